//! `cargo xtask fuzz`: libFuzzer on every parser of bytes from outside. Stable Rust: the coverage instrumentation is LLVM's own.
//!
//! Usually the mesh's own crates alone are instrumented (`fuzz/rustc.sh`): everything else is what the workspace was built with
//! already. `--whole` instruments the dependencies as well, which finds ways through YAML, HTTP and X.509, and takes minutes more.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};
use clap::Args;

use crate::tools;
use crate::workspace::Workspace;

/// As `fuzz/Cargo.toml` has them.
const TARGETS: [&str; 22] = [
    "answer",
    "certificate",
    "cgroup",
    "cni",
    "conflist",
    "connect",
    "discovery",
    "enrol",
    "enrolment",
    "greeting",
    "handover",
    "identity",
    "manifests",
    "memory",
    "netlink",
    "node_pods",
    "reports",
    "request",
    "responses",
    "state",
    "subscriptions",
    "token",
];
/// Seconds for each target among the tests.
const TEST_SECONDS: u32 = 5;
/// The target with a bug, and how long it may take to find it: it takes less than a second.
const PLANTED: &str = "planted";
const PLANTED_SECONDS: u32 = 60;
/// Of what a target says before it fails.
const SHOWN_LINES: usize = 80;
const RSS_LIMIT_MB: u32 = 2048;
/// Of one input.
const TIMEOUT_SECONDS: u32 = 10;

/// What cargo-fuzz passes as well, but for a sanitizer, which needs nightly: the code under test is safe Rust.
const INSTRUMENTATION: [&str; 6] = [
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];
/// What `fuzz/rustc.sh` reads them from.
const INSTRUMENTATION_VARIABLE: &str = "CULVERT_FUZZ_FLAGS";

#[derive(Args)]
pub struct Arguments {
    /// Seconds for each target, beside its corpus
    #[arg(long, default_value_t = 60)]
    time: u32,
    /// Instruments the dependencies, too
    #[arg(long)]
    whole: bool,
    /// Only these
    #[arg(value_parser = TARGETS)]
    targets: Vec<String>,
}

/// The built targets, and where what they make goes.
struct Fuzzer<'a> {
    workspace: &'a Workspace,
    binaries: PathBuf,
    folder: PathBuf,
}

pub fn run(workspace: &Workspace, arguments: &Arguments) -> Result<ExitCode> {
    let fuzzer = Fuzzer::build(workspace, arguments.whole)?;
    let chosen = TARGETS
        .iter()
        .filter(|target| arguments.targets.is_empty() || arguments.targets.iter().any(|chosen| chosen == *target));
    let mut is_clean = true;
    for target in chosen {
        is_clean &= fuzzer.run(target, arguments.time)?;
    }
    if is_clean {
        tools::say("nothing was found");
        return Ok(ExitCode::SUCCESS);
    }
    Ok(ExitCode::FAILURE)
}

/// For `cargo xtask test`: each target whose name contains the filter, briefly. Answers those of them that found something.
pub fn test(workspace: &Workspace, filter: Option<&str>) -> Result<Vec<(&'static str, bool)>> {
    let fuzzer = Fuzzer::build(workspace, false)?;
    let chosen = TARGETS
        .iter()
        .filter(|target| filter.is_none_or(|filter| target.contains(filter)));
    chosen
        .map(|target| Ok((*target, fuzzer.run(target, TEST_SECONDS)?)))
        .collect()
}

impl<'a> Fuzzer<'a> {
    fn build(workspace: &'a Workspace, whole: bool) -> Result<Self> {
        tools::ensure_command("g++", "g++", "libFuzzer is C++")?;
        tools::say("building the fuzz targets (the first time takes some minutes)");
        let folder = workspace.target.join("fuzz");
        let mut cargo = workspace.cargo(&["build", "--locked", "--manifest-path", "fuzz/Cargo.toml"]);
        let binaries = if whole {
            // With a target named, procedural macros are built without the instrumentation.
            let host = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
            cargo
                .args(["--release", "--target", &host])
                .env("CARGO_ENCODED_RUSTFLAGS", INSTRUMENTATION.join("\x1f"))
                .env("CARGO_TARGET_DIR", folder.join("build"));
            folder.join("build").join(host).join("release")
        } else {
            cargo
                .env("RUSTC_WRAPPER", workspace.root.join("fuzz/rustc.sh"))
                .env(INSTRUMENTATION_VARIABLE, INSTRUMENTATION.join(" "));
            workspace.binaries()
        };
        tools::run(&mut cargo)?;
        let fuzzer = Self {
            workspace,
            binaries,
            folder,
        };
        fuzzer.find_planted()?;
        Ok(fuzzer)
    }

