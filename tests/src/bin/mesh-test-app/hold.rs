//! More connections than threads can be had for: a server that answers once and then holds, and a client that opens as many as it gets.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use crate::client::kind;

const MESSAGE_BYTES: usize = 64;
const TIMEOUT: Duration = Duration::from_secs(60);

/// One connection after the other: a client says its message at once.
pub fn serve(port: &str) -> Result<Value> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port.parse::<u16>()?)).context("listening")?;
    let mut held = Vec::new();
    for stream in listener.incoming() {
        let mut stream = stream.context("accept")?;
        let mut message = [0; MESSAGE_BYTES];
        let answered = stream
            .set_read_timeout(Some(TIMEOUT))
            .and_then(|()| stream.read_exact(&mut message))
            .and_then(|()| stream.write_all(&message));
        if answered.is_ok() {
            held.push(stream);
        }
    }
    Ok(Value::Null)
}

fn open(address: SocketAddr, number: usize) -> Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT).context("connect")?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    let mut message = [0; MESSAGE_BYTES];
    message[..8].copy_from_slice(&number.to_be_bytes());
    stream.write_all(&message).context("write")?;
    let mut answer = [0; MESSAGE_BYTES];
    stream.read_exact(&mut answer).context("read")?;
    if answer != message {
        bail!("the answer is another message");
    }
    Ok(stream)
}

/// So many connections to the addresses in turn, each used once, held until standard input ends. What was not to be had is told.
pub fn hold(count: &str, threads: &str, addresses: &[&str]) -> Result<Value> {
    let (count, threads): (usize, usize) = (count.parse()?, threads.parse()?);
    let addresses: Vec<SocketAddr> = addresses.iter().map(|address| address.parse()).collect::<Result<_, _>>()?;
    let mut running = Vec::new();
    for first in 0..threads {
        let addresses = addresses.clone();
        running.push(std::thread::spawn(move || {
            let (mut held, mut failed) = (Vec::new(), BTreeMap::<String, usize>::new());
            for number in (first..count).step_by(threads) {
                match open(addresses[number / threads % addresses.len()], number) {
                    Ok(stream) => held.push(stream),
                    Err(error) => *failed.entry(kind(&error)).or_default() += 1,
                }
            }
            (held, failed)
        }));
    }
    let (mut held, mut failed) = (Vec::new(), BTreeMap::<String, usize>::new());
    for thread in running {
        let (of_thread, failures) = thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?;
        held.extend(of_thread);
        for (kind, times) in failures {
            *failed.entry(kind).or_default() += times;
        }
    }
    let report = json!({ "held": held.len(), "failed": failed });
    writeln!(std::io::stdout(), "{report}")?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(report)
}
