use super::*;

const UNKNOWN: Known<'static> = Known {
    capture: None,
    problem: None,
};
const PROVEN: Known<'static> = Known {
    capture: Some(CaptureState::Proven),
    problem: None,
};

fn pod() -> PodRef {
    PodRef {
        namespace: "shop".into(),
        name: "web".into(),
        uid: "u".into(),
    }
}

fn reason(said: Option<Said>) -> Option<(Reason, String)> {
    said.map(|(_, reason, note)| (reason, note))
}

fn problem(notices: &mut PodNotices) -> Option<Option<String>> {
    notices.take_problem().map(|write| write.text)
}

#[test]
fn a_pod_that_is_well_from_its_start_is_told_nothing() {
    let mut notices = PodNotices::default();
    let now = Instant::now();
    assert_eq!(notices.hear(&pod(), Proof::Pending, "not proven yet", UNKNOWN, now), None);
    assert_eq!(notices.hear(&pod(), Proof::Proven, "", UNKNOWN, now), None);
    assert_eq!(notices.take_due(now + NOT_ENROLLED_AFTER), []);
    assert_eq!(notices.hear(&pod(), Proof::Proven, "", PROVEN, now), None);
    assert_eq!((problem(&mut notices), notices.pods.len()), (None, 0));
    assert!(notices.in_trouble().is_empty());
}

#[test]
fn one_that_stays_unproven_is_told_once_with_the_last_reason_and_when_it_is_well() {
    let mut notices = PodNotices::default();
    let now = Instant::now();
    assert_eq!(notices.hear(&pod(), Proof::Pending, "not proven yet", UNKNOWN, now), None);
    assert_eq!(notices.hear(&pod(), Proof::Pending, "no route", UNKNOWN, now), None);
    assert_eq!(problem(&mut notices), None, "it may be nothing");
    let due = notices.due().expect("due");
    let said = notices.take_due(due);
    assert_eq!(said.len(), 1);
    assert_eq!(said[0].1, Reason::NotEnrolled);
    assert!(said[0].2.contains("no route"), "{said:?}");
    assert_eq!(problem(&mut notices), Some(Some("pending: no route".into())));
    assert_eq!(notices.in_trouble()["shop/web"], "pending: no route");
    let known = Known {
        problem: Some("pending: no route"),
        ..UNKNOWN
    };
    // The same again and again.
    assert_eq!(notices.hear(&pod(), Proof::Pending, "no route", known, due), None);
    assert_eq!(
        (problem(&mut notices), notices.take_due(due + NOT_ENROLLED_AFTER)),
        (None, vec![])
    );
    let said = reason(notices.hear(&pod(), Proof::Pending, "another", known, due));
    assert!(said.is_some_and(|(reason, note)| reason == Reason::NotEnrolled && note.contains("another")));
    let said = reason(notices.hear(&pod(), Proof::Proven, "", known, due));
    assert_eq!(said.map(|(reason, _)| reason), Some(Reason::Protected));
    assert_eq!(problem(&mut notices), Some(None));
    // Until the annotation's end has come back, it is told again.
    assert_eq!(notices.hear(&pod(), Proof::Proven, "", known, due), None);
    assert_eq!(notices.hear(&pod(), Proof::Proven, "", PROVEN, due), None);
    assert_eq!((notices.pods.len(), problem(&mut notices)), (0, None));
}

#[test]
fn what_was_well_in_between_has_begun_anew() {
    let mut notices = PodNotices::default();
    let now = Instant::now();
    notices.hear(&pod(), Proof::Pending, "first", UNKNOWN, now);
    notices.hear(&pod(), Proof::Proven, "", UNKNOWN, now);
    let later = now + NOT_ENROLLED_AFTER / 2;
    notices.hear(&pod(), Proof::Pending, "second", UNKNOWN, later);
    assert_eq!(notices.take_due(now + NOT_ENROLLED_AFTER), []);
    assert_eq!(notices.take_due(later + NOT_ENROLLED_AFTER).len(), 1);
}

#[test]
fn a_loss_is_told_at_once_and_its_end() {
    let mut notices = PodNotices::default();
    let now = Instant::now();
    let said = reason(notices.hear(&pod(), Proof::Lost, "somebody else answers", PROVEN, now));
    assert!(said.is_some_and(|(reason, note)| reason == Reason::ProtectionLost && note.contains("somebody else answers")));
    assert_eq!(problem(&mut notices), Some(Some("lost: somebody else answers".into())));
    assert_eq!(notices.hear(&pod(), Proof::Lost, "somebody else answers", PROVEN, now), None);
    // The agent was restarted, and has not proven it again.
    assert_eq!(notices.hear(&pod(), Proof::Pending, "not proven yet", PROVEN, now), None);
    assert_eq!(notices.in_trouble()["shop/web"], "lost: somebody else answers");
    let said = reason(notices.hear(&pod(), Proof::Proven, "", PROVEN, now));
    assert_eq!(said.map(|(reason, _)| reason), Some(Reason::Protected));
}

