use super::*;
use crate::limits::{MAX_DOCUMENTS, MAX_FILES, MAX_FOLDER_BYTES, MAX_LAST_GOOD_BYTES};
use crate::objects::Kind;
use crate::state_dir::StateError;

fn scan(files: &[(&str, &str)]) -> Scan {
    files
        .iter()
        .map(|(name, text)| ((*name).to_owned(), Ok(Arc::from(*text))))
        .collect()
}

fn pod(name: &str, ip: &str) -> String {
    format!("---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, uid: u-{name}}}\nstatus: {{podIPs: [{{ip: {ip}}}]}}\n")
}

fn id(name: &str) -> ObjectId {
    ObjectId {
        kind: Kind::Pod,
        namespace: "default".into(),
        name: name.into(),
    }
}

fn address(registry: &Registry, name: &str) -> Option<String> {
    let world = registry.world();
    world.get(&id(name)).map(|object| object.exclusive_addresses()[0].to_string())
}

#[test]
fn changes_and_removals_are_followed() {
    let mut registry = Registry::default();
    assert!(registry.apply(&scan(&[("a.yaml", &pod("a", "10.0.0.1")), ("b.yaml", &pod("b", "10.0.0.2"))])));
    assert_eq!(registry.world().len(), 2);
    assert!(
        !registry.apply(&scan(&[("a.yaml", &pod("a", "10.0.0.1")), ("b.yaml", &pod("b", "10.0.0.2"))])),
        "nothing new"
    );
    assert!(registry.apply(&scan(&[("a.yaml", &pod("a", "10.0.0.9"))])));
    assert_eq!(address(&registry, "a").as_deref(), Some("10.0.0.9"));
    assert_eq!(address(&registry, "b"), None);
}

#[test]
fn what_breaks_keeps_its_last_good_form_and_the_rest_moves_on() {
    let mut registry = Registry::default();
    registry.apply(&scan(&[("a.yaml", &(pod("a", "10.0.0.1") + &pod("b", "10.0.0.2")))]));
    // A field that cannot stand: only that object stays as it was.
    registry.apply(&scan(&[("a.yaml", &(pod("a", "nonsense") + &pod("b", "10.0.0.3")))]));
    assert_eq!(address(&registry, "a").as_deref(), Some("10.0.0.1"));
    assert_eq!(address(&registry, "b").as_deref(), Some("10.0.0.3"));
    let rejection = &registry.rejections()[0];
    assert_eq!(
        (rejection.file.as_str(), rejection.document, rejection.reason),
        ("a.yaml", 1, Reason::Field)
    );
    assert!(rejection.last_good_in_force && rejection.message.starts_with("status.podIPs[0].ip"));
    // A document that cannot be read at all: all that the file held stays.
    registry.apply(&scan(&[(
        "a.yaml",
        &(pod("a", "10.0.0.4").replace("metadata: {", "metadata: [") + &pod("b", "10.0.0.5")),
    )]));
    assert_eq!(address(&registry, "a").as_deref(), Some("10.0.0.1"));
    assert_eq!(address(&registry, "b").as_deref(), Some("10.0.0.5"));
    // A file that cannot be read.
    let mut unreadable = Scan::new();
    unreadable.insert("a.yaml".into(), Err("is not UTF-8".into()));
    registry.apply(&unreadable);
    assert_eq!(registry.world().len(), 2);
    assert_eq!(registry.rejections()[0].reason, Reason::File);
    // Mended.
    registry.apply(&scan(&[("a.yaml", &pod("a", "10.0.0.6"))]));
    assert_eq!(address(&registry, "a").as_deref(), Some("10.0.0.6"));
    assert_eq!(address(&registry, "b"), None);
    assert!(registry.rejections().is_empty());
}

