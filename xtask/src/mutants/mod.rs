//! `cargo xtask test mutants`: each defence is taken away in a copy of the checkout, and the attack's test must then fail by the
//! attack's success. What is shipped has no switch for that: every mutant is a build of its own.

pub mod build;
mod engine;
#[cfg(test)]
mod index;
pub mod table;
pub mod tree;
mod verdict;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::tools;
use crate::workspace::Workspace;
use build::Built;
use table::{GROUPS, Group, Mutant, Noticed, Suite};
use tree::Tree;
use verdict::{Outcome, outcomes};

/// Of one test; it includes its waiting in vain for what the defence would have done.
const TEST_LIMIT: Duration = Duration::from_secs(120);
/// Of the chosen checks of a suite with a set-up of its own.
const SUITE_LIMIT: Duration = Duration::from_secs(300);

#[derive(Default)]
pub struct Report {
    pub noticed: usize,
    /// Mutants that no test noticed, and what else went wrong.
    pub faults: Vec<String>,
}

/// Of the mutants whose name contains the filter.
pub fn run(workspace: &Workspace, filter: Option<&str>) -> Result<Report> {
    let folder = workspace.target.join("mutants");
    let mutated = Mutated {
        main: workspace,
        tree: Tree::new(workspace, &folder.join("tree"))?,
        built: Workspace::at(folder.join("tree"), folder.join("target")),
        logs: folder.join("logs"),
    };
    std::fs::create_dir_all(&mutated.logs)?;
    build::lend_dependencies(workspace, &mutated.built)?;
    let mut report = Report::default();
    for group in &GROUPS {
        let chosen = |mutant: &&Mutant| filter.is_none_or(|filter| mutant.name.contains(filter));
        let mutants: Vec<&Mutant> = group.mutants.iter().filter(chosen).collect();
        if !mutants.is_empty() {
            mutated.judge(group, &mutants, &mut report)?;
        }
    }
    engine::run(workspace, &folder, filter, &mut report)?;
    Ok(report)
}

struct Mutated<'a> {
    main: &'a Workspace,
    tree: Tree,
    built: Workspace,
    logs: PathBuf,
}

impl Mutated<'_> {
    fn judge(&self, group: &Group, mutants: &[&Mutant], report: &mut Report) -> Result<()> {
        let start = Instant::now();
        tools::say(&format!("-- {}: building without {} defences", group.name, mutants.len()));
        self.tree.mutate(mutants)?;
        let noticed = mutants.iter().flat_map(|mutant| mutant.noticed_by);
        let mut wanted: BTreeMap<Suite, BTreeSet<&str>> = BTreeMap::new();
        for Noticed { suite, test, .. } in noticed {
            wanted.entry(*suite).or_default().insert(test);
        }
        for (suite, tests) in &mut wanted {
            let controls: Vec<&str> = group
                .controls
                .iter()
                .filter(|(of, _)| of == suite)
                .map(|(_, test)| *test)
                .collect();
            if controls.is_empty() {
                report.fault(format!("{}: no control test in {}", group.name, suite.name()));
            }
            tests.extend(controls);
        }
        let suites: Vec<Suite> = wanted.keys().copied().collect();
        let built = build::build(self.main, &self.built, &suites).with_context(|| format!("the group {}", group.name))?;
        let after_build = start.elapsed().as_secs();
        let mut ended = BTreeMap::new();
        for (suite, tests) in &wanted {
            self.test(group, &built, *suite, tests, report, &mut ended)?;
        }
        for (suite, test) in group.controls.iter().filter(|(suite, _)| wanted.contains_key(suite)) {
            let outcome = ended.get(&(*suite, *test));
            if outcome != Some(&Outcome::Passed) {
                report.fault(format!(
                    "{}: the control test {} did not pass in the mutated build, which says nothing then: {outcome:?}",
                    group.name,
                    printed(*suite, test)
                ));
            }
        }
        for mutant in mutants {
            report.judge(mutant, &ended);
        }
        let all = start.elapsed().as_secs();
        tools::say(&format!("   {after_build} s to build, {} s to test", all - after_build));
        Ok(())
    }

    fn test<'t>(
        &self,
        group: &Group,
        built: &Built,
        suite: Suite,
        tests: &BTreeSet<&'t str>,
        report: &mut Report,
        ended: &mut BTreeMap<(Suite, &'t str), Outcome>,
    ) -> Result<()> {
        let binary = built
            .tests
            .get(&suite)
            .with_context(|| format!("cargo built no {}", suite.name()))?;
        let mut run = |tests: &[&'t str], limit, log: &str| -> Result<()> {
            let mut command = Command::new(binary);
            if !suite.has_own_runner() {
                command.args(["--exact", "--test-threads=1"]);
            }
            command
                .args(tests)
                .current_dir(package(self.tree.folder(), suite))
                .env("CULVERT_BIN_DIR", self.built.binaries());
            let log = self.logs.join(format!("{log}.log"));
            let ran = build::run_limited(&mut command, &log, limit)?;
            if ran.timed_out {
                report.fault(format!(
                    "{}: {} had not ended after {limit:?}: {}",
                    group.name,
                    tests.join(", "),
                    log.display()
                ));
            }
            let mut all = outcomes(&ran.output);
            for test in tests {
                if let Some(outcome) = all.remove(&printed(suite, test)) {
                    ended.insert((suite, test), outcome);
                }
            }
            Ok(())
        };
        let tests: Vec<&'t str> = tests.iter().copied().collect();
        if suite.has_own_runner() {
            return run(&tests, SUITE_LIMIT, &format!("{}-{}", group.name, suite.name()));
        }
        for test in tests {
            let log = format!("{}-{}-{}", group.name, suite.name(), test.replace("::", "."));
            run(&[test], TEST_LIMIT, &log)?;
        }
        Ok(())
    }
}

