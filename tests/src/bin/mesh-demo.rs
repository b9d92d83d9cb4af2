//! The demo's process; `cargo xtask demo` builds what it needs and starts it.

use std::io::Write as _;
use std::process::ExitCode;

use mesh_tests::demo;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match words.as_slice() {
        [] => demo::run(false).map(|()| 0),
        ["--check"] => demo::run(true).map(|()| 0),
        ["exec", pod, "--", ..] => demo::running::exec(pod, &arguments[3..]),
        _ => {
            let _ = writeln!(
                std::io::stderr(),
                "usage: mesh-demo [--check] | mesh-demo exec POD -- COMMAND…"
            );
            Ok(2)
        }
    };
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "\nThe demo failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}
