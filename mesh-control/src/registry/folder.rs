//! Reads a folder and says when to read it again. One level only: sub-folders are not read.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};

use super::Scan;
use crate::limits::{FOLDER_DEBOUNCE, FOLDER_DEBOUNCE_MOST, FOLDER_EVENTS, FOLDER_RESCAN, MAX_FILE_BYTES, MAX_FILES};

#[derive(Debug, thiserror::Error)]
#[error("registry folder {}: {error}", path.display())]
pub struct FolderError {
    path: PathBuf,
    error: std::io::Error,
}

/// A folder of manifests: `*.yaml`, `*.yml` and `*.json` in it, and symbolic links to files inside it (a mounted ConfigMap is
/// made of these).
pub struct Folder {
    path: PathBuf,
    most_bytes: u64,
}

impl Folder {
    /// Of `most_bytes` together: what sorts behind them is refused.
    #[must_use]
    pub fn new(path: &Path, most_bytes: u64) -> Self {
        Self {
            path: path.to_owned(),
            most_bytes,
        }
    }

    /// Reads every manifest.
    ///
    /// # Errors
    /// The folder itself cannot be read. A file that cannot be read is an entry of the scan.
    pub fn scan(&self) -> Result<Scan, FolderError> {
        let error = |error| FolderError {
            path: self.path.clone(),
            error,
        };
        let root = self.path.canonicalize().map_err(error)?;
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&root).map_err(error)? {
            let name = entry.map_err(error)?.file_name();
            let Some(name) = name.to_str() else { continue };
            // Editors keep their copies as hidden files.
            if !name.starts_with('.') && is_manifest(name) {
                names.push(name.to_owned());
            }
        }
        names.sort();
        let mut scan = BTreeMap::new();
        let mut total = 0;
        for (index, name) in names.into_iter().enumerate() {
            let content = if index >= MAX_FILES {
                Err(format!("more than {MAX_FILES} manifests in the folder"))
            } else {
                match read(&root, &name) {
                    Ok(None) => continue,
                    Ok(Some(text)) => {
                        total += text.len() as u64;
                        if total > self.most_bytes {
                            Err(format!(
                                "the folder holds more than {} bytes of manifests; remove some",
                                self.most_bytes
                            ))
                        } else {
                            Ok(Arc::from(text))
                        }
                    }
                    Err(message) => Err(message),
                }
            };
            scan.insert(name, content);
        }
        Ok(scan)
    }

    /// Begins to follow changes. Call before the first scan, so that no change falls between.
    #[must_use]
    pub fn watch(&self) -> Watch {
        let (sender, events) = sync_channel(FOLDER_EVENTS);
        let watcher = self.watcher(sender.clone());
        Watch {
            _watcher: watcher,
            events,
            waker: sender,
        }
    }

    fn watcher(&self, sender: SyncSender<()>) -> Option<RecommendedWatcher> {
        let path = self.path.clone();
        let start = || -> notify::Result<RecommendedWatcher> {
            let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
                // Our own reading is an event, too.
                if !event.is_ok_and(|event| event.kind.is_access()) {
                    wake(&sender);
                }
            })?;
            watcher.watch(&path, RecursiveMode::NonRecursive)?;
            Ok(watcher)
        };
        start()
            .inspect_err(|error| {
                tracing::warn!(%error, folder = %self.path.display(), "no change events; the folder is read every {FOLDER_RESCAN:?}");
            })
            .ok()
    }
}

fn wake(sender: &SyncSender<()>) {
    match sender.try_send(()) {
        Ok(()) | Err(TrySendError::Full(()) | TrySendError::Disconnected(())) => {}
    }
}

fn is_manifest(name: &str) -> bool {
    [".yaml", ".yml", ".json"].iter().any(|ending| name.ends_with(ending))
}

/// `None`: not a file, or gone meanwhile.
fn read(root: &Path, name: &str) -> Result<Option<String>, String> {
    let path = match root.join(name).canonicalize() {
        Ok(path) => path,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && !root.join(name).is_symlink() => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    if !path.starts_with(root) {
        return Err("is a symbolic link to outside the registry folder; such links are not followed".to_owned());
    }
    // A FIFO would block its opening for ever.
    let metadata = std::fs::metadata(&path).map_err(|error| error.to_string())?;
    if metadata.is_dir() {
        return Ok(None);
    }
    if !metadata.is_file() {
        return Err("is no regular file".to_owned());
    }
    let file = std::fs::File::open(&path).map_err(|error| error.to_string())?;
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| error.to_string())?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(format!("is larger than {} KiB; split it", MAX_FILE_BYTES >> 10));
    }
    String::from_utf8(bytes)
        .map(Some)
        .map_err(|error| format!("is not UTF-8: {error}"))
}

/// Change events of a folder.
pub struct Watch {
    _watcher: Option<RecommendedWatcher>,
    events: Receiver<()>,
    waker: SyncSender<()>,
}

impl Watch {
    /// Ends a wait from another thread.
    pub fn waker(&self) -> impl Fn() + Send + Sync + use<> {
        let sender = self.waker.clone();
        move || wake(&sender)
    }

    /// A watch of the folder that has the same path now.
    #[must_use]
    pub fn renewed(self, folder: &Folder) -> Self {
        let watcher = folder.watcher(self.waker.clone());
        Self {
            _watcher: watcher,
            ..self
        }
    }

    /// Waits until the folder should be read again: after a change and a little quiet, or for a rescan.
    pub fn wait(&self) {
        match self.events.recv_timeout(FOLDER_RESCAN) {
            Err(RecvTimeoutError::Disconnected) => std::thread::sleep(FOLDER_RESCAN),
            Err(RecvTimeoutError::Timeout) => {}
            Ok(()) => {
                let latest = Instant::now() + FOLDER_DEBOUNCE_MOST;
                while Instant::now() < latest {
                    let quiet = FOLDER_DEBOUNCE
                        .min(latest.saturating_duration_since(Instant::now()))
                        .max(Duration::from_millis(1));
                    if self.events.recv_timeout(quiet).is_err() {
                        break;
                    }
                }
            }
        }
    }
}
