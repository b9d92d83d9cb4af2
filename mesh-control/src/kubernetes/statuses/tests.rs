use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;

use super::super::world::Written;
use super::*;
use crate::compile::forms::Forms;
use crate::enforcement::share::Group;
use crate::objects::Kind;

fn policy(name: &str) -> ObjectId {
    let (namespace, name) = name.split_once('/').unwrap_or(("shop", name));
    ObjectId {
        kind: Kind::AuthorizationPolicy,
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    }
}

fn form(text: &str) -> Form {
    ShortHash::of(&[text.as_bytes()])
}

fn mark(name: &str, generation: i64) -> Mark {
    Mark {
        id: policy(name),
        written: Arc::new(Written {
            generation,
            resource_version: "1".to_owned(),
            status: None,
        }),
        refused: None,
    }
}

fn written(mark: &mut Mark) -> &mut Written {
    Arc::make_mut(&mut mark.written)
}

fn names(nodes: &[&str]) -> Vec<String> {
    nodes.iter().map(|name| (*name).to_owned()).collect()
}

/// Nodes that enforce and reject these forms.
fn share(nodes: &[&str], enforces: &[&str], rejects: &[&str]) -> Share {
    let forms = |texts: &[&str]| texts.iter().map(|text| form(text)).collect::<BTreeSet<_>>();
    let group = Group {
        nodes: nodes.iter().map(|name| node_key(name)).collect(),
        enforces: forms(enforces),
        rejects: forms(rejects),
    };
    let of = forms(enforces).union(&forms(rejects)).copied().collect();
    Share::of(of, std::iter::once(group)).0
}

fn at(second: i64) -> Time {
    Time(Timestamp::from_second(second).expect("a second"))
}

#[test]
fn a_node_counts_once_and_only_while_the_cluster_has_it() {
    let nodes = names(&["n1", "n2", "n3"]);
    // n1 has gone from one replica to the other; n9 is gone.
    let shares = [share(&["n1", "n9"], &["a"], &[]), share(&["n1", "n2"], &["a", "b"], &[])];
    let tally = Tally::new(&nodes, ["a", "b", "c"].into_iter().map(form), shares.iter());
    assert_eq!(tally.of(form("a")), (Some(2), vec![]));
    assert_eq!(tally.of(form("b")), (Some(2), vec![]));
    assert_eq!(tally.of(form("c")), (None, vec![]), "nobody tells of it");
}

#[test]
fn who_rejects_it_does_not_count_whatever_another_replica_heard_before() {
    let nodes = names(&["n1", "n2"]);
    let shares = [share(&["n1", "n2"], &["a"], &[]), share(&["n2"], &["b"], &["a"])];
    let tally = Tally::new(&nodes, std::iter::once(form("a")), shares.iter());
    assert_eq!(tally.of(form("a")), (Some(1), vec!["n2"]));
}

#[test]
fn more_than_one_word_of_nodes_is_counted() {
    let nodes: Vec<String> = (0..200).map(|number| format!("n{number}")).collect();
    let all: Vec<&str> = nodes.iter().map(String::as_str).collect();
    let shares = [share(&all[..150], &["a"], &[]), share(&all[100..], &["a"], &["b"])];
    let tally = Tally::new(&nodes, ["a", "b"].into_iter().map(form), shares.iter());
    assert_eq!(tally.of(form("a")).0, Some(200));
    assert_eq!(tally.of(form("b")).1, all[100..]);
}

/// A state with all of these in force, each for two workloads, in a cluster of nodes n1 and n2.
fn snapshot(marks: &[Mark]) -> Snapshot {
    let mut forms = Forms::default();
    for mark in marks {
        forms.insert(mark.id.clone(), form(&mark.id.name), false);
    }
    Snapshot {
        forms: Arc::new(forms),
        selected: marks.iter().map(|mark| (mark.id.clone(), 2)).collect(),
        nodes: names(&["n1", "n2"]),
        ..Snapshot::default()
    }
}

