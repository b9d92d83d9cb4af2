//! Starting the outbound probe's process: in the Pod's network namespace and a cgroup, as nobody, with nothing to gain.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use super::netns::NetNamespace;

/// nobody and nogroup, as on every Linux system.
const NOBODY: libc::c_long = 65_534;

/// A child that runs `program` there. What is switched is switched between fork and exec.
pub(super) fn command(program: &Path, netns: &NetNamespace, cgroup: &Path) -> io::Result<Command> {
    let procs = File::options().write(true).open(cgroup.join("cgroup.procs"))?;
    let netns = netns.as_fd().try_clone_to_owned()?;
    let mut command = Command::new(program);
    command.env_clear().stdin(Stdio::null()).stdout(Stdio::null());
    before_exec(&mut command, move || {
        (&procs).write_all(b"0")?;
        become_nobody_in(netns.as_raw_fd())
    });
    Ok(command)
}

#[allow(unsafe_code, reason = "std marks what runs between fork and exec as unsafe")]
fn before_exec(command: &mut Command, work: impl FnMut() -> io::Result<()> + Send + Sync + 'static) {
    // SAFETY: the closure makes system calls on descriptors that it owns; it neither allocates nor takes a lock, so that it is
    // sound in the one thread that a fork of a process with many leaves.
    unsafe { command.pre_exec(work) };
}

/// Raw calls: the C library's wrappers of set*id would talk to threads that do not exist after a fork.
#[allow(unsafe_code, reason = "system calls without a wrapper that is safe after fork")]
fn become_nobody_in(netns: libc::c_int) -> io::Result<()> {
    let check = |result: libc::c_long| {
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    };
    // SAFETY: all arguments are integers, or a null pointer with length 0.
    unsafe {
        check(libc::syscall(libc::SYS_setns, netns, libc::CLONE_NEWNET))?;
        check(libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()))?;
        check(libc::syscall(libc::SYS_setresgid, NOBODY, NOBODY, NOBODY))?;
        check(libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY))?;
        check(libc::syscall(libc::SYS_prctl, libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        // Should the agent die first.
        check(libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0))
    }
}

const PROBE_CGROUP_PREFIX: &str = "culvert-probe-";

/// A cgroup of the probe's own, for Pods without a container yet; removed when this is dropped.
#[derive(Debug)]
pub(super) struct ProbeCgroup(PathBuf);

impl ProbeCgroup {
    pub(super) fn create(root: &Path) -> io::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = root.join(format!("{PROBE_CGROUP_PREFIX}{}-{number}", std::process::id()));
        fs::create_dir(&path)?;
        Ok(Self(path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for ProbeCgroup {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.0) {
            tracing::warn!(cgroup = %self.0.display(), %error, "the probe's cgroup stays until the agent's next start");
        }
    }
}

/// Removes what probes of a killed agent left; those that still have a process refuse.
pub(super) fn sweep_probe_cgroups(root: &Path) {
    let Ok(entries) = fs::read_dir(root) else { return };
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with(PROBE_CGROUP_PREFIX) {
            let _ = fs::remove_dir(entry.path());
        }
    }
}
