//! What the replicas of the control plane know of each other, by way of the API server: what agents have proven stands on the Pods, and
//! deleted service accounts in a ConfigMap. There is no state directory for it.
//!
//! *Proven* counts once it is written: what a crash of this replica would take back, no agent has heard. *Lost* counts at once: it
//! only closes.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::notices::Notices;
use super::{ControlPlane, Inner};
use crate::accounts::Accounts;
use crate::capture_states::{CaptureState, Proof};
use crate::compile::Snapshot;
use crate::kubernetes::wishes::{PodRef, Reading, Wishes, Write};
use crate::metrics::Metrics;
use crate::objects::{Object, ObjectId, Pod, World};

#[cfg(test)]
mod tests;

/// What is to be written to the API server. Whoever writes it waits for [`Self::wished`] and [`Self::accounts`].
pub struct Shared {
    wishes: Mutex<Wishes>,
    wished: Notify,
    accounts: watch::Sender<Option<Accounts>>,
    pub notices: Notices,
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            wishes: Mutex::default(),
            wished: Notify::new(),
            accounts: watch::Sender::new(None),
            notices: Notices::default(),
        }
    }
}

impl Shared {
    /// Done when there may be more to write.
    pub async fn wished(&self) {
        self.wished.notified().await;
    }

    /// The next write, or when to ask again.
    ///
    /// # Errors
    /// Not now; `None`: only after [`Self::wished`].
    pub fn take(&self, now: Instant) -> Result<Write, Option<Instant>> {
        let mut wishes = self.wishes.lock();
        wishes.take(now).ok_or_else(|| wishes.due())
    }

    pub fn failed(&self, write: &Write) {
        self.wishes.lock().failed(write, Instant::now());
        self.wished.notify_one();
    }

    pub fn gone(&self, write: &Write) {
        self.wishes.lock().gone(write);
    }

    /// How many writes wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.wishes.lock().waiting()
    }

    /// The newest accounts that are to be kept.
    #[must_use]
    pub fn accounts(&self) -> watch::Receiver<Option<Accounts>> {
        self.accounts.subscribe()
    }

    pub(super) fn keep_accounts(&self, accounts: &Accounts) {
        self.accounts.send_replace(Some(accounts.clone()));
    }

    fn want(&self, pod: PodRef, value: Option<CaptureState>, metrics: &Metrics) {
        let mut wishes = self.wishes.lock();
        if wishes.wanted(&pod.uid) == Some(value) {
            return;
        }
        if wishes.want(pod, value, Instant::now()) {
            metrics
                .capture_writes_waiting
                .set(i64::try_from(wishes.waiting()).unwrap_or(i64::MAX));
            self.wished.notify_one();
        } else {
            metrics.capture_writes_failed.with_label_values(&["no_room"]).inc();
        }
    }

    /// An agent's word on a Pod of its node. True when the state has changed already.
    pub(super) fn take_word(&self, inner: &mut Inner, pod: PodRef, proof: Proof, metrics: &Metrics) -> bool {
        let known = inner.captures.of(&pod.uid);
        let wanted = self.wishes.lock().wanted(&pod.uid).flatten();
        match proof {
            Proof::Pending => false,
            Proof::Proven => {
                if known != Some(CaptureState::Proven) || wanted == Some(CaptureState::Lost) {
                    self.want(pod, Some(CaptureState::Proven), metrics);
                }
                false
            }
            Proof::Lost => {
                if known == Some(CaptureState::Lost) && wanted != Some(CaptureState::Proven) {
                    return false;
                }
                let changed = inner.captures.apply(&pod.uid, Proof::Lost);
                self.want(pod, Some(CaptureState::Lost), metrics);
                changed
            }
        }
    }

    /// Takes over what stands on the Pods.
    pub(super) fn read(&self, inner: &mut Inner, world: &World) {
        let now = Instant::now();
        let mut wishes = self.wishes.lock();
        wishes.expire(now);
        for (id, pod) in pods(world) {
            let Some(state) = pod.annotated else {
                // Only that a removal has come back.
                wishes.read(&pod.uid, None, now);
                continue;
            };
            if wishes.read(&pod.uid, Some(state), now) == Reading::Ours || inner.captures.of(&pod.uid) == Some(state) {
                continue;
            }
            let proof = match state {
                CaptureState::Proven => Proof::Proven,
                CaptureState::Lost => Proof::Lost,
            };
            inner.captures.apply(&pod.uid, proof);
            tracing::info!(pod = %id, state = state.as_str(), "the Pod's capture, as another replica wrote it");
            // The agent has told another replica since: its old word must not be taken again.
            if let Some(words) = inner.reports.get_mut(&pod.node) {
                words.retain(|word| word.uid != pod.uid);
            }
        }
    }

    /// Mends what stands on the Pods: an annotation that somebody took away, and one of a Pod that has left the mesh.
    pub(super) fn mend(&self, inner: &Inner, world: &World, snapshot: &Snapshot, metrics: &Metrics) {
        for (id, pod) in pods(world) {
            let Some(place) = snapshot.pods.get(&pod.uid) else { continue };
            let wanted = if place.is_member { inner.captures.of(&pod.uid) } else { None };
            let is_ours = self.wishes.lock().wanted(&pod.uid).is_some();
            // Where nothing is known, another replica may be putting it right.
            let is_wrong = wanted != pod.annotated || (pod.is_annotation_foreign && wanted.is_some());
            if is_wrong && !is_ours {
                self.want(pod_ref(id, pod), wanted, metrics);
            }
        }
    }
}

impl ControlPlane {
    /// A write has arrived; what it says counts from now on. Blocking.
    pub fn capture_written(&self, write: &Write) {
        let Some(shared) = &self.shared else { return };
        let mut inner = self.inner.lock();
        let newest = shared.wishes.lock().written(write, Instant::now());
        // What was wished meanwhile may go now.
        shared.wished.notify_one();
        self.metrics.capture_writes.inc();
        let proof = match (newest, write.value) {
            (true, Some(CaptureState::Proven)) => Proof::Proven,
            (true, Some(CaptureState::Lost)) => Proof::Lost,
            _ => return,
        };
        if inner.captures.apply(&write.pod.uid, proof) {
            let pod = format!("{}/{}", write.pod.namespace, write.pod.name);
            tracing::info!(pod, ?proof, "the Pod's capture is written down");
            self.publish_soon(&mut inner);
        }
    }
}

impl ControlPlane {
    /// A write of a Pod's capture has had its time to come back: what stands there counts, should somebody have written since. Blocking.
    pub fn look_at_capture(&self, uid: &str) {
        let Some(shared) = &self.shared else { return };
        let mut inner = self.inner.lock();
        if shared.wishes.lock().wanted(uid).is_none() {
            return;
        }
        let world = Arc::clone(&inner.world);
        shared.read(&mut inner, &world);
        self.publish_soon(&mut inner);
    }
}

pub(super) fn pods(world: &World) -> impl Iterator<Item = (&ObjectId, &Pod)> {
    world.iter().filter_map(|(id, object)| match object.as_ref() {
        Object::Pod(pod) => Some((id, pod.as_ref())),
        _ => None,
    })
}

pub(super) fn pod_ref(id: &ObjectId, pod: &Pod) -> PodRef {
    PodRef {
        namespace: id.namespace.clone(),
        name: id.name.clone(),
        uid: pod.uid.clone(),
    }
}