/// Where n1 enforces the forms named, and nobody the others, of which a node that is gone is told.
fn found(marks: &[Mark], enforced: &[&str], now: i64) -> Vec<Change> {
    let snapshot = snapshot(marks);
    let others: Vec<&str> = marks.iter().map(|mark| mark.id.name.as_str()).collect();
    let silent: Vec<&str> = others.into_iter().filter(|name| !enforced.contains(name)).collect();
    let shares = [share(&["n1"], enforced, &[]), share(&["gone"], &silent, &[])];
    let tally = Tally::new(&snapshot.nodes, snapshot.forms.iter().map(|(_, form)| form), shares.iter());
    changes(marks, &snapshot, Some(&tally), &at(now))
}

#[test]
fn only_what_differs_is_written_and_only_for_what_stands_there() {
    let mut marks = [mark("a", 3)];
    let first = found(&marks, &["a"], 10);
    assert_eq!(first.len(), 1);
    assert!(first[0].is_urgent && first[0].resource_version == "1");
    let status = &first[0].status;
    assert_eq!(
        (status.observed_generation, status.workloads_selected, status.nodes_enforcing),
        (Some(3), Some(2), Some(1))
    );
    written(&mut marks[0]).status = Some(status.clone());
    assert_eq!(found(&marks, &["a"], 20), []);
    let count = found(&marks, &[], 20);
    assert!(!count[0].is_urgent && count[0].status.nodes_enforcing == Some(0));
    assert_eq!(count[0].status.conditions[0].last_transition_time, at(10));
    written(&mut marks[0]).generation = 4;
    assert!(found(&marks, &["a"], 20)[0].is_urgent);
    marks[0].refused = Some("spec.rules: no".to_owned());
    let refused = found(&marks, &["a"], 30);
    assert_eq!(refused[0].status.nodes_enforcing, None);
    assert_eq!(refused[0].status.conditions[0].message, "spec.rules: no");
}

#[test]
fn what_agents_reject_is_not_urgent_since_they_may_say_so_all_the_time() {
    let mut marks = [mark("a", 1)];
    written(&mut marks[0]).status = Some(found(&marks, &["a"], 1).remove(0).status);
    let snapshot = snapshot(&marks);
    let shares = [share(&["n1"], &[], &["a"])];
    let tally = Tally::new(&snapshot.nodes, std::iter::once(form("a")), shares.iter());
    let rejected = changes(&marks, &snapshot, Some(&tally), &at(2));
    assert_eq!(rejected[0].status.conditions[0].reason, Reason::RejectedByNodes.as_str());
    assert!(!rejected[0].is_urgent);
}

#[test]
fn without_what_replicas_tell_no_count_is_changed_and_a_new_generation_has_none() {
    let mut marks = [mark("a", 1)];
    written(&mut marks[0]).status = Some(found(&marks, &["a"], 1).remove(0).status);
    let snapshot = snapshot(&marks);
    assert_eq!(changes(&marks, &snapshot, None, &at(2)), []);
    written(&mut marks[0]).generation = 2;
    let change = changes(&marks, &snapshot, None, &at(2)).remove(0);
    let counts = (change.status.workloads_selected, change.status.nodes_enforcing);
    assert_eq!((counts, change.status.observed_generation), ((Some(2), None), Some(2)));
}

#[test]
fn what_is_not_published_yet_is_not_said_to_be_in_force() {
    let (marks, state) = ([mark("a", 1)], Snapshot::default());
    let tally = Tally::new(&state.nodes, std::iter::empty(), [].iter());
    assert_eq!(changes(&marks, &state, Some(&tally), &at(1)), []);
}

/// What is to be written of them: of those without a status all of it, of the others a count.
fn due(marks: &[Mark]) -> Vec<Change> {
    found(marks, &[], 2)
}

/// That many policies of a namespace, whose counts differ, or that have no status at all.
fn many(namespace: &str, count: usize, is_new: bool) -> Vec<Mark> {
    let mut marks: Vec<Mark> = (0..count)
        .map(|number| mark(&format!("{namespace}/{number:03}"), 1))
        .collect();
    if !is_new {
        let names: Vec<String> = marks.iter().map(|mark| mark.id.name.clone()).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        for (change, place) in found(&marks, &names, 1).into_iter().zip(0..) {
            let mark: &mut Mark = &mut marks[place];
            written(mark).status = Some(change.status);
        }
    }
    marks
}

