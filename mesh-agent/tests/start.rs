//! The real agent on kernels that lack what it needs: it says what, and nothing of it stays attached. Needs root and the kernel
//! programs.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test file")]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

use aya::maps::MapData;
use mesh_agent::capture::kernel::{Kernel, KernelConfig, has_programs};
use mesh_common::STORAGE_VERSION;

const OLDER_KERNEL: &str = include_str!("start/older_kernel.py");

/// The programs as an older kernel refuses them, and what is to be said of each.
const PROGRAMS: [(&str, &str); 11] = [
    ("connect4", "5.14"),
    ("connect6", "5.14"),
    ("bind4", "5.14"),
    ("bind6", "5.14"),
    ("getpeername4", "5.8"),
    ("getpeername6", "5.8"),
    ("getsockname4", "5.8"),
    ("getsockname6", "5.8"),
    ("connection_events", "5.15"),
    ("socket_create", "5.7"),
    ("steer", "sk_lookup (5.9)"),
];

/// Where one agent may start, and nothing else is: a run directory, a bpffs, a cgroup.
struct Machine {
    folder: tempfile::TempDir,
    cgroup: PathBuf,
}

impl Machine {
    fn new(test: &str) -> Option<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let missing = if !nix::unistd::geteuid().is_root() {
            "root"
        } else if !has_programs() {
            "EBPF_OBJECT at build time"
        } else {
            ""
        };
        if !missing.is_empty() {
            println!("SKIPPED: start::{test}: missing {missing}");
            return None;
        }
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let root = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2")).unwrap();
        let name = format!("cvstart{}x{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let machine = Self {
            folder: tempfile::tempdir().unwrap(),
            cgroup: Path::new(root.split(' ').nth(1).unwrap()).join(name),
        };
        fs::create_dir_all(machine.cgroup.join("agent")).unwrap();
        fs::create_dir(machine.folder.path().join("bpf")).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "bpf", "bpf"])
            .arg(machine.folder.path().join("bpf"))
            .status();
        assert!(mounted.unwrap().success());
        let token = serde_json::json!({
            "node": "node-1", "secret": "secret", "root_sha256": "00".repeat(32), "address": "127.0.0.1:1",
        });
        fs::write(machine.token(), token.to_string()).unwrap();
        fs::set_permissions(machine.token(), fs::Permissions::from_mode(0o600)).unwrap();
        Some(machine)
    }

    fn token(&self) -> PathBuf {
        self.folder.path().join("token")
    }

    fn kernel(&self) -> KernelConfig {
        KernelConfig {
            pin_path: self.folder.path().join("bpf/culvert"),
            cgroup_root: Some(self.cgroup.clone()),
        }
    }

    fn pins(&self) -> PathBuf {
        self.kernel().pin_path.join(format!("v{STORAGE_VERSION}"))
    }

    /// `mesh-agent run` behind a wrapper, to its end, which comes if it runs at all: nobody takes its Pods.
    fn run(&self, wrapper: &[&str]) -> Output {
        Command::new("sh")
            .args(["-ec", "echo $$ > \"$1/agent/cgroup.procs\"; shift; exec \"$@\"", "sh"])
            .arg(&self.cgroup)
            .args(wrapper)
            .args(["timeout", "--signal=TERM", "20", env!("CARGO_BIN_EXE_mesh-agent"), "run"])
            .args(["--metrics", "127.0.0.1:0", "--ready", "127.0.0.1:0", "--admin", "127.0.0.1:0"])
            .arg("--token-file")
            .arg(self.token())
            .arg("--run-dir")
            .arg(self.folder.path().join("run"))
            .arg("--pin-path")
            .arg(self.kernel().pin_path)
            .arg("--cgroup-root")
            .arg(&self.cgroup)
            .output()
            .unwrap()
    }

    fn run_on_older_kernel(&self, refuses: &str) -> Output {
        self.run(&["/usr/bin/python3", "-c", OLDER_KERNEL, refuses, "--"])
    }

    fn links(&self) -> Vec<String> {
        let mut links: Vec<String> = ["links", "pods"]
            .iter()
            .filter_map(|folder| fs::read_dir(self.pins().join(folder)).ok())
            .flat_map(|entries| entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()))
            .collect();
        links.sort();
        links
    }

    /// It failed by itself, said all of `parts`, and left nothing attached.
    fn check_failed(&self, output: &Output, parts: &[&str]) {
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        for part in parts.iter().chain(&["the datapath does not start"]) {
            assert!(said.contains(part), "{part} is missing in {said}");
        }
        assert_eq!(self.links(), Vec::<String>::new(), "{said}");
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = Kernel::cleanup(&self.kernel().pin_path);
        let _ = Command::new("umount").arg(self.folder.path().join("bpf")).status();
        let _ = fs::remove_dir(self.cgroup.join("agent"));
        let _ = fs::remove_dir(&self.cgroup);
    }
}

