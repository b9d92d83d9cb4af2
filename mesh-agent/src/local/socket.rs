//! The socket's file and who may use it.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use nix::sys::stat::{Mode, fchmod};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::time::sleep;
use tracing::warn;

pub const SOCKET_FILE: &str = "agent.sock";
pub const LOCK_FILE: &str = "agent.lock";
/// There while the mesh leaves the node.
pub const LEAVING_FILE: &str = "leaving";
/// Who waits to be accepted.
const BACKLOG: i32 = 1024;
/// After a failed accept, before the next.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    #[error("--run-dir {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("--run-dir {0}: another agent runs there")]
    InUse(PathBuf),
}

#[must_use]
pub fn socket_path(run_dir: &Path) -> PathBuf {
    run_dir.join(SOCKET_FILE)
}

/// The listening socket. Its folder is this agent's alone while it lives.
#[derive(Debug)]
pub struct LocalSocket {
    listener: UnixListener,
    refused: Arc<AtomicU64>,
    path: PathBuf,
    /// Unlocked by the kernel, with the last descriptor of it: one may be a successor's.
    lock: File,
    /// It is another agent's now, and so is its file.
    is_handed_over: AtomicBool,
}

/// Makes the folder and takes its lock, which is held until the file is dropped.
///
/// # Errors
/// Another agent has the folder, or it cannot be used.
pub fn lock(run_dir: &Path) -> Result<File, SocketError> {
    let io = |source| SocketError::Io {
        path: run_dir.to_owned(),
        source,
    };
    DirBuilder::new().recursive(true).mode(0o700).create(run_dir).map_err(io)?;
    let lock = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(run_dir.join(LOCK_FILE))
        .map_err(io)?;
    lock.try_lock().map_err(|error| match error {
        TryLockError::WouldBlock => SocketError::InUse(run_dir.to_owned()),
        TryLockError::Error(error) => io(error),
    })?;
    Ok(lock)
}

/// Whether agents have been in the folder, and none is any more. Makes nothing: a folder that is gone was cleaned.
#[must_use]
pub fn is_abandoned(run_dir: &Path) -> bool {
    let lock = OpenOptions::new().write(true).open(run_dir.join(LOCK_FILE));
    !run_dir.join(LEAVING_FILE).exists() && lock.is_ok_and(|lock| lock.try_lock().is_ok())
}

/// Whether agents have been in the folder, and it was not cleaned since.
#[must_use]
pub fn is_of_agents(run_dir: &Path) -> bool {
    run_dir.join(LOCK_FILE).exists()
}

/// Whether the mesh leaves the node, or has left it: nobody is to take its Pods up again.
#[must_use]
pub fn has_left(run_dir: &Path) -> bool {
    run_dir.join(LEAVING_FILE).exists() || !is_of_agents(run_dir)
}

/// The mesh leaves the node: whoever was taken over from is not to come back, though nobody has the folder. Until an agent listens, or
/// goes on, there.
///
/// # Errors
/// It cannot be written.
pub fn leave(run_dir: &Path) -> std::io::Result<()> {
    File::create(run_dir.join(LEAVING_FILE)).map(drop)
}

/// It does not leave.
pub fn stay(run_dir: &Path) {
    // What is not there need not be removed; what cannot be keeps an agent from coming back by itself, and no more.
    drop(std::fs::remove_file(run_dir.join(LEAVING_FILE)));
}

impl LocalSocket {
    /// Makes the folder, takes its lock, and listens.
    ///
    /// # Errors
    /// Another agent has the folder, or it cannot be used.
    pub fn listen(run_dir: &Path) -> Result<Self, SocketError> {
        let io = |source| SocketError::Io {
            path: run_dir.to_owned(),
            source,
        };
        let lock = lock(run_dir)?;
        stay(run_dir);
        let path = socket_path(run_dir);
        // Ours to replace: we hold the lock. Should someone listen all the same, it is not an agent's, and not ours to break.
        if std::os::unix::net::UnixStream::connect(&path).is_ok() {
            return Err(SocketError::InUse(run_dir.to_owned()));
        }
        let listener = listen_at(&path).map_err(io)?;
        Ok(Self {
            listener,
            refused: Arc::default(),
            path,
            lock,
            is_handed_over: AtomicBool::new(false),
        })
    }

