//! What an operator should mend outside of the mesh: NetworkPolicies in its way.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::SystemTime;

use tokio::time::{Instant, sleep};

use super::{ControlPlane, Shared};
use crate::compile::network_policies::{Direction, Finding, Findings, in_the_way};
use crate::limits::{MAX_NETWORK_POLICIES_LOGGED, NETWORK_POLICY_PACE, NETWORK_POLICY_UNTOLD};
use crate::objects::World;

impl ControlPlane {
    /// Looks at NetworkPolicies after each change, and again while not all could be told, for ever.
    pub async fn look_at_network_policies(self: Arc<Self>) {
        let mut snapshots = self.subscribe();
        let Some(mut writer) = self.writer() else { return };
        let mut all_told = true;
        loop {
            tokio::select! {
                changed = snapshots.changed() => if changed.is_err() { return },
                // Whoever tells it from now on has told nothing yet.
                changed = writer.changed() => if changed.is_err() { return },
                () = sleep(NETWORK_POLICY_UNTOLD), if !all_told => {}
            }
            sleep(NETWORK_POLICY_PACE).await;
            let snapshot = Arc::clone(&snapshots.borrow_and_update());
            let control = Arc::clone(&self);
            let began = Instant::now();
            let looked = tokio::task::spawn_blocking(move || {
                let world = Arc::clone(&control.inner.lock().world);
                control.advise(&world, in_the_way(&world, &snapshot))
            });
            all_told = looked.await.unwrap_or(true);
            sleep(began.elapsed() * 4).await;
        }
    }

    /// True: all are told by whoever is to tell them.
    fn advise(&self, world: &World, findings: Findings) -> bool {
        for direction in Direction::ALL {
            let count = findings.count.get(&direction).copied().unwrap_or_default();
            self.metrics.network_policies(direction.as_str(), count);
        }
        let cut = i64::try_from(findings.cut).unwrap_or(i64::MAX);
        self.metrics.network_policies_not_compared.set(cut);
        let when = (Instant::now(), SystemTime::now());
        let tell = |shared: &Arc<Shared>| shared.notices.policies(world, &findings.policies, when, &self.metrics);
        let all_told = self.shared.as_ref().is_none_or(tell);
        let mut known = self.findings.lock();
        let told: BTreeSet<_> = known.policies.iter().map(key).collect();
        let new = findings.policies.iter().filter(|finding| !told.contains(&key(finding)));
        for finding in new.take(MAX_NETWORK_POLICIES_LOGGED) {
            tracing::warn!(pods = finding.pods, "{}", finding.advice());
        }
        *known = findings;
        all_told
    }

    /// For `/status`.
    pub(super) fn network_policies(&self) -> Vec<serde_json::Value> {
        let findings = self.findings.lock();
        let policies = findings.policies.iter().map(|finding| {
            serde_json::json!({
                "policy": format!("{}/{}", finding.namespace, finding.name),
                "direction": finding.direction.as_str(),
                "pods": finding.pods,
                "advice": finding.advice(),
            })
        });
        policies.collect()
    }
}

fn key(finding: &Finding) -> (&str, &str, Direction) {
    (&finding.namespace, &finding.name, finding.direction)
}
