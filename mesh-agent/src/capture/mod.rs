//! The datapath's user half: the only module that knows aya. `kernel` holds programs and maps; the rest brings a Pod's network
//! namespace into the mesh and out of it again.
//!
//! Order of an enrolment: record, return path, listeners, sk_lookup, the Pod's entry in `PODS`, from which on its connects are
//! redirected, and last the backstop. A release goes backwards.

mod addresses;
mod backstop;
mod bpf_syscalls;
mod carried;
mod cgroup_root;
mod cleanup;
pub mod descriptors;
mod enrol;
mod enrolments;
mod events;
pub mod find;
#[cfg(fuzzing)]
pub mod fuzz;
pub mod heap;
mod heartbeat;
pub mod kernel;
mod kubelet;
mod namespace;
mod netlink;
pub mod netns;
pub mod network;
mod pod_cgroup;
pub mod probe;
mod probe_child;
mod recovery;
mod repair;
mod routing;
mod search;
mod self_test;
mod sockets;
pub mod tcp_info;
mod unprotected;
mod upstreams;

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt, try_join_all};
use ipnet::IpNet;
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use self::addresses::{normal_addresses, wait_for_addresses};
use self::enrol::{Enrolment, Established, Inner};
use self::enrolments::{Enrolments, check_uid};
use self::events::Events;
use self::find::Cgroups;
use self::heartbeat::Heartbeat;
use self::kernel::inspect::MapFill;
use self::kernel::{Kernel, KernelConfig};
use self::netns::NetNamespace;
use self::probe::{PROBE_ADDRESS_V4, PROBE_ADDRESS_V6};
use self::probe_child::ProbeCgroup;
use self::upstreams::MAX_UPSTREAMS;

pub use self::backstop::Backstop;
pub use self::carried::CUT_PATIENCE;
pub use self::cleanup::CleanupSummary;
pub use self::enrolments::{Origin, PodToEnroll, boot_id};
pub use self::find::{FindError, Found, Wanted};
pub use self::kubelet::{Kubelet, Unknown};
pub use self::namespace::PodNamespace;
pub use self::network::{CaptureError, PodListeners, PodNetwork, Upstream};
pub use self::probe::{Probes, ProofError, is_probe};
pub use self::repair::Repairs;
pub use self::routing::use_settings_at;
pub use self::upstreams::UpstreamLease;

/// Some 30 system calls. While a program is detached, what it decides on is open: not long.
pub(crate) const NODE_REPAIR_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Clone, Debug)]
pub struct CaptureConfig {
    pub kernel: KernelConfig,
    /// Enrolments are recorded in its folder `pods`.
    pub run_dir: PathBuf,
    /// The program that is run as outbound probe: the agent itself (`/proc/self/exe`), but for tests.
    pub probe_program: PathBuf,
}

impl CaptureConfig {
    #[must_use]
    pub fn new(kernel: KernelConfig, run_dir: PathBuf) -> Self {
        Self {
            kernel,
            run_dir,
            probe_program: "/proc/self/exe".into(),
        }
    }
}

/// A Pod whose connections arrive at `listeners`.
#[derive(Debug)]
pub struct CapturedPod {
    pub pod: PodToEnroll,
    pub netns_cookie: u64,
    pub slot: u32,
    pub network: Arc<PodNamespace>,
    pub listeners: PodListeners,
}

/// The Pods of this node that are captured. Dropping it leaves everything in the kernel in place, for the next agent to
/// [`Capture::recover`]; until then connections are refused.
pub struct Capture {
    inner: Arc<Inner>,
    probes: Arc<Probes>,
    cgroup_root: PathBuf,
    probe_program: PathBuf,
    kubelet: Mutex<Kubelet>,
    heartbeat: Mutex<Option<Heartbeat>>,
}

impl std::fmt::Debug for Capture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Capture").finish_non_exhaustive()
    }
}

/// How often a draining agent looks for Pods that leave the mesh meanwhile: it reads a small file for each.
pub const LEAVING_LOOK: Duration = Duration::from_millis(500);

