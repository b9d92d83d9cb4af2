use super::*;
use crate::registry::{Registry, Scan};

/// As a watch tells it.
fn apply(world: &mut ClusterWorld, text: &str) {
    let value: serde_json::Value = serde_norway::from_str(text).expect("YAML");
    let text_of = |name: &str| value["metadata"][name].as_str().map(str::to_owned);
    let (api_version, kind) = (
        value["apiVersion"].as_str().unwrap_or_default(),
        value["kind"].as_str().unwrap_or_default(),
    );
    let kind = Kind::of(api_version, kind).expect("a kind of the mesh");
    let meta = Meta {
        name: text_of("name").unwrap_or_default(),
        namespace: kind.is_namespaced().then(|| text_of("namespace").unwrap_or_default()),
        uid: text_of("uid").unwrap_or_default(),
        created: value["metadata"]["created"].as_u64().unwrap_or_default(),
        written: value["metadata"]["generation"].as_i64().map(|generation| Written {
            generation,
            ..Written::default()
        }),
    };
    world.apply(kind, meta, |id| crate::registry::convert::parse(id, &value));
}

fn delete(world: &mut ClusterWorld, kind: Kind, name: &str, uid: &str) {
    let meta = Meta {
        name: name.into(),
        namespace: Some("shop".into()),
        uid: uid.into(),
        created: 0,
        written: None,
    };
    world.delete(kind, meta);
}

fn policy(name: &str, port: &str) -> String {
    format!(
        "apiVersion: culvert.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: shop, uid: u-{name}}}\n\
         spec: {{action: Deny, rules: [{{to: [{{ports: [{port}]}}]}}]}}\n"
    )
}

fn pod(name: &str, uid: &str, ip: &str, created: u64) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, uid: 'u{uid}', created: {created}}}\n\
         spec: {{nodeName: node-a, serviceAccountName: web}}\nstatus: {{podIPs: [{{ip: {ip}}}]}}\n"
    )
}

fn id(kind: Kind, name: &str) -> ObjectId {
    ObjectId {
        kind,
        namespace: "shop".into(),
        name: name.into(),
    }
}

fn names(world: &ClusterWorld) -> Vec<String> {
    world.world().keys().map(|id| id.name.clone()).collect()
}

#[test]
fn what_is_broken_keeps_its_last_good_form_and_harms_no_other() {
    let mut world = ClusterWorld::default();
    apply(&mut world, &policy("a", "80"));
    apply(&mut world, &policy("b", "80"));
    assert!(world.decide());
    let before = world.world();
    apply(&mut world, &policy("a", "0"));
    assert!(world.decide());
    assert_eq!(world.world(), before);
    let [rejection] = world.rejections() else {
        panic!("{:?}", world.rejections())
    };
    assert!(
        rejection.last_good_in_force && rejection.message.contains("ports"),
        "{rejection:?}"
    );
    assert_eq!(rejection.object, Some(id(Kind::AuthorizationPolicy, "a")));
    apply(&mut world, &policy("b", "81"));
    world.decide();
    assert_ne!(world.world(), before, "another one goes on");
    apply(&mut world, &policy("a", "82"));
    world.decide();
    assert!(world.rejections().is_empty());
}

#[test]
fn what_was_never_good_is_not_in_force() {
    let mut world = ClusterWorld::default();
    apply(&mut world, &policy("a", "0"));
    assert!(world.decide());
    assert!(world.world().is_empty() && !world.rejections()[0].last_good_in_force);
}

#[test]
fn only_a_complete_list_takes_anything_away() {
    let mut world = ClusterWorld::default();
    world.begin_list(Kind::Pod);
    apply(&mut world, &pod("a", "1", "10.0.0.1", 1));
    apply(&mut world, &pod("b", "2", "10.0.0.2", 1));
    assert!(!world.complete().contains(&Kind::Pod));
    world.end_list(Kind::Pod);
    assert!(world.complete().contains(&Kind::Pod) && !world.is_complete());
    world.decide();
    world.begin_list(Kind::Pod);
    apply(&mut world, &pod("b", "2", "10.0.0.2", 1));
    // The API server is lost here, and the list begins anew.
    world.decide();
    assert_eq!(names(&world), ["a", "b"]);
    world.begin_list(Kind::Pod);
    world.decide();
    assert_eq!(names(&world), ["a", "b"]);
    world.end_list(Kind::Pod);
    world.decide();
    assert!(names(&world).is_empty(), "this one was complete");
    for kind in Kind::ALL {
        world.absent(kind);
    }
    assert!(world.is_complete());
}

