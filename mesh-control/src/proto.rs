//! Between the wire and the rest of the control plane.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use mesh_api::{Mode, Mtls, PolicyAction, StringMatch, ValidDestination, ValidMeshConfig, ValidPolicy, ValidRule, ValidSource};
use mesh_proto::{
    AFFINITY_EXTENSION, AFFINITY_TYPE_URL, CAPTURE_EXTENSION, CAPTURE_TYPE_URL, discovery, mesh, node, security, workload,
};
use prost::Message as _;
use prost_types::{Any, Struct, value::Kind as ValueKind};

use crate::capture_states::Proof;
use crate::compile::membership::{Namespaces, NodePod, NodePods, Refusal};
use crate::compile::{Capture, OwnerKind, SettingsView, WorkloadView};
use crate::discovery::subscription::{Request, Response};
use crate::limits::MAX_NACK_BYTES;
use crate::objects::{ObjectId, Service, TargetPort};
use crate::troubles::{Problem, Repaired};

/// Which workloads a policy applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    Global,
    Namespace,
    WorkloadSelector,
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

#[must_use]
pub fn encode_workload(view: &WorkloadView<'_>) -> Vec<u8> {
    let capture_extension = view.capture.map(|state| {
        let state = match state {
            Capture::Pending => mesh::capture::State::Pending,
            Capture::Proven | Capture::Elsewhere => mesh::capture::State::Proven,
            Capture::Lost => mesh::capture::State::Lost,
        };
        // Agents remember by it who was proven.
        let pod_uid = if view.capture == Some(Capture::Elsewhere) {
            String::new()
        } else {
            view.pod.uid.clone()
        };
        let capture = mesh::Capture {
            state: state.into(),
            pod_uid,
        };
        let config = Any {
            type_url: CAPTURE_TYPE_URL.to_owned(),
            value: capture.encode_to_vec(),
        };
        workload::Extension {
            name: CAPTURE_EXTENSION.to_owned(),
            config: Some(config),
        }
    });
    let tunnel = if matches!(view.capture, Some(Capture::Proven | Capture::Elsewhere)) {
        workload::TunnelProtocol::Hbone
    } else {
        workload::TunnelProtocol::None
    };
    let kind = match view.owner.kind {
        OwnerKind::Deployment => workload::WorkloadType::Deployment,
        OwnerKind::CronJob => workload::WorkloadType::Cronjob,
        OwnerKind::Job => workload::WorkloadType::Job,
        OwnerKind::Pod => workload::WorkloadType::Pod,
    };
    let status = if view.healthy {
        workload::WorkloadStatus::Healthy
    } else {
        workload::WorkloadStatus::Unhealthy
    };
    let mode = if view.pod.host_network {
        workload::NetworkMode::HostNetwork
    } else {
        workload::NetworkMode::Standard
    };
    let ports = |ports: &Vec<(u16, u16)>| workload::PortList {
        ports: ports.iter().map(|(service, target)| port(*service, *target)).collect(),
    };
    let has_locality = !view.region.is_empty() || !view.zone.is_empty();
    let message = workload::Workload {
        name: view.id.name.clone(),
        namespace: view.id.namespace.clone(),
        addresses: view.pod.addresses.iter().map(|ip| octets(*ip)).collect(),
        tunnel_protocol: tunnel.into(),
        trust_domain: view.parameters.trust_domain.clone(),
        service_account: view.pod.service_account.clone(),
        node: view.pod.node.clone(),
        canonical_name: view.canonical_name.clone(),
        canonical_revision: view.canonical_revision.clone(),
        workload_type: kind.into(),
        workload_name: view.owner.name.clone(),
        authorization_policies: view.policies.clone(),
        status: status.into(),
        cluster_id: view.parameters.cluster.clone(),
        uid: view.uid.clone(),
        services: view
            .services
            .iter()
            .map(|(name, list)| (name.clone(), ports(list)))
            .collect::<BTreeMap<_, _>>(),
        locality: has_locality.then(|| workload::Locality {
            region: view.region.clone(),
            zone: view.zone.clone(),
            subzone: String::new(),
        }),
        network_mode: mode.into(),
        extensions: capture_extension.into_iter().collect(),
        ..Default::default()
    };
    workload::Address {
        r#type: Some(workload::address::Type::Workload(message)),
    }
    .encode_to_vec()
}

fn port(service: u16, target: u16) -> workload::Port {
    workload::Port {
        service_port: service.into(),
        target_port: target.into(),
        app_protocol: 0,
    }
}

#[must_use]
pub fn encode_service(id: &ObjectId, hostname: &str, service: &Service) -> Vec<u8> {
    let addresses = service.addresses.iter();
    let message = workload::Service {
        name: id.name.clone(),
        namespace: id.namespace.clone(),
        hostname: hostname.to_owned(),
        addresses: addresses
            .map(|ip| workload::NetworkAddress {
                network: String::new(),
                address: octets(*ip),
                length: None,
            })
            .collect(),
        ports: service
            .ports
            .iter()
            // A named target port may differ from Pod to Pod: each workload says its own, the service says 0.
            .map(|p| match p.target {
                TargetPort::Number(target) => port(p.port, target),
                TargetPort::Name(_) => port(p.port, 0),
            })
            .collect(),
        load_balancing: load_balancing(service),
        extensions: service.affinity_seconds.map(affinity).into_iter().collect(),
        ..Default::default()
    };
    workload::Address {
        r#type: Some(workload::address::Type::Service(message)),
    }
    .encode_to_vec()
}