impl Capture {
    /// Loads or takes over the programs and starts the heartbeat. Must be called in the node's network namespace.
    ///
    /// # Errors
    /// The kernel lacks something, the rights are missing, or the run directory cannot be used.
    pub fn start(config: CaptureConfig) -> Result<Arc<Self>, CaptureError> {
        let mut config = config;
        let cgroup_root = match config.kernel.cgroup_root.take() {
            Some(root) => root,
            None => cgroup_root::detect()?,
        };
        config.kernel.cgroup_root = Some(cgroup_root.clone());
        let enrolments = Enrolments::open(&config.run_dir)?;
        let pods = enrolments
            .load()?
            .records
            .into_iter()
            .map(|(uid, record)| (uid, Enrolment::of(record)))
            .collect();
        let kernel = Kernel::load_tested(&config.kernel, |kernel| {
            self_test::upstream_connects_are_noted(kernel, &cgroup_root)
        })?;
        let kernel = Arc::new(kernel);
        let heartbeat = Heartbeat::start(Arc::clone(&kernel))?;
        probe_child::sweep_probe_cgroups(&cgroup_root);
        Ok(Arc::new(Self {
            inner: Arc::new(Inner {
                kernel,
                enrolments,
                node_cookie: netns::cookie_of_this_thread()?,
                boot_id: boot_id()?,
                change: Mutex::default(),
                is_offered: AtomicBool::new(false),
                pods: Mutex::new(pods),
                adopted: Mutex::default(),
                upstreams: Arc::new(Semaphore::new(MAX_UPSTREAMS)),
                events: Events::default(),
                probe_ports: Mutex::default(),
            }),
            kubelet: Mutex::default(),
            probes: Arc::default(),
            cgroup_root,
            probe_program: config.probe_program,
            heartbeat: Mutex::new(Some(heartbeat)),
        }))
    }

    /// Listeners that the agent before has handed over, by uid: outbound, tunnel, plaintext. To be called before
    /// [`Capture::recover`], which goes on with them instead of opening new ones.
    pub fn adopt(&self, listeners: HashMap<String, [TcpListener; 3]>) {
        *self.inner.adopted.lock() = listeners;
    }

    /// Another agent begins to take over: nothing is put back until [`Capture::take_back`]. Blocks.
    pub fn offer(&self) {
        self.inner.offer();
    }

    /// It has not. Nothing happens where nothing was offered. Blocks.
    pub fn take_back(&self) {
        self.inner.take_back();
    }

    /// This agent serves, and no other but to drain: what other ABI versions left is removed.
    pub fn stand_alone(&self) {
        if let Err(error) = self.inner.kernel.stand_alone() {
            tracing::error!(%error, "what another ABI version left cannot be removed yet");
        }
    }

    /// Another agent beats from now on; should it die, nothing of this one may hide that.
    pub fn fall_silent(&self) {
        self.heartbeat.lock().take();
    }

    /// Takes over the Pods that an earlier agent enrolled; to be called once, after start. A Pod whose namespace is gone for sure is
    /// released. One that cannot be taken over stays closed, and may be tried again with [`Capture::take_over`].
    #[allow(clippy::result_large_err, reason = "the Pod comes back with its error; a handful at start")]
    pub async fn recover(&self) -> Vec<Result<CapturedPod, (PodToEnroll, CaptureError)>> {
        let inner = Arc::clone(&self.inner);
        let recovered = blocking(move || {
            let recovered = inner.recover();
            // Of Pods that are gone.
            inner.adopted.lock().clear();
            Ok(recovered)
        });
        let established = recovered.await.unwrap_or_else(|error| {
            tracing::error!(%error, "enrolled Pods cannot be recovered");
            Vec::new()
        });
        established
            .into_iter()
            .map(|result| {
                result.and_then(|established| {
                    let pod = established.record.pod.clone();
                    established.into_captured().map_err(|error| (pod, error))
                })
            })
            .collect()
    }

    /// Completes what an agent had begun to release when it died; those that could not be are captured still. It waits for agents that
    /// drain, up to [`CUT_PATIENCE`].
    pub async fn complete_releases(&self) -> Vec<(PodToEnroll, CaptureError)> {
        let inner = Arc::clone(&self.inner);
        let completed = blocking(move || Ok(inner.complete_releases())).await;
        completed.unwrap_or_else(|error| {
            tracing::error!(%error, "releases that an earlier agent had begun cannot be completed");
            Vec::new()
        })
    }

    /// Tries again to take over one that [`Capture::recover`] could not. `None`: its namespace is gone, and it is released.
    ///
    /// # Errors
    /// It still cannot be taken over, and stays closed; or it is served already.
    pub async fn take_over(&self, uid: &str) -> Result<Option<CapturedPod>, CaptureError> {
        let (inner, uid) = (Arc::clone(&self.inner), uid.to_owned());
        let established = blocking(move || inner.take_over(&uid)).await?;
        established.map(Established::into_captured).transpose()
    }

