use std::time::Duration;

use super::*;

const WHY: Problem = Problem::InboundNotCaptured;

fn pod() -> PodRef {
    PodRef {
        namespace: "shop".into(),
        name: "web".into(),
        uid: "u".into(),
    }
}

fn known(capture: Option<CaptureState>, problem: Option<&str>) -> Known {
    Known {
        capture,
        problem: problem.map(str::to_owned),
        is_ending: false,
        agent: None,
    }
}

fn proven() -> Known {
    known(Some(CaptureState::Proven), None)
}

fn unknown() -> Known {
    Known::default()
}

/// Of each node's agent.
fn heard(_: &str) -> bool {
    true
}

/// Reason and note of what is said on an agent's word.
fn hear(notices: &mut PodNotices, proof: Proof, problem: Problem, known: &Known, now: Instant) -> Option<Reason> {
    notices.hear(&pod(), proof, problem, known, now).map(|said| said.reason)
}

/// What the annotation is made to say at this time; `Some("")`: nothing.
fn written(notices: &mut PodNotices, now: Instant) -> Option<String> {
    notices
        .take_problem(now, heard)
        .ok()
        .map(|write| write.text.unwrap_or_default())
}

fn is_empty(notices: &PodNotices) -> bool {
    notices.pods.is_empty() && notices.due.is_empty() && notices.problems.is_empty() && notices.turns.is_empty()
}

#[test]
fn a_pod_that_is_well_from_its_start_is_told_nothing() {
    let (mut notices, now) = (PodNotices::default(), Instant::now());
    assert_eq!(hear(&mut notices, Proof::Pending, Problem::Other, &unknown(), now), None);
    assert_eq!(hear(&mut notices, Proof::Proven, Problem::Other, &unknown(), now), None);
    assert_eq!(notices.take_due(now + NOT_ENROLLED_AFTER, heard), []);
    assert_eq!(hear(&mut notices, Proof::Proven, Problem::Other, &proven(), now), None);
    assert!(is_empty(&notices));
}

#[test]
fn one_that_stays_unproven_is_told_once_with_the_last_reason_and_when_it_is_well() {
    let (mut notices, now) = (PodNotices::default(), Instant::now());
    for problem in [Problem::Other, WHY] {
        assert_eq!(hear(&mut notices, Proof::Pending, problem, &unknown(), now), None);
    }
    assert_eq!(written(&mut notices, now), None, "it may be nothing");
    let due = notices.due().expect("due");
    let said = notices.take_due(due, heard);
    assert_eq!((said.len(), said[0].reason), (1, Reason::NotEnrolled));
    assert!(said[0].note.contains(WHY.text()), "{said:?}");
    let text = written(&mut notices, due).expect("its annotation");
    assert_eq!(text, format!("not enrolled: {}", WHY.text()));
    let stands = known(None, Some(&text));
    // The same again and again.
    assert_eq!(hear(&mut notices, Proof::Pending, WHY, &stands, due), None);
    assert_eq!((written(&mut notices, due), notices.take_due(due, heard)), (None, vec![]));
    let said = hear(&mut notices, Proof::Pending, Problem::NoCertificate, &stands, due);
    assert_eq!(said, Some(Reason::NotEnrolled), "another reason");
    assert_eq!(
        hear(&mut notices, Proof::Proven, Problem::Other, &stands, due),
        Some(Reason::Protected)
    );
    // Until that has come back, it is not told again.
    assert_eq!(hear(&mut notices, Proof::Proven, Problem::Other, &stands, due), None);
    assert_eq!(written(&mut notices, due + PROBLEM_PACE), Some(String::new()));
    assert_eq!(hear(&mut notices, Proof::Proven, Problem::Other, &proven(), due), None);
    assert!(is_empty(&notices));
}

