//! What a Pod's owner is told of its protection: which Events there are, and what its annotation says. Pure.
//!
//! Only Pods with which something is wrong, or was a moment ago, are remembered, each once and by its uid. Nothing is said of those that
//! find no room: it would be said again at every look.

use std::collections::{BTreeMap, BTreeSet};

use tokio::time::Instant;

use super::event_queue::Reason;
use super::wishes::PodRef;
use crate::capture_states::{CaptureState, Proof};
use crate::limits::{
    CAPTURE_ECHO, MAX_PODS_IN_TROUBLE, MAX_PODS_IN_TROUBLE_OF_NAMESPACE, MAX_PODS_LEFT_OUT, NOT_ENROLLED_AFTER,
    NOT_PROVEN_AGAIN_AFTER, PROBLEM_PACE,
};
use crate::registry::convert::problem_text;
use crate::troubles::Problem;

#[cfg(test)]
mod tests;

/// What is known of a Pod beside what is said now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Known {
    pub capture: Option<CaptureState>,
    /// Its annotation, as the API server has it.
    pub problem: Option<String>,
    /// It is being deleted, or has run to its end: what ends with it is no loss.
    pub is_ending: bool,
    /// The node whose agent says what is said; `None`: the objects do.
    pub agent: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Trouble {
    /// Over, until that can be read.
    Over,
    /// May be nothing: it has just begun.
    Maybe {
        until: Instant,
        problem: Problem,
    },
    NotEnrolled(Problem),
    Refused(String),
    Lost(Problem),
}

#[derive(Debug)]
struct OfPod {
    pod: PodRef,
    trouble: Trouble,
    /// As [`Known::agent`].
    agent: Option<String>,
    /// When its annotation was last written, and whether that was a text.
    written: Option<(Instant, bool)>,
}

/// An annotation that is to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProblemWrite {
    pub pod: PodRef,
    /// `None`: it is to be removed.
    pub text: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    pub pod: PodRef,
    pub reason: Reason,
    pub note: String,
}

#[derive(Debug, Default)]
pub struct PodNotices {
    pods: BTreeMap<String, OfPod>,
    /// How many of them are in each namespace: none takes the others' room.
    of_namespace: BTreeMap<String, usize>,
    /// When [`Trouble::Maybe`] of a uid has lasted long enough.
    due: BTreeSet<(Instant, String)>,
    /// By uid, each with its place in `turns`.
    problems: BTreeMap<String, (Instant, ProblemWrite)>,
    turns: BTreeSet<(Instant, String)>,
    /// By uid, those for which there was no room, so that each counts once.
    without_room: BTreeMap<String, PodRef>,
    /// How many they were.
    left_out: u64,
}

impl PodNotices {
    /// An agent's word on a Pod of its node.
    pub fn hear(&mut self, pod: &PodRef, proof: Proof, problem: Problem, known: &Known, now: Instant) -> Option<Said> {
        if known.is_ending || problem == Problem::Released {
            self.forget(&pod.uid);
            return None;
        }
        let before = self.pods.get(&pod.uid).map(|of| of.trouble.clone());
        match proof {
            Proof::Proven => self.hear_proven(pod, before.as_ref(), known, now),
            Proof::Lost => {
                let trouble = Trouble::Lost(problem);
                // Another replica has told it, before its agent came to this one; or this one, before it was started again.
                let is_told = match &before {
                    Some(before) => matches!(before, Trouble::Lost(_)),
                    None => known.problem == trouble.text(),
                };
                let is_remembered = self.set(pod, trouble, known, now);
                let note = format!(
                    "the proof of its capture is lost, and the mesh refuses its connections until it is proven again: {}",
                    problem.text()
                );
                (is_remembered && !is_told).then(|| said(pod, Reason::ProtectionLost, note))
            }
            Proof::Pending => self.hear_pending(pod, problem, before, known, now),
        }
    }

    fn hear_proven(&mut self, pod: &PodRef, before: Option<&Trouble>, known: &Known, now: Instant) -> Option<Said> {
        // While the proof is on its way to the API server, what stands there may still say that it was lost.
        let is_read = known.capture == Some(CaptureState::Proven) || before != Some(&Trouble::Over);
        let had_trouble = match before {
            None => known.capture == Some(CaptureState::Lost),
            Some(before) => matches!(before, Trouble::NotEnrolled(_) | Trouble::Lost(_) | Trouble::Refused(_)),
        };
        if !had_trouble && is_read && known.problem.is_none() && !self.problems.contains_key(&pod.uid) {
            self.forget(&pod.uid);
            return None;
        }
        let is_remembered = self.set(pod, Trouble::Over, known, now);
        let note = "its capture is proven: what it sends to the mesh and takes from it is protected";
        (is_remembered && had_trouble).then(|| said(pod, Reason::Protected, note.to_owned()))
    }

