//! Kubernetes Events that are to be written: what is the same is counted in one, and nobody gets many. Pure.
//!
//! An Event's name follows from what it says, so that replicas which see the same thing write one Event, and a restarted one none anew.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, SystemTime};

use sha2::{Digest as _, Sha256};
use tokio::time::Instant;

use crate::limits::{
    EVENT_ATTEMPTS, EVENT_RETRY, EVENT_SUBJECT_IDLE, EVENTS_BURST, EVENTS_INTERVAL, EVENTS_OF_SUBJECT_BURST,
    EVENTS_OF_SUBJECT_INTERVAL, MAX_EVENT_KINDS_OF_SUBJECT, MAX_EVENT_NOTE_BYTES, MAX_EVENT_SUBJECTS, MAX_EVENTS_WAITING,
};

#[cfg(test)]
mod tests;

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

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    NotEnrolled,
    ProtectionLost,
    Repaired,
    Protected,
    LabelIgnored,
    PortNotAllowed,
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
            Self::PortNotAllowed => "MeshPortNotAllowed",
        }
    }

    #[must_use]
    pub fn is_warning(self) -> bool {
        self != Self::Protected
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventWrite {
    pub subject: Subject,
    pub reason: Reason,
    pub note: String,
    pub name: String,
    /// How often it was so, as far as this replica knows. More than once: there is an Event of that name to be counted up.
    pub count: i32,
    pub at: SystemTime,
    attempts: u32,
}

/// Label of `mesh_control_events_dropped_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dropped {
    /// Its subject has had as many as it gets.
    SubjectLimit,
    /// All have.
    TotalLimit,
    NoRoom,
    /// The API server did not take it.
    Failed,
}

impl Dropped {
    pub const ALL: [Self; 4] = [Self::SubjectLimit, Self::TotalLimit, Self::NoRoom, Self::Failed];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::SubjectLimit => "subject_limit",
            Self::TotalLimit => "total_limit",
            Self::NoRoom => "no_room",
            Self::Failed => "failed",
        }
    }
}

/// So many at once, and then one in each interval.
#[derive(Debug)]
struct Allowance {
    burst: u32,
    interval: Duration,
    left: u32,
    since: Instant,
}

impl Allowance {
    fn new(burst: u32, interval: Duration, now: Instant) -> Self {
        Self {
            burst,
            interval,
            left: burst,
            since: now,
        }
    }

    fn refill(&mut self, now: Instant) {
        let more = now.saturating_duration_since(self.since).as_nanos() / self.interval.as_nanos().max(1);
        let more = u32::try_from(more).unwrap_or(u32::MAX);
        if more > 0 {
            self.left = self.left.saturating_add(more).min(self.burst);
            self.since += self.interval.saturating_mul(more);
        }
    }

    fn take(&mut self, now: Instant) -> bool {
        self.refill(now);
        let is_there = self.left > 0;
        self.left -= u32::from(is_there);
        is_there
    }
}

#[derive(Debug)]
struct OfSubject {
    allowance: Allowance,
    last: Instant,
    /// Name of an Event → how often it was said; oldest first.
    said: VecDeque<(String, i32)>,
}

#[derive(Debug)]
pub struct EventQueue {
    subjects: BTreeMap<Subject, OfSubject>,
    total: Allowance,
    waiting: BTreeMap<String, EventWrite>,
    queue: BTreeSet<(Instant, String)>,
}

