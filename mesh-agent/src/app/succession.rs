//! What becomes of an agent that was taken over from, should its successor be gone for good.

use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use http::StatusCode;
use tokio::signal::unix::Signal;

use crate::admin::Page;
use crate::local;

/// A successor that was killed and is started again has as long before its predecessor takes its place.
const ABANDONED_LOOK: Duration = Duration::from_millis(500);
const ABANDONED_LOOKS: u32 = 6;

/// What becomes of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Done,
    StartAgain,
}

/// Until nobody has had the run directory for a while, though it is there: a rollout whose new agent fails ends with this one, which
/// has given everything up.
pub(super) async fn abandoned(run_dir: &Path) {
    let mut looks = 0;
    while looks < ABANDONED_LOOKS {
        tokio::time::sleep(ABANDONED_LOOK).await;
        looks = if local::is_abandoned(run_dir) { looks + 1 } else { 0 };
    }
}

/// Of one that was taken over from. `stands_by`: the run directory, of which it waits whether somebody has it; it would serve again,
/// should the other fail, and is not to be ended before the other is ready.
pub(super) fn readiness(stands_by: Option<&Path>) -> Page {
    let (status, text) = match stands_by {
        Some(run_dir) if local::has_left(run_dir) => (StatusCode::SERVICE_UNAVAILABLE, "missing: the mesh has left this node\n"),
        Some(_) => (StatusCode::OK, "another agent has taken over\n"),
        None => (StatusCode::SERVICE_UNAVAILABLE, "missing: another agent has taken over\n"),
    };
    Page::text(status, text.to_owned())
}

/// An end that was asked for meanwhile is not passed over.
pub(super) async fn unless_told_to_end(terminate: &mut Signal, interrupt: &mut Signal) -> End {
    tokio::select! {
        biased;
        _ = terminate.recv() => End::Done,
        _ = interrupt.recv() => End::Done,
        () = std::future::ready(()) => End::StartAgain,
    }
}

/// In place: whoever watches over this process would take its time to start another. Returns only if that fails.
pub(super) fn start_again() -> anyhow::Result<()> {
    // The program that this is, also where its file is gone by now.
    let program = std::env::current_exe()?;
    let program = if program.exists() { program } else { "/proc/self/exe".into() };
    let error = Command::new(program).args(std::env::args_os().skip(1)).exec();
    Err(error).context("starting again")
}
