//! The kernel programs and their maps: loading, attaching, pinning, and every map operation of the agent.
//!
//! Everything is pinned below `<pin path>/v<storage version>`: the maps by name, those of an ABI version in its folder, the node's
//! links in `links/`, each Pod's sk_lookup link in `pods/`, its tcx links in `backstops/`. Pins outlive the agent; a new one reuses
//! the maps, or of another ABI version what they hold (`versions.rs`), and replaces the programs of the links in place.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use aya::Ebpf;
use aya::maps::{Array, HashMap, MapData, MapError, PerCpuArray, SkStorage, SockMap};
use ipnet::IpNet;
use mesh_common::{
    AgentSocketValue, Counter, LISTENERS_PER_POD, OriginalDestinationValue, PodValue, RedirectedConnectionKey,
    UpstreamConnectionKey, limits,
};
use nix::time::{ClockId, clock_gettime};
use parking_lot::Mutex;

use self::destinations::{Destinations, remove_if};
use self::mesh_destinations::MeshDestinations;
use self::pin_names::{pin_name, pod_uid};
use self::pins::{NewLinks, attach, detach, names_in, open_cgroup_root, prepare_pins};
pub use self::probes::PodProbePorts;
use self::probes::ProbeMaps;
use self::programs::{LOOKUP_PROGRAM, NODE_PROGRAMS, attaching, load_lookup_program, load_node_programs, take_map, typed};
use self::upkeep::Kept;
use self::versions::Pins;
use super::CaptureError;
use super::bpf_syscalls::{self, AttachType};
use super::heap;

pub use self::pins::CleanupReport;
pub(super) use self::pins::detect_cgroup_root;
pub use self::programs::has_programs;

/// Original destinations that nobody took are removed at this age, ns: far longer than a connection may wait to be accepted.
const DESTINATION_AGE_NS: u64 = 60_000_000_000;
/// Connects of the agent that are on their way for longer are removed, ns: with the kernel's default of six retries a SYN is
/// given up after two minutes, and the agent waits less.
const UPSTREAM_AGE_NS: u64 = 300_000_000_000;
/// How often they are looked for, in beats: about a minute.
const SWEEP_EVERY_BEATS: u32 = 120;
/// How a map entry is written (include/uapi/linux/bpf.h): over what there may be, or only where nothing is.
const BPF_ANY: u64 = 0;
const BPF_NOEXIST: u64 = 1;

#[derive(Clone, Debug)]
pub struct KernelConfig {
    /// A directory on a bpffs, made if missing.
    pub pin_path: PathBuf,
    /// The root of the cgroup-v2 hierarchy that holds every Pod of this node. `None`: the mount in /proc/self/mountinfo.
    pub cgroup_root: Option<PathBuf>,
}

pub struct Kernel {
    pins: Pins,
    kept: Kept,
    /// Which program this agent has put into which pinned link.
    own_programs: Mutex<BTreeMap<PathBuf, u32>>,
    /// No other agent runs here, but to drain.
    is_alone: AtomicBool,
    pods: Mutex<HashMap<MapData, u64, PodValue>>,
    heartbeat: Mutex<Array<MapData, u64>>,
    agent_sockets: Mutex<SkStorage<MapData, AgentSocketValue>>,
    destinations: Destinations,
    upstreams: Mutex<HashMap<MapData, UpstreamConnectionKey, u64>>,
    listeners: Mutex<SockMap<MapData>>,
    mesh_destinations: Mutex<MeshDestinations>,
    probes: ProbeMaps,
    counters: PerCpuArray<MapData, u64>,
    beats: AtomicU32,
    /// Beats that somebody erased or falsified before the next one.
    erased_beats: AtomicU32,
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernel")
            .field("pins", &self.pins.shared)
            .finish_non_exhaustive()
    }
}

fn failed(what: impl fmt::Display, error: impl fmt::Display) -> CaptureError {
    CaptureError::Other(format!("{what}: {error}"))
}

