//! Every connection of every Pod, from before its policy check until its end. What is registered can be cut; there is no moment
//! in which a connection is allowed and not yet here.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::buffers::{Account, Buffers, PodBuffers};
use super::error::{ProxyError, Refusal, ResetBy};
use super::limits::Limits;
use super::proof::Proof;
use super::review::CutBy;
use crate::addr::OriginalDst;
use crate::identity::Identity;
use crate::telemetry::{ConnectionPath, Direction};
use crate::workload::Workload;

/// Where a connection goes that was let out in clear.
#[derive(Clone, Debug)]
pub(super) struct InClear {
    /// For a service's address, an endpoint of it.
    pub to: OriginalDst,
    /// Who had that address by then.
    pub holder: Option<Arc<Workload>>,
    /// When a review first found that it would go by a tunnel now, to the same holder.
    pub protected_at: Option<Instant>,
}

/// What a decision to cut needs to know.
#[derive(Clone, Debug)]
pub struct ConnectionInfo {
    pub direction: Direction,
    pub path: ConnectionPath,
    /// Proven; none for plaintext, and none outbound: the Pod itself.
    pub source: Option<Identity>,
    pub source_address: SocketAddr,
    pub destination: SocketAddr,
    /// Outbound, and not in a tunnel.
    pub(super) in_clear: Option<InClear>,
    /// Of the tunnel that carries it; none before there is one.
    pub(super) proof: Option<Arc<Proof>>,
    /// Its source was found at its address.
    pub(super) decided: bool,
}

impl ConnectionInfo {
    #[must_use]
    pub fn new(direction: Direction, path: ConnectionPath, source_address: SocketAddr, destination: SocketAddr) -> Self {
        Self {
            direction,
            path,
            source: None,
            source_address,
            destination,
            in_clear: None,
            proof: None,
            decided: false,
        }
    }
}

#[derive(Debug)]
struct Entry {
    info: ConnectionInfo,
    cut: Arc<Cut>,
}

/// The end of a connection that its ends did not want.
#[derive(Debug, Default)]
struct Cut {
    token: CancellationToken,
    by: OnceLock<CutBy>,
}

#[derive(Debug, Default)]
struct Inner {
    next_id: u64,
    pods: HashMap<Arc<str>, Connections>,
}

/// A Pod's.
#[derive(Debug)]
struct Connections {
    entries: HashMap<u64, Entry>,
    /// Inbound ones that are not decided, by their source's address.
    undecided: HashMap<IpAddr, usize>,
    buffers: Arc<PodBuffers>,
}

#[derive(Debug)]
pub struct Registry {
    inner: Mutex<Inner>,
    buffers: Arc<Buffers>,
    limits: Limits,
}

impl Default for Registry {
    fn default() -> Self {
        Self::new(&Limits::default())
    }
}

impl Registry {
    #[must_use]
    pub fn new(limits: &Limits) -> Self {
        Self {
            inner: Mutex::default(),
            buffers: Buffers::new(limits),
            limits: limits.clone(),
        }
    }

    #[must_use]
    pub fn with_limit(per_pod: usize) -> Self {
        Self::new(&Limits {
            connections_per_pod: per_pod,
            ..Limits::default()
        })
    }

    /// What the connections hold.
    #[must_use]
    pub fn buffers(&self) -> &Arc<Buffers> {
        &self.buffers
    }

    /// # Errors
    /// The Pod has as many connections as it may have, or as many from this source that are not decided.
    pub fn register(self: &Arc<Self>, pod_uid: &Arc<str>, info: ConnectionInfo) -> Result<Registered, ProxyError> {
        let mut inner = self.inner.lock();
        let id = inner.next_id;
        let connections = inner.pods.entry(pod_uid.clone()).or_insert_with(|| Connections {
            entries: HashMap::new(),
            undecided: HashMap::new(),
            buffers: self.buffers.pod(pod_uid),
        });
        if connections.entries.len() >= self.limits.connections_per_pod {
            return Err(Refusal::Limit.into());
        }
        let mut undecided_from = None;
        if info.direction == Direction::Inbound {
            let source = info.source_address.ip();
            let undecided = connections.undecided.get(&source).copied().unwrap_or(0);
            if undecided >= self.limits.undecided_per_source {
                return Err(Refusal::Limit.into());
            }
            connections.undecided.insert(source, undecided + 1);
            undecided_from = Some(source);
        }
        let cut = Arc::<Cut>::default();
        let asked = info.destination;
        connections.entries.insert(id, Entry { info, cut: cut.clone() });
        let account = connections.buffers.account();
        inner.next_id += 1;
        Ok(Registered {
            registry: self.clone(),
            pod_uid: pod_uid.clone(),
            id,
            undecided_from: Mutex::new(undecided_from),
            asked,
            cut,
            account,
        })
    }