#[test]
fn another_object_of_the_same_name_inherits_nothing() {
    let mut world = ClusterWorld::default();
    apply(&mut world, &pod("a", "1", "10.0.0.1", 1));
    apply(&mut world, &pod("b", "2", "10.0.0.2", 1));
    world.decide();
    // The deletion of the first `a` was missed; the new one's address is somebody's.
    apply(&mut world, &pod("a", "3", "10.0.0.2", 5));
    world.decide();
    assert_eq!(names(&world), ["b"]);
    assert!(!world.rejections()[0].last_good_in_force, "{:?}", world.rejections());
    // A late word of the first one.
    delete(&mut world, Kind::Pod, "a", "u1");
    apply(&mut world, &pod("a", "3", "10.0.0.3", 5));
    world.decide();
    assert_eq!(names(&world), ["a", "b"]);
    delete(&mut world, Kind::Pod, "a", "u3");
    world.decide();
    assert_eq!(names(&world), ["b"]);
}

#[test]
fn who_was_created_first_has_the_address_on_every_replica() {
    let (older, younger) = (pod("z", "1", "10.0.0.1", 1), pod("a", "2", "10.0.0.1", 2));
    for order in [[&older, &younger], [&younger, &older]] {
        let mut world = ClusterWorld::default();
        for text in order {
            apply(&mut world, text);
        }
        world.decide();
        assert_eq!(names(&world), ["z"]);
        assert_eq!(world.rejections()[0].reason, Reason::Conflict);
        delete(&mut world, Kind::Pod, "z", "u1");
        world.decide();
        assert_eq!(names(&world), ["a"]);
        assert!(world.rejections().is_empty());
    }
}

#[test]
fn the_address_of_a_pod_that_terminates_is_the_next_ones() {
    let mut world = ClusterWorld::default();
    let old = pod("old", "1", "10.0.0.1", 1);
    apply(&mut world, &old);
    world.decide();
    let terminating = old.replace("created: 1", "created: 1, deletionTimestamp: '2026-01-01T00:00:00Z'");
    apply(&mut world, &terminating);
    world.decide();
    assert_eq!(names(&world), ["old"], "it lives as long as nobody else has its address");
    apply(&mut world, &pod("new", "2", "10.0.0.1", 2));
    world.decide();
    assert_eq!(names(&world), ["new"]);
    delete(&mut world, Kind::Pod, "old", "u1");
    world.decide();
    assert!(names(&world) == ["new"] && world.rejections().is_empty());
}

#[test]
fn beyond_the_bound_objects_are_left_out_and_that_is_said() {
    let mut world = ClusterWorld::default();
    let meta = |n: usize| Meta {
        name: format!("n{n}"),
        namespace: None,
        uid: n.to_string(),
        created: 0,
        written: None,
    };
    let labels = || Object::Namespace {
        labels: std::collections::BTreeMap::new(),
        best_effort: false,
    };
    for n in 0..=MAX_OBJECTS {
        world.apply(Kind::Namespace, meta(n), |_| Ok(labels()));
    }
    assert_eq!(world.left_out(Kind::Namespace), 1);
    let problem = world.problem().expect("said");
    assert!(problem.contains("Namespace") && problem.contains("left out"), "{problem}");
    world.delete(Kind::Namespace, meta(0));
    world.begin_list(Kind::Namespace);
    for n in 1..=MAX_OBJECTS {
        world.apply(Kind::Namespace, meta(n), |_| Ok(labels()));
    }
    world.end_list(Kind::Namespace);
    assert_eq!((world.left_out(Kind::Namespace), world.problem()), (0, None));
}

