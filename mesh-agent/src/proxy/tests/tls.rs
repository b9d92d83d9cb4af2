//! The tunnel's handshake and its CONNECT, against ends that are not ours.

use bytes::Bytes;
use h2::client::SendRequest;
use http::{Method, Request, StatusCode, Uri};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::{DigitallySignedStruct, SignatureScheme, SupportedProtocolVersion};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;

/// A client that trusts everyone, to find out whom the server trusts.
#[derive(Debug)]
struct TrustAll;

impl ServerCertVerifier for TrustAll {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ECDSA_NISTP256_SHA256, SignatureScheme::ED25519]
    }
}

const TLS13_ONLY: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13];

struct Attempt<'a> {
    versions: &'a [&'static SupportedProtocolVersion],
    alpn: &'a [&'a [u8]],
    pair: Option<Arc<CertifiedKeyPair>>,
}

impl<'a> Attempt<'a> {
    fn with(pair: Arc<CertifiedKeyPair>) -> Self {
        Self {
            versions: TLS13_ONLY,
            alpn: &[b"h2"],
            pair: Some(pair),
        }
    }

    /// Ready to send requests, once the far side has sent its settings: it does only for those whom it takes.
    async fn connect(self, from: IpAddr, to: IpAddr) -> Result<SendRequest<Bytes>, String> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(self.versions)
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(TrustAll));
        let mut config = match self.pair {
            Some(pair) => builder
                .with_client_auth_cert(pair.chain.clone(), pair.key.clone_key())
                .unwrap(),
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = self.alpn.iter().map(|protocol| protocol.to_vec()).collect();
        let attempt = async {
            let stream = socket_at(from).connect(SocketAddr::new(to, TUNNEL_PORT)).await.unwrap();
            let tls = TlsConnector::from(Arc::new(config))
                .connect(ServerName::IpAddress(to.into()), stream)
                .await
                .map_err(|error| error.to_string())?;
            let (send, mut connection) = h2::client::handshake(tls).await.map_err(|error| error.to_string())?;
            let mut pings = connection.ping_pong().unwrap();
            let driver = tokio::spawn(connection);
            pings.ping(h2::Ping::opaque()).await.map_err(|error| error.to_string())?;
            drop(driver);
            Ok(send)
        };
        timeout(PATIENCE, attempt).await.expect("neither taken nor refused")
    }
}

async fn status(send: &SendRequest<Bytes>, method: Method, authority: &str) -> StatusCode {
    let mut send = send.clone().ready().await.unwrap();
    let request = Request::builder()
        .method(&method)
        .uri(if method == Method::CONNECT {
            Uri::builder().authority(authority).build().unwrap()
        } else {
            format!("https://{authority}/").parse().unwrap()
        })
        .body(())
        .unwrap();
    let (response, _stream) = send.send_request(request, false).unwrap();
    timeout(PATIENCE, response).await.unwrap().unwrap().status()
}

#[tokio::test]
async fn whom_the_server_takes() {
    let mesh = Mesh::new();
    let server = mesh.pod(&mesh.far, "server").await;
    let from = fresh_address();
    let client = identity("client");
    let good = mesh.authority.issue(&client);
    let foreign = Identity::new("elsewhere", "shop", "client");
    let tls12: &[&SupportedProtocolVersion] = &[&rustls::version::TLS12];
    let hour = in_an_hour();
    let refused = [
        (
            "no certificate",
            Attempt {
                pair: None,
                ..Attempt::with(good.clone())
            },
        ),
        (
            "TLS 1.2",
            Attempt {
                versions: tls12,
                ..Attempt::with(good.clone())
            },
        ),
        (
            "no ALPN",
            Attempt {
                alpn: &[],
                ..Attempt::with(good.clone())
            },
        ),
        (
            "another ALPN",
            Attempt {
                alpn: &[b"http/1.1"],
                ..Attempt::with(good.clone())
            },
        ),
        ("another root", Attempt::with(Authority::new().issue(&client))),
        ("another trust domain", Attempt::with(mesh.authority.issue(&foreign))),
        (
            "expired",
            Attempt::with(
                mesh.authority
                    .issue_with(&client, &[&client.to_string()], &[], a_minute_ago()),
            ),
        ),
        (
            "no identity",
            Attempt::with(mesh.authority.issue_with(&client, &["https://example.com/"], &[], hour)),
        ),
        (
            "the first URI counts",
            Attempt::with(
                mesh.authority
                    .issue_with(&client, &[&foreign.to_string(), &client.to_string()], &[], hour),
            ),
        ),
    ];
    for (name, attempt) in refused {
        assert!(attempt.connect(from, server.ip).await.is_err(), "{name}");
    }
    mesh.far.logs_reason("handshake_failed").await;
    let private_first = Attempt {
        alpn: &[b"private/1", b"h2"],
        ..Attempt::with(good.clone())
    };
    private_first.connect(from, server.ip).await.expect("picks h2");
    Attempt::with(good).connect(from, server.ip).await.expect("a good one");
}

