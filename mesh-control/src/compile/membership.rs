//! Which Pods belong in the mesh, and what each node is told of its own. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use mesh_proto::ROOT_NAMESPACE;

use super::MESH_LABEL;
use crate::limits::{MAX_ADDRESSES_TOLD, MAX_MESH_NAMESPACES, MAX_NODE_PODS, MAX_PROBE_PORTS_TOLD, MAX_REFUSED_SHOWN};
use crate::objects::{Labels, ObjectId, Pod};

#[cfg(test)]
mod tests;

/// Never in the mesh: DNS and the control plane would wait for each other.
const KEPT_OUT: [&str; 2] = ["kube-system", ROOT_NAMESPACE];
/// Parts of the names that runtime classes have whose Pods live in a machine of their own, where no program of the node sees their
/// sockets.
const VM_RUNTIMES: [&str; 7] = [
    "kata",
    "gvisor",
    "runsc",
    "firecracker",
    "cloud-hypervisor",
    "hyperv",
    "confidential",
];

/// Of a Namespace, what counts here.
#[derive(Clone, Copy, Debug)]
pub struct Namespace<'a> {
    pub labels: &'a Labels,
    pub best_effort: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Membership {
    Outside,
    Member,
    Refused(Refusal),
}

/// Why a Pod that asks to be a member cannot be one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refusal {
    CapturedElsewhere,
    Sidecar(&'static str),
    Static,
    VmRuntime,
}

impl Refusal {
    pub const REASONS: [&'static str; 4] = ["captured_elsewhere", "sidecar", "static", "vm_runtime"];

    /// Metric label.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::CapturedElsewhere => "captured_elsewhere",
            Self::Sidecar(_) => "sidecar",
            Self::Static => "static",
            Self::VmRuntime => "vm_runtime",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CapturedElsewhere => f.write_str("another mesh captures it; take it out of one of the two"),
            Self::Sidecar(what) => write!(f, "it has another mesh's sidecar ({what}); switch its injection off"),
            Self::Static => f.write_str(
                "it is a static Pod: its identity is the word of its node alone, which may show such Pods in any namespace",
            ),
            Self::VmRuntime => {
                f.write_str("its runtime class runs it in a machine of its own, whose sockets the node does not see")
            }
        }
    }
}

