//! The Pods of this node, from their enrolment to their release: captured, served, given a certificate, and proven again and again.

pub mod cni;
mod draining;
pub mod following;
mod plan;
pub mod probe_ports;
mod proving;
mod standing;
pub mod trust_domain;

use standing::{Standing, Why};
pub use trust_domain::TrustDomain;

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use crate::capture::netns::NetNamespace;
use crate::capture::{Capture, CaptureError, CapturedPod, PodToEnroll};
use crate::discovery::noticed::Noticed;
use crate::discovery::report::{PodStatus, Proof, RELEASED};
use crate::identity::Identity;
use crate::identity::renewal::Certificates;
use crate::proxy::{PodProxyHandle, Proxy, ProxyPod};

/// An enrolment is answered after this, whatever is still missing; the Pod stays enrolled and pending.
const ENROLMENT_PATIENCE: Duration = Duration::from_secs(10);
/// How long another change of the same Pod is waited for.
const BUSY_PATIENCE: Duration = Duration::from_secs(30);
/// How long a Pod that leaves the mesh still serves who takes it for a member: peers are told by their own agents, each at its time.
const LEAVING_GRACE: Duration = Duration::from_secs(2);
const FREEZE_POLL: Duration = Duration::from_millis(5);
/// Proofs at a time on the node; each starts a process for each family of addresses.
const CONCURRENT_PROOFS: usize = 4;

#[derive(Debug, thiserror::Error)]
pub enum PodError {
    #[error("{field}: {why}")]
    Invalid { field: &'static str, why: String },
    #[error("another change of this Pod is running")]
    Busy,
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// The Pod is enrolled and closed to what cannot be protected; the agent goes on trying.
    #[error("enrolled, but not in the mesh yet: {text}")]
    Pending {
        /// As [`PodStatus::problem`].
        problem: &'static str,
        text: String,
    },
    /// Processes of a Pod can make namespaces with its address: the one that is captured is not let go for such a one.
    #[error(
        "another network namespace has its address, while processes run in the one that is enrolled: that one stays captured"
    )]
    AnotherNamespace,
}

impl PodError {
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Invalid { .. } => "invalid",
            Self::Busy => "busy",
            Self::Capture(error) => error.reason(),
            Self::Pending { problem, .. } => problem,
            Self::AnotherNamespace => "another_namespace",
        }
    }
}

/// An enrolled Pod.
struct Enrolled {
    pod: PodToEnroll,
    uid: Arc<str>,
    identity: Identity,
    netns_cookie: u64,
    standing: Standing,
    /// `None`: its listeners could not be taken over; its connections are refused until they are.
    handle: Option<PodProxyHandle>,
    /// Ends its proofs.
    stop: CancellationToken,
    /// A release has begun, and is to be completed before anything else.
    is_leaving: bool,
    /// The agent ends, and its drain has the handle.
    is_draining: bool,
}

/// A Pod as the admin dump shows it.
#[derive(Debug, serde::Serialize)]
pub struct PodView {
    pub uid: String,
    pub namespace: String,
    pub name: String,
    pub identity: String,
    pub addresses: Vec<IpAddr>,
    pub netns_cookie: u64,
    pub proof: &'static str,
    pub origin: &'static str,
    pub reason: String,
    pub served: bool,
    pub connections: usize,
}

impl std::fmt::Debug for Pods {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pods").finish_non_exhaustive()
    }
}

pub struct Pods {
    capture: Arc<Capture>,
    proxy: Arc<Proxy>,
    certificates: Arc<Certificates>,
    trust_domain: Arc<TrustDomain>,
    noticed: Arc<Noticed>,
    enrolled: Mutex<BTreeMap<Arc<str>, Enrolled>>,
    /// Whose sandbox the CNI plugin has taken away: the control plane lists them for a while longer.
    ended: Mutex<HashSet<Arc<str>>>,
    /// uids with a change under way; one at a time each.
    busy: Mutex<HashSet<Arc<str>>>,
    no_longer_busy: Notify,
    /// Another agent takes over: nothing of a Pod changes here any more. Under `busy`.
    frozen: AtomicBool,
    proofs: Semaphore,
    status: watch::Sender<Arc<Vec<PodStatus>>>,
}

impl Pods {
    #[must_use]
    pub fn new(
        capture: Arc<Capture>,
        proxy: Arc<Proxy>,
        certificates: Arc<Certificates>,
        trust_domain: Arc<TrustDomain>,
        noticed: Arc<Noticed>,
    ) -> Arc<Self> {
        Arc::new(Self {
            capture,
            proxy,
            certificates,
            trust_domain,
            noticed,
            enrolled: Mutex::default(),
            ended: Mutex::default(),
            busy: Mutex::default(),
            no_longer_busy: Notify::new(),
            frozen: AtomicBool::new(false),
            proofs: Semaphore::new(CONCURRENT_PROOFS),
            status: watch::Sender::default(),
        })
    }

