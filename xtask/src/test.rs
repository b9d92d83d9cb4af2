//! `cargo xtask test`: every test that this machine can run, counted; what it cannot run is said, and never counts as passed.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};

use crate::workspace::{USER_HALF, Workspace};
use crate::{demo, ebpf, tools};

#[derive(Args)]
pub struct Arguments {
    /// A part of the tests; without it, all of them
    part: Option<Part>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Seconds, no root: tables, protocol state machines, the tunnel on loopback
    Unit,
    /// Minutes, root: the kernel programs, two nodes of namespaces, the demo's claims
    Net,
    /// A real Kubernetes
    Kube,
}

#[derive(Default)]
struct Totals {
    passed: usize,
    failed: usize,
    skipped: Vec<String>,
    /// How many of them were in the harness's summaries.
    reported_skips: usize,
    broken: Vec<String>,
}

pub fn run(workspace: &Workspace, arguments: &Arguments) -> Result<ExitCode> {
    let mut totals = Totals::default();
    let wants = |part| arguments.part.is_none_or(|wanted| wanted == part);
    if wants(Part::Unit) {
        unit(workspace, &mut totals)?;
    }
    if wants(Part::Net) {
        net(workspace, &mut totals)?;
    }
    if wants(Part::Kube) {
        tools::say("kube: there is no Kubernetes suite yet; nothing was tested against a real Kubernetes");
    }
    Ok(totals.report(arguments.part == Some(Part::Kube)))
}

fn unit(workspace: &Workspace, totals: &mut Totals) -> Result<()> {
    heading("unit tests");
    // The object only changes what mesh-agent embeds; without it here, mesh-agent would be built twice.
    let object = if tools::is_root() {
        Some(ebpf::object(workspace)?)
    } else {
        None
    };
    let mut cargo = workspace.cargo(&["test", "--locked", "--no-fail-fast", "--lib", "--bins"]);
    cargo.args(USER_HALF);
    if let Some(object) = &object {
        cargo.env(ebpf::OBJECT_VARIABLE, object);
    }
    totals.count("the unit tests", &mut cargo)?;
    Ok(())
}

fn net(workspace: &Workspace, totals: &mut Totals) -> Result<()> {
    heading("tests with network namespaces and eBPF");
    if !tools::is_root() {
        totals
            .skipped
            .push("net: everything: root is missing (network namespaces, cgroups and eBPF need it)".to_owned());
        return Ok(());
    }
    demo::prepare(workspace)?;
    if !PathBuf::from("/usr/lib/python3/dist-packages/h2").exists() {
        tools::install(
            &["python3", "python3-h2", "openssl"],
            "an HTTP/2 stack that is not ours, to test the tunnel against",
        )?;
    }
    tools::ensure_command("openssl", "openssl", "certificates for the foreign peer")?;
    let object = ebpf::object(workspace)?;
    // Every suite here needs the kernel, so all integration tests are of this part.
    let mut cargo = workspace.cargo(&["test", "--locked", "--no-fail-fast", "--test", "*"]);
    cargo
        .args(USER_HALF)
        .args(["--", "--nocapture"])
        .env(ebpf::OBJECT_VARIABLE, &object)
        .env("CULVERT_BIN_DIR", workspace.binaries());
    totals.count("the integration tests", &mut cargo)?;
    heading("the demo's claims");
    let mut command = Command::new(workspace.binaries().join("mesh-demo"));
    command.arg("--check").env("CULVERT_BIN_DIR", workspace.binaries());
    if command.status().context("starting the demo")?.success() {
        totals.passed += 1;
    } else {
        totals.failed += 1;
        totals.broken.push("the demo".to_owned());
    }
    Ok(())
}

impl Totals {
    /// Runs a test command, shows its output and counts by the harness's own summary lines.
    fn count(&mut self, name: &str, command: &mut Command) -> Result<()> {
        let mut child = command.stdout(Stdio::piped()).spawn().context("starting cargo")?;
        let output = child.stdout.take().context("the output of cargo")?;
        let mut stdout = std::io::stdout();
        let before = (self.passed, self.skipped.len(), self.reported_skips);
        for line in BufReader::new(output).split(b'\n') {
            let line = String::from_utf8_lossy(&line?).into_owned();
            let _ = writeln!(stdout, "{line}");
            self.take(&line);
        }
        // A test of Rust's own harness that skips itself counts as passed there; not here. Suites with our runner say
        // themselves how many they skipped.
        let skipped_themselves = (self.skipped.len() - before.1).saturating_sub(self.reported_skips - before.2);
        self.passed = self.passed.saturating_sub(skipped_themselves).max(before.0);
        if !child.wait()?.success() {
            self.broken.push(name.to_owned());
        }
        Ok(())
    }

    fn take(&mut self, line: &str) {
        // With --nocapture a test's own line may follow the harness's on one line.
        if let Some((_, skipped)) = line.split_once("SKIPPED: ") {
            self.skipped.push(skipped.to_owned());
        }
        if let Some(summary) = line.strip_prefix("test result: ") {
            self.passed += number_before(summary, " passed");
            self.failed += number_before(summary, " failed");
            self.reported_skips += number_before(summary, " ignored");
        }
    }

    fn report(&self, asked_for_kube: bool) -> ExitCode {
        for skipped in &self.skipped {
            tools::say(&format!("skipped: {skipped}"));
        }
        for broken in &self.broken {
            tools::say(&format!("failed: {broken}"));
        }
        let could_have_run = tools::is_root() && std::env::var_os("CI").is_some() && !self.skipped.is_empty();
        if could_have_run {
            tools::say("a test was skipped in CI on a machine with root: that is a failure");
        }
        tools::say(&format!(
            "{} passed, {} failed, {} skipped",
            self.passed,
            self.failed,
            self.skipped.len()
        ));
        let good = self.failed == 0 && self.broken.is_empty() && !could_have_run && !asked_for_kube;
        if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

fn number_before(text: &str, word: &str) -> usize {
    text.split_once(word)
        .and_then(|(before, _)| before.rsplit(' ').next()?.parse().ok())
        .unwrap_or(0)
}

fn heading(text: &str) {
    tools::say(&format!("== {text}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_harness_is_read() {
        let mut totals = Totals::default();
        totals.take("test result: ok. 12 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s");
        totals.take("test a::b ... SKIPPED: a::b: no root");
        totals.take("test result: FAILED. 3 passed; 0 failed; 2 ignored");
        assert_eq!((totals.passed, totals.failed), (15, 1));
        assert_eq!(totals.skipped, ["a::b: no root"]);
    }
}
