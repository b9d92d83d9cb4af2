use std::time::Duration;

use super::*;

const NOW: SystemTime = SystemTime::UNIX_EPOCH;

fn queue() -> EventQueue {
    EventQueue::new("one".into())
}

fn lost(namespace: &str, pod: &str, note: &str) -> Telling {
    Telling {
        subject: Subject {
            api_version: "v1",
            kind: "Pod",
            namespace: namespace.to_owned(),
            name: pod.to_owned(),
            uid: format!("uid-{pod}"),
        },
        reason: Reason::ProtectionLost,
        note: note.to_owned(),
        generation: None,
    }
}

fn said(queue: &mut EventQueue, telling: Telling, now: Instant) -> Option<Dropped> {
    queue.say(telling, now, NOW).err()
}

/// Says something in another namespace so often that it has nothing to say any longer.
fn flood(queue: &mut EventQueue, namespace: &str, now: Instant) -> Vec<Dropped> {
    let pods = (0..1000).map(|n| lost(namespace, &format!("pod-{n}"), "why"));
    pods.filter_map(|telling| said(queue, telling, now)).collect()
}

#[test]
fn what_is_the_same_is_one_event_that_is_counted() {
    let (mut queue, now) = (queue(), Instant::now());
    for _ in 0..3 {
        assert_eq!(said(&mut queue, lost("shop", "web", "why"), now), None);
    }
    let first = queue.take().expect("an Event");
    assert_eq!((first.count, queue.take()), (3, None));
    assert_eq!(said(&mut queue, lost("shop", "web", "why"), now), None);
    assert_eq!(said(&mut queue, lost("shop", "web", "another"), now), None);
    let (again, other) = (queue.take().expect("again"), queue.take().expect("another"));
    assert_eq!((&again.name, again.count), (&first.name, 4));
    assert_ne!(other.name, first.name);
    assert_eq!(other.count, 1);
}

#[test]
fn what_every_replica_sees_has_one_name_and_what_has_happened_is_its_own() {
    let (mut one, mut other, now) = (queue(), EventQueue::new("other".into()), Instant::now());
    let mut names = |generation: Option<i64>| {
        let telling = Telling {
            generation,
            ..lost("shop", "web", "why")
        };
        [&mut one, &mut other].map(|queue| {
            assert_eq!(said(queue, telling.clone(), now), None);
            queue.take().expect("an Event").name
        })
    };
    let [first, second] = names(Some(1));
    assert_eq!(first, second);
    assert_ne!(names(Some(2))[0], first, "a changed object is told anew");
    let [first, second] = names(None);
    assert_ne!(first, second);
    // Nor has it been more often because it could not be told at first.
    let fact = |pod: &str| Telling {
        generation: Some(1),
        ..lost("noisy", pod, "why")
    };
    flood(&mut one, "noisy", now);
    while one.take().is_some() {}
    assert_eq!(said(&mut one, fact("late"), now), Some(Dropped::NamespaceLimit));
    assert_eq!(said(&mut one, fact("late"), now + EVENTS_OF_NAMESPACE_INTERVAL), None);
    assert_eq!(one.take().map(|write| write.count), Some(1));
}

#[test]
fn nobody_gets_many_and_what_is_not_told_is_counted_in_the_next() {
    let (mut queue, now) = (queue(), Instant::now());
    let mut refused = 0;
    let mut say = |queue: &mut EventQueue, now: Instant| {
        let dropped = said(queue, lost("shop", "web", "why"), now);
        let write = queue.take();
        assert_eq!(dropped.is_none(), write.is_some());
        assert!(matches!(dropped, None | Some(Dropped::SubjectLimit)), "{dropped:?}");
        refused += u32::from(dropped.is_some());
        write
    };
    for _ in 0..EVENTS_OF_SUBJECT_BURST + 5 {
        say(&mut queue, now);
    }
    let next = say(&mut queue, now + EVENTS_OF_SUBJECT_INTERVAL).expect("an Event");
    assert_eq!(refused, 5);
    assert_eq!(next.count, i32::try_from(EVENTS_OF_SUBJECT_BURST + 6).expect("small"));
}

#[test]
fn one_namespace_never_keeps_another_from_being_told() {
    let (mut queue, now) = (queue(), Instant::now());
    let dropped = flood(&mut queue, "noisy", now);
    assert_eq!(dropped.len(), 1000 - MAX_EVENTS_WAITING_OF_NAMESPACE);
    assert_eq!(said(&mut queue, lost("quiet", "web", "why"), now), None);
    let turns: Vec<String> = (0..2)
        .map(|_| queue.take().expect("an Event").telling.subject.namespace)
        .collect();
    assert_eq!(turns, ["noisy", "quiet"], "it waits behind all of another namespace");
    // Nor in the long run, however much is said.
    while queue.take().is_some() {}
    let dropped = flood(&mut queue, "noisy", now + EVENTS_OF_NAMESPACE_INTERVAL);
    assert_eq!(
        dropped.iter().filter(|dropped| **dropped == Dropped::NamespaceLimit).count(),
        999
    );
    assert_eq!(said(&mut queue, lost("quiet", "web", "more"), now), None);
}

