//! The mesh on the topology: mesh-control in the world between the nodes, an agent on each node, Pods enrolled by the
//! agents' local sockets. All through command lines, files and ports, as an operator would.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::access_log::AccessLog;
use crate::app::{self, App, ECHO_PORT};
use crate::binaries::{self, Build};
use crate::http::Response;
use crate::manifests::{MESHED, PodManifest, Registry, UNMESHED, pod_uid};
use crate::poll;
use crate::process::{Process, tail};
use crate::topology::{NodeName, PodPlace, Topology, WORLD_V4};

const CONTROL_PORT: u16 = 15012;
const CONTROL_ADMIN_PORT: u16 = 15014;
const AGENT_ADMIN_PORT: u16 = 15000;
const METRICS_PORT: u16 = 15020;
const READY_PORT: u16 = 15021;
/// `mesh-agent enroll` answers when the capture is proven, or says why it is not.
const ENROLL_DEADLINE: Duration = Duration::from_secs(60);
const COMMAND_DEADLINE: Duration = Duration::from_secs(20);
const LOG_LINES: usize = 40;

/// A Pod to be made.
#[derive(Clone, Copy, Debug)]
pub struct PodSpec {
    pub name: &'static str,
    pub node: NodeName,
    /// The host part of its addresses.
    pub host: u8,
    pub meshed: bool,
    /// As [`PodManifest::annotations`].
    pub annotations: &'static str,
}

impl PodSpec {
    #[must_use]
    pub const fn new(name: &'static str, node: NodeName, host: u8, meshed: bool) -> Self {
        Self {
            name,
            node,
            host,
            meshed,
            annotations: "",
        }
    }
}

#[derive(Debug)]
pub struct Mesh {
    agents: BTreeMap<NodeName, Process>,
    control: Option<Process>,
    servers: BTreeMap<&'static str, Process>,
    /// What the next agents and control planes to be started are of.
    pub agent_build: Build,
    pub control_build: Build,
    pub registry: Registry,
    pub app: App,
    pub topology: Topology,
}

impl Mesh {
    /// Everything up to Pods that run their servers, with the meshed ones proven and known as such to each other's nodes.
    /// `progress` hears of each step.
    ///
    /// # Errors
    /// The first step that failed, with the ends of the logs.
    pub fn start(pods: &[PodSpec], progress: &mut dyn FnMut(&str)) -> Result<Self> {
        progress("two nodes, each with its own network namespace, bpf file system and cgroup");
        let topology = Topology::create()?;
        let registry = Registry::create(topology.folder().join("registry"))?;
        let app = App::install(&binaries::path("mesh-test-app")?, topology.folder())?;
        let mut mesh = Self {
            agents: BTreeMap::new(),
            control: None,
            servers: BTreeMap::new(),
            agent_build: Build::default(),
            control_build: Build::default(),
            registry,
            app,
            topology,
        };
        match mesh.bring_up(pods, progress) {
            Ok(()) => Ok(mesh),
            Err(error) => Err(mesh.with_logs(error)),
        }
    }

    fn bring_up(&mut self, pods: &[PodSpec], progress: &mut dyn FnMut(&str)) -> Result<()> {
        progress("the control plane, on a folder of Kubernetes manifests");
        self.start_control()?;
        for node in NodeName::ALL {
            progress(&format!("{}: its token, and its agent", node.as_str()));
            self.issue_token(node)?;
            self.start_agent(node)?;
        }
        for pod in pods {
            let mesh = if pod.meshed { "in the mesh" } else { "outside the mesh" };
            progress(&format!("Pod {} on {}, {mesh}", pod.name, pod.node.as_str()));
            self.add_pod(pod)?;
        }
        let meshed: Vec<&PodSpec> = pods.iter().filter(|pod| pod.meshed).collect();
        for from in &meshed {
            for to in meshed.iter().filter(|to| to.name != from.name) {
                self.wait_for_tunnel(from.name, to.name)?;
            }
        }
        Ok(())
    }

