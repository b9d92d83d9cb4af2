//! Which form of a policy or of a MeshConfig is in force: the same hash wherever the same is said. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use mesh_api::{ValidMeshConfig, ValidPolicy};
use mesh_proto::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL, SETTINGS_TYPE_URL};
use sha2::{Digest as _, Sha256};

use crate::objects::{Kind, ObjectId};
use crate::proto;

/// 64 bits of SHA-256, 16 hexadecimal digits as text. Of forms, and of nodes' names: what replicas tell each other is full of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShortHash(u64);

/// A form of an object.
pub type Form = ShortHash;

impl ShortHash {
    /// Digits of its text.
    pub const DIGITS: usize = 16;

    #[must_use]
    pub fn of(parts: &[&[u8]]) -> Self {
        let mut hash = Sha256::new();
        for part in parts {
            hash.update((part.len() as u64).to_be_bytes());
            hash.update(part);
        }
        let mut first = [0; 8];
        first.copy_from_slice(&hash.finalize()[..8]);
        Self(u64::from_be_bytes(first))
    }
}

impl fmt::Display for ShortHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl FromStr for ShortHash {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        u64::from_str_radix(text, 16).map(Self)
    }
}

/// Of every policy and MeshConfig that is in force.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Forms {
    of: BTreeMap<ObjectId, Form>,
    /// Those of policies with a selector.
    selecting: BTreeSet<Form>,
}

/// What agents are told of policies and MeshConfigs by; which workloads a policy with a selector is for, with the workloads.
pub const TYPES: [&str; 3] = [AUTHORIZATION_TYPE_URL, SETTINGS_TYPE_URL, ADDRESS_TYPE_URL];

impl Forms {
    /// `encoded`: as agents are told, which has its name in it.
    pub fn insert_policy(&mut self, id: &ObjectId, policy: &ValidPolicy, encoded: &[u8]) {
        let labels = policy.selector.iter().flatten();
        let labels = labels.flat_map(|(name, value)| [name.as_bytes(), value.as_bytes()]);
        let parts: Vec<&[u8]> = [&b"policy"[..], encoded].into_iter().chain(labels).collect();
        let form = ShortHash::of(&parts);
        if policy.selector.is_some() {
            self.selecting.insert(form);
        }
        self.of.insert(id.clone(), form);
    }

    pub fn insert_mesh_config(&mut self, id: &ObjectId, config: &ValidMeshConfig) {
        let form = ShortHash::of(&[b"mesh config", id.namespace.as_bytes(), &proto::encode_mesh_config(config)]);
        self.of.insert(id.clone(), form);
    }

    #[cfg(test)]
    pub fn insert(&mut self, id: ObjectId, form: Form, selects: bool) {
        if selects {
            self.selecting.insert(form);
        }
        self.of.insert(id, form);
    }

    #[must_use]
    pub fn get(&self, id: &ObjectId) -> Option<Form> {
        self.of.get(id).copied()
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.of.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.of.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = (&ObjectId, Form)> {
        self.of.iter().map(|(id, form)| (id, *form))
    }

    /// The types by which agents must have been told of a form, so that they enforce it.
    #[must_use]
    pub fn types_of(&self, id: &ObjectId, form: Form) -> &'static [&'static str] {
        match id.kind {
            Kind::MeshConfig => &[SETTINGS_TYPE_URL],
            _ if self.selecting.contains(&form) => &[AUTHORIZATION_TYPE_URL, ADDRESS_TYPE_URL],
            _ => &[AUTHORIZATION_TYPE_URL],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::convert;

    fn id(kind: Kind, name: &str) -> ObjectId {
        ObjectId {
            kind,
            namespace: "shop".to_owned(),
            name: name.to_owned(),
        }
    }

    fn form(text: &str) -> (Form, &'static [&'static str]) {
        let value: serde_json::Value = serde_norway::from_str(text).unwrap();
        let id = id(Kind::AuthorizationPolicy, "p");
        let crate::objects::Object::AuthorizationPolicy(policy) = convert::parse(&id, &value).unwrap() else {
            panic!("another kind");
        };
        let mut forms = Forms::default();
        forms.insert_policy(&id, &policy, b"told");
        let form = forms.get(&id).unwrap();
        (form, forms.types_of(&id, form))
    }

    #[test]
    fn another_selector_is_another_form_and_travels_with_the_workloads() {
        let policy = |selector: &str| {
            form(&format!(
                "kind: AuthorizationPolicy\nmetadata: {{name: p, namespace: shop}}\nspec: {{{selector} action: Deny, rules: [{{}}]}}"
            ))
        };
        let (all, of_all) = policy("");
        let (web, of_web) = policy("selector: {matchLabels: {app: web}},");
        let (db, of_db) = policy("selector: {matchLabels: {app: db}},");
        assert!(all != web && web != db && all != db);
        assert_eq!(of_all, [AUTHORIZATION_TYPE_URL]);
        assert_eq!(of_web, [AUTHORIZATION_TYPE_URL, ADDRESS_TYPE_URL]);
        assert_eq!(of_db, of_web);
    }
}
