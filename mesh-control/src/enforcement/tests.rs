use super::*;
use crate::compile::TypeSnapshot;
use crate::limits::MAX_SHARED_BYTES;

fn id(kind: Kind, name: &str) -> ObjectId {
    ObjectId {
        kind,
        namespace: "shop".to_owned(),
        name: name.to_owned(),
    }
}

fn form(text: &str) -> Form {
    ShortHash::of(&[text.as_bytes()])
}

/// A state of these policies (name, form), of that version.
fn snapshot(version: &str, policies: &[(&str, &str)]) -> Snapshot {
    let mut snapshot = Snapshot::default();
    for (type_url, kind) in TYPES {
        let of_type = TypeSnapshot {
            version: format!("{version}-{}", kind.as_str()),
            ..TypeSnapshot::default()
        };
        snapshot.types.insert(type_url, Arc::new(of_type));
    }
    let policies = policies.iter();
    snapshot.forms = policies
        .map(|(name, text)| (id(Kind::AuthorizationPolicy, name), form(text)))
        .chain([(id(Kind::MeshConfig, "default"), form("config"))])
        .collect();
    snapshot
}

fn versions(version: &str) -> BTreeMap<String, String> {
    let version = |(type_url, kind): (&str, Kind)| (type_url.to_owned(), format!("{version}-{}", kind.as_str()));
    TYPES.into_iter().map(version).collect()
}

/// Which of the nodes enforce, and which reject, what this replica tells of the form.
fn told(enforcement: &mut Enforcement, snapshot: &Snapshot, text: &str, now: Instant) -> (Vec<ShortHash>, Vec<ShortHash>) {
    let (share, left_out) = enforcement.share(&snapshot.forms, now);
    assert_eq!(left_out, 0);
    let share = Share::parse(share.text()).expect("a share");
    let nodes = |has: &dyn Fn(&Group) -> bool| {
        let groups = share.groups.iter().filter(|group| has(group));
        groups.flat_map(|group| group.nodes.clone()).collect::<Vec<_>>()
    };
    (
        nodes(&|group| group.enforces.contains(&form(text))),
        nodes(&|group| group.rejects.contains(&form(text))),
    )
}

#[test]
fn a_node_enforces_a_form_once_it_says_the_version_that_has_it() {
    let (mut enforcement, now) = (Enforcement::default(), Instant::now());
    let (first, second) = (
        snapshot("1", &[("a", "a1"), ("b", "b1")]),
        snapshot("2", &[("a", "a2"), ("b", "b1")]),
    );
    enforcement.published(&first);
    enforcement.opened("n1", now);
    assert_eq!(told(&mut enforcement, &first, "a1", now).0, [], "it has said nothing");
    enforcement.reported("n1", &versions("1"), &[]);
    assert_eq!(told(&mut enforcement, &first, "a1", now).0, [node_key("n1")]);
    enforcement.published(&second);
    assert_eq!(told(&mut enforcement, &second, "a2", now).0, [], "it has yet to say so");
    assert_eq!(
        told(&mut enforcement, &second, "b1", now).0,
        [node_key("n1")],
        "what has not changed stays in force"
    );
    assert_eq!(told(&mut enforcement, &second, "config", now).0, [node_key("n1")]);
    enforcement.reported("n1", &versions("2+partial"), &[]);
    assert_eq!(told(&mut enforcement, &second, "a2", now).0, [], "a part may be without it");
    enforcement.reported("n1", &versions("2"), &[]);
    assert_eq!(told(&mut enforcement, &second, "a2", now).0, [node_key("n1")]);
    enforcement.reported("n1", &BTreeMap::new(), &[]);
    assert_eq!(
        told(&mut enforcement, &second, "a2", now).0,
        [],
        "an agent that has just started"
    );
}

#[test]
fn a_version_that_is_forgotten_still_tells_what_it_was_of_who_said_it_in_time() {
    let (mut enforcement, now) = (Enforcement::default(), Instant::now());
    enforcement.published(&snapshot("0", &[("a", "a1"), ("b", "b0")]));
    enforcement.opened("n1", now);
    enforcement.opened("late", now);
    enforcement.reported("n1", &versions("0"), &[]);
    let mut last = Snapshot::default();
    for version in 1..=MAX_VERSIONS_KEPT {
        last = snapshot(&version.to_string(), &[("a", "a1"), ("b", &format!("b{version}"))]);
        enforcement.published(&last);
    }
    enforcement.reported("n1", &versions("0"), &[]);
    enforcement.reported("late", &versions("0"), &[]);
    assert_eq!(told(&mut enforcement, &last, "a1", now).0, [node_key("n1")]);
    assert!(
        enforcement
            .history
            .values()
            .all(|versions| versions.len() == MAX_VERSIONS_KEPT)
    );
}

