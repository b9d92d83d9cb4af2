//! What a machine must have for the testbed; what is missing is named, never worked around.

use std::path::Path;

use crate::{binaries, cgroup};

/// What is missing, each with what would help. Empty: everything is there.
#[must_use]
pub fn missing() -> Vec<String> {
    let mut missing = Vec::new();
    if !nix::unistd::geteuid().is_root() {
        missing.push("root (network namespaces, cgroups and eBPF need it)".to_owned());
    }
    if let Err(error) = cgroup::mount_point() {
        missing.push(format!("{error} (mount -t cgroup2 none /sys/fs/cgroup)"));
    }
    if !Path::new("/sys/kernel/btf/vmlinux").exists() {
        missing.push("a kernel with BTF (CONFIG_DEBUG_INFO_BTF)".to_owned());
    }
    if !std::fs::read_to_string("/proc/filesystems")
        .unwrap_or_default()
        .contains("\tbpf\n")
    {
        missing.push("a kernel with the bpf file system (CONFIG_BPF_SYSCALL)".to_owned());
    }
    if !Path::new("/proc/sys/net/ipv6").exists() {
        missing.push("IPv6 in the kernel".to_owned());
    }
    if std::process::Command::new("ip").arg("-Version").output().is_err() {
        missing.push("the command `ip` (package iproute2)".to_owned());
    }
    for name in ["mesh-agent", "mesh-control", "mesh-test-app"] {
        if let Err(error) = binaries::path(name) {
            missing.push(format!("{name}: {error}"));
            break;
        }
    }
    missing
}