impl EventQueue {
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self {
            subjects: BTreeMap::new(),
            total: Allowance::new(EVENTS_BURST, EVENTS_INTERVAL, now),
            waiting: BTreeMap::new(),
            queue: BTreeSet::new(),
        }
    }

    /// # Errors
    /// It is not written, and why.
    pub fn say(&mut self, subject: &Subject, reason: Reason, note: &str, now: Instant, at: SystemTime) -> Result<(), Dropped> {
        let note = note[..note.floor_char_boundary(MAX_EVENT_NOTE_BYTES)].to_owned();
        let name = event_name(subject, reason, &note);
        if !self.subjects.contains_key(subject) {
            if self.subjects.len() >= MAX_EVENT_SUBJECTS {
                self.subjects
                    .retain(|_, of| now.saturating_duration_since(of.last) < EVENT_SUBJECT_IDLE);
            }
            if self.subjects.len() >= MAX_EVENT_SUBJECTS {
                return Err(Dropped::NoRoom);
            }
            let of_subject = OfSubject {
                allowance: Allowance::new(EVENTS_OF_SUBJECT_BURST, EVENTS_OF_SUBJECT_INTERVAL, now),
                last: now,
                said: VecDeque::new(),
            };
            self.subjects.insert(subject.clone(), of_subject);
        }
        let Some(of_subject) = self.subjects.get_mut(subject) else {
            return Err(Dropped::NoRoom);
        };
        of_subject.last = now;
        let count = of_subject.count(&name);
        if let Some(waiting) = self.waiting.get_mut(&name) {
            // It has its place already.
            (waiting.count, waiting.at) = (count, at);
            return Ok(());
        }
        if !of_subject.allowance.take(now) {
            return Err(Dropped::SubjectLimit);
        }
        if self.waiting.len() >= MAX_EVENTS_WAITING {
            return Err(Dropped::NoRoom);
        }
        if !self.total.take(now) {
            return Err(Dropped::TotalLimit);
        }
        let write = EventWrite {
            subject: subject.clone(),
            reason,
            note,
            name: name.clone(),
            count,
            at,
            attempts: 0,
        };
        self.queue.insert((now, name.clone()));
        self.waiting.insert(name, write);
        Ok(())
    }

    /// The next one, if it is time for it.
    pub fn take(&mut self, now: Instant) -> Option<EventWrite> {
        if self.due()? > now {
            return None;
        }
        let (_, name) = self.queue.pop_first()?;
        self.waiting.remove(&name)
    }

    /// When [`Self::take`] will have something.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        self.queue.first().map(|(due, _)| *due)
    }

    /// It could not be written, and may be later.
    ///
    /// # Errors
    /// It was tried often enough.
    pub fn again(&mut self, mut write: EventWrite, now: Instant) -> Result<(), Dropped> {
        write.attempts += 1;
        if write.attempts >= EVENT_ATTEMPTS {
            return Err(Dropped::Failed);
        }
        if self.waiting.len() >= MAX_EVENTS_WAITING {
            return Err(Dropped::NoRoom);
        }
        let due = now + EVENT_RETRY.saturating_mul(1 << write.attempts);
        // A newer one of that name says all that this one does.
        if !self.waiting.contains_key(&write.name) {
            self.queue.insert((due, write.name.clone()));
            self.waiting.insert(write.name.clone(), write);
        }
        Ok(())
    }
}

impl OfSubject {
    fn count(&mut self, name: &str) -> i32 {
        if let Some((_, count)) = self.said.iter_mut().find(|(said, _)| said == name) {
            *count = count.saturating_add(1);
            return *count;
        }
        if self.said.len() >= MAX_EVENT_KINDS_OF_SUBJECT {
            self.said.pop_front();
        }
        self.said.push_back((name.to_owned(), 1));
        1
    }
}

/// A DNS subdomain, at most 253 bytes.
fn event_name(subject: &Subject, reason: Reason, note: &str) -> String {
    let mut hash = Sha256::new();
    for part in [subject.kind, &subject.uid, reason.as_str(), note] {
        hash.update(part.as_bytes());
        hash.update([0]);
    }
    let digest = hex::encode(&hash.finalize()[..8]);
    let most = subject.name.len().min(253 - 1 - digest.len());
    let name = subject.name[..most].trim_end_matches(['.', '-']);
    format!("{name}.{digest}")
}
