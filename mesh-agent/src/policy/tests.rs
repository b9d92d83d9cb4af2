mod against_oracle;
mod oracle;

use std::sync::Arc;

use proptest::prelude::*;

use super::*;

fn identity(namespace: &str, account: &str) -> Identity {
    Identity::new("cluster.local", namespace, account)
}

fn policy(name: &str, action: Action, rules: Vec<Rule>) -> Arc<Policy> {
    Arc::new(Policy {
        name: format!("shop/{name}").into(),
        namespace: "shop".into(),
        scope: Scope::Namespace,
        action,
        rules,
        dry_run: false,
    })
}

fn rule(matches: Vec<Match>) -> Rule {
    Rule {
        clauses: vec![Clause { matches }],
        unknown: false,
    }
}

fn exact(text: &str) -> Vec<StringMatch> {
    vec![StringMatch::Exact(text.into())]
}

/// From web in namespace shop, at 10.0.0.1, to 10.0.1.2:8080.
fn decide(policies: &[Arc<Policy>], source: Option<&Identity>) -> Verdict {
    evaluate(
        policies,
        &Connection {
            source,
            claimed: None,
            source_ip: "10.0.0.1".parse().unwrap(),
            destination_ip: "10.0.1.2".parse().unwrap(),
            destination_port: 8080,
        },
    )
}

#[test]
fn one_match_of_each_kind() {
    let web = identity("shop", "web");
    let principal = |m: StringMatch| Match {
        principals: vec![m],
        ..Match::default()
    };
    let net = |text: &str| vec![text.parse().unwrap()];
    let account = |namespace: &str, account: &str| {
        vec![ServiceAccountMatch {
            namespace: namespace.into(),
            service_account: account.into(),
        }]
    };
    let table: Vec<(&str, Match, bool, bool)> = vec![
        // (name, match, matches web, matches a plaintext source)
        (
            "exact",
            principal(StringMatch::Exact("cluster.local/ns/shop/sa/web".into())),
            true,
            false,
        ),
        (
            "exact is not prefix",
            principal(StringMatch::Exact("cluster.local/ns/shop".into())),
            false,
            false,
        ),
        (
            "no scheme",
            principal(StringMatch::Exact("spiffe://cluster.local/ns/shop/sa/web".into())),
            false,
            false,
        ),
        (
            "prefix",
            principal(StringMatch::Prefix("cluster.local/ns/shop/".into())),
            true,
            false,
        ),
        ("suffix", principal(StringMatch::Suffix("/sa/web".into())), true, false),
        ("presence", principal(StringMatch::Presence), true, false),
        (
            "no presence",
            Match {
                not_principals: vec![StringMatch::Presence],
                ..Match::default()
            },
            false,
            true,
        ),
        (
            "namespace",
            Match {
                namespaces: exact("shop"),
                ..Match::default()
            },
            true,
            false,
        ),
        (
            "other namespace",
            Match {
                namespaces: exact("bank"),
                ..Match::default()
            },
            false,
            false,
        ),
        (
            "not that namespace",
            Match {
                not_namespaces: exact("shop"),
                ..Match::default()
            },
            false,
            true,
        ),
        (
            "source ip",
            Match {
                source_ips: net("10.0.0.0/24"),
                ..Match::default()
            },
            true,
            true,
        ),
        (
            "other source ip",
            Match {
                source_ips: net("10.0.9.0/24"),
                ..Match::default()
            },
            false,
            false,
        ),
        (
            "not source ip",
            Match {
                not_source_ips: net("10.0.0.1/32"),
                ..Match::default()
            },
            false,
            false,
        ),
        (
            "destination ip",
            Match {
                destination_ips: net("10.0.1.2/32"),
                ..Match::default()
            },
            true,
            true,
        ),
        (
            "not destination ip",
            Match {
                not_destination_ips: net("10.0.1.0/24"),
                ..Match::default()
            },
            false,
            false,
        ),
        (
            "port",
            Match {
                destination_ports: vec![80, 8080],
                ..Match::default()
            },
            true,
            true,
        ),
        (
            "other port",
            Match {
                destination_ports: vec![80],
                ..Match::default()
            },
            false,
            false,
        ),
        (
            "not port",
            Match {
                not_destination_ports: vec![8080],
                ..Match::default()
            },
            false,
            false,
        ),
        (
            "account",
            Match {
                service_accounts: account("shop", "web"),
                ..Match::default()
            },
            true,
            false,
        ),
        (
            "other account",
            Match {
                service_accounts: account("shop", "db"),
                ..Match::default()
            },
            false,
            false,
        ),
        (
            "not account",
            Match {
                not_service_accounts: account("shop", "web"),
                ..Match::default()
            },
            false,
            true,
        ),
        (
            "kinds are ANDed",
            Match {
                namespaces: exact("shop"),
                destination_ports: vec![80],
                ..Match::default()
            },
            false,
            false,
        ),
    ];
    for (name, m, identified, plaintext) in table {
        let policies = [policy("p", Action::Deny, vec![rule(vec![m])])];
        assert_eq!(!decide(&policies, Some(&web)).decision.is_allow(), identified, "{name}: web");
        assert_eq!(!decide(&policies, None).decision.is_allow(), plaintext, "{name}: plaintext");
    }
}

