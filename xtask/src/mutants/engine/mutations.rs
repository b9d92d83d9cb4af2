//! One expression each: inverted comparisons, ignored fields, confused fields, wrong quantifiers.

use super::Mutation;

pub const MUTATIONS: &[Mutation] = &[
    Mutation {
        name: "a claimed identity that counts beside a proven one",
        from: "connection.claimed.filter(|_| connection.source.is_none())",
        to: "connection.claimed.filter(|_| true)",
    },
    Mutation {
        name: "a claimed identity that never counts",
        from: "connection.claimed.filter(|_| connection.source.is_none())",
        to: "connection.claimed.filter(|_| false)",
    },
    Mutation {
        name: "a claimed identity that counts for ALLOW",
        from: "policy.action == Action::Deny && claimed.is_some_and",
        to: "claimed.is_some_and",
    },
    Mutation {
        name: "a claimed identity that counts instead of none",
        from: "policy.matches(&proven) || denied_as_claimed()",
        to: "denied_as_claimed()",
    },
    Mutation {
        name: "enforced policies among the dry runs",
        from: "policy.dry_run && matches(policy)",
        to: "matches(policy)",
    },
    Mutation {
        name: "dry runs that do not match among the dry runs",
        from: "policy.dry_run && matches(policy)",
        to: "policy.dry_run",
    },
    Mutation {
        name: "dry runs that are enforced",
        from: "!policy.dry_run && policy.action == action",
        to: "policy.action == action",
    },
    Mutation {
        name: "only dry runs are enforced",
        from: "!policy.dry_run && policy.action == action",
        to: "policy.dry_run && policy.action == action",
    },
    Mutation {
        name: "actions that do not count",
        from: "!policy.dry_run && policy.action == action",
        to: "!policy.dry_run",
    },
    Mutation {
        name: "ALLOW where DENY is asked",
        from: "if let Some(policy) = enforced(Action::Deny).find(|policy| matches(policy)) {\n        Decision::Deny",
        to: "if let Some(policy) = enforced(Action::Allow).find(|policy| matches(policy)) {\n        Decision::Deny",
    },
    Mutation {
        name: "DENY that allows",
        from: "enforced(Action::Deny).find(|policy| matches(policy)) {\n        Decision::Deny {",
        to: "enforced(Action::Deny).find(|policy| matches(policy)) {\n        Decision::Allow {",
    },
    Mutation {
        name: "DENY without its name",
        from: "Decision::Deny {\n            policy: Some(policy.name.clone()),",
        to: "Decision::Deny {\n            policy: None.or_else(|| policy.name.is_empty().then(|| policy.name.clone())),",
    },
    Mutation {
        name: "no ALLOW list closes, and any opens",
        from: "enforced(Action::Allow).next().is_none()",
        to: "enforced(Action::Allow).next().is_some()",
    },
    Mutation {
        name: "an ALLOW list that closes nothing",
        from: "enforced(Action::Allow).next().is_none()",
        to: "true",
    },
    Mutation {
        name: "an ALLOW list that closes without being there",
        from: "enforced(Action::Allow).next().is_none()",
        to: "false",
    },
    Mutation {
        name: "ALLOW that denies",
        from: "enforced(Action::Allow).find(|policy| matches(policy)) {\n        Decision::Allow {",
        to: "enforced(Action::Allow).find(|policy| matches(policy)) {\n        Decision::Deny {",
    },
    Mutation {
        name: "the end of an ALLOW list opens",
        from: "} else {\n        Decision::Deny { policy: None }",
        to: "} else {\n        Decision::Allow { policy: None }",
    },
    Mutation {
        name: "the subject's principal is missing",
        from: "principal: identity.map(Identity::principal)",
        to: "principal: None",
    },
    Mutation {
        name: "all rules must match",
        from: "self.rules.iter().any(|rule| {",
        to: "self.rules.iter().all(|rule| {",
    },
    Mutation {
        name: "an unknown part that counts for nothing",
        from: "if rule.has_unknown_part() {",
        to: "if false {",
    },
    Mutation {
        name: "an unknown part that opens",
        from: "return self.action == Action::Deny;",
        to: "return self.action != Action::Deny;",
    },
    Mutation {
        name: "one clause is enough",
        from: "rule.clauses.iter().all(|clause|",
        to: "rule.clauses.iter().any(|clause|",
    },
    Mutation {
        name: "an unknown part of a rule itself that is not seen",
        from: "self.unknown || self.clauses",
        to: "self.clauses",
    },
    Mutation {
        name: "an unknown part of a match that is not seen",
        from: ".any(|m| m.unknown)",
        to: ".any(|_| false)",
    },
    Mutation {
        name: "an empty clause that is false",
        from: "self.matches.is_empty() || self.matches.iter()",
        to: "self.matches.iter()",
    },
    Mutation {
        name: "an empty match that is true",
        from: "!m.is_empty() && m.matches(subject)",
        to: "m.matches(subject)",
    },
    Mutation {
        name: "all matches of a clause",
        from: "self.matches.iter().any(|m| !m.is_empty()",
        to: "self.matches.iter().all(|m| !m.is_empty()",
    },
    Mutation {
        name: "a match without a value that is not empty",
        from: "*self == Self::default()",
        to: "false",
    },
    Mutation {
        name: "no namespaces",
        from: "kind(&self.namespaces, &self.not_namespaces, |m| m.matches(namespace))\n            && ",
        to: "",
    },
    Mutation {
        name: "no principals",
        from: "\n            && kind(&self.principals, &self.not_principals, |m| m.matches(principal))",
        to: "",
    },
    Mutation {
        name: "no source addresses",
        from: "\n            && kind(&self.source_ips, &self.not_source_ips, |net| net.contains(&source_ip))",
        to: "",
    },
    Mutation {
        name: "no destination addresses",
        from: "kind(&self.destination_ips, &self.not_destination_ips, |net| {",
        to: "kind::<IpNet>(&[], &[], |net| {",
    },
    Mutation {
        name: "no destination ports",
        from: "\n            && kind(&self.destination_ports, &self.not_destination_ports, |p| *p == port)",
        to: "",
    },
    Mutation {
        name: "no service accounts",
        from: "kind(&self.service_accounts, &self.not_service_accounts, |m| {",
        to: "kind::<ServiceAccountMatch>(&[], &[], |m| {",
    },
    Mutation {
        name: "namespaces inverted",
        from: "kind(&self.namespaces, &self.not_namespaces,",
        to: "kind(&self.not_namespaces, &self.namespaces,",
    },
    Mutation {
        name: "principals inverted",
        from: "kind(&self.principals, &self.not_principals,",
        to: "kind(&self.not_principals, &self.principals,",
    },
    Mutation {
        name: "source addresses inverted",
        from: "kind(&self.source_ips, &self.not_source_ips,",
        to: "kind(&self.not_source_ips, &self.source_ips,",
    },
    Mutation {
        name: "destination addresses inverted",
        from: "kind(&self.destination_ips, &self.not_destination_ips,",
        to: "kind(&self.not_destination_ips, &self.destination_ips,",
    },
    Mutation {
        name: "destination ports inverted",
        from: "kind(&self.destination_ports, &self.not_destination_ports,",
        to: "kind(&self.not_destination_ports, &self.destination_ports,",
    },
    Mutation {
        name: "service accounts inverted",
        from: "kind(&self.service_accounts, &self.not_service_accounts,",
        to: "kind(&self.not_service_accounts, &self.service_accounts,",
    },
    Mutation {
        name: "source and destination addresses confused",
        from: "|net| net.contains(&source_ip)",
        to: "|net| net.contains(&destination_ip)",
    },
    Mutation {
        name: "destination and source addresses confused",
        from: "net.contains(&destination_ip)\n",
        to: "net.contains(&source_ip)\n",
    },
    Mutation {
        name: "namespace and principal confused",
        from: "|m| m.matches(namespace))",
        to: "|m| m.matches(principal))",
    },
    Mutation {
        name: "principal and namespace confused",
        from: "|m| m.matches(principal))",
        to: "|m| m.matches(namespace))",
    },
    Mutation {
        name: "every other port",
        from: "*p == port",
        to: "*p != port",
    },
    Mutation {
        name: "any two kinds are enough",
        from: "|m| m.matches(principal))\n            && kind",
        to: "|m| m.matches(principal))\n            || kind",
    },
    Mutation {
        name: "v4-mapped sources as they are",
        from: "connection.source_ip.to_canonical()",
        to: "connection.source_ip",
    },
    Mutation {
        name: "v4-mapped destinations as they are",
        from: "connection.destination_ip.to_canonical()",
        to: "connection.destination_ip",
    },
    Mutation {
        name: "a kind without a value that is false",
        from: "(values.is_empty() || values.iter().any(&mut is_match))",
        to: "values.iter().any(&mut is_match)",
    },
    Mutation {
        name: "all values of a kind",
        from: "values.iter().any(&mut is_match)",
        to: "values.iter().all(&mut is_match)",
    },
    Mutation {
        name: "negated values that do not count",
        from: " && !negated.iter().any(is_match)",
        to: "",
    },
    Mutation {
        name: "negated values that must match",
        from: "!negated.iter().any(is_match)",
        to: "(negated.is_empty() || negated.iter().any(is_match))",
    },
    Mutation {
        name: "one negated value may match",
        from: "!negated.iter().any(is_match)",
        to: "(negated.is_empty() || !negated.iter().all(is_match))",
    },
    Mutation {
        name: "no value matches whatever is asked",
        from: "let Some(value) = value else { return false };",
        to: "let Some(value) = value else { return true };",
    },
    Mutation {
        name: "exact inverted",
        from: "value == &**text",
        to: "value != &**text",
    },
    Mutation {
        name: "exact as prefix",
        from: "Self::Exact(text) => value == &**text",
        to: "Self::Exact(text) => value.starts_with(&**text)",
    },
    Mutation {
        name: "prefix as suffix",
        from: "value.starts_with(&**text)",
        to: "value.ends_with(&**text)",
    },
    Mutation {
        name: "prefix as exact",
        from: "value.starts_with(&**text)",
        to: "value == &**text",
    },
    Mutation {
        name: "suffix as prefix",
        from: "value.ends_with(&**text)",
        to: "value.starts_with(&**text)",
    },
    Mutation {
        name: "presence that is never there",
        from: "Self::Presence => true",
        to: "Self::Presence => false",
    },
    Mutation {
        name: "a service account of any namespace",
        from: "source.namespace == self.namespace && source.service_account",
        to: "source.service_account",
    },
    Mutation {
        name: "any service account of a namespace",
        from: "source.namespace == self.namespace && source.service_account == self.service_account",
        to: "source.namespace == self.namespace",
    },
    Mutation {
        name: "service accounts inverted one by one",
        from: "source.is_some_and(|source| source.namespace",
        to: "!source.is_some_and(|source| source.namespace",
    },
];
