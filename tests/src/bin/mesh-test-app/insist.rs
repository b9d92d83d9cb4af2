//! Requests one after the other until it is killed, each told in a line: what a client saw while the world around it changed.

use std::io::Write as _;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result};
use mesh_tests::http;
use serde_json::{Value, json};

use super::client::kind;

/// Longer than any bounded wait of the mesh.
const TIMEOUT: Duration = Duration::from_secs(15);
/// Between two requests: the machine has other work.
const PAUSE: Duration = Duration::from_millis(20);

/// The path of each request is `/<token>-<number>`, which no other request has.
pub fn insist(address: &str, token: &str) -> Result<Value> {
    let address: SocketAddr = address.parse().with_context(|| format!("an address: {address}"))?;
    for number in 0_u64.. {
        let token = format!("{token}-{number}");
        let mut local = None;
        let report = match request(address, &token, &mut local) {
            Ok(body) => json!({ "token": token, "local": local, "answer": body.trim_end() }),
            Err(error) => json!({ "token": token, "local": local, "error": kind(&error), "message": format!("{error:#}") }),
        };
        writeln!(std::io::stdout(), "{report}")?;
        std::thread::sleep(PAUSE);
    }
    Ok(Value::Null)
}

fn request(address: SocketAddr, token: &str, local: &mut Option<SocketAddr>) -> Result<String> {
    let stream = TcpStream::connect_timeout(&address, TIMEOUT).context("connect")?;
    *local = Some(stream.local_addr()?);
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    Ok(http::request_on(stream, &address.to_string(), &format!("/{token}"))?.body)
}
