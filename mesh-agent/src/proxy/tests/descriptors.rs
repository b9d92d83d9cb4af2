//! A node without descriptors: who is connected goes on, who comes waits, and each failed accept is counted.

use std::fs::File;
use std::process::Command;

use nix::sys::resource::{Resource, setrlimit};

use super::*;

/// Set in the process that has few descriptors: its limit is the whole process's, and the other tests need theirs.
const CHILD: &str = "CULVERT_TEST_FEW_DESCRIPTORS";
const NAME: &str = "proxy::tests::descriptors::without_descriptors_accepts_fail_and_are_counted_and_tried_again";
const FEW: u64 = 256;

#[test]
fn without_descriptors_accepts_fail_and_are_counted_and_tried_again() {
    if std::env::var_os(CHILD).is_some() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        return runtime.block_on(with_few_descriptors());
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    let child = command
        .args([NAME, "--exact", "--nocapture"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout);
    let errors = String::from_utf8_lossy(&child.stderr);
    assert!(child.status.success() && said.contains("1 passed"), "{said}\n{errors}");
}

async fn with_few_descriptors() {
    setrlimit(Resource::RLIMIT_NOFILE, FEW, FEW).unwrap();
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let server = mesh.pod(&mesh.far, "server").await;
    let _echo = server.echo().await;
    let mut open = client.connect(server.application()).await;
    assert_echo(&mut open, "before").await;
    assert_eq!(failed_accepts(&mesh), 0);

    let mut taken = Vec::new();
    while let Ok(file) = File::open("/dev/null") {
        taken.push(file);
    }
    // The client's own; none is left for its agent.
    taken.pop().unwrap();
    let mut waiting = client.connect(server.application()).await;
    until("failed accepts are counted, again and again", || failed_accepts(&mesh) >= 3).await;
    assert_echo(&mut open, "meanwhile").await;

    drop(taken);
    assert_echo(&mut waiting, "accepted at last").await;
    assert_echo(&mut open, "after").await;
}

fn failed_accepts(mesh: &Mesh) -> u64 {
    let text = mesh.near.metrics.render();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("mesh_accept_errors_total{listener=\"outbound\"} "));
    line.map_or(0, |count| count.parse().unwrap())
}
