//! New connections without a pause, while something is done to agents or Pods.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::mesh::Mesh;
use crate::poll::{self, SOON};
use crate::process::Process;

const LOAD_PORT: u16 = 9900;
const PATIENTLY: Duration = Duration::from_secs(40);

/// Connections, one after the other in each of a few threads, each with a message and its echo, until it is finished.
pub struct Load {
    process: Option<Process>,
    log: PathBuf,
    stop: PathBuf,
    _server: Process,
}

impl Load {
    pub fn start(mesh: &Mesh, from: &str, to: &str) -> Result<Self> {
        let folder = mesh.topology.folder();
        let binary = mesh.app.binary();
        let serve = mesh
            .pod(to)
            .place()
            .command(binary, &["load-serve", &LOAD_PORT.to_string()])?;
        let server = Process::start("the load's server", serve, folder.join(format!("load-server-{to}.log")))?;
        let name = format!("load-{:016x}", rand::random::<u64>());
        let (log, stop) = (folder.join(format!("{name}.log")), folder.join(format!("{name}.stop")));
        let address = SocketAddr::new(mesh.pod(to).v4.into(), LOAD_PORT);
        let script = format!(
            "while [ ! -e {} ]; do {} load-connects {address} 8 25 2>&1; done",
            stop.display(),
            binary.display()
        );
        let command = mesh.pod(from).place().command("/bin/sh".as_ref(), &["-c", &script])?;
        let process = Process::start("the load", command, log.clone())?;
        let load = Self {
            process: Some(process),
            log,
            stop,
            _server: server,
        };
        // Its first connections may meet a server that does not listen yet.
        poll::until_true("the load flows", SOON, || Ok(load.report()?.0 > 0))?;
        std::fs::write(&load.log, "")?;
        Ok(load)
    }

    /// Connections that worked, and lines that tell of one that did not.
    fn report(&self) -> Result<(u64, Vec<String>)> {
        let text = std::fs::read_to_string(&self.log)?;
        let (mut worked, mut failures) = (0, Vec::new());
        for line in text.lines() {
            match serde_json::from_str::<Value>(line)
                .ok()
                .and_then(|report| report["count"].as_u64())
            {
                Some(count) => worked += count,
                None => failures.push(line.to_owned()),
            }
        }
        Ok((worked, failures))
    }

    /// Until so many more have worked.
    pub fn wait_for(&self, more: u64) -> Result<()> {
        let before = self.report()?.0;
        poll::until_true("more connections are made", PATIENTLY, || {
            Ok(self.report()?.0 >= before + more)
        })
    }

    pub fn finish(mut self) -> Result<(u64, Vec<String>)> {
        std::fs::write(&self.stop, "")?;
        let process = self.process.take().context("it runs")?;
        process.wait(PATIENTLY)?;
        self.report()
    }
}
