//! Authorization: pure data in, a decision out. The semantics are those of the ambient protocols: rules are OR-ed, clauses of a
//! rule AND-ed, matches of a clause OR-ed; inside a match the kinds are AND-ed, the values of a kind OR-ed, and of a negated
//! kind none may match.

#[cfg(test)]
mod tests;

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::identity::Identity;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// "namespace/name".
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    pub scope: Scope,
    pub action: Action,
    /// No rule at all: never matches.
    pub rules: Vec<Rule>,
    /// Evaluated and reported, never enforced.
    pub dry_run: bool,
}

/// Whom a policy applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    Global,
    /// The workloads of the policy's namespace.
    Namespace,
    /// The workloads that list it.
    WorkloadSelector,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Allow,
    Deny,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    pub clauses: Vec<Clause>,
    /// A part of the rule is not known to this agent: the rule matches for DENY, and does not match for ALLOW.
    pub unknown: bool,
}

/// True when it is empty, or when one of its matches is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Clause {
    pub matches: Vec<Match>,
}

/// An empty match is skipped: it makes no clause true.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Match {
    pub namespaces: Vec<StringMatch>,
    pub not_namespaces: Vec<StringMatch>,
    /// Compared with the principal's form without `spiffe://`.
    pub principals: Vec<StringMatch>,
    pub not_principals: Vec<StringMatch>,
    pub source_ips: Vec<IpNet>,
    pub not_source_ips: Vec<IpNet>,
    pub destination_ips: Vec<IpNet>,
    pub not_destination_ips: Vec<IpNet>,
    pub destination_ports: Vec<u16>,
    pub not_destination_ports: Vec<u16>,
    pub service_accounts: Vec<ServiceAccountMatch>,
    pub not_service_accounts: Vec<ServiceAccountMatch>,
    /// As [`Rule::unknown`], found in this match.
    pub unknown: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StringMatch {
    Exact(Arc<str>),
    Prefix(Arc<str>),
    Suffix(Arc<str>),
    /// Any value, as long as there is one.
    Presence,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceAccountMatch {
    pub namespace: Arc<str>,
    pub service_account: Arc<str>,
}

/// What is to be authorized.
#[derive(Clone, Debug)]
pub struct Connection<'a> {
    /// The proven identity of the source; a plaintext connection has none.
    pub source: Option<&'a Identity>,
    /// Who has the source's address by discovery, where nothing is proven: whom DENY names cannot come in by leaving its tunnel.
    /// Counts for DENY only, beside the missing principal.
    pub claimed: Option<&'a Identity>,
    pub source_ip: IpAddr,
    pub destination_ip: IpAddr,
    pub destination_port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// By the named ALLOW policy; by none where no ALLOW policy applies.
    Allow { policy: Option<Arc<str>> },
    /// By the named DENY policy; by none where ALLOW policies apply and none of them matches.
    Deny { policy: Option<Arc<str>> },
}

