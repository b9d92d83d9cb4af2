//! Two nodes, their Pods and the network between them, before any mesh.
//!
//! ```text
//!   Pod eth0 ── veth ── node-1 ─┐                 ┌─ node-2 ── veth ── eth0 Pod
//!   10.61.1.x, fd61:1::x        └── br0 (world) ──┘        10.61.2.x, fd61:2::x
//!                                  10.61.0.1, fd61::1
//! ```
//! The world between is where the control plane runs, and what lies outside the mesh. All namespaces are the run's own, so
//! the addresses can be the same in every run.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::cgroup::{self, Cgroup};
use crate::disk;
use crate::netns::{self, Netns};
use crate::process::Place;
use crate::run_folder::{self, RunFolder};
use crate::run_id::RunId;

/// The node's end of every Pod's veth: the Pod's gateway.
const GATEWAY_V4: &str = "169.254.1.1";
const GATEWAY_V6: &str = "fe80::1";

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum NodeName {
    One,
    Two,
}

impl NodeName {
    pub const ALL: [Self; 2] = [Self::One, Self::Two];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::One => "node-1",
            Self::Two => "node-2",
        }
    }

    fn number(self) -> u8 {
        match self {
            Self::One => 1,
            Self::Two => 2,
        }
    }

    /// The node's own addresses on the network between the nodes.
    #[must_use]
    pub fn addresses(self) -> (Ipv4Addr, Ipv6Addr) {
        let host = 10 + self.number();
        (
            Ipv4Addr::new(10, 61, 0, host),
            Ipv6Addr::new(0xfd61, 0, 0, 0, 0, 0, 0, host.into()),
        )
    }

    /// The ranges of its Pods.
    #[must_use]
    pub fn pod_cidrs(self) -> [String; 2] {
        [
            format!("10.61.{}.0/24", self.number()),
            format!("fd61:{}::/64", self.number()),
        ]
    }
}

/// IPv4, IPv6, and IPv4 through an IPv6 socket (v4-mapped): the address forms of every check.
#[must_use]
pub fn forms(v4: Ipv4Addr, v6: Ipv6Addr) -> [IpAddr; 3] {
    [v4.into(), v6.into(), v4.to_ipv6_mapped().into()]
}

/// The addresses of the world between the nodes.
pub const WORLD_V4: Ipv4Addr = Ipv4Addr::new(10, 61, 0, 1);
pub const WORLD_V6: Ipv6Addr = Ipv6Addr::new(0xfd61, 0, 0, 0, 0, 0, 0, 1);

#[derive(Debug)]
pub struct Topology {
    id: RunId,
    // Dropped in this order: Pods before their node, namespaces before cgroups.
    pods: BTreeMap<String, PodPlace>,
    nodes: BTreeMap<NodeName, NodePlace>,
    world: Netns,
    folder: RunFolder,
}

#[derive(Debug)]
pub struct PodPlace {
    pub node: NodeName,
    pub netns: Netns,
    pub cgroup: Cgroup,
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
}

impl PodPlace {
    /// Where its applications run: unprivileged, in the Pod's own cgroup.
    #[must_use]
    pub fn place(&self) -> Place {
        Place {
            netns: self.netns.path(),
            cgroup: Some(self.cgroup.path().to_owned()),
            unprivileged: true,
        }
    }

    #[must_use]
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }

    /// Every way in which an application may write this Pod as a destination.
    #[must_use]
    pub fn forms(&self) -> [IpAddr; 3] {
        forms(self.v4, self.v6)
    }

    /// Its own address of the family in which `destination` is spoken to.
    #[must_use]
    pub fn own_address(&self, destination: IpAddr) -> IpAddr {
        if destination.to_canonical().is_ipv4() {
            self.v4.into()
        } else {
            self.v6.into()
        }
    }
}

