//! Which of the forms that objects have are in force. Pure, and the same for a folder and for the API server.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::Reason;
use crate::objects::{Claim, Object, ObjectId, World};

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
pub struct Form {
    pub object: Arc<Object>,
    /// The whole file that it was read from.
    pub text: Arc<str>,
    pub document: usize,
}

/// The last good form of an object in a file.
#[derive(Clone, Debug)]
pub struct Held {
    pub form: Form,
    /// Number of the scan in which this file first had this object: who was there first.
    pub since: u64,
}

/// What is in force of an object, and from where.
#[derive(Clone)]
pub struct InForce {
    pub form: Form,
    pub file: String,
    pub since: u64,
}

/// Of several forms of one object the oldest wins, and of several objects with one address or uid likewise. `held`: each with the file,
/// or the like, that has it; `before`: what is in force now.
pub fn decide<'a>(
    held: impl Iterator<Item = (&'a str, &'a ObjectId, &'a Held)>,
    before: &BTreeMap<ObjectId, InForce>,
    rejections: &mut Vec<Rejection>,
) -> BTreeMap<ObjectId, InForce> {
    let mut claims: BTreeMap<&ObjectId, Vec<(u64, &str, &Held)>> = BTreeMap::new();
    for (file, id, held) in held {
        claims.entry(id).or_default().push((held.since, file, held));
    }
    let mut candidates = Vec::with_capacity(claims.len());
    for (id, mut of_object) in claims {
        // What is in force keeps its place; then age; then the file's name.
        let current = before.get(id).map(|held| held.file.as_str());
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
        let unchanged = before.get(id).is_some_and(|before| before.form.object == held.form.object);
        let age = (!unchanged, !before.contains_key(id), since);
        candidates.push((yields(&held.form.object), age, file, held, id));
    }
    // First what is in force unchanged (it cannot contradict itself), then changed objects, then new ones by age.
    candidates.sort_by_key(|(yields, age, file, held, _)| (*yields, *age, *file, held.form.document));
    // Who has had a thing and still claims it keeps it, also when it changes in the same moment as another one that wants it.
    let mut owners: HashMap<Claim<'_>, &ObjectId> = HashMap::new();
    for (yields, _, _, held, id) in &candidates {
        if let Some(before) = before.get(*id) {
            let wanted: Vec<Claim<'_>> = held.form.object.claims().collect();
            let kept = before.form.object.claims().filter(|claim| wanted.contains(claim));
            let kept = kept.filter(|claim| !yields || matches!(claim, Claim::Uid(_)));
            owners.extend(kept.map(|claim| (claim, *id)));
        }
    }
    let mut in_force = BTreeMap::new();
    for (_, (_, _, since), file, held, id) in candidates {
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
            let last = before.get(id).filter(|before| taken(&before.form.object, &owners).is_none());
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

/// A Pod that terminates may have given its address back already, and its node may have given it to the next one.
fn yields(object: &Object) -> bool {
    matches!(object, Object::Pod(pod) if pod.terminating)
}

pub fn world_of(in_force: &BTreeMap<ObjectId, InForce>) -> Arc<World> {
    let object = |(id, held): (&ObjectId, &InForce)| (id.clone(), Arc::clone(&held.form.object));
    Arc::new(in_force.iter().map(object).collect())
}

fn address_field(object: &Object) -> &'static str {
    match object {
        Object::Service(_) => "spec.clusterIPs:",
        _ => "status.podIPs:",
    }
}
