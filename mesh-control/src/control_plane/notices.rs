//! What owners of Pods, and operators, are told by the API server of what agents say: Events, and a Pod's problem.

use std::time::SystemTime;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::{ControlPlane, Inner, is_of_node, key_of};
use crate::compile::Snapshot;
use crate::compile::membership::kept_out_because;
use crate::kubernetes::event_queue::{Dropped, EventQueue, EventWrite, Reason, Subject};
use crate::kubernetes::pod_notices::{Known, PodNotices, ProblemWrite, Said};
use crate::kubernetes::wishes::PodRef;
use crate::metrics::Metrics;
use crate::objects::{Kind, Object, ObjectId, Pod, World};
use crate::proto::PodWord;

#[cfg(test)]
mod tests;

/// Something to be written.
#[derive(Debug)]
pub enum Notice {
    Event(EventWrite),
    Problem(ProblemWrite),
}

pub struct Notices {
    known: Mutex<(PodNotices, EventQueue)>,
    more: Notify,
}

impl Default for Notices {
    fn default() -> Self {
        Self {
            known: Mutex::new((PodNotices::default(), EventQueue::new(Instant::now()))),
            more: Notify::new(),
        }
    }
}

impl Notices {
    pub async fn wait(&self) {
        self.more.notified().await;
    }

    /// The next one, or when to ask again.
    ///
    /// # Errors
    /// Not now; `None`: only after [`Self::wait`].
    pub fn take(&self, now: Instant, at: SystemTime, metrics: &Metrics) -> Result<Notice, Option<Instant>> {
        let mut known = self.known.lock();
        let (pods, events) = &mut *known;
        for said in pods.take_due(now) {
            say(events, said, now, at, metrics);
        }
        if let Some(event) = events.take(now) {
            return Ok(Notice::Event(event));
        }
        if let Some(problem) = pods.take_problem() {
            return Ok(Notice::Problem(problem));
        }
        Err(pods.due().into_iter().chain(events.due()).min())
    }

    /// # Errors
    /// It is not tried again.
    pub fn again(&self, event: EventWrite, now: Instant) -> Result<(), Dropped> {
        let again = self.known.lock().1.again(event, now);
        self.more.notify_one();
        again
    }

    /// What an agent says of its node's Pods, before it changes what is known of them.
    pub(super) fn hear(&self, inner: &Inner, snapshot: &Snapshot, node: &str, words: &[PodWord], metrics: &Metrics) {
        let (now, at) = (Instant::now(), SystemTime::now());
        let mut known = self.known.lock();
        let (pods, events) = &mut *known;
        for word in words.iter().filter(|word| is_of_node(snapshot, node, word)) {
            let Some(uid) = key_of(snapshot, word) else { continue };
            let id = ObjectId {
                kind: Kind::Pod,
                namespace: word.namespace.clone(),
                name: word.name.clone(),
            };
            let stands = Known {
                capture: inner.captures.of(&uid),
                problem: pod(&inner.world, &id).and_then(|pod| pod.problem.as_deref()),
            };
            let pod = PodRef {
                namespace: id.namespace,
                name: id.name,
                uid,
            };
            if !word.repaired.is_empty() {
                let note = format!(
                    "pieces of its capture were missing and are put back: {}",
                    word.repaired.join(", ")
                );
                say(events, (pod.clone(), Reason::Repaired, note), now, at, metrics);
            }
            if let Some(said) = pods.hear(&pod, word.proof, &word.reason, stands, now) {
                say(events, said, now, at, metrics);
            }
        }
        self.shown(pods, metrics);
    }

