//! Asking the node's agent.

use std::io::{self, Read as _, Write as _};
use std::path::Path;
use std::time::{Duration, Instant};

use socket2::{Domain, SockAddr, Socket, Type};

use crate::protocol::{Answer, MAX_MESSAGE_BYTES, Request};

/// Between two attempts to reach it.
const RETRY: Duration = Duration::from_millis(200);
/// The shortest time that a socket is given, whatever is left.
const LEAST: Duration = Duration::from_millis(10);

/// How long to try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Until somebody takes the request.
    pub reach: Duration,
    /// Until it is answered.
    pub answer: Duration,
}

/// # Errors
/// Nobody answered in time: the last reason.
pub fn ask(socket: &Path, request: &Request, patience: Patience) -> io::Result<Answer> {
    let reach_until = Instant::now() + patience.reach;
    let until = Instant::now() + patience.answer;
    loop {
        match attempt(socket, request, until) {
            Ok(answer) => return Ok(answer),
            // Not there yet, or gone half-way: an agent that restarts. Asking again changes nothing that was done.
            Err(error) if Instant::now() >= reach_until || error.kind() == io::ErrorKind::InvalidData => return Err(error),
            Err(_) => std::thread::sleep(RETRY),
        }
    }
}

fn attempt(path: &Path, request: &Request, until: Instant) -> io::Result<Answer> {
    let left = || until.saturating_duration_since(Instant::now()).max(LEAST);
    let mut socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // Holds for connect as well: the queue of a hung agent may be full.
    socket.set_write_timeout(Some(left()))?;
    socket.connect(&SockAddr::unix(path)?)?;
    let mut line = serde_json::to_vec(request).map_err(io::Error::other)?;
    line.push(b'\n');
    socket.write_all(&line)?;
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    while !answer.ends_with(b"\n") {
        socket.set_read_timeout(Some(left()))?;
        let count = socket.read(&mut buffer)?;
        if count == 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the agent closed without an answer",
            ));
        }
        answer.extend_from_slice(&buffer[..count]);
        if answer.len() > MAX_MESSAGE_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the agent's answer is too long"));
        }
    }
    serde_json::from_slice(&answer).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}