    /// A Pod's namespace, manifest and servers; enrolled if it is meshed.
    ///
    /// # Errors
    /// As its parts.
    pub fn add_pod(&mut self, pod: &PodSpec) -> Result<()> {
        self.topology.add_pod(pod.name, pod.node, pod.host)?;
        self.write_pod(pod)?;
        self.start_server(pod.name)?;
        if pod.meshed { self.enroll(pod.name) } else { Ok(()) }
    }

    /// As [`Mesh::add_pod`], in the place and with the addresses of one that is gone, or going.
    ///
    /// # Errors
    /// As its parts.
    pub fn add_pod_at(&mut self, pod: &PodSpec, addresses: (Ipv4Addr, Ipv6Addr)) -> Result<()> {
        self.topology.add_pod_at(pod.name, pod.node, addresses)?;
        self.write_pod(pod)?;
        self.start_server(pod.name)?;
        if pod.meshed { self.enroll(pod.name) } else { Ok(()) }
    }

    /// A Pod's end: its processes, its enrolment, its manifest, its namespace.
    ///
    /// # Errors
    /// As its parts.
    pub fn delete_pod(&mut self, name: &str) -> Result<()> {
        self.stop_server(name);
        self.release(name)?;
        self.registry.remove(&format!("pod-{name}.yaml"))?;
        self.topology.remove_pod(name);
        Ok(())
    }

    /// # Errors
    /// The file cannot be written.
    pub fn write_pod(&self, pod: &PodSpec) -> Result<()> {
        let namespace = if pod.meshed { MESHED } else { UNMESHED };
        let addresses = self.pod(pod.name).addresses();
        self.registry.write_pod(&PodManifest {
            name: pod.name,
            namespace,
            node: pod.node,
            addresses: &addresses,
            annotations: pod.annotations,
        })
    }

    /// # Errors
    /// It does not answer.
    pub fn start_server(&mut self, name: &'static str) -> Result<()> {
        let log = self.topology.folder().join(format!("{name}.log"));
        let server = self.app.serve(name, &self.pod(name).place(), log)?;
        self.servers.insert(name, server);
        Ok(())
    }

    pub fn stop_server(&mut self, name: &str) {
        self.servers.remove(name);
    }

    #[must_use]
    pub fn pod(&self, name: &str) -> &PodPlace {
        self.topology.pod(name)
    }

    /// # Errors
    /// It does not become ready.
    pub fn start_control(&mut self) -> Result<()> {
        let state_dir = self.control_state_dir();
        let arguments = [
            "--registry",
            text(self.registry.folder())?,
            "--state-dir",
            text(&state_dir)?,
            "--listen",
            &format!("0.0.0.0:{CONTROL_PORT}"),
            "--admin",
            &format!("127.0.0.1:{CONTROL_ADMIN_PORT}"),
        ];
        let command = self
            .topology
            .world_place()
            .command(&self.control_build.path("mesh-control")?, &arguments)?;
        let control = Process::start("mesh-control", command, self.topology.folder().join("mesh-control.log"))?;
        let control = self.control.insert(control);
        let world = self.topology.world();
        poll::until_true("mesh-control is ready", poll::SOON, || {
            control.check_running()?;
            let page = app::page(world, Ipv4Addr::LOCALHOST.into(), CONTROL_ADMIN_PORT, "/healthz/ready")?;
            Ok(page.status == 200)
        })
    }

    /// The root key and the nodes' secrets (hashed) are here.
    #[must_use]
    pub fn control_state_dir(&self) -> PathBuf {
        self.topology.folder().join("control-state")
    }

    /// `kill -9`.
    pub fn kill_control(&mut self) {
        self.control.take();
    }

    fn issue_token(&self, node: NodeName) -> Result<()> {
        let state_dir = self.control_state_dir();
        let token = self.token_file(node);
        let address = SocketAddr::new(WORLD_V4.into(), CONTROL_PORT).to_string();
        let arguments = [
            "node-token",
            node.as_str(),
            "--state-dir",
            text(&state_dir)?,
            "--address",
            &address,
            "--output",
            text(&token)?,
        ];
        let world = self.topology.world_place();
        world
            .run(&binaries::path("mesh-control")?, &arguments, COMMAND_DEADLINE)?
            .ok("mesh-control node-token")?;
        Ok(())
    }

