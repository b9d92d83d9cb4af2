//! Peers that keep to no rule of the protocol: bytes by the second, streams and headers without end. They have a certificate.

use tokio_rustls::TlsAcceptor;
use tokio_rustls::client::TlsStream;

use super::tls::RIGHT;
use super::*;
use crate::proxy::limits::{FRAME_BYTES, HEADER_LIST_BYTES, STREAMS_PER_INBOUND_TUNNEL};

/// Between two bytes; the limits below are longer than a byte takes, and shorter than all bytes take.
const BETWEEN: Duration = Duration::from_millis(20);
const SHORT: Duration = Duration::from_millis(400);

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const EMPTY_SETTINGS: [u8; 9] = [0, 0, 0, SETTINGS, 0, 0, 0, 0, 0];
// Frame types (RFC 9113, 6).
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;
const ACK: u8 = 1;
const CANCEL: u32 = 8;
const REFUSED_STREAM: u32 = 7;
const FRAME_SIZE_ERROR: u32 = 6;
/// `:status: 200`, a field of its own (RFC 7541, appendix A).
const STATUS_200: u8 = 0x88;

type Tunnel = TlsStream<TcpStream>;

struct Frame {
    kind: u8,
    stream: u32,
    payload: Vec<u8>,
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = u32::try_from(payload.len()).unwrap().to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// The fields of a CONNECT, in the plainest form of HPACK: literals that are not indexed (RFC 7541, 6.2.2).
fn connect_fields(authority: &str) -> Vec<u8> {
    [&[2][..], &literal("CONNECT"), &[1], &literal(authority)].concat()
}

/// A string with its length, an integer of a seven-bit prefix (RFC 7541, 5.1).
fn literal(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    match text.len() {
        short @ 0..127 => bytes.push(u8::try_from(short).unwrap()),
        mut long => {
            bytes.push(127);
            long -= 127;
            while long >= 128 {
                bytes.push(u8::try_from(long % 128).unwrap() | 128);
                long /= 128;
            }
            bytes.push(u8::try_from(long).unwrap());
        }
    }
    bytes.extend(text.as_bytes());
    bytes
}

/// A client that its node knows, whose TLS is done.
async fn tls_to(mesh: &Mesh, server: &Pod) -> Tunnel {
    let from = fresh_address();
    let uid = format!("Kubernetes//Pod/shop/hostile-{from}").into();
    mesh.tell(vec![Change::Workload(Workload {
        uid,
        ..workload("hostile", from)
    })]);
    let pair = mesh.authority.issue(&identity("hostile"));
    let stream = socket_at(from)
        .connect(SocketAddr::new(server.ip, TUNNEL_PORT))
        .await
        .unwrap();
    let handshake = mesh
        .near
        .proxy
        .tls
        .connect(&pair, None, &server.workload.identity, server.ip, stream);
    timeout(PATIENCE, handshake).await.unwrap().unwrap().0
}

async fn tunnel_to(mesh: &Mesh, server: &Pod) -> Tunnel {
    let mut tunnel = tls_to(mesh, server).await;
    tunnel.write_all(PREFACE).await.unwrap();
    tunnel.write_all(&EMPTY_SETTINGS).await.unwrap();
    tunnel.flush().await.unwrap();
    tunnel
}

/// Says these bytes one by one, and then zeros, until the other side ends it.
async fn trickle(stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite, bytes: &[u8]) {
    let (mut read, mut write) = tokio::io::split(stream);
    let talk = async {
        let bytes = bytes.iter().copied().chain(std::iter::repeat(0));
        for byte in bytes {
            if write.write_all(&[byte]).await.is_err() || write.flush().await.is_err() {
                return;
            }
            sleep(BETWEEN).await;
        }
    };
    let hear = async {
        let mut sink = [0; 4096];
        while read.read(&mut sink).await.is_ok_and(|length| length > 0) {}
    };
    let over = async {
        tokio::select! {
            () = talk => {}
            () = hear => {}
        }
    };
    timeout(PATIENCE, over).await.expect("it is listened to for ever");
}

async fn next_frame(tunnel: &mut (impl tokio::io::AsyncRead + Unpin)) -> std::io::Result<Frame> {
    let read = async {
        let mut head = [0; 9];
        tunnel.read_exact(&mut head).await?;
        let mut payload = vec![0; usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2])];
        tunnel.read_exact(&mut payload).await?;
        Ok(Frame {
            kind: head[3],
            stream: u32::from_be_bytes(head[5..9].try_into().unwrap()),
            payload,
        })
    };
    timeout(PATIENCE, read).await.expect("nothing more is said")
}

