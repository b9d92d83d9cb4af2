//! Proof of enrolment: connections that must arrive at the agent if, and only if, a Pod's capture works. Outbound, an
//! unprivileged child in the Pod's namespace connects to a test address; inbound, the agent connects from the node's namespace to
//! the Pod. Each carries a nonce that [`Probes`] waits for.

use std::collections::{HashMap, VecDeque};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use mesh_common::PROBE_PORT;
use nix::unistd::geteuid;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::netns::NetNamespace;
use super::probe_child;
use crate::addr::OriginalDst;

/// Addresses for documentation (RFC 5737, RFC 3849): nothing real is ever there.
pub const PROBE_ADDRESS_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
pub const PROBE_ADDRESS_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);

/// Hidden subcommand of the agent that is the child: `probe-connect ADDRESS:PORT NONCE`.
pub const CHILD_COMMAND: &str = "probe-connect";

/// One probe, all told.
pub(crate) const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
const NONCE_LEN: usize = 16;
/// Connections to a probe's destination that are read at a time, of one Pod. Anyone may make them and be silent: one more ends the
/// oldest, so that a probe, which speaks at once, is heard through any number of them.
const MAX_ANSWERS: usize = 32;

type Nonce = [u8; NONCE_LEN];

/// What a probe says: its nonce, and the user id it runs as.
const GREETING_LEN: usize = NONCE_LEN + size_of::<u32>();

/// Whether a connection is for [`Probes::answer`] instead of the mesh.
#[must_use]
pub fn is_probe(destination: OriginalDst) -> bool {
    destination.port() == PROBE_PORT || destination.ip() == PROBE_ADDRESS_V4 || destination.ip() == PROBE_ADDRESS_V6
}

/// The probes that are under way.
#[derive(Debug, Default)]
pub struct Probes {
    expected: Mutex<HashMap<Nonce, Expected>>,
    /// By Pod: the connections that are read, oldest first. Dropping one ends it.
    answers: Mutex<HashMap<String, VecDeque<Answer>>>,
    next_answer: AtomicU64,
}

#[derive(Debug)]
struct Expected {
    pod_uid: String,
    destination: SocketAddr,
    /// From a process of the Pod's, which must have no rights of the agent's.
    unprivileged: bool,
    arrived: oneshot::Sender<()>,
}

#[derive(Debug)]
struct Answer {
    id: u64,
    _alive: oneshot::Sender<()>,
}

/// The place of a connection among its Pod's [`Answer`]s.
struct Turn<'a> {
    probes: &'a Probes,
    pod_uid: &'a str,
    id: u64,
    displaced: oneshot::Receiver<()>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut answers = self.probes.answers.lock();
        if let Some(of_pod) = answers.get_mut(self.pod_uid) {
            of_pod.retain(|answer| answer.id != self.id);
            if of_pod.is_empty() {
                answers.remove(self.pod_uid);
            }
        }
    }
}

/// A nonce that is waited for until this is dropped.
struct Expectation {
    probes: Arc<Probes>,
    nonce: Nonce,
    arrived: oneshot::Receiver<()>,
}

impl Expected {
    fn is(&self, pod_uid: &str, destination: OriginalDst) -> bool {
        self.pod_uid == pod_uid && OriginalDst::new(self.destination) == destination
    }
}

fn greeting(nonce: &Nonce) -> [u8; GREETING_LEN] {
    let mut greeting = [0; GREETING_LEN];
    greeting[..NONCE_LEN].copy_from_slice(nonce);
    greeting[NONCE_LEN..].copy_from_slice(&geteuid().as_raw().to_be_bytes());
    greeting
}

impl Drop for Expectation {
    fn drop(&mut self) {
        self.probes.expected.lock().remove(&self.nonce);
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ProofError {
    #[error("Pod {0} is not enrolled")]
    NotEnrolled(String),
    #[error("outbound capture is not proven ({destination}): {why}")]
    Outbound { destination: SocketAddr, why: String },
    #[error("inbound capture is not proven ({destination}): {why}")]
    Inbound { destination: SocketAddr, why: String },
}

impl ProofError {
    /// Label in metrics and logs.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NotEnrolled(_) => "not_enrolled",
            Self::Outbound { .. } => "outbound_not_captured",
            Self::Inbound { .. } => "inbound_not_captured",
        }
    }
}

