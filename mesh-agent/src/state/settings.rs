use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::identity::Identity;
use crate::identity::trust::TrustBundle;

/// The mesh's settings; the defaults hold under a control plane that has none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    pub trust_domain: String,
    /// Where Pods have their addresses: an unknown one in here is waited for, never taken for an outsider.
    pub pod_ranges: Vec<IpNet>,
    /// For Pods of every namespace that `namespaces` does not name.
    pub mtls: Mtls,
    pub namespaces: BTreeMap<Arc<str>, Mtls>,
    pub excluded: Exclusions,
    /// What everybody's certificates are verified against. `None`: a control plane that names no roots; then those that came with our own.
    pub trust_bundle: Option<Arc<TrustBundle>>,
    /// Whose service accounts were deleted: they prove nothing any longer.
    pub revoked: BTreeSet<Identity>,
}

/// Whether Pods of the mesh take connections in clear.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mtls {
    /// Where policies allow them.
    #[default]
    Permissive,
    Strict,
}

/// Destinations that the operator took out of the mesh: connections to them go in clear, whatever stands there. A Pod whose capture is
/// lost is no exception, for what is excluded was never to be protected.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exclusions {
    pub ports: BTreeSet<u16>,
    pub ranges: Vec<IpNet>,
}

impl Mtls {
    /// As manifests have it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Permissive => "Permissive",
            Self::Strict => "Strict",
        }
    }
}

impl Settings {
    /// Whether Pods of the namespace take only what mutual TLS has proven.
    #[must_use]
    pub fn is_strict(&self, namespace: &str) -> bool {
        *self.namespaces.get(namespace).unwrap_or(&self.mtls) == Mtls::Strict
    }

    /// Whether connections in clear to a Pod of the namespace are refused. An exclusion holds at both of its ends: else the source would
    /// send in clear what the destination then refuses.
    #[must_use]
    pub fn refuses_plaintext(&self, namespace: &str, ip: IpAddr, port: u16) -> bool {
        self.is_strict(namespace) && !self.excluded.contains(ip, port)
    }
}

impl Exclusions {
    #[must_use]
    pub fn contains(&self, ip: IpAddr, port: u16) -> bool {
        let ip = ip.to_canonical();
        // The agent's own ports are nobody's destination.
        !mesh_common::is_agent_port(port) && (self.ports.contains(&port) || self.ranges.iter().any(|range| range.contains(&ip)))
    }
}
