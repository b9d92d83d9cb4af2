//! Each Pod's own task: what is missing is put back, then the capture is proven, again and again.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;
use tracing::{error, info, warn};

use super::Pods;
use super::standing::{Turn, Why};
use crate::discovery::report::Proof;

/// Proven Pods are proven again this often; others are tried as often, after some quick attempts.
const PROOF_INTERVAL: Duration = Duration::from_secs(5);
/// Waits before the first attempts.
const FIRST_PROOFS: [Duration; 4] = [
    Duration::ZERO,
    Duration::from_millis(200),
    Duration::from_millis(500),
    Duration::from_secs(1),
];

impl Pods {
    pub(super) async fn prove_for_ever(self: &Arc<Self>, uid: &Arc<str>) {
        let mut first = FIRST_PROOFS.into_iter();
        loop {
            let settled = self
                .enrolled
                .lock()
                .get(uid)
                .is_none_or(|enrolled| enrolled.standing.proof() == Proof::Proven);
            let wait = if settled {
                PROOF_INTERVAL
            } else {
                first.next().unwrap_or(PROOF_INTERVAL)
            };
            sleep(jittered(wait)).await;
            let is_unserved = self
                .enrolled
                .lock()
                .get(uid)
                .is_some_and(|enrolled| enrolled.handle.is_none());
            if is_unserved {
                // Succeeds by replacing this entry, and with it this task.
                self.take_over_again(uid);
                continue;
            }
            let result = self.prove(uid).await;
            self.settle(uid, result);
        }
    }

    /// A Pod that could not be recovered. In a task of its own: a takeover is awaited to its end, whoever is cancelled meanwhile.
    fn take_over_again(self: &Arc<Self>, uid: &Arc<str>) {
        let (pods, uid) = (self.clone(), uid.clone());
        tokio::spawn(async move {
            let Ok(_change) = pods.exclusively(&uid).await else { return };
            let still_unserved = pods
                .enrolled
                .lock()
                .get(&uid)
                .is_some_and(|enrolled| enrolled.handle.is_none() && !enrolled.stop.is_cancelled());
            if !still_unserved {
                return;
            }
            match pods.capture.take_over(&uid).await {
                Ok(Some(captured)) => {
                    info!(%uid, "an enrolled Pod is taken over after all");
                    pods.serve(captured, true);
                }
                Ok(None) => {
                    pods.forget(&uid);
                }
                Err(error) => {
                    if let Some(enrolled) = pods.enrolled.lock().get_mut(&uid) {
                        enrolled.standing.explain(error.into());
                    }
                }
            }
            pods.publish();
        });
    }

    /// In a task of its own, as above. The Pod's connections end with its old listeners; there is no other way to have them closed
    /// before new ones take their ports.
    fn reopen(self: &Arc<Self>, uid: &Arc<str>) {
        let (pods, uid) = (self.clone(), uid.clone());
        tokio::spawn(async move {
            let Ok(_change) = pods.exclusively(&uid).await else { return };
            let handle = {
                let mut enrolled = pods.enrolled.lock();
                let enrolled = enrolled.get_mut(&uid).filter(|enrolled| !enrolled.stop.is_cancelled());
                enrolled.and_then(|enrolled| Some((enrolled.handle.take()?, enrolled.standing.clone())))
            };
            let Some((handle, standing)) = handle else { return };
            handle.shutdown().await;
            match pods.capture.reopen(&uid).await {
                Ok(captured) => {
                    pods.noticed.pod_repaired(&uid, &["listener"]);
                    pods.serve(captured, true);
                    // What it was proven to be does not start anew.
                    if let Some(enrolled) = pods.enrolled.lock().get_mut(&uid) {
                        enrolled.standing = standing;
                    }
                }
                Err(error) => {
                    error!(%uid, %error, "closed listeners of the agent cannot be opened again: the Pod's connections are refused");
                    // Its handle is gone: what it is now is what a failed recovery is.
                    pods.capture.give_up(&uid);
                    if let Some(enrolled) = pods.enrolled.lock().get_mut(&uid) {
                        enrolled.standing.settle(Err(error.into()));
                    }
                }
            }
            pods.publish();
        });
    }