#[derive(Debug)]
pub struct NodePlace {
    pub netns: Netns,
    agent_cgroup: Cgroup,
    pub cgroup: Cgroup,
    pub bpffs: BpfMount,
    /// Logs, token, access log.
    pub folder: PathBuf,
}

impl NodePlace {
    /// Where the agent runs.
    #[must_use]
    pub fn agent_place(&self) -> Place {
        Place {
            netns: self.netns.path(),
            cgroup: Some(self.agent_cgroup.path().to_owned()),
            unprivileged: false,
        }
    }

    #[must_use]
    pub fn run_dir(&self) -> PathBuf {
        self.folder.join("run")
    }

    #[must_use]
    pub fn pin_path(&self) -> PathBuf {
        self.bpffs.0.join("culvert")
    }
}

impl Topology {
    /// # Errors
    /// No root, or iproute2, cgroup v2 or bpffs is missing.
    pub fn create() -> Result<Self> {
        sweep();
        let id = RunId::new();
        let folder = RunFolder::create(id.folder())?;
        let world = Netns::create(id.name("world"))?;
        world.batch(&[
            "link add br0 type bridge".into(),
            "link set br0 up".into(),
            format!("addr add {WORLD_V4}/24 dev br0"),
            format!("addr add {WORLD_V6}/64 dev br0 nodad"),
        ])?;
        let mut topology = Self {
            id,
            pods: BTreeMap::new(),
            nodes: BTreeMap::new(),
            world,
            folder,
        };
        for name in NodeName::ALL {
            let node = topology.create_node(name)?;
            topology.nodes.insert(name, node);
        }
        Ok(topology)
    }

    fn create_node(&self, name: NodeName) -> Result<NodePlace> {
        let label = name.as_str();
        let netns = Netns::create(self.id.name(label))?;
        for key in ["ipv4.ip_forward", "ipv6.conf.all.forwarding"] {
            netns.set_sysctl(key, "1")?;
        }
        netns.batch(&[format!(
            "link add uplink type veth peer name {label} netns {}",
            self.world.name()
        )])?;
        let to_node = |node: NodeName| {
            let [v4, v6] = node.pod_cidrs();
            let (via_v4, via_v6) = node.addresses();
            [format!("route add {v4} via {via_v4}"), format!("route add {v6} via {via_v6}")]
        };
        self.world
            .batch(&[format!("link set {label} master br0"), format!("link set {label} up")])?;
        let (v4, v6) = name.addresses();
        let mut lines = vec![
            "link set uplink up".to_owned(),
            format!("addr add {v4}/24 dev uplink"),
            format!("addr add {v6}/64 dev uplink nodad"),
            format!("route add default via {WORLD_V4}"),
            format!("route add default via {WORLD_V6}"),
        ];
        for other in NodeName::ALL.into_iter().filter(|other| *other != name) {
            lines.extend(to_node(other));
        }
        netns.batch(&lines)?;
        self.world.batch(&to_node(name))?;
        let folder = self.folder.path().join(label);
        std::fs::create_dir(&folder)?;
        let cgroup = Cgroup::at_root(&self.id.name(label))?;
        Ok(NodePlace {
            netns,
            agent_cgroup: cgroup.child("agent")?,
            cgroup,
            bpffs: BpfMount::create(folder.join("bpf"))?,
            folder,
        })
    }

    /// A new Pod; its host part is the same in both families.
    ///
    /// # Errors
    /// The name is taken, or iproute2 refuses.
    pub fn add_pod(&mut self, name: &str, node: NodeName, host: u8) -> Result<()> {
        let v4 = Ipv4Addr::new(10, 61, node.number(), host);
        let v6 = Ipv6Addr::new(0xfd61, node.number().into(), 0, 0, 0, 0, 0, host.into());
        self.place_pod(name, node, (v4, v6), &format!("pod{host}"))
    }

