//! `--follow-pods`: the node's enrolments are made to be what the control plane's list says. Pods that run already are found by
//! their uid and enrolled as they are; those that leave are released: at once who is listed as no member, who is not listed any more
//! once no process is in its namespace. While the control plane is away nothing is released.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use parking_lot::Mutex;
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

use super::plan::{Known, Plan, plan};
use super::standing::Why;
use super::{LEAVING_GRACE, PodError, Pods};
use crate::capture::{FindError, Found, Origin, PodToEnroll, Wanted};
use crate::discovery::backoff::Backoff;
use crate::discovery::node_pods::{ListedPod, NodeList, NodeLists};
use crate::discovery::noticed::failing as failing_member;
use crate::discovery::report::Proof;

/// After something failed, before it is tried again.
const FIRST_RETRY: Duration = Duration::from_millis(250);
const LONGEST_RETRY: Duration = Duration::from_secs(10);
/// Between two turns, whatever happens: changes come in bursts, and a walk over a node's processes costs some milliseconds.
const PACE: Duration = Duration::from_millis(50);
/// Without any change, before everything is compared again.
const IDLE: Duration = Duration::from_secs(5);
/// Enrolments at a time.
const CONCURRENT: usize = 8;
/// Releases at a time, which mostly wait for [`LEAVING_GRACE`].
const CONCURRENT_RELEASES: usize = 64;

/// How following stands, for metrics and the admin dump.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Followed {
    /// Whether the control plane has told of the node's Pods.
    pub is_told: bool,
    pub members: usize,
    /// Members that have no address yet.
    pub waiting: usize,
    /// `namespace/name` → why the Pod is not enrolled, or released, as it should be.
    pub failing: BTreeMap<String, String>,
    /// `namespace/name` → why the Pod cannot be a member.
    pub refused: BTreeMap<String, String>,
    /// Failed attempts by reason, since the start.
    #[serde(skip)]
    pub failures: BTreeMap<&'static str, u64>,
}

/// A Pod with which something failed.
struct Attempt {
    backoff: Backoff,
    due: Instant,
    /// Empty: it was done.
    why: Why,
}

pub struct Following {
    pods: Arc<Pods>,
    lists: NodeLists,
    attempts: HashMap<Arc<str>, Attempt>,
    shown: Arc<Mutex<Followed>>,
}

impl Following {
    #[must_use]
    pub fn new(pods: Arc<Pods>, lists: NodeLists, shown: Arc<Mutex<Followed>>) -> Self {
        Self {
            pods,
            lists,
            attempts: HashMap::new(),
            shown,
        }
    }

    /// For ever.
    pub async fn run(mut self) {
        let mut status = self.pods.status();
        loop {
            status.mark_unchanged();
            let list = self.lists.borrow_and_update().clone();
            if let Some(list) = list {
                self.turn(&list).await;
            }
            tokio::time::sleep(PACE).await;
            let next = self.attempts.values().map(|attempt| attempt.due).min();
            let next = next.unwrap_or_else(|| Instant::now() + IDLE).min(Instant::now() + IDLE);
            tokio::select! {
                changed = self.lists.changed() => if changed.is_err() { return },
                changed = status.changed() => if changed.is_err() { return },
                () = sleep_until(next) => {}
            }
        }
    }

    async fn turn(&mut self, list: &Arc<NodeList>) {
        let enrolled = self.pods.known();
        let plan = plan(list, &enrolled);
        self.pods.ended.lock().retain(|uid| list.pods.contains_key(uid));
        let in_plan = [&plan.find, &plan.release, &plan.complete, &plan.vanished];
        self.attempts.retain(|uid, _| in_plan.iter().any(|uids| uids.contains(uid)));
        self.show(list, &plan);
        let now = Instant::now();
        let is_due = |uid: &&Arc<str>| self.attempts.get(*uid).is_none_or(|attempt| attempt.due <= now);
        let leaving = plan.release.iter().filter(is_due).cloned();
        let mut release: Vec<(Arc<str>, Duration)> = leaving.map(|uid| (uid, LEAVING_GRACE)).collect();
        let begun = plan.complete.iter().filter(is_due).cloned();
        release.extend(begun.map(|uid| (uid, Duration::ZERO)));
        let vanished: Vec<Arc<str>> = plan.vanished.iter().filter(is_due).cloned().collect();
        let find: Vec<Arc<str>> = plan.find.iter().filter(is_due).cloned().collect();
        let mut outcomes: Vec<(Arc<str>, Result<(), Why>)> = Vec::new();
        if !vanished.is_empty() {
            let (still_running, ended) = self.still_running(vanished).await;
            release.extend(ended.into_iter().map(|uid| (uid, Duration::ZERO)));
            outcomes.extend(still_running);
        }
        let releases: Vec<_> = (release.into_iter())
            .map(|(uid, grace)| {
                let pods = self.pods.clone();
                async move {
                    info!(%uid, "the Pod is no longer one of the mesh's on this node");
                    let released = to_its_end(pods.release_listed(uid.clone(), grace)).await;
                    (uid, released)
                }
            })
            .collect();
        let released: Vec<_> = futures_util::stream::iter(releases)
            .buffer_unordered(CONCURRENT_RELEASES)
            .collect()
            .await;
        outcomes.extend(released);
        if !find.is_empty() {
            outcomes.extend(self.find_and_enroll(list, &enrolled, find).await);
        }
        for (uid, outcome) in outcomes {
            self.note(list, uid, outcome);
        }
        self.show(list, &plan);
    }

