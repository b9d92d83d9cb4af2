//! Waiting: always for a condition, always with a deadline, always saying what was waited for.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

const INTERVAL: Duration = Duration::from_millis(25);

/// For what normally takes milliseconds; generous because the machine may have two cores and other work.
pub const SOON: Duration = Duration::from_secs(20);

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Makes every wait fail: somebody pressed Ctrl-C, and the owners must get to clean up.
pub fn interrupt() {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

#[must_use]
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Asks until there is an answer.
///
/// # Errors
/// The deadline passed: tells what was waited for and the last error seen.
pub fn until<T>(what: &str, deadline: Duration, mut ask: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    let mut last_error = None;
    loop {
        match ask() {
            Ok(Some(answer)) => return Ok(answer),
            Ok(None) => {}
            Err(error) => last_error = Some(error),
        }
        if interrupted() {
            bail!("interrupted");
        }
        if start.elapsed() >= deadline {
            return match last_error {
                Some(error) => Err(error.context(format!("waited {deadline:?} in vain: {what}"))),
                None => bail!("waited {deadline:?} in vain: {what}"),
            };
        }
        std::thread::sleep(INTERVAL);
    }
}

/// As [`until`], for a condition.
///
/// # Errors
/// The deadline passed.
pub fn until_true(what: &str, deadline: Duration, mut ask: impl FnMut() -> Result<bool>) -> Result<()> {
    until(what, deadline, || Ok(ask()?.then_some(())))
}
