//! What the control plane writes back: whether an object stands, why not, and where it is in force.

use std::fmt;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::schema;

/// The type of the condition that says whether an object is valid, so that nodes are told of it.
pub const ACCEPTED: &str = "Accepted";
/// Bytes of a condition's message; the definition refuses longer ones. What is beyond is cut off, with `…`.
const MAX_MESSAGE: usize = 32_768;
/// Nodes that a message names.
const MAX_NAMED: usize = 3;

/// What the control plane made of it.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// `Accepted`: whether it is valid, so that nodes are told of it, and if not, why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::conditions")]
    pub conditions: Vec<Condition>,
    /// The `metadata.generation` that all of this is said of. Lower than that: the control plane has not seen the last change yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::count")]
    pub observed_generation: Option<i64>,
    /// How many workloads of the mesh it is for. 0: it selects nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::count")]
    pub workloads_selected: Option<i64>,
    /// How many nodes enforce it as it stands. Nodes that it does not concern enforce it, too, once they have it. Absent: not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::count")]
    pub nodes_enforcing: Option<i64>,
}

/// Why nodes are told of an object, or are not: a condition's `reason`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Valid.
    Accepted,
    /// Valid, for no workload of the mesh: nothing has its labels, or nothing of its namespace is in the mesh.
    SelectsNothing,
    /// Valid, and there are nodes whose agents cannot use it; a policy that such an agent never had in a form it could use denies there.
    RejectedByNodes,
    /// A field cannot stand. What stood before stays in force where it was known.
    Invalid,
}

impl Reason {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "Accepted",
            Self::SelectsNothing => "SelectsNothing",
            Self::RejectedByNodes => "RejectedByNodes",
            Self::Invalid => "Invalid",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What was found of one generation of an object.
#[derive(Clone, Copy, Debug)]
pub enum Verdict<'a> {
    /// It is valid, for that many workloads, and in force on that many nodes, where that is known.
    InForce {
        workloads: usize,
        nodes: Option<usize>,
        /// Nodes that cannot use it.
        rejecting: &'a [&'a str],
    },
    /// It cannot stand, for this.
    Refused(&'a str),
}

impl Status {
    /// The status that follows the one that is written there: the time of a condition moves only when it changes, so that two
    /// replicas that find the same write the same. Conditions of other types stay as they are.
    #[must_use]
    pub fn next(written: Option<&Self>, generation: i64, verdict: Verdict<'_>, now: &Time) -> Self {
        let (reason, message, counts) = match verdict {
            Verdict::InForce {
                workloads,
                nodes,
                rejecting,
            } => {
                let (reason, message) = in_force(workloads, rejecting);
                (reason, message, Some((count(workloads), nodes.map(count))))
            }
            Verdict::Refused(why) => (Reason::Invalid, why.to_owned(), None),
        };
        let before = written.map(|status| status.conditions.as_slice()).unwrap_or_default();
        let status = if reason == Reason::Invalid { "False" } else { "True" };
        let same = before.iter().find(|old| old.type_ == ACCEPTED && old.status == status);
        let condition = Condition {
            type_: ACCEPTED.to_owned(),
            status: status.to_owned(),
            reason: reason.to_string(),
            message: cut(message),
            last_transition_time: same.map_or_else(|| now.clone(), |old| old.last_transition_time.clone()),
            observed_generation: Some(generation),
        };
        // Others may have written as many as there is room for.
        let others = before.iter().filter(|old| old.type_ != ACCEPTED).cloned();
        let others = others.take(schema::MAX_CONDITIONS - 1);
        Self {
            conditions: std::iter::once(condition).chain(others).collect(),
            observed_generation: Some(generation),
            workloads_selected: counts.map(|(workloads, _)| workloads),
            nodes_enforcing: counts.and_then(|(_, nodes)| nodes),
        }
    }
}

