//! From an `AuthorizationPolicy` as written to one that can be compiled. Every error names the field and says how to mend it.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::authorization_policy::{AuthorizationPolicySpec, Mode, PolicyAction, Rule, Selector, limits};
use crate::matcher::StringMatch;

#[cfg(test)]
mod tests;

/// A policy whose every value is known to be good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValidPolicy {
    /// Labels that a Pod must have; `None` selects every Pod.
    pub selector: Option<BTreeMap<String, String>>,
    pub action: PolicyAction,
    pub rules: Vec<ValidRule>,
    pub mode: Mode,
}

/// An empty list matches everything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValidRule {
    pub from: Vec<ValidSource>,
    pub to: Vec<ValidDestination>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ValidSource {
    pub principals: Vec<StringMatch>,
    pub not_principals: Vec<StringMatch>,
    pub namespaces: Vec<StringMatch>,
    pub not_namespaces: Vec<StringMatch>,
    pub ip_blocks: Vec<IpNet>,
    pub not_ip_blocks: Vec<IpNet>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ValidDestination {
    pub ports: Vec<u16>,
    pub not_ports: Vec<u16>,
}

/// One field that cannot stand.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {problem}")]
pub struct FieldError {
    /// As in `spec.rules[0].to[0].ports[1]`.
    pub path: String,
    /// What is wrong and what to write instead.
    pub problem: String,
}

/// Everything that is wrong with a policy, at most [`limits::MAX_ERRORS`]; never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValidationErrors(pub Vec<FieldError>);

impl fmt::Display for ValidationErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("; ")?;
            }
            error.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for ValidationErrors {}

impl AuthorizationPolicySpec {
    /// Checks every field.
    ///
    /// # Errors
    /// All fields that cannot stand, each with its path.
    pub fn validate(&self) -> Result<ValidPolicy, ValidationErrors> {
        let mut check = Check::default();
        let selector = self.selector.as_ref().map(|selector| check.selector(selector));
        if self.action == PolicyAction::Deny && self.rules.is_empty() {
            check.fail(
                "spec.rules",
                "a Deny policy without rules denies nothing; write `- {}` to deny everything",
            );
        }
        check.at_most("spec.rules", self.rules.len(), limits::MAX_RULES);
        let rules = self
            .rules
            .iter()
            .enumerate()
            .map(|(i, rule)| check.rule(&format!("spec.rules[{i}]"), rule))
            .collect();
        if check.errors.is_empty() {
            Ok(ValidPolicy {
                selector,
                action: self.action,
                rules,
                mode: self.mode,
            })
        } else {
            Err(ValidationErrors(check.errors))
        }
    }
}

#[derive(Default)]
pub(crate) struct Check {
    pub(crate) errors: Vec<FieldError>,
}

impl Check {
    pub(crate) fn fail(&mut self, path: &str, problem: impl Into<String>) {
        if self.errors.len() < limits::MAX_ERRORS {
            self.errors.push(FieldError {
                path: path.to_owned(),
                problem: problem.into(),
            });
        }
    }

    fn at_most(&mut self, path: &str, count: usize, most: usize) {
        if count > most {
            self.fail(
                path,
                format!("{count} entries, at most {most} are allowed; split it over several"),
            );
        }
    }

    fn selector(&mut self, selector: &Selector) -> BTreeMap<String, String> {
        let path = "spec.selector.matchLabels";
        if selector.match_labels.is_empty() {
            self.fail(
                path,
                "is empty; name a label, or leave `selector` out to mean every Pod of the namespace",
            );
        }
        self.at_most(path, selector.match_labels.len(), limits::MAX_LABELS);
        for (key, value) in &selector.match_labels {
            if !label_key(key) {
                self.fail(
                    &format!("{path}[{key:?}]"),
                    "is no label name; give [prefix/]name as on the Pods",
                );
            } else if !label_text(value, true) {
                self.fail(
                    &format!("{path}[{key:?}]"),
                    format!("{value:?} is no label value; give at most 63 letters, digits, '-', '_' or '.'"),
                );
            }
        }
        selector.match_labels.clone()
    }

