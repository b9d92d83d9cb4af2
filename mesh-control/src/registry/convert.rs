//! Kubernetes objects → the mesh's, whether they were read as text or from the API server. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as slices;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use mesh_api::{AuthorizationPolicy, MeshConfig, MeshConfigScope};
use mesh_proto::ROOT_NAMESPACE;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::enrolment::{asks_best_effort, sidecar};
use super::probe_ports;
use crate::capture_states::CaptureState;
use crate::limits::MAX_PROBLEM_BYTES;
use crate::network_policy;
use crate::objects::{Endpoint, EndpointSlice, Kind, Node, Object, ObjectId, Pod, Service, ServicePort, TargetPort};

/// What ambient node agents of other makers write on a Pod that they capture.
/// Prefix lengths: of a node's Pods, wider ones are a mistake or an attack.
const WIDEST_V4: u8 = 8;
const WIDEST_V6: u8 = 16;
/// On what a kubelet shows of its static Pods; a kubelet may show such ones only.
const MIRROR_ANNOTATION: &str = "kubernetes.io/config.mirror";
const REDIRECTION_ANNOTATION: &str = "ambient.istio.io/redirection";

/// What an agent has proven of a Pod, as every replica of the control plane reads it from the API server. In a folder it says nothing:
/// whoever wrote the file is no agent.
pub const CAPTURE_ANNOTATION: &str = "culvert.dev/capture";

/// The uid of the Pod that [`CAPTURE_ANNOTATION`] is of. With another one it says nothing: it was copied along with the manifest of another
/// Pod, and this one has proven nothing.
pub const CAPTURE_UID_ANNOTATION: &str = "culvert.dev/capture-uid";

/// Why a Pod that asks for the mesh is not protected, for people.
pub const PROBLEM_ANNOTATION: &str = "culvert.dev/problem";

/// Of an EndpointSlice: the Service whose endpoints it lists.
const SERVICE_LABEL: &str = "kubernetes.io/service-name";

/// The one that counts in its namespace.
const MESH_CONFIG_NAME: &str = "default";

/// A document that cannot stand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// `None`: not readable far enough to know.
    pub id: Option<ObjectId>,
    pub reason: Reason,
    /// Names the field where there is one.
    pub message: String,
}

/// Label of `mesh_control_manifests_rejected`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// The file cannot be read, is too large or lies outside the folder.
    File,
    /// Neither YAML nor JSON, or no Kubernetes object.
    Syntax,
    /// A field cannot stand.
    Field,
    /// It contradicts another object that is in force.
    Conflict,
}

impl Reason {
    pub const ALL: [Self; 4] = [Self::File, Self::Syntax, Self::Field, Self::Conflict];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Syntax => "syntax",
            Self::Field => "field",
            Self::Conflict => "conflict",
        }
    }
}

/// RFC 1123 subdomain; also of service accounts and nodes.
pub(crate) fn is_name(name: &str) -> bool {
    let alphanumeric = |byte: Option<u8>| byte.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    name.len() <= 253
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.')
        && alphanumeric(name.bytes().next())
        && alphanumeric(name.bytes().next_back())
}

/// What the API server gives is an UUID. Other text would not stand as a file's name on the node.
fn is_uid(uid: &str) -> bool {
    !uid.is_empty() && uid.len() <= 128 && uid.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}

/// The error begins with the field's path.
pub(super) fn typed<T: DeserializeOwned>(value: &Value) -> Result<T, String> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        if path == "." {
            error.inner().to_string()
        } else {
            format!("{path}: {}", error.inner())
        }
    })
}

/// A typed object of the API, with its kind here.
pub trait Convert: DeserializeOwned {
    const KIND: Kind;

    /// # Errors
    /// The field that cannot stand.
    fn convert(self) -> Result<Object, String>;
}

impl Convert for core::Namespace {
    const KIND: Kind = Kind::Namespace;

    fn convert(self) -> Result<Object, String> {
        let best_effort = [&self.metadata.labels, &self.metadata.annotations]
            .into_iter()
            .flatten()
            .any(asks_best_effort);
        Ok(Object::Namespace {
            labels: self.metadata.labels.unwrap_or_default(),
            best_effort,
        })
    }
}

impl Convert for core::ServiceAccount {
    const KIND: Kind = Kind::ServiceAccount;

    fn convert(self) -> Result<Object, String> {
        Ok(Object::ServiceAccount)
    }
}

impl Convert for core::Node {
    const KIND: Kind = Kind::Node;

    fn convert(self) -> Result<Object, String> {
        node(self).map(Object::Node)
    }
}

impl Convert for core::Service {
    const KIND: Kind = Kind::Service;

