use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::report::{Results, progress};
use super::{LOAD_PORT, System};
use crate::mesh::Mesh;
use crate::poll;
use crate::process::{Conversation, Process};
use crate::topology::NodeName;

const BULK_STREAMS: u64 = 8;
const CONNECT_THREADS: usize = 8;
const IDLE_CONNECTIONS: usize = 1000;
const DEADLINE: Duration = Duration::from_secs(120);

/// How much of everything one measurement takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Amounts {
    bulk_bytes: u64,
    ping_pongs: usize,
    /// A client's address has some 12,000 upstream ports at a server, which stay busy for a minute after their connections.
    connects_alone: usize,
    connects_each: usize,
}

impl Amounts {
    /// A second or two of bulk on the slower of the systems.
    pub const FULL: Self = Self {
        bulk_bytes: 512 << 20,
        ping_pongs: 10_000,
        connects_alone: 300,
        connects_each: 150,
    };
    /// Shows that everything can be measured; its figures mean little.
    pub const BRIEF: Self = Self {
        bulk_bytes: 8 << 20,
        ping_pongs: 100,
        connects_alone: 10,
        connects_each: 5,
    };
}

pub struct Bench<'a> {
    mesh: &'a mut Mesh,
    amounts: Amounts,
    /// Kept for as long as they are measured.
    servers: Vec<Process>,
}

/// CPU seconds, from the cgroups.
#[derive(Clone, Copy)]
struct Cpu {
    agents: f64,
    everyone: f64,
}

impl<'a> Bench<'a> {
    pub fn start(mesh: &'a mut Mesh, amounts: Amounts) -> Result<Self> {
        let mut servers = Vec::new();
        for system in System::ALL {
            let name = system.server();
            let command = mesh
                .pod(name)
                .place()
                .command(mesh.app.binary(), &["load-serve", &LOAD_PORT.to_string()])?;
            let log = mesh.topology.folder().join(format!("{name}-load.log"));
            let mut server = Process::start("the load server", command, log.clone())?;
            poll::until_true("the load server listens", poll::SOON, || {
                server.check_running()?;
                Ok(std::fs::read_to_string(&log)?.contains("serves"))
            })?;
            servers.push(server);
        }
        Ok(Self { mesh, amounts, servers })
    }

    pub fn run(self, rounds: usize, results: &mut Results) -> Result<()> {
        ensure!(!self.servers.is_empty(), "no load server runs");
        results.add("rss_fresh", "MB", System::Mesh, self.rss()?);
        for round in 1..=rounds {
            for system in System::ALL {
                progress(&format!("round {round} of {rounds}: {}", system.as_str()));
                self.bulk(system, results)?;
                self.ping_pong(system, results)?;
                self.connects(system, results)?;
            }
        }
        self.idle(results)
    }

    fn load(&self, system: System, arguments: &[&str]) -> Result<(Value, Cpu)> {
        let address = self.address(system);
        let mut all = vec![arguments[0], &address];
        all.extend_from_slice(&arguments[1..]);
        let before = self.cpu()?;
        let output = self
            .mesh
            .pod(system.client())
            .place()
            .run(self.mesh.app.binary(), &all, DEADLINE)?
            .ok(&format!("{}: {all:?}", system.as_str()))?;
        let after = self.cpu()?;
        let report = serde_json::from_str(&output).with_context(|| output.clone())?;
        let cpu = Cpu {
            agents: after.agents - before.agents,
            everyone: after.everyone - before.everyone,
        };
        Ok((report, cpu))
    }

    fn address(&self, system: System) -> String {
        format!("{}:{LOAD_PORT}", self.mesh.pod(system.server()).v4)
    }

