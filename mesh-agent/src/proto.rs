//! The edge where wire types become domain types. Nothing behind it knows protobuf; nothing in front of it decides.

mod authorization;
mod settings;
#[cfg(test)]
mod tests;
mod unknown_fields;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use mesh_proto::discovery::Resource;
use mesh_proto::mesh::{Capture, SessionAffinity, Settings as WireSettings, capture};
use mesh_proto::workload::{
    Address, NetworkMode, Port as WirePort, Service as WireService, TunnelProtocol, Workload as WireWorkload,
    WorkloadStatus as WireStatus, WorkloadType as WireWorkloadType, address,
    load_balancing::{HealthPolicy, Mode, Scope as RoutingScope},
};
use mesh_proto::{AFFINITY_EXTENSION, AFFINITY_TYPE_URL, CAPTURE_EXTENSION, CAPTURE_TYPE_URL, ROOT_NAMESPACE, SETTINGS_NAME};
use prost::Message as _;

use crate::identity::Identity;
use crate::policy::{Action, Policy, Rule, Scope};
use crate::state::{Change, Settings, service_name};
use crate::workload::{Membership, Service, ServicePort, Workload, WorkloadType};

/// What the wire leaves empty means these.
pub const DEFAULT_TRUST_DOMAIN: &str = "cluster.local";
const DEFAULT_SERVICE_ACCOUNT: &str = "default";
/// A day, as Kubernetes bounds it.
const MAX_AFFINITY_SECONDS: u32 = 86_400;

/// Why a resource cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtoError {
    #[error("does not decode: {0}")]
    Decode(#[from] prost::DecodeError),
    #[error("field `{field}` {why}")]
    Field { field: &'static str, why: String },
    #[error("is named `{named}` but holds `{holds}`")]
    Name { named: String, holds: String },
}

fn field(field: &'static str, why: impl Into<String>) -> ProtoError {
    ProtoError::Field { field, why: why.into() }
}

/// A resource is removed by its name, so its contents may not have another.
fn same_name(resource: &Resource, holds: &str) -> Result<(), ProtoError> {
    if resource.name == holds {
        return Ok(());
    }
    Err(ProtoError::Name {
        named: resource.name.clone(),
        holds: holds.to_owned(),
    })
}

fn value(resource: &Resource) -> &[u8] {
    resource.resource.as_ref().map_or(&[], |any| &any.value)
}

/// # Errors
/// The resource is no usable workload or service.
pub fn address(resource: &Resource) -> Result<Change, ProtoError> {
    match Address::decode(value(resource))?.r#type {
        Some(address::Type::Workload(wire)) => {
            let workload = Workload::try_from(wire)?;
            same_name(resource, &workload.uid)?;
            Ok(Change::Workload(workload))
        }
        Some(address::Type::Service(wire)) => {
            let service = Service::try_from(wire)?;
            same_name(resource, &service_name(&service))?;
            Ok(Change::Service(service))
        }
        None => Err(field("type", "is neither a workload nor a service")),
    }
}

/// # Errors
/// The resource is no authorization at all. What is merely unknown in it fails closed instead.
pub fn authorization(resource: &Resource) -> Result<Change, ProtoError> {
    let policy = authorization::decode(value(resource))?;
    same_name(resource, &policy.name)?;
    if policy.has_unknown_part() {
        tracing::warn!(policy = %policy.name, "has parts that this agent does not know: its rules with them deny (DENY) or do not allow (ALLOW)");
    }
    Ok(Change::Policy(Arc::new(policy)))
}

/// What stands in for a policy that cannot be read at all: nobody reaches those whom it may have been for.
pub fn denying(name: &str) -> Option<Change> {
    let (namespace, _) = name.split_once('/')?;
    Some(Change::Policy(Arc::new(Policy {
        name: name.into(),
        namespace: namespace.into(),
        scope: widest_scope(namespace),
        action: Action::Deny,
        rules: vec![Rule {
            clauses: Vec::new(),
            unknown: true,
        }],
        dry_run: false,
    })))
}

