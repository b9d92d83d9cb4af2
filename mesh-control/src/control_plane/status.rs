//! What `/status` says.

use std::collections::BTreeMap;

use super::{ControlPlane, NO_POD_RANGES};
use crate::capture_states::CaptureState;
use crate::limits::MAX_SERVICE_WARNINGS;
use crate::objects::{Object, World};

impl ControlPlane {
    /// For `/status`.
    #[must_use]
    pub fn status(&self) -> serde_json::Value {
        let inner = self.inner.lock();
        let rejections: Vec<_> = inner
            .rejections
            .iter()
            .map(|rejection| {
                serde_json::json!({
                    "file": rejection.file,
                    "document": rejection.document,
                    "object": rejection.object.as_ref().map(ToString::to_string),
                    "reason": rejection.reason.as_str(),
                    "message": rejection.message,
                    "last_good_in_force": rejection.last_good_in_force,
                })
            })
            .collect();
        let snapshot = self.snapshot();
        let pods: BTreeMap<String, &str> = snapshot
            .pods
            .iter()
            .filter(|(_, place)| place.is_member)
            .map(|(key, place)| {
                let state = match inner.captures.of(key) {
                    None => "pending",
                    Some(CaptureState::Proven) => "proven",
                    Some(CaptureState::Lost) => "lost",
                };
                (format!("{}/{}", place.namespace, place.name), state)
            })
            .collect();
        let versions: BTreeMap<_, _> = snapshot
            .types
            .iter()
            .map(|(url, of_type)| (*url, of_type.version.as_str()))
            .collect();
        let ranges: Vec<String> = snapshot.pod_ranges.iter().map(ToString::to_string).collect();
        let mut warnings: Vec<String> = self.registry_problem().into_iter().collect();
        if self.is_ready() && ranges.is_empty() {
            warnings.push(NO_POD_RANGES.to_owned());
        }
        warnings.extend(snapshot.enrolment.warnings());
        warnings.extend(unfollowed(&inner.world));
        serde_json::json!({
            "ready": self.is_ready(),
            "warnings": warnings,
            "pod_ranges": ranges,
            "ignored_manifests": inner.ignored,
            "versions": versions,
            "nodes": *self.nodes.lock(),
            "trusted_roots": inner.parameters.trust_bundle.len(),
            "revoked_identities": inner.parameters.revoked,
            "pods": pods,
            "network_policies_in_the_way": self.network_policies(),
            "rejected_manifests": rejections,
        })
    }
}

/// What Services ask for that agents do not do.
fn unfollowed(world: &World) -> Vec<String> {
    let services = world.iter().filter_map(|(id, object)| match object.as_ref() {
        Object::Service(service) => Some((id, service)),
        _ => None,
    });
    let mut warnings: Vec<String> = services
        .filter(|(_, service)| service.prefers_near)
        .map(|(id, _)| format!("{id}: trafficDistribution is not followed: connections go to endpoints in any zone, on any node"))
        .take(MAX_SERVICE_WARNINGS + 1)
        .collect();
    if warnings.len() > MAX_SERVICE_WARNINGS {
        warnings.truncate(MAX_SERVICE_WARNINGS);
        warnings.push("more Services ask for what is not followed".to_owned());
    }
    warnings
}
