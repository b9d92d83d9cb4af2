//! Taking over what an earlier agent enrolled. Leftovers are released only where the kernel itself tells that their namespace is
//! gone: a path that cannot be opened tells nothing, and a living Pod without its `PODS` entry would speak in clear.

use std::sync::atomic::Ordering;
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::enrol::{Established, Inner};
use super::enrolments::{EnrolmentRecord, PodToEnroll};
use super::kernel::inspect::LookupTarget;
use super::netns::NetNamespace;
use super::network::CaptureError;
use super::search;

/// A namespace that was deleted a moment ago still looks alive, and can no longer be found. For all Pods of a recovery together.
const DYING_PATIENCE: Duration = Duration::from_secs(2);
const DYING_POLL: Duration = Duration::from_millis(50);

/// Where the namespace of a record is.
pub(super) enum Place {
    Living(NetNamespace),
    Gone,
}

/// The namespace of a record, where it was or elsewhere. `None` says only that it is not seen.
pub(super) fn find(record: &EnrolmentRecord, boot_id: &str) -> Option<NetNamespace> {
    if record.boot_id != boot_id {
        return None;
    }
    at_path(record).or_else(|| search::find(record.netns_cookie, None))
}

fn at_path(record: &EnrolmentRecord) -> Option<NetNamespace> {
    NetNamespace::open(&record.pod.netns_path)
        .ok()
        .filter(|netns| netns.cookie() == record.netns_cookie)
}

impl Inner {
    pub(super) fn recover(&self) -> Vec<Result<Established, (PodToEnroll, CaptureError)>> {
        let _change = self.change.lock();
        if let Err(error) = self.remove_orphans() {
            tracing::error!(%error, "what a Pod without a record left in the kernel cannot be removed");
        }
        let records: Vec<_> = {
            let pods = self.pods.lock();
            pods.values()
                .filter(|e| e.active.is_none() && !e.record.is_leaving)
                .map(|e| e.record.clone())
                .collect()
        };
        let until = Instant::now() + DYING_PATIENCE;
        records
            .into_iter()
            .filter_map(|record| {
                let pod = record.pod.clone();
                self.resume(record, until).map_err(|error| (pod, error)).transpose()
            })
            .collect()
    }

    pub(super) fn take_over(&self, uid: &str) -> Result<Option<Established>, CaptureError> {
        self.enrolments.wait_until_cut(&self.leaving(|of| of == uid));
        let _change = self.change.lock();
        let record = {
            let pods = self.pods.lock();
            match pods.get(uid) {
                None => return Ok(None),
                Some(enrolment) if enrolment.active.is_some() => return Err(CaptureError::AlreadyEnrolled(uid.to_owned())),
                Some(enrolment) => enrolment.record.clone(),
            }
        };
        self.resume(record, Instant::now())
    }

    /// What an agent had begun to release when it died. One before it may still drain those Pods, and is waited for, not under
    /// `change`, since it takes its time.
    pub(super) fn complete_releases(&self) -> Vec<(PodToEnroll, CaptureError)> {
        let leaving = self.leaving(|_| true);
        self.enrolments.wait_for_looks_and_until_cut(&leaving);
        let _change = self.change.lock();
        let undone = leaving.iter().filter_map(|uid| {
            let record = self.pods.lock().get(uid).map(|enrolment| enrolment.record.clone())?;
            let pod = record.pod.clone();
            self.resume(record, Instant::now()).err().map(|error| (pod, error))
        });
        undone.collect()
    }

    /// Uids of Pods whose release had begun before this agent.
    fn leaving(&self, is_meant: impl Fn(&str) -> bool) -> Vec<String> {
        let pods = self.pods.lock();
        let leaving = pods
            .iter()
            .filter(|(uid, e)| e.active.is_none() && e.record.is_leaving && is_meant(uid));
        leaving.map(|(uid, _)| uid.clone()).collect()
    }

