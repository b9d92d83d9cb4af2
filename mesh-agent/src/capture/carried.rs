//! Which agents carry connections of a Pod. Each of them holds a lock of the file `<uid>.carried` beside the Pod's record, shared, from
//! before its listeners accept until the last connection of that Pod is cut; of an agent that dies the kernel takes it back. Without
//! the Pod's rules and routes the answers of such connections would find another way, in clear: whoever takes those away waits first.

use std::fs::{File, TryLockError};
use std::os::unix::fs::OpenOptionsExt as _;
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::LEAVING_LOOK;
use super::enrolments::Enrolments;
use super::network::{CaptureError, IoContext as _};

/// How long an agent that drains may take to cut a Pod that leaves: until its next look, and then until the Pod's connections have
/// ended or are given up (the proxy's `SHUTDOWN_PATIENCE`). One that has not by then hangs: that is logged, and the Pod is let go all
/// the same.
pub const CUT_PATIENCE: Duration = Duration::from_secs(6);
pub(super) const POLL: Duration = Duration::from_millis(20);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Carriers {
    None,
    Some,
    /// There is no such file: an agent of a build without it may carry connections of the Pod.
    Unknown,
}

impl Enrolments {
    /// To be held for as long as this agent carries connections of the Pod.
    pub(super) fn carry(&self, uid: &str) -> Result<File, CaptureError> {
        const STEP: &str = "locking the file of who carries a Pod";
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(self.carried_path(uid))
            .step(STEP)?;
        // Whoever looks has it for a moment.
        file.lock_shared().step(STEP)?;
        Ok(file)
    }

    /// Whether an agent carries connections of the Pod, or may.
    pub(super) fn is_carried(&self, uid: &str) -> bool {
        self.carriers(uid) != Carriers::None
    }

    /// Two looks long, and on until nobody carries connections of these Pods, which are marked as leaving; up to [`CUT_PATIENCE`] for
    /// all together. The looks, because an agent of a build without these files may have been here before or after one with them.
    /// Blocks.
    pub(super) fn wait_for_looks_and_until_cut(&self, uids: &[String]) {
        if !uids.is_empty() {
            sleep(2 * LEAVING_LOOK);
            self.wait_until_cut(uids);
        }
    }

    /// Until nobody carries connections of these Pods, which are marked as leaving; up to [`CUT_PATIENCE`] for all together. Blocks.
    pub(super) fn wait_until_cut(&self, uids: &[String]) {
        let left = self.carried_after(uids, CUT_PATIENCE);
        if !left.is_empty() {
            tracing::error!(
                uids = ?left,
                "an agent that drains has not cut what it carries of Pods that leave: they are let go, and answers may go in clear"
            );
        }
    }

    /// Those that somebody still carries then.
    fn carried_after<'a>(&self, uids: &'a [String], patience: Duration) -> Vec<&'a str> {
        let began = Instant::now();
        let mut left: Vec<&str> = uids.iter().map(String::as_str).collect();
        loop {
            let waited = began.elapsed();
            left.retain(|uid| match self.carriers(uid) {
                Carriers::None => false,
                Carriers::Some => true,
                // Of what it does, only the look is known.
                Carriers::Unknown => waited < 2 * LEAVING_LOOK,
            });
            if left.is_empty() || waited >= patience {
                return left;
            }
            sleep(POLL);
        }
    }

    fn carriers(&self, uid: &str) -> Carriers {
        let Ok(file) = File::open(self.carried_path(uid)) else {
            return Carriers::Unknown;
        };
        match file.try_lock() {
            Ok(()) => Carriers::None,
            Err(TryLockError::WouldBlock) => Carriers::Some,
            Err(TryLockError::Error(_)) => Carriers::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(100);

    #[test]
    fn a_pod_is_waited_for_until_the_last_agent_has_cut_it() {
        let folder = tempfile::tempdir().unwrap();
        let enrolments = Enrolments::open(folder.path()).unwrap();
        // Two that drain, and one that has the Pod now.
        let [first, second, third] = [(); 3].map(|()| enrolments.carry("a-1").unwrap());
        drop(enrolments.carry("b-2").unwrap());
        assert!(enrolments.is_carried("a-1"));
        drop(third);
        let uids = ["b-2", "a-1"].map(str::to_owned);
        assert_eq!(enrolments.carried_after(&uids, SHORT), ["a-1"], "there is a bound");
        let began = Instant::now();
        let cut = std::thread::spawn(move || {
            sleep(SHORT);
            drop(first);
            sleep(SHORT);
            drop(second);
        });
        assert!(enrolments.carried_after(&uids, CUT_PATIENCE).is_empty());
        assert!(began.elapsed() >= 2 * SHORT, "one still carries it");
        cut.join().unwrap();

        // An agent that tells nothing may be there all the same.
        let began = Instant::now();
        enrolments.wait_for_looks_and_until_cut(&uids);
        assert!(began.elapsed() >= 2 * LEAVING_LOOK);
        // Where nobody is, nobody is waited for.
        assert!(enrolments.carried_after(&uids, Duration::ZERO).is_empty());
    }

    #[test]
    fn an_agent_that_tells_nothing_has_the_time_of_its_looks() {
        let folder = tempfile::tempdir().unwrap();
        let enrolments = Enrolments::open(folder.path()).unwrap();
        let began = Instant::now();
        assert!(enrolments.is_carried("a-1"));
        assert!(enrolments.carried_after(&["a-1".to_owned()], CUT_PATIENCE).is_empty());
        assert!(began.elapsed() >= 2 * LEAVING_LOOK && began.elapsed() < CUT_PATIENCE);
    }
}
