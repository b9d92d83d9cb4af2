//! Every connection of every Pod, from before its policy check until its end. What is registered can be cut; there is no moment
//! in which a connection is allowed and not yet here.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use super::error::{ProxyError, Refusal};
use super::limits::CONNECTIONS_PER_POD;
use crate::identity::Identity;
use crate::telemetry::{ConnectionPath, Direction};

/// What a decision to cut needs to know.
#[derive(Clone, Debug)]
pub struct ConnectionInfo {
    pub direction: Direction,
    pub path: ConnectionPath,
    /// Proven; none for plaintext, and none outbound: the Pod itself.
    pub source: Option<Identity>,
    pub source_address: SocketAddr,
    pub destination: SocketAddr,
}

#[derive(Debug)]
struct Entry {
    info: ConnectionInfo,
    cut: CancellationToken,
}

#[derive(Debug, Default)]
struct Inner {
    next_id: u64,
    pods: HashMap<Arc<str>, HashMap<u64, Entry>>,
}

#[derive(Debug)]
pub struct Registry {
    inner: Mutex<Inner>,
    per_pod: usize,
}

impl Default for Registry {
    fn default() -> Self {
        Self::with_limit(CONNECTIONS_PER_POD)
    }
}

impl Registry {
    #[must_use]
    pub fn with_limit(per_pod: usize) -> Self {
        Self {
            inner: Mutex::default(),
            per_pod,
        }
    }

    /// # Errors
    /// The Pod has as many connections as it may have.
    pub fn register(self: &Arc<Self>, pod_uid: &Arc<str>, info: ConnectionInfo) -> Result<Registered, ProxyError> {
        let mut inner = self.inner.lock();
        let id = inner.next_id;
        let connections = inner.pods.entry(pod_uid.clone()).or_default();
        if connections.len() >= self.per_pod {
            return Err(Refusal::Limit.into());
        }
        let cut = CancellationToken::new();
        connections.insert(id, Entry { info, cut: cut.clone() });
        inner.next_id += 1;
        Ok(Registered {
            registry: self.clone(),
            pod_uid: pod_uid.clone(),
            id,
            cut,
        })
    }

    /// Cuts the connections that `is_denied` picks, and says how many they are.
    pub fn cut(&self, mut is_denied: impl FnMut(&str, &ConnectionInfo) -> bool) -> usize {
        let inner = self.inner.lock();
        let denied = inner
            .pods
            .iter()
            .flat_map(|(pod, connections)| connections.values().map(move |entry| (pod, entry)))
            .filter(|(pod, entry)| is_denied(pod, &entry.info));
        denied.map(|(_, entry)| entry.cut.cancel()).count()
    }

    #[must_use]
    pub fn count(&self, pod_uid: &str) -> usize {
        self.inner.lock().pods.get(pod_uid).map_or(0, HashMap::len)
    }
}

/// A registered connection; released when dropped.
#[derive(Debug)]
pub struct Registered {
    registry: Arc<Registry>,
    pod_uid: Arc<str>,
    id: u64,
    cut: CancellationToken,
}

impl Registered {
    /// Resolves when the connection is to be cut.
    pub fn cut(&self) -> &CancellationToken {
        &self.cut
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let mut inner = self.registry.inner.lock();
        if let Some(connections) = inner.pods.get_mut(&self.pod_uid) {
            connections.remove(&self.id);
            if connections.is_empty() {
                inner.pods.remove(&self.pod_uid);
            }
        }
    }
}
