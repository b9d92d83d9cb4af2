//! The servers: IPv4 and IPv6 on one socket, a thread a connection.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv6Addr, TcpListener, TcpStream, UdpSocket};

use anyhow::{Context as _, Result};
use serde_json::Value;

const THREAD_STACK_BYTES: usize = 256 << 10;
const COPY_BYTES: usize = 64 << 10;
const MAX_HEAD_LINES: usize = 100;

pub fn serve(name: &str, http_port: &str, echo_port: &str) -> Result<Value> {
    let http = listen(http_port)?;
    let echo = listen(echo_port)?;
    let datagrams = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, echo_port.parse().context("the echo port")?))?;
    std::thread::spawn(move || echo_datagrams(&datagrams));
    std::thread::spawn(move || accept(&echo, |stream| echo_until_end(&stream)));
    let name = name.to_owned();
    writeln!(std::io::stdout(), "{name} serves")?;
    accept(&http, move |stream| answer_http(&stream, &name));
    Ok(Value::Null)
}

fn listen(port: &str) -> Result<TcpListener> {
    let port: u16 = port.parse().context("a port")?;
    // Linux lets a socket bound to :: accept IPv4 as well, as v4-mapped addresses.
    TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).with_context(|| format!("listening on port {port}"))
}

fn accept(listener: &TcpListener, serve: impl Fn(TcpStream) -> Result<()> + Clone + Send + 'static) {
    for stream in listener.incoming().flatten() {
        let serve = serve.clone();
        let _ = std::thread::Builder::new()
            .stack_size(THREAD_STACK_BYTES)
            .spawn(move || serve(stream));
    }
}

fn echo_until_end(mut stream: &TcpStream) -> Result<()> {
    let mut buffer = vec![0; COPY_BYTES];
    loop {
        let length = stream.read(&mut buffer)?;
        if length == 0 {
            // Dropping the stream would do; this says that a half-close is answered by one.
            stream.shutdown(std::net::Shutdown::Write)?;
            return Ok(());
        }
        stream.write_all(&buffer[..length])?;
    }
}

fn echo_datagrams(socket: &UdpSocket) {
    let mut buffer = [0; 2048];
    while let Ok((length, from)) = socket.recv_from(&mut buffer) {
        let _ = socket.send_to(&buffer[..length], from);
    }
}

fn answer_http(mut stream: &TcpStream, name: &str) -> Result<()> {
    let client = stream.peer_addr()?.ip().to_canonical();
    let mut lines = BufReader::new(stream).lines();
    let request = lines.next().context("no request")??;
    for line in lines.take(MAX_HEAD_LINES) {
        if line?.is_empty() {
            break;
        }
    }
    let path = request.split(' ').nth(1).unwrap_or_default();
    // Also what never gets its answer was received.
    writeln!(std::io::stdout(), "{name} received {path} from {client}")?;
    let body = format!("server={name} client={client} path={path}\n");
    let head = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(format!("{head}{body}").as_bytes())?;
    Ok(())
}
