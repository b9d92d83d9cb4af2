//! NetworkPolicies that let an application's port through and not the mesh's: what worked in clear fails once both ends are members, for
//! their connections then go to port 15008. Pure; nothing is decided by it.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use super::Snapshot;
use crate::limits::{MAX_NETWORK_POLICIES_NAMED, NETWORK_POLICY_STEPS, NETWORK_POLICY_STEPS_OF_NAMESPACE};
use crate::network_policy::{NetworkPolicy, Peer, Ports, Rule, Selector};
use crate::objects::{Labels, Object, ObjectId, World};

#[cfg(test)]
mod tests;

/// Where agents take tunnels in a Pod (`mesh_common::TUNNEL_PORT`).
const TUNNEL_PORT: u16 = 15008;

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
}

impl Finding {
    /// What to do about it.
    #[must_use]
    pub fn advice(&self) -> String {
        let (what, list) = match self.direction {
            Direction::Ingress => ("lets ports of the mesh's Pods in", "from"),
            Direction::Egress => ("lets the mesh's Pods out", "to"),
        };
        format!(
            "NetworkPolicy {}/{} {what} and not TCP port {TUNNEL_PORT}, by which the mesh carries connections between its Pods: add \
             {{port: {TUNNEL_PORT}, protocol: TCP}} to the ports of its spec.{} rules whose `{list}` has members of the mesh",
            self.namespace,
            self.name,
            self.direction.as_str(),
        )
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// At most [`MAX_NETWORK_POLICIES_NAMED`]: the first ones of each namespace before the second ones of any.
    pub policies: Vec<Finding>,
    /// How many there are of each direction, the others with them.
    pub count: BTreeMap<Direction, usize>,
    /// Namespaces whose policies and Pods are too many to compare them all: what is found of them may not be all.
    pub cut: usize,
}

/// Members that no policy can tell apart.
struct Group<'a> {
    namespace: &'a str,
    labels: &'a Labels,
    named_ports: &'a BTreeMap<String, u16>,
    pods: usize,
}

#[must_use]
pub fn in_the_way(world: &World, snapshot: &Snapshot) -> Findings {
    let steps = (NETWORK_POLICY_STEPS, NETWORK_POLICY_STEPS_OF_NAMESPACE);
    in_the_way_within(world, snapshot, steps)
}

/// `steps`: of all namespaces, and of one.
fn in_the_way_within(world: &World, snapshot: &Snapshot, (mut left, of_one): (usize, usize)) -> Findings {
    let mut policies: BTreeMap<&str, Vec<(&ObjectId, &NetworkPolicy)>> = BTreeMap::new();
    let mut namespaces: BTreeMap<&str, &Labels> = BTreeMap::new();
    for (id, object) in world {
        match object.as_ref() {
            Object::NetworkPolicy(policy) => policies.entry(&id.namespace).or_default().push((id, policy)),
            Object::Namespace { labels, .. } => {
                namespaces.insert(&id.name, labels);
            }
            _ => {}
        }
    }
    if policies.is_empty() {
        return Findings::default();
    }
    let groups = groups(world, snapshot);
    let mut of_namespaces: BTreeMap<&str, Vec<&Group<'_>>> = BTreeMap::new();
    for group in &groups {
        of_namespaces.entry(group.namespace).or_default().push(group);
    }
    let view = View {
        namespaces: &namespaces,
        of_namespaces: &of_namespaces,
        tunnel_names: tunnel_names(&groups),
        ranges: IpNet::aggregate(&snapshot.pod_ranges.iter().copied().collect()),
    };
    // Those with the least to compare first: what others have takes nothing from them.
    let mut turns: Vec<_> = policies
        .iter()
        .filter_map(|(namespace, policies)| {
            let groups = of_namespaces.get(namespace)?;
            let size: usize = policies.iter().map(|(_, policy)| policy.size()).sum();
            Some((size.saturating_mul(groups.len()), *namespace, policies, groups))
        })
        .collect();
    turns.sort_by_key(|(size, namespace, _, _)| (*size, *namespace));
    let mut findings = Findings::default();
    let mut found: BTreeMap<(&ObjectId, Direction), usize> = BTreeMap::new();
    for (_, namespace, policies, groups) in turns {
        let allowed = left.min(of_one);
        let mut steps = Steps(allowed);
        let done = Direction::ALL
            .into_iter()
            .try_for_each(|direction| view.look(namespace, policies, groups, direction, &mut steps, &mut found));
        if done.is_err() || policies.iter().any(|(_, policy)| policy.is_too_large) {
            findings.cut += 1;
        }
        left -= allowed - steps.0;
    }
    let mut ranks: BTreeMap<&str, usize> = BTreeMap::new();
    let mut ranked: Vec<(usize, Finding)> = found
        .into_iter()
        .map(|((id, direction), pods)| {
            *findings.count.entry(direction).or_default() += 1;
            let rank = ranks.entry(&id.namespace).or_default();
            *rank += 1;
            let finding = Finding {
                namespace: id.namespace.clone(),
                name: id.name.clone(),
                direction,
                pods,
            };
            (*rank, finding)
        })
        .collect();
    // In the order of names within a rank.
    ranked.sort_by_key(|(rank, _)| *rank);
    ranked.truncate(MAX_NETWORK_POLICIES_NAMED);
    findings.policies = ranked.into_iter().map(|(_, finding)| finding).collect();
    findings
}