/// What nodes are told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Enrolment {
    pub nodes: BTreeMap<String, Arc<NodePods>>,
    pub namespaces: Arc<Namespaces>,
    /// Labelled, and kept out all the same.
    pub kept_out: Vec<String>,
    /// `namespace/name` of Pods that ask to be members and cannot be.
    pub refused: BTreeMap<String, Refusal>,
    /// `namespace/name` of members that the kubelet asks at more ports than are told → how many they have.
    pub probes_cut: BTreeMap<String, usize>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodePods {
    /// By uid; at most [`MAX_NODE_PODS`].
    pub pods: Vec<NodePod>,
    pub omitted: usize,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Namespaces {
    /// Name → best effort; at most [`MAX_MESH_NAMESPACES`].
    pub names: BTreeMap<String, bool>,
    pub omitted: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodePod {
    pub uid: String,
    pub namespace: String,
    pub name: String,
    pub service_account: String,
    pub addresses: Vec<std::net::IpAddr>,
    pub is_member: bool,
    pub refused: Option<Refusal>,
    /// At most [`MAX_PROBE_PORTS_TOLD`].
    pub probe_ports: Vec<u16>,
}

/// What is said of a namespace that is kept out.
#[must_use]
pub fn kept_out_because() -> String {
    format!(
        "its label {MESH_LABEL}=enabled is ignored, since DNS and the control plane could not start before each other: remove it"
    )
}

impl Enrolment {
    /// What operators should hear of, one line each.
    pub fn warnings(&self) -> impl Iterator<Item = String> {
        let kept_out = self.kept_out.iter();
        let kept_out = kept_out.map(|namespace| format!("namespace {namespace}: {}", kept_out_because()));
        let refused = self
            .refused
            .iter()
            .map(|(pod, refusal)| format!("Pod {pod} is not in the mesh: {refusal}"));
        let omitted = self.nodes.iter().filter(|(_, pods)| pods.omitted > 0).map(|(node, pods)| {
            format!(
                "{node} has {} Pods beyond the {MAX_NODE_PODS} that it is told of: those are not enrolled",
                pods.omitted
            )
        });
        let namespaces = Some(self.namespaces.omitted).filter(|count| *count > 0).map(|count| {
            format!(
                "{count} namespaces beyond the {MAX_MESH_NAMESPACES} that nodes are told of: their Pods start without waiting"
            )
        });
        let probes_cut = self.probes_cut.iter().map(|(pod, ports)| {
            format!(
                "Pod {pod} has probes at {ports} ports: at those beyond the {MAX_PROBE_PORTS_TOLD} lowest the kubelet is taken for \
                 anybody's plaintext"
            )
        });
        kept_out
            .chain(refused.take(MAX_REFUSED_SHOWN))
            .chain(probes_cut.take(MAX_REFUSED_SHOWN))
            .chain(omitted)
            .chain(namespaces)
    }

    /// Those that `before` had not.
    pub fn warnings_since(&self, before: &Self) -> Vec<String> {
        let before: BTreeSet<String> = before.warnings().collect();
        self.warnings().filter(|warning| !before.contains(warning)).collect()
    }
}

#[must_use]
pub fn membership(namespace: Option<&Namespace<'_>>, name: &str, pod: &Pod) -> Membership {
    let opted_out = pod.labels.get(MESH_LABEL).is_some_and(|value| value == "disabled");
    if !is_in_mesh(namespace, name) || opted_out || pod.host_network {
        return Membership::Outside;
    }
    // First: whatever else it says of itself, it gets no identity.
    if pod.is_static {
        return Membership::Refused(Refusal::Static);
    }
    if pod.captured_elsewhere {
        return Membership::Refused(Refusal::CapturedElsewhere);
    }
    if let Some(what) = pod.sidecar {
        return Membership::Refused(Refusal::Sidecar(what));
    }
    let class = pod.runtime_class.to_ascii_lowercase();
    if VM_RUNTIMES.iter().any(|runtime| class.contains(runtime)) {
        return Membership::Refused(Refusal::VmRuntime);
    }
    Membership::Member
}

fn is_labelled(namespace: &Namespace<'_>) -> bool {
    namespace.labels.get(MESH_LABEL).is_some_and(|value| value == "enabled")
}

fn is_in_mesh(namespace: Option<&Namespace<'_>>, name: &str) -> bool {
    namespace.is_some_and(is_labelled) && !KEPT_OUT.contains(&name)
}

pub(super) fn enrolment(namespaces: &BTreeMap<&str, Namespace<'_>>, pods: &[(&ObjectId, &Pod)]) -> Enrolment {
    let mut enrolment = Enrolment::default();
    let mut named = Namespaces::default();
    for (name, namespace) in namespaces {
        if !is_in_mesh(Some(namespace), name) {
            if is_labelled(namespace) {
                enrolment.kept_out.push((*name).to_owned());
            }
        } else if named.names.len() < MAX_MESH_NAMESPACES {
            named.names.insert((*name).to_owned(), namespace.best_effort);
        } else {
            named.omitted += 1;
        }
    }
    enrolment.namespaces = Arc::new(named);
    let mut nodes: BTreeMap<&str, NodePods> = BTreeMap::new();
    for (id, pod) in pods {
        let membership = membership(namespaces.get(id.namespace.as_str()), &id.namespace, pod);
        let refused = match membership {
            Membership::Refused(refusal) => Some(refusal),
            Membership::Member | Membership::Outside => None,
        };
        if membership == Membership::Member && pod.probe_ports.len() > MAX_PROBE_PORTS_TOLD {
            enrolment
                .probes_cut
                .insert(format!("{}/{}", id.namespace, id.name), pod.probe_ports.len());
        }
        if let Some(refusal) = refused {
            enrolment.refused.insert(format!("{}/{}", id.namespace, id.name), refusal);
        }
        // One without a uid is a manifest written by hand: who enrols it knows it.
        if pod.node.is_empty() || pod.uid.is_empty() {
            continue;
        }
        nodes.entry(&pod.node).or_default().pods.push(NodePod {
            uid: pod.uid.clone(),
            namespace: id.namespace.clone(),
            name: id.name.clone(),
            service_account: pod.service_account.clone(),
            // Those on the host's network have the node's, which are nobody's to enrol.
            addresses: if pod.host_network {
                Vec::new()
            } else {
                pod.addresses.iter().copied().take(MAX_ADDRESSES_TOLD).collect()
            },
            is_member: membership == Membership::Member,
            refused,
            probe_ports: pod.probe_ports.iter().copied().take(MAX_PROBE_PORTS_TOLD).collect(),
        });
    }
    enrolment.nodes = nodes
        .into_iter()
        .map(|(node, pods)| (node.to_owned(), Arc::new(pods.bounded())))
        .collect();
    enrolment
}

impl NodePods {
    /// Members are told first; and all in an order that depends on nothing but them.
    fn bounded(mut self) -> Self {
        self.pods.sort_by(|a, b| (!a.is_member, &a.uid).cmp(&(!b.is_member, &b.uid)));
        self.omitted = self.pods.len().saturating_sub(MAX_NODE_PODS);
        self.pods.truncate(MAX_NODE_PODS);
        self.pods.sort_by(|a, b| a.uid.cmp(&b.uid));
        self
    }
}