    #[must_use]
    pub fn token_file(&self, node: NodeName) -> PathBuf {
        self.topology.node(node).folder.join("token.json")
    }

    /// # Errors
    /// It does not become ready.
    pub fn start_agent(&mut self, node: NodeName) -> Result<()> {
        self.launch_agent(node)?;
        self.wait_until_ready(node)
    }

    /// Starts it and does not wait.
    ///
    /// # Errors
    /// It cannot start.
    pub fn launch_agent(&mut self, node: NodeName) -> Result<()> {
        self.launch_agent_with(node, &[])
    }

    /// With further arguments.
    ///
    /// # Errors
    /// It cannot start.
    pub fn launch_agent_with(&mut self, node: NodeName, more: &[&str]) -> Result<()> {
        let place = self.topology.node(node);
        let (token, run_dir, pin_path) = (self.token_file(node), place.run_dir(), place.pin_path());
        let access_log = place.folder.join("access.log");
        let mut arguments = vec![
            "run",
            "--token-file",
            text(&token)?,
            "--run-dir",
            text(&run_dir)?,
            "--pin-path",
            text(&pin_path)?,
            "--cgroup-root",
            text(place.cgroup.path())?,
            "--access-log",
            text(&access_log)?,
        ];
        arguments.extend(more);
        // How much it logs: CULVERT_LOG, as for any agent.
        let command = place
            .agent_place()
            .command(&self.agent_build.path("mesh-agent")?, &arguments)?;
        let name = format!("the agent of {}", node.as_str());
        let process = Process::start(&name, command, place.folder.join("mesh-agent.log"))?;
        self.agents.insert(node, process);
        Ok(())
    }

    /// # Errors
    /// It does not become ready, or ends.
    pub fn wait_until_ready(&mut self, node: NodeName) -> Result<()> {
        let netns = &self.topology.node(node).netns;
        let agent = self.agents.get_mut(&node).context("no agent runs there")?;
        poll::until_true(&format!("{} is ready", agent.name()), poll::SOON, || {
            agent.check_running()?;
            Ok(app::page(netns, Ipv4Addr::LOCALHOST.into(), READY_PORT, "/healthz/ready")?.status == 200)
        })
    }

    /// The agent that runs, for a successor to take over from it.
    ///
    /// # Errors
    /// None runs.
    pub fn take_agent(&mut self, node: NodeName) -> Result<Process> {
        self.agents.remove(&node).context("no agent runs there")
    }

    /// One that was taken, and still runs.
    pub fn put_agent(&mut self, node: NodeName, agent: Process) {
        self.agents.insert(node, agent);
    }

    /// `kill -9`.
    pub fn kill_agent(&mut self, node: NodeName) {
        self.agents.remove(&node);
    }

    /// SIGTERM.
    ///
    /// # Errors
    /// It did not end in time.
    pub fn terminate_agent(&mut self, node: NodeName) -> Result<()> {
        let agent = self.agents.remove(&node).context("no agent runs there")?;
        agent.terminate(Duration::from_secs(15)).map(drop)
    }

    /// What `mesh-agent list` says of a Pod.
    ///
    /// # Errors
    /// The agent does not answer.
    pub fn listed(&self, name: &str) -> Result<Option<Value>> {
        let list = self.agent_command(self.pod(name).node, "list", &[])?;
        let pods = list.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        Ok(pods.into_iter().find(|pod| pod["name"] == name))
    }

    /// What the control plane says of a Pod's capture: "pending", "proven", "lost".
    ///
    /// # Errors
    /// It does not answer, or knows no such Pod.
    pub fn capture_state(&self, name: &str) -> Result<String> {
        let status: Value = serde_json::from_str(&self.control_page("/status")?.body)?;
        let state = &status["pods"][format!("{MESHED}/{name}")];
        Ok(state.as_str().with_context(|| format!("{name} in {status}"))?.to_owned())
    }

    /// The agent's process id, while it runs.
    #[must_use]
    pub fn agent_id(&self, node: NodeName) -> Option<u32> {
        self.agents.get(&node).map(Process::id)
    }

