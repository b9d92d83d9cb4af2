//! Objects of all shapes from one seed: good values, almost good ones, and good ones with a character changed.

use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};
use serde_json::{Map, Value, json};

const BLOCKS: &[&str] = &[
    "10.0.0.0/8",
    "10.1.2.3/8",
    "10.0.0.1",
    "0.0.0.0/0",
    "0.0.0.0/00",
    "10.0.0.0/08",
    "10.0.0.0/+8",
    "010.0.0.0/8",
    "10.0.0/8",
    "10.0.0.0/33",
    "1.2.3.4/",
    "1.2.3.4/32",
    "1.2.3.4/32 ",
    "256.0.0.1",
    "::",
    "::1",
    "::/0",
    "1::/128",
    "1::/129",
    "0001::",
    "00001::",
    "2001:db8::/64",
    "2001:db8::1/64",
    "2001:DB8::/32",
    "1:2:3:4:5:6:7::",
    "1:2:3:4:5:6:7:8::",
    "::10.0.0.1",
    "64:ff9b::1.2.3.4",
    "64:ff9b::1.2.3.4/128",
    "1111:2222:3333:4444:5555:6666:255.255.255.255/128",
    "::ffff:10.0.0.1",
    "::ffff:10.0.0.0/104",
    "::ffff:0:0/95",
    "::fffe:0:0/95",
    "fe80::1%eth0",
    "fe80::1%eth0/64",
    "",
    "host",
];
const PRINCIPALS: &[&str] = &[
    "*",
    "cluster.local/ns/web/sa/front",
    "cluster.local/ns/ops/*",
    "*/sa/admin",
    "spiffe://cluster.local/ns/a/sa/b",
    "spiffe://*",
    "a/ns/b/sa/",
    "/ns/b/sa/c",
    "a/ns/b.c/sa/d",
    "a/ns/b/sa/d.e",
    "a/ns/b/sa/d..e",
    "a/ns/-b/sa/c",
    "a/ns/B/sa/c",
    "a/b/ns/n/sa/s",
    "",
];
const NAMESPACES: &[&str] = &[
    "shop", "a", "0", "a*", "*a", "*", "**", "-a", "a-", "a.b", "a_b", "A", "a b", "é", "",
];
const KEYS: &[&str] = &[
    "app",
    "app.kubernetes.io/name",
    "a/b/c",
    "/a",
    "a/",
    "A/b",
    "a.b/C_d",
    "p..q/n",
    "-a",
    "a-",
    "a b",
    "é",
    "",
];
const LABELS: &[&str] = &["", "a", "A_b.c-d", "-a", "a-", "a b", "é"];
const PORTS: &[i64] = &[1, 80, 65_535, 0, 65_536, -1, 1 << 31, 1 << 40];
const CHARACTERS: &[char] = &[
    '*', '/', 'a', 'A', '0', '.', '-', ' ', ':', '_', '@', '~', '!', '\t', 'é', '\u{85}', '\u{2003}', '%',
];

/// Endless: kind, whether it is of a namespace and not of the mesh, spec.
pub struct Corpus(StdRng);

impl Iterator for Corpus {
    type Item = (&'static str, bool, Value);

    fn next(&mut self) -> Option<Self::Item> {
        Some(if self.0.random_bool(0.8) {
            ("AuthorizationPolicy", false, self.policy())
        } else {
            ("MeshConfig", self.0.random_bool(0.3), self.config())
        })
    }
}

impl Corpus {
    pub fn new(seed: u64) -> Self {
        Self(StdRng::seed_from_u64(seed))
    }