    fn hear_pending(
        &mut self,
        pod: &PodRef,
        problem: Problem,
        before: Option<Trouble>,
        known: &Known,
        now: Instant,
    ) -> Option<Said> {
        match before {
            Some(Trouble::NotEnrolled(told)) => {
                self.set(pod, Trouble::NotEnrolled(problem), known, now);
                (told != problem).then(|| not_enrolled(pod, problem))
            }
            // It was lost, and is not proven by the agent that came after.
            Some(lost @ Trouble::Lost(_)) => {
                self.set(pod, lost, known, now);
                None
            }
            Some(Trouble::Maybe { until, .. }) => {
                self.set(pod, Trouble::Maybe { until, problem }, known, now);
                None
            }
            Some(Trouble::Refused(_) | Trouble::Over) | None => {
                let told = Trouble::NotEnrolled(problem);
                let patience = if known.capture == Some(CaptureState::Proven) {
                    NOT_PROVEN_AGAIN_AFTER
                } else {
                    NOT_ENROLLED_AFTER
                };
                let until = now + patience;
                let is_told = known.problem.is_some() && known.problem == told.text();
                let trouble = if is_told { told } else { Trouble::Maybe { until, problem } };
                self.set(pod, trouble, known, now);
                None
            }
        }
    }

    /// It asks to be in the mesh and cannot be.
    pub fn refused(&mut self, pod: &PodRef, why: &str, known: &Known, now: Instant) -> Option<Said> {
        if known.is_ending {
            self.forget(&pod.uid);
            return None;
        }
        let trouble = Trouble::Refused(why.to_owned());
        let is_told = match self.pods.get(&pod.uid) {
            Some(of) => of.trouble == trouble,
            None => known.problem == trouble.text(),
        };
        let is_remembered = self.set(pod, trouble, known, now);
        let note = format!("it asks to be in the mesh and cannot be: {why}");
        (is_remembered && !is_told).then(|| said(pod, Reason::NotEnrolled, note))
    }

    /// It does not ask to be in the mesh.
    pub fn outside(&mut self, pod: &PodRef, known: &Known, now: Instant) {
        if known.problem.is_none() || known.is_ending {
            self.forget(&pod.uid);
        } else {
            self.set(pod, Trouble::Over, known, now);
        }
    }

    /// Keeps those of which `is_ours` holds: others are gone, or another replica hears their agents. `is_heard`: as for
    /// [`Self::take_due`].
    pub fn retain(&mut self, is_ours: impl Fn(&PodRef) -> bool, is_heard: impl Fn(&str) -> bool) {
        let of_namespace = &mut self.of_namespace;
        self.pods.retain(|_, of| {
            // That it is proven again, as another replica hears, may change nothing that is read here: it may have counted as proven all
            // along. The end of a loss is always read.
            let may_be_over = matches!(of.trouble, Trouble::NotEnrolled(_)) && !of.is_still_said(&is_heard);
            let is_kept = is_ours(&of.pod) && !may_be_over;
            if !is_kept {
                one_less(of_namespace, &of.pod.namespace);
            }
            is_kept
        });
        self.without_room.retain(|_, pod| is_ours(pod));
        let pods = &self.pods;
        self.due.retain(|(_, uid)| pods.contains_key(uid));
        self.problems.retain(|uid, _| pods.contains_key(uid));
        let problems = &self.problems;
        self.turns.retain(|(_, uid)| problems.contains_key(uid));
    }

