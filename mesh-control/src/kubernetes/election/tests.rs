use k8s_openapi::api::coordination::v1::LeaseSpec;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::*;
use crate::limits::{ELECTION_PACE, STATUS_TIMEOUT};

fn lease(version: &str, holder: &str) -> Lease {
    Lease {
        metadata: ObjectMeta {
            resource_version: Some(version.to_owned()),
            ..ObjectMeta::default()
        },
        spec: Some(LeaseSpec {
            holder_identity: Some(holder.to_owned()),
            lease_transitions: Some(3),
            ..LeaseSpec::default()
        }),
    }
}

fn take(version: &str) -> Step {
    Step::Take {
        resource_version: version.to_owned(),
        transitions: 4,
    }
}

#[test]
fn a_lease_that_is_renewed_is_not_taken_and_one_that_is_not_is() {
    let mut election = Election::new("b".to_owned());
    let start = Instant::now();
    for (beat, version) in ["1", "2", "3"].into_iter().enumerate() {
        // Each just before the one before would have run out.
        let now = start + ELECTION_LIFE.mul_f64(0.9) * u32::try_from(beat).expect("few");
        assert_eq!(election.read(Some(&lease(version, "a")), now), Step::Wait);
    }
    let last = start + ELECTION_LIFE.mul_f64(0.9) * 2;
    assert_eq!(election.read(Some(&lease("3", "a")), last + ELECTION_LIFE / 2), Step::Wait);
    assert_eq!(election.read(Some(&lease("3", "a")), last + ELECTION_LIFE), take("3"));
    assert!(!election.is_held(last), "it is not written yet");
}

#[test]
fn a_lease_that_is_let_go_or_missing_is_taken_at_once() {
    let mut election = Election::new("b".to_owned());
    let now = Instant::now();
    assert_eq!(election.read(Some(&lease("1", "")), now), take("1"));
    assert_eq!(election.read(None, now), Step::Create);
}

#[test]
fn who_cannot_renew_stops_before_anybody_else_may_begin() {
    let mut election = Election::new("a".to_owned());
    let sent = Instant::now();
    election.written(sent);
    assert!(election.is_held(sent));
    // Nobody answers; nothing is read.
    assert!(!election.is_held(sent + ELECTION_DEADLINE));
    // A write that was begun in the last moment has ended before another replica has waited long enough.
    assert!(ELECTION_DEADLINE + STATUS_TIMEOUT < ELECTION_LIFE);
    assert!(ELECTION_PACE * 2 < ELECTION_DEADLINE, "one renewal may fail");
    let renew = Step::Renew {
        resource_version: "9".to_owned(),
    };
    assert_eq!(election.read(Some(&lease("9", "a")), sent + ELECTION_LIFE), renew);
}

#[test]
fn who_finds_another_holder_stops_at_once() {
    let mut election = Election::new("a".to_owned());
    let now = Instant::now();
    election.written(now);
    assert_eq!(election.read(Some(&lease("2", "b")), now), Step::Wait);
    assert!(!election.is_held(now));
}
