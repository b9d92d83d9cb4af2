//! Undoing everything without an agent.

use std::path::Path;

use super::enrolments::{Enrolments, boot_id};
use super::kernel::{CleanupReport, Kernel};
use super::network::CaptureError;
use super::{Capture, blocking, recovery, routing};

/// What [`Capture::cleanup`] undid.
#[derive(Debug)]
pub struct CleanupSummary {
    pub kernel: CleanupReport,
    /// Uids of the Pods whose namespaces are as before, or gone.
    pub released: Vec<String>,
    pub failed: Vec<(String, CaptureError)>,
}

impl Capture {
    /// Undoes everything, of any version, without a running agent.
    ///
    /// # Errors
    /// The programs cannot be detached, or the run directory cannot be read.
    pub async fn cleanup(run_dir: &Path, pin_path: &Path) -> Result<CleanupSummary, CaptureError> {
        let (run_dir, pin_path) = (run_dir.to_owned(), pin_path.to_owned());
        blocking(move || {
            // First: from here on nothing is redirected any more.
            let kernel = Kernel::cleanup(&pin_path)?;
            let mut summary = CleanupSummary {
                kernel,
                released: Vec::new(),
                failed: Vec::new(),
            };
            let boot_id = boot_id()?;
            let enrolments = Enrolments::open(&run_dir)?;
            let mut leaving = Vec::new();
            for (uid, mut record) in enrolments.load()? {
                record.is_leaving = true;
                record.cut_after_ms = 0;
                match enrolments.save(&record) {
                    Ok(()) => leaving.push((uid, record)),
                    Err(error) => summary.failed.push((uid, error)),
                }
            }
            let uids: Vec<&str> = leaving.iter().map(|(uid, _)| uid.as_str()).collect();
            enrolments.wait_until_cut(&uids);
            for (uid, record) in leaving {
                let undone = match recovery::find(&record, &boot_id) {
                    Some(netns) => netns.run(|| routing::undo(&record.before)),
                    None => Ok(()),
                };
                match undone.and_then(|()| enrolments.remove(&uid)) {
                    Ok(()) => summary.released.push(uid),
                    Err(error) => summary.failed.push((uid, error)),
                }
            }
            Ok(summary)
        })
        .await
    }
}
