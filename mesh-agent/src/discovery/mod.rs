//! Keeps the agent's state as the control plane has it: one stream, three resource types, reconnected for ever. While the control
//! plane is away the last good state stands.

pub mod backoff;
pub mod node_pods;
pub mod noticed;
pub mod report;
pub mod subscription;
#[cfg(test)]
mod tests;
pub mod transport;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use mesh_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Resource};
use mesh_proto::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL, SETTINGS_TYPE_URL};
use parking_lot::Mutex;
use prost_types::{Struct, Value, value::Kind};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::proto;
use crate::state::{Change, SharedState};
use backoff::Backoff;
pub use subscription::MAX_REJECTED_NAMED;
use subscription::{Received, Subscription, refuse_unknown_type};
use transport::ControlPlane;

/// Waits between streams: doubled from the first up to the longest, jittered.
const FIRST_RETRY: Duration = Duration::from_millis(200);
const LONGEST_RETRY: Duration = Duration::from_secs(10);
/// Opening a stream includes TCP and TLS, which have limits of their own.
const OPEN_TIMEOUT: Duration = Duration::from_secs(15);
/// Another maker's control plane never answers for our settings: the defaults count after this long on a stream that answers
/// for everything else.
const SETTINGS_PATIENCE: Duration = Duration::from_secs(3);
/// Requests that wait for the stream; one for each type and one for each response.
const REQUEST_QUEUE: usize = 16;

/// How discovery stands: for readiness, metrics, and the node's reports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiscoveryStatus {
    pub connected: bool,
    /// Every type has answered once since the agent started; stays true.
    pub synced: bool,
    /// What is synced is what an earlier agent remembered: the control plane has not answered for everything yet.
    pub from_memory: bool,
    /// Type URL → system_version_info of what decisions are made by.
    pub enforced_versions: BTreeMap<&'static str, String>,
    /// "type name: reason" of what was sent and cannot be used, until it can, or is gone. At most [`MAX_REJECTED_NAMED`]; the name `*`
    /// stands for more of its type.
    pub rejected: Vec<String>,
    /// Policies that could never be read, and deny until they can, or are gone; at most [`MAX_REJECTED_NAMED`], in order.
    pub stand_ins: Vec<String>,
    /// When the control plane last said something on the stream.
    pub last_word: Option<Instant>,
    /// Counted since the start.
    pub connections: u64,
    pub responses: u64,
    pub rejected_resources: u64,
}

/// Who the agent is to the control plane.
#[derive(Clone, Debug)]
pub struct NodeName(pub Arc<str>);

impl NodeName {
    fn wire(&self) -> Node {
        let text = |text: &str| Value {
            kind: Some(Kind::StringValue(text.to_owned())),
        };
        Node {
            // The form that ambient control planes parse: kind, address, pod.namespace, domain.
            id: format!("ztunnel~0.0.0.0~{}.culvert-system~culvert-system.svc.cluster.local", self.0),
            cluster: "culvert-agent".to_owned(),
            metadata: Some(Struct {
                fields: BTreeMap::from([("NODE_NAME".to_owned(), text(&self.0))]),
            }),
        }
    }
}

/// The three subscriptions, which outlive streams, and are remembered for the agent after this one.
#[derive(Debug)]
pub struct Subscriptions {
    addresses: Subscription,
    authorizations: Subscription,
    settings: Subscription,
}

impl Default for Subscriptions {
    fn default() -> Self {
        Self {
            addresses: Subscription::new(ADDRESS_TYPE_URL),
            authorizations: Subscription::new(AUTHORIZATION_TYPE_URL),
            settings: Subscription::new(SETTINGS_TYPE_URL),
        }
    }
}

impl Subscriptions {
    /// Everything in force, once there is everything; a part must not be taken for the whole.
    #[must_use]
    pub fn snapshot(&self) -> Option<[DeltaDiscoveryResponse; 3]> {
        self.synced(true).then(|| self.each().map(Subscription::snapshot))
    }

    /// Brings the state to where an earlier agent's was. False: the snapshot has not everything, and nothing is changed.
    ///
    /// A type is read as a response of the control plane is. What cannot be read, in a file that is whole, is of another version
    /// of the agent: nothing of it is believed.
    #[must_use]
    pub fn restore(&mut self, snapshot: Vec<DeltaDiscoveryResponse>, state: &SharedState) -> bool {
        let mut restored = Self::default();
        let mut changes = Vec::new();
        for snapshot in snapshot {
            let stand_ins = snapshot
                .resources
                .iter()
                .filter(|resource| resource.resource.is_none())
                .count();
            let Some(received) = restored.restore_one(snapshot) else {
                return false;
            };
            if received.rejected.len() != stand_ins {
                return false;
            }
            changes.extend(received.changes);
        }
        if !restored.synced(true) {
            return false;
        }
        changes.push(Change::Synced);
        state.apply(changes);
        *self = restored;
        true
    }

