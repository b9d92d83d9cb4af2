//! Takeovers between versions that end half-way.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use mesh_tests::app::ECHO_PORT;
use mesh_tests::binaries::Build;
use mesh_tests::bpf;
use mesh_tests::mesh::{Mesh, PodSpec};
use mesh_tests::poll::{self, SOON};
use mesh_tests::topology::NodeName;

use super::{
    LONG_DRAIN, METRIC, PATIENTLY, Shared, begin, begin_all, expect_traces, log_of, pins, pods_of, said_since, traces,
    wait_until_alone,
};
use mesh_tests::load::Load;

const NODE: NodeName = NodeName::One;

/// How far the next agent is.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// It makes its maps.
    Maps,
    /// It has filled them, and puts its programs into the links.
    Filled,
    /// Its programs are in the node's links, and it takes over the Pods.
    Attached,
}

/// The last of the node's links to be given the next agent's program; the Pods', which take far longer, come after it.
const LAST_LINK: &str = "links/socket_create";

/// Launches an agent of that build, and returns at that moment, or some milliseconds later.
fn launch_until(mesh: &mut Mesh, next: Build, moment: Moment) -> Result<()> {
    let log = log_of(mesh, NODE);
    let position = std::fs::metadata(&log)?.len();
    let (maps, link) = (
        pins(mesh, NODE).join(format!("abi{}", next.abi_version())),
        pins(mesh, NODE).join(LAST_LINK),
    );
    let before = bpf::program_in(&link)?;
    mesh.agent_build = next;
    mesh.launch_agent_with(NODE, &LONG_DRAIN)?;
    let is_here = || {
        Ok::<_, anyhow::Error>(match moment {
            Moment::Maps => maps.exists(),
            Moment::Filled => said_since(&log, position)?.contains("a map of another ABI version is taken over"),
            Moment::Attached => bpf::program_in(&link)? != before,
        })
    };
    let start = Instant::now();
    while !is_here()? {
        if start.elapsed() > SOON {
            bail!("the next agent does not come to {moment:?}");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// What the programs in the node's links look into is this build's again, and nothing of the other is left.
fn expect_programs_of(mesh: &Mesh, build: Build, links: usize) -> Result<()> {
    wait_until_alone(mesh, NODE, build)?;
    let map: OwnedFd = bpf::open(&pods_of(mesh, NODE, build))?;
    let mut last = 0;
    poll::until_true("every link has a program of the agent that goes on", PATIENTLY, || {
        last = bpf::users(&map)?.1;
        Ok(last == links)
    })
    .with_context(|| format!("{last} links look into its PODS, of {links}"))
}

pub fn successor_killed(shared: &mut Shared) -> Result<()> {
    let mesh = &mut shared.mesh;
    for (running, next, moments) in [
        (
            Build::This,
            Build::Other,
            &[Moment::Maps, Moment::Filled, Moment::Attached][..],
        ),
        (Build::Other, Build::This, &[Moment::Attached][..]),
    ] {
        begin_all(mesh, running)?;
        let before = traces(mesh, NODE, running)?;
        let links = bpf::users(&bpf::open(&pods_of(mesh, NODE, running))?)?.1;
        let load = Load::start(mesh, "client", "server")?;
        let mut chat = mesh.app.chat(&mesh.pod("client").place(), mesh.pod("server").v4.into())?;
        let repaired = |mesh: &Mesh| mesh.metric(NODE, METRIC, &[("event", "repaired")]);
        let repaired_before = repaired(mesh)?;
        for moment in moments {
            let at = format!("{next:?} is killed at {moment:?}");
            let mut agent = mesh.take_agent(NODE)?;
            let log = log_of(mesh, NODE);
            let position = std::fs::metadata(&log)?.len();
            launch_until(mesh, next, *moment).context(at.clone())?;
            mesh.kill_agent(NODE);
            if matches!(moment, Moment::Attached) {
                // Before it lets any Pod change: not by a repair some time later.
                let goes_on = poll::until("the running agent goes on", SOON, || {
                    let said = said_since(&log, position)?;
                    Ok(said.find("no handover; this agent goes on").map(|end| said[..end].to_owned()))
                })?;
                ensure!(
                    goes_on.contains("the programs are this one's again"),
                    "{at}: it goes on with the other's programs: {goes_on}"
                );
            }
            agent.check_running().context("the running agent has ended as well")?;
            mesh.put_agent(NODE, agent);
            expect_programs_of(mesh, running, links).context(at.clone())?;
            let told = repaired(mesh)? - repaired_before;
            ensure!(
                told == 0.0,
                "{at}: the takeover is told as {told} pieces that somebody took away"
            );
            ensure!(chat.ask("still", SOON)? == "still", "{at}");
            load.wait_for(200).context(at.clone())?;
            // A Pod that is new is seen by the programs: it is not open, and is proven.
            let spec = PodSpec::new("passing", NODE, 50, true);
            mesh.add_pod(&spec).context(at.clone())?;
            mesh.wait_for_tunnel("passing", "server").context(at.clone())?;
            mesh.delete_pod("passing").context(at.clone())?;
        }
        drop(chat);
        let (worked, failures) = load.finish()?;
        ensure!(failures.is_empty(), "{failures:?} beside {worked} connections");
        expect_traces(mesh, NODE, running, &before)?;
    }
    Ok(())
}

pub fn both_killed(shared: &mut Shared) -> Result<()> {
    let mesh = &mut shared.mesh;
    begin(mesh, NodeName::Two, Build::This)?;
    for (running, next, last, moment) in [
        (Build::This, Build::Other, Build::This, Moment::Attached),
        (Build::This, Build::Other, Build::Other, Moment::Filled),
        (Build::Other, Build::This, Build::Other, Moment::Attached),
    ] {
        let how = format!("from {running:?} to {next:?}, both killed at {moment:?}, then {last:?}");
        begin(mesh, NODE, last)?;
        let before = traces(mesh, NODE, last)?;
        begin(mesh, NODE, running)?;
        mesh.wait_for_tunnel("client", "server")?;
        let agent = mesh.take_agent(NODE)?;
        launch_until(mesh, next, moment).context(how.clone())?;
        agent.kill();
        mesh.kill_agent(NODE);
        for address in mesh.pod("server").forms() {
            let attempt = mesh.app.connect(&mesh.pod("client").place(), address, ECHO_PORT)?;
            attempt.expect_refused(PATIENTLY).context(how.clone())?;
        }
        begin(mesh, NODE, last).context(how.clone())?;
        mesh.wait_for_tunnel("client", "server").context(how.clone())?;
        mesh.wait_for_tunnel("server", "client").context(how.clone())?;
        expect_traces(mesh, NODE, last, &before).context(how)?;
    }
    begin_all(mesh, Build::This)
}