#[test]
fn problems_of_several_kinds_are_one_line() {
    let mut world = ClusterWorld::default();
    assert_eq!(world.problem(), None);
    for kind in [Kind::Pod, Kind::Service] {
        world.set_problem(kind, Some("connection refused".into()));
    }
    assert_eq!(
        world.problem().expect("said"),
        "API server: Service, Pod cannot be followed: connection refused"
    );
    world.set_problem(Kind::Pod, None);
    world.set_problem(Kind::Service, None);
    assert_eq!(world.problem(), None);
}

#[test]
fn a_cluster_and_a_folder_decide_alike() {
    let texts = [
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {culvert.dev/mesh: enabled}}\n".to_owned(),
        pod("a", "1", "10.0.0.1", 1),
        policy("deny", "80"),
        "apiVersion: culvert.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: other, namespace: shop}\nspec: {}\n".to_owned(),
    ];
    let mut cluster = ClusterWorld::default();
    for text in &texts {
        apply(&mut cluster, text);
    }
    cluster.decide();
    let mut folder = Registry::default();
    folder.apply(&Scan::from([("all.yaml".to_owned(), Ok(Arc::from(texts.join("---\n"))))]));
    assert_eq!(cluster.world(), folder.world());
    let said = |rejections: &[Rejection]| {
        rejections
            .iter()
            .map(|r| (r.object.clone(), r.message.clone()))
            .collect::<Vec<_>>()
    };
    assert_eq!(said(cluster.rejections()), said(folder.rejections()));
    assert_eq!(cluster.rejections().len(), 1);
}

#[test]
fn what_gets_a_status_is_told_with_what_is_wrong_with_it() {
    let of =
        |name: &str, generation: i64, port: &str| policy(name, port).replace("uid:", &format!("generation: {generation}, uid:"));
    let mut world = ClusterWorld::default();
    let told = |world: &mut ClusterWorld| {
        let marks = world.marks();
        let told = marks
            .iter()
            .map(|mark| (mark.id.name.clone(), mark.written.generation, mark.refused.clone()));
        told.collect::<Vec<_>>()
    };
    apply(&mut world, &of("a", 1, "80"));
    apply(&mut world, &of("b", 1, "0"));
    apply(&mut world, &pod("no-status", "1", "10.0.0.1", 1));
    let first = told(&mut world);
    assert_eq!(first[0], ("a".to_owned(), 1, None));
    let why = first[1].2.as_deref().expect("a refusal");
    assert!(why.contains("ports") && !why.contains("What stood before"), "{why}");
    assert_eq!(first.len(), 2);
    let before = world.marks();
    apply(&mut world, &pod("no-status", "1", "10.0.0.2", 1));
    assert!(Arc::ptr_eq(&before, &world.marks()), "nothing was said of what gets a status");
    // A new generation that says the same, one that is broken, and one that is mended.
    apply(&mut world, &of("a", 2, "80"));
    assert_eq!(told(&mut world)[0], ("a".to_owned(), 2, None));
    apply(&mut world, &of("a", 3, "0"));
    let broken = told(&mut world).remove(0);
    assert!(broken.1 == 3 && broken.2.expect("a refusal").contains("What stood before stays in force"));
    apply(&mut world, &of("b", 2, "80"));
    assert_eq!(told(&mut world)[1], ("b".to_owned(), 2, None));
    delete(&mut world, Kind::AuthorizationPolicy, "a", "u-a");
    assert_eq!(told(&mut world), [("b".to_owned(), 2, None)]);
}

#[test]
fn nobody_waits_for_what_is_advice_alone() {
    let mut world = ClusterWorld::default();
    for kind in Kind::ALL.into_iter().filter(|kind| !kind.is_advice()) {
        assert!(!world.is_complete());
        world.begin_list(kind);
        world.end_list(kind);
    }
    assert!(world.is_complete());
    world.set_problem(Kind::NetworkPolicy, Some("forbidden".into()));
    assert_eq!(world.problem(), None);
}
