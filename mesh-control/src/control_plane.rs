//! Keeps the world and the capture states, and publishes what they compile to.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until};

use crate::accounts::Accounts;
use crate::capture_states::{CaptureState, CaptureStates, PodKey, Proof, pod_key};
use crate::compile::network_policies::Findings;
use crate::compile::{Parameters, Snapshot, compile_after, spiffe_id};
use crate::enforcement::Enforcement;
use crate::kubernetes::wishes::PodRef;
use crate::limits::{Bounds, MAX_NODES, MAX_REPORTED_PODS};
use crate::metrics::Metrics;
use crate::objects::{Kind, World};
use crate::proto::PodWord;
use crate::registry::{Registry, Rejection};
use crate::state_dir::{StateDir, StateError};

const CAPTURE_STATES: &str = "capture-states.json";
const ACCOUNTS: &str = "service-accounts.json";

mod advice;
mod enforced;
mod notices;
mod pace;
mod shared;
mod status;
#[cfg(test)]
mod tests;

use pace::Pace;
pub use shared::Shared;

const NO_POD_RANGES: &str = "no address ranges of Pods are known: Pods that discovery has not told yet are reached IN CLEAR; \
                             give Node manifests with spec.podCIDRs, or --pod-cidr";

pub struct ControlPlane {
    pub metrics: Arc<Metrics>,
    pub bounds: Bounds,
    /// `None`: what is to outlive this process goes by the API server.
    state_dir: Option<StateDir>,
    /// `None`: one process, and its state directory.
    shared: Option<Arc<Shared>>,
    inner: Mutex<Inner>,
    /// Reports wait for it before they are published.
    pace: Mutex<Pace>,
    publish_wanted: Notify,
    /// Why the folder as it is now is not in force.
    registry_problem: Mutex<Option<String>>,
    snapshot: watch::Sender<Arc<Snapshot>>,
    /// Set once the folder was read: before, every resource would seem to be gone.
    ready: AtomicBool,
    nodes: Mutex<BTreeMap<String, NodeStatus>>,
    /// What the agents that this replica serves enforce.
    enforcement: Mutex<Enforcement>,
    /// NetworkPolicies in the mesh's way, when they were last looked at.
    findings: Mutex<Findings>,
    closing: watch::Sender<bool>,
}

struct Inner {
    parameters: Parameters,
    accounts: Accounts,
    /// The accounts differ from those on disk.
    unsaved_accounts: bool,
    world: Arc<World>,
    captures: CaptureStates,
    /// The last report of each node: a Pod may be proven before its manifest is read.
    reports: BTreeMap<String, Vec<PodWord>>,
    rejections: Vec<Rejection>,
    /// The states differ from those on disk.
    unsaved: bool,
    /// The states differ from those published.
    unpublished: bool,
    ignored: usize,
}

/// What a node last said of itself.
#[derive(Clone, Debug, Default, Serialize)]
pub struct NodeStatus {
    pub discovery_streams: usize,
    pub report_streams: usize,
    pub pods_streams: usize,
    /// Type URL → version in force there.
    pub enforced: BTreeMap<String, String>,
    pub rejected_by_agent: Vec<String>,
    /// Type URL → the last response that the agent refused, with its reason.
    pub refused_responses: BTreeMap<String, String>,
}

impl ControlPlane {
    /// # Errors
    /// The capture states on disk cannot be read: to go on without them would send proven Pods cleartext. Nor can the accounts: whom
    /// an operator deleted would be trusted again.
    pub fn new(parameters: Parameters, state_dir: StateDir, metrics: Arc<Metrics>, bounds: Bounds) -> Result<Self, StateError> {
        let captures = match state_dir.read(CAPTURE_STATES, bounds.capture_file_bytes)? {
            None => CaptureStates::default(),
            Some(bytes) => serde_json::from_slice(&bytes)
                .map_err(|error| StateError::content(&state_dir.path().join(CAPTURE_STATES), error))?,
        };
        let accounts = match state_dir.read(ACCOUNTS, bounds.accounts_file_bytes)? {
            None => Accounts::default(),
            Some(bytes) => {
                Accounts::from_json(&bytes).map_err(|error| StateError::content(&state_dir.path().join(ACCOUNTS), error))?
            }
        };
        Ok(Self {
            state_dir: Some(state_dir),
            ..Self::with(parameters, accounts, captures, metrics, bounds)
        })
    }

    /// One of several replicas, which know of each other by the API server. `accounts`: those deleted before this one started.
    #[must_use]
    pub fn shared(
        parameters: Parameters,
        accounts: Accounts,
        shared: Arc<Shared>,
        metrics: Arc<Metrics>,
        bounds: Bounds,
    ) -> Self {
        Self {
            shared: Some(shared),
            ..Self::with(parameters, accounts, CaptureStates::default(), metrics, bounds)
        }
    }

