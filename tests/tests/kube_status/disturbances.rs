//! Nodes, API servers and replicas that go away.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use mesh_tests::poll;

use crate::{Bench, Control, NAMESPACE, NODES, PATIENCE, ROUNDS, SHOP, Said, lease, policy, writer};

/// Longer than what a replica tells counts, and than a Lease holds.
const OUTAGE: Duration = Duration::from_secs(36);

pub fn node_gone(bench: &mut Bench) -> Result<()> {
    let before = bench.until("both nodes", "deny", |said| said.nodes == Some(2))?;
    // Its agent is gone.
    drop(bench.agents.pop());
    let one = bench.until("the node counts no longer", "deny", |said| said.nodes == Some(1))?;
    ensure!(one.since == before.since && one.reason == "Accepted", "{one:?}");
    let agent = bench.agent(1, 1)?;
    bench.agents.push(agent);
    bench.until("it is back", "deny", |said| said.nodes == Some(2))?;
    // It is no node of the cluster's any more, whatever its agent says.
    bench.run(&["delete", "node", NODES[1]])?;
    bench.until("a node that was deleted counts no longer", "deny", |said| {
        said.nodes == Some(1)
    })?;
    bench.apply(&format!("{{apiVersion: v1, kind: Node, metadata: {{name: {}}}}}", NODES[1]))?;
    bench.until("it is back", "deny", |said| said.nodes == Some(2)).map(drop)
}

pub fn away(bench: &mut Bench) -> Result<()> {
    let before = bench.until("both nodes", "deny", |said| said.nodes == Some(2))?;
    bench.server.stop();
    let began = Instant::now();
    // Until long after everything would have run out, had it been the replicas' fault.
    let without = poll::until_true("nobody writes", PATIENCE, || {
        let mut failures = 0.0;
        for control in bench.controls.iter_mut().flatten() {
            control.0.process.check_running()?;
            if control.is_writer()? {
                return Ok(false);
            }
            failures += control.metric("mesh_control_lease_failures_total", "election")?;
        }
        Ok(failures >= 8.0 && began.elapsed() > OUTAGE)
    });
    bench.server.resume()?;
    without?;
    let mut seen = Seen::new(&before);
    bench.apply(&policy("after", "web", "83"))?;
    poll::until_true("a policy that came later has its status", PATIENCE, || {
        seen.look(bench)?;
        let said = bench.status("after")?;
        Ok(said.nodes == Some(2) && said.reason == "Accepted")
    })?;
    seen.nothing_changed()?;
    writer(bench)?;
    bench.run(&["-n", SHOP, "delete", "authorizationpolicy", "after"]).map(drop)
}

pub fn killed_reader(bench: &mut Bench) -> Result<()> {
    let before = bench.until("both nodes", "deny", |said| said.nodes == Some(2))?;
    let writing = writer(bench)?;
    let place = 1 - writing;
    if let Some(control) = bench.controls[place].take() {
        control.0.process.kill();
    }
    let mut seen = Seen::new(&before);
    // Its agent goes to the other one, within the time for which the dead one's word counts.
    let agent = bench.agent(place, writing)?;
    bench.agents[place] = agent;
    seen.nothing_changes_while_the_dead_one_is_forgotten(bench)?;
    ensure!(writer(bench)? == writing, "the Lease went to another one");
    let again = Control::start(&bench.server, &bench.kubeconfig, "mesh-control-again")?;
    bench.controls[place] = Some(again);
    let agent = bench.agent(place, place)?;
    bench.agents[place] = agent;
    bench.until("both nodes", "deny", |said| said.nodes == Some(2)).map(drop)
}

pub fn killed(bench: &mut Bench) -> Result<()> {
    let before = bench.until("both nodes", "deny", |said| said.nodes == Some(2))?;
    let place = writer(bench)?;
    let other = 1 - place;
    let holder = lease(bench)?["spec"]["holderIdentity"].clone();
    if let Some(control) = bench.controls[place].take() {
        control.0.process.kill();
    }
    let mut seen = Seen::new(&before);
    // While nobody writes; and its agent goes to the other one, as kube-proxy would have it.
    bench.apply(&policy("orphan", "db", "84"))?;
    let agent = bench.agent(place, other)?;
    bench.agents[place] = agent;
    poll::until_true("the other one writes", PATIENCE, || {
        seen.look(bench)?;
        bench.control(other)?.is_writer()
    })?;
    poll::until_true("what was made meanwhile has its status", PATIENCE, || {
        seen.look(bench)?;
        Ok(bench.status("orphan")?.nodes == Some(2))
    })?;
    ensure!(
        lease(bench)?["spec"]["holderIdentity"] != holder,
        "the dead one holds the Lease"
    );
    seen.nothing_changes_while_the_dead_one_is_forgotten(bench)?;
    // Another one takes its place, and does not take the Lease from who holds it.
    let again = Control::start(&bench.server, &bench.kubeconfig, "mesh-control-3")?;
    bench.controls[place] = Some(again);
    poll::until_true("the new one has told of itself", PATIENCE, || Ok(replicas(bench)? == 2))?;
    ensure!(writer(bench)? == other, "the new replica writes, too");
    // One that ends as it should lets the Lease go: the other one need not wait for it.
    if let Some(control) = bench.controls[other].take() {
        control.0.process.terminate(PATIENCE)?;
    }
    let holder = lease(bench)?["spec"]["holderIdentity"].clone();
    let new_holds = bench.control(place)?.is_writer()?;
    ensure!(holder == "" || new_holds, "the Lease was not let go: {holder}");
    poll::until_true("the new one writes", PATIENCE, || bench.control(place)?.is_writer())?;
    bench.run(&["-n", SHOP, "delete", "authorizationpolicy", "orphan"]).map(drop)
}

fn replicas(bench: &Bench) -> Result<usize> {
    let leases = bench
        .server
        .kubectl()
        .get(&["-n", NAMESPACE, "leases", "-l", "culvert.dev/replica=true"])?;
    Ok(leases["items"].as_array().map_or(0, Vec::len))
}

/// Every status of a policy that was seen, of one that must stay as it is.
struct Seen {
    before: Said,
    others: Vec<Said>,
    looks: usize,
}

impl Seen {
    fn new(before: &Said) -> Self {
        Self {
            before: before.clone(),
            others: Vec::new(),
            looks: 0,
        }
    }

    fn look(&mut self, bench: &Bench) -> Result<()> {
        let said = bench.status("deny")?;
        self.looks += 1;
        if said != self.before && !self.others.contains(&said) {
            self.others.push(said);
        }
        Ok(())
    }

    /// Until what a dead replica has told runs out, and some rounds after.
    fn nothing_changes_while_the_dead_one_is_forgotten(&mut self, bench: &Bench) -> Result<()> {
        poll::until_true("nothing is left of the dead one", PATIENCE, || {
            self.look(bench)?;
            Ok(replicas(bench)? == 1)
        })?;
        let gone = Instant::now();
        poll::until_true("the statuses were compared since", PATIENCE, || {
            self.look(bench)?;
            Ok(gone.elapsed() > ROUNDS)
        })?;
        self.nothing_changed()
    }

    fn nothing_changed(&self) -> Result<()> {
        println!("the status was read {} times", self.looks);
        ensure!(self.others.is_empty(), "it was {:?}, and then {:?}", self.before, self.others);
        Ok(())
    }
}