#[test]
fn what_another_replica_has_told_is_not_told_again() {
    let lost = Known {
        capture: Some(CaptureState::Lost),
        problem: Some("lost: why"),
    };
    let mut notices = PodNotices::default();
    let now = Instant::now();
    assert_eq!(notices.hear(&pod(), Proof::Lost, "why", lost, now), None);
    assert_eq!(problem(&mut notices), None, "it stands there");
    // And of one that starts, the end of what another one told is.
    let mut fresh = PodNotices::default();
    let said = reason(fresh.hear(&pod(), Proof::Proven, "", lost, now));
    assert_eq!(said.map(|(reason, _)| reason), Some(Reason::Protected));
    assert_eq!(problem(&mut fresh), Some(None));
}

#[test]
fn what_is_read_late_is_mended_and_what_another_replica_hears_is_no_longer_this_ones() {
    let mut notices = PodNotices::default();
    let now = Instant::now();
    let lost = Known {
        capture: Some(CaptureState::Lost),
        problem: None,
    };
    assert!(notices.hear(&pod(), Proof::Proven, "", lost, now).is_some());
    assert_eq!(problem(&mut notices), None);
    let late = Known {
        problem: Some("lost: why"),
        ..PROVEN
    };
    notices.see("u", late, true, now);
    assert_eq!(problem(&mut notices), Some(None));
    notices.hear(&pod(), Proof::Lost, "why", PROVEN, now);
    notices.see("u", late, true, now);
    assert_eq!(notices.in_trouble_count(), 1);
    notices.see("u", PROVEN, false, now);
    assert_eq!(notices.in_trouble_count(), 0);
}

#[test]
fn a_refused_pod_is_told_why_until_it_leaves() {
    let mut notices = PodNotices::default();
    let now = Instant::now();
    let said = reason(notices.refused(&pod(), "a sidecar", UNKNOWN, now));
    assert!(said.is_some_and(|(reason, note)| reason == Reason::NotEnrolled && note.contains("a sidecar")));
    assert_eq!(problem(&mut notices), Some(Some("refused: a sidecar".into())));
    let known = Known {
        problem: Some("refused: a sidecar"),
        ..UNKNOWN
    };
    assert_eq!(notices.refused(&pod(), "a sidecar", known, now), None);
    notices.outside(&pod(), known, now);
    assert_eq!(problem(&mut notices), Some(None));
    notices.outside(&pod(), UNKNOWN, now);
    assert!(notices.pods.is_empty());
}

#[test]
fn a_text_that_never_stays_the_same_is_not_written_all_the_time() {
    let mut notices = PodNotices::default();
    let mut now = Instant::now();
    notices.hear(&pod(), Proof::Pending, "0", UNKNOWN, now);
    now += NOT_ENROLLED_AFTER;
    notices.take_due(now);
    let mut written = usize::from(problem(&mut notices).is_some());
    for n in 1..100 {
        now += PROBLEM_PACE / 10;
        notices.hear(&pod(), Proof::Pending, &n.to_string(), UNKNOWN, now);
        written += usize::from(problem(&mut notices).is_some());
    }
    assert!((9..=11).contains(&written), "{written}");
    // What it is at the end of it is written.
    now += PROBLEM_PACE;
    notices.hear(&pod(), Proof::Pending, "last", UNKNOWN, now);
    assert_eq!(problem(&mut notices), Some(Some("pending: last".into())));
}

#[test]
fn pods_in_trouble_are_remembered_within_a_bound_and_those_that_are_gone_are_not() {
    let mut notices = PodNotices::default();
    let now = Instant::now();
    for n in 0..=MAX_PODS_IN_TROUBLE {
        let pod = PodRef {
            uid: n.to_string(),
            ..pod()
        };
        notices.hear(&pod, Proof::Pending, "why", UNKNOWN, now);
    }
    assert_eq!((notices.pods.len(), notices.left_out()), (MAX_PODS_IN_TROUBLE, 1));
    notices.retain(|uid| uid == "7");
    assert_eq!((notices.pods.len(), notices.due.len()), (1, 1));
}
