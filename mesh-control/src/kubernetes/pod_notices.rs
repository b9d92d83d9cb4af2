//! What a Pod's owner is told of its protection: which Events there are, and what its annotation says. Pure.
//!
//! Only Pods with which something is wrong, or was a moment ago, are remembered.

use std::collections::{BTreeMap, BTreeSet};

use tokio::time::Instant;

use super::event_queue::Reason;
use super::wishes::PodRef;
use crate::capture_states::{CaptureState, Proof};
use crate::limits::{MAX_PODS_IN_TROUBLE, NOT_ENROLLED_AFTER, PROBLEM_PACE};

#[cfg(test)]
mod tests;

/// What the API server has of a Pod.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    pub capture: Option<CaptureState>,
    pub problem: Option<&'a str>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Trouble {
    /// With nothing wrong any longer, until that can be read.
    None,
    /// May be nothing: it has just begun.
    Maybe {
        since: Instant,
        why: String,
    },
    NotEnrolled(String),
    Refused(String),
    Lost(String),
}

#[derive(Debug)]
struct OfPod {
    pod: PodRef,
    trouble: Trouble,
    /// What its annotation was last made to say, and when.
    written: Option<(Option<String>, Instant)>,
}

/// An annotation that is to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProblemWrite {
    pub pod: PodRef,
    /// `None`: it is to be removed.
    pub text: Option<String>,
}

pub type Said = (PodRef, Reason, String);

#[derive(Debug, Default)]
pub struct PodNotices {
    pods: BTreeMap<String, OfPod>,
    /// Of `Trouble::Maybe`.
    due: BTreeSet<(Instant, String)>,
    problems: BTreeMap<String, ProblemWrite>,
    /// Pods with which something is wrong and that found no room.
    left_out: u64,
}

impl PodNotices {
    /// An agent's word on a Pod of its node.
    pub fn hear(&mut self, pod: &PodRef, proof: Proof, why: &str, known: Known<'_>, now: Instant) -> Option<Said> {
        let before = self.pods.get(&pod.uid).map(|of| of.trouble.clone());
        let (trouble, said) = match proof {
            Proof::Proven => {
                let had_trouble = match &before {
                    None => known.capture == Some(CaptureState::Lost) || known.problem.is_some(),
                    Some(before) => !matches!(before, Trouble::None | Trouble::Maybe { .. }),
                };
                let is_settled = known.problem.is_none() && known.capture == Some(CaptureState::Proven);
                if !had_trouble && (before.is_none() || is_settled) {
                    self.forget(&pod.uid);
                    return None;
                }
                let note = "its capture is proven again: what it sends to the mesh and takes from it is protected";
                (Trouble::None, had_trouble.then(|| (Reason::Protected, note.to_owned())))
            }
            Proof::Lost => {
                let said = !matches!(before, Some(Trouble::Lost(_)));
                // One that this replica has not seen before, and that another one has told of.
                let said = said && !(before.is_none() && known.problem == Some(lost(why).as_str()));
                let note = format!("{why}; the mesh refuses its connections until its capture is proven again");
                (Trouble::Lost(why.to_owned()), said.then_some((Reason::ProtectionLost, note)))
            }
            Proof::Pending => match before {
                Some(Trouble::NotEnrolled(said)) if said == why => (Trouble::NotEnrolled(said), None),
                Some(Trouble::NotEnrolled(_)) => (Trouble::NotEnrolled(why.to_owned()), Some(not_enrolled(why))),
                // It was lost, and is not proven by the agent that came after.
                Some(Trouble::Lost(said)) => (Trouble::Lost(said), None),
                Some(Trouble::Maybe { since, .. }) => {
                    let why = why.to_owned();
                    (Trouble::Maybe { since, why }, None)
                }
                Some(Trouble::Refused(_) | Trouble::None) | None => {
                    let why = why.to_owned();
                    (Trouble::Maybe { since: now, why }, None)
                }
            },
        };
        self.set(pod, trouble, known, now);
        said.map(|(reason, note)| (pod.clone(), reason, note))
    }

    /// It asks to be in the mesh and cannot be.
    pub fn refused(&mut self, pod: &PodRef, why: &str, known: Known<'_>, now: Instant) -> Option<Said> {
        let is_new = self
            .pods
            .get(&pod.uid)
            .is_none_or(|of| of.trouble != Trouble::Refused(why.to_owned()));
        self.set(pod, Trouble::Refused(why.to_owned()), known, now);
        let (reason, note) = not_enrolled(why);
        is_new.then(|| (pod.clone(), reason, note))
    }

    /// It does not ask to be in the mesh.
    pub fn outside(&mut self, pod: &PodRef, known: Known<'_>, now: Instant) {
        if known.problem.is_none() {
            self.forget(&pod.uid);
        } else {
            self.set(pod, Trouble::None, known, now);
        }
    }

    #[must_use]
    pub fn is_known(&self, uid: &str) -> bool {
        self.pods.contains_key(uid)
    }

