//! What the mesh knows of a workload and of a service: domain types, without wire or I/O.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::identity::Identity;

/// Where a Pod stands on its way into the mesh (DESIGN.md, invariant 4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Membership {
    /// Not of the mesh: reached in clear.
    Outside,
    /// Belongs to the mesh, never proven yet.
    Pending,
    /// Reached through a tunnel.
    Proven,
    /// Was proven once: never reached in clear again.
    Lost,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// "cluster/group/kind/namespace/name".
    pub uid: Arc<str>,
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    pub identity: Identity,
    pub addresses: Vec<IpAddr>,
    /// Its addresses are its node's: they name no workload.
    pub host_network: bool,
    /// The name of the node that it runs on; empty where that is not known.
    pub node: Arc<str>,
    /// The owner, as in metrics and baggage: "deployment", "pod", "job" or "cronjob", and its name.
    pub workload_type: WorkloadType,
    pub workload_name: Arc<str>,
    pub canonical_name: Arc<str>,
    pub canonical_revision: Arc<str>,
    pub cluster: Arc<str>,
    pub region: Arc<str>,
    pub zone: Arc<str>,
    pub membership: Membership,
    /// The Pod's uid, where the control plane tells it; else empty.
    pub pod_uid: Arc<str>,
    /// "namespace/name" of the selector policies that apply.
    pub policies: Vec<Arc<str>>,
    /// The services that it is an endpoint of, by "namespace/hostname".
    pub services: Vec<(Arc<str>, Vec<ServicePort>)>,
    /// Ready, and not about to end: to be given new connections of a service.
    pub healthy: bool,
    /// Its share of a service's connections; 0 gets none.
    pub weight: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkloadType {
    Deployment,
    CronJob,
    Pod,
    Job,
}

impl WorkloadType {
    /// As in the baggage key `k8s.<…>.name`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Deployment => "deployment",
            Self::CronJob => "cronjob",
            Self::Pod => "pod",
            Self::Job => "job",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    pub hostname: Arc<str>,
    pub addresses: Vec<IpAddr>,
    pub ports: Vec<ServicePort>,
    /// Whether only healthy workloads are its endpoints.
    pub only_healthy: bool,
    /// Whether only workloads on the client's own node are its endpoints.
    pub node_local: bool,
    /// For how long after its last connection a client keeps its endpoint.
    pub affinity: Option<Duration>,
}

/// A port of a service, and the workload's port behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServicePort {
    pub port: u16,
    pub target: u16,
}
