//! `istio.security.Authorization` → [`Policy`]. What is unknown or malformed inside a rule marks the rule, which then denies
//! (DENY) or does not allow (ALLOW): rejecting the whole would leave a restriction out of force.

use mesh_proto::security::{
    Action as WireAction, Address, Authorization, Clause as WireClause, Match as WireMatch, Rule as WireRule, Scope as WireScope,
    ServiceAccountMatch as WireServiceAccount, StringMatch as WireString, string_match,
};
use prost::Message as _;

use super::{ProtoError, field, network, unknown_fields};
use crate::policy::{Action, Clause, Match, Policy, Rule, Scope, ServiceAccountMatch, StringMatch};

pub fn decode(bytes: &[u8]) -> Result<Policy, ProtoError> {
    let unknown = unknown_fields::of_authorization(bytes);
    let wire = Authorization::decode(bytes)?;
    for (name, text) in [("name", &wire.name), ("namespace", &wire.namespace)] {
        if text.is_empty() {
            return Err(field(name, "is empty"));
        }
    }
    let mut whole_unknown = unknown.whole;
    let action = match WireAction::try_from(wire.action) {
        Ok(WireAction::Allow) => Action::Allow,
        Ok(WireAction::Deny) => Action::Deny,
        Err(_) => {
            whole_unknown = true;
            Action::Deny
        }
    };
    let scope = match WireScope::try_from(wire.scope) {
        Ok(WireScope::Global) => Scope::Global,
        Ok(WireScope::Namespace) => Scope::Namespace,
        Ok(WireScope::WorkloadSelector) => Scope::WorkloadSelector,
        Err(_) => {
            whole_unknown = true;
            super::widest_scope(&wire.namespace)
        }
    };
    let mut rules: Vec<Rule> = wire
        .rules
        .into_iter()
        .enumerate()
        .map(|(i, wire)| Rule {
            unknown: whole_unknown || unknown.rules.get(i).copied().unwrap_or(true),
            ..rule(wire)
        })
        .collect();
    // What we do not know may stand where rules stood: a policy without any would never match.
    if whole_unknown && rules.is_empty() {
        rules.push(Rule {
            clauses: Vec::new(),
            unknown: true,
        });
    }
    Ok(Policy {
        name: format!("{}/{}", wire.namespace, wire.name).into(),
        namespace: wire.namespace.into(),
        scope,
        action,
        rules,
        dry_run: wire.dry_run,
    })
}

fn rule(wire: WireRule) -> Rule {
    Rule {
        clauses: wire
            .clauses
            .into_iter()
            .map(|WireClause { matches }| Clause {
                matches: matches.into_iter().map(condition).collect(),
            })
            .collect(),
        unknown: false,
    }
}

fn condition(wire: WireMatch) -> Match {
    let mut unknown = false;
    let mut result = Match {
        namespaces: each(wire.namespaces, &mut unknown, string),
        not_namespaces: each(wire.not_namespaces, &mut unknown, string),
        principals: each(wire.principals, &mut unknown, string),
        not_principals: each(wire.not_principals, &mut unknown, string),
        source_ips: each(wire.source_ips, &mut unknown, block),
        not_source_ips: each(wire.not_source_ips, &mut unknown, block),
        destination_ips: each(wire.destination_ips, &mut unknown, block),
        not_destination_ips: each(wire.not_destination_ips, &mut unknown, block),
        destination_ports: each(wire.destination_ports, &mut unknown, port),
        not_destination_ports: each(wire.not_destination_ports, &mut unknown, port),
        service_accounts: each(wire.service_accounts, &mut unknown, service_account),
        not_service_accounts: each(wire.not_service_accounts, &mut unknown, service_account),
        unknown: false,
    };
    result.unknown = unknown;
    result
}

/// A value that means nothing to us makes the match unknown.
fn each<W, D>(wire: Vec<W>, unknown: &mut bool, domain: impl Fn(W) -> Option<D>) -> Vec<D> {
    wire.into_iter()
        .filter_map(|value| {
            let value = domain(value);
            *unknown |= value.is_none();
            value
        })
        .collect()
}

fn string(wire: WireString) -> Option<StringMatch> {
    Some(match wire.match_type? {
        string_match::MatchType::Exact(text) => StringMatch::Exact(text.into()),
        string_match::MatchType::Prefix(text) => StringMatch::Prefix(text.into()),
        string_match::MatchType::Suffix(text) => StringMatch::Suffix(text.into()),
        string_match::MatchType::Presence(_) => StringMatch::Presence,
    })
}

fn block(wire: Address) -> Option<ipnet::IpNet> {
    network(&wire.address, wire.length)
}

fn port(wire: u32) -> Option<u16> {
    u16::try_from(wire).ok().filter(|&port| port != 0)
}

fn service_account(wire: WireServiceAccount) -> Option<ServiceAccountMatch> {
    if wire.namespace.is_empty() || wire.service_account.is_empty() {
        return None;
    }
    Some(ServiceAccountMatch {
        namespace: wire.namespace.into(),
        service_account: wire.service_account.into(),
    })
}
