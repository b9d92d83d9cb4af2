use super::*;

const TIMEOUT: Duration = Duration::from_secs(100);

fn key(client: u8) -> AffinityKey {
    AffinityKey {
        client: IpAddr::from([10, 0, 0, client]),
        service: "web.shop.svc.cluster.local".into(),
        port: 80,
    }
}

/// Of endpoints that all have a weight of 1.
fn choice(affinities: &Affinities, key: &AffinityKey, endpoints: &[&'static str], now: Instant) -> Option<&'static str> {
    affinities.take(key, &mut endpoints.to_vec(), |name| name, |_| 1, now)
}

#[test]
fn a_client_keeps_its_endpoint_until_its_time_is_over() {
    let mut affinities = Affinities::new(8);
    let now = Instant::now();
    for client in 0..=255 {
        let key = key(client);
        let by_address = choice(&affinities, &key, &["a", "b", "c"], now).unwrap();
        let other = if by_address == "a" { "b" } else { "a" };
        assert!(affinities.keep(key.clone(), other.into(), now, TIMEOUT));
        let at = |after: Duration| choice(&affinities, &key, &["a", "b", "c"], now + after).unwrap();
        assert_eq!(at(TIMEOUT - Duration::from_nanos(1)), other);
        assert_eq!(at(TIMEOUT), by_address);
        // Each new connection begins its time again.
        let later = now + TIMEOUT / 2;
        assert!(affinities.keep(key.clone(), other.into(), later, TIMEOUT));
        assert_eq!(choice(&affinities, &key, &["a", "b", "c"], now + TIMEOUT), Some(other));
        affinities.kept.clear();
    }
}

#[test]
fn one_that_is_gone_or_has_no_weight_is_not_kept() {
    let mut affinities = Affinities::new(8);
    let now = Instant::now();
    assert!(affinities.keep(key(1), "gone".into(), now, TIMEOUT));
    assert!(choice(&affinities, &key(1), &["a", "b"], now).is_some());
    assert_eq!(choice(&affinities, &key(1), &[], now), None);
    let weight = |name: &&str| u32::from(*name != "gone");
    let taken = affinities.take(&key(1), &mut vec!["gone", "a"], |name| name, weight, now);
    assert_eq!(taken, Some("a"));
    assert_eq!(affinities.take(&key(1), &mut vec!["gone"], |name| name, weight, now), None);
}

#[test]
fn what_was_taken_is_taken_out() {
    let affinities = Affinities::new(8);
    let mut candidates = vec!["a", "b", "c"];
    let mut taken = Vec::new();
    while let Some(one) = affinities.take(&key(1), &mut candidates, |name| name, |_| 1, Instant::now()) {
        taken.push(one);
    }
    taken.sort_unstable();
    assert_eq!(taken, ["a", "b", "c"]);
}

/// The next agent, which knows nothing, and one whose table is full choose alike; an endpoint more moves only those that it gets.
#[test]
fn a_choice_is_the_addresss_own() {
    let (one, other) = (Affinities::new(8), Affinities::new(0));
    let now = Instant::now();
    let mut counts: HashMap<&str, u32> = HashMap::new();
    for client in 0..=255 {
        let before = choice(&one, &key(client), &["a", "b", "c"], now).unwrap();
        assert_eq!(choice(&other, &key(client), &["c", "a", "b"], now), Some(before));
        let after = choice(&one, &key(client), &["a", "b", "c", "d"], now).unwrap();
        assert!(after == before || after == "d", "{client}: {before}, then {after}");
        *counts.entry(before).or_default() += 1;
    }
    // Of 256 clients a third is 85; four standard deviations are 30.
    assert!(counts.values().all(|count| (55..=115).contains(count)), "{counts:?}");
}

#[test]
fn a_weight_is_a_share() {
    let affinities = Affinities::new(0);
    let mut heavy = 0;
    for client in 0..=255 {
        let weight = |name: &&str| if *name == "heavy" { 3 } else { 1 };
        let taken = affinities.take(&key(client), &mut vec!["heavy", "light"], |name| name, weight, Instant::now());
        heavy += u32::from(taken == Some("heavy"));
    }
    // 192 of 256; four standard deviations are 28.
    assert!((164..=220).contains(&heavy), "{heavy}");
}

#[test]
fn at_the_bound_nothing_is_pushed_out_but_what_is_over() {
    let mut affinities = Affinities::new(2);
    let now = Instant::now();
    assert!(affinities.keep(key(1), "a".into(), now, TIMEOUT));
    assert!(affinities.keep(key(2), "a".into(), now, TIMEOUT * 2));
    assert!(!affinities.keep(key(3), "a".into(), now, TIMEOUT));
    assert!(affinities.keep(key(1), "b".into(), now, TIMEOUT), "it is there already");
    assert!(
        affinities.keep(key(3), "a".into(), now + TIMEOUT, TIMEOUT),
        "the first one's time is over"
    );
    assert_eq!(affinities.kept.len(), 2);
    assert!(affinities.kept.contains_key(&key(2)));
}

/// As every build chooses: whom an agent of another version serves keeps its endpoint.
#[test]
fn choices_are_the_same_in_every_build() {
    let affinities = Affinities::new(0);
    let chosen: String = (0..16)
        .map(|client| choice(&affinities, &key(client), &["a", "b", "c"], Instant::now()).unwrap())
        .collect();
    assert_eq!(chosen, "bcabbbaabaabbaaa");
    let of_v6 = AffinityKey {
        client: "fd00::1".parse().unwrap(),
        ..key(0)
    };
    assert_eq!(choice(&affinities, &of_v6, &["a", "b", "c"], Instant::now()), Some("a"));
}