    fn convert(self) -> Result<Object, String> {
        service(self).map(Object::Service)
    }
}

impl Convert for core::Pod {
    const KIND: Kind = Kind::Pod;

    fn convert(self) -> Result<Object, String> {
        Ok(Object::Pod(Box::new(pod(self)?)))
    }
}

impl Convert for slices::EndpointSlice {
    const KIND: Kind = Kind::EndpointSlice;

    fn convert(self) -> Result<Object, String> {
        endpoint_slice(self).map(Object::EndpointSlice)
    }
}

impl Convert for NetworkPolicy {
    const KIND: Kind = Kind::NetworkPolicy;

    fn convert(self) -> Result<Object, String> {
        network_policy::convert(self).map(|policy| Object::NetworkPolicy(Box::new(policy)))
    }
}

/// What makes it the object that it is.
///
/// # Errors
/// A name that would not stand in identities and resource names, where `/` separates.
pub(crate) fn identify(kind: Kind, name: String, namespace: Option<String>) -> Result<ObjectId, Rejected> {
    let syntax = |message: String| Rejected {
        id: None,
        reason: Reason::Syntax,
        message,
    };
    if !is_name(&name) {
        return Err(syntax(format!(
            "metadata.name: {name:?} is no name; give lower-case letters, digits, '-' and '.'"
        )));
    }
    let namespace = match namespace {
        Some(namespace) if !is_name(&namespace) => {
            return Err(syntax(format!("metadata.namespace: {namespace:?} is no namespace's name")));
        }
        namespace => namespace.unwrap_or_default(),
    };
    let id = ObjectId { kind, namespace, name };
    if kind == Kind::MeshConfig && id.name != MESH_CONFIG_NAME {
        let first = format!("{} {}/{MESH_CONFIG_NAME}", kind.as_str(), id.namespace);
        return Err(Rejected {
            id: Some(id),
            reason: Reason::Conflict,
            message: format!("metadata.name: of its namespace only {first} counts; say it there and remove this one"),
        });
    }
    Ok(id)
}

/// # Errors
/// The field that cannot stand.
pub(crate) fn parse(id: &ObjectId, value: &Value) -> Result<Object, String> {
    Ok(match id.kind {
        Kind::Namespace => typed::<core::Namespace>(value)?.convert()?,
        Kind::ServiceAccount => typed::<core::ServiceAccount>(value)?.convert()?,
        Kind::Node => typed::<core::Node>(value)?.convert()?,
        Kind::Service => typed::<core::Service>(value)?.convert()?,
        Kind::EndpointSlice => typed::<slices::EndpointSlice>(value)?.convert()?,
        Kind::Pod => typed::<core::Pod>(value)?.convert()?,
        Kind::NetworkPolicy => typed::<NetworkPolicy>(value)?.convert()?,
        Kind::AuthorizationPolicy => {
            let policy: AuthorizationPolicy = typed(value)?;
            Object::AuthorizationPolicy(Box::new(policy.spec.validate().map_err(|error| error.to_string())?))
        }
        Kind::MeshConfig => {
            let config: MeshConfig = typed(value)?;
            let scope = if id.namespace == ROOT_NAMESPACE {
                MeshConfigScope::Mesh
            } else {
                MeshConfigScope::Namespace
            };
            Object::MeshConfig(Box::new(config.spec.validate(scope).map_err(|error| error.to_string())?))
        }
    })
}

fn node(node: core::Node) -> Result<Node, String> {
    let spec = node.spec.unwrap_or_default();
    let ranges = match (spec.pod_cidrs, spec.pod_cidr) {
        (Some(ranges), _) => ranges,
        (None, one) => one.into_iter().collect(),
    };
    let parse = |(i, text): (usize, &String)| {
        let range: IpNet = text
            .parse()
            .map_err(|_| format!("spec.podCIDRs[{i}]: {text:?} is no address range; give one like 10.1.0.0/24"))?;
        let widest = if range.addr().is_ipv4() { WIDEST_V4 } else { WIDEST_V6 };
        if range.prefix_len() < widest {
            // What is in a Pod range and not known is refused: a node must not name everybody's addresses its own.
            return Err(format!(
                "spec.podCIDRs[{i}]: {text:?} is wider than a node's Pods can need; /{widest} at most"
            ));
        }
        Ok(range.trunc())
    };
    let pod_ranges = ranges.iter().enumerate().map(parse).collect::<Result<_, _>>()?;
    Ok(Node {
        labels: node.metadata.labels.unwrap_or_default(),
        pod_ranges,
    })
}