    /// Runs `mesh-agent <command>` on a node, with the node's `--run-dir` added.
    ///
    /// # Errors
    /// It fails: as it said.
    pub fn agent_command(&self, node: NodeName, command: &str, arguments: &[&str]) -> Result<String> {
        let place = self.topology.node(node);
        let run_dir = place.run_dir();
        let mut all = vec![command, "--run-dir", text(&run_dir)?];
        all.extend_from_slice(arguments);
        let output = place
            .agent_place()
            .run(&binaries::path("mesh-agent")?, &all, ENROLL_DEADLINE)?;
        output.ok(&format!("mesh-agent {command}"))
    }

    /// # Errors
    /// The agent refuses, or cannot prove the capture.
    pub fn enroll(&self, name: &str) -> Result<()> {
        self.enroll_in(name, self.pod(name).cgroup.path())
    }

    /// With another cgroup to be proven in than the Pod's.
    ///
    /// # Errors
    /// As [`Mesh::enroll`].
    pub fn enroll_in(&self, name: &str, cgroup: &Path) -> Result<()> {
        let pod = self.pod(name);
        let (netns, uid) = (pod.netns.path(), pod_uid(name));
        let (v4, v6) = (pod.v4.to_string(), pod.v6.to_string());
        let arguments = [
            "--uid",
            &uid,
            "--namespace",
            MESHED,
            "--name",
            name,
            "--service-account",
            name,
            "--netns",
            text(&netns)?,
            "--address",
            &v4,
            "--address",
            &v6,
            "--cgroup",
            text(cgroup)?,
        ];
        self.agent_command(pod.node, "enroll", &arguments)
            .map(drop)
            .with_context(|| format!("enrolling {name}"))
    }

    /// # Errors
    /// The agent fails to.
    pub fn release(&self, name: &str) -> Result<()> {
        self.agent_command(self.pod(name).node, "release", &["--uid", &pod_uid(name)])
            .map(drop)
    }

    /// Undoes everything on a node, with or without its agent.
    ///
    /// # Errors
    /// It fails to.
    pub fn cleanup(&self, node: NodeName) -> Result<String> {
        let pin_path = self.topology.node(node).pin_path();
        self.agent_command(node, "cleanup", &["--pin-path", text(&pin_path)?])
    }

    #[must_use]
    pub fn access_log(&self, node: NodeName) -> AccessLog {
        AccessLog::new(self.topology.node(node).folder.join("access.log"))
    }

    /// # Errors
    /// The agent does not answer.
    pub fn metrics(&self, node: NodeName) -> Result<String> {
        Ok(self.agent_page(node, METRICS_PORT, "/metrics")?.body)
    }

    /// # Errors
    /// The agent does not answer.
    pub fn agent_page(&self, node: NodeName, port: u16, path: &str) -> Result<Response> {
        app::page(&self.topology.node(node).netns, Ipv4Addr::LOCALHOST.into(), port, path)
    }

    /// What a node's agent has in force of what the control plane told.
    ///
    /// # Errors
    /// The agent does not answer.
    pub fn agent_state(&self, node: NodeName) -> Result<Value> {
        let page = self.agent_page(node, AGENT_ADMIN_PORT, "/config_dump")?;
        let dump: Value = serde_json::from_str(&page.body)?;
        Ok(dump["state"].clone())
    }

    /// Writes a Service into the file of its name, and waits until the node knows it: before, its address is some outsider's.
    ///
    /// # Errors
    /// It does not come to know.
    pub fn add_service(&self, node: NodeName, name: &str, manifest: &str) -> Result<()> {
        self.registry.write(&format!("{name}.yaml"), manifest)?;
        let resource = Value::from(format!("{MESHED}/{name}.{MESHED}.svc.cluster.local"));
        poll::until_true("the node knows the service", poll::SOON, || {
            let state = self.agent_state(node)?;
            Ok(state["services"].as_array().is_some_and(|known| known.contains(&resource)))
        })
    }

    /// # Errors
    /// The control plane does not answer.
    pub fn control_page(&self, path: &str) -> Result<Response> {
        app::page(self.topology.world(), Ipv4Addr::LOCALHOST.into(), CONTROL_ADMIN_PORT, path)
    }