#[test]
fn rules_clauses_and_matches() {
    let port = |port| Match {
        destination_ports: vec![port],
        ..Match::default()
    };
    let clause = |matches: Vec<Match>| Clause { matches };
    let table: Vec<(&str, Vec<Rule>, bool)> = vec![
        ("no rule never matches", vec![], false),
        ("a rule without clauses matches", vec![Rule::default()], true),
        ("an empty clause is true", vec![rule(vec![])], true),
        ("an empty match is skipped", vec![rule(vec![Match::default()])], false),
        (
            "an empty match beside another",
            vec![rule(vec![Match::default(), port(8080)])],
            true,
        ),
        ("rules are ORed", vec![rule(vec![port(1)]), rule(vec![port(8080)])], true),
        ("matches are ORed", vec![rule(vec![port(1), port(8080)])], true),
        (
            "clauses are ANDed",
            vec![Rule {
                clauses: vec![clause(vec![port(8080)]), clause(vec![port(1)])],
                unknown: false,
            }],
            false,
        ),
    ];
    for (name, rules, matches) in table {
        let denied = !decide(&[policy("p", Action::Deny, rules)], None).decision.is_allow();
        assert_eq!(denied, matches, "{name}");
    }
}

#[test]
fn deny_goes_first_and_an_allow_list_closes() {
    let all = vec![Rule::default()];
    let none = vec![rule(vec![Match {
        destination_ports: vec![1],
        ..Match::default()
    }])];
    let name = |name: &str| Some(Arc::from(format!("shop/{name}").as_str()));

    assert_eq!(decide(&[], None).decision, Decision::Allow { policy: None });
    let policies = [
        policy("a", Action::Allow, all.clone()),
        policy("d", Action::Deny, all.clone()),
    ];
    assert_eq!(decide(&policies, None).decision, Decision::Deny { policy: name("d") });
    let policies = [
        policy("a", Action::Allow, none.clone()),
        policy("b", Action::Allow, all.clone()),
    ];
    assert_eq!(decide(&policies, None).decision, Decision::Allow { policy: name("b") });
    let policies = [policy("a", Action::Allow, none.clone())];
    assert_eq!(decide(&policies, None).decision, Decision::Deny { policy: None });
    let policies = [policy("a", Action::Allow, vec![])];
    assert_eq!(
        decide(&policies, None).decision,
        Decision::Deny { policy: None },
        "an ALLOW policy without rules allows nothing"
    );
    let policies = [policy("d", Action::Deny, none)];
    assert_eq!(decide(&policies, None).decision, Decision::Allow { policy: None });
}