    /// Every enrolled Pod and where it stands, at each change.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<Arc<Vec<PodStatus>>> {
        self.status.subscribe()
    }

    /// Takes over what an earlier agent enrolled.
    pub async fn recover(self: &Arc<Self>) {
        for recovered in self.capture.recover().await {
            match recovered {
                Ok(captured) => {
                    info!(pod = %captured.pod.name, namespace = %captured.pod.namespace, "enrolled Pod found again");
                    self.serve(captured, true);
                }
                Err((pod, error)) => self.insert_closed(pod, error),
            }
        }
        self.publish();
    }

    /// Completes the releases that an earlier agent had begun. Once this one serves: it may have to wait for one that drains.
    pub async fn complete_releases(self: Arc<Self>) {
        for (pod, error) in self.capture.complete_releases().await {
            self.insert_closed(pod, error);
        }
        self.publish();
    }

    fn insert_closed(self: &Arc<Self>, pod: PodToEnroll, error: CaptureError) {
        error!(pod = %pod.name, namespace = %pod.namespace, %error, "an enrolled Pod cannot be taken over; its connections are refused until it can");
        self.insert(pod, 0, None, true, error.into());
    }

    /// Enrols a Pod and waits, bounded, for its certificate and its proof. What is already enrolled is only waited for.
    ///
    /// # Errors
    /// Nothing was changed, or ([`PodError::Pending`]) the Pod is enrolled and the agent goes on trying.
    pub async fn enroll(self: Arc<Self>, pod: PodToEnroll) -> Result<u64, PodError> {
        validate(&pod)?;
        let uid: Arc<str> = pod.uid.as_str().into();
        self.trust_domain.known(ENROLMENT_PATIENCE).await;
        let netns = NetNamespace::open(&pod.netns_path)?;
        self.capture_in(&uid, pod, netns).await?;
        self.wait_until_proven(&uid, Instant::now() + ENROLMENT_PATIENCE).await
    }

    /// To be awaited to its end. What is enrolled already stays as it is.
    async fn capture_in(self: &Arc<Self>, uid: &Arc<str>, pod: PodToEnroll, netns: NetNamespace) -> Result<(), PodError> {
        if self.known().get(uid).is_some_and(|known| known.is_leaving) {
            self.clone().release(uid).await?;
        }
        let _change = self.exclusively(uid).await?;
        match self.capture.enroll_in(pod, netns).await {
            Ok(captured) => {
                let (pod, origin) = (&captured.pod, captured.pod.origin.as_str());
                info!(pod = %pod.name, namespace = %pod.namespace, %uid, origin, "Pod enrolled");
                self.serve(captured, false);
                self.publish();
                Ok(())
            }
            Err(CaptureError::AlreadyEnrolled(_)) if self.enrolled.lock().contains_key(uid) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    async fn wait_until_proven(&self, uid: &str, until: Instant) -> Result<u64, PodError> {
        let mut status = self.status.subscribe();
        let proven = status.wait_for(|pods| {
            pods.iter()
                .find(|pod| &*pod.uid == uid)
                .is_none_or(|pod| pod.proof == Proof::Proven)
        });
        let last = match timeout_at(until, proven).await {
            Ok(Ok(pods)) => pods.iter().find(|pod| &*pod.uid == uid).cloned(),
            Ok(Err(_)) => None,
            Err(_) => self.status.borrow().iter().find(|pod| &*pod.uid == uid).cloned(),
        };
        match last {
            Some(pod) if pod.proof == Proof::Proven => Ok(pod.netns_cookie),
            Some(pod) => Err(PodError::Pending {
                problem: pod.problem,
                text: pod.reason,
            }),
            None => Err(PodError::Pending {
                problem: RELEASED,
                text: "released meanwhile".to_owned(),
            }),
        }
    }

    /// Undoes everything for a Pod. False: none of that uid was enrolled.
    ///
    /// # Errors
    /// Something could not be undone; releasing again completes it.
    pub async fn release(self: Arc<Self>, uid: &str) -> Result<bool, PodError> {
        self.release_after(uid, Duration::ZERO).await
    }

    /// As [`Self::release`]; whoever has not heard of it yet is served for so long.
    async fn release_after(self: Arc<Self>, uid: &str, grace: Duration) -> Result<bool, PodError> {
        let uid: Arc<str> = uid.into();
        let _change = self.exclusively(&uid).await?;
        if let Some(enrolled) = self.enrolled.lock().get_mut(&uid) {
            enrolled.stop.cancel();
            enrolled.is_leaving = true;
            enrolled.standing.leave();
        }
        // Whatever fails from here on: nobody takes it for protected.
        self.publish();
        // Before the listeners close: whoever was still sent to them would be refused.
        if self.capture.let_go(&uid, grace).await? {
            sleep(grace).await;
        }
        let taken = self
            .enrolled
            .lock()
            .get_mut(&uid)
            .map(|enrolled| (enrolled.handle.take(), enrolled.is_draining));
        match taken {
            Some((Some(handle), _)) => handle.shutdown().await,
            // This agent ends: its drain has the handle, and cuts the Pod at its next look.
            Some((None, true)) => self.capture.until_cut(&uid).await,
            _ => {}
        }
        // A failure leaves the entry, so that it is reported, listed and can be released again.
        let known = self.capture.release(&uid).await?;
        let was_enrolled = self.forget(&uid);
        self.publish();
        Ok(known || was_enrolled)
    }

    fn forget(&self, uid: &Arc<str>) -> bool {
        let enrolled = self.enrolled.lock().remove(uid);
        self.proxy.forget(&self.certificates.unwant(uid));
        let Some(enrolled) = enrolled else { return false };
        enrolled.stop.cancel();
        info!(pod = %enrolled.pod.name, namespace = %enrolled.pod.namespace, %uid, "Pod released");
        true
    }

    #[must_use]
    pub fn list(&self) -> Vec<PodView> {
        let registry = self.proxy.registry();
        let enrolled = self.enrolled.lock();
        enrolled
            .values()
            .map(|enrolled| PodView {
                uid: enrolled.uid.to_string(),
                namespace: enrolled.pod.namespace.clone(),
                name: enrolled.pod.name.clone(),
                identity: enrolled.identity.to_string(),
                addresses: enrolled.pod.addresses.clone(),
                netns_cookie: enrolled.netns_cookie,
                proof: enrolled.standing.proof().as_str(),
                origin: enrolled.pod.origin.as_str(),
                reason: enrolled.standing.reason().to_owned(),
                served: enrolled.handle.is_some(),
                connections: registry.count(&enrolled.uid),
            })
            .collect()
    }

    /// Connections of all Pods.
    #[must_use]
    pub fn connections(&self) -> usize {
        let registry = self.proxy.registry();
        self.enrolled.lock().keys().map(|uid| registry.count(uid)).sum()
    }

    /// The agent stops: Pods stay captured, and closed until the next agent. Connections have until `patience` is over, or until an
    /// agent that has taken over releases their Pod.
    pub async fn stop(&self, patience: Duration) {
        let mut handles = Vec::new();
        for enrolled in self.enrolled.lock().values_mut() {
            enrolled.stop.cancel();
            match enrolled.handle.take() {
                Some(handle) => {
                    enrolled.is_draining = true;
                    handles.push((enrolled.uid.clone(), handle));
                }
                // Its release is under way, and tells by itself.
                None if enrolled.is_leaving => {}
                None => self.capture.has_cut(&enrolled.uid),
            }
        }
        let (is_kept, has_cut) = (|uid: &str| self.capture.is_kept(uid), |uid: &str| self.capture.has_cut(uid));
        draining::drain(handles, patience, || self.connections(), is_kept, has_cut).await;
    }

    /// Changes of Pods are refused from now on. False: one was still under way after `patience`, and they go on. Blocks.
    #[must_use]
    pub fn freeze(&self, patience: Duration) -> bool {
        self.frozen.store(true, Ordering::Relaxed);
        let until = Instant::now() + patience;
        while !self.busy.lock().is_empty() {
            if Instant::now() >= until {
                self.thaw();
                return false;
            }
            std::thread::sleep(FREEZE_POLL);
        }
        self.capture.offer();
        true
    }

    /// Nobody took over. Blocks.
    pub fn thaw(&self) {
        self.capture.take_back();
        self.frozen.store(false, Ordering::Relaxed);
    }

    /// Of every served Pod, by uid: outbound, tunnel, plaintext.
    #[must_use]
    pub fn listeners(&self) -> Vec<(Arc<str>, [Arc<TcpListener>; 3])> {
        let enrolled = self.enrolled.lock();
        let served = enrolled
            .values()
            .filter_map(|enrolled| Some((enrolled.uid.clone(), enrolled.handle.as_ref()?.listeners()?)));
        served.collect()
    }

    fn serve(self: &Arc<Self>, captured: CapturedPod, recovered: bool) {
        let CapturedPod {
            pod,
            netns_cookie,
            network,
            listeners,
            ..
        } = captured;
        let identity = self.identity(&pod);
        // Connections may wait at the listeners of an agent before, and with them for its certificate: not a moment without.
        self.certificates.want(&identity, &pod.uid.as_str().into());
        let served = ProxyPod {
            pod_uid: pod.uid.as_str().into(),
            namespace: pod.namespace.as_str().into(),
            name: pod.name.as_str().into(),
            identity,
            addresses: pod.addresses.clone(),
            network,
            probes: self.capture.probes(),
        };
        let handle = self.proxy.serve(served, listeners);
        self.insert(
            pod,
            netns_cookie,
            Some(handle),
            recovered,
            Why::new("not_proven_yet", "not proven yet"),
        );
    }

    fn insert(self: &Arc<Self>, pod: PodToEnroll, netns_cookie: u64, handle: Option<PodProxyHandle>, recovered: bool, why: Why) {
        let uid: Arc<str> = pod.uid.as_str().into();
        let identity = self.identity(&pod);
        self.certificates.want(&identity, &uid);
        let stop = CancellationToken::new();
        let enrolled = Enrolled {
            pod,
            uid: uid.clone(),
            identity,
            netns_cookie,
            standing: Standing::new(recovered, why),
            handle,
            stop: stop.clone(),
            is_leaving: false,
            is_draining: false,
        };
        if let Some(before) = self.enrolled.lock().insert(uid.clone(), enrolled) {
            before.stop.cancel();
        }
        let pods = self.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = pods.prove_for_ever(&uid) => {}
            }
        });
    }

    fn identity(&self, pod: &PodToEnroll) -> Identity {
        Identity::new(&self.trust_domain.current(), &pod.namespace, &pod.service_account)
    }

    fn publish(&self) {
        let pods: Vec<PodStatus> = self
            .enrolled
            .lock()
            .values()
            .map(|enrolled| PodStatus {
                uid: enrolled.uid.clone(),
                namespace: enrolled.pod.namespace.as_str().into(),
                name: enrolled.pod.name.as_str().into(),
                netns_cookie: enrolled.netns_cookie,
                proof: enrolled.standing.proof(),
                reason: enrolled.standing.reason().to_owned(),
                problem: enrolled.standing.problem(),
            })
            .collect();
        self.status.send_if_modified(|current| {
            let changed = **current != pods;
            if changed {
                *current = Arc::new(pods);
            }
            changed
        });
    }

    async fn exclusively(self: &Arc<Self>, uid: &Arc<str>) -> Result<Change, PodError> {
        let turn = async {
            loop {
                // Before the look: an end between look and wait is not missed.
                let mut notified = std::pin::pin!(self.no_longer_busy.notified());
                notified.as_mut().enable();
                {
                    let mut busy = self.busy.lock();
                    if self.frozen.load(Ordering::Relaxed) {
                        return Err(PodError::Busy);
                    }
                    if busy.insert(uid.clone()) {
                        return Ok(());
                    }
                }
                notified.await;
            }
        };
        timeout(BUSY_PATIENCE, turn).await.map_err(|_| PodError::Busy)??;
        Ok(Change {
            pods: self.clone(),
            uid: uid.clone(),
        })
    }
}