/// A test's name as its harness prints it.
fn printed(suite: Suite, test: &str) -> String {
    if suite.has_own_runner() {
        format!("{}::{test}", suite.name())
    } else {
        test.to_owned()
    }
}

/// Where cargo would start a suite.
fn package(tree: &Path, suite: Suite) -> PathBuf {
    tree.join(match suite {
        Suite::Agent | Suite::Hooks => "mesh-agent",
        Suite::Control => "mesh-control",
        Suite::Attacks | Suite::Enrolment => "tests",
    })
}

impl Report {
    pub fn fault(&mut self, fault: String) {
        tools::say(&format!("FAULT {fault}"));
        self.faults.push(fault);
    }

    /// Every test that should notice did, by what the attack's success makes it say.
    fn judge(&mut self, mutant: &Mutant, ended: &BTreeMap<(Suite, &str), Outcome>) {
        let mut by = Vec::new();
        for Noticed { suite, test, says } in mutant.noticed_by {
            let name = format!("{}::{test}", suite.name());
            let why = match ended.get(&(*suite, *test)) {
                Some(Outcome::Failed(said)) if said.contains(says) => {
                    by.push(name);
                    continue;
                }
                Some(Outcome::Failed(said)) => format!("failed, and did not say {says:?} but:\n{said}"),
                Some(Outcome::Passed) => "passed".to_owned(),
                None => "did not run to its end".to_owned(),
            };
            self.fault(format!("{}: without {}, {name} {why}", mutant.name, mutant.without));
            return;
        }
        let (attacks, without, by) = (mutant.attacks.join(", "), mutant.without, by.join(", "));
        self.notice(&format!("{attacks}: without {without}: by {by}"));
    }

    fn notice(&mut self, what: &str) {
        self.noticed += 1;
        tools::say(&format!("   noticed: {what}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_failure_by_the_attacks_success_counts() {
        const MUTANT: Mutant = Mutant {
            name: "door",
            attacks: &["walking in"],
            without: "the lock",
            edits: &[],
            noticed_by: &[Noticed {
                suite: Suite::Hooks,
                test: "locked",
                says: "walked in",
            }],
        };
        let failed = |said: &str| Some(Outcome::Failed(said.to_owned()));
        for (outcome, noticed) in [
            (failed("panicked: walked in, from 10.0.0.1"), true),
            (failed("panicked: the house burns"), false),
            (Some(Outcome::Passed), false),
            (None, false),
        ] {
            let ended = outcome
                .clone()
                .map(|outcome| ((Suite::Hooks, "locked"), outcome))
                .into_iter()
                .collect();
            let mut report = Report::default();
            report.judge(&MUTANT, &ended);
            assert_eq!(
                (report.noticed, report.faults.len()),
                if noticed { (1, 0) } else { (0, 1) },
                "{outcome:?}"
            );
        }
    }
}
