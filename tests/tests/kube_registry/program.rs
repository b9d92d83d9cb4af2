//! The program itself, with a cluster as its registry.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::kube::ControlProgram;
use mesh_tests::process::Place;
use mesh_tests::{binaries, http, poll};
use serde_json::Value;

use crate::Bench;

const PATIENCE: Duration = Duration::from_secs(60);

pub fn serves(bench: &mut Bench) -> Result<()> {
    bench.install_kinds()?;
    bench.namespace("program")?;
    bench.pod("program", "a", &["10.244.5.1"])?;
    let mut program = ControlProgram::start(
        "mesh-control",
        &bench.kubeconfig,
        bench.server.folder().join("mesh-control.log"),
    )?;
    let admin = program.admin;
    let told = poll::until_true("the program tells the cluster's Pods", PATIENCE, || {
        program.process.check_running()?;
        let Ok(response) = http::request(admin, "/status") else {
            return Ok(false);
        };
        Ok(response.body.contains("\"program/a\": \"pending\""))
    });
    told.map_err(|error| error.context(mesh_tests::process::tail(&program.log, 20)))?;
    // An API server that is lost does not make it unready: what is in force is served.
    bench.server.stop();
    let said = poll::until_true("it says what it lacks, and serves", PATIENCE, || {
        let response = http::request(admin, "/healthz/ready")?;
        ensure!(response.status == 200, "{}", response.body);
        Ok(response.body.contains("API server"))
    });
    bench.server.resume()?;
    said?;
    poll::until_true("it is well again", PATIENCE, || {
        Ok(http::request(admin, "/healthz/ready")?.body == "ready\n")
    })?;
    let status = program.process.terminate(PATIENCE)?;
    ensure!(status.success(), "{status}");
    Ok(())
}

/// `cargo xtask bench control`, with little of everything.
pub fn benchmark(_: &mut Bench) -> Result<()> {
    let expected = [
        ("making", "s"),
        ("making_compilations", ""),
        ("making_lists_of_pods", ""),
        ("making_cpu", "s"),
        ("making_rss_peak", "MiB"),
        ("ready", "s"),
        ("ready_cpu", "s"),
        ("first_compilation", "s"),
        ("rss", "MiB"),
        ("pss", "MiB"),
        ("rss_peak", "MiB"),
        ("pod_change", "s"),
        ("pod_change_at_once", "s"),
        ("policy_change", "s"),
        ("compilation", "s"),
        ("compilations_per_change", ""),
        ("lists_of_pods", ""),
    ];
    let said = Place::here()
        .run(
            &binaries::path("mesh-bench")?,
            &["2", "--json", "--brief", "--control", "100"],
            PATIENCE * 3,
        )?
        .ok("the benchmark")?;
    let rows: Vec<Value> = said.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let mut medians = BTreeMap::new();
    for (measure, unit) in expected {
        let row = rows.iter().find(|row| row["measure"] == measure && row["unit"] == unit);
        let row = row.with_context(|| format!("{measure} is not measured: {said}"))?;
        medians.insert(measure, row["median"].as_f64().with_context(|| row.to_string())?);
    }
    ensure!(
        medians["making_lists_of_pods"] == 0.0 && medians["lists_of_pods"] == 1.0 && medians["compilations_per_change"] >= 1.0,
        "{medians:?}"
    );
    for measure in ["making", "ready", "rss", "pod_change", "policy_change"] {
        ensure!(medians[measure] > 0.0, "{measure}: {medians:?}");
    }
    Ok(())
}