    /// Puts back what is missing of a Pod's capture. Nothing is taken away on the way, so that it is never open. Lost listeners
    /// are only told of: whoever serves the others closes them first, and then calls [`Capture::reopen`].
    ///
    /// # Errors
    /// Something is missing and cannot be put back.
    pub async fn repair(&self, uid: &str) -> Result<Repairs, CaptureError> {
        let (inner, uid) = (Arc::clone(&self.inner), uid.to_owned());
        blocking(move || inner.repair(&uid)).await
    }

    /// As [`Capture::repair`], of the kernel's entries of the listeners that serve the Pod: tunnel, plaintext. True: one was missing.
    ///
    /// # Errors
    /// It cannot be put back.
    pub async fn restore_listeners(&self, uid: &str, listeners: [Arc<tokio::net::TcpListener>; 2]) -> Result<bool, CaptureError> {
        let (inner, uid) = (Arc::clone(&self.inner), uid.to_owned());
        blocking(move || inner.restore_listeners(&uid, &listeners)).await
    }

    /// As [`Capture::repair`], of what all Pods share: the programs' links at the cgroup root, the pins, the heartbeat. Names what was
    /// put back.
    ///
    /// # Errors
    /// Something is missing and cannot be put back.
    pub async fn repair_node(&self) -> Result<Vec<String>, CaptureError> {
        let inner = Arc::clone(&self.inner);
        blocking(move || inner.repair_node()).await
    }

    /// Repairs what all Pods share, for ever. `tell` is told what was put back.
    pub async fn keep_whole(self: Arc<Self>, tell: impl Fn(&[String])) {
        let mut last = String::new();
        loop {
            let repaired = self.repair_node().await;
            if let Ok(repaired) = &repaired {
                tell(repaired);
            }
            let now = repaired.err().map(|error| error.to_string()).unwrap_or_default();
            if !now.is_empty() && now != last {
                tracing::error!(error = now, "what is missing of the node's capture cannot be put back");
            }
            last = now;
            tokio::time::sleep(NODE_REPAIR_INTERVAL).await;
        }
    }

    /// New listeners for a Pod whose own are closed. Until then its connections are refused.
    ///
    /// # Errors
    /// Another process of the Pod took a port meanwhile, say.
    pub async fn reopen(&self, uid: &str) -> Result<CapturedPod, CaptureError> {
        let (inner, uid) = (Arc::clone(&self.inner), uid.to_owned());
        blocking(move || inner.reopen(&uid)).await?.into_captured()
    }

    /// Until this agent's drain has cut the Pod, which is marked as leaving; at most [`CUT_PATIENCE`], which is logged.
    pub async fn until_cut(&self, uid: &str) {
        let until = tokio::time::Instant::now() + CUT_PATIENCE;
        while self.inner.carries(uid) {
            if tokio::time::Instant::now() >= until {
                tracing::error!(
                    uid,
                    "this agent's drain has not cut a Pod that leaves: it is let go, and answers may go in clear"
                );
                return;
            }
            tokio::time::sleep(carried::POLL).await;
        }
    }

    /// Nothing of the Pod is carried by this agent any longer: whoever takes its rules and routes away need not wait for it.
    pub fn has_cut(&self, uid: &str) {
        self.inner.has_cut(uid);
    }

    /// After a failed [`Capture::reopen`]: the Pod stays closed until [`Capture::take_over`].
    pub fn give_up(&self, uid: &str) {
        if let Some(enrolment) = self.inner.pods.lock().get_mut(uid) {
            enrolment.active = None;
            drop(enrolment.carried.take());
        }
    }

    /// Whether the Pod is still carried: an agent that has taken over may have released it, or be about to.
    #[must_use]
    pub fn is_kept(&self, uid: &str) -> bool {
        self.inner.enrolments.is_kept(uid)
    }

    /// The same Pod again (same uid and namespace, listeners in use) is [`CaptureError::AlreadyEnrolled`] and changes nothing.
    /// To be awaited to its end: a caller that gives up loses the listeners, and the Pod's connections are refused until it is
    /// released.
    ///
    /// # Errors
    /// The Pod cannot be captured; nothing of the attempt is left then.
    pub async fn enroll(&self, pod: PodToEnroll) -> Result<CapturedPod, CaptureError> {
        let netns = NetNamespace::open(&pod.netns_path)?;
        self.enroll_in(pod, netns).await
    }

