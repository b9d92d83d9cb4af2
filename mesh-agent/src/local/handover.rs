//! A graceful restart: the running agent hands what must not be closed to its successor, over a socket of the run directory that
//! is root's alone. Both accept until the successor serves; so there is no moment in which nobody does.
//!
//! One message after the other, each a length, JSON, and descriptors: the successor's [`Hello`]; the [`Answer`] with the folder's
//! lock, the local socket and the pages' listeners; a [`PodOffered`] with three listeners for each served Pod; the successor's
//! [`SERVING`]; the running agent's [`RELEASED`]. Before those last words nothing is given up: without the first the running agent
//! goes on as before, and says so ([`GOES_ON`]), and then the successor must not: two agents would share the Pods.
//!
//! The two may be of different builds, the newer one before or after. Both know all messages then: fields and descriptors are only
//! added, at the end, each with a meaning for where it is missing; what one does not know it leaves alone.

use std::collections::HashMap;
use std::io::{self, Read as _};
use std::net::TcpListener;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mesh_common::ABI_VERSION;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::net::UnixListener;
use tracing::{info, warn};

use super::LocalSocket;
use crate::capture::descriptors::{receive, send};
use crate::memory::Memory;
use crate::pods::Pods;

pub const SOCKET_FILE: &str = "handover.sock";
/// Raised when a message changes.
const VERSION: u32 = 3;
/// The oldest version whose messages this one understands, and that understands its own. Raised when an order changes, or when a field
/// appears that must not be missing; then between the two no agent takes over.
const OLDEST: u32 = 3;
/// The other agent answers at once, or hangs.
const PATIENCE: Duration = Duration::from_secs(10);
/// From the offer until the successor serves: it loads programs, and finds again what was not offered.
const TAKEOVER_PATIENCE: Duration = Duration::from_secs(60);
/// A uid has at most 128 bytes, a path 4,096.
const MAX_MESSAGE_BYTES: usize = 16 * 1024;
const ACCEPT_RETRY: Duration = Duration::from_millis(50);
const SERVING: &str = "serving";
const RELEASED: &str = "released";
const GOES_ON: &str = "goes on";

/// Who wants to take over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    version: u32,
    oldest: u32,
    pub node: String,
    pub pin_path: PathBuf,
    /// Told to whoever reads the log; 0: it does not say.
    #[serde(default)]
    abi: u32,
}

impl Hello {
    #[must_use]
    pub fn new(node: &str, pin_path: &Path) -> Self {
        Self {
            version: VERSION,
            oldest: OLDEST,
            node: node.to_owned(),
            pin_path: pin_path.to_owned(),
            abi: ABI_VERSION,
        }
    }

    /// Why this agent cannot be taken over by that successor.
    fn objection(&self, successor: &Hello) -> Option<String> {
        let (same_node, same_pins) = (self.node == successor.node, self.pin_path == successor.pin_path);
        if !same_node || !same_pins {
            return Some(format!(
                "it is of the node {} with its pins in {}, the successor of {} with {}",
                self.node,
                self.pin_path.display(),
                successor.node,
                successor.pin_path.display()
            ));
        }
        if successor.version < self.oldest || self.version < successor.oldest {
            return Some(format!(
                "it speaks version {} of the handover and understands those from {}, the successor {} and from {}: install a version \
                 between the two first, or let this agent end",
                self.version, self.oldest, successor.version, successor.oldest
            ));
        }
        None
    }
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Answer {
    refused: Option<String>,
    pods: usize,
}

#[derive(Debug, Serialize, Deserialize)]
struct PodOffered {
    uid: String,
}

/// What the running agent gives.
#[derive(Debug)]
pub struct Offer {
    pub hello: Hello,
    pub local: Arc<LocalSocket>,
    /// Of metrics, readiness and admin.
    pub pages: [TcpListener; 3],
    pub pods: Arc<Pods>,
    pub memory: Arc<Memory>,
}

impl Offer {
    /// Nobody took over. Blocks.
    fn go_on(&self) {
        self.local.set_handed_over(false);
        self.pods.thaw();
        // Who asked may have been an uninstaller that was ended half-way.
        self.local.stay();
    }
}

/// What the successor has got. Dropped before [`Inherited::serving`], the other agent goes on.
#[derive(Debug)]
pub struct Inherited {
    folder: Option<(OwnedFd, OwnedFd)>,
    pub pages: Vec<TcpListener>,
    /// uid → outbound, tunnel, plaintext.
    pub pods: HashMap<String, [TcpListener; 3]>,
    stream: UnixStream,
}

impl Inherited {
    /// Of the run directory.
    ///
    /// # Errors
    /// They were taken already.
    pub fn lock_and_socket(&mut self) -> io::Result<(OwnedFd, OwnedFd)> {
        self.folder.take().ok_or_else(|| io::Error::other("taken already"))
    }

