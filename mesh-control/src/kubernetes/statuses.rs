//! Which statuses are to be written, and in which order. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use mesh_api::{ACCEPTED, Reason, Status, Verdict};
use tokio::time::Instant;

use super::world::Mark;
use crate::compile::Snapshot;
use crate::compile::forms::{Form, ShortHash};
use crate::enforcement::node_key;
use crate::enforcement::share::Share;
use crate::limits::{STATUS_COUNT_WINDOW, STATUS_COUNT_WRITES, STATUS_WRITES};
use crate::objects::ObjectId;

#[cfg(test)]
mod tests;

/// A status to be written.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    pub id: ObjectId,
    /// It is only for the object as it stands here.
    pub resource_version: String,
    pub status: Status,
    /// More than a count differs, or which nodes reject it: what agents say may change all the time.
    pub is_urgent: bool,
}

/// On which nodes each form is in force, over all replicas. A node that several of them tell of counts once, and what one of them says
/// it rejects does not count.
pub struct Tally<'a> {
    /// In order.
    nodes: &'a [String],
    /// By form that any replica tells of: who enforces it, and who rejects it, a bit a node.
    forms: HashMap<Form, (Bits, Bits)>,
}

type Bits = Vec<u64>;

impl<'a> Tally<'a> {
    /// Of nodes that the cluster does not have, nothing counts.
    #[must_use]
    pub fn new<'s>(
        nodes: &'a [String],
        forms: impl Iterator<Item = Form>,
        shares: impl Iterator<Item = &'s Share> + Clone,
    ) -> Self {
        let places: HashMap<ShortHash, usize> = nodes
            .iter()
            .enumerate()
            .map(|(place, name)| (node_key(name), place))
            .collect();
        let words = nodes.len().div_ceil(64);
        let nothing = || (vec![0; words], vec![0; words]);
        let told: HashSet<Form> = shares.clone().flat_map(|share| &share.forms).copied().collect();
        let forms = forms.filter(|form| told.contains(form));
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

    /// How many enforce it, where anybody tells of it; and who rejects it.
    fn of(&self, form: Form) -> (Option<usize>, Vec<&'a str>) {
        let Some((enforcing, rejecting)) = self.forms.get(&form) else {
            return (None, Vec::new());
        };
        let enforcing = enforcing
            .iter()
            .zip(rejecting)
            .map(|(yes, no)| (yes & !no).count_ones() as usize);
        let is_rejecting = |place: &usize| rejecting[place / 64] & (1 << (place % 64)) != 0;
        let names = (0..self.nodes.len()).filter(is_rejecting);
        (Some(enforcing.sum()), names.map(|place| self.nodes[place].as_str()).collect())
    }
}

fn add(to: &mut Bits, bits: &Bits) {
    for (word, more) in to.iter_mut().zip(bits) {
        *word |= more;
    }
}

/// Statuses that differ from what is written. `tally`: `None` while what replicas tell cannot be read; then no count is changed.
#[must_use]
pub fn changes(marks: &[Mark], snapshot: &Snapshot, tally: Option<&Tally<'_>>, now: &Time) -> Vec<Change> {
    marks.iter().filter_map(|mark| change(mark, snapshot, tally, now)).collect()
}

fn change(mark: &Mark, snapshot: &Snapshot, tally: Option<&Tally<'_>>, now: &Time) -> Option<Change> {
    let written = mark.written.status.as_ref();
    let (nodes, rejecting) = match (&mark.refused, snapshot.forms.get(&mark.id), tally) {
        (Some(_), _, _) => (None, Vec::new()),
        (None, Some(form), Some(tally)) => tally.of(form),
        // What is said of this generation may be so still.
        (None, Some(_), None) if written.is_some_and(|written| written.observed_generation == Some(mark.written.generation)) => {
            return None;
        }
        (None, Some(_), None) => (None, Vec::new()),
        // Not published yet: nothing is known of it.
        (None, None, _) => return None,
    };
    let verdict = match &mark.refused {
        Some(why) => Verdict::Refused(why),
        None => Verdict::InForce {
            workloads: snapshot.selected.get(&mark.id).copied().unwrap_or_default(),
            nodes,
            rejecting: &rejecting,
        },
    };
    let status = Status::next(written, mark.written.generation, verdict, now);
    if written == Some(&status) {
        return None;
    }
    Some(Change {
        id: mark.id.clone(),
        resource_version: mark.written.resource_version.clone(),
        is_urgent: written.is_none_or(|written| is_urgent(written, &status)),
        status,
    })
}

fn is_urgent(written: &Status, next: &Status) -> bool {
    let said = |status: &Status| {
        let accepted = status.conditions.iter().find(|condition| condition.type_ == ACCEPTED)?;
        // Valid, whatever agents make of it.
        let reason = if accepted.reason == Reason::RejectedByNodes.as_str() {
            Reason::Accepted.as_str()
        } else {
            &accepted.reason
        };
        Some((accepted.status.clone(), reason.to_owned(), status.observed_generation))
    };
    said(written) != said(next)
}

