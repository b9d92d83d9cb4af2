use super::*;
use crate::limits::{REVIEW_GRACE, REVIEW_LIFE};

fn token(number: u8) -> TokenHash {
    [number; 32]
}

fn accepted(node: &str, expires_unix_seconds: Option<u64>) -> Result<Accepted, Refusal> {
    Ok(Accepted {
        node: node.to_owned(),
        expires_unix_seconds,
    })
}

#[test]
fn what_was_said_is_repeated_for_its_life_and_no_longer() {
    let began = Instant::now();
    let mut cache = ReviewCache::new(&Bounds::default());
    assert_eq!(cache.verdict(&token(1), began, 0), None);
    cache.keep(token(1), accepted("node-a", None), began);
    cache.keep(token(2), Err(Refusal::Unknown), began);
    let moment = Duration::from_millis(1);
    let said = |token_number, after| cache.verdict(&token(token_number), began + after, 0);
    assert_eq!(said(1, REVIEW_LIFE - moment), Some(Ok("node-a".to_owned())));
    assert_eq!(said(1, REVIEW_LIFE), None);
    assert_eq!(said(2, REFUSED_LIFE - moment), Some(Err(Refusal::Unknown)));
    assert_eq!(said(2, REFUSED_LIFE), None);
}

#[test]
fn an_open_stream_goes_on_for_the_grace_and_no_longer() {
    let began = Instant::now();
    let mut cache = ReviewCache::new(&Bounds::default());
    cache.keep(token(1), accepted("node-a", None), began);
    let last = REVIEW_LIFE + REVIEW_GRACE;
    let grace = |after| cache.in_grace(&token(1), began + after, 0);
    assert_eq!(grace(last - Duration::from_millis(1)), Ok(()));
    assert_eq!(grace(last), Err(Refusal::Unreviewed));
    assert_eq!(
        cache.in_grace(&token(2), began, 0),
        Err(Refusal::Unreviewed),
        "never accepted"
    );
}

#[test]
fn a_token_that_is_over_has_neither_life_nor_grace() {
    let began = Instant::now();
    let mut cache = ReviewCache::new(&Bounds::default());
    cache.keep(token(1), accepted("node-a", Some(1000)), began);
    assert_eq!(cache.verdict(&token(1), began, 999), Some(Ok("node-a".to_owned())));
    assert_eq!(cache.verdict(&token(1), began, 1000), Some(Err(Refusal::Expired)));
    assert_eq!(cache.in_grace(&token(1), began, 999), Ok(()));
    assert_eq!(cache.in_grace(&token(1), began, 1000), Err(Refusal::Expired));
}

#[test]
fn a_refusal_ends_the_grace_and_an_acceptance_the_refusal() {
    let began = Instant::now();
    let mut cache = ReviewCache::new(&Bounds::default());
    cache.keep(token(1), accepted("node-a", None), began);
    cache.keep(token(1), Err(Refusal::Unknown), began);
    assert_eq!(cache.verdict(&token(1), began, 0), Some(Err(Refusal::Unknown)));
    assert_eq!(cache.in_grace(&token(1), began, 0), Err(Refusal::Unreviewed));
    cache.keep(token(1), accepted("node-a", None), began);
    assert_eq!(cache.verdict(&token(1), began, 0), Some(Ok("node-a".to_owned())));
}

#[test]
fn a_flood_of_bad_tokens_takes_only_its_own_room() {
    let began = Instant::now();
    let mut cache = ReviewCache::with_room(&Bounds::default(), 2, 3);
    cache.keep(token(1), accepted("node-a", None), began);
    for number in 10..100 {
        cache.keep(
            token(number),
            Err(Refusal::Unknown),
            began + Duration::from_millis(number.into()),
        );
    }
    let now = began + Duration::from_millis(100);
    assert_eq!(cache.counts(), (1, 3));
    assert_eq!(cache.verdict(&token(1), now, 0), Some(Ok("node-a".to_owned())));
    assert_eq!(cache.verdict(&token(99), now, 0), Some(Err(Refusal::Unknown)));
    assert_eq!(cache.verdict(&token(10), now, 0), None, "the oldest is asked for again");
}

#[test]
fn the_oldest_good_token_makes_room() {
    let began = Instant::now();
    let mut cache = ReviewCache::with_room(&Bounds::default(), 2, 1);
    for number in 1..=2 {
        cache.keep(
            token(number),
            accepted("node-a", None),
            began + Duration::from_secs(number.into()),
        );
    }
    // Said again: no longer the oldest.
    cache.keep(token(1), accepted("node-a", None), began + Duration::from_secs(3));
    cache.keep(token(3), accepted("node-a", None), began + Duration::from_secs(4));
    let known = |number| cache.verdict(&token(number), began + Duration::from_secs(5), 0).is_some();
    assert_eq!([known(1), known(2), known(3)], [true, false, true]);
    // What is too old goes by itself.
    cache.keep(
        token(4),
        accepted("node-a", None),
        began + REVIEW_LIFE + REVIEW_GRACE + Duration::from_secs(10),
    );
    assert_eq!(cache.counts(), (1, 0));
}
