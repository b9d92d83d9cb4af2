//! The testbed by itself, before any mesh: what the other suites stand on.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test: a panic is its failure, and standard output its report"
)]

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use mesh_tests::app::{App, CLOSED_PORT, ECHO_PORT};
use mesh_tests::binaries;
use mesh_tests::firewall;
use mesh_tests::process::Process;
use mesh_tests::suite;
use mesh_tests::topology::{NodeName, Topology};
use mesh_tests::wire::Recorder;

struct Bed {
    _server: Process,
    app: App,
    topology: Topology,
}

fn main() -> ExitCode {
    suite::run(
        "topology",
        || {
            let mut topology = Topology::create()?;
            topology.add_pod("client", NodeName::One, 10)?;
            topology.add_pod("server", NodeName::Two, 20)?;
            let app = App::install(&binaries::path("mesh-test-app")?, topology.folder())?;
            let server = app.serve(
                "server",
                &topology.pod("server").place(),
                topology.folder().join("server.log"),
            )?;
            Ok(Bed {
                _server: server,
                app,
                topology,
            })
        },
        |_, error| error,
        &[
            ("pods_of_two_nodes_reach_each_other", reach_each_other),
            ("applications_are_unprivileged_in_their_own_cgroup", unprivileged),
            ("the_wire_shows_plaintext", wire_shows_plaintext),
            ("the_search_for_firewall_rules_finds_one", firewall_is_seen),
        ],
    )
}

fn reach_each_other(bed: &mut Bed) -> Result<()> {
    let (client, server) = (bed.topology.pod("client"), bed.topology.pod("server"));
    for address in server.forms() {
        let from = client.own_address(address);
        let body = bed.app.get(&client.place(), address, "/")?;
        ensure!(
            body.contains(&format!("client={from} ")),
            "expected the client {from}, saw {body}"
        );
        bed.app.connect(&client.place(), address, ECHO_PORT)?.expect_ok()?;
        bed.app
            .connect(&client.place(), address, CLOSED_PORT)?
            .expect_refused(Duration::from_secs(1))?;
        let bulk = bed.app.bulk(&client.place(), address, 1 << 20)?;
        ensure!(bulk["sent_sha256"] == bulk["received_sha256"], "{bulk}");
    }
    Ok(())
}

fn unprivileged(bed: &mut Bed) -> Result<()> {
    let client = bed.topology.pod("client");
    let output = client.place().run(
        "/bin/sh".as_ref(),
        &["-c", "id -u; cat /proc/self/cgroup"],
        Duration::from_secs(5),
    )?;
    let text = output.ok("the shell")?;
    ensure!(text.starts_with("65534\n"), "{text}");
    ensure!(
        text.lines()
            .any(|line| line.starts_with("0::") && line.ends_with("/pod-client")),
        "{text}"
    );
    Ok(())
}

fn firewall_is_seen(bed: &mut Bed) -> Result<()> {
    let (with, without) = (&bed.topology.pod("client").netns, &bed.topology.pod("server").netns);
    firewall::add_table(with, "a-table").map_err(|error| suite::skip(&format!("no nftables in this kernel: {error:#}")))?;
    let seen = firewall::tables(with)?;
    ensure!(seen == ["nftables a-table"], "expected the table made just now, saw {seen:?}");
    let seen = firewall::tables(without)?;
    ensure!(seen.is_empty(), "expected no table in another namespace, saw {seen:?}");
    Ok(())
}

fn wire_shows_plaintext(bed: &mut Bed) -> Result<()> {
    let (client, server) = (bed.topology.pod("client"), bed.topology.pod("server"));
    let recorder = Recorder::start(&bed.topology.node(NodeName::One).netns, "uplink")?;
    bed.app.get(&client.place(), server.v4.into(), "/a-marker-in-clear")?;
    let recording = recorder.finish()?;
    ensure!(
        recording.contains(b"a-marker-in-clear"),
        "the marker is not among {} frames",
        recording.frames
    );
    ensure!(!recording.contains(b"another-marker"), "a marker that nobody sent");
    Ok(())
}
