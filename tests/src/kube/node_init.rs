//! What a node does from its birth: it takes namespaces and cgroups of its own, mounts what a machine has mounted, starts
//! its services and keeps them running. The binary `mesh-kube-node` is this and no more.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{WaitStatus, wait, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use serde::{Deserialize, Serialize};

use super::hierarchies::{self, Hierarchy, VERSION_2_BESIDE_1};
use crate::run_id::RunId;

const CGROUPS: &str = "/sys/fs/cgroup";
/// A service that ends at once is not started again at once.
const RESTART_INTERVAL: Duration = Duration::from_secs(1);
/// For a socket of the service before; containerd takes half a second.
const SOCKET_DEADLINE: Duration = Duration::from_secs(60);
/// What the kubelet would set on the machine; it is shown these in their stead.
const SYSCTLS: [(&str, &str); 4] = [
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
];
/// Of the machine's own folders, those that a node writes to: over the machine's files lie its own.
const OVERLAID: [&str; 3] = ["etc", "opt", "var"];

#[derive(Debug, Serialize, Deserialize)]
pub struct Spec {
    pub hostname: String,
    /// What the node keeps over a reboot, and its logs.
    pub folder: PathBuf,
    /// The name of its cgroup in every hierarchy.
    pub cgroup: String,
    /// Of its services.
    pub search_path: String,
    /// The CNI plugins to begin with.
    pub cni_plugins: PathBuf,
    pub services: Vec<Service>,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Service {
    pub name: String,
    pub program: PathBuf,
    pub arguments: Vec<String>,
    /// It starts when this socket is there.
    pub after: Option<PathBuf>,
}

impl Spec {
    /// The file with the process id of the node's first process, as the machine sees it.
    #[must_use]
    pub fn pid_file(folder: &Path) -> PathBuf {
        folder.join("pid1")
    }
}

/// In a process of its own, with one thread, in the node's network namespace. Returns when the node has ended.
///
/// # Errors
/// A namespace, a cgroup or a mount is refused.
pub fn run(spec: &Spec) -> Result<()> {
    hierarchies::leave_mounts()?;
    let_others_go()?;
    let scratch = spec.folder.join("cgroups");
    std::fs::create_dir_all(&scratch)?;
    let hierarchies = hierarchies::mount_below(&scratch)?;
    for (hierarchy, root) in &hierarchies {
        enter(hierarchy, root, &spec.cgroup)?;
    }
    // From here on, the cgroups just entered are the roots.
    unshare(CloneFlags::CLONE_NEWCGROUP | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWPID)
        .context("the node's namespaces")?;
    umount2(&scratch, MntFlags::MNT_DETACH)?;
    // SAFETY: this process has one thread.
    #[allow(unsafe_code, reason = "the first process of a PID namespace is a child")]
    match unsafe { fork() }.context("forking")? {
        ForkResult::Parent { child } => {
            std::fs::write(Spec::pid_file(&spec.folder), child.to_string())?;
            // Ends only when everything in the namespace has.
            let status = waitpid(child, None)?;
            bail!("the node ended: {status:?}")
        }
        ForkResult::Child => {
            nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
            let hierarchies: Vec<Hierarchy> = hierarchies.into_iter().map(|(hierarchy, _)| hierarchy).collect();
            mount_all(spec, &hierarchies)?;
            std::fs::write("/proc/sys/kernel/hostname", &spec.hostname)?;
            serve(spec)
        }
    }
}

/// A mount namespace begins with what is mounted on the machine: what other runs have there would live as long as the node.
fn let_others_go() -> Result<()> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").context("reading /proc/self/mounts")?;
    let places = [RunId::base(), PathBuf::from("/run/netns")];
    let of_runs = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(1).map(Path::new))
        .filter(|path| places.iter().any(|place| path.starts_with(place)));
    for path in of_runs {
        // One inside of another is gone with it.
        let _ = umount2(path, MntFlags::MNT_DETACH);
    }
    Ok(())
}

/// Makes the cgroup, if this is not a reboot, and moves this process into it.
fn enter(hierarchy: &Hierarchy, root: &Path, name: &str) -> Result<()> {
    let own = root.join(name);
    if !own.exists() {
        std::fs::create_dir(&own).with_context(|| format!("making the cgroup {}", own.display()))?;
    }
    // A new cgroup of version 1 has no processors, and so takes no process.
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let (parent, own) = (root.join(file), own.join(file));
        if hierarchy.is_version_1() && parent.exists() {
            std::fs::write(&own, std::fs::read(&parent)?).with_context(|| format!("writing {}", own.display()))?;
        }
    }
    std::fs::write(own.join("cgroup.procs"), "0").with_context(|| format!("entering the cgroup {}", own.display()))
}

