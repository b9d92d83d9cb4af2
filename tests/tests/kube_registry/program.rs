//! The program itself, with a cluster as its registry.

use std::time::Duration;

use anyhow::{Result, ensure};
use mesh_tests::kube::ControlProgram;
use mesh_tests::{http, poll};

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
