//! The tunnels of other Pods to this one: mutual TLS, then for each CONNECT its own check, authorization and connect to the
//! application, which sees the true client's address.

use std::future::poll_fn;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use h2::server::{Connection, SendResponse};
use h2::{Reason, RecvStream};
use http::{Method, Request, Response, StatusCode};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, interval, sleep};

use super::authorize::{authorize, confirm_source, still_proven};
use super::buffers::Windows;
use super::copy::{self, End, Incoming};
use super::error::{Phase, ProxyError, Refusal, ResetBy, UNANSWERED, count_end};
use super::limits::{
    CONNECTION_WINDOW_BYTES, EARLY_BYTES, FRAME_BYTES, HEADER_LIST_BYTES, SEND_BUFFER_BYTES, STREAMS_PER_INBOUND_TUNNEL,
};
use super::measured::Measured;
use super::pod::PodContext;
use super::pool::keep_alive;
use super::proof::Proof;
use super::registry::ConnectionInfo;
use super::review;
use super::socket::{Carried, within};
use super::step::Step;
use super::{Accepted, Proxy};
use crate::identity::Identity;
use crate::telemetry::{ConnectionPath, ConnectionRecord, Direction, Peer, Reporter, SecurityPolicy, WorkloadPair};
use crate::tls::TlsError;
use crate::workload::Membership;

/// A tunnel after its handshake.
struct Tunnel {
    identity: Identity,
    /// The true client's address: never what a header claims.
    peer: SocketAddr,
    /// The address that it was opened to, which is one of the Pod's.
    local: IpAddr,
    /// When the first of both certificates ends.
    usable_until: SystemTime,
    proof: Arc<Proof>,
}

pub(super) async fn serve(proxy: Arc<Proxy>, context: Arc<PodContext>, accepted: Accepted) {
    let (peer, local) = (accepted.client.socket_addr(), accepted.listener.socket_addr());
    if let Err(error) = serve_tunnel(&proxy, &context, accepted).await {
        tracing::debug!(%error, %peer, pod = %context.pod.name, "tunnel refused");
        proxy.metrics.count_tunnel(error.reason());
        let record = proxy.state.read(|state| {
            let source = state.by_address(peer.ip());
            ConnectionRecord::new(
                Direction::Inbound,
                ConnectionPath::Tunnel,
                Peer::at(peer).workload(source.as_deref()),
                context.peer(Peer::at(local), state),
                proxy.access_log.clone(),
            )
        });
        record.finish(Some(error.reason()));
    }
}

/// An error only before the first stream.
async fn serve_tunnel(proxy: &Arc<Proxy>, context: &Arc<PodContext>, accepted: Accepted) -> Result<(), ProxyError> {
    let stream = Carried::new(accepted.stream);
    let limit = ProxyError::Refused(Refusal::Limit);
    let address = accepted.client.ip();
    let is_member = proxy.state.read(|state| {
        let known = state.by_address(address);
        known.is_some_and(|workload| workload.membership != Membership::Outside)
    });
    let _tunnel_place = context.inbound_tunnels.take(address, is_member).ok_or(limit.clone())?;
    // Whoever says nothing costs no handshake.
    within(proxy.limits.first_bytes_timeout, Phase::Handshake, async {
        stream.peek(&mut [0]).await.map_err(|error| TlsError::Handshake(error.into()))
    })
    .await?;
    let handshake_place = context.handshakes.take(address, is_member).ok_or(limit)?;
    let pair = proxy
        .certificates
        .current(&context.pod.identity)
        .ok_or(ProxyError::Refused(Refusal::CertificateMissing))?;
    if pair.is_expired(SystemTime::now()) {
        return Err(Refusal::CertificateExpired.into());
    }
    let windows = context.buffers.windows();
    let (stream, measure) = Measured::new(stream.into_inner());
    let handshake = async {
        let trusted = proxy.state.read(|state| state.settings().trust_bundle.clone());
        let (tls, peer) = proxy.tls.accept(&pair, trusted.as_deref(), stream).await?;
        let connection = h2::server::Builder::new()
            .initial_window_size(windows.stream_window())
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES)
            .max_header_list_size(HEADER_LIST_BYTES)
            .max_concurrent_streams(STREAMS_PER_INBOUND_TUNNEL)
            .max_send_buffer_size(SEND_BUFFER_BYTES)
            .handshake::<_, Bytes>(tls)
            .await?;
        Ok::<_, ProxyError>((connection, peer))
    };
    let handshake = within(proxy.limits.handshake_timeout, Phase::Handshake, handshake).await;
    let failed = handshake.as_ref().err().map(ProxyError::reason);
    proxy.metrics.tunnels().count_handshake(Reporter::Destination, failed);
    let (connection, peer) = handshake?;
    drop(handshake_place);
    let proof = Proof::new(&pair, &peer, address);
    still_proven(proxy, &proof)?;
    measure.opened(&proxy.metrics, ends(proxy, context, address, &peer.identity));
    proxy.metrics.count_tunnel("accepted");
    let tunnel = Arc::new(Tunnel {
        identity: peer.identity,
        peer: accepted.client.socket_addr(),
        local: accepted.listener.ip(),
        usable_until: peer.not_after.min(pair.not_after),
        proof,
    });
    serve_streams(proxy, context, connection, windows, tunnel).await;
    Ok(())
}

