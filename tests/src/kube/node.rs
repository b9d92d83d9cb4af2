//! A node: namespaces and cgroups of this machine, in which containerd, a kubelet and a kube-proxy run.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use super::api_server::ApiServer;
use super::hierarchies::NodeCgroups;
use super::node_config as config;
use super::node_init::{Service, Spec};
use super::tools::Tools;
use crate::binaries;
use crate::netns::Netns;
use crate::poll::{self, SOON};
use crate::process::{Conversation, Output, Place, Process, tail};

/// Longer than unpacking an image of some hundred megabytes takes on a busy machine.
const IMPORT_DEADLINE: Duration = Duration::from_secs(120);
pub(super) const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";
const CONTAINERD: &str = "containerd";

#[derive(Debug)]
pub struct Node {
    name: String,
    number: u8,
    // Dropped in this order: its processes, then what they were in.
    process: Option<Process>,
    cgroups: NodeCgroups,
    netns: Netns,
    folder: PathBuf,
    tools: Tools,
}

impl Node {
    /// The node's place in the network, and its files. Nothing runs yet.
    pub(super) fn create(number: u8, run: &str, control_plane: &Netns, server: &ApiServer) -> Result<Self> {
        let name = format!("node-{number}");
        let folder = server.folder().join(&name);
        std::fs::create_dir(&folder).with_context(|| format!("making {}", folder.display()))?;
        let node = Self {
            cgroups: NodeCgroups(format!("{run}-{name}")),
            netns: Netns::create(format!("{run}-{name}"))?,
            process: None,
            folder,
            tools: server.tools.clone(),
            number,
            name,
        };
        node.connect(control_plane)?;
        node.configure(server)?;
        Ok(node)
    }

    fn connect(&self, control_plane: &Netns) -> Result<()> {
        let (name, address) = (&self.name, self.address());
        let address_v6 = config::node_address_v6(self.number);
        control_plane.batch(&[
            format!("link add {name} type veth peer name eth0 netns {}", self.netns.name()),
            format!("link set {name} master {} up", config::BRIDGE),
            format!("route add {} via {address}", config::pod_cidr(self.number)),
            format!("route add {} via {address_v6}", config::pod_cidr_v6(self.number)),
        ])?;
        // Pods of other nodes by way of the control plane's namespace, which routes as a network would.
        self.netns.batch(&[
            format!("addr add {address}/{} dev eth0", config::NODES_PREFIX),
            format!("addr add {address_v6}/{} dev eth0 nodad", config::NODES_PREFIX_V6),
            "link set eth0 up".to_owned(),
            format!("route add default via {}", config::CONTROL_PLANE),
            format!("route add default via {}", config::CONTROL_PLANE_V6),
        ])?;
        for (key, value) in [
            ("ipv4.ip_forward", "1"),
            ("ipv6.conf.all.forwarding", "1"),
            // The other node's Pods come from where the way back does not lead.
            ("ipv4.conf.all.rp_filter", "0"),
            ("ipv4.conf.default.rp_filter", "0"),
            // Nobody needs to be told of the shorter way.
            ("ipv4.conf.all.send_redirects", "0"),
        ] {
            self.netns.set_sysctl(key, value)?;
        }
        Ok(())
    }

    fn configure(&self, server: &ApiServer) -> Result<()> {
        let folder = &self.folder;
        let user = format!("system:node:{}", self.name);
        let kubelet = server
            .authority
            .kubeconfig(&self.name, &server.url(), &user, &["system:nodes"])?;
        let proxy_name = format!("{}-proxy", self.name);
        let proxy = server
            .authority
            .kubeconfig(&proxy_name, &server.url(), "system:kube-proxy", &[])?;
        let network = folder.join("upper/etc/cni/net.d");
        std::fs::create_dir_all(&network)?;
        std::fs::write(network.join(config::NETWORK_FILE), config::network(self.number))?;
        let runc = self.tools.debian("usr/sbin/runc");
        std::fs::write(folder.join("containerd.toml"), config::containerd(&runc))?;
        std::fs::write(folder.join("kubelet.yaml"), config::kubelet(&server.authority.certificate()))?;
        std::fs::write(folder.join("kube-proxy.yaml"), config::kube_proxy(&self.name, &proxy))?;
        let spec = self.spec(&kubelet);
        Ok(std::fs::write(self.spec_file(), serde_json::to_vec(&spec)?)?)
    }

