//! The datapath's user half: the only module that knows aya. `kernel` holds programs and maps; the rest brings a Pod's network
//! namespace into the mesh and out of it again.
//!
//! Order of an enrolment: record, return path, listeners, sk_lookup, and last the Pod's entry in `PODS`, from which on its
//! connects are redirected. A release goes backwards.

mod addresses;
mod bpf_syscalls;
mod enrolments;
#[cfg(fuzzing)]
pub mod fuzz;
mod heartbeat;
pub mod kernel;
mod namespace;
mod netlink;
pub mod netns;
pub mod network;
pub mod probe;
mod probe_child;
mod routing;
mod sockets;

use std::collections::HashMap;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::future::{BoxFuture, FutureExt, try_join_all};
use mesh_common::limits::{MAX_POD_ADDRESSES, MAX_PODS};
use mesh_common::{PLAINTEXT_LISTENER, PodValue, TUNNEL_LISTENER};
use parking_lot::Mutex;
use tokio::net::TcpListener;

use self::addresses::{normal_addresses, wait_for_addresses};
use self::enrolments::{EnrolmentRecord, Enrolments, boot_id, check_uid};
use self::heartbeat::Heartbeat;
use self::kernel::{CleanupReport, Kernel, KernelConfig};
use self::netns::NetNamespace;
use self::network::IoContext;
use self::probe::{PROBE_ADDRESS_V4, PROBE_ADDRESS_V6};
use self::probe_child::ProbeCgroup;
use self::sockets::StdListeners;
use crate::addr::address_bytes;

pub use self::enrolments::PodToEnroll;
pub use self::namespace::PodNamespace;
pub use self::network::{CaptureError, PodListeners, PodNetwork};
pub use self::probe::{Probes, ProofError, is_probe};

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
    _heartbeat: Heartbeat,
}

impl std::fmt::Debug for Capture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Capture").finish_non_exhaustive()
    }
}

struct Inner {
    kernel: Arc<Kernel>,
    enrolments: Enrolments,
    node_cookie: u64,
    boot_id: String,
    /// One enrolment or release at a time. Taken before `pods`, and on blocking threads only.
    change: Mutex<()>,
    pods: Mutex<HashMap<String, Enrolment>>,
}

struct Enrolment {
    record: EnrolmentRecord,
    /// `None` until it is recovered: its listeners are not ours yet, and its connections are refused.
    active: Option<Arc<PodNamespace>>,
}

/// What an enrolment has made, before the runtime has it.
struct Established {
    record: EnrolmentRecord,
    network: Arc<PodNamespace>,
    listeners: StdListeners,
}

/// What [`Capture::cleanup`] undid.
#[derive(Debug)]
pub struct CleanupSummary {
    pub kernel: CleanupReport,
    /// Uids of the Pods whose namespaces are as before, or gone.
    pub released: Vec<String>,
    pub failed: Vec<(String, CaptureError)>,
}

impl Capture {
    /// Loads or takes over the programs and starts the heartbeat. Must be called in the node's network namespace.
    ///
    /// # Errors
    /// The kernel lacks something, the rights are missing, or the run directory cannot be used.
    pub fn start(config: CaptureConfig) -> Result<Arc<Self>, CaptureError> {
        let cgroup_root = match &config.kernel.cgroup_root {
            Some(root) => root.clone(),
            None => kernel::detect_cgroup_root()?,
        };
        let enrolments = Enrolments::open(&config.run_dir)?;
        let pods = enrolments
            .load()?
            .into_iter()
            .map(|(uid, record)| (uid, Enrolment { record, active: None }))
            .collect();
        let kernel = Arc::new(Kernel::load(&config.kernel)?);
        let heartbeat = Heartbeat::start(Arc::clone(&kernel))?;
        probe_child::sweep_probe_cgroups(&cgroup_root);
        Ok(Arc::new(Self {
            inner: Arc::new(Inner {
                kernel,
                enrolments,
                node_cookie: netns::cookie_of_this_thread()?,
                boot_id: boot_id()?,
                change: Mutex::default(),
                pods: Mutex::new(pods),
            }),
            probes: Arc::default(),
            cgroup_root,
            probe_program: config.probe_program,
            _heartbeat: heartbeat,
        }))
    }

