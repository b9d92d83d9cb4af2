//! What the writing of statuses meets.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use mesh_tests::kube::faults::{Fault, Target};
use mesh_tests::poll;

use crate::Bench;
use crate::control::{Control, PATIENCE, let_pass};

/// One that writes.
fn writer(bench: &Bench) -> Result<Control> {
    let control = Control::start(bench)?;
    poll::until_true("it holds the Lease of who writes", PATIENCE, || {
        Ok(control.metrics.status_writer.get() == 1)
    })?;
    Ok(control)
}

fn is_accepted(bench: &Bench, kind: &str, name: &str) -> Result<bool> {
    let object = bench.server.kubectl().get(&["-n", "shop", kind, name])?;
    Ok(object["status"]["conditions"][0]["status"] == "True")
}

fn until_accepted(bench: &Bench, kind: &str, name: &str) -> Result<()> {
    poll::until_true(&format!("{kind} {name} has its status"), PATIENCE, || {
        is_accepted(bench, kind, name)
    })
}

pub fn patience(bench: &mut Bench) -> Result<()> {
    const ASKED: u32 = 6;
    let control = writer(bench)?;
    let busy = control.metrics.status_writes_failed.with_label_values(&["busy"]);
    for code in [429, 503] {
        let (began, before, name) = (Instant::now(), busy.get(), format!("status-{code}"));
        control.proxy.break_with(Target::Statuses, Fault::RetryAfter(code, ASKED));
        bench.policy(&name)?;
        control.until_policy(&name)?;
        poll::until_true("it was tried again", PATIENCE, || Ok(busy.get() >= before + 3))?;
        let tries = control.proxy.seen(Target::Statuses, "", began);
        for (one, next) in tries.iter().zip(tries.iter().skip(1)) {
            let pause = next.at - one.at;
            ensure!(
                pause >= Duration::from_secs(ASKED.into()),
                "asked for {ASKED} s of patience after {code}, a status came after {pause:?}"
            );
        }
        ensure!(!is_accepted(bench, "authorizationpolicy", &name)?, "the fault met nobody");
        let waiting = &control.metrics.status_writes_waiting;
        ensure!(waiting.get() > 0, "what waits is not counted");
        control.proxy.heal();
        until_accepted(bench, "authorizationpolicy", &name)?;
        poll::until_true("nothing waits any longer", PATIENCE, || Ok(waiting.get() == 0))?;
    }
    Ok(())
}

/// By the API server, and by a webhook that fails, for which it answers 500.
pub fn refused(bench: &mut Bench) -> Result<()> {
    let control = writer(bench)?;
    let kubectl = bench.server.kubectl();
    for (code, reason) in [(422, "refused"), (500, "trouble")] {
        let began = Instant::now();
        control.proxy.break_of(Target::Statuses, "meshconfigs", Fault::Status(code));
        kubectl.apply(
            "apiVersion: culvert.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: default, namespace: shop}\nspec: {mtls: Permissive}\n",
        )?;
        let refused = control.metrics.status_writes_failed.with_label_values(&[reason]);
        poll::until_true("it is refused", PATIENCE, || Ok(refused.get() > 0))?;
        for number in 0..3 {
            let name = format!("status-beside-{code}-{number}");
            bench.policy(&name)?;
            until_accepted(bench, "authorizationpolicy", &name)?;
        }
        let_pass(began, Duration::from_secs(20));
        let tries = control.proxy.seen(Target::Statuses, "meshconfigs", began).len();
        ensure!(tries == 1, "a status that was answered {code} was tried {tries} times");
        control.proxy.heal();
        // Another version of the object need not wait for the minute to be over.
        kubectl.run(&["-n", "shop", "annotate", "meshconfig", "default", "example.com/changed=yes"])?;
        until_accepted(bench, "meshconfig", "default")?;
        println!("written {:?} after it was answered {code} first", began.elapsed());
        kubectl.run(&["-n", "shop", "delete", "meshconfig", "default"])?;
    }
    Ok(())
}

/// What this replica's agents enforce changes all the time.
pub fn leases(bench: &mut Bench) -> Result<()> {
    let control = writer(bench)?;
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(12) {
        for name in ["leases-1", "leases-2"] {
            bench.policy(name)?;
            bench
                .server
                .kubectl()
                .run(&["-n", "shop", "delete", "authorizationpolicy", name])?;
        }
    }
    // Read, elected by two, told: each once in the pace of 2 s.
    let asked = control.proxy.seen(Target::Everything, "leases", began).len();
    let most = 4 * (began.elapsed().as_secs() as usize / 2 + 2);
    ensure!(
        asked > 4 && asked <= most,
        "{asked} requests for Leases in {:?}",
        began.elapsed()
    );
    Ok(())
}