impl Probes {
    /// Takes a connection for which [`is_probe`] holds. `pod_uid` is the Pod whose listener accepted it. Dropped at once unless
    /// that very Pod is being probed at that very destination.
    pub async fn answer(&self, pod_uid: &str, destination: OriginalDst, mut stream: TcpStream) {
        if !self.awaits(pod_uid, destination) {
            return;
        }
        let mut turn = self.take_turn(pod_uid);
        let mut greeting = [0; GREETING_LEN];
        tokio::select! {
            read = timeout(PROBE_TIMEOUT, stream.read_exact(&mut greeting)) => match read {
                Ok(Ok(_)) => {}
                Ok(Err(_)) | Err(_) => return,
            },
            _ = &mut turn.displaced => {
                tracing::debug!(pod_uid, "too many connections to a probe's destination: the oldest is dropped");
                return;
            }
        }
        if let Some(nonce) = self.settle(pod_uid, destination, &greeting) {
            // The child tells by its exit code that it saw its nonce again; the proof does not depend on it.
            let _ = timeout(PROBE_TIMEOUT, stream.write_all(&nonce)).await;
        }
    }

    fn awaits(&self, pod_uid: &str, destination: OriginalDst) -> bool {
        self.expected
            .lock()
            .values()
            .any(|expected| expected.is(pod_uid, destination))
    }

    fn take_turn<'a>(&'a self, pod_uid: &'a str) -> Turn<'a> {
        let id = self.next_answer.fetch_add(1, Ordering::Relaxed);
        let (alive, displaced) = oneshot::channel();
        let mut answers = self.answers.lock();
        let of_pod = answers.entry(pod_uid.to_owned()).or_default();
        if of_pod.len() >= MAX_ANSWERS {
            of_pod.pop_front();
        }
        of_pod.push_back(Answer { id, _alive: alive });
        Turn {
            probes: self,
            pod_uid,
            id,
            displaced,
        }
    }

    /// The nonce, if it was waited for, from that very Pod, for that very destination, by a process of the expected rights.
    fn settle(&self, pod_uid: &str, destination: OriginalDst, greeting: &[u8; GREETING_LEN]) -> Option<Nonce> {
        let (nonce, user) = greeting.split_first_chunk::<NONCE_LEN>()?;
        let user = u32::from_be_bytes(user.try_into().ok()?);
        let mut expected = self.expected.lock();
        let probe = expected.get(nonce).filter(|expected| expected.is(pod_uid, destination))?;
        if probe.unprivileged && user == 0 {
            tracing::error!(pod_uid, "the probe runs as root inside the Pod: it proves nothing");
            return None;
        }
        expected.remove(nonce)?.arrived.send(()).ok().map(|()| *nonce)
    }

    fn expect(self: &Arc<Self>, pod_uid: &str, destination: SocketAddr, unprivileged: bool) -> Expectation {
        let nonce: Nonce = rand::random();
        let (sender, arrived) = oneshot::channel();
        let expected = Expected {
            pod_uid: pod_uid.to_owned(),
            destination,
            unprivileged,
            arrived: sender,
        };
        self.expected.lock().insert(nonce, expected);
        Expectation {
            probes: Arc::clone(self),
            nonce,
            arrived,
        }
    }

    pub(super) async fn prove_outbound(
        self: &Arc<Self>,
        pod_uid: &str,
        address: IpAddr,
        netns: &NetNamespace,
        cgroup: &Path,
        program: &Path,
    ) -> Result<(), ProofError> {
        // A fresh port each time: an answer is that of this very connect.
        let destination = SocketAddr::new(address, rand::random_range(20_000..60_000));
        let mut expectation = self.expect(pod_uid, destination, true);
        let failed = |why: String| ProofError::Outbound { destination, why };
        let mut child = tokio::process::Command::from(
            probe_child::command(program, netns, cgroup).map_err(|error| failed(format!("{}: {error}", cgroup.display())))?,
        )
        .args([CHILD_COMMAND, &destination.to_string(), &hex::encode(expectation.nonce)])
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| failed(format!("the probing process cannot start: {error}")))?;
        let outcome = timeout(PROBE_TIMEOUT, async {
            tokio::select! {
                biased;
                arrived = &mut expectation.arrived => arrived.map_err(|_| "the probe was dropped".to_owned()),
                // It ends by itself only after it saw its nonce again, or with an error.
                ended = child.wait() => match expectation.arrived.try_recv() {
                    Ok(()) => Ok(()),
                    Err(_) => Err(format!("the connection did not reach the agent ({ended:?})")),
                },
            }
        })
        .await;
        // It may have ended already; what counts is that it is gone, and out of its cgroup.
        let _ = child.start_kill();
        let _ = child.wait().await;
        match outcome {
            Ok(Ok(())) => Ok(()),
            Ok(Err(why)) => {
                let mut said = Vec::new();
                if let Some(stderr) = child.stderr.take() {
                    let _ = timeout(PROBE_TIMEOUT, stderr.take(512).read_to_end(&mut said)).await;
                }
                Err(failed(format!("{why}; {}", String::from_utf8_lossy(&said).trim())))
            }
            Err(_) => Err(failed("no answer in time".into())),
        }
    }

    pub(super) async fn prove_inbound(self: &Arc<Self>, pod_uid: &str, address: IpAddr) -> Result<(), ProofError> {
        let destination = SocketAddr::new(address, PROBE_PORT);
        let mut expectation = self.expect(pod_uid, destination, false);
        let greeting = greeting(&expectation.nonce);
        let outcome = timeout(PROBE_TIMEOUT, async {
            let mut stream = TcpStream::connect(destination).await?;
            stream.write_all(&greeting).await?;
            (&mut expectation.arrived).await.map_err(io::Error::other)
        })
        .await;
        let why = match outcome {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "no answer in time".to_owned(),
        };
        Err(ProofError::Inbound { destination, why })
    }
}

