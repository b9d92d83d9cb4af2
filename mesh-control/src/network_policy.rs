//! What a NetworkPolicy allows, as far as TCP goes.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use k8s_openapi::api::networking::v1 as networking;
use k8s_openapi::apimachinery::pkg::apis::meta::v1 as meta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use crate::limits::MAX_NETWORK_POLICY_PARTS;
use crate::objects::Labels;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetworkPolicy {
    pub uid: String,
    pub generation: i64,
    /// Of Pods of its namespace.
    pub selector: Selector,
    /// `None`: it says nothing of this direction.
    pub ingress: Option<Vec<Rule>>,
    pub egress: Option<Vec<Rule>>,
    /// It has more than [`MAX_NETWORK_POLICY_PARTS`]: nothing of it is kept.
    pub is_too_large: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// TCP ports; `None`: all. None in it: only other protocols.
    pub ports: Option<Vec<Ports>>,
    /// Empty: everybody.
    pub peers: BTreeSet<Peer>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ports {
    All,
    Range(u16, u16),
    Named(String),
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Peer {
    Block {
        range: IpNet,
        except: Vec<IpNet>,
    },
    Pods {
        /// `None`: of the policy's own namespace.
        namespaces: Option<Selector>,
        pods: Selector,
    },
}

/// One that asks for nothing selects everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Selector {
    labels: Labels,
    expressions: Vec<Expression>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Expression {
    key: String,
    operator: Operator,
    values: BTreeSet<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Operator {
    In,
    NotIn,
    Exists,
    DoesNotExist,
}

impl NetworkPolicy {
    /// As [`Rule::size`].
    #[must_use]
    pub fn size(&self) -> usize {
        let rules = [&self.ingress, &self.egress].into_iter().flatten().flatten();
        self.selector.size() + rules.map(Rule::size).sum::<usize>()
    }
}

impl Rule {
    /// What comparing it with something takes, in parts of about 50 ns.
    #[must_use]
    pub fn size(&self) -> usize {
        let ports = self.ports.as_ref().map_or(0, Vec::len);
        1 + ports + self.peers.iter().map(Peer::size).sum::<usize>()
    }
}

impl Peer {
    /// As [`Rule::size`].
    #[must_use]
    pub fn size(&self) -> usize {
        match self {
            Self::Block { except, .. } => 1 + except.len(),
            Self::Pods { namespaces, pods } => namespaces.as_ref().map_or(0, Selector::size) + pods.size(),
        }
    }
}

impl Selector {
    /// As [`Rule::size`].
    #[must_use]
    pub fn size(&self) -> usize {
        1 + self.labels.len()
            + self
                .expressions
                .iter()
                .map(|expression| 1 + expression.values.len())
                .sum::<usize>()
    }

    #[must_use]
    pub fn is_everything(&self) -> bool {
        self.labels.is_empty() && self.expressions.is_empty()
    }

    #[must_use]
    pub fn selects(&self, labels: &Labels) -> bool {
        let equal = |(key, value): (&String, &String)| labels.get(key) == Some(value);
        self.labels.iter().all(equal) && self.expressions.iter().all(|expression| expression.holds(labels))
    }
}

impl Expression {
    fn holds(&self, labels: &Labels) -> bool {
        let value = labels.get(&self.key);
        let is_in = value.is_some_and(|value| self.values.contains(value));
        match self.operator {
            Operator::In => is_in,
            Operator::NotIn => !is_in,
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    }
}

/// # Errors
/// The field that cannot stand.
pub fn convert(policy: networking::NetworkPolicy) -> Result<NetworkPolicy, String> {
    let spec = policy.spec.unwrap_or_default();
    let uid = policy.metadata.uid.unwrap_or_default();
    let generation = policy.metadata.generation.unwrap_or_default();
    if parts(&spec) > MAX_NETWORK_POLICY_PARTS {
        return Ok(NetworkPolicy {
            uid,
            generation,
            is_too_large: true,
            ..NetworkPolicy::default()
        });
    }
    let types = spec.policy_types.unwrap_or_default();
    let has = |name: &str| types.iter().any(|given| given == name);
    let ingress = spec.ingress.unwrap_or_default().into_iter().enumerate().map(|(i, given)| {
        let path = format!("spec.ingress[{i}]");
        rule(&path, given.ports, given.from)
    });
    let ingress = ingress.collect::<Result<Vec<_>, _>>()?;
    let egress = spec.egress.unwrap_or_default().into_iter().enumerate().map(|(i, given)| {
        let path = format!("spec.egress[{i}]");
        rule(&path, given.ports, given.to)
    });
    let egress = egress.collect::<Result<Vec<_>, _>>()?;
    // What a policy that does not say is for: ingress always, egress if it has rules of it.
    let is_of_ingress = types.is_empty() || has("Ingress");
    let is_of_egress = has("Egress") || (types.is_empty() && !egress.is_empty());
    Ok(NetworkPolicy {
        uid,
        generation,
        selector: spec.pod_selector.map(selector).transpose()?.unwrap_or_default(),
        ingress: is_of_ingress.then_some(ingress),
        egress: is_of_egress.then_some(egress),
        is_too_large: false,
    })
}

/// How many parts it has, about.
fn parts(spec: &networking::NetworkPolicySpec) -> usize {
    let of_peers = |peers: &Option<Vec<networking::NetworkPolicyPeer>>| peers.iter().flatten().map(parts_of_peer).sum::<usize>();
    let ingress = spec.ingress.iter().flatten();
    let ingress = ingress.map(|rule| 1 + rule.ports.as_ref().map_or(0, Vec::len) + of_peers(&rule.from));
    let egress = spec.egress.iter().flatten();
    let egress = egress.map(|rule| 1 + rule.ports.as_ref().map_or(0, Vec::len) + of_peers(&rule.to));
    spec.pod_selector.as_ref().map_or(0, parts_of_selector) + ingress.chain(egress).sum::<usize>()
}

fn parts_of_peer(peer: &networking::NetworkPolicyPeer) -> usize {
    let except = peer.ip_block.as_ref().and_then(|block| block.except.as_ref());
    let selectors = [&peer.namespace_selector, &peer.pod_selector];
    let selectors = selectors.into_iter().flatten().map(parts_of_selector);
    1 + except.map_or(0, Vec::len) + selectors.sum::<usize>()
}

fn parts_of_selector(selector: &meta::LabelSelector) -> usize {
    let expressions = selector.match_expressions.iter().flatten();
    let expressions = expressions.map(|expression| 1 + expression.values.as_ref().map_or(0, Vec::len));
    selector.match_labels.as_ref().map_or(0, BTreeMap::len) + expressions.sum::<usize>()
}

fn rule(
    path: &str,
    ports: Option<Vec<networking::NetworkPolicyPort>>,
    peers: Option<Vec<networking::NetworkPolicyPeer>>,
) -> Result<Rule, String> {
    let ports = ports.filter(|ports| !ports.is_empty());
    let ports = ports.map(|ports| {
        let tcp = ports
            .into_iter()
            .filter(|port| port.protocol.as_deref().is_none_or(|protocol| protocol == "TCP"));
        tcp.map(|given| match (given.port, given.end_port) {
            (None, _) => Ok(Ports::All),
            (Some(IntOrString::String(name)), _) => Ok(Ports::Named(name)),
            (Some(IntOrString::Int(first)), last) => {
                let number = |number: i32| u16::try_from(number).map_err(|_| format!("{path}.ports: {number} is no port"));
                Ok(Ports::Range(number(first)?, number(last.unwrap_or(first))?))
            }
        })
        .collect::<Result<Vec<_>, String>>()
    });
    let peers = peers.unwrap_or_default().into_iter().map(|given| peer(path, given));
    Ok(Rule {
        ports: ports.transpose()?,
        peers: peers.collect::<Result<_, _>>()?,
    })
}

fn peer(path: &str, given: networking::NetworkPolicyPeer) -> Result<Peer, String> {
    let Some(block) = given.ip_block else {
        return Ok(Peer::Pods {
            namespaces: given.namespace_selector.map(selector).transpose()?,
            pods: given.pod_selector.map(selector).transpose()?.unwrap_or_default(),
        });
    };
    let range = |text: &String| {
        let range = text.parse::<IpNet>();
        range.map_err(|_| format!("{path}: {text:?} is no address range"))
    };
    Ok(Peer::Block {
        range: range(&block.cidr)?,
        except: block.except.iter().flatten().map(range).collect::<Result<_, _>>()?,
    })
}

fn selector(given: meta::LabelSelector) -> Result<Selector, String> {
    let expressions = given.match_expressions.unwrap_or_default().into_iter().map(|expression| {
        let operator = match expression.operator.as_str() {
            "In" => Operator::In,
            "NotIn" => Operator::NotIn,
            "Exists" => Operator::Exists,
            "DoesNotExist" => Operator::DoesNotExist,
            other => return Err(format!("matchExpressions: {other:?} is no operator")),
        };
        Ok(Expression {
            key: expression.key,
            operator,
            values: expression.values.unwrap_or_default().into_iter().collect(),
        })
    });
    Ok(Selector {
        labels: given.match_labels.unwrap_or_default(),
        expressions: expressions.collect::<Result<_, _>>()?,
    })
}
