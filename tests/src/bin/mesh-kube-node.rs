//! A node of the test cluster: started in its network namespace, with the file that describes it.

use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use mesh_tests::kube::node_init::{self, Spec};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let file = std::env::args_os().nth(1).context("usage: mesh-kube-node SPEC")?;
    let text = std::fs::read(Path::new(&file)).with_context(|| format!("reading {}", file.display()))?;
    let spec: Spec = serde_json::from_slice(&text).with_context(|| file.display().to_string())?;
    node_init::run(&spec)
}
