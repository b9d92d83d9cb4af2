//! A whole cluster: a control plane in a network namespace of its own, nodes around it, DNS.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::api_server::{self, ApiServer, Seat};
use super::image::Image;
use super::kubectl::Kubectl;
use super::node::Node;
use super::node_config as config;
use super::sweep;
use super::tools::Tools;
use crate::binaries;
use crate::netns::Netns;
use crate::poll;
use crate::process::{Place, Process, tail};
use crate::run_folder::RunFolder;
use crate::run_id::RunId;

/// mesh-test-app and a shell, known to every node.
pub const APP_IMAGE: &str = "culvert.test/app:1";
const DNS_IMAGE: &str = "culvert.test/coredns:1";
const DNS_MANIFESTS: &str = include_str!("../../kube/dns/deployment.yaml");
/// A node is Ready some seconds after it was switched on.
const NODE_DEADLINE: Duration = Duration::from_secs(120);
const MAX_NODES: u8 = 9;

#[derive(Debug)]
pub struct Cluster {
    // Dropped in this order: nodes before what they talk to, processes before their namespace.
    nodes: Vec<Node>,
    controllers: Vec<Process>,
    server: ApiServer,
    _control_plane: Netns,
    id: RunId,
}

impl Cluster {
    /// So many nodes, Ready, with DNS.
    ///
    /// # Errors
    /// The tools are missing, or the first step that failed, with the ends of the logs.
    pub fn start(nodes: u8) -> Result<Self> {
        ensure!(
            (1..=MAX_NODES).contains(&nodes),
            "a cluster has 1 to {MAX_NODES} nodes, not {nodes}"
        );
        sweep();
        let tools = Tools::find()?;
        let id = RunId::new();
        let folder = RunFolder::create(id.folder())?;
        let control_plane = Netns::create(id.name("control-plane"))?;
        control_plane.batch(&[
            format!("link add {} type bridge", config::BRIDGE),
            format!(
                "addr add {}/{} dev {}",
                config::CONTROL_PLANE,
                config::NODES_PREFIX,
                config::BRIDGE
            ),
            format!(
                "addr add {}/{} dev {} nodad",
                config::CONTROL_PLANE_V6,
                config::NODES_PREFIX_V6,
                config::BRIDGE
            ),
            format!("link set {} up", config::BRIDGE),
        ])?;
        control_plane.set_sysctl("ipv4.ip_forward", "1")?;
        control_plane.set_sysctl("ipv6.conf.all.forwarding", "1")?;
        control_plane.set_sysctl("ipv4.conf.all.send_redirects", "0")?;
        let images = images(&tools, folder.path())?;
        let seat = Seat {
            place: Place {
                netns: control_plane.path(),
                cgroup: None,
                unprivileged: false,
            },
            address: config::CONTROL_PLANE,
            advertised: config::CONTROL_PLANE,
            has_controllers: true,
        };
        let server = ApiServer::start_at(seat, folder)?;
        let mut cluster = Self {
            nodes: Vec::new(),
            controllers: Vec::new(),
            server,
            _control_plane: control_plane,
            id,
        };
        match cluster.bring_up(nodes, &images) {
            Ok(()) => Ok(cluster),
            Err(error) => Err(cluster.with_logs(error)),
        }
    }

    fn bring_up(&mut self, nodes: u8, images: &[PathBuf]) -> Result<()> {
        self.start_controllers()?;
        for number in 1..=nodes {
            let node = Node::create(number, &self.id.to_string(), &self._control_plane, &self.server)?;
            self.nodes.push(node);
        }
        // Side by side: most of it is waiting.
        std::thread::scope(|scope| {
            let boots: Vec<_> = self
                .nodes
                .iter_mut()
                .map(|node| {
                    scope.spawn(move || {
                        node.boot()?;
                        images.iter().try_for_each(|image| node.load_image(image))
                    })
                })
                .collect();
            boots
                .into_iter()
                .try_for_each(|boot| boot.join().unwrap_or_else(|_| anyhow::bail!("a node's thread panicked")))
        })?;
        images.iter().try_for_each(std::fs::remove_file)?;
        for number in 1..=nodes {
            self.wait_until_ready(&format!("node-{number}"))?;
        }
        self.kubectl().apply(DNS_MANIFESTS)?;
        self.kubectl().rolled_out("kube-system", "deployment/coredns")?;
        poll::until_true("the default service account", poll::SOON, || {
            Ok(self.kubectl().output(&["get", "serviceaccount", "default"])?.status.success())
        })
    }

