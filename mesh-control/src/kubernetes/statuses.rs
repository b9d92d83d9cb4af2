//! Which statuses are to be written, and in which order. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use mesh_api::{Status, Verdict};

use super::world::Mark;
use crate::compile::forms::{Form, ShortHash};
use crate::enforcement::node_key;
use crate::enforcement::share::Share;
use crate::objects::{Kind, ObjectId, World};

#[cfg(test)]
mod tests;

/// A status to be written.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    pub id: ObjectId,
    /// It is only for the object as it stands here.
    pub resource_version: String,
    pub status: Status,
    /// More than a count differs.
    pub is_urgent: bool,
}

/// On which nodes each form is in force, over all replicas. A node that several of them tell of counts once, and what one of them says
/// it rejects does not count.
pub struct Tally<'a> {
    /// In order.
    nodes: Vec<&'a str>,
    /// By form: who enforces it, and who rejects it, a bit a node.
    forms: HashMap<Form, (Bits, Bits)>,
}

type Bits = Vec<u64>;

impl<'a> Tally<'a> {
    /// Of nodes that the cluster does not have, nothing counts.
    #[must_use]
    pub fn new<'s>(world: &'a World, forms: impl Iterator<Item = Form>, shares: impl Iterator<Item = &'s Share>) -> Self {
        let nodes: Vec<&str> = world
            .keys()
            .filter(|id| id.kind == Kind::Node)
            .map(|id| id.name.as_str())
            .collect();
        let places: HashMap<ShortHash, usize> = nodes
            .iter()
            .enumerate()
            .map(|(place, name)| (node_key(name), place))
            .collect();
        let words = nodes.len().div_ceil(64);
        let nothing = || (vec![0; words], vec![0; words]);
        let mut forms: HashMap<Form, (Bits, Bits)> = forms.map(|form| (form, nothing())).collect();
        for group in shares.flat_map(|share| &share.groups) {
            let mut bits = vec![0_u64; words];
            for place in group.nodes.iter().filter_map(|node| places.get(node)) {
                bits[place / 64] |= 1 << (place % 64);
            }
            for form in &group.enforces {
                if let Some((enforcing, _)) = forms.get_mut(form) {
                    add(enforcing, &bits);
                }
            }
            for form in &group.rejects {
                if let Some((_, rejecting)) = forms.get_mut(form) {
                    add(rejecting, &bits);
                }
            }
        }
        Self { nodes, forms }
    }

    fn of(&self, form: Form) -> (usize, Vec<&'a str>) {
        let Some((enforcing, rejecting)) = self.forms.get(&form) else {
            return (0, Vec::new());
        };
        let enforcing = enforcing
            .iter()
            .zip(rejecting)
            .map(|(yes, no)| (yes & !no).count_ones() as usize);
        let is_rejecting = |place: &usize| rejecting[place / 64] & (1 << (place % 64)) != 0;
        let names = (0..self.nodes.len()).filter(is_rejecting).map(|place| self.nodes[place]);
        (enforcing.sum(), names.collect())
    }
}

fn add(to: &mut Bits, bits: &Bits) {
    for (word, more) in to.iter_mut().zip(bits) {
        *word |= more;
    }
}

/// What is in force, and where.
pub struct Found<'a> {
    pub forms: &'a BTreeMap<ObjectId, Form>,
    pub selected: &'a BTreeMap<ObjectId, usize>,
    pub tally: &'a Tally<'a>,
}

/// Statuses that differ from what is written: first where more than a count does, and then those after `last` first, so that none
/// waits for ever.
#[must_use]
pub fn changes(marks: &[Mark], found: &Found<'_>, last: Option<&ObjectId>, now: &Time) -> Vec<Change> {
    let mut changes: Vec<Change> = marks.iter().filter_map(|mark| change(mark, found, now)).collect();
    changes.sort_by(|a, b| {
        let key = |change: &Change| (!change.is_urgent, last.is_some_and(|last| change.id <= *last));
        key(a).cmp(&key(b)).then_with(|| a.id.cmp(&b.id))
    });
    changes
}

fn change(mark: &Mark, found: &Found<'_>, now: &Time) -> Option<Change> {
    let (nodes, rejecting) = match (&mark.refused, found.forms.get(&mark.id)) {
        (Some(_), _) => (0, Vec::new()),
        (None, Some(form)) => found.tally.of(*form),
        // Not published yet: nothing is known of it.
        (None, None) => return None,
    };
    let verdict = match &mark.refused {
        Some(why) => Verdict::Refused(why),
        None => Verdict::InForce {
            workloads: found.selected.get(&mark.id).copied().unwrap_or_default(),
            nodes,
            rejecting: &rejecting,
        },
    };
    let written = mark.written.status.as_ref();
    let status = Status::next(written, mark.written.generation, verdict, now);
    if written == Some(&status) {
        return None;
    }
    let is_urgent = written.is_none_or(|written| {
        written.conditions != status.conditions || written.observed_generation != status.observed_generation
    });
    Some(Change {
        id: mark.id.clone(),
        resource_version: mark.written.resource_version.clone(),
        status,
        is_urgent,
    })
}

/// Objects that are not to be tried until they have changed.
#[derive(Debug, Default)]
pub struct Tried {
    /// With the version that the last try was for, and when it may be tried again all the same.
    objects: BTreeMap<ObjectId, (String, Option<tokio::time::Instant>)>,
}

impl Tried {
    /// Written, or another one was quicker: the next version is waited for.
    pub fn wait_for_next(&mut self, change: &Change) {
        self.objects
            .insert(change.id.clone(), (change.resource_version.clone(), None));
    }

    pub fn wait_until(&mut self, change: &Change, again: tokio::time::Instant) {
        self.objects
            .insert(change.id.clone(), (change.resource_version.clone(), Some(again)));
    }

    #[must_use]
    pub fn may(&self, change: &Change, now: tokio::time::Instant) -> bool {
        self.objects
            .get(&change.id)
            .is_none_or(|(version, again)| *version != change.resource_version || again.is_some_and(|again| now >= again))
    }

    /// Only what is there is remembered.
    pub fn keep(&mut self, marks: &[Mark]) {
        let there: BTreeSet<&ObjectId> = marks.iter().map(|mark| &mark.id).collect();
        self.objects.retain(|id, _| there.contains(id));
    }
}