#[test]
fn whoever_has_the_namespace_where_they_are_does_not_keep_events_of_nodes_from_being_told() {
    let (mut queue, now) = (queue(), Instant::now());
    assert!(!flood(&mut queue, NAMESPACE_OF_THE_REST, now).is_empty());
    let of_node = || {
        let mut telling = lost("", "node", "why");
        telling.subject.kind = "Node";
        telling
    };
    assert_eq!(said(&mut queue, of_node(), now), None);
    let turns: Vec<EventWrite> = (0..2).map(|_| queue.take().expect("an Event")).collect();
    let kinds: Vec<&str> = turns.iter().map(|write| write.telling.subject.kind).collect();
    assert_eq!(kinds, ["Pod", "Node"], "it waits behind all of a namespace");
    // Nor is what could not be written dropped for want of that namespace's room.
    flood(&mut queue, NAMESPACE_OF_THE_REST, now + EVENTS_OF_NAMESPACE_INTERVAL);
    assert_eq!(queue.again(turns[1].clone(), now), Ok(()));
}

#[test]
fn what_is_remembered_has_bounds_and_what_waits_is_never_forgotten_for_others() {
    let (mut queue, now) = (queue(), Instant::now());
    for n in 0..MAX_EVENT_NAMESPACES {
        assert_eq!(said(&mut queue, lost(&format!("n{n}"), "web", "why"), now), None);
    }
    assert_eq!(said(&mut queue, lost("late", "web", "why"), now), Some(Dropped::NoRoom));
    // One of them has been told: there is room.
    let told = queue.take().expect("an Event").telling.subject.namespace;
    assert_eq!(said(&mut queue, lost("late", "web", "why"), now), None);
    assert_eq!(queue.namespaces.len(), MAX_EVENT_NAMESPACES);
    assert!(!queue.namespaces.contains_key(&told));
    assert!(!flood(&mut queue, "late", now).is_empty());
    assert_eq!(queue.namespaces["late"].subjects.len(), MAX_EVENT_SUBJECTS_OF_NAMESPACE);
    for n in 0..2 * MAX_EVENT_KINDS_OF_SUBJECT {
        assert!(said(&mut queue, lost("late", "web", &n.to_string()), now).is_some());
    }
    let of = &queue.namespaces["late"].subjects[&lost("late", "web", "").subject];
    assert_eq!(of.said.len(), MAX_EVENT_KINDS_OF_SUBJECT);
}

#[test]
fn what_could_not_be_written_is_tried_until_it_is_too_old() {
    let (mut queue, now) = (queue(), Instant::now());
    assert_eq!(said(&mut queue, lost("shop", "web", "why"), now), None);
    let write = queue.take().expect("an Event");
    let later = now + EVENT_LIFE - Duration::from_secs(1);
    assert_eq!(queue.again(write.clone(), later), Ok(()));
    assert_eq!(queue.take(), Some(write.clone()));
    assert_eq!(queue.again(write.clone(), now + EVENT_LIFE), Err(Dropped::TooOld));
    // A newer one has taken its place.
    assert_eq!(said(&mut queue, lost("shop", "web", "why"), now), None);
    assert_eq!(queue.again(write, now), Ok(()));
    assert_eq!(queue.take().map(|write| write.count), Some(2));
    assert_eq!(queue.take(), None);
}

#[test]
fn names_and_notes_are_what_kubernetes_takes() {
    let (mut queue, now) = (queue(), Instant::now());
    let long = format!("{}.-{}", "a".repeat(MAX_NAME_BYTES - 19), "b".repeat(15));
    let note = "ä".repeat(MAX_EVENT_NOTE_BYTES);
    assert_eq!(said(&mut queue, lost("shop", &long, &note), now), None);
    let write = queue.take().expect("an Event");
    assert!(
        write.name.len() <= MAX_NAME_BYTES && !write.name.contains("-."),
        "{}",
        write.name
    );
    assert!(write.telling.note.len() <= MAX_EVENT_NOTE_BYTES);
    let of_cluster = Subject {
        namespace: String::new(),
        ..lost("", "node", "").subject
    };
    assert_eq!(of_cluster.event_namespace(), "default");
}
