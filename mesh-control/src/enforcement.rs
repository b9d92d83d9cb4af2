//! What the agents that this replica serves enforce, by their reports, and how it is told to the other replicas. Pure.
//!
//! An agent says which version of a type it enforces; what is in a version, the replica that served it knows. Told are forms: a
//! policy's form is the same hash at every replica, whichever versions each of them happened to publish on the way.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use mesh_proto::{AUTHORIZATION_TYPE_URL, SETTINGS_TYPE_URL};
use tokio::time::Instant;

use crate::compile::Snapshot;
use crate::compile::forms::{Form, ShortHash};
use crate::limits::{ENFORCED_GRACE, MAX_NODES, MAX_REJECTED, MAX_VERSIONS_KEPT};
use crate::objects::{Kind, ObjectId};
use share::{Group, Share};

pub mod share;
#[cfg(test)]
mod tests;

type Forms = Arc<BTreeMap<ObjectId, Form>>;

/// The types that are made of what has a status, each with the kind of it.
const TYPES: [(&str, Kind); 2] = [
    (AUTHORIZATION_TYPE_URL, Kind::AuthorizationPolicy),
    (SETTINGS_TYPE_URL, Kind::MeshConfig),
];
/// In the place of a name: the agent rejects more than it names.
const OTHERS: &str = "*";

#[derive(Default)]
pub struct Enforcement {
    /// By type, the newest last: what each version is made of.
    history: BTreeMap<&'static str, VecDeque<(String, Forms)>>,
    /// At most [`MAX_NODES`].
    nodes: BTreeMap<String, Node>,
    /// Streams of nodes that found no room.
    without_room: usize,
}

struct Node {
    key: ShortHash,
    streams: usize,
    /// When its last stream ended.
    ended: Option<Instant>,
    words: BTreeMap<&'static str, Word>,
}

/// What a node says of one type.
struct Word {
    version: String,
    /// What it was made of when the node said so.
    forms: Forms,
    rejected: BTreeSet<Form>,
    /// It rejects more than it names: nothing of the type is taken for enforced.
    is_vague: bool,
}

/// Of a word: its type, the version, what is rejected, and whether there is more of that.
type Said<'a> = (&'a str, &'a str, &'a BTreeSet<Form>, bool);

impl Enforcement {
    /// A state is published. Before any agent hears of it.
    pub fn published(&mut self, snapshot: &Snapshot) {
        for (type_url, kind) in TYPES {
            let Some(of_type) = snapshot.types.get(type_url) else {
                continue;
            };
            let of_kind = snapshot.forms.iter().filter(|(id, _)| id.kind == kind);
            let forms: BTreeMap<ObjectId, Form> = of_kind.map(|(id, form)| (id.clone(), *form)).collect();
            let versions = self.history.entry(type_url).or_default();
            match versions.back_mut() {
                Some((version, known)) if *version == of_type.version => {
                    // Another object that says nothing new: agents need not be told, and have it.
                    if **known != forms {
                        *known = Arc::new(forms);
                    }
                }
                _ => versions.push_back((of_type.version.clone(), Arc::new(forms))),
            }
            if versions.len() > MAX_VERSIONS_KEPT {
                versions.pop_front();
            }
        }
    }

    fn forms(&self, type_url: &str, version: &str) -> Option<&Forms> {
        let mut versions = self.history.get(type_url)?.iter().rev();
        versions.find(|(known, _)| known == version).map(|(_, forms)| forms)
    }

    /// A stream of a node's reports is open.
    pub fn opened(&mut self, node: &str, now: Instant) {
        if self.nodes.len() >= MAX_NODES && !self.nodes.contains_key(node) {
            self.expire(now);
        }
        if self.nodes.len() >= MAX_NODES && !self.nodes.contains_key(node) {
            self.without_room += 1;
            return;
        }
        let known = self.nodes.entry(node.to_owned()).or_insert_with(|| Node {
            key: node_key(node),
            streams: 0,
            ended: None,
            words: BTreeMap::new(),
        });
        known.streams += 1;
    }

    pub fn closed(&mut self, node: &str, now: Instant) {
        match self.nodes.get_mut(node).filter(|known| known.streams > 0) {
            Some(known) => {
                known.streams -= 1;
                known.ended = (known.streams == 0).then_some(now);
            }
            None => self.without_room = self.without_room.saturating_sub(1),
        }
    }

