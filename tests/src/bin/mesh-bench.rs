//! The benchmarks' process; `cargo xtask bench` builds what it needs and starts it.

use std::io::Write as _;
use std::process::ExitCode;

use mesh_tests::bench::{self, Amounts, Format};

const USAGE: &str = "usage: mesh-bench ROUNDS [--json] [--brief]";

fn main() -> ExitCode {
    let mut rounds = None;
    let (mut format, mut amounts, mut is_understood) = (Format::Table, Amounts::FULL, true);
    for argument in std::env::args().skip(1) {
        match argument.as_str() {
            "--json" => format = Format::Json,
            "--brief" => amounts = Amounts::BRIEF,
            number => is_understood &= rounds.replace(number.parse()).is_none(),
        }
    }
    let outcome = match rounds {
        Some(Ok(rounds @ 1..=100)) if is_understood => bench::run(rounds, amounts, format),
        _ => Err(anyhow::anyhow!(USAGE)),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "{error:#}");
            ExitCode::FAILURE
        }
    }
}