#[test]
fn a_broken_file_at_first_stops_no_other() {
    let mut registry = Registry::default();
    registry.apply(&scan(&[("a.yaml", "{{{"), ("b.yaml", &pod("b", "10.0.0.2"))]));
    assert_eq!(registry.world().len(), 1);
    assert!(!registry.rejections()[0].last_good_in_force);
}

#[test]
fn of_two_definitions_the_first_stays() {
    let mut registry = Registry::default();
    registry.apply(&scan(&[("z.yaml", &pod("a", "10.0.0.1"))]));
    registry.apply(&scan(&[("b.yaml", &pod("a", "10.0.0.2")), ("z.yaml", &pod("a", "10.0.0.1"))]));
    assert_eq!(
        address(&registry, "a").as_deref(),
        Some("10.0.0.1"),
        "there first, though its file sorts last"
    );
    assert_eq!(registry.rejections().len(), 1);
    assert_eq!(
        (registry.rejections()[0].file.as_str(), registry.rejections()[0].reason),
        ("b.yaml", Reason::Conflict)
    );
    // Within one file the first document is the object.
    let mut registry = Registry::default();
    registry.apply(&scan(&[("a.yaml", &(pod("a", "10.0.0.1") + &pod("a", "10.0.0.2")))]));
    assert_eq!(address(&registry, "a").as_deref(), Some("10.0.0.1"));
    assert_eq!(registry.rejections()[0].document, 2);
    // The loser takes over when the winner goes.
    let mut registry = Registry::default();
    registry.apply(&scan(&[("a.yaml", &pod("a", "10.0.0.1")), ("b.yaml", &pod("a", "10.0.0.2"))]));
    registry.apply(&scan(&[("b.yaml", &pod("a", "10.0.0.2"))]));
    assert_eq!(address(&registry, "a").as_deref(), Some("10.0.0.2"));
    assert!(registry.rejections().is_empty());
}

#[test]
fn an_address_belongs_to_whom_had_it_first() {
    let mut registry = Registry::default();
    registry.apply(&scan(&[("b.yaml", &pod("b", "10.0.0.1"))]));
    registry.apply(&scan(&[("a.yaml", &pod("a", "10.0.0.1")), ("b.yaml", &pod("b", "10.0.0.1"))]));
    assert_eq!(address(&registry, "a"), None);
    assert_eq!(
        registry.rejections()[0].message,
        "status.podIPs: 10.0.0.1 belongs to Pod default/b already"
    );
    // One that is in force and turns into a contradiction keeps its last good form.
    registry.apply(&scan(&[("a.yaml", &pod("a", "10.0.0.2")), ("b.yaml", &pod("b", "10.0.0.1"))]));
    registry.apply(&scan(&[("a.yaml", &pod("a", "10.0.0.1")), ("b.yaml", &pod("b", "10.0.0.1"))]));
    assert_eq!(address(&registry, "a").as_deref(), Some("10.0.0.2"));
    assert!(registry.rejections()[0].last_good_in_force);
    // Two that swap in one change contradict nothing.
    registry.apply(&scan(&[("a.yaml", &pod("a", "10.0.0.2")), ("b.yaml", &pod("b", "10.0.0.1"))]));
    registry.apply(&scan(&[("a.yaml", &pod("a", "10.0.0.1")), ("b.yaml", &pod("b", "10.0.0.2"))]));
    assert_eq!(address(&registry, "a").as_deref(), Some("10.0.0.1"));
    assert!(registry.rejections().is_empty());
    // Services and Pods exclude each other, Pods on the host's network do not.
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: s}\nspec: {clusterIP: 10.0.0.1}\n";
    let host = "apiVersion: v1\nkind: Pod\nmetadata: {name: h}\nspec: {hostNetwork: true}\nstatus: {podIP: 10.0.0.1}\n";
    registry.apply(&scan(&[
        ("a.yaml", &pod("a", "10.0.0.1")),
        ("s.yaml", service),
        ("h.yaml", host),
    ]));
    assert_eq!(registry.rejections().len(), 1);
    assert_eq!(registry.rejections()[0].file, "s.yaml");
    assert_eq!(registry.world().len(), 2);
}