#[tokio::test]
async fn who_says_a_byte_now_and_then_has_no_longer_for_it() {
    let mesh = Mesh {
        near: Node::new(),
        ..Mesh::with_limits(Limits {
            handshake_timeout: SHORT,
            ping_interval: SHORT / 4,
            ping_timeout: SHORT,
            ..Limits::default()
        })
    };
    let server = mesh.pod(&mesh.far, "server").await;
    // A TLS record of 16 KiB, in it the head of a ClientHello as long.
    let hello = [0x16, 3, 1, 0x40, 0, 1, 0, 0x3f, 0xfc];
    let stream = socket_at(fresh_address())
        .connect(SocketAddr::new(server.ip, TUNNEL_PORT))
        .await
        .unwrap();
    trickle(stream, &hello).await;
    mesh.far.logs_reason("handshake_timeout").await;

    let failures = || {
        let text = mesh.far.metrics.render();
        let line = text.lines().find(|line| {
            line.starts_with("mesh_tunnel_handshakes_total") && line.contains("inbound") && line.contains("handshake_timeout")
        });
        line.map_or(0.0, |line| line.rsplit(' ').next().unwrap().parse().unwrap())
    };
    let before = failures();
    trickle(tls_to(&mesh, &server).await, PREFACE).await;
    until("the preface is counted as a handshake that took too long", || {
        failures() > before
    })
    .await;

    // The head of HEADERS, whose 16,000 bytes do not come; nor does any answer to a ping, behind them.
    let begun = &frame(HEADERS, END_HEADERS, 1, &[0; 16_000])[..9];
    trickle(tunnel_to(&mesh, &server).await, begun).await;
    assert_eq!(mesh.far.proxy.registry.count(&server.handle.context.pod.pod_uid), 0);
    until("it is counted", || mesh.far.tunnels("unanswered") == 1).await;
}

#[tokio::test]
async fn a_tunnel_has_only_so_many_streams() {
    let mesh = Mesh::new();
    let server = mesh.pod(&mesh.far, "server").await;
    let _echo = server.echo().await;
    let mut tunnel = tunnel_to(&mesh, &server).await;
    let fields = connect_fields(&server.application().to_string());
    let (most, more) = (STREAMS_PER_INBOUND_TUNNEL, 50);
    for nth in 0..most + more {
        tunnel
            .write_all(&frame(HEADERS, END_HEADERS, 2 * nth + 1, &fields))
            .await
            .unwrap();
    }
    tunnel.flush().await.unwrap();
    let (mut opened, mut refused) = (0, 0);
    while opened + refused < most + more {
        let frame = next_frame(&mut tunnel).await.unwrap();
        match frame.kind {
            HEADERS => opened += 1,
            RST_STREAM => {
                assert_eq!(frame.payload, REFUSED_STREAM.to_be_bytes());
                refused += 1;
            }
            GOAWAY => panic!("the tunnel is ended, and with it what was open"),
            _ => {}
        }
    }
    assert_eq!((opened, refused), (most, more));
    let count = mesh.far.proxy.registry.count(&server.handle.context.pod.pod_uid);
    assert_eq!(count, most as usize);
}

