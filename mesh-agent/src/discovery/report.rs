//! The upward stream: which Pods are proven, what is enforced, what was rejected. An agent works without it.

use std::sync::Arc;
use std::time::Duration;

use mesh_common::limits::MAX_PODS;
use mesh_proto::node::{NodeReport, PodReport, Proof as WireProof};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tracing::{debug, info};

use super::backoff::Backoff;
use super::noticed::Noticed;
use super::transport::ControlPlane;
use super::{DiscoveryStatus, MAX_REJECTED_NAMED};

/// Everything is told again this often, so that nothing wrong stays.
const REPORT_INTERVAL: Duration = Duration::from_secs(30);
/// Changes that come together go in one report.
const GATHER: Duration = Duration::from_millis(20);
const FIRST_RETRY: Duration = Duration::from_millis(200);
const LONGEST_RETRY: Duration = Duration::from_secs(10);
/// Released Pods that wait to be told; beyond, those released first are not, and stay proven until their manifests go.
const MAX_RELEASED: usize = 256;
/// What people are told nothing of: it has left the mesh.
pub const RELEASED: &str = "released";
/// Another control plane may not know this service; it is asked again, in case it is replaced.
const UNIMPLEMENTED_RETRY: Duration = Duration::from_secs(300);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proof {
    /// Enrolled, never proven by this agent yet.
    Pending,
    Proven,
    /// Was proven, and the proof failed since.
    Lost,
}

impl Proof {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Proven => "proven",
            Self::Lost => "lost",
        }
    }
}

/// Where an enrolled Pod stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodStatus {
    pub uid: Arc<str>,
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    pub netns_cookie: u64,
    pub proof: Proof,
    /// Why the proof is missing; empty when proven.
    pub reason: String,
    /// The same as one word, by which people are told.
    pub problem: &'static str,
}

/// Pods as they are, and those that were released while the control plane may still believe them proven: their peers would
/// tunnel into nothing. Outlives streams.
#[derive(Default)]
struct Told {
    pods: Arc<Vec<PodStatus>>,
    /// With the sequence of the first report that told it in this stream; 0: none yet.
    released: Vec<(u64, PodStatus)>,
}

impl Told {
    fn update(&mut self, pods: Arc<Vec<PodStatus>>) {
        let before = std::mem::replace(&mut self.pods, pods);
        let is_there = |pod: &PodStatus| self.pods.iter().any(|other| other.uid == pod.uid);
        self.released.retain(|(_, pod)| !is_there(pod));
        let gone = before.iter().filter(|pod| !is_there(pod));
        self.released.extend(gone.map(|pod| {
            let released = PodStatus {
                proof: Proof::Lost,
                reason: RELEASED.to_owned(),
                problem: RELEASED,
                ..pod.clone()
            };
            (0, released)
        }));
        let surplus = self.released.len().saturating_sub(MAX_RELEASED);
        self.released.drain(..surplus);
    }

    fn report(&mut self, sequence: u64, status: &DiscoveryStatus, noticed: &Noticed) -> NodeReport {
        let room = (MAX_PODS as usize).saturating_sub(self.pods.len()).min(self.released.len());
        for (told_in, _) in self.released[..room].iter_mut().filter(|(told_in, _)| *told_in == 0) {
            *told_in = sequence;
        }
        let released = &self.released[..room];
        let room = (MAX_PODS as usize).saturating_sub(self.pods.len() + released.len());
        // What is enrolled by now says it by its proof; and of what was just released, that is to be heard first.
        let is_told = |uid: &str| {
            let released = self.released.iter().map(|(_, pod)| pod);
            self.pods.iter().chain(released).any(|pod| &*pod.uid == uid)
        };
        let mut failing = noticed.failing(is_told);
        failing.truncate(room);
        let pods = self.pods.iter().chain(released.iter().map(|(_, pod)| pod)).chain(&failing);
        report(sequence, pods, status, noticed)
    }

    fn received(&mut self, sequence: u64) {
        self.released.retain(|(told_in, _)| *told_in == 0 || *told_in > sequence);
    }

