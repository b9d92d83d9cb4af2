//! Objects → discovery resources. Pure: the same objects in any order give the same bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use mesh_api::{Mtls, ValidMeshConfig};
use mesh_proto::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL, ROOT_NAMESPACE, SETTINGS_NAME, SETTINGS_TYPE_URL};
use sha2::{Digest as _, Sha256};

use crate::capture_states::{CaptureState, CaptureStates, PodKey, pod_key};
use crate::objects::{Kind, Node, Object, ObjectId, Pod, Service, TargetPort, World};
use crate::proto;
use endpoints::{Listed, Services};
use forms::Forms;
use membership::{Enrolment, Membership, Refusal, membership};
use selectors::Selectors;

mod endpoints;
pub mod forms;
pub mod membership;
pub mod network_policies;
mod selection;
mod selectors;
mod workload_names;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

/// `enabled` on a Namespace opts in; `disabled` on a Pod opts out.
pub const MESH_LABEL: &str = "culvert.dev/mesh";
/// DNS domain of Services.
const SERVICE_DOMAIN: &str = "svc.cluster.local";
const REGION_LABEL: &str = "topology.kubernetes.io/region";
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// What an operator sets, and what has followed from it.
#[derive(Clone, Debug)]
pub struct Parameters {
    pub trust_domain: String,
    pub cluster: String,
    /// Beside the ranges of the Nodes.
    pub pod_ranges: Vec<IpNet>,
    /// PEM of the roots.
    pub trust_bundle: Vec<String>,
    /// SPIFFE ids that are nobody's any longer.
    pub revoked: BTreeSet<String>,
    pub endpoints: EndpointSource,
}

/// What says which Pods are a Service's endpoints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EndpointSource {
    /// The Service's selector: where nobody makes EndpointSlices of it.
    #[default]
    Selectors,
    /// The cluster's EndpointSlices, and nothing else.
    Slices,
}

/// Everything that agents are told, and what they may ask for.
#[derive(Debug, Default)]
pub struct Snapshot {
    pub types: BTreeMap<&'static str, Arc<TypeSnapshot>>,
    /// SPIFFE ids that each node may have certificates for.
    pub identities: BTreeMap<String, BTreeSet<String>>,
    pub pods: BTreeMap<PodKey, PodPlace>,
    /// Of Nodes and [`Parameters`].
    pub pod_ranges: BTreeSet<IpNet>,
    /// What nodes are to enrol.
    pub enrolment: Enrolment,
    pub forms: Arc<Forms>,
    /// How many workloads of the mesh each policy and MeshConfig is for.
    pub selected: BTreeMap<ObjectId, usize>,
    /// The cluster's, in order.
    pub nodes: Vec<String>,
}

/// Where a Pod is: for checking what agents say of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodPlace {
    pub namespace: String,
    pub name: String,
    pub node: String,
    pub is_member: bool,
}

/// The resources of one type.
#[derive(Debug, Default)]
pub struct TypeSnapshot {
    /// Hash of all names and versions.
    pub version: String,
    pub resources: BTreeMap<String, Arc<CompiledResource>>,
    /// `<network>/<ip>` → resource name.
    pub aliases: BTreeMap<String, String>,
    /// Service → its workloads: who asks for a service needs them, too.
    pub endpoints: BTreeMap<String, Vec<String>>,
}

impl TypeSnapshot {
    /// All resources that a subscribed name stands for.
    pub fn resolve<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Arc<CompiledResource>> {
        let name = self.aliases.get(name).map_or(name, String::as_str);
        let endpoints = self.endpoints.get(name).into_iter().flatten().map(String::as_str);
        std::iter::once(name)
            .chain(endpoints)
            .filter_map(|name| self.resources.get(name))
    }
}

#[derive(Debug, PartialEq, Eq)]
pub struct CompiledResource {
    pub name: String,
    /// Hash of the encoding.
    pub version: String,
    pub aliases: Vec<String>,
    /// The encoded message.
    pub value: Vec<u8>,
}

/// A Pod with everything that its resource is made of.
pub struct WorkloadView<'a> {
    pub id: &'a ObjectId,
    pub pod: &'a Pod,
    pub uid: String,
    pub parameters: &'a Parameters,
    /// `None`: outside the mesh.
    pub capture: Option<Capture>,
    pub policies: Vec<String>,
    /// `namespace/hostname` → (service port, target port).
    pub services: Services,
    pub owner: workload_names::Owner,
    pub canonical_name: String,
    pub canonical_revision: String,
    pub region: String,
    pub zone: String,
    pub healthy: bool,
}

