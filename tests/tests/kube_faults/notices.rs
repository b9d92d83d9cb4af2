//! What the writing of Events meets.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use mesh_tests::kube::faults::{Fault, Target};
use mesh_tests::poll;

use crate::Bench;
use crate::control::{Control, PATIENCE};

/// A Pod that cannot be a member.
fn refused(bench: &Bench, name: &str) -> Result<()> {
    let pod = format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec: {{nodeName: node-a, serviceAccountName: web, \
         containers: [{{name: c, image: 'nowhere.test/a:1'}}, {{name: istio-proxy, image: 'nowhere.test/a:1'}}]}}\n"
    );
    bench.server.kubectl().apply(&pod).map(drop)
}

fn is_told(bench: &Bench, name: &str) -> Result<bool> {
    let list = bench.server.kubectl().get(&["-n", "shop", "events.events.k8s.io"])?;
    let items = list["items"].as_array().cloned().unwrap_or_default();
    let is_it = |event: &serde_json::Value| event["regarding"]["name"] == name && event["reason"] == "MeshNotEnrolled";
    Ok(items.iter().any(is_it))
}

pub fn patience(bench: &mut Bench) -> Result<()> {
    const ASKED: u32 = 6;
    let control = Control::start(bench)?;
    let failed = |reason: &str| {
        let page = control.metrics.text()?;
        let series = format!("mesh_control_notice_writes_failed_total{{kind=\"event\",reason=\"{reason}\"}} ");
        let line = page.lines().find_map(|line| line.strip_prefix(&series)).unwrap_or_default();
        anyhow::Ok(line.parse::<u64>().unwrap_or_default())
    };
    for code in [429, 503] {
        let (began, before, name) = (Instant::now(), failed("busy")?, format!("refused-{code}"));
        control.proxy.break_with(Target::Events, Fault::RetryAfter(code, ASKED));
        refused(bench, &name)?;
        poll::until_true("it was tried again", PATIENCE, || Ok(failed("busy")? >= before + 3))?;
        let tries = control.proxy.seen(Target::Events, "", began);
        for (one, next) in tries.iter().zip(tries.iter().skip(1)) {
            let pause = next.at - one.at;
            ensure!(
                pause >= Duration::from_secs(ASKED.into()),
                "asked for {ASKED} s of patience after {code}, an Event came after {pause:?}"
            );
        }
        ensure!(!is_told(bench, &name)?, "the fault met nobody");
        control.proxy.heal();
        poll::until_true("it is told after all", PATIENCE, || is_told(bench, &name))?;
    }
    Ok(())
}

/// As by a quota of one namespace: it is given up, and others do not wait.
pub fn forbidden(bench: &mut Bench) -> Result<()> {
    let control = Control::start(bench)?;
    let began = Instant::now();
    control.proxy.break_with(Target::Events, Fault::Status(403));
    refused(bench, "by-quota")?;
    poll::until_true("it was tried", PATIENCE, || {
        Ok(control
            .metrics
            .text()?
            .lines()
            .any(|line| line == "mesh_control_events_dropped_total{reason=\"refused\"} 1"))
    })?;
    control.proxy.heal();
    refused(bench, "beside")?;
    poll::until_true("another one is told", PATIENCE, || is_told(bench, "beside"))?;
    let tries = control.proxy.seen(Target::Events, "", began).len();
    ensure!(tries == 2 && !is_told(bench, "by-quota")?, "{tries} tries");
    Ok(())
}
