//! Finding the network namespace of a Pod that runs, by its uid: through its processes.
//!
//! What a process is in is read through one descriptor of its folder in /proc, which is that process's for ever, whoever gets its
//! number next; and its cgroup is read again after its namespace was opened. A namespace counts only if it has an address of the
//! Pod. Where several do, as any process of a Pod can make one and give it that address, the one with a veth to the node counts:
//! no process of a Pod can make that. Processes are looked at in the order in which they were started, the sandbox's first.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::io::Read as _;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::backstop;
use super::netlink::Netlink;
use super::netns::NetNamespace;
use super::network::IoContext as _;
use super::pod_cgroup::{self, PodCgroup};

/// A line for each controller, each with a path; what is longer is no Pod's.
pub(super) const MAX_CGROUP_FILE: u64 = 64 * 1024;
/// Namespaces of a Pod that are looked into: one, and what its own containers make.
const MAX_NAMESPACES_OF_POD: usize = 16;

/// A Pod to be found.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub uid: Arc<str>,
    pub addresses: Vec<IpAddr>,
}

#[derive(Debug)]
pub struct Found {
    pub netns: NetNamespace,
    /// Where it was found, for a later agent to look first.
    pub path: PathBuf,
    /// The container's, where it can be seen from here.
    pub cgroup: Option<PathBuf>,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum FindError {
    #[error("no process of it is seen on the node (does the agent see the node's processes, as with hostPID?)")]
    NoProcess,
    #[error("its processes are in the node's own network namespace")]
    HostNetwork,
    #[error("none of its processes is in a network namespace with an address of the Pod's")]
    NoAddress,
    #[error("its processes are in {0} network namespaces that have an address of the Pod's: which is the Pod's cannot be told")]
    Ambiguous(usize),
}

impl FindError {
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoProcess => "no_process",
            Self::HostNetwork => "host_network",
            Self::NoAddress => "no_address",
            Self::Ambiguous(_) => "ambiguous",
        }
    }
}

/// What is seen of one Pod's processes.
#[derive(Default)]
struct Seen {
    /// By inode, while each is held open: what was looked into.
    looked_into: Vec<(u64, NetNamespace)>,
    of_pod: BTreeMap<u64, Found>,
    on_host: bool,
    elsewhere: bool,
}

/// One walk over the node's processes, for all at once.
pub(super) fn find(wanted: Vec<Wanted>, node_cookie: u64, cgroups: &Cgroups) -> HashMap<Arc<str>, Result<Found, FindError>> {
    let mut by_uid: HashMap<String, (Wanted, Seen)> = wanted
        .into_iter()
        .filter_map(|wanted| Some((pod_cgroup::normal_uid(&wanted.uid)?, (wanted, Seen::default()))))
        .collect();
    let mut of_wanted: Vec<(u64, PathBuf)> = processes()
        .filter(|process| read_cgroup(process).is_some_and(|found| by_uid.contains_key(&found.uid)))
        .filter_map(|process| Some((started(&process)?, process)))
        .collect();
    of_wanted.sort();
    for (_, process) in of_wanted {
        // One that has ended meanwhile is no loss.
        let _ = look_at(&process, &mut by_uid, node_cookie, cgroups);
    }
    by_uid
        .into_values()
        .map(|(wanted, seen)| (wanted.uid, seen.verdict()))
        .collect()
}

fn look_at(
    process: &Path,
    by_uid: &mut HashMap<String, (Wanted, Seen)>,
    node_cookie: u64,
    cgroups: &Cgroups,
) -> Result<(), super::CaptureError> {
    const STEP: &str = "looking at a process";
    let folder = File::open(process).step(STEP)?;
    let pinned = PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd()));
    let Some(of_pod) = read_cgroup(&pinned) else { return Ok(()) };
    let Some((wanted, seen)) = by_uid.get_mut(&of_pod.uid) else {
        return Ok(());
    };
    let inode = fs::metadata(pinned.join("ns/net")).step(STEP)?.ino();
    if seen.looked_into.iter().any(|(known, _)| *known == inode) || seen.looked_into.len() >= MAX_NAMESPACES_OF_POD {
        return Ok(());
    }
    let netns = NetNamespace::open(&pinned.join("ns/net"))?;
    if read_cgroup(&pinned).is_none_or(|again| again.uid != of_pod.uid) {
        return Ok(());
    }
    seen.looked_into.push((inode, netns.try_clone()?));
    if netns.cookie() == node_cookie {
        seen.on_host = true;
        return Ok(());
    }
    let present = netns.run(|| Netlink::open().and_then(|netlink| netlink.addresses()).step(STEP))?;
    let has_address = (wanted.addresses.iter()).any(|wanted| present.iter().any(|(ip, _)| *ip == wanted.to_canonical()));
    if !has_address {
        seen.elsewhere = true;
        return Ok(());
    }
    let found = Found {
        path: process.join("ns/net"),
        cgroup: of_pod.path.as_deref().and_then(|path| cgroups.folder(path)),
        netns,
    };
    seen.of_pod.entry(found.netns.cookie()).or_insert(found);
    Ok(())
}