impl Decision {
    #[must_use]
    pub fn is_allow(&self) -> bool {
        matches!(self, Self::Allow { .. })
    }
    #[must_use]
    pub fn policy(&self) -> Option<&Arc<str>> {
        match self {
            Self::Allow { policy } | Self::Deny { policy } => policy.as_ref(),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    pub decision: Decision,
    /// Dry-run policies that matched: to be reported.
    pub dry_run_matches: Vec<Arc<str>>,
}

/// Decides about a connection by the policies that apply to its destination.
#[must_use]
pub fn evaluate(policies: &[Arc<Policy>], connection: &Connection<'_>) -> Verdict {
    let proven = Subject::new(connection, connection.source);
    let claimed = connection.claimed.filter(|_| connection.source.is_none());
    let claimed = claimed.map(|identity| Subject::new(connection, Some(identity)));
    let matches = |policy: &Policy| {
        let denied_as_claimed = || {
            let claimed = claimed.as_ref();
            policy.action == Action::Deny && claimed.is_some_and(|claimed| policy.matches(claimed))
        };
        policy.matches(&proven) || denied_as_claimed()
    };
    let dry_run_matches = policies
        .iter()
        .filter(|policy| policy.dry_run && matches(policy))
        .map(|policy| policy.name.clone())
        .collect();
    let enforced = |action| {
        policies
            .iter()
            .filter(move |policy| !policy.dry_run && policy.action == action)
    };

    let decision = if let Some(policy) = enforced(Action::Deny).find(|policy| matches(policy)) {
        Decision::Deny {
            policy: Some(policy.name.clone()),
        }
    } else if enforced(Action::Allow).next().is_none() {
        Decision::Allow { policy: None }
    } else if let Some(policy) = enforced(Action::Allow).find(|policy| matches(policy)) {
        Decision::Allow {
            policy: Some(policy.name.clone()),
        }
    } else {
        Decision::Deny { policy: None }
    };
    Verdict {
        decision,
        dry_run_matches,
    }
}

/// A connection as somebody's, with what the matching needs, made once.
struct Subject<'a> {
    identity: Option<&'a Identity>,
    principal: Option<String>,
    connection: &'a Connection<'a>,
}

impl<'a> Subject<'a> {
    fn new(connection: &'a Connection<'a>, identity: Option<&'a Identity>) -> Self {
        Self {
            identity,
            principal: identity.map(Identity::principal),
            connection,
        }
    }
}

impl Policy {
    fn matches(&self, subject: &Subject<'_>) -> bool {
        self.rules.iter().any(|rule| {
            if rule.has_unknown_part() {
                return self.action == Action::Deny;
            }
            rule.clauses.iter().all(|clause| clause.matches(subject))
        })
    }

    /// Whether a part of it is not known to this agent: to be made visible.
    #[must_use]
    pub fn has_unknown_part(&self) -> bool {
        self.rules.iter().any(Rule::has_unknown_part)
    }
}

impl Rule {
    fn has_unknown_part(&self) -> bool {
        self.unknown || self.clauses.iter().flat_map(|clause| &clause.matches).any(|m| m.unknown)
    }
}

impl Clause {
    fn matches(&self, subject: &Subject<'_>) -> bool {
        self.matches.is_empty() || self.matches.iter().any(|m| !m.is_empty() && m.matches(subject))
    }
}

impl Match {
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    fn matches(&self, subject: &Subject<'_>) -> bool {
        let connection = subject.connection;
        let principal = subject.principal.as_deref();
        let namespace = subject.identity.map(|identity| &*identity.namespace);
        let (source_ip, destination_ip) = (connection.source_ip.to_canonical(), connection.destination_ip.to_canonical());
        let port = connection.destination_port;

        kind(&self.namespaces, &self.not_namespaces, |m| m.matches(namespace))
            && kind(&self.principals, &self.not_principals, |m| m.matches(principal))
            && kind(&self.source_ips, &self.not_source_ips, |net| net.contains(&source_ip))
            && kind(&self.destination_ips, &self.not_destination_ips, |net| {
                net.contains(&destination_ip)
            })
            && kind(&self.destination_ports, &self.not_destination_ports, |p| *p == port)
            && kind(&self.service_accounts, &self.not_service_accounts, |m| {
                m.matches(subject.identity)
            })
    }
}

/// One kind of a match: no value asks nothing; else one of them must match, and none of the negated.
fn kind<T>(values: &[T], negated: &[T], mut is_match: impl FnMut(&T) -> bool) -> bool {
    (values.is_empty() || values.iter().any(&mut is_match)) && !negated.iter().any(is_match)
}

impl StringMatch {
    fn matches(&self, value: Option<&str>) -> bool {
        let Some(value) = value else { return false };
        match self {
            Self::Exact(text) => value == &**text,
            Self::Prefix(text) => value.starts_with(&**text),
            Self::Suffix(text) => value.ends_with(&**text),
            Self::Presence => true,
        }
    }
}

impl ServiceAccountMatch {
    fn matches(&self, source: Option<&Identity>) -> bool {
        source.is_some_and(|source| source.namespace == self.namespace && source.service_account == self.service_account)
    }
}