/// "Rapid reset": a stream that is reset counts no longer among those that are open.
#[tokio::test]
async fn streams_that_are_opened_and_reset_without_end_leave_nothing() {
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let server = mesh.pod(&mesh.far, "server").await;
    let _echo = server.echo().await;
    let mut neighbour = client.connect(server.application()).await;
    assert_echo(&mut neighbour, "before").await;
    let uid = &server.handle.context.pod.pod_uid;
    let (mut read, mut write) = tokio::io::split(tunnel_to(&mesh, &server).await);
    let fields = connect_fields(&server.application().to_string());
    let flood = async {
        for nth in 0..20_000 {
            let mut both = frame(HEADERS, END_HEADERS, 2 * nth + 1, &fields);
            both.extend(frame(RST_STREAM, 0, 2 * nth + 1, &CANCEL.to_be_bytes()));
            if write.write_all(&both).await.is_err() || write.flush().await.is_err() {
                return nth;
            }
        }
        let _ = write.shutdown().await;
        20_000
    };
    let (sent, calm) = tokio::join!(flood, async {
        let mut calm = None;
        while let Ok(frame) = next_frame(&mut read).await {
            if frame.kind == GOAWAY {
                calm = Some(u32::from_be_bytes(frame.payload[4..8].try_into().unwrap()));
            }
        }
        calm
    });
    assert!(sent < 20_000, "it may go on for ever");
    // ENHANCE_YOUR_CALM, unless the peer's last words were lost with the rest.
    assert!(calm.is_none_or(|error| error == 11), "{calm:?}");
    until("nothing is left of it", || mesh.far.proxy.registry.count(uid) == 1).await;
    until("it is counted", || mesh.far.tunnels("flood") == 1).await;
    assert_echo(&mut neighbour, "after").await;
}

#[tokio::test]
async fn headers_have_a_size() {
    let mesh = Mesh::new();
    let server = mesh.pod(&mesh.far, "server").await;
    let _echo = server.echo().await;
    let uid = &server.handle.context.pod.pod_uid;

    // Too long as a whole: that stream is refused, and the next one is served.
    let mut tunnel = tunnel_to(&mesh, &server).await;
    let fields = connect_fields(&server.application().to_string());
    // All is well with it but for a field that nobody asked for.
    let fill = literal(&"x".repeat(HEADER_LIST_BYTES as usize));
    let long = [&fields[..], &[0], &literal("fill"), &fill].concat();
    let (first, rest) = long.split_at(16_000);
    tunnel.write_all(&frame(HEADERS, 0, 1, first)).await.unwrap();
    tunnel.write_all(&frame(CONTINUATION, END_HEADERS, 1, rest)).await.unwrap();
    tunnel.write_all(&frame(HEADERS, END_HEADERS, 3, &fields)).await.unwrap();
    tunnel.flush().await.unwrap();
    let mut answers = HashMap::new();
    while answers.len() < 2 {
        let frame = next_frame(&mut tunnel).await.unwrap();
        if matches!(frame.kind, HEADERS | RST_STREAM) {
            answers.entry(frame.stream).or_insert((frame.kind, frame.payload));
        }
    }
    // 200 is a field of its own (RFC 7541, appendix A).
    let is_200 = |stream: u32| answers[&stream].0 == HEADERS && answers[&stream].1[0] == 0x88;
    assert!(!is_200(1) && is_200(3), "{answers:?}");
    assert_eq!(mesh.far.proxy.registry.count(uid), 1);
    drop(tunnel);

    // Without end, each field as it should be.
    let more = [&[0][..], &literal("fill"), &literal(&"x".repeat(1_000))].concat();
    let (mut read, mut write) = tokio::io::split(tunnel_to(&mesh, &server).await);
    let flood = async {
        write.write_all(&frame(HEADERS, 0, 1, &fields)).await?;
        for _ in 0..10_000 {
            write.write_all(&frame(CONTINUATION, 0, 1, &more)).await?;
            write.flush().await?;
        }
        Ok::<_, std::io::Error>(())
    };
    let (flood, ()) = tokio::join!(flood, async { while next_frame(&mut read).await.is_ok() {} });
    assert!(flood.is_err(), "it may go on for ever");
    until("nothing is left of it", || mesh.far.proxy.registry.count(uid) == 0).await;
    until("it is counted", || mesh.far.tunnels("flood") == 1).await;
}

/// The next of this type on a stream.
async fn next_of(tunnel: &mut (impl tokio::io::AsyncRead + Unpin), kind: u8) -> Frame {
    loop {
        let frame = next_frame(tunnel).await.unwrap();
        if frame.kind == kind {
            return frame;
        }
        assert!(
            !matches!(frame.kind, GOAWAY | RST_STREAM),
            "type {}: {:?}",
            frame.kind,
            frame.payload
        );
    }
}

/// Settings hold for both ends once they are acknowledged.
async fn acknowledge_settings(tunnel: &mut (impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin)) {
    next_of(tunnel, SETTINGS).await;
    tunnel.write_all(&frame(SETTINGS, ACK, 0, &[])).await.unwrap();
    tunnel.flush().await.unwrap();
}

