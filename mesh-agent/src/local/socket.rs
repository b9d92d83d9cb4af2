//! The socket's file and who may use it.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use nix::sys::stat::{Mode, umask};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::time::sleep;
use tracing::warn;

const SOCKET_FILE: &str = "agent.sock";
const LOCK_FILE: &str = "agent.lock";
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
    refused: AtomicU64,
    path: PathBuf,
    _lock: Flock<File>,
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
        DirBuilder::new().recursive(true).mode(0o700).create(run_dir).map_err(io)?;
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(run_dir.join(LOCK_FILE))
            .map_err(io)?;
        let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| match error {
            nix::errno::Errno::EWOULDBLOCK => SocketError::InUse(run_dir.to_owned()),
            error => io(error.into()),
        })?;
        let path = socket_path(run_dir);
        // Ours to replace: we hold the lock. Should someone listen all the same, it is not an agent's, and not ours to break.
        if std::os::unix::net::UnixStream::connect(&path).is_ok() {
            return Err(SocketError::InUse(run_dir.to_owned()));
        }
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io(error)),
            _ => {}
        }
        // Never there with a wider mode, not for a moment.
        let before = umask(Mode::from_bits_truncate(0o177));
        let listener = UnixListener::bind(&path);
        umask(before);
        let listener = listener.map_err(io)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map_err(io)?;
        Ok(Self {
            listener,
            refused: AtomicU64::new(0),
            path,
            _lock: lock,
        })
    }

    /// Connections that were not root's.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
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
                        self.refused.fetch_add(1, Ordering::Relaxed);
                        warn!(
                            uid = peer.uid(),
                            pid = peer.pid(),
                            "the local socket is root's only; connection refused"
                        );
                    }
                    Err(error) => {
                        self.refused.fetch_add(1, Ordering::Relaxed);
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
        // A leftover is replaced by the next agent.
        let _ = fs::remove_file(&self.path);
    }
}

/// The kernel's word (SO_PEERCRED) of who connected, in the agent's user namespace.
pub(super) fn is_allowed(uid: u32) -> bool {
    uid == 0
}