/// What the settings are made of.
pub struct SettingsView<'a> {
    pub parameters: &'a Parameters,
    pub pod_ranges: &'a BTreeSet<IpNet>,
    pub mesh: Option<&'a ValidMeshConfig>,
    pub namespaces: BTreeMap<&'a str, Mtls>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Capture {
    Pending,
    Proven,
    Lost,
    /// By the proxy of another maker, as it says itself: tunnelled to, and proven to nobody.
    Elsewhere,
}

pub use workload_names::OwnerKind;

#[must_use]
pub fn hostname(id: &ObjectId) -> String {
    format!("{}.{}.{SERVICE_DOMAIN}", id.name, id.namespace)
}

#[must_use]
pub fn spiffe_id(trust_domain: &str, namespace: &str, service_account: &str) -> String {
    format!("spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}")
}

/// There is one network; its name is empty.
fn network_alias(ip: IpAddr) -> String {
    format!("/{ip}")
}

#[must_use]
pub fn compile(world: &World, captures: &CaptureStates, parameters: &Parameters) -> Snapshot {
    compile_after(world, captures, parameters, &Snapshot::default())
}

/// As [`compile`]. Of `before`, resources whose bytes are the same are taken over as they are, hash and all.
#[must_use]
pub fn compile_after(world: &World, captures: &CaptureStates, parameters: &Parameters, before: &Snapshot) -> Snapshot {
    let index = Index::new(world);
    let listed = match parameters.endpoints {
        EndpointSource::Selectors => Listed::default(),
        EndpointSource::Slices => Listed::new(world),
    };
    let mut addresses = Resources::after(before, ADDRESS_TYPE_URL);
    let mut identities: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut pods = BTreeMap::new();

    for (id, pod) in &index.pods {
        let key = pod_key(&pod.uid, &id.namespace, &id.name);
        let is_member = index.is_member(id, pod);
        let place = PodPlace {
            namespace: id.namespace.clone(),
            name: id.name.clone(),
            node: pod.node.clone(),
            is_member,
        };
        pods.insert(key.clone(), place);
        if is_member && !pod.node.is_empty() {
            let identity = spiffe_id(&parameters.trust_domain, &id.namespace, &pod.service_account);
            if !parameters.revoked.contains(&identity) {
                identities.entry(pod.node.clone()).or_default().insert(identity);
            }
        }
        // Without an address nobody can reach it, and peers could not tell it by one.
        if pod.addresses.is_empty() {
            continue;
        }
        let capture = is_member.then(|| match captures.of(&key) {
            // Nobody of ours will prove it. Who claims it wrongly is sent tunnels that nobody takes.
            None if pod.captured_elsewhere => Capture::Elsewhere,
            None => Capture::Pending,
            Some(CaptureState::Proven) => Capture::Proven,
            Some(CaptureState::Lost) => Capture::Lost,
        });
        let view = index.workload(id, pod, capture, &listed, parameters);
        for service in view.services.keys() {
            addresses.endpoints.entry(service.clone()).or_default().push(view.uid.clone());
        }
        // Pods on the host's network share its address: an alias would stand for several.
        let aliases = if pod.host_network {
            Vec::new()
        } else {
            pod.addresses.iter().map(|ip| network_alias(*ip)).collect()
        };
        addresses.insert(view.uid.clone(), aliases, proto::encode_workload(&view));
    }
    for (id, pod, services) in listed.outside_of_the_mesh() {
        let view = outside(id, pod, services.clone(), parameters);
        for service in view.services.keys() {
            addresses.endpoints.entry(service.clone()).or_default().push(view.uid.clone());
        }
        addresses.insert(view.uid.clone(), Vec::new(), proto::encode_workload(&view));
    }
    for (id, service) in &index.services {
        let hostname = hostname(id);
        let aliases = service.addresses.iter().map(|ip| network_alias(*ip)).collect();
        let name = format!("{}/{hostname}", id.namespace);
        addresses.insert(name, aliases, proto::encode_service(id, &hostname, service));
    }

    let mut authorizations = Resources::after(before, AUTHORIZATION_TYPE_URL);
    let mut forms = Forms::default();
    for (id, policy) in &index.policies {
        let scope = match (&policy.selector, id.namespace.as_str()) {
            (Some(_), _) => proto::Scope::WorkloadSelector,
            (None, ROOT_NAMESPACE) => proto::Scope::Global,
            (None, _) => proto::Scope::Namespace,
        };
        let name = format!("{}/{}", id.namespace, id.name);
        let encoded = proto::encode_authorization(id, policy, scope);
        forms.insert_policy(id, policy, &encoded);
        authorizations.insert(name, Vec::new(), encoded);
    }
    for (id, object) in world {
        if let Object::MeshConfig(config) = object.as_ref() {
            forms.insert_mesh_config(id, config);
        }
    }

    let ranges: BTreeSet<IpNet> = index
        .nodes
        .values()
        .flat_map(|node| &node.pod_ranges)
        .chain(&parameters.pod_ranges)
        .map(IpNet::trunc)
        .collect();
    let mut settings = Resources::after(before, SETTINGS_TYPE_URL);
    let encoded = proto::encode_settings(&SettingsView {
        parameters,
        pod_ranges: &ranges,
        mesh: index.mesh_configs.get(ROOT_NAMESPACE).copied(),
        namespaces: index
            .mesh_configs
            .iter()
            .filter(|(namespace, _)| **namespace != ROOT_NAMESPACE)
            .map(|(namespace, config)| (*namespace, config.mtls))
            .collect(),
    });
    settings.insert(SETTINGS_NAME.to_owned(), Vec::new(), encoded);

    let types = [
        (ADDRESS_TYPE_URL, addresses),
        (AUTHORIZATION_TYPE_URL, authorizations),
        (SETTINGS_TYPE_URL, settings),
    ];
    Snapshot {
        types: types
            .into_iter()
            .map(|(url, resources)| (url, Arc::new(resources.finish())))
            .collect(),
        identities,
        pods,
        pod_ranges: ranges,
        enrolment: membership::enrolment(&index.namespaces, &index.pods),
        forms: if *before.forms == forms {
            Arc::clone(&before.forms)
        } else {
            Arc::new(forms)
        },
        selected: selection::selected(world, &index),
        nodes: index.nodes.keys().map(|name| (*name).to_owned()).collect(),
    }
}