    fn with(parameters: Parameters, accounts: Accounts, captures: CaptureStates, metrics: Arc<Metrics>, bounds: Bounds) -> Self {
        let inner = Inner {
            parameters,
            accounts,
            unsaved_accounts: false,
            world: Arc::default(),
            captures,
            reports: BTreeMap::new(),
            rejections: Vec::new(),
            unsaved: false,
            unpublished: false,
            ignored: 0,
        };
        Self {
            metrics,
            bounds,
            state_dir: None,
            shared: None,
            inner: Mutex::new(inner),
            pace: Mutex::new(Pace::new(bounds.publish_interval, Instant::now())),
            publish_wanted: Notify::new(),
            registry_problem: Mutex::default(),
            snapshot: watch::Sender::new(Arc::default()),
            ready: AtomicBool::new(false),
            nodes: Mutex::default(),
            enforcement: Mutex::default(),
            findings: Mutex::default(),
            closing: watch::Sender::new(false),
        }
    }

    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Acquire)
    }

    /// Why the registry as it is now is not in force; `None` when it is.
    #[must_use]
    pub fn registry_problem(&self) -> Option<String> {
        self.registry_problem.lock().clone()
    }

    /// What was in force stays so; said until the registry can be read again (`None`).
    pub fn set_registry_problem(&self, problem: Option<String>) {
        self.metrics.registry_stale.set(i64::from(problem.is_some()));
        let mut current = self.registry_problem.lock();
        if let Some(problem) = &problem {
            self.metrics.registry_reads_failed.inc();
            if current.is_none() {
                tracing::error!("{problem}; everything that was read before stays in force");
            }
        } else if current.is_some() {
            tracing::info!("the registry can be read again");
        }
        *current = problem;
    }

    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.snapshot.subscribe()
    }

    /// Done when open streams are to end.
    pub fn closed(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut closing = self.closing.subscribe();
        async move { drop(closing.wait_for(|closing| *closing).await) }
    }

    pub fn close(&self) {
        self.closing.send_replace(true);
    }

    #[must_use]
    pub fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(&self.snapshot.borrow())
    }

    /// Takes over what the folder says is in force. Blocking.
    pub fn set_world(&self, registry: &Registry) {
        self.set_objects(registry.world(), registry.rejections(), registry.ignored());
    }

    /// Takes over what is in force, whoever decided it. Blocking.
    pub fn set_objects(&self, world: Arc<World>, rejections: &[Rejection], ignored: usize) {
        let mut inner = self.inner.lock();
        for rejection in rejections.iter().filter(|new| !inner.rejections.contains(new)) {
            self.metrics
                .manifests_rejected_total
                .with_label_values(&[rejection.reason.as_str()])
                .inc();
            tracing::warn!(
                file = %rejection.file,
                document = rejection.document,
                object = rejection.object.as_ref().map(ToString::to_string),
                reason = rejection.reason.as_str(),
                last_good_in_force = rejection.last_good_in_force,
                "manifest rejected: {}",
                rejection.message
            );
        }
        for mended in inner.rejections.iter().filter(|old| !rejections.contains(old)) {
            tracing::info!(file = %mended.file, document = mended.document, "a rejected manifest was mended or removed");
        }
        self.metrics.set_rejections(rejections);
        inner.rejections = rejections.iter().take(self.bounds.rejections).cloned().collect();
        inner.ignored = ignored;
        self.metrics
            .manifests_ignored
            .set(i64::try_from(inner.ignored).unwrap_or(i64::MAX));
        let mut counts: BTreeMap<Kind, usize> = BTreeMap::new();
        for id in world.keys() {
            *counts.entry(id.kind).or_default() += 1;
        }
        for kind in Kind::ALL {
            let count = counts.get(&kind).copied().unwrap_or_default();
            self.metrics
                .objects
                .with_label_values(&[kind.as_str()])
                .set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        let before = inner.accounts.clone();
        inner.accounts.follow(&world, unix_seconds());
        if let Some(shared) = &self.shared {
            if !self.is_ready() {
                inner.accounts.presume_deleted(&world, unix_seconds());
            }
            shared.read(&mut inner, &world);
        }
        inner.unsaved_accounts |= inner.accounts != before;
        inner.world = world;
        self.publish(&mut inner);
        self.ready.store(true, Ordering::Release);
    }

    /// Other roots are trusted from now on. Blocking.
    pub fn set_trust_bundle(&self, bundle: Vec<String>) {
        let mut inner = self.inner.lock();
        inner.parameters.trust_bundle = bundle;
        // Nothing is told before the folder was read.
        if self.is_ready() {
            self.publish(&mut inner);
        }
    }

    /// PEM of the roots that are trusted, the signing one first.
    #[must_use]
    pub fn trust_bundle(&self) -> Vec<String> {
        self.inner.lock().parameters.trust_bundle.clone()
    }

    /// Takes a node's report of its Pods. Blocking.
    pub fn set_report(&self, node: &str, mut words: Vec<PodWord>) {
        words.truncate(MAX_REPORTED_PODS);
        let mut inner = self.inner.lock();
        let snapshot = self.snapshot();
        let ignored = words.iter().filter(|word| !is_of_node(&snapshot, node, word)).count();
        self.metrics.report_pods_ignored.inc_by(ignored as u64);
        if ignored > 0 {
            tracing::debug!(node, ignored, "reported Pods that are not of this node's mesh");
        }
        // Before the words change what is known.
        let heard = (self.shared.is_some()).then(|| Self::heard(&inner, &snapshot, node, &mut words));
        let changed = self.take_words(&mut inner, &snapshot, node, &words);
        forget_who_left(&mut words, &snapshot);
        inner.reports.insert(node.to_owned(), words);
        if changed || inner.unsaved {
            self.publish_soon(&mut inner);
        }
        drop(inner);
        if let (Some(shared), Some(heard)) = (&self.shared, heard) {
            shared.notices.hear(heard, &self.metrics);
        }
    }

    fn publish_soon(&self, inner: &mut Inner) {
        if Instant::now() >= self.publish_after() {
            self.publish(inner);
        } else {
            inner.unpublished = true;
            self.publish_wanted.notify_one();
        }
    }

    /// Before, whoever follows changes that come one by one lets them gather.
    #[must_use]
    pub fn publish_after(&self) -> Instant {
        self.pace.lock().next()
    }

    /// Publishes what reports have changed, once it is time for it.
    pub async fn publish_when_due(self: Arc<Self>) {
        loop {
            self.publish_wanted.notified().await;
            sleep_until(self.publish_after()).await;
            let control = Arc::clone(&self);
            let published = tokio::task::spawn_blocking(move || {
                let mut inner = control.inner.lock();
                if inner.unpublished {
                    control.publish(&mut inner);
                }
            });
            drop(published.await);
        }
    }

    fn publish(&self, inner: &mut Inner) {
        let began = Instant::now();
        inner.unpublished = false;
        let trust_domain = inner.parameters.trust_domain.clone();
        let revoked = inner.accounts.revoked();
        inner.parameters.revoked = revoked
            .map(|(namespace, name)| spiffe_id(&trust_domain, namespace, name))
            .collect();
        self.save_accounts(inner);
        let before = self.snapshot();
        let mut snapshot = compile_after(&inner.world, &inner.captures, &inner.parameters, &before);
        // A Pod that its agent proved before it was in the world, or that moved.
        let mut reports = std::mem::take(&mut inner.reports);
        let mut changed = false;
        for (node, words) in &mut reports {
            changed |= self.take_words(inner, &snapshot, node, words);
            forget_who_left(words, &snapshot);
        }
        inner.reports = reports;
        if inner.captures.prune(|key| match snapshot.pods.get(key) {
            // The API server has said all there is, and a uid never comes back.
            None if self.shared.is_some() => Some(false),
            place => place.map(|place| place.is_member),
        }) {
            inner.unsaved = self.state_dir.is_some();
        }
        if changed {
            snapshot = compile_after(&inner.world, &inner.captures, &inner.parameters, &snapshot);
        }
        self.save_captures(inner);
        if let Some(shared) = &self.shared {
            shared.mend(inner, &inner.world, &snapshot, &self.metrics);
            shared.notices.look(self, inner, &snapshot);
        }
        let count = |wanted: Option<CaptureState>| {
            snapshot
                .pods
                .iter()
                .filter(|(key, place)| place.is_member && inner.captures.of(key) == wanted)
                .count()
        };
        let states = [
            ("pending", None),
            ("proven", Some(CaptureState::Proven)),
            ("lost", Some(CaptureState::Lost)),
        ];
        for (label, state) in states {
            self.metrics
                .capture_states
                .with_label_values(&[label])
                .set(i64::try_from(count(state)).unwrap_or(i64::MAX));
        }
        self.metrics
            .set_trust(inner.parameters.trust_bundle.len(), inner.parameters.revoked.len());
        self.metrics.set_enrolment(&snapshot.enrolment);
        for warning in snapshot.enrolment.warnings_since(&self.snapshot().enrolment) {
            tracing::warn!("{warning}");
        }
        let ranges = snapshot.pod_ranges.len();
        self.metrics.pod_ranges.set(i64::try_from(ranges).unwrap_or(i64::MAX));
        // Nobody is told in a folder.
        if self.shared.is_some() {
            self.enforcement.lock().published(&snapshot);
        }
        let before = self.snapshot.send_replace(Arc::new(snapshot));
        if ranges == 0 && (before.types.is_empty() || !before.pod_ranges.is_empty()) {
            tracing::warn!("{NO_POD_RANGES}");
        }
        self.metrics.snapshots.inc();
        let (now, took) = (Instant::now(), began.elapsed());
        self.metrics.compile_seconds.inc_by(took.as_secs_f64());
        self.pace.lock().compiled(now, took);
    }

    /// On disk before any agent hears of it: after a crash nobody may have believed more than we know.
    fn save_captures(&self, inner: &mut Inner) {
        let (true, Some(state_dir)) = (inner.unsaved, &self.state_dir) else {
            return;
        };
        let saved = serde_json::to_vec(&inner.captures)
            .map_err(|error| StateError::content(state_dir.path(), error))
            .and_then(|content| state_dir.write_within(CAPTURE_STATES, &content, self.bounds.capture_file_bytes));
        match saved {
            Ok(()) => inner.unsaved = false,
            Err(error) => {
                self.metrics.state_writes_failed.inc();
                tracing::error!(%error, "the capture states cannot be kept; after a restart Pods would be pending");
            }
        }
    }

    /// On disk before any agent hears of it: whom one was told to be deleted stays so.
    fn save_accounts(&self, inner: &mut Inner) {
        if !inner.unsaved_accounts {
            return;
        }
        if let Some(shared) = &self.shared {
            shared.keep_accounts(&inner.accounts);
            inner.unsaved_accounts = false;
        }
        let Some(state_dir) = &self.state_dir else { return };
        let saved = (inner.accounts.to_json())
            .map_err(|error| StateError::content(state_dir.path(), error))
            .and_then(|content| state_dir.write_within(ACCOUNTS, &content, self.bounds.accounts_file_bytes));
        match saved {
            Ok(()) => inner.unsaved_accounts = false,
            Err(error) => {
                self.metrics.state_writes_failed.inc();
                tracing::error!(%error, "the service accounts cannot be kept; after a restart deleted ones would be trusted");
            }
        }
    }

    /// Changes what is known of a node. Only authenticated nodes get here; those of a cluster come and go under ever new names, and
    /// at the bound those without a stream are forgotten. (Streams are bounded by the connections.)
    pub fn with_node<T>(&self, node: &str, change: impl FnOnce(&mut NodeStatus) -> T) -> T {
        let mut nodes = self.nodes.lock();
        if nodes.len() >= MAX_NODES && !nodes.contains_key(node) {
            nodes.retain(|_, status| status.discovery_streams + status.report_streams + status.pods_streams > 0);
        }
        change(nodes.entry(node.to_owned()).or_default())
    }
}