    fn restore_one(&mut self, snapshot: DeltaDiscoveryResponse) -> Option<Received<Change>> {
        fn decoded<T>(result: Result<T, impl ToString>) -> Result<T, String> {
            result.map_err(|error| error.to_string())
        }
        match snapshot.type_url.as_str() {
            ADDRESS_TYPE_URL => Some(
                self.addresses
                    .restore(snapshot, |resource| decoded(proto::address(resource)), |_| None),
            ),
            AUTHORIZATION_TYPE_URL => {
                let policy = |resource: &Resource| decoded(proto::authorization(resource));
                Some(self.authorizations.restore(snapshot, policy, proto::denying))
            }
            SETTINGS_TYPE_URL => Some(
                self.settings
                    .restore(snapshot, |resource| decoded(proto::settings(resource)), |_| None),
            ),
            _ => None,
        }
    }

    fn is_confirmed(&self) -> bool {
        self.addresses.confirmed() && self.authorizations.confirmed()
    }

    fn each(&self) -> [&Subscription; 3] {
        [&self.settings, &self.authorizations, &self.addresses]
    }

    /// The first requests of a new stream: settings and policies before those who are subject to them.
    fn open(&mut self, node: &NodeName) -> [DeltaDiscoveryRequest; 3] {
        [&mut self.settings, &mut self.authorizations, &mut self.addresses].map(|subscription| subscription.open(node.wire()))
    }

    fn receive(&mut self, response: DeltaDiscoveryResponse) -> Result<Received<Change>, DeltaDiscoveryResponse> {
        let received = match response.type_url.as_str() {
            ADDRESS_TYPE_URL => self.addresses.receive(
                response,
                |resource| proto::address(resource).map_err(|e| e.to_string()),
                |name| Some(Change::RemoveAddress(name)),
                |_| None,
            ),
            AUTHORIZATION_TYPE_URL => self.authorizations.receive(
                response,
                |resource| proto::authorization(resource).map_err(|e| e.to_string()),
                |name| Some(Change::RemovePolicy(name)),
                proto::denying,
            ),
            // Settings that are gone say nothing of what holds instead: the last ones stay.
            SETTINGS_TYPE_URL => self.settings.receive(
                response,
                |resource| proto::settings(resource).map_err(|e| e.to_string()),
                |_| None,
                |_| None,
            ),
            _ => return Err(response),
        };
        Ok(received)
    }

    /// `settings_due`: the settings have been waited for long enough.
    fn synced(&self, settings_due: bool) -> bool {
        // Settings that cannot be used are there, and say something that must not be taken for the defaults.
        let unusable = self.settings.rejected().next().is_some();
        let settings = self.settings.held() > 0 || (!unusable && (settings_due || self.settings.answered()));
        self.addresses.answered() && self.authorizations.answered() && settings
    }
}

/// Runs discovery until `stop`. `subscriptions`: as they are, or restored; shared with who remembers them.
pub async fn run(
    control: ControlPlane,
    node: NodeName,
    subscriptions: Arc<Mutex<Subscriptions>>,
    state: Arc<SharedState>,
    status: watch::Sender<DiscoveryStatus>,
    stop: CancellationToken,
) {
    let mut backoff = Backoff::new(FIRST_RETRY, LONGEST_RETRY);
    loop {
        let stream = stream(&control, &node, &state, &status, &subscriptions, &mut backoff);
        let ended = tokio::select! {
            () = stop.cancelled() => return,
            ended = stream => ended,
        };
        status.send_if_modified(|status| std::mem::replace(&mut status.connected, false));
        let wait = backoff.after_failure();
        warn!(control = control.address(), reason = %causes(&ended), retry_in = ?wait, "discovery is away; the last good state stands");
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
        }
    }
}

