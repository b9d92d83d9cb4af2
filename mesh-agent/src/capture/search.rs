//! Finding a network namespace that lives, though the path that a record names is gone: a container that was started again has
//! another process, and a mount of /run/netns may not reach the agent.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::netns::NetNamespace;

/// The namespace with that cookie, if a process that we see is in it or a mount that we see holds it. `inode`, where it is known,
/// spares entering the others.
pub(super) fn find(cookie: u64, inode: Option<u64>) -> Option<NetNamespace> {
    let mut seen = HashSet::new();
    of_processes().chain(of_mounts()).find_map(|path| {
        let of_path = fs::metadata(&path).ok()?.ino();
        if inode.is_some_and(|inode| inode != of_path) || !seen.insert(of_path) {
            return None;
        }
        NetNamespace::open(&path).ok().filter(|netns| netns.cookie() == cookie)
    })
}

fn of_processes() -> impl Iterator<Item = PathBuf> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter(|entry| entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit))
        .map(|entry| entry.path().join("ns/net"))
}

fn of_mounts() -> impl Iterator<Item = PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mounted(&mounts).into_iter()
}

/// Mount points of network namespaces in a mountinfo (proc_pid_mountinfo(5)).
fn mounted(mountinfo: &str) -> Vec<PathBuf> {
    let point = |line: &str| {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        let is_netns = root.starts_with("net:[") && file_system.split(' ').next() == Some("nsfs");
        is_netns.then(|| Path::new(&point.replace("\\040", " ")).to_owned())
    };
    mountinfo.lines().filter_map(point).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounted_network_namespaces_are_known() {
        let mounts = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
                      60 25 0:4 net:[4026532] /run/netns/a\\040b rw shared:1 - nsfs nsfs rw\n\
                      61 25 0:4 mnt:[4026533] /run/mnt/c rw - nsfs nsfs rw\n";
        assert_eq!(mounted(mounts), [PathBuf::from("/run/netns/a b")]);
    }
}