#[test]
fn while_its_node_has_a_new_agent_a_proven_pod_is_not_told_to_be_outside() {
    let (mut notices, now) = (PodNotices::default(), Instant::now());
    assert_eq!(hear(&mut notices, Proof::Pending, Problem::Other, &proven(), now), None);
    assert_eq!(
        notices.take_due(now + NOT_ENROLLED_AFTER * 2, heard),
        [],
        "an agent was started again"
    );
    assert_eq!(hear(&mut notices, Proof::Proven, Problem::Other, &proven(), now), None);
    assert!(is_empty(&notices));
    // One that has come to stay so is told.
    assert_eq!(hear(&mut notices, Proof::Pending, WHY, &proven(), now), None);
    assert_eq!(notices.take_due(now + NOT_PROVEN_AGAIN_AFTER, heard).len(), 1);
}

#[test]
fn what_was_well_in_between_has_begun_anew() {
    let (mut notices, now) = (PodNotices::default(), Instant::now());
    hear(&mut notices, Proof::Pending, WHY, &unknown(), now);
    hear(&mut notices, Proof::Proven, Problem::Other, &unknown(), now);
    hear(&mut notices, Proof::Pending, WHY, &unknown(), now + Duration::from_secs(1));
    assert_eq!(notices.take_due(now + NOT_ENROLLED_AFTER, heard), []);
    assert_eq!(
        notices
            .take_due(now + NOT_ENROLLED_AFTER + Duration::from_secs(1), heard)
            .len(),
        1
    );
}

#[test]
fn a_loss_is_told_at_once_and_once_whichever_replica_is_asked() {
    let (mut notices, now) = (PodNotices::default(), Instant::now());
    let lost = |notices: &mut PodNotices, known: &Known| hear(notices, Proof::Lost, WHY, known, now);
    assert_eq!(lost(&mut notices, &proven()), Some(Reason::ProtectionLost));
    assert_eq!(lost(&mut notices, &proven()), None);
    let text = written(&mut notices, now).expect("its annotation");
    assert_eq!(text, format!("lost: {}", WHY.text()));
    // Its agent is started again, and proves nothing yet.
    let stands = known(Some(CaptureState::Lost), Some(&text));
    assert_eq!(hear(&mut notices, Proof::Pending, WHY, &stands, now), None);
    assert_eq!(
        notices.take_due(now + NOT_PROVEN_AGAIN_AFTER, heard),
        [],
        "it is lost, which was told"
    );
    // The agent has gone to another replica.
    let mut other = PodNotices::default();
    assert_eq!(lost(&mut other, &stands), None);
    assert_eq!(written(&mut other, now), None, "it stands there already");
    let said = hear(&mut other, Proof::Proven, Problem::Other, &stands, now);
    assert_eq!(said, Some(Reason::Protected));
    assert_eq!(written(&mut other, now), Some(String::new()));
    // Until its proof is read, the older word there is none of it.
    let echo = known(Some(CaptureState::Lost), None);
    assert_eq!(hear(&mut other, Proof::Proven, Problem::Other, &echo, now), None);
    assert_eq!(hear(&mut other, Proof::Proven, Problem::Other, &echo, now), None);
    assert_eq!(hear(&mut other, Proof::Proven, Problem::Other, &proven(), now), None);
    assert!(is_empty(&other));
}

#[test]
fn the_normal_end_of_a_pod_is_no_loss() {
    let now = Instant::now();
    let ending = Known {
        is_ending: true,
        ..proven()
    };
    for (problem, known) in [(WHY, &ending), (Problem::Released, &proven())] {
        let mut notices = PodNotices::default();
        assert_eq!(hear(&mut notices, Proof::Lost, problem, known, now), None);
        assert_eq!(hear(&mut notices, Proof::Pending, problem, known, now), None);
        assert_eq!(notices.take_due(now + NOT_PROVEN_AGAIN_AFTER, heard), []);
        assert!(is_empty(&notices));
    }
    let mut notices = PodNotices::default();
    assert_eq!(notices.refused(&pod(), "a sidecar", &ending, now), None);
    assert!(is_empty(&notices));
    // One that was in trouble before it ended.
    hear(&mut notices, Proof::Pending, WHY, &unknown(), now);
    hear(&mut notices, Proof::Lost, Problem::Released, &unknown(), now);
    assert!(is_empty(&notices));
}

