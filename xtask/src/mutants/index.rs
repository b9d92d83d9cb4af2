//! docs/ATTACKS.md, the mutants and the tests tell the same. That needs no build, and so is a unit test.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::table::{GROUPS, Group, Mutant, Noticed, Suite};
use super::tree::edited;

/// Names of tests and of mutants, by attack.
type Index = BTreeMap<String, (BTreeSet<String>, BTreeSet<String>)>;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn read(file: &str) -> String {
    std::fs::read_to_string(root().join(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

fn mutants() -> impl Iterator<Item = &'static Mutant> {
    GROUPS.iter().flat_map(|group| group.mutants)
}

fn of_table() -> Index {
    let mut index = Index::new();
    for mutant in mutants() {
        for attack in mutant.attacks {
            let (tests, names) = index.entry((*attack).to_owned()).or_default();
            names.insert(mutant.name.to_owned());
            let tests_of = mutant.noticed_by.iter();
            tests.extend(tests_of.map(|Noticed { suite, test, .. }| format!("{}::{test}", suite.name())));
        }
    }
    index
}

fn of_document() -> Index {
    let names = |cell: &str| cell.split(", ").map(|name| name.trim_matches('`').to_owned()).collect();
    read("docs/ATTACKS.md")
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| attack |") && !line.starts_with("| --- |"))
        .map(|line| {
            let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
            let [attack, tried_by, stopped_by, tests, mutants] = cells[..] else {
                panic!("five columns are expected: {line}");
            };
            assert!(!tried_by.is_empty() && !stopped_by.is_empty(), "{line}");
            (attack.to_owned(), (names(tests), names(mutants)))
        })
        .collect()
}

/// Where a test is, and how it begins there.
fn exists(suite: Suite, test: &str) -> bool {
    let mut path: Vec<&str> = test.split("::").collect();
    let name = path.pop().unwrap();
    let (files, text) = match suite {
        Suite::Attacks | Suite::Enrolment => (vec![format!("tests/tests/{}.rs", suite.name())], format!("\"{name}\",")),
        Suite::Hooks if path.is_empty() => (vec!["mesh-agent/tests/hooks.rs".to_owned()], format!("fn {name}(")),
        Suite::Hooks => (
            vec![format!("mesh-agent/tests/hooks/{}.rs", path.join("/"))],
            format!("fn {name}("),
        ),
        Suite::Agent | Suite::Control => {
            let krate = if suite == Suite::Agent { "mesh-agent" } else { "mesh-control" };
            let path = path.join("/");
            (
                vec![format!("{krate}/src/{path}.rs"), format!("{krate}/src/{path}/mod.rs")],
                format!("fn {name}("),
            )
        }
    };
    let texts = files
        .iter()
        .filter_map(|file| std::fs::read_to_string(root().join(file)).ok());
    texts.into_iter().any(|there| there.contains(&text))
}

#[test]
fn the_document_and_the_mutants_name_the_same() {
    let (table, document) = (of_table(), of_document());
    for (attack, (tests, mutants)) in &table {
        let (shown, named) = document
            .get(attack)
            .unwrap_or_else(|| panic!("docs/ATTACKS.md has no {attack:?}"));
        assert_eq!((shown, named), (tests, mutants), "{attack}");
    }
    let unknown: Vec<&String> = document.keys().filter(|attack| !table.contains_key(*attack)).collect();
    assert!(unknown.is_empty(), "no mutant names {unknown:?}");
}

#[test]
fn each_test_is_there() {
    let noticed = mutants()
        .flat_map(|mutant| mutant.noticed_by)
        .map(|noticed| (noticed.suite, noticed.test));
    let controls = GROUPS.iter().flat_map(|group| group.controls.iter().copied());
    for (suite, test) in noticed.chain(controls) {
        assert!(exists(suite, test), "{}::{test} is nowhere", suite.name());
    }
    assert!(!exists(Suite::Hooks, "attacks::no_such_test"));
}

#[test]
fn each_text_to_replace_occurs_once() {
    for Group { mutants, .. } in &GROUPS {
        let mut texts = BTreeMap::new();
        for (mutant, edit) in mutants
            .iter()
            .flat_map(|mutant| mutant.edits.iter().map(move |edit| (mutant, edit)))
        {
            let text = texts.entry(edit.file).or_insert_with(|| read(edit.file));
            *text = edited(text, edit).unwrap_or_else(|error| panic!("the mutant {}: {error}", mutant.name));
        }
    }
}

/// A test that two mutants of one build are to fail would be decided by either.
#[test]
fn each_test_is_decided_by_one_mutant_of_its_group() {
    let mut names = BTreeSet::new();
    for group in &GROUPS {
        let mut deciders: BTreeMap<(Suite, &str), &str> = BTreeMap::new();
        for mutant in group.mutants {
            assert!(names.insert(mutant.name), "two mutants are named {}", mutant.name);
            for noticed in mutant.noticed_by {
                let other = deciders.insert((noticed.suite, noticed.test), mutant.name);
                assert_eq!(other, None, "{} is to fail for {} as well", noticed.test, mutant.name);
            }
        }
    }
}
