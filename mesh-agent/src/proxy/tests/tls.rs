//! The tunnel's handshake and its CONNECT, against ends that are not ours.

use bytes::Bytes;
use h2::client::SendRequest;
use http::{Method, Request, StatusCode, Uri};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs::cipher_suite;
use rustls::{
    ClientConfig, DigitallySignedStruct, HandshakeKind, SignatureScheme, SupportedCipherSuite, SupportedProtocolVersion,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio_rustls::{TlsAcceptor, TlsConnector, client};

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
    /// All that the provider has, where none are given.
    ciphers: Vec<SupportedCipherSuite>,
}

impl<'a> Attempt<'a> {
    fn with(pair: Arc<CertifiedKeyPair>) -> Self {
        Self {
            versions: TLS13_ONLY,
            alpn: &[b"h2"],
            pair: Some(pair),
            ciphers: Vec::new(),
        }
    }

    fn config(self) -> Arc<ClientConfig> {
        let mut provider = rustls::crypto::aws_lc_rs::default_provider();
        if !self.ciphers.is_empty() {
            provider.cipher_suites = self.ciphers;
        }
        let builder = ClientConfig::builder_with_provider(Arc::new(provider))
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
        Arc::new(config)
    }

    /// Ready to send requests, once the far side has sent its settings: it does only for those whom it takes.
    async fn connect(self, from: IpAddr, to: IpAddr) -> Result<SendRequest<Bytes>, String> {
        let attempt = async {
            let tls = handshake(self.config(), from, to).await?;
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

async fn handshake(config: Arc<ClientConfig>, from: IpAddr, to: IpAddr) -> Result<client::TlsStream<TcpStream>, String> {
    let stream = socket_at(from).connect(SocketAddr::new(to, TUNNEL_PORT)).await.unwrap();
    TlsConnector::from(config)
        .connect(ServerName::IpAddress(to.into()), stream)
        .await
        .map_err(|error| error.to_string())
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
            "not yet valid",
            Attempt::with(
                mesh.authority
                    .issue_with(&client, &[&client.to_string()], &[], hour + Duration::from_secs(7200)),
            ),
        ),
        (
            "no clientAuth",
            Attempt::with(mesh.authority.issue_with(
                &client,
                &[&client.to_string()],
                &[ExtendedKeyUsagePurpose::ServerAuth],
                hour,
            )),
        ),
        (
            "ChaCha20 only",
            Attempt {
                ciphers: vec![cipher_suite::TLS13_CHACHA20_POLY1305_SHA256],
                ..Attempt::with(good.clone())
            },
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
    let mut taken = Vec::new();
    for (name, attempt) in refused {
        if attempt.connect(from, server.ip).await.is_ok() {
            taken.push(name);
        }
    }
    assert!(taken.is_empty(), "taken: {taken:?}");
    mesh.far.logs_reason("handshake_failed").await;
    let private_first = Attempt {
        alpn: &[b"private/1", b"h2"],
        ..Attempt::with(good.clone())
    };
    private_first.connect(from, server.ip).await.expect("picks h2");
    for suite in [cipher_suite::TLS13_AES_256_GCM_SHA384, cipher_suite::TLS13_AES_128_GCM_SHA256] {
        let one = Attempt {
            ciphers: vec![suite],
            ..Attempt::with(good.clone())
        };
        one.connect(from, server.ip).await.expect("AES-GCM of either length");
    }
    Attempt::with(good).connect(from, server.ip).await.expect("a good one");
}

/// A resumed session has no certificates to check: whose identity it had, and until when it holds, would be forgotten.
#[tokio::test]
async fn no_session_is_resumed() {
    let mesh = Mesh::new();
    let server = mesh.pod(&mesh.far, "server").await;
    // The client would: it keeps every ticket that it is given.
    let config = Attempt::with(mesh.authority.issue(&identity("client"))).config();
    for round in 1..=3 {
        let mut tls = handshake(config.clone(), fresh_address(), server.ip).await.unwrap();
        // The server's settings: by now it has sent its tickets, too, had it any.
        let mut settings = [0];
        timeout(PATIENCE, tls.read_exact(&mut settings)).await.unwrap().unwrap();
        let connection = tls.get_ref().1;
        assert_eq!(connection.handshake_kind(), Some(HandshakeKind::Full), "round {round}");
        assert_eq!(connection.tls13_tickets_received(), 0, "round {round}");
    }
}

#[tokio::test]
async fn a_renewed_certificate_serves_the_next_tunnel_and_a_dropped_one_none() {
    let mesh = Mesh::new();
    let server = mesh.pod(&mesh.far, "server").await;
    let config = Attempt::with(mesh.authority.issue(&identity("client"))).config();
    let presented = async || {
        let tls = handshake(config.clone(), fresh_address(), server.ip).await?;
        let leaf = tls.get_ref().1.peer_certificates().unwrap()[0].clone();
        Ok::<_, String>(leaf)
    };
    let current = || mesh.far.certificates.current(&identity("server")).unwrap().chain[0].clone();
    let first = current();
    assert_eq!(presented().await.unwrap(), first);
    mesh.far.certificates.insert(mesh.authority.issue(&identity("server")));
    assert_ne!(current(), first);
    assert_eq!(presented().await.unwrap(), current());

    let kept = || mesh.far.proxy.tls.identities();
    assert_eq!(kept(), [identity("server")]);
    mesh.far.certificates.remove(&identity("server"));
    mesh.far.proxy.forget(&[identity("server")]);
    assert_eq!(kept(), [], "no key is left");
    assert!(presented().await.is_err());
    mesh.far.logs_reason("certificate_missing").await;
}

/// A handshake that began before its identity was dropped puts nothing back for good.
#[tokio::test]
async fn what_is_made_of_a_certificate_ends_with_it() {
    let authority = Authority::new();
    let configs = TlsConfigs::default();
    for account in ["first", "second", "third"] {
        let pair = authority.issue(&identity(account));
        // Nobody is there: enough to have its configuration made.
        let listener = TcpListener::bind((fresh_address(), 0)).await.unwrap();
        let connect = TcpStream::connect(listener.local_addr().unwrap());
        let (accepted, client) = tokio::join!(listener.accept(), connect);
        drop(client.unwrap());
        assert!(configs.accept(&pair, None, accepted.unwrap().0).await.is_err());
        assert_eq!(configs.identities(), [identity(account)], "the others' pairs are gone");
    }
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
    let mut wrong = Vec::new();
    for (name, method, authority, expected) in table {
        let answered = status(&send, method, &authority).await;
        if answered != expected {
            wrong.push(format!("{name}: {answered}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

/// How a far side speaks.
pub(super) struct Speech<'a> {
    versions: &'a [&'static SupportedProtocolVersion],
    alpn: &'a [&'a [u8]],
    ciphers: &'a [SupportedCipherSuite],
}

pub(super) const RIGHT: Speech<'static> = Speech {
    versions: TLS13_ONLY,
    alpn: &[b"h2"],
    ciphers: rustls::crypto::aws_lc_rs::ALL_CIPHER_SUITES,
};

impl Speech<'_> {
    pub(super) fn config(&self, pair: &CertifiedKeyPair) -> Arc<rustls::ServerConfig> {
        let mut provider = rustls::crypto::aws_lc_rs::default_provider();
        provider.cipher_suites = self.ciphers.to_vec();
        let mut config = rustls::ServerConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(self.versions)
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(pair.chain.clone(), pair.key.clone_key())
            .unwrap();
        config.alpn_protocols = self.alpn.iter().map(|protocol| protocol.to_vec()).collect();
        Arc::new(config)
    }
}

/// Connects to a far side like that; the request that it got, if it was taken.
async fn taken(mesh: &Mesh, client: &Pod, config: Arc<rustls::ServerConfig>) -> Option<http::request::Parts> {
    let ip = fresh_address();
    mesh.tell(vec![Change::Workload(workload("server", ip))]);
    let listener = TcpListener::bind(SocketAddr::new(ip, TUNNEL_PORT)).await.unwrap();
    let far = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let tls = TlsAcceptor::from(config).accept(stream).await.ok()?;
        assert!(tls.get_ref().1.server_name().is_none(), "no server name is sent");
        let mut connection = h2::server::handshake(tls).await.ok()?;
        let (request, _respond) = connection.accept().await?.ok()?;
        Some(request.into_parts().0)
    });
    let destination = SocketAddr::new(ip, APPLICATION_PORT);
    let stream = client.connect(destination).await;
    let request = timeout(PATIENCE, far).await.unwrap().unwrap();
    if let Some(request) = &request {
        assert_eq!(request.method, Method::CONNECT);
        assert_eq!(request.uri.authority().unwrap().as_str(), destination.to_string());
        let forwarded = format!("for=\"{}\"", stream.local_addr().unwrap());
        assert_eq!(request.headers["forwarded"], forwarded.as_str());
        let baggage =
            "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.pod.name=client,service.name=client,service.version=v1";
        assert_eq!(request.headers["baggage"], baggage);
    }
    assert_refused(stream).await;
    request
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
    let foreign = Identity::new("elsewhere", "shop", "server");
    let issue = |uris: &[&str], usages: &[_], until| mesh.authority.issue_with(&expected, uris, usages, until);
    let other_usage = [ExtendedKeyUsagePurpose::ClientAuth];
    let later = hour + Duration::from_secs(7200);
    let table = [
        ("somebody else", mesh.authority.issue(&identity("other")), false),
        ("another trust domain", mesh.authority.issue(&foreign), false),
        ("another root", Authority::new().issue(&expected), false),
        ("no identity", issue(&["https://example.com/"], &usages, hour), false),
        ("no serverAuth", issue(&[&uri], &other_usage, hour), false),
        ("expired", issue(&[&uri], &usages, a_minute_ago()), false),
        ("not valid yet", issue(&[&uri], &usages, later), false),
        (
            "one of its names",
            issue(&[&identity("first").to_string(), &uri], &usages, hour),
            true,
        ),
    ];
    for (name, pair, is_taken) in table {
        assert_eq!(taken(&mesh, &client, RIGHT.config(&pair)).await.is_some(), is_taken, "{name}");
    }
}

/// A far side that is who it should be, and speaks otherwise.
#[tokio::test]
async fn how_the_client_has_to_be_spoken_to() {
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let pair = mesh.authority.issue(&identity("server"));
    let table = [
        (
            "TLS 1.2",
            Speech {
                versions: &[&rustls::version::TLS12],
                ..RIGHT
            },
            false,
        ),
        ("no ALPN", Speech { alpn: &[], ..RIGHT }, false),
        (
            "another ALPN",
            Speech {
                alpn: &[b"http/1.1"],
                ..RIGHT
            },
            false,
        ),
        (
            "ChaCha20 only",
            Speech {
                ciphers: &[cipher_suite::TLS13_CHACHA20_POLY1305_SHA256],
                ..RIGHT
            },
            false,
        ),
        (
            "AES-128 only",
            Speech {
                ciphers: &[cipher_suite::TLS13_AES_128_GCM_SHA256],
                ..RIGHT
            },
            true,
        ),
    ];
    for (name, speech, is_taken) in table {
        assert_eq!(
            taken(&mesh, &client, speech.config(&pair)).await.is_some(),
            is_taken,
            "{name}"
        );
    }
    mesh.near.logs_reason("handshake_failed").await;
}
