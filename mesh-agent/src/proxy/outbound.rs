//! What an application of the Pod opens: into a tunnel when its destination is in the mesh, passed on when it is a known outsider,
//! to an endpoint of a service when it is a service's address, refused otherwise.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use http::{Method, Request, Uri};

use super::authorize::still_proven;
use super::copy::{self, End};
use super::error::{ProxyError, Refusal, ResetBy};
use super::limits::{DISCOVERY_PATIENCE, ENDPOINT_TRIES};
use super::pod::PodContext;
use super::pool::{OpenStream, PoolKey};
use super::registry::ConnectionInfo;
use super::review::takes_nothing_in_clear;
use super::socket::Carried;
use super::step::Step;
use super::{Accepted, Proxy, Registered};
use crate::addr::{ClientAddr, OriginalDst};
use crate::balance::{self, AffinityKey};
use crate::capture::is_probe;
use crate::state::{Destination, Endpoint, Endpoints, State};
use crate::telemetry::{ConnectionPath, ConnectionRecord, Direction, PROTECTED, Peer, SecurityPolicy};
use crate::workload::{Service, Workload};

pub(super) async fn serve(proxy: Arc<Proxy>, context: Arc<PodContext>, accepted: Accepted) {
    let Accepted {
        stream,
        client,
        listener,
    } = accepted;
    let destination = context.pod.network.take_original_destination(client, listener);
    if let Ok(destination) = destination
        && is_probe(destination)
    {
        return context.pod.probes.answer(&context.pod.pod_uid, destination, stream).await;
    }
    let application = Carried::new(stream);
    let client = match destination {
        Ok(destination) => context.application(client, destination),
        Err(_) => client,
    };
    let (source, known) = proxy.state.read(|state| {
        let source = context.peer(Peer::at(client.socket_addr()), state);
        let known = destination
            .as_ref()
            .ok()
            .and_then(|destination| state.by_address(destination.ip()));
        (source, known)
    });
    let peer = match &destination {
        Ok(destination) => Peer::at(destination.socket_addr()).workload(known.as_deref()),
        Err(_) => Peer::default(),
    };
    let (direction, path) = (Direction::Outbound, ConnectionPath::Passthrough);
    let mut record = ConnectionRecord::new(direction, path, source, peer, proxy.access_log.clone());
    let result = match destination {
        Ok(destination) => carry(&proxy, &context, application, client, destination, &mut record).await,
        // Not redirected by our programs, or their map was full: never guessed.
        Err(error) => Err(error.into()),
    };
    if let Err(error) = &result {
        tracing::debug!(%error, pod = %context.pod.name, "outbound connection");
    }
    record.finish(result.err().map(|error| error.reason()));
}

async fn carry(
    proxy: &Arc<Proxy>,
    context: &PodContext,
    application: Carried,
    client: ClientAddr,
    destination: OriginalDst,
    record: &mut ConnectionRecord,
) -> Result<(), ProxyError> {
    let registered = proxy.registry.register(
        &context.pod.pod_uid,
        ConnectionInfo::new(
            Direction::Outbound,
            ConnectionPath::Passthrough,
            client.socket_addr(),
            destination.socket_addr(),
        ),
    )?;
    let mut far = open(proxy, context, client, destination, &registered, record).await;
    if far.as_ref().is_err_and(ProxyError::is_protected_meanwhile) && registered.cut_by().is_none() {
        // Nothing was sent yet, and now there is somebody to open a tunnel to.
        far = open(proxy, context, client, destination, &registered, record).await;
    }
    if far.as_ref().is_err_and(ProxyError::is_protected_meanwhile) && registered.cut_by().is_none() {
        proxy.metrics.count_proof_cut(PROTECTED);
    }
    let far = far?;
    record.opened();
    match far {
        Far::Plain(outside) => copy::plain(application, outside, record, &registered).await,
        Far::Tunnel(stream) => {
            let receive = copy::Incoming::new(stream.receive, &registered);
            let result = copy::tunnel(application, End::Source, stream.send, receive, record, &registered).await;
            drop(stream.guard);
            result
        }
    }
}

/// Opens the far half to whatever stands at the destination.
async fn open(
    proxy: &Arc<Proxy>,
    context: &PodContext,
    client: ClientAddr,
    destination: OriginalDst,
    registered: &Registered,
    record: &mut ConnectionRecord,
) -> Result<Far, ProxyError> {
    match resolve(proxy, destination).await? {
        Destination::ServiceVip(service) => {
            record.service(&service);
            reach_service(proxy, context, client, destination, &service, registered, record).await
        }
        standing => reach(proxy, context, client, destination, standing, registered, record).await,
    }
}

