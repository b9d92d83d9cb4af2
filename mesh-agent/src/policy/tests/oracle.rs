//! The semantics of authorization once more, written down from their description alone, as sets: a match, a clause, a rule and a
//! policy each *are* the connections of a small universe for which they hold. Of the module it shares no code and no type. Each
//! [`Mutation`] is a mistake that the module could have.

/// The identities of the universe: principal, namespace, service account.
pub const IDENTITIES: [(&str, &str, &str); 4] = [
    ("cluster.local/ns/shop/sa/web", "shop", "web"),
    ("cluster.local/ns/shop/sa/db", "shop", "db"),
    ("cluster.local/ns/bank/sa/web", "bank", "web"),
    ("other.org/ns/shop/sa/web", "shop", "web"),
];
pub const SOURCES: [&str; 4] = ["10.0.0.1", "10.0.1.1", "::ffff:10.0.0.2", "fd00::1"];
pub const DESTINATIONS: [&str; 3] = ["10.0.0.1", "::ffff:10.9.0.1", "fd00::2"];
pub const PORTS: [u16; 3] = [80, 443, 8080];

/// What one kind of a match looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Namespace,
    Principal,
    SourceIp,
    DestinationIp,
    Port,
    Account,
}

pub const KINDS: [Kind; 6] = [
    Kind::Namespace,
    Kind::Principal,
    Kind::SourceIp,
    Kind::DestinationIp,
    Kind::Port,
    Kind::Account,
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    Exact,
    Prefix,
    Suffix,
    Presence,
}