/// The one change of a Pod that is under way.
struct Change {
    pods: Arc<Pods>,
    uid: Arc<str>,
}

impl Drop for Change {
    fn drop(&mut self) {
        self.pods.busy.lock().remove(&self.uid);
        self.pods.no_longer_busy.notify_waiters();
    }
}

pub(crate) fn validate(pod: &PodToEnroll) -> Result<(), PodError> {
    let invalid = |field, why: &str| PodError::Invalid {
        field,
        why: why.to_owned(),
    };
    for (field, text) in [
        ("namespace", &pod.namespace),
        ("name", &pod.name),
        ("service_account", &pod.service_account),
    ] {
        let valid = !text.is_empty()
            && text.len() <= 253
            && text
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.'));
        if !valid {
            return Err(invalid(field, "is not a Kubernetes name"));
        }
    }
    if pod.uid.is_empty() {
        return Err(invalid("uid", "is empty"));
    }
    if !pod.netns_path.is_absolute() {
        return Err(invalid("netns_path", "must be an absolute path"));
    }
    if pod.cgroup_path.as_ref().is_some_and(|path| !path.is_absolute()) {
        return Err(invalid("cgroup_path", "must be an absolute path"));
    }
    if pod.addresses.is_empty() {
        return Err(invalid("addresses", "has none"));
    }
    Ok(())
}
