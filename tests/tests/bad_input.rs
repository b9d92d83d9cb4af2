//! What an operator, a tenant or a machine may put before the binaries: a clear message or a counted refusal, and nothing else breaks.

#[path = "bad_input/disk.rs"]
mod disk;
#[path = "bad_input/ipv6.rs"]
mod ipv6;
#[path = "bad_input/machine.rs"]
mod machine;
#[path = "bad_input/names.rs"]
mod names;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::demo::PODS;
use mesh_tests::mesh::Mesh;
use mesh_tests::suite;

/// Where the agent first waits for something better.
const PATIENTLY: Duration = Duration::from_secs(40);

struct Shared {
    mesh: Mesh,
}

fn main() -> ExitCode {
    suite::run(
        "bad_input",
        || {
            Ok(Shared {
                mesh: Mesh::start(&PODS, &mut |_| {})?,
            })
        },
        |shared, error| shared.mesh.with_logs(error),
        &[
            ("hostile_names_stay_inside_their_line_and_field", names::hostile),
            ("a_name_of_253_characters_is_a_name", names::longest),
            ("a_folder_that_is_no_bpffs_is_refused", machine::no_bpffs),
            ("too_few_descriptors_are_told_with_numbers", machine::few_descriptors),
            ("programs_of_others_at_the_cgroup_go_on", machine::others_programs),
            ("a_cgroup_that_somebody_has_alone_is_told", machine::exclusive_program),
            ("a_full_disk_under_the_control_plane", disk::control_plane),
            ("a_full_disk_under_the_agent", disk::agent),
            ("a_pod_without_ipv6_is_in_the_mesh", ipv6::of_pod),
            // Takes the addresses of a node.
            ("a_node_without_ipv6_goes_on_by_ipv4", ipv6::of_node),
        ],
    )
}

fn size(log: &Path) -> Result<usize> {
    Ok(usize::try_from(std::fs::metadata(log)?.len())?)
}

/// What was written since.
fn since(log: &Path, position: usize) -> Result<String> {
    let bytes = std::fs::read(log)?;
    let new = bytes.get(position..).context("the log has become shorter")?;
    Ok(String::from_utf8_lossy(new).into_owned())
}

fn expect_words(text: &str, words: &[&str]) -> Result<()> {
    for word in words {
        ensure!(text.contains(word), "expected {word:?}, saw {text}");
    }
    Ok(())
}
