//! An API server that is away, or says no.

use std::time::Duration;

use anyhow::{Result, ensure};
use mesh_control::capture_states::Proof;
use mesh_tests::poll::{self, SOON};

use crate::{ADDRESSES, Bench, POLICIES, policy, resource, told};

/// Longer than the longest pause between two tries, twice.
const PATIENCE: Duration = Duration::from_secs(60);

pub fn lost(bench: &mut Bench) -> Result<()> {
    bench.install_kinds()?;
    bench.namespace("lost")?;
    bench.pod("lost", "a", &["10.244.4.1"])?;
    bench.apply(&policy("lost", "deny", "80"))?;
    let replica = bench.replica()?;
    let control = &replica.control;
    let lost = bench.word("lost", "a", Proof::Lost)?;
    control.set_report("node-a", bench.word("lost", "a", Proof::Proven)?);
    replica.until("lost/a", "proven")?;
    let before = told(&control.snapshot());
    bench.server.stop();
    poll::until_true("the loss is said", SOON, || {
        let problem = control.registry_problem().unwrap_or_default();
        Ok(problem.contains("Pod") && problem.contains("Namespace") && control.metrics.registry_stale.get() == 1)
    })?;
    ensure!(told(&control.snapshot()) == before, "what was read is in force no longer");
    // What closes counts at once; it is written when that can be.
    control.set_report("node-a", lost);
    replica.until("lost/a", "lost")?;
    let lists = || control.metrics.lists.with_label_values(&["Pod"]).get();
    let lists_before = lists();
    bench.server.resume()?;
    bench.pod("lost", "b", &["10.244.4.2"])?;
    bench.run(&["-n", "lost", "delete", "authorizationpolicy", "deny"])?;
    poll::until_true("what has changed meanwhile arrives", PATIENCE, || {
        Ok(
            resource(control, ADDRESSES, "Kubernetes//Pod/lost/b").is_some()
                && resource(control, POLICIES, "lost/deny").is_none(),
        )
    })?;
    poll::until_true("nothing is said any longer", PATIENCE, || {
        Ok(control.registry_problem().is_none())
    })?;
    poll::until_true("what the agent said meanwhile is written", PATIENCE, || {
        Ok(bench.annotation("lost", "a")?.as_deref() == Some("lost"))
    })?;
    ensure!(replica.state("lost/a") == "lost");
    ensure!(lists() <= lists_before + 2, "a storm of lists: {}", lists() - lists_before);
    Ok(())
}

pub fn forbidden(bench: &mut Bench) -> Result<()> {
    let kubeconfig = bench.server.kubeconfig_of("nobody", &[])?;
    let replica = bench.replica_by(&kubeconfig)?;
    poll::until_true("what is forbidden is said", SOON, || {
        let problem = replica.control.registry_problem().unwrap_or_default();
        Ok(problem.contains("403") && problem.contains("Pod"))
    })?;
    // Long enough for it to publish, if it did.
    poll::until_true("it has tried several times", SOON, || {
        let failures = &replica.control.metrics.watch_failures;
        Ok(failures.with_label_values(&["Pod"]).get() >= 4)
    })?;
    ensure!(!replica.control.is_ready(), "nothing is known");
    ensure!(replica.control.snapshot().types.is_empty());
    Ok(())
}