/// Where writing goes on: behind the last one of each.
#[derive(Debug, Default)]
pub struct Turns {
    urgent: Option<ObjectId>,
    calm: Option<ObjectId>,
}

impl Turns {
    /// Whose turn it is, [`STATUS_WRITES`] at most: half of them are kept for what is not urgent, and namespaces come one after another,
    /// so that nobody waits for ever behind those who have much.
    #[must_use]
    pub fn next(&self, due: Vec<Change>) -> Vec<Change> {
        let (urgent, calm): (Vec<_>, Vec<_>) = due.into_iter().partition(|change| change.is_urgent);
        let for_calm = calm.len().min(STATUS_WRITES / 2);
        let mut urgent = in_turn(urgent, self.urgent.as_ref());
        urgent.truncate(STATUS_WRITES - for_calm);
        let mut calm = in_turn(calm, self.calm.as_ref());
        calm.truncate(STATUS_WRITES - urgent.len());
        // One of these and one of those: a round may end before its last.
        let mut next = Vec::with_capacity(urgent.len() + calm.len());
        let (mut urgent, mut calm) = (urgent.into_iter(), calm.into_iter());
        loop {
            let pair = [urgent.next(), calm.next()];
            if pair.iter().all(Option::is_none) {
                return next;
            }
            next.extend(pair.into_iter().flatten());
        }
    }

    /// It is tried.
    pub fn took(&mut self, change: &Change) {
        let turn = if change.is_urgent { &mut self.urgent } else { &mut self.calm };
        *turn = Some(change.id.clone());
    }
}

/// First the first one of each namespace, those behind that of `last` first; then the second ones.
fn in_turn(mut changes: Vec<Change>, last: Option<&ObjectId>) -> Vec<Change> {
    changes.sort_unstable_by(|a, b| a.id.cmp(&b.id));
    let mut ranks: BTreeMap<String, usize> = BTreeMap::new();
    let mut ranked: Vec<((usize, bool), Change)> = changes
        .into_iter()
        .map(|change| {
            let rank = ranks.entry(change.id.namespace.clone()).or_default();
            *rank += 1;
            let had_its_turn = last.is_some_and(|last| change.id.namespace <= last.namespace);
            ((*rank, had_its_turn), change)
        })
        .collect();
    ranked.sort_by(|(a, of_a), (b, of_b)| a.cmp(b).then_with(|| of_a.id.namespace.cmp(&of_b.id.namespace)));
    ranked.into_iter().map(|(_, change)| change).collect()
}

/// Objects that are not to be tried until they have changed, or for a while.
#[derive(Debug, Default)]
pub struct Tried {
    objects: BTreeMap<ObjectId, Try>,
}

#[derive(Debug)]
struct Try {
    /// What it was for.
    resource_version: String,
    /// When that may be tried again all the same.
    again: Option<Instant>,
    /// Writes of counts in the window that has begun then.
    window: Instant,
    counts: u32,
}

impl Tried {
    /// Written, or another one was quicker: the next version is waited for.
    pub fn wait_for_next(&mut self, change: &Change, now: Instant) {
        self.insert(change, now, None);
    }

    pub fn wait_until(&mut self, change: &Change, now: Instant, again: Instant) {
        self.insert(change, now, Some(again));
    }

    fn insert(&mut self, change: &Change, now: Instant, again: Option<Instant>) {
        let before = self
            .objects
            .get(&change.id)
            .filter(|tried| now < tried.window + STATUS_COUNT_WINDOW);
        let (window, counts) = before.map_or((now, 0), |tried| (tried.window, tried.counts));
        let tried = Try {
            resource_version: change.resource_version.clone(),
            again,
            window,
            counts: counts + u32::from(!change.is_urgent),
        };
        self.objects.insert(change.id.clone(), tried);
    }

    #[must_use]
    pub fn may(&self, change: &Change, now: Instant) -> bool {
        self.objects.get(&change.id).is_none_or(|tried| {
            let has_room = tried.counts < STATUS_COUNT_WRITES || now >= tried.window + STATUS_COUNT_WINDOW;
            let is_another = tried.resource_version != change.resource_version;
            (is_another && (change.is_urgent || has_room)) || tried.again.is_some_and(|again| now >= again)
        })
    }

    /// It is due, but for the bound on how often an object's counts are written.
    #[must_use]
    pub fn is_held_back(&self, change: &Change, now: Instant) -> bool {
        let is_another = |tried: &Try| tried.resource_version != change.resource_version;
        !self.may(change, now) && self.objects.get(&change.id).is_some_and(is_another)
    }

    /// Only what is there is remembered.
    pub fn keep(&mut self, marks: &[Mark]) {
        let there: BTreeSet<&ObjectId> = marks.iter().map(|mark| &mark.id).collect();
        self.objects.retain(|id, _| there.contains(id));
    }
}
