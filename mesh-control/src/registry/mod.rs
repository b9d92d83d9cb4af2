//! What is in force, from the files of a folder. A broken document takes nothing out of force: its last good form stays, and a
//! contradiction is decided for what was there first.

mod enrolment;
mod folder;
mod follow;
mod last_good;
mod manifest;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use sha2::{Digest as _, Sha256};

pub use folder::{Folder, FolderError, Watch};
pub use follow::Follow;
pub use last_good::LastGood;
pub use manifest::Reason;
pub(crate) use manifest::is_name;

use crate::objects::{Claim, Object, ObjectId, World};
use manifest::parse_file;

#[cfg(test)]
mod tests;

/// A read of the folder: file name → its text, or why it cannot be read.
pub type Scan = BTreeMap<String, Result<Arc<str>, String>>;

/// Something that was not taken.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rejection {
    pub file: String,
    /// Counted from 1; 0 means the whole file.
    pub document: usize,
    pub object: Option<ObjectId>,
    pub reason: Reason,
    pub message: String,
    /// An earlier form of it is still in force.
    pub last_good_in_force: bool,
}

/// A good form of an object.
#[derive(Clone, Debug)]
struct Form {
    object: Arc<Object>,
    /// The whole file that it was read from.
    text: Arc<str>,
    document: usize,
}

/// The last good form of an object in a file.
#[derive(Clone, Debug)]
struct Held {
    form: Form,
    /// Number of the scan in which this file first had this object: who was there first.
    since: u64,
}

#[derive(Clone, Default)]
struct FileState {
    hash: [u8; 32],
    held: BTreeMap<ObjectId, Held>,
    rejected: Vec<Rejection>,
    ignored: usize,
}

/// What is in force of an object, and from where.
#[derive(Clone)]
struct InForce {
    form: Form,
    file: String,
    since: u64,
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
        let in_force = self.decide(&mut rejections);
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

    /// Of several forms of one object the oldest wins, and of several objects with one address or uid likewise.
    fn decide(&self, rejections: &mut Vec<Rejection>) -> BTreeMap<ObjectId, InForce> {
        let mut claims: BTreeMap<&ObjectId, Vec<(u64, &str, &Held)>> = BTreeMap::new();
        for (file, state) in &self.files {
            for (id, held) in &state.held {
                claims.entry(id).or_default().push((held.since, file, held));
            }
        }
        let mut candidates = Vec::with_capacity(claims.len());
        for (id, mut of_object) in claims {
            // What is in force keeps its place; then age; then the file's name.
            let current = self.in_force.get(id).map(|held| held.file.as_str());
            of_object.sort_by_key(|(since, file, _)| (Some(*file) != current, *since, *file));
            let (since, file, held) = of_object[0];
            for (_, other, loser) in &of_object[1..] {
                rejections.push(Rejection {
                    file: (*other).to_owned(),
                    document: loser.form.document,
                    object: Some(id.clone()),
                    reason: Reason::Conflict,
                    message: format!("{id} is defined in {file} already; remove one of them"),
                    last_good_in_force: false,
                });
            }
            let unchanged = self
                .in_force
                .get(id)
                .is_some_and(|before| before.form.object == held.form.object);
            candidates.push((!unchanged, !self.in_force.contains_key(id), since, file, held, id));
        }
        // First what is in force unchanged (it cannot contradict itself), then changed objects, then new ones by age.
        candidates.sort_by_key(|(changed, new, since, file, held, _)| (*changed, *new, *since, *file, held.form.document));
        // Who has had a thing and still claims it keeps it, also when it changes in the same moment as another one that wants it.
        let mut owners: HashMap<Claim<'_>, &ObjectId> = HashMap::new();
        for (_, _, _, _, held, id) in &candidates {
            if let Some(before) = self.in_force.get(*id) {
                let wanted: Vec<Claim<'_>> = held.form.object.claims().collect();
                let kept = before.form.object.claims().filter(|claim| wanted.contains(claim));
                owners.extend(kept.map(|claim| (claim, *id)));
            }
        }
        let mut in_force = BTreeMap::new();
        for (_, _, since, file, held, id) in candidates {
            let taken = |object: &Object, owners: &HashMap<Claim<'_>, &ObjectId>| {
                object.claims().find_map(|claim| {
                    let owner = owners.get(&claim).filter(|owner| **owner != id)?;
                    Some(match claim {
                        Claim::Address(ip) => format!("{} {ip} belongs to {owner} already", address_field(object)),
                        Claim::Uid(uid) => format!("metadata.uid: {uid} belongs to {owner} already"),
                    })
                })
            };
            let mut form = &held.form;
            if let Some(message) = taken(&form.object, &owners) {
                let last = self
                    .in_force
                    .get(id)
                    .filter(|before| taken(&before.form.object, &owners).is_none());
                rejections.push(Rejection {
                    file: file.to_owned(),
                    document: held.form.document,
                    object: Some(id.clone()),
                    reason: Reason::Conflict,
                    message,
                    last_good_in_force: last.is_some(),
                });
                let Some(last) = last else { continue };
                form = &last.form;
            }
            owners.extend(form.object.claims().map(|claim| (claim, id)));
            in_force.insert(
                id.clone(),
                InForce {
                    form: form.clone(),
                    file: file.to_owned(),
                    since,
                },
            );
        }
        in_force
    }
}

fn world_of(in_force: &BTreeMap<ObjectId, InForce>) -> Arc<World> {
    let object = |(id, held): (&ObjectId, &InForce)| (id.clone(), Arc::clone(&held.form.object));
    Arc::new(in_force.iter().map(object).collect())
}

fn address_field(object: &Object) -> &'static str {
    match object {
        Object::Service(_) => "spec.clusterIPs:",
        _ => "status.podIPs:",
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
