//! A network namespace with a name, made and removed with iproute2.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use nix::sched::{CloneFlags, setns};

use crate::run_id::RunId;

const FOLDER: &str = "/run/netns";

#[derive(Debug)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// A new namespace with its loopback up.
    ///
    /// # Errors
    /// iproute2 refuses.
    pub fn create(name: String) -> Result<Self> {
        ip(&["netns", "add", &name])?;
        let netns = Self { name };
        netns.batch(&["link set lo up".to_owned()])?;
        Ok(netns)
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    #[must_use]
    pub fn path(&self) -> PathBuf {
        Path::new(FOLDER).join(&self.name)
    }

    /// Runs lines of `ip` in the namespace.
    ///
    /// # Errors
    /// The first line that fails ends the batch.
    pub fn batch(&self, lines: &[String]) -> Result<()> {
        let mut child = Command::new("ip")
            .args(["-n", &self.name, "-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting `ip` (package iproute2)")?;
        let mut input = child.stdin.take().context("the batch's input")?;
        input.write_all(lines.join("\n").as_bytes())?;
        drop(input);
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!(
                "`ip -n {} -batch`: {}\n{}",
                self.name,
                String::from_utf8_lossy(&output.stderr).trim(),
                lines.join("\n")
            );
        }
        Ok(())
    }

    /// Runs `f` on a thread of its own inside the namespace.
    ///
    /// # Errors
    /// The namespace cannot be entered, or what `f` answers.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        within(&self.path(), f)
    }

    /// Writes a `/proc/sys/net` key of the namespace, as "ipv4.ip_forward".
    ///
    /// # Errors
    /// No such key, or not allowed.
    pub fn set_sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = sysctl_path(key);
        self.run(|| std::fs::write(&path, value).with_context(|| format!("writing {path}")))
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = ip(&["netns", "del", &self.name]);
    }
}

/// Runs `f` on a thread of its own inside the network namespace at `path`.
///
/// # Errors
/// The namespace cannot be entered, or what `f` answers.
pub fn within<T: Send>(path: &Path, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let netns = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    std::thread::scope(|scope| {
        scope
            .spawn(move || {
                setns(&netns, CloneFlags::CLONE_NEWNET).context("entering the network namespace")?;
                f()
            })
            .join()
            .unwrap_or_else(|_| bail!("the thread in {} panicked", path.display()))
    })
}

/// Removes the namespaces of runs that were killed.
pub fn sweep() {
    let Ok(entries) = std::fs::read_dir(FOLDER) else { return };
    for name in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        if RunId::is_left_behind(&name) {
            let _ = ip(&["netns", "del", &name]);
        }
    }
}

fn sysctl_path(key: &str) -> String {
    format!("/proc/sys/net/{}", key.replace('.', "/"))
}

fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip")
        .args(arguments)
        .output()
        .context("starting `ip` (package iproute2)")?;
    if !output.status.success() {
        bail!(
            "`ip {}`: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
