//! NetworkPolicies that let an application's port through and not the mesh's: what worked in clear fails once both ends are members, for
//! their connections then go to port 15008. Pure; nothing is decided by it.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use super::Snapshot;
use crate::limits::{MAX_NETWORK_POLICIES_NAMED, MAX_PODS_OF_NETWORK_POLICY_NAMED, MAX_POLICY_COMPARISONS};
use crate::network_policy::{NetworkPolicy, Peer, Ports, Rule, Selector};
use crate::objects::{Labels, Object, ObjectId, World};

#[cfg(test)]
mod tests;

/// Where agents take tunnels in a Pod (`mesh_common::TUNNEL_PORT`).
pub const TUNNEL_PORT: u16 = 15008;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    Ingress,
    Egress,
}

impl Direction {
    pub const ALL: [Self; 2] = [Self::Ingress, Self::Egress];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }
}

/// A policy that stands in the mesh's way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub namespace: String,
    pub name: String,
    pub direction: Direction,
    /// Members that it selects.
    pub pods: usize,
    /// Names of some of them, with their uids.
    pub named: Vec<(String, String)>,
}

impl Finding {
    /// What to do about it.
    #[must_use]
    pub fn advice(&self) -> String {
        let (what, list, ends) = match self.direction {
            Direction::Ingress => ("lets ports of the mesh's Pods in", "from", "members of the mesh"),
            Direction::Egress => ("lets the mesh's Pods out", "to", "members of the mesh"),
        };
        format!(
            "NetworkPolicy {}/{} {what} and not TCP port {TUNNEL_PORT}, by which the mesh carries connections between its Pods: add \
             {{port: {TUNNEL_PORT}, protocol: TCP}} to the ports of its spec.{} rules whose `{list}` has {ends}",
            self.namespace,
            self.name,
            self.direction.as_str(),
        )
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// At most [`MAX_NETWORK_POLICIES_NAMED`], by namespace and name.
    pub policies: Vec<Finding>,
    /// Beyond those.
    pub more: usize,
    /// There are too many policies and Pods to compare them all.
    pub is_cut: bool,
}

/// Members that no policy can tell apart.
struct Group<'a> {
    namespace: &'a str,
    labels: &'a Labels,
    named_ports: &'a BTreeMap<String, u16>,
    pods: Vec<(&'a str, &'a str)>,
}

#[must_use]
pub fn in_the_way(world: &World, snapshot: &Snapshot) -> Findings {
    let mut findings = Findings::default();
    let mut policies: BTreeMap<&str, Vec<(&ObjectId, &NetworkPolicy)>> = BTreeMap::new();
    let mut namespaces: BTreeMap<&str, &Labels> = BTreeMap::new();
    for (id, object) in world {
        match object.as_ref() {
            Object::NetworkPolicy(policy) => policies.entry(&id.namespace).or_default().push((id, policy)),
            Object::Namespace { labels, .. } => drop(namespaces.insert(&id.name, labels)),
            _ => {}
        }
    }
    if policies.is_empty() {
        return findings;
    }
    let groups = groups(world, snapshot);
    let view = View {
        namespaces: &namespaces,
        groups: &groups,
        ranges: snapshot.pod_ranges.iter().copied().collect(),
    };
    let policies_count: usize = policies.values().map(Vec::len).sum();
    if policies_count.saturating_mul(groups.len()) > MAX_POLICY_COMPARISONS {
        findings.is_cut = true;
        return findings;
    }
    let mut found: BTreeMap<(&ObjectId, Direction), Finding> = BTreeMap::new();
    for (namespace, of_namespace) in &policies {
        for direction in Direction::ALL {
            let rules: Vec<OfRule<'_>> = of_namespace
                .iter()
                .filter_map(|(id, policy)| Some((*id, &policy.selector, rules(policy, direction)?)))
                .flat_map(|(id, selector, rules)| rules.iter().map(move |rule| (id, selector, rule)))
                .map(|(id, selector, rule)| OfRule {
                    id,
                    selector,
                    rule,
                    is_of_members: view.is_of_members(namespace, rule),
                })
                .collect();
            for group in groups.iter().filter(|group| group.namespace == *namespace) {
                for id in in_the_way_of(group, &rules) {
                    let finding = found.entry((id, direction)).or_insert_with(|| Finding::new(id, direction));
                    finding.add(group);
                }
            }
        }
    }
    findings.more = found.len().saturating_sub(MAX_NETWORK_POLICIES_NAMED);
    findings.policies = found.into_values().take(MAX_NETWORK_POLICIES_NAMED).collect();
    findings
}

/// A rule of one direction, with its policy.
struct OfRule<'a> {
    id: &'a ObjectId,
    selector: &'a Selector,
    rule: &'a Rule,
    is_of_members: bool,
}