    fn policy(&mut self) -> Value {
        let mut spec = Map::new();
        if self.0.random_bool(0.97) {
            spec.insert("action".into(), self.one(&["Allow", "Allow", "Deny", "Deny", "deny"]).into());
        }
        if self.0.random_bool(0.9) {
            spec.insert("rules".into(), self.list(1, Self::rule));
        }
        if self.0.random_bool(0.3) {
            spec.insert("mode".into(), self.one(&["Enforce", "DryRun", "dry"]).into());
        }
        if self.0.random_bool(0.3) {
            let labels = (0..self.0.random_range(0..3)).map(|_| (self.text(KEYS), self.text(LABELS).into()));
            let labels: Map<String, Value> = labels.collect();
            spec.insert("selector".into(), json!({"matchLabels": labels}));
        }
        spec.into()
    }

    fn config(&mut self) -> Value {
        let mut spec = Map::new();
        if self.0.random_bool(0.6) {
            spec.insert("mtls".into(), self.one(&["Strict", "Permissive", "strict"]).into());
        }
        if self.0.random_bool(0.4) {
            spec.insert("excludedPorts".into(), self.list(2, Self::port));
        }
        if self.0.random_bool(0.4) {
            spec.insert("excludedCidrs".into(), self.list(2, |corpus| corpus.text(BLOCKS).into()));
        }
        spec.into()
    }

    fn rule(&mut self) -> Value {
        let mut rule = Map::new();
        if self.0.random_bool(0.7) {
            rule.insert("from".into(), self.list(1, Self::source));
        }
        if self.0.random_bool(0.3) {
            rule.insert("to".into(), self.list(1, Self::destination));
        }
        rule.into()
    }

    fn source(&mut self) -> Value {
        let mut source = Map::new();
        for (field, values) in [
            ("principals", PRINCIPALS),
            ("notPrincipals", PRINCIPALS),
            ("namespaces", NAMESPACES),
            ("notNamespaces", NAMESPACES),
            ("ipBlocks", BLOCKS),
            ("notIpBlocks", BLOCKS),
        ] {
            if self.0.random_bool(0.2) {
                source.insert(field.into(), self.list(2, |corpus| corpus.text(values).into()));
            }
        }
        source.into()
    }

    fn destination(&mut self) -> Value {
        let mut destination = Map::new();
        for field in ["ports", "notPorts"] {
            if self.0.random_bool(0.6) {
                destination.insert(field.into(), self.list(2, Self::port));
            }
        }
        destination.into()
    }

    fn port(&mut self) -> Value {
        match self.0.random_range(0..20) {
            0 => json!(1.5),
            1 => json!("80"),
            2..12 => json!(self.0.random_range(1..=65_535)),
            _ => PORTS.choose(&mut self.0).copied().into(),
        }
    }

    fn list(&mut self, most: usize, of: impl Fn(&mut Self) -> Value) -> Value {
        let length = if self.0.random_bool(0.1) {
            0
        } else {
            self.0.random_range(1..=most)
        };
        (0..length).map(|_| of(self)).collect()
    }

    fn one(&mut self, values: &[&'static str]) -> &'static str {
        values.choose(&mut self.0).copied().unwrap_or_default()
    }

    /// One of them, as it is, with characters more or less, or as long as it may be, and longer.
    fn text(&mut self, values: &[&'static str]) -> String {
        let value = self.one(values);
        let mut characters: Vec<char> = value.chars().collect();
        match self.0.random_range(0..10) {
            0..3 => {
                let at = self.0.random_range(0..=characters.len());
                characters.insert(at, CHARACTERS.choose(&mut self.0).copied().unwrap_or_default());
            }
            3 if !characters.is_empty() => {
                let at = self.0.random_range(0..characters.len());
                characters.remove(at);
            }
            4 if !characters.is_empty() => {
                let at = self.0.random_range(0..characters.len());
                let longest = [63, 253, 255, 317, 579].choose(&mut self.0).copied().unwrap_or(63);
                let missing = usize::saturating_sub(longest + self.0.random_range(0..2), characters.len());
                let one = characters[at];
                characters.splice(at..at, std::iter::repeat_n(one, missing));
            }
            _ => {}
        }
        characters.into_iter().collect()
    }
}
