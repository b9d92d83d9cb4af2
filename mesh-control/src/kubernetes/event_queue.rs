//! Kubernetes Events that are to be written. Pure.
//!
//! What is the same is counted in one Event, nobody gets many, and namespaces take turns: what one of them has to be told never keeps
//! another from being told.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::SystemTime;

use sha2::{Digest as _, Sha256};
use tokio::time::Instant;

use super::allowance::Allowance;
use crate::limits::{
    EVENT_LIFE, EVENTS_OF_NAMESPACE_BURST, EVENTS_OF_NAMESPACE_INTERVAL, EVENTS_OF_SUBJECT_BURST, EVENTS_OF_SUBJECT_INTERVAL,
    MAX_EVENT_KINDS_OF_SUBJECT, MAX_EVENT_NAMESPACES, MAX_EVENT_NOTE_BYTES, MAX_EVENT_SUBJECTS_OF_NAMESPACE,
    MAX_EVENTS_WAITING_OF_NAMESPACE,
};

#[cfg(test)]
mod tests;

/// Where Events about what belongs to no namespace are.
const NAMESPACE_OF_THE_REST: &str = "default";
/// Of an object's name, by Kubernetes.
const MAX_NAME_BYTES: usize = 253;

/// What an Event is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Subject {
    pub api_version: &'static str,
    pub kind: &'static str,
    /// Empty: of a cluster-wide kind.
    pub namespace: String,
    pub name: String,
    /// Empty where it is not known.
    pub uid: String,
}

impl Subject {
    /// Where its Events are. Not whose turn they take: see [`EventQueue`].
    #[must_use]
    pub fn event_namespace(&self) -> &str {
        if self.namespace.is_empty() {
            NAMESPACE_OF_THE_REST
        } else {
            &self.namespace
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    NotEnrolled,
    ProtectionLost,
    Repaired,
    Protected,
    LabelIgnored,
    PortBlocked,
}

impl Reason {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotEnrolled => "MeshNotEnrolled",
            Self::ProtectionLost => "MeshProtectionLost",
            Self::Repaired => "MeshProtectionRepaired",
            Self::Protected => "MeshProtected",
            Self::LabelIgnored => "MeshLabelIgnored",
            Self::PortBlocked => "MeshPortBlocked",
        }
    }

    #[must_use]
    pub fn is_warning(self) -> bool {
        self != Self::Protected
    }
}

/// What is to be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Telling {
    pub subject: Subject,
    pub reason: Reason,
    pub note: String,
    /// `Some`: it follows from the objects themselves, at this generation of the subject, and is one Event, whichever replica tells
    /// it and however often that is tried. `None`: it has happened, and may again.
    pub generation: Option<i64>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventWrite {
    pub telling: Telling,
    pub name: String,
    /// How often it was so. More than once: there may be an Event of that name to be counted up.
    pub count: i32,
    pub at: SystemTime,
    since: Instant,
}

/// Label of `mesh_control_events_dropped_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dropped {
    /// Its subject has had as many as it gets.
    SubjectLimit,
    NamespaceLimit,
    NoRoom,
    /// The API server does not take it.
    Refused,
    /// It could not be written for too long.
    TooOld,
}

impl Dropped {
    pub const ALL: [Self; 5] = [
        Self::SubjectLimit,
        Self::NamespaceLimit,
        Self::NoRoom,
        Self::Refused,
        Self::TooOld,
    ];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::SubjectLimit => "subject_limit",
            Self::NamespaceLimit => "namespace_limit",
            Self::NoRoom => "no_room",
            Self::Refused => "refused",
            Self::TooOld => "too_old",
        }
    }
}

#[derive(Debug)]
struct OfSubject {
    allowance: Allowance,
    last: Instant,
    /// Of an Event's name → how often it was said; oldest first.
    said: VecDeque<(u64, i32)>,
}

#[derive(Debug)]
struct OfNamespace {
    allowance: Allowance,
    last: Instant,
    subjects: BTreeMap<Subject, OfSubject>,
    waiting: VecDeque<EventWrite>,
}

#[derive(Debug)]
pub struct EventQueue {
    /// Of this process: its Events are no other one's to count up.
    instance: Arc<str>,
    /// By the subjects' own: cluster-wide kinds are in "", not in the namespace where their Events are, whose owner could use it up.
    namespaces: BTreeMap<String, OfNamespace>,
    /// Each namespace of which something waits, once.
    turns: VecDeque<String>,
}

impl EventQueue {
    #[must_use]
    pub fn new(instance: Arc<str>) -> Self {
        Self {
            instance,
            namespaces: BTreeMap::new(),
            turns: VecDeque::new(),
        }
    }