    /// Tells the other agent that this one serves. One that died meanwhile has released everything as well.
    ///
    /// # Errors
    /// The other agent goes on, or may: this one must end.
    pub fn serving(&self) -> io::Result<()> {
        // What it said before it closed can still be read.
        let told = write(&self.stream, &SERVING, &[]);
        match read::<String>(&self.stream) {
            Ok((word, _)) if word == RELEASED => Ok(()),
            Ok(_) => Err(io::Error::other("the running agent has given up waiting and goes on")),
            Err(error) if is_gone(&error) => Ok(()),
            Err(error) => Err(told.err().unwrap_or(error)),
        }
    }

    /// The listener of this address, if it is one that was given.
    pub fn page(&mut self, address: std::net::SocketAddr) -> Option<TcpListener> {
        let at = self
            .pages
            .iter()
            .position(|page| page.local_addr().is_ok_and(|of| of == address))?;
        Some(self.pages.swap_remove(at))
    }
}

/// Where an agent is asked for what it has.
#[must_use]
pub fn socket_path(run_dir: &Path) -> PathBuf {
    run_dir.join(SOCKET_FILE)
}

/// Asks the running agent for everything. Blocks.
///
/// # Errors
/// It does not answer, or will not: its reason.
pub fn take(run_dir: &Path, hello: &Hello) -> io::Result<Inherited> {
    take_from(UnixStream::connect(socket_path(run_dir))?, hello, PATIENCE)
}

fn take_from(stream: UnixStream, hello: &Hello, patience: Duration) -> io::Result<Inherited> {
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))?;
    write(&stream, hello, &[])?;
    let (answer, descriptors) = read::<Answer>(&stream)?;
    if let Some(refused) = answer.refused {
        return Err(io::Error::other(format!("it will not be taken over: {refused}")));
    }
    let mut descriptors = descriptors.into_iter();
    let (Some(lock), Some(local)) = (descriptors.next(), descriptors.next()) else {
        return Err(io::Error::other("it gave no lock"));
    };
    let pages = descriptors.map(TcpListener::from).collect();
    let mut pods = HashMap::new();
    for _ in 0..answer.pods {
        let (pod, listeners) = read::<PodOffered>(&stream)?;
        let listeners: Vec<TcpListener> = listeners.into_iter().take(3).map(TcpListener::from).collect();
        let listeners = <[TcpListener; 3]>::try_from(listeners).map_err(|_| io::Error::other("a Pod has three listeners"))?;
        pods.insert(pod.uid, listeners);
    }
    Ok(Inherited {
        folder: Some((lock, local)),
        pages,
        pods,
        stream,
    })
}

/// Waits for a successor, and returns once one serves. From then on nothing is this agent's but the connections that it has.
pub async fn give(listener: UnixListener, offer: Arc<Offer>) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                warn!(%error, "accept on the handover socket");
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        if !stream.peer_cred().is_ok_and(|peer| peer.uid() == 0) {
            warn!("the handover socket is root's only; connection refused");
            offer.local.count_refused();
            continue;
        }
        let giving = offer.clone();
        let given = tokio::task::spawn_blocking(move || {
            let stream = stream.into_std()?;
            stream.set_nonblocking(false)?;
            let given = give_to(&stream, &giving);
            if given.is_err() {
                giving.go_on();
                // A successor that is gone need not hear it.
                let _ = write(&stream, &GOES_ON, &[]);
            }
            given
        });
        match given.await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => warn!(%error, "no handover; this agent goes on"),
            Err(error) => {
                offer.go_on();
                warn!(%error, "a handover did not end; this agent goes on");
            }
        }
    }
}

fn give_to(stream: &UnixStream, offer: &Offer) -> io::Result<()> {
    let hello = hello_of(stream, PATIENCE)?;
    let refuse = |why: String| {
        let answer = Answer {
            refused: Some(why.clone()),
            ..Answer::default()
        };
        write(stream, &answer, &[])?;
        Err(io::Error::other(why))
    };
    if let Some(objection) = offer.hello.objection(&hello) {
        return refuse(objection);
    }
    if !offer.pods.freeze(PATIENCE / 2) {
        return refuse("a Pod is being enrolled or released; try again".to_owned());
    }
    info!(abi = hello.abi, "another agent takes over: until it serves, both accept");
    // From here on a successor may have the socket: should this agent be ended meanwhile, its file stays.
    offer.local.set_handed_over(true);
    // What it serves by, should the control plane be away.
    offer.memory.write_now();
    let pods = offer.pods.listeners();
    let answer = Answer {
        refused: None,
        pods: pods.len(),
    };
    offer.local.with_descriptors(|lock, local| {
        let [metrics, ready, admin] = &offer.pages;
        write(stream, &answer, &[lock, local, metrics.as_fd(), ready.as_fd(), admin.as_fd()])
    })?;
    for (uid, [outbound, tunnel, plaintext]) in pods {
        let all = [outbound.as_fd(), tunnel.as_fd(), plaintext.as_fd()];
        write(stream, &PodOffered { uid: uid.to_string() }, &all)?;
    }
    release_to(stream, TAKEOVER_PATIENCE)
}