    /// Of those that are not listed: which have processes, with that failure, and which have none.
    async fn still_running(&self, vanished: Vec<Arc<str>>) -> (Vec<(Arc<str>, Result<(), Why>)>, Vec<Arc<str>>) {
        let inhabited = match self.pods.capture.inhabited(&vanished).await {
            Ok(inhabited) => inhabited,
            Err(error) => {
                warn!(%error, "the node's processes cannot be looked at");
                vanished.iter().cloned().collect()
            }
        };
        let (running, ended): (Vec<_>, Vec<_>) = vanished.into_iter().partition(|uid| inhabited.contains(uid));
        let why = Why::new(
            "still_running",
            "the control plane does not list it any longer, and its processes run: it stays captured",
        );
        (running.into_iter().map(|uid| (uid, Err(why.clone()))).collect(), ended)
    }

    async fn find_and_enroll(
        &self,
        list: &Arc<NodeList>,
        enrolled: &BTreeMap<Arc<str>, Known>,
        uids: Vec<Arc<str>>,
    ) -> Vec<(Arc<str>, Result<(), Why>)> {
        let wanted = uids.iter().filter_map(|uid| {
            Some(Wanted {
                uid: uid.clone(),
                addresses: list.pods.get(uid)?.addresses.clone(),
            })
        });
        let mut found = match self.pods.capture.find_pods(wanted.collect()).await {
            Ok(found) => found,
            Err(error) => {
                warn!(%error, "the node's processes cannot be looked at");
                HashMap::new()
            }
        };
        let attempt = |uid: Arc<str>| {
            let found = found.remove(&uid);
            let (pods, pod) = (self.pods.clone(), list.pods.get(&uid).cloned());
            let known = enrolled.get(&uid).copied();
            let has_ended = self.pods.ended.lock().contains(&uid);
            async move {
                let outcome = match (found, pod) {
                    (Some(Ok(found)), Some(pod)) => to_its_end(pods.enroll_found(uid.clone(), pod, found, known)).await,
                    // It is enrolled; whatever its proof lacks is said where it is proven.
                    (Some(Err(_)), Some(_)) if known.is_some() => Ok(()),
                    // Its end is on its way to the control plane. Looked for all the same: a sandbox may be made again unseen.
                    (Some(Err(FindError::NoProcess)), Some(_)) if has_ended => Ok(()),
                    (Some(Err(error)), Some(_)) => Err(Why::new(error.reason(), error.to_string())),
                    _ => Err(Why::new("not_looked_for", "the node's processes could not be looked at")),
                };
                (uid, outcome)
            }
        };
        let attempts: Vec<_> = uids.into_iter().map(attempt).collect();
        futures_util::stream::iter(attempts)
            .buffer_unordered(CONCURRENT)
            .collect()
            .await
    }

    fn note(&mut self, list: &NodeList, uid: Arc<str>, outcome: Result<(), Why>) {
        let attempt = self.attempts.entry(uid.clone()).or_insert_with(|| Attempt {
            backoff: Backoff::new(FIRST_RETRY, LONGEST_RETRY),
            due: Instant::now(),
            why: Why::default(),
        });
        // Also after a success: one that stays unproven is looked for again, with pauses.
        attempt.due = Instant::now() + attempt.backoff.after_failure();
        match outcome {
            Ok(()) => attempt.why = Why::default(),
            Err(why) => {
                *self.shown.lock().failures.entry(why.problem).or_default() += 1;
                if attempt.why != why {
                    let pod = list.pods.get(&uid).map(name_of).unwrap_or_default();
                    warn!(%uid, pod, reason = why.problem, "a Pod's enrolment is not what it should be: {}", why.text);
                }
                attempt.why = why;
            }
        }
    }