/// All whom a policy of the namespace may have been for.
fn widest_scope(namespace: &str) -> Scope {
    if namespace == ROOT_NAMESPACE {
        Scope::Global
    } else {
        Scope::Namespace
    }
}

/// # Errors
/// The resource is not the mesh's settings.
pub fn settings(resource: &Resource) -> Result<Change, ProtoError> {
    same_name(resource, SETTINGS_NAME)?;
    Settings::try_from(WireSettings::decode(value(resource))?).map(Change::Settings)
}

/// 4 or 16 bytes, network order.
fn ip(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(v4.into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(|v6| IpAddr::from(v6).to_canonical())
}

fn network(bytes: &[u8], length: u32) -> Option<IpNet> {
    // Not `ip`: a length belongs to the family that was written.
    let ip = if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        IpAddr::from(v4)
    } else {
        IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?)
    };
    Some(IpNet::new(ip, u8::try_from(length).ok()?).ok()?.trunc())
}

fn non_empty<'a>(text: &'a str, default: &'a str) -> &'a str {
    if text.is_empty() { default } else { text }
}

impl TryFrom<WireWorkload> for Workload {
    type Error = ProtoError;

    fn try_from(wire: WireWorkload) -> Result<Self, ProtoError> {
        for (name, text) in [("uid", &wire.uid), ("name", &wire.name), ("namespace", &wire.namespace)] {
            if text.is_empty() {
                return Err(field(name, "is empty"));
            }
        }
        let identity = Identity::new(
            non_empty(&wire.trust_domain, DEFAULT_TRUST_DOMAIN),
            &wire.namespace,
            non_empty(&wire.service_account, DEFAULT_SERVICE_ACCOUNT),
        );
        Identity::parse(&identity.to_string()).map_err(|e| field("service_account", format!("makes no identity: {e}")))?;
        let addresses = wire
            .addresses
            .iter()
            .map(|bytes| ip(bytes).ok_or_else(|| field("addresses", format!("has an address of {} bytes", bytes.len()))))
            .collect::<Result<_, _>>()?;
        let (membership, pod_uid) = membership(&wire)?;
        let network_mode = NetworkMode::try_from(wire.network_mode)
            .map_err(|e| field("network_mode", format!("is {}, which is not known", e.0)))?;
        let workload_type = match WireWorkloadType::try_from(wire.workload_type) {
            Ok(WireWorkloadType::Deployment) => WorkloadType::Deployment,
            Ok(WireWorkloadType::Cronjob) => WorkloadType::CronJob,
            Ok(WireWorkloadType::Job) => WorkloadType::Job,
            // Only a label: an unknown kind of owner is no reason to refuse a workload.
            Ok(WireWorkloadType::Pod) | Err(_) => WorkloadType::Pod,
        };
        let services = wire
            .services
            .into_iter()
            .map(|(service, list)| Ok((service.into(), service_ports("services", &list.ports)?)))
            .collect::<Result<_, ProtoError>>()?;
        let locality = wire.locality.unwrap_or_default();
        Ok(Self {
            workload_name: non_empty(&wire.workload_name, &wire.name).into(),
            canonical_name: non_empty(&wire.canonical_name, &wire.name).into(),
            canonical_revision: non_empty(&wire.canonical_revision, "latest").into(),
            uid: wire.uid.into(),
            name: wire.name.into(),
            namespace: wire.namespace.into(),
            identity,
            addresses,
            host_network: network_mode == NetworkMode::HostNetwork,
            node: wire.node.into(),
            workload_type,
            cluster: wire.cluster_id.into(),
            region: locality.region.into(),
            zone: locality.zone.into(),
            membership,
            pod_uid: pod_uid.into(),
            policies: wire.authorization_policies.into_iter().map(Into::into).collect(),
            services,
            healthy: WireStatus::try_from(wire.status) == Ok(WireStatus::Healthy),
            weight: wire.capacity.unwrap_or(1),
        })
    }
}

