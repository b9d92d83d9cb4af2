//! Who may have a tunnel's place, and a handshake's.

use super::*;
use crate::proxy::limits::QuotaLimits;
use crate::proxy::quota::Quota;

const HOUR: Duration = Duration::from_secs(3600);

/// Connections to the Pod's tunnel port that say `first`, and then nothing.
async fn silent(from: IpAddr, to: &Pod, count: usize, first: &[u8]) -> Vec<TcpStream> {
    let mut streams = Vec::new();
    for _ in 0..count {
        // Each of these fails only when it has been refused already.
        if let Ok(mut stream) = socket_at(from).connect(SocketAddr::new(to.ip, TUNNEL_PORT)).await {
            let _ = stream.write_all(first).await;
            streams.push(stream);
        }
    }
    streams
}

/// With all the patience there is, so that places are held.
fn patient() -> Limits {
    Limits {
        first_bytes_timeout: HOUR,
        handshake_timeout: HOUR,
        ..Limits::default()
    }
}

#[tokio::test]
async fn silent_connections_leave_room_for_members() {
    let mesh = Mesh {
        // The client's patience is a node's.
        near: Node::new(),
        ..Mesh::with_limits(patient())
    };
    let client = mesh.pod(&mesh.near, "client").await;
    let bad = mesh.pod(&mesh.near, "bad").await;
    for (name, from) in [("a stranger", fresh_address()), ("a member", bad.ip)] {
        let server = mesh.pod(&mesh.far, "server").await;
        let _echo = server.echo().await;
        // The head of a TLS record: all handshakes that there are, and more tunnels than there are.
        let _begun = silent(from, &server, 256, &[0x16]).await;
        let _silent = silent(from, &server, 900, &[]).await;
        let mut stream = client.connect(server.application()).await;
        assert_echo(&mut stream, name).await;
    }
    let refused = mesh.far.logs_reason("limit").await;
    assert_eq!(refused["direction"], "inbound");
}

#[tokio::test]
async fn many_strangers_leave_room_for_members() {
    let mesh = Mesh {
        near: Node::new(),
        ..Mesh::with_limits(patient())
    };
    let client = mesh.pod(&mesh.near, "client").await;
    let server = mesh.pod(&mesh.far, "server").await;
    let _echo = server.echo().await;
    let mut begun = Vec::new();
    for _ in 0..256 {
        begun.extend(silent(fresh_address(), &server, 5, &[0x16]).await);
    }
    let mut stream = client.connect(server.application()).await;
    assert_echo(&mut stream, "hello").await;
}

#[tokio::test]
async fn who_says_nothing_is_not_waited_for() {
    let mesh = Mesh::with_limits(Limits {
        first_bytes_timeout: Duration::from_millis(100),
        handshake_timeout: HOUR,
        ..Limits::default()
    });
    let server = mesh.pod(&mesh.far, "server").await;
    let mut streams = silent(fresh_address(), &server, 1, &[]).await;
    // Whichever end.
    let _ = timeout(PATIENCE, streams[0].read(&mut [0])).await.expect("waited for");
    mesh.far.logs_reason("handshake_timeout").await;
}

#[tokio::test]
async fn a_handshake_has_its_time() {
    let mesh = Mesh::with_limits(Limits {
        handshake_timeout: Duration::from_millis(100),
        ..Limits::default()
    });
    let server = mesh.pod(&mesh.far, "server").await;
    let mut streams = silent(fresh_address(), &server, 1, &[0x16]).await;
    let _ = timeout(PATIENCE, streams[0].read(&mut [0])).await.expect("waited for");
    mesh.far.logs_reason("handshake_timeout").await;

    // And so has that of a server which never answers.
    let client = mesh.pod(&mesh.near, "client").await;
    let mute = fresh_address();
    mesh.tell(vec![Change::Workload(workload("mute", mute))]);
    let _listener = TcpListener::bind(SocketAddr::new(mute, TUNNEL_PORT)).await.unwrap();
    assert_refused(client.connect(SocketAddr::new(mute, APPLICATION_PORT)).await).await;
    mesh.near.logs_reason("handshake_timeout").await;
}

#[test]
fn a_quota_by_address_and_for_strangers() {
    let quota = Quota::new(QuotaLimits {
        total: 4,
        per_address: 2,
        strangers: 1,
    });
    let [a, b, c] = [fresh_address(), fresh_address(), fresh_address()];
    let stranger = quota.take(a, false).unwrap();
    assert!(quota.take(b, false).is_none(), "strangers");
    let (first, second) = (quota.take(b, true).unwrap(), quota.take(b, true).unwrap());
    assert!(quota.take(b, true).is_none(), "of one address");
    let _last = quota.take(c, true).unwrap();
    assert!(quota.take(c, true).is_none(), "in all");
    drop(stranger);
    let stranger = quota.take(c, false).expect("given back");
    drop((first, second, stranger));
    assert!(quota.take(b, true).is_some());
}
