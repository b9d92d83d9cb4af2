//! What the agents that this replica serves enforce, by their reports, and how it is told to the other replicas. Pure.
//!
//! An agent says which version of a type it enforces; what is in a version, the replica that served it knows. Told are forms: a
//! policy's form is the same hash at every replica, whichever versions each of them happened to publish on the way.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::sync::Arc;

use mesh_proto::{ADDRESS_TYPE_URL, SETTINGS_TYPE_URL};
use tokio::time::Instant;

use crate::compile::Snapshot;
use crate::compile::forms::{Form, Forms, ShortHash, TYPES};
use crate::limits::{ENFORCED_GRACE, MAX_FORMS_KEPT, MAX_NODES, MAX_REJECTED, MAX_SHARED_FORMS, MAX_VERSIONS_KEPT};
use crate::objects::{Kind, ObjectId};
use share::{Group, Share};

pub mod share;
#[cfg(test)]
mod tests;

/// In the place of a name: the agent rejects more than it names.
const OTHERS: &str = "*";

#[derive(Default)]
pub struct Enforcement {
    /// By type, the newest last: what was in force in each version.
    history: BTreeMap<&'static str, VecDeque<(String, Arc<Forms>)>>,
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
    /// Objects of the version. Whatever form one has that is told by the same version, it is rejected.
    rejected: BTreeSet<ObjectId>,
    /// It rejects more than it names: nothing of the type is taken for enforced.
    is_vague: bool,
    /// Since when it says nothing that is known here: its agent has just started, has a part of a version, or speaks of another replica's.
    doubted: Option<Instant>,
}

/// What finds no room in what is told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeftOut {
    pub nodes: usize,
    pub forms: usize,
}

/// Nodes of which the same is to be told: by type, where the forms are, what is rejected, and whether there is more of that.
type Alike<'a> = Vec<(&'a str, *const Forms, &'a BTreeSet<ObjectId>, bool)>;

impl Enforcement {
    /// A state is published. Before any agent hears of it.
    pub fn published(&mut self, snapshot: &Snapshot) {
        for type_url in TYPES {
            let Some(of_type) = snapshot.types.get(type_url) else {
                continue;
            };
            let versions = self.history.entry(type_url).or_default();
            match versions.back_mut() {
                // Whatever has changed is nothing that agents are told by this type, and so they have it.
                Some((version, known)) if *version == of_type.version => *known = Arc::clone(&snapshot.forms),
                _ => versions.push_back((of_type.version.clone(), Arc::clone(&snapshot.forms))),
            }
            while versions.len() > MAX_VERSIONS_KEPT || (versions.len() > 1 && kept(versions) > MAX_FORMS_KEPT) {
                versions.pop_front();
            }
        }
    }

    fn forms(&self, type_url: &str, version: &str) -> Option<&Arc<Forms>> {
        let mut versions = self.history.get(type_url)?.iter().rev();
        versions.find(|(known, _)| known == version).map(|(_, forms)| forms)
    }

    /// A stream of a node's reports is open. False: there is no room for the node, and [`Self::closed`] is to be told so.
    pub fn opened(&mut self, node: &str, now: Instant) -> bool {
        if self.nodes.len() >= MAX_NODES && !self.nodes.contains_key(node) {
            self.expire(now);
        }
        if self.nodes.len() >= MAX_NODES && !self.nodes.contains_key(node) {
            self.without_room += 1;
            return false;
        }
        let known = self.nodes.entry(node.to_owned()).or_insert_with(|| Node {
            key: node_key(node),
            streams: 0,
            ended: None,
            words: BTreeMap::new(),
        });
        known.streams += 1;
        true
    }

    pub fn closed(&mut self, node: &str, had_room: bool, now: Instant) {
        if !had_room {
            self.without_room = self.without_room.saturating_sub(1);
        } else if let Some(known) = self.nodes.get_mut(node) {
            known.streams = known.streams.saturating_sub(1);
            known.ended = (known.streams == 0).then_some(now);
        }
    }