#[test]
fn each_program_that_the_kernel_refuses_is_named_with_what_it_needs() {
    let Some(machine) = Machine::new("each_program_that_the_kernel_refuses_is_named_with_what_it_needs") else {
        return;
    };
    for (program, feature) in PROGRAMS {
        let output = machine.run_on_older_kernel(&format!("load:{program}"));
        machine.check_failed(
            &output,
            &[&format!("kernel program {program},"), feature, "CAP_BPF", "Invalid argument"],
        );
    }
}

#[test]
fn a_start_that_fails_half_way_detaches_what_it_attached() {
    let Some(machine) = Machine::new("a_start_that_fails_half_way_detaches_what_it_attached") else {
        return;
    };
    for (attach_type, program) in [(10, "connect4"), (30, "getpeername6"), (2, "socket_create")] {
        let output = machine.run_on_older_kernel(&format!("attach:{attach_type}"));
        machine.check_failed(
            &output,
            &[&format!("attaching the kernel program {program}"), "BPF links (5.7"],
        );
    }
    // What was attached before stays: an earlier agent's Pods count on it.
    drop(Kernel::load(&machine.kernel()).unwrap());
    for gone in ["connect6", "socket_create"] {
        fs::remove_file(machine.pins().join("links").join(gone)).unwrap();
    }
    let before = machine.links();
    assert_eq!(before.len(), 8);
    let output = machine.run_on_older_kernel("attach:2");
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(machine.links(), before);
}

#[test]
fn a_root_without_the_rights_is_told_which() {
    let Some(machine) = Machine::new("a_root_without_the_rights_is_told_which") else {
        return;
    };
    for kept in ["", ",+bpf", ",+net_admin,+perfmon"] {
        let bounds = format!("--bounding-set=-bpf,-sys_admin,-perfmon,-net_admin{kept}");
        let output = machine.run(&["setpriv", &bounds]);
        machine.check_failed(&output, &["CAP_BPF", "CAP_NET_ADMIN", "kernel program", "perm"]);
    }
}

#[test]
fn an_agent_outside_of_its_cgroup_leaves_nothing_attached() {
    let Some(machine) = Machine::new("an_agent_outside_of_its_cgroup_leaves_nothing_attached") else {
        return;
    };
    let beside = machine.cgroup.with_extension("beside");
    fs::create_dir(&beside).unwrap();
    let moved = format!("echo $$ > {}/cgroup.procs; exec \"$@\"", beside.display());
    let output = machine.run(&["sh", "-ec", &moved, "sh"]);
    let removed = fs::remove_dir(&beside);
    machine.check_failed(&output, &["--cgroup-root"]);
    removed.unwrap();
}

/// What stands in the way half-way is no link at all.
#[test]
fn a_pin_that_is_no_link_ends_the_start() {
    let Some(machine) = Machine::new("a_pin_that_is_no_link_ends_the_start") else {
        return;
    };
    drop(Kernel::load(&machine.kernel()).unwrap());
    for link in machine.links() {
        fs::remove_file(machine.pins().join("links").join(link)).unwrap();
    }
    let obstacle = machine.pins().join("links/getsockname4");
    MapData::from_pin(machine.pins().join("HEARTBEAT"))
        .unwrap()
        .pin(&obstacle)
        .unwrap();
    let error = Kernel::load(&machine.kernel()).unwrap_err().to_string();
    assert!(error.contains("attaching the kernel program getsockname4"), "{error}");
    assert_eq!(machine.links(), ["getsockname4"]);
}
