//! Maps of several ABI versions beside each other. An agent of another version than the running one brings its own of those maps
//! whose layout may change, fills them from what is there, and only then puts its programs into the links. What was is removed once
//! no agent of that version can need it: after a takeover, or by the one that goes on after a takeover that failed. An end at any
//! moment between leaves both, and the next agent of either version begins again here.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use mesh_common::{ABI_VERSION, MAPS_OF_ABI};

use super::super::CaptureError;
use super::super::bpf_syscalls::{self, Flags, MapShape};
use super::failed;
use super::pins::names_in;

/// Where things are pinned.
#[derive(Clone, Debug)]
pub(super) struct Pins {
    /// Links, and the maps that all versions share.
    pub shared: PathBuf,
    /// The maps of this ABI version.
    pub own: PathBuf,
}

impl Pins {
    pub(super) fn of(shared: PathBuf) -> Self {
        let own = shared.join(format!("abi{ABI_VERSION}"));
        Self { shared, own }
    }

    /// The pin of a map.
    pub(super) fn map(&self, name: &str) -> PathBuf {
        if MAPS_OF_ABI.contains(&name) {
            self.own.join(name)
        } else {
            self.shared.join(name)
        }
    }

    /// The names of all pinned maps.
    pub(super) fn maps(&self) -> io::Result<Vec<String>> {
        let mut maps = Vec::new();
        for folder in [&self.shared, &self.own] {
            maps.extend(names_in(folder)?.into_iter().filter(|name| !folder.join(name).is_dir()));
        }
        Ok(maps)
    }

    /// The folders of other ABI versions.
    fn others(&self) -> Result<Vec<PathBuf>, CaptureError> {
        let names = names_in(&self.shared).map_err(|error| failed(self.shared.display(), error))?;
        let others = names
            .iter()
            .filter(|name| abi_of(name).is_some_and(|version| version != ABI_VERSION));
        Ok(others.map(|name| self.shared.join(name)).collect())
    }

    /// Fills this version's maps from those of others. To be called before a program of this version is attached: with a Pod missing
    /// in its map, that Pod would be open.
    pub(super) fn import(&self) -> Result<(), CaptureError> {
        for other in self.others()? {
            for name in MAPS_OF_ABI {
                let from = match bpf_syscalls::object_get(&other.join(name)) {
                    Ok(from) => from,
                    // It ended while it was made, or while it was removed.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    Err(error) => return Err(failed(other.join(name).display(), error)),
                };
                let to = self.map(name);
                let copied = bpf_syscalls::object_get(&to).and_then(|to| copy(name, from.as_fd(), to.as_fd()));
                let copied =
                    copied.map_err(|error| failed(format!("filling {} from {}", to.display(), other.display()), error))?;
                tracing::info!(map = name, from = %other.display(), copied, "a map of another ABI version is taken over");
            }
        }
        Ok(())
    }

    /// Removes other versions' maps: no agent of theirs runs here any more but to drain, and for that it needs none of them. How many
    /// versions there were.
    pub(super) fn remove_others(&self) -> Result<usize, CaptureError> {
        let others = self.others()?;
        for other in &others {
            remove(other).map_err(|error| failed(other.display(), error))?;
            tracing::info!(removed = %other.display(), "another ABI version's maps are no longer needed");
        }
        Ok(others.len())
    }
}

fn remove(folder: &Path) -> io::Result<()> {
    for name in names_in(folder)? {
        fs::remove_file(folder.join(name))?;
    }
    fs::remove_dir(folder)
}

/// The ABI version of a folder `abi<number>`.
pub(super) fn abi_of(name: &str) -> Option<u32> {
    name.strip_prefix("abi")?.parse().ok()
}

/// How many entries were written.
fn copy(name: &str, from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<usize> {
    let (old, new) = (bpf_syscalls::map_shape(from)?, bpf_syscalls::map_shape(to)?);
    if (old.kind, old.key_bytes) != (new.kind, new.key_bytes) {
        return Err(io::Error::other(format!("its keys are others: {old:?}, here {new:?}")));
    }
    match name {
        "COUNTERS" => add_up(from, old, to, new),
        // An agent writes it from its state within moments, and what it removes then must not come back.
        "MESH_DESTINATIONS" if bpf_syscalls::map_next_key(to, None, new)?.is_some() => Ok(0),
        _ => copy_missing(from, old, to, new),
    }
}

/// Every entry that is not there yet. What is there was written by an agent of this version, or is copied already.
fn copy_missing(from: BorrowedFd<'_>, old: MapShape, to: BorrowedFd<'_>, new: MapShape) -> io::Result<usize> {
    let (mut copied, mut last) = (0, None);
    // A walk that others disturb may begin anew; nobody adds a Pod meanwhile.
    for _ in 0..old.max_entries {
        let Some(key) = bpf_syscalls::map_next_key(from, last.as_deref(), old)? else {
            break;
        };
        if let Some(value) = bpf_syscalls::map_read(from, &key, old)? {
            match bpf_syscalls::map_write(to, &key, &resized(value, new.value_bytes), Flags::NoExist) {
                Ok(()) => copied += 1,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        last = Some(key);
    }
    Ok(copied)
}

/// The larger value of each counter: none goes back, whichever version counted last.
fn add_up(from: BorrowedFd<'_>, old: MapShape, to: BorrowedFd<'_>, new: MapShape) -> io::Result<usize> {
    const NUMBER_BYTES: usize = 8;
    let counters = old.max_entries.min(new.max_entries);
    for index in 0..counters {
        let key = index.to_ne_bytes();
        let (Some(theirs), Some(mut ours)) = (
            bpf_syscalls::map_read(from, &key, old)?,
            bpf_syscalls::map_read(to, &key, new)?,
        ) else {
            continue;
        };
        // One number for each CPU.
        for (ours, theirs) in ours.chunks_exact_mut(NUMBER_BYTES).zip(theirs.chunks_exact(NUMBER_BYTES)) {
            if number(theirs) > number(ours) {
                ours.copy_from_slice(theirs);
            }
        }
        bpf_syscalls::map_write(to, &key, &ours, Flags::Any)?;
    }
    Ok(counters as usize)
}

fn number(bytes: &[u8]) -> u64 {
    bytes.try_into().map(u64::from_ne_bytes).unwrap_or_default()
}

/// What another version knows of an entry: fields that it has not are zero, those that are only its own are left out.
fn resized(mut value: Vec<u8>, bytes: usize) -> Vec<u8> {
    value.resize(bytes, 0);
    value
}

/// A map by its pin, for who keeps it.
pub(super) fn open(pin: &Path) -> Result<OwnedFd, CaptureError> {
    bpf_syscalls::object_get(pin).map_err(|error| failed(pin.display(), error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_of_another_version_keeps_what_both_know() {
        assert_eq!(resized(vec![1, 2, 3, 4], 6), [1, 2, 3, 4, 0, 0]);
        assert_eq!(resized(vec![1, 2, 3, 4], 2), [1, 2]);
    }

    #[test]
    fn only_folders_of_versions_are_versions() {
        assert_eq!(abi_of("abi4"), Some(4));
        for other in ["abi", "abi4x", "links", "v4", "PODS"] {
            assert_eq!(abi_of(other), None, "{other}");
        }
        let pins = Pins::of("/pins/v4".into());
        assert_eq!(pins.map("HEARTBEAT"), Path::new("/pins/v4/HEARTBEAT"));
        assert_eq!(pins.map("PODS"), Path::new(&format!("/pins/v4/abi{ABI_VERSION}/PODS")));
    }
}
