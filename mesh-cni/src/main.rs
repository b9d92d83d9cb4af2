//! `mesh-cni`, run by the container runtime: see the library.

use std::io::{self, Read as _, Write as _};
use std::path::Path;
use std::process::ExitCode;

use mesh_cni::agent::{self, Patience};
use mesh_cni::plugin::{self, Node};
use mesh_cni::protocol::{Answer, NamespaceList, Request};

/// Bytes of the configuration with the previous result: some interfaces, addresses and routes.
const MAX_INPUT_BYTES: u64 = 1 << 20;

struct ThisNode;

impl Node for ThisNode {
    fn list(&self, path: &Path) -> io::Result<Option<NamespaceList>> {
        NamespaceList::read(path)
    }

    fn ask(&self, socket: &Path, request: &Request, patience: Patience) -> io::Result<Answer> {
        agent::ask(socket, request, patience)
    }
}

fn main() -> ExitCode {
    let environment = std::env::vars_os()
        .filter_map(|(key, value)| Some((key.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    let mut input = Vec::new();
    // What cannot be read is no configuration, and said to be none.
    let _ = io::stdin().lock().take(MAX_INPUT_BYTES).read_to_end(&mut input);
    let outcome = plugin::run(&environment, &input, &ThisNode);
    if let Some(remark) = outcome.remark {
        let _ = writeln!(io::stderr(), "mesh-cni: {remark}");
    }
    let told = match outcome.result {
        Some(result) => writeln!(io::stdout().lock(), "{result}"),
        None => Ok(()),
    };
    if outcome.failed || told.is_err() {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}
