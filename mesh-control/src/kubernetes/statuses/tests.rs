use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use tokio::time::Instant;

use super::super::world::Written;
use super::*;
use crate::enforcement::share::Group;
use crate::objects::{Node, Object};

fn policy(name: &str) -> ObjectId {
    ObjectId {
        kind: Kind::AuthorizationPolicy,
        namespace: "shop".to_owned(),
        name: name.to_owned(),
    }
}

fn form(text: &str) -> Form {
    ShortHash::of(&[text.as_bytes()])
}

fn mark(name: &str, generation: i64) -> Mark {
    Mark {
        id: policy(name),
        written: Written {
            generation,
            resource_version: "1".to_owned(),
            status: None,
        },
        refused: None,
    }
}

fn world(nodes: &[&str]) -> World {
    let node = |name: &&str| {
        let id = ObjectId {
            kind: Kind::Node,
            namespace: String::new(),
            name: (*name).to_owned(),
        };
        (id, Arc::new(Object::Node(Node::default())))
    };
    nodes.iter().map(node).collect()
}

/// Nodes that enforce and reject these forms.
fn share(nodes: &[&str], enforces: &[&str], rejects: &[&str]) -> Share {
    let forms = |texts: &[&str]| texts.iter().map(|text| form(text)).collect::<BTreeSet<_>>();
    let group = Group {
        nodes: nodes.iter().map(|name| node_key(name)).collect(),
        enforces: forms(enforces),
        rejects: forms(rejects),
    };
    Share::of(forms(enforces), std::iter::once(group)).0
}

fn at(second: i64) -> Time {
    Time(Timestamp::from_second(second).expect("a second"))
}

#[test]
fn a_node_counts_once_and_only_while_the_cluster_has_it() {
    let world = world(&["n1", "n2", "n3"]);
    // n1 has gone from one replica to the other; n9 is gone.
    let shares = [share(&["n1", "n9"], &["a"], &[]), share(&["n1", "n2"], &["a", "b"], &[])];
    let tally = Tally::new(&world, [form("a"), form("b")].into_iter(), shares.iter());
    assert_eq!(tally.of(form("a")), (2, vec![]));
    assert_eq!(tally.of(form("b")), (2, vec![]));
    assert_eq!(tally.of(form("c")), (0, vec![]));
}

#[test]
fn who_rejects_it_does_not_count_whatever_another_replica_heard_before() {
    let world = world(&["n1", "n2"]);
    let shares = [share(&["n1", "n2"], &["a"], &[]), share(&["n2"], &["b"], &["a"])];
    let tally = Tally::new(&world, [form("a")].into_iter(), shares.iter());
    assert_eq!(tally.of(form("a")), (1, vec!["n2"]));
}

#[test]
fn more_than_one_word_of_nodes_is_counted() {
    let names: Vec<String> = (0..200).map(|number| format!("n{number}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let world = world(&names);
    let shares = [share(&names[..150], &["a"], &[]), share(&names[100..], &["a"], &["b"])];
    let tally = Tally::new(&world, [form("a"), form("b")].into_iter(), shares.iter());
    assert_eq!(tally.of(form("a")).0, 200);
    assert_eq!(tally.of(form("b")).1.len(), 100);
}

/// With nodes n1 and n2, of which n1 enforces the forms named; each policy selects two workloads.
fn found(marks: &[Mark], enforced: &[&str], last: Option<&ObjectId>, now: i64) -> Vec<Change> {
    let world = world(&["n1", "n2"]);
    let forms = marks.iter().map(|mark| (mark.id.clone(), form(&mark.id.name))).collect();
    let selected = marks.iter().map(|mark| (mark.id.clone(), 2)).collect();
    let shares = [share(&["n1"], enforced, &[])];
    let tally = Tally::new(&world, marks.iter().map(|mark| form(&mark.id.name)), shares.iter());
    let found = Found {
        forms: &forms,
        selected: &selected,
        tally: &tally,
    };
    changes(marks, &found, last, &at(now))
}

#[test]
fn only_what_differs_is_written_and_only_for_what_stands_there() {
    let mut marks = [mark("a", 3)];
    let first = found(&marks, &["a"], None, 10);
    assert_eq!(first.len(), 1);
    assert!(first[0].is_urgent && first[0].resource_version == "1");
    let status = &first[0].status;
    assert_eq!(
        (status.observed_generation, status.workloads_selected, status.nodes_enforcing),
        (Some(3), Some(2), Some(1))
    );
    marks[0].written.status = Some(status.clone());
    assert_eq!(found(&marks, &["a"], None, 20), []);
    let count = found(&marks, &[], None, 20);
    assert!(!count[0].is_urgent && count[0].status.nodes_enforcing == Some(0));
    assert_eq!(count[0].status.conditions[0].last_transition_time, at(10));
    marks[0].written.generation = 4;
    assert!(found(&marks, &["a"], None, 20)[0].is_urgent);
    marks[0].refused = Some("spec.rules: no".to_owned());
    let refused = found(&marks, &["a"], None, 30);
    assert_eq!(refused[0].status.nodes_enforcing, None);
    assert_eq!(refused[0].status.conditions[0].message, "spec.rules: no");
}

#[test]
fn what_is_not_published_yet_is_not_said_to_be_in_force() {
    let (marks, forms, selected) = ([mark("a", 1)], BTreeMap::new(), BTreeMap::new());
    let world = world(&["n1"]);
    let tally = Tally::new(&world, std::iter::empty(), [].iter());
    let found = Found {
        forms: &forms,
        selected: &selected,
        tally: &tally,
    };
    assert_eq!(changes(&marks, &found, None, &at(1)), []);
}

#[test]
fn what_is_urgent_comes_first_and_none_waits_for_ever() {
    let mut marks = [mark("a", 1), mark("b", 1), mark("c", 1), mark("d", 1)];
    for change in found(&marks, &[], None, 1) {
        let mark = marks.iter_mut().find(|mark| mark.id == change.id).expect("it is there");
        mark.written.status = Some(change.status);
    }
    marks[3].written.generation = 2;
    let order = |last: Option<&str>| {
        let last = last.map(policy);
        let due = found(&marks, &["a", "b", "c", "d"], last.as_ref(), 2);
        due.into_iter().map(|change| change.id.name).collect::<Vec<_>>()
    };
    assert_eq!(order(None), ["d", "a", "b", "c"]);
    assert_eq!(order(Some("a")), ["d", "b", "c", "a"]);
    assert_eq!(order(Some("d")), ["d", "a", "b", "c"]);
}

#[test]
fn what_was_tried_waits_for_the_objects_next_version() {
    let mut marks = [mark("a", 1)];
    let change = found(&marks, &[], None, 1).remove(0);
    let (mut tried, now) = (Tried::default(), Instant::now());
    assert!(tried.may(&change, now));
    tried.wait_for_next(&change);
    assert!(!tried.may(&change, now + Duration::from_secs(999)));
    marks[0].written.resource_version = "2".to_owned();
    let next = found(&marks, &[], None, 1).remove(0);
    assert!(tried.may(&next, now));
    tried.wait_until(&next, now + Duration::from_secs(60));
    assert!(!tried.may(&next, now) && tried.may(&next, now + Duration::from_secs(60)));
    tried.keep(&[]);
    assert!(tried.may(&next, now), "it is forgotten with its object");
}
