//! Manifests as people write them → objects. Pure: text in, objects and rejections out.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use mesh_api::{AuthorizationPolicy, MeshConfig, MeshConfigScope};
use mesh_proto::ROOT_NAMESPACE;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::limits::MAX_DOCUMENTS;
use crate::objects::{Kind, Node, Object, ObjectId, Pod, Service, ServicePort, TargetPort};
use crate::registry::enrolment::{asks_best_effort, sidecar};

#[cfg(test)]
mod tests;

/// What ambient node agents of other makers write on a Pod that they capture.
const REDIRECTION_ANNOTATION: &str = "ambient.istio.io/redirection";

/// The one that counts in its namespace.
const MESH_CONFIG_NAME: &str = "default";

/// One document of a file that the mesh reads.
#[derive(Debug)]
pub struct Document {
    /// Counted from 1; a List's items count as documents.
    pub number: usize,
    pub content: Result<(ObjectId, Object), Rejected>,
}

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

/// What a file holds.
#[derive(Debug, Default)]
pub struct Parsed {
    /// In order. Documents of other kinds are left out.
    pub documents: Vec<Document>,
    /// Documents of other kinds that look as if somebody meant them for the mesh: number, kind and apiVersion.
    pub ignored: Vec<String>,
}

/// By way of YAML's own values, whose mappings refuse a key that is there twice: JSON's take the last one, and a policy would lose
/// the rules of the first in silence.
fn read(part: &str) -> Result<Value, String> {
    let value: serde_norway::Value = serde_norway::from_str(part).map_err(|error| error.to_string())?;
    serde_json::to_value(value).map_err(|error| error.to_string())
}

#[must_use]
pub fn parse_file(text: &str) -> Parsed {
    let Parsed {
        mut documents,
        mut ignored,
    } = Parsed::default();
    let mut number = 0;
    for part in split_documents(text.strip_prefix('\u{feff}').unwrap_or(text)) {
        let value = match read(part) {
            Ok(Value::Null) => continue,
            Ok(value) => value,
            Err(error) => {
                number += 1;
                documents.push(rejected(number, None, Reason::Syntax, format!("no YAML: {error}")));
                continue;
            }
        };
        for value in items(value) {
            number += 1;
            if number > MAX_DOCUMENTS {
                let message = format!("more than {MAX_DOCUMENTS} documents in a file; split it");
                documents.push(rejected(number, None, Reason::File, message));
                return Parsed { documents, ignored };
            }
            match parse_document(value) {
                Ok(Content::Other(None)) => {}
                Ok(Content::Other(Some(what))) => ignored.push(format!("document {number}: {what}")),
                Ok(Content::Object(id, object)) => documents.push(Document {
                    number,
                    content: Ok((id, *object)),
                }),
                Err(error) => documents.push(Document {
                    number,
                    content: Err(error),
                }),
            }
        }
    }
    Parsed { documents, ignored }
}

enum Content {
    Object(ObjectId, Box<Object>),
    /// A kind that the mesh does not read; named when it is one that it seems to be meant to.
    Other(Option<String>),
}

fn rejected(number: usize, id: Option<ObjectId>, reason: Reason, message: String) -> Document {
    Document {
        number,
        content: Err(Rejected { id, reason, message }),
    }
}

/// A line that begins with `---` ends a document wherever it stands (YAML 1.2, 9.1.2), so that each part can be read by itself
/// and a broken one hides no other.
fn split_documents(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let text = rest?;
        let mut offset = 0;
        for line in text.split_inclusive('\n') {
            // The first line's own marker opens the document, it does not end an empty one before it.
            if offset > 0 && line.starts_with("---") && line[3..].chars().next().is_none_or(char::is_whitespace) {
                rest = Some(&text[offset..]);
                return Some(&text[..offset]);
            }
            offset += line.len();
        }
        rest = None;
        Some(text)
    })
}

