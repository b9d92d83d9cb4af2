//! What owners of Pods, and operators, are told by way of the API server: Events, and a Pod's annotation.
//!
//! What an agent says is told by the replica that it says it to, and only about Pods of that agent's own node. What follows from the
//! objects themselves, which every replica sees, is told by the one that holds the Lease of who writes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::{ControlPlane, Inner, is_of_node, key_of};
use crate::compile::Snapshot;
use crate::compile::membership::kept_out_because;
use crate::compile::network_policies::{Direction, Finding};
use crate::kubernetes::event_queue::{Dropped, EventQueue, EventWrite, Reason, Subject, Telling};
use crate::kubernetes::pod_notices::{Known, PodNotices, ProblemWrite, Said};
use crate::kubernetes::wishes::PodRef;
use crate::metrics::Metrics;
use crate::objects::{Kind, Object, ObjectId, Pod, World};
use crate::proto::PodWord;
use crate::troubles::Repaired;

#[cfg(test)]
mod tests;

/// As Kubernetes bounds it.
const MAX_INSTANCE_BYTES: usize = 128;

struct State {
    pods: PodNotices,
    events: EventQueue,
    /// Namespaces whose ignored label was told.
    kept_out: BTreeSet<String>,
    /// NetworkPolicies in the way; no more than findings are named.
    policies: BTreeMap<(String, String, Direction), OfPolicy>,
}

struct OfPolicy {
    /// Its uid and generation.
    form: (String, i64),
    is_told: bool,
}

pub struct Notices {
    state: Mutex<State>,
    more_events: Notify,
    more_problems: Notify,
    /// Whether this replica tells what every one sees.
    writer: watch::Sender<bool>,
    instance: Arc<str>,
}

impl Default for Notices {
    fn default() -> Self {
        let instance: Arc<str> = instance().into();
        Self {
            state: Mutex::new(State {
                pods: PodNotices::default(),
                events: EventQueue::new(Arc::clone(&instance)),
                kept_out: BTreeSet::new(),
                policies: BTreeMap::new(),
            }),
            more_events: Notify::new(),
            more_problems: Notify::new(),
            writer: watch::Sender::new(false),
            instance,
        }
    }
}

/// Of each process another one: the Pod's name, in a cluster, and something drawn.
fn instance() -> String {
    let host = std::env::var("HOSTNAME").unwrap_or_default();
    let drawn: u32 = rand::random();
    let name = format!("{drawn:08x}-{host}");
    name[..name.floor_char_boundary(MAX_INSTANCE_BYTES)].to_owned()
}

/// An agent's word on a Pod of its node, and what is known of it beside.
pub struct Heard {
    pod: PodRef,
    word: PodWord,
    known: Known,
}

impl Notices {
    #[must_use]
    pub fn instance(&self) -> &str {
        &self.instance
    }

    pub async fn more_events(&self) {
        self.more_events.notified().await;
    }

    pub async fn more_problems(&self) {
        self.more_problems.notified().await;
    }

    /// The next one.
    ///
    /// # Errors
    /// When to ask again; `None`: only after [`Self::more_events`].
    pub fn take_event(&self, control: &ControlPlane, now: Instant, at: SystemTime) -> Result<EventWrite, Option<Instant>> {
        let mut state = self.state.lock();
        let due = state.pods.take_due(now, |node| control.hears(node));
        if !due.is_empty() {
            self.more_problems.notify_one();
        }
        for said in due {
            state.say(said, (now, at), &control.metrics);
        }
        state.events.take().ok_or_else(|| state.pods.due())
    }

    /// # Errors
    /// It is not tried again.
    pub fn event_again(&self, event: EventWrite, now: Instant) -> Result<(), Dropped> {
        self.state.lock().events.again(event, now)
    }

    /// # Errors
    /// As [`Self::take_event`].
    pub fn take_problem(&self, control: &ControlPlane, now: Instant) -> Result<ProblemWrite, Option<Instant>> {
        self.state.lock().pods.take_problem(now, |node| control.hears(node))
    }

    pub fn problem_again(&self, problem: ProblemWrite, now: Instant) {
        self.state.lock().pods.again(problem, now);
    }

    pub(super) fn hear(&self, heard: Vec<Heard>, metrics: &Metrics) {
        let when = (Instant::now(), SystemTime::now());
        self.change(metrics, |state| {
            for Heard { pod, word, known } in heard {
                if !word.repaired.is_empty() && !known.is_ending {
                    let (pod, note) = (pod.clone(), word.repaired.text("its"));
                    let reason = Reason::Repaired;
                    state.say(Said { pod, reason, note }, when, metrics);
                }
                if let Some(said) = state.pods.hear(&pod, word.proof, word.problem, &known, when.0) {
                    state.say(said, when, metrics);
                }
            }
        });
    }

