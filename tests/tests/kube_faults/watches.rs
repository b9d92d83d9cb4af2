//! What lists and watches meet.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use mesh_control::limits::MAX_ANSWER_BYTES;
use mesh_tests::kube::faults::{Fault, Target};
use mesh_tests::poll;

use crate::Bench;
use crate::control::{Control, PATIENCE, let_pass, proxy};

/// In which requests are counted.
const WINDOW: Duration = Duration::from_secs(10);
/// Pauses of 0.1, 0.2, 0.4, 0.8, 1.6, 3.2 and 6.4 s, were each as short as it may be, are seven tries in that time.
const MOST_TRIES: usize = 8;
const KINDS: [&str; 9] = [
    "namespaces",
    "nodes",
    "pods",
    "services",
    "endpointslices",
    "serviceaccounts",
    "authorizationpolicies",
    "meshconfigs",
    "networkpolicies",
];

pub fn gone(bench: &mut Bench) -> Result<()> {
    let control = Control::start(bench)?;
    let followed = control.followed(bench, "gone")?;
    for (policy, fault) in [("gone-1", Fault::Status(410)), ("gone-2", Fault::ErrorEvent(410))] {
        let (began, lists) = (Instant::now(), control.lists_of("Pod"));
        control.proxy.break_with(Target::Watches, fault);
        poll::until_true("the list is read again", PATIENCE, || Ok(control.lists_of("Pod") > lists))?;
        // Lists work: what changes is known all the same.
        bench.policy(policy)?;
        control.until_policy(policy)?;
        let_pass(began, WINDOW);
        let counted = began.elapsed();
        for kind in KINDS {
            let lists = control.proxy.seen(Target::Lists, kind, began).len();
            let most = MOST_TRIES + counted.saturating_sub(WINDOW).as_secs() as usize / 7;
            ensure!(lists <= most, "a storm: {lists} lists of {kind} in {counted:?}");
        }
        control.proxy.heal();
        control.until_well()?;
    }
    followed.ensure_uncut()
}

pub fn patience(bench: &mut Bench) -> Result<()> {
    const ASKED: u32 = 6;
    let control = Control::start(bench)?;
    let followed = control.followed(bench, "patience")?;
    let lists = control.lists_of("Pod");
    for code in [429, 503] {
        let began = Instant::now();
        control.proxy.break_with(Target::Watches, Fault::RetryAfter(code, ASKED));
        control.until_said(&[&code.to_string(), "asks to be left alone for 6 s"])?;
        let_pass(began, 3 * Duration::from_secs(ASKED.into()));
        for kind in KINDS {
            let asked = control.proxy.seen(Target::Watches, kind, began);
            for (one, next) in asked.iter().zip(asked.iter().skip(1)) {
                let pause = next.at - one.at;
                ensure!(
                    pause >= Duration::from_secs(ASKED.into()),
                    "asked for {ASKED} s of patience after {code}, watches of {kind} came after {pause:?}"
                );
            }
        }
        bench.policy(&format!("patience-{code}"))?;
        control.proxy.heal();
        control.until_policy(&format!("patience-{code}"))?;
        control.until_well()?;
    }
    ensure!(
        control.lists_of("Pod") == lists,
        "who has too much to do was asked for a list"
    );
    followed.ensure_uncut()
}

pub fn trouble(bench: &mut Bench) -> Result<()> {
    let control = Control::start(bench)?;
    let followed = control.followed(bench, "trouble")?;
    for (code, fault) in [
        ("500", Fault::Status(500)),
        ("503", Fault::Status(503)),
        ("500", Fault::ErrorEvent(500)),
    ] {
        let before = control.control().snapshot();
        let (began, lists) = (Instant::now(), control.lists_of("Pod"));
        let failures = control.metrics.watch_failures.with_label_values(&["Pod"]).get();
        let target = if matches!(fault, Fault::ErrorEvent(_)) {
            Target::Watches
        } else {
            Target::Everything
        };
        control.proxy.break_with(target, fault);
        control.until_said(&[code, "Pod"])?;
        let_pass(began, WINDOW);
        let counted = began.elapsed();
        for kind in KINDS {
            let read = |target| control.proxy.seen(target, kind, began).len();
            let asked = read(Target::Lists) + read(Target::Watches);
            let most = MOST_TRIES + counted.saturating_sub(WINDOW).as_secs() as usize / 7;
            ensure!(asked <= most, "a storm: {asked} requests for {kind} in {counted:?}");
        }
        ensure!(control.lists_of("Pod") == lists, "who is in trouble was asked for a list");
        ensure!(control.metrics.watch_failures.with_label_values(&["Pod"]).get() > failures);
        let same = control
            .control()
            .snapshot()
            .types
            .values()
            .map(|of| of.version.clone())
            .collect::<Vec<_>>()
            == before.types.values().map(|of| of.version.clone()).collect::<Vec<_>>();
        ensure!(same, "what was read is in force no longer");
        control.proxy.heal();
        control.until_well()?;
    }
    bench.policy("trouble")?;
    control.until_policy("trouble")?;
    followed.ensure_uncut()
}

