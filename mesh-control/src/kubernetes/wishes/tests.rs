use std::time::Duration;

use super::*;

const PROVEN: Option<CaptureState> = Some(CaptureState::Proven);
const LOST: Option<CaptureState> = Some(CaptureState::Lost);

fn pod(uid: &str) -> PodRef {
    PodRef {
        namespace: "shop".into(),
        name: format!("pod-{uid}"),
        uid: uid.into(),
    }
}

#[test]
fn a_wish_is_written_once_and_read_back() {
    let now = Instant::now();
    let mut wishes = Wishes::default();
    assert_eq!(wishes.read("a", None, now), Reading::Theirs, "nobody wishes anything");
    assert!(wishes.want(pod("a"), PROVEN, now) && wishes.want(pod("a"), PROVEN, now));
    let write = wishes.take(now).expect("due");
    assert_eq!((write.value, write.pod.name.as_str()), (PROVEN, "pod-a"));
    assert_eq!(wishes.take(now), None, "the same again is no second write");
    assert_eq!(wishes.read("a", None, now), Reading::Ours);
    assert!(wishes.written(&write, now));
    assert_eq!(
        wishes.read("a", LOST, now),
        Reading::Ours,
        "an older word that is still on its way"
    );
    assert_eq!(wishes.read("a", PROVEN, now), Reading::Theirs);
    assert_eq!(
        wishes.read("a", LOST, now),
        Reading::Theirs,
        "another replica's, which is newer"
    );
}

#[test]
fn what_never_comes_back_holds_nothing_up() {
    let now = Instant::now();
    let mut wishes = Wishes::default();
    for uid in ["a", "b"] {
        wishes.want(pod(uid), PROVEN, now);
        let write = wishes.take(now).expect("due");
        wishes.written(&write, now);
    }
    assert_eq!(wishes.read("a", LOST, now + CAPTURE_ECHO), Reading::Theirs);
    wishes.expire(now + CAPTURE_ECHO - Duration::from_millis(1));
    assert!(wishes.wanted("b").is_some());
    wishes.expire(now + CAPTURE_ECHO);
    assert!(wishes.wanted("b").is_none());
}

#[test]
fn a_newer_wish_waits_for_the_write_that_is_on_its_way_and_then_goes() {
    let now = Instant::now();
    for failed in [false, true] {
        let mut wishes = Wishes::default();
        wishes.want(pod("a"), PROVEN, now);
        let first = wishes.take(now).expect("due");
        wishes.want(pod("a"), LOST, now);
        assert_eq!(wishes.take(now), None, "the first is still on its way");
        if failed {
            wishes.failed(&first, now);
        } else {
            assert!(!wishes.written(&first, now), "it is not what is wished any longer");
        }
        assert_eq!(wishes.read("a", PROVEN, now), Reading::Ours);
        let second = wishes.take(now).expect("due");
        assert_eq!(second.value, LOST);
        assert!(wishes.written(&second, now));
    }
}

#[test]
fn a_wish_that_changes_before_it_goes_is_one_write() {
    let now = Instant::now();
    let mut wishes = Wishes::default();
    wishes.want(pod("a"), PROVEN, now);
    wishes.want(pod("a"), LOST, now);
    wishes.want(pod("a"), None, now);
    assert_eq!(wishes.take(now).expect("due").value, None);
    assert_eq!(wishes.take(now), None);
}

#[test]
fn what_fails_is_tried_again_ever_later_and_others_are_not_held_up() {
    let now = Instant::now();
    let mut wishes = Wishes::default();
    wishes.want(pod("a"), PROVEN, now);
    let mut at = now;
    let mut pauses = Vec::new();
    for _ in 0..12 {
        let write = wishes.take(at).expect("due");
        wishes.failed(&write, at);
        assert_eq!(wishes.take(at), None);
        let due = wishes.due().expect("again");
        pauses.push(due - at);
        at = due;
    }
    assert!(
        pauses.is_sorted() && pauses[0] == CAPTURE_RETRY && pauses[11] == CAPTURE_RETRY_MOST,
        "{pauses:?}"
    );
    wishes.want(pod("b"), LOST, now);
    assert_eq!(wishes.take(now).expect("due").pod.uid, "b");
    let write = wishes.take(at).expect("due");
    wishes.gone(&write);
    assert_eq!((wishes.wanted("a"), wishes.due()), (None, None));
}

#[test]
fn there_are_only_so_many() {
    let now = Instant::now();
    let mut wishes = Wishes::default();
    for n in 0..MAX_CAPTURE_WRITES {
        assert!(wishes.want(pod(&n.to_string()), PROVEN, now));
    }
    assert!(!wishes.want(pod("one more"), PROVEN, now));
    assert!(wishes.want(pod("0"), LOST, now), "one that has its place already");
    assert_eq!(wishes.waiting(), MAX_CAPTURE_WRITES);
    let write = wishes.take(now).expect("due");
    wishes.gone(&write);
    assert!(wishes.want(pod("one more"), PROVEN, now), "a place is free again");
}