    /// A new Pod with addresses that another one had, on any node: from now on everybody's packets to them go there.
    ///
    /// # Errors
    /// As [`Topology::add_pod`].
    pub fn add_pod_at(&mut self, name: &str, node: NodeName, addresses: (Ipv4Addr, Ipv6Addr)) -> Result<()> {
        self.place_pod(name, node, addresses, &format!("pod-{name}"))?;
        let (v4, v6) = addresses;
        let (via_v4, via_v6) = node.addresses();
        let detour = [
            format!("route replace {v4} via {via_v4}"),
            format!("route replace {v6} via {via_v6}"),
        ];
        self.world.batch(&detour)?;
        for (other, place) in &self.nodes {
            if *other != node {
                place.netns.batch(&detour)?;
            }
        }
        Ok(())
    }

    fn place_pod(&mut self, name: &str, node: NodeName, (v4, v6): (Ipv4Addr, Ipv6Addr), device: &str) -> Result<()> {
        if self.pods.contains_key(name) {
            bail!("the Pod {name} exists");
        }
        let place = self.node(node);
        let netns = Netns::create(self.id.name(name))?;
        place.netns.batch(&[
            format!("link add {device} type veth peer name eth0 netns {}", netns.name()),
            format!("addr add {GATEWAY_V4}/32 dev {device}"),
            format!("addr add {GATEWAY_V6}/64 dev {device} nodad"),
            format!("link set {device} up"),
            format!("route replace {v4} dev {device}"),
            format!("route replace {v6} dev {device}"),
        ])?;
        netns.batch(&[
            "link set eth0 up".into(),
            format!("addr add {v4}/32 dev eth0"),
            format!("addr add {v6}/128 dev eth0 nodad"),
            format!("route add {GATEWAY_V4} dev eth0"),
            format!("route add default via {GATEWAY_V4}"),
            format!("route add default via {GATEWAY_V6} dev eth0"),
        ])?;
        let cgroup = place.cgroup.child(&format!("pod-{name}"))?;
        self.pods.insert(
            name.to_owned(),
            PodPlace {
                node,
                netns,
                cgroup,
                v4,
                v6,
            },
        );
        Ok(())
    }

    /// Removes a Pod as a container runtime does: its namespace goes.
    pub fn remove_pod(&mut self, name: &str) {
        self.pods.remove(name);
    }

    /// # Panics
    /// There is no such Pod: a mistake in the test.
    #[must_use]
    pub fn pod(&self, name: &str) -> &PodPlace {
        self.pods.get(name).unwrap_or_else(|| panic!("the testbed has no Pod {name}"))
    }

    pub fn pods(&self) -> impl Iterator<Item = (&str, &PodPlace)> {
        self.pods.iter().map(|(name, pod)| (name.as_str(), pod))
    }

    #[must_use]
    pub fn node(&self, name: NodeName) -> &NodePlace {
        &self.nodes[&name]
    }

    #[must_use]
    pub fn world(&self) -> &Netns {
        &self.world
    }

    #[must_use]
    pub fn world_place(&self) -> Place {
        Place {
            netns: self.world.path(),
            cgroup: None,
            unprivileged: false,
        }
    }

    /// The run's folder: world-traversable, with a folder for each node.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }
}

/// A bpf file system of a node's own, so that the pins of two nodes cannot meet.
#[derive(Debug)]
pub struct BpfMount(PathBuf);

impl BpfMount {
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    fn create(path: PathBuf) -> Result<Self> {
        use nix::mount::{MsFlags, mount};
        std::fs::create_dir(&path)?;
        mount(Some("bpf"), &path, Some("bpf"), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("mounting a bpf file system at {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for BpfMount {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

/// Removes what killed runs left behind.
pub(crate) fn sweep() {
    netns::sweep();
    cgroup::sweep();
    let of_nodes = NodeName::ALL
        .iter()
        .flat_map(|node| ["bpf", "run"].map(|mount| format!("{}/{mount}", node.as_str())));
    let mounts: Vec<String> = of_nodes.chain([disk::FOLDER.to_owned()]).collect();
    run_folder::sweep(&mounts);
}