#[test]
fn an_unknown_part_closes() {
    let in_match = rule(vec![Match {
        destination_ports: vec![1],
        unknown: true,
        ..Match::default()
    }]);
    let in_rule = Rule {
        clauses: vec![],
        unknown: true,
    };
    for rule in [in_match, in_rule] {
        assert!(
            !decide(&[policy("d", Action::Deny, vec![rule.clone()])], None)
                .decision
                .is_allow()
        );
        assert!(
            !decide(&[policy("a", Action::Allow, vec![rule.clone()])], None)
                .decision
                .is_allow()
        );
        let beside = [policy("a", Action::Allow, vec![rule, Rule::default()])];
        assert!(decide(&beside, None).decision.is_allow(), "another rule still allows");
        assert!(beside[0].has_unknown_part());
    }
}

#[test]
fn dry_run_is_reported_and_not_enforced() {
    let dry = |name: &str, action| {
        let mut policy = (*policy(name, action, vec![Rule::default()])).clone();
        policy.dry_run = true;
        Arc::new(policy)
    };
    let policies = [dry("d", Action::Deny), dry("a", Action::Allow)];
    let verdict = decide(&policies, None);
    assert_eq!(
        verdict.decision,
        Decision::Allow { policy: None },
        "a dry-run ALLOW closes nothing either"
    );
    assert_eq!(verdict.dry_run_matches, ["shop/d".into(), "shop/a".into()]);
}

#[test]
fn who_comes_without_its_tunnel_is_denied_all_the_same_and_never_allowed() {
    let (web, db) = (identity("shop", "web"), identity("shop", "db"));
    let by = |m: Match| vec![rule(vec![m])];
    let principals = |not: bool, values| {
        by(match not {
            false => Match {
                principals: values,
                ..Match::default()
            },
            true => Match {
                not_principals: values,
                ..Match::default()
            },
        })
    };
    let namespace = by(Match {
        namespaces: exact("shop"),
        ..Match::default()
    });
    let account = by(Match {
        service_accounts: vec![ServiceAccountMatch {
            namespace: "shop".into(),
            service_account: "web".into(),
        }],
        ..Match::default()
    });
    let web_only = exact("cluster.local/ns/shop/sa/web");
    use Action::{Allow, Deny};
    let table = [
        // (name, action, rules, proven, claimed, allowed)
        (
            "by principal",
            Deny,
            principals(false, web_only.clone()),
            None,
            Some(&web),
            false,
        ),
        ("by namespace", Deny, namespace.clone(), None, Some(&web), false),
        ("by account", Deny, account.clone(), None, Some(&web), false),
        ("somebody else", Deny, account, None, Some(&db), true),
        ("an outsider", Deny, namespace.clone(), None, None, true),
        (
            "no principal",
            Deny,
            principals(true, vec![StringMatch::Presence]),
            None,
            Some(&web),
            false,
        ),
        (
            "none but that",
            Deny,
            principals(true, web_only.clone()),
            None,
            Some(&web),
            false,
        ),
        (
            "what is proven counts",
            Deny,
            principals(false, web_only.clone()),
            Some(&db),
            Some(&web),
            true,
        ),
        (
            "ALLOW by principal",
            Allow,
            principals(false, web_only),
            None,
            Some(&web),
            false,
        ),
        ("ALLOW by namespace", Allow, namespace, None, Some(&web), false),
    ];
    for (name, action, rules, source, claimed, allowed) in table {
        let connection = Connection {
            source,
            claimed,
            source_ip: "10.0.0.1".parse().unwrap(),
            destination_ip: "10.0.1.2".parse().unwrap(),
            destination_port: 8080,
        };
        let verdict = evaluate(&[policy("p", action, rules)], &connection);
        assert_eq!(verdict.decision.is_allow(), allowed, "{name}");
    }
}