    /// What follows from the objects: who has left, and, where this replica is to tell it, who asks for the mesh and cannot be in it.
    pub(super) fn look(&self, control: &ControlPlane, inner: &Inner, snapshot: &Snapshot) {
        let (world, when) = (&inner.world, (Instant::now(), SystemTime::now()));
        let metrics = &control.metrics;
        let is_writer = *self.writer.borrow();
        self.change(metrics, |state| {
            let is_ours = |pod: &PodRef| is_followed(inner, snapshot, pod, is_writer);
            state.pods.retain(is_ours, |node| control.hears(node));
            if !is_writer {
                return;
            }
            for (id, pod) in super::shared::pods(world).filter(|(_, pod)| pod.problem.is_some()) {
                if snapshot.pods.get(&pod.uid).is_some_and(|place| !place.is_member) && !is_refused(snapshot, id) {
                    state
                        .pods
                        .outside(&super::shared::pod_ref(id, pod), &known(inner, pod), when.0);
                }
            }
            for (name, refusal) in &snapshot.enrolment.refused {
                let Some((id, pod)) = named(world, name) else { continue };
                let (of, why) = (super::shared::pod_ref(&id, pod), refusal.to_string());
                if let Some(said) = state.pods.refused(&of, &why, &known(inner, pod), when.0) {
                    state.say_once(said, when, metrics);
                }
            }
            let kept_out = &snapshot.enrolment.kept_out;
            state.kept_out.retain(|name| kept_out.contains(name));
            for name in kept_out {
                if state.kept_out.contains(name) {
                    continue;
                }
                let telling = Telling {
                    subject: cluster_wide("Namespace", name),
                    reason: Reason::LabelIgnored,
                    note: kept_out_because(),
                    generation: Some(0),
                };
                if state.tell(telling, when, metrics) {
                    state.kept_out.insert(name.clone());
                }
            }
        });
    }

    /// NetworkPolicies in the way, each once in a form. True: all are told by whoever is to tell them. What is dropped counts once, and
    /// is tried again at the next look.
    pub(super) fn policies(
        &self,
        world: &World,
        findings: &[Finding],
        (now, at): (Instant, SystemTime),
        metrics: &Metrics,
    ) -> bool {
        if !*self.writer.borrow() {
            return true;
        }
        let mut all_told = true;
        self.change(metrics, |state| {
            let before = std::mem::take(&mut state.policies);
            for finding in findings {
                let id = ObjectId {
                    kind: Kind::NetworkPolicy,
                    namespace: finding.namespace.clone(),
                    name: finding.name.clone(),
                };
                let Some(Object::NetworkPolicy(policy)) = world.get(&id).map(AsRef::as_ref) else {
                    continue;
                };
                let key = (id.namespace.clone(), id.name.clone(), finding.direction);
                let form = (policy.uid.clone(), policy.generation);
                let known = before.get(&key).filter(|of| of.form == form);
                let mut is_told = known.is_some_and(|of| of.is_told);
                if !is_told {
                    let telling = Telling {
                        subject: Subject {
                            api_version: "networking.k8s.io/v1",
                            kind: "NetworkPolicy",
                            namespace: id.namespace,
                            name: id.name,
                            uid: policy.uid.clone(),
                        },
                        reason: Reason::PortBlocked,
                        note: finding.advice(),
                        generation: Some(policy.generation),
                    };
                    let said = state.events.say(telling, now, at);
                    is_told = said.is_ok();
                    if let (Err(dropped), None) = (said, known) {
                        metrics.event_dropped(dropped);
                    }
                }
                all_told &= is_told;
                state.policies.insert(key, OfPolicy { form, is_told });
            }
        });
        all_told
    }

    fn change(&self, metrics: &Metrics, change: impl FnOnce(&mut State)) {
        let mut state = self.state.lock();
        let left_out = state.pods.left_out();
        change(&mut state);
        for _ in left_out..state.pods.left_out() {
            metrics.event_dropped(Dropped::NoRoom);
        }
        drop(state);
        self.more_events.notify_one();
        self.more_problems.notify_one();
    }
}

impl State {
    fn say(&mut self, said: Said, when: (Instant, SystemTime), metrics: &Metrics) {
        self.tell(telling(said, None), when, metrics);
    }

    /// What every replica sees alike.
    fn say_once(&mut self, said: Said, when: (Instant, SystemTime), metrics: &Metrics) {
        self.tell(telling(said, Some(0)), when, metrics);
    }

    /// False: it is dropped, and counted.
    fn tell(&mut self, telling: Telling, (now, at): (Instant, SystemTime), metrics: &Metrics) -> bool {
        let said = self.events.say(telling, now, at);
        if let Err(dropped) = said {
            metrics.event_dropped(dropped);
        }
        said.is_ok()
    }
}

fn telling(Said { pod, reason, note }: Said, generation: Option<i64>) -> Telling {
    let PodRef { namespace, name, uid } = pod;
    let subject = Subject {
        api_version: "v1",
        kind: "Pod",
        namespace,
        name,
        uid,
    };
    Telling {
        subject,
        reason,
        note,
        generation,
    }
}

fn cluster_wide(kind: &'static str, name: &str) -> Subject {
    Subject {
        api_version: "v1",
        kind,
        namespace: String::new(),
        name: name.to_owned(),
        uid: String::new(),
    }
}