fn in_force(workloads: usize, rejecting: &[&str]) -> (Reason, String) {
    const NOTHING: &str = "It is valid and selects no workload of the mesh: no Pod of it has these labels here.";
    if rejecting.is_empty() {
        return if workloads == 0 {
            (Reason::SelectsNothing, NOTHING.to_owned())
        } else {
            (
                Reason::Accepted,
                "It is valid; nodesEnforcing says on how many nodes it is in force.".to_owned(),
            )
        };
    }
    let named = rejecting.iter().take(MAX_NAMED).copied().collect::<Vec<_>>().join(", ");
    let more = match rejecting.len().saturating_sub(MAX_NAMED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let nodes = match rejecting.len() {
        1 => "1 node cannot".to_owned(),
        many => format!("{many} nodes cannot"),
    };
    let rejection = format!(
        "{nodes} use it: {named}{more}. There what their agents had of it before stands, or it denies; their logs say why."
    );
    if workloads == 0 {
        (Reason::SelectsNothing, format!("{NOTHING} {rejection}"))
    } else {
        (Reason::RejectedByNodes, rejection)
    }
}

fn count(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn cut(mut message: String) -> String {
    if message.len() > MAX_MESSAGE {
        message.truncate(message.floor_char_boundary(MAX_MESSAGE - "…".len()));
        message.push('…');
    }
    message
}

#[cfg(test)]
mod tests {
    use k8s_openapi::jiff::Timestamp;

    use super::*;

    fn at(second: i64) -> Time {
        Time(Timestamp::from_second(second).expect("a second"))
    }

    #[test]
    fn a_condition_keeps_its_time_until_it_changes() {
        let in_force = |workloads| Verdict::InForce {
            workloads,
            nodes: Some(2),
            rejecting: &[],
        };
        let first = Status::next(None, 1, in_force(3), &at(10));
        assert_eq!(
            (first.observed_generation, first.workloads_selected, first.nodes_enforcing),
            (Some(1), Some(3), Some(2))
        );
        assert_eq!(
            (first.conditions[0].status.as_str(), first.conditions[0].reason.as_str()),
            ("True", "Accepted")
        );
        assert_eq!(Status::next(Some(&first), 1, in_force(3), &at(20)), first, "nothing to write");

        let nothing = Status::next(Some(&first), 2, in_force(0), &at(30));
        assert_eq!(nothing.conditions[0].reason, "SelectsNothing");
        assert_eq!(nothing.workloads_selected, Some(0));
        assert_eq!(nothing.conditions[0].last_transition_time, at(10), "it is accepted still");

        let why = format!("spec.rules: {}", "x".repeat(MAX_MESSAGE));
        let refused = Status::next(Some(&nothing), 3, Verdict::Refused(&why), &at(40));
        let condition = &refused.conditions[0];
        assert_eq!((condition.status.as_str(), condition.reason.as_str()), ("False", "Invalid"));
        assert_eq!(condition.last_transition_time, at(40));
        assert_eq!(condition.observed_generation, Some(3));
        assert!(condition.message.starts_with("spec.rules: x") && condition.message.ends_with('…'));
        assert_eq!(condition.message.len(), MAX_MESSAGE);
        assert_eq!((refused.workloads_selected, refused.nodes_enforcing), (None, None));
    }

    #[test]
    fn nodes_that_reject_it_are_named() {
        let verdict = |workloads, rejecting| Verdict::InForce {
            workloads,
            nodes: Some(7),
            rejecting,
        };
        let one = Status::next(None, 1, verdict(3, &["a"]), &at(1));
        assert_eq!(
            (one.conditions[0].status.as_str(), one.conditions[0].reason.as_str()),
            ("True", "RejectedByNodes")
        );
        let message = &one.conditions[0].message;
        assert!(message.contains("1 node cannot use it: a."), "{message}");
        let five = Status::next(Some(&one), 1, verdict(3, &["a", "b", "c", "d", "e"]), &at(9));
        let message = &five.conditions[0].message;
        assert!(message.contains("5 nodes cannot use it: a, b, c and 2 more."), "{message}");
        assert_eq!(five.conditions[0].last_transition_time, at(1));
        // A node that rejects it, or says so, hides nothing.
        let nothing = Status::next(Some(&one), 1, verdict(0, &["a"]), &at(9));
        assert_eq!(nothing.conditions[0].reason, "SelectsNothing");
        let message = &nothing.conditions[0].message;
        assert!(
            message.contains("selects no workload") && message.contains("1 node cannot"),
            "{message}"
        );
    }

    #[test]
    fn where_it_is_in_force_may_be_unknown() {
        let verdict = Verdict::InForce {
            workloads: 3,
            nodes: None,
            rejecting: &[],
        };
        let status = Status::next(None, 1, verdict, &at(1));
        assert_eq!((status.workloads_selected, status.nodes_enforcing), (Some(3), None));
    }

    #[test]
    fn conditions_of_others_stay() {
        let verdict = Verdict::InForce {
            workloads: 1,
            nodes: Some(1),
            rejecting: &[],
        };
        let mut written = Status::next(None, 1, verdict, &at(1));
        written.conditions[0].type_ = "Other".to_owned();
        let next = Status::next(Some(&written), 1, verdict, &at(2));
        let types: Vec<&str> = next.conditions.iter().map(|condition| condition.type_.as_str()).collect();
        assert_eq!(types, ["Accepted", "Other"]);
        // One of ours finds room whatever others have written.
        let other = written.conditions[0].clone();
        written.conditions = vec![other; schema::MAX_CONDITIONS];
        let next = Status::next(Some(&written), 1, verdict, &at(2));
        assert_eq!(next.conditions.len(), schema::MAX_CONDITIONS);
        assert_eq!(next.conditions[0].type_, "Accepted");
    }
}