/// Between whom a tunnel is, by the workloads' names.
fn ends(proxy: &Proxy, context: &PodContext, address: IpAddr, identity: &Identity) -> WorkloadPair {
    proxy.state.read(|state| {
        let source = state.by_address(address).filter(|workload| workload.identity == *identity);
        let source = Peer::default().workload(source.as_deref());
        WorkloadPair::new(Reporter::Destination, &source, &context.peer(Peer::default(), state))
    })
}

async fn serve_streams<T: AsyncRead + AsyncWrite + Unpin>(
    proxy: &Arc<Proxy>,
    context: &Arc<PodContext>,
    mut connection: Connection<T, Bytes>,
    mut windows: Windows,
    tunnel: Arc<Tunnel>,
) {
    let lost = keep_alive(connection.ping_pong(), &proxy.limits);
    let expired = sleep(tunnel.usable_until.duration_since(SystemTime::now()).unwrap_or_default());
    tokio::pin!(lost, expired);
    let patience = proxy.limits.idle_inbound_tunnel;
    let mut idle_check = interval(patience / 4);
    let mut last_used = Instant::now();
    let mut closing = false;
    loop {
        tokio::select! {
            accepted = connection.accept() => match accepted {
                Some(Ok((request, respond))) => {
                    last_used = Instant::now();
                    serve_or_refuse(proxy, context, &tunnel, request, respond);
                }
                Some(Err(error)) => {
                    tracing::debug!(%error, peer = %tunnel.peer, "tunnel ended");
                    count_end(&proxy.metrics, &error);
                    return;
                }
                None => return,
            },
            () = &mut lost => {
                tracing::debug!(peer = %tunnel.peer, "the tunnel's peer no longer answers");
                proxy.metrics.count_tunnel(UNANSWERED);
                return;
            }
            () = windows.changed() => windows.apply(|size| connection.set_initial_window_size(size)),
            // The peer opens another one; streams that are open go on.
            // Of an agent that goes: what the peer still opens goes to the next one.
            () = context.stop_accepting.cancelled(), if !closing => {
                closing = true;
                connection.graceful_shutdown();
            }
            () = &mut expired, if !closing => {
                closing = true;
                connection.graceful_shutdown();
            }
            _ = idle_check.tick(), if !closing => {
                // Each stream's task holds the tunnel.
                if proxy.state.read(|state| tunnel.proof.broken_by(state.settings())).is_some() {
                    // Of no use any longer: each new stream would be refused.
                    closing = true;
                    connection.graceful_shutdown();
                } else if Arc::strong_count(&tunnel) > 1 {
                    last_used = Instant::now();
                } else if last_used.elapsed() >= patience {
                    closing = true;
                    connection.graceful_shutdown();
                }
            }
        }
    }
}

fn serve_or_refuse(
    proxy: &Arc<Proxy>,
    context: &Arc<PodContext>,
    tunnel: &Arc<Tunnel>,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
) {
    if SystemTime::now() >= tunnel.usable_until {
        proxy.metrics.count_tunnel(Refusal::CertificateExpired.reason());
        respond.send_reset(Reason::REFUSED_STREAM);
        return;
    }
    let stream = serve_stream(proxy.clone(), context.clone(), tunnel.clone(), request, respond);
    let shutdown = context.shutdown.clone();
    context.tasks.spawn(async move {
        tokio::select! {
            () = stream => {}
            () = shutdown.cancelled() => {}
        }
    });
}

async fn serve_stream(
    proxy: Arc<Proxy>,
    context: Arc<PodContext>,
    tunnel: Arc<Tunnel>,
    request: Request<RecvStream>,
    respond: SendResponse<Bytes>,
) {
    let destination = requested_destination(&request, tunnel.local);
    let mut record = proxy.state.read(|state| {
        let own = Peer::at(destination.unwrap_or(SocketAddr::new(tunnel.local, 0))).principal(Some(&context.pod.identity));
        ConnectionRecord::new(
            Direction::Inbound,
            ConnectionPath::Tunnel,
            Peer::at(tunnel.peer).principal(Some(&tunnel.identity)),
            context.peer(own, state),
            proxy.access_log.clone(),
        )
    });
    record.path(ConnectionPath::Tunnel, SecurityPolicy::MutualTls);
    let result = carry(
        &proxy,
        &context,
        &tunnel,
        destination,
        request.into_body(),
        respond,
        &mut record,
    )
    .await;
    if let Err(error) = &result {
        tracing::debug!(%error, peer = %tunnel.peer, source = %tunnel.identity, "inbound connection");
    }
    record.finish(result.err().map(|error| error.reason()));
}

