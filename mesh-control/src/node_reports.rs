//! The upward stream: what agents have proven, enforce and reject.

use std::pin::Pin;
use std::sync::Arc;

use mesh_proto::node::node_reports_server::NodeReports;
use mesh_proto::node::{NodeReport, ReportReceipt};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::authentication::{Authenticator, Caller};
use crate::control_plane::ControlPlane;
use crate::limits::{MAX_REJECTED, MAX_REPORTED_PODS, MAX_TYPES, RECEIPTS_WAITING, REPORT_PACE};
use crate::node_streams::{NodeStream, StreamKind};
use crate::proto;
use crate::troubles::Repaired;

pub struct Reports {
    pub control: Arc<ControlPlane>,
    pub authenticator: Authenticator,
}

#[tonic::async_trait]
impl NodeReports for Reports {
    type ReportStream = Pin<Box<dyn tokio_stream::Stream<Item = Result<ReportReceipt, Status>> + Send + 'static>>;

    async fn report(&self, request: Request<Streaming<NodeReport>>) -> Result<Response<Self::ReportStream>, Status> {
        let caller = self.authenticator.authenticate(&request).await?;
        let open = NodeStream::open(&self.control, &caller.node, StreamKind::Reports)?;
        let (receipts, receiver) = mpsc::channel(RECEIPTS_WAITING);
        let (control, authenticator) = (Arc::clone(&self.control), self.authenticator.clone());
        tokio::spawn(async move {
            let _open = open;
            let node = caller.node.clone();
            if let Err(Cut(reason, status)) = serve(&control, &authenticator, &caller, request.into_inner(), &receipts).await {
                control.metrics.report_streams_cut.with_label_values(&[reason]).inc();
                tracing::warn!(node, reason, "report stream ended: {}", status.message());
                drop(receipts.try_send(Err(status)));
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

/// Why a stream was ended from this side: metric label and answer.
struct Cut(&'static str, Status);

async fn serve(
    control: &Arc<ControlPlane>,
    authenticator: &Authenticator,
    caller: &Caller,
    mut reports: Streaming<NodeReport>,
    receipts: &mpsc::Sender<Result<ReportReceipt, Status>>,
) -> Result<(), Cut> {
    let mut recheck = interval(control.bounds.token_recheck);
    recheck.set_missed_tick_behavior(MissedTickBehavior::Delay);
    recheck.reset();
    let closed = control.closed();
    tokio::pin!(closed);
    loop {
        let report = tokio::select! {
            report = reports.message() => match report {
                Ok(Some(report)) => report,
                Err(status) if proto::is_too_large(&status) => return Err(Cut("too_much", status)),
                // The stream's end withdraws nothing.
                Ok(None) | Err(_) => return Ok(()),
            },
            () = &mut closed => return Err(Cut("shutdown", Status::unavailable("the control plane ends"))),
            _ = recheck.tick() => {
                authenticator.recheck(caller).await.map_err(|status| Cut("token", status))?;
                continue;
            }
        };
        if report.pods.len() > MAX_REPORTED_PODS {
            let status = Status::resource_exhausted(format!("more than {MAX_REPORTED_PODS} Pods in a report"));
            return Err(Cut("too_much", status));
        }
        let sequence = report.sequence;
        take(control, &caller.node, report)
            .await
            .map_err(|status| Cut("failed", status))?;
        match timeout(control.bounds.send, receipts.send(Ok(ReportReceipt { sequence }))).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Ok(()),
            Err(_) => return Err(Cut("unread", Status::deadline_exceeded("receipts are not read"))),
        }
        sleep(REPORT_PACE).await;
    }
}

/// The receipt says that the report was taken: what it changes is published within [`crate::limits::PUBLISH_INTERVAL`], and on
/// disk before.
async fn take(control: &Arc<ControlPlane>, node: &str, report: NodeReport) -> Result<(), Status> {
    let words = proto::pod_words(&report.pods);
    control.node_repaired(node, &Repaired::of(&report.repaired));
    let enforced = report
        .enforced_versions
        .into_iter()
        .take(MAX_TYPES)
        .map(|(url, version)| (proto::shortened(url), proto::shortened(version)))
        .collect();
    let rejected: Vec<String> = report.rejected.into_iter().take(MAX_REJECTED).map(proto::shortened).collect();
    control.set_enforced(node, &enforced, &rejected);
    control.with_node(node, |status| {
        status.enforced = enforced;
        if !rejected.is_empty() && rejected != status.rejected_by_agent {
            tracing::warn!(node, rejected = ?rejected, "the agent cannot use some resources");
        }
        status.rejected_by_agent = rejected;
    });
    let (control, node) = (Arc::clone(control), node.to_owned());
    tokio::task::spawn_blocking(move || control.set_report(&node, words))
        .await
        .map_err(|_| Status::internal("the report was not taken"))
}
