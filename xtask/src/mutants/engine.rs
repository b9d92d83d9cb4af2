//! Mutants of the policy engine. It is pure, so each is compiled by itself, with its tests and the one module that it needs, in a
//! second instead of a build of the agent.

mod mutations;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::Report;
use super::build::{Built, build, run_limited};
use super::table::{Edit, Suite};
use super::tree::edited;
use super::verdict::{Outcome, outcomes};
use crate::tools;
use crate::workspace::Workspace;
use mutations::MUTATIONS;

const POLICY: &str = "mesh-agent/src/policy";
const ENGINE: &str = "mesh-agent/src/policy/mod.rs";
const IDENTITY: &str = "mesh-agent/src/identity/mod.rs";
/// Always the same cases: what it notices once it notices always.
const ORACLE: &str = "policy::tests::against_oracle::fixed_cases_are_decided_as_the_oracle_says";
const SAYS: &str = "the module and the oracle differ";
const CRATES: [&str; 3] = ["ipnet", "proptest", "thiserror"];
/// Of a compiler or a test.
const LIMIT: Duration = Duration::from_secs(120);

/// A change of one expression, which changes a decision.
pub struct Mutation {
    pub name: &'static str,
    pub from: &'static str,
    pub to: &'static str,
}

/// What one mutation came to; an error tells what was said instead.
type Judged = Result<(), String>;

pub fn run(workspace: &Workspace, folder: &Path, filter: Option<&str>, report: &mut Report) -> Result<()> {
    let chosen: Vec<&Mutation> = MUTATIONS
        .iter()
        .filter(|mutation| filter.is_none_or(|filter| format!("policy engine: {}", mutation.name).contains(filter)))
        .collect();
    if chosen.is_empty() {
        return Ok(());
    }
    let start = Instant::now();
    tools::say(&format!("-- the policy engine: {} mutations against {ORACLE}", chosen.len()));
    let bench = Bench {
        engine: read(workspace, ENGINE)?,
        identity: alone(&read(workspace, IDENTITY)?),
        tests: workspace.root.join(POLICY),
        libraries: build(workspace, workspace, &[Suite::Agent])?,
        folder: folder.join("engine"),
    };
    // The control: compiled alone and unchanged, the engine is as the oracle says.
    match bench.outcome("control", &bench.engine)? {
        Outcome::Passed => {}
        Outcome::Failed(said) => bail!("the unchanged engine is not as the oracle says:\n{said}"),
    }
    for (mutation, judged) in bench.judge(&chosen)? {
        match judged {
            Ok(()) => report.notice(mutation.name),
            Err(why) => report.fault(format!("policy engine: {}: {why}", mutation.name)),
        }
    }
    tools::say(&format!("   {} s", start.elapsed().as_secs()));
    Ok(())
}

fn read(workspace: &Workspace, file: &'static str) -> Result<String> {
    std::fs::read_to_string(workspace.root.join(file)).context(file)
}

/// The identities' own module without those that lie below it, which do I/O.
fn alone(identity: &str) -> String {
    identity
        .lines()
        .filter(|line| !line.starts_with("pub mod "))
        .collect::<Vec<_>>()
        .join("\n")
}

struct Bench {
    engine: String,
    identity: String,
    /// Where the engine's tests lie: they are compiled as they are.
    tests: PathBuf,
    libraries: Built,
    folder: PathBuf,
}

impl Bench {
    /// As many at once as there are processors.
    fn judge<'m>(&self, mutations: &[&'m Mutation]) -> Result<Vec<(&'m Mutation, Judged)>> {
        let next = AtomicUsize::new(0);
        let judged = Mutex::new(Vec::new());
        let worker = || -> Result<()> {
            while let Some(mutation) = mutations.get(next.fetch_add(1, Ordering::Relaxed)) {
                let outcome = self.mutated(mutation)?;
                let result = match outcome {
                    Outcome::Failed(said) if said.contains(SAYS) => Ok(()),
                    Outcome::Failed(said) => Err(format!("failed otherwise:\n{said}")),
                    Outcome::Passed => Err("the oracle test passed".to_owned()),
                };
                judged
                    .lock()
                    .map_err(|_| anyhow::anyhow!("a worker panicked"))?
                    .push((*mutation, result));
            }
            Ok(())
        };
        let workers = std::thread::available_parallelism().map_or(1, Into::into);
        std::thread::scope(|scope| {
            let started: Vec<_> = (0..workers).map(|_| scope.spawn(worker)).collect();
            started
                .into_iter()
                .try_for_each(|started| started.join().map_err(|_| anyhow::anyhow!("a worker panicked"))?)
        })?;
        judged.into_inner().map_err(|_| anyhow::anyhow!("a worker panicked"))
    }

    fn mutated(&self, mutation: &Mutation) -> Result<Outcome> {
        let edit = Edit {
            file: ENGINE,
            from: mutation.from,
            to: mutation.to,
        };
        let text = edited(&self.engine, &edit).with_context(|| format!("the mutation {}", mutation.name))?;
        self.outcome(&mutation.name.replace(|c: char| !c.is_ascii_alphanumeric(), "-"), &text)
    }

    /// What the oracle's test says of an engine.
    fn outcome(&self, name: &str, engine: &str) -> Result<Outcome> {
        let folder = self.folder.join(name);
        let policy = folder.join("policy");
        std::fs::create_dir_all(policy.join("tests"))?;
        std::fs::write(folder.join("main.rs"), "mod identity;\nmod policy;\n")?;
        std::fs::write(folder.join("identity.rs"), &self.identity)?;
        std::fs::write(policy.join("mod.rs"), engine)?;
        for file in ["tests.rs", "tests/against_oracle.rs", "tests/oracle.rs"] {
            std::fs::copy(self.tests.join(file), policy.join(file))?;
        }
        let binary = folder.join("test");
        let mut rustc = Command::new("rustc");
        rustc
            .args(["--edition=2024", "--test", "-Cdebuginfo=0", "-Awarnings", "-o"])
            .arg(&binary)
            .arg(folder.join("main.rs"));
        for name in CRATES {
            let library = self
                .libraries
                .libraries
                .get(name)
                .with_context(|| format!("cargo built no {name}"))?;
            rustc.arg("--extern").arg(format!("{name}={}", library.display()));
            let near = library.parent().context("a library lies in a folder")?;
            rustc.arg("-L").arg(format!("dependency={}", near.display()));
        }
        let compiled = run_limited(&mut rustc, &folder.join("rustc.log"), LIMIT)?;
        if !compiled.succeeded {
            bail!("{name}: a mutant must compile:\n{}", compiled.output);
        }
        let ran = run_limited(
            Command::new(&binary).args(["--exact", ORACLE]),
            &folder.join("test.log"),
            LIMIT,
        )?;
        outcomes(&ran.output).remove(ORACLE).with_context(|| {
            format!(
                "{name}: the oracle's test did not end within {LIMIT:?}, or is gone:\n{}",
                ran.output
            )
        })
    }
}