    fn spec(&self, kubeconfig: &Path) -> Spec {
        let file = |name: &str| self.folder.join(name).display().to_string();
        let service = |name: &str, program: PathBuf, arguments: Vec<String>, after: Option<&str>| Service {
            name: name.to_owned(),
            program,
            arguments,
            after: after.map(PathBuf::from),
        };
        let kubelet = vec![
            format!("--config={}", file("kubelet.yaml")),
            format!("--kubeconfig={}", kubeconfig.display()),
            format!("--hostname-override={}", self.name),
            format!("--node-ip={},{}", self.address(), config::node_address_v6(self.number)),
        ];
        Spec {
            hostname: self.name.clone(),
            folder: self.folder.clone(),
            cgroup: self.cgroups.0.clone(),
            search_path: self.search_path(),
            cni_plugins: self.tools.debian("usr/lib/cni"),
            services: vec![
                service(
                    CONTAINERD,
                    self.tools.debian("usr/bin/containerd"),
                    vec![format!("--config={}", file("containerd.toml"))],
                    None,
                ),
                service("kubelet", self.tools.component("kubelet"), kubelet, Some(CONTAINERD_SOCKET)),
                service(
                    "kube-proxy",
                    self.tools.component("kube-proxy"),
                    vec![format!("--config={}", file("kube-proxy.yaml"))],
                    None,
                ),
            ],
        }
    }

    /// Of its services, and of commands that tests run on it.
    fn search_path(&self) -> String {
        let own = ["usr/bin", "usr/sbin"].map(|folder| self.tools.debian(folder).display().to_string());
        let components = self.tools.components().display().to_string();
        let machine = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        format!("{}:{components}:{machine}", own.join(":"))
    }

    fn spec_file(&self) -> PathBuf {
        self.folder.join("node.json")
    }

    /// Switches it on, the first time or after [`Node::kill`]; answers when its container runtime does.
    ///
    /// # Errors
    /// It ends, or containerd does not come up: with the logs' ends.
    pub fn boot(&mut self) -> Result<()> {
        if self.process.is_some() {
            bail!("{} is on", self.name);
        }
        let _ = std::fs::remove_file(Spec::pid_file(&self.folder));
        let spec = self.spec_file();
        let place = Place {
            netns: self.netns.path(),
            cgroup: None,
            unprivileged: false,
        };
        let command = place.command(&binaries::path("mesh-kube-node")?, &[spec.to_str().context("a path")?])?;
        let log = self.folder.join("init.log");
        let process = self.process.insert(Process::start(&self.name, command, log)?);
        let pid_file = Spec::pid_file(&self.folder);
        poll::until_true(&format!("{}'s container runtime", self.name), SOON, || {
            process.check_running()?;
            let Ok(pid) = std::fs::read_to_string(&pid_file) else {
                return Ok(false);
            };
            // As the node sees it.
            Ok(Path::new(&format!("/proc/{}/root{CONTAINERD_SOCKET}", pid.trim())).exists())
        })
        .with_context(|| self.log_ends())
    }