fn address(path: &str, text: &str) -> Result<IpAddr, String> {
    match text.parse::<IpAddr>() {
        Ok(ip) if ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() => {
            Err(format!("{path}: {text} cannot be an address of its own"))
        }
        Ok(ip) => Ok(ip.to_canonical()),
        Err(_) => Err(format!("{path}: {text:?} is no IP address")),
    }
}

pub(super) fn port(path: &str, number: i32) -> Result<u16, String> {
    u16::try_from(number)
        .ok()
        .filter(|p| *p != 0)
        .ok_or_else(|| format!("{path}: {number} is no port; give 1-65535"))
}

fn is_tcp(protocol: Option<&str>) -> bool {
    protocol.is_none_or(|protocol| protocol == "TCP")
}

fn service(service: core::Service) -> Result<Service, String> {
    let spec = service.spec.unwrap_or_default();
    let given = spec
        .cluster_ips
        .or_else(|| spec.cluster_ip.map(|ip| vec![ip]))
        .unwrap_or_default();
    let mut addresses = Vec::new();
    for (i, text) in given
        .iter()
        .enumerate()
        .filter(|(_, text)| !text.is_empty() && *text != "None")
    {
        let ip = address(&format!("spec.clusterIPs[{i}]"), text)?;
        if !addresses.contains(&ip) {
            addresses.push(ip);
        }
    }
    let mut ports = Vec::new();
    for (i, given) in spec.ports.unwrap_or_default().into_iter().enumerate() {
        if !is_tcp(given.protocol.as_deref()) {
            continue;
        }
        let path = format!("spec.ports[{i}]");
        let number = port(&format!("{path}.port"), given.port)?;
        let target = match given.target_port {
            None => TargetPort::Number(number),
            Some(IntOrString::Int(0)) => TargetPort::Number(number),
            Some(IntOrString::Int(target)) => TargetPort::Number(port(&format!("{path}.targetPort"), target)?),
            Some(IntOrString::String(name)) if name.is_empty() => {
                return Err(format!(
                    "{path}.targetPort: is empty; give a port's number or name, or leave it out"
                ));
            }
            Some(IntOrString::String(name)) => TargetPort::Name(name),
        };
        if ports.iter().any(|other: &ServicePort| other.port == number) {
            return Err(format!("{path}.port: {number} is there already"));
        }
        ports.push(ServicePort {
            name: given.name.unwrap_or_default(),
            port: number,
            target,
        });
    }
    Ok(Service {
        is_external_name: spec.type_.as_deref() == Some("ExternalName"),
        affinity_seconds: affinity_seconds(spec.session_affinity.as_deref(), spec.session_affinity_config)?,
        prefers_near: spec.traffic_distribution.is_some(),
        node_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
        addresses,
        ports,
        selector: spec.selector.unwrap_or_default(),
        publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
    })
}

/// As the API server completes and bounds it.
fn affinity_seconds(affinity: Option<&str>, config: Option<core::SessionAffinityConfig>) -> Result<Option<u32>, String> {
    const DEFAULT_SECONDS: i32 = 10_800;
    const MAX_SECONDS: u32 = 86_400;
    if affinity != Some("ClientIP") {
        return Ok(None);
    }
    let given = config
        .and_then(|config| config.client_ip?.timeout_seconds)
        .unwrap_or(DEFAULT_SECONDS);
    match u32::try_from(given) {
        Ok(seconds @ 1..=MAX_SECONDS) => Ok(Some(seconds)),
        _ => Err(format!(
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds: {given} is no such time; give 1-{MAX_SECONDS}"
        )),
    }
}