/// The world by kind.
#[derive(Default)]
struct Index<'a> {
    namespaces: BTreeMap<&'a str, membership::Namespace<'a>>,
    nodes: BTreeMap<&'a str, &'a Node>,
    pods: Vec<(&'a ObjectId, &'a Pod)>,
    services: Vec<(&'a ObjectId, &'a Service)>,
    services_of_namespace: BTreeMap<&'a str, Selectors<'a, (&'a ObjectId, &'a Service)>>,
    policies: Vec<(&'a ObjectId, &'a mesh_api::ValidPolicy)>,
    /// Those with a selector.
    selecting_policies: BTreeMap<&'a str, Selectors<'a, &'a ObjectId>>,
    mesh_configs: BTreeMap<&'a str, &'a ValidMeshConfig>,
}

impl<'a> Index<'a> {
    fn new(world: &'a World) -> Self {
        let mut index = Self::default();
        let mut services: BTreeMap<&str, Vec<_>> = BTreeMap::new();
        let mut policies: BTreeMap<&str, Vec<_>> = BTreeMap::new();
        for (id, object) in world {
            match object.as_ref() {
                Object::Namespace { labels, best_effort } => {
                    let best_effort = *best_effort;
                    index
                        .namespaces
                        .insert(&id.name, membership::Namespace { labels, best_effort });
                }
                Object::Node(node) => {
                    index.nodes.insert(&id.name, node);
                }
                Object::Pod(pod) if !pod.finished => index.pods.push((id, pod)),
                Object::Pod(_) | Object::ServiceAccount | Object::EndpointSlice(_) | Object::NetworkPolicy(_) => {}
                Object::Service(service) if service.is_external_name => {}
                Object::Service(service) => {
                    index.services.push((id, service));
                    // One without a selector has none of its own finding.
                    if !service.selector.is_empty() {
                        let of_namespace = services.entry(&id.namespace).or_default();
                        of_namespace.push((&service.selector, (id, service)));
                    }
                }
                Object::AuthorizationPolicy(policy) => {
                    index.policies.push((id, policy));
                    if let Some(selector) = &policy.selector {
                        policies.entry(&id.namespace).or_default().push((selector, id));
                    }
                }
                Object::MeshConfig(config) => {
                    index.mesh_configs.insert(&id.namespace, config);
                }
            }
        }
        let services = services.into_iter();
        index.services_of_namespace = services.map(|(namespace, all)| (namespace, Selectors::new(all))).collect();
        let policies = policies.into_iter();
        index.selecting_policies = policies.map(|(namespace, all)| (namespace, Selectors::new(all))).collect();
        index
    }

    fn is_member(&self, id: &ObjectId, pod: &Pod) -> bool {
        match membership(self.namespaces.get(id.namespace.as_str()), &id.namespace, pod) {
            Membership::Member => true,
            // Its peers are sent tunnels, which the other mesh takes.
            Membership::Refused(refusal) => refusal == Refusal::CapturedElsewhere,
            Membership::Outside => false,
        }
    }

