//! Durations and counts that bound a tunnel, each with a value that a test can meet.

use tokio_rustls::TlsAcceptor;

use super::raw::{RawTunnel, assert_stream_echo};
use super::tls::RIGHT;
use super::*;
use crate::proxy::limits::{QuotaLimits, UPSTREAM_TRIES};

const SHORT: Duration = Duration::from_millis(100);

#[tokio::test]
async fn a_peer_that_no_longer_answers_is_gone() {
    let limits = Limits {
        ping_interval: SHORT,
        ping_timeout: SHORT,
        ..Limits::default()
    };
    // Inbound.
    let mesh = Mesh::with_limits(limits);
    let server = mesh.pod(&mesh.far, "server").await;
    let _echo = server.echo().await;
    let pair = mesh.authority.issue(&identity("client"));
    let tunnel = RawTunnel::open(&mesh, fresh_address(), &server, pair).await;
    let (status, mut send, mut receive) = tunnel.connect(server.application()).await.unwrap();
    assert_eq!(status, 200);
    // While it answers, it stays.
    sleep(SHORT * 5).await;
    assert_stream_echo(&mut send, &mut receive, "hello").await;
    let uid = &server.handle.context.pod.pod_uid;
    assert_eq!(mesh.far.proxy.registry.count(uid), 1);
    tunnel.silence.cancel();
    until("its connections go", || mesh.far.proxy.registry.count(uid) == 0).await;
    until("it is counted", || mesh.far.tunnels("unanswered") == 1).await;

    // Outbound: a far side that is stopped behind the wire.
    let client = mesh.pod(&mesh.near, "client").await;
    let wire = Wire::to(&mesh, &server).await;
    let mut stream = client.connect(SocketAddr::new(wire.ip, APPLICATION_PORT)).await;
    until("a tunnel", || mesh.near.proxy.pool.tunnel_count() == 1).await;
    wire.cut.cancel();
    until("no tunnel", || mesh.near.proxy.pool.tunnel_count() == 0).await;
    until("it is counted", || mesh.near.tunnels("unanswered") == 1).await;
    assert!(timeout(PATIENCE, stream.read(&mut [0])).await.unwrap().is_err());
}

/// A relay in front of a Pod's tunnel port that can stop carrying without closing anything.
struct Wire {
    ip: IpAddr,
    cut: tokio_util::sync::CancellationToken,
}

impl Wire {
    async fn to(mesh: &Mesh, server: &Pod) -> Self {
        let ip = fresh_address();
        let behind = SocketAddr::new(server.ip, TUNNEL_PORT);
        mesh.near.state.apply(vec![Change::Workload(workload("server", ip))]);
        let listener = TcpListener::bind(SocketAddr::new(ip, TUNNEL_PORT)).await.unwrap();
        let cut = tokio_util::sync::CancellationToken::new();
        let stop = cut.clone();
        tokio::spawn(async move {
            let (mut near, _) = listener.accept().await.unwrap();
            let mut far = TcpStream::connect(behind).await.unwrap();
            tokio::select! {
                _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                () = stop.cancelled() => std::future::pending().await,
            }
        });
        Self { ip, cut }
    }
}

#[tokio::test]
async fn idle_tunnels_are_closed_and_used_ones_are_not() {
    let mesh = Mesh::with_limits(Limits {
        idle_tunnel: SHORT,
        idle_inbound_tunnel: SHORT,
        ..Limits::default()
    });
    let client = mesh.pod(&mesh.near, "client").await;
    let server = mesh.pod(&mesh.far, "server").await;
    let _echo = server.echo().await;
    let tunnels = || mesh.near.proxy.pool.tunnel_count();
    let mut stream = client.connect(server.application()).await;
    assert_echo(&mut stream, "hello").await;
    sleep(SHORT * 5).await;
    assert_echo(&mut stream, "still").await;
    assert_eq!(tunnels(), 1);
    drop(stream);
    until("an idle tunnel stays", || tunnels() == 0).await;

    // A peer that keeps its tunnel.
    let pair = mesh.authority.issue(&identity("client"));
    let tunnel = RawTunnel::open(&mesh, fresh_address(), &server, pair).await;
    let (_, mut send, mut receive) = tunnel.connect(server.application()).await.unwrap();
    sleep(SHORT * 5).await;
    assert_stream_echo(&mut send, &mut receive, "still").await;
    drop((send, receive));
    let RawTunnel { send: _send, driver, .. } = tunnel;
    timeout(PATIENCE, driver)
        .await
        .expect("an idle tunnel of a peer stays")
        .unwrap();
}