    /// `None`: the namespace is gone, and what it left is released.
    fn resume(&self, record: EnrolmentRecord, until: Instant) -> Result<Option<Established>, CaptureError> {
        let uid = record.pod.uid.clone();
        if record.is_leaving {
            tracing::info!(uid, "an earlier agent had begun to release the Pod: it is released");
            return self.undo(&uid).map(|()| None);
        }
        let resumed = self.locate(&record, until).and_then(|place| match place {
            Place::Living(netns) => self.establish(record, netns).map(Some),
            Place::Gone => {
                tracing::info!(uid, "the network namespace of an enrolled Pod is gone: released");
                self.undo(&uid).map(|()| None)
            }
        });
        resumed.inspect_err(|error| {
            self.events.kept_closed.fetch_add(1, Ordering::Relaxed);
            tracing::error!(uid, %error, "an enrolled Pod cannot be taken over: it stays captured, and closed");
        })
    }

    /// # Errors
    /// It may live, and is not found until `until`.
    pub(super) fn locate(&self, record: &EnrolmentRecord, until: Instant) -> Result<Place, CaptureError> {
        if record.boot_id != self.boot_id {
            return Ok(Place::Gone);
        }
        if let Some(netns) = at_path(record) {
            return Ok(Place::Living(netns));
        }
        let uid = &record.pod.uid;
        loop {
            let target = self.kernel.lookup_target(uid)?;
            let inode = match target {
                LookupTarget::Netns(inode) => Some(inode),
                LookupTarget::Gone | LookupTarget::NoLink => None,
            };
            if let Some(netns) = search::find(record.netns_cookie, inode) {
                tracing::info!(uid, path = %record.pod.netns_path.display(), "the Pod's network namespace is no longer at its path, and found elsewhere");
                return Ok(Place::Living(netns));
            }
            if target == LookupTarget::Gone {
                return Ok(Place::Gone);
            }
            if Instant::now() >= until {
                return Err(CaptureError::Other(format!(
                    "the network namespace of Pod {uid} is not at {} any more and not known to be gone: if the Pod has ended, \
                     release it; if it lives, give it the path again",
                    record.pod.netns_path.display()
                )));
            }
            sleep(DYING_POLL);
        }
    }

    /// What the kernel holds for Pods without a record: it was lost, or is in another run directory. Only what belongs to no
    /// living namespace is removed.
    fn remove_orphans(&self) -> Result<(), CaptureError> {
        let (cookies, uids): (Vec<u64>, Vec<String>) = {
            let pods = self.pods.lock();
            pods.values()
                .map(|e| (e.record.netns_cookie, e.record.pod.uid.clone()))
                .unzip()
        };
        for uid in self.kernel.pods_with_backstops()? {
            // Its interfaces went with its namespace. One that lives still checks what its Pod sends.
            if !uids.contains(&uid) && self.kernel.backstops(&uid)?.is_empty() {
                self.kernel.detach_backstops(&uid)?;
            }
        }
        let mut all_gone = true;
        for uid in self.kernel.attached_pods()? {
            if uids.contains(&uid) {
                continue;
            }
            if self.kernel.lookup_target(&uid)? == LookupTarget::Gone {
                self.kernel.detach_lookup(&uid)?;
                continue;
            }
            all_gone = false;
            self.events.kept_closed.fetch_add(1, Ordering::Relaxed);
            tracing::error!(
                uid,
                "a captured Pod has no readable record here: it stays closed until it is enrolled again, or until `mesh-agent \
                 cleanup`"
            );
        }
        for (cookie, value) in self.kernel.pods()? {
            // No link tells which entry is its own: while one lives, every entry may be its.
            if cookies.contains(&cookie) || !all_gone || search::find(cookie, None).is_some() {
                continue;
            }
            tracing::warn!(cookie, "a captured network namespace is gone and has no record: released");
            self.kernel.remove_pod(cookie)?;
            self.kernel.clear_listeners(value.slot);
            self.kernel.forget_probes(value.slot)?;
        }
        Ok(())
    }
}