    /// As [`Capture::enroll`], with a namespace that is held open: whatever is at its path meanwhile.
    ///
    /// # Errors
    /// As [`Capture::enroll`].
    pub async fn enroll_in(&self, mut pod: PodToEnroll, netns: NetNamespace) -> Result<CapturedPod, CaptureError> {
        check_uid(&pod.uid)?;
        pod.addresses = normal_addresses(&pod.addresses)?;
        if netns.cookie() == self.inner.node_cookie {
            return Err(CaptureError::Refused(format!(
                "{} is the node's own network namespace: Pods with hostNetwork cannot be enrolled",
                pod.netns_path.display()
            )));
        }
        wait_for_addresses(&netns, &pod.addresses).await?;
        let inner = Arc::clone(&self.inner);
        blocking(move || inner.enroll(pod, netns)).await?.into_captured()
    }

    /// The first half of a release: new connections of the Pod go past the agent, whose listeners still serve what comes by them. Where
    /// the agent dies before [`Self::release`], the next one completes it. An agent that drains carries what it has for `grace` more.
    /// False: the Pod is not served, and nothing was done.
    ///
    /// # Errors
    /// Something could not be undone; releasing completes it.
    pub async fn let_go(&self, uid: &str, grace: Duration) -> Result<bool, CaptureError> {
        let (inner, uid) = (Arc::clone(&self.inner), uid.to_owned());
        blocking(move || inner.let_go(&uid, grace)).await
    }

    /// Undoes everything for a Pod; false if none of that uid is enrolled. The proxy's connections and listeners are to be closed
    /// by their holder, before; those of other agents, which drain, are waited for up to [`CUT_PATIENCE`].
    ///
    /// # Errors
    /// Something cannot be undone. The record stays, and releasing again completes it.
    pub async fn release(&self, uid: &str) -> Result<bool, CaptureError> {
        let (inner, uid) = (Arc::clone(&self.inner), uid.to_owned());
        blocking(move || inner.release(&uid)).await
    }

    /// Shows that the Pod's connections are captured, in both directions and in every family that it has. Works only while its
    /// listeners are served, by someone who hands connections to [`Capture::probes`].
    ///
    /// # Errors
    /// A probe did not arrive within its time.
    pub async fn prove(&self, uid: &str) -> Result<(), ProofError> {
        let (pod, network) = {
            let pods = self.inner.pods.lock();
            let enrolment = pods.get(uid).ok_or_else(|| ProofError::NotEnrolled(uid.to_owned()))?;
            let network = enrolment
                .active
                .clone()
                .ok_or_else(|| ProofError::NotEnrolled(uid.to_owned()))?;
            (enrolment.record.pod.clone(), network)
        };
        let mut probes: Vec<BoxFuture<'_, Result<(), ProofError>>> = Vec::new();
        if pod.addresses.iter().any(IpAddr::is_ipv4) {
            probes.push(self.prove_outbound(&pod, &network, PROBE_ADDRESS_V4.into()).boxed());
        }
        if pod.addresses.iter().any(IpAddr::is_ipv6) {
            probes.push(self.prove_outbound(&pod, &network, PROBE_ADDRESS_V6.into()).boxed());
        }
        for address in &pod.addresses {
            probes.push(self.probes.prove_inbound(uid, *address).boxed());
        }
        try_join_all(probes).await.map(|_| ())
    }

    async fn prove_outbound(&self, pod: &PodToEnroll, network: &PodNamespace, address: IpAddr) -> Result<(), ProofError> {
        // A container that was started again has another one. One that somebody has named is meant.
        let of_container = pod.cgroup_path.as_deref();
        let of_container = of_container.filter(|path| pod.origin == Origin::Local || path.exists());
        let own = match of_container {
            Some(_) => None,
            None => Some(ProbeCgroup::create(&self.cgroup_root).map_err(|error| ProofError::Outbound {
                destination: (address, 0).into(),
                why: format!("no cgroup for the probe in {}: {error}", self.cgroup_root.display()),
            })?),
        };
        let cgroup = own.as_ref().map(ProbeCgroup::path).or(of_container);
        self.probes
            .prove_outbound(
                &pod.uid,
                address,
                network.netns(),
                cgroup.unwrap_or(&self.cgroup_root),
                &self.probe_program,
            )
            .await
    }

