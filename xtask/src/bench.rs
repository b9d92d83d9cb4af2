//! `cargo xtask bench`: builds for release and hands over to the benchmarks' own binary.

use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result};
use clap::Args;

use crate::demo;
use crate::workspace::Workspace;

#[derive(Args)]
pub struct Arguments {
    /// How often everything is measured
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u8).range(1..=100))]
    rounds: u8,
    /// One JSON object a line instead of a table
    #[arg(long)]
    json: bool,
    /// Little of everything: to see that it runs. Its figures mean nothing
    #[arg(long)]
    brief: bool,
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
    Err(bench.exec()).with_context(|| format!("starting {}", binary.display()))
}
