//! The connection to the control plane: TLS 1.3 to a server that chains to a root of the mesh, a bearer token on every call.

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

use crate::config::{Credentials, RootsFollower, Secret, TokenFollower};
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
pub struct Bearer(Source);

#[derive(Clone)]
enum Source {
    Fixed(MetadataValue<Ascii>),
    /// The newest in a file.
    Followed(Arc<TokenFollower>),
}

impl fmt::Debug for Bearer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Bearer([secret])")
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let value = match &self.0 {
            Source::Fixed(value) => value.clone(),
            Source::Followed(token) => header(&token.newest()).map_err(|error| Status::internal(error.to_string()))?,
        };
        request.metadata_mut().insert("authorization", value);
        Ok(request)
    }
}

fn header(secret: &Secret) -> Result<MetadataValue<Ascii>, TransportError> {
    let mut value: MetadataValue<Ascii> = format!("Bearer {}", secret.expose())
        .parse()
        .map_err(|_| TransportError::Secret)?;
    value.set_sensitive(true);
    Ok(value)
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

/// The roots that the control plane itself has named; before it has, the credentials say who is believed.
type Trusted = Arc<RwLock<Option<Arc<TrustBundle>>>>;

impl ControlPlane {
    /// # Errors
    /// The secret is no header value, or TLS cannot be set up.
    pub fn new(credentials: &Credentials) -> Result<Self, TransportError> {
        let (bearer, anchor) = match credentials {
            Credentials::Node { token, .. } => (Source::Fixed(header(&token.secret)?), Anchor::Digest(token.root_sha256)),
            Credentials::ServiceAccount(account) => {
                (Source::Followed(account.token.clone()), Anchor::File(account.roots.clone()))
            }
        };
        let bearer = Bearer(bearer);
        let address: Arc<str> = credentials.control().into();
        let trusted = Trusted::default();
        let tls = TlsConnector::from(Arc::new(client_config(anchor, trusted.clone())?));
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
            bearer,
            address,
            trusted,
        })
    }

    /// The control plane proves itself by one of these from its next connection on. Without any, as the credentials say.
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

fn client_config(anchor: Anchor, trusted: Trusted) -> Result<ClientConfig, rustls::Error> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = MeshRoots {
        anchor,
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

/// Who vouches for the control plane, as the agent's credentials say.
#[derive(Debug)]
enum Anchor {
    /// The root with this SHA-256, until the control plane has named its roots.
    Digest([u8; 32]),
    /// The roots in a file that the cluster keeps. They count beside those that the control plane has named: of the two, either may be
    /// the newer word.
    File(Arc<RootsFollower>),
}

/// Trusts only chains to a presented certificate that is one of the mesh's roots. An ordinary path validation from there: that replaces
/// only where the trust anchor comes from.
#[derive(Debug)]
struct MeshRoots {
    anchor: Anchor,
    trusted: Trusted,
    provider: Arc<CryptoProvider>,
}

impl MeshRoots {
    /// Those whom the certificates that the server has sent may chain to.
    fn root<'a>(&self, presented: &'a [CertificateDer<'a>]) -> Result<&'a CertificateDer<'a>, rustls::Error> {
        let named = self.trusted.read().clone();
        let is_named = |root: &CertificateDer<'_>| named.as_ref().is_some_and(|named| named.contains(root));
        let found = match &self.anchor {
            Anchor::Digest(sha256) if named.is_none() => presented
                .iter()
                .find(|root| Sha256::digest(root).as_slice() == sha256.as_slice()),
            Anchor::Digest(_) => presented.iter().find(|root| is_named(root)),
            Anchor::File(file) => match file.newest() {
                Ok(roots) => presented.iter().find(|root| roots.contains(root) || is_named(root)),
                Err(error) if named.is_none() => return Err(rustls::Error::General(error.to_string())),
                Err(_) => presented.iter().find(|root| is_named(root)),
            },
        };
        Ok(found.ok_or(CertificateError::UnknownIssuer)?)
    }
}

impl ServerCertVerifier for MeshRoots {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let root = self.root(intermediates)?;
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
        // With both times: a clock that is wrong shows.
        webpki::Error::CertExpired { time, not_after } => CertificateError::ExpiredContext { time, not_after },
        webpki::Error::CertNotValidYet { time, not_before } => CertificateError::NotValidYetContext { time, not_before },
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
    struct Served {
        leaf: CertificateDer<'static>,
        root: CertificateDer<'static>,
        root_pem: String,
    }

    fn served() -> Served {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).unwrap();
        let mut leaf = CertificateParams::new(vec![CONTROL_SERVER_NAME.to_owned()]).unwrap();
        leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let leaf = leaf
            .signed_by(&KeyPair::generate().unwrap(), &Issuer::new(params, key))
            .unwrap();
        Served {
            leaf: leaf.der().clone(),
            root: root.der().clone(),
            root_pem: root.pem(),
        }
    }

    fn verifier(anchor: Anchor) -> MeshRoots {
        MeshRoots {
            anchor,
            trusted: Trusted::default(),
            provider: Arc::new(rustls::crypto::aws_lc_rs::default_provider()),
        }
    }

    fn takes(verifier: &MeshRoots, served: &Served) -> bool {
        let name = ServerName::try_from(CONTROL_SERVER_NAME).unwrap();
        let chain = [served.root.clone()];
        verifier
            .verify_server_cert(&served.leaf, &chain, &name, &[], UnixTime::now())
            .is_ok()
    }

    fn name(verifier: &MeshRoots, served: &[&Served]) {
        let roots = served.iter().map(|served| served.root.clone()).collect();
        *verifier.trusted.write() = Some(Arc::new(TrustBundle::new(roots).unwrap()));
    }

    #[test]
    fn the_token_is_believed_until_the_control_plane_has_named_its_roots() {
        let (first, second) = (served(), served());
        let verifier = verifier(Anchor::Digest(Sha256::digest(&first.root).into()));
        let both = || (takes(&verifier, &first), takes(&verifier, &second));
        assert_eq!(both(), (true, false));
        name(&verifier, &[&first, &second]);
        assert_eq!(both(), (true, true));
        name(&verifier, &[&second]);
        assert_eq!(both(), (false, true));
    }

    #[test]
    fn the_published_roots_count_beside_those_that_the_control_plane_has_named() {
        let (first, second, third) = (served(), served(), served());
        let file = tempfile::NamedTempFile::new().unwrap();
        let publish = |served: &[&Served]| {
            let pem: String = served.iter().map(|served| served.root_pem.as_str()).collect();
            std::fs::write(file.path(), pem).unwrap();
        };
        let verifier = verifier(Anchor::File(Arc::new(RootsFollower::new(file.path()))));
        let all = || [&first, &second, &third].map(|served| takes(&verifier, served));
        assert_eq!(all(), [false; 3], "nothing is published yet");
        publish(&[&first]);
        assert_eq!(all(), [true, false, false]);
        // Either may be the newer word.
        name(&verifier, &[&second]);
        assert_eq!(all(), [true, true, false]);
        publish(&[&second, &third]);
        assert_eq!(all(), [false, true, true]);
        name(&verifier, &[&third]);
        publish(&[&third]);
        assert_eq!(all(), [false, false, true], "the others are dropped");
    }
}
