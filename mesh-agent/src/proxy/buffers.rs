//! What the agent holds of its connections' data, in bytes: of each connection, each Pod and the node. A Pod that holds much gets
//! small windows; one that holds too much, or the largest of a node that does, loses the connections that have stalled longest.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::{Duration, Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::limits::{Limits, SCARCE_STREAM_WINDOW_BYTES, STREAM_WINDOW_BYTES};

/// A chunk's own overhead: its header, its place in a queue.
const CHUNK_OVERHEAD_BYTES: usize = 128;
/// Before a tunnel is told of another window again, while it has not acknowledged the last one.
const SETTINGS_RETRY: Duration = Duration::from_millis(50);

/// Bytes held; of them, how many belong to connections that were told to end and have not yet.
#[derive(Debug, Default)]
struct Level {
    held: AtomicUsize,
    evicting: AtomicUsize,
}

impl Level {
    /// What stays once those that must end have ended.
    fn lasting(&self) -> usize {
        let held = self.held.load(Ordering::Relaxed);
        held.saturating_sub(self.evicting.load(Ordering::Relaxed))
    }
}

/// The node's.
#[derive(Debug)]
pub struct Buffers {
    pod_limit_bytes: usize,
    node_limit_bytes: usize,
    level: Level,
    pods: Mutex<HashMap<Arc<str>, Weak<PodBuffers>>>,
}

/// A Pod's: lives while it has a connection or a tunnel.
#[derive(Debug)]
pub(super) struct PodBuffers {
    node: Arc<Buffers>,
    uid: Arc<str>,
    level: Level,
    accounts: Mutex<Accounts>,
    scarce: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct Accounts {
    next_id: u64,
    by_id: HashMap<u64, Weak<Account>>,
}

/// A connection's.
#[derive(Debug)]
pub(super) struct Account {
    pod: Arc<PodBuffers>,
    id: u64,
    held: Mutex<Held>,
    evicted: CancellationToken,
}

#[derive(Debug)]
struct Held {
    bytes: usize,
    /// Whether it was let through to its destination.
    open: bool,
    evicted: bool,
    /// When something last moved.
    moved: Instant,
}

impl Buffers {
    pub(super) fn new(limits: &Limits) -> Arc<Self> {
        Arc::new(Self {
            pod_limit_bytes: limits.pod_buffered_bytes,
            node_limit_bytes: limits.node_buffered_bytes,
            level: Level::default(),
            pods: Mutex::default(),
        })
    }

    /// All that is held.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        self.level.held.load(Ordering::Relaxed)
    }

    pub(super) fn pod(self: &Arc<Self>, uid: &Arc<str>) -> Arc<PodBuffers> {
        let mut pods = self.pods.lock();
        if let Some(pod) = pods.get(uid).and_then(Weak::upgrade) {
            return pod;
        }
        let pod = Arc::new(PodBuffers {
            node: self.clone(),
            uid: uid.clone(),
            level: Level::default(),
            accounts: Mutex::default(),
            scarce: watch::Sender::new(false),
        });
        pods.insert(uid.clone(), Arc::downgrade(&pod));
        pod
    }

    fn evict(&self) {
        let pods: Vec<_> = self.pods.lock().values().filter_map(Weak::upgrade).collect();
        let lasting = self.level.lasting();
        let wanted = self.node_limit_bytes - self.node_limit_bytes / 8;
        if let Some(largest) = pods.iter().max_by_key(|pod| pod.level.lasting())
            && lasting > self.node_limit_bytes
        {
            largest.evict(lasting - wanted);
        }
    }
}

impl PodBuffers {
    #[cfg(test)]
    pub(super) fn held_bytes(&self) -> usize {
        self.level.held.load(Ordering::Relaxed)
    }

    pub(super) fn account(self: &Arc<Self>) -> Arc<Account> {
        let mut accounts = self.accounts.lock();
        let id = accounts.next_id;
        accounts.next_id += 1;
        let account = Arc::new(Account {
            pod: self.clone(),
            id,
            held: Mutex::new(Held {
                bytes: 0,
                open: false,
                evicted: false,
                moved: Instant::now(),
            }),
            evicted: CancellationToken::new(),
        });
        accounts.by_id.insert(id, Arc::downgrade(&account));
        account
    }

    /// The windows for a tunnel of this Pod.
    pub(super) fn windows(self: &Arc<Self>) -> Windows {
        let mut scarce = self.scarce.subscribe();
        let applied = *scarce.borrow_and_update();
        Windows {
            _pod: self.clone(),
            scarce,
            applied,
            retry: false,
        }
    }

    /// Tells the tunnels when the Pod comes to hold much, and when it no longer does.
    fn level_changed(&self) {
        let is_scarce = *self.scarce.borrow();
        // Apart, so that it does not change with every chunk.
        let part = if is_scarce { 8 } else { 4 };
        let scarce = self.level.lasting() > self.node.pod_limit_bytes / part
            || self.node.level.lasting() > self.node.node_limit_bytes / part * 2;
        if scarce != is_scarce {
            self.scarce.send_replace(scarce);
        }
    }