/// Takes them all, and tells of which namespace they were.
fn taken(turns: &mut Turns, due: Vec<Change>) -> Vec<(String, String)> {
    let next = turns.next(due);
    assert!(next.len() <= STATUS_WRITES);
    for change in &next {
        turns.took(change);
    }
    next.into_iter().map(|change| (change.id.namespace, change.id.name)).collect()
}

#[test]
fn namespaces_come_in_turn_however_much_one_of_them_has() {
    let marks = [many("big", 500, true), many("small", 2, true)].concat();
    let mut turns = Turns::default();
    let first = taken(&mut turns, due(&marks));
    assert_eq!(first.len(), STATUS_WRITES);
    assert_eq!(first.iter().filter(|(namespace, _)| namespace == "small").count(), 2);
}

#[test]
fn who_had_its_turn_comes_after_those_behind_it() {
    let marks: Vec<Mark> = (0..STATUS_WRITES + 5)
        .flat_map(|number| many(&format!("ns{number:03}"), 1, true))
        .collect();
    let mut turns = Turns::default();
    let first = taken(&mut turns, due(&marks));
    assert_eq!(first.first().map(|(namespace, _)| namespace.as_str()), Some("ns000"));
    // Whatever has become of those: all differ still.
    let second = taken(&mut turns, due(&marks));
    let expected = (STATUS_WRITES..STATUS_WRITES + 5).chain(0..STATUS_WRITES - 5);
    let expected: Vec<String> = expected.map(|number| format!("ns{number:03}")).collect();
    assert_eq!(
        second.into_iter().map(|(namespace, _)| namespace).collect::<Vec<_>>(),
        expected
    );
}

#[test]
fn counts_have_half_of_the_writes_whatever_is_urgent() {
    let marks = [many("new", 100, true), many("counts", 100, false)].concat();
    let next = taken(&mut Turns::default(), due(&marks));
    let of_counts = next.iter().filter(|(namespace, _)| namespace == "counts").count();
    assert_eq!((next.len(), of_counts), (STATUS_WRITES, STATUS_WRITES / 2));
    // Neither has to wait for the others' end.
    let first_calm = next.iter().position(|(namespace, _)| namespace == "counts");
    assert_eq!(first_calm, Some(1));
    let alone = taken(&mut Turns::default(), due(&many("counts", 100, false)));
    assert_eq!(alone.len(), STATUS_WRITES);
}

#[test]
fn what_was_tried_waits_for_the_objects_next_version() {
    let mut marks = [mark("a", 1)];
    let change = found(&marks, &[], 1).remove(0);
    let (mut tried, now) = (Tried::default(), Instant::now());
    assert!(tried.may(&change, now));
    tried.wait_for_next(&change, now);
    assert!(!tried.may(&change, now + Duration::from_secs(999)));
    written(&mut marks[0]).resource_version = "2".to_owned();
    let next = found(&marks, &[], 1).remove(0);
    assert!(tried.may(&next, now));
    tried.wait_until(&next, now, now + Duration::from_secs(60));
    assert!(!tried.may(&next, now) && tried.may(&next, now + Duration::from_secs(60)));
    tried.keep(&[]);
    assert!(tried.may(&next, now), "it is forgotten with its object");
}

#[test]
fn counts_of_an_object_are_written_so_many_times_in_a_window_and_the_rest_at_once() {
    let mut marks = many("shop", 1, false);
    let (mut tried, now) = (Tried::default(), Instant::now());
    let mut version = 1;
    let mut next = |marks: &mut [Mark]| {
        version += 1;
        written(&mut marks[0]).resource_version = version.to_string();
        found(marks, &[], 2).remove(0)
    };
    for _ in 0..STATUS_COUNT_WRITES {
        let change = next(&mut marks);
        assert!(!change.is_urgent && tried.may(&change, now));
        tried.wait_for_next(&change, now);
    }
    let change = next(&mut marks);
    assert!(!tried.may(&change, now) && tried.is_held_back(&change, now));
    let later = now + STATUS_COUNT_WINDOW;
    assert!(tried.may(&change, later) && !tried.is_held_back(&change, later));
    written(&mut marks[0]).generation = 2;
    assert!(tried.may(&next(&mut marks), now), "users' changes are answered at once");
}