fn known(inner: &Inner, pod: &Pod) -> Known {
    Known {
        capture: inner.captures.of(&pod.uid),
        problem: pod.problem.clone(),
        is_ending: pod.terminating || pod.finished,
        agent: None,
    }
}

fn pod_of<'a>(world: &'a World, id: &ObjectId) -> Option<&'a Pod> {
    match world.get(id)?.as_ref() {
        Object::Pod(pod) => Some(pod),
        _ => None,
    }
}

/// Of `namespace/name`.
fn named<'a>(world: &'a World, name: &str) -> Option<(ObjectId, &'a Pod)> {
    let (namespace, name) = name.split_once('/')?;
    let id = pod_id(namespace, name);
    let pod = pod_of(world, &id)?;
    Some((id, pod))
}

fn pod_id(namespace: &str, name: &str) -> ObjectId {
    ObjectId {
        kind: Kind::Pod,
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    }
}

fn is_refused(snapshot: &Snapshot, id: &ObjectId) -> bool {
    let refused = &snapshot.enrolment.refused;
    !refused.is_empty() && refused.contains_key(&format!("{}/{}", id.namespace, id.name))
}

/// Whether this replica is the one that tells of the Pod: it has heard its agent last, or tells of all that need no agent.
fn is_followed(inner: &Inner, snapshot: &Snapshot, pod: &PodRef, is_writer: bool) -> bool {
    let id = pod_id(&pod.namespace, &pod.name);
    let Some(there) = pod_of(&inner.world, &id).filter(|there| there.uid == pod.uid) else {
        return false;
    };
    let Some(place) = snapshot.pods.get(&pod.uid) else {
        return false;
    };
    if there.terminating || there.finished {
        return false;
    }
    if !place.is_member || is_refused(snapshot, &id) {
        return is_writer;
    }
    let words = inner.reports.get(&place.node);
    words.is_some_and(|words| words.iter().any(|word| word.uid == pod.uid))
}

impl ControlPlane {
    /// What of a node's words people may be told: of its own members, and not of those that are refused, which need no agent's word.
    pub(super) fn heard(inner: &Inner, snapshot: &Snapshot, node: &str, words: &mut [PodWord]) -> Vec<Heard> {
        let mut heard = Vec::new();
        for word in words.iter_mut() {
            // They are told once, and the word is kept.
            let repaired = std::mem::take(&mut word.repaired);
            if !is_of_node(snapshot, node, word) {
                continue;
            }
            let Some(uid) = key_of(snapshot, word) else { continue };
            let id = pod_id(&word.namespace, &word.name);
            let Some(pod) = pod_of(&inner.world, &id).filter(|_| !is_refused(snapshot, &id)) else {
                continue;
            };
            heard.push(Heard {
                pod: PodRef {
                    namespace: id.namespace,
                    name: id.name,
                    uid,
                },
                word: PodWord {
                    repaired,
                    ..word.clone()
                },
                known: Known {
                    agent: Some(node.to_owned()),
                    ..known(inner, pod)
                },
            });
        }
        heard
    }

    /// Whether a node's agent tells this replica what it proves. Once its stream has ended, it may tell another one.
    fn hears(&self, node: &str) -> bool {
        let nodes = self.nodes.lock();
        nodes.get(node).is_some_and(|status| status.report_streams > 0)
    }

    /// Pieces of what a node's Pods share were missing, as its agent says.
    pub fn node_repaired(&self, node: &str, repaired: &Repaired) {
        let Some(shared) = self.shared.as_ref().filter(|_| !repaired.is_empty()) else {
            return;
        };
        let telling = Telling {
            subject: Subject {
                // As the kubelet writes it, by which `kubectl describe node` finds it.
                uid: node.to_owned(),
                ..cluster_wide("Node", node)
            },
            reason: Reason::Repaired,
            note: repaired.text("the node's"),
            generation: None,
        };
        let when = (Instant::now(), SystemTime::now());
        let notices = &shared.notices;
        notices.change(&self.metrics, |state| {
            state.tell(telling, when, &self.metrics);
        });
    }

    /// Whether this replica holds the Lease of who writes.
    pub fn set_writer(&self, is_writer: bool) {
        if let Some(shared) = &self.shared {
            let change = |before: &mut bool| std::mem::replace(before, is_writer) != is_writer;
            shared.notices.writer.send_if_modified(change);
        }
    }

    /// Changes of [`Self::set_writer`].
    #[must_use]
    pub fn writer(&self) -> Option<watch::Receiver<bool>> {
        self.shared.as_ref().map(|shared| shared.notices.writer.subscribe())
    }

    /// Once this replica is the one that tells what all see, it looks at what it has not told yet; for ever.
    pub async fn tell_as_writer(self: Arc<Self>) {
        let Some(mut writer) = self.writer() else { return };
        while writer.wait_for(|is_writer| *is_writer).await.is_ok() {
            let control = Arc::clone(&self);
            let looked = tokio::task::spawn_blocking(move || {
                let inner = control.inner.lock();
                if let Some(shared) = &control.shared {
                    shared.notices.look(&control, &inner, &control.snapshot());
                }
            });
            drop(looked.await);
            if writer.changed().await.is_err() {
                return;
            }
        }
    }
}
