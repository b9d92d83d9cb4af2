//! What is in force, from the files of a folder. A broken document takes nothing out of force: its last good form stays, and a
//! contradiction is decided for what was there first.

pub mod convert;
pub mod decision;
mod enrolment;
mod folder;
mod follow;
mod last_good;
mod manifest;
mod probe_ports;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use sha2::{Digest as _, Sha256};

pub use convert::Reason;
pub(crate) use convert::is_name;
pub use decision::Rejection;
pub use folder::{Folder, FolderError, Watch};
pub use follow::Follow;
pub use last_good::LastGood;

use crate::objects::{ObjectId, World};
use decision::{Form, Held, InForce, decide, world_of};
use manifest::parse_file;

#[cfg(test)]
mod tests;

/// A read of the folder: file name → its text, or why it cannot be read.
pub type Scan = BTreeMap<String, Result<Arc<str>, String>>;

#[derive(Clone, Default)]
struct FileState {
    hash: [u8; 32],
    held: BTreeMap<ObjectId, Held>,
    rejected: Vec<Rejection>,
    ignored: usize,
}

/// The pure part of the registry.
#[derive(Default)]
pub struct Registry {
    scans: u64,
    files: BTreeMap<String, FileState>,
    in_force: BTreeMap<ObjectId, InForce>,
    world: Arc<World>,
    rejections: Vec<Rejection>,
    /// Something was in force once: an empty folder is then one that was lost.
    filled: bool,
    emptied: bool,
}

impl Registry {
    /// As after a restart where something was in force before.
    #[must_use]
    pub fn filled_before(mut self) -> Self {
        self.filled = true;
        self
    }

    /// The last scan would have left nothing in force where there was something, and was not taken: an unmounted folder looks
    /// just so, and believing it would take every policy out of force.
    #[must_use]
    pub fn emptied(&self) -> bool {
        self.emptied
    }

    /// Documents that look as if they were meant for the mesh, which does not read them.
    #[must_use]
    pub fn ignored(&self) -> usize {
        self.files.values().map(|file| file.ignored).sum()
    }

    /// Whose content is held.
    #[cfg(fuzzing)]
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.files.keys().map(String::as_str)
    }

    #[must_use]
    pub fn world(&self) -> Arc<World> {
        Arc::clone(&self.world)
    }

    /// Everything that is not taken at present.
    #[must_use]
    pub fn rejections(&self) -> &[Rejection] {
        &self.rejections
    }

    /// Takes over a read of the folder. True when what is in force, or what is rejected, has changed. See [`Self::emptied`].
    pub fn apply(&mut self, scan: &Scan) -> bool {
        let before = self.files.clone();
        self.scans += 1;
        self.files.retain(|file, _| scan.contains_key(file));
        for (file, content) in scan {
            let state = self.files.entry(file.clone()).or_default();
            match content {
                Ok(text) => read_file(state, file, text, self.scans),
                Err(message) => {
                    state.hash = [0; 32];
                    state.rejected = vec![Rejection {
                        file: file.clone(),
                        document: 0,
                        object: None,
                        reason: Reason::File,
                        message: message.clone(),
                        last_good_in_force: !state.held.is_empty(),
                    }];
                }
            }
        }
        let mut rejections: Vec<Rejection> = self.files.values().flat_map(|file| file.rejected.clone()).collect();
        let held = self
            .files
            .iter()
            .flat_map(|(file, state)| state.held.iter().map(move |(id, held)| (file.as_str(), id, held)));
        let in_force = decide(held, &self.in_force, &mut rejections);
        self.emptied = self.filled && in_force.is_empty();
        if self.emptied {
            self.files = before;
            return false;
        }
        rejections.sort();
        let world = world_of(&in_force);
        let changed = world != self.world || rejections != self.rejections;
        if world != self.world {
            self.world = world;
        }
        self.filled |= !in_force.is_empty();
        self.in_force = in_force;
        self.rejections = rejections;
        changed
    }
}

fn read_file(state: &mut FileState, file: &str, text: &Arc<str>, scan: u64) {
    let hash: [u8; 32] = Sha256::digest(text.as_bytes()).into();
    if state.hash == hash {
        return;
    }
    state.hash = hash;
    let before = std::mem::take(&mut state.held);
    let mut rejected = Vec::new();
    let mut broken: BTreeSet<ObjectId> = BTreeSet::new();
    // A document too broken to say which object it is may be any of those that are missing now.
    let mut unknown_broken = false;
    let parsed = parse_file(text);
    state.ignored = parsed.ignored.len();
    if let Some(first) = parsed.ignored.first() {
        tracing::warn!(
            file,
            documents = state.ignored,
            first,
            "NOT read, though it looks as if it was meant to be: the mesh's policies are {}",
            mesh_api::API_VERSION
        );
    }
    for document in parsed.documents {
        let mut reject = |object: Option<ObjectId>, reason, message| {
            let last_good_in_force = object.as_ref().map_or(!before.is_empty(), |id| before.contains_key(id));
            rejected.push(Rejection {
                file: file.to_owned(),
                document: document.number,
                object,
                reason,
                message,
                last_good_in_force,
            });
        };
        match document.content {
            Ok((id, object)) => {
                if let Some(first) = state.held.get(&id) {
                    let message = format!(
                        "{id} is defined in document {} already; remove one of them",
                        first.form.document
                    );
                    reject(Some(id), Reason::Conflict, message);
                    continue;
                }
                let since = before.get(&id).map_or(scan, |held| held.since);
                state.held.insert(
                    id,
                    Held {
                        form: Form {
                            object: Arc::new(object),
                            text: Arc::clone(text),
                            document: document.number,
                        },
                        since,
                    },
                );
            }
            Err(error) => {
                match &error.id {
                    Some(id) => {
                        broken.insert(id.clone());
                    }
                    None => unknown_broken = true,
                }
                reject(error.id, error.reason, error.message);
            }
        }
    }
    for (id, held) in before {
        if unknown_broken || broken.contains(&id) {
            state.held.entry(id).or_insert(held);
        }
    }
    state.rejected = rejected;
}
