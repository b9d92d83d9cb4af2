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

/// A state of these policies (name, form) and a MeshConfig, of that version.
fn snapshot(version: &str, policies: &[(&str, &str)]) -> Snapshot {
    let mut forms = Forms::default();
    for (name, text) in policies {
        forms.insert(id(Kind::AuthorizationPolicy, name), form(text), false);
    }
    forms.insert(id(Kind::MeshConfig, "default"), form("config"), false);
    snapshot_of(version, forms)
}

fn snapshot_of(version: &str, forms: Forms) -> Snapshot {
    let mut snapshot = Snapshot::default();
    for (type_url, version) in TYPES.into_iter().zip(versions(version).into_values()) {
        let of_type = TypeSnapshot {
            version,
            ..TypeSnapshot::default()
        };
        snapshot.types.insert(type_url, Arc::new(of_type));
    }
    snapshot.forms = Arc::new(forms);
    snapshot
}

/// As an agent says them; they are the same for all types, which are told apart.
fn versions(version: &str) -> BTreeMap<String, String> {
    TYPES
        .into_iter()
        .map(|type_url| (type_url.to_owned(), version.to_owned()))
        .collect()
}

/// Which of the nodes enforce, and which reject, what this replica tells of the form.
fn told(enforcement: &mut Enforcement, snapshot: &Snapshot, text: &str, now: Instant) -> (Vec<ShortHash>, Vec<ShortHash>) {
    let (share, left_out) = enforcement.share(&snapshot.forms, now);
    assert_eq!(left_out, LeftOut::default());
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
    assert!(enforcement.opened("n1", now));
    assert_eq!(told(&mut enforcement, &first, "a1", now).0, [], "it has said nothing");
    enforcement.reported("n1", &versions("1"), &[], now);
    assert_eq!(told(&mut enforcement, &first, "a1", now).0, [node_key("n1")]);
    enforcement.published(&second);
    assert_eq!(told(&mut enforcement, &second, "a2", now).0, [], "it has yet to say so");
    assert_eq!(
        told(&mut enforcement, &second, "b1", now).0,
        [node_key("n1")],
        "what has not changed stays in force"
    );
    assert_eq!(told(&mut enforcement, &second, "config", now).0, [node_key("n1")]);
    enforcement.reported("n1", &versions("2+partial"), &[], now);
    assert_eq!(told(&mut enforcement, &second, "a2", now).0, [], "a part may be without it");
    assert_eq!(told(&mut enforcement, &second, "b1", now).0, [node_key("n1")]);
    enforcement.reported("n1", &versions("2"), &[], now);
    assert_eq!(told(&mut enforcement, &second, "a2", now).0, [node_key("n1")]);
}

#[test]
fn what_was_said_before_stands_for_a_while_where_a_word_is_not_understood() {
    let (mut enforcement, now) = (Enforcement::default(), Instant::now());
    let state = snapshot("1", &[("a", "a1")]);
    enforcement.published(&state);
    enforcement.opened("n1", now);
    enforcement.reported("n1", &versions("1"), &[], now);
    // An agent that has just started, and goes on saying nothing that is known here: it is the first time that counts.
    enforcement.reported("n1", &BTreeMap::new(), &[], now);
    let last = now + ENFORCED_GRACE.mul_f64(0.9);
    enforcement.reported("n1", &versions("of another replica"), &[], last);
    assert_eq!(told(&mut enforcement, &state, "a1", last).0, [node_key("n1")]);
    assert_eq!(told(&mut enforcement, &state, "a1", now + ENFORCED_GRACE).0, []);
    enforcement.reported("n1", &versions("1"), &[], now + ENFORCED_GRACE);
    assert_eq!(
        told(&mut enforcement, &state, "a1", now + ENFORCED_GRACE * 2).0,
        [node_key("n1")]
    );
}

#[test]
fn a_selector_counts_once_the_workloads_have_it_too() {
    let (mut enforcement, now) = (Enforcement::default(), Instant::now());
    let of = |version: &str, text: &str, selects: bool| {
        let mut forms = Forms::default();
        forms.insert(id(Kind::AuthorizationPolicy, "a"), form(text), selects);
        forms.insert(id(Kind::AuthorizationPolicy, "b"), form("b1"), false);
        snapshot_of(version, forms)
    };
    enforcement.published(&of("1", "a for web", true));
    enforcement.opened("n1", now);
    enforcement.reported("n1", &versions("1"), &[], now);
    // The selector is another one: the policy's resource is the same, and the workloads' are not.
    let second = of("2", "a for db", true);
    enforcement.published(&second);
    let mut said = versions("2");
    said.insert(ADDRESS_TYPE_URL.to_owned(), "1".to_owned());
    enforcement.reported("n1", &said, &[], now);
    assert_eq!(told(&mut enforcement, &second, "a for db", now).0, []);
    assert_eq!(told(&mut enforcement, &second, "b1", now).0, [node_key("n1")]);
    enforcement.reported("n1", &versions("2"), &[], now);
    assert_eq!(told(&mut enforcement, &second, "a for db", now).0, [node_key("n1")]);
    // A workload that the agent cannot use may be one of the policy's.
    let rejected = ["Address Kubernetes//Pod/shop/db: what".to_owned()];
    enforcement.reported("n1", &versions("2"), &rejected, now);
    assert_eq!(told(&mut enforcement, &second, "a for db", now).0, []);
    assert_eq!(told(&mut enforcement, &second, "b1", now).0, [node_key("n1")]);
}

