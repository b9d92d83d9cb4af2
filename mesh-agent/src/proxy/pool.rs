//! Tunnels to other Pods, shared by the connections that have the very same source Pod, source identity, destination and expected
//! identity. A handshake costs two to four plain connections; whoever needs the same tunnel meanwhile waits for the one under way.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use h2::client::SendRequest;
use h2::{Ping, PingPong, Reason, RecvStream, SendStream};
use http::{Request, StatusCode};
use mesh_common::TUNNEL_PORT;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, sleep, timeout};

use super::buffers::Windows;
use super::error::{Phase, ProxyError, Refusal, UNANSWERED, count_end};
use super::limits::{
    CERTIFICATE_PATIENCE, CONNECTION_WINDOW_BYTES, FRAME_BYTES, HEADER_LIST_BYTES, Limits, SEND_BUFFER_BYTES,
    STREAMS_PER_OUTBOUND_TUNNEL,
};
use super::measured::Measured;
use super::pod::PodContext;
use super::proof::Proof;
use super::socket::{Carried, connect, within};
use crate::identity::Identity;
use crate::identity::store::{CertificateStore, CertifiedKeyPair};
use crate::state::{Settings, SharedState};
use crate::telemetry::{Metrics, Peer, Reporter, WorkloadPair};
use crate::tls::TlsConfigs;

/// Tunnels that broke under us before the far side answered: another is tried, as nothing was carried yet.
const ATTEMPTS: usize = 3;

/// All four, or one Pod's tunnel would carry another's traffic.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct PoolKey {
    /// Stands for the source's network namespace.
    pub pod_uid: Arc<str>,
    pub source: Identity,
    pub destination: IpAddr,
    pub expected: Identity,
}

#[derive(Debug)]
pub(super) struct Pool {
    state: Arc<SharedState>,
    certificates: Arc<CertificateStore>,
    tls: Arc<TlsConfigs>,
    metrics: Arc<Metrics>,
    limits: Limits,
    /// Bounded by the tunnels of each Pod.
    slots: Mutex<HashMap<PoolKey, Arc<Slot>>>,
}

/// The tunnels of one key.
#[derive(Debug, Default)]
struct Slot {
    tunnels: Mutex<Vec<Arc<Tunnel>>>,
    /// Held during a handshake; the last failure goes to those that waited for it.
    connecting: tokio::sync::Mutex<Option<(Instant, ProxyError)>>,
}

#[derive(Debug)]
struct Tunnel {
    send: SendRequest<Bytes>,
    /// The certificate that it was made with; a newer one wants a new tunnel.
    pair: Arc<CertifiedKeyPair>,
    peer_not_after: SystemTime,
    proof: Arc<Proof>,
    streams: AtomicUsize,
    closed: AtomicBool,
    last_used: Mutex<Instant>,
}

/// An open stream; counts against its tunnel, and keeps it, until dropped.
#[derive(Debug)]
pub(super) struct StreamGuard(Arc<Tunnel>);

pub(super) struct OpenStream {
    pub send: SendStream<Bytes>,
    pub receive: RecvStream,
    pub guard: StreamGuard,
}

impl Pool {
    pub(super) fn new(
        state: Arc<SharedState>,
        certificates: Arc<CertificateStore>,
        tls: Arc<TlsConfigs>,
        metrics: Arc<Metrics>,
        limits: Limits,
    ) -> Arc<Self> {
        Arc::new(Self {
            state,
            certificates,
            tls,
            metrics,
            limits,
            slots: Mutex::default(),
        })
    }