impl ControlPlane {
    fn take_words(&self, inner: &mut Inner, snapshot: &Snapshot, node: &str, words: &[PodWord]) -> bool {
        let mut changed = false;
        for word in words.iter().filter(|word| is_of_node(snapshot, node, word)) {
            let Some(key) = key_of(snapshot, word) else { continue };
            if let Some(shared) = &self.shared {
                let pod = PodRef {
                    namespace: word.namespace.clone(),
                    name: word.name.clone(),
                    uid: key,
                };
                changed |= shared.take_word(inner, pod, word.proof, &self.metrics);
                continue;
            }
            let before = inner.captures.of(&key);
            if inner.captures.apply(&key, word.proof) {
                changed = true;
                let pod = format!("{}/{}", word.namespace, word.name);
                match word.proof {
                    Proof::Lost => tracing::warn!(node, pod, ?before, "the Pod's capture is lost"),
                    Proof::Proven | Proof::Pending => tracing::info!(node, pod, ?before, "the Pod's capture is proven"),
                }
            }
        }
        inner.unsaved |= changed && self.state_dir.is_some();
        changed
    }
}

fn unix_seconds() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

/// By uid, and by name where the manifest has no uid.
fn key_of(snapshot: &Snapshot, word: &PodWord) -> Option<PodKey> {
    [pod_key(&word.uid, "", ""), pod_key("", &word.namespace, &word.name)]
        .into_iter()
        .find(|key| {
            snapshot
                .pods
                .get(key)
                .is_some_and(|place| place.namespace == word.namespace && place.name == word.name)
        })
}

/// What an agent lets go it tells as lost. That is not to be taken for the Pod's capture should it join again before the agent's next
/// report.
fn forget_who_left(words: &mut Vec<PodWord>, snapshot: &Snapshot) {
    let is_member = |word: &PodWord| key_of(snapshot, word).is_none_or(|key| snapshot.pods[&key].is_member);
    words.retain(|word| word.proof != Proof::Lost || is_member(word));
}

fn is_of_node(snapshot: &Snapshot, node: &str, word: &PodWord) -> bool {
    key_of(snapshot, word)
        .and_then(|key| snapshot.pods.get(&key))
        .is_some_and(|place| place.is_member && place.node == node)
}
