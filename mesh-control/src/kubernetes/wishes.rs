//! What is to be written on Pods of what their agents have proven, and what of it is on its way. Pure.
//!
//! Between a write and its coming back by the watch older words are still read: until then, or for [`CAPTURE_ECHO`], what was
//! written counts and not what is read.

use std::collections::{BTreeMap, BTreeSet};

use tokio::time::Instant;

use crate::capture_states::CaptureState;
use crate::limits::{CAPTURE_ECHO, CAPTURE_RETRY, CAPTURE_RETRY_MOST, MAX_CAPTURE_WRITES};

#[cfg(test)]
mod tests;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodRef {
    pub namespace: String,
    pub name: String,
    pub uid: String,
}

/// A write to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    pub pod: PodRef,
    /// `None`: the annotation is to be removed.
    pub value: Option<CaptureState>,
    turn: u64,
}

/// Whose word on a Pod counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// What the API server says.
    Theirs,
    /// What this replica has yet to write, or wrote just now.
    Ours,
}

#[derive(Debug)]
struct Wish {
    pod: PodRef,
    value: Option<CaptureState>,
    stage: Stage,
    failures: u32,
    /// Which wish it is: what comes back of an earlier one says nothing of this one.
    turn: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Queued(Instant),
    /// One write of a Pod at a time, so that they arrive in order.
    OnItsWay,
    Written(Instant),
}

/// By the Pods' uids; at most [`MAX_CAPTURE_WRITES`].
#[derive(Debug, Default)]
pub struct Wishes {
    pods: BTreeMap<String, Wish>,
    queue: BTreeSet<(Instant, u64, String)>,
    turns: u64,
}

impl Wishes {
    /// False: there is no room.
    pub fn want(&mut self, pod: PodRef, value: Option<CaptureState>, now: Instant) -> bool {
        if self.wanted(&pod.uid) == Some(value) {
            return true;
        }
        if !self.pods.contains_key(&pod.uid) && self.pods.len() >= MAX_CAPTURE_WRITES {
            return false;
        }
        self.turns += 1;
        let uid = pod.uid.clone();
        let mut stage = Stage::Queued(now);
        if let Some(before) = self.pods.get(&uid) {
            match before.stage {
                Stage::Queued(due) => {
                    self.queue.remove(&(due, before.turn, uid.clone()));
                }
                Stage::OnItsWay => stage = Stage::OnItsWay,
                Stage::Written(_) => {}
            }
        }
        let wish = Wish {
            pod,
            value,
            stage,
            failures: 0,
            turn: self.turns,
        };
        if stage != Stage::OnItsWay {
            self.queue.insert((now, wish.turn, uid.clone()));
        }
        self.pods.insert(uid, wish);
        true
    }

    /// What is wished of a Pod, or was just written.
    #[must_use]
    pub fn wanted(&self, uid: &str) -> Option<Option<CaptureState>> {
        self.pods.get(uid).map(|wish| wish.value)
    }

    /// How many wait for their turn.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.queue.len()
    }

    /// When [`Self::take`] will have something.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        self.queue.first().map(|(due, _, _)| *due)
    }

    /// The next write, if it is time for one. [`Self::written`], [`Self::failed`] or [`Self::gone`] must follow.
    pub fn take(&mut self, now: Instant) -> Option<Write> {
        if self.due()? > now {
            return None;
        }
        let (_, _, uid) = self.queue.pop_first()?;
        let wish = self.pods.get_mut(&uid)?;
        wish.stage = Stage::OnItsWay;
        Some(Write {
            pod: wish.pod.clone(),
            value: wish.value,
            turn: wish.turn,
        })
    }

    /// The API server has it. True when nothing else is wished by now.
    pub fn written(&mut self, write: &Write, now: Instant) -> bool {
        self.back(write, now, |wish| wish.stage = Stage::Written(now))
    }

    /// It is tried again later.
    pub fn failed(&mut self, write: &Write, now: Instant) {
        let mut again = None;
        self.back(write, now, |wish| {
            let pause = CAPTURE_RETRY
                .saturating_mul(1 << wish.failures.min(16))
                .min(CAPTURE_RETRY_MOST);
            wish.failures += 1;
            wish.stage = Stage::Queued(now + pause);
            again = Some((now + pause, wish.turn, wish.pod.uid.clone()));
        });
        self.queue.extend(again);
    }

    /// There is no such Pod any longer.
    pub fn gone(&mut self, write: &Write) {
        self.pods.remove(&write.pod.uid);
    }

    fn back(&mut self, write: &Write, now: Instant, then: impl FnOnce(&mut Wish)) -> bool {
        let Some(wish) = self.pods.get_mut(&write.pod.uid) else {
            return false;
        };
        if wish.turn == write.turn {
            then(wish);
            return true;
        }
        // Something else was wished meanwhile: now it may go.
        wish.stage = Stage::Queued(now);
        self.queue.insert((now, wish.turn, write.pod.uid.clone()));
        false
    }

    /// What the API server says of a Pod was read.
    pub fn read(&mut self, uid: &str, value: Option<CaptureState>, now: Instant) -> Reading {
        match self.pods.get(uid) {
            None => Reading::Theirs,
            Some(wish) => match wish.stage {
                Stage::Written(at) if wish.value == value || now >= at + CAPTURE_ECHO => {
                    self.pods.remove(uid);
                    Reading::Theirs
                }
                _ => Reading::Ours,
            },
        }
    }

    /// Forgets what was written long ago, of Pods that are not read any longer.
    pub fn expire(&mut self, now: Instant) {
        self.pods
            .retain(|_, wish| !matches!(wish.stage, Stage::Written(at) if now >= at + CAPTURE_ECHO));
    }
}