    fn rule(&mut self, path: &str, rule: &Rule) -> ValidRule {
        let mut from = Vec::new();
        if let Some(sources) = &rule.from {
            let path = format!("{path}.from");
            self.alternatives(&path, sources.len(), "a source");
            for (i, source) in sources.iter().enumerate() {
                let path = format!("{path}[{i}]");
                let valid = ValidSource {
                    principals: self.values(&format!("{path}.principals"), source.principals.as_deref(), |text| {
                        Self::principal(text)
                    }),
                    not_principals: self.values(&format!("{path}.notPrincipals"), source.not_principals.as_deref(), |text| {
                        Self::principal(text)
                    }),
                    namespaces: self.values(&format!("{path}.namespaces"), source.namespaces.as_deref(), |text| {
                        Self::namespace(text)
                    }),
                    not_namespaces: self.values(&format!("{path}.notNamespaces"), source.not_namespaces.as_deref(), |text| {
                        Self::namespace(text)
                    }),
                    ip_blocks: self.values(&format!("{path}.ipBlocks"), source.ip_blocks.as_deref(), |text| {
                        Self::ip_block(text)
                    }),
                    not_ip_blocks: self.values(&format!("{path}.notIpBlocks"), source.not_ip_blocks.as_deref(), |text| {
                        Self::ip_block(text)
                    }),
                };
                if *source == crate::Source::default() {
                    self.fail(&path, "is empty; name a source, or leave `from` out to mean any");
                }
                from.push(valid);
            }
        }
        let mut to = Vec::new();
        if let Some(destinations) = &rule.to {
            let path = format!("{path}.to");
            self.alternatives(&path, destinations.len(), "a destination");
            for (i, destination) in destinations.iter().enumerate() {
                let path = format!("{path}[{i}]");
                if *destination == crate::Destination::default() {
                    self.fail(&path, "is empty; name ports, or leave `to` out to mean any");
                }
                to.push(ValidDestination {
                    ports: self.values(&format!("{path}.ports"), destination.ports.as_deref(), Self::port),
                    not_ports: self.values(&format!("{path}.notPorts"), destination.not_ports.as_deref(), Self::port),
                });
            }
        }
        ValidRule { from, to }
    }

    fn alternatives(&mut self, path: &str, count: usize, what: &str) {
        if count == 0 {
            self.fail(path, format!("is empty; name {what}, or leave the field out to mean any"));
        }
        self.at_most(path, count, limits::MAX_ALTERNATIVES);
    }

    fn values<In, Out>(&mut self, path: &str, values: Option<&[In]>, parse: impl Fn(&In) -> Result<Out, String>) -> Vec<Out> {
        let Some(values) = values else { return Vec::new() };
        if values.is_empty() {
            self.fail(path, "is empty; give a value, or leave the field out");
        }
        self.at_most(path, values.len(), limits::MAX_VALUES);
        let mut valid = Vec::with_capacity(values.len().min(limits::MAX_VALUES));
        for (i, value) in values.iter().enumerate().take(limits::MAX_VALUES) {
            match parse(value) {
                Ok(value) => valid.push(value),
                Err(problem) => self.fail(&format!("{path}[{i}]"), problem),
            }
        }
        valid
    }

    fn principal(text: &str) -> Result<StringMatch, String> {
        if let Some(rest) = text.strip_prefix("spiffe://") {
            return Err(format!("{text:?} has a scheme; write {rest:?}"));
        }
        let matched = wildcard(
            text,
            limits::MAX_PRINCIPAL,
            "a principal, <trust domain>/ns/<namespace>/sa/<service account>",
        )?;
        if let StringMatch::Exact(exact) = &matched {
            let parts: Vec<&str> = exact.split('/').collect();
            let well_formed = matches!(parts[..], [domain, "ns", ns, "sa", sa]
                if !domain.is_empty() && namespace_name(ns) && dns_name(sa));
            if !well_formed {
                return Err(format!(
                    "{exact:?} is no principal; give <trust domain>/ns/<namespace>/sa/<service account>, with `*` at one end for any"
                ));
            }
        }
        Ok(matched)
    }