/// One stream, from its opening to its end.
async fn stream(
    control: &ControlPlane,
    node: &NodeName,
    state: &SharedState,
    status: &watch::Sender<DiscoveryStatus>,
    subscriptions: &Mutex<Subscriptions>,
    backoff: &mut Backoff,
) -> tonic::Status {
    let (requests, receiver) = mpsc::channel(REQUEST_QUEUE);
    let openings = subscriptions.lock().open(node);
    for opening in openings {
        // The queue has room for the three: this never waits.
        if requests.send(opening).await.is_err() {
            return tonic::Status::internal("the request stream is closed");
        }
    }
    let mut discovery = control.discovery();
    let opening = discovery.delta_aggregated_resources(ReceiverStream::new(receiver));
    let mut responses = match tokio::time::timeout(OPEN_TIMEOUT, opening).await {
        Ok(Ok(response)) => response.into_inner(),
        Ok(Err(status)) => return status,
        Err(_) => return tonic::Status::deadline_exceeded("the stream did not open"),
    };
    info!(control = control.address(), "discovery is connected");
    status.send_modify(|status| {
        status.connected = true;
        status.connections += 1;
    });
    let settings_due = Instant::now() + SETTINGS_PATIENCE;
    loop {
        let message = tokio::select! {
            message = responses.message() => message,
            () = tokio::time::sleep_until(settings_due), if !status.borrow().synced && Instant::now() < settings_due => {
                mark_synced(&subscriptions.lock(), state, status, true);
                continue;
            }
        };
        let response = match message {
            Ok(Some(response)) => response,
            Ok(None) => return tonic::Status::unavailable("ended by the control plane"),
            Err(status) => return status,
        };
        backoff.reset();
        let reply = {
            let mut subscriptions = subscriptions.lock();
            let reply = match subscriptions.receive(response) {
                Ok(received) => apply(received, state, &mut subscriptions, status),
                Err(unknown) => {
                    warn!(type_url = %unknown.type_url.chars().take(100).collect::<String>(), "a response of a type that was not asked for");
                    refuse_unknown_type(&unknown)
                }
            };
            mark_synced(&subscriptions, state, status, Instant::now() >= settings_due);
            reply
        };
        if requests.send(reply).await.is_err() {
            return tonic::Status::unavailable("the control plane stopped reading");
        }
    }
}

/// Makes the changes those by which decisions are made, and only then gives the answer out.
fn apply(
    received: Received<Change>,
    state: &SharedState,
    subscriptions: &mut Subscriptions,
    status: &watch::Sender<DiscoveryStatus>,
) -> DeltaDiscoveryRequest {
    let Received {
        changes,
        reply,
        rejected,
    } = received;
    let count = changes.len();
    state.apply(changes);
    let Some(subscription) = subscriptions.each().into_iter().find(|s| s.type_url() == reply.type_url) else {
        return reply;
    };
    let (type_url, version) = (subscription.type_url(), subscription.version().to_owned());
    debug!(type_url, %version, changes = count, rejected = rejected.len(), "applied");
    for resource in rejected.iter().take(MAX_REJECTED_NAMED) {
        warn!(type_url, name = %resource.name, reason = %resource.reason, "a resource cannot be used; what was known of it before stands");
    }
    let rejected_count = rejected.len() as u64;
    let mut stand_ins: Vec<String> = subscriptions.authorizations.stand_ins().iter().cloned().collect();
    stand_ins.sort_unstable();
    stand_ins.truncate(MAX_REJECTED_NAMED);
    // Policies first: of them the control plane tells what is in force where.
    let types = [
        &subscriptions.authorizations,
        &subscriptions.settings,
        &subscriptions.addresses,
    ];
    let rejected = types.into_iter().flat_map(|subscription| {
        let type_url = subscription.type_url();
        let short = type_url.rsplit('.').next().unwrap_or(type_url);
        subscription.rejected().map(move |named| format!("{short} {named}"))
    });
    let rejected: Vec<String> = rejected.take(MAX_REJECTED_NAMED).collect();
    status.send_modify(|status| {
        status.responses += 1;
        status.last_word = Some(Instant::now());
        status.rejected_resources += rejected_count;
        status.enforced_versions.insert(type_url, version);
        status.stand_ins = stand_ins;
        status.rejected = rejected;
    });
    reply
}

fn mark_synced(subscriptions: &Subscriptions, state: &SharedState, status: &watch::Sender<DiscoveryStatus>, settings_due: bool) {
    if subscriptions.is_confirmed() && status.send_if_modified(|status| std::mem::replace(&mut status.from_memory, false)) {
        info!("the control plane has answered for everything: the state is no longer only remembered");
    }
    if !status.borrow().synced && subscriptions.synced(settings_due) {
        state.apply(vec![Change::Synced]);
        let first = status.send_if_modified(|status| !std::mem::replace(&mut status.synced, true));
        if first {
            info!(
                addresses = subscriptions.addresses.held(),
                policies = subscriptions.authorizations.held(),
                "discovery is synced"
            );
        }
    }
}

/// A gRPC status with what caused it: tonic's own message for a failed connection is only "transport error".
fn causes(status: &tonic::Status) -> String {
    use std::error::Error as _;
    let mut text = format!("{:?}: {}", status.code(), status.message());
    let mut cause = status.source();
    // Chains are short; the bound is against a cycle.
    for _ in 0..8 {
        let Some(error) = cause else { break };
        let next = error.to_string();
        if !text.ends_with(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}
