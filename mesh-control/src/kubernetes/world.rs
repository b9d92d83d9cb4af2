//! What lists and watches of the API server have told. Pure.
//!
//! A broken object keeps its last good form, and touches no other. What a list leaves out is gone once the list is complete, and not
//! before.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::limits::MAX_OBJECTS;
use crate::objects::{Kind, Object, ObjectId, World};
use crate::registry::Reason;
use crate::registry::convert::identify;
use crate::registry::decision::{Form, Held, InForce, Rejection, decide, world_of};

#[cfg(test)]
mod tests;

/// Stands in rejections where the folder's registry names a file.
pub const ORIGIN: &str = "kubernetes";

/// Of an object's metadata, what says which one it is.
#[derive(Clone, Debug, Default)]
pub struct Meta {
    pub name: String,
    /// `None`: a cluster-wide kind.
    pub namespace: Option<String>,
    pub uid: String,
    /// Unix seconds: who was there first. The same for every replica, and after a restart.
    pub created: u64,
    /// Of kinds that have a status of this project's.
    pub written: Option<Written>,
}

/// What stands in the API server of an object that gets a status.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Written {
    pub generation: i64,
    pub resource_version: String,
    /// `None`: there is none, or something else is in its place.
    pub status: Option<mesh_api::Status>,
}

/// An object that gets a status, and what is to be said of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Mark {
    pub id: ObjectId,
    pub written: Arc<Written>,
    /// Why this form of it is not in force.
    pub refused: Option<String>,
}

/// Everything that was told of an object.
#[derive(Debug)]
struct Source {
    uid: String,
    held: Option<Held>,
    rejected: Option<Rejection>,
    written: Option<Arc<Written>>,
    /// The last list that had it.
    list: u64,
}

pub struct ClusterWorld {
    sources: BTreeMap<ObjectId, Source>,
    kinds: BTreeMap<Kind, OfKind>,
    in_force: BTreeMap<ObjectId, InForce>,
    world: Arc<World>,
    rejections: Vec<Rejection>,
    /// Something was told since the last decision: most of what a cluster says of its objects is nothing to the mesh.
    is_undecided: bool,
    marks: Arc<Vec<Mark>>,
    /// Something was told of what gets a status.
    are_marks_old: bool,
    /// Objects from the API server have no text of their own to be kept.
    text: Arc<str>,
}

#[derive(Debug, Default)]
struct OfKind {
    count: usize,
    left_out: usize,
    lists: u64,
    is_complete: bool,
    problem: Option<String>,
}

impl Default for ClusterWorld {
    fn default() -> Self {
        Self {
            sources: BTreeMap::new(),
            kinds: Kind::ALL.into_iter().map(|kind| (kind, OfKind::default())).collect(),
            in_force: BTreeMap::new(),
            world: Arc::default(),
            rejections: Vec::new(),
            is_undecided: true,
            marks: Arc::default(),
            are_marks_old: false,
            text: Arc::from(""),
        }
    }
}

impl ClusterWorld {
    fn of(&mut self, kind: Kind) -> &mut OfKind {
        self.kinds.entry(kind).or_default()
    }

    /// A list begins.
    pub fn begin_list(&mut self, kind: Kind) {
        let of_kind = self.of(kind);
        of_kind.lists += 1;
        of_kind.left_out = 0;
    }

    /// The list was read to its end: what was not in it is gone.
    pub fn end_list(&mut self, kind: Kind) {
        let list = self.of(kind).lists;
        let gone: Vec<ObjectId> = self
            .sources
            .iter()
            .filter(|(id, source)| id.kind == kind && source.list != list)
            .map(|(id, _)| id.clone())
            .collect();
        for id in gone {
            self.forget(&id);
        }
        self.of(kind).is_complete = true;
    }

    /// The cluster does not have the kind at all.
    pub fn absent(&mut self, kind: Kind) {
        self.begin_list(kind);
        self.end_list(kind);
    }

    /// The object is there, in a form that stands or not.
    pub fn apply(&mut self, kind: Kind, meta: Meta, form: impl FnOnce(&ObjectId) -> Result<Object, String>) {
        let given = ObjectId {
            kind,
            namespace: meta.namespace.clone().unwrap_or_default(),
            name: meta.name.clone(),
        };
        let identified = identify(kind, meta.name, meta.namespace);
        let list = self.of(kind).lists;
        // Another object of that name: of the one before it nothing stays.
        if self.sources.get(&given).is_some_and(|before| before.uid != meta.uid) {
            self.forget(&given);
        }
        if !self.sources.contains_key(&given) {
            let of_kind = self.of(kind);
            if of_kind.count >= MAX_OBJECTS {
                of_kind.left_out += 1;
                return;
            }
            of_kind.count += 1;
            let source = Source {
                uid: meta.uid,
                held: None,
                rejected: None,
                written: None,
                list,
            };
            self.sources.insert(given.clone(), source);
        }
        let text = Arc::clone(&self.text);
        let Some(source) = self.sources.get_mut(&given) else { return };
        source.list = list;
        self.are_marks_old |= meta.written.is_some();
        source.written = meta.written.map(Arc::new);
        let problem = match identified {
            Ok(id) => form(&id).map_err(|message| (Reason::Field, message)),
            Err(rejected) => Err((rejected.reason, rejected.message)),
        };
        match problem {
            Ok(object) => {
                self.is_undecided |= source.rejected.take().is_some();
                let since = source.held.as_ref().map_or(meta.created, |held| held.since);
                if source.held.as_ref().is_some_and(|held| *held.form.object == object) {
                    return;
                }
                self.is_undecided = true;
                let form = Form {
                    object: Arc::new(object),
                    text,
                    document: 0,
                };
                source.held = Some(Held { form, since });
            }
            Err((reason, message)) => {
                let rejected = Some(Rejection {
                    file: ORIGIN.to_owned(),
                    document: 0,
                    object: Some(given),
                    reason,
                    message,
                    last_good_in_force: source.held.is_some(),
                });
                self.is_undecided |= source.rejected != rejected;
                source.rejected = rejected;
            }
        }
    }