/// With the Pod's uid. Our control plane tells by its extension; another's workloads have only `tunnel_protocol`.
fn membership(wire: &WireWorkload) -> Result<(Membership, String), ProtoError> {
    let tunnel = TunnelProtocol::try_from(wire.tunnel_protocol)
        .map_err(|e| field("tunnel_protocol", format!("is {}, which is not known", e.0)))?;
    let Some(extension) = wire.extensions.iter().find(|extension| extension.name == CAPTURE_EXTENSION) else {
        let membership = match tunnel {
            TunnelProtocol::Hbone => Membership::Proven,
            TunnelProtocol::None => Membership::Outside,
        };
        return Ok((membership, String::new()));
    };
    let config = extension
        .config
        .as_ref()
        .filter(|any| any.type_url == CAPTURE_TYPE_URL)
        .ok_or_else(|| field("extensions", "has a capture extension of another type"))?;
    let capture = Capture::decode(config.value.as_slice())?;
    let membership = match capture::State::try_from(capture.state) {
        Ok(capture::State::Pending) => Membership::Pending,
        Ok(capture::State::Lost) => Membership::Lost,
        Ok(capture::State::Proven) if tunnel == TunnelProtocol::Hbone => Membership::Proven,
        Ok(capture::State::Proven) => return Err(field("tunnel_protocol", "is NONE although the capture is proven")),
        Ok(capture::State::Unspecified) | Err(_) => return Err(field("extensions", "has a capture state that is not known")),
    };
    Ok((membership, capture.pod_uid))
}

fn service_ports(name: &'static str, wire: &[WirePort]) -> Result<Vec<ServicePort>, ProtoError> {
    let port = |number: u32| u16::try_from(number).map_err(|_| field(name, format!("has the port {number}")));
    wire.iter()
        .map(|wire| {
            Ok(ServicePort {
                port: port(wire.service_port)?,
                target: port(wire.target_port)?,
            })
        })
        .collect()
}

fn affinity(wire: &WireService) -> Result<Option<Duration>, ProtoError> {
    let Some(extension) = wire.extensions.iter().find(|extension| extension.name == AFFINITY_EXTENSION) else {
        return Ok(None);
    };
    let config = extension
        .config
        .as_ref()
        .filter(|any| any.type_url == AFFINITY_TYPE_URL)
        .ok_or_else(|| field("extensions", "has a session affinity of another type"))?;
    match SessionAffinity::decode(config.value.as_slice())?.timeout_seconds {
        seconds @ 1..=MAX_AFFINITY_SECONDS => Ok(Some(Duration::from_secs(seconds.into()))),
        seconds => Err(field("extensions", format!("has a session affinity of {seconds} s"))),
    }
}

impl TryFrom<WireService> for Service {
    type Error = ProtoError;

    fn try_from(wire: WireService) -> Result<Self, ProtoError> {
        for (name, text) in [("namespace", &wire.namespace), ("hostname", &wire.hostname)] {
            if text.is_empty() {
                return Err(field(name, "is empty"));
            }
        }
        let mut addresses = Vec::with_capacity(wire.addresses.len());
        for address in &wire.addresses {
            let ip = ip(&address.address)
                .ok_or_else(|| field("addresses", format!("has an address of {} bytes", address.address.len())))?;
            let whole = if ip.is_ipv4() { 32 } else { 128 };
            // A range, and the unspecified address of a headless service, are no virtual address.
            if !ip.is_unspecified() && address.length.is_none_or(|length| length >= whole) {
                addresses.push(ip);
            }
        }
        let ports = service_ports("ports", &wire.ports)?;
        let affinity = affinity(&wire)?;
        let balancing = wire.load_balancing.unwrap_or_default();
        Ok(Self {
            name: wire.name.into(),
            namespace: wire.namespace.into(),
            hostname: wire.hostname.into(),
            addresses,
            ports,
            only_healthy: balancing.health_policy() == HealthPolicy::OnlyHealthy,
            // Other places that endpoints are asked for in are only preferred, or not known here.
            node_local: balancing.mode() == Mode::Strict
                && balancing.routing_preference().any(|scope| scope == RoutingScope::Node),
            affinity,
        })
    }
}
