//! The folder of secrets and state: 0700, its files 0600, every write atomic.

use std::fs::{DirBuilder, File};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: std::io::Error },
    #[error("{}: others than its owner may use it (mode {mode:o}); run `chmod {want:o} {}`", path.display(), path.display())]
    TooOpen { path: PathBuf, mode: u32, want: u32 },
    #[error("{}: {problem}", path.display())]
    Content { path: PathBuf, problem: String },
    #[error("{}: has, or would have, more than {most} bytes", path.display())]
    TooLarge { path: PathBuf, most: u64 },
}

impl StateError {
    pub(crate) fn content(path: &Path, problem: impl ToString) -> Self {
        Self::Content {
            path: path.to_owned(),
            problem: problem.to_string(),
        }
    }
}

#[derive(Clone, Debug)]
pub struct StateDir {
    path: PathBuf,
}

impl StateDir {
    /// Opens the folder; makes it when it is missing.
    ///
    /// # Errors
    /// It cannot be made, or others may use it.
    pub fn open(path: &Path) -> Result<Self, StateError> {
        make_private_dir(path)?;
        Ok(Self { path: path.to_owned() })
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A folder in it, made when it is missing.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn sub_dir(&self, name: &str) -> Result<Self, StateError> {
        Self::open(&self.path.join(name))
    }

    /// `None`: there is no such file.
    ///
    /// # Errors
    /// It cannot be read, is larger than `most` bytes, or others may read it.
    pub fn read(&self, name: &str, most: u64) -> Result<Option<Vec<u8>>, StateError> {
        let path = self.path.join(name);
        let io = |error| StateError::Io {
            path: path.clone(),
            error,
        };
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io(error)),
        };
        let mode = file.metadata().map_err(io)?.mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(StateError::TooOpen { path, mode, want: 0o600 });
        }
        let mut bytes = Vec::new();
        file.take(most + 1).read_to_end(&mut bytes).map_err(io)?;
        if bytes.len() as u64 > most {
            return Err(StateError::TooLarge { path, most });
        }
        Ok(Some(bytes))
    }

    /// As [`Self::write`], but of more than `most` bytes nothing: what could not be read back would keep this program from starting.
    ///
    /// # Errors
    /// The disk's; [`StateError::TooLarge`]: the file is as it was.
    pub fn write_within(&self, name: &str, content: &[u8], most: u64) -> Result<(), StateError> {
        if content.len() as u64 > most {
            let path = self.path.join(name);
            return Err(StateError::TooLarge { path, most });
        }
        self.write(name, content)
    }

    /// Replaces or makes a file: readers see the old or the new content, whole, also after a power cut.
    ///
    /// # Errors
    /// The disk's.
    pub fn write(&self, name: &str, content: &[u8]) -> Result<(), StateError> {
        write_private(&self.path.join(name), content, true)
    }

    /// Sees to it that there is no such file.
    ///
    /// # Errors
    /// The disk's.
    pub fn remove(&self, name: &str) -> Result<(), StateError> {
        let path = self.path.join(name);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(StateError::Io { path, error }),
            _ => Ok(()),
        }
    }

    /// As [`Self::write`], but never replaces a file: false when there was one.
    ///
    /// # Errors
    /// The disk's.
    pub fn write_new(&self, name: &str, content: &[u8]) -> Result<bool, StateError> {
        match write_private(&self.path.join(name), content, false) {
            Ok(()) => Ok(true),
            Err(StateError::Io { error, .. }) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Names of the files in it, at most `most`.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn list(&self, most: usize) -> Result<Vec<String>, StateError> {
        let io = |error| StateError::Io {
            path: self.path.clone(),
            error,
        };
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.path).map_err(io)?.take(most) {
            names.extend(entry.map_err(io)?.file_name().into_string());
        }
        names.sort();
        Ok(names)
    }
}

fn make_private_dir(path: &Path) -> Result<(), StateError> {
    let io = |error| StateError::Io {
        path: path.to_owned(),
        error,
    };
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io)?;
    let mode = std::fs::metadata(path).map_err(io)?.mode() & 0o7777;
    if mode & 0o077 == 0 {
        return Ok(());
    }
    // One that was just made for us holds nothing that could have been read.
    if std::fs::read_dir(path).map_err(io)?.next().is_none() {
        return std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700)).map_err(io);
    }
    Err(StateError::TooOpen {
        path: path.to_owned(),
        mode,
        want: 0o700,
    })
}

/// Writes a 0600 file by a temporary one beside it.
///
/// # Errors
/// The disk's; without `replace`, [`ErrorKind::AlreadyExists`].
pub fn write_private(path: &Path, content: &[u8], replace: bool) -> Result<(), StateError> {
    let io = |error| StateError::Io {
        path: path.to_owned(),
        error,
    };
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new()
        .prefix(".new-")
        .permissions(std::fs::Permissions::from_mode(0o600))
        .tempfile_in(parent)
        .map_err(io)?;
    file.write_all(content).map_err(io)?;
    file.as_file().sync_all().map_err(io)?;
    let persisted = if replace {
        file.persist(path)
    } else {
        file.persist_noclobber(path)
    };
    persisted.map_err(|error| io(error.error))?;
    File::open(parent).and_then(|parent| parent.sync_all()).map_err(io)
}