    /// Where Pods that run are, each by its uid: one walk over the node's processes.
    ///
    /// # Errors
    /// The walk did not end.
    pub async fn find_pods(&self, wanted: Vec<Wanted>) -> Result<HashMap<Arc<str>, Result<Found, FindError>>, CaptureError> {
        let cgroups = Cgroups {
            mount: kernel::detect_cgroup_root().ok(),
            root: self.cgroup_root.clone(),
        };
        let node_cookie = self.inner.node_cookie;
        blocking(move || Ok(find::find(wanted, node_cookie, &cgroups))).await
    }

    /// Of these Pods, those in whose enrolled namespace a process is; and those whose namespace is not known, where one may be.
    ///
    /// # Errors
    /// The walk did not end.
    pub async fn inhabited(&self, uids: &[Arc<str>]) -> Result<HashSet<Arc<str>>, CaptureError> {
        let (mut unknown, mut known) = (HashSet::new(), Vec::new());
        {
            let pods = self.inner.pods.lock();
            for uid in uids {
                match pods.get(&**uid).map(|enrolment| enrolment.active.as_ref()) {
                    Some(Some(network)) => known.push((uid.clone(), network.netns().try_clone()?)),
                    Some(None) => drop(unknown.insert(uid.clone())),
                    None => {}
                }
            }
        }
        let mut inhabited = blocking(move || find::inhabited(known)).await?;
        inhabited.extend(unknown);
        Ok(inhabited)
    }

    /// Another Pod's uid, if a process of one runs in the namespace.
    ///
    /// # Errors
    /// The walk did not end.
    pub async fn other_pod_in(&self, netns: &NetNamespace, uid: &str) -> Result<Option<String>, CaptureError> {
        let (netns, uid) = (netns.try_clone()?, uid.to_owned());
        blocking(move || find::other_pod_in(&netns, &uid)).await
    }

    /// Connections of each Pod that were open before it was enrolled, and still are; by uid, as of its last proof.
    #[must_use]
    pub fn unprotected(&self) -> Vec<(String, usize)> {
        let pods = self.inner.pods.lock();
        pods.iter()
            .map(|(uid, enrolment)| (uid.clone(), enrolment.unprotected.len()))
            .collect()
    }

    #[must_use]
    pub fn probes(&self) -> Arc<Probes> {
        Arc::clone(&self.probes)
    }

    /// What the programs counted, and this half.
    #[must_use]
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut counters = self.inner.kernel.counters();
        counters.extend(self.inner.events.counts());
        counters
    }

    /// As [`Kernel::detached_programs`]: with any, the node's Pods are not captured as they should be.
    #[must_use]
    pub fn detached_programs(&self) -> Vec<&'static str> {
        self.inner.kernel.detached_programs()
    }

    /// Whether each Pod that is served has its backstop, by uid.
    #[must_use]
    pub fn backstops(&self) -> Vec<(String, Backstop)> {
        let pods = self.inner.pods.lock();
        let served = pods.iter().filter(|(_, enrolment)| enrolment.active.is_some());
        served.map(|(uid, enrolment)| (uid.clone(), enrolment.backstop)).collect()
    }

    /// Tells the backstops what is in the mesh, or taken out of a wider prefix.
    ///
    /// # Errors
    /// The kernel refuses: more counts as the mesh's than should.
    pub async fn set_mesh_destinations(&self, prefixes: Vec<(IpNet, bool)>) -> Result<(), CaptureError> {
        let inner = Arc::clone(&self.inner);
        blocking(move || {
            if inner.kernel.set_mesh_destinations(&prefixes)? {
                inner.events.mesh_destinations_full.fetch_add(1, Ordering::Relaxed);
                tracing::error!(
                    prefixes = prefixes.len(),
                    "more prefixes are in the mesh than the kernel's map has room for: everything counts as the mesh's, and what Pods \
                     send around their agent to the outside is dropped"
                );
            }
            Ok(())
        })
        .await
    }

    /// How full the kernel's maps are.
    #[must_use]
    pub fn map_fill(&self) -> Vec<MapFill> {
        self.inner.kernel.map_fill()
    }
}

/// Removes what probes have left at the cgroup root, and does nothing where there is none. For an uninstallation.
pub fn sweep_probes(cgroup_root: Option<&Path>) {
    let root = cgroup_root.map_or_else(cgroup_root::detect, |root| Ok(root.to_owned()));
    if let Ok(root) = root {
        probe_child::sweep_probe_cgroups(&root);
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, CaptureError> + Send + 'static) -> Result<T, CaptureError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| CaptureError::Other(format!("a step of the capture did not end: {error}")))?
}

#[cfg(test)]
mod tests;