    pub fn delete(&mut self, kind: Kind, meta: Meta) {
        let id = ObjectId {
            kind,
            namespace: meta.namespace.unwrap_or_default(),
            name: meta.name,
        };
        // A late word of one whose name another one has by now.
        if self.sources.get(&id).is_some_and(|source| source.uid == meta.uid) {
            self.forget(&id);
        }
    }

    fn forget(&mut self, id: &ObjectId) {
        if let Some(source) = self.sources.remove(id) {
            self.are_marks_old |= source.written.is_some();
            self.of(id.kind).count -= 1;
            self.is_undecided = true;
        }
        // Not as its last good form either, should another one of its name not stand.
        self.in_force.remove(id);
    }

    /// Objects of the kind were left out, and may have room by now.
    #[must_use]
    pub fn left_out(&self, kind: Kind) -> usize {
        self.kinds.get(&kind).map_or(0, |of_kind| of_kind.left_out)
    }

    pub fn set_problem(&mut self, kind: Kind, problem: Option<String>) {
        self.of(kind).problem = problem;
    }

    /// Why what the API server has now is not all in force.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        let mut by_text: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        let kinds = || self.kinds.iter().filter(|(kind, _)| !kind.is_advice());
        for (kind, of_kind) in kinds() {
            if let Some(problem) = &of_kind.problem {
                by_text.entry(problem).or_default().push(kind.as_str());
            }
        }
        let mut texts: Vec<String> = by_text
            .into_iter()
            .map(|(problem, kinds)| format!("API server: {} cannot be followed: {problem}", kinds.join(", ")))
            .collect();
        let left_out: Vec<&str> = kinds()
            .filter(|(_, of_kind)| of_kind.left_out > 0)
            .map(|(kind, _)| kind.as_str())
            .collect();
        if !left_out.is_empty() {
            texts.push(format!(
                "more than {MAX_OBJECTS} objects of {}: the others are left out",
                left_out.join(", ")
            ));
        }
        (!texts.is_empty()).then(|| texts.join("; "))
    }

    /// Kinds that were read to their end once.
    #[must_use]
    pub fn complete(&self) -> BTreeSet<Kind> {
        let complete = self.kinds.iter().filter(|(_, of_kind)| of_kind.is_complete);
        complete.map(|(kind, _)| *kind).collect()
    }

    /// Every kind was that anybody waits for.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        let mut kinds = self.kinds.iter();
        kinds.all(|(kind, of_kind)| of_kind.is_complete || kind.is_advice())
    }

    /// Decides what is in force now. True when that, or what is rejected, has changed.
    pub fn decide(&mut self) -> bool {
        if !self.is_undecided {
            return false;
        }
        let mut rejections: Vec<Rejection> = self.sources.values().filter_map(|source| source.rejected.clone()).collect();
        let held = self
            .sources
            .iter()
            .filter_map(|(id, source)| source.held.as_ref().map(|held| (ORIGIN, id, held)));
        self.in_force = decide(held, &self.in_force, &mut rejections);
        rejections.sort();
        let world = world_of(&self.in_force);
        let changed = world != self.world || rejections != self.rejections;
        if world != self.world {
            self.world = world;
        }
        self.rejections = rejections;
        // What was in force before counts in a decision: the next one may differ until nothing does.
        self.is_undecided = changed;
        changed
    }

    #[must_use]
    pub fn world(&self) -> Arc<World> {
        Arc::clone(&self.world)
    }

    /// Of what gets a status.
    pub fn marks(&mut self) -> Arc<Vec<Mark>> {
        if !std::mem::take(&mut self.are_marks_old) {
            return Arc::clone(&self.marks);
        }
        let marks = self.sources.iter().filter_map(|(id, source)| {
            let refused = source.rejected.as_ref().map(|rejected| {
                let last_good = if rejected.last_good_in_force {
                    " (What stood before stays in force where it was known.)"
                } else {
                    ""
                };
                format!("{}{last_good}", rejected.message)
            });
            Some(Mark {
                id: id.clone(),
                written: source.written.clone()?,
                refused,
            })
        });
        self.marks = Arc::new(marks.collect());
        Arc::clone(&self.marks)
    }

    #[must_use]
    pub fn rejections(&self) -> &[Rejection] {
        &self.rejections
    }
}
