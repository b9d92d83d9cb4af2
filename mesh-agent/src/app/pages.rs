//! What the admin socket's pages show.

use std::time::SystemTime;

use http::StatusCode;
use serde_json::json;

use super::Agent;
use crate::admin::Page;
use crate::capture::Kubelet;
use crate::state::service_name;

impl Agent {
    pub(super) fn readiness(&self) -> Page {
        // Attached since before this server runs, unless somebody's hand detached it.
        let detached = self.capture.detached_programs();
        if !detached.is_empty() {
            let missing = format!(
                "missing: kernel programs are detached ({}); the agent attaches them again, or says in its log why it cannot\n",
                detached.join(", ")
            );
            return Page::text(StatusCode::SERVICE_UNAVAILABLE, missing);
        }
        let discovery = self.discovery.borrow();
        if discovery.from_memory {
            // It serves its Pods by what was last known, as an agent does that has lost its control plane.
            let body = format!("ready, from memory: discovery has not answered yet ({})\n", self.control);
            Page::text(StatusCode::OK, body)
        } else if discovery.synced {
            Page::text(StatusCode::OK, "ready\n".to_owned())
        } else {
            let missing = format!("missing: discovery has not answered yet ({})\n", self.control);
            Page::text(StatusCode::SERVICE_UNAVAILABLE, missing)
        }
    }

    /// All that the agent knows, but for keys and tokens.
    pub(super) fn dump(&self) -> Page {
        let seconds = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let failures = self.certificates.failures();
        let certificates: Vec<_> = self
            .store
            .identities()
            .into_iter()
            .filter_map(|identity| self.store.current(&identity))
            .map(|pair| {
                json!({
                    "identity": pair.identity.to_string(),
                    "fingerprint": pair.fingerprint(),
                    "not_before_unix_seconds": seconds(pair.not_before),
                    "not_after_unix_seconds": seconds(pair.not_after),
                    "roots": pair.roots.len(),
                })
            })
            .collect();
        let known = self.state.read(|state| {
            let settings = state.settings();
            json!({
                "workloads": state.workloads().count(),
                "services": state.services().map(|service| service_name(service)).collect::<std::collections::BTreeSet<_>>(),
                "policies": state.policies().map(|policy| policy.name.to_string()).collect::<std::collections::BTreeSet<_>>(),
                "trust_domain": settings.trust_domain,
                "pod_ranges": settings.pod_ranges,
                "mtls": settings.mtls.as_str(),
                "mtls_of_namespaces": settings.namespaces.iter().map(|(namespace, mtls)| (namespace.to_string(), mtls.as_str())).collect::<std::collections::BTreeMap<_, _>>(),
                "excluded_ports": settings.excluded.ports,
                "excluded_ranges": settings.excluded.ranges,
                "trusted_roots": settings.trust_bundle.as_ref().map(|bundle| bundle.len()),
                "revoked_identities": settings.revoked.iter().map(ToString::to_string).collect::<Vec<_>>(),
            })
        });
        let discovery = self.discovery.borrow().clone();
        Page::json(&json!({
            "node": &*self.node,
            "control": self.control,
            "discovery": {
                "connected": discovery.connected,
                "synced": discovery.synced,
                "from_memory": discovery.from_memory,
                "enforced_versions": discovery.enforced_versions,
                "rejected": discovery.rejected,
                "denying_stand_ins": discovery.stand_ins,
            },
            "state": known,
            "pods": self.pods.list(),
            "following": *self.followed.lock(),
            "kubelet": match self.capture.kubelet() {
                Kubelet::Known { cgroup, id } => json!({ "cgroup": cgroup, "cgroup_id": id }),
                Kubelet::Unknown(why) => json!({ "unknown": why.to_string() }),
            },
            "connections": self.pods.connections(),
            "certificates": certificates,
            "certificate_failures": failures.iter().map(|(identity, why)| (identity.to_string(), why)).collect::<std::collections::BTreeMap<_, _>>(),
        }))
    }
}
