//! The TLS listener: a serving certificate that makes itself anew, and bounded connections.

use std::collections::HashSet;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll};

use parking_lot::RwLock;
use rustls::ServerConfig;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use time::OffsetDateTime;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::{Sleep, sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

use crate::authority::AuthorityError;
use crate::limits::{ACCEPT_PAUSE, Bounds, MAX_SERVER_NAMES};
use crate::metrics::Metrics;
use crate::places::{Place, Places};
use crate::roots::Roots;

/// The certificate in use.
pub struct ServingCertificate {
    roots: Arc<Roots>,
    current: RwLock<Option<Current>>,
    /// Names that found no room.
    left_out: AtomicUsize,
}

struct Current {
    /// Whoever has signed it, and how that leads to the root.
    chain: Vec<CertificateDer<'static>>,
    names: Vec<String>,
    made_at: OffsetDateTime,
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
    pub fn new(roots: Arc<Roots>) -> Self {
        Self {
            roots,
            current: RwLock::new(None),
            left_out: AtomicUsize::new(0),
        }
    }

    /// How many names found no room at the last look.
    #[must_use]
    pub fn names_left_out(&self) -> usize {
        self.left_out.load(Ordering::Relaxed)
    }

    /// Makes a new certificate when there is none, at half-life, and when the names, or the root that signs, have changed. The first
    /// [`MAX_SERVER_NAMES`] names are in it.
    ///
    /// # Errors
    /// It cannot be made; the old one stays in use.
    pub fn refresh(&self, mut names: Vec<String>, now: OffsetDateTime) -> Result<bool, AuthorityError> {
        let mut seen = HashSet::new();
        names.retain(|name| seen.insert(name.clone()));
        let left_out = names.len().saturating_sub(MAX_SERVER_NAMES);
        let first_left_out = names.get(MAX_SERVER_NAMES).cloned().unwrap_or_default();
        names.truncate(MAX_SERVER_NAMES);
        if self.left_out.swap(left_out, Ordering::Relaxed) != left_out && left_out > 0 {
            tracing::error!(
                left_out,
                first = first_left_out,
                "the serving certificate has room for {MAX_SERVER_NAMES} names; nodes that reach the control plane by others cannot \
                 connect: give them one name in common (node-token --rotate --address)"
            );
        }
        let roots = self.roots.in_force();
        // The root goes along: a node that knows only its fingerprint finds it in the chain.
        let mut chain = roots.authority.intermediates().to_vec();
        chain.push(roots.authority.root_der().clone());
        // One of a time that has not come yet is from before the clock was set back: no node may take it.
        let is_current = |current: &Current| {
            current.names == names && current.chain == chain && (current.made_at..current.renew_at).contains(&now)
        };
        if self.current.read().as_ref().is_some_and(is_current) {
            return Ok(false);
        }
        let (leaf, key, not_after) = roots.authority.sign_serving(&names, now)?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key));
        let key =
            rustls::crypto::aws_lc_rs::sign::any_ecdsa_type(&key).map_err(|error| AuthorityError::Signing(error.to_string()))?;
        let sent = std::iter::once(leaf).chain(chain.iter().cloned()).collect();
        let renew_at = now + (not_after - now) / 2;
        tracing::info!(?names, %not_after, "serving certificate made");
        *self.current.write() = Some(Current {
            chain,
            names,
            made_at: now,
            renew_at,
            key: Arc::new(CertifiedKey::new(sent, key)),
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

/// Whether a call on a connection has brought a node's token.
#[derive(Clone, Debug)]
pub struct Authenticated {
    is_set: Arc<AtomicBool>,
    host: IpAddr,
}

impl Authenticated {
    fn by(host: IpAddr) -> Self {
        let is_set = Arc::default();
        Self { is_set, host }
    }

    pub fn set(&self) {
        self.is_set.store(true, Ordering::Release);
    }

    fn is_set(&self) -> bool {
        self.is_set.load(Ordering::Acquire)
    }

    /// Where the connection comes from.
    #[must_use]
    pub fn host(&self) -> IpAddr {
        self.host
    }
}

/// A connection after its handshake. It fails when nobody has authenticated himself on it in time.
pub struct Connection {
    stream: TlsStream<TcpStream>,
    authenticated: Authenticated,
    /// `None`: authenticated, or over already.
    deadline: Option<Pin<Box<Sleep>>>,
    overdue: bool,
    _place: Place,
    metrics: Arc<Metrics>,
}

impl Connection {
    /// Asked on every use, reading and writing alike: a peer that reads nothing keeps a server from reading, too.
    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if let Some(deadline) = &mut self.deadline {
            if self.authenticated.is_set() {
                self.deadline = None;
            } else if deadline.as_mut().poll(cx).is_ready() {
                self.deadline = None;
                self.overdue = true;
                let refused = &self.metrics.connections_refused;
                refused.with_label_values(&["unauthenticated"]).inc();
            }
        }
        if self.overdue {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "nobody has authenticated himself"));
        }
        Ok(())
    }
}

