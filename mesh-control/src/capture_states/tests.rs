use super::*;

#[test]
fn only_the_agents_word_moves_a_state_and_never_back_to_pending() {
    let mut states = CaptureStates::default();
    assert!(!states.apply("a", Proof::Pending));
    assert_eq!(states.of("a"), None);
    assert!(states.apply("a", Proof::Proven));
    assert!(!states.apply("a", Proof::Proven), "nothing new");
    assert!(!states.apply("a", Proof::Pending), "an agent that restarts withdraws nothing");
    assert_eq!(states.of("a"), Some(CaptureState::Proven));
    assert!(states.apply("a", Proof::Lost));
    assert!(!states.apply("a", Proof::Pending));
    assert_eq!(states.of("a"), Some(CaptureState::Lost));
    assert!(states.apply("a", Proof::Proven));
}

#[test]
fn pods_that_left_the_mesh_are_forgotten_and_absent_ones_kept() {
    let mut states = CaptureStates::default();
    for key in ["member", "left", "gone"] {
        states.apply(key, Proof::Proven);
    }
    assert!(states.prune(|key| match key {
        "member" => Some(true),
        "left" => Some(false),
        _ => None,
    }));
    assert_eq!(states.of("left"), None);
    assert_eq!(states.of("gone"), Some(CaptureState::Proven), "the folder may only be away");
    assert_eq!(states.of("member"), Some(CaptureState::Proven));
}

#[test]
fn the_bound_takes_absent_pods_first() {
    let mut states = CaptureStates::default();
    for i in 0..MAX_CAPTURE_STATES {
        states.apply(&format!("absent-{i:06}"), Proof::Proven);
    }
    states.apply("zz-member", Proof::Lost);
    states.prune(|key| (key == "zz-member").then_some(true));
    assert_eq!(states.len(), MAX_CAPTURE_STATES);
    assert_eq!(states.of("zz-member"), Some(CaptureState::Lost));
}

#[test]
fn a_released_pod_is_lost_until_it_leaves_the_mesh_or_is_proven_again() {
    let mut states = CaptureStates::default();
    states.apply("a", Proof::Proven);
    // What an agent says of a Pod that it has released.
    assert!(states.apply("a", Proof::Lost));
    states.prune(|_| Some(true));
    assert!(!states.apply("a", Proof::Pending), "enrolled again, and not proven yet");
    assert_eq!(
        states.of("a"),
        Some(CaptureState::Lost),
        "never pending: that would send it cleartext"
    );
    states.prune(|_| Some(false));
    assert_eq!(states.of("a"), None, "its manifest has left the mesh");
}