/// Until the other side has ended the tunnel, saying this.
async fn ended_by(tunnel: &mut (impl tokio::io::AsyncRead + Unpin), error: u32) -> bool {
    while let Ok(frame) = next_frame(tunnel).await {
        if frame.kind == GOAWAY {
            return frame.payload[4..8] == error.to_be_bytes();
        }
    }
    false
}

#[tokio::test]
async fn a_frame_of_a_clients_has_a_size() {
    let mesh = Mesh::new();
    let server = mesh.pod(&mesh.far, "server").await;
    let _echo = server.echo().await;
    let mut tunnel = tunnel_to(&mesh, &server).await;
    acknowledge_settings(&mut tunnel).await;
    let fields = connect_fields(&server.application().to_string());
    tunnel.write_all(&frame(HEADERS, END_HEADERS, 1, &fields)).await.unwrap();
    tunnel.flush().await.unwrap();
    assert_eq!(next_of(&mut tunnel, HEADERS).await.payload[0], STATUS_200);
    // Exactly as large.
    tunnel
        .write_all(&frame(DATA, 0, 1, &vec![1; FRAME_BYTES as usize]))
        .await
        .unwrap();
    tunnel.flush().await.unwrap();
    assert_eq!(next_of(&mut tunnel, DATA).await.payload[0], 1);
    tunnel
        .write_all(&frame(DATA, 0, 1, &vec![2; FRAME_BYTES as usize + 1]))
        .await
        .unwrap();
    tunnel.flush().await.unwrap();
    assert!(
        ended_by(&mut tunnel, FRAME_SIZE_ERROR).await,
        "a frame beyond the bound is taken"
    );
    let uid = &server.handle.context.pod.pod_uid;
    until("nothing is left of it", || mesh.far.proxy.registry.count(uid) == 0).await;
    until("it is counted", || mesh.far.tunnels("protocol_error") == 1).await;
}

#[tokio::test]
async fn a_frame_of_a_servers_has_a_size() {
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let ip = fresh_address();
    mesh.tell(vec![Change::Workload(workload("server", ip))]);
    let listener = TcpListener::bind(SocketAddr::new(ip, TUNNEL_PORT)).await.unwrap();
    let config = RIGHT.config(&mesh.authority.issue(&identity("server")));
    let (go_on, gone_on) = tokio::sync::oneshot::channel();
    let far = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut tunnel = TlsAcceptor::from(config).accept(stream).await.unwrap();
        let mut preface = [0; PREFACE.len()];
        tunnel.read_exact(&mut preface).await.unwrap();
        tunnel.write_all(&EMPTY_SETTINGS).await.unwrap();
        acknowledge_settings(&mut tunnel).await;
        let stream = next_of(&mut tunnel, HEADERS).await.stream;
        tunnel
            .write_all(&frame(HEADERS, END_HEADERS, stream, &[STATUS_200]))
            .await
            .unwrap();
        let data = |byte, length| frame(DATA, 0, stream, &vec![byte; length]);
        tunnel.write_all(&data(1, FRAME_BYTES as usize)).await.unwrap();
        tunnel.flush().await.unwrap();
        gone_on.await.unwrap();
        tunnel.write_all(&data(2, FRAME_BYTES as usize + 1)).await.unwrap();
        tunnel.flush().await.unwrap();
        ended_by(&mut tunnel, FRAME_SIZE_ERROR).await
    });
    let mut stream = client.connect(SocketAddr::new(ip, APPLICATION_PORT)).await;
    // Exactly as large.
    let mut got = vec![0; FRAME_BYTES as usize];
    let read = timeout(PATIENCE, stream.read_exact(&mut got)).await;
    read.expect("nothing arrives").unwrap();
    assert!(got.iter().all(|byte| *byte == 1));
    go_on.send(()).unwrap();
    assert!(
        timeout(PATIENCE, far).await.unwrap().unwrap(),
        "a frame beyond the bound is taken"
    );
    let end = timeout(PATIENCE, stream.read(&mut [0]))
        .await
        .expect("neither data nor an end");
    assert!(end.is_err(), "a broken tunnel looks like an application's end");
    until("it is counted", || mesh.near.tunnels("protocol_error") == 1).await;
}