fn load_balancing(service: &Service) -> Option<workload::LoadBalancing> {
    use workload::load_balancing::{HealthPolicy, Mode, Scope};
    if !service.publish_not_ready && !service.node_local {
        return None;
    }
    let mut balancing = workload::LoadBalancing::default();
    if service.publish_not_ready {
        balancing.set_health_policy(HealthPolicy::AllowAll);
    }
    if service.node_local {
        balancing.set_mode(Mode::Strict);
        balancing.push_routing_preference(Scope::Node);
    }
    Some(balancing)
}

fn affinity(timeout_seconds: u32) -> workload::Extension {
    let config = Any {
        type_url: AFFINITY_TYPE_URL.to_owned(),
        value: mesh::SessionAffinity { timeout_seconds }.encode_to_vec(),
    };
    workload::Extension {
        name: AFFINITY_EXTENSION.to_owned(),
        config: Some(config),
    }
}

#[must_use]
pub fn encode_authorization(id: &ObjectId, policy: &ValidPolicy, scope: Scope) -> Vec<u8> {
    let scope = match scope {
        Scope::Global => security::Scope::Global,
        Scope::Namespace => security::Scope::Namespace,
        Scope::WorkloadSelector => security::Scope::WorkloadSelector,
    };
    let action = match policy.action {
        PolicyAction::Allow => security::Action::Allow,
        PolicyAction::Deny => security::Action::Deny,
    };
    let message = security::Authorization {
        name: id.name.clone(),
        namespace: id.namespace.clone(),
        scope: scope.into(),
        action: action.into(),
        rules: policy.rules.iter().map(rule).collect(),
        dry_run: policy.mode == Mode::DryRun,
        extensions: Vec::new(),
    };
    message.encode_to_vec()
}

/// The sources are one clause and the destinations another: both must hold.
fn rule(rule: &ValidRule) -> security::Rule {
    let mut clauses = Vec::new();
    if !rule.from.is_empty() {
        clauses.push(security::Clause {
            matches: rule.from.iter().map(source).collect(),
        });
    }
    if !rule.to.is_empty() {
        clauses.push(security::Clause {
            matches: rule.to.iter().map(destination).collect(),
        });
    }
    if clauses.is_empty() {
        // An empty clause is true; what a rule without clauses means is nowhere said.
        clauses.push(security::Clause { matches: Vec::new() });
    }
    security::Rule { clauses }
}

fn source(source: &ValidSource) -> security::Match {
    security::Match {
        principals: source.principals.iter().map(string_match).collect(),
        not_principals: source.not_principals.iter().map(string_match).collect(),
        namespaces: source.namespaces.iter().map(string_match).collect(),
        not_namespaces: source.not_namespaces.iter().map(string_match).collect(),
        source_ips: source.ip_blocks.iter().map(block).collect(),
        not_source_ips: source.not_ip_blocks.iter().map(block).collect(),
        ..Default::default()
    }
}

fn destination(destination: &ValidDestination) -> security::Match {
    security::Match {
        destination_ports: destination.ports.iter().map(|port| u32::from(*port)).collect(),
        not_destination_ports: destination.not_ports.iter().map(|port| u32::from(*port)).collect(),
        ..Default::default()
    }
}

fn string_match(value: &StringMatch) -> security::StringMatch {
    use security::string_match::MatchType;
    let kind = match value {
        StringMatch::Exact(text) => MatchType::Exact(text.clone()),
        StringMatch::Prefix(text) => MatchType::Prefix(text.clone()),
        StringMatch::Suffix(text) => MatchType::Suffix(text.clone()),
        StringMatch::Present => MatchType::Presence(security::Empty {}),
    };
    security::StringMatch { match_type: Some(kind) }
}

fn block(block: &IpNet) -> security::Address {
    security::Address {
        address: octets(block.network()),
        length: block.prefix_len().into(),
    }
}

#[must_use]
pub fn encode_settings(view: &SettingsView<'_>) -> Vec<u8> {
    let default = ValidMeshConfig::default();
    let config = view.mesh.unwrap_or(&default);
    let message = mesh::Settings {
        trust_domain: view.parameters.trust_domain.clone(),
        pod_ranges: view.pod_ranges.iter().map(cidr).collect(),
        trust_bundle: view.parameters.trust_bundle.clone(),
        mtls: mtls(config.mtls).into(),
        namespaces: view
            .namespaces
            .iter()
            .map(|(namespace, given)| mesh::NamespaceMtls {
                namespace: (*namespace).to_owned(),
                mtls: mtls(*given).into(),
            })
            .collect(),
        excluded_ports: config.excluded_ports.iter().map(|port| u32::from(*port)).collect(),
        excluded_cidrs: config.excluded_cidrs.iter().map(cidr).collect(),
        revoked_identities: view.parameters.revoked.iter().cloned().collect(),
    };
    message.encode_to_vec()
}