pub fn hang(bench: &mut Bench) -> Result<()> {
    let control = Control::start(bench)?;
    let followed = control.followed(bench, "hang")?;
    let began = Instant::now();
    control.proxy.break_with(Target::Everything, Fault::Hang);
    control.until_said(&["no answer within", "Pod", "AuthorizationPolicy"])?;
    let asked = control.proxy.seen(Target::Everything, "pods", began).len();
    ensure!(asked <= MOST_TRIES, "a storm: {asked} requests");
    followed.ensure_uncut()?;
    bench.policy("hang")?;
    control.proxy.heal();
    control.until_policy("hang")?;
    control.until_well()?;
    followed.ensure_uncut()
}

pub fn silent(bench: &mut Bench) -> Result<()> {
    let control = Control::start(bench)?;
    let lists = control.lists_of("AuthorizationPolicy");
    control.proxy.break_with(Target::Watches, Fault::Silent);
    bench.policy("silent")?;
    control.until_said(&["nothing is heard of it", "AuthorizationPolicy"])?;
    // Though watches never tell: the list does.
    control.until_policy("silent")?;
    ensure!(control.lists_of("AuthorizationPolicy") > lists);
    control.proxy.heal();
    control.until_well()
}

pub fn cut(bench: &mut Bench) -> Result<()> {
    let control = Control::start(bench)?;
    let followed = control.followed(bench, "cut")?;
    let (began, lists) = (Instant::now(), control.lists_of("AuthorizationPolicy"));
    control.proxy.break_with(Target::Watches, Fault::CutMidEvent);
    for n in 0..5 {
        bench.policy(&format!("cut-{n}"))?;
    }
    control.until_said(&["AuthorizationPolicy"])?;
    let asked = control.proxy.seen(Target::Watches, "authorizationpolicies", began).len();
    ensure!(asked <= 2 * MOST_TRIES, "a storm: {asked} watches");
    control.proxy.heal();
    for n in 0..5 {
        control.until_policy(&format!("cut-{n}"))?;
    }
    control.until_well()?;
    ensure!(
        control.lists_of("AuthorizationPolicy") == lists,
        "a cut made it read the list again"
    );
    followed.ensure_uncut()
}

pub fn endless(bench: &mut Bench) -> Result<()> {
    let control = Control::start(bench)?;
    let began = Instant::now();
    control
        .proxy
        .break_of(Target::Watches, "authorizationpolicies", Fault::EndlessLine);
    control.until_said(&["has more than", "AuthorizationPolicy"])?;
    let watches = control.proxy.seen(Target::Watches, "authorizationpolicies", began).len();
    // What is in sockets' buffers is on top.
    let most = watches * (MAX_ANSWER_BYTES + (16 << 20));
    let read = control.proxy.endless_bytes();
    ensure!(read <= most, "{read} bytes of {watches} events without an end were read");
    bench.policy("endless")?;
    control.proxy.heal();
    control.until_policy("endless")?;
    control.until_well()
}

pub fn slow(bench: &mut Bench) -> Result<()> {
    let proxy = proxy(bench)?;
    proxy.break_with(Target::Everything, Fault::Slow(Duration::from_millis(1500)));
    let control = Control::start_by(bench, proxy)?;
    bench.policy("slow")?;
    control.until_policy("slow")?;
    Ok(())
}

pub fn start(bench: &mut Bench) -> Result<()> {
    let proxy = proxy(bench)?;
    proxy.break_with(Target::Secrets, Fault::Status(503));
    proxy.break_of(Target::Everything, "configmaps", Fault::RetryAfter(429, 1));
    let (began, mending) = (Instant::now(), Arc::clone(&proxy));
    let mended = std::thread::spawn(move || {
        let asked = poll::until_true("it asks again", PATIENCE, || {
            Ok(mending.seen(Target::Secrets, "", began).len() >= 3)
        });
        mending.heal();
        asked
    });
    let started = Control::start_by(bench, proxy);
    mended.join().map_err(|_| anyhow::anyhow!("the thread that mends"))??;
    started.map(drop)
}
