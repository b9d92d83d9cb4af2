//! What a machine must have for the testbed; what is missing is named, never worked around.

use std::path::Path;

use crate::{binaries, cgroup};

/// What was found; `None` or `Ok` is good.
struct Found {
    root: bool,
    cgroup: Result<(), String>,
    btf: bool,
    bpffs: bool,
    ipv6: bool,
    ip_command: bool,
    binaries: Result<(), String>,
}

/// What is missing, each with what would help. Empty: everything is there.
#[must_use]
pub fn missing() -> Vec<String> {
    let file_systems = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    named(&Found {
        root: nix::unistd::geteuid().is_root(),
        cgroup: cgroup::mount_point().map(drop).map_err(|error| error.to_string()),
        btf: Path::new("/sys/kernel/btf/vmlinux").exists(),
        bpffs: file_systems.contains("\tbpf\n"),
        ipv6: Path::new("/proc/sys/net/ipv6").exists(),
        ip_command: std::process::Command::new("ip").arg("-Version").output().is_ok(),
        binaries: ["mesh-agent", "mesh-control", "mesh-test-app"]
            .into_iter()
            .try_for_each(|name| binaries::path(name).map(drop).map_err(|error| format!("{name}: {error}"))),
    })
}

fn named(found: &Found) -> Vec<String> {
    let mut missing = Vec::new();
    let mut need = |there: bool, what: &str| {
        if !there {
            missing.push(what.to_owned());
        }
    };
    need(found.root, "root (network namespaces, cgroups and eBPF need it)");
    need(found.btf, "a kernel with BTF (CONFIG_DEBUG_INFO_BTF)");
    need(found.bpffs, "a kernel with the bpf file system (CONFIG_BPF_SYSCALL)");
    need(found.ipv6, "IPv6 in the kernel");
    need(found.ip_command, "the command `ip` (package iproute2)");
    if let Err(error) = &found.cgroup {
        missing.push(format!("{error} (mount -t cgroup2 none /sys/fs/cgroup)"));
    }
    missing.extend(found.binaries.clone().err());
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    fn everything() -> Found {
        Found {
            root: true,
            cgroup: Ok(()),
            btf: true,
            bpffs: true,
            ipv6: true,
            ip_command: true,
            binaries: Ok(()),
        }
    }

    #[test]
    fn what_is_missing_is_named_and_nothing_else() {
        assert_eq!(named(&everything()), Vec::<String>::new());
        type TakeAway = fn(&mut Found);
        let cases: [(TakeAway, &str); 7] = [
            (|found| found.root = false, "root ("),
            (
                |found| found.cgroup = Err("no cgroup-v2 hierarchy".to_owned()),
                "mount -t cgroup2",
            ),
            (|found| found.btf = false, "CONFIG_DEBUG_INFO_BTF"),
            (|found| found.bpffs = false, "CONFIG_BPF_SYSCALL"),
            (|found| found.ipv6 = false, "IPv6"),
            (|found| found.ip_command = false, "iproute2"),
            (|found| found.binaries = Err("mesh-agent: not there".to_owned()), "mesh-agent"),
        ];
        for (take_away, wanted) in cases {
            let mut found = everything();
            take_away(&mut found);
            let missing = named(&found);
            assert!(missing.len() == 1 && missing[0].contains(wanted), "{missing:?}, not {wanted}");
        }
    }
}