    /// A stream to where `request` says, accepted by the far side.
    pub(super) async fn open(
        self: &Arc<Self>,
        pod: &PodContext,
        key: &PoolKey,
        request: &Request<()>,
    ) -> Result<OpenStream, ProxyError> {
        let mut attempt = 1;
        loop {
            let guard = self.tunnel(pod, key).await?;
            match guard.request(request.clone(), self.limits.response_timeout).await {
                Err(ProxyError::Tunnel(error)) if attempt < ATTEMPTS && is_tunnels_end(&error) => {
                    tracing::debug!(%error, destination = %key.destination, "tunnel broke before its answer; another is tried");
                    guard.0.closed.store(true, Ordering::Relaxed);
                    attempt += 1;
                }
                result => {
                    let (send, receive) = result?;
                    return Ok(OpenStream { send, receive, guard });
                }
            }
        }
    }

    async fn tunnel(self: &Arc<Self>, pod: &PodContext, key: &PoolKey) -> Result<StreamGuard, ProxyError> {
        let slot = self.slots.lock().entry(key.clone()).or_default().clone();
        let result = self.tunnel_of_slot(pod, key, &slot).await;
        drop(slot);
        if result.is_err() {
            self.forget_if_empty(key);
        }
        result
    }

    async fn tunnel_of_slot(
        self: &Arc<Self>,
        pod: &PodContext,
        key: &PoolKey,
        slot: &Arc<Slot>,
    ) -> Result<StreamGuard, ProxyError> {
        let pair = self
            .certificates
            .current_within(CERTIFICATE_PATIENCE, &key.source)
            .await
            .ok_or(ProxyError::Refused(Refusal::CertificateMissing))?;
        if pair.is_expired(SystemTime::now()) {
            return Err(Refusal::CertificateExpired.into());
        }
        let settings = || self.state.read(|state| state.settings().clone());
        if let Some(guard) = slot.claim(&pair, &settings()) {
            return Ok(guard);
        }
        let since = Instant::now();
        // As long as one handshake may take; then this one has waited enough.
        let mut last_failure = timeout(self.limits.handshake_timeout, slot.connecting.lock())
            .await
            .map_err(|_| ProxyError::Timeout(Phase::Handshake))?;
        if let Some(guard) = slot.claim(&pair, &settings()) {
            return Ok(guard);
        }
        if let Some((at, error)) = &*last_failure
            && *at >= since
        {
            return Err(error.clone());
        }
        // In a box of its own: each connection's task would have room for a handshake, for as long as the connection lives.
        match Box::pin(self.establish(pod, key, slot, pair.clone())).await {
            Ok(tunnel) => {
                self.metrics.count_tunnel("opened");
                // A root was taken away, or an account deleted, during the handshake.
                if let Some(broken) = tunnel.proof.broken_by(&settings()) {
                    return Err(broken.into());
                }
                slot.tunnels.lock().push(tunnel);
                slot.claim(&pair, &settings())
                    .ok_or(ProxyError::Refused(Refusal::CertificateExpired))
            }
            Err(error) => {
                self.metrics.count_tunnel(error.reason());
                *last_failure = Some((Instant::now(), error.clone()));
                Err(error)
            }
        }
    }

