//! What the agents have proven: pending, proven, lost. Pure; [`crate::control_plane`] keeps it on disk.
//!
//! A proof falls only by its own agent's word or with the Pod, never with a stream, a report that leaves the Pod out, or a
//! restart of either side. A Pod proven once never becomes pending again: that would send it cleartext.
//!
//! A Pod that its agent has released while its manifest stays is told as lost, not left proven: nobody takes tunnels there any
//! more, so that peers must be refused at once instead of trying; and not forgotten: it was proven, and what it would be sent
//! in clear was meant for a captured Pod. It ends with the manifest, with the Pod's opting out, or with a new proof.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::limits::MAX_CAPTURE_STATES;

#[cfg(test)]
mod tests;

/// A Pod's `metadata.uid`; where a manifest has none, `namespace/name`.
pub type PodKey = String;

#[must_use]
pub fn pod_key(uid: &str, namespace: &str, name: &str) -> PodKey {
    if uid.is_empty() {
        format!("{namespace}/{name}")
    } else {
        uid.to_owned()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CaptureState {
    Proven,
    Lost,
}

impl CaptureState {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Proven => "proven",
            Self::Lost => "lost",
        }
    }

    /// `None`: no state's name.
    #[must_use]
    pub fn of(text: &str) -> Option<Self> {
        [Self::Proven, Self::Lost].into_iter().find(|state| state.as_str() == text)
    }
}

/// An agent's word on one Pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proof {
    Pending,
    Proven,
    Lost,
}

/// A Pod that is not in it is pending.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaptureStates {
    pods: BTreeMap<PodKey, CaptureState>,
}

impl CaptureStates {
    #[must_use]
    pub fn of(&self, key: &str) -> Option<CaptureState> {
        self.pods.get(key).copied()
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.pods.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pods.is_empty()
    }

    /// Takes an agent's word on a Pod of its node. True when the state has changed.
    pub fn apply(&mut self, key: &str, proof: Proof) -> bool {
        let state = match proof {
            // An agent that has just restarted says so of Pods that it has yet to prove again: not a withdrawal.
            Proof::Pending => return false,
            Proof::Proven => CaptureState::Proven,
            Proof::Lost => CaptureState::Lost,
        };
        if self.pods.get(key) == Some(&state) {
            return false;
        }
        self.pods.insert(key.to_owned(), state);
        true
    }

    /// Forgets Pods that have left the mesh while they live on; states of Pods that are gone are kept, because a folder that is
    /// not mounted yet looks just the same, up to a bound. `is_member` is `None` for Pods that are not in the world.
    pub fn prune(&mut self, is_member: impl Fn(&str) -> Option<bool>) -> bool {
        let before = self.pods.len();
        self.pods.retain(|key, _| is_member(key) != Some(false));
        let mut surplus = self.pods.len().saturating_sub(MAX_CAPTURE_STATES);
        self.pods.retain(|key, _| {
            let forget = surplus > 0 && is_member(key).is_none();
            surplus -= usize::from(forget);
            !forget
        });
        self.pods.len() != before
    }
}