/// What stands at the destination, after waiting for discovery where it may soon say something better.
async fn resolve(proxy: &Proxy, destination: OriginalDst) -> Result<Destination, ProxyError> {
    let settled = |state: &State| match state.destination(destination) {
        Destination::Lost(_) | Destination::Unknown => None,
        Destination::Pending(workload) if state.settings().is_strict(&workload.namespace) => None,
        destination => Some(destination),
    };
    match proxy.state.wait_for(DISCOVERY_PATIENCE, settled).await {
        Some(destination) => Ok(destination),
        None => Ok(proxy.state.read(|state| state.destination(destination))),
    }
}

/// The far half of a connection, open.
enum Far {
    Tunnel(OpenStream),
    Plain(Carried),
}

/// Opens the far half to one address.
async fn reach(
    proxy: &Arc<Proxy>,
    context: &PodContext,
    client: ClientAddr,
    destination: OriginalDst,
    standing: Destination,
    registered: &Registered,
    record: &mut ConnectionRecord,
) -> Result<Far, ProxyError> {
    let (unprotected, holder) = match standing {
        Destination::Mesh(workload) => {
            if mesh_common::is_agent_port(destination.port()) {
                return Err(Refusal::AgentPort.into());
            }
            let ends = Ends {
                client,
                destination,
                workload,
            };
            return tunnel(proxy, context, &ends, registered, record).await.map(Far::Tunnel);
        }
        Destination::Lost(_) => return Err(Refusal::DestinationLost.into()),
        // A service behind a service's address is nothing that an endpoint can be.
        Destination::Unknown | Destination::ServiceVip(_) => return Err(Refusal::DestinationUnknown.into()),
        Destination::Pending(workload) => {
            if proxy.state.read(|state| state.settings().is_strict(&workload.namespace)) {
                return Err(Refusal::DestinationPending.into());
            }
            ("pending", Some(workload))
        }
        Destination::Excluded(holder) => {
            record.path(ConnectionPath::Excluded, SecurityPolicy::None);
            ("excluded", holder)
        }
        Destination::Outside(holder) => ("outside", holder),
    };
    proxy.steps.done(Step::Resolved);
    let socket = context.pod.network.outbound_socket(destination.ip())?;
    registered.goes_in_clear(destination, holder);
    // Cut from here on when the destination comes under protection; it may have come just before.
    if proxy
        .state
        .read(|state| takes_nothing_in_clear(state, registered.asked(), destination))
    {
        return Err(ProxyError::Reset(ResetBy::Protection));
    }
    proxy.metrics.count_passthrough(unprotected);
    proxy.steps.done(Step::LetOut);
    let outside = tokio::select! {
        outside = Carried::connect(socket, destination.socket_addr(), "passthrough") => outside?,
        error = registered.cut_off() => return Err(error),
    };
    Ok(Far::Plain(outside))
}

/// Opens the far half to an endpoint of a service, and to another one if that refuses. Nothing of the application's was sent by
/// then, so it cannot be sent twice.
async fn reach_service(
    proxy: &Arc<Proxy>,
    context: &PodContext,
    client: ClientAddr,
    asked: OriginalDst,
    service: &Service,
    registered: &Registered,
    record: &mut ConnectionRecord,
) -> Result<Far, ProxyError> {
    let mut candidates = match proxy.state.read(|state| state.endpoints(service, asked)) {
        Endpoints::NoSuchPort => return Err(Refusal::ServicePortUnknown.into()),
        Endpoints::Of(candidates) => candidates,
    };
    if service.node_local && !candidates.is_empty() {
        candidates.retain(|endpoint| endpoint.workload.node == proxy.node);
        if candidates.is_empty() {
            return Err(Refusal::NoLocalEndpoint.into());
        }
    }
    let affinity = service.affinity.map(|timeout| {
        let key = AffinityKey {
            client: client.ip(),
            service: service.hostname.clone(),
            port: asked.port(),
        };
        (key, timeout)
    });
    let mut failed = None;
    for _ in 0..ENDPOINT_TRIES {
        let weight = |endpoint: &Endpoint| endpoint.workload.weight;
        let taken = match &affinity {
            Some((key, _)) => {
                let affinities = context.affinities.lock();
                affinities.take(
                    key,
                    &mut candidates,
                    |endpoint| &endpoint.workload.uid,
                    weight,
                    Instant::now(),
                )
            }
            None => balance::take(&mut candidates, weight, rand::random()),
        };
        let Some(endpoint) = taken else { break };
        if failed.is_some() {
            proxy.metrics.count_endpoint_retry();
        }
        record.destination(Peer::at(endpoint.address.socket_addr()).workload(Some(&endpoint.workload)));
        let uid = endpoint.workload.uid.clone();
        let standing = Destination::of(endpoint.workload);
        match reach(proxy, context, client, endpoint.address, standing, registered, record).await {
            Err(error) if error.is_refusal_to_connect() => failed = Some(error),
            Err(error) => return Err(error),
            Ok(far) => {
                if let Some((key, timeout)) = affinity {
                    let is_kept = context.affinities.lock().keep(key, uid, Instant::now(), timeout);
                    if !is_kept {
                        proxy.metrics.count_affinity_not_kept();
                    }
                }
                return Ok(far);
            }
        }
    }
    Err(failed.unwrap_or(Refusal::NoHealthyEndpoint.into()))
}