/// The child: connects, writes the nonce, and wants to read it back. `args` are those after [`CHILD_COMMAND`].
pub fn run_child(args: impl IntoIterator<Item = String>) -> ExitCode {
    match child(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The parent reads it; should that fail, the exit code says enough.
            let _ = writeln!(io::stderr(), "{error}");
            ExitCode::FAILURE
        }
    }
}

fn child(args: impl IntoIterator<Item = String>) -> io::Result<()> {
    let mut args = args.into_iter();
    let (Some(destination), Some(nonce), None) = (args.next(), args.next(), args.next()) else {
        return Err(io::Error::other(format!("usage: {CHILD_COMMAND} ADDRESS:PORT NONCE")));
    };
    let destination: SocketAddr = destination.parse().map_err(io::Error::other)?;
    let nonce = hex::decode(nonce).map_err(io::Error::other)?;
    let mut stream = std::net::TcpStream::connect_timeout(&destination, PROBE_TIMEOUT)?;
    stream.set_read_timeout(Some(PROBE_TIMEOUT))?;
    stream.set_write_timeout(Some(PROBE_TIMEOUT))?;
    let nonce = Nonce::try_from(nonce).map_err(|_| io::Error::other("a nonce of another length"))?;
    stream.write_all(&greeting(&nonce))?;
    let mut answer = vec![0; nonce.len()];
    stream.read_exact(&mut answer)?;
    if answer == nonce[..] {
        Ok(())
    } else {
        Err(io::Error::other("something else answered"))
    }
}

/// What comes to a probe's destination: its first byte says from which of two Pods, and to which of two destinations. Only the
/// greeting that is waited for, from that Pod, at that destination, by somebody without root's rights, is answered, and once.
#[cfg(fuzzing)]
pub(super) fn fuzz(bytes: &[u8]) {
    const NONCE: Nonce = *b"sixteen of them.";
    let Some((choice, said)) = bytes.split_first() else { return };
    let Some(said) = said.first_chunk::<GREETING_LEN>() else {
        return;
    };
    let destinations = [PROBE_ADDRESS_V4.into(), PROBE_ADDRESS_V6.into()].map(|ip: IpAddr| SocketAddr::new(ip, PROBE_PORT));
    let probes = Probes::default();
    let (sender, mut arrived) = oneshot::channel();
    let expected = Expected {
        pod_uid: "uid-a".to_owned(),
        destination: destinations[0],
        unprivileged: true,
        arrived: sender,
    };
    probes.expected.lock().insert(NONCE, expected);
    let from = if choice & 1 == 0 { "uid-a" } else { "uid-b" };
    let to = destinations[usize::from(choice >> 1 & 1)];
    let answer = |said| probes.settle(from, OriginalDst::new(to), said);
    let is_right = choice & 3 == 0 && said[..NONCE_LEN] == NONCE && said[NONCE_LEN..] != [0; 4];
    assert_eq!(answer(said), is_right.then_some(NONCE));
    assert_eq!(arrived.try_recv().is_ok(), is_right);
    assert!(answer(said).is_none(), "a nonce counts once");
}

#[cfg(test)]
mod tests;
