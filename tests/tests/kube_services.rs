//! Every kind of Service and of Pod, in the mesh on a real cluster, behaves as it does without one.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test: a panic is its failure, and standard output its report"
)]

#[path = "kube_services/ends.rs"]
mod ends;
#[path = "kube_services/kinds.rs"]
mod kinds;
#[path = "kube_services/membership.rs"]
mod membership;
#[path = "kube_services/outside.rs"]
mod outside;
#[path = "kube_services/world.rs"]
mod world;

use std::process::ExitCode;

use mesh_tests::suite;
use world::World;

fn main() -> ExitCode {
    suite::run(
        "kube_services",
        World::start,
        World::with_logs,
        &[
            ("services_of_every_kind_are_carried", kinds::every_kind),
            ("named_ports_are_each_pods_own", kinds::named_ports),
            ("a_client_keeps_its_endpoint", kinds::affinity),
            ("a_service_of_the_node_stays_on_it", kinds::node_local),
            ("udp_goes_as_it_went", kinds::udp),
            ("init_containers_and_sidecars_are_in_the_mesh", membership::first_containers),
            ("a_pod_that_asks_out_is_out", membership::asks_out),
            ("pods_made_while_their_namespace_is_labelled_join", membership::race),
            ("what_another_mesh_or_a_machine_has_is_refused", membership::refused),
            ("a_label_on_what_the_mesh_stands_on_is_ignored_and_told", membership::kept_out),
            ("a_pod_with_a_user_namespace", membership::user_namespace),
            ("a_job_ends_and_is_forgotten", ends::job),
            ("a_terminating_pod_lives_until_it_ends", ends::terminating),
            ("exec_logs_and_port_forward_work", outside::kubectl),
            ("what_comes_from_outside_is_plaintext_under_policy", outside::permissive),
            ("strict_refuses_what_comes_from_outside", outside::strict),
        ],
    )
}