    async fn establish(
        self: &Arc<Self>,
        pod: &PodContext,
        key: &PoolKey,
        slot: &Arc<Slot>,
        pair: Arc<CertifiedKeyPair>,
    ) -> Result<Arc<Tunnel>, ProxyError> {
        let permit = pod
            .outbound_tunnels
            .clone()
            .try_acquire_owned()
            .map_err(|_| ProxyError::Refused(Refusal::Limit))?;
        let socket = pod.pod.network.outbound_socket(key.destination)?;
        let stream = connect(socket, SocketAddr::new(key.destination, TUNNEL_PORT), "tunnel").await?;
        let (stream, measure) = Measured::new(Carried::new(stream).into_inner());
        let windows = pod.buffers.windows();
        let handshake = async {
            let trusted = self.state.read(|state| state.settings().trust_bundle.clone());
            let (tls, peer) = self
                .tls
                .connect(&pair, trusted.as_deref(), &key.expected, key.destination, stream)
                .await?;
            let (send, connection) = h2::client::Builder::new()
                .enable_push(false)
                .initial_window_size(windows.stream_window())
                .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
                .max_frame_size(FRAME_BYTES)
                .max_header_list_size(HEADER_LIST_BYTES)
                .max_send_buffer_size(SEND_BUFFER_BYTES)
                .handshake::<_, Bytes>(tls)
                .await?;
            Ok::<_, ProxyError>((send, connection, peer))
        };
        let handshake = within(self.limits.handshake_timeout, Phase::Handshake, handshake).await;
        let failed = handshake.as_ref().err().map(ProxyError::reason);
        self.metrics.tunnels().count_handshake(Reporter::Source, failed);
        let (send, connection, peer) = handshake?;
        measure.opened(&self.metrics, self.ends(pod, key));
        let tunnel = Arc::new(Tunnel {
            send,
            proof: Proof::new(&pair, &peer, key.destination),
            pair,
            peer_not_after: peer.not_after,
            streams: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            last_used: Mutex::new(Instant::now()),
        });
        let driver = Driver {
            pool: self.clone(),
            key: key.clone(),
            slot: Arc::downgrade(slot),
            tunnel: Arc::downgrade(&tunnel),
            _permit: permit,
        };
        let shutdown = pod.shutdown.clone();
        pod.tasks.spawn(async move {
            tokio::select! {
                () = driver.run(connection, windows) => {}
                () = shutdown.cancelled() => {}
            }
        });
        Ok(tunnel)
    }

    /// Between whom a tunnel is, by the workloads' names.
    fn ends(&self, pod: &PodContext, key: &PoolKey) -> WorkloadPair {
        self.state.read(|state| {
            let source = pod.peer(Peer::default(), state);
            let destination = state.by_address(key.destination);
            // Another one may have the address by now.
            let destination = destination.filter(|workload| workload.identity == key.expected);
            let destination = Peer::default().workload(destination.as_deref());
            WorkloadPair::new(Reporter::Source, &source, &destination)
        })
    }

    fn forget_if_empty(&self, key: &PoolKey) {
        let mut slots = self.slots.lock();
        // Openers take their slot under this lock: a count of one means that nobody is about to use it.
        if let Some(slot) = slots.get(key)
            && Arc::strong_count(slot) == 1
            && slot.tunnels.lock().is_empty()
        {
            slots.remove(key);
        }
    }

    #[cfg(test)]
    pub(super) fn tunnel_count(&self) -> usize {
        self.slots.lock().values().map(|slot| slot.tunnels.lock().len()).sum()
    }
}

impl Slot {
    /// A stream on the fullest tunnel that has room, so that the others can become idle.
    fn claim(&self, pair: &Arc<CertifiedKeyPair>, settings: &Settings) -> Option<StreamGuard> {
        let now = SystemTime::now();
        let mut tunnels = self.tunnels.lock();
        // Its streams keep a tunnel that is no longer here; it closes with the last of them.
        tunnels.retain(|tunnel| tunnel.takes_new_streams(pair, settings, now));
        let tunnel = tunnels
            .iter()
            .filter(|tunnel| tunnel.streams.load(Ordering::Relaxed) < tunnel.max_streams())
            .max_by_key(|tunnel| tunnel.streams.load(Ordering::Relaxed))?;
        tunnel.streams.fetch_add(1, Ordering::Relaxed);
        *tunnel.last_used.lock() = Instant::now();
        Some(StreamGuard(tunnel.clone()))
    }
}

impl Tunnel {
    fn takes_new_streams(&self, current: &Arc<CertifiedKeyPair>, settings: &Settings, now: SystemTime) -> bool {
        !self.closed.load(Ordering::Relaxed)
            && Arc::ptr_eq(&self.pair, current)
            && !self.pair.is_expired(now)
            && now < self.peer_not_after
            && self.proof.broken_by(settings).is_none()
    }

