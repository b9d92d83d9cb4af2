//! The benchmarks' process; `cargo xtask bench` builds what it needs and starts it.

use std::io::Write as _;
use std::process::ExitCode;

use mesh_tests::bench::{self, Format};

const USAGE: &str = "usage: mesh-bench ROUNDS [--json]";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (rounds, format) = match words.as_slice() {
        [rounds] => (rounds.parse(), Format::Table),
        [rounds, "--json"] => (rounds.parse(), Format::Json),
        _ => ("".parse(), Format::Table),
    };
    let outcome = match rounds {
        Ok(rounds @ 1..=100) => bench::run(rounds, format),
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