/// Between whom a tunnelled connection is.
struct Ends {
    client: ClientAddr,
    destination: OriginalDst,
    workload: Arc<Workload>,
}

async fn tunnel(
    proxy: &Arc<Proxy>,
    context: &PodContext,
    ends: &Ends,
    registered: &Registered,
    record: &mut ConnectionRecord,
) -> Result<OpenStream, ProxyError> {
    let pod = &context.pod;
    // Another endpoint may have been tried in clear, or this one a moment ago: nothing was sent to it.
    registered.goes_not_in_clear();
    record.path(ConnectionPath::Tunnel, SecurityPolicy::MutualTls);
    let source = proxy
        .state
        .read(|state| context.peer(Peer::at(ends.client.socket_addr()), state));
    record.source(source.principal(Some(&pod.identity)));
    record.destination(
        Peer::at(ends.destination.socket_addr())
            .workload(Some(&ends.workload))
            .principal(Some(&ends.workload.identity)),
    );
    let key = PoolKey {
        pod_uid: pod.pod_uid.clone(),
        source: pod.identity.clone(),
        destination: ends.destination.ip(),
        expected: ends.workload.identity.clone(),
    };
    let own = proxy.state.read(|state| context.workload(state));
    let request = connect_request(ends, own.as_deref())?;
    let revoked = |state: &State| {
        [&key.source, &key.expected]
            .iter()
            .any(|identity| state.settings().revoked.contains(identity))
    };
    if proxy.state.read(revoked) {
        return Err(Refusal::IdentityRevoked.into());
    }
    let stream = tokio::select! {
        stream = proxy.pool.open(context, &key, &request) => stream?,
        error = registered.cut_off() => return Err(error),
    };
    registered.rely_on(stream.guard.proof());
    registered.decided();
    still_proven(proxy, stream.guard.proof())?;
    // As inbound: cut from here on when the address gets another holder, it may have got one just before.
    if !proxy.state.read(|state| stream.guard.proof().peer_is_there(state)) {
        return Err(Refusal::IdentityMismatch.into());
    }
    Ok(stream)
}

/// No `traceparent`: that is passed on, and an application's bytes are opaque here: there is none to pass on.
fn connect_request(ends: &Ends, source: Option<&Workload>) -> Result<Request<()>, ProxyError> {
    let bad = |_| ProxyError::Refused(Refusal::BadRequest);
    let authority = Uri::builder().authority(ends.destination.to_string()).build().map_err(bad)?;
    let mut request = Request::builder()
        .method(Method::CONNECT)
        .uri(authority)
        .header("forwarded", forwarded(ends.client.socket_addr()));
    if let Some(source) = source {
        request = request.header("baggage", baggage(source));
    }
    request.body(()).map_err(bad)
}

/// RFC 7239: an address with a port stands in quotes.
fn forwarded(client: SocketAddr) -> String {
    format!("for=\"{client}\"")
}

/// Who the source is, for the far side's telemetry (W3C baggage). Claimed, never used for a decision.
fn baggage(source: &Workload) -> String {
    let owner = format!("k8s.{}.name", source.workload_type.as_str());
    [
        ("k8s.cluster.name", &source.cluster),
        ("k8s.namespace.name", &source.namespace),
        (owner.as_str(), &source.workload_name),
        ("service.name", &source.canonical_name),
        ("service.version", &source.canonical_revision),
        ("cloud.region", &source.region),
        ("cloud.availability_zone", &source.zone),
    ]
    .into_iter()
    .filter(|(_, value)| !value.is_empty())
    .map(|(key, value)| format!("{key}={}", percent_encoded(value)))
    .collect::<Vec<_>>()
    .join(",")
}

fn percent_encoded(value: &str) -> String {
    let mut text = String::with_capacity(value.len());
    for byte in value.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~' | b'/' | b':') {
            text.push(char::from(byte));
        } else {
            text.push_str(&format!("%{byte:02X}"));
        }
    }
    text
}