    /// Goes on with what the agent before has handed over: its lock, and its socket with whoever waits there.
    ///
    /// # Errors
    /// It is no lock of this folder, or no socket.
    pub fn inherit(run_dir: &Path, lock: OwnedFd, listener: OwnedFd) -> Result<Self, SocketError> {
        let io = |source| SocketError::Io {
            path: run_dir.to_owned(),
            source,
        };
        let lock = File::from(lock);
        // Ours already, with the file that it came with; said again, so that no other descriptor can pass for it.
        lock.try_lock().map_err(|_| SocketError::InUse(run_dir.to_owned()))?;
        let listener = std::os::unix::net::UnixListener::from(listener);
        listener.set_nonblocking(true).map_err(io)?;
        Ok(Self {
            listener: UnixListener::from_std(listener).map_err(io)?,
            refused: Arc::default(),
            path: socket_path(run_dir),
            lock,
            is_handed_over: AtomicBool::new(false),
        })
    }

    /// Lock and listener, for a successor.
    pub fn with_descriptors<T>(&self, give: impl FnOnce(BorrowedFd<'_>, BorrowedFd<'_>) -> T) -> T {
        give(self.lock.as_fd(), self.listener.as_fd())
    }

    /// As [`stay`], of this agent's folder.
    pub fn stay(&self) {
        if let Some(run_dir) = self.path.parent() {
            stay(run_dir);
        }
    }

    /// Whether the socket's file is another agent's now: then it is not removed at the end.
    pub fn set_handed_over(&self, is_handed_over: bool) {
        self.is_handed_over.store(is_handed_over, Ordering::Relaxed);
    }

    /// Of a socket beside this one: both are counted together.
    pub(super) fn count_refused(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    /// Connections that were not root's. Whoever shows it need not hold the socket: its lock is a successor's with the last holder's end.
    #[must_use]
    pub fn refused(&self) -> Arc<AtomicU64> {
        self.refused.clone()
    }

    /// Hands root's connections on, and closes everyone else's, until nobody takes them.
    pub(super) async fn accept_root(&self, accepted: mpsc::Sender<io::Result<UnixStream>>) {
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => match stream.peer_cred() {
                    Ok(peer) if is_allowed(peer.uid()) => {
                        if accepted.send(Ok(stream)).await.is_err() {
                            return;
                        }
                    }
                    Ok(peer) => {
                        self.count_refused();
                        warn!(
                            uid = peer.uid(),
                            pid = peer.pid(),
                            "the local socket is root's only; connection refused"
                        );
                    }
                    Err(error) => {
                        self.count_refused();
                        warn!(%error, "a connection to the local socket has no credentials; refused");
                    }
                },
                Err(error) => {
                    warn!(%error, "accept on the local socket");
                    sleep(ACCEPT_RETRY).await;
                }
            }
        }
    }
}

impl Drop for LocalSocket {
    fn drop(&mut self) {
        if !self.is_handed_over.load(Ordering::Relaxed) {
            // A leftover is replaced by the next agent.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// A root's socket of the run directory, in the place of what a dead agent left.
///
/// # Errors
/// It cannot be made.
pub fn listen_at(path: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // The file gets the socket's own mode: it is never there with a wider one. (A umask would be the whole process's, and be inherited by
    // the children that other threads make meanwhile.)
    fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
    socket.bind(&SockAddr::unix(path)?)?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    UnixListener::from_std(socket.into())
}

/// The kernel's word (SO_PEERCRED) of who connected, in the agent's user namespace.
pub(super) fn is_allowed(uid: u32) -> bool {
    uid == 0
}
