use std::net::IpAddr;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::buffers::PodBuffers;
use super::limits::Limits;
use super::quota::Quota;
use crate::addr::{ClientAddr, OriginalDst};
use crate::balance::Affinities;
use crate::capture::{PodNetwork, Probes};
use crate::identity::Identity;
use crate::state::State;
use crate::telemetry::Peer;
use crate::workload::Workload;

/// An enrolled Pod, as the proxy serves it.
#[derive(Clone, Debug)]
pub struct ProxyPod {
    /// The Pod's metadata.uid: stands for its network namespace.
    pub pod_uid: Arc<str>,
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    pub identity: Identity,
    pub addresses: Vec<IpAddr>,
    pub network: Arc<dyn PodNetwork>,
    pub probes: Arc<Probes>,
}

/// What a Pod's connections share: its bounds, so that one Pod cannot starve the others, and its end.
#[derive(Debug)]
pub(super) struct PodContext {
    pub pod: ProxyPod,
    pub shutdown: CancellationToken,
    /// Its listeners close; its connections go on.
    pub stop_accepting: CancellationToken,
    pub tasks: TaskTracker,
    /// Of those, what accepts and what was accepted: a connection is here before it is registered anywhere.
    pub accepted: TaskTracker,
    pub outbound_tunnels: Arc<Semaphore>,
    pub inbound_tunnels: Arc<Quota>,
    pub handshakes: Arc<Quota>,
    /// What its connections hold.
    pub buffers: Arc<PodBuffers>,
    /// Which endpoints it keeps as a client.
    pub affinities: Mutex<Affinities>,
}

impl PodContext {
    pub(super) fn new(pod: ProxyPod, limits: &Limits, buffers: Arc<PodBuffers>) -> Arc<Self> {
        Arc::new(Self {
            pod,
            shutdown: CancellationToken::new(),
            stop_accepting: CancellationToken::new(),
            tasks: TaskTracker::new(),
            accepted: TaskTracker::new(),
            outbound_tunnels: Arc::new(Semaphore::new(limits.outbound_tunnels_per_pod)),
            inbound_tunnels: Quota::new(limits.inbound_tunnels),
            handshakes: Quota::new(limits.handshakes),
            buffers,
            affinities: Mutex::new(Affinities::new(limits.affinities_per_pod)),
        })
    }

    /// The application's end of a connection as everybody else knows it. To us it came by the loopback address, to which the
    /// kernel redirected it; what leaves the Pod has the Pod's own address of the destination's family.
    pub(super) fn application(&self, client: ClientAddr, destination: OriginalDst) -> ClientAddr {
        let of_family = |own: &&IpAddr| own.is_ipv4() == destination.ip().is_ipv4();
        match self.pod.addresses.iter().find(of_family) {
            Some(own) if client.ip().is_loopback() => ClientAddr::new((*own, client.port()).into()),
            _ => client,
        }
    }

    /// What discovery knows of this Pod, and not of another that has, or had, one of its addresses.
    pub(super) fn workload(&self, state: &State) -> Option<Arc<Workload>> {
        let ProxyPod { namespace, name, .. } = &self.pod;
        self.pod.addresses.iter().find_map(|ip| state.pod_at(*ip, namespace, name))
    }

    /// This Pod as one end of a connection; by its own name while discovery doesn't know it.
    pub(super) fn peer(&self, end: Peer, state: &State) -> Peer {
        match self.workload(state) {
            Some(workload) => end.workload(Some(&workload)),
            None => Peer {
                workload: self.pod.name.clone(),
                namespace: self.pod.namespace.clone(),
                ..end
            },
        }
    }
}