/// Whoever says nothing, or reads nothing, keeps the next one from it only so long.
fn hello_of(stream: &UnixStream, patience: Duration) -> io::Result<Hello> {
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))?;
    Ok(read(stream)?.0)
}

fn release_to(stream: &UnixStream, patience: Duration) -> io::Result<()> {
    stream.set_read_timeout(Some(patience))?;
    let (word, _) = read::<String>(stream)?;
    if word == SERVING {
        // A successor that is gone again is none of this agent's business: it has said that it served.
        let _ = write(stream, &RELEASED, &[]);
        Ok(())
    } else {
        Err(io::Error::other("the successor does not say that it serves"))
    }
}

/// The other process has ended, or closed its end.
fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
    )
}

fn write(stream: &UnixStream, message: &impl Serialize, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let text = serde_json::to_vec(message)?;
    let length = u32::try_from(text.len()).map_err(io::Error::other)?;
    send(stream, &[&length.to_be_bytes()[..], &text].concat(), descriptors)
}

fn read<T: DeserializeOwned>(mut stream: &UnixStream) -> io::Result<(T, Vec<OwnedFd>)> {
    let mut length = [0; 4];
    let descriptors = receive(stream, &mut length)?;
    let length = u32::from_be_bytes(length) as usize;
    if length > MAX_MESSAGE_BYTES {
        return Err(io::Error::other("a message is too long"));
    }
    let mut text = vec![0; length];
    stream.read_exact(&mut text)?;
    Ok((serde_json::from_slice(&text)?, descriptors))
}

