//! What a NetworkPolicy allows, as far as TCP goes.

use std::collections::BTreeMap;

use ipnet::IpNet;
use k8s_openapi::api::networking::v1 as networking;
use k8s_openapi::apimachinery::pkg::apis::meta::v1 as meta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use crate::objects::Labels;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetworkPolicy {
    /// Of Pods of its namespace.
    pub selector: Selector,
    /// `None`: it says nothing of this direction.
    pub ingress: Option<Vec<Rule>>,
    pub egress: Option<Vec<Rule>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// TCP ports; `None`: all. None in it: only other protocols.
    pub ports: Option<Vec<Ports>>,
    /// Empty: everybody.
    pub peers: Vec<Peer>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ports {
    All,
    Range(u16, u16),
    Named(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    Block(IpNet),
    Pods {
        /// `None`: of the policy's own namespace.
        namespaces: Option<Selector>,
        pods: Selector,
    },
}

/// One that asks for nothing selects everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector {
    labels: Labels,
    expressions: Vec<Expression>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Expression {
    key: String,
    operator: Operator,
    values: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operator {
    In,
    NotIn,
    Exists,
    DoesNotExist,
}

impl Selector {
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
        selector: spec.pod_selector.map(selector).transpose()?.unwrap_or_default(),
        ingress: is_of_ingress.then_some(ingress),
        egress: is_of_egress.then_some(egress),
    })
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
    let peers = peers.unwrap_or_default().into_iter().map(|given| match given.ip_block {
        Some(block) => {
            let range = block.cidr.parse::<IpNet>();
            range
                .map(Peer::Block)
                .map_err(|_| format!("{path}: {:?} is no address range", block.cidr))
        }
        None => Ok(Peer::Pods {
            namespaces: given.namespace_selector.map(selector).transpose()?,
            pods: given.pod_selector.map(selector).transpose()?.unwrap_or_default(),
        }),
    });
    Ok(Rule {
        ports: ports.transpose()?,
        peers: peers.collect::<Result<_, _>>()?,
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
            values: expression.values.unwrap_or_default(),
        })
    });
    Ok(Selector {
        labels: given.match_labels.unwrap_or_else(BTreeMap::new),
        expressions: expressions.collect::<Result<_, _>>()?,
    })
}