fn mount_all(spec: &Spec, hierarchies: &[Hierarchy]) -> Result<()> {
    let fresh = |kind: &str, at: &str, options: Option<&str>| {
        mount(Some(kind), at, Some(kind), MsFlags::empty(), options).with_context(|| format!("mounting {kind} at {at}"))
    };
    fresh("proc", "/proc", None)?;
    // With all that is mounted below: it shows the machine's network and cgroups.
    umount2("/sys", MntFlags::MNT_DETACH).context("unmounting /sys")?;
    fresh("sysfs", "/sys", None)?;
    mount_cgroups(hierarchies)?;
    fresh("bpf", "/sys/fs/bpf", None)?;
    fresh("tmpfs", "/run", Some("mode=0755"))?;
    for name in OVERLAID {
        let (upper, work) = (spec.folder.join("upper").join(name), spec.folder.join("work").join(name));
        overlay(
            Path::new("/").join(name).as_path(),
            &upper,
            &work,
            Path::new("/").join(name).as_path(),
        )?;
    }
    std::fs::create_dir_all("/opt/cni/bin")?;
    let (upper, work) = (spec.folder.join("upper/cni"), spec.folder.join("work/cni"));
    overlay(&spec.cni_plugins, &upper, &work, Path::new("/opt/cni/bin"))?;
    // Not on an overlay: containerd makes its own there.
    for name in ["containerd", "kubelet"] {
        let (own, at) = (spec.folder.join(name), Path::new("/var/lib").join(name));
        std::fs::create_dir_all(&own)?;
        std::fs::create_dir_all(&at)?;
        bind(&own, &at)?;
    }
    std::fs::create_dir_all("/run/netns")?;
    for (key, value) in SYSCTLS {
        let shown = Path::new("/run/sysctls").join(key);
        std::fs::create_dir_all(shown.parent().context("a folder")?)?;
        std::fs::write(&shown, value)?;
        bind(&shown, &Path::new("/proc/sys").join(key))?;
    }
    // Pods may ask for mounts that reach the node.
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_SHARED,
        None::<&str>,
    )
    .context("making mounts shared")
}

/// As a machine has them: version 2 alone at the top, or one folder for each.
fn mount_cgroups(hierarchies: &[Hierarchy]) -> Result<()> {
    let root = Path::new(CGROUPS);
    if let [only] = hierarchies {
        only.mount_at(root)?;
        return delegate(root);
    }
    mount(Some("tmpfs"), root, Some("tmpfs"), MsFlags::empty(), Some("mode=0755")).context("mounting the cgroups' tmpfs")?;
    for hierarchy in hierarchies {
        let path = root.join(&hierarchy.name);
        std::fs::create_dir(&path)?;
        hierarchy.mount_at(&path)?;
    }
    Ok(())
}

/// Version 2: controllers are for cgroups without processes of their own, so this one moves down.
fn delegate(root: &Path) -> Result<()> {
    let own = root.join("init");
    if !own.exists() {
        std::fs::create_dir(&own)?;
    }
    std::fs::write(own.join("cgroup.procs"), "0")?;
    let controllers = std::fs::read_to_string(root.join("cgroup.controllers"))?;
    for controller in controllers.split_whitespace() {
        std::fs::write(root.join("cgroup.subtree_control"), format!("+{controller}"))
            .with_context(|| format!("the cgroup controller {controller}"))?;
    }
    Ok(())
}

fn overlay(lower: &Path, upper: &Path, work: &Path, at: &Path) -> Result<()> {
    std::fs::create_dir_all(upper)?;
    std::fs::create_dir_all(work)?;
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.display(),
        upper.display(),
        work.display()
    );
    mount(Some("overlay"), at, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
        .with_context(|| format!("mounting an overlay at {} ({options})", at.display()))
}

fn bind(from: &Path, at: &Path) -> Result<()> {
    mount(Some(from), at, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("mounting {} at {}", from.display(), at.display()))
}

/// A cgroup of version 2 of its own, another one at each start, as systemd makes it. (Of version 1 it stays in the node's.)
fn cgroup_of(service: &str) -> Result<PathBuf> {
    let beside_1 = Path::new(CGROUPS).join(VERSION_2_BESIDE_1);
    let root = if beside_1.is_dir() { beside_1 } else { PathBuf::from(CGROUPS) };
    let own = root.join("system.slice").join(format!("{service}.service"));
    // Of the start before; what still lives in it keeps it.
    let _ = std::fs::remove_dir(&own);
    std::fs::create_dir_all(&own).with_context(|| format!("making the cgroup {}", own.display()))?;
    Ok(own)
}

/// As the first process of the node: services that end are started again, and orphans are waited for.
fn serve(spec: &Spec) -> Result<()> {
    let mut running = Vec::new();
    for service in &spec.services {
        if let Some(socket) = &service.after {
            let start = Instant::now();
            while !socket.exists() {
                if start.elapsed() > SOCKET_DEADLINE {
                    bail!("{} waited {SOCKET_DEADLINE:?} for {}", service.name, socket.display());
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        running.push((start(spec, service)?, service));
    }
    loop {
        let ended = match wait()? {
            WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _) => pid,
            _ => continue,
        };
        if let Some((pid, service)) = running.iter_mut().find(|(pid, _)| *pid == ended) {
            std::thread::sleep(RESTART_INTERVAL);
            *pid = start(spec, service)?;
        }
    }
}

fn start(spec: &Spec, service: &Service) -> Result<Pid> {
    let log = spec.folder.join(format!("{}.log", service.name));
    let log = OpenOptions::new().create(true).append(true).open(log)?;
    let procs = OpenOptions::new()
        .write(true)
        .open(cgroup_of(&service.name)?.join("cgroup.procs"))?;
    let mut command = Command::new(&service.program);
    command
        .args(&service.arguments)
        .env("PATH", &spec.search_path)
        .current_dir("/")
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    // SAFETY: one system call on a descriptor that the closure owns, as is required between fork and exec.
    #[allow(unsafe_code, reason = "the child enters its cgroup before it executes")]
    unsafe {
        command.pre_exec(move || (&procs).write_all(b"0"));
    }
    let child = command.spawn().with_context(|| format!("starting {}", service.name))?;
    Ok(Pid::from_raw(i32::try_from(child.id())?))
}
