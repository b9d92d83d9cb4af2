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
    /// By uid, or by the path of what should be a record.
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
            let loaded = enrolments.load()?;
            for (path, why) in loaded.unreadable {
                // Whose it is nobody can tell: a Pod may have its rules and settings still.
                let error = CaptureError::Other(format!("no record of a Pod ({why}): when its Pod has ended, remove it"));
                summary.failed.push((path.display().to_string(), error));
            }
            let mut leaving = Vec::new();
            for (uid, mut record) in loaded.records {
                record.is_leaving = true;
                record.cut_after_ms = 0;
                match enrolments.save(&record) {
                    Ok(()) => leaving.push((uid, record)),
                    Err(error) => summary.failed.push((uid, error)),
                }
            }
            let uids: Vec<String> = leaving.iter().map(|(uid, _)| uid.clone()).collect();
            enrolments.wait_for_looks_and_until_cut(&uids);
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

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[tokio::test]
    async fn a_record_that_cannot_be_read_is_not_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        let (run_dir, pin_path) = (folder.path().join("run"), folder.path().join("pins"));
        let pods = run_dir.join("pods");
        fs::create_dir_all(&pods).unwrap();
        // Of a start of the node that is over, so that nothing is to be undone.
        let record = serde_json::json!({
            "boot_id": "another",
            "pod": {
                "uid": "a-1", "namespace": "shop", "name": "web-0", "service_account": "web",
                "netns_path": "/run/netns/web-0", "addresses": ["10.0.0.1"], "cgroup_path": null,
            },
            "netns_cookie": 7, "slot": 3, "before": { "ipv6": true, "settings": [] },
        });
        fs::write(pods.join("a-1.json"), record.to_string()).unwrap();
        fs::write(pods.join("b-2.json"), "{").unwrap();

        for released in [&["a-1"][..], &[]] {
            let summary = Capture::cleanup(&run_dir, &pin_path).await.unwrap();
            assert_eq!(summary.released, released);
            let [(path, error)] = &summary.failed[..] else {
                panic!("{:?}", summary.failed);
            };
            assert_eq!(*path, pods.join("b-2.json").display().to_string());
            assert!(error.to_string().contains("no record of a Pod"), "{error}");
        }
    }
}
