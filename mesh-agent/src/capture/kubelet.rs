//! Who the kubelet of this node is: its cgroup, by which the kernel tells its probes from what others send. And the ports at which
//! Pods say that it asks them.
//!
//! By itself the agent believes a process that is called `kubelet`, runs as root in the node's network namespace and is in no Pod's
//! cgroup. A name alone proves nothing, but who is root on the node could enter the kubelet's cgroup anyway.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Read as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mesh_common::PodValue;

use super::enrol::{Inner, pod_value};
use super::enrolments::EnrolmentRecord;
use super::find::{MAX_CGROUP_FILE, processes};
use super::kernel::PodProbePorts;
use super::network::CaptureError;
use super::{Capture, blocking, pod_cgroup};

const NAME: &str = "kubelet";
/// While it is known: a system call or two for each process in its cgroup. While it is away each look is a walk over all processes,
/// with ever longer pauses between them.
const INTERVAL: Duration = Duration::from_secs(1);
/// While it is known all processes are walked over at each such look: another one may be there by now that could be it.
const WALK_EVERY: u32 = 10;
const LONGEST_INTERVAL: Duration = Duration::from_secs(10);
/// Cgroups of the node, without the Pods', that are looked into for the kubelet. A node has some hundred.
const MAX_CGROUPS: usize = 4096;
/// Processes of the kubelet's cgroup that are looked at; with more it is not the kubelet's own.
const MAX_PROCESSES: usize = 256;
const MAX_FILE: u64 = MAX_CGROUP_FILE;

/// By uid; `None` until they were told.
pub(super) type ProbePorts = Option<Arc<BTreeMap<Arc<str>, Vec<u16>>>>;

/// Whose probes the kernel lets pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kubelet {
    Known { cgroup: PathBuf, id: u64 },
    Unknown(Unknown),
}

impl Default for Kubelet {
    fn default() -> Self {
        Self::Unknown(Unknown::NoProcess)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unknown {
    #[error(
        "no process called kubelet runs as root in the node's network namespace, as far as the agent sees (does it see the node's \
         processes, as with hostPID?); where another process is the kubelet name its cgroup with --kubelet-cgroup"
    )]
    NoProcess,
    #[error(
        "it is in no cgroup below the agent's --cgroup-root, or in that one itself, where anybody could be; give it one of its own"
    )]
    NoCgroup,
    #[error("processes called kubelet are in {0} cgroups; name the kubelet's with --kubelet-cgroup")]
    Ambiguous(usize),
    #[error(
        "its cgroup {cgroup} has process {pid}, which is not root's, and could pass for it; give the kubelet a cgroup of its own"
    )]
    Shared { cgroup: String, pid: u32 },
    #[error(
        "--kubelet-cgroup {0}: there is no such cgroup below the agent's --cgroup-root; give a path below it, as /system.slice/k3s.service"
    )]
    NoSuchCgroup(String),
}

impl Unknown {
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoProcess => "no_process",
            Self::NoCgroup => "no_cgroup",
            Self::Ambiguous(_) => "ambiguous",
            Self::Shared { .. } => "shared",
            Self::NoSuchCgroup(_) => "no_such_cgroup",
        }
    }

    pub const REASONS: [&str; 5] = ["no_process", "no_cgroup", "ambiguous", "shared", "no_such_cgroup"];
}

impl Capture {
    #[must_use]
    pub fn kubelet(&self) -> Kubelet {
        self.kubelet.lock().clone()
    }