    /// A Pod is proven by its capture; for the first time only once it has a certificate to be reached by.
    async fn prove(self: &Arc<Self>, uid: &Arc<str>) -> Result<(), Why> {
        {
            // Held for the probes alone: a Pod without a certificate must not keep others from being proven.
            let Ok(_permit) = self.proofs.acquire().await else {
                return Err(Why::new("stops", "the agent stops"));
            };
            let repairs = self.capture.repair(uid).await?;
            self.noticed.pod_repaired(uid, &repairs.repaired);
            if repairs.is_listener_lost {
                self.reopen(uid);
                return Err(Why::new("listener_closed", "a listener of the agent in the Pod was closed"));
            }
            let listeners = self
                .enrolled
                .lock()
                .get(uid)
                .and_then(|enrolled| enrolled.handle.as_ref()?.listeners());
            if let Some([_, tunnel, plaintext]) = listeners
                && self.capture.restore_listeners(uid, [tunnel, plaintext]).await?
            {
                self.noticed.pod_repaired(uid, &["listeners_entry"]);
            }
            self.capture.prove(uid).await?;
        }
        let identity = self
            .enrolled
            .lock()
            .get(uid)
            .filter(|enrolled| enrolled.standing.proof() != Proof::Proven)
            .map(|enrolled| enrolled.identity.clone());
        match identity {
            Some(identity) => {
                let ready = self.certificates.ready(&identity, PROOF_INTERVAL).await;
                ready.map(|_| ()).map_err(|text| Why::new("no_certificate", text))
            }
            None => Ok(()),
        }
    }

    fn settle(&self, uid: &str, result: Result<(), Why>) {
        {
            let mut enrolled = self.enrolled.lock();
            let Some(enrolled) = enrolled.get_mut(uid) else { return };
            let (namespace, name) = (&enrolled.pod.namespace, &enrolled.pod.name);
            let reason = result.as_ref().err().map(|why| why.text.clone()).unwrap_or_default();
            let turn = enrolled.standing.settle(result);
            if !reason.is_empty() {
                warn!(%namespace, pod = %name, %reason, failures = enrolled.standing.failures(), "the Pod cannot be proven to be in the mesh");
            }
            match turn {
                Turn::Proven => {
                    info!(%namespace, pod = %name, "the Pod's capture is proven");
                }
                Turn::Lost => {
                    error!(%namespace, pod = %name, %reason, "the proof of the Pod's capture is LOST: the mesh refuses its connections until it is proven again");
                }
                Turn::None => {}
            }
        }
        self.publish();
    }
}

/// Never later, and so that Pods enrolled together are not proven together for ever.
fn jittered(wait: Duration) -> Duration {
    wait.mul_f64(rand::random_range(0.8..=1.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::NODE_REPAIR_INTERVAL;
    use crate::capture::probe::PROBE_TIMEOUT;

    /// What an operator is told: a capture that is broken by hand is seen within this.
    const SEEN_WITHIN: Duration = Duration::from_secs(10);

    /// A turn repairs before it probes, so that what can be repaired is so after one interval. What cannot makes a probe fail: the
    /// first to fail ends the turn, at the latest when its time is over and its process had as long to say why.
    #[test]
    fn a_broken_capture_is_seen_in_time() {
        let turn = PROBE_TIMEOUT + PROBE_TIMEOUT;
        assert!(PROOF_INTERVAL + turn <= SEEN_WITHIN);
        assert!(FIRST_PROOFS.iter().all(|wait| *wait <= PROOF_INTERVAL));
        // What all Pods share is looked at apart from their turns.
        assert!(NODE_REPAIR_INTERVAL <= SEEN_WITHIN);
        let waits = (0..10_000).map(|_| jittered(PROOF_INTERVAL));
        let (least, most) = waits.fold((Duration::MAX, Duration::ZERO), |(least, most), wait| {
            (least.min(wait), most.max(wait))
        });
        assert!(most <= PROOF_INTERVAL, "{most:?}");
        assert!(least < PROOF_INTERVAL.mul_f64(0.9), "not spread: {least:?}");
    }
}