    fn workload(
        &self,
        id: &'a ObjectId,
        pod: &'a Pod,
        capture: Option<Capture>,
        listed: &Listed<'_>,
        parameters: &'a Parameters,
    ) -> WorkloadView<'a> {
        debug_assert_eq!(id.kind, Kind::Pod);
        // In the order of the world, whichever of the two comes first.
        let mut namespaces = [id.namespace.as_str(), ROOT_NAMESPACE];
        namespaces.sort_unstable();
        let namespaces = &namespaces[usize::from(namespaces[0] == namespaces[1])..];
        let policies = namespaces
            .iter()
            .filter_map(|namespace| self.selecting_policies.get(namespace))
            .flat_map(|of_namespace| of_namespace.choosing(&pod.labels))
            .map(|policy_id| format!("{}/{}", policy_id.namespace, policy_id.name))
            .collect();
        let services = match parameters.endpoints {
            EndpointSource::Selectors => self.selecting(id, pod),
            EndpointSource::Slices => listed.of_pod(id),
        };
        let owner = workload_names::owner(&id.name, pod);
        let label = |node: Option<&&Node>, label: &str| node.and_then(|node| node.labels.get(label)).cloned().unwrap_or_default();
        let node = self.nodes.get(pod.node.as_str());
        WorkloadView {
            id,
            pod,
            uid: format!("{}//Pod/{}/{}", parameters.cluster, id.namespace, id.name),
            parameters,
            capture,
            policies,
            services,
            canonical_name: workload_names::canonical_name(&pod.labels, &owner.name),
            canonical_revision: workload_names::canonical_revision(&pod.labels),
            owner,
            region: label(node, REGION_LABEL),
            zone: label(node, ZONE_LABEL),
            healthy: pod.is_healthy(),
        }
    }

    /// Services whose selectors choose the Pod.
    fn selecting(&self, id: &ObjectId, pod: &Pod) -> Services {
        let mut services = BTreeMap::new();
        let of_namespace = self.services_of_namespace.get(id.namespace.as_str()).into_iter();
        for (service_id, service) in of_namespace.flat_map(|of_namespace| of_namespace.choosing(&pod.labels)) {
            let ports: Vec<(u16, u16)> = service
                .ports
                .iter()
                .filter_map(|port| {
                    let target = match &port.target {
                        TargetPort::Number(number) => *number,
                        TargetPort::Name(name) => *pod.named_ports.get(name)?,
                    };
                    Some((port.port, target))
                })
                .collect();
            services.insert(format!("{}/{}", service_id.namespace, hostname(service_id)), ports);
        }
        services
    }
}

/// An endpoint that is no Pod.
fn outside<'a>(id: &'a ObjectId, pod: &'a Pod, services: Services, parameters: &'a Parameters) -> WorkloadView<'a> {
    let owner = workload_names::owner(&id.name, pod);
    WorkloadView {
        id,
        pod,
        uid: format!(
            "{}/discovery.k8s.io/EndpointSlice/{}/{}",
            parameters.cluster, id.namespace, id.name
        ),
        parameters,
        capture: None,
        policies: Vec::new(),
        services,
        canonical_name: owner.name.clone(),
        canonical_revision: workload_names::canonical_revision(&pod.labels),
        owner,
        region: String::new(),
        zone: String::new(),
        healthy: pod.is_healthy(),
    }
}

struct Resources<'a> {
    before: Option<&'a TypeSnapshot>,
    resources: BTreeMap<String, Arc<CompiledResource>>,
    aliases: BTreeMap<String, String>,
    endpoints: BTreeMap<String, Vec<String>>,
}

impl<'a> Resources<'a> {
    fn after(before: &'a Snapshot, url: &str) -> Self {
        Self {
            before: before.types.get(url).map(AsRef::as_ref),
            resources: BTreeMap::new(),
            aliases: BTreeMap::new(),
            endpoints: BTreeMap::new(),
        }
    }

    fn insert(&mut self, name: String, aliases: Vec<String>, value: Vec<u8>) {
        for alias in &aliases {
            self.aliases.insert(alias.clone(), name.clone());
        }
        let before = self.before.and_then(|before| before.resources.get(&name));
        if let Some(same) = before.filter(|before| before.value == value && before.aliases == aliases) {
            self.resources.insert(name, Arc::clone(same));
            return;
        }
        let version = short_hash(&[&value]);
        self.resources.insert(
            name.clone(),
            Arc::new(CompiledResource {
                name,
                version,
                aliases,
                value,
            }),
        );
    }

    fn finish(self) -> TypeSnapshot {
        let parts: Vec<&[u8]> = self
            .resources
            .values()
            .flat_map(|resource| [resource.name.as_bytes(), resource.version.as_bytes()])
            .collect();
        let version = short_hash(&parts);
        TypeSnapshot {
            version,
            resources: self.resources,
            aliases: self.aliases,
            endpoints: self.endpoints,
        }
    }
}

/// 128 bits of SHA-256: clients send all versions back on each reconnect.
fn short_hash<T: AsRef<[u8]>>(parts: &[T]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.as_ref().len() as u64).to_be_bytes());
        hash.update(part.as_ref());
    }
    hex::encode(&hash.finalize()[..16])
}
