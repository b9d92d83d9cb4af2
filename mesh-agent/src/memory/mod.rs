//! What outlives the agent: the last good state, and the certificates and keys of the node's identities, in one file of the run
//! directory (0600, on tmpfs by default). The agent after a crash serves its Pods from it at once, control plane or not.
//!
//! What is not to be believed is told and ignored: the agent then knows nothing, and refuses until discovery has answered.

mod file;
#[cfg(test)]
mod tests;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use nix::sys::statfs::{FsType, TMPFS_MAGIC, statfs};
use nix::unistd::geteuid;
use parking_lot::Mutex;
use tokio::sync::watch;
use tracing::{info, warn};

#[cfg(fuzzing)]
pub use file::fuzz;
pub use file::{FileError, LONGEST_ABSENCE, MAX_FILE_BYTES, Owner, Remembered};

pub const FILE: &str = "memory";
/// `RAMFS_MAGIC` of linux/magic.h.
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);
/// From a change until it is written, so that many at once are written once.
const DEBOUNCE: Duration = Duration::from_millis(200);
/// A large state is written no more often than this many times what its last writing took: a twentieth of a processor.
const WRITING_SHARE: u32 = 20;
/// Without a change it is written again, so that it says that an agent stood by it until lately.
const REFRESH: Duration = Duration::from_secs(3600);

#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("others than its owner may use it, or own it")]
    Permissions,
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl MemoryError {
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::File(error) => error.reason(),
            Self::Permissions => "permissions",
            Self::Io(_) => "io",
        }
    }
}

/// The file of one agent.
pub struct Memory {
    path: PathBuf,
    owner: Owner,
    /// What is to be remembered now; nothing before there is everything.
    source: Box<dyn Fn() -> Option<Remembered> + Send + Sync>,
    /// One writer at a time, and whether the last one failed.
    writing: Mutex<bool>,
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Memory").field("path", &self.path).finish_non_exhaustive()
    }
}

/// What an earlier agent left, if it is to be believed.
#[must_use]
pub fn recall(run_dir: &Path, owner: &Owner) -> Option<Remembered> {
    let path = run_dir.join(FILE);
    match read(&path).and_then(|bytes| Ok(file::decode(&bytes, owner, SystemTime::now())?)) {
        Ok(remembered) => Some(remembered),
        Err(MemoryError::Io(error)) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => {
            warn!(path = %path.display(), %error, reason = error.reason(), "what an earlier agent remembered is not used");
            None
        }
    }
}

/// Keys in a file of a disk are still there when the file is not; whoever chose the folder is to know.
#[must_use]
pub fn is_on_tmpfs(run_dir: &Path) -> bool {
    statfs(run_dir).is_ok_and(|of| matches!(of.filesystem_type(), TMPFS_MAGIC | RAMFS_MAGIC))
}

/// No key stays behind.
///
/// # Errors
/// The file cannot be removed.
pub fn remove(run_dir: &Path) -> io::Result<()> {
    for path in [run_dir.join(FILE), new_path(&run_dir.join(FILE))] {
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

impl Memory {
    #[must_use]
    pub fn new(run_dir: &Path, owner: Owner, source: impl Fn() -> Option<Remembered> + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            path: run_dir.join(FILE),
            owner,
            source: Box::new(source),
            writing: Mutex::new(false),
        })
    }

    /// Writes after each change, for ever.
    pub async fn keep(self: Arc<Self>, mut changes: [watch::Receiver<u64>; 2]) {
        let [state, certificates] = &mut changes;
        let mut took = Duration::ZERO;
        loop {
            tokio::time::sleep(DEBOUNCE.max(took * WRITING_SHARE)).await;
            state.mark_unchanged();
            certificates.mark_unchanged();
            let memory = self.clone();
            let start = Instant::now();
            if tokio::task::spawn_blocking(move || memory.write_now()).await.is_err() {
                return;
            }
            took = start.elapsed();
            tokio::select! {
                changed = state.changed() => if changed.is_err() { return },
                changed = certificates.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(REFRESH) => {}
            }
        }
    }

    /// Blocks, briefly. A file that cannot be written is removed: it would tell of what is no longer so.
    pub fn write_now(&self) {
        let mut failed = self.writing.lock();
        let Some(remembered) = (self.source)() else { return };
        let written = file::encode(&self.owner, remembered, SystemTime::now())
            .map_err(MemoryError::from)
            .and_then(|bytes| Ok(write(&self.path, &bytes)?));
        match written {
            Ok(()) => {
                if std::mem::replace(&mut *failed, false) {
                    info!(path = %self.path.display(), "the state is remembered again");
                }
            }
            Err(error) => {
                for path in [&self.path, &new_path(&self.path)] {
                    // Not there, most likely; and nothing else could be done.
                    let _ = fs::remove_file(path);
                }
                if !std::mem::replace(&mut *failed, true) {
                    warn!(path = %self.path.display(), %error, reason = error.reason(), "the state cannot be remembered: after a crash, the next agent needs the control plane");
                }
            }
        }
    }
}

pub fn new_path(path: &Path) -> PathBuf {
    path.with_extension("new")
}

/// Whole or not at all. Not synced: it is to outlive the process, and no reboot.
fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = new_path(path);
    // One of an agent that died while it wrote may have been opened by somebody: never written into.
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
    file.write_all(bytes)?;
    fs::rename(&new, path)
}

fn read(path: &Path) -> Result<Vec<u8>, MemoryError> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)?;
    check(&file)?;
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > MAX_FILE_BYTES {
        return Err(FileError::TooLarge.into());
    }
    Ok(bytes)
}

/// Of the open file: what is checked is what is read. Who could write it could say who is in the mesh.
fn check(file: &File) -> Result<(), MemoryError> {
    let metadata = file.metadata()?;
    if metadata.is_file() && metadata.mode() & 0o077 == 0 && metadata.uid() == geteuid().as_raw() {
        Ok(())
    } else {
        Err(MemoryError::Permissions)
    }
}
