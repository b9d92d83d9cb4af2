//! The kernel programs and their maps: loading, attaching, pinning, and every map operation of the agent.
//!
//! Everything is pinned below `<pin path>/v<ABI version>`: the maps by name, the node's links in `links/`, each Pod's sk_lookup
//! link in `pods/`. Pins outlive the agent; a new one reuses the maps and replaces the programs of the links in place.

use std::fmt;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use aya::maps::{Array, HashMap, Map, MapData, PerCpuArray, SkStorage, SockMap};
use aya::programs::{Program, ProgramError};
use aya::{Ebpf, EbpfLoader};
use mesh_common::{
    ABI_VERSION, AgentSocketValue, Counter, LISTENERS_PER_POD, OriginalDestinationValue, PodValue, RedirectedConnectionKey,
    limits,
};
use nix::sys::statfs::{BPF_FS_MAGIC, CGROUP2_SUPER_MAGIC, statfs};
use nix::time::{ClockId, clock_gettime};
use parking_lot::Mutex;

use self::pin_names::{pin_name, pod_uid};
use super::CaptureError;
use super::bpf_syscalls::{self, AttachType};

/// The object that `cargo xtask build-ebpf` made; empty in an agent that was built without it.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/mesh-ebpf.o"));

/// The node's programs by function name in mesh-ebpf, where each attaches, and the kernel feature that it needs.
const NODE_PROGRAMS: [(&str, AttachType, &str); 8] = [
    (
        "connect4",
        AttachType::CgroupConnect4,
        "cgroup/connect4 with bpf_get_netns_cookie and socket storage (5.14)",
    ),
    (
        "connect6",
        AttachType::CgroupConnect6,
        "cgroup/connect6 with bpf_get_netns_cookie and socket storage (5.14)",
    ),
    ("getpeername4", AttachType::CgroupGetpeername4, "cgroup/getpeername4 (5.8)"),
    ("getpeername6", AttachType::CgroupGetpeername6, "cgroup/getpeername6 (5.8)"),
    ("getsockname4", AttachType::CgroupGetsockname4, "cgroup/getsockname4 (5.8)"),
    ("getsockname6", AttachType::CgroupGetsockname6, "cgroup/getsockname6 (5.8)"),
    (
        "connection_events",
        AttachType::CgroupSockOps,
        "sockops with bpf_get_netns_cookie (5.15)",
    ),
    (
        "socket_create",
        AttachType::CgroupSockCreate,
        "cgroup/sock_create with bpf_get_netns_cookie (5.7)",
    ),
];
const LOOKUP_PROGRAM: (&str, &str) = ("steer", "sk_lookup (5.9)");

/// Original destinations that nobody took are removed at this age, ns: far longer than a connection may wait to be accepted.
const DESTINATION_AGE_NS: u64 = 60_000_000_000;
/// How often they are looked for, in beats: about a minute.
const SWEEP_EVERY_BEATS: u32 = 120;

#[derive(Clone, Debug)]
pub struct KernelConfig {
    /// A directory on a bpffs, made if missing.
    pub pin_path: PathBuf,
    /// The root of the cgroup-v2 hierarchy that holds every Pod of this node. `None`: the mount in /proc/self/mountinfo.
    pub cgroup_root: Option<PathBuf>,
}

/// What [`Kernel::cleanup`] removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CleanupReport {
    pub links_detached: usize,
    pub maps_removed: usize,
    /// Version directories removed.
    pub directories: Vec<PathBuf>,
}

pub struct Kernel {
    directory: PathBuf,
    pods: Mutex<HashMap<MapData, u64, PodValue>>,
    heartbeat: Mutex<Array<MapData, u64>>,
    agent_sockets: Mutex<SkStorage<MapData, AgentSocketValue>>,
    destinations: Mutex<HashMap<MapData, RedirectedConnectionKey, OriginalDestinationValue>>,
    /// The same map, for the one operation that aya lacks.
    destinations_fd: OwnedFd,
    listeners: Mutex<SockMap<MapData>>,
    counters: PerCpuArray<MapData, u64>,
    beats: AtomicU32,
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernel")
            .field("directory", &self.directory)
            .finish_non_exhaustive()
    }
}