#[tokio::test]
async fn a_half_closed_connection_that_moves_nothing_is_reset() {
    let mesh = Mesh::with_limits(Limits {
        half_closed_idle: SHORT,
        ..Limits::default()
    });
    let client = mesh.pod(&mesh.near, "client").await;
    let server = mesh.pod(&mesh.far, "server").await;
    let listener = server.listen().await;
    let mut stream = client.connect(server.application()).await;
    let (mut accepted, _) = timeout(PATIENCE, listener.accept()).await.unwrap().unwrap();
    // Open and silent is for the ends to decide.
    sleep(SHORT * 5).await;
    accepted.write_all(b"x").await.unwrap();
    stream.read_exact(&mut [0]).await.unwrap();
    stream.shutdown().await.unwrap();
    let end = timeout(PATIENCE, stream.read(&mut [0])).await.expect("kept");
    assert_eq!(end.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    let near = mesh.near.log_line(|line| line["reason"] != "").await;
    assert!(["half_closed_idle", "reset_by_destination"].contains(&near["reason"].as_str().unwrap()));
    let far = mesh.far.log_line(|line| line["reason"] != "").await;
    assert!(near["reason"] == "half_closed_idle" || far["reason"] == "half_closed_idle");
}

#[tokio::test]
async fn a_pod_has_only_so_many_tunnels() {
    let quota = QuotaLimits {
        total: 1,
        per_address: 1,
        strangers: 1,
    };
    let mesh = Mesh {
        far: Node::with_limits(Limits {
            inbound_tunnels: quota,
            ..Limits::default()
        }),
        ..Mesh::with_limits(Limits {
            outbound_tunnels_per_pod: 1,
            ..Limits::default()
        })
    };
    let client = mesh.pod(&mesh.near, "client").await;
    let second = mesh.pod(&mesh.near, "second").await;
    let server = mesh.pod(&mesh.far, "server").await;
    let other = mesh.pod(&mesh.far, "other").await;
    let (_server, _other) = (server.echo().await, other.echo().await);
    let mut stream = client.connect(server.application()).await;
    assert_echo(&mut stream, "hello").await;
    assert_refused(client.connect(other.application()).await).await;
    mesh.near.logs_reason("limit").await;
    assert_refused(second.connect(server.application()).await).await;
    mesh.far.logs_reason("limit").await;
    let mut another = second.connect(other.application()).await;
    assert_echo(&mut another, "each Pod has its own").await;
}

/// The far side takes the CONNECT, answers pings, and never says whether the application is reached.
#[tokio::test]
async fn an_answer_has_its_time() {
    let mesh = Mesh::with_limits(Limits {
        response_timeout: SHORT,
        ..Limits::default()
    });
    let client = mesh.pod(&mesh.near, "client").await;
    let ip = fresh_address();
    mesh.tell(vec![Change::Workload(workload("server", ip))]);
    let listener = TcpListener::bind(SocketAddr::new(ip, TUNNEL_PORT)).await.unwrap();
    let config = RIGHT.config(&mesh.authority.issue(&identity("server")));
    let far = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let tls = TlsAcceptor::from(config).accept(stream).await.unwrap();
        let mut connection = h2::server::handshake(tls).await.unwrap();
        let mut unanswered = Vec::new();
        while let Some(request) = connection.accept().await {
            unanswered.push(request);
        }
    });
    assert_refused(client.connect(SocketAddr::new(ip, APPLICATION_PORT)).await).await;
    mesh.near.logs_reason("response_timeout").await;
    far.abort();
}

/// The kernel's queue of the listener is full, so the SYN is not answered.
#[tokio::test(start_paused = true)]
async fn a_connect_has_its_time() {
    let address = SocketAddr::new(fresh_address(), APPLICATION_PORT);
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(address).unwrap();
    let _listener = socket.listen(1).unwrap();
    let mut held = Vec::new();
    // Virtual time: it passes only in the waiting.
    let since = tokio::time::Instant::now();
    let error = loop {
        match super::socket::connect(TcpSocket::new_v4().unwrap(), address, "test").await {
            Ok(stream) => held.push(stream),
            Err(error) => break error,
        }
        assert!(held.len() < 100, "a queue of one takes a hundred");
    };
    assert_eq!(error.reason(), "connect_timeout");
    assert!(since.elapsed() < Duration::from_secs(6), "{:?}", since.elapsed());
}

/// Where most ports are busy one is shared, and may be that of a connection that lives.
#[tokio::test]
async fn another_port_is_tried_where_the_first_ones_connection_lives() {
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let server = mesh.pod(&mesh.far, "server").await;
    let _echo = server.echo().await;
    let application = server.application();
    let living = shared_socket_at(SocketAddr::new(client.ip, 0));
    let port = living.local_addr().unwrap().port();
    let mut living = living.connect(application).await.unwrap();
    let tries = UPSTREAM_TRIES as usize;
    for (shared, works) in [(tries - 1, true), (tries, false)] {
        *server.network.shared_ports.lock() = vec![port; shared];
        let mut stream = client.connect(application).await;
        if works {
            assert_echo(&mut stream, "from another port").await;
        } else {
            assert_refused(stream).await;
            mesh.far.logs_reason("local_ports_exhausted").await;
        }
        assert!(server.network.shared_ports.lock().is_empty(), "it was tried once too little");
    }
    assert_echo(&mut living, "and on").await;
}
