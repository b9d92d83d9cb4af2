//! The connection to the control plane: TLS 1.3 to a server that chains to the one pinned root, a bearer token on every call.

use std::sync::Arc;
use std::time::Duration;
use std::{fmt, io};

use hyper_util::rt::TokioIo;
use mesh_proto::ca::istio_certificate_service_client::IstioCertificateServiceClient;
use mesh_proto::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use mesh_proto::node::node_pods_client::NodePodsClient;
use mesh_proto::node::node_reports_client::NodeReportsClient;
use parking_lot::RwLock;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use sha2::{Digest as _, Sha256};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Request, Status};

use crate::config::NodeToken;
use crate::identity::trust::TrustBundle;

/// The name in the control plane's serving certificate, wherever it listens.
pub const CONTROL_SERVER_NAME: &str = "mesh-control.culvert-system.svc";

/// Largest discovery response that is accepted; some 100,000 workloads of 600 bytes.
pub const MAX_MESSAGE_BYTES: usize = 64 * 1024 * 1024;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// A dead control plane is noticed after these two together.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    #[error("the token's secret cannot be sent in a header")]
    Secret,
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
}

/// Adds the node's credential to each call.
#[derive(Clone)]
pub struct Bearer(MetadataValue<Ascii>);

impl fmt::Debug for Bearer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Bearer([secret])")
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("authorization", self.0.clone());
        Ok(request)
    }
}

type Authenticated = InterceptedService<Channel, Bearer>;

/// A handle to the control plane; cheap to clone. Connects when first used and again after each loss.
#[derive(Clone, Debug)]
pub struct ControlPlane {
    channel: Channel,
    bearer: Bearer,
    address: Arc<str>,
    trusted: Trusted,
}

/// The roots that the control plane itself has named; before it has, the token's fingerprint stands for one.
type Trusted = Arc<RwLock<Option<Arc<TrustBundle>>>>;

impl ControlPlane {
    /// # Errors
    /// The secret is no header value, or TLS cannot be set up.
    pub fn new(token: &NodeToken, address: Option<&str>) -> Result<Self, TransportError> {
        let mut bearer: MetadataValue<Ascii> = format!("Bearer {}", token.secret.expose())
            .parse()
            .map_err(|_| TransportError::Secret)?;
        bearer.set_sensitive(true);
        let address: Arc<str> = address.unwrap_or(&token.address).into();
        let trusted = Trusted::default();
        let tls = TlsConnector::from(Arc::new(client_config(token.root_sha256, trusted.clone())?));
        let target = address.clone();
        let connector = tower::service_fn(move |_: Uri| {
            let (target, tls) = (target.clone(), tls.clone());
            async move { connect(&target, tls).await.map(TokioIo::new) }
        });
        // tonic must not put TLS of its own around ours, hence http. The name is only the :authority.
        let channel = Endpoint::from_static("http://culvert-control")
            .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
            .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .http2_adaptive_window(true)
            .connect_with_connector_lazy(connector);
        Ok(Self {
            channel,
            bearer: Bearer(bearer),
            address,
            trusted,
        })
    }

    /// The control plane proves itself by one of these from its next connection on. Without any, by the token's fingerprint.
    pub fn trust(&self, bundle: Option<&Arc<TrustBundle>>) {
        *self.trusted.write() = bundle.cloned();
    }

    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    #[must_use]
    pub fn discovery(&self) -> AggregatedDiscoveryServiceClient<Authenticated> {
        AggregatedDiscoveryServiceClient::with_interceptor(self.channel.clone(), self.bearer.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    #[must_use]
    pub fn certificates(&self) -> IstioCertificateServiceClient<Authenticated> {
        IstioCertificateServiceClient::with_interceptor(self.channel.clone(), self.bearer.clone())
    }

    #[must_use]
    pub fn node_pods(&self) -> NodePodsClient<Authenticated> {
        NodePodsClient::with_interceptor(self.channel.clone(), self.bearer.clone())
    }

    #[must_use]
    pub fn reports(&self) -> NodeReportsClient<Authenticated> {
        NodeReportsClient::with_interceptor(self.channel.clone(), self.bearer.clone())
    }
}

async fn connect(address: &str, tls: TlsConnector) -> io::Result<TlsStream<TcpStream>> {
    let stream = timeout(CONNECT_TIMEOUT, TcpStream::connect(address))
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "connecting to the control plane took too long"))??;
    stream.set_nodelay(true)?;
    let name = ServerName::try_from(CONTROL_SERVER_NAME).map_err(io::Error::other)?;
    timeout(HANDSHAKE_TIMEOUT, tls.connect(name, stream)).await.map_err(|_| {
        io::Error::new(
            io::ErrorKind::TimedOut,
            "the TLS handshake with the control plane took too long",
        )
    })?
}