    /// # Errors
    /// It is not written, and why.
    pub fn say(&mut self, mut telling: Telling, now: Instant, at: SystemTime) -> Result<(), Dropped> {
        telling.note.truncate(telling.note.floor_char_boundary(MAX_EVENT_NOTE_BYTES));
        let digest = self.digest(&telling);
        let name = event_name(&telling.subject.name, digest);
        let namespace = telling.subject.namespace.clone();
        let of = self.namespace(&namespace, now).ok_or(Dropped::NoRoom)?;
        of.last = now;
        let subject = remembered(&mut of.subjects, &telling.subject, now);
        let count = if telling.generation.is_some() {
            1
        } else {
            subject.count(digest)
        };
        if let Some(waiting) = of.waiting.iter_mut().find(|waiting| waiting.name == name) {
            // It has its place already.
            (waiting.count, waiting.at) = (count, at);
            return Ok(());
        }
        if !subject.allowance.take(now) {
            return Err(Dropped::SubjectLimit);
        }
        if of.waiting.len() >= MAX_EVENTS_WAITING_OF_NAMESPACE {
            return Err(Dropped::NoRoom);
        }
        if !of.allowance.take(now) {
            return Err(Dropped::NamespaceLimit);
        }
        let is_first = of.waiting.is_empty();
        of.waiting.push_back(EventWrite {
            telling,
            name,
            count,
            at,
            since: now,
        });
        if is_first {
            self.turns.push_back(namespace);
        }
        Ok(())
    }

    /// The next one: of that namespace whose last turn is longest ago.
    pub fn take(&mut self) -> Option<EventWrite> {
        let namespace = self.turns.pop_front()?;
        let of = self.namespaces.get_mut(&namespace)?;
        let write = of.waiting.pop_front();
        if !of.waiting.is_empty() {
            self.turns.push_back(namespace);
        }
        write
    }

    /// It could not be written, and may be later.
    ///
    /// # Errors
    /// It is not, and why.
    pub fn again(&mut self, write: EventWrite, now: Instant) -> Result<(), Dropped> {
        if now.saturating_duration_since(write.since) >= EVENT_LIFE {
            return Err(Dropped::TooOld);
        }
        let namespace = write.telling.subject.namespace.clone();
        let of = self.namespace(&namespace, now).ok_or(Dropped::NoRoom)?;
        // A newer one of that name says all that this one does.
        if of.waiting.iter().any(|waiting| waiting.name == write.name) {
            return Ok(());
        }
        if of.waiting.len() >= MAX_EVENTS_WAITING_OF_NAMESPACE {
            return Err(Dropped::NoRoom);
        }
        let is_first = of.waiting.is_empty();
        of.waiting.push_back(write);
        if is_first {
            self.turns.push_back(namespace);
        }
        Ok(())
    }

    fn namespace(&mut self, name: &str, now: Instant) -> Option<&mut OfNamespace> {
        if !self.namespaces.contains_key(name) {
            if self.namespaces.len() >= MAX_EVENT_NAMESPACES {
                let idle = self.namespaces.iter().filter(|(_, of)| of.waiting.is_empty());
                let (idle, _) = idle.min_by_key(|(_, of)| of.last)?;
                let idle = idle.clone();
                self.namespaces.remove(&idle);
            }
            let of = OfNamespace {
                allowance: Allowance::new(EVENTS_OF_NAMESPACE_BURST, EVENTS_OF_NAMESPACE_INTERVAL, now),
                last: now,
                subjects: BTreeMap::new(),
                waiting: VecDeque::new(),
            };
            self.namespaces.insert(name.to_owned(), of);
        }
        self.namespaces.get_mut(name)
    }

    fn digest(&self, telling: &Telling) -> u64 {
        let subject = &telling.subject;
        let generation = telling.generation.map(|generation| generation.to_string());
        let whose = generation.as_deref().unwrap_or(&self.instance);
        let mut hash = Sha256::new();
        for part in [
            subject.kind,
            &subject.name,
            &subject.uid,
            telling.reason.as_str(),
            &telling.note,
            whose,
        ] {
            hash.update(part.as_bytes());
            hash.update([0]);
        }
        hash.finalize()
            .iter()
            .take(8)
            .fold(0, |all, byte| (all << 8) | u64::from(*byte))
    }
}

/// Of a namespace's subjects this one; at the bound the one that is idle for longest is forgotten.
fn remembered<'a>(subjects: &'a mut BTreeMap<Subject, OfSubject>, subject: &Subject, now: Instant) -> &'a mut OfSubject {
    if !subjects.contains_key(subject) && subjects.len() >= MAX_EVENT_SUBJECTS_OF_NAMESPACE {
        let idle = subjects.iter().min_by_key(|(_, of)| of.last);
        if let Some(idle) = idle.map(|(subject, _)| subject.clone()) {
            subjects.remove(&idle);
        }
    }
    let of = subjects.entry(subject.clone()).or_insert_with(|| OfSubject {
        allowance: Allowance::new(EVENTS_OF_SUBJECT_BURST, EVENTS_OF_SUBJECT_INTERVAL, now),
        last: now,
        said: VecDeque::new(),
    });
    of.last = now;
    of
}

impl OfSubject {
    fn count(&mut self, digest: u64) -> i32 {
        if let Some((_, count)) = self.said.iter_mut().find(|(said, _)| *said == digest) {
            *count = count.saturating_add(1);
            return *count;
        }
        if self.said.len() >= MAX_EVENT_KINDS_OF_SUBJECT {
            self.said.pop_front();
        }
        self.said.push_back((digest, 1));
        1
    }
}

/// A DNS subdomain.
fn event_name(subject: &str, digest: u64) -> String {
    let digest = format!("{digest:016x}");
    let most = subject.len().min(MAX_NAME_BYTES - 1 - digest.len());
    let subject = subject[..subject.floor_char_boundary(most)].trim_end_matches(['.', '-']);
    format!("{subject}.{digest}")
}
