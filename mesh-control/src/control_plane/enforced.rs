//! What agents say they enforce, and what is told of it.

use std::collections::BTreeMap;

use tokio::time::Instant;

use super::ControlPlane;
use crate::enforcement::share::Share;

impl ControlPlane {
    /// A stream of a node's reports begins; [`Self::reports_end`] must follow, with the answer.
    pub fn reports_begin(&self, node: &str) -> bool {
        self.enforcement.lock().opened(node, Instant::now())
    }

    pub fn reports_end(&self, node: &str, had_room: bool) {
        self.enforcement.lock().closed(node, had_room, Instant::now());
    }

    /// Takes from a node's report what it enforces (type URL → version), and what it cannot use.
    pub fn set_enforced(&self, node: &str, enforced: &BTreeMap<String, String>, rejected: &[String]) {
        self.enforcement.lock().reported(node, enforced, rejected, Instant::now());
    }

    /// What the other replicas are to know of this one's agents.
    #[must_use]
    pub fn share(&self) -> Share {
        let snapshot = self.snapshot();
        let (share, left_out) = self.enforcement.lock().share(&snapshot.forms, Instant::now());
        for (what, count) in [("nodes", left_out.nodes), ("policies", left_out.forms)] {
            let count = i64::try_from(count).unwrap_or(i64::MAX);
            self.metrics.enforcement_left_out.with_label_values(&[what]).set(count);
        }
        share
    }
}
