//! Pods that join and leave the mesh by the control plane's word: found while they run, enrolled as they are, released as they were.

#[path = "enrolment/cni.rs"]
mod cni;
#[path = "enrolment/live.rs"]
mod live;

use std::process::ExitCode;

use mesh_tests::mesh::{Mesh, PodSpec};
use mesh_tests::suite;
use mesh_tests::topology::NodeName;

/// One that somebody has enrolled by hand, and one outside.
const PODS: [PodSpec; 2] = [
    PodSpec::new("client", NodeName::One, 11, true),
    PodSpec::new("outsider", NodeName::One, 12, false),
];

fn main() -> ExitCode {
    suite::run(
        "enrolment",
        || {
            let mut mesh = Mesh::start(&PODS, &mut |_| {})?;
            for node in NodeName::ALL {
                mesh.terminate_agent(node)?;
                mesh.launch_agent_with(node, &["--follow-pods"])?;
                mesh.wait_until_ready(node)?;
            }
            Ok(mesh)
        },
        Mesh::with_logs,
        &[
            (
                "a_pod_that_runs_is_enrolled_live_and_released_as_it_was",
                live::joins_and_leaves,
            ),
            (
                "what_is_said_while_a_pod_leaves_an_agent_that_ends_is_never_in_clear",
                live::leaves_an_agent_that_ends,
            ),
            ("a_release_that_fails_is_completed_before_anything_else", live::release_fails),
            ("a_process_of_a_pod_in_anothers_namespace_enrols_nothing", live::wrong_pairing),
            ("a_namespace_that_a_pod_makes_with_its_address_is_no_pods", live::decoy),
            ("what_cannot_be_enrolled_is_said", live::refused),
            ("the_plugin_answers_once_the_pod_is_in_the_mesh", cni::add_check_del),
            ("without_an_agent_only_pods_of_the_mesh_do_not_start", cni::without_agent),
            ("a_pod_that_gets_no_certificate_does_not_start", cni::without_certificate),
            ("a_namespace_brought_with_anothers_uid_is_not_enrolled", cni::wrong_pairing),
            ("the_plugin_is_installed_kept_and_removed", cni::installed),
        ],
    )
}
