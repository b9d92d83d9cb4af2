//! `cargo xtask fuzz`: libFuzzer on every parser of bytes from outside. Stable Rust: the coverage instrumentation is LLVM's own.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Result, bail};
use clap::Args;

use crate::tools;
use crate::workspace::Workspace;

/// As `fuzz/Cargo.toml` has them.
const TARGETS: [&str; 6] = ["connect", "discovery", "identity", "manifests", "netlink", "request"];
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

#[derive(Args)]
pub struct Arguments {
    /// Seconds for each target, beside its corpus
    #[arg(long, default_value_t = 60)]
    time: u32,
    /// Only these
    #[arg(value_parser = TARGETS)]
    targets: Vec<String>,
}

pub fn run(workspace: &Workspace, arguments: &Arguments) -> Result<ExitCode> {
    tools::ensure_command("g++", "g++", "libFuzzer is C++")?;
    let folder = workspace.target.join("fuzz");
    tools::say("building the fuzz targets (the first time takes some minutes)");
    let mut cargo = workspace.cargo(&["build", "--locked", "--release", "--manifest-path", "fuzz/Cargo.toml"]);
    // With a target named, procedural macros are built without the instrumentation.
    let host = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    cargo
        .args(["--target", &host])
        .env("CARGO_ENCODED_RUSTFLAGS", INSTRUMENTATION.join("\x1f"))
        .env("CARGO_TARGET_DIR", folder.join("build"));
    tools::run(&mut cargo)?;
    let binaries = folder.join("build").join(host).join("release");
    let chosen = TARGETS
        .iter()
        .filter(|target| arguments.targets.is_empty() || arguments.targets.iter().any(|chosen| chosen == *target));
    let mut found = Vec::new();
    for target in chosen {
        tools::say(&format!("== {target}: its corpus, then {} s", arguments.time));
        if !fuzz(workspace, &binaries, &folder, target, arguments.time)? {
            found.push(*target);
        }
    }
    if found.is_empty() {
        tools::say("nothing was found");
        return Ok(ExitCode::SUCCESS);
    }
    for target in found {
        let findings = folder.join("findings").join(target);
        tools::say(&format!(
            "{target}: something was found; its input is in {}. Give it to {} to see it again; a copy in fuzz/corpus/{target} keeps it \
             found",
            findings.display(),
            binaries.join(target).display()
        ));
    }
    Ok(ExitCode::FAILURE)
}

/// False: it crashed, hung or grew.
fn fuzz(workspace: &Workspace, binaries: &Path, folder: &Path, target: &str, seconds: u32) -> Result<bool> {
    let committed = workspace.root.join("fuzz/corpus").join(target);
    if !committed.is_dir() {
        bail!("{} is missing: a target starts from a corpus", committed.display());
    }
    // What is found on the way stays out of the checkout.
    let [grown, findings] = ["grown", "findings"].map(|kind| folder.join(kind).join(target));
    for made in [&grown, &findings] {
        std::fs::create_dir_all(made)?;
    }
    let run = |arguments: &[String]| -> Result<bool> {
        let mut command = Command::new(binaries.join(target));
        command
            .arg(format!("-rss_limit_mb={RSS_LIMIT_MB}"))
            .arg(format!("-timeout={TIMEOUT_SECONDS}"))
            .arg(format!("-artifact_prefix={}/", findings.display()))
            .args(["-verbosity=0", "-print_final_stats=1"])
            .args(arguments)
            .env("RUST_BACKTRACE", "1");
        Ok(command.status()?.success())
    };
    let path = |path: &PathBuf| path.display().to_string();
    if !run(&["-runs=0".to_owned(), path(&committed)])? {
        return Ok(false);
    }
    Ok(seconds == 0 || run(&[format!("-max_total_time={seconds}"), path(&grown), path(&committed)])?)
}