    /// Cuts those of a Pod's connections that `denied_by` names a reason for, and says by what each was.
    pub fn cut(&self, pod_uid: &str, mut denied_by: impl FnMut(&mut ConnectionInfo) -> Option<CutBy>) -> Vec<CutBy> {
        let mut inner = self.inner.lock();
        let entries = inner
            .pods
            .get_mut(pod_uid)
            .into_iter()
            .flat_map(|pod| pod.entries.values_mut());
        entries
            .filter(|entry| !entry.cut.token.is_cancelled())
            .filter_map(|entry| {
                let by = denied_by(&mut entry.info)?;
                // Before the token: whoever sees the connection cut finds the reason.
                let by = entry.cut.by.get_or_init(|| by).clone();
                entry.cut.token.cancel();
                Some(by)
            })
            .collect()
    }

    fn change(&self, of: &Registered, change: impl FnOnce(&mut Connections, u64)) {
        if let Some(connections) = self.inner.lock().pods.get_mut(&of.pod_uid) {
            change(connections, of.id);
        }
    }

    #[must_use]
    pub fn count(&self, pod_uid: &str) -> usize {
        self.inner
            .lock()
            .pods
            .get(pod_uid)
            .map_or(0, |connections| connections.entries.len())
    }
}

/// A registered connection; released when dropped.
#[derive(Debug)]
pub struct Registered {
    registry: Arc<Registry>,
    pod_uid: Arc<str>,
    id: u64,
    undecided_from: Mutex<Option<IpAddr>>,
    asked: SocketAddr,
    cut: Arc<Cut>,
    account: Arc<Account>,
}

impl Registered {
    /// Resolves when the connection is to be cut.
    pub(super) async fn cut_off(&self) -> ProxyError {
        self.cut.token.cancelled().await;
        ProxyError::Reset(match self.cut_by() {
            Some(CutBy::Settings) => ResetBy::Settings,
            Some(CutBy::Revoked) => ResetBy::Revocation,
            Some(CutBy::RootRemoved) => ResetBy::RemovedRoot,
            Some(CutBy::NewHolder) => ResetBy::NewHolder,
            Some(CutBy::Protection) => ResetBy::Protection,
            Some(CutBy::Policy(_) | CutBy::NoAllowMatched) | None => ResetBy::Policy,
        })
    }

    /// What cut it, if that has happened.
    pub fn cut_by(&self) -> Option<&CutBy> {
        self.cut.by.get()
    }

    /// The destination that it was registered with.
    pub(super) fn asked(&self) -> SocketAddr {
        self.asked
    }

    /// What it holds of data.
    pub(super) fn account(&self) -> &Arc<Account> {
        &self.account
    }

    pub(super) fn half_closed_idle(&self) -> Duration {
        self.registry.limits.half_closed_idle
    }

    /// It may go on to its destination.
    pub(super) fn decided(&self) {
        self.account.opened();
        let source = self.undecided_from.lock().take();
        self.registry.change(self, |connections, id| {
            if let Some(source) = source {
                connections.no_longer_undecided(source);
            }
            if let Some(entry) = connections.entries.get_mut(&id) {
                entry.info.decided = true;
            }
        });
    }

    /// From now on it is cut when what it asked for, or this, takes nothing in clear. Whoever calls looks at that once more afterwards.
    /// `holder`: who has the address.
    pub(super) fn goes_in_clear(&self, to: OriginalDst, holder: Option<Arc<Workload>>) {
        let in_clear = InClear {
            to,
            holder,
            protected_at: None,
        };
        self.is_in_clear(Some(in_clear));
    }

    /// It does not after all.
    pub(super) fn goes_not_in_clear(&self) {
        self.is_in_clear(None);
    }

    fn is_in_clear(&self, in_clear: Option<InClear>) {
        self.registry.change(self, |connections, id| {
            if let Some(entry) = connections.entries.get_mut(&id) {
                entry.info.in_clear = in_clear;
            }
        });
    }

    /// From now on it is cut with what this tunnel's ends have proven. Whoever calls looks at that once more afterwards.
    pub(super) fn rely_on(&self, proof: &Arc<Proof>) {
        self.registry.change(self, |connections, id| {
            if let Some(entry) = connections.entries.get_mut(&id) {
                entry.info.proof = Some(proof.clone());
            }
        });
    }
}

impl Connections {
    fn no_longer_undecided(&mut self, source: IpAddr) {
        if let Some(undecided) = self.undecided.get_mut(&source) {
            *undecided -= 1;
            if *undecided == 0 {
                self.undecided.remove(&source);
            }
        }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let undecided_from = self.undecided_from.get_mut().take();
        let mut inner = self.registry.inner.lock();
        if let Some(connections) = inner.pods.get_mut(&self.pod_uid) {
            connections.entries.remove(&self.id);
            if let Some(source) = undecided_from {
                connections.no_longer_undecided(source);
            }
            if connections.entries.is_empty() {
                inner.pods.remove(&self.pod_uid);
            }
        }
    }
}
