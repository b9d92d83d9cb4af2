//! What runs inside the Pods of the testbed: small servers, and clients that report as JSON what they saw. An application
//! as any other: it knows nothing of the mesh, and runs unprivileged.

mod client;
mod health;
mod hold;
mod insist;
mod load;
mod server;

use std::io::Write as _;
use std::process::ExitCode;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::{Value, json};

const USAGE: &str = "usage:
  mesh-test-app serve NAME HTTP_PORT ECHO_PORT     an HTTP server that tells its client's address, and an echo server
  mesh-test-app health PORT                        a gRPC server that says of itself that it serves
  mesh-test-app get URL                            an HTTP request
  mesh-test-app connect ADDRESS:PORT               a connection, its two ends and one echoed line
  mesh-test-app bulk ADDRESS:PORT BYTES            so many bytes there and back through the echo server, checksummed
  mesh-test-app swarm ADDRESS:PORT COUNT           so many connections at the same time
  mesh-test-app insist ADDRESS:PORT TOKEN          HTTP requests without end, a line about each
  mesh-test-app chat ADDRESS:PORT                  one connection; lines of standard input go through the echo server
  mesh-test-app mptcp ADDRESS:PORT                 asks for a multipath TCP socket
  mesh-test-app unix PATH                          one connection to a Unix socket, and whether it is closed without a byte
  mesh-test-app udp ADDRESS:PORT                   a datagram through the echo server
  mesh-test-app hold-serve PORT                    answers each connection once, and holds it
  mesh-test-app hold COUNT THREADS ADDRESS:PORT…   opens so many, uses each once, and holds them until standard input ends
load, for benchmarks:
  mesh-test-app load-serve PORT
  mesh-test-app load-up|load-down ADDRESS:PORT STREAMS BYTES
  mesh-test-app load-ping-pong ADDRESS:PORT COUNT
  mesh-test-app load-connects ADDRESS:PORT THREADS COUNT
  mesh-test-app load-idle ADDRESS:PORT COUNT            held until standard input ends";

fn main() -> ExitCode {
    // A thousand connections need more descriptors than the usual soft limit of 1,024.
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let answer = match arguments.as_slice() {
        ["serve", name, http, echo] => server::serve(name, http, echo),
        ["health", port] => health::serve(port),
        ["get", url] => return get(url),
        ["connect", address] => client::connect(address),
        ["bulk", address, bytes] => client::bulk(address, bytes),
        ["swarm", address, count] => client::swarm(address, count),
        ["insist", address, token] => insist::insist(address, token),
        ["chat", address] => client::chat(address),
        ["mptcp", address] => client::mptcp(address),
        ["unix", path] => client::unix(path),
        ["udp", address] => client::udp(address),
        ["hold-serve", port] => hold::serve(port),
        ["hold", count, threads, addresses @ ..] => hold::hold(count, threads, addresses),
        ["load-serve", port] => load::serve(port),
        ["load-up", address, streams, bytes] => load::bulk(address, streams, bytes, true),
        ["load-down", address, streams, bytes] => load::bulk(address, streams, bytes, false),
        ["load-ping-pong", address, count] => load::ping_pong(address, count),
        ["load-connects", address, threads, count] => load::connects(address, threads, count),
        ["load-idle", address, count] => load::idle(address, count),
        _ => {
            let _ = writeln!(std::io::stderr(), "{USAGE}");
            return ExitCode::from(2);
        }
    };
    match answer {
        Ok(report) => print(&report),
        Err(error) => {
            print(&json!({ "error": client::kind(&error), "message": format!("{error:#}") }));
            ExitCode::FAILURE
        }
    }
}

fn print(report: &Value) -> ExitCode {
    match writeln!(std::io::stdout(), "{report}") {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// As people use it in a demo: the body alone.
fn get(url: &str) -> ExitCode {
    match client::get(url) {
        Ok(response) if response.status == 200 => {
            let _ = write!(std::io::stdout(), "{}", response.body);
            ExitCode::SUCCESS
        }
        Ok(response) => {
            let _ = writeln!(std::io::stderr(), "status {}: {}", response.status, response.body);
            ExitCode::FAILURE
        }
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "{error:#}");
            ExitCode::FAILURE
        }
    }
}
