//! What agents say they enforce, and what is told of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::time::Instant;

use super::ControlPlane;
use crate::enforcement::share::Share;
use crate::objects::World;

impl ControlPlane {
    /// A stream of a node's reports begins; [`Self::reports_end`] must follow.
    pub fn reports_begin(&self, node: &str) {
        self.enforcement.lock().opened(node, Instant::now());
    }

    pub fn reports_end(&self, node: &str) {
        self.enforcement.lock().closed(node, Instant::now());
    }

    /// Takes from a node's report what it enforces (type URL → version), and what it cannot use.
    pub fn set_enforced(&self, node: &str, enforced: &BTreeMap<String, String>, rejected: &[String]) {
        self.enforcement.lock().reported(node, enforced, rejected);
    }

    /// What the other replicas are to know of this one's agents.
    #[must_use]
    pub fn share(&self) -> Share {
        let snapshot = self.snapshot();
        let (share, left_out) = self.enforcement.lock().share(&snapshot.forms, Instant::now());
        let left_out = i64::try_from(left_out).unwrap_or(i64::MAX);
        self.metrics.enforcement_left_out.set(left_out);
        share
    }

    /// What is in force.
    #[must_use]
    pub fn world(&self) -> Arc<World> {
        Arc::clone(&self.inner.lock().world)
    }
}