    /// Takes over the Pods that an earlier agent enrolled; to be called once, after start. A Pod whose namespace is gone is
    /// released. One that cannot be taken over stays closed, and may be tried again with [`Capture::enroll`].
    #[allow(clippy::result_large_err, reason = "the Pod comes back with its error; a handful at start")]
    pub async fn recover(&self) -> Vec<Result<CapturedPod, (PodToEnroll, CaptureError)>> {
        let inner = Arc::clone(&self.inner);
        let established = blocking(move || Ok(inner.recover())).await.unwrap_or_else(|error| {
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

    /// The same Pod again (same uid and namespace, listeners in use) is [`CaptureError::AlreadyEnrolled`] and changes nothing.
    /// To be awaited to its end: a caller that gives up loses the listeners, and the Pod's connections are refused until it is
    /// released.
    ///
    /// # Errors
    /// The Pod cannot be captured; nothing of the attempt is left then.
    pub async fn enroll(&self, mut pod: PodToEnroll) -> Result<CapturedPod, CaptureError> {
        check_uid(&pod.uid)?;
        pod.addresses = normal_addresses(&pod.addresses)?;
        let netns = NetNamespace::open(&pod.netns_path)?;
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

    /// Undoes everything for a Pod; false if none of that uid is enrolled. The proxy's connections and listeners are to be closed
    /// by their holder, before or after.
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
        let own = match &pod.cgroup_path {
            Some(_) => None,
            None => Some(ProbeCgroup::create(&self.cgroup_root).map_err(|error| ProofError::Outbound {
                destination: (address, 0).into(),
                why: format!("no cgroup for the probe in {}: {error}", self.cgroup_root.display()),
            })?),
        };
        let cgroup = own.as_ref().map(ProbeCgroup::path).or(pod.cgroup_path.as_deref());
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

    #[must_use]
    pub fn probes(&self) -> Arc<Probes> {
        Arc::clone(&self.probes)
    }

    /// What the programs counted.
    #[must_use]
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        self.inner.kernel.counters()
    }

    /// Undoes everything, of any version, without a running agent.
    ///
    /// # Errors
    /// The programs cannot be detached, or the run directory cannot be read.
    pub async fn cleanup(run_dir: &Path, pin_path: &Path) -> Result<CleanupSummary, CaptureError> {
        let (run_dir, pin_path) = (run_dir.to_owned(), pin_path.to_owned());
        blocking(move || {
            // First: from here on nothing is redirected any more.
            let kernel = Kernel::cleanup(&pin_path)?;
            let mut summary = CleanupSummary {
                kernel,
                released: Vec::new(),
                failed: Vec::new(),
            };
            let boot_id = boot_id()?;
            let enrolments = Enrolments::open(&run_dir)?;
            for (uid, record) in enrolments.load()? {
                let undone = match living_netns(&record, &boot_id) {
                    Some(netns) => netns.run(|| routing::undo(&record.before)),
                    None => Ok(()),
                };
                match undone.and_then(|()| enrolments.remove(&uid)) {
                    Ok(()) => summary.released.push(uid),
                    Err(error) => summary.failed.push((uid, error)),
                }
            }
            Ok(summary)
        })
        .await
    }
}

impl Inner {
    fn enroll(&self, pod: PodToEnroll, netns: NetNamespace) -> Result<Established, CaptureError> {
        let _change = self.change.lock();
        let cookie = netns.cookie();
        let (known, slot) = {
            let pods = self.pods.lock();
            if let Some(other) = pods
                .values()
                .find(|e| e.record.netns_cookie == cookie && e.record.pod.uid != pod.uid)
            {
                return Err(CaptureError::Refused(format!(
                    "the network namespace {} is enrolled for Pod {} already",
                    pod.netns_path.display(),
                    other.record.pod.uid
                )));
            }
            let known = pods.get(&pod.uid).map(|e| (e.record.clone(), e.active.is_some()));
            (known, free_slot(pods.values().map(|e| e.record.slot)))
        };
        let resumed = match known {
            Some((record, _)) if record.netns_cookie != cookie => {
                return Err(CaptureError::Refused(format!(
                    "Pod {} is enrolled with another network namespace: release it first",
                    record.pod.uid
                )));
            }
            Some((record, true)) => return Err(CaptureError::AlreadyEnrolled(record.pod.uid)),
            // A recovery that failed is tried again, with what was there before the *first* attempt.
            Some((record, false)) => Some(EnrolmentRecord {
                pod: pod.clone(),
                ..record
            }),
            None => None,
        };
        let is_new = resumed.is_none();
        let record = match resumed {
            Some(record) => record,
            None => EnrolmentRecord {
                boot_id: self.boot_id.clone(),
                netns_cookie: cookie,
                slot: slot.ok_or_else(|| CaptureError::Refused(format!("the node's {MAX_PODS} slots for Pods are taken")))?,
                before: netns.run(routing::observe)?,
                pod,
            },
        };
        self.enrolments.save(&record)?;
        let uid = record.pod.uid.clone();
        self.pods.lock().insert(
            uid.clone(),
            Enrolment {
                record: record.clone(),
                active: None,
            },
        );
        self.establish(record, netns).inspect_err(|_| {
            if is_new && let Err(error) = self.undo(&uid) {
                tracing::error!(uid, %error, "a failed enrolment cannot be undone: release the Pod to try again");
            }
        })
    }

    /// Every step is fine with what is there already.
    fn establish(&self, record: EnrolmentRecord, netns: NetNamespace) -> Result<Established, CaptureError> {
        let listeners = netns.run(|| {
            routing::set_up(&record.before)?;
            StdListeners::open(&self.kernel, record.slot)
        })?;
        self.kernel
            .set_listener(record.slot, TUNNEL_LISTENER, listeners.tunnel.as_fd())?;
        self.kernel
            .set_listener(record.slot, PLAINTEXT_LISTENER, listeners.plaintext.as_fd())?;
        self.kernel.attach_lookup(record.slot, &record.pod.uid, netns.as_fd())?;
        self.kernel.add_pod(record.netns_cookie, &pod_value(&record))?;
        let network = Arc::new(PodNamespace::new(
            Arc::clone(&self.kernel),
            netns,
            record.slot,
            record.pod.addresses.clone(),
        ));
        if let Some(enrolment) = self.pods.lock().get_mut(&record.pod.uid) {
            enrolment.active = Some(Arc::clone(&network));
        }
        Ok(Established {
            record,
            network,
            listeners,
        })
    }

    fn release(&self, uid: &str) -> Result<bool, CaptureError> {
        let _change = self.change.lock();
        if !self.pods.lock().contains_key(uid) {
            return Ok(false);
        }
        self.undo(uid)?;
        Ok(true)
    }

    /// Backwards. The record goes last: until then undoing again completes it.
    fn undo(&self, uid: &str) -> Result<(), CaptureError> {
        let (record, active) = {
            let pods = self.pods.lock();
            let Some(enrolment) = pods.get(uid) else { return Ok(()) };
            (enrolment.record.clone(), enrolment.active.clone())
        };
        self.forget_in_kernel(&record)?;
        match active {
            Some(network) => network.netns().run(|| routing::undo(&record.before))?,
            None => {
                if let Some(netns) = living_netns(&record, &self.boot_id) {
                    netns.run(|| routing::undo(&record.before))?;
                }
            }
        }
        self.enrolments.remove(uid)?;
        self.pods.lock().remove(uid);
        Ok(())
    }

    fn forget_in_kernel(&self, record: &EnrolmentRecord) -> Result<(), CaptureError> {
        self.kernel.remove_pod(record.netns_cookie)?;
        self.kernel.detach_lookup(&record.pod.uid)?;
        self.kernel.clear_listeners(record.slot);
        Ok(())
    }

    fn recover(&self) -> Vec<Result<Established, (PodToEnroll, CaptureError)>> {
        let _change = self.change.lock();
        if let Err(error) = self.remove_orphans() {
            tracing::error!(%error, "what a Pod without a record left in the kernel cannot be removed");
        }
        let records: Vec<_> = {
            let pods = self.pods.lock();
            pods.values()
                .filter(|e| e.active.is_none())
                .map(|e| e.record.clone())
                .collect()
        };
        let mut recovered = Vec::new();
        for record in records {
            let pod = record.pod.clone();
            match living_netns(&record, &self.boot_id) {
                Some(netns) => recovered.push(self.establish(record, netns).map_err(|error| (pod, error))),
                None => {
                    tracing::info!(uid = pod.uid, "the network namespace of an enrolled Pod is gone: released");
                    if let Err(error) = self.undo(&pod.uid) {
                        recovered.push(Err((pod, error)));
                    }
                }
            }
        }
        recovered
    }

    /// What the kernel holds for Pods without a record: their namespaces cannot be found any more.
    fn remove_orphans(&self) -> Result<(), CaptureError> {
        let (cookies, uids): (Vec<u64>, Vec<String>) = {
            let pods = self.pods.lock();
            pods.values()
                .map(|e| (e.record.netns_cookie, e.record.pod.uid.clone()))
                .unzip()
        };
        for (cookie, value) in self.kernel.pods()? {
            if !cookies.contains(&cookie) {
                tracing::warn!(cookie, "a captured network namespace has no record: released");
                self.kernel.remove_pod(cookie)?;
                self.kernel.clear_listeners(value.slot);
            }
        }
        for uid in self.kernel.attached_pods()? {
            if !uids.contains(&uid) {
                self.kernel.detach_lookup(&uid)?;
            }
        }
        Ok(())
    }
}

impl Established {
    fn into_captured(self) -> Result<CapturedPod, CaptureError> {
        const STEP: &str = "giving a listener to the runtime";
        Ok(CapturedPod {
            pod: self.record.pod,
            netns_cookie: self.record.netns_cookie,
            slot: self.record.slot,
            network: self.network,
            listeners: PodListeners {
                outbound: TcpListener::from_std(self.listeners.outbound).step(STEP)?,
                tunnel: TcpListener::from_std(self.listeners.tunnel).step(STEP)?,
                plaintext: TcpListener::from_std(self.listeners.plaintext).step(STEP)?,
            },
        })
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, CaptureError> + Send + 'static) -> Result<T, CaptureError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| CaptureError::Other(format!("a step of the capture did not end: {error}")))?
}

/// The namespace of a record, if it is still the same one.
fn living_netns(record: &EnrolmentRecord, boot_id: &str) -> Option<NetNamespace> {
    if record.boot_id != boot_id {
        return None;
    }
    NetNamespace::open(&record.pod.netns_path)
        .ok()
        .filter(|netns| netns.cookie() == record.netns_cookie)
}

fn free_slot(taken: impl Iterator<Item = u32>) -> Option<u32> {
    let mut is_free = vec![true; MAX_PODS as usize];
    for slot in taken {
        if let Some(entry) = is_free.get_mut(slot as usize) {
            *entry = false;
        }
    }
    (0..MAX_PODS).find(|slot| is_free[*slot as usize])
}

fn pod_value(record: &EnrolmentRecord) -> PodValue {
    let mut addresses = [[0; 16]; MAX_POD_ADDRESSES];
    for (bytes, address) in addresses.iter_mut().zip(&record.pod.addresses) {
        *bytes = address_bytes(*address);
    }
    PodValue {
        slot: record.slot,
        address_count: record.pod.addresses.len().min(MAX_POD_ADDRESSES) as u32,
        addresses,
    }
}

#[cfg(test)]
mod tests;
