//! The module against the oracle, on generated policies and every connection of the oracle's universe.

use proptest::strategy::ValueTree as _;
use proptest::test_runner::TestRunner;

use super::oracle::{self, Condition, DESTINATIONS, How, IDENTITIES, Kind, Mutation, Oracle, PORTS, Point, SOURCES, Value};
use super::*;

const NAMESPACES: [&str; 5] = ["shop", "bank", "sh", "op", ""];
const PRINCIPALS: [&str; 6] = [
    "cluster.local/ns/shop/sa/web",
    "cluster.local/ns/shop",
    "cluster.local/",
    "/sa/web",
    "spiffe://cluster.local/ns/shop/sa/web",
    "",
];
const NETS: [(&str, u32); 8] = [
    ("10.0.0.0", 24),
    ("10.0.0.0", 16),
    ("10.0.0.1", 32),
    ("10.9.0.0", 16),
    ("0.0.0.0", 0),
    ("fd00::", 64),
    ("fd00::2", 128),
    ("::", 0),
];

fn value() -> impl Strategy<Value = Value> {
    use prop::sample::select;
    let how = || select(vec![How::Exact, How::Prefix, How::Suffix, How::Presence]);
    prop_oneof![
        (how(), select(&NAMESPACES[..])).prop_map(|(how, text)| Value::Namespace(how, text)),
        (how(), select(&PRINCIPALS[..])).prop_map(|(how, text)| Value::Principal(how, text)),
        select(&NETS[..]).prop_map(|(net, length)| Value::SourceIp(net, length)),
        select(&NETS[..]).prop_map(|(net, length)| Value::DestinationIp(net, length)),
        select(&PORTS[..]).prop_map(Value::Port),
        (select(vec!["shop", "bank"]), select(vec!["web", "db"])).prop_map(|(ns, name)| Value::Account(ns, name)),
    ]
}

fn rarely() -> impl Strategy<Value = bool> {
    prop::bool::weighted(0.03)
}

fn one_match() -> impl Strategy<Value = oracle::Match> {
    let condition = (prop::bool::weighted(0.4), value()).prop_map(|(negated, value)| Condition { negated, value });
    (prop::collection::vec(condition, 0..5), rarely()).prop_map(|(conditions, unknown)| oracle::Match { conditions, unknown })
}

fn policies() -> impl Strategy<Value = Vec<oracle::Policy>> {
    let clause = prop::collection::vec(one_match(), 0..4);
    let rule = (prop::collection::vec(clause, 0..3), rarely()).prop_map(|(clauses, unknown)| oracle::Rule { clauses, unknown });
    let policy = (any::<bool>(), prop::bool::weighted(0.25), prop::collection::vec(rule, 0..4));
    let policy = policy.prop_map(|(deny, dry_run, rules)| oracle::Policy { deny, dry_run, rules });
    prop::collection::vec(policy, 0..5)
}

/// The same, as the module has it.
fn built(policies: &[oracle::Policy]) -> Vec<Arc<Policy>> {
    let built_rule = |rule: &oracle::Rule| Rule {
        clauses: rule
            .clauses
            .iter()
            .map(|matches| Clause {
                matches: matches.iter().map(built_match).collect(),
            })
            .collect(),
        unknown: rule.unknown,
    };
    let built_policy = |(place, wanted): (usize, &oracle::Policy)| {
        let action = if wanted.deny { Action::Deny } else { Action::Allow };
        let rules = wanted.rules.iter().map(built_rule).collect();
        Arc::new(Policy {
            dry_run: wanted.dry_run,
            ..(*policy(&place.to_string(), action, rules)).clone()
        })
    };
    policies.iter().enumerate().map(built_policy).collect()
}

fn built_match(wanted: &oracle::Match) -> Match {
    let mut m = Match {
        unknown: wanted.unknown,
        ..Match::default()
    };
    let text = |how, text: &str| match how {
        How::Exact => StringMatch::Exact(text.into()),
        How::Prefix => StringMatch::Prefix(text.into()),
        How::Suffix => StringMatch::Suffix(text.into()),
        How::Presence => StringMatch::Presence,
    };
    let net = |net: &str, length: u32| format!("{net}/{length}").parse().unwrap();
    for Condition { negated, value } in &wanted.conditions {
        match (*value, negated) {
            (Value::Namespace(how, value), false) => m.namespaces.push(text(how, value)),
            (Value::Namespace(how, value), true) => m.not_namespaces.push(text(how, value)),
            (Value::Principal(how, value), false) => m.principals.push(text(how, value)),
            (Value::Principal(how, value), true) => m.not_principals.push(text(how, value)),
            (Value::SourceIp(ip, length), false) => m.source_ips.push(net(ip, length)),
            (Value::SourceIp(ip, length), true) => m.not_source_ips.push(net(ip, length)),
            (Value::DestinationIp(ip, length), false) => m.destination_ips.push(net(ip, length)),
            (Value::DestinationIp(ip, length), true) => m.not_destination_ips.push(net(ip, length)),
            (Value::Port(port), false) => m.destination_ports.push(port),
            (Value::Port(port), true) => m.not_destination_ports.push(port),
            (Value::Account(namespace, name), negated) => {
                let account = ServiceAccountMatch {
                    namespace: namespace.into(),
                    service_account: name.into(),
                };
                if *negated {
                    &mut m.not_service_accounts
                } else {
                    &mut m.service_accounts
                }
                .push(account);
            }
        }
    }
    m
}

