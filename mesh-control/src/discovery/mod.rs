//! Delta discovery: the streams around [`subscription::Subscription`].

pub mod subscription;

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;

use mesh_proto::discovery::aggregated_discovery_service_server::AggregatedDiscoveryService;
use mesh_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::authentication::{Authenticator, Caller};
use crate::compile::{Snapshot, TypeSnapshot};
use crate::control_plane::ControlPlane;
use crate::limits::{MAX_TYPES, RESPONSES_WAITING};
use crate::node_streams::{NodeStream, StreamKind};
use crate::proto;
use crate::tokens::Refusal;
use subscription::{Answer, Subscription};

pub struct Discovery {
    pub control: Arc<ControlPlane>,
    pub authenticator: Authenticator,
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Discovery {
    type DeltaAggregatedResourcesStream =
        Pin<Box<dyn tokio_stream::Stream<Item = Result<DeltaDiscoveryResponse, Status>> + Send + 'static>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let caller = self.authenticator.authenticate(&request).await?;
        let open = NodeStream::open(&self.control, &caller.node, StreamKind::Discovery)?;
        let (responses, receiver) = mpsc::channel(RESPONSES_WAITING);
        let stream = Stream {
            control: Arc::clone(&self.control),
            authenticator: self.authenticator.clone(),
            caller,
            requests: request.into_inner(),
            snapshots: self.control.subscribe(),
            responses,
            types: BTreeMap::new(),
            _open: open,
        };
        tokio::spawn(stream.run());
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

struct Stream {
    control: Arc<ControlPlane>,
    authenticator: Authenticator,
    caller: Caller,
    requests: Streaming<DeltaDiscoveryRequest>,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    types: BTreeMap<String, OfType>,
    _open: NodeStream,
}

#[derive(Default)]
struct OfType {
    subscription: Subscription,
    acknowledge_by: Option<Instant>,
}

/// Why a stream was ended from this side: metric label and answer.
struct Cut(&'static str, Status);

impl Stream {
    async fn run(mut self) {
        let node = self.caller.node.clone();
        tracing::info!(node, "discovery stream opened");
        match self.serve().await {
            Ok(()) => tracing::info!(node, "discovery stream closed by the agent"),
            Err(Cut(reason, status)) => {
                self.control.metrics.streams_cut.with_label_values(&[reason]).inc();
                tracing::warn!(node, reason, "discovery stream ended: {}", status.message());
                // The channel may be full of what the client does not read; dropping it ends the stream in any case.
                drop(self.responses.try_send(Err(status)));
            }
        }
    }

    async fn serve(&mut self) -> Result<(), Cut> {
        let mut recheck = interval(self.control.bounds.token_recheck);
        recheck.set_missed_tick_behavior(MissedTickBehavior::Delay);
        recheck.reset();
        let closed = self.control.closed();
        tokio::pin!(closed);
        loop {
            let deadline = self.types.values().filter_map(|of_type| of_type.acknowledge_by).min();
            tokio::select! {
                request = self.requests.message() => match request {
                    Ok(Some(request)) => self.request(request)?,
                    Err(status) if proto::is_too_large(&status) => return Err(Cut("too_much", status)),
                    // The client is gone, by a half-close or by the loss of its connection.
                    Ok(None) | Err(_) => return Ok(()),
                },
                _ = self.snapshots.changed() => {}
                () = &mut closed => {
                    return Err(Cut("shutdown", Status::unavailable("the control plane ends")));
                }
                () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                    return Err(Cut(
                        "unacknowledged",
                        Status::deadline_exceeded("a response was not acknowledged in time"),
                    ));
                }
                _ = recheck.tick() => {
                    self.authenticator.recheck(&self.caller).await.map_err(|status| Cut("token", status))?;
                    continue;
                }
            }
            self.respond().await?;
        }
    }

    fn request(&mut self, request: DeltaDiscoveryRequest) -> Result<(), Cut> {
        let metadata = request.node.as_ref().and_then(|node| node.metadata.as_ref());
        if let Some(named) = proto::text_field(metadata, "NODE_NAME")
            && named != self.caller.node
        {
            drop(self.authenticator.refuse(Refusal::OtherNode));
            return Err(Cut(
                "other_node",
                Status::permission_denied("NODE_NAME is not the node of the token"),
            ));
        }
        let type_url = request.type_url.clone();
        if !self.types.contains_key(&type_url) && self.types.len() >= MAX_TYPES {
            return Err(Cut(
                "too_much",
                Status::resource_exhausted("too many resource types on a stream"),
            ));
        }
        let of_type = self.types.entry(type_url.clone()).or_default();
        let mut request = proto::request_from_wire(request);
        if short_type(&type_url) == OTHER {
            // There is nothing of it and never will be: it is answered once, and its names are not remembered.
            request.forget_names();
        }
        let snapshot = Arc::clone(&self.snapshots.borrow());
        let answer = of_type
            .subscription
            .request(request, snapshot.types.get(type_url.as_str()).map(Arc::as_ref))
            .map_err(|error| Cut("too_much", Status::resource_exhausted(error.to_string())))?;
        if !of_type.subscription.in_flight() {
            of_type.acknowledge_by = None;
        }
        let metrics = &self.control.metrics;
        match answer {
            Answer::None => {}
            Answer::Acknowledged => metrics.acknowledged.with_label_values(&[short_type(&type_url)]).inc(),
            Answer::Rejected { names, error } => {
                metrics.rejected.with_label_values(&[short_type(&type_url)]).inc();
                let error = proto::shortened(error);
                let some: Vec<&String> = names.iter().take(8).collect();
                tracing::warn!(node = %self.caller.node, type_url, names = ?some, of = names.len(), error, "the agent rejects a response");
                self.control.with_node(&self.caller.node, |node| {
                    if node.refused_responses.len() < MAX_TYPES || node.refused_responses.contains_key(&type_url) {
                        node.refused_responses.insert(type_url, error);
                    }
                });
            }
        }
        Ok(())
    }

    async fn respond(&mut self) -> Result<(), Cut> {
        let snapshot = Arc::clone(&self.snapshots.borrow_and_update());
        // Nothing was compiled yet: to answer now would tell a client that everything is gone.
        if snapshot.types.is_empty() {
            return Ok(());
        }
        let nothing = TypeSnapshot::default();
        for (type_url, of_type) in &mut self.types {
            // A type that is unknown here still gets its empty response, or its client would never be ready.
            let of_snapshot = snapshot.types.get(type_url.as_str()).map_or(&nothing, Arc::as_ref);
            let Some(response) = of_type.subscription.next(of_snapshot) else {
                continue;
            };
            let response = proto::response_to_wire(type_url, response);
            match timeout(self.control.bounds.send, self.responses.send(Ok(response))).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Ok(()),
                Err(_) => return Err(Cut("unread", Status::deadline_exceeded("a response was not read in time"))),
            }
            of_type.acknowledge_by = Some(Instant::now() + self.control.bounds.acknowledge);
            self.control
                .metrics
                .responses
                .with_label_values(&[short_type(type_url)])
                .inc();
        }
        Ok(())
    }
}

const OTHER: &str = "other";

/// A metric label from a closed set.
fn short_type(type_url: &str) -> &'static str {
    match type_url {
        mesh_proto::ADDRESS_TYPE_URL => "address",
        mesh_proto::AUTHORIZATION_TYPE_URL => "authorization",
        mesh_proto::SETTINGS_TYPE_URL => "settings",
        _ => OTHER,
    }
}