impl Connected for Connection {
    type ConnectInfo = Authenticated;
    fn connect_info(&self) -> Authenticated {
        self.authenticated.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
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
    bounds: Bounds,
    connections: mpsc::Sender<io::Result<Connection>>,
) {
    let acceptor = TlsAcceptor::from(config);
    let places = Places::new(
        bounds.connections,
        bounds.connections_per_address,
        Some(metrics.connections.clone()),
    );
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
        let Some(place) = places.take(peer.ip()) else {
            refuse("too_many");
            continue;
        };
        drop(stream.set_nodelay(true));
        let (acceptor, connections, metrics) = (acceptor.clone(), connections.clone(), Arc::clone(&metrics));
        tokio::spawn(async move {
            match timeout(bounds.tls_handshake, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => {
                    let connection = Connection {
                        stream,
                        authenticated: Authenticated::by(place.host()),
                        deadline: Some(Box::pin(sleep(bounds.authenticate))),
                        overdue: false,
                        _place: place,
                        metrics,
                    };
                    drop(connections.send(Ok(connection)).await);
                }
                Ok(Err(error)) => {
                    tracing::debug!(%peer, %error, "TLS handshake");
                    metrics.connections_refused.with_label_values(&["handshake"]).inc();
                }
                Err(_) => metrics.connections_refused.with_label_values(&["handshake_timeout"]).inc(),
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_jumps_a_day_leaves_a_certificate_that_holds_now() {
        let folder = tempfile::tempdir().unwrap();
        let state = crate::state_dir::StateDir::open(folder.path()).unwrap();
        let now = OffsetDateTime::now_utc();
        let roots = Roots::open(&state, "cluster.local", now - time::Duration::days(7)).unwrap();
        let certificate = ServingCertificate::new(Arc::new(roots));
        let names = || vec!["localhost".to_owned()];
        let day = time::Duration::days(1);
        assert!(certificate.refresh(names(), now).unwrap());
        assert!(!certificate.refresh(names(), now + day).unwrap(), "it holds a day later");
        assert!(
            certificate.refresh(names(), now - day).unwrap(),
            "of tomorrow: no node takes it"
        );
        assert!(!certificate.refresh(names(), now - day).unwrap());
        assert!(!certificate.refresh(names(), now).unwrap(), "and ahead again");
    }

    #[test]
    fn a_serving_certificate_has_room_for_so_many_names_and_its_own_come_first() {
        let folder = tempfile::tempdir().unwrap();
        let state = crate::state_dir::StateDir::open(folder.path()).unwrap();
        let now = OffsetDateTime::now_utc();
        let roots = Roots::open(&state, "cluster.local", now).unwrap();
        let certificate = ServingCertificate::new(Arc::new(roots));
        let with = |others: usize| {
            let others = (1..=others).map(|n| format!("10.0.{}.{}", n / 250, n % 250));
            ["localhost".to_owned(), "localhost".to_owned()]
                .into_iter()
                .chain(others)
                .collect()
        };
        let names = || {
            let current = certificate.current.read();
            let chain = &current.as_ref().expect("one was made").key.cert;
            let (_, leaf) = x509_parser::parse_x509_certificate(&chain[0]).unwrap();
            let names = leaf.subject_alternative_name().unwrap().expect("names").value.clone();
            names.general_names.iter().map(|name| format!("{name:?}")).collect::<Vec<_>>()
        };
        assert!(certificate.refresh(with(MAX_SERVER_NAMES - 1), now).unwrap());
        assert_eq!((names().len(), certificate.names_left_out()), (MAX_SERVER_NAMES, 0));
        certificate.refresh(with(MAX_SERVER_NAMES + 1), now).unwrap();
        assert_eq!((names().len(), certificate.names_left_out()), (MAX_SERVER_NAMES, 2));
        assert!(names()[0].contains("localhost"), "{:?}", names()[0]);
    }
}