#[test]
fn a_version_that_is_forgotten_counts_for_nothing() {
    let (mut enforcement, now) = (Enforcement::default(), Instant::now());
    enforcement.published(&snapshot("0", &[("a", "a1"), ("b", "b0")]));
    enforcement.opened("n1", now);
    enforcement.reported("n1", &versions("0"), &[], now);
    let mut last = Snapshot::default();
    for version in 1..=MAX_VERSIONS_KEPT {
        assert!(
            version == 1 || told(&mut enforcement, &last, "a1", now).0 == [node_key("n1")],
            "{version}"
        );
        last = snapshot(&version.to_string(), &[("a", "a1"), ("b", &format!("b{version}"))]);
        enforcement.published(&last);
    }
    assert_eq!(told(&mut enforcement, &last, "a1", now).0, []);
    enforcement.reported("n1", &versions("1"), &[], now);
    assert_eq!(told(&mut enforcement, &last, "a1", now).0, [node_key("n1")]);
    let all = enforcement.history.values();
    assert!(all.clone().count() == TYPES.len() && all.clone().all(|versions| versions.len() == MAX_VERSIONS_KEPT));
}

#[test]
fn forms_that_are_kept_are_bounded_and_the_newest_stay() {
    let mut enforcement = Enforcement::default();
    let of = |version: usize| {
        let mut forms = Forms::default();
        for number in 0..MAX_FORMS_KEPT / 3 {
            let form = form(&format!("{number} of {version}"));
            forms.insert(id(Kind::AuthorizationPolicy, &number.to_string()), form, false);
        }
        Arc::new(forms)
    };
    for version in 0..4 {
        // Of each state two versions, which share its forms.
        let forms = of(version);
        for half in ["", "+"] {
            let mut state = snapshot(&format!("{version}{half}"), &[]);
            state.forms = Arc::clone(&forms);
            enforcement.published(&state);
        }
    }
    for versions in enforcement.history.values() {
        let kept: Vec<&str> = versions.iter().map(|(version, _)| version.as_str()).collect();
        assert_eq!(kept, ["1", "1+", "2", "2+", "3", "3+"]);
    }
    // One state that is beyond the bound by itself is kept all the same.
    let mut all = Forms::default();
    for number in 0..=MAX_FORMS_KEPT {
        all.insert(
            id(Kind::AuthorizationPolicy, &number.to_string()),
            form(&number.to_string()),
            false,
        );
    }
    enforcement.published(&snapshot_of("4", all));
    assert!(enforcement.history.values().all(|versions| versions.len() == 1));
}

#[test]
fn what_a_node_rejects_it_does_not_enforce() {
    let (mut enforcement, now) = (Enforcement::default(), Instant::now());
    let state = snapshot("1", &[("a", "a1"), ("b", "b1")]);
    enforcement.published(&state);
    enforcement.opened("n1", now);
    let mut says = |rejected: &[String], text: &str| {
        enforcement.reported("n1", &versions("1"), rejected, now);
        told(&mut enforcement, &state, text, now)
    };
    let one = |text: &str| vec![text.to_owned()];
    let (yes, no, unsure) = (
        (vec![node_key("n1")], vec![]),
        (vec![], vec![node_key("n1")]),
        (vec![], vec![]),
    );
    let a = one("Authorization shop/a: unknown part: 7");
    assert_eq!(says(&a, "a1"), no);
    assert_eq!(says(&a, "b1"), yes);
    let settings = one("Settings mesh: what");
    assert_eq!(says(&settings, "config"), no);
    assert_eq!(says(&settings, "a1"), yes);
    // More than can be named: nothing is sure.
    assert_eq!(says(&one("Authorization *: there are more"), "b1"), unsure);
    // A list that is full may have been cut: what comes behind its last is not sure either.
    assert_eq!(
        says(&vec!["Authorization shop/x: what".to_owned(); MAX_REJECTED], "b1"),
        unsure
    );
    assert_eq!(
        says(&vec!["Authorization shop/x: what".to_owned(); MAX_REJECTED], "config"),
        unsure
    );
    assert_eq!(
        says(&vec!["Authorization shop/x: what".to_owned(); MAX_REJECTED - 1], "b1"),
        yes
    );
    assert_eq!(says(&vec!["Address shop/x: what".to_owned(); MAX_REJECTED], "b1"), yes);
    assert_eq!(says(&vec!["nonsense".to_owned(); MAX_REJECTED], "b1"), unsure);
    assert_eq!(says(&[], "a1"), yes);
}

