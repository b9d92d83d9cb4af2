//! TLS of the tunnel: 1.3 only, both ends prove their identity, no server name. What is checked here is the handshake: chain,
//! validity, key usage, trust domain, identity, ALPN. That a peer's identity fits its address is the proxy's to check.

mod verify;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self, cipher_suite};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, CommonState, RootCertStore, ServerConfig};
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::identity::Identity;
use crate::identity::store::CertifiedKeyPair;
use crate::identity::trust::TrustBundle;

pub use verify::first_identity;

/// The tunnel's only protocol so far. A private one would be offered before it.
pub const ALPN: &[u8] = b"h2";

#[derive(Clone, Debug, thiserror::Error)]
pub enum TlsError {
    /// The pair cannot be used at all: the key does not fit, say.
    #[error("our certificate cannot be used: {0}")]
    OwnCertificate(String),
    #[error("handshake: {0}")]
    Handshake(Arc<std::io::Error>),
    #[error("the peer did not agree on h2")]
    NoAlpn,
    #[error("the peer's certificate: {0}")]
    PeerCertificate(String),
}

/// A peer after its handshake.
#[derive(Clone, Debug)]
pub struct TlsPeer {
    pub identity: Identity,
    pub not_after: SystemTime,
    /// Leaf first, as it was verified.
    pub chain: Vec<CertificateDer<'static>>,
}

/// What is made once a certificate: rebuilt when the store has a newer one, and when other roots are trusted.
struct Generation {
    /// The pair's own life is the store's to decide.
    pair: Weak<CertifiedKeyPair>,
    /// What clients are verified against.
    roots: Arc<RootCertStore>,
    server: Arc<ServerConfig>,
    client_key: Arc<dyn ResolvesClientCert>,
}

/// TLS configurations by identity. Bounded like the certificate store: one for each identity, replaced with its certificate, dropped
/// with its last Pod.
#[derive(Default)]
pub struct TlsConfigs {
    generations: Mutex<HashMap<Identity, Arc<Generation>>>,
}

impl std::fmt::Debug for TlsConfigs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsConfigs").finish_non_exhaustive()
    }
}

impl TlsConfigs {
    /// # Errors
    /// The pair cannot be used, the handshake fails, the client does not prove an identity of our trust domain, or does not speak h2.
    pub async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        pair: &Arc<CertifiedKeyPair>,
        trusted: Option<&TrustBundle>,
        stream: S,
    ) -> Result<(server::TlsStream<S>, TlsPeer), TlsError> {
        let config = self.generation(pair, trusted)?.server.clone();
        let tls = TlsAcceptor::from(config)
            .accept(stream)
            .await
            .map_err(|error| TlsError::Handshake(error.into()))?;
        let peer = checked_peer(tls.get_ref().1)?;
        Ok((tls, peer))
    }

    /// # Errors
    /// The pair cannot be used, the handshake fails, the server does not prove the expected identity, or does not speak h2.
    pub async fn connect<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        pair: &Arc<CertifiedKeyPair>,
        trusted: Option<&TrustBundle>,
        expected: &Identity,
        address: IpAddr,
        stream: S,
    ) -> Result<(client::TlsStream<S>, TlsPeer), TlsError> {
        let generation = self.generation(pair, trusted)?;
        let verifier = verify::ExpectedServer::new(generation.roots.clone(), expected.clone(), provider());
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| TlsError::OwnCertificate(error.to_string()))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(generation.client_key.clone());
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.enable_sni = false;
        // A session is resumed without its certificates: nothing to check their identity or their end by.
        config.resumption = Resumption::disabled();
        let tls = TlsConnector::from(Arc::new(config))
            .connect(ServerName::IpAddress(address.into()), stream)
            .await
            .map_err(|error| TlsError::Handshake(error.into()))?;
        let mut peer = checked_peer(tls.get_ref().1)?;
        // A server may have more names than one; it has proven this one.
        peer.identity = expected.clone();
        Ok((tls, peer))
    }

    fn generation(&self, pair: &Arc<CertifiedKeyPair>, trusted: Option<&TrustBundle>) -> Result<Arc<Generation>, TlsError> {
        let roots = trusted.map_or(&pair.roots, TrustBundle::roots);
        let mut generations = self.generations.lock();
        if let Some(generation) = generations.get(&pair.identity)
            && std::ptr::eq(generation.pair.as_ptr(), Arc::as_ptr(pair))
            && Arc::ptr_eq(&generation.roots, roots)
        {
            return Ok(generation.clone());
        }
        let generation = Arc::new(Generation::new(pair, roots).map_err(TlsError::OwnCertificate)?);
        // A handshake may have had the pair from before its identity was dropped: what that left goes here.
        generations.retain(|_, generation| generation.pair.strong_count() > 0);
        generations.insert(pair.identity.clone(), generation.clone());
        Ok(generation)
    }

    /// Nothing of this identity's key is kept.
    pub fn forget(&self, identity: &Identity) {
        self.generations.lock().remove(identity);
    }

    #[cfg(test)]
    pub(crate) fn identities(&self) -> Vec<Identity> {
        self.generations.lock().keys().cloned().collect()
    }
}