fn failed(what: impl fmt::Display, error: impl fmt::Display) -> CaptureError {
    CaptureError::Other(format!("{what}: {error}"))
}

/// Whether this agent was built with the kernel programs.
#[must_use]
pub fn has_programs() -> bool {
    !OBJECT.is_empty()
}

impl Kernel {
    /// Loads the programs, reusing pinned maps, and attaches them to the cgroup root; pinned links get the new programs.
    ///
    /// # Errors
    /// No bpffs, no cgroup v2, pins of another ABI version, or a kernel without a needed feature, which the error names.
    pub fn load(config: &KernelConfig) -> Result<Kernel, CaptureError> {
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
        let directory = prepare_pins(&config.pin_path)?;

        let mut programs = match load_node_programs(&directory, true) {
            Ok(programs) => programs,
            // Before 5.18 a cgroup program cannot choose the error: a refused connect is EPERM.
            Err(error) => match load_node_programs(&directory, false) {
                Ok(programs) => {
                    tracing::warn!("the kernel lacks bpf_set_retval (5.18): refused connects fail with EPERM, not ECONNREFUSED");
                    programs
                }
                Err(_) => return Err(error),
            },
        };
        let cgroup_id = cgroup.metadata().map_err(|error| failed(cgroup_root.display(), error))?.ino();
        for (name, attach_type, _) in NODE_PROGRAMS {
            let program = programs.program(name).ok_or_else(|| failed(name, "not in the object"))?;
            let fd = program.fd().map_err(|error| failed(name, error))?;
            attach(
                fd.as_fd(),
                cgroup.as_fd(),
                cgroup_id,
                attach_type,
                &directory.join("links").join(name),
            )
            .map_err(|error| failed(format!("attaching {name} to {}", cgroup_root.display()), error))?;
        }

        let destinations = take_map(&mut programs, "ORIGINAL_DESTINATIONS")?;
        let Map::HashMap(data) = &destinations else {
            return Err(failed("ORIGINAL_DESTINATIONS", "not a hash map"));
        };
        let destinations_fd = data
            .fd()
            .as_fd()
            .try_clone_to_owned()
            .map_err(|error| failed("ORIGINAL_DESTINATIONS", error))?;
        let kernel = Kernel {
            pods: Mutex::new(typed(take_map(&mut programs, "PODS")?)?),
            heartbeat: Mutex::new(typed(take_map(&mut programs, "HEARTBEAT")?)?),
            agent_sockets: Mutex::new(typed(take_map(&mut programs, "AGENT_SOCKETS")?)?),
            destinations: Mutex::new(typed(destinations)?),
            destinations_fd,
            listeners: Mutex::new(typed(take_map(&mut programs, "LISTENERS")?)?),
            counters: typed(take_map(&mut programs, "COUNTERS")?)?,
            beats: AtomicU32::new(0),
            directory,
        };
        kernel.sweep_destinations(|_, age_ns| age_ns > DESTINATION_AGE_NS);
        Ok(kernel)
    }

    /// Enrols a network namespace, or changes what is known of it.
    ///
    /// # Errors
    /// The map is full, or the slot is out of range.
    pub fn add_pod(&self, netns_cookie: u64, value: &PodValue) -> Result<(), CaptureError> {
        check_slot(value.slot)?;
        self.pods
            .lock()
            .insert(netns_cookie, value, 0)
            .map_err(|error| failed("enrolling a network namespace", error))
    }