    fn start_controllers(&mut self) -> Result<()> {
        let (server, url) = (&self.server, self.server.url());
        let authority = &server.authority;
        let kubeconfig = |name: &str| authority.kubeconfig(name, &url, &format!("system:{name}"), &[]);
        let place = server.place();
        let manager = kubeconfig("kube-controller-manager")?;
        let manager = [
            format!("--kubeconfig={}", manager.display()),
            "--bind-address=127.0.0.1".to_owned(),
            "--use-service-account-credentials=true".to_owned(),
            format!("--service-account-private-key-file={}", authority.accounts_key().display()),
            format!("--root-ca-file={}", authority.certificate().display()),
            format!("--cluster-signing-cert-file={}", authority.certificate().display()),
            format!("--cluster-signing-key-file={}", authority.key().display()),
            "--leader-elect=false".to_owned(),
            // For a node that crashed; a live one renews its lease every four seconds.
            "--node-monitor-grace-period=20s".to_owned(),
        ];
        let scheduler = kubeconfig("kube-scheduler")?.display().to_string();
        let scheduler = [
            format!("--kubeconfig={scheduler}"),
            format!("--authentication-kubeconfig={scheduler}"),
            format!("--authorization-kubeconfig={scheduler}"),
            "--bind-address=127.0.0.1".to_owned(),
            "--leader-elect=false".to_owned(),
        ];
        let start = |name: &str, flags: &[String]| api_server::start(&server.tools, place, name, flags, server.folder());
        self.controllers = vec![
            start("kube-controller-manager", &manager)?,
            start("kube-scheduler", &scheduler)?,
        ];
        Ok(())
    }

    /// # Errors
    /// Not in time.
    pub fn wait_until_ready(&self, node: &str) -> Result<()> {
        poll::until_true(&format!("{node} is Ready"), NODE_DEADLINE, || self.is_ready(node))
    }

    /// Whether the API server says of a node that it is Ready.
    ///
    /// # Errors
    /// There is no such node, or no API server.
    pub fn is_ready(&self, node: &str) -> Result<bool> {
        let node = self.kubectl().get(&["node", node])?;
        let conditions = node["status"]["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
        let ready = conditions.iter().find(|condition| condition["type"] == "Ready");
        Ok(ready.is_some_and(|condition| condition["status"] == "True"))
    }

    #[must_use]
    pub fn server(&self) -> &ApiServer {
        &self.server
    }

    /// The API server is away until [`Cluster::resume_server`], and the nodes go on. The controllers end with it, as they do where
    /// several of them are elected: those that lived through it would take every node for dead, whose lease is older than their patience.
    pub fn stop_server(&mut self) {
        self.controllers.clear();
        self.server.stop();
    }

    /// # Errors
    /// It, or the controllers, do not come up again.
    pub fn resume_server(&mut self) -> Result<()> {
        self.server.resume()?;
        self.start_controllers()
    }

    /// The administrator's.
    #[must_use]
    pub fn kubectl(&self) -> &Kubectl {
        self.server.kubectl()
    }

    #[must_use]
    pub fn tools(&self) -> &Tools {
        &self.server.tools
    }

    /// For files of the test.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.server.folder()
    }

    /// By which everything that belongs to this cluster is named on this machine.
    #[must_use]
    pub fn id(&self) -> &RunId {
        &self.id
    }