    /// A new stream counts anew.
    fn start(&mut self) {
        for (told_in, _) in &mut self.released {
            *told_in = 0;
        }
    }
}

/// Reports until `stop`; connects again after every loss.
pub async fn run(
    control: ControlPlane,
    mut pods: watch::Receiver<Arc<Vec<PodStatus>>>,
    mut status: watch::Receiver<DiscoveryStatus>,
    noticed: Arc<Noticed>,
    stop: CancellationToken,
) {
    let mut backoff = Backoff::new(FIRST_RETRY, LONGEST_RETRY);
    let mut told = Told::default();
    loop {
        let session = session(&control, &mut pods, &mut status, &noticed, &mut told, &mut backoff);
        let ended = tokio::select! {
            () = stop.cancelled() => return,
            ended = session => ended,
        };
        let wait = if ended.code() == Code::Unimplemented {
            info!("the control plane takes no node reports");
            UNIMPLEMENTED_RETRY
        } else {
            let wait = backoff.after_failure();
            debug!(reason = %ended.message(), ?wait, "the stream of node reports ended");
            wait
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
        }
    }
}

async fn session(
    control: &ControlPlane,
    pods: &mut watch::Receiver<Arc<Vec<PodStatus>>>,
    status: &mut watch::Receiver<DiscoveryStatus>,
    noticed: &Noticed,
    told: &mut Told,
    backoff: &mut Backoff,
) -> tonic::Status {
    let (reports, receiver) = mpsc::channel(1);
    let mut sequence = 1;
    told.start();
    noticed.start();
    let mut more = noticed.changed();
    told.update(pods.borrow_and_update().clone());
    let first = told.report(sequence, &status.borrow_and_update(), noticed);
    // The channel has room for one: this cannot wait, and the request needs a first message to start the stream.
    if reports.try_send(first).is_err() {
        return tonic::Status::internal("no room for the first report");
    }
    let mut receipts = match control.reports().report(ReceiverStream::new(receiver)).await {
        Ok(response) => response.into_inner(),
        Err(status) => return status,
    };
    let mut again = tokio::time::interval(REPORT_INTERVAL);
    again.reset();
    loop {
        tokio::select! {
            receipt = receipts.message() => match receipt {
                Ok(Some(receipt)) => {
                    backoff.reset();
                    told.received(receipt.sequence);
                    noticed.received(receipt.sequence);
                    debug!(receipt.sequence, "node report received by the control plane");
                    continue;
                }
                Ok(None) => return tonic::Status::unavailable("ended by the control plane"),
                Err(status) => return status,
            },
            _ = again.tick() => {}
            changed = pods.changed() => {
                if changed.is_err() {
                    return tonic::Status::cancelled("the agent stops");
                }
                tokio::time::sleep(GATHER).await;
            }
            changed = more.changed() => {
                if changed.is_err() {
                    return tonic::Status::cancelled("the agent stops");
                }
                tokio::time::sleep(GATHER).await;
            }
            changed = status.changed() => {
                if changed.is_err() {
                    return tonic::Status::cancelled("the agent stops");
                }
                tokio::time::sleep(GATHER).await;
            }
        }
        sequence += 1;
        more.mark_unchanged();
        told.update(pods.borrow_and_update().clone());
        let next = told.report(sequence, &status.borrow_and_update(), noticed);
        if reports.send(next).await.is_err() {
            return tonic::Status::unavailable("the control plane stopped reading reports");
        }
    }
}

