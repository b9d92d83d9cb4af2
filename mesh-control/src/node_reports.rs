//! The upward stream: what agents have proven, enforce and reject.

use std::pin::Pin;
use std::sync::Arc;

use mesh_proto::node::node_reports_server::NodeReports;
use mesh_proto::node::{NodeReport, ReportReceipt};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::authentication::{Authenticator, Caller};
use crate::control_plane::ControlPlane;
use crate::limits::{MAX_NACK_BYTES, MAX_REPORTED_PODS, MAX_TYPES, SEND_TIMEOUT, TOKEN_RECHECK};
use crate::proto;

/// As the interface says.
const MAX_REJECTED: usize = 64;

pub struct Reports {
    pub control: Arc<ControlPlane>,
    pub authenticator: Authenticator,
}

#[tonic::async_trait]
impl NodeReports for Reports {
    type ReportStream = Pin<Box<dyn tokio_stream::Stream<Item = Result<ReportReceipt, Status>> + Send + 'static>>;

    async fn report(&self, request: Request<Streaming<NodeReport>>) -> Result<Response<Self::ReportStream>, Status> {
        let caller = self.authenticator.authenticate(request.metadata()).await?;
        let (receipts, receiver) = mpsc::channel(4);
        let (control, authenticator) = (Arc::clone(&self.control), self.authenticator.clone());
        tokio::spawn(async move {
            let node = caller.node.clone();
            control.with_node(&node, |node| node.report_streams += 1);
            let counted = Counted(control, node.clone());
            if let Err(status) = serve(&counted.0, &authenticator, &caller, request.into_inner(), &receipts).await {
                tracing::warn!(node, "report stream ended: {}", status.message());
                drop(receipts.try_send(Err(status)));
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

struct Counted(Arc<ControlPlane>, String);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0
            .with_node(&self.1, |node| node.report_streams = node.report_streams.saturating_sub(1));
    }
}

async fn serve(
    control: &Arc<ControlPlane>,
    authenticator: &Authenticator,
    caller: &Caller,
    mut reports: Streaming<NodeReport>,
    receipts: &mpsc::Sender<Result<ReportReceipt, Status>>,
) -> Result<(), Status> {
    let mut recheck = interval(TOKEN_RECHECK);
    recheck.set_missed_tick_behavior(MissedTickBehavior::Delay);
    recheck.reset();
    let closed = control.closed();
    tokio::pin!(closed);
    loop {
        let report = tokio::select! {
            report = reports.message() => match report {
                Ok(Some(report)) => report,
                // The stream's end withdraws nothing.
                Ok(None) | Err(_) => return Ok(()),
            },
            () = &mut closed => return Err(Status::unavailable("the control plane ends")),
            _ = recheck.tick() => {
                authenticator.recheck(caller).await?;
                continue;
            }
        };
        if report.pods.len() > MAX_REPORTED_PODS {
            return Err(Status::resource_exhausted(format!(
                "more than {MAX_REPORTED_PODS} Pods in a report"
            )));
        }
        let sequence = report.sequence;
        take(control, &caller.node, report).await?;
        match timeout(SEND_TIMEOUT, receipts.send(Ok(ReportReceipt { sequence }))).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Ok(()),
            Err(_) => return Err(Status::deadline_exceeded("receipts are not read")),
        }
    }
}

/// The receipt is sent once the states are on disk and published.
async fn take(control: &Arc<ControlPlane>, node: &str, report: NodeReport) -> Result<(), Status> {
    let words = proto::pod_words(&report.pods);
    let cut = |text: String| text.chars().take(MAX_NACK_BYTES).collect::<String>();
    control.with_node(node, |status| {
        status.enforced = report
            .enforced_versions
            .into_iter()
            .take(MAX_TYPES)
            .map(|(url, version)| (cut(url), cut(version)))
            .collect();
        let rejected: Vec<String> = report.rejected.into_iter().take(MAX_REJECTED).map(cut).collect();
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