    /// Counted from 1: "node-1".
    ///
    /// # Panics
    /// There is no such node: a mistake in the test.
    #[must_use]
    pub fn node(&self, number: usize) -> &Node {
        &self.nodes[number - 1]
    }

    /// # Panics
    /// As [`Cluster::node`].
    pub fn node_mut(&mut self, number: usize) -> &mut Node {
        &mut self.nodes[number - 1]
    }

    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Makes an image, and makes it known to every node. Pods name it as the image is named.
    ///
    /// # Errors
    /// As [`Image::write`], or a container runtime refuses it.
    pub fn load_image(&self, image: &Image) -> Result<()> {
        let archive = archive_path(self.folder(), image.name());
        image.write(&archive)?;
        self.load_archive(&archive)?;
        Ok(std::fs::remove_file(archive)?)
    }

    /// Makes an image that is written already known to every node, by the name that it says.
    ///
    /// # Errors
    /// It is refused.
    pub fn load_archive(&self, archive: &Path) -> Result<()> {
        self.nodes.iter().try_for_each(|node| node.load_image(archive))
    }

    /// Gives an image another name, too, on every node.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn tag_image(&self, from: &str, to: &str) -> Result<()> {
        self.nodes.iter().try_for_each(|node| node.tag_image(from, to))
    }

    /// Of a Pod: its address.
    ///
    /// # Errors
    /// It has none yet, or is not there.
    pub fn pod_address(&self, namespace: &str, pod: &str) -> Result<String> {
        let pod = self.kubectl().get(&["-n", namespace, "pod", pod])?;
        let address = pod["status"]["podIP"].as_str();
        Ok(address.with_context(|| format!("no address: {}", pod["status"]))?.to_owned())
    }

    /// Pods by label ("app=web"), as the API server has them.
    ///
    /// # Errors
    /// kubectl fails.
    pub fn pods(&self, namespace: &str, label: &str) -> Result<Vec<Value>> {
        let mut list = self.kubectl().get(&["-n", namespace, "pods", "-l", label])?;
        serde_json::from_value(list["items"].take()).context("a list of Pods")
    }

    /// For failure output: the ends of all logs, and what the API server knows of Pods.
    #[must_use]
    pub fn with_logs(&self, error: anyhow::Error) -> anyhow::Error {
        let mut text = String::new();
        for log in ["kube-apiserver", "kube-controller-manager", "kube-scheduler"] {
            let end = tail(&self.folder().join(format!("{log}.log")), 8);
            text += &format!("--- {log}:\n{end}\n");
        }
        text.extend(self.nodes.iter().map(Node::log_ends));
        for command in [&["get", "pods", "-A", "-o", "wide"][..], &["get", "events", "-A"][..]] {
            text += &self.kubectl().run(command).unwrap_or_else(|error| format!("{error:#}\n"));
        }
        anyhow::anyhow!("{error:#}\n{text}")
    }
}

/// What every node has from the beginning.
fn images(tools: &Tools, folder: &Path) -> Result<Vec<PathBuf>> {
    let images = [
        Image::new(config::PAUSE_IMAGE)
            .shell(tools)
            .entrypoint(&["/bin/sleep", "inf"]),
        Image::new(DNS_IMAGE)
            .program(&tools.component("coredns"), "/bin/coredns")?
            .entrypoint(&["/bin/coredns"]),
        Image::new(APP_IMAGE)
            .shell(tools)
            .program(&binaries::path("mesh-test-app")?, "/bin/mesh-test-app")?
            .entrypoint(&["/bin/mesh-test-app"]),
    ];
    images
        .iter()
        .map(|image| {
            let path = archive_path(folder, image.name());
            image.write(&path)?;
            Ok(path)
        })
        .collect()
}

fn archive_path(folder: &Path, image: &str) -> PathBuf {
    folder.join(format!("{}.tar", image.replace(['/', ':'], "-")))
}
