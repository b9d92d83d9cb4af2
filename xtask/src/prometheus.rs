//! A real Prometheus, for the suite of dashboards and alerts: the machine's, or Debian's package unpacked beside the other tools.
//! Unpacked, not installed: an installed one starts a service.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::tools;
use crate::workspace::Workspace;

/// Where the suite looks; `mesh_tests::dashboards::prometheus` has the same name.
pub const FOLDER_VARIABLE: &str = "CULVERT_PROMETHEUS_DIR";
const PACKAGE: &str = "prometheus";
const PROGRAMS: [&str; 2] = ["prometheus", "promtool"];

/// The folder of its programs; unpacked now if the machine has none.
pub fn folder(workspace: &Workspace) -> Result<PathBuf> {
    let on_machine = PROGRAMS.map(tools::find_command);
    if let [Some(server), Some(_)] = &on_machine
        && let Some(folder) = server.parent().filter(|folder| runs(folder))
    {
        return Ok(folder.to_owned());
    }
    let own = tools::cache_folder(workspace).join(PACKAGE);
    if !runs(&own) {
        tools::say("unpacking Debian's prometheus: the dashboards and alerts are tried on a real one");
        unpack(&own)?;
    }
    Ok(own)
}

fn runs(folder: &Path) -> bool {
    PROGRAMS.iter().all(|program| {
        let version = Command::new(folder.join(program)).arg("--version").output();
        version.is_ok_and(|output| output.status.success())
    })
}

fn unpack(own: &Path) -> Result<()> {
    if tools::find_command("apt-get").is_none() {
        bail!("this machine has neither {PACKAGE} nor apt-get");
    }
    // Another xtask may be at it, too: each in a folder of its own, and the first one stays.
    let scratch = own.with_extension(std::process::id().to_string());
    std::fs::create_dir_all(&scratch)?;
    let unpacked = unpack_in(&scratch, own);
    let _ = std::fs::remove_dir_all(&scratch);
    unpacked
}

fn unpack_in(scratch: &Path, own: &Path) -> Result<()> {
    let mut download = Command::new("apt-get");
    // As this user: apt's own may not enter the folder.
    download
        .args(["download", "-q", "-o", "APT::Sandbox::User=root", PACKAGE])
        .current_dir(scratch)
        .stdout(Stdio::null());
    if tools::run(&mut download).is_err() {
        // The lists are old, or there are none yet.
        tools::run(Command::new("apt-get").args(["update", "-q"]).stdout(Stdio::null()))?;
        tools::run(&mut download)?;
    }
    let package = std::fs::read_dir(scratch)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .context("apt-get left no package")?;
    let root = scratch.join("root");
    tools::run(Command::new("dpkg-deb").arg("--extract").arg(package).arg(&root))?;
    let programs = root.join("usr").join("bin");
    if !runs(&programs) {
        bail!("Debian's {PACKAGE} was unpacked and does not run");
    }
    if std::fs::rename(&programs, own).is_err() && !runs(own) {
        // What is there is broken.
        std::fs::remove_dir_all(own).with_context(|| format!("removing {}", own.display()))?;
        std::fs::rename(&programs, own)?;
    }
    Ok(())
}
