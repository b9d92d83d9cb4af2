//! What the control plane has told: workloads, services, policies and settings. [`State`] is pure; [`SharedState`] lets
//! connections read it and wait, bounded, for something fresher.

mod prefixes;
mod settings;
mod shared;
#[cfg(test)]
mod tests;

pub use settings::{Exclusions, Mtls, Settings};
pub use shared::SharedState;

use std::collections::HashMap;
use std::hash::Hash;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::addr::OriginalDst;
use crate::policy::{Policy, Scope};
use crate::workload::{Membership, Service, Workload};

/// One change of what the control plane tells. The name of a resource is what it is removed by.
#[derive(Clone, Debug)]
pub enum Change {
    Workload(Workload),
    Service(Service),
    /// A workload's uid or a service's "namespace/hostname".
    RemoveAddress(String),
    Policy(Arc<Policy>),
    /// "namespace/name".
    RemovePolicy(String),
    Settings(Settings),
    /// Everything was told once. Until then what is not known decides nothing.
    Synced,
}

/// What stands at an original destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destination {
    /// Proven to be in the mesh.
    Mesh(Arc<Workload>),
    /// Belongs in the mesh, never proven yet.
    Pending(Arc<Workload>),
    /// Was proven once.
    Lost(Arc<Workload>),
    ServiceVip(Arc<Service>),
    /// Taken out of the mesh by its operator, whatever stands there; who has the address, where that is known.
    Excluded(Option<Arc<Workload>>),
    /// Outside the mesh; the workload, where it is known.
    Outside(Option<Arc<Workload>>),
    /// Not known, and inside the Pod ranges, or told of later.
    Unknown,
}

impl Destination {
    /// What stands where a workload is reached.
    #[must_use]
    pub fn of(workload: Arc<Workload>) -> Self {
        match workload.membership {
            Membership::Proven => Self::Mesh(workload),
            Membership::Pending => Self::Pending(workload),
            Membership::Lost => Self::Lost(workload),
            Membership::Outside => Self::Outside(Some(workload)),
        }
    }
}

/// A workload behind a service, and where it is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub workload: Arc<Workload>,
    pub address: OriginalDst,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoints {
    NoSuchPort,
    /// Maybe none.
    Of(Vec<Endpoint>),
}

/// The policies that apply to a workload.
#[derive(Clone, Debug, Default)]
pub struct ApplicablePolicies {
    pub policies: Vec<Arc<Policy>>,
    /// Whether these are all: before discovery is synced, or while a policy that the workload lists has not arrived, they are
    /// not; that is to be waited for, then refused.
    pub complete: bool,
}

#[derive(Debug, Default)]
pub struct State {
    workloads: HashMap<Arc<str>, Arc<Workload>>,
    /// Who has an address, oldest first: a Pod's address may be given to the next before the first one's end is told. The
    /// latest counts.
    addresses: HashMap<IpAddr, Vec<Arc<Workload>>>,
    /// By "namespace/hostname".
    services: HashMap<Arc<str>, Arc<Service>>,
    vips: HashMap<IpAddr, Vec<Arc<Service>>>,
    /// Service → its workloads, which may be told before it is.
    endpoints: HashMap<Arc<str>, Vec<Arc<Workload>>>,
    policies: HashMap<Arc<str>, Arc<Policy>>,
    settings: Arc<Settings>,
    synced: bool,
    /// Raised when an address has another holder, or none any longer.
    holders: u64,
}

impl State {
    pub fn apply(&mut self, changes: Vec<Change>) {
        for change in changes {
            match change {
                Change::Workload(workload) => {
                    let addresses = self.addresses_of(&workload.uid, &workload.addresses);
                    self.watching(&addresses, |state| state.insert_workload(workload));
                }
                Change::Service(service) => self.insert_service(service),
                Change::RemoveAddress(name) => {
                    let addresses = self.addresses_of(&name, &[]);
                    self.watching(&addresses, |state| state.remove_workload(&name));
                    self.remove_service(&name);
                }
                Change::Policy(policy) => {
                    self.policies.insert(policy.name.clone(), policy);
                }
                Change::RemovePolicy(name) => {
                    self.policies.remove(&*name);
                }
                Change::Settings(settings) => self.settings = settings.into(),
                Change::Synced => {
                    self.synced = true;
                    self.holders += 1;
                }
            }
        }
    }