fn report<'a>(
    sequence: u64,
    pods: impl Iterator<Item = &'a PodStatus>,
    status: &DiscoveryStatus,
    noticed: &Noticed,
) -> NodeReport {
    let (repaired, mut of_pods) = noticed.pieces(sequence);
    NodeReport {
        sequence,
        pods: pods
            .map(|pod| PodReport {
                uid: pod.uid.to_string(),
                namespace: pod.namespace.to_string(),
                name: pod.name.to_string(),
                proof: match pod.proof {
                    Proof::Pending => WireProof::Pending,
                    Proof::Proven => WireProof::Proven,
                    Proof::Lost => WireProof::Lost,
                }
                .into(),
                reason: pod.reason.clone(),
                problem: pod.problem.to_owned(),
                repaired: of_pods.remove(&pod.uid).unwrap_or_default(),
            })
            .collect(),
        repaired,
        enforced_versions: status
            .enforced_versions
            .iter()
            .map(|(t, v)| ((*t).to_owned(), v.clone()))
            .collect(),
        rejected: status.rejected.iter().take(MAX_REJECTED_NAMED).cloned().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::noticed::failing;
    use super::*;

    fn pods(uids: &[&str]) -> Arc<Vec<PodStatus>> {
        let pod = |uid: &&str| PodStatus {
            uid: (*uid).into(),
            namespace: "shop".into(),
            name: (*uid).into(),
            netns_cookie: 1,
            proof: Proof::Proven,
            reason: String::new(),
            problem: "",
        };
        Arc::new(uids.iter().map(pod).collect())
    }

    fn told(told: &mut Told, sequence: u64) -> Vec<(String, WireProof)> {
        let report = told.report(sequence, &DiscoveryStatus::default(), &Noticed::default());
        report.pods.iter().map(|pod| (pod.uid.clone(), pod.proof())).collect()
    }

    #[test]
    fn a_released_pod_is_told_as_lost_until_that_was_heard() {
        let expected = |list: &[(&str, WireProof)]| {
            list.iter()
                .map(|(uid, proof)| ((*uid).to_owned(), *proof))
                .collect::<Vec<_>>()
        };
        let mut state = Told::default();
        state.update(pods(&["a", "b"]));
        told(&mut state, 1);
        state.update(pods(&["b"]));
        let with_a = expected(&[("b", WireProof::Proven), ("a", WireProof::Lost)]);
        assert_eq!(told(&mut state, 2), with_a);
        state.received(1);
        assert_eq!(told(&mut state, 3), with_a, "the receipt is of an earlier report");
        // The stream broke before the receipt came: the next one counts from 1.
        state.start();
        assert_eq!(told(&mut state, 1), with_a);
        state.received(1);
        assert_eq!(told(&mut state, 2), expected(&[("b", WireProof::Proven)]));
        // Enrolled again before it was told: it is what it is now.
        state.update(pods(&[]));
        state.update(pods(&["b"]));
        assert_eq!(told(&mut state, 3), expected(&[("b", WireProof::Proven)]));
    }

    #[test]
    fn members_that_are_not_enrolled_are_told_with_their_reason_and_never_as_lost() {
        let noticed = Noticed::default();
        for uid in ["a", "b"] {
            noticed.failing_by_cni(failing(&uid.into(), "shop", uid, "no room", "limit"));
        }
        let mut state = Told::default();
        state.update(pods(&["b"]));
        let all = |state: &mut Told| {
            let report = state.report(1, &DiscoveryStatus::default(), &noticed);
            let pods = report.pods.iter();
            pods.map(|pod| (pod.uid.clone(), pod.proof(), pod.problem.clone()))
                .collect::<Vec<_>>()
        };
        let a = ("a".to_owned(), WireProof::Pending, "limit".to_owned());
        assert_eq!(all(&mut state), [("b".to_owned(), WireProof::Proven, String::new()), a]);
        noticed.enrolled_by_cni("a");
        assert_eq!(all(&mut state).len(), 1);
        // CNI ADD has failed of one that was enrolled, and it was released: first that, so that each report has a Pod once.
        state.update(pods(&[]));
        let released = ("b".to_owned(), WireProof::Lost, RELEASED.to_owned());
        assert_eq!(all(&mut state), [released]);
        state.received(1);
        let failing = ("b".to_owned(), WireProof::Pending, "limit".to_owned());
        assert_eq!(all(&mut state), [failing]);
    }

    #[test]
    fn released_pods_are_told_within_a_bound() {
        let many: Vec<String> = (0..=MAX_RELEASED).map(|i| i.to_string()).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        let mut state = Told::default();
        state.update(pods(&many));
        state.update(pods(&[]));
        assert_eq!(told(&mut state, 1).len(), MAX_RELEASED);
    }
}
