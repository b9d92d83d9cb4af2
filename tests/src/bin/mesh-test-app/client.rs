//! The clients. Each reports what an application can see, in the words of its own system calls.

use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs as _, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use mesh_tests::http::{self, Response};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use socket2::{Domain, Protocol, Socket, Type};

/// Longer than any bounded wait of the mesh: what is refused must be refused by then.
const TIMEOUT: Duration = Duration::from_secs(15);
const CHUNK_BYTES: usize = 64 << 10;
const THREAD_STACK_BYTES: usize = 256 << 10;

/// The error's name as the standard library has it: "ConnectionRefused", "ConnectionReset", …
pub fn kind(error: &anyhow::Error) -> String {
    error
        .chain()
        .find_map(|cause| cause.downcast_ref::<std::io::Error>())
        .map_or_else(|| "Other".to_owned(), |error| format!("{:?}", error.kind()))
}

/// To an address, or to a name's addresses, one after the other.
fn open(address: &str) -> Result<TcpStream> {
    let addresses = address
        .to_socket_addrs()
        .with_context(|| format!("an address, or a name that has one: {address}"))?;
    let mut outcome = Err(anyhow::anyhow!("{address} has no address"));
    for address in addresses {
        outcome = TcpStream::connect_timeout(&address, TIMEOUT).context("connect");
        if outcome.is_ok() {
            break;
        }
    }
    let stream = outcome?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    Ok(stream)
}

/// One line to the echo server and back.
fn echo_line(stream: &TcpStream, line: &str) -> Result<()> {
    let mut writer = stream;
    writer.write_all(line.as_bytes()).context("write")?;
    let mut answer = vec![0; line.len()];
    let mut reader = stream;
    reader.read_exact(&mut answer).context("read")?;
    if answer != line.as_bytes() {
        bail!("the echo was {:?}", String::from_utf8_lossy(&answer));
    }
    Ok(())
}

pub fn get(url: &str) -> Result<Response> {
    let rest = url.strip_prefix("http://").context("the URL must start with http://")?;
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    let has_port = host.rsplit_once(':').is_some_and(|(_, port)| !port.ends_with(']'));
    let stream = if has_port { open(host)? } else { open(&format!("{host}:80"))? };
    http::request_on(stream, host, &format!("/{path}"))
}

pub fn connect(address: &str) -> Result<Value> {
    let start = Instant::now();
    let mut step = "connect";
    let attempt = (|| {
        let stream = open(address)?;
        step = "echo";
        echo_line(&stream, "hello\n")?;
        Ok((stream.peer_addr()?, stream.local_addr()?))
    })();
    let elapsed_ms = u64::try_from(start.elapsed().as_millis())?;
    Ok(match attempt {
        Ok((peer, local)) => {
            json!({ "ok": true, "peer": peer.to_string(), "local": local.to_string(), "elapsed_ms": elapsed_ms })
        }
        Err(error) => json!({
            "ok": false, "step": step, "error": kind(&error), "message": format!("{error:#}"), "elapsed_ms": elapsed_ms
        }),
    })
}

pub fn bulk(address: &str, bytes: &str) -> Result<Value> {
    let total: usize = bytes.parse().context("how many bytes")?;
    let stream = open(address)?;
    let sender = stream.try_clone()?;
    let sending = std::thread::spawn(move || send_pseudorandom(&sender, total));
    let (received, received_sha256) = digest(&stream)?;
    let sent_sha256 = sending.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
    Ok(json!({ "sent": total, "received": received, "sent_sha256": sent_sha256, "received_sha256": received_sha256 }))
}

/// Bytes that do not repeat within a window, cheap to make (a linear congruential generator, Knuth's constants).
fn send_pseudorandom(mut stream: &TcpStream, total: usize) -> Result<String> {
    let mut hash = Sha256::new();
    let mut state = 1_u64;
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut left = total;
    while left > 0 {
        for word in chunk.chunks_exact_mut(8) {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            word.copy_from_slice(&state.to_le_bytes());
        }
        let part = &chunk[..left.min(CHUNK_BYTES)];
        hash.update(part);
        stream.write_all(part).context("write")?;
        left -= part.len();
    }
    stream.shutdown(std::net::Shutdown::Write).context("half-close")?;
    Ok(hex::encode(hash.finalize()))
}

