//! The agent's connections to applications: how many there may be, and which they are, so that one that comes back is known.

use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use mesh_common::limits::MAX_UPSTREAM_CONNECTIONS;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::network::CaptureError;
use crate::addr::{ClientAddr, OriginalDst, canonical};

/// Of the node. The kernel's map has room for a third more: for those that the agent has closed and TCP not yet.
pub(super) const MAX_UPSTREAMS: usize = 49_152;
/// Of a Pod, so that one cannot take all: a third. 16,384 × 56 B = 0.9 MiB of tuples.
const MAX_UPSTREAMS_PER_POD: usize = 16_384;
const _: () = assert!(MAX_UPSTREAMS < MAX_UPSTREAM_CONNECTIONS as usize && MAX_UPSTREAMS_PER_POD < MAX_UPSTREAMS);

/// Client and application of the live ones. A count: ports are shared when they run out.
type Live = Mutex<HashMap<(SocketAddr, SocketAddr), u32>>;

/// Those of a Pod.
#[derive(Debug)]
pub(super) struct Upstreams {
    of_node: Arc<Semaphore>,
    of_pod: Arc<Semaphore>,
    live: Arc<Live>,
}

/// Keeps a connection's place in the bounds; to be held until it is closed. The default is of no bounds.
#[derive(Default)]
pub struct UpstreamLease {
    /// Of the Pod and of the node.
    _places: Option<[OwnedSemaphorePermit; 2]>,
    registered: Option<(Arc<Live>, (SocketAddr, SocketAddr))>,
}

impl Upstreams {
    pub(super) fn new(of_node: Arc<Semaphore>) -> Self {
        Self::with_limit(of_node, MAX_UPSTREAMS_PER_POD)
    }

    fn with_limit(of_node: Arc<Semaphore>, per_pod: usize) -> Self {
        Self {
            of_node,
            of_pod: Arc::new(Semaphore::new(per_pod)),
            live: Arc::default(),
        }
    }

    /// # Errors
    /// [`CaptureError::UpstreamLimit`]
    pub(super) fn reserve(&self) -> Result<UpstreamLease, CaptureError> {
        let place = |semaphore: &Arc<Semaphore>, of| {
            semaphore
                .clone()
                .try_acquire_owned()
                .map_err(|_| CaptureError::UpstreamLimit(of))
        };
        Ok(UpstreamLease {
            _places: Some([place(&self.of_pod, "Pod")?, place(&self.of_node, "node")?]),
            registered: None,
        })
    }

    /// Before the connect. A `client` without a port (it is chosen at the connect) is not remembered.
    pub(super) fn register(&self, lease: &mut UpstreamLease, client: SocketAddr, application: SocketAddr) {
        if client.port() == 0 {
            return;
        }
        let ends = (canonical(client), canonical(application));
        *self.live.lock().entry(ends).or_default() += 1;
        lease.registered = Some((self.live.clone(), ends));
    }

    pub(super) fn is_live(&self, client: ClientAddr, application: OriginalDst) -> bool {
        let ends = (client.socket_addr(), application.socket_addr());
        self.live.lock().contains_key(&ends)
    }
}

impl Drop for UpstreamLease {
    fn drop(&mut self) {
        let Some((live, ends)) = self.registered.take() else { return };
        let mut live = live.lock();
        if let Some(count) = live.get_mut(&ends) {
            *count -= 1;
            if *count == 0 {
                live.remove(&ends);
            }
        }
    }
}

impl fmt::Debug for UpstreamLease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UpstreamLease").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_pod_has_its_bound_and_the_node_another() {
        let node = Arc::new(Semaphore::new(3));
        let (a, b) = (Upstreams::with_limit(node.clone(), 2), Upstreams::with_limit(node.clone(), 2));
        let of_a = [a.reserve().unwrap(), a.reserve().unwrap()];
        assert!(matches!(a.reserve(), Err(CaptureError::UpstreamLimit("Pod"))));
        let _of_b = b.reserve().unwrap();
        assert!(matches!(b.reserve(), Err(CaptureError::UpstreamLimit("node"))));
        // What was refused holds nothing.
        drop(of_a);
        assert!(b.reserve().is_ok());
        assert_eq!(node.available_permits(), 2);
    }

    #[test]
    fn a_connection_is_known_by_both_of_its_ends_while_it_lives() {
        let upstreams = Upstreams::new(Arc::new(Semaphore::new(9)));
        let mut lease = upstreams.reserve().unwrap();
        upstreams.register(&mut lease, at("10.0.0.1:20000"), at("10.0.0.2:80"));
        let known =
            |client: &str, application: &str| upstreams.is_live(ClientAddr::new(at(client)), OriginalDst::new(at(application)));
        assert!(known("10.0.0.1:20000", "10.0.0.2:80"));
        assert!(known("[::ffff:10.0.0.1]:20000", "[::ffff:10.0.0.2]:80"));
        assert!(!known("10.0.0.1:20001", "10.0.0.2:80"));
        // Another connection of the true client's may have that port.
        assert!(!known("10.0.0.1:20000", "10.0.0.2:81"));
        let mut second = upstreams.reserve().unwrap();
        upstreams.register(&mut second, at("10.0.0.1:20000"), at("10.0.0.2:80"));
        drop(lease);
        assert!(known("10.0.0.1:20000", "10.0.0.2:80"));
        drop(second);
        assert!(!known("10.0.0.1:20000", "10.0.0.2:80"));
    }
}
