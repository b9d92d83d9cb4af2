//! The program itself, with a cluster as its registry.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use mesh_tests::process::{Place, Process};
use mesh_tests::{binaries, http, poll};

use crate::Bench;

const PATIENCE: Duration = Duration::from_secs(60);

pub fn serves(bench: &mut Bench) -> Result<()> {
    bench.install_kinds()?;
    bench.namespace("program")?;
    bench.pod("program", "a", &["10.244.5.1"])?;
    let place = Place {
        netns: PathBuf::from("/proc/self/ns/net"),
        cgroup: None,
        unprivileged: false,
    };
    let [a, b, c] = rand::random::<[u8; 3]>();
    let admin = SocketAddr::new(Ipv4Addr::new(127, a.max(1), b, c.clamp(1, 254)).into(), 15014);
    let (listen, admin_flag) = ("127.0.0.1:0", admin.to_string());
    let flags = ["--kubernetes", "--listen", listen, "--admin", &admin_flag];
    let program = binaries::path("mesh-control")?;
    let mut command = place.command(&program, &flags)?;
    command.env("KUBECONFIG", &bench.kubeconfig);
    let log = bench.server.folder().join("mesh-control.log");
    let mut control = Process::start("mesh-control", command, log.clone())?;
    let told = poll::until_true("the program tells the cluster's Pods", PATIENCE, || {
        control.check_running()?;
        let Ok(response) = http::request(admin, "/status") else {
            return Ok(false);
        };
        Ok(response.body.contains("\"program/a\": \"pending\""))
    });
    told.map_err(|error| error.context(mesh_tests::process::tail(&log, 20)))?;
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
    let status = control.terminate(PATIENCE)?;
    ensure!(status.success(), "{status}");
    Ok(())
}