/// One value of a match.
#[derive(Clone, Copy, Debug)]
pub enum Value {
    Namespace(How, &'static str),
    Principal(How, &'static str),
    SourceIp(&'static str, u32),
    DestinationIp(&'static str, u32),
    Port(u16),
    Account(&'static str, &'static str),
}

impl Value {
    pub fn kind(self) -> Kind {
        match self {
            Self::Namespace(..) => Kind::Namespace,
            Self::Principal(..) => Kind::Principal,
            Self::SourceIp(..) => Kind::SourceIp,
            Self::DestinationIp(..) => Kind::DestinationIp,
            Self::Port(_) => Kind::Port,
            Self::Account(..) => Kind::Account,
        }
    }
}

#[derive(Clone, Debug)]
pub struct Condition {
    pub negated: bool,
    pub value: Value,
}

#[derive(Clone, Debug)]
pub struct Match {
    pub conditions: Vec<Condition>,
    pub unknown: bool,
}

#[derive(Clone, Debug)]
pub struct Rule {
    pub clauses: Vec<Vec<Match>>,
    pub unknown: bool,
}

#[derive(Clone, Debug)]
pub struct Policy {
    pub deny: bool,
    pub dry_run: bool,
    pub rules: Vec<Rule>,
}

/// A connection of the universe, by the places of its parts in the tables above.
#[derive(Clone, Copy, Debug)]
pub struct Point {
    pub source: Option<usize>,
    pub claimed: Option<usize>,
    pub source_ip: usize,
    pub destination_ip: usize,
    pub port: usize,
}

/// All that differ in what a policy can look at.
pub fn universe() -> Vec<Point> {
    let sources = (0..IDENTITIES.len()).map(Some).chain([None]);
    let mut points = Vec::new();
    for source in sources {
        for source_ip in 0..SOURCES.len() {
            for destination_ip in 0..DESTINATIONS.len() {
                for port in 0..PORTS.len() {
                    points.push(Point {
                        source,
                        claimed: None,
                        source_ip,
                        destination_ip,
                        port,
                    });
                }
            }
        }
    }
    points
}

/// What is decided, with the places of policies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    pub allowed: bool,
    pub policy: Option<usize>,
    pub dry_run: Vec<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// As it is written.
    None,
    /// The kind's plain (false) or negated (true) values are not looked at.
    Ignored(Kind, bool),
    /// The kind's comparison the other way round.
    Inverted(Kind),
    /// Negated values count as plain ones.
    NegationIgnored(Kind),
    PrefixAsExact,
    SuffixAsExact,
    ExactAsPrefix,
    ExactAsSuffix,
    PresenceMatchesNothing,
    PresenceMatchesAbsence,
    AbsenceMatchesText,
    PrincipalWithScheme,
    NetAsAddress,
    NetIgnoresFamily,
    MappedIsNotCanonical,
    AccountIgnoresNamespace,
    AccountIgnoresName,
    ValuesAnded,
    NegatedValuesAnded,
    KindsOred,
    MatchesAnded,
    ClausesOred,
    RulesAnded,
    EmptyMatchHolds,
    EmptyClauseFails,
    RuleWithoutClausesFails,
    NoRulesMatch,
    UnknownRuleSkipped,
    UnknownMatchSkipped,
    UnknownRuleAllows,
    UnknownMatchAllows,
    AllowBeforeDeny,
    DenyIgnored,
    NoAllowListCloses,
    AllowListLeavesOpen,
    AnyActionAllows,
    DryRunEnforced,
    DryRunAllowListCloses,
    DryRunUnreported,
    EnforcedReportedAsDryRun,
    ClaimedIgnored,
    ClaimedAllows,
    ClaimedBesideProven,
    ClaimedInsteadOfNone,
    LastPolicyNamed,
}

impl Mutation {
    pub fn all() -> Vec<Self> {
        let mut all = vec![
            Self::PrefixAsExact,
            Self::SuffixAsExact,
            Self::ExactAsPrefix,
            Self::ExactAsSuffix,
            Self::PresenceMatchesNothing,
            Self::PresenceMatchesAbsence,
            Self::AbsenceMatchesText,
            Self::PrincipalWithScheme,
            Self::NetAsAddress,
            Self::NetIgnoresFamily,
            Self::MappedIsNotCanonical,
            Self::AccountIgnoresNamespace,
            Self::AccountIgnoresName,
            Self::ValuesAnded,
            Self::NegatedValuesAnded,
            Self::KindsOred,
            Self::MatchesAnded,
            Self::ClausesOred,
            Self::RulesAnded,
            Self::EmptyMatchHolds,
            Self::EmptyClauseFails,
            Self::RuleWithoutClausesFails,
            Self::NoRulesMatch,
            Self::UnknownRuleSkipped,
            Self::UnknownMatchSkipped,
            Self::UnknownRuleAllows,
            Self::UnknownMatchAllows,
            Self::AllowBeforeDeny,
            Self::DenyIgnored,
            Self::NoAllowListCloses,
            Self::AllowListLeavesOpen,
            Self::AnyActionAllows,
            Self::DryRunEnforced,
            Self::DryRunAllowListCloses,
            Self::DryRunUnreported,
            Self::EnforcedReportedAsDryRun,
            Self::ClaimedIgnored,
            Self::ClaimedAllows,
            Self::ClaimedBesideProven,
            Self::ClaimedInsteadOfNone,
            Self::LastPolicyNamed,
        ];
        for kind in KINDS {
            all.extend([
                Self::Ignored(kind, false),
                Self::Ignored(kind, true),
                Self::Inverted(kind),
                Self::NegationIgnored(kind),
            ]);
        }
        all
    }
}

/// Of the universe, those that are in it.
type Set = Vec<bool>;

fn union(sets: impl IntoIterator<Item = Set>, size: usize) -> Set {
    sets.into_iter().fold(vec![false; size], |mut result, set| {
        result.iter_mut().zip(set).for_each(|(r, s)| *r |= s);
        result
    })
}

fn intersection(sets: impl IntoIterator<Item = Set>, size: usize) -> Set {
    sets.into_iter().fold(vec![true; size], |mut result, set| {
        result.iter_mut().zip(set).for_each(|(r, s)| *r &= s);
        result
    })
}

/// The policies of a case, with the sets that they are.
pub struct Oracle<'a> {
    mutation: Mutation,
    universe: Vec<Point>,
    policies: &'a [Policy],
    sets: Vec<Set>,
}

impl<'a> Oracle<'a> {
    pub fn new(policies: &'a [Policy], mutation: Mutation) -> Self {
        let mut oracle = Self {
            mutation,
            universe: universe(),
            policies,
            sets: Vec::new(),
        };
        oracle.sets = policies.iter().map(|policy| oracle.policy(policy)).collect();
        oracle
    }

    fn is(&self, mutation: Mutation) -> bool {
        self.mutation == mutation
    }

    /// "DENY policies → deny; no ALLOW policy applies → allow; any ALLOW matches → allow; else deny."
    pub fn verdict(&self, point: Point) -> Verdict {
        let holds = |i: &usize| {
            let (policy, set) = (&self.policies[*i], &self.sets[*i]);
            let as_who = |source| set[self.place(Point { source, ..point })];
            let counts = (policy.deny || self.is(Mutation::ClaimedAllows))
                && !self.is(Mutation::ClaimedIgnored)
                && (point.source.is_none() || self.is(Mutation::ClaimedBesideProven));
            let by_claim = point.claimed.is_some() && counts && as_who(point.claimed);
            if by_claim || (self.is(Mutation::ClaimedInsteadOfNone) && counts && point.claimed.is_some()) {
                return by_claim;
            }
            as_who(point.source)
        };
        let places = || 0..self.policies.len();
        let in_force = |i: &usize| !self.policies[*i].dry_run || self.is(Mutation::DryRunEnforced);
        let mut denying = places().filter(|i| self.policies[*i].deny).filter(in_force).filter(holds);
        let deny = if self.is(Mutation::LastPolicyNamed) {
            denying.next_back()
        } else {
            denying.next()
        };
        let deny = deny.filter(|_| !self.is(Mutation::DenyIgnored));
        let is_allow = |i: &usize| !self.policies[*i].deny || self.is(Mutation::AnyActionAllows);
        let closed = places()
            .filter(is_allow)
            .any(|i| in_force(&i) || self.is(Mutation::DryRunAllowListCloses));
        let allow = places().filter(is_allow).filter(in_force).find(holds);

        let (allowed, policy) = match (deny, allow) {
            (Some(_), Some(allow)) if self.is(Mutation::AllowBeforeDeny) => (true, Some(allow)),
            (Some(deny), _) => (false, Some(deny)),
            (None, Some(allow)) => (true, Some(allow)),
            (None, None) if closed => (self.is(Mutation::AllowListLeavesOpen), None),
            (None, None) => (!self.is(Mutation::NoAllowListCloses), None),
        };
        let reported = |i: &usize| {
            (self.policies[*i].dry_run || self.is(Mutation::EnforcedReportedAsDryRun)) && !self.is(Mutation::DryRunUnreported)
        };
        Verdict {
            allowed,
            policy,
            dry_run: places().filter(reported).filter(holds).collect(),
        }
    }

    fn place(&self, point: Point) -> usize {
        let source = point.source.unwrap_or(IDENTITIES.len());
        ((source * SOURCES.len() + point.source_ip) * DESTINATIONS.len() + point.destination_ip) * PORTS.len() + point.port
    }

    fn everything(&self, holds: bool) -> Set {
        vec![holds; self.universe.len()]
    }

    /// "Rules are OR-ed. No rules at all never matches."
    fn policy(&self, policy: &Policy) -> Set {
        if policy.rules.is_empty() {
            return self.everything(self.is(Mutation::NoRulesMatch));
        }
        let rules: Vec<Set> = policy.rules.iter().map(|rule| self.rule(rule, policy.deny)).collect();
        if self.is(Mutation::RulesAnded) {
            intersection(rules, self.universe.len())
        } else {
            union(rules, self.universe.len())
        }
    }

    /// "Clauses of a rule AND-ed. A rule with an unknown part matches for DENY and does not match for ALLOW."
    fn rule(&self, rule: &Rule, deny: bool) -> Set {
        let rule_unknown = rule.unknown && !self.is(Mutation::UnknownRuleSkipped);
        let match_unknown = rule.clauses.iter().flatten().any(|m| m.unknown) && !self.is(Mutation::UnknownMatchSkipped);
        if rule_unknown || match_unknown {
            let allows = (rule_unknown && self.is(Mutation::UnknownRuleAllows))
                || (match_unknown && self.is(Mutation::UnknownMatchAllows));
            return self.everything(deny || allows);
        }
        if rule.clauses.is_empty() {
            return self.everything(!self.is(Mutation::RuleWithoutClausesFails));
        }
        let clauses: Vec<Set> = rule.clauses.iter().map(|clause| self.clause(clause)).collect();
        if self.is(Mutation::ClausesOred) {
            union(clauses, self.universe.len())
        } else {
            intersection(clauses, self.universe.len())
        }
    }

    /// "Matches of a clause OR-ed; an empty match is skipped; an empty clause is true."
    fn clause(&self, clause: &[Match]) -> Set {
        if clause.is_empty() {
            return self.everything(!self.is(Mutation::EmptyClauseFails));
        }
        let matches: Vec<Set> = clause.iter().map(|m| self.one_match(m)).collect();
        if self.is(Mutation::MatchesAnded) {
            intersection(matches, self.universe.len())
        } else {
            union(matches, self.universe.len())
        }
    }

    /// "The kinds are AND-ed, values of a kind OR-ed, `not_*` = none may match."
    fn one_match(&self, m: &Match) -> Set {
        if m.conditions.is_empty() {
            return self.everything(self.is(Mutation::EmptyMatchHolds));
        }
        let size = self.universe.len();
        let mut kinds = Vec::new();
        for kind in KINDS {
            let of_kind = |negated: bool| -> Vec<Set> {
                let wanted = m.conditions.iter().filter(|c| c.value.kind() == kind);
                wanted
                    .filter(|c| (c.negated && !self.is(Mutation::NegationIgnored(kind))) == negated)
                    .filter(|_| !self.is(Mutation::Ignored(kind, negated)))
                    .map(|c| self.value(c.value))
                    .collect()
            };
            let (plain, negated) = (of_kind(false), of_kind(true));
            if !plain.is_empty() {
                kinds.push(if self.is(Mutation::ValuesAnded) {
                    intersection(plain, size)
                } else {
                    union(plain, size)
                });
            }
            if !negated.is_empty() {
                let forbidden = if self.is(Mutation::NegatedValuesAnded) {
                    intersection(negated, size)
                } else {
                    union(negated, size)
                };
                kinds.push(forbidden.into_iter().map(|holds| !holds).collect());
            }
        }
        if self.is(Mutation::KindsOred) && !kinds.is_empty() {
            union(kinds, size)
        } else {
            intersection(kinds, size)
        }
    }

    fn value(&self, value: Value) -> Set {
        let inverted = self.is(Mutation::Inverted(value.kind()));
        self.universe
            .iter()
            .map(|point| self.holds(value, point) != inverted)
            .collect()
    }

    fn holds(&self, value: Value, point: &Point) -> bool {
        let who = point.source.map(|place| IDENTITIES[place]);
        match value {
            Value::Namespace(how, text) => self.text(how, text, who.map(|(_, namespace, _)| namespace)),
            Value::Principal(how, text) if self.is(Mutation::PrincipalWithScheme) => {
                let with_scheme = who.map(|(principal, _, _)| format!("spiffe://{principal}"));
                self.text(how, text, with_scheme.as_deref())
            }
            Value::Principal(how, text) => self.text(how, text, who.map(|(principal, _, _)| principal)),
            Value::SourceIp(net, length) => self.within(net, length, SOURCES[point.source_ip]),
            Value::DestinationIp(net, length) => self.within(net, length, DESTINATIONS[point.destination_ip]),
            Value::Port(port) => PORTS[point.port] == port,
            Value::Account(namespace, account) => who.is_some_and(|who| {
                (who.1 == namespace || self.is(Mutation::AccountIgnoresNamespace))
                    && (who.2 == account || self.is(Mutation::AccountIgnoresName))
            }),
        }
    }

    fn text(&self, how: How, text: &str, value: Option<&str>) -> bool {
        let how = match how {
            How::Prefix if self.is(Mutation::PrefixAsExact) => How::Exact,
            How::Suffix if self.is(Mutation::SuffixAsExact) => How::Exact,
            How::Exact if self.is(Mutation::ExactAsPrefix) => How::Prefix,
            How::Exact if self.is(Mutation::ExactAsSuffix) => How::Suffix,
            how => how,
        };
        let Some(value) = value else {
            return match how {
                How::Presence => self.is(Mutation::PresenceMatchesAbsence),
                _ => self.is(Mutation::AbsenceMatchesText),
            };
        };
        match how {
            How::Exact => value.len() == text.len() && value.find(text) == Some(0),
            How::Prefix => value.find(text) == Some(0),
            How::Suffix => value.rfind(text).is_some_and(|at| at + text.len() == value.len()),
            How::Presence => !self.is(Mutation::PresenceMatchesNothing),
        }
    }

    /// By the numbers that addresses are: the first `length` bits agree.
    fn within(&self, net: &str, length: u32, address: &str) -> bool {
        let (net, address) = (self.number(net), self.number(address));
        let same_family = net.1 == address.1;
        if self.is(Mutation::NetAsAddress) {
            return net == address;
        }
        if self.is(Mutation::NetIgnoresFamily) && !same_family {
            return length == 0;
        }
        same_family && (net.0 ^ address.0).checked_shr(net.1 - length).unwrap_or(0) == 0
    }

    /// An address and its length in bits.
    fn number(&self, address: &str) -> (u128, u32) {
        match address.strip_prefix("::ffff:") {
            Some(v4) if !self.is(Mutation::MappedIsNotCanonical) => self.number(v4),
            _ if address.contains(':') => (address.parse::<std::net::Ipv6Addr>().unwrap().into(), 128),
            _ => (u32::from(address.parse::<std::net::Ipv4Addr>().unwrap()).into(), 32),
        }
    }
}