fn in_the_way_of<'a>(group: &Group<'_>, rules: &[OfRule<'a>]) -> BTreeSet<&'a ObjectId> {
    let selecting: Vec<&OfRule<'a>> = rules.iter().filter(|of| of.selector.selects(group.labels)).collect();
    let is_allowed_elsewhere = |rule: &Rule| {
        selecting
            .iter()
            .any(|other| allows(other.rule, TUNNEL_PORT, group.named_ports) && covers(other.rule, rule))
    };
    let in_the_way = selecting
        .iter()
        .filter(|of| of.is_of_members && lacks_tunnel(of.rule, group.named_ports) && !is_allowed_elsewhere(of.rule));
    in_the_way.map(|of| of.id).collect()
}

impl Finding {
    fn new(id: &ObjectId, direction: Direction) -> Self {
        Self {
            namespace: id.namespace.clone(),
            name: id.name.clone(),
            direction,
            pods: 0,
            named: Vec::new(),
        }
    }

    fn add(&mut self, group: &Group<'_>) {
        self.pods += group.pods.len();
        let room = MAX_PODS_OF_NETWORK_POLICY_NAMED.saturating_sub(self.named.len());
        let named = group.pods.iter().take(room);
        self.named
            .extend(named.map(|(name, uid)| ((*name).to_owned(), (*uid).to_owned())));
    }
}

fn groups<'a>(world: &'a World, snapshot: &Snapshot) -> Vec<Group<'a>> {
    let mut groups: BTreeMap<(&str, &Labels, &BTreeMap<String, u16>), Vec<(&str, &str)>> = BTreeMap::new();
    for (id, object) in world {
        let Object::Pod(pod) = object.as_ref() else { continue };
        if !snapshot.pods.get(&pod.uid).is_some_and(|place| place.is_member) {
            continue;
        }
        let key = (id.namespace.as_str(), &pod.labels, &pod.named_ports);
        groups.entry(key).or_default().push((&id.name, &pod.uid));
    }
    let group = |((namespace, labels, named_ports), pods)| Group {
        namespace,
        labels,
        named_ports,
        pods,
    };
    groups.into_iter().map(group).collect()
}

struct View<'a> {
    namespaces: &'a BTreeMap<&'a str, &'a Labels>,
    groups: &'a [Group<'a>],
    ranges: Vec<IpNet>,
}

impl View<'_> {
    /// Whether the rule's peers may be members; of others nothing comes by a tunnel.
    fn is_of_members(&self, namespace: &str, rule: &Rule) -> bool {
        rule.peers.is_empty() || rule.peers.iter().any(|peer| self.is_member(namespace, peer))
    }

    fn is_member(&self, namespace: &str, peer: &Peer) -> bool {
        match peer {
            // Addresses of Pods are mostly not meant by it; where they may be, they are taken to be.
            Peer::Block(block) => self.ranges.iter().any(|range| range.contains(block) || block.contains(range)),
            Peer::Pods { namespaces, pods } => self.groups.iter().any(|group| {
                let is_there = match namespaces {
                    None => group.namespace == namespace,
                    Some(selector) => self
                        .namespaces
                        .get(group.namespace)
                        .is_some_and(|labels| selector.selects(labels)),
                };
                is_there && pods.selects(group.labels)
            }),
        }
    }
}

fn rules(policy: &NetworkPolicy, direction: Direction) -> Option<&Vec<Rule>> {
    match direction {
        Direction::Ingress => policy.ingress.as_ref(),
        Direction::Egress => policy.egress.as_ref(),
    }
}

/// The rule lets TCP through, and not to the tunnel's port. (What is for DNS alone is not meant for members.)
fn lacks_tunnel(rule: &Rule, named_ports: &BTreeMap<String, u16>) -> bool {
    const DNS: Ports = Ports::Range(53, 53);
    let Some(ports) = &rule.ports else { return false };
    ports.iter().any(|port| *port != DNS) && !allows(rule, TUNNEL_PORT, named_ports)
}

fn allows(rule: &Rule, number: u16, named_ports: &BTreeMap<String, u16>) -> bool {
    let Some(ports) = &rule.ports else { return true };
    ports.iter().any(|port| match port {
        Ports::All => true,
        Ports::Range(first, last) => (*first..=*last).contains(&number),
        Ports::Named(name) => named_ports.get(name) == Some(&number),
    })
}

/// Whoever `rule` is for `other` is for, too, as far as can be said without comparing what selectors select.
fn covers(other: &Rule, rule: &Rule) -> bool {
    other.peers.is_empty() || (!rule.peers.is_empty() && rule.peers.iter().all(|peer| other.peers.contains(peer)))
}
