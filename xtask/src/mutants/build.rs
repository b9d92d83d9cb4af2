//! Building a mutated tree, and running one test of it.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::table::Suite;
use crate::workspace::{USER_HALF, Workspace};
use crate::{ebpf, tools};

/// Our own packages, and crates by their names in file names: another path, another build.
const OWN: [&str; 3] = ["mesh-", "mesh_", "xtask"];

/// What the suites with a set-up of their own start.
const STARTED: [&str; 3] = ["mesh-agent", "mesh-control", "mesh-test-app"];

/// What cargo made: test binaries, and libraries to compile against.
#[derive(Default)]
pub struct Built {
    pub tests: BTreeMap<Suite, PathBuf>,
    pub libraries: BTreeMap<String, PathBuf>,
}

/// The kernel programs, the binaries that the suites start, and the tests.
pub fn build(main: &Workspace, tree: &Workspace, suites: &[Suite]) -> Result<Built> {
    let object = ebpf::build(tree)?;
    let cargo = |arguments: &[&str]| cargo(main, tree, &object, arguments);
    if suites.iter().any(|suite| suite.has_own_runner()) {
        let mut binaries = cargo(&["build", "--locked", "--quiet"]);
        tools::run(binaries.args(STARTED.iter().flat_map(|name| ["--bin", name])))?;
    }
    let mut tests = cargo(&[
        "test",
        "--locked",
        "--quiet",
        "--no-run",
        "--message-format=json-render-diagnostics",
    ]);
    // Each once: cargo takes no `--lib` twice.
    let targets: BTreeSet<Vec<&str>> = suites.iter().map(|suite| suite.cargo_target()).collect();
    tests.args(targets.into_iter().flatten());
    let mut child = tests.stdout(Stdio::piped()).spawn().context("starting cargo")?;
    let messages = BufReader::new(child.stdout.take().context("the output of cargo")?);
    let mut built = Built::default();
    for line in messages.lines() {
        if let Ok(message) = serde_json::from_str(&line?) {
            built.take(&message);
        }
    }
    if !child.wait()?.success() {
        bail!("a mutated tree does not build: a mutant must compile");
    }
    Ok(built)
}

/// Cargo on a copy of the checkout.
pub fn cargo(main: &Workspace, tree: &Workspace, object: &Path, arguments: &[&str]) -> Command {
    // The path of the linker is part of what cargo compares: with the tree's own, every dependency would be built again.
    let linker = format!(
        "CARGO_TARGET_{}_UNKNOWN_LINUX_GNU_LINKER",
        std::env::consts::ARCH.to_uppercase()
    );
    let linked_by = std::env::var_os(&linker).unwrap_or_else(|| OsString::from(main.root.join("xtask/linker.sh")));
    let mut cargo = tree.cargo(arguments);
    cargo
        .args(USER_HALF)
        .env(ebpf::OBJECT_VARIABLE, object)
        .env(linker, linked_by)
        .stderr(Stdio::inherit());
    cargo
}

impl Built {
    fn take(&mut self, message: &Value) {
        if message["reason"] != "compiler-artifact" {
            return;
        }
        let target = &message["target"];
        let name = target["name"].as_str().unwrap_or_default();
        if let Some(executable) = message["executable"].as_str() {
            let is_library = target["kind"][0] == "lib";
            if message["profile"]["test"] == true
                && let Some(suite) = Suite::of_target(name, is_library)
            {
                self.tests.insert(suite, executable.into());
            }
            return;
        }
        let files = message["filenames"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str);
        if let Some(library) = files.into_iter().find(|file| file.ends_with(".rlib")) {
            self.libraries.insert(name.to_owned(), library.into());
        }
    }
}

/// Lends the mutated tree what the checkout has built of others' crates: those are the same, and take most of the time. What cargo
/// may write to is copied; libraries, which are only ever replaced whole, are linked.
pub fn lend_dependencies(main: &Workspace, tree: &Workspace) -> Result<()> {
    lend(&main.binaries(), &tree.binaries())?;
    let of_kernel = |workspace: &Workspace| workspace.target.join("ebpf").join("build");
    for profile in ["release", "bpfel-unknown-none/release"] {
        lend(&of_kernel(main).join(profile), &of_kernel(tree).join(profile))?;
    }
    Ok(())
}

fn lend(from: &Path, to: &Path) -> Result<()> {
    for (folder, linked) in [("deps", true), ("deps", false), ("build", false), (".fingerprint", false)] {
        let (from, to) = (from.join(folder), to.join(folder));
        let Ok(entries) = std::fs::read_dir(&from) else { continue };
        std::fs::create_dir_all(&to)?;
        let mut lent = Vec::new();
        for entry in entries {
            let name = entry?.file_name();
            let text = name.to_string_lossy();
            let is_library = text.ends_with(".rlib") || text.ends_with(".rmeta") || text.ends_with(".so");
            let is_note = folder != "deps" || text.ends_with(".d");
            let wanted = if linked { is_library } else { is_note };
            let bare = if is_library { text.trim_start_matches("lib") } else { &text };
            if wanted && !OWN.iter().any(|own| bare.starts_with(own)) && !to.join(&name).exists() {
                lent.push(from.join(&name));
            }
        }
        for chunk in lent.chunks(200) {
            let mut cp = Command::new("cp");
            cp.arg("--archive").args(linked.then_some("--link")).args(chunk).arg(&to);
            tools::run(&mut cp)?;
        }
    }
    Ok(())
}

/// What became of tests that ran.
pub struct Ran {
    pub output: String,
    pub succeeded: bool,
    pub timed_out: bool,
}

/// Runs to its end or its limit, with all output in a file.
pub fn run_limited(command: &mut Command, log: &Path, limit: Duration) -> Result<Ran> {
    let file = std::fs::File::create(log).with_context(|| format!("creating {}", log.display()))?;
    let mut child = command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file).spawn()?;
    let ended = wait(&mut child, limit)?;
    if ended.is_none() {
        let _ = child.kill();
        let _ = child.wait();
    }
    Ok(Ran {
        output: String::from_utf8_lossy(&std::fs::read(log)?).into_owned(),
        succeeded: ended.is_some_and(|status| status.success()),
        timed_out: ended.is_none(),
    })
}

fn wait(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let start = Instant::now();
    while start.elapsed() < limit {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(None)
}
