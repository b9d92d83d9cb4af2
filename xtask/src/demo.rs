//! `cargo xtask demo`: builds, sees to what the machine lacks, and hands over to the demo's own binary.

use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};
use clap::{Args, Subcommand};

use crate::tools;
use crate::workspace::Workspace;

#[derive(Args)]
pub struct Arguments {
    /// Proves every claim, tidies up and ends, instead of staying up until Ctrl-C
    #[arg(long)]
    check: bool,
    #[command(subcommand)]
    command: Option<DemoCommand>,
}

#[derive(Subcommand)]
enum DemoCommand {
    /// Runs a command in a Pod of the demo that is running in another terminal: `exec client -- <command>`
    Exec {
        pod: String,
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
}

pub fn run(workspace: &Workspace, arguments: &Arguments) -> Result<ExitCode> {
    let binary = workspace.binaries().join("mesh-demo");
    let mut demo = Command::new(&binary);
    match &arguments.command {
        Some(DemoCommand::Exec { pod, command }) => {
            demo.args(["exec", pod, "--"]).args(command);
        }
        None => {
            prepare(workspace)?;
            demo.env("CULVERT_BIN_DIR", workspace.binaries());
            if arguments.check {
                demo.arg("--check");
            }
        }
    }
    // In place of this process: signals and the exit code are the demo's.
    Err(demo.exec()).with_context(|| format!("starting {}", binary.display()))
}

/// Everything that the testbed needs, built or installed.
pub fn prepare(workspace: &Workspace) -> Result<()> {
    if !tools::is_root() {
        bail!("root is missing: network namespaces, cgroups and eBPF need it (sudo -E cargo xtask …)");
    }
    tools::ensure_command("ip", "iproute2", "the nodes and Pods are network namespaces")?;
    tools::say("building (the first time takes some minutes)");
    workspace.build()?;
    Ok(())
}
