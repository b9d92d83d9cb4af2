use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;
use tokio::sync::watch;

use super::{Change, State};

/// The state as connections share it. Reading takes a lock for the time of a few map look-ups.
#[derive(Debug)]
pub struct SharedState {
    state: RwLock<State>,
    /// Raised by every change, after it can be read.
    version: watch::Sender<u64>,
}

impl Default for SharedState {
    fn default() -> Self {
        Self {
            state: RwLock::default(),
            version: watch::Sender::new(0),
        }
    }
}

impl SharedState {
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// On return every decision is made by the new state.
    pub fn apply(&self, changes: Vec<Change>) {
        self.state.write().apply(changes);
        self.version.send_modify(|version| *version += 1);
    }

    pub fn read<T>(&self, read: impl FnOnce(&State) -> T) -> T {
        read(&self.state.read())
    }

    /// Tells of changes after this call.
    #[must_use]
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    /// What `read` finds, now or within `patience` while discovery goes on; `None` when it has found nothing by then.
    pub async fn wait_for<T>(&self, patience: Duration, mut read: impl FnMut(&State) -> Option<T>) -> Option<T> {
        if let Some(found) = self.read(&mut read) {
            return Some(found);
        }
        // Subscribed before the state is read again, so that no change falls between.
        let mut changed = self.changed();
        let search = async {
            loop {
                if let Some(found) = self.read(&mut read) {
                    return Some(found);
                }
                changed.changed().await.ok()?;
            }
        };
        tokio::time::timeout(patience, search).await.ok().flatten()
    }
}
