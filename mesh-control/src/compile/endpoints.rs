//! Which workloads are a Service's endpoints, as EndpointSlices say. Pure.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use super::hostname;
use crate::objects::{Endpoint, Kind, Object, ObjectId, Pod, Service, World};

#[cfg(test)]
mod tests;

/// `namespace/hostname` → (service port, target port).
pub type Services = BTreeMap<String, Vec<(u16, u16)>>;

/// What the slices list.
#[derive(Default)]
pub struct Listed<'a> {
    pods: HashMap<&'a ObjectId, Services>,
    outside: BTreeMap<ObjectId, Outside>,
}

/// An endpoint that is no Pod, such as the API server itself. It has no address of its own here: nodes have theirs from
/// elsewhere, and several Services may name one.
struct Outside {
    pod: Pod,
    services: Services,
}

impl<'a> Listed<'a> {
    pub fn new(world: &'a World) -> Self {
        let mut listed = Self::default();
        let mut by_address: HashMap<IpAddr, (&ObjectId, &Pod)> = HashMap::new();
        for (id, object) in world {
            if let Object::Pod(pod) = object.as_ref() {
                by_address.extend(object.exclusive_addresses().iter().map(|ip| (*ip, (id, pod.as_ref()))));
            }
        }
        for (id, object) in world {
            let Object::EndpointSlice(slice) = object.as_ref() else {
                continue;
            };
            let service_id = ObjectId {
                kind: Kind::Service,
                namespace: id.namespace.clone(),
                name: slice.service.clone(),
            };
            let Some(Object::Service(service)) = world.get(&service_id).map(AsRef::as_ref) else {
                continue;
            };
            if service.is_external_name {
                continue;
            }
            let name = format!("{}/{}", service_id.namespace, hostname(&service_id));
            let ports = ports(service, &slice.ports);
            for endpoint in &slice.endpoints {
                let pod = match &endpoint.pod {
                    // One that is not known yet, or has another address by now, is nobody's for the moment.
                    Some(pod) => match find(world, &id.namespace, pod, endpoint.address) {
                        Some(pod) => Some(pod),
                        None => continue,
                    },
                    None => by_address.get(&endpoint.address).copied(),
                };
                let services = match pod {
                    Some((_, pod)) if !counts(endpoint, pod) => continue,
                    Some((id, _)) => listed.pods.entry(id).or_default(),
                    None if !endpoint.ready => continue,
                    None => &mut listed.outside(&service_id, endpoint).services,
                };
                let of_service = services.entry(name.clone()).or_default();
                for port in &ports {
                    if !of_service.contains(port) {
                        of_service.push(*port);
                    }
                }
            }
        }
        listed
    }

    fn outside(&mut self, service: &ObjectId, endpoint: &Endpoint) -> &mut Outside {
        let address = endpoint.address;
        let id = ObjectId {
            kind: Kind::EndpointSlice,
            namespace: service.namespace.clone(),
            name: format!("{}/{address}", service.name),
        };
        self.outside.entry(id).or_insert_with(|| Outside {
            pod: Pod {
                addresses: vec![address],
                node: endpoint.node.clone(),
                host_network: true,
                ready: true,
                service_account: "default".to_owned(),
                // Telemetry names it by its Service.
                owner: Some(("Service".to_owned(), service.name.clone())),
                ..Pod::default()
            },
            services: Services::new(),
        })
    }

    pub fn of_pod(&self, id: &ObjectId) -> Services {
        self.pods.get(id).cloned().unwrap_or_default()
    }

    /// Endpoints that are no Pods: each as a workload outside of the mesh, with its Services.
    pub fn outside_of_the_mesh(&self) -> impl Iterator<Item = (&ObjectId, &Pod, &Services)> {
        self.outside.iter().map(|(id, outside)| (id, &outside.pod, &outside.services))
    }
}

fn find<'a>(world: &'a World, namespace: &str, name: &str, address: IpAddr) -> Option<(&'a ObjectId, &'a Pod)> {
    let wanted = ObjectId {
        kind: Kind::Pod,
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    };
    match world.get_key_value(&wanted).map(|(id, object)| (id, object.as_ref())) {
        Some((id, Object::Pod(pod))) if !pod.finished && pod.addresses.contains(&address) => Some((id, pod)),
        _ => None,
    }
}

/// What the slice takes out is taken out. A Pod that says of itself that it is not ready stays in with that word, as one without
/// slices would: a Service that publishes what is not ready finds it.
fn counts(endpoint: &Endpoint, pod: &Pod) -> bool {
    endpoint.ready || !pod.is_healthy()
}

/// In the Service's order. A slice names the Service's ports by their names.
fn ports(service: &Service, of_slice: &[(String, u16)]) -> Vec<(u16, u16)> {
    let target = |name: &str| of_slice.iter().find(|(port, _)| port == name).map(|(_, target)| *target);
    let ports = service.ports.iter();
    ports.filter_map(|port| Some((port.port, target(&port.name)?))).collect()
}