#[test]
fn another_form_of_what_is_rejected_is_rejected_until_agents_are_told_something_new() {
    let (mut enforcement, now) = (Enforcement::default(), Instant::now());
    let of = |text: &str| {
        let mut forms = Forms::default();
        forms.insert(id(Kind::AuthorizationPolicy, "a"), form(text), true);
        snapshot_of("1", forms)
    };
    enforcement.published(&of("for web"));
    enforcement.opened("n1", now);
    let rejected = ["Authorization shop/a: unknown part: 7".to_owned()];
    enforcement.reported("n1", &versions("1"), &rejected, now);
    // Another selector, by which no workload is chosen as by the one before: all versions are the same.
    let second = of("for nobody");
    enforcement.published(&second);
    assert_eq!(
        told(&mut enforcement, &second, "for nobody", now),
        (vec![], vec![node_key("n1")])
    );
}

#[test]
fn a_node_that_is_gone_counts_until_it_could_be_back() {
    let (mut enforcement, now) = (Enforcement::default(), Instant::now());
    let state = snapshot("1", &[("a", "a1")]);
    enforcement.published(&state);
    // The next agent of the node, and then the one before, ends.
    enforcement.opened("n1", now);
    enforcement.reported("n1", &versions("1"), &[], now);
    enforcement.opened("n1", now);
    enforcement.closed("n1", true, now);
    assert_eq!(
        told(&mut enforcement, &state, "a1", now + ENFORCED_GRACE * 9).0,
        [node_key("n1")]
    );
    enforcement.closed("n1", true, now);
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
        let has_room = enforcement.opened(&format!("n{node}"), now);
        assert_eq!(has_room, node < MAX_NODES);
        enforcement.reported(&format!("n{node}"), &versions("1"), &[], now);
    }
    assert_eq!(enforcement.nodes.len(), MAX_NODES);
    let (share, left_out) = enforcement.share(&state.forms, now);
    assert_eq!(
        (left_out.nodes, share.groups.len(), share.groups[0].nodes.len()),
        (2, 1, MAX_NODES)
    );
    assert!(share.text().len() <= MAX_SHARED_BYTES, "{}", share.text().len());
    enforcement.closed(&format!("n{MAX_NODES}"), false, now);
    assert_eq!(enforcement.share(&state.forms, now).1.nodes, 1);
    // Who is gone makes room.
    enforcement.closed("n0", true, now);
    assert!(!enforcement.opened("new", now), "it may come back");
    assert!(enforcement.opened("new", now + ENFORCED_GRACE));
    assert!(enforcement.nodes.contains_key("new") && !enforcement.nodes.contains_key("n0"));
}

#[test]
fn a_namespace_with_many_policies_takes_no_room_from_others() {
    let mut forms = Forms::default();
    let of = |namespace: &str, number: usize| ObjectId {
        kind: Kind::AuthorizationPolicy,
        namespace: namespace.to_owned(),
        name: number.to_string(),
    };
    for number in 0..MAX_SHARED_FORMS {
        forms.insert(of("a-big", number), form(&format!("big {number}")), false);
    }
    for number in 0..3 {
        forms.insert(of("small", number), form(&format!("small {number}")), false);
    }
    let (share, left_out) = Enforcement::default().share(&forms, Instant::now());
    assert_eq!(left_out, LeftOut { nodes: 0, forms: 3 });
    assert!((0..3).all(|number| share.forms.contains(&form(&format!("small {number}")))));
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
    enforcement.published(&snapshot("1", &[("a", "a1")]));
    enforcement.opened("n1", now);
    enforcement.reported("n1", &versions("1"), &[], now);
    // A MeshConfig with the defaults: the settings are the same bytes.
    let mut forms = Forms::default();
    forms.insert(id(Kind::MeshConfig, "other"), form("defaults"), false);
    let state = snapshot_of("1", forms);
    enforcement.published(&state);
    assert_eq!(told(&mut enforcement, &state, "defaults", now).0, [node_key("n1")]);
    assert!(enforcement.history.values().all(|versions| versions.len() == 1));
}
