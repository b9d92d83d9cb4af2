//! What one replica tells the others of its agents, within the bounds of a Lease's annotation. Pure.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::compile::forms::{Form, ShortHash};
use crate::limits::{MAX_SHARED_BYTES, MAX_SHARED_FORMS};

/// Nodes that enforce the same.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Group {
    pub nodes: Vec<ShortHash>,
    pub enforces: BTreeSet<Form>,
    pub rejects: BTreeSet<Form>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// Of these it tells.
    pub forms: BTreeSet<Form>,
    pub groups: Vec<Group>,
    /// As it is written.
    text: String,
}

/// On the wire: as short as it can be, since every node is in it.
#[derive(Serialize, Deserialize)]
struct Text {
    /// Hashes, one behind the other.
    forms: String,
    groups: Vec<GroupText>,
}

#[derive(Serialize, Deserialize)]
struct GroupText {
    nodes: String,
    /// Which of the forms are not enforced, by their places.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    lacks: Vec<usize>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    rejects: Vec<usize>,
}

impl Share {
    /// With how many nodes are left out: large groups come first, and what finds no room in [`MAX_SHARED_BYTES`] is not told, so that
    /// it counts nowhere as enforcing.
    pub fn of(mut forms: BTreeSet<Form>, groups: impl Iterator<Item = Group>) -> (Self, usize) {
        if let Some(first_beyond) = forms.iter().nth(MAX_SHARED_FORMS).copied() {
            forms.split_off(&first_beyond);
        }
        let mut groups: Vec<Group> = groups
            .filter(|group| !group.enforces.is_empty() || !group.rejects.is_empty())
            .collect();
        groups.sort_by_key(|group| std::cmp::Reverse(group.nodes.len()));
        let places: BTreeMap<Form, usize> = forms.iter().enumerate().map(|(place, form)| (*form, place)).collect();
        let mut room = MAX_SHARED_BYTES.saturating_sub(forms.len() * ShortHash::DIGITS + ENVELOPE_BYTES);
        let mut left_out = 0;
        let mut told = Vec::new();
        let mut texts = Vec::new();
        for mut group in groups {
            group.nodes.sort_unstable();
            let lacks: Vec<usize> = places
                .iter()
                .filter(|(form, _)| !group.enforces.contains(form))
                .map(|(_, place)| *place)
                .collect();
            let rejects: Vec<usize> = group.rejects.iter().filter_map(|form| places.get(form).copied()).collect();
            let bytes = group.nodes.len() * ShortHash::DIGITS + (lacks.len() + rejects.len()) * PLACE_BYTES + ENVELOPE_BYTES;
            let Some(rest) = room.checked_sub(bytes) else {
                left_out += group.nodes.len();
                continue;
            };
            room = rest;
            texts.push(GroupText {
                nodes: joined(group.nodes.iter()),
                lacks,
                rejects,
            });
            told.push(group);
        }
        let text = Text {
            forms: joined(forms.iter()),
            groups: texts,
        };
        let text = serde_json::to_string(&text).unwrap_or_default();
        let share = Self {
            forms,
            groups: told,
            text,
        };
        (share, left_out)
    }

    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// `None`: it is no share.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let parsed: Text = serde_json::from_str(text).ok()?;
        let forms = split(&parsed.forms)?;
        let mut groups = Vec::with_capacity(parsed.groups.len());
        for group in parsed.groups {
            let lacks: BTreeSet<usize> = group.lacks.into_iter().collect();
            let enforced = forms.iter().enumerate().filter(|(place, _)| !lacks.contains(place));
            groups.push(Group {
                nodes: split(&group.nodes)?,
                enforces: enforced.map(|(_, form)| *form).collect(),
                rejects: group.rejects.iter().filter_map(|place| forms.get(*place).copied()).collect(),
            });
        }
        Some(Self {
            forms: forms.into_iter().collect(),
            groups,
            text: text.to_owned(),
        })
    }
}

/// Around the forms, and around each group.
const ENVELOPE_BYTES: usize = 64;
/// A place with its comma: at most 4 digits.
const PLACE_BYTES: usize = 5;
const _: () = assert!(MAX_SHARED_FORMS <= 10_000, "places have 4 digits");

fn joined<'a>(hashes: impl Iterator<Item = &'a ShortHash>) -> String {
    hashes.map(ToString::to_string).collect()
}

fn split(text: &str) -> Option<Vec<ShortHash>> {
    let bytes = text.as_bytes().chunks(ShortHash::DIGITS);
    bytes.map(|digits| std::str::from_utf8(digits).ok()?.parse().ok()).collect()
}