/// What may still be compared, in parts as [`Rule::size`] counts them: who has many policies keeps nobody's from being looked at.
struct Steps(usize);

/// Too much to compare.
struct Cut;

impl Steps {
    fn take(&mut self, parts: usize) -> Result<(), Cut> {
        self.0 = self.0.checked_sub(parts).ok_or(Cut)?;
        Ok(())
    }
}

/// A rule of one direction, with its policy.
struct OfRule<'a> {
    id: &'a ObjectId,
    selector: &'a Selector,
    rule: &'a Rule,
    /// Those of its peers that may be members; `None`: it is for everybody.
    members: Option<Vec<&'a Peer>>,
}

impl OfRule<'_> {
    /// Of others than members nothing comes by a tunnel.
    fn is_of_members(&self) -> bool {
        self.members.as_ref().is_none_or(|members| !members.is_empty())
    }
}

fn groups<'a>(world: &'a World, snapshot: &Snapshot) -> Vec<Group<'a>> {
    let mut groups: BTreeMap<(&str, &Labels, &BTreeMap<String, u16>), usize> = BTreeMap::new();
    for (id, object) in world {
        let Object::Pod(pod) = object.as_ref() else { continue };
        if snapshot.pods.get(&pod.uid).is_some_and(|place| place.is_member) {
            let key = (id.namespace.as_str(), &pod.labels, &pod.named_ports);
            *groups.entry(key).or_default() += 1;
        }
    }
    let group = |((namespace, labels, named_ports), pods)| Group {
        namespace,
        labels,
        named_ports,
        pods,
    };
    groups.into_iter().map(group).collect()
}

/// Names that members have for the tunnel's port, and for no other: what a rule of egress names is a port of whoever is reached.
fn tunnel_names<'a>(groups: &[Group<'a>]) -> BTreeSet<&'a str> {
    let ports = groups.iter().flat_map(|group| group.named_ports);
    let (tunnels, others): (Vec<_>, Vec<_>) = ports.partition(|(_, number)| **number == TUNNEL_PORT);
    let others: BTreeSet<&String> = others.into_iter().map(|(name, _)| name).collect();
    let names = tunnels.into_iter().map(|(name, _)| name);
    names.filter(|name| !others.contains(name)).map(String::as_str).collect()
}

struct View<'a> {
    namespaces: &'a BTreeMap<&'a str, &'a Labels>,
    of_namespaces: &'a BTreeMap<&'a str, Vec<&'a Group<'a>>>,
    tunnel_names: BTreeSet<&'a str>,
    ranges: Vec<IpNet>,
}