#[test]
fn who_cannot_be_a_member_is_told_once_and_no_longer_once_it_has_left() {
    let (mut notices, now) = (PodNotices::default(), Instant::now());
    let refused = |notices: &mut PodNotices, known: &Known| notices.refused(&pod(), "a sidecar", known, now).is_some();
    assert!(refused(&mut notices, &unknown()));
    assert!(!refused(&mut notices, &unknown()));
    assert_eq!(written(&mut notices, now), Some("refused: a sidecar".into()));
    let stands = known(None, Some("refused: a sidecar"));
    assert!(!refused(&mut PodNotices::default(), &stands), "another replica has told it");
    notices.outside(&pod(), &stands, now);
    assert_eq!(written(&mut notices, now + PROBLEM_PACE), Some(String::new()));
    notices.outside(&pod(), &unknown(), now);
    assert!(is_empty(&notices));
}

#[test]
fn an_annotation_is_written_at_its_pace_with_what_is_true_then() {
    let (mut notices, now) = (PodNotices::default(), Instant::now());
    hear(&mut notices, Proof::Lost, WHY, &proven(), now);
    assert!(written(&mut notices, now).is_some());
    let stands = known(None, Some("another text"));
    for problem in [Problem::NoProcess, Problem::NoAddress] {
        hear(&mut notices, Proof::Lost, problem, &stands, now);
    }
    let due = notices
        .take_problem(now, heard)
        .expect_err("it was written just now")
        .expect("when");
    assert_eq!(due, now + PROBLEM_PACE);
    let text = written(&mut notices, due);
    assert_eq!(text, Some(format!("lost: {}", Problem::NoAddress.text())));
}

#[test]
fn what_could_not_be_written_is_written_later_unless_it_is_not_true_any_more() {
    let (mut notices, now) = (PodNotices::default(), Instant::now());
    hear(&mut notices, Proof::Lost, WHY, &proven(), now);
    let write = notices.take_problem(now, heard).expect("its annotation");
    notices.again(write.clone(), now);
    assert_eq!(notices.take_problem(now, heard), Ok(write.clone()));
    hear(&mut notices, Proof::Proven, Problem::Other, &unknown(), now);
    let removed = written(&mut notices, now + PROBLEM_PACE);
    assert_eq!(removed, Some(String::new()), "what may be there unread is removed");
    notices.again(write.clone(), now);
    assert_eq!(written(&mut notices, now), None, "it is proven by now");
    notices.retain(|_| false, heard);
    notices.again(write, now);
    assert!(is_empty(&notices), "the Pod is gone");
}

#[test]
fn pods_that_find_no_room_are_counted() {
    let (mut notices, now) = (PodNotices::default(), Instant::now());
    let of = |namespace: usize, n: usize| PodRef {
        uid: format!("{namespace}-{n}"),
        namespace: namespace.to_string(),
        ..pod()
    };
    let hear = |notices: &mut PodNotices, pod: &PodRef| notices.hear(pod, Proof::Pending, WHY, &unknown(), now);
    for n in 0..MAX_PODS_IN_TROUBLE_OF_NAMESPACE + 2 {
        hear(&mut notices, &of(0, n));
    }
    assert_eq!(
        (notices.pods.len(), notices.left_out()),
        (MAX_PODS_IN_TROUBLE_OF_NAMESPACE, 2),
        "one namespace takes the others' room"
    );
    for namespace in 1..=MAX_PODS_IN_TROUBLE / MAX_PODS_IN_TROUBLE_OF_NAMESPACE {
        for n in 0..MAX_PODS_IN_TROUBLE_OF_NAMESPACE {
            hear(&mut notices, &of(namespace, n));
        }
    }
    let left_out = 2 + MAX_PODS_IN_TROUBLE_OF_NAMESPACE as u64;
    assert_eq!((notices.pods.len(), notices.left_out()), (MAX_PODS_IN_TROUBLE, left_out));
    assert_eq!(notices.due.len(), MAX_PODS_IN_TROUBLE);
    // Whoever goes makes room in his namespace.
    notices.hear(&of(0, 0), Proof::Pending, Problem::Released, &unknown(), now);
    hear(&mut notices, &of(0, MAX_PODS_IN_TROUBLE_OF_NAMESPACE));
    assert_eq!(notices.left_out(), left_out);
    notices.retain(|pod| pod.namespace != "0", heard);
    for n in 0..MAX_PODS_IN_TROUBLE_OF_NAMESPACE {
        hear(&mut notices, &of(17, n));
    }
    assert_eq!(notices.left_out(), left_out);
    assert_eq!(notices.of_namespace.values().sum::<usize>(), notices.pods.len());
}

