//! What an operator should mend outside of the mesh: NetworkPolicies in its way.

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio::time::sleep;

use super::ControlPlane;
use super::notices::pod_subject;
use crate::compile::network_policies::{Direction, Finding, Findings, in_the_way};
use crate::kubernetes::event_queue::{Reason, Subject};
use crate::kubernetes::wishes::PodRef;
use crate::limits::NETWORK_POLICY_PACE;

impl ControlPlane {
    /// Looks at NetworkPolicies after each change, for ever.
    pub async fn look_at_network_policies(self: Arc<Self>) {
        let mut snapshots = self.subscribe();
        loop {
            if snapshots.changed().await.is_err() {
                return;
            }
            sleep(NETWORK_POLICY_PACE).await;
            let snapshot = Arc::clone(&snapshots.borrow_and_update());
            let control = Arc::clone(&self);
            let looked = tokio::task::spawn_blocking(move || {
                let world = Arc::clone(&control.inner.lock().world);
                control.advise(in_the_way(&world, &snapshot));
            });
            drop(looked.await);
        }
    }

    pub(super) fn advise(&self, findings: Findings) {
        for direction in Direction::ALL {
            let count = findings
                .policies
                .iter()
                .filter(|finding| finding.direction == direction)
                .count();
            self.metrics.network_policies(direction.as_str(), count);
        }
        self.metrics.network_policies("not_named", findings.more);
        self.metrics.network_policies("not_looked_at", usize::from(findings.is_cut));
        let before = std::mem::replace(&mut *self.findings.lock(), findings.clone());
        let told: BTreeSet<(&str, &str, Direction)> = before.policies.iter().map(key).collect();
        for finding in findings.policies.iter().filter(|finding| !told.contains(&key(finding))) {
            let advice = finding.advice();
            tracing::warn!(pods = finding.pods, "{advice}");
            let Some(shared) = &self.shared else { continue };
            let policy = Subject {
                api_version: "networking.k8s.io/v1",
                kind: "NetworkPolicy",
                namespace: finding.namespace.clone(),
                name: finding.name.clone(),
                uid: String::new(),
            };
            let pods = finding.named.iter().map(|(name, uid)| {
                pod_subject(&PodRef {
                    namespace: finding.namespace.clone(),
                    name: name.clone(),
                    uid: uid.clone(),
                })
            });
            for subject in std::iter::once(policy).chain(pods) {
                shared.notices.tell(&subject, Reason::PortNotAllowed, &advice, &self.metrics);
            }
        }
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