/// Every connection: with each proven identity, and without one with each that may be claimed, and one claimed beside a proven one.
fn connections() -> Vec<Point> {
    let mut all = Vec::new();
    for point in oracle::universe() {
        all.push(point);
        let claims = match point.source {
            None => 0..IDENTITIES.len(),
            Some(proven) => {
                let other = (proven + 1) % IDENTITIES.len();
                other..other + 1
            }
        };
        all.extend(claims.map(|claimed| Point {
            claimed: Some(claimed),
            ..point
        }));
    }
    all
}

/// The module's word, in the oracle's form.
fn module(policies: &[Arc<Policy>], point: Point) -> oracle::Verdict {
    let who = |place: usize| {
        let (principal, namespace, account) = IDENTITIES[place];
        let (trust_domain, _) = principal.split_once('/').unwrap();
        Identity::new(trust_domain, namespace, account)
    };
    let (source, claimed) = (point.source.map(who), point.claimed.map(who));
    let verdict = evaluate(
        policies,
        &Connection {
            source: source.as_ref(),
            claimed: claimed.as_ref(),
            source_ip: SOURCES[point.source_ip].parse().unwrap(),
            destination_ip: DESTINATIONS[point.destination_ip].parse().unwrap(),
            destination_port: PORTS[point.port],
        },
    );
    let place = |name: &Arc<str>| name.strip_prefix("shop/").unwrap().parse::<usize>().unwrap();
    oracle::Verdict {
        allowed: verdict.decision.is_allow(),
        policy: verdict.decision.policy().map(place),
        dry_run: verdict.dry_run_matches.iter().map(place).collect(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn every_connection_is_decided_as_the_oracle_says(policies in policies()) {
        let (built, oracle) = (built(&policies), Oracle::new(&policies, Mutation::None));
        for point in connections() {
            prop_assert_eq!(module(&built, point), oracle.verdict(point), "{:?}", point);
        }
    }
}

/// Cases in which each mutation must show itself.
const CASES: usize = 1500;
/// Of them, those in which each mutation of the module must show itself.
const FIXED_CASES: usize = 500;

/// Always the same cases: a mutation that is found once is found for ever.
fn cases() -> impl Iterator<Item = Vec<oracle::Policy>> {
    let mut runner = TestRunner::deterministic();
    std::iter::repeat_with(move || policies().new_tree(&mut runner).unwrap().current())
}

/// What `cargo xtask test mutants` runs against every mutation of the module.
#[test]
fn fixed_cases_are_decided_as_the_oracle_says() {
    for policies in cases().take(FIXED_CASES) {
        let (built, oracle) = (built(&policies), Oracle::new(&policies, Mutation::None));
        for point in connections() {
            let (decided, expected) = (module(&built, point), oracle.verdict(point));
            assert_eq!(
                decided, expected,
                "the module and the oracle differ about {point:?} by {policies:?}"
            );
        }
    }
}

#[test]
fn every_mutation_of_the_semantics_is_noticed() {
    let mut unnoticed = Mutation::all();
    for policies in cases().take(CASES) {
        if unnoticed.is_empty() {
            return;
        }
        let built = built(&policies);
        let decided: Vec<_> = connections()
            .into_iter()
            .map(|point| (point, module(&built, point)))
            .collect();
        unnoticed.retain(|mutation| {
            let oracle = Oracle::new(&policies, *mutation);
            decided.iter().all(|(point, verdict)| oracle.verdict(*point) == *verdict)
        });
    }
    assert!(unnoticed.is_empty(), "not noticed in {CASES} cases: {unnoticed:?}");
}

#[test]
fn the_cases_decide_in_every_way_often() {
    let (mut ways, mut all) = ([0usize; 5], 0);
    let mut kinds = [(0usize, 0usize); 6];
    for policies in cases().take(200) {
        let oracle = Oracle::new(&policies, Mutation::None);
        for point in oracle::universe() {
            let verdict = oracle.verdict(point);
            let way = usize::from(verdict.allowed) * 2 + usize::from(verdict.policy.is_some());
            ways[way] += 1;
            ways[4] += usize::from(!verdict.dry_run.is_empty());
            all += 1;
        }
        let matches = policies.iter().flat_map(|p| &p.rules).flat_map(|r| &r.clauses).flatten();
        for condition in matches.flat_map(|m| &m.conditions) {
            let kind: Kind = condition.value.kind();
            let (plain, negated) = &mut kinds[kind as usize];
            *if condition.negated { negated } else { plain } += 1;
        }
    }
    // Denied by none and by a policy, allowed by none and by a policy, and a dry-run policy that matches.
    assert!(
        ways.iter().all(|&count| count * 20 > all),
        "{ways:?} of {all}: one is rarer than 5 %"
    );
    assert!(kinds.iter().all(|&(plain, negated)| plain > 50 && negated > 50), "{kinds:?}");
}