/// A MeshConfig by itself: what tells its forms apart.
#[must_use]
pub fn encode_mesh_config(config: &ValidMeshConfig) -> Vec<u8> {
    let message = mesh::Settings {
        mtls: mtls(config.mtls).into(),
        excluded_ports: config.excluded_ports.iter().map(|port| u32::from(*port)).collect(),
        excluded_cidrs: config.excluded_cidrs.iter().map(cidr).collect(),
        ..Default::default()
    };
    message.encode_to_vec()
}

fn cidr(range: &IpNet) -> mesh::Cidr {
    mesh::Cidr {
        address: octets(range.network()),
        length: range.prefix_len().into(),
    }
}

fn mtls(given: Mtls) -> mesh::settings::Mtls {
    match given {
        Mtls::Permissive => mesh::settings::Mtls::Permissive,
        Mtls::Strict => mesh::settings::Mtls::Strict,
    }
}

#[must_use]
pub fn request_from_wire(request: discovery::DeltaDiscoveryRequest) -> Request {
    Request {
        subscribe: request.resource_names_subscribe,
        unsubscribe: request.resource_names_unsubscribe,
        initial_versions: request.initial_resource_versions.into_iter().collect(),
        nonce: request.response_nonce,
        error: request.error_detail.map(|detail| detail.message),
    }
}

#[must_use]
pub fn response_to_wire(type_url: &str, response: Response) -> discovery::DeltaDiscoveryResponse {
    let resource = |resource: &crate::compile::CompiledResource| discovery::Resource {
        version: resource.version.clone(),
        resource: Some(Any {
            type_url: type_url.to_owned(),
            value: resource.value.clone(),
        }),
        name: resource.name.clone(),
        aliases: resource.aliases.clone(),
        ttl: None,
    };
    discovery::DeltaDiscoveryResponse {
        system_version_info: response.version,
        resources: response.resources.iter().map(|compiled| resource(compiled)).collect(),
        type_url: type_url.to_owned(),
        nonce: response.nonce,
        removed_resources: response.removed,
    }
}

/// A text in a request's metadata.
#[must_use]
pub fn text_field<'a>(fields: Option<&'a Struct>, name: &str) -> Option<&'a str> {
    match fields?.fields.get(name)?.kind.as_ref()? {
        ValueKind::StringValue(text) => Some(text),
        _ => None,
    }
}

/// What is kept of a text that an agent chose.
#[must_use]
pub fn shortened(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(MAX_NACK_BYTES));
    text
}

/// A message beyond what its service decodes. (Of a stream's codes this one is never the peer's.)
#[must_use]
pub fn is_too_large(status: &tonic::Status) -> bool {
    status.code() == tonic::Code::OutOfRange
}

/// What an agent says of one Pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodWord {
    pub uid: String,
    pub namespace: String,
    pub name: String,
    pub proof: Proof,
    /// Why it is not proven.
    pub problem: Problem,
    /// Pieces of its capture that were put back.
    pub repaired: Repaired,
}

#[must_use]
pub fn pod_words(pods: &[node::PodReport]) -> Vec<PodWord> {
    pods.iter()
        .map(|pod| PodWord {
            uid: pod.uid.clone(),
            namespace: pod.namespace.clone(),
            name: pod.name.clone(),
            proof: match pod.proof() {
                node::Proof::Proven => Proof::Proven,
                node::Proof::Lost => Proof::Lost,
                node::Proof::Pending | node::Proof::Unspecified => Proof::Pending,
            },
            problem: Problem::of(&pod.problem),
            repaired: Repaired::of(&pod.repaired),
        })
        .collect()
}

/// What a node is told of its Pods.
#[must_use]
pub fn node_pods(of_node: &NodePods, namespaces: &Namespaces) -> node::NodePodsState {
    let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    let pod = |pod: &NodePod| node::NodePod {
        uid: pod.uid.clone(),
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        service_account: pod.service_account.clone(),
        addresses: pod.addresses.iter().map(ToString::to_string).collect(),
        is_member: pod.is_member,
        refused: pod.refused.map(|refusal| refusal.to_string()).unwrap_or_default(),
        is_static: pod.refused == Some(Refusal::Static),
        probe_ports: pod.probe_ports.iter().copied().map(u32::from).collect(),
    };
    let namespace = |(name, best_effort): (&String, &bool)| node::MeshNamespace {
        name: name.clone(),
        best_effort: *best_effort,
    };
    node::NodePodsState {
        pods: of_node.pods.iter().map(pod).collect(),
        omitted_pods: count(of_node.omitted),
        namespaces: namespaces.names.iter().map(namespace).collect(),
        omitted_namespaces: count(namespaces.omitted),
    }
}
