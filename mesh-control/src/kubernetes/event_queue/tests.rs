use super::*;

fn pod(name: &str) -> Subject {
    Subject {
        api_version: "v1",
        kind: "Pod",
        namespace: "shop".into(),
        name: name.into(),
        uid: format!("uid-{name}"),
    }
}

fn say(queue: &mut EventQueue, subject: &Subject, note: &str, now: Instant) -> Result<(), Dropped> {
    queue.say(subject, Reason::ProtectionLost, note, now, SystemTime::UNIX_EPOCH)
}

#[test]
fn what_is_the_same_is_one_event_that_is_counted_up() {
    let now = Instant::now();
    let mut queue = EventQueue::new(now);
    say(&mut queue, &pod("web"), "why", now).expect("taken");
    // Before the first was written: one write.
    say(&mut queue, &pod("web"), "why", now).expect("taken");
    let first = queue.take(now).expect("due");
    assert_eq!((first.count, queue.take(now)), (2, None));
    say(&mut queue, &pod("web"), "why", now).expect("taken");
    let second = queue.take(now).expect("due");
    assert_eq!((&second.name, second.count), (&first.name, 3));
    say(&mut queue, &pod("web"), "another", now).expect("taken");
    let other = queue.take(now).expect("due");
    assert_ne!(other.name, first.name);
    assert_eq!(other.count, 1);
    // Another Pod of that name is somebody else.
    let anew = Subject {
        uid: "anew".into(),
        ..pod("web")
    };
    say(&mut queue, &anew, "why", now).expect("taken");
    assert_ne!(queue.take(now).expect("due").name, first.name);
}

#[test]
fn nobody_gets_many_and_what_is_not_written_is_counted_in_what_is() {
    let mut now = Instant::now();
    let mut queue = EventQueue::new(now);
    for n in 0..EVENTS_OF_SUBJECT_BURST {
        say(&mut queue, &pod("web"), &n.to_string(), now).expect("within the bound");
    }
    while queue.take(now).is_some() {}
    assert_eq!(say(&mut queue, &pod("web"), "0", now), Err(Dropped::SubjectLimit));
    say(&mut queue, &pod("other"), "0", now).expect("another one's bound is its own");
    now += EVENTS_OF_SUBJECT_INTERVAL;
    say(&mut queue, &pod("web"), "0", now).expect("one more after a while");
    let written: Vec<EventWrite> = std::iter::from_fn(|| queue.take(now)).collect();
    let of_web = written.iter().find(|write| write.subject.name == "web").expect("its Event");
    assert_eq!(of_web.count, 3, "the one that was not written is counted");
    assert_eq!(say(&mut queue, &pod("web"), "0", now), Err(Dropped::SubjectLimit));
}

#[test]
fn all_together_get_no_more_than_their_bound() {
    let mut now = Instant::now();
    let mut queue = EventQueue::new(now);
    let taken = |queue: &mut EventQueue, now| {
        let many = (0..2 * EVENTS_BURST).map(|n| say(queue, &pod(&n.to_string()), "why", now));
        many.filter(|said| *said == Ok(())).count()
    };
    assert_eq!(taken(&mut queue, now), EVENTS_BURST as usize);
    while queue.take(now).is_some() {}
    now += EVENTS_INTERVAL * 3;
    let said = say(&mut queue, &pod("a"), "why", now);
    assert_eq!(said, Ok(()));
    assert_eq!(say(&mut queue, &pod("b"), "why", now), Ok(()));
    assert_eq!(say(&mut queue, &pod("c"), "why", now), Ok(()));
    assert_eq!(say(&mut queue, &pod("d"), "why", now), Err(Dropped::TotalLimit));
}

#[test]
fn subjects_are_remembered_within_a_bound() {
    let mut now = Instant::now();
    let mut queue = EventQueue::new(now);
    for n in 0..MAX_EVENT_SUBJECTS {
        // Most find no allowance; they are remembered all the same.
        let said = say(&mut queue, &pod(&n.to_string()), "why", now);
        assert_ne!(said, Err(Dropped::NoRoom));
    }
    while queue.take(now).is_some() {}
    now += EVENTS_INTERVAL * EVENTS_BURST;
    assert_eq!(say(&mut queue, &pod("new"), "why", now), Err(Dropped::NoRoom));
    now += EVENT_SUBJECT_IDLE;
    assert_eq!(say(&mut queue, &pod("new"), "why", now), Ok(()));
}

#[test]
fn one_that_fails_is_tried_again_for_a_while() {
    let mut now = Instant::now();
    let mut queue = EventQueue::new(now);
    say(&mut queue, &pod("web"), "why", now).expect("taken");
    let mut write = queue.take(now).expect("due");
    for _ in 1..EVENT_ATTEMPTS {
        queue.again(write, now).expect("again");
        assert_eq!(queue.take(now), None, "not at once");
        now = queue.due().expect("later");
        write = queue.take(now).expect("due");
    }
    assert_eq!(queue.again(write, now), Err(Dropped::Failed));
    assert_eq!(queue.due(), None);
}

#[test]
fn names_are_names() {
    let long = Subject {
        name: "a".repeat(253),
        ..pod("")
    };
    let name = event_name(&long, Reason::Protected, "why");
    assert!(crate::registry::is_name(&name) && name.len() <= 253, "{name}");
    let dotted = Subject {
        name: format!("{}.{}", "a".repeat(235), "b".repeat(17)),
        ..pod("")
    };
    assert!(crate::registry::is_name(&event_name(&dotted, Reason::Protected, "why")));
    let mut queue = EventQueue::new(Instant::now());
    say(&mut queue, &pod("web"), &"ü".repeat(MAX_EVENT_NOTE_BYTES), Instant::now()).expect("taken");
    assert!(queue.take(Instant::now()).expect("due").note.len() <= MAX_EVENT_NOTE_BYTES);
}