impl Kernel {
    /// Loads the programs, reusing pinned maps, and attaches them to the cgroup root; pinned links get the new programs.
    ///
    /// # Errors
    /// No bpffs, no cgroup v2, pins of another ABI version, or a kernel without a needed feature, which the error names.
    pub fn load(config: &KernelConfig) -> Result<Kernel, CaptureError> {
        Self::load_tested(config, |_| Ok(()))
    }

    /// The same with a last word of the caller. What fails leaves nothing attached that was not so before.
    pub(super) fn load_tested(
        config: &KernelConfig,
        test: impl FnOnce(&Kernel) -> Result<(), CaptureError>,
    ) -> Result<Kernel, CaptureError> {
        let loaded = Self::load_with(config, load_node_programs, test);
        heap::trim();
        loaded
    }

    /// As [`Kernel::load`] does on a kernel without `bpf_set_retval`, so that it can be tested on one that has it.
    ///
    /// # Errors
    /// As [`Kernel::load`].
    pub fn load_as_before_set_retval(config: &KernelConfig) -> Result<Kernel, CaptureError> {
        Self::load_with(config, |pins, _| load_node_programs(pins, false), |_| Ok(()))
    }

    fn load_with(
        config: &KernelConfig,
        load_node_programs: impl Fn(&Pins, bool) -> Result<Ebpf, CaptureError>,
        test: impl FnOnce(&Kernel) -> Result<(), CaptureError>,
    ) -> Result<Kernel, CaptureError> {
        if !has_programs() {
            return Err(CaptureError::Other(
                "this mesh-agent was built without its kernel programs; build it with `cargo xtask build`".into(),
            ));
        }
        let cgroup_root = match &config.cgroup_root {
            Some(path) => path.clone(),
            None => detect_cgroup_root()?,
        };
        let cgroup = open_cgroup_root(&cgroup_root)?;
        let pins = prepare_pins(&config.pin_path)?;

        let mut programs = match load_node_programs(&pins, true) {
            Ok(programs) => programs,
            // Before 5.18 a cgroup program cannot choose the error: a refused connect is EPERM.
            Err(error) => match load_node_programs(&pins, false) {
                Ok(programs) => {
                    tracing::warn!("the kernel lacks bpf_set_retval (5.18): refused connects fail with EPERM, not ECONNREFUSED");
                    programs
                }
                Err(_) => return Err(error),
            },
        };
        // Each Pod gets an instance of its own; a kernel that has no such programs is told so now, not at the first Pod.
        drop(load_lookup_program(&pins, limits::MAX_PODS)?);
        pins.import()?;
        let mut new_links = NewLinks::default();
        let cgroup_id = cgroup.metadata().map_err(|error| failed(cgroup_root.display(), error))?.ino();
        let kept = Kept::of(&programs, &pins, cgroup, cgroup_id)?;
        let kernel = Kernel {
            kept,
            own_programs: Mutex::default(),
            is_alone: AtomicBool::new(false),
            pods: Mutex::new(typed(take_map(&mut programs, "PODS")?)?),
            heartbeat: Mutex::new(typed(take_map(&mut programs, "HEARTBEAT")?)?),
            agent_sockets: Mutex::new(typed(take_map(&mut programs, "AGENT_SOCKETS")?)?),
            destinations: Destinations::open(take_map(&mut programs, "ORIGINAL_DESTINATIONS")?)?,
            upstreams: Mutex::new(typed(take_map(&mut programs, "UPSTREAM_CONNECTIONS")?)?),
            listeners: Mutex::new(typed(take_map(&mut programs, "LISTENERS")?)?),
            mesh_destinations: Mutex::new(MeshDestinations::open(typed(take_map(&mut programs, "MESH_DESTINATIONS")?)?)?),
            probes: ProbeMaps::take(&mut programs)?,
            counters: typed(take_map(&mut programs, "COUNTERS")?)?,
            beats: AtomicU32::new(0),
            erased_beats: AtomicU32::new(0),
            pins,
        };
        kernel
            .attach_all(&NODE_PROGRAMS.map(|(name, ..)| name), &mut new_links)
            .map_err(|error| failed(cgroup_root.display(), error))?;
        let now = now_ns()?;
        kernel.destinations.sweep(0, 1, now, DESTINATION_AGE_NS);
        kernel.sweep_upstreams(now);
        test(&kernel)?;
        new_links.keep();
        Ok(kernel)
    }