impl View<'_> {
    /// Adds to `found` for how many members each policy of a namespace is in the way, in one direction.
    fn look<'p>(
        &self,
        namespace: &str,
        policies: &[(&'p ObjectId, &'p NetworkPolicy)],
        groups: &[&Group<'_>],
        direction: Direction,
        steps: &mut Steps,
        found: &mut BTreeMap<(&'p ObjectId, Direction), usize>,
    ) -> Result<(), Cut> {
        let mut rules: Vec<OfRule<'p>> = Vec::new();
        for (id, policy) in policies {
            let of_direction = match direction {
                Direction::Ingress => policy.ingress.as_deref(),
                Direction::Egress => policy.egress.as_deref(),
            };
            for rule in of_direction.unwrap_or_default() {
                rules.push(OfRule {
                    id,
                    selector: &policy.selector,
                    rule,
                    members: self.members(namespace, rule, steps)?,
                });
            }
        }
        for group in groups {
            let mut open: Vec<&OfRule<'p>> = Vec::new();
            let mut others: Vec<&OfRule<'p>> = Vec::new();
            for of in &rules {
                steps.take(of.selector.size() + of.rule.size())?;
                if !of.selector.selects(group.labels) {
                    continue;
                }
                if self.allows_tunnel(of.rule, direction, group) {
                    open.push(of);
                } else if of.is_of_members() && is_for_applications(of.rule) {
                    others.push(of);
                }
            }
            if others.is_empty() || self.is_open_to_all(&open, steps)? {
                continue;
            }
            let mut in_the_way: BTreeSet<&'p ObjectId> = BTreeSet::new();
            for of in others {
                if !in_the_way.contains(of.id) && !is_covered(of, &open, steps)? {
                    in_the_way.insert(of.id);
                }
            }
            for id in in_the_way {
                *found.entry((id, direction)).or_default() += group.pods;
            }
        }
        Ok(())
    }

    /// The tunnel's port is open to every member.
    fn is_open_to_all(&self, open: &[&OfRule<'_>], steps: &mut Steps) -> Result<bool, Cut> {
        if open
            .iter()
            .any(|of| of.rule.peers.is_empty() || of.rule.peers.iter().any(is_everybody))
        {
            return Ok(true);
        }
        let blocks: Vec<&IpNet> = open
            .iter()
            .flat_map(|of| &of.rule.peers)
            .filter_map(|peer| match peer {
                Peer::Block { range, except } if except.is_empty() => Some(range),
                _ => None,
            })
            .collect();
        steps.take(blocks.len() * self.ranges.len())?;
        let is_open = |pods: &IpNet| blocks.iter().any(|range| range.contains(pods));
        Ok(!self.ranges.is_empty() && self.ranges.iter().all(is_open))
    }

    /// As [`OfRule::members`].
    fn members<'p>(&self, namespace: &str, rule: &'p Rule, steps: &mut Steps) -> Result<Option<Vec<&'p Peer>>, Cut> {
        if rule.peers.is_empty() {
            return Ok(None);
        }
        let mut members = Vec::new();
        for peer in &rule.peers {
            if self.is_member(namespace, peer, steps)? {
                members.push(peer);
            }
        }
        Ok(Some(members))
    }

    fn is_member(&self, namespace: &str, peer: &Peer, steps: &mut Steps) -> Result<bool, Cut> {
        match peer {
            // Addresses of Pods are mostly not meant by it; where they may be, they are taken to be.
            Peer::Block { range, except } => {
                steps.take(self.ranges.len() * peer.size())?;
                let is_excepted = |part: &IpNet| except.iter().any(|except| except.contains(part));
                Ok(self
                    .ranges
                    .iter()
                    .any(|pods| (pods.contains(range) && !is_excepted(range)) || (range.contains(pods) && !is_excepted(pods))))
            }
            Peer::Pods { namespaces, pods } => {
                let Some(selector) = namespaces else {
                    let own = self.of_namespaces.get(namespace).map(Vec::as_slice);
                    return has_member(own.unwrap_or_default(), pods, steps);
                };
                for (name, groups) in self.of_namespaces {
                    steps.take(selector.size())?;
                    let is_there = self.namespaces.get(name).is_some_and(|labels| selector.selects(labels));
                    if is_there && has_member(groups, pods, steps)? {
                        return Ok(true);
                    }
                }
                Ok(false)
            }
        }
    }

    fn allows_tunnel(&self, rule: &Rule, direction: Direction, group: &Group<'_>) -> bool {
        let Some(ports) = &rule.ports else { return true };
        ports.iter().any(|port| match (port, direction) {
            (Ports::All, _) => true,
            (Ports::Range(first, last), _) => (*first..=*last).contains(&TUNNEL_PORT),
            (Ports::Named(name), Direction::Ingress) => group.named_ports.get(name) == Some(&TUNNEL_PORT),
            (Ports::Named(name), Direction::Egress) => self.tunnel_names.contains(name.as_str()),
        })
    }
}

fn has_member(groups: &[&Group<'_>], pods: &Selector, steps: &mut Steps) -> Result<bool, Cut> {
    for group in groups {
        steps.take(pods.size())?;
        if pods.selects(group.labels) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The rule lets TCP through. (What is for DNS alone is not meant for members.)
fn is_for_applications(rule: &Rule) -> bool {
    const DNS: Ports = Ports::Range(53, 53);
    rule.ports.as_ref().is_some_and(|ports| ports.iter().any(|port| *port != DNS))
}

/// Each member that the rule names is let to the tunnel's port by some other rule, as far as can be said without comparing what selectors
/// select.
fn is_covered(of: &OfRule<'_>, open: &[&OfRule<'_>], steps: &mut Steps) -> Result<bool, Cut> {
    let Some(members) = &of.members else { return Ok(false) };
    for member in members {
        let mut is_covered = false;
        for other in open {
            steps.take(member.size() + other.rule.size())?;
            if other.rule.peers.iter().any(|other| covers(other, member)) {
                is_covered = true;
                break;
            }
        }
        if !is_covered {
            return Ok(false);
        }
    }
    Ok(true)
}

fn is_everybody(peer: &Peer) -> bool {
    matches!(peer, Peer::Pods { namespaces: Some(namespaces), pods } if namespaces.is_everything() && pods.is_everything())
}

/// Whoever `peer` is, `other` is, too. Both in rules of one namespace.
fn covers(other: &Peer, peer: &Peer) -> bool {
    match (other, peer) {
        (Peer::Pods { namespaces, pods }, Peer::Pods { namespaces: of, .. }) if pods.is_everything() && namespaces == of => true,
        (Peer::Block { range, except }, Peer::Block { range: of, .. }) if except.is_empty() => range.contains(of),
        _ => other == peer,
    }
}