    /// The power fails: `kill -9` of its first process, with which the kernel ends all others. What is on its disk stays.
    ///
    /// # Errors
    /// It is off.
    pub fn kill(&mut self) -> Result<()> {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.pid()?)?);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).context("killing the node's first process")?;
        let process = self.process.take().context("the node is off")?;
        // Its parent ends after everything in the node has.
        process.wait(SOON).map(drop)
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// On the network between the nodes.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        config::node_address(self.number)
    }

    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Its logs (`kubelet.log`, `containerd.log`, …), and what it keeps over a reboot.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Its file system, as this machine sees it.
    ///
    /// # Errors
    /// As [`Node::pid`].
    pub fn root(&self) -> Result<PathBuf> {
        Ok(Path::new("/proc").join(self.pid()?.to_string()).join("root"))
    }

    /// Its first process, as this machine sees it; `/proc/<pid>/root` is the node's file system.
    ///
    /// # Errors
    /// It is off, or has not come up.
    pub fn pid(&self) -> Result<u32> {
        ensure!(self.process.is_some(), "{} is off", self.name);
        let file = Spec::pid_file(&self.folder);
        let text = std::fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
        text.trim().parse().context("a process id")
    }

    /// Runs a command on the node, in all of its namespaces; its PATH has `ctr`, `kubectl` and the others.
    ///
    /// # Errors
    /// It cannot start, or does not end in time (then it is killed); that it fails is an answer.
    pub fn run(&self, command: &[&str], deadline: Duration) -> Result<Output> {
        let (place, arguments) = self.entered(command)?;
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        place.run(Path::new("/usr/bin/nsenter"), &arguments, deadline)
    }

    /// A command on the node that is talked to.
    ///
    /// # Errors
    /// It cannot start.
    pub fn converse(&self, command: &[&str]) -> Result<Conversation> {
        Conversation::start(self.command(command)?)
    }

    /// As [`Node::run`], to be started by the caller.
    ///
    /// # Errors
    /// The node is off.
    pub fn command(&self, command: &[&str]) -> Result<Command> {
        let (place, arguments) = self.entered(command)?;
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        place.command(Path::new("/usr/bin/nsenter"), &arguments)
    }

    fn entered(&self, command: &[&str]) -> Result<(Place, Vec<String>)> {
        let pid = self.pid()?.to_string();
        let path = format!("PATH={}", self.search_path());
        let enter = ["-t", &pid, "-m", "-u", "-i", "-n", "-p", "-C", "--", "/usr/bin/env", &path];
        let place = Place {
            netns: self.netns.path(),
            cgroup: None,
            unprivileged: false,
        };
        Ok((place, enter.iter().chain(command).map(ToString::to_string).collect()))
    }

    /// Makes an image known to the node's container runtime.
    ///
    /// # Errors
    /// It is refused: as containerd says.
    pub fn load_image(&self, archive: &Path) -> Result<()> {
        let archive = archive.to_str().context("a path")?;
        let import = ["ctr", "-n", "k8s.io", "images", "import", archive];
        let output = self.run(&import, IMPORT_DEADLINE)?;
        output.ok(&format!("{}: importing {archive}", self.name)).map(drop)
    }

    /// Gives an image of the node's container runtime another name, too.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn tag_image(&self, from: &str, to: &str) -> Result<()> {
        let tag = ["ctr", "-n", "k8s.io", "images", "tag", "--force", from, to];
        let output = self.run(&tag, IMPORT_DEADLINE)?;
        output.ok(&format!("{}: {from} as {to}", self.name)).map(drop)
    }

    /// Its cgroups that are there.
    ///
    /// # Errors
    /// The hierarchies cannot be mounted.
    pub fn cgroups(&self) -> Result<Vec<PathBuf>> {
        self.cgroups.present()
    }

    /// For failure output.
    #[must_use]
    pub fn log_ends(&self) -> String {
        let logs = ["init", CONTAINERD, "kubelet", "kube-proxy"];
        let ends = logs.map(|log| {
            let end = tail(&self.folder.join(format!("{log}.log")), 15);
            format!("--- {} of {}:\n{end}\n", log, self.name)
        });
        ends.concat()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Killed by its parent's end otherwise, which nobody would wait for.
        if self.process.is_some() {
            let _ = self.kill();
        }
    }
}
