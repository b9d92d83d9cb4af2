//! What a connection carries, through two agents.

use sha2::{Digest, Sha256};
use socket2::SockRef;
use tokio::sync::Barrier;

use super::*;

async fn connected(mesh: &Mesh) -> (Pod, Pod, TcpStream, TcpStream) {
    let client = mesh.pod(&mesh.near, "client").await;
    let server = mesh.pod(&mesh.far, "server").await;
    let listener = server.listen().await;
    let stream = client.connect(server.application()).await;
    let (accepted, peer) = timeout(PATIENCE, listener.accept()).await.unwrap().unwrap();
    assert_eq!(peer.ip(), client.ip, "the application sees the true client");
    (client, server, stream, accepted)
}

fn reset(stream: TcpStream) {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
}

async fn assert_reset(stream: &mut TcpStream) {
    let mut rest = Vec::new();
    let result = timeout(PATIENCE, stream.read_to_end(&mut rest)).await.expect("not reset");
    assert_eq!(result.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_half_close_leaves_the_other_direction_open() {
    let mesh = Mesh::new();
    // Served until their ends are logged.
    let mut pods = Vec::new();
    for client_first in [true, false] {
        let (client_pod, server_pod, client, server) = connected(&mesh).await;
        pods.push((client_pod, server_pod));
        let (mut first, mut second) = if client_first { (client, server) } else { (server, client) };
        first.write_all(b"question").await.unwrap();
        first.shutdown().await.unwrap();
        let mut got = Vec::new();
        timeout(PATIENCE, second.read_to_end(&mut got)).await.unwrap().unwrap();
        assert_eq!(got, b"question");
        second.write_all(b"answer").await.unwrap();
        second.shutdown().await.unwrap();
        got.clear();
        timeout(PATIENCE, first.read_to_end(&mut got)).await.unwrap().unwrap();
        assert_eq!(got, b"answer");
    }
    let line = mesh.near.log_line(|line| line["result"] == "ok").await;
    assert_eq!(line["direction"], "outbound");
    assert_eq!(line["path"], "tunnel");
    assert_eq!(line["connection_security_policy"], "mutual_tls");
    assert_eq!(line["source_principal"], "spiffe://cluster.local/ns/shop/sa/client");
    assert_eq!(line["destination_principal"], "spiffe://cluster.local/ns/shop/sa/server");
    assert_eq!(line["bytes_received"], 8, "from the source");
    assert_eq!(line["bytes_sent"], 6, "to the source");
    let line = mesh.far.log_line(|line| line["result"] == "ok").await;
    assert_eq!(line["direction"], "inbound");
    assert_eq!(line["source_workload"], "client");
    assert_eq!(line["bytes_received"], 8);
}

#[tokio::test]
async fn a_reset_arrives_as_a_reset() {
    let mesh = Mesh::new();
    let mut pods = Vec::new();
    for client_first in [true, false] {
        let (client_pod, server_pod, mut client, mut server) = connected(&mesh).await;
        pods.push((client_pod, server_pod));
        client.write_all(b"x").await.unwrap();
        server.read_exact(&mut [0]).await.unwrap();
        let (resetting, mut other) = if client_first { (client, server) } else { (server, client) };
        reset(resetting);
        assert_reset(&mut other).await;
    }
    mesh.near.logs_reason("reset_by_source").await;
    mesh.near.logs_reason("reset_by_destination").await;
}

#[tokio::test]
async fn a_reset_after_the_half_close_arrives_too() {
    let mesh = Mesh::new();
    let (_client, _server, mut client, mut server) = connected(&mesh).await;
    client.shutdown().await.unwrap();
    assert_eq!(server.read(&mut [0]).await.unwrap(), 0);
    reset(server);
    assert_reset(&mut client).await;
}

/// Writes `len` bytes that differ everywhere, and returns their digest.
async fn send_digested(mut to: impl tokio::io::AsyncWrite + Unpin, len_bytes: usize, seed: u8) -> Vec<u8> {
    let mut digest = Sha256::new();
    let mut chunk = vec![0; 256 * 1024];
    for number in 0..len_bytes / chunk.len() {
        for (i, byte) in chunk.iter_mut().step_by(61).enumerate() {
            *byte = (i ^ number) as u8 ^ seed;
        }
        digest.update(&chunk);
        to.write_all(&chunk).await.unwrap();
    }
    to.shutdown().await.unwrap();
    digest.finalize().to_vec()
}

async fn receive_digested(mut from: impl tokio::io::AsyncRead + Unpin) -> (usize, Vec<u8>) {
    let (mut digest, mut received, mut chunk) = (Sha256::new(), 0, vec![0; 256 * 1024]);
    loop {
        match from.read(&mut chunk).await.unwrap() {
            0 => return (received, digest.finalize().to_vec()),
            read => {
                received += read;
                digest.update(&chunk[..read]);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_four_mebibytes_both_ways_at_once() {
    const LEN_BYTES: usize = 64 * 1024 * 1024;
    let mesh = Mesh::new();
    let (_client, _server, client, server) = connected(&mesh).await;
    let (client_read, client_write) = client.into_split();
    let (server_read, server_write) = server.into_split();
    let there = tokio::spawn(send_digested(client_write, LEN_BYTES, 1));
    let back = tokio::spawn(send_digested(server_write, LEN_BYTES, 2));
    let at_server = tokio::spawn(receive_digested(server_read));
    let at_client = tokio::spawn(receive_digested(client_read));
    let all = async {
        (
            there.await.unwrap(),
            back.await.unwrap(),
            at_server.await.unwrap(),
            at_client.await.unwrap(),
        )
    };
    let (there, back, at_server, at_client) = timeout(PATIENCE, all).await.expect("too slow");
    assert_eq!(at_server, (LEN_BYTES, there));
    assert_eq!(at_client, (LEN_BYTES, back));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_readers_stop_their_writers_and_nobody_else() {
    /// What the sockets of the path may hold (the kernel's defaults: 4 and 6 MiB), the window, and our buffers.
    const BOUND_BYTES: usize = 48 * 1024 * 1024;
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let server = mesh.pod(&mesh.far, "server").await;
    let listener = server.listen().await;
    let mut stalled = Vec::new();
    for _ in 0..8 {
        let stream = client.connect(server.application()).await;
        let (accepted, _) = timeout(PATIENCE, listener.accept()).await.unwrap().unwrap();
        stalled.push((stream, accepted));
    }
    let chunk = vec![7; 1024 * 1024];
    let mut written = vec![0; stalled.len()];
    let held_bytes = || mesh.far.proxy.registry.buffers().held_bytes();
    let fill = async {
        // On a loaded machine a writer waits that long although it is not stopped yet: then once more.
        while held_bytes() < 8 * 1024 * 1024 {
            for ((stream, _), total) in stalled.iter_mut().zip(&mut written) {
                // A writer that cannot write for so long is stopped.
                while let Ok(result) = timeout(Duration::from_millis(300), stream.write(&chunk)).await {
                    *total += result.unwrap();
                    assert!(*total < BOUND_BYTES, "nothing stops the writer");
                }
            }
        }
    };
    timeout(PATIENCE, fill).await.expect("the windows never fill");

    // A window each, of 2 MiB, at the far side, whose application does not read: as the agent itself counts it.
    let held = held_bytes();
    assert!((8 * 1024 * 1024..20 * 1024 * 1024).contains(&held), "{held}");

    // Another stream of the same tunnel.
    let mut moving = client.connect(server.application()).await;
    let (mut accepted, _) = timeout(PATIENCE, listener.accept()).await.unwrap().unwrap();
    assert_eq!(mesh.near.proxy.pool.tunnel_count(), 1, "one tunnel");
    for _ in 0..64 {
        let exchange = async {
            moving.write_all(&chunk).await.unwrap();
        };
        let receive = async {
            let mut back = vec![0; chunk.len()];
            accepted.read_exact(&mut back).await.unwrap();
        };
        timeout(PATIENCE, async { tokio::join!(exchange, receive) })
            .await
            .expect("held up by a slow reader");
    }

    // Nothing of the slow ones is lost.
    for ((mut stream, accepted), written) in stalled.into_iter().zip(written) {
        stream.shutdown().await.unwrap();
        let (received, _) = timeout(PATIENCE, receive_digested(accepted)).await.unwrap();
        assert_eq!(received, written);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_connections_at_once() {
    const CONNECTIONS: usize = 1000;
    let mesh = Mesh::new();
    let client = Arc::new(mesh.pod(&mesh.near, "client").await);
    let server = mesh.pod(&mesh.far, "server").await;
    let _echo = server.echo().await;
    let all_open = Arc::new(Barrier::new(CONNECTIONS + 1));
    let connections: Vec<_> = (0..CONNECTIONS)
        .map(|number| {
            let (client, all_open, to) = (client.clone(), all_open.clone(), server.application());
            tokio::spawn(async move {
                let mut stream = client.connect(to).await;
                assert_echo(&mut stream, &format!("hello {number}")).await;
                all_open.wait().await;
                assert_echo(&mut stream, &format!("still {number}")).await;
            })
        })
        .collect();
    timeout(PATIENCE, all_open.wait()).await.expect("not all open");
    let tunnels = mesh.near.proxy.pool.tunnel_count();
    assert_eq!(tunnels, CONNECTIONS / limits::STREAMS_PER_OUTBOUND_TUNNEL);
    for connection in connections {
        connection.await.unwrap();
    }
    let all_gone = async {
        while mesh.near.proxy.registry.count(&client.handle.context.pod.pod_uid) > 0 {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, all_gone)
        .await
        .expect("the registry keeps ended connections");
    let metrics = mesh.near.metrics.render();
    let opened = metrics
        .lines()
        .find(|line| line.starts_with("mesh_tcp_connections_opened_total"))
        .unwrap();
    assert!(opened.ends_with(" 1000"), "{opened}");
}

#[tokio::test]
async fn two_pods_of_one_node_and_a_pod_to_itself() {
    let mesh = Mesh::new();
    let one = mesh.pod(&mesh.near, "one").await;
    let two = mesh.pod(&mesh.near, "two").await;
    let (_one, _two) = (one.echo().await, two.echo().await);
    for (from, to) in [(&one, &two), (&two, &one), (&one, &one)] {
        let mut stream = from.connect(to.application()).await;
        assert_echo(&mut stream, "hello").await;
    }
}

#[tokio::test]
async fn outsiders_are_passed_through_and_counted() {
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let outsider = TcpListener::bind(SocketAddr::new(fresh_address(), 0)).await.unwrap();
    let mut stream = client.connect(outsider.local_addr().unwrap()).await;
    let (mut accepted, _) = outsider.accept().await.unwrap();
    stream.write_all(b"x").await.unwrap();
    accepted.read_exact(&mut [0]).await.unwrap();
    drop((stream, accepted));
    let line = mesh.near.log_line(|line| line["path"] == "passthrough").await;
    assert_eq!(line["connection_security_policy"], "none");
    let metrics = mesh.near.metrics.render();
    assert!(
        metrics.contains(r#"mesh_passthrough_connections_total{destination="outside"} 1"#),
        "{metrics}"
    );

    // A Pod that is not protected yet, too.
    let pending = mesh.unannounced_pod(&mesh.far, "pending").await;
    let mut workload = pending.workload.clone();
    workload.membership = Membership::Pending;
    mesh.tell(vec![Change::Workload(workload)]);
    let _echo = pending.echo().await;
    let mut stream = client.connect(pending.application()).await;
    assert_echo(&mut stream, "hello").await;
    let metrics = mesh.near.metrics.render();
    assert!(
        metrics.contains(r#"mesh_passthrough_connections_total{destination="pending"} 1"#),
        "{metrics}"
    );
}

#[tokio::test]
async fn a_cut_and_a_release_reset_both_ends() {
    let mesh = Mesh::new();
    let (_client, _server, mut client, mut server) = connected(&mesh).await;
    mesh.tell(vec![deny("shop/late", "client")]);
    assert_reset(&mut client).await;
    assert_reset(&mut server).await;
    let line = mesh.far.logs_reason("cut_by_policy").await;
    assert_eq!(line["policy"], "shop/late");
    let metrics = mesh.far.metrics.render();
    assert!(
        metrics.contains(r#"mesh_policy_cut_total{policy="shop/late"} 1"#),
        "{metrics}"
    );
    mesh.tell(vec![Change::RemovePolicy("shop/late".into())]);

    let (pod, _server, mut client, mut server) = connected(&mesh).await;
    pod.handle.shutdown().await;
    assert_reset(&mut client).await;
    assert_reset(&mut server).await;
    let address = SocketAddr::new(pod.ip, OUTBOUND_PORT);
    assert!(TcpStream::connect(address).await.is_err(), "the listener is closed");
    mesh.near.logs_reason("aborted").await;
}

#[tokio::test]
async fn both_ends_of_a_tunnel_tell_how_tcp_fares_on_it() {
    let mesh = Mesh::new();
    let (client, server, mut stream, mut peer) = connected(&mesh).await;
    let open = |node: &Node, direction: &str, count: usize| {
        let line = format!("mesh_tunnels_open{{direction=\"{direction}\"}} {count}\n");
        node.metrics.render().contains(&line)
    };
    assert!(open(&mesh.near, "outbound", 1) && open(&mesh.far, "inbound", 1));
    stream.write_all(b"ping").await.unwrap();
    peer.read_exact(&mut [0; 4]).await.unwrap();
    client.handle.shutdown().await;
    server.handle.shutdown().await;
    for (node, direction, reporter) in [(&mesh.near, "outbound", "source"), (&mesh.far, "inbound", "destination")] {
        let closed = async {
            while !open(node, direction, 0) {
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(PATIENCE, closed).await.expect("the tunnel is still counted as open");
        let metrics = node.metrics.render();
        let labels = format!(
            "{{destination_workload=\"server\",destination_workload_namespace=\"shop\",reporter=\"{reporter}\",source_workload=\"client\",source_workload_namespace=\"shop\"}}"
        );
        let value = |name: &str| {
            let prefix = format!("{name}{labels} ");
            let line = metrics.lines().find_map(|line| line.strip_prefix(&prefix));
            line.map(|value| value.parse::<u64>().unwrap())
        };
        let sent = value("mesh_tcp_sent_segments_total").expect("told");
        assert!(sent > 0, "{metrics}");
        // None is lost on loopback; a busy machine may send one again all the same, and never most of them.
        let again = value("mesh_tcp_retransmitted_segments_total").expect("told");
        assert!(again * 2 < sent, "{again} of {sent} were sent again: {metrics}");
        assert!(value("mesh_tcp_smoothed_rtt_seconds_count") > Some(0), "{metrics}");
    }
}
