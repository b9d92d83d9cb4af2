//! Load, for `cargo xtask bench`: a server whose connections begin with what is wanted of them, and its clients. Times are taken
//! here, around the traffic alone.

use std::io::{Read as _, Write as _};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

const THREAD_STACK_BYTES: usize = 256 << 10;
const CHUNK_BYTES: usize = 128 << 10;
pub const MESSAGE_BYTES: usize = 64;
/// A measurement that waits this long has failed.
const TIMEOUT: Duration = Duration::from_secs(60);

/// What a connection asks for, its first byte.
const UP: u8 = b'u';
const DOWN: u8 = b'd';
const ECHO: u8 = b'e';

pub fn serve(port: &str) -> Result<Value> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port.parse::<u16>()?)).context("listening")?;
    writeln!(std::io::stdout(), "serves")?;
    for stream in listener.incoming().flatten() {
        std::thread::Builder::new()
            .stack_size(THREAD_STACK_BYTES)
            .spawn(move || answer(&stream))?;
    }
    Ok(Value::Null)
}

fn answer(mut stream: &TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut wanted = [0];
    stream.read_exact(&mut wanted)?;
    match wanted[0] {
        UP => {
            let received = read_to_end(stream)?;
            stream.write_all(&received.to_be_bytes())?;
        }
        DOWN => {
            let mut bytes = [0; 8];
            stream.read_exact(&mut bytes)?;
            write_zeros(stream, u64::from_be_bytes(bytes))?;
        }
        _ => {
            let mut message = [0; MESSAGE_BYTES];
            while stream.read_exact(&mut message).is_ok() {
                stream.write_all(&message)?;
            }
        }
    }
    Ok(())
}

fn read_to_end(mut stream: &TcpStream) -> Result<u64> {
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut total = 0;
    loop {
        let length = stream.read(&mut buffer)?;
        if length == 0 {
            return Ok(total);
        }
        total += length as u64;
    }
}

fn write_zeros(mut stream: &TcpStream, mut left: u64) -> Result<()> {
    let chunk = vec![0; CHUNK_BYTES];
    while left > 0 {
        let part = usize::try_from(left.min(CHUNK_BYTES as u64))?;
        stream.write_all(&chunk[..part])?;
        left -= part as u64;
    }
    Ok(())
}

fn open(address: SocketAddr, wanted: u8) -> Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT).context("connect")?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    stream.write_all(&[wanted])?;
    Ok(stream)
}

fn message(mut stream: &TcpStream) -> Result<()> {
    let mut message = [7; MESSAGE_BYTES];
    stream.write_all(&message)?;
    stream.read_exact(&mut message)?;
    Ok(())
}

/// Runs `work` in so many threads that begin together; answers what each says, and the seconds from the first's begin to the
/// last's end.
fn together<T: Send + 'static>(
    threads: usize,
    work: impl Fn(&Barrier) -> Result<T> + Clone + Send + 'static,
) -> Result<(Vec<T>, f64)> {
    let barrier = Arc::new(Barrier::new(threads + 1));
    let mut running = Vec::new();
    for _ in 0..threads {
        let (barrier, work) = (barrier.clone(), work.clone());
        running.push(std::thread::Builder::new().spawn(move || work(&barrier))?);
    }
    barrier.wait();
    let start = Instant::now();
    let mut answers = Vec::new();
    for thread in running {
        answers.push(thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??);
    }
    Ok((answers, start.elapsed().as_secs_f64()))
}

/// `bytes` on each of so many streams, to the server (`up`) or from it.
pub fn bulk(address: &str, streams: &str, bytes: &str, up: bool) -> Result<Value> {
    let (address, streams, bytes): (SocketAddr, usize, u64) = (address.parse()?, streams.parse()?, bytes.parse()?);
    let transfer = move |barrier: &Barrier| -> Result<u64> {
        let opened = open(address, if up { UP } else { DOWN });
        barrier.wait();
        let mut stream = opened?;
        if up {
            write_zeros(&stream, bytes)?;
            stream.shutdown(std::net::Shutdown::Write)?;
            let mut received = [0; 8];
            stream.read_exact(&mut received)?;
            Ok(u64::from_be_bytes(received))
        } else {
            stream.write_all(&bytes.to_be_bytes())?;
            read_to_end(&stream)
        }
    };
    let (received, seconds) = together(streams, transfer)?;
    ensure!(received.iter().all(|&received| received == bytes), "{received:?} arrived");
    Ok(json!({ "seconds": seconds, "bytes": bytes * streams as u64 }))
}

pub fn ping_pong(address: &str, count: &str) -> Result<Value> {
    let count: usize = count.parse()?;
    let stream = open(address.parse()?, ECHO)?;
    for _ in 0..count / 10 {
        message(&stream)?;
    }
    let mut micros = Vec::with_capacity(count);
    for _ in 0..count {
        let start = Instant::now();
        message(&stream)?;
        micros.push(start.elapsed().as_secs_f64() * 1e6);
    }
    Ok(percentiles(micros))
}

/// Connections one after another in each of so many threads, each with one message there and back.
pub fn connects(address: &str, threads: &str, count: &str) -> Result<Value> {
    let (address, threads, count): (SocketAddr, usize, usize) = (address.parse()?, threads.parse()?, count.parse()?);
    let work = move |barrier: &Barrier| -> Result<Vec<f64>> {
        barrier.wait();
        let mut micros = Vec::with_capacity(count);
        for _ in 0..count {
            let start = Instant::now();
            message(&open(address, ECHO)?)?;
            micros.push(start.elapsed().as_secs_f64() * 1e6);
        }
        Ok(micros)
    };
    let (micros, seconds) = together(threads, work)?;
    let mut report = percentiles(micros.concat());
    report["seconds"] = seconds.into();
    Ok(report)
}

/// So many connections that were used once, held until standard input ends.
pub fn idle(address: &str, count: &str) -> Result<Value> {
    let (address, count): (SocketAddr, usize) = (address.parse()?, count.parse()?);
    let mut held = Vec::with_capacity(count);
    for _ in 0..count {
        let stream = open(address, ECHO)?;
        message(&stream)?;
        held.push(stream);
    }
    writeln!(std::io::stdout(), "connected")?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(json!({ "held": held.len() }))
}

fn percentiles(mut micros: Vec<f64>) -> Value {
    micros.sort_by(f64::total_cmp);
    let at = |share: usize| micros.get(micros.len() * share / 100).copied().unwrap_or(f64::NAN);
    json!({ "p50": at(50), "p99": at(99), "count": micros.len() })
}
