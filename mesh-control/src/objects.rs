//! The objects that the mesh is compiled from, whichever registry they came from.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use mesh_api::{ValidMeshConfig, ValidPolicy};
use serde::{Deserialize, Serialize};

use crate::capture_states::CaptureState;
use crate::network_policy::NetworkPolicy;

/// What makes two documents the same object. Cluster-wide kinds have an empty namespace.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ObjectId {
    pub kind: Kind,
    pub namespace: String,
    pub name: String,
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            write!(f, "{} {}", self.kind.as_str(), self.name)
        } else {
            write!(f, "{} {}/{}", self.kind.as_str(), self.namespace, self.name)
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Kind {
    Namespace,
    Node,
    ServiceAccount,
    Service,
    EndpointSlice,
    Pod,
    AuthorizationPolicy,
    MeshConfig,
    NetworkPolicy,
}

impl Kind {
    pub const ALL: [Self; 9] = [
        Self::Namespace,
        Self::Node,
        Self::ServiceAccount,
        Self::Service,
        Self::EndpointSlice,
        Self::Pod,
        Self::AuthorizationPolicy,
        Self::MeshConfig,
        Self::NetworkPolicy,
    ];

    /// Only advice comes of it: nobody waits for it, and where it may not be read, nothing is out of date.
    #[must_use]
    pub fn is_advice(self) -> bool {
        self == Self::NetworkPolicy
    }

    /// `None`: a kind that the mesh does not read from files. EndpointSlices are a cluster's own finding of who is ready; a file of
    /// them would be out of date when it is written. NetworkPolicies are for a cluster's network to enforce.
    #[must_use]
    pub fn of(api_version: &str, kind: &str) -> Option<Self> {
        match (api_version, kind) {
            ("v1", "Namespace") => Some(Self::Namespace),
            ("v1", "Node") => Some(Self::Node),
            ("v1", "ServiceAccount") => Some(Self::ServiceAccount),
            ("v1", "Service") => Some(Self::Service),
            ("v1", "Pod") => Some(Self::Pod),
            (mesh_api::API_VERSION, "AuthorizationPolicy") => Some(Self::AuthorizationPolicy),
            (mesh_api::API_VERSION, "MeshConfig") => Some(Self::MeshConfig),
            _ => None,
        }
    }

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Namespace => "Namespace",
            Self::Node => "Node",
            Self::ServiceAccount => "ServiceAccount",
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Pod => "Pod",
            Self::AuthorizationPolicy => "AuthorizationPolicy",
            Self::MeshConfig => "MeshConfig",
            Self::NetworkPolicy => "NetworkPolicy",
        }
    }

    #[must_use]
    pub fn is_namespaced(self) -> bool {
        !matches!(self, Self::Namespace | Self::Node)
    }
}

pub type Labels = BTreeMap<String, String>;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    Namespace {
        labels: Labels,
        /// Asked for by label or annotation: its Pods start even where they cannot be enrolled.
        best_effort: bool,
    },
    Node(Node),
    ServiceAccount,
    Service(Service),
    EndpointSlice(EndpointSlice),
    Pod(Box<Pod>),
    AuthorizationPolicy(Box<ValidPolicy>),
    MeshConfig(Box<ValidMeshConfig>),
    NetworkPolicy(Box<NetworkPolicy>),
}

/// What no two objects may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Claim<'a> {
    Address(IpAddr),
    /// Of a Pod. What its agent proves is kept by it: a second Pod with it would speak for the first.
    Uid(&'a str),
}

impl Object {
    pub fn claims(&self) -> impl Iterator<Item = Claim<'_>> {
        let uid = match self {
            Self::Pod(pod) if !pod.uid.is_empty() => Some(Claim::Uid(&pod.uid)),
            _ => None,
        };
        uid.into_iter()
            .chain(self.exclusive_addresses().iter().map(|ip| Claim::Address(*ip)))
    }

    /// Addresses that no other object may have.
    #[must_use]
    pub fn exclusive_addresses(&self) -> &[IpAddr] {
        match self {
            Self::Service(service) => &service.addresses,
            Self::Pod(pod) if !pod.host_network && !pod.finished => &pod.addresses,
            _ => &[],
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    pub labels: Labels,
    pub pod_ranges: Vec<IpNet>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    /// Empty where the manifest has none.
    pub uid: String,
    pub labels: Labels,
    pub addresses: Vec<IpAddr>,
    /// Empty until it is scheduled.
    pub node: String,
    pub service_account: String,
    pub host_network: bool,
    /// Another maker's ambient proxy captures it, and says so.
    pub captured_elsewhere: bool,
    /// What its annotation says of its capture; it counts only where the API server is the registry.
    pub annotated: Option<CaptureState>,
    /// It has that annotation in a form that says nothing: of another Pod's uid, or no state's name.
    pub is_annotation_foreign: bool,
    /// What its annotation tells people of why it is not protected; nothing is decided by it but whether it is written again.
    pub problem: Option<String>,
    /// What shows that it brings the proxy of another mesh along.
    pub sidecar: Option<&'static str>,
    /// Its node's kubelet has it from a file, and shows it to the API server under another uid.
    pub is_static: bool,
    /// Empty: the runtime's default.
    pub runtime_class: String,
    /// Phase `Succeeded` or `Failed`: its address belongs to it no more.
    pub finished: bool,
    /// It has a deletion timestamp: it still runs, and gets no new work.
    pub terminating: bool,
    pub ready: bool,
    /// Kind and name of the controlling owner.
    pub owner: Option<(String, String)>,
    /// TCP ports of its containers by name.
    pub named_ports: BTreeMap<String, u16>,
    /// At which the kubelet asks it, sorted.
    pub probe_ports: Vec<u16>,
}

impl Pod {
    /// For new connections.
    #[must_use]
    pub fn is_healthy(&self) -> bool {
        self.ready && !self.terminating
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Service {
    pub addresses: Vec<IpAddr>,
    pub ports: Vec<ServicePort>,
    /// Empty selects nothing.
    pub selector: Labels,
    pub publish_not_ready: bool,
    /// It is another name for something outside, and nothing of the mesh's.
    pub is_external_name: bool,
    /// `sessionAffinity: ClientIP`: for how long after its last connection a client keeps its endpoint.
    pub affinity_seconds: Option<u32>,
    /// `internalTrafficPolicy: Local`.
    pub node_local: bool,
    /// `trafficDistribution`: endpoints near by are asked for first, which agents do not do.
    pub prefers_near: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Empty where it has none.
    pub name: String,
    pub port: u16,
    pub target: TargetPort,
}

/// Some of a Service's endpoints, as the cluster sees them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EndpointSlice {
    /// The Service's name; empty: nobody's.
    pub service: String,
    /// Name of the Service's port, and the port of the endpoints.
    pub ports: Vec<(String, u16)>,
    pub endpoints: Vec<Endpoint>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub address: IpAddr,
    /// The Pod of the slice's namespace that it is, where the slice says so.
    pub pod: Option<String>,
    /// For new connections. False of what terminates, unless the Service publishes what is not ready.
    pub ready: bool,
    /// Empty where the slice does not say. A Pod says it itself.
    pub node: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetPort {
    Number(u16),
    Name(String),
}

/// Everything that is in force, by its identity.
pub type World = BTreeMap<ObjectId, std::sync::Arc<Object>>;