#[test]
fn what_a_node_rejects_it_does_not_enforce() {
    let (mut enforcement, now) = (Enforcement::default(), Instant::now());
    let state = snapshot("1", &[("a", "a1"), ("b", "b1")]);
    enforcement.published(&state);
    enforcement.opened("n1", now);
    let rejected = |text: &str| vec![text.to_owned()];
    enforcement.reported("n1", &versions("1"), &rejected("Authorization shop/a: unknown part: 7"));
    assert_eq!(told(&mut enforcement, &state, "a1", now), (vec![], vec![node_key("n1")]));
    assert_eq!(told(&mut enforcement, &state, "b1", now), (vec![node_key("n1")], vec![]));
    enforcement.reported("n1", &versions("1"), &rejected("Settings mesh: what"));
    assert_eq!(told(&mut enforcement, &state, "config", now), (vec![], vec![node_key("n1")]));
    assert_eq!(told(&mut enforcement, &state, "a1", now).0, [node_key("n1")]);
    // More than can be named: nothing is sure.
    enforcement.reported("n1", &versions("1"), &rejected("Authorization *: others, too"));
    assert_eq!(told(&mut enforcement, &state, "b1", now), (vec![], vec![]));
    enforcement.reported("n1", &versions("1"), &vec!["Address shop/x: what".to_owned(); MAX_REJECTED]);
    assert_eq!(told(&mut enforcement, &state, "b1", now), (vec![], vec![]));
    enforcement.reported("n1", &versions("1"), &[]);
    assert_eq!(told(&mut enforcement, &state, "a1", now), (vec![node_key("n1")], vec![]));
}

#[test]
fn a_node_that_is_gone_counts_until_it_could_be_back() {
    let (mut enforcement, now) = (Enforcement::default(), Instant::now());
    let state = snapshot("1", &[("a", "a1")]);
    enforcement.published(&state);
    // The next agent of the node, and then the one before, ends.
    enforcement.opened("n1", now);
    enforcement.reported("n1", &versions("1"), &[]);
    enforcement.opened("n1", now);
    enforcement.closed("n1", now);
    assert_eq!(
        told(&mut enforcement, &state, "a1", now + ENFORCED_GRACE * 9).0,
        [node_key("n1")]
    );
    enforcement.closed("n1", now);
    let before = now + ENFORCED_GRACE.mul_f64(0.9);
    assert_eq!(told(&mut enforcement, &state, "a1", before).0, [node_key("n1")]);
    assert_eq!(told(&mut enforcement, &state, "a1", now + ENFORCED_GRACE).0, []);
    assert!(enforcement.nodes.is_empty());
}

#[test]
fn nodes_without_room_are_counted_and_take_none() {
    let (mut enforcement, now) = (Enforcement::default(), Instant::now());
    let state = snapshot("1", &[("a", "a1")]);
    enforcement.published(&state);
    for node in 0..MAX_NODES + 2 {
        enforcement.opened(&format!("n{node}"), now);
        enforcement.reported(&format!("n{node}"), &versions("1"), &[]);
    }
    assert_eq!(enforcement.nodes.len(), MAX_NODES);
    let (share, left_out) = enforcement.share(&state.forms, now);
    assert_eq!(
        (left_out, share.groups.iter().map(|group| group.nodes.len()).sum::<usize>()),
        (2, MAX_NODES)
    );
    assert!(share.text().len() <= MAX_SHARED_BYTES, "{}", share.text().len());
    enforcement.closed(&format!("n{MAX_NODES}"), now);
    assert_eq!(enforcement.share(&state.forms, now).1, 1);
    // Who is gone makes room.
    enforcement.closed("n0", now);
    enforcement.opened("new", now + ENFORCED_GRACE);
    assert!(enforcement.nodes.contains_key("new") && !enforcement.nodes.contains_key("n0"));
}

#[test]
fn a_share_keeps_its_bounds_whatever_is_in_it() {
    let forms: BTreeSet<Form> = (0..6000).map(|number| form(&format!("form {number}"))).collect();
    let group = |number: usize, size: usize| Group {
        nodes: (0..size).map(|node| node_key(&format!("{number}/{node}"))).collect(),
        enforces: forms.iter().skip(number).step_by(2).copied().collect(),
        rejects: forms.iter().nth(number).copied().into_iter().collect(),
    };
    let groups = (0..60).map(|number| group(number, 1 + number));
    let (share, left_out) = Share::of(forms.clone(), groups);
    assert!(share.text().len() <= MAX_SHARED_BYTES, "{}", share.text().len());
    let told: usize = share.groups.iter().map(|group| group.nodes.len()).sum();
    assert_eq!(told + left_out, (1..=60).sum::<usize>());
    assert_eq!(share.groups[0].nodes.len(), 60, "the largest come first");
    let parsed = Share::parse(share.text()).expect("a share");
    for (read, told) in parsed.groups.iter().zip(&share.groups) {
        assert_eq!(read.nodes, told.nodes);
        let beyond = told.enforces.difference(&read.enforces).count();
        assert!(
            read.enforces.is_subset(&told.enforces) && beyond > 0,
            "forms beyond the bound count nowhere"
        );
    }
    for bad in [
        "",
        "{}",
        r#"{"forms":"zz","groups":[]}"#,
        r#"{"forms":"","groups":[{"nodes":"é"}]}"#,
    ] {
        assert_eq!(Share::parse(bad), None, "{bad}");
    }
}

#[test]
fn an_object_that_tells_agents_nothing_new_is_enforced_by_who_has_the_version() {
    let (mut enforcement, now) = (Enforcement::default(), Instant::now());
    let mut state = snapshot("1", &[("a", "a1")]);
    enforcement.published(&state);
    enforcement.opened("n1", now);
    enforcement.reported("n1", &versions("1"), &[]);
    // A MeshConfig with the defaults: the settings are the same bytes.
    state.forms.insert(id(Kind::MeshConfig, "other"), form("defaults"));
    enforcement.published(&state);
    assert_eq!(told(&mut enforcement, &state, "defaults", now).0, [node_key("n1")]);
}