    /// A workload's addresses, those that it has and those that it will have.
    fn addresses_of(&self, uid: &str, coming: &[IpAddr]) -> Vec<IpAddr> {
        let held = self.workloads.get(uid).map_or(&[][..], |held| &held.addresses);
        held.iter().chain(coming).copied().collect()
    }

    fn watching(&mut self, addresses: &[IpAddr], change: impl FnOnce(&mut Self)) {
        let holders = |state: &Self| -> Vec<Option<Arc<Workload>>> { addresses.iter().map(|ip| state.by_address(*ip)).collect() };
        let before = holders(self);
        change(self);
        let same = |(before, after): (&Option<Arc<Workload>>, &Option<Arc<Workload>>)| match (before, after) {
            (Some(before), Some(after)) => before.identity == after.identity && before.membership == after.membership,
            (before, after) => before.is_none() && after.is_none(),
        };
        if !before.iter().zip(&holders(self)).all(same) {
            self.holders += 1;
        }
    }

    /// Changes whenever somebody else has an address than before.
    #[must_use]
    pub fn holders(&self) -> u64 {
        self.holders
    }

    #[must_use]
    pub fn by_address(&self, ip: IpAddr) -> Option<Arc<Workload>> {
        self.addresses.get(&ip.to_canonical())?.last().cloned()
    }

    /// Whether everything was told once.
    #[must_use]
    pub fn is_synced(&self) -> bool {
        self.synced
    }

    #[must_use]
    pub fn by_uid(&self, uid: &str) -> Option<Arc<Workload>> {
        self.workloads.get(uid).cloned()
    }

    /// The workload that is the Pod `namespace/name` at this address; another that has the same address is not meant.
    #[must_use]
    pub fn pod_at(&self, ip: IpAddr, namespace: &str, name: &str) -> Option<Arc<Workload>> {
        self.addresses
            .get(&ip.to_canonical())?
            .iter()
            .rev()
            .find(|workload| &*workload.namespace == namespace && &*workload.name == name)
            .cloned()
    }