    /// Enrols a network namespace, or changes what is known of it.
    ///
    /// # Errors
    /// The map is full, or the slot is out of range.
    pub fn add_pod(&self, netns_cookie: u64, value: &PodValue) -> Result<(), CaptureError> {
        check_slot(value.slot)?;
        // First: a connect that is redirected needs it.
        self.destinations.add_pod(netns_cookie)?;
        self.probes.add_pod(value.slot)?;
        self.pods
            .lock()
            .insert(netns_cookie, value, 0)
            .map_err(|error| failed("enrolling a network namespace", error))
    }

    /// Whether a network namespace has its map of original destinations.
    #[must_use]
    pub fn has_destinations(&self, netns_cookie: u64) -> bool {
        self.destinations.has_pod(netns_cookie)
    }

    /// Releases a network namespace; `Ok` when it was not enrolled.
    ///
    /// # Errors
    /// The map refuses.
    pub fn remove_pod(&self, netns_cookie: u64) -> Result<(), CaptureError> {
        let removed = self.stop_redirecting(netns_cookie);
        let freed = self.destinations.remove_pod(netns_cookie);
        removed.and(freed)
    }

    /// As [`Self::remove_pod`], but for what is under way: where connections that were redirected wanted to go is kept.
    ///
    /// # Errors
    /// The map refuses.
    pub fn stop_redirecting(&self, netns_cookie: u64) -> Result<(), CaptureError> {
        match self.pods.lock().remove(&netns_cookie) {
            Err(error) if !is_missing(&error) => Err(failed("releasing a network namespace", error)),
            _ => Ok(()),
        }
    }