fn client_config(root_sha256: [u8; 32], trusted: Trusted) -> Result<ClientConfig, rustls::Error> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = PinnedRoot {
        root_sha256,
        trusted,
        provider: provider.clone(),
    };
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

/// Trusts only chains to a presented certificate that is one of the mesh's roots, as the control plane has named them, or before it has,
/// to the one whose digest the token names. An ordinary path validation from there: that replaces only where the trust anchor comes from.
#[derive(Debug)]
struct PinnedRoot {
    root_sha256: [u8; 32],
    trusted: Trusted,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for PinnedRoot {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let root = intermediates
            .iter()
            .find(|certificate| match &*self.trusted.read() {
                Some(bundle) => bundle.contains(certificate),
                None => Sha256::digest(certificate).as_slice() == self.root_sha256,
            })
            .ok_or(CertificateError::UnknownIssuer)?;
        let anchor = webpki::anchor_from_trusted_cert(root).map_err(invalid)?;
        let certificate = webpki::EndEntityCert::try_from(end_entity).map_err(invalid)?;
        certificate
            .verify_for_usage(
                self.provider.signature_verification_algorithms.all,
                &[anchor],
                intermediates,
                now,
                webpki::KeyUsage::server_auth(),
                None,
                None,
            )
            .map_err(invalid)?;
        certificate.verify_is_valid_for_subject_name(server_name).map_err(invalid)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken here".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

fn invalid(error: webpki::Error) -> rustls::Error {
    let reason = match error {
        webpki::Error::CertExpired { .. } => CertificateError::Expired,
        webpki::Error::CertNotValidYet { .. } => CertificateError::NotValidYet,
        webpki::Error::CertNotValidForName(_) => CertificateError::NotValidForName,
        webpki::Error::UnknownIssuer => CertificateError::UnknownIssuer,
        other => CertificateError::Other(rustls::OtherError(Arc::new(other))),
    };
    reason.into()
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};

    use super::*;

    /// A serving certificate, and its root.
    fn served() -> (CertificateDer<'static>, CertificateDer<'static>) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).unwrap();
        let mut leaf = CertificateParams::new(vec![CONTROL_SERVER_NAME.to_owned()]).unwrap();
        leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let leaf = leaf
            .signed_by(&KeyPair::generate().unwrap(), &Issuer::new(params, key))
            .unwrap();
        (leaf.der().clone(), root.der().clone())
    }

    #[test]
    fn the_token_is_believed_until_the_control_plane_has_named_its_roots() {
        let (first, second) = (served(), served());
        let verifier = PinnedRoot {
            root_sha256: Sha256::digest(&first.1).into(),
            trusted: Trusted::default(),
            provider: Arc::new(rustls::crypto::aws_lc_rs::default_provider()),
        };
        let takes = |(leaf, root): &(CertificateDer<'static>, CertificateDer<'static>)| {
            let name = ServerName::try_from(CONTROL_SERVER_NAME).unwrap();
            let chain = [root.clone()];
            verifier.verify_server_cert(leaf, &chain, &name, &[], UnixTime::now()).is_ok()
        };
        assert_eq!((takes(&first), takes(&second)), (true, false));
        for (roots, expected) in [(vec![&first, &second], (true, true)), (vec![&second], (false, true))] {
            let roots = roots.into_iter().map(|(_, root)| root.clone()).collect();
            *verifier.trusted.write() = Some(Arc::new(TrustBundle::new(roots).unwrap()));
            assert_eq!((takes(&first), takes(&second)), expected);
        }
    }
}
