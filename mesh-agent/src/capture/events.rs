//! What this half of the datapath counts, beside the programs.

use std::sync::atomic::{AtomicU64, Ordering};

#[derive(Debug, Default)]
pub(super) struct Events {
    /// Pods that an agent captured before and that could not be taken over: they stay closed.
    pub kept_closed: AtomicU64,
    /// Pieces of a Pod's capture that were missing and were put back.
    pub repaired: AtomicU64,
    /// Times that what is in the mesh did not fit into the kernel's map.
    pub mesh_destinations_full: AtomicU64,
}

impl Events {
    pub(super) fn counts(&self) -> [(&'static str, u64); 3] {
        [
            ("kept_closed", self.kept_closed.load(Ordering::Relaxed)),
            ("repaired", self.repaired.load(Ordering::Relaxed)),
            ("mesh_destinations_full", self.mesh_destinations_full.load(Ordering::Relaxed)),
        ]
    }
}
