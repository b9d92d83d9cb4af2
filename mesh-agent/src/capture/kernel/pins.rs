//! Pins: the version's directories, links that are updated in place, and removing everything of any version.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use mesh_common::STORAGE_VERSION;
use nix::sys::statfs::{BPF_FS_MAGIC, CGROUP2_SUPER_MAGIC, statfs};

use super::super::CaptureError;
use super::super::bpf_syscalls::{self, AttachType};
use super::failed;
use super::versions::Pins;

/// What [`Kernel::cleanup`] removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CleanupReport {
    pub links_detached: usize,
    pub maps_removed: usize,
    /// Version directories removed.
    pub directories: Vec<PathBuf>,
}

/// [`super::Kernel::cleanup`].
pub(super) fn cleanup(pin_path: &Path) -> Result<CleanupReport, CaptureError> {
    let mut report = CleanupReport::default();
    let names = match names_in(pin_path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(report),
        names => names.map_err(|error| failed(pin_path.display(), error))?,
    };
    for directory in names
        .iter()
        .filter(|name| storage_version(name).is_some())
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

/// The links that a start has made. They go with it if it fails: with half of them attached nothing works, and nobody knows.
#[derive(Default)]
pub(super) struct NewLinks(Vec<PathBuf>);

impl NewLinks {
    pub(super) fn add(&mut self, pin: PathBuf) {
        self.0.push(pin);
    }

    /// The start succeeded.
    pub(super) fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for NewLinks {
    fn drop(&mut self) {
        for pin in self.0.drain(..).rev() {
            let undone = bpf_syscalls::object_get(&pin).and_then(|link| detach(link.as_fd(), &pin));
            if let Err(error) = undone {
                tracing::error!(pin = %pin.display(), %error, "what a failed start attached cannot be detached: run `mesh-agent cleanup`");
            }
        }
    }
}

/// Updates the link that is pinned at `pin`, if it is still attached to the target, or makes and pins a new one. True: a new one.
pub(super) fn attach(
    program: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    target_id: u64,
    attach_type: AttachType,
    pin: &Path,
) -> io::Result<bool> {
    match bpf_syscalls::object_get(pin) {
        Ok(link) => {
            if bpf_syscalls::link_target(link.as_fd())? == target_id {
                return bpf_syscalls::link_update(link.as_fd(), program).map(|()| false);
            }
            // Its cgroup or namespace is gone, or another was meant.
            detach(link.as_fd(), pin)?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let link = bpf_syscalls::link_create(program, target, attach_type)?;
    bpf_syscalls::object_pin(link.as_fd(), pin).map(|()| true)
}

pub(super) fn detach(link: BorrowedFd<'_>, pin: &Path) -> io::Result<()> {
    bpf_syscalls::link_detach(link)?;
    fs::remove_file(pin)
}

pub(super) fn names_in(directory: &Path) -> io::Result<Vec<String>> {
    fs::read_dir(directory)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect()
}

/// In which order pins go, so that a Pod's connection works at every moment: who drops what the agent has not made goes before who
/// has the agent make it; who redirects before who remembers where to; links before the maps that they read.
fn rank(name: &str) -> u8 {
    match name {
        super::backstop::DIRECTORY => 0,
        "connect4" | "connect6" => 1,
        "links" => 2,
        "pods" => 3,
        "connection_events" => 5,
        _ => 4,
    }
}

fn remove_pins(directory: &Path, report: &mut CleanupReport) -> io::Result<()> {
    let mut names = names_in(directory)?;
    names.sort_by_key(|name| rank(name));
    for name in names {
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

/// The storage version of a directory `v<number>`.
pub(super) fn storage_version(name: &str) -> Option<u32> {
    name.strip_prefix('v')?.parse().ok()
}

/// Makes the directories on the bpffs, for root only, and refuses those of another storage version.
pub(super) fn prepare_pins(pin_path: &Path) -> Result<Pins, CaptureError> {
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
            .find(|name| storage_version(name).is_some_and(|version| version != STORAGE_VERSION))
    {
        return Err(CaptureError::Other(format!(
            "{} is of a version that nothing can be taken over from (this one is v{STORAGE_VERSION}); let its agent end, release it \
             with `mesh-agent cleanup --pin-path {}` and start again",
            pin_path.join(other).display(),
            pin_path.display()
        )));
    }
    let pins = Pins::of(pin_path.join(format!("v{STORAGE_VERSION}")));
    for path in [
        pin_path,
        &pins.shared,
        &pins.own,
        &pins.shared.join("links"),
        &pins.shared.join("pods"),
        &pins.shared.join(super::backstop::DIRECTORY),
    ] {
        match DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(path.display(), error)),
            _ => {}
        }
    }
    Ok(pins)
}

pub(super) fn open_cgroup_root(path: &Path) -> Result<File, CaptureError> {
    let file_system = statfs(path).map_err(|error| failed(path.display(), error))?;
    if file_system.filesystem_type() != CGROUP2_SUPER_MAGIC {
        return Err(CaptureError::Other(format!(
            "{} is not in a cgroup-v2 hierarchy",
            path.display()
        )));
    }
    File::open(path).map_err(|error| failed(path.display(), error))
}

pub(in crate::capture) fn detect_cgroup_root() -> Result<PathBuf, CaptureError> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(|error| failed("/proc/self/mountinfo", error))?;
    cgroup2_mount(&mounts).ok_or_else(|| {
        CaptureError::Other("no cgroup-v2 hierarchy is mounted; mount one (`mount -t cgroup2 none DIR`) or give its root".into())
    })
}

/// The mount point of the cgroup-v2 root in a mountinfo (proc_pid_mountinfo(5)): /sys/fs/cgroup, or on a machine that also
/// has version 1 commonly /sys/fs/cgroup/unified.
pub(super) fn cgroup2_mount(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        let is_root = root == "/" && file_system.split(' ').next() == Some("cgroup2");
        is_root.then(|| PathBuf::from(point.replace("\\040", " ")))
    })
}
