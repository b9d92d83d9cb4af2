//! The downward stream of enrolment: which Pods a node has, and which namespaces are in the mesh.

use std::pin::Pin;
use std::sync::Arc;

use mesh_proto::node::node_pods_server::NodePods;
use mesh_proto::node::{NodePodsRequest, NodePodsState};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::authentication::{Authenticator, Caller};
use crate::control_plane::ControlPlane;
use crate::limits::{NODE_PODS_DEBOUNCE, RESPONSES_WAITING};
use crate::node_streams::{NodeStream, StreamKind};
use crate::proto;

pub struct PodLists {
    pub control: Arc<ControlPlane>,
    pub authenticator: Authenticator,
}

#[tonic::async_trait]
impl NodePods for PodLists {
    type WatchStream = Pin<Box<dyn tokio_stream::Stream<Item = Result<NodePodsState, Status>> + Send + 'static>>;

    async fn watch(&self, request: Request<NodePodsRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let caller = self.authenticator.authenticate(&request).await?;
        let open = NodeStream::open(&self.control, &caller.node, StreamKind::Pods)?;
        let (states, receiver) = mpsc::channel(RESPONSES_WAITING);
        let (control, authenticator) = (Arc::clone(&self.control), self.authenticator.clone());
        tokio::spawn(async move {
            let _open = open;
            if let Err(Cut(reason, status)) = serve(&control, &authenticator, &caller, &states).await {
                control.metrics.node_pods_streams_cut.with_label_values(&[reason]).inc();
                tracing::warn!(
                    node = caller.node,
                    reason,
                    "stream of a node's Pods ended: {}",
                    status.message()
                );
                drop(states.try_send(Err(status)));
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
    states: &mpsc::Sender<Result<NodePodsState, Status>>,
) -> Result<(), Cut> {
    let mut recheck = interval(control.bounds.token_recheck);
    recheck.set_missed_tick_behavior(MissedTickBehavior::Delay);
    recheck.reset();
    let closed = control.closed();
    tokio::pin!(closed);
    let mut snapshots = control.subscribe();
    let mut told = None;
    loop {
        // Before the registry was read every Pod would seem to be gone.
        if control.is_ready() {
            // Made only when nothing waits any more, so that what a slow reader gets next is the newest.
            let room = match timeout(control.bounds.send, states.reserve()).await {
                Ok(Ok(room)) => room,
                Ok(Err(_)) => return Ok(()),
                Err(_) => return Err(Cut("unread", Status::deadline_exceeded("the list of Pods is not read"))),
            };
            let snapshot = Arc::clone(&snapshots.borrow_and_update());
            let of_node = snapshot.enrolment.nodes.get(&caller.node).cloned();
            let now = (of_node.unwrap_or_default(), Arc::clone(&snapshot.enrolment.namespaces));
            if told.as_ref() != Some(&now) {
                room.send(Ok(proto::node_pods(&now.0, &now.1)));
                told = Some(now);
            }
        }
        tokio::select! {
            changed = snapshots.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
                sleep(NODE_PODS_DEBOUNCE).await;
            }
            () = states.closed() => return Ok(()),
            () = &mut closed => return Err(Cut("shutdown", Status::unavailable("the control plane ends"))),
            _ = recheck.tick() => {
                authenticator.recheck(caller).await.map_err(|status| Cut("token", status))?;
            }
        }
    }
}
