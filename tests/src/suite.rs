//! A runner for checks that share one expensive set-up. Its output is that of Rust's own test harness, so that people and
//! `cargo xtask test` read it alike; unlike it, what is shared is dropped at the end, and checks run one after the other.

use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;

use crate::requirements;

/// What a check ends with that cannot run on this machine.
#[derive(Debug)]
struct Skipped(String);

impl std::fmt::Display for Skipped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skipped {}

/// Ends a check, or with the set-up a whole suite, as skipped: it is counted and said, and in CI it is a failure.
#[must_use]
pub fn skip(why: &str) -> anyhow::Error {
    Skipped(why.to_owned()).into()
}

/// A named check on what the suite shares.
pub type Check<T> = (&'static str, fn(&mut T) -> Result<()>);

/// Runs a suite: the set-up, every check (those whose `suite::name` contains an argument, if there is one), the tear-down. A machine that
/// lacks something skips all checks, saying what it lacks.
#[must_use]
pub fn run<T>(
    suite: &str,
    set_up: impl FnOnce() -> Result<T>,
    explain: fn(&T, anyhow::Error) -> anyhow::Error,
    checks: &[Check<T>],
) -> ExitCode {
    let filters: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with('-'))
        .collect();
    let chosen: Vec<&Check<T>> = checks
        .iter()
        .filter(|(name, _)| {
            let name = format!("{suite}::{name}");
            filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()))
        })
        .collect();
    if std::env::args().any(|argument| argument == "--list") {
        for (name, _) in &chosen {
            say(&format!("{suite}::{name}: test"));
        }
        return ExitCode::SUCCESS;
    }
    say(&format!("\nrunning {} tests", chosen.len()));
    let missing = requirements::missing();
    if !missing.is_empty() {
        for (name, _) in &chosen {
            say(&format!("SKIPPED: {suite}::{name}: missing {}", missing.join("; ")));
        }
        return summary(0, 0, chosen.len());
    }
    if chosen.is_empty() {
        return summary(0, 0, 0);
    }
    let mut shared = match guarded(set_up) {
        Ok(shared) => shared,
        Err(error) if error.is::<Skipped>() => {
            for (name, _) in &chosen {
                say(&format!("SKIPPED: {suite}::{name}: {error}"));
            }
            return summary(0, 0, chosen.len());
        }
        Err(error) => {
            say(&format!("the set-up of {suite} failed: {error:#}"));
            for (name, _) in &chosen {
                say(&format!("test {suite}::{name} ... FAILED"));
            }
            return summary(0, chosen.len(), 0);
        }
    };
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for (name, check) in chosen {
        let start = Instant::now();
        match guarded(|| check(&mut shared)) {
            Ok(()) => {
                passed += 1;
                say(&format!(
                    "test {suite}::{name} ... ok ({:.1} s)",
                    start.elapsed().as_secs_f32()
                ));
            }
            Err(error) if error.is::<Skipped>() => {
                skipped += 1;
                say(&format!("SKIPPED: {suite}::{name}: {error}"));
            }
            Err(error) => {
                failed += 1;
                say(&format!("test {suite}::{name} ... FAILED\n{:#}", explain(&shared, error)));
            }
        }
    }
    drop(shared);
    summary(passed, failed, skipped)
}

/// A panic is a failure like any other.
fn guarded<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|panic| {
        let message = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or(panic.downcast_ref::<&str>().copied());
        Err(anyhow::anyhow!("panicked: {}", message.unwrap_or("without a message")))
    })
}

fn summary(passed: usize, failed: usize, skipped: usize) -> ExitCode {
    let verdict = if failed == 0 { "ok" } else { "FAILED" };
    say(&format!(
        "\ntest result: {verdict}. {passed} passed; {failed} failed; {skipped} ignored; 0 measured; 0 filtered out"
    ));
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::from(101) }
}

/// A line of the suite's output: what was measured.
pub fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}