    /// Releases a network namespace; `Ok` when it was not enrolled.
    ///
    /// # Errors
    /// The map refuses.
    pub fn remove_pod(&self, netns_cookie: u64) -> Result<(), CaptureError> {
        let removed = self.pods.lock().remove(&netns_cookie);
        self.sweep_destinations(|key, _| key.netns_cookie == netns_cookie);
        match removed {
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
        let mut listeners = self.listeners.lock();
        listeners
            .set(slot * LISTENERS_PER_POD + which, &socket, 0)
            .map_err(|error| failed("registering a listener", error))
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
        let (name, feature) = LOOKUP_PROGRAM;
        let mut programs = loader(&self.directory)
            .override_global("SLOT", &slot, true)
            .load(OBJECT)
            .map_err(loading)?;
        let Some(Program::SkLookup(program)) = programs.program_mut(name) else {
            return Err(failed(name, "not in the object"));
        };
        program.load().map_err(|error| program_failed(name, feature, &error))?;
        let fd = program.fd().map_err(|error| failed(name, error))?;
        let inode = nix::sys::stat::fstat(netns)
            .map_err(|error| failed("the Pod's network namespace", error))?
            .st_ino;
        attach(
            fd.as_fd(),
            netns,
            inode,
            AttachType::SkLookup,
            &self.directory.join("pods").join(pin_name(pod_uid)),
        )
        .map_err(|error| failed(format!("attaching {name} to the network namespace of Pod {pod_uid}"), error))
    }

    /// Detaches a Pod's sk_lookup program. `false`: it had none.
    ///
    /// # Errors
    /// The pin cannot be opened or removed.
    pub fn detach_lookup(&self, pod_uid: &str) -> Result<bool, CaptureError> {
        let pin = self.directory.join("pods").join(pin_name(pod_uid));
        match bpf_syscalls::object_get(&pin) {
            Ok(link) => detach(link.as_fd(), &pin)
                .map(|()| true)
                .map_err(|error| failed(format!("detaching sk_lookup of Pod {pod_uid}"), error)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(failed(pin.display(), error)),
        }
    }

    /// The uids of the Pods that have an sk_lookup program.
    ///
    /// # Errors
    /// The pins cannot be listed.
    pub fn attached_pods(&self) -> Result<Vec<String>, CaptureError> {
        let directory = self.directory.join("pods");
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
        bpf_syscalls::map_take(self.destinations_fd.as_fd(), key).map_err(|source| CaptureError::Io {
            step: "taking an original destination",
            source,
        })
    }

    /// Renews the lease: until it is over the programs take the agent for alive.
    ///
    /// # Errors
    /// The map refuses.
    pub fn beat(&self) -> Result<(), CaptureError> {
        self.heartbeat
            .lock()
            .set(0, now_ns()?, 0)
            .map_err(|error| failed("beating", error))?;
        if self.beats.fetch_add(1, Ordering::Relaxed) % SWEEP_EVERY_BEATS == SWEEP_EVERY_BEATS - 1 {
            self.sweep_destinations(|_, age_ns| age_ns > DESTINATION_AGE_NS);
        }
        Ok(())
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

    /// Removes original destinations by key and age, ns: of connections that ended before they were accepted. Entries that
    /// appear or vanish meanwhile may be missed; the next sweep finds them.
    fn sweep_destinations(&self, remove: impl Fn(&RedirectedConnectionKey, u64) -> bool) {
        let Ok(now) = now_ns() else { return };
        let mut destinations = self.destinations.lock();
        let stale: Vec<_> = destinations
            .iter()
            .take(limits::MAX_ORIGINAL_DESTINATIONS as usize)
            .filter_map(Result::ok)
            .filter(|(key, value)| remove(key, now.saturating_sub(value.connected_at_ns)))
            .map(|(key, _)| key)
            .collect();
        for key in &stale {
            let _ = destinations.remove(key);
        }
        if !stale.is_empty() {
            tracing::debug!(removed = stale.len(), "swept original destinations that nobody took");
        }
    }

    /// Detaches and unpins everything of any ABI version below a pin path. Needs no running agent.
    ///
    /// # Errors
    /// A pin cannot be opened or removed; what was removed before stays removed.
    pub fn cleanup(pin_path: &Path) -> Result<CleanupReport, CaptureError> {
        let mut report = CleanupReport::default();
        let names = match names_in(pin_path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(report),
            names => names.map_err(|error| failed(pin_path.display(), error))?,
        };
        for directory in names
            .iter()
            .filter(|name| abi_version(name).is_some())
            .map(|name| pin_path.join(name))
        {
            remove_pins(&directory, &mut report).map_err(|error| failed(directory.display(), error))?;
            report.directories.push(directory);
        }
        match fs::remove_dir(pin_path) {
            // What is not ours stays.
            Err(error) if error.kind() != io::ErrorKind::DirectoryNotEmpty => Err(failed(pin_path.display(), error)),
            _ => Ok(report),
        }
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

fn loader(directory: &Path) -> EbpfLoader<'_> {
    let mut loader = EbpfLoader::new();
    loader.default_map_pin_directory(directory);
    // A map that is declared in BTF cannot ask for its pin by itself.
    for name in ["AGENT_SOCKETS", "ORIGINAL_DESTINATIONS_OF_SOCKETS"] {
        loader.map_pin_path(name, directory.join(name));
    }
    loader
}

fn load_node_programs(directory: &Path, has_set_retval: bool) -> Result<Ebpf, CaptureError> {
    let has_set_retval = u32::from(has_set_retval);
    let mut programs = loader(directory)
        .override_global("HAS_SET_RETVAL", &has_set_retval, true)
        .load(OBJECT)
        .map_err(loading)?;
    for (name, _, feature) in NODE_PROGRAMS {
        let loaded = match programs.program_mut(name) {
            Some(Program::CgroupSockAddr(program)) => program.load(),
            Some(Program::CgroupSock(program)) => program.load(),
            Some(Program::SockOps(program)) => program.load(),
            _ => return Err(failed(name, "not in the object")),
        };
        loaded.map_err(|error| program_failed(name, feature, &error))?;
    }
    Ok(programs)
}

fn loading(error: aya::EbpfError) -> CaptureError {
    failed("loading the kernel programs", chain(&error))
}

fn program_failed(name: &str, feature: &str, error: &ProgramError) -> CaptureError {
    failed(
        format!("loading the kernel program {name}, which needs {feature} and CAP_BPF, CAP_NET_ADMIN"),
        chain(error),
    )
}

/// An error with its causes; aya keeps the reason in them.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

fn take_map(programs: &mut Ebpf, name: &'static str) -> Result<Map, CaptureError> {
    programs.take_map(name).ok_or_else(|| failed(name, "not in the object"))
}

fn typed<T: TryFrom<Map, Error: fmt::Display>>(map: Map) -> Result<T, CaptureError> {
    T::try_from(map).map_err(|error| failed("a kernel map is not of the expected type", error))
}

fn is_missing(error: &aya::maps::MapError) -> bool {
    use aya::maps::MapError;
    match error {
        MapError::KeyNotFound => true,
        MapError::SyscallError(error) => error.io_error.kind() == io::ErrorKind::NotFound,
        _ => false,
    }
}

/// Updates the link that is pinned at `pin`, if it is still attached to the target, or makes and pins a new one.
fn attach(
    program: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    target_id: u64,
    attach_type: AttachType,
    pin: &Path,
) -> io::Result<()> {
    match bpf_syscalls::object_get(pin) {
        Ok(link) => {
            if bpf_syscalls::link_target(link.as_fd())? == target_id {
                return bpf_syscalls::link_update(link.as_fd(), program);
            }
            // Its cgroup or namespace is gone, or another was meant.
            detach(link.as_fd(), pin)?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let link = bpf_syscalls::link_create(program, target, attach_type)?;
    bpf_syscalls::object_pin(link.as_fd(), pin)
}

fn detach(link: BorrowedFd<'_>, pin: &Path) -> io::Result<()> {
    bpf_syscalls::link_detach(link)?;
    fs::remove_file(pin)
}

fn names_in(directory: &Path) -> io::Result<Vec<String>> {
    fs::read_dir(directory)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect()
}

fn remove_pins(directory: &Path, report: &mut CleanupReport) -> io::Result<()> {
    for name in names_in(directory)? {
        let path = directory.join(name);
        if path.is_dir() {
            remove_pins(&path, report)?;
            continue;
        }
        // Only a link can be detached: this tells links from maps in the layout of any version.
        let object = bpf_syscalls::object_get(&path)?;
        match bpf_syscalls::link_detach(object.as_fd()) {
            Ok(()) => report.links_detached += 1,
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => report.maps_removed += 1,
            Err(error) => return Err(error),
        }
        fs::remove_file(&path)?;
    }
    fs::remove_dir(directory)
}

/// The version of a directory `v<number>`.
fn abi_version(name: &str) -> Option<u32> {
    name.strip_prefix('v')?.parse().ok()
}

/// Makes the version's directories on the bpffs, for root only, and refuses another version's.
fn prepare_pins(pin_path: &Path) -> Result<PathBuf, CaptureError> {
    let existing = pin_path.ancestors().find(|path| path.exists()).unwrap_or(pin_path);
    let file_system = statfs(existing).map_err(|error| failed(existing.display(), error))?;
    if file_system.filesystem_type() != BPF_FS_MAGIC {
        return Err(CaptureError::Other(format!(
            "{} is not on a BPF file system: mount one (`mount -t bpf bpf /sys/fs/bpf`) or give another pin path",
            pin_path.display()
        )));
    }
    if let Ok(names) = names_in(pin_path)
        && let Some(other) = names
            .iter()
            .find(|name| abi_version(name).is_some_and(|version| version != ABI_VERSION))
    {
        return Err(CaptureError::Other(format!(
            "{} was left by an agent of another version (this one is v{ABI_VERSION}); release it with `mesh-agent cleanup \
             --pin-path {}` and start again",
            pin_path.join(other).display(),
            pin_path.display()
        )));
    }
    let directory = pin_path.join(format!("v{ABI_VERSION}"));
    for path in [pin_path, &directory, &directory.join("links"), &directory.join("pods")] {
        match DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(path.display(), error)),
            _ => {}
        }
    }
    Ok(directory)
}

fn open_cgroup_root(path: &Path) -> Result<File, CaptureError> {
    let file_system = statfs(path).map_err(|error| failed(path.display(), error))?;
    if file_system.filesystem_type() != CGROUP2_SUPER_MAGIC {
        return Err(CaptureError::Other(format!(
            "{} is not in a cgroup-v2 hierarchy",
            path.display()
        )));
    }
    File::open(path).map_err(|error| failed(path.display(), error))
}

pub(super) fn detect_cgroup_root() -> Result<PathBuf, CaptureError> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(|error| failed("/proc/self/mountinfo", error))?;
    cgroup2_mount(&mounts).ok_or_else(|| {
        CaptureError::Other("no cgroup-v2 hierarchy is mounted; mount one (`mount -t cgroup2 none DIR`) or give its root".into())
    })
}

/// The mount point of the cgroup-v2 root in a mountinfo (proc_pid_mountinfo(5)): /sys/fs/cgroup, or on a machine that also
/// has version 1 commonly /sys/fs/cgroup/unified.
fn cgroup2_mount(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        let is_root = root == "/" && file_system.split(' ').next() == Some("cgroup2");
        is_root.then(|| PathBuf::from(point.replace("\\040", " ")))
    })
}
pub mod inspect;
mod pin_names;
#[cfg(test)]
mod tests;
