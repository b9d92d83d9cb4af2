//! `cargo xtask bench`: builds for release and hands over to the benchmarks' own binary.

use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};
use clap::{Args, Subcommand};

use crate::workspace::Workspace;
use crate::{demo, kube};

/// As many Pods as a large cluster has.
const PODS: u32 = 10_000;
/// As many as show that it runs.
const PODS_BRIEF: u32 = 200;

#[derive(Args)]
pub struct Arguments {
    /// How often everything is measured
    #[arg(long, global = true, default_value_t = 5, value_parser = clap::value_parser!(u8).range(1..=100))]
    rounds: u8,
    /// One JSON object a line instead of a table
    #[arg(long, global = true)]
    json: bool,
    /// Little of everything: to see that it runs. Its figures mean nothing
    #[arg(long, global = true)]
    brief: bool,
    #[command(subcommand)]
    command: Option<BenchCommand>,
}

#[derive(Subcommand)]
enum BenchCommand {
    /// The control plane alone, on a real API server: time and memory with a tenth as many Services as Pods, and half as many policies
    Control {
        /// How many Pods
        #[arg(long)]
        pods: Option<u32>,
    },
}

pub fn run(workspace: &Workspace, arguments: &Arguments) -> Result<ExitCode> {
    let workspace = workspace.for_release();
    demo::prepare(&workspace)?;
    let binaries = workspace.binaries();
    let binary = binaries.join("mesh-bench");
    let mut bench = Command::new(&binary);
    bench.arg(arguments.rounds.to_string()).env("CULVERT_BIN_DIR", binaries);
    if arguments.json {
        bench.arg("--json");
    }
    if arguments.brief {
        bench.arg("--brief");
    }
    if let Some(BenchCommand::Control { pods }) = &arguments.command {
        let pods = pods.unwrap_or(if arguments.brief { PODS_BRIEF } else { PODS });
        match kube::tools(&workspace)? {
            kube::Tools::Here(folder) => bench.env(kube::DIR_VARIABLE, folder),
            kube::Tools::Impossible(why) => bail!("there is no API server to measure on: {why}"),
        };
        bench.args(["--control", &pods.to_string()]);
    }
    Err(bench.exec()).with_context(|| format!("starting {}", binary.display()))
}