    fn namespace(text: &str) -> Result<StringMatch, String> {
        let matched = wildcard(text, limits::MAX_NAMESPACE, "a namespace's name")?;
        match &matched {
            StringMatch::Exact(name) if !namespace_name(name) => Err(format!(
                "{name:?} is no namespace's name; give lower-case letters, digits and '-'"
            )),
            _ => Ok(matched),
        }
    }

    pub(crate) fn ip_block(text: &str) -> Result<IpNet, String> {
        let block = block(text);
        if let Some(IpNet::V6(block)) = &block
            && let Some(ipv4) = mapped(block)
        {
            return Err(format!(
                "{text:?} is IPv4 written as IPv6, which no connection matches; write {ipv4}"
            ));
        }
        match block {
            None => Err(format!(
                "{text:?} is no address range; give one like 10.1.0.0/16, 2001:db8::/64 or a single address"
            )),
            Some(block) if block.trunc() != block => Err(format!("{text:?} has bits beyond its prefix; write {}", block.trunc())),
            Some(block) => Ok(block),
        }
    }

    pub(crate) fn port(port: &i64) -> Result<u16, String> {
        u16::try_from(*port)
            .ok()
            .filter(|port| *port != 0)
            .ok_or_else(|| format!("{port} is no port; give 1-65535"))
    }
}

/// As the API server reads it: a number that begins with 0, which some read as octal, is none.
fn block(text: &str) -> Option<IpNet> {
    let Some((address, length)) = text.split_once('/') else {
        return text.parse::<IpAddr>().ok().map(IpNet::from);
    };
    let is_plain = length == "0" || (!length.starts_with('0') && length.bytes().all(|byte| byte.is_ascii_digit()));
    let length = length.parse().ok().filter(|_| is_plain)?;
    IpNet::new(address.parse().ok()?, length).ok()
}

/// Addresses are compared as what they are: an IPv4 client never has an IPv6 address here.
fn mapped(block: &Ipv6Net) -> Option<IpNet> {
    let address = block.network().to_ipv4_mapped()?;
    let length = block.prefix_len().checked_sub(96)?;
    Ipv4Net::new(address, length).ok().map(|block| IpNet::V4(block.trunc()))
}

fn wildcard(text: &str, longest: usize, what: &str) -> Result<StringMatch, String> {
    if text.trim().is_empty() {
        return Err(format!("is empty; give {what}, or `*` for any that is proven"));
    }
    if text.len() > longest {
        return Err(format!("has {} bytes, at most {longest} can match", text.len()));
    }
    if !text.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(format!(
            "{text:?} has white space in it, or what is not ASCII, and so matches nothing; give {what}"
        ));
    }
    StringMatch::parse(text).ok_or_else(|| format!("{text:?}: one `*` is allowed, as the first or the last character"))
}

/// RFC 1123 label.
fn namespace_name(name: &str) -> bool {
    !name.contains('.') && name.len() <= limits::MAX_NAMESPACE && dns_name(name)
}

/// RFC 1123 subdomain.
fn dns_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 253
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.')
        && name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
        && name.bytes().next_back().is_some_and(|b| b.is_ascii_alphanumeric())
}

/// `[prefix/]name`, the prefix an RFC 1123 subdomain.
fn label_key(key: &str) -> bool {
    let (prefix, name) = key.split_once('/').map_or((None, key), |(prefix, name)| (Some(prefix), name));
    prefix.is_none_or(dns_name) && label_text(name, false)
}

fn label_text(text: &str, may_be_empty: bool) -> bool {
    let alphanumeric = |byte: Option<u8>| byte.is_some_and(|b| b.is_ascii_alphanumeric());
    (text.is_empty() && may_be_empty)
        || (text.len() <= limits::MAX_LABEL
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
            && alphanumeric(text.bytes().next())
            && alphanumeric(text.bytes().next_back()))
}