    /// Waits until the source's node knows that the destination is to be tunnelled to, on both families, by connecting.
    ///
    /// # Errors
    /// It does not come to know.
    pub fn wait_for_tunnel(&self, from: &str, to: &str) -> Result<()> {
        for address in self.pod(to).addresses() {
            self.wait_for_path(from, address, "tunnel")
                .with_context(|| format!("{from} → {to} ({address}) by tunnel"))?;
        }
        Ok(())
    }

    /// Connects until the source's access log shows the path.
    ///
    /// # Errors
    /// It never does.
    pub fn wait_for_path(&self, from: &str, address: IpAddr, path: &str) -> Result<()> {
        let source = self.pod(from);
        let log = self.access_log(source.node);
        let destination = SocketAddr::new(address.to_canonical(), ECHO_PORT).to_string();
        poll::until_true(&format!("the path is {path}"), poll::SOON, || {
            let position = log.position();
            self.app.connect(&source.place(), address, ECHO_PORT)?.expect_ok()?;
            let fields = [
                ("direction", "outbound"),
                ("destination_address", destination.as_str()),
                ("path", path),
            ];
            Ok(log.wait_for(position, &fields, Duration::from_millis(500)).is_ok())
        })
    }

    /// Connects until the outcome is the wanted one: a change takes a moment to reach everyone.
    ///
    /// # Errors
    /// It never is.
    pub fn wait_for_outcome(&self, from: &str, address: IpAddr, port: u16, works: bool) -> Result<()> {
        let source = self.pod(from);
        let mut last = String::new();
        let what = if works {
            "the connection works"
        } else {
            "the connection is refused"
        };
        poll::until_true(what, poll::SOON, || {
            let attempt = self.app.connect(&source.place(), address, port)?;
            last = attempt.report.to_string();
            Ok(attempt.ok() == works)
        })
        .with_context(|| format!("{from} → {address} port {port}; last seen: {last}"))
    }

    /// An error with the ends of all logs, for a person to see what happened.
    #[must_use]
    pub fn with_logs(&self, error: anyhow::Error) -> anyhow::Error {
        let mut text = String::new();
        let mut logs = vec![("mesh-control".to_owned(), self.topology.folder().join("mesh-control.log"))];
        for node in NodeName::ALL {
            for file in ["mesh-agent.log", "access.log"] {
                logs.push((
                    format!("{} {file}", node.as_str()),
                    self.topology.node(node).folder.join(file),
                ));
            }
        }
        for (name, path) in logs {
            text.push_str(&format!("--- the end of {name}:\n{}\n", tail(&path, LOG_LINES)));
        }
        error.context(text)
    }

    /// The value of a metric: the sum over all series whose labels contain every given `label="value"`.
    ///
    /// # Errors
    /// The agent does not answer.
    pub fn metric(&self, node: NodeName, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
        Ok(sum_of_series(&self.metrics(node)?, name, labels))
    }
}

/// Of the series of a page of metrics that have these labels.
#[must_use]
pub fn sum_of_series(page: &str, name: &str, labels: &[(&str, &str)]) -> f64 {
    let wanted: Vec<String> = labels.iter().map(|(label, value)| format!("{label}=\"{value}\"")).collect();
    page.lines()
        .filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])))
        .filter(|line| wanted.iter().all(|label| line.contains(label.as_str())))
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        // The sum of nothing is -0.
        .fold(0.0, |sum, value| sum + value)
}

fn text(path: &Path) -> Result<&str> {
    match path.to_str() {
        Some(text) => Ok(text),
        None => bail!("{} is not UTF-8", path.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_are_summed_by_their_labels() {
        let page = "# TYPE a counter\na{x=\"1\",y=\"2\"} 3\na{x=\"1\",y=\"3\"} 4\nab{x=\"1\"} 9\nc 7\n";
        assert_eq!(sum_of_series(page, "a", &[("x", "1")]), 7.0);
        assert_eq!(sum_of_series(page, "a", &[("y", "3")]), 4.0);
        assert_eq!(sum_of_series(page, "c", &[]), 7.0);
        assert_eq!(sum_of_series(page, "d", &[]), 0.0);
    }
}