fn read_cgroup(process: &Path) -> Option<PodCgroup> {
    let mut text = String::new();
    File::open(process.join("cgroup"))
        .ok()?
        .take(MAX_CGROUP_FILE)
        .read_to_string(&mut text)
        .ok()?;
    pod_cgroup::parse(&text)
}

/// When it was started, in clock ticks since the boot: the 22nd field of proc_pid_stat(5), of which the second may have any characters.
fn started(process: &Path) -> Option<u64> {
    let stat = fs::read_to_string(process.join("stat")).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// Of these namespaces, those that a process of the node is in.
pub(super) fn inhabited(namespaces: Vec<(Arc<str>, NetNamespace)>) -> Result<HashSet<Arc<str>>, super::CaptureError> {
    let mut by_inode = HashMap::new();
    for (uid, netns) in &namespaces {
        let status = nix::sys::stat::fstat(netns.as_fd()).map_err(std::io::Error::from);
        by_inode.insert(status.step("looking at a network namespace")?.st_ino, uid);
    }
    let found = processes().filter_map(|process| by_inode.get(&fs::metadata(process.join("ns/net")).ok()?.ino()).copied());
    Ok(found.cloned().collect())
}

/// A process of another Pod in the namespace, by that Pod's uid.
pub(super) fn other_pod_in(netns: &NetNamespace, uid: &str) -> Result<Option<String>, super::CaptureError> {
    const STEP: &str = "looking at a network namespace";
    let of_pod = pod_cgroup::normal_uid(uid);
    let inode = nix::sys::stat::fstat(netns.as_fd())
        .map_err(std::io::Error::from)
        .step(STEP)?
        .st_ino;
    let in_it =
        processes().filter(|process| fs::metadata(process.join("ns/net")).is_ok_and(|of_process| of_process.ino() == inode));
    Ok(in_it
        .filter_map(|process| read_cgroup(&process))
        .map(|found| found.uid)
        .find(|found| Some(found) != of_pod.as_ref()))
}

pub(super) fn processes() -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit))
        .map(|entry| entry.path())
}

impl Seen {
    fn verdict(mut self) -> Result<Found, FindError> {
        if self.of_pod.len() > 1 {
            let has_veth = |found: &Found| backstop::host_ends(&found.netns).is_ok_and(|ends| !ends.is_empty());
            let (with_veth, without): (BTreeMap<_, _>, BTreeMap<_, _>) =
                self.of_pod.into_iter().partition(|(_, found)| has_veth(found));
            self.of_pod = if with_veth.is_empty() { without } else { with_veth };
        }
        let count = self.of_pod.len();
        match self.of_pod.pop_first() {
            Some((_, found)) if count == 1 => Ok(found),
            Some(_) => Err(FindError::Ambiguous(count)),
            None if self.elsewhere => Err(FindError::NoAddress),
            None if self.on_host => Err(FindError::HostNetwork),
            None => Err(FindError::NoProcess),
        }
    }
}

/// Where the folders of containers' cgroups are.
#[derive(Debug)]
pub(super) struct Cgroups {
    /// Of version 2.
    pub mount: Option<PathBuf>,
    /// Where the node's programs are attached: a probe outside of it would prove nothing.
    pub root: PathBuf,
}

impl Cgroups {
    fn folder(&self, path: &str) -> Option<PathBuf> {
        let folder = self.mount.as_ref()?.join(path.trim_start_matches('/'));
        (folder.starts_with(&self.root) && folder.is_dir()).then_some(folder)
    }
}