    /// A node's word: type URL → version that it enforces, and "type name: reason" of what it cannot use. What it said before stands for
    /// [`ENFORCED_GRACE`] where this is nothing that is known here: an agent that takes over has yet to hear what it goes on with.
    pub fn reported(&mut self, node: &str, enforced: &BTreeMap<String, String>, rejected: &[String], now: Instant) {
        let Some(known) = self.nodes.get(node) else { return };
        let mut words = BTreeMap::new();
        for type_url in TYPES {
            let version = enforced.get(type_url);
            if let Some((version, forms)) = version.and_then(|version| Some((version, self.forms(type_url, version)?))) {
                let (rejected, is_vague) = rejected_objects(type_url, forms, rejected);
                let word = Word {
                    version: version.clone(),
                    rejected,
                    is_vague,
                    doubted: None,
                };
                words.insert(type_url, word);
            } else if let Some(before) = known.words.get(type_url) {
                let word = Word {
                    version: before.version.clone(),
                    rejected: before.rejected.clone(),
                    is_vague: before.is_vague,
                    doubted: before.doubted.or(Some(now)),
                };
                words.insert(type_url, word);
            }
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

    /// What is to be told of `current`, the forms that are in force, and what is left out of it.
    pub fn share(&mut self, current: &Forms, now: Instant) -> (Share, LeftOut) {
        self.expire(now);
        let forms = fair(current);
        let mut left_out = LeftOut {
            nodes: self.without_room,
            forms: current.len() - forms.len(),
        };
        // Few: nodes that have the same and reject the same are in one.
        let mut alike: BTreeMap<Alike<'_>, Vec<ShortHash>> = BTreeMap::new();
        for node in self.nodes.values() {
            let words = node.words.iter().filter_map(|(type_url, word)| {
                let is_over = word.doubted.is_some_and(|since| now >= since + ENFORCED_GRACE);
                // One that is forgotten is of an agent that is far behind.
                let forms = self.forms(type_url, &word.version).filter(|_| !is_over)?;
                Some((*type_url, Arc::as_ptr(forms), &word.rejected, word.is_vague))
            });
            alike.entry(words.collect()).or_default().push(node.key);
        }
        let used: BTreeSet<*const Forms> = alike.keys().flatten().map(|(_, place, _, _)| *place).collect();
        let mut known: BTreeMap<*const Forms, (&Forms, HashSet<Form>)> = BTreeMap::new();
        for (_, forms) in self.history.values().flatten() {
            let place = Arc::as_ptr(forms);
            if used.contains(&place) {
                known
                    .entry(place)
                    .or_insert_with(|| (forms, forms.iter().map(|(_, form)| form).collect()));
            }
        }
        let groups: Vec<Group> = alike
            .into_iter()
            .map(|(words, nodes)| {
                let forms_at = |place: &*const Forms| known.get(place).map(|(forms, _)| *forms);
                let rejected: BTreeSet<Form> = words
                    .iter()
                    .flat_map(|(_, place, rejected, _)| {
                        let forms = forms_at(place);
                        rejected.iter().filter_map(move |id| forms?.get(id))
                    })
                    .collect();
                let has = |type_url: &&str, form: &Form| {
                    let mut words = words.iter();
                    let word = words.find(|(of, _, _, is_vague)| of == type_url && !is_vague);
                    word.and_then(|(_, place, _, _)| known.get(place))
                        .is_some_and(|(_, known)| known.contains(form))
                };
                let enforces = forms
                    .iter()
                    .filter(|(form, types)| !rejected.contains(*form) && types.iter().all(|type_url| has(type_url, form)));
                Group {
                    nodes,
                    enforces: enforces.map(|(form, _)| *form).collect(),
                    rejects: forms.keys().filter(|form| rejected.contains(form)).copied().collect(),
                }
            })
            .collect();
        let (share, nodes) = Share::of(forms.into_keys().collect(), groups.into_iter());
        left_out.nodes += nodes;
        (share, left_out)
    }
}

/// Those that are told of, each with the types by which agents are told of it. Beyond [`MAX_SHARED_FORMS`] the namespaces with the most
/// lose: the first objects of each come before the second ones of any.
fn fair(current: &Forms) -> BTreeMap<Form, &'static [&'static str]> {
    let mut ranks: BTreeMap<&str, usize> = BTreeMap::new();
    let mut ranked: Vec<(usize, &ObjectId, Form)> = current
        .iter()
        .map(|(id, form)| {
            let rank = ranks.entry(&id.namespace).or_default();
            *rank += 1;
            (*rank, id, form)
        })
        .collect();
    ranked.sort_unstable();
    let told = ranked.into_iter().take(MAX_SHARED_FORMS);
    told.map(|(_, id, form)| (form, current.types_of(id, form))).collect()
}

/// How many forms are kept for these versions: those that follow one another share them.
fn kept(versions: &VecDeque<(String, Arc<Forms>)>) -> usize {
    let before = std::iter::once(None).chain(versions.iter().map(|(_, forms)| Some(forms)));
    let each = versions.iter().zip(before);
    each.filter(|((_, forms), before)| before.is_none_or(|before| !Arc::ptr_eq(before, forms)))
        .map(|((_, forms), _)| forms.len())
        .sum()
}

/// How a node is named in what replicas tell each other.
#[must_use]
pub fn node_key(name: &str) -> ShortHash {
    ShortHash::of(&[b"node", name.as_bytes()])
}

/// What of a version an agent cannot use, and whether there may be more.
fn rejected_objects(type_url: &str, forms: &Forms, rejected: &[String]) -> (BTreeSet<ObjectId>, bool) {
    let mut found = BTreeSet::new();
    let mut is_vague = is_cut(type_url, rejected);
    for name in rejected.iter().filter_map(|text| name_in(type_url, text)) {
        match type_url {
            // Which policies are for that workload is told with it.
            ADDRESS_TYPE_URL => is_vague = true,
            _ if name == OTHERS => is_vague = true,
            // All MeshConfigs are one resource.
            SETTINGS_TYPE_URL => {
                let configs = forms.iter().map(|(id, _)| id).filter(|id| id.kind == Kind::MeshConfig);
                found.extend(configs.cloned());
            }
            _ => {
                if let Some((namespace, name)) = name.split_once('/') {
                    found.insert(ObjectId {
                        kind: Kind::AuthorizationPolicy,
                        namespace: namespace.to_owned(),
                        name: name.to_owned(),
                    });
                }
            }
        }
    }
    (found, is_vague)
}

/// A list that is full may have been longer: of the type that is last in it, and of those that would come behind.
fn is_cut(type_url: &str, rejected: &[String]) -> bool {
    let Some(last) = rejected.get(MAX_REJECTED - 1) else {
        return false;
    };
    let place = |wanted: &dyn Fn(&str) -> bool| TYPES.iter().position(|type_url| wanted(type_url));
    let of_last = place(&|type_url| name_in(type_url, last).is_some());
    of_last.is_none_or(|of_last| place(&|other| other == type_url).is_none_or(|place| place >= of_last))
}

/// The name in "type name: reason", of this type.
fn name_in<'a>(type_url: &str, text: &'a str) -> Option<&'a str> {
    let short = type_url.rsplit('.').next().unwrap_or(type_url);
    let (name, _) = text.strip_prefix(short)?.strip_prefix(' ')?.split_once(": ")?;
    Some(name)
}
