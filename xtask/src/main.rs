//! The project's commands. `cargo xtask --help` lists them.

mod bench;
mod chart;
mod demo;
mod ebpf;
mod fresh;
mod fuzz;
mod generate;
mod helm;
mod images;
mod kind;
mod kube;
mod mutants;
mod other_build;
mod prometheus;
mod test;
mod tidy;
mod tools;
mod workspace;

use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};

use workspace::Workspace;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Builds, shows and checks Culvert")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Brings up a mesh of two nodes on this machine and proves what it claims (root)
    Demo(demo::Arguments),
    /// Runs the tests that this machine can run, and says which it cannot
    Test(test::Arguments),
    /// Measures direct connections against meshed ones, side by side on this machine (root)
    Bench(bench::Arguments),
    /// Feeds every parser of bytes from outside with what it does not expect
    Fuzz(fuzz::Arguments),
    /// Builds the kernel programs to <target>/ebpf/mesh-ebpf.o
    BuildEbpf,
    /// Builds Kubernetes for the suites on it, and tells the folder that they take as CULVERT_KUBE_DIR
    BuildKube,
    /// Builds the kernel programs, then mesh-agent with them inside and mesh-control
    Build,
    /// Writes what is committed and made from something else: deploy/crds and deploy/culvert.yaml
    Generate(generate::Arguments),
    /// Builds the container images, without a container engine, to <target>/images
    Images(images::Arguments),
    /// Checks what compilers don't: lengths of files, forbidden words, where `unsafe` is, who may know whom
    Tidy,
    /// Runs `demo --check` and `test` of HEAD in a minimal Debian 12 made for it (root)
    Fresh(fresh::Arguments),
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(code) => code,
        Err(error) => {
            tools::say(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    let workspace = Workspace::find()?;
    match command {
        Command::Demo(arguments) => demo::run(&workspace, &arguments),
        Command::Test(arguments) => test::run(&workspace, &arguments),
        Command::Bench(arguments) => bench::run(&workspace, &arguments),
        Command::Fuzz(arguments) => fuzz::run(&workspace, &arguments),
        Command::BuildEbpf => {
            let object = ebpf::object(&workspace)?;
            tools::say(&format!("the kernel programs are in {}", object.display()));
            Ok(ExitCode::SUCCESS)
        }
        Command::BuildKube => match kube::tools(&workspace)? {
            kube::Tools::Here(folder) => {
                tools::say(&format!("{}={}", kube::DIR_VARIABLE, folder.display()));
                Ok(ExitCode::SUCCESS)
            }
            kube::Tools::Impossible(why) => bail!("{why}"),
        },
        Command::Build => {
            let folder = workspace.build()?;
            tools::say(&format!("mesh-agent and mesh-control are in {}", folder.display()));
            Ok(ExitCode::SUCCESS)
        }
        Command::Generate(arguments) => generate::run(&workspace, &arguments),
        Command::Images(arguments) => images::run(&workspace, &arguments),
        Command::Tidy => tidy::run(&workspace),
        Command::Fresh(arguments) => fresh::run(&workspace, &arguments),
    }
}
