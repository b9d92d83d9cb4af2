//! A tunnel's client without a pool: what another maker's proxy, or a hostile one, does.

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::{RecvStream, SendStream};
use http::{Method, Request, StatusCode, Uri};
use tokio_util::sync::CancellationToken;

use super::*;

pub(super) struct RawTunnel {
    pub send: SendRequest<Bytes>,
    /// Ends with the tunnel.
    pub driver: JoinHandle<()>,
    /// From then on nothing is read, and no ping answered.
    pub silence: CancellationToken,
}

impl RawTunnel {
    /// From an address that discovery knows as that of the certificate's identity.
    pub(super) async fn open(mesh: &Mesh, from: IpAddr, to: &Pod, pair: Arc<CertifiedKeyPair>) -> Self {
        mesh.tell(vec![Change::Workload(Workload {
            uid: format!("Kubernetes//Pod/shop/raw-{from}").into(),
            identity: pair.identity.clone(),
            ..workload("raw", from)
        })]);
        let stream = socket_at(from).connect(SocketAddr::new(to.ip, TUNNEL_PORT)).await.unwrap();
        let handshake = mesh.near.proxy.tls.connect(&pair, None, &to.workload.identity, to.ip, stream);
        let (tls, _) = timeout(PATIENCE, handshake).await.unwrap().unwrap();
        let (send, mut connection) = h2::client::handshake(tls).await.unwrap();
        let silence = CancellationToken::new();
        let silent = silence.clone();
        let driver = tokio::spawn(async move {
            tokio::select! {
                // How it ends is the test's to see at its streams.
                _ = &mut connection => return,
                () = silent.cancelled() => {}
            }
            // Held, and never polled again.
            let _connection = connection;
            std::future::pending().await
        });
        Self { send, driver, silence }
    }

    /// A CONNECT that has not been answered.
    pub(super) async fn request(&self, to: SocketAddr) -> Result<(ResponseFuture, SendStream<Bytes>), h2::Error> {
        let mut send = self.send.clone().ready().await?;
        let request = Request::builder()
            .method(Method::CONNECT)
            .uri(Uri::builder().authority(to.to_string()).build().unwrap())
            .body(())
            .unwrap();
        send.send_request(request, false)
    }

    pub(super) async fn connect(&self, to: SocketAddr) -> Result<(StatusCode, SendStream<Bytes>, RecvStream), h2::Error> {
        let exchange = async {
            let (response, send) = self.request(to).await?;
            let response = response.await?;
            Ok((response.status(), send, response.into_body()))
        };
        timeout(PATIENCE, exchange).await.expect("neither answered nor refused")
    }
}

pub(super) async fn assert_stream_echo(send: &mut SendStream<Bytes>, receive: &mut RecvStream, text: &'static str) {
    send.send_data(Bytes::from_static(text.as_bytes()), false).unwrap();
    let mut back = Vec::new();
    while back.len() < text.len() {
        let data = timeout(PATIENCE, receive.data()).await.expect("no answer").unwrap().unwrap();
        back.extend_from_slice(&data);
    }
    assert_eq!(back, text.as_bytes());
}