    #[must_use]
    pub fn settings(&self) -> &Arc<Settings> {
        &self.settings
    }

    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }
    pub fn policies(&self) -> impl Iterator<Item = &Arc<Policy>> {
        self.policies.values()
    }

    #[must_use]
    pub fn destination(&self, destination: OriginalDst) -> Destination {
        if self.settings.excluded.contains(destination.ip(), destination.port()) {
            return Destination::Excluded(self.by_address(destination.ip()));
        }
        self.standing(destination)
    }

    /// As [`State::destination`], without regard to exclusions.
    fn standing(&self, destination: OriginalDst) -> Destination {
        let ip = destination.ip();
        if let Some(workload) = self.by_address(ip) {
            return Destination::of(workload);
        }
        if let Some(service) = self.vips.get(&ip).and_then(|services| services.last()) {
            return Destination::ServiceVip(service.clone());
        }
        if !self.synced || self.settings.pod_ranges.iter().any(|range| range.contains(&ip)) {
            return Destination::Unknown;
        }
        Destination::Outside(None)
    }

    /// Where connections to a port of a service can go. Addresses are of the family that was asked for: the application behind
    /// must be able to see its client. A workload that would be refused is none: one whose capture is lost, or not proven where its
    /// namespace takes nothing in clear.
    #[must_use]
    pub fn endpoints(&self, service: &Service, asked: OriginalDst) -> Endpoints {
        if !service.ports.iter().any(|port| port.port == asked.port()) {
            return Endpoints::NoSuchPort;
        }
        let workloads = self.endpoints.get(&*service_name(service)).into_iter().flatten();
        let usable = workloads.filter(|workload| {
            let in_clear_only = workload.membership == Membership::Pending && self.settings.is_strict(&workload.namespace);
            let reachable = workload.membership != Membership::Lost && !in_clear_only;
            reachable && workload.weight > 0 && (workload.healthy || !service.only_healthy)
        });
        let endpoints = usable.filter_map(|workload| endpoint(workload, service, asked));
        Endpoints::Of(endpoints.filter(|endpoint| self.has_its_address(endpoint)).collect())
    }

    /// Who only says so would be reached as itself, in clear maybe, where another is.
    fn has_its_address(&self, endpoint: &Endpoint) -> bool {
        match self.by_address(endpoint.address.ip()) {
            Some(holder) => Arc::ptr_eq(&holder, &endpoint.workload),
            None => matches!(self.standing(endpoint.address), Destination::Outside(_)),
        }
    }

    /// Its namespace's, the global ones, and those that it lists.
    #[must_use]
    pub fn policies_for(&self, workload: &Workload) -> ApplicablePolicies {
        let mut applicable = ApplicablePolicies {
            policies: Vec::new(),
            complete: self.synced,
        };
        for policy in self.policies.values() {
            match policy.scope {
                Scope::Global => applicable.policies.push(policy.clone()),
                Scope::Namespace if policy.namespace == workload.namespace => {
                    applicable.policies.push(policy.clone());
                }
                Scope::Namespace | Scope::WorkloadSelector => {}
            }
        }
        for name in &workload.policies {
            match self.policies.get(name) {
                Some(policy) => applicable.policies.push(policy.clone()),
                None => applicable.complete = false,
            }
        }
        // The policy that a decision names does not depend on a hash map's order.
        applicable.policies.sort_by(|a, b| a.name.cmp(&b.name));
        applicable.policies.dedup_by(|a, b| a.name == b.name);
        applicable
    }

    fn insert_workload(&mut self, mut workload: Workload) {
        // A Pod that was proven once is never sent cleartext again, whatever the control plane has forgotten, or was made to forget.
        let before = self
            .workloads
            .get(&workload.uid)
            .filter(|before| before.pod_uid == workload.pod_uid);
        let was_proven = before.is_some_and(|before| matches!(before.membership, Membership::Proven | Membership::Lost));
        if was_proven && !workload.pod_uid.is_empty() && workload.membership == Membership::Pending {
            workload.membership = Membership::Lost;
        }
        self.remove_workload(&workload.uid);
        let workload = Arc::new(workload);
        // A node's address stands for all that run there; and whoever merely claims to be on the host's network must not take the
        // place of the Pod that has the address.
        let own = if workload.host_network { &[][..] } else { &workload.addresses };
        for ip in own {
            self.addresses.entry(ip.to_canonical()).or_default().push(workload.clone());
        }
        for (service, _) in &workload.services {
            self.endpoints.entry(service.clone()).or_default().push(workload.clone());
        }
        self.workloads.insert(workload.uid.clone(), workload);
    }

    fn remove_workload(&mut self, uid: &str) {
        let Some(old) = self.workloads.remove(uid) else { return };
        for ip in &old.addresses {
            forget(&mut self.addresses, &ip.to_canonical(), &old);
        }
        for (service, _) in &old.services {
            forget(&mut self.endpoints, service, &old);
        }
    }

    fn insert_service(&mut self, service: Service) {
        let name = service_name(&service);
        self.remove_service(&name);
        let service = Arc::new(service);
        for ip in &service.addresses {
            self.vips.entry(ip.to_canonical()).or_default().push(service.clone());
        }
        self.services.insert(name.into(), service);
    }

    fn remove_service(&mut self, name: &str) {
        let Some(old) = self.services.remove(name) else { return };
        for ip in &old.addresses {
            forget(&mut self.vips, &ip.to_canonical(), &old);
        }
    }
}

fn endpoint(workload: &Arc<Workload>, service: &Service, asked: OriginalDst) -> Option<Endpoint> {
    let name = service_name(service);
    let (_, ports) = workload.services.iter().find(|(service, _)| **service == *name)?;
    // A workload that names no port of its own has the service's.
    let target = ports.iter().find(|port| port.port == asked.port())?.target;
    let ip = workload.addresses.iter().find(|ip| ip.is_ipv4() == asked.ip().is_ipv4())?;
    Some(Endpoint {
        address: OriginalDst::new(SocketAddr::new(*ip, target)),
        workload: workload.clone(),
    })
}

/// The name that a service's resource has.
#[must_use]
pub fn service_name(service: &Service) -> String {
    format!("{}/{}", service.namespace, service.hostname)
}

fn forget<K: Hash + Eq, T>(holders: &mut HashMap<K, Vec<Arc<T>>>, key: &K, old: &Arc<T>) {
    if let Some(list) = holders.get_mut(key) {
        list.retain(|holder| !Arc::ptr_eq(holder, old));
        if list.is_empty() {
            holders.remove(key);
        }
    }
}