    /// Follows the kubelet for ever: it may be started again, in another cgroup of the same name. `named`: its cgroup below the
    /// cgroup root, if not the one of the process of that name.
    pub async fn follow_kubelet(self: Arc<Self>, named: Option<PathBuf>) {
        let mut pause = INTERVAL;
        let mut told = None;
        for turn in (0..WALK_EVERY).cycle() {
            let (root, named) = (self.cgroup_root.clone(), named.clone());
            let before = if turn == 0 { Kubelet::default() } else { self.kubelet() };
            let inner = Arc::clone(&self.inner);
            let looked = blocking(move || {
                let now = look(&root, named.as_deref(), before);
                let id = match &now {
                    Kubelet::Known { id, .. } => Some(*id),
                    Kubelet::Unknown(_) => None,
                };
                // At each look: an earlier agent may have left something else, or one that did not come to take over, or somebody's hand.
                inner.kernel.set_kubelet(inner.node_cookie, id)?;
                Ok(now)
            });
            match looked.await {
                Ok(now) => {
                    if told.as_ref() != Some(&now) {
                        say(&now);
                        *self.kubelet.lock() = now.clone();
                        pause = INTERVAL;
                    } else if matches!(now, Kubelet::Unknown(_)) {
                        pause = (pause * 2).min(LONGEST_INTERVAL);
                    }
                    told = Some(now);
                }
                Err(error) => tracing::error!(%error, "the kernel is not told who the kubelet is"),
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// The ports at which the kubelet asks each Pod of this node, by uid, whether or not it is enrolled yet.
    ///
    /// # Errors
    /// The kernel refuses some.
    pub async fn set_probe_ports(&self, ports: BTreeMap<Arc<str>, Vec<u16>>) -> Result<(), CaptureError> {
        let inner = Arc::clone(&self.inner);
        blocking(move || inner.set_probe_ports(ports)).await
    }
}

impl Inner {
    fn set_probe_ports(&self, ports: BTreeMap<Arc<str>, Vec<u16>>) -> Result<(), CaptureError> {
        let _change = self.change.lock();
        *self.probe_ports.lock() = Some(Arc::new(ports));
        let records: Vec<EnrolmentRecord> = self.pods.lock().values().map(|enrolment| enrolment.record.clone()).collect();
        self.tell_probe_ports(&records)
    }

    /// Until the agent was told any, those stay that an earlier one was told.
    pub(super) fn tell_probe_ports(&self, records: &[EnrolmentRecord]) -> Result<(), CaptureError> {
        let Some(ports) = self.probe_ports.lock().clone() else {
            return Ok(());
        };
        let values: Vec<PodValue> = records.iter().map(pod_value).collect();
        let pods: Vec<PodProbePorts<'_>> = (records.iter().zip(&values))
            .map(|(record, value)| {
                let ports = ports.get(record.pod.uid.as_str()).map(Vec::as_slice).unwrap_or_default();
                probe_ports(record, value, ports)
            })
            .collect();
        self.kernel.set_probe_ports(&pods)
    }

    /// The pieces that were missing.
    pub(super) fn repair_probes(&self, record: &EnrolmentRecord) -> Result<Vec<&'static str>, CaptureError> {
        let ports = self.probe_ports.lock().clone();
        let ports = ports.as_ref().and_then(|ports| ports.get(record.pod.uid.as_str()));
        let ports = ports.map(Vec::as_slice).unwrap_or_default();
        self.kernel.repair_probes(&probe_ports(record, &pod_value(record), ports))
    }
}

fn probe_ports<'a>(record: &EnrolmentRecord, value: &'a PodValue, ports: &'a [u16]) -> PodProbePorts<'a> {
    PodProbePorts {
        slot: record.slot,
        addresses: &value.addresses[..value.address_count as usize],
        ports,
    }
}

fn say(kubelet: &Kubelet) {
    match kubelet {
        Kubelet::Known { cgroup, id } => {
            tracing::info!(cgroup = %cgroup.display(), id, "the kubelet's probes of Pods are known by its cgroup");
        }
        Kubelet::Unknown(why @ Unknown::NoProcess) => {
            tracing::info!("the kubelet's probes are taken for anybody's plaintext: {why}")
        }
        Kubelet::Unknown(why) => tracing::error!(
            reason = why.reason(),
            "the kubelet's probes are taken for anybody's plaintext, and refused where that is: {why}"
        ),
    }
}

fn look(root: &Path, named: Option<&Path>, before: Kubelet) -> Kubelet {
    let found = match named {
        Some(named) => of_name(root, named),
        None => match before {
            Kubelet::Known { cgroup, id } if is_still_its(&cgroup, id) => check(cgroup),
            _ => of_process(root),
        },
    };
    found.unwrap_or_else(Kubelet::Unknown)
}

fn of_name(root: &Path, named: &Path) -> Result<Kubelet, Unknown> {
    let missing = || Unknown::NoSuchCgroup(named.display().to_string());
    let below: PathBuf = named.components().filter(|part| *part != Component::RootDir).collect();
    let is_plain = below.components().all(|part| matches!(part, Component::Normal(_)));
    if below.as_os_str().is_empty() || !is_plain {
        return Err(missing());
    }
    let cgroup = root.join(below);
    cgroup_id(&cgroup).ok_or_else(missing)?;
    check(cgroup)
}

fn of_process(root: &Path) -> Result<Kubelet, Unknown> {
    let Ok(of_node) = fs::metadata("/proc/self/ns/net") else {
        return Err(Unknown::NoProcess);
    };
    let pids: Vec<u32> = processes()
        .filter_map(|process| pid_of_kubelet(&process, of_node.ino()))
        .collect();
    if pids.is_empty() {
        return Err(Unknown::NoProcess);
    }
    let mut cgroups: BTreeSet<PathBuf> = pids.iter().filter_map(|pid| cgroup_of(root, *pid)).collect();
    let count = cgroups.len();
    match cgroups.pop_first() {
        Some(cgroup) if count == 1 => check(cgroup),
        Some(_) => Err(Unknown::Ambiguous(count)),
        None => Err(Unknown::NoCgroup),
    }
}

/// By one descriptor of its folder: another process may have its number next.
fn pid_of_kubelet(process: &Path, netns_inode: u64) -> Option<u32> {
    let folder = File::open(process).ok()?;
    let pinned = PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd()));
    if read(&pinned.join("comm"))?.trim_end() != NAME {
        return None;
    }
    let is_nodes = fs::metadata(pinned.join("ns/net")).ok()?.ino() == netns_inode;
    let cgroup = read(&pinned.join("cgroup"))?;
    let is_pods = cgroup.contains("kubepods") || pod_cgroup::parse(&cgroup).is_some();
    let is_kubelet = is_nodes && !is_pods && is_roots(&read(&pinned.join("status"))?);
    is_kubelet.then(|| process.file_name()?.to_str()?.parse().ok())?
}