#[test]
fn nothing_is_said_of_a_pod_that_finds_no_room_and_it_counts_once() {
    let (mut notices, now) = (PodNotices::default(), Instant::now());
    let of = |n: usize| PodRef {
        uid: n.to_string(),
        ..pod()
    };
    let look = |notices: &mut PodNotices, n: usize| notices.refused(&of(n), "a sidecar", &unknown(), now).is_some();
    for n in 0..MAX_PODS_IN_TROUBLE_OF_NAMESPACE {
        assert!(look(&mut notices, n));
    }
    let late = MAX_PODS_IN_TROUBLE_OF_NAMESPACE;
    for _ in 0..3 {
        assert!(!look(&mut notices, late), "said at every look");
        let lost = notices.hear(&of(late), Proof::Lost, WHY, &proven(), now);
        assert_eq!(lost, None, "said at every report");
        let was_lost = known(Some(CaptureState::Lost), None);
        let over = notices.hear(&of(late), Proof::Proven, Problem::Other, &was_lost, now);
        assert_eq!(over, None, "said at every report");
    }
    assert_eq!(notices.left_out(), 1);
    // Another one goes: what is wrong with it is said, and no memory of it is left.
    notices.retain(|pod| pod.uid != "0", heard);
    assert!(look(&mut notices, late));
    assert!(!look(&mut notices, late));
    assert!(notices.without_room.is_empty());
    // Whoever was left out and has gone is forgotten.
    for n in late + 1..late + 1 + 2 * MAX_PODS_LEFT_OUT {
        assert!(!look(&mut notices, n));
    }
    assert_eq!(notices.without_room.len(), MAX_PODS_LEFT_OUT);
    notices.retain(|_| false, heard);
    assert!(notices.without_room.is_empty() && is_empty(&notices));
}

#[test]
fn what_an_agent_has_said_is_told_only_while_it_is_heard() {
    let (mut notices, now) = (PodNotices::default(), Instant::now());
    let proven = Known {
        agent: Some("n".into()),
        ..proven()
    };
    let has_left = |node: &str| node != "n";
    // Started again, it says that nothing is proven yet, and then to another replica that all is, as it was before.
    assert_eq!(hear(&mut notices, Proof::Pending, WHY, &proven, now), None);
    let due = now + NOT_PROVEN_AGAIN_AFTER;
    assert_eq!(notices.take_due(due, has_left), [], "it is proven, as another replica knows");
    // Where it had only died, it says so again, and is told when that has lasted.
    hear(&mut notices, Proof::Pending, WHY, &proven, due);
    assert_eq!(notices.take_due(due, heard), [], "it has only just come back");
    // Neither what was told of it, nor that it was, outlives its leaving.
    let due = due + NOT_ENROLLED_AFTER;
    assert_eq!(notices.take_due(due, heard).len(), 1);
    assert_eq!(notices.take_problem(due, has_left), Err(None));
    notices.retain(|_| true, has_left);
    assert!(is_empty(&notices), "its next start would be told as trouble at once");
    // It comes back.
    hear(&mut notices, Proof::Lost, WHY, &proven, now);
    assert_eq!(notices.take_problem(now, has_left), Err(None));
    notices.retain(|_| true, has_left);
    assert_eq!(hear(&mut notices, Proof::Lost, WHY, &proven, now), None, "the loss was told");
    assert!(written(&mut notices, now).is_some());
    // What the objects say needs no agent.
    let mut notices = PodNotices::default();
    assert!(notices.refused(&pod(), "a sidecar", &unknown(), now).is_some());
    assert!(notices.take_problem(now, has_left).is_ok());
}