/// Method CONNECT, and an authority whose address is the one that the tunnel was opened to.
pub(super) fn requested_destination<Body>(request: &Request<Body>, local: IpAddr) -> Option<SocketAddr> {
    let authority = request.uri().authority()?.as_str();
    let destination: SocketAddr = authority.parse().ok()?;
    let destination = crate::addr::canonical(destination);
    (request.method() == Method::CONNECT && destination.ip() == local && !mesh_common::is_agent_port(destination.port()))
        .then_some(destination)
}

async fn carry(
    proxy: &Arc<Proxy>,
    context: &PodContext,
    tunnel: &Tunnel,
    destination: Option<SocketAddr>,
    receive: RecvStream,
    mut respond: SendResponse<Bytes>,
    record: &mut ConnectionRecord,
) -> Result<(), ProxyError> {
    let Some(destination) = destination else {
        let refusal = Refusal::BadRequest.into();
        answer(&mut respond, status(&refusal), true)?;
        return Err(refusal);
    };
    proxy.steps.done(Step::Accepted);
    let registered = proxy.registry.register(
        &context.pod.pod_uid,
        ConnectionInfo {
            source: Some(tunnel.identity.clone()),
            proof: Some(tunnel.proof.clone()),
            ..ConnectionInfo::new(Direction::Inbound, ConnectionPath::Tunnel, tunnel.peer, destination)
        },
    );
    let connected = match registered {
        Ok(registered) => {
            let mut incoming = Incoming::new(receive, &registered);
            let connect = async {
                proxy.steps.done(Step::Registered);
                still_proven(proxy, &tunnel.proof)?;
                let source = confirm_source(proxy, tunnel.peer.ip(), &tunnel.identity).await?;
                proxy.steps.done(Step::Confirmed);
                let peer = Peer::at(tunnel.peer).principal(Some(&tunnel.identity));
                record.source(peer.workload(Some(&source)));
                authorize(proxy, context, Some(&tunnel.identity), tunnel.peer.ip(), destination, record).await?;
                proxy.steps.done(Step::Evaluated);
                registered.decided();
                proxy.steps.done(Step::Decided);
                // From here on it is cut when the address gets another holder; it may have got one just before.
                if !proxy.state.read(|state| tunnel.proof.peer_is_there(state)) {
                    return Err(Refusal::IdentityMismatch.into());
                }
                let (lease, application) = Carried::to_application(context, tunnel.peer.ip(), destination).await?;
                proxy.steps.done(Step::Connected);
                Ok((lease, application))
            };
            // Whoever gives up, or sends much too early, is not waited for.
            tokio::select! {
                connected = connect => connected.map(|(lease, application)| (registered, incoming, lease, application)),
                error = given_up(&mut respond) => Err(error),
                error = incoming.early(EARLY_BYTES) => Err(error),
                () = registered.account().evicted().cancelled() => Err(ProxyError::Reset(ResetBy::Memory)),
            }
        }
        Err(error) => Err(error),
    };
    let (registered, incoming, _lease, application) = match connected {
        Ok(connected) => connected,
        Err(error @ ProxyError::Reset(_)) => {
            respond.send_reset(Reason::CANCEL);
            return Err(error);
        }
        Err(error) => {
            answer(&mut respond, status(&error), true)?;
            return Err(error);
        }
    };
    let send = answer(&mut respond, StatusCode::OK, false)?;
    record.opened();
    let result = copy::tunnel(application, End::Destination, send, incoming, record, &registered).await;
    review::name_policy(record, &registered);
    result
}

/// Resolves when the peer resets a stream that is not answered.
async fn given_up(respond: &mut SendResponse<Bytes>) -> ProxyError {
    // An error is the tunnel's end.
    let _ = poll_fn(|cx| respond.poll_reset(cx)).await;
    ProxyError::Reset(ResetBy::Source)
}

fn answer(
    respond: &mut SendResponse<Bytes>,
    status: StatusCode,
    end_of_stream: bool,
) -> Result<h2::SendStream<Bytes>, ProxyError> {
    let mut response = Response::new(());
    *response.status_mut() = status;
    Ok(respond.send_response(response, end_of_stream)?)
}

fn status(error: &ProxyError) -> StatusCode {
    match error {
        ProxyError::Refused(Refusal::BadRequest) => StatusCode::BAD_REQUEST,
        ProxyError::Refused(
            Refusal::DeniedByPolicy
            | Refusal::PolicyMissing
            | Refusal::IdentityMismatch
            | Refusal::IdentityUnknown
            | Refusal::IdentityRevoked
            | Refusal::RootRemoved
            | Refusal::DestinationUnknown,
        ) => StatusCode::UNAUTHORIZED,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    }
}