fn digest(mut stream: impl Read) -> Result<(usize, String)> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut total = 0;
    loop {
        let length = stream.read(&mut buffer).context("read")?;
        if length == 0 {
            return Ok((total, hex::encode(hash.finalize())));
        }
        hash.update(&buffer[..length]);
        total += length;
    }
}

pub fn swarm(address: &str, count: &str) -> Result<Value> {
    let count: usize = count.parse().context("how many")?;
    // All connections are open before the first is used, and stay open until all were.
    let all_open = std::sync::Arc::new(std::sync::Barrier::new(count));
    let all_used = std::sync::Arc::new(std::sync::Barrier::new(count));
    let mut threads = Vec::with_capacity(count);
    for number in 0..count {
        let (address, all_open, all_used) = (address.to_owned(), all_open.clone(), all_used.clone());
        let connection = move || -> Result<()> {
            let stream = open(&address);
            all_open.wait();
            let used = stream.and_then(|stream| {
                echo_line(&stream, &format!("connection {number}\n"))?;
                Ok(stream)
            });
            all_used.wait();
            used.map(drop)
        };
        threads.push(std::thread::Builder::new().stack_size(THREAD_STACK_BYTES).spawn(connection)?);
    }
    let mut ok = 0;
    let mut errors = Vec::new();
    for thread in threads {
        match thread.join() {
            Ok(Ok(())) => ok += 1,
            Ok(Err(error)) => errors.push(format!("{error:#}")),
            Err(_) => errors.push("panic".to_owned()),
        }
    }
    errors.sort();
    errors.dedup();
    Ok(json!({ "ok": ok, "errors": errors }))
}

/// Lines to the echo server and back, until either end is over; what ends the connection is said at once, also while nobody speaks.
/// Not sent, but answered: what the socket says of its ends.
const NAMES: &str = "?names";

pub fn chat(address: &str) -> Result<Value> {
    let stream = open(address)?;
    stream.set_read_timeout(None)?;
    writeln!(std::io::stdout(), "connected")?;
    let answers = BufReader::new(stream.try_clone()?).lines();
    std::thread::spawn(move || {
        for line in std::io::stdin().lines().map_while(Result::ok) {
            if line == NAMES {
                let name =
                    |name: std::io::Result<SocketAddr>| name.map_or_else(|error| error.to_string(), |name| name.to_string());
                let _ = writeln!(
                    std::io::stdout(),
                    "{} {}",
                    name(stream.local_addr()),
                    name(stream.peer_addr())
                );
                continue;
            }
            // The other direction tells what became of the connection.
            let _ = writeln!(&stream, "{line}");
        }
        let _ = stream.shutdown(std::net::Shutdown::Write);
    });
    for answer in answers {
        writeln!(std::io::stdout(), "{}", answer.context("read")?)?;
    }
    Ok(json!({ "ok": true }))
}

pub fn mptcp(address: &str) -> Result<Value> {
    let address: SocketAddr = address.parse()?;
    let socket = match Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::MPTCP)) {
        Ok(socket) => socket,
        Err(error) => return Ok(json!({ "socket": false, "errno": error.raw_os_error(), "message": error.to_string() })),
    };
    let connected = socket.connect_timeout(&address.into(), TIMEOUT);
    Ok(json!({ "socket": true, "connected": connected.is_ok() }))
}

pub fn unix(path: &str) -> Result<Value> {
    let mut stream = std::os::unix::net::UnixStream::connect(path).context("connect")?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    Ok(json!({ "closed": stream.read(&mut [0]).context("read")? == 0 }))
}

pub fn udp(address: &str) -> Result<Value> {
    let address: SocketAddr = address.parse()?;
    let socket = UdpSocket::bind(if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    socket.connect(address)?;
    socket.send(b"datagram")?;
    let mut buffer = [0; 64];
    let length = socket.recv(&mut buffer).context("no answer")?;
    Ok(json!({ "ok": &buffer[..length] == b"datagram" }))
}