fn pod(pod: core::Pod) -> Result<Pod, String> {
    let ObjectMeta {
        labels,
        uid,
        annotations,
        deletion_timestamp,
        owner_references,
        ..
    } = pod.metadata;
    let spec = pod.spec.unwrap_or_default();
    let annotations = annotations.unwrap_or_default();
    let sidecar = sidecar(&spec, &annotations);
    let status = pod.status.unwrap_or_default();
    if let Some(uid) = uid.as_deref().filter(|uid| !is_uid(uid)) {
        return Err(format!(
            "metadata.uid: {uid:?} is no uid; give at most 128 letters, digits, '-', '_' or '.'"
        ));
    }
    let given: Vec<Option<String>> = match status.pod_ips {
        Some(ips) => ips.into_iter().map(|ip| Some(ip.ip)).collect(),
        None => vec![status.pod_ip],
    };
    let mut addresses = Vec::new();
    for (i, text) in given.iter().enumerate().filter_map(|(i, text)| Some((i, text.as_deref()?))) {
        let ip = address(&format!("status.podIPs[{i}].ip"), text)?;
        if !addresses.contains(&ip) {
            addresses.push(ip);
        }
    }
    let service_account = spec
        .service_account_name
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "default".to_owned());
    if !is_name(&service_account) {
        return Err(format!("spec.serviceAccountName: {service_account:?} is no name"));
    }
    let node = spec.node_name.unwrap_or_default();
    if !node.is_empty() && !is_name(&node) {
        return Err(format!("spec.nodeName: {node:?} is no name"));
    }
    let mut probe_ports = BTreeSet::new();
    let of_kind = [
        ("initContainers", spec.init_containers.as_deref().unwrap_or_default()),
        ("containers", &spec.containers),
    ];
    for (list, containers) in of_kind {
        for (c, container) in containers.iter().enumerate() {
            // Init containers that end are not asked; a probe of theirs is refused by the API server.
            probe_ports::add(&mut probe_ports, &format!("spec.{list}[{c}]"), container)?;
        }
    }
    let mut named_ports = BTreeMap::new();
    for (c, container) in spec.containers.into_iter().enumerate() {
        for (p, given) in container.ports.unwrap_or_default().into_iter().enumerate() {
            let number = port(
                &format!("spec.containers[{c}].ports[{p}].containerPort"),
                given.container_port,
            )?;
            if let (Some(name), true) = (given.name, is_tcp(given.protocol.as_deref())) {
                named_ports.entry(name).or_insert(number);
            }
        }
    }
    let annotated = annotations
        .get(CAPTURE_ANNOTATION)
        .and_then(|text| CaptureState::of(text))
        .filter(|_| annotations.get(CAPTURE_UID_ANNOTATION) == uid.as_ref());
    let owner = owner_references
        .unwrap_or_default()
        .into_iter()
        .find(|owner| owner.controller == Some(true));
    Ok(Pod {
        uid: uid.unwrap_or_default(),
        labels: labels.unwrap_or_default(),
        addresses,
        node,
        service_account,
        host_network: spec.host_network.unwrap_or(false),
        annotated,
        is_annotation_foreign: annotated.is_none()
            && (annotations.contains_key(CAPTURE_ANNOTATION) || annotations.contains_key(CAPTURE_UID_ANNOTATION)),
        problem: annotations.get(PROBLEM_ANNOTATION).map(|text| problem_text(text)),
        captured_elsewhere: annotations
            .get(REDIRECTION_ANNOTATION)
            .is_some_and(|value| value == "enabled"),
        sidecar,
        is_static: annotations.contains_key(MIRROR_ANNOTATION),
        runtime_class: spec.runtime_class_name.unwrap_or_default(),
        finished: status
            .phase
            .as_deref()
            .is_some_and(|phase| phase == "Succeeded" || phase == "Failed"),
        terminating: deletion_timestamp.is_some(),
        // A manifest without conditions is one written by hand.
        ready: status
            .conditions
            .unwrap_or_default()
            .iter()
            .find(|condition| condition.type_ == "Ready")
            .is_none_or(|condition| condition.status == "True"),
        owner: owner.map(|owner| (owner.kind, owner.name)),
        named_ports,
        probe_ports: probe_ports.into_iter().collect(),
    })
}

/// As it is kept: what somebody else wrote there may be of any length.
#[must_use]
pub fn problem_text(text: &str) -> String {
    text[..text.floor_char_boundary(MAX_PROBLEM_BYTES)].to_owned()
}

fn endpoint_slice(slice: slices::EndpointSlice) -> Result<EndpointSlice, String> {
    let labels = slice.metadata.labels.unwrap_or_default();
    let service = labels.get(SERVICE_LABEL).cloned().unwrap_or_default();
    let mut ports = Vec::new();
    for (i, given) in slice.ports.unwrap_or_default().into_iter().enumerate() {
        if let (true, Some(number)) = (is_tcp(given.protocol.as_deref()), given.port) {
            ports.push((given.name.unwrap_or_default(), port(&format!("ports[{i}].port"), number)?));
        }
    }
    let mut endpoints = Vec::new();
    // Names are not resolved here.
    if slice.address_type != "FQDN" {
        for (i, given) in slice.endpoints.into_iter().flatten().enumerate() {
            // All of an endpoint's addresses are the same thing; the API says to take the first.
            let Some(text) = given.addresses.first() else { continue };
            let address = address(&format!("endpoints[{i}].addresses[0]"), text)?;
            let conditions = given.conditions.unwrap_or_default();
            let pod = given.target_ref.filter(|target| target.kind.as_deref() == Some("Pod"));
            endpoints.push(Endpoint {
                address,
                pod: pod.and_then(|target| target.name),
                ready: conditions.ready.unwrap_or(true),
                node: given.node_name.unwrap_or_default(),
            });
        }
    }
    Ok(EndpointSlice {
        service,
        ports,
        endpoints,
    })
}
