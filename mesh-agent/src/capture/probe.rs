//! Proof of enrolment: connections that must arrive at the agent if, and only if, a Pod's capture works. Outbound, an
//! unprivileged child in the Pod's namespace connects to a test address; inbound, the agent connects from the node's namespace to
//! the Pod. Each carries a nonce that [`Probes`] waits for.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::time::Duration;

use mesh_common::PROBE_PORT;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, oneshot};
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
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
const NONCE_LEN: usize = 16;
/// Connections to probe addresses that are read at a time, of all Pods: an application may make them, too.
const MAX_ANSWERS: usize = 64;

type Nonce = [u8; NONCE_LEN];

/// Whether a connection is for [`Probes::answer`] instead of the mesh.
#[must_use]
pub fn is_probe(destination: OriginalDst) -> bool {
    destination.port() == PROBE_PORT || destination.ip() == PROBE_ADDRESS_V4 || destination.ip() == PROBE_ADDRESS_V6
}

/// The probes that are under way.
#[derive(Debug)]
pub struct Probes {
    expected: Mutex<HashMap<Nonce, Expected>>,
    answers: Semaphore,
}

#[derive(Debug)]
struct Expected {
    pod_uid: String,
    destination: SocketAddr,
    arrived: oneshot::Sender<()>,
}

/// A nonce that is waited for until this is dropped.
struct Expectation {
    probes: Arc<Probes>,
    nonce: Nonce,
    arrived: oneshot::Receiver<()>,
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

impl Default for Probes {
    fn default() -> Self {
        Self {
            expected: Mutex::default(),
            answers: Semaphore::new(MAX_ANSWERS),
        }
    }
}

impl Probes {
    /// Takes a connection for which [`is_probe`] holds. `pod_uid` is the Pod whose listener accepted it.
    pub async fn answer(&self, pod_uid: &str, destination: OriginalDst, mut stream: TcpStream) {
        let Ok(_permit) = self.answers.try_acquire() else {
            tracing::debug!(pod_uid, "too many connections to probe addresses: one dropped");
            return;
        };
        let mut nonce = [0; NONCE_LEN];
        match timeout(PROBE_TIMEOUT, stream.read_exact(&mut nonce)).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) | Err(_) => return,
        }
        if self.settle(pod_uid, destination, &nonce) {
            // The child tells by its exit code that it saw its nonce again; the proof does not depend on it.
            let _ = timeout(PROBE_TIMEOUT, stream.write_all(&nonce)).await;
        }
    }

    /// Whether the nonce was waited for, from that very Pod, for that very destination.
    fn settle(&self, pod_uid: &str, destination: OriginalDst, nonce: &Nonce) -> bool {
        let mut expected = self.expected.lock();
        let matches = expected
            .get(nonce)
            .is_some_and(|expected| expected.pod_uid == pod_uid && OriginalDst::new(expected.destination) == destination);
        matches
            && expected
                .remove(nonce)
                .is_some_and(|expected| expected.arrived.send(()).is_ok())
    }

    fn expect(self: &Arc<Self>, pod_uid: &str, destination: SocketAddr) -> Expectation {
        let nonce: Nonce = rand::random();
        let (sender, arrived) = oneshot::channel();
        let expected = Expected {
            pod_uid: pod_uid.to_owned(),
            destination,
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
        let mut expectation = self.expect(pod_uid, destination);
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
        let mut expectation = self.expect(pod_uid, destination);
        let nonce = expectation.nonce;
        let outcome = timeout(PROBE_TIMEOUT, async {
            let mut stream = TcpStream::connect(destination).await?;
            stream.write_all(&nonce).await?;
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
    stream.write_all(&nonce)?;
    let mut answer = vec![0; nonce.len()];
    stream.read_exact(&mut answer)?;
    if answer == nonce {
        Ok(())
    } else {
        Err(io::Error::other("something else answered"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn destination(text: &str) -> OriginalDst {
        OriginalDst::new(text.parse().unwrap())
    }

    #[test]
    fn probe_destinations_are_known() {
        for probe in [
            "192.0.2.1:80",
            "[2001:db8::1]:443",
            "[::ffff:192.0.2.1]:1",
            "10.0.0.1:15009",
            "[fd00::1]:15009",
        ] {
            assert!(is_probe(destination(probe)), "{probe}");
        }
        for other in ["192.0.2.2:80", "10.0.0.1:80", "[fd00::1]:15008"] {
            assert!(!is_probe(destination(other)), "{other}");
        }
    }

    #[test]
    fn a_nonce_counts_once_and_only_from_its_pod_for_its_destination() {
        let probes = Arc::new(Probes::default());
        let mut expectation = probes.expect("uid", "192.0.2.1:20000".parse().unwrap());
        let nonce = expectation.nonce;
        assert!(!probes.settle("other", destination("192.0.2.1:20000"), &nonce));
        assert!(!probes.settle("uid", destination("192.0.2.1:20001"), &nonce));
        assert!(!probes.settle("uid", destination("192.0.2.1:20000"), &[0; NONCE_LEN]));
        assert!(expectation.arrived.try_recv().is_err());
        assert!(probes.settle("uid", destination("192.0.2.1:20000"), &nonce));
        assert!(expectation.arrived.try_recv().is_ok());
        assert!(!probes.settle("uid", destination("192.0.2.1:20000"), &nonce));
    }

    #[test]
    fn what_is_no_longer_waited_for_is_forgotten() {
        let probes = Arc::new(Probes::default());
        drop(probes.expect("uid", "192.0.2.1:20000".parse().unwrap()));
        assert!(probes.expected.lock().is_empty());
    }

    #[test]
    fn the_child_refuses_odd_arguments() {
        assert!(child([]).is_err());
        assert!(child(["nowhere".to_owned(), "00".to_owned()]).is_err());
        assert!(child(["127.0.0.1:1".to_owned(), "xy".to_owned()]).is_err());
    }
}