    fn bulk(&self, system: System, results: &mut Results) -> Result<()> {
        for (measure, measure_cpu, load, streams) in [
            ("bulk_up_1", Some("bulk_up_1_cpu"), "load-up", 1),
            ("bulk_down_1", Some("bulk_down_1_cpu"), "load-down", 1),
            ("bulk_up_8", None, "load-up", BULK_STREAMS),
            ("bulk_down_8", None, "load-down", BULK_STREAMS),
        ] {
            let each = (self.amounts.bulk_bytes / streams).to_string();
            let (report, cpu) = self.load(system, &[load, &streams.to_string(), &each])?;
            let (seconds, bytes) = (number(&report, "seconds")?, number(&report, "bytes")?);
            results.add(measure, "Gbit/s", system, bytes * 8.0 / seconds / 1e9);
            if let Some(measure) = measure_cpu.filter(|_| system != System::Direct) {
                results.add(measure, "s/GB", system, cpu.agents / (bytes / 1e9));
            }
        }
        Ok(())
    }

    fn ping_pong(&self, system: System, results: &mut Results) -> Result<()> {
        let (report, cpu) = self.load(system, &["load-ping-pong", &self.amounts.ping_pongs.to_string()])?;
        results.add("pingpong_64_p50", "µs", system, number(&report, "p50")?);
        results.add("pingpong_64_p99", "µs", system, number(&report, "p99")?);
        // A tenth more for the warming up.
        let per_10_000 = cpu.everyone * 10_000.0 / (self.amounts.ping_pongs as f64 * 1.1);
        results.add("pingpong_64_cpu", "s/10,000", system, per_10_000);
        Ok(())
    }

    fn connects(&self, system: System, results: &mut Results) -> Result<()> {
        let (report, _) = self.load(system, &["load-connects", "1", &self.amounts.connects_alone.to_string()])?;
        results.add("connect_1_p50", "µs", system, number(&report, "p50")?);
        let (threads, each) = (CONNECT_THREADS.to_string(), self.amounts.connects_each.to_string());
        let (report, cpu) = self.load(system, &["load-connects", &threads, &each])?;
        let count = number(&report, "count")?;
        results.add("connect_8_rate", "1/s", system, count / number(&report, "seconds")?);
        results.add("connect_8_cpu", "s/10,000", system, cpu.everyone * 10_000.0 / count);
        Ok(())
    }

    fn idle(&self, results: &mut Results) -> Result<()> {
        progress(&format!("{IDLE_CONNECTIONS} idle connections"));
        let address = self.address(System::Mesh);
        let command = self.mesh.pod(System::Mesh.client()).place().command(
            self.mesh.app.binary(),
            &["load-idle", &address, &IDLE_CONNECTIONS.to_string()],
        )?;
        let held = Conversation::start(command)?;
        ensure!(held.hear(DEADLINE)? == "connected", "the idle connections were not opened");
        results.add("rss_1000_idle", "MB", System::Mesh, self.rss()?);
        Ok(())
    }

    /// Resident memory of the larger of the two agents.
    fn rss(&self) -> Result<f64> {
        let mut most: f64 = 0.0;
        for node in NodeName::ALL {
            let id = self.mesh.agent_id(node).context("the agent runs")?;
            let status = std::fs::read_to_string(format!("/proc/{id}/status"))?;
            let kilobytes: f64 = status
                .lines()
                .find_map(|line| line.strip_prefix("VmRSS:"))
                .and_then(|rest| rest.split_whitespace().next())
                .context("VmRSS")?
                .parse()?;
            most = most.max(kilobytes * 1024.0 / 1e6);
        }
        Ok(most)
    }

    fn cpu(&self) -> Result<Cpu> {
        let mut cpu = Cpu {
            agents: 0.0,
            everyone: 0.0,
        };
        for node in NodeName::ALL {
            let place = self.mesh.topology.node(node);
            cpu.everyone += usage(place.cgroup.path())?;
            let agent: PathBuf = place.agent_place().cgroup.context("the agent has a cgroup")?;
            cpu.agents += usage(&agent)?;
        }
        Ok(cpu)
    }
}

/// CPU seconds of a cgroup and all below it.
fn usage(cgroup: &Path) -> Result<f64> {
    let file = cgroup.join("cpu.stat");
    let text = std::fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
    let micros: f64 = text
        .lines()
        .find_map(|line| line.strip_prefix("usage_usec "))
        .context("usage_usec")?
        .trim()
        .parse()?;
    Ok(micros / 1e6)
}

fn number(report: &Value, field: &str) -> Result<f64> {
    report[field]
        .as_f64()
        .with_context(|| format!("{field} is missing in {report}"))
}
