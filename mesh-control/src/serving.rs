//! The TLS listener: a serving certificate that makes itself anew, and bounded connections.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use parking_lot::{Mutex, RwLock};
use rustls::ServerConfig;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use time::OffsetDateTime;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

use crate::authority::{Authority, AuthorityError};
use crate::limits::{ACCEPT_PAUSE, MAX_CONNECTIONS, MAX_CONNECTIONS_PER_ADDRESS, MAX_SERVER_NAMES, TLS_HANDSHAKE_TIMEOUT};
use crate::metrics::Metrics;

/// The certificate in use.
pub struct ServingCertificate {
    authority: Arc<Authority>,
    current: RwLock<Option<Current>>,
}

struct Current {
    names: Vec<String>,
    renew_at: OffsetDateTime,
    key: Arc<CertifiedKey>,
}

impl std::fmt::Debug for ServingCertificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ServingCertificate")
    }
}

impl ServingCertificate {
    #[must_use]
    pub fn new(authority: Arc<Authority>) -> Self {
        Self {
            authority,
            current: RwLock::new(None),
        }
    }

    /// Makes a new certificate when there is none, at half-life, and when the names have changed.
    ///
    /// # Errors
    /// It cannot be made; the old one stays in use.
    pub fn refresh(&self, mut names: Vec<String>, now: OffsetDateTime) -> Result<bool, AuthorityError> {
        names.sort();
        names.dedup();
        names.truncate(MAX_SERVER_NAMES);
        if self
            .current
            .read()
            .as_ref()
            .is_some_and(|current| current.names == names && now < current.renew_at)
        {
            return Ok(false);
        }
        let (leaf, key, not_after) = self.authority.sign_serving(&names, now)?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key));
        let key =
            rustls::crypto::aws_lc_rs::sign::any_ecdsa_type(&key).map_err(|error| AuthorityError::Signing(error.to_string()))?;
        // The root goes along: a node that knows only its fingerprint finds it in the chain.
        let chain = vec![leaf, self.authority.root_der().clone()];
        let renew_at = now + (not_after - now) / 2;
        tracing::info!(?names, %not_after, "serving certificate made");
        *self.current.write() = Some(Current {
            names,
            renew_at,
            key: Arc::new(CertifiedKey::new(chain, key)),
        });
        Ok(true)
    }
}

impl ResolvesServerCert for ServingCertificate {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.current.read().as_ref().map(|current| Arc::clone(&current.key))
    }
}

/// TLS 1.3 only, HTTP/2 only.
///
/// # Errors
/// The crypto provider has no TLS 1.3.
pub fn tls_config(certificate: Arc<ServingCertificate>) -> Result<ServerConfig, rustls::Error> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(certificate);
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

#[derive(Default)]
struct Open {
    total: usize,
    by_address: HashMap<IpAddr, usize>,
}

/// A place among the open connections.
struct Place {
    open: Arc<Mutex<Open>>,
    address: IpAddr,
    metrics: Arc<Metrics>,
}

impl Place {
    fn take(open: &Arc<Mutex<Open>>, address: IpAddr, metrics: &Arc<Metrics>) -> Option<Self> {
        let mut counts = open.lock();
        let of_address = counts.by_address.get(&address).copied().unwrap_or(0);
        if counts.total >= MAX_CONNECTIONS || of_address >= MAX_CONNECTIONS_PER_ADDRESS {
            return None;
        }
        counts.total += 1;
        counts.by_address.insert(address, of_address + 1);
        metrics.connections.inc();
        Some(Self {
            open: Arc::clone(open),
            address,
            metrics: Arc::clone(metrics),
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.metrics.connections.dec();
        let mut counts = self.open.lock();
        counts.total -= 1;
        if let Some(of_address) = counts.by_address.get_mut(&self.address) {
            *of_address -= 1;
            if *of_address == 0 {
                counts.by_address.remove(&self.address);
            }
        }
    }
}

/// A connection after its handshake.
pub struct Connection {
    stream: TlsStream<TcpStream>,
    _place: Place,
}

impl Connected for Connection {
    type ConnectInfo = ();
    fn connect_info(&self) {}
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Accepts connections until the receiver is dropped.
pub async fn accept(
    listener: TcpListener,
    config: Arc<ServerConfig>,
    metrics: Arc<Metrics>,
    connections: mpsc::Sender<io::Result<Connection>>,
) {
    let acceptor = TlsAcceptor::from(config);
    let open = Arc::new(Mutex::new(Open::default()));
    let refuse = |reason: &str| metrics.connections_refused.with_label_values(&[reason]).inc();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = connections.closed() => return,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "accept");
                refuse("accept");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Some(place) = Place::take(&open, peer.ip().to_canonical(), &metrics) else {
            refuse("too_many");
            continue;
        };
        drop(stream.set_nodelay(true));
        let (acceptor, connections, metrics) = (acceptor.clone(), connections.clone(), Arc::clone(&metrics));
        tokio::spawn(async move {
            match timeout(TLS_HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => drop(connections.send(Ok(Connection { stream, _place: place })).await),
                Ok(Err(error)) => {
                    tracing::debug!(%peer, %error, "TLS handshake");
                    metrics.connections_refused.with_label_values(&["handshake"]).inc();
                }
                Err(_) => metrics.connections_refused.with_label_values(&["handshake_timeout"]).inc(),
            }
        });
    }
}
