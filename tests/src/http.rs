//! As much of an HTTP/1.1 client as the testbed needs.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result};

const TIMEOUT: Duration = Duration::from_secs(5);
/// More than any page asked for here.
const MAX_RESPONSE_BYTES: u64 = 4 << 20;

#[derive(Debug)]
pub struct Response {
    pub status: u16,
    pub body: String,
}

/// # Errors
/// No connection, or no whole response in time.
pub fn request(address: SocketAddr, path: &str) -> Result<Response> {
    let stream = TcpStream::connect_timeout(&address, TIMEOUT).with_context(|| format!("connecting to {address}"))?;
    request_on(stream, &address.to_string(), path)
}

/// # Errors
/// No whole response in time.
pub fn request_on(mut stream: TcpStream, host: &str, path: &str) -> Result<Response> {
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n").as_bytes())?;
    let mut bytes = Vec::new();
    stream
        .take(MAX_RESPONSE_BYTES)
        .read_to_end(&mut bytes)
        .context("reading the response")?;
    let text = String::from_utf8_lossy(&bytes);
    let (head, body) = text.split_once("\r\n\r\n").context("the response has no end of its head")?;
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok())
        .context("the response has no status")?;
    let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
    Ok(Response {
        status,
        body: if chunked { without_chunks(body) } else { body.to_owned() },
    })
}

fn without_chunks(mut body: &str) -> String {
    let mut whole = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let Ok(size) = usize::from_str_radix(size.trim(), 16) else {
            break;
        };
        if size == 0 || size > rest.len() {
            break;
        }
        whole.push_str(&rest[..size]);
        body = rest[size..].trim_start_matches("\r\n");
    }
    whole
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_joined() {
        assert_eq!(without_chunks("3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n"), "abcdefg");
        assert_eq!(without_chunks(""), "");
    }
}