    /// What follows from the objects themselves: who asks for the mesh and cannot be in it, and who has left.
    pub(super) fn look(&self, inner: &Inner, snapshot: &Snapshot, before: &Snapshot, metrics: &Metrics) {
        let (now, at) = (Instant::now(), SystemTime::now());
        let mut known = self.known.lock();
        let (pods, events) = &mut *known;
        pods.retain(|uid| snapshot.pods.contains_key(uid));
        for (id, pod) in super::shared::pods(&inner.world) {
            let Some(place) = snapshot.pods.get(&pod.uid) else { continue };
            let stands = Known {
                capture: None,
                problem: pod.problem.as_deref(),
            };
            let of = || super::shared::pod_ref(id, pod);
            let refusal = snapshot.enrolment.refused.get(&(id.namespace.clone() + "/" + &id.name));
            match refusal {
                Some(refusal) => {
                    if let Some(said) = pods.refused(&of(), &refusal.to_string(), stands, now) {
                        say(events, said, now, at, metrics);
                    }
                }
                None if !place.is_member => pods.outside(&of(), stands, now),
                None if pods.is_known(&pod.uid) => {
                    let words = inner.reports.get(&place.node);
                    let is_heard = words.is_some_and(|words| words.iter().any(|word| word.uid == pod.uid));
                    pods.see(&pod.uid, stands, is_heard, now);
                }
                None => {}
            }
        }
        let new = |name: &&String| !before.enrolment.kept_out.contains(name);
        for name in snapshot.enrolment.kept_out.iter().filter(new) {
            let subject = cluster_wide("Namespace", name);
            tell(
                events,
                &subject,
                Reason::LabelIgnored,
                &kept_out_because(),
                (now, at),
                metrics,
            );
        }
        self.shown(pods, metrics);
    }

    fn shown(&self, pods: &PodNotices, metrics: &Metrics) {
        let size = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        metrics.pods_in_trouble.set(size(pods.in_trouble_count()));
        metrics
            .pods_in_trouble_left_out
            .set(i64::try_from(pods.left_out()).unwrap_or(i64::MAX));
        self.more.notify_one();
    }

    /// About something else than a Pod's protection.
    pub fn tell(&self, subject: &Subject, reason: Reason, note: &str, metrics: &Metrics) {
        let when = (Instant::now(), SystemTime::now());
        tell(&mut self.known.lock().1, subject, reason, note, when, metrics);
        self.more.notify_one();
    }

    /// `namespace/name` → what is wrong.
    pub(super) fn in_trouble(&self) -> std::collections::BTreeMap<String, String> {
        self.known.lock().0.in_trouble()
    }
}

impl ControlPlane {
    /// Pieces of a node's own capture were missing, as its agent says.
    pub fn node_repaired(&self, node: &str, pieces: &[String]) {
        tracing::warn!(node, repaired = ?pieces, "the agent put back pieces of its node's capture");
        let Some(shared) = &self.shared else { return };
        let note = format!(
            "pieces of the node's capture were missing and are put back: {}",
            pieces.join(", ")
        );
        let subject = Subject {
            // As the kubelet writes it, by which `kubectl describe node` finds it.
            uid: node.to_owned(),
            ..cluster_wide("Node", node)
        };
        shared.notices.tell(&subject, Reason::Repaired, &note, &self.metrics);
    }
}

#[must_use]
pub fn cluster_wide(kind: &'static str, name: &str) -> Subject {
    Subject {
        api_version: "v1",
        kind,
        namespace: String::new(),
        name: name.to_owned(),
        uid: String::new(),
    }
}

fn pod<'a>(world: &'a World, id: &ObjectId) -> Option<&'a Pod> {
    match world.get(id)?.as_ref() {
        Object::Pod(pod) => Some(pod),
        _ => None,
    }
}

#[must_use]
pub fn pod_subject(pod: &PodRef) -> Subject {
    Subject {
        api_version: "v1",
        kind: "Pod",
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        uid: pod.uid.clone(),
    }
}

fn say(events: &mut EventQueue, (pod, reason, note): Said, now: Instant, at: SystemTime, metrics: &Metrics) {
    tell(events, &pod_subject(&pod), reason, &note, (now, at), metrics);
}

fn tell(
    events: &mut EventQueue,
    subject: &Subject,
    reason: Reason,
    note: &str,
    (now, at): (Instant, SystemTime),
    metrics: &Metrics,
) {
    if let Err(dropped) = events.say(subject, reason, note, now, at) {
        metrics.event_dropped(dropped);
    }
}