    /// The enrolled network namespaces by cookie.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn pods(&self) -> Result<Vec<(u64, PodValue)>, CaptureError> {
        let pods = self.pods.lock();
        pods.iter()
            .collect::<Result<_, _>>()
            .map_err(|error| failed("reading the enrolled network namespaces", error))
    }

    /// Makes `socket` the listener of a Pod; `which` is `TUNNEL_LISTENER` or `PLAINTEXT_LISTENER`.
    ///
    /// # Errors
    /// Not a listening TCP socket, or the slot is out of range.
    pub fn set_listener(&self, slot: u32, which: u32, socket: BorrowedFd<'_>) -> Result<(), CaptureError> {
        check_slot(slot)?;
        if which >= LISTENERS_PER_POD {
            return Err(CaptureError::Other(format!("a Pod has no listener {which}")));
        }
        self.write_listener(slot, which, socket, BPF_ANY)
            .map_err(|error| failed("registering a listener", error))
    }

    fn write_listener(&self, slot: u32, which: u32, socket: BorrowedFd<'_>, flags: u64) -> Result<(), MapError> {
        self.listeners.lock().set(slot * LISTENERS_PER_POD + which, &socket, flags)
    }

    /// As [`Kernel::set_listener`] where there is none. `false`: there is one.
    ///
    /// # Errors
    /// As [`Kernel::set_listener`].
    pub fn restore_listener(&self, slot: u32, which: u32, socket: BorrowedFd<'_>) -> Result<bool, CaptureError> {
        match self.write_listener(slot, which, socket, BPF_NOEXIST) {
            Ok(()) => Ok(true),
            Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(failed("registering a listener again", error)),
        }
    }

    /// Forgets a Pod's listeners; nothing happens where there are none.
    pub fn clear_listeners(&self, slot: u32) {
        let mut listeners = self.listeners.lock();
        for which in 0..LISTENERS_PER_POD {
            // The kernel's answer for an empty index is an error; there is no other for an index in range.
            if let Some(index) = slot.checked_mul(LISTENERS_PER_POD) {
                let _ = listeners.clear_index(&(index + which));
            }
        }
    }

    /// Attaches the Pod's own instance of the sk_lookup program to its network namespace; an existing one is replaced.
    ///
    /// # Errors
    /// The kernel lacks sk_lookup, or the namespace cannot take it.
    pub fn attach_lookup(&self, slot: u32, pod_uid: &str, netns: BorrowedFd<'_>) -> Result<(), CaptureError> {
        check_slot(slot)?;
        self.load_and_attach_lookup(slot, pod_uid, netns)?;
        heap::trim();
        Ok(())
    }

    fn load_and_attach_lookup(&self, slot: u32, pod_uid: &str, netns: BorrowedFd<'_>) -> Result<(), CaptureError> {
        let (name, _) = LOOKUP_PROGRAM;
        let programs = load_lookup_program(&self.pins, slot)?;
        let program = programs.program(name).ok_or_else(|| failed(name, "not in the object"))?;
        let fd = program.fd().map_err(|error| failed(name, error))?;
        let inode = nix::sys::stat::fstat(netns)
            .map_err(|error| failed("the Pod's network namespace", error))?
            .st_ino;
        let pin = self.lookup_pin(pod_uid);
        attach(fd.as_fd(), netns, inode, AttachType::SkLookup, &pin)
            .and_then(|_| self.note_program(pin, fd.as_fd()))
            .map_err(|error| attaching(name, format_args!("the network namespace of Pod {pod_uid}"), &error))
    }

    fn lookup_pin(&self, pod_uid: &str) -> PathBuf {
        self.pins.shared.join("pods").join(pin_name(pod_uid))
    }

    /// Detaches a Pod's sk_lookup program. `false`: it had none.
    ///
    /// # Errors
    /// The pin cannot be opened or removed.
    pub fn detach_lookup(&self, pod_uid: &str) -> Result<bool, CaptureError> {
        let pin = self.lookup_pin(pod_uid);
        match bpf_syscalls::object_get(&pin) {
            Ok(link) => {
                self.own_programs.lock().remove(&pin);
                detach(link.as_fd(), &pin)
                    .map(|()| true)
                    .map_err(|error| failed(format!("detaching sk_lookup of Pod {pod_uid}"), error))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(failed(pin.display(), error)),
        }
    }

    /// The uids of the Pods that have an sk_lookup program.
    ///
    /// # Errors
    /// The pins cannot be listed.
    pub fn attached_pods(&self) -> Result<Vec<String>, CaptureError> {
        let directory = self.pins.shared.join("pods");
        let names = names_in(&directory).map_err(|error| failed(directory.display(), error))?;
        Ok(names.iter().map(|name| pod_uid(name)).collect())
    }

    /// Marks a socket as the agent's. Before `connect` or `listen`.
    ///
    /// # Errors
    /// Not a socket, or no memory.
    pub fn mark_socket(&self, socket: BorrowedFd<'_>, mark: AgentSocketValue) -> Result<(), CaptureError> {
        self.agent_sockets
            .lock()
            .insert(&socket, mark, 0)
            .map_err(|error| failed("marking a socket as the agent's", error))
    }

    /// Takes where an accepted connection wanted to go.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn take_original_destination(
        &self,
        key: &RedirectedConnectionKey,
    ) -> Result<Option<OriginalDestinationValue>, CaptureError> {
        self.destinations.take(key)
    }

    /// What is in the mesh from now on, or taken out of a wider prefix. `true`: it is too much for the map, and everything is.
    ///
    /// # Errors
    /// The map refuses; it holds more of the mesh than before then, not less.
    pub fn set_mesh_destinations(&self, prefixes: &[(IpNet, bool)]) -> Result<bool, CaptureError> {
        self.mesh_destinations.lock().replace(prefixes)
    }

    /// Renews the lease: until it is over the programs take the agent for alive.
    ///
    /// # Errors
    /// The map refuses.
    pub fn beat(&self) -> Result<(), CaptureError> {
        let beats = self.beats.fetch_add(1, Ordering::Relaxed);
        let now = {
            let mut heartbeat = self.heartbeat.lock();
            // Another agent that takes over beats as well, but neither nothing nor in the future.
            let last = heartbeat.get(&0, 0).map_err(|error| failed("reading the last beat", error))?;
            let now = now_ns()?;
            if beats > 0 && (last == 0 || last > now) {
                self.erased_beats.fetch_add(1, Ordering::Relaxed);
            }
            heartbeat.set(0, now, 0).map_err(|error| failed("beating", error))?;
            now
        };
        let turn = beats % SWEEP_EVERY_BEATS;
        self.destinations.sweep(turn, SWEEP_EVERY_BEATS, now, DESTINATION_AGE_NS);
        if turn == SWEEP_EVERY_BEATS - 1 {
            self.sweep_upstreams(now);
            self.probes.sweep(now);
        }
        Ok(())
    }

    /// Entries whose end the programs could not be told of. One that is established does not need its entry, whatever its age.
    fn sweep_upstreams(&self, now_ns: u64) {
        let removed = remove_if(
            &mut self.upstreams.lock(),
            limits::MAX_UPSTREAM_CONNECTIONS,
            |_, connected_at_ns| now_ns.saturating_sub(*connected_at_ns) > UPSTREAM_AGE_NS,
        );
        if removed > 0 {
            tracing::debug!(removed, "swept connects to applications that never ended");
        }
    }

    /// What the programs counted, since their maps were made, summed over the CPUs.
    #[must_use]
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let sum = |counter: Counter| match self.counters.get(&(counter as u32), 0) {
            Ok(values) => values.iter().sum(),
            Err(error) => {
                tracing::warn!(%error, "a kernel counter cannot be read");
                0
            }
        };
        Counter::ALL.iter().map(|&(counter, name)| (name, sum(counter))).collect()
    }

    /// Detaches and unpins everything of any version below a pin path. Needs no running agent.
    ///
    /// # Errors
    /// A pin cannot be opened or removed; what was removed before stays removed.
    pub fn cleanup(pin_path: &Path) -> Result<CleanupReport, CaptureError> {
        pins::cleanup(pin_path)
    }

    /// Whether anything of any version is pinned there.
    #[must_use]
    pub fn has_pins(pin_path: &Path) -> bool {
        pins::names_in(pin_path).is_ok_and(|names| names.iter().any(|name| pins::storage_version(name).is_some()))
    }
}

fn check_slot(slot: u32) -> Result<(), CaptureError> {
    if slot < limits::MAX_PODS {
        return Ok(());
    }
    Err(CaptureError::Other(format!(
        "slot {slot}: a node holds at most {} enrolled Pods",
        limits::MAX_PODS
    )))
}

fn now_ns() -> Result<u64, CaptureError> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_err(|error| failed("the monotonic clock", error))?;
    Ok(now.tv_sec().cast_unsigned() * 1_000_000_000 + now.tv_nsec().cast_unsigned())
}

fn is_missing(error: &MapError) -> bool {
    match error {
        MapError::KeyNotFound => true,
        MapError::SyscallError(error) => error.io_error.kind() == io::ErrorKind::NotFound,
        _ => false,
    }
}

mod backstop;
mod destinations;
pub mod inspect;
mod mesh_destinations;
mod pin_names;
mod pins;
mod probes;
mod programs;
#[cfg(test)]
mod tests;
mod upkeep;
mod versions;