    fn max_streams(&self) -> usize {
        self.send.current_max_send_streams().clamp(1, STREAMS_PER_OUTBOUND_TUNNEL)
    }
}

impl StreamGuard {
    pub(super) fn proof(&self) -> &Arc<Proof> {
        &self.0.proof
    }

    async fn request(&self, request: Request<()>, patience: Duration) -> Result<(SendStream<Bytes>, RecvStream), ProxyError> {
        within(patience, Phase::Response, async {
            let mut send = self.0.send.clone().ready().await?;
            let (response, stream) = send.send_request(request, false)?;
            let response = response.await?;
            match response.status() {
                StatusCode::OK => Ok((stream, response.into_body())),
                status => Err(ProxyError::Answer(status)),
            }
        })
        .await
    }
}

impl Drop for StreamGuard {
    fn drop(&mut self) {
        *self.0.last_used.lock() = Instant::now();
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Keeps a tunnel going, and takes it out of its slot when it ends or is idle.
struct Driver {
    pool: Arc<Pool>,
    key: PoolKey,
    slot: Weak<Slot>,
    tunnel: Weak<Tunnel>,
    _permit: OwnedSemaphorePermit,
}

impl Driver {
    async fn run<T: AsyncRead + AsyncWrite + Unpin>(
        self,
        mut connection: h2::client::Connection<T, Bytes>,
        mut windows: Windows,
    ) {
        let lost = keep_alive(connection.ping_pong(), &self.pool.limits);
        let idle = self.retire_when_idle();
        tokio::pin!(lost, idle);
        loop {
            tokio::select! {
                result = &mut connection => {
                    if let Err(error) = result {
                        tracing::debug!(%error, destination = %self.key.destination, "tunnel ended");
                        count_end(&self.pool.metrics, &error);
                    }
                    return;
                }
                () = &mut lost => {
                    tracing::debug!(destination = %self.key.destination, "the tunnel's peer no longer answers");
                    self.pool.metrics.count_tunnel(UNANSWERED);
                    return;
                }
                // Retired, nobody holds it but its last streams, whose end closes it.
                () = &mut idle => return,
                () = windows.changed() => windows.apply(|size| connection.set_initial_window_size(size)),
            }
        }
    }

    /// Never resolves: an idle tunnel is only let go of.
    async fn retire_when_idle(&self) {
        loop {
            sleep(self.pool.limits.idle_tunnel / 4).await;
            let (Some(slot), Some(tunnel)) = (self.slot.upgrade(), self.tunnel.upgrade()) else {
                continue;
            };
            // Claims happen under this lock.
            let mut tunnels = slot.tunnels.lock();
            if tunnel.streams.load(Ordering::Relaxed) == 0 && tunnel.last_used.lock().elapsed() >= self.pool.limits.idle_tunnel {
                tunnels.retain(|other| !Arc::ptr_eq(other, &tunnel));
            }
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if let Some(tunnel) = self.tunnel.upgrade() {
            tunnel.closed.store(true, Ordering::Relaxed);
            if let Some(slot) = self.slot.upgrade() {
                slot.tunnels.lock().retain(|other| !Arc::ptr_eq(other, &tunnel));
            }
        }
        self.pool.forget_if_empty(&self.key);
    }
}

/// Whether it is the tunnel that has ended, or that takes nothing more, and not this one stream.
fn is_tunnels_end(error: &h2::Error) -> bool {
    error.is_io() || error.is_go_away() || error.reason() == Some(Reason::REFUSED_STREAM)
}

/// Resolves when the peer no longer answers.
pub(super) async fn keep_alive(pings: Option<PingPong>, limits: &Limits) {
    let Some(mut pings) = pings else {
        return std::future::pending().await;
    };
    loop {
        sleep(limits.ping_interval).await;
        match timeout(limits.ping_timeout, pings.ping(Ping::opaque())).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) | Err(_) => return,
        }
    }
}