    fn evict_above_limit(&self) {
        let (lasting, limit) = (self.level.lasting(), self.node.pod_limit_bytes);
        if lasting > limit {
            self.evict(lasting - (limit - limit / 8));
        }
    }

    /// Ends connections that hold `excess_bytes` together: those not let through before those that were, then by how long they
    /// have stalled. Many at a time, so that looking through all of them is rare.
    fn evict(&self, mut excess_bytes: usize) {
        // Let go of only after the lock: the last reference to an account takes it.
        let accounts: Vec<_> = self.accounts.lock().by_id.values().filter_map(Weak::upgrade).collect();
        let mut stalled: Vec<_> = accounts
            .iter()
            .filter_map(|account| {
                let held = account.held.lock();
                (held.bytes > 0 && !held.evicted).then_some((held.open, held.moved, account))
            })
            .collect();
        stalled.sort_by_key(|(open, moved, _)| (*open, *moved));
        for (.., account) in stalled {
            if excess_bytes == 0 {
                break;
            }
            excess_bytes = excess_bytes.saturating_sub(account.evict());
        }
    }
}

impl Drop for PodBuffers {
    fn drop(&mut self) {
        let mut pods = self.node.pods.lock();
        if pods.get(&self.uid).is_some_and(|pod| pod.strong_count() == 0) {
            pods.remove(&self.uid);
        }
    }
}

impl Account {
    fn levels(&self) -> [&Level; 2] {
        [&self.pod.level, &self.pod.node.level]
    }

    /// The connection is let through to its destination.
    pub(super) fn opened(&self) {
        self.held.lock().open = true;
    }

    /// Resolves when the connection is to end, for what it holds.
    pub(super) fn evicted(&self) -> &CancellationToken {
        &self.evicted
    }

    pub(super) fn hold(&self, bytes: usize) {
        {
            let mut held = self.held.lock();
            if held.bytes == 0 {
                held.moved = Instant::now();
            }
            held.bytes += bytes;
            for level in self.levels() {
                level.held.fetch_add(bytes, Ordering::Relaxed);
                if held.evicted {
                    level.evicting.fetch_add(bytes, Ordering::Relaxed);
                }
            }
        }
        self.pod.level_changed();
        self.pod.evict_above_limit();
        if self.pod.node.level.lasting() > self.pod.node.node_limit_bytes {
            self.pod.node.evict();
        }
    }

    pub(super) fn release(&self, bytes: usize) {
        {
            let mut held = self.held.lock();
            held.moved = Instant::now();
            held.bytes -= bytes;
            for level in self.levels() {
                level.held.fetch_sub(bytes, Ordering::Relaxed);
                if held.evicted {
                    level.evicting.fetch_sub(bytes, Ordering::Relaxed);
                }
            }
        }
        self.pod.level_changed();
    }

    fn evict(&self) -> usize {
        let mut held = self.held.lock();
        if std::mem::replace(&mut held.evicted, true) {
            return 0;
        }
        for level in self.levels() {
            level.evicting.fetch_add(held.bytes, Ordering::Relaxed);
        }
        self.evicted.cancel();
        held.bytes
    }

    /// Data that counts until its last use, which may be h2's.
    pub(super) fn holding(self: &Arc<Self>, data: Bytes) -> Bytes {
        Bytes::from_owner(Charged::new(self.clone(), data))
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.pod.accounts.lock().by_id.remove(&self.id);
    }
}

struct Charged {
    account: Arc<Account>,
    data: Bytes,
}

impl Charged {
    fn new(account: Arc<Account>, data: Bytes) -> Self {
        account.hold(data.len() + CHUNK_OVERHEAD_BYTES);
        Self { account, data }
    }
}

impl AsRef<[u8]> for Charged {
    fn as_ref(&self) -> &[u8] {
        &self.data
    }
}

impl Drop for Charged {
    fn drop(&mut self) {
        self.account.release(self.data.len() + CHUNK_OVERHEAD_BYTES);
    }
}

/// A tunnel's share in its Pod's level.
#[derive(Debug)]
pub(super) struct Windows {
    _pod: Arc<PodBuffers>,
    scarce: watch::Receiver<bool>,
    applied: bool,
    retry: bool,
}

impl Windows {
    /// A new stream's window.
    pub(super) fn stream_window(&self) -> u32 {
        if self.applied {
            SCARCE_STREAM_WINDOW_BYTES
        } else {
            STREAM_WINDOW_BYTES
        }
    }

    /// Resolves when the tunnel is to have another window.
    pub(super) async fn changed(&mut self) {
        if self.retry {
            sleep(SETTINGS_RETRY).await;
        }
        let applied = self.applied;
        // The sender lives with the Pod's buffers.
        let _ = self.scarce.wait_for(|scarce| *scarce != applied).await;
    }

    /// Gives it to the tunnel; one that has not yet acknowledged the last one is told later.
    pub(super) fn apply(&mut self, set: impl FnOnce(u32) -> Result<(), h2::Error>) {
        self.applied = !self.applied;
        self.retry = set(self.stream_window()).is_err();
        if self.retry {
            self.applied = !self.applied;
        }
    }
}