/// What the other end of a handover says: the successor's words, then those of the agent that runs.
#[cfg(fuzzing)]
pub fn fuzz(bytes: &[u8]) {
    use std::io::Write as _;
    let Ok((stream, mut other)) = UnixStream::pair() else { return };
    // More than a message may have does not fit into the socket's buffer at once.
    if other.set_nonblocking(true).is_err() || other.write_all(&bytes[..bytes.len().min(2 * MAX_MESSAGE_BYTES)]).is_err() {
        return;
    }
    drop(other);
    let _ = read::<Hello>(&stream);
    let _ = read::<Answer>(&stream);
    while let Ok((offered, descriptors)) = read::<PodOffered>(&stream) {
        assert!(offered.uid.len() <= MAX_MESSAGE_BYTES && descriptors.is_empty());
    }
    let _ = read::<String>(&stream);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A successor at its last word, and the running agent's end.
    fn last_word() -> (Inherited, UnixStream) {
        let (stream, other) = UnixStream::pair().unwrap();
        let inherited = Inherited {
            folder: None,
            pages: Vec::new(),
            pods: HashMap::new(),
            stream,
        };
        (inherited, other)
    }

    #[test]
    fn a_successor_serves_only_where_nobody_else_does() {
        let (inherited, other) = last_word();
        write(&other, &RELEASED, &[]).unwrap();
        inherited.serving().unwrap();
        assert_eq!(read::<String>(&other).unwrap().0, SERVING);

        // It died: by the time of the word, or before.
        let (inherited, other) = last_word();
        drop(other);
        inherited.serving().unwrap();

        // It waited in vain, and goes on: still there, or ended since.
        let (inherited, other) = last_word();
        write(&other, &GOES_ON, &[]).unwrap();
        assert!(inherited.serving().is_err());
        let (inherited, other) = last_word();
        write(&other, &GOES_ON, &[]).unwrap();
        drop(other);
        assert!(inherited.serving().is_err());

        // It hangs.
        let (inherited, _other) = last_word();
        inherited.stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        assert!(inherited.serving().is_err());
    }

    #[test]
    fn agents_of_neighbouring_versions_take_over_from_each_other() {
        let of = |version, oldest| Hello {
            version,
            oldest,
            ..Hello::new("node", Path::new("/pins"))
        };
        for (running, successor, fits) in [
            ((3, 3), (3, 3), true),
            // A newer one that has added fields, and back.
            ((3, 3), (4, 3), true),
            ((4, 3), (3, 3), true),
            // One that has changed what the other needs, and back.
            ((3, 3), (4, 4), false),
            ((4, 4), (3, 3), false),
        ] {
            let (running, successor) = (of(running.0, running.1), of(successor.0, successor.1));
            let objection = running.objection(&successor);
            assert_eq!(objection.is_none(), fits, "{running:?} {successor:?}: {objection:?}");
        }
        let own = Hello::new("node", Path::new("/pins"));
        for other in [
            Hello::new("other", Path::new("/pins")),
            Hello::new("node", Path::new("/elsewhere")),
        ] {
            let objection = own.objection(&other).unwrap();
            assert!(objection.contains("/pins") && objection.contains("node"), "{objection}");
        }
    }

    #[test]
    fn words_of_other_versions_are_understood() {
        let (stream, other) = UnixStream::pair().unwrap();
        let newer = serde_json::json!({ "version": 4, "oldest": 3, "node": "node", "pin_path": "/pins", "abi": 9, "added": [1] });
        write(&other, &newer, &[]).unwrap();
        assert_eq!(read::<Hello>(&stream).unwrap().0.abi, 9);
        let older = serde_json::json!({ "version": 3, "oldest": 3, "node": "node", "pin_path": "/pins" });
        write(&other, &older, &[]).unwrap();
        assert_eq!(read::<Hello>(&stream).unwrap().0.abi, 0);

        // A newer agent that gives more than this one knows.
        let file = tempfile::tempfile().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let six = [
            file.as_fd(),
            file.as_fd(),
            listener.as_fd(),
            listener.as_fd(),
            listener.as_fd(),
            listener.as_fd(),
        ];
        let four = [listener.as_fd(), listener.as_fd(), listener.as_fd(), file.as_fd()];
        write(&other, &serde_json::json!({ "refused": null, "pods": 1, "added": {} }), &six).unwrap();
        write(&other, &serde_json::json!({ "uid": "a", "added": true }), &four).unwrap();
        let inherited = take_from(stream, &Hello::new("node", Path::new("/pins")), SHORT).unwrap();
        assert_eq!((inherited.pages.len(), inherited.pods["a"].len()), (4, 3));
    }

    const SHORT: Duration = Duration::from_millis(50);

    fn timed_out<T>(result: io::Result<T>) -> bool {
        // The end of a socket's patience is one of the two (POSIX, recv).
        result.is_err_and(|error| matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut))
    }

    /// Runs beside the test, so that what waits for ever fails it.
    fn within_patience<T: Send + 'static>(wait: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, waited) = std::sync::mpsc::channel();
        std::thread::spawn(move || done.send(wait()));
        waited.recv_timeout(Duration::from_secs(30)).expect("it waits for ever")
    }

    #[test]
    fn who_says_nothing_is_not_waited_for() {
        // A successor that says nothing, and one that says half.
        let (stream, _other) = UnixStream::pair().unwrap();
        assert!(timed_out(within_patience(move || hello_of(&stream, SHORT))));
        let (stream, mut other) = UnixStream::pair().unwrap();
        io::Write::write_all(&mut other, &[0, 0, 0, 9, b'{']).unwrap();
        assert!(timed_out(within_patience(move || hello_of(&stream, SHORT))));

        // One that reads nothing.
        let (stream, other) = UnixStream::pair().unwrap();
        write(&other, &Hello::new("node", Path::new("/pins")), &[]).unwrap();
        let written = within_patience(move || {
            hello_of(&stream, SHORT)?;
            let much = "x".repeat(MAX_MESSAGE_BYTES / 2);
            // Far more than a socket's buffer takes.
            (0..10_000).try_for_each(|_| write(&stream, &much, &[]))
        });
        assert!(timed_out(written));

        // One that has everything, and never serves: it is not told that it may.
        let (stream, mut other) = UnixStream::pair().unwrap();
        assert!(timed_out(within_patience(move || release_to(&stream, SHORT))));
        let mut heard = Vec::new();
        other.read_to_end(&mut heard).unwrap();
        assert!(heard.is_empty(), "{heard:?}");

        // A running agent that hangs.
        let (stream, _other) = UnixStream::pair().unwrap();
        let hello = Hello::new("node", Path::new("/pins"));
        assert!(timed_out(within_patience(move || take_from(stream, &hello, SHORT))));
    }

    #[test]
    fn a_message_has_a_size() {
        let (stream, other) = UnixStream::pair().unwrap();
        // With its quotes.
        let longest = "x".repeat(MAX_MESSAGE_BYTES - 2);
        write(&other, &longest, &[]).unwrap();
        assert_eq!(read::<String>(&stream).unwrap().0, longest);
        write(&other, &(longest + "x"), &[]).unwrap();
        let refused = read::<String>(&stream).unwrap_err();
        assert!(refused.to_string().contains("too long"), "{refused}");
    }
}
