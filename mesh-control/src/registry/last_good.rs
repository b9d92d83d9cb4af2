//! What is in force although the folder alone would not say so: last good forms of what broke, and who was first where two
//! contradict. Kept in the state directory, so that a restart takes no policy out of force.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::decision::{Form, Held, InForce, world_of};
use super::manifest::parse_file;
use super::{FileState, Reason, Registry};
use crate::objects::ObjectId;
use crate::state_dir::{StateDir, StateError};

const FILE: &str = "last-good.json";

/// Everything in force, by the texts that it was read from. Another version reads it as well: fields are only added, each with a
/// meaning for where it is missing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastGood {
    scans: u64,
    texts: Vec<Text>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Text {
    file: String,
    text: String,
    /// What of it is in force, and since which scan.
    objects: Vec<(ObjectId, u64)>,
}

impl LastGood {
    #[cfg(test)]
    pub(super) fn texts_of(&self, file: &str) -> usize {
        self.texts.iter().filter(|text| text.file == file).count()
    }

    /// # Errors
    /// It cannot be read, or holds something else: what was in force is then not known.
    pub fn load(state: &StateDir, most_bytes: u64) -> Result<Option<Self>, StateError> {
        let Some(bytes) = state.read(FILE, most_bytes)? else {
            return Ok(None);
        };
        serde_json::from_slice(&bytes).map(Some).map_err(|error| {
            let path = state.path().join(FILE);
            StateError::content(
                &path,
                format!("{error}; it holds policies whose files in the registry are broken: mend those, then remove it"),
            )
        })
    }

    /// # Errors
    /// The disk's; more than `most_bytes`, which [`Self::load`] would refuse. What was kept before stays.
    pub fn save(this: Option<&Self>, state: &StateDir, most_bytes: u64) -> Result<(), StateError> {
        let Some(this) = this else {
            return state.remove(FILE);
        };
        let mut content = Bounded {
            bytes: Vec::new(),
            left: most_bytes,
        };
        serde_json::to_writer(&mut content, this).map_err(|error| {
            let path = state.path().join(FILE);
            if error.is_io() {
                StateError::TooLarge { path, most: most_bytes }
            } else {
                StateError::content(&path, error)
            }
        })?;
        state.write(FILE, &content.bytes)
    }
}

/// Takes so many bytes, and fails at the next.
struct Bounded {
    bytes: Vec<u8>,
    left: u64,
}

impl std::io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.left = self
            .left
            .checked_sub(bytes.len() as u64)
            .ok_or(std::io::ErrorKind::FileTooLarge)?;
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Registry {
    /// `None`: the folder says all.
    #[must_use]
    pub fn last_good(&self) -> Option<LastGood> {
        let unsaid = |rejection: &super::Rejection| rejection.last_good_in_force || rejection.reason == Reason::Conflict;
        if !self.rejections.iter().any(unsaid) {
            return None;
        }
        let mut texts: BTreeMap<(&str, *const u8), Text> = BTreeMap::new();
        for (id, in_force) in &self.in_force {
            // Documents of one read share their text.
            let text = texts
                .entry((&in_force.file, in_force.form.text.as_ptr()))
                .or_insert_with(|| Text {
                    file: in_force.file.clone(),
                    text: in_force.form.text.to_string(),
                    objects: Vec::new(),
                });
            text.objects.push((id.clone(), in_force.since));
        }
        let mut texts: Vec<Text> = texts.into_values().collect();
        texts.sort_by(|a, b| (&a.file, &a.text).cmp(&(&b.file, &b.text)));
        Some(LastGood {
            scans: self.scans,
            texts,
        })
    }

    /// As it was before a restart; the next [`Registry::apply`] goes on from there.
    #[must_use]
    pub fn restore(saved: LastGood) -> Self {
        let mut registry = Self {
            scans: saved.scans,
            ..Self::default()
        };
        for Text { file, text, objects } in saved.texts {
            let text: Arc<str> = Arc::from(text);
            let mut forms: BTreeMap<ObjectId, Form> = BTreeMap::new();
            for document in parse_file(&text).documents {
                if let Ok((id, object)) = document.content {
                    forms.entry(id).or_insert_with(|| Form {
                        object: Arc::new(object),
                        text: Arc::clone(&text),
                        document: document.number,
                    });
                }
            }
            let state: &mut FileState = registry.files.entry(file.clone()).or_default();
            for (id, since) in objects {
                // Missing: this version no longer takes what an earlier one took.
                let Some(form) = forms.remove(&id) else {
                    tracing::error!(%file, object = %id, "the last good form of it is none for this version");
                    continue;
                };
                let held = Held {
                    form: form.clone(),
                    since,
                };
                state.held.insert(id.clone(), held);
                let file = file.clone();
                registry.in_force.insert(id, InForce { form, file, since });
            }
        }
        registry.filled = !registry.in_force.is_empty();
        registry.world = world_of(&registry.in_force);
        registry
    }
}