#[tokio::test]
async fn what_a_connect_is_answered() {
    let mesh = Mesh::new();
    let server = mesh.pod(&mesh.far, "server").await;
    let _echo = server.echo().await;
    let good = mesh.authority.issue(&identity("client"));
    let from = fresh_address();
    mesh.tell(vec![Change::Workload(workload("client", from))]);
    let send = Attempt::with(good).connect(from, server.ip).await.unwrap();
    let own = |port: u16| SocketAddr::new(server.ip, port).to_string();
    let elsewhere = SocketAddr::new(fresh_address(), APPLICATION_PORT).to_string();
    let table = [
        ("the application", Method::CONNECT, own(APPLICATION_PORT), StatusCode::OK),
        ("another address", Method::CONNECT, elsewhere, StatusCode::BAD_REQUEST),
        (
            "a name",
            Method::CONNECT,
            "server.shop:8080".to_owned(),
            StatusCode::BAD_REQUEST,
        ),
        (
            "an agent's port",
            Method::CONNECT,
            own(OUTBOUND_PORT),
            StatusCode::BAD_REQUEST,
        ),
        ("another method", Method::GET, own(APPLICATION_PORT), StatusCode::BAD_REQUEST),
        ("a closed port", Method::CONNECT, own(9), StatusCode::SERVICE_UNAVAILABLE),
    ];
    for (name, method, authority, expected) in table {
        assert_eq!(status(&send, method, &authority).await, expected, "{name}");
    }
}

/// A far side that is not who discovery says it is.
#[tokio::test]
async fn whom_the_client_takes() {
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let expected = identity("server");
    let usages = [ExtendedKeyUsagePurpose::ServerAuth];
    let hour = in_an_hour();
    let uri = expected.to_string();
    let table = [
        ("somebody else", mesh.authority.issue(&identity("other")), false),
        ("another root", Authority::new().issue(&expected), false),
        (
            "no serverAuth",
            mesh.authority
                .issue_with(&expected, &[&uri], &[ExtendedKeyUsagePurpose::ClientAuth], hour),
            false,
        ),
        (
            "expired",
            mesh.authority.issue_with(&expected, &[&uri], &usages, a_minute_ago()),
            false,
        ),
        (
            "one of its names",
            mesh.authority
                .issue_with(&expected, &[&identity("first").to_string(), &uri], &usages, hour),
            true,
        ),
    ];
    for (name, pair, taken) in table {
        let ip = fresh_address();
        mesh.tell(vec![Change::Workload(workload("server", ip))]);
        let listener = TcpListener::bind(SocketAddr::new(ip, TUNNEL_PORT)).await.unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(pair.chain.clone(), pair.key.clone_key())
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let far = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let tls = TlsAcceptor::from(Arc::new(config)).accept(stream).await.ok()?;
            assert!(tls.get_ref().1.server_name().is_none(), "no server name is sent");
            let mut connection = h2::server::handshake(tls).await.ok()?;
            let (request, _respond) = connection.accept().await?.ok()?;
            Some(request.into_parts().0)
        });
        let destination = SocketAddr::new(ip, APPLICATION_PORT);
        let stream = client.connect(destination).await;
        let request = timeout(PATIENCE, far).await.unwrap().unwrap();
        assert_eq!(request.is_some(), taken, "{name}");
        if let Some(request) = request {
            assert_eq!(request.method, Method::CONNECT);
            assert_eq!(request.uri.authority().unwrap().as_str(), destination.to_string());
            let forwarded = format!("for=\"{}\"", stream.local_addr().unwrap());
            assert_eq!(request.headers["forwarded"], forwarded.as_str());
            let baggage =
                "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.pod.name=client,service.name=client,service.version=v1";
            assert_eq!(request.headers["baggage"], baggage);
        }
        assert_refused(stream).await;
    }
}
