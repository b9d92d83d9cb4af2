//! The benchmarks' process; `cargo xtask bench` builds what it needs and starts it.

use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser;
use mesh_tests::bench::{self, Amounts, Format, control};

#[derive(Parser)]
struct Arguments {
    /// How often everything is measured
    #[arg(value_parser = clap::value_parser!(u8).range(1..=100))]
    rounds: u8,
    /// The control plane on a cluster with so many Pods, instead of the mesh
    #[arg(long, value_name = "PODS", value_parser = clap::value_parser!(u32).range(100..=50_000))]
    control: Option<u32>,
    #[arg(long)]
    json: bool,
    #[arg(long)]
    brief: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let format = if arguments.json { Format::Json } else { Format::Table };
    let amounts = if arguments.brief { Amounts::BRIEF } else { Amounts::FULL };
    let rounds = usize::from(arguments.rounds);
    let outcome = match arguments.control {
        Some(pods) => {
            let changes = if arguments.brief { 1 } else { 5 };
            let size = control::Size {
                pods: pods as usize,
                changes,
            };
            control::run(rounds, size, format)
        }
        None => bench::run(rounds, amounts, format),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "{error:#}");
            ExitCode::FAILURE
        }
    }
}