#[test]
fn a_uid_belongs_to_whom_had_it_first() {
    let twin = |name: &str, uid: &str, ip: &str| {
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, uid: {uid}, labels: {{culvert.dev/mesh: disabled}}}}\n\
             status: {{podIPs: [{{ip: {ip}}}]}}\n"
        )
    };
    let mut registry = Registry::default();
    registry.apply(&scan(&[("victim.yaml", &pod("a", "10.0.0.1"))]));
    registry.apply(&scan(&[
        ("0.yaml", &twin("z", "u-a", "10.0.0.2")),
        ("victim.yaml", &pod("a", "10.0.0.1")),
    ]));
    assert_eq!((address(&registry, "a").is_some(), address(&registry, "z")), (true, None));
    assert_eq!(registry.rejections()[0].reason, Reason::Conflict);
    assert_eq!(
        registry.rejections()[0].message,
        "metadata.uid: u-a belongs to Pod default/a already"
    );
    // An older Pod that takes it over in the moment in which its owner changes, too.
    let mut registry = Registry::default();
    registry.apply(&scan(&[("0.yaml", &twin("z", "u-z", "10.0.0.2"))]));
    registry.apply(&scan(&[
        ("0.yaml", &twin("z", "u-z", "10.0.0.2")),
        ("victim.yaml", &pod("a", "10.0.0.1")),
    ]));
    registry.apply(&scan(&[
        ("0.yaml", &twin("z", "u-a", "10.0.0.2")),
        ("victim.yaml", &pod("a", "10.0.0.9")),
    ]));
    assert_eq!(address(&registry, "a").as_deref(), Some("10.0.0.9"));
    assert_eq!(registry.rejections()[0].file, "0.yaml");
    // Pods without one are told apart by their names.
    let mut registry = Registry::default();
    let nameless = |name: &str, ip: &str| pod(name, ip).replace(&format!(", uid: u-{name}"), "");
    registry.apply(&scan(&[
        ("a.yaml", &nameless("a", "10.0.0.1")),
        ("b.yaml", &nameless("b", "10.0.0.2")),
    ]));
    assert_eq!(registry.world().len(), 2);
}

#[test]
fn an_empty_folder_after_a_full_one_is_none_that_was_read() {
    let full = pod("a", "10.0.0.1");
    for empty in [
        scan(&[]),
        scan(&[("a.yaml", "")]),
        scan(&[("other.yaml", "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n")]),
    ] {
        let mut registry = Registry::default();
        assert!(!registry.apply(&empty) && !registry.emptied(), "nothing was there yet");
        registry.apply(&scan(&[("a.yaml", &full)]));
        assert!(!registry.apply(&empty), "nothing changes");
        assert!(registry.emptied());
        assert_eq!(address(&registry, "a").as_deref(), Some("10.0.0.1"));
        // Mounted again.
        assert!(!registry.apply(&scan(&[("a.yaml", &full)])) && !registry.emptied());
        // Also when a restart lies between.
        let mut after = Registry::default().filled_before();
        assert!(!after.apply(&empty) && after.emptied());
        // Emptied for good: something is left.
        let last = "apiVersion: v1\nkind: Namespace\nmetadata: {name: last}\n";
        assert!(registry.apply(&scan(&[("last.yaml", last)])) && !registry.emptied());
        assert_eq!((registry.world().len(), address(&registry, "a")), (1, None));
    }
}

fn restarted(registry: &Registry) -> Registry {
    let state_dir = tempfile::tempdir().expect("directory");
    let state = crate::state_dir::StateDir::open(&state_dir.path().join("state")).expect("state directory");
    LastGood::save(registry.last_good().as_ref(), &state, MAX_LAST_GOOD_BYTES).expect("written");
    let saved = LastGood::load(&state, MAX_LAST_GOOD_BYTES).expect("read");
    assert_eq!(saved, registry.last_good());
    saved.map(Registry::restore).unwrap_or_default()
}