    /// A node's word: type URL → version that it enforces, and "type name: reason" of what it cannot use.
    pub fn reported(&mut self, node: &str, enforced: &BTreeMap<String, String>, rejected: &[String]) {
        let Some(known) = self.nodes.get(node) else { return };
        let mut words = BTreeMap::new();
        for (type_url, kind) in TYPES {
            let Some(version) = enforced.get(type_url) else { continue };
            let before = known.words.get(type_url).filter(|word| word.version == *version);
            let forms = self.forms(type_url, version).or(before.map(|word| &word.forms));
            // Another replica's, or a part of one: the agent is about to say another one.
            let Some(forms) = forms else { continue };
            let (rejected, is_vague) = rejected_forms(type_url, kind, forms, rejected);
            let word = Word {
                version: version.clone(),
                forms: Arc::clone(forms),
                rejected,
                is_vague,
            };
            words.insert(type_url, word);
        }
        if let Some(known) = self.nodes.get_mut(node) {
            known.words = words;
        }
    }

    fn expire(&mut self, now: Instant) {
        self.nodes.retain(|_, node| {
            let lately = node.ended.is_some_and(|ended| now < ended + ENFORCED_GRACE);
            node.streams > 0 || lately
        });
    }

    /// What is to be told of `current`, the forms that are in force, and how many nodes are left out of it.
    pub fn share(&mut self, current: &BTreeMap<ObjectId, Form>, now: Instant) -> (Share, usize) {
        self.expire(now);
        let forms: BTreeSet<Form> = current.values().copied().collect();
        // Few: nodes that enforce the same versions and reject the same are in one.
        let mut alike: BTreeMap<Vec<Said<'_>>, Vec<&Node>> = BTreeMap::new();
        for node in self.nodes.values() {
            let words = node.words.iter();
            let said = words.map(|(type_url, word)| (*type_url, word.version.as_str(), &word.rejected, word.is_vague));
            alike.entry(said.collect()).or_default().push(node);
        }
        let groups = alike.into_values().map(|nodes| {
            let words = nodes.first().map(|node| &node.words).into_iter().flatten();
            let (mut enforced, mut rejected): (BTreeSet<Form>, BTreeSet<Form>) = Default::default();
            for (type_url, word) in words {
                if !word.is_vague {
                    let newest = self.forms(type_url, &word.version).unwrap_or(&word.forms);
                    enforced.extend(newest.values());
                }
                rejected.extend(&word.rejected);
            }
            Group {
                nodes: nodes.iter().map(|node| node.key).collect(),
                enforces: forms
                    .iter()
                    .filter(|form| enforced.contains(*form) && !rejected.contains(*form))
                    .copied()
                    .collect(),
                rejects: forms.intersection(&rejected).copied().collect(),
            }
        });
        let (share, left_out) = Share::of(forms.clone(), groups);
        (share, left_out + self.without_room)
    }
}

/// How a node is named in what replicas tell each other.
#[must_use]
pub fn node_key(name: &str) -> ShortHash {
    ShortHash::of(&[b"node", name.as_bytes()])
}

fn rejected_forms(type_url: &str, kind: Kind, forms: &Forms, rejected: &[String]) -> (BTreeSet<Form>, bool) {
    let short = type_url.rsplit('.').next().unwrap_or(type_url);
    let names = rejected.iter().filter_map(|text| {
        let (name, _) = text.strip_prefix(short)?.strip_prefix(' ')?.split_once(": ")?;
        Some(name)
    });
    let mut found = BTreeSet::new();
    // A list that is full may have been longer.
    let mut is_vague = rejected.len() >= MAX_REJECTED;
    for name in names {
        if name == OTHERS {
            is_vague = true;
        } else if kind == Kind::MeshConfig {
            // All of them are one resource.
            found.extend(forms.values());
        } else if let Some((namespace, name)) = name.split_once('/') {
            let id = ObjectId {
                kind,
                namespace: namespace.to_owned(),
                name: name.to_owned(),
            };
            found.extend(forms.get(&id));
        }
    }
    (found, is_vague)
}
