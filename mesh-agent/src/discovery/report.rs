//! The upward stream: which Pods are proven, what is enforced, what was rejected. An agent works without it.

use std::sync::Arc;
use std::time::Duration;

use mesh_proto::node::{NodeReport, PodReport, Proof as WireProof};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tracing::{debug, info};

use super::backoff::Backoff;
use super::transport::ControlPlane;
use super::{DiscoveryStatus, MAX_REJECTED_NAMED};

/// Everything is told again this often, so that nothing wrong stays.
const REPORT_INTERVAL: Duration = Duration::from_secs(30);
/// Changes that come together go in one report.
const GATHER: Duration = Duration::from_millis(20);
const FIRST_RETRY: Duration = Duration::from_millis(200);
const LONGEST_RETRY: Duration = Duration::from_secs(10);
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
}

/// Reports until `stop`; connects again after every loss.
pub async fn run(
    control: ControlPlane,
    mut pods: watch::Receiver<Arc<Vec<PodStatus>>>,
    mut status: watch::Receiver<DiscoveryStatus>,
    stop: CancellationToken,
) {
    let mut backoff = Backoff::new(FIRST_RETRY, LONGEST_RETRY);
    loop {
        let session = session(&control, &mut pods, &mut status, &mut backoff);
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
    backoff: &mut Backoff,
) -> tonic::Status {
    let (reports, receiver) = mpsc::channel(1);
    let mut sequence = 1;
    let first = report(sequence, &pods.borrow_and_update(), &status.borrow_and_update());
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
            changed = status.changed() => {
                if changed.is_err() {
                    return tonic::Status::cancelled("the agent stops");
                }
                tokio::time::sleep(GATHER).await;
            }
        }
        sequence += 1;
        let next = report(sequence, &pods.borrow_and_update(), &status.borrow_and_update());
        if reports.send(next).await.is_err() {
            return tonic::Status::unavailable("the control plane stopped reading reports");
        }
    }
}

fn report(sequence: u64, pods: &[PodStatus], status: &DiscoveryStatus) -> NodeReport {
    NodeReport {
        sequence,
        pods: pods
            .iter()
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
            })
            .collect(),
        enforced_versions: status
            .enforced_versions
            .iter()
            .map(|(t, v)| ((*t).to_owned(), v.clone()))
            .collect(),
        rejected: status.rejected.iter().take(MAX_REJECTED_NAMED).cloned().collect(),
    }
}