#[test]
fn a_restart_keeps_last_good_forms_and_who_was_first() {
    let broken = pod("a", "nonsense") + &pod("b", "10.0.0.3");
    let mut registry = Registry::default();
    registry.apply(&scan(&[("a.yaml", &(pod("a", "10.0.0.1") + &pod("b", "10.0.0.2")))]));
    assert_eq!(registry.last_good(), None, "the folder says all");
    registry.apply(&scan(&[("a.yaml", &broken)]));
    registry.apply(&scan(&[("a.yaml", &broken), ("z.yaml", &pod("c", "10.0.0.4"))]));
    let contested = [
        ("0.yaml", pod("c", "10.0.0.5")),
        ("a.yaml", broken),
        ("b.yaml", pod("d", "10.0.0.4")),
        ("z.yaml", pod("c", "10.0.0.4")),
    ];
    let contested: Vec<(&str, &str)> = contested.iter().map(|(file, text)| (*file, text.as_str())).collect();
    registry.apply(&scan(&contested));
    let mut after = restarted(&registry);
    after.apply(&scan(&contested));
    for (name, ip) in [
        ("a", Some("10.0.0.1")),
        ("b", Some("10.0.0.3")),
        ("c", Some("10.0.0.4")),
        ("d", None),
    ] {
        assert_eq!(address(&registry, name).as_deref(), ip, "{name}");
        assert_eq!(address(&after, name).as_deref(), ip, "{name} after a restart");
    }
    assert_eq!(after.rejections(), registry.rejections());
    assert_eq!(after.last_good().map(|kept| kept.texts_of("a.yaml")), Some(2));
    // What left the folder while nobody looked is gone; what was mended counts.
    let mut after = restarted(&registry);
    after.apply(&scan(&[("a.yaml", &pod("a", "10.0.0.9"))]));
    assert_eq!(address(&after, "a").as_deref(), Some("10.0.0.9"));
    assert_eq!(after.world().len(), 1);
    assert_eq!(after.last_good(), None);
}

#[test]
fn a_folder_is_read_one_level_deep_and_links_stay_inside() {
    let dir = tempfile::tempdir().expect("directory");
    let folder = dir.path().join("registry");
    std::fs::create_dir_all(folder.join("..data")).expect("sub-folder");
    std::fs::create_dir(folder.join("sub.yaml")).expect("a folder with a manifest's name");
    std::fs::write(folder.join("a.yaml"), "a").expect("file");
    std::fs::write(folder.join("notes.txt"), "no manifest").expect("file");
    std::fs::write(folder.join(".a.yaml.swp.yaml"), "an editor's").expect("file");
    std::fs::write(folder.join("..data/b.json"), "b").expect("file");
    std::fs::write(dir.path().join("outside.yaml"), "secret").expect("file");
    std::os::unix::fs::symlink("..data/b.json", folder.join("b.json")).expect("link");
    std::os::unix::fs::symlink("../outside.yaml", folder.join("c.yml")).expect("link");
    std::fs::write(folder.join("d.yaml"), [0xff, 0xfe]).expect("file");
    std::fs::write(folder.join("e.yaml"), vec![b' '; crate::limits::MAX_FILE_BYTES as usize + 1]).expect("file");
    let scan = Folder::new(&folder, MAX_FOLDER_BYTES).scan().expect("scan");
    assert_eq!(
        scan.keys().collect::<Vec<_>>(),
        ["a.yaml", "b.json", "c.yml", "d.yaml", "e.yaml"]
    );
    assert_eq!(scan["b.json"].as_deref(), Ok("b"));
    for (file, problem) in [
        ("c.yml", "outside the registry folder"),
        ("d.yaml", "is not UTF-8"),
        ("e.yaml", "is larger than 1024 KiB"),
    ] {
        assert!(scan[file].as_ref().expect_err("refused").contains(problem), "{file}");
    }
    let missing = Folder::new(&dir.path().join("missing"), MAX_FOLDER_BYTES);
    let missing = missing.scan().expect_err("missing");
    assert!(missing.to_string().contains("missing"));
}