impl Generation {
    fn new(pair: &Arc<CertifiedKeyPair>, roots: &Arc<RootCertStore>) -> Result<Self, String> {
        let provider = provider();
        let key =
            CertifiedKey::from_der(pair.chain.clone(), pair.key.clone_key(), &provider).map_err(|error| error.to_string())?;
        let key = Arc::new(OneKey(Arc::new(key)));
        let clients = verify::MeshClients::new(roots.clone(), &pair.identity.trust_domain, provider.clone())?;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| error.to_string())?
            .with_client_cert_verifier(Arc::new(clients))
            .with_cert_resolver(key.clone());
        server.alpn_protocols = vec![ALPN.to_vec()];
        // No resumption here either.
        server.send_tls13_tickets = 0;
        server.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        Ok(Self {
            pair: Arc::downgrade(pair),
            roots: roots.clone(),
            server: Arc::new(server),
            client_key: key,
        })
    }
}

/// Our only certificate, whoever asks.
#[derive(Debug)]
struct OneKey(Arc<CertifiedKey>);

impl ResolvesClientCert for OneKey {
    fn resolve(&self, _issuers: &[&[u8]], _schemes: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }
    fn has_certs(&self) -> bool {
        true
    }
}

impl rustls::server::ResolvesServerCert for OneKey {
    fn resolve(&self, _hello: rustls::server::ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }
}

/// aws-lc-rs with the tunnel's cipher suites, AES-GCM, and no other.
fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: std::sync::OnceLock<Arc<CryptoProvider>> = std::sync::OnceLock::new();
    PROVIDER
        .get_or_init(|| {
            Arc::new(CryptoProvider {
                cipher_suites: vec![cipher_suite::TLS13_AES_256_GCM_SHA384, cipher_suite::TLS13_AES_128_GCM_SHA256],
                ..aws_lc_rs::default_provider()
            })
        })
        .clone()
}

fn checked_peer(connection: &CommonState) -> Result<TlsPeer, TlsError> {
    if connection.alpn_protocol() != Some(ALPN) {
        return Err(TlsError::NoAlpn);
    }
    let chain = connection.peer_certificates().unwrap_or_default();
    let leaf = chain
        .first()
        .ok_or_else(|| TlsError::PeerCertificate("there is none".into()))?;
    Ok(TlsPeer {
        identity: first_identity(leaf).map_err(TlsError::PeerCertificate)?,
        not_after: not_after(leaf).map_err(TlsError::PeerCertificate)?,
        chain: chain.iter().map(|certificate| certificate.clone().into_owned()).collect(),
    })
}

fn not_after(leaf: &CertificateDer<'_>) -> Result<SystemTime, String> {
    let (_, certificate) = X509Certificate::from_der(leaf).map_err(|error| error.to_string())?;
    let seconds = u64::try_from(certificate.validity().not_after.timestamp()).map_err(|error| error.to_string())?;
    Ok(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
}