    /// What has lasted long enough to be told. `is_heard`: whether this replica hears the agent of a node; another one may know better.
    pub fn take_due(&mut self, now: Instant, is_heard: impl Fn(&str) -> bool) -> Vec<Said> {
        let mut told = Vec::new();
        while self.due.first().is_some_and(|(due, _)| *due <= now) {
            let Some((_, uid)) = self.due.pop_first() else { break };
            let Some(of) = self.pods.get_mut(&uid) else { continue };
            let Trouble::Maybe { problem, .. } = of.trouble else {
                continue;
            };
            if !of.is_still_said(&is_heard) {
                // Its agent may have died, and say so again, or be another replica's by now. In either case: later.
                let until = now + NOT_ENROLLED_AFTER;
                of.trouble = Trouble::Maybe { until, problem };
                self.due.insert((until, uid));
                continue;
            }
            of.trouble = Trouble::NotEnrolled(problem);
            told.push(not_enrolled(&of.pod, problem));
            self.want(&uid, now);
        }
        told
    }

    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        self.due.first().map(|(due, _)| *due)
    }

    /// The next annotation to be written. `is_heard`: as for [`Self::take_due`].
    ///
    /// # Errors
    /// When there may be one.
    pub fn take_problem(&mut self, now: Instant, is_heard: impl Fn(&str) -> bool) -> Result<ProblemWrite, Option<Instant>> {
        loop {
            let due = self.turns.first().map(|(due, _)| *due);
            if due.is_none_or(|due| due > now) {
                return Err(due);
            }
            let (_, uid) = self.turns.pop_first().ok_or(None)?;
            let (_, write) = self.problems.remove(&uid).ok_or(None)?;
            let Some(of) = self.pods.get_mut(&uid) else { continue };
            // Its agent's next report, to whichever replica, brings it again.
            if of.is_still_said(&is_heard) {
                of.written = Some((now, write.text.is_some()));
                return Ok(write);
            }
        }
    }

    /// It could not be written, and may be later.
    pub fn again(&mut self, write: ProblemWrite, now: Instant) {
        let uid = write.pod.uid.clone();
        let is_true = self.pods.get(&uid).is_some_and(|of| of.trouble.text() == write.text);
        if is_true && !self.problems.contains_key(&uid) {
            self.turns.insert((now, uid.clone()));
            self.problems.insert(uid, (now, write));
        }
    }

    /// For how many Pods there was no room.
    #[must_use]
    pub fn left_out(&self) -> u64 {
        self.left_out
    }

    fn forget(&mut self, uid: &str) {
        if let Some(of) = self.pods.remove(uid) {
            not_due(&mut self.due, uid, &of.trouble);
            one_less(&mut self.of_namespace, &of.pod.namespace);
        }
        self.without_room.remove(uid);
        self.take_back(uid);
    }

    fn take_back(&mut self, uid: &str) {
        if let Some((due, _)) = self.problems.remove(uid) {
            self.turns.remove(&(due, uid.to_owned()));
        }
    }

    fn leave_out(&mut self, pod: &PodRef) {
        if !self.without_room.contains_key(&pod.uid) {
            self.left_out += 1;
            if self.without_room.len() < MAX_PODS_LEFT_OUT {
                self.without_room.insert(pod.uid.clone(), pod.clone());
            }
        }
    }

    /// False: there is no room to remember it.
    fn set(&mut self, pod: &PodRef, trouble: Trouble, known: &Known, now: Instant) -> bool {
        if !self.pods.contains_key(&pod.uid) {
            let of_namespace = self.of_namespace.get(&pod.namespace).copied().unwrap_or_default();
            if self.pods.len() >= MAX_PODS_IN_TROUBLE || of_namespace >= MAX_PODS_IN_TROUBLE_OF_NAMESPACE {
                self.leave_out(pod);
                return false;
            }
            self.of_namespace.insert(pod.namespace.clone(), of_namespace + 1);
            self.without_room.remove(&pod.uid);
        }
        let of = self.pods.entry(pod.uid.clone()).or_insert_with(|| OfPod {
            pod: pod.clone(),
            trouble: Trouble::Over,
            agent: None,
            written: None,
        });
        of.agent.clone_from(&known.agent);
        let before = std::mem::replace(&mut of.trouble, trouble.clone());
        not_due(&mut self.due, &pod.uid, &before);
        if let Trouble::Maybe { until, .. } = trouble {
            self.due.insert((until, pod.uid.clone()));
            return true;
        }
        // What was written just now may not have been read yet.
        let text = trouble.text();
        let may_stand = text.is_none() && of.written.is_some_and(|(at, is_text)| is_text && now < at + CAPTURE_ECHO);
        if known.problem == text && !may_stand {
            self.take_back(&pod.uid);
        } else {
            self.want(&pod.uid, now);
        }
        true
    }

    /// Its annotation is to say what is wrong now.
    fn want(&mut self, uid: &str, now: Instant) {
        let Some(of) = self.pods.get(uid) else { return };
        let (pod, text) = (of.pod.clone(), of.trouble.text());
        if let Some((_, waiting)) = self.problems.get_mut(uid) {
            waiting.text = text;
            return;
        }
        let due = of.written.map_or(now, |(at, _)| now.max(at + PROBLEM_PACE));
        self.turns.insert((due, uid.to_owned()));
        self.problems.insert(uid.to_owned(), (due, ProblemWrite { pod, text }));
    }
}

impl OfPod {
    /// Whether who has said it would tell this replica if it were over.
    fn is_still_said(&self, is_heard: impl Fn(&str) -> bool) -> bool {
        self.agent.as_deref().is_none_or(is_heard)
    }
}

impl Trouble {
    /// What the annotation says.
    fn text(&self) -> Option<String> {
        let text = match self {
            Self::Over | Self::Maybe { .. } => return None,
            Self::NotEnrolled(problem) => format!("not enrolled: {}", problem.text()),
            Self::Refused(why) => format!("refused: {why}"),
            Self::Lost(problem) => format!("lost: {}", problem.text()),
        };
        Some(problem_text(&text))
    }
}

fn one_less(of_namespace: &mut BTreeMap<String, usize>, namespace: &str) {
    if let Some(count) = of_namespace.get_mut(namespace) {
        *count -= 1;
        if *count == 0 {
            of_namespace.remove(namespace);
        }
    }
}

fn not_due(due: &mut BTreeSet<(Instant, String)>, uid: &str, trouble: &Trouble) {
    if let Trouble::Maybe { until, .. } = trouble {
        due.remove(&(*until, uid.to_owned()));
    }
}

fn said(pod: &PodRef, reason: Reason, note: String) -> Said {
    let pod = pod.clone();
    Said { pod, reason, note }
}

fn not_enrolled(pod: &PodRef, problem: Problem) -> Said {
    let note = format!("the mesh does not protect it yet: {}", problem.text());
    said(pod, Reason::NotEnrolled, note)
}