    /// A member as the API server has it by now. `is_heard`: the last word of its agent was said to this replica.
    pub fn see(&mut self, uid: &str, known: Known<'_>, is_heard: bool, now: Instant) {
        let Some(of) = self.pods.get(uid) else { return };
        if !is_heard {
            // Whoever hears its agent now tells what becomes of it.
            self.forget(uid);
        } else if of.trouble == Trouble::None && known.problem.is_some() {
            self.write_problem(&uid.to_owned(), Some(known), now);
        }
    }

    /// Those that are gone.
    pub fn retain(&mut self, is_there: impl Fn(&str) -> bool) {
        self.pods.retain(|uid, _| is_there(uid));
        self.due.retain(|(_, uid)| is_there(uid));
        self.problems.retain(|uid, _| is_there(uid));
    }

    /// What has lasted long enough to be told.
    pub fn take_due(&mut self, now: Instant) -> Vec<Said> {
        let mut said = Vec::new();
        while self.due.first().is_some_and(|(due, _)| *due <= now) {
            let Some((_, uid)) = self.due.pop_first() else { break };
            let Some(of) = self.pods.get_mut(&uid) else { continue };
            let Trouble::Maybe { why, since } = &of.trouble else {
                continue;
            };
            // It was well in between.
            if *since + NOT_ENROLLED_AFTER > now {
                continue;
            }
            let (reason, note) = not_enrolled(why);
            of.trouble = Trouble::NotEnrolled(why.clone());
            said.push((of.pod.clone(), reason, note));
            self.write_problem(&uid, None, now);
        }
        said
    }

    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        let now = (!self.problems.is_empty()).then(Instant::now);
        let due = self.due.first().map(|(due, _)| *due);
        now.into_iter().chain(due).min()
    }

    /// The next annotation to be written.
    pub fn take_problem(&mut self) -> Option<ProblemWrite> {
        self.problems.pop_first().map(|(_, write)| write)
    }

    /// `namespace/name` → what is wrong.
    #[must_use]
    pub fn in_trouble(&self) -> BTreeMap<String, String> {
        let pods = self.pods.values().filter_map(|of| {
            let text = of.trouble.text()?;
            Some((format!("{}/{}", of.pod.namespace, of.pod.name), text))
        });
        pods.collect()
    }

    #[must_use]
    pub fn in_trouble_count(&self) -> usize {
        self.pods.values().filter(|of| of.trouble.text().is_some()).count()
    }

    /// How often there was no room to remember a Pod.
    #[must_use]
    pub fn left_out(&self) -> u64 {
        self.left_out
    }

    fn forget(&mut self, uid: &str) {
        self.pods.remove(uid);
        self.problems.remove(uid);
    }

    fn set(&mut self, pod: &PodRef, trouble: Trouble, known: Known<'_>, now: Instant) {
        if !self.pods.contains_key(&pod.uid) && self.pods.len() >= MAX_PODS_IN_TROUBLE {
            self.left_out += 1;
            return;
        }
        if let Trouble::Maybe { since, .. } = trouble {
            self.due.insert((since + NOT_ENROLLED_AFTER, pod.uid.clone()));
        }
        let of = self.pods.entry(pod.uid.clone()).or_insert_with(|| OfPod {
            pod: pod.clone(),
            trouble: Trouble::None,
            written: None,
        });
        of.trouble = trouble;
        self.write_problem(&pod.uid, Some(known), now);
    }

    /// Of one whose problem has another text all the time, not every text is written.
    fn write_problem(&mut self, uid: &str, known: Option<Known<'_>>, now: Instant) {
        let Some(of) = self.pods.get_mut(uid) else { return };
        if matches!(of.trouble, Trouble::Maybe { .. }) {
            return;
        }
        let text = of.trouble.text().map(|text| crate::registry::convert::problem_text(&text));
        if known.is_some_and(|known| known.problem == text.as_deref()) {
            self.problems.remove(uid);
            return;
        }
        if let Some((written, at)) = &of.written {
            let kind = |text: &Option<String>| text.as_ref().map(|text| text.split(':').next().map(str::to_owned));
            if now.saturating_duration_since(*at) < PROBLEM_PACE && kind(written) == kind(&text) {
                return;
            }
        }
        of.written = Some((text.clone(), now));
        let pod = of.pod.clone();
        self.problems.insert(uid.to_owned(), ProblemWrite { pod, text });
    }
}

impl Trouble {
    fn text(&self) -> Option<String> {
        match self {
            Self::None | Self::Maybe { .. } => None,
            Self::NotEnrolled(why) => Some(format!("pending: {why}")),
            Self::Refused(why) => Some(format!("refused: {why}")),
            Self::Lost(why) => Some(lost(why)),
        }
    }
}

fn lost(why: &str) -> String {
    format!("lost: {why}")
}

fn not_enrolled(why: &str) -> (Reason, String) {
    (Reason::NotEnrolled, format!("the mesh does not protect it: {why}"))
}