#[test]
fn files_and_documents_are_bounded() {
    let folder = tempfile::tempdir().unwrap();
    for number in 0..=MAX_FILES {
        std::fs::write(folder.path().join(format!("{number:05}.yaml")), "").unwrap();
    }
    let scan = Folder::new(folder.path(), MAX_FOLDER_BYTES).scan().unwrap();
    let refused: Vec<_> = scan.iter().filter(|(_, content)| content.is_err()).collect();
    let [(file, content)] = refused[..] else {
        panic!("{} files refused", refused.len());
    };
    assert_eq!(*file, format!("{MAX_FILES:05}.yaml"), "what sorts last");
    assert!(content.as_ref().unwrap_err().contains("4096"), "{content:?}");

    let document = "apiVersion: v1\nkind: Namespace\nmetadata: { name: a }\n---\n";
    for (count, refused) in [(MAX_DOCUMENTS, 0), (MAX_DOCUMENTS + 5, 1)] {
        let parsed = manifest::parse_file(&document.repeat(count));
        let refusals = parsed.documents.iter().filter(|document| document.content.is_err());
        assert_eq!(refusals.count(), refused, "of {count} documents");
        assert_eq!(parsed.documents.len(), MAX_DOCUMENTS + refused);
    }
}

#[test]
fn the_bytes_of_a_folder_are_bounded_and_what_sorts_last_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let text = pod("a", "10.0.0.1");
    for file in ["a.yaml", "b.yaml", "c.yaml"] {
        std::fs::write(folder.path().join(file), &text).unwrap();
    }
    let within = |bytes| Folder::new(folder.path(), bytes).scan().unwrap();
    let of_three = 3 * text.len() as u64;
    assert!(within(of_three).values().all(Result::is_ok), "exactly as many");
    let scan = within(of_three - 1);
    assert!(scan["a.yaml"].is_ok() && scan["b.yaml"].is_ok());
    let said = scan["c.yaml"].as_ref().expect_err("refused");
    assert!(said.contains(&format!("more than {} bytes", of_three - 1)), "{said}");
}

#[test]
fn last_good_forms_beyond_their_bound_are_not_written_and_those_kept_before_stay() {
    let dir = tempfile::tempdir().unwrap();
    let state = crate::state_dir::StateDir::open(&dir.path().join("state")).unwrap();
    let mut registry = Registry::default();
    registry.apply(&scan(&[("a.yaml", &pod("a", "10.0.0.1"))]));
    registry.apply(&scan(&[("a.yaml", &pod("a", "nonsense"))]));
    let kept = registry.last_good().expect("something is broken");
    let bytes = serde_json::to_vec(&kept).unwrap().len() as u64;
    LastGood::save(Some(&kept), &state, bytes).expect("exactly as many");
    assert_eq!(LastGood::load(&state, bytes).unwrap(), Some(kept.clone()));

    let more = pod("a", "nonsense") + &pod("b", "10.0.0.2");
    registry.apply(&scan(&[("a.yaml", &more)]));
    registry.apply(&scan(&[("a.yaml", &(more + &pod("b", "10.0.0.3")))]));
    let larger = registry.last_good().expect("something is broken");
    let refused = LastGood::save(Some(&larger), &state, bytes).expect_err("refused");
    assert!(matches!(refused, StateError::TooLarge { .. }), "{refused}");
    assert!(refused.to_string().contains(&format!("more than {bytes} bytes")), "{refused}");
    assert_eq!(LastGood::load(&state, bytes).unwrap(), Some(kept), "as it was");
    // Nor is one read that something else has made so large.
    assert!(LastGood::load(&state, bytes - 1).is_err());
}