    fn show(&self, list: &NodeList, plan: &Plan) {
        let mut shown = self.shown.lock();
        shown.is_told = true;
        shown.members = list.pods.values().filter(|pod| pod.is_member).count();
        shown.waiting = plan.waiting;
        let failing = self.attempts.iter().filter(|(_, attempt)| !attempt.why.text.is_empty());
        shown.failing = failing
            .map(|(uid, attempt)| {
                let pod = list.pods.get(uid).map_or_else(|| uid.to_string(), name_of);
                (pod, attempt.why.text.clone())
            })
            .collect();
        let failing = self.attempts.iter().filter(|(_, attempt)| !attempt.why.text.is_empty());
        let members = failing.filter_map(|(uid, attempt)| {
            let pod = list.pods.get(uid).filter(|pod| pod.is_member)?;
            let told = failing_member(uid, &pod.namespace, &pod.name, &attempt.why.text, attempt.why.problem);
            Some((uid.clone(), told))
        });
        let enrolled = self.pods.known();
        let waits = |uid: &str| !enrolled.contains_key(uid) && list.pods.get(uid).is_some_and(|pod| pod.is_member);
        self.pods.noticed.failing_by_list(members.collect(), waits);
        let refused: BTreeMap<String, String> = (list.pods.values())
            .filter(|pod| !pod.refused.is_empty())
            .map(|pod| (name_of(pod), pod.refused.clone()))
            .collect();
        for (pod, why) in refused.iter().filter(|(pod, why)| shown.refused.get(*pod) != Some(*why)) {
            warn!(pod, "the Pod asks to be in the mesh and cannot be: {why}");
        }
        shown.refused = refused;
    }
}

/// In a task of its own: a change of a Pod is finished, whoever is cancelled meanwhile.
async fn to_its_end(work: impl Future<Output = Result<(), PodError>> + Send + 'static) -> Result<(), Why> {
    match tokio::spawn(work).await {
        Ok(result) => result.map_err(Why::from),
        Err(_) => Err(Why::new("failed", "the change's task failed; see the agent's log")),
    }
}

fn name_of(pod: &ListedPod) -> String {
    format!("{}/{}", pod.namespace, pod.name)
}

impl Pods {
    pub(super) fn known(&self) -> BTreeMap<Arc<str>, Known> {
        let enrolled = self.enrolled.lock();
        let known = enrolled.iter().map(|(uid, enrolled)| {
            let known = Known {
                origin: enrolled.pod.origin,
                netns_cookie: enrolled.netns_cookie,
                is_proven: enrolled.standing.proof() == Proof::Proven,
                is_leaving: enrolled.is_leaving,
            };
            (uid.clone(), known)
        });
        known.collect()
    }

    async fn release_listed(self: Arc<Self>, uid: Arc<str>, grace: Duration) -> Result<(), PodError> {
        self.release_after(&uid, grace).await.map(|_| ())
    }

    /// Does not wait for its proof: the agent goes on trying by itself.
    async fn enroll_found(
        self: Arc<Self>,
        uid: Arc<str>,
        pod: ListedPod,
        found: Found,
        known: Option<Known>,
    ) -> Result<(), PodError> {
        match known {
            // One that could not be recovered has no cookie here, and is taken over where it is proven.
            Some(known) if known.netns_cookie == found.netns.cookie() || known.netns_cookie == 0 => return Ok(()),
            // Its sandbox was made anew, and nobody has said so.
            Some(_) => {
                if !self.capture.inhabited(std::slice::from_ref(&uid)).await?.is_empty() {
                    return Err(PodError::AnotherNamespace);
                }
                info!(%uid, "the Pod has another network namespace by now: the old one is released");
                self.clone().release(&uid).await?;
            }
            None => {}
        }
        let pod = PodToEnroll {
            uid: uid.to_string(),
            namespace: pod.namespace,
            name: pod.name,
            service_account: pod.service_account,
            netns_path: found.path,
            addresses: pod.addresses,
            cgroup_path: found.cgroup,
            origin: Origin::Following,
        };
        super::validate(&pod)?;
        self.trust_domain.known(super::ENROLMENT_PATIENCE).await;
        self.capture_in(&uid, pod, found.netns).await
    }
}