/// Of a status file (proc_pid_status(5)): real, effective, saved and file-system user.
fn is_roots(status: &str) -> bool {
    let users = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    users.is_some_and(|users| users.split_ascii_whitespace().all(|user| user == "0"))
}

/// Whether all who are in it may do on the node what they like anyway.
fn check(cgroup: PathBuf) -> Result<Kubelet, Unknown> {
    let id = cgroup_id(&cgroup).ok_or(Unknown::NoCgroup)?;
    let shared_with = |pid| Unknown::Shared {
        cgroup: cgroup.display().to_string(),
        pid,
    };
    for (i, pid) in processes_in(&cgroup).into_iter().enumerate() {
        // One that has ended meanwhile has no status.
        let status = read(&PathBuf::from(format!("/proc/{pid}/status")));
        if i >= MAX_PROCESSES || status.is_some_and(|status| !is_roots(&status)) {
            return Err(shared_with(pid));
        }
    }
    Ok(Kubelet::Known { cgroup, id })
}

fn is_still_its(cgroup: &Path, id: u64) -> bool {
    let is_kubelet = |pid: &u32| read(&PathBuf::from(format!("/proc/{pid}/comm"))).is_some_and(|name| name.trim_end() == NAME);
    cgroup_id(cgroup) == Some(id) && processes_in(cgroup).iter().any(is_kubelet)
}

/// Its folder's inode.
fn cgroup_id(cgroup: &Path) -> Option<u64> {
    let folder = fs::metadata(cgroup).ok().filter(fs::Metadata::is_dir)?;
    Some(folder.ino())
}

/// As this process numbers them.
fn processes_in(cgroup: &Path) -> Vec<u32> {
    let text = read(&cgroup.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

/// The cgroup below `root` that a process is in. Looked for from there, since what /proc says is relative to the reader's own cgroup
/// namespace, whose place in the hierarchy a container does not see.
fn cgroup_of(root: &Path, pid: u32) -> Option<PathBuf> {
    let mut left = vec![root.to_owned()];
    let mut walked = 0;
    while let Some(folder) = left.pop() {
        walked += 1;
        if walked > MAX_CGROUPS {
            return None;
        }
        if folder != root && processes_in(&folder).contains(&pid) {
            return Some(folder);
        }
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let is_pods = entry.file_name().to_string_lossy().contains("kubepods");
            if !is_pods && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                left.push(entry.path());
            }
        }
    }
    None
}

fn read(path: &Path) -> Option<String> {
    let mut text = String::new();
    File::open(path).ok()?.take(MAX_FILE).read_to_string(&mut text).ok()?;
    Some(text)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt as _;
    use std::process::Command;

    use super::*;

    #[test]
    fn only_who_is_root_in_every_way_is_roots() {
        assert!(is_roots("Name:\tkubelet\nUid:\t0\t0\t0\t0\nGid:\t0\t0\t0\t0\n"));
        for users in ["1000\t0\t0\t0", "0\t1000\t0\t0", "65534\t65534\t65534\t65534"] {
            assert!(!is_roots(&format!("Name:\tkubelet\nUid:\t{users}\n")), "{users}");
        }
        assert!(!is_roots(""));
    }

    #[test]
    fn a_cgroup_that_is_named_is_below_the_root_and_not_the_root() {
        let root = tempfile::tempdir().unwrap();
        let own = root.path().join("system.slice/k3s.service");
        fs::create_dir_all(&own).unwrap();
        let id = fs::metadata(&own).unwrap().ino();
        for named in ["/system.slice/k3s.service", "system.slice/k3s.service"] {
            let found = of_name(root.path(), Path::new(named));
            assert_eq!(found, Ok(Kubelet::Known { cgroup: own.clone(), id }));
        }
        // Named or not: who is not root has no place in it.
        let mut somebody = Command::new("sleep");
        if fs::metadata("/proc/self").unwrap().uid() == 0 {
            somebody.uid(65_534);
        }
        let mut somebody = somebody.arg("60").spawn().unwrap();
        fs::write(own.join("cgroup.procs"), format!("{}\n", somebody.id())).unwrap();
        let shared = of_name(root.path(), Path::new("/system.slice/k3s.service")).unwrap_err();
        somebody.kill().unwrap();
        somebody.wait().unwrap();
        assert_eq!(shared.reason(), "shared");
        for named in ["/", "", "/missing", "/system.slice/../..", ".."] {
            let error = of_name(root.path(), Path::new(named)).unwrap_err();
            assert_eq!(error.reason(), "no_such_cgroup", "{named}");
        }
    }
}
