//! The demo: brings up the mesh, proves each claim with evidence gathered then and there, and leaves it to play with.

pub mod claims;
mod report;
pub mod running;

use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{SigSet, Signal};

use crate::mesh::{Mesh, PodSpec};
use crate::topology::NodeName;
use crate::{poll, requirements};
use report::Report;
use running::Running;

/// The demo's Pods: a client, a server on the other node, one on the same node, and one that is not in the mesh.
pub const PODS: [PodSpec; 4] = [
    PodSpec::new("client", NodeName::One, 10, true),
    PodSpec::new("local", NodeName::One, 11, true),
    PodSpec::new("outsider", NodeName::One, 12, false),
    PodSpec::new("server", NodeName::Two, 20, true),
];

const INTERRUPTED: &str = "interrupted before every claim was proven; everything that was made is removed";

/// Brings everything up, proves the claims, and (unless only checking) waits for Ctrl-C.
///
/// # Errors
/// What is missing on this machine, or the first step that failed, with what was expected and seen.
pub fn run(check_only: bool) -> Result<()> {
    let missing = requirements::missing();
    if !missing.is_empty() {
        bail!("the demo cannot run here; missing:\n  - {}", missing.join("\n  - "));
    }
    let signals = catch_interrupts()?;
    let start = Instant::now();
    let mut report = Report::new();
    report.heading("Bringing up a mesh of two nodes on this machine");
    let mut mesh = Mesh::start(&PODS, &mut |step| report.progress(step))?;
    report.progress("each Pod serves: mesh-test-app, a small HTTP and echo server of this repository, as an unprivileged user");
    report.heading("What it does, each claim with the evidence just gathered");
    for claim in claims::ALL {
        if poll::interrupted() {
            bail!(INTERRUPTED);
        }
        match (claim.prove)(&mut mesh) {
            Ok(evidence) => report.proven(claim.says, &evidence),
            Err(_) if poll::interrupted() => bail!(INTERRUPTED),
            Err(error) => {
                report.failed(claim.says, &error);
                return Err(mesh.with_logs(error));
            }
        }
    }
    let (claims, seconds) = (claims::ALL.len(), start.elapsed().as_secs_f32());
    report.heading(&format!("All {claims} claims hold ({seconds:.0} s)"));
    if !check_only {
        let _running = Running::announce(&mesh)?;
        report.try_this(&mesh);
        signals.recv().context("waiting for Ctrl-C")?;
        report.heading("Tidying up");
    }
    Ok(())
}

/// Ctrl-C ends every wait with an error instead of ending the process, so that what was made is removed.
fn catch_interrupts() -> Result<std::sync::mpsc::Receiver<Signal>> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signals.add(signal);
    }
    // Before any other thread starts: they inherit the mask.
    signals.thread_block().context("blocking signals")?;
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        while let Ok(signal) = signals.wait() {
            poll::interrupt();
            let _ = sender.send(signal);
        }
    });
    Ok(receiver)
}