/// `kubectl get -o yaml` prints a List.
fn items(value: Value) -> Vec<Value> {
    if let Value::Object(mut fields) = value {
        let is_list = fields
            .get("kind")
            .and_then(Value::as_str)
            .is_some_and(|kind| kind.ends_with("List"));
        match fields.remove("items") {
            Some(Value::Array(items)) if is_list => return items,
            Some(other) => {
                fields.insert("items".to_owned(), other);
            }
            None => {}
        }
        return vec![Value::Object(fields)];
    }
    vec![value]
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Header {
    api_version: Option<String>,
    kind: Option<String>,
    metadata: Option<HeaderMetadata>,
}

#[derive(Deserialize)]
struct HeaderMetadata {
    name: Option<String>,
    namespace: Option<String>,
}

fn parse_document(value: Value) -> Result<Content, Rejected> {
    let syntax = |message: String| Rejected {
        id: None,
        reason: Reason::Syntax,
        message,
    };
    let header: Header = typed(&value).map_err(|error| syntax(format!("no Kubernetes object: {error}")))?;
    let (Some(api_version), Some(kind_name)) = (header.api_version, header.kind) else {
        return Err(syntax("no Kubernetes object: apiVersion and kind are needed".to_owned()));
    };
    let Some(kind) = Kind::of(&api_version, &kind_name) else {
        if api_version.split('/').next() == Some(mesh_api::GROUP) {
            return Err(syntax(format!(
                "apiVersion: {api_version:?} is unknown with kind {kind_name:?}; write {} and AuthorizationPolicy or MeshConfig",
                mesh_api::API_VERSION
            )));
        }
        let meant = is_meant_for_the_mesh(&api_version, &kind_name);
        return Ok(Content::Other(
            meant.then(|| format!("{kind_name:.64} of {api_version:.128}")),
        ));
    };
    let metadata = header.metadata.unwrap_or(HeaderMetadata {
        name: None,
        namespace: None,
    });
    let name = metadata.name.unwrap_or_default();
    let namespace = match (kind.is_namespaced(), metadata.namespace) {
        (false, _) => String::new(),
        (true, Some(namespace)) => namespace,
        (true, None) => "default".to_owned(),
    };
    // A name that is none would go into identities and resource names, where `/` separates.
    if !is_name(&name) {
        return Err(syntax(format!(
            "metadata.name: {name:?} is no name; give lower-case letters, digits, '-' and '.'"
        )));
    }
    if kind.is_namespaced() && !is_name(&namespace) {
        return Err(syntax(format!("metadata.namespace: {namespace:?} is no namespace's name")));
    }
    let id = ObjectId { kind, namespace, name };
    if kind == Kind::MeshConfig && id.name != MESH_CONFIG_NAME {
        let first = format!("{} {}/{MESH_CONFIG_NAME}", kind.as_str(), id.namespace);
        return Err(Rejected {
            id: Some(id),
            reason: Reason::Conflict,
            message: format!("metadata.name: of its namespace only {first} counts; say it there and remove this one"),
        });
    }
    match parse_object(&id, &value) {
        Ok(object) => Ok(Content::Object(id, Box::new(object))),
        Err(message) => Err(Rejected {
            id: Some(id),
            reason: Reason::Field,
            message,
        }),
    }
}

/// What another mesh reads, and what is almost what this one reads: whoever wrote it believes that it protects something.
fn is_meant_for_the_mesh(api_version: &str, kind: &str) -> bool {
    let is = |name: &&str| name.eq_ignore_ascii_case(kind);
    let (group, _) = api_version.split_once('/').unwrap_or(("", api_version));
    group == "security.istio.io"
        || [
            "AuthorizationPolicy",
            "MeshConfig",
            "PeerAuthentication",
            "RequestAuthentication",
        ]
        .iter()
        .any(is)
        || (group.is_empty() && Kind::ALL.iter().any(|kind| is(&kind.as_str())))
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
fn typed<T: DeserializeOwned>(value: &Value) -> Result<T, String> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        if path == "." {
            error.inner().to_string()
        } else {
            format!("{path}: {}", error.inner())
        }
    })
}

fn parse_object(id: &ObjectId, value: &Value) -> Result<Object, String> {
    Ok(match id.kind {
        Kind::Namespace => {
            let namespace: core::Namespace = typed(value)?;
            let best_effort = [&namespace.metadata.labels, &namespace.metadata.annotations]
                .into_iter()
                .flatten()
                .any(asks_best_effort);
            Object::Namespace {
                labels: namespace.metadata.labels.unwrap_or_default(),
                best_effort,
            }
        }
        Kind::ServiceAccount => {
            typed::<core::ServiceAccount>(value)?;
            Object::ServiceAccount
        }
        Kind::Node => Object::Node(node(typed(value)?)?),
        Kind::Service => Object::Service(service(typed(value)?)?),
        Kind::Pod => Object::Pod(Box::new(pod(typed(value)?)?)),
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
        text.parse::<IpNet>()
            .map(|range| range.trunc())
            .map_err(|_| format!("spec.podCIDRs[{i}]: {text:?} is no address range; give one like 10.1.0.0/24"))
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

fn port(path: &str, number: i32) -> Result<u16, String> {
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
        ports.push(ServicePort { port: number, target });
    }
    Ok(Service {
        addresses,
        ports,
        selector: spec.selector.unwrap_or_default(),
        publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
    })
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
        captured_elsewhere: annotations
            .get(REDIRECTION_ANNOTATION)
            .is_some_and(|value| value == "enabled"),
        sidecar,
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
    })
}