    /// What finds nothing is believed where it finds what is there.
    fn find_planted(&self) -> Result<()> {
        let findings = self.folder.join("findings").join(PLANTED);
        std::fs::create_dir_all(&findings)?;
        let limit = format!("-max_total_time={PLANTED_SECONDS}");
        let (is_clean, said) = self.start(PLANTED, &findings, &limit, &[])?;
        if is_clean || !said.contains("the planted bug") {
            bail!("the fuzzer did not find the bug that is planted for it: what it does not find elsewhere says nothing");
        }
        tools::say("the planted bug was found");
        Ok(())
    }

    /// The committed corpus, then what comes of it. False: it crashed, hung or grew.
    fn run(&self, target: &str, seconds: u32) -> Result<bool> {
        tools::say(&format!("== {target}: its corpus, then {seconds} s"));
        let committed = self.workspace.root.join("fuzz/corpus").join(target);
        if !committed.is_dir() {
            bail!("{} is missing: a target starts from a corpus", committed.display());
        }
        // What is found on the way stays out of the checkout.
        let [grown, findings] = ["grown", "findings"].map(|kind| self.folder.join(kind).join(target));
        for made in [&grown, &findings] {
            std::fs::create_dir_all(made)?;
        }
        let run = |limit: &str, corpora: &[&Path]| -> Result<bool> {
            let (is_clean, said) = self.start(target, &findings, limit, corpora)?;
            if is_clean {
                tools::say(&format!("   {}", summary(&said)?));
            } else {
                let lines: Vec<&str> = said.lines().collect();
                lines[lines.len().saturating_sub(SHOWN_LINES)..]
                    .iter()
                    .for_each(|line| tools::say(line));
            }
            Ok(is_clean)
        };
        let is_clean = run("-runs=0", &[&committed])?
            && (seconds == 0 || run(&format!("-max_total_time={seconds}"), &[&grown, &committed])?);
        if !is_clean {
            tools::say(&format!(
                "{target}: something was found; its input is in {}. Give it to {} to see it again; a copy in fuzz/corpus/{target} \
                 keeps it found",
                findings.display(),
                self.binaries.join(target).display()
            ));
        }
        Ok(is_clean)
    }

    /// Whether it ended well, and what it said: it is much, and of use only when something was found.
    fn start(&self, target: &str, findings: &Path, limit: &str, corpora: &[&Path]) -> Result<(bool, String)> {
        let said = self.folder.join(format!("{target}.log"));
        let mut command = Command::new(self.binaries.join(target));
        command
            .arg(format!("-rss_limit_mb={RSS_LIMIT_MB}"))
            .arg(format!("-timeout={TIMEOUT_SECONDS}"))
            .arg(format!("-artifact_prefix={}/", findings.display()))
            .args(["-print_final_stats=1", "-print_funcs=0", limit])
            .args(corpora)
            .env("RUST_BACKTRACE", "1")
            .stderr(File::create(&said)?);
        let status = command.status();
        let is_clean = status
            .with_context(|| format!("starting the fuzz target {target}"))?
            .success();
        Ok((is_clean, String::from_utf8_lossy(&std::fs::read(&said)?).into_owned()))
    }
}

/// How much was run. A target that reached nothing was not tested: its instrumentation is missing, or its corpus.
fn summary(said: &str) -> Result<String> {
    let number = |text: &str| text.split_whitespace().next().and_then(|word| word.parse::<u64>().ok());
    let after = |mark: &str| said.rsplit_once(mark).and_then(|(_, rest)| number(rest));
    let executions = after("stat::number_of_executed_units:");
    let edges = after(" cov: ");
    match (executions, edges) {
        (Some(executions @ 1..), Some(edges @ 1..)) => Ok(format!("{executions} executions, {edges} edges reached")),
        _ => bail!("the fuzz target ran nothing, or is not instrumented: {executions:?} executions, {edges:?} edges"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_is_run() {
        let targets = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/targets")).unwrap();
        let mut names: Vec<_> = targets
            .map(|entry| entry.unwrap().path().file_stem().unwrap().to_owned())
            .filter(|name| name != PLANTED)
            .collect();
        names.sort();
        assert_eq!(names, TARGETS);
    }

    #[test]
    fn what_was_run_is_said_and_nothing_is_an_error() {
        let said =
            "#7\tINITED cov: 12 ft: 20 corp: 3/9b\n#99\tDONE   cov: 31 ft: 40\nstat::number_of_executed_units: 99\nstat::x: 1";
        assert_eq!(summary(said).unwrap(), "99 executions, 31 edges reached");
        for nothing in [
            "",
            "#2\tDONE cov: 0 ft: 1\nstat::number_of_executed_units: 2",
            "#2\tDONE cov: 5 ft: 1",
        ] {
            assert!(summary(nothing).is_err(), "{nothing}");
        }
    }
}
