//! What stalled connections may hold.

use super::raw::RawTunnel;
use super::*;
use crate::proxy::buffers::Buffers;

const MEBIBYTE: usize = 1024 * 1024;

fn held(node: &Node) -> usize {
    node.proxy.registry.buffers().held_bytes()
}

fn resident_bytes() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

/// An application that sends what it can to whoever connects. The kernel holds little of it: what it may hold of TCP is one bound for
/// the whole machine, and beyond that it resets other people's connections.
async fn gushing(pod: &Pod) -> JoinHandle<()> {
    let listener = pod.listen().await;
    tokio::spawn(async move {
        let chunk: &[u8] = vec![7; 64 * 1024].leak();
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            socket2::SockRef::from(&stream).set_send_buffer_size(64 * 1024).unwrap();
            // Until it is reset.
            tokio::spawn(async move { while stream.write_all(chunk).await.is_ok() {} });
        }
    })
}

/// A connection whose application never reads, with a small buffer in the kernel: what it holds is the agent's.
async fn stalled(pod: &Pod, to: SocketAddr) -> TcpStream {
    let socket = socket_at(pod.ip);
    socket.set_recv_buffer_size(16 * 1024).unwrap();
    let local = socket.local_addr().unwrap();
    pod.network.destinations.lock().insert(local, OriginalDst::new(to));
    socket.connect(SocketAddr::new(pod.ip, OUTBOUND_PORT)).await.unwrap()
}

/// The most that the node holds until it holds the same for half a second.
async fn settled(node: &Node) -> usize {
    let (mut most, mut last, mut same) = (0, 0, 0);
    for _ in 0..600 {
        sleep(Duration::from_millis(100)).await;
        let now = held(node);
        same = if now == last { same + 1 } else { 0 };
        (most, last) = (most.max(now), now);
        if same == 5 {
            break;
        }
    }
    most
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_stalled_streams_stay_inside_the_bound() {
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let other = mesh.pod(&mesh.near, "other").await;
    let server = mesh.pod(&mesh.far, "server").await;
    let echo = mesh.pod(&mesh.far, "echo").await;
    let _echo = echo.echo().await;
    let _gushing = gushing(&server).await;
    let before = resident_bytes();
    let mut streams = Vec::new();
    for _ in 0..1000 {
        streams.push(stalled(&client, server.application()).await);
    }
    let held_bytes = settled(&mesh.near).await;
    let growth = resident_bytes().saturating_sub(before);
    // 1,000 full windows would be 2,000 MiB.
    assert!(held_bytes > 16 * MEBIBYTE, "nothing has stalled: {held_bytes}");
    assert!(held_bytes <= 128 * MEBIBYTE, "{held_bytes}");
    assert!(held(&mesh.far) <= 128 * MEBIBYTE, "{}", held(&mesh.far));
    // Two agents' bounds, and what a thousand connections of both cost; other tests of this process run beside it.
    assert!(growth <= 700 * MEBIBYTE, "{growth}");
    // Small windows keep most of them, how many depends on how soon they come; full ones would leave 64.
    let open = mesh.near.proxy.registry.count(&client.handle.context.pod.pod_uid);
    assert!(open > 128, "{open}");
    let mut stream = other.connect(echo.application()).await;
    assert_echo(&mut stream, "unaffected").await;
    let mut stream = client.connect(echo.application()).await;
    assert_echo(&mut stream, "nor is what moves").await;
    // Nothing is left once they are gone.
    drop((streams, stream));
    until("released", || held(&mesh.near) == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_longest_stalled_give_way() {
    // The far agent has room: where it gave way first, too little would come to the near one.
    let mesh = Mesh {
        near: Node::with_limits(Limits {
            pod_buffered_bytes: 2 * MEBIBYTE,
            ..Limits::default()
        }),
        ..Mesh::new()
    };
    let client = mesh.pod(&mesh.near, "client").await;
    let other = mesh.pod(&mesh.near, "other").await;
    let server = mesh.pod(&mesh.far, "server").await;
    let echo = mesh.pod(&mesh.far, "echo").await;
    let _echo = echo.echo().await;
    let _gushing = gushing(&server).await;
    let mut moving = client.connect(echo.application()).await;
    assert_echo(&mut moving, "hello").await;
    let mut bystander = other.connect(echo.application()).await;
    let mut streams = Vec::new();
    // With small windows each keeps up to 64 KiB here, and some much less: more than the bound together.
    for _ in 0..200 {
        streams.push(stalled(&client, server.application()).await);
    }
    mesh.near.logs_reason("memory_limit").await;
    let held_bytes = mesh.near.proxy.registry.buffers().pod(&client.handle.context.pod.pod_uid);
    settled(&mesh.near).await;
    let held_bytes = held_bytes.held_bytes();
    assert!(held_bytes <= 2 * MEBIBYTE, "{held_bytes}");
    assert_echo(&mut moving, "still here").await;
    assert_echo(&mut bystander, "another Pod's").await;
}

/// What is not decided gives way before what was let through, then what has stalled longest; and of a node, the largest Pod's.
#[tokio::test(start_paused = true)]
async fn who_gives_way() {
    let buffers = Buffers::new(&Limits {
        pod_buffered_bytes: 80,
        node_buffered_bytes: 120,
        ..Limits::default()
    });
    let pod = buffers.pod(&"one".into());
    let accounts: Vec<_> = (0..4).map(|_| pod.account()).collect();
    let evicted = |accounts: &[Arc<crate::proxy::buffers::Account>]| -> Vec<bool> {
        accounts.iter().map(|account| account.evicted().is_cancelled()).collect()
    };
    for account in &accounts {
        account.hold(20);
        tokio::time::advance(Duration::from_secs(1)).await;
    }
    for open in [0, 1, 3] {
        accounts[open].opened();
    }
    accounts[0].release(10);
    assert_eq!(evicted(&accounts), [false; 4]);
    // To 81: an eighth is to be free, which the undecided one's 20 are enough for.
    accounts[3].hold(11);
    assert_eq!(evicted(&accounts), [false, false, true, false]);
    // What must end is not counted again; the next is the one that moved longest ago, and not 0, which has moved since.
    accounts[3].hold(20);
    assert_eq!(evicted(&accounts), [false, true, true, false]);
    assert_eq!(pod.held_bytes(), 101);
    accounts[1].release(20);
    accounts[2].release(20);

    let small = buffers.pod(&"two".into());
    let other = small.account();
    other.hold(50);
    assert_eq!(evicted(&accounts), [false, true, true, false]);
    let third = buffers.pod(&"three".into()).account();
    third.hold(20);
    assert!(!other.evicted().is_cancelled() && !third.evicted().is_cancelled());
    assert!(accounts[0].evicted().is_cancelled() || accounts[3].evicted().is_cancelled());
    accounts[0].release(10);
    accounts[3].release(51);
    other.release(50);
    third.release(20);
    assert_eq!(buffers.held_bytes(), 0);
}

/// A server whose decision waits.
async fn undecided(mesh: &Mesh) -> Pod {
    let server = mesh.unannounced_pod(&mesh.far, "server").await;
    let mut listed = server.workload.clone();
    listed.policies = vec!["shop/late".into()];
    mesh.tell(vec![Change::Workload(listed)]);
    server
}

#[tokio::test]
async fn early_data_is_bounded() {
    let mesh = Mesh::new();
    let server = undecided(&mesh).await;
    let pair = mesh.authority.issue(&identity("client"));
    let tunnel = RawTunnel::open(&mesh, fresh_address(), &server, pair).await;
    let (response, mut send) = tunnel.request(server.application()).await.unwrap();
    send.send_data(vec![0; MEBIBYTE].into(), false).unwrap();
    mesh.far.logs_reason("early_data").await;
    assert_eq!(timeout(PATIENCE, response).await.unwrap().unwrap().status(), 503);
    until("released", || held(&mesh.far) == 0).await;
}

#[tokio::test]
async fn who_gives_up_while_it_is_decided_leaves_at_once() {
    let mesh = Mesh::new();
    let server = undecided(&mesh).await;
    let pair = mesh.authority.issue(&identity("client"));
    let tunnel = RawTunnel::open(&mesh, fresh_address(), &server, pair).await;
    let uid = &server.handle.context.pod.pod_uid;
    let count = || mesh.far.proxy.registry.count(uid);
    for end_of_stream in [false, true] {
        let (response, mut send) = tunnel.request(server.application()).await.unwrap();
        until("registered before it is decided", || count() == 1).await;
        if end_of_stream {
            send.send_data(vec![].into(), true).unwrap();
        }
        send.send_reset(h2::Reason::CANCEL);
        drop((response, send));
        until("still there", || count() == 0).await;
    }
    // Not of the decision's patience.
    mesh.far.logs_reason("reset_by_source").await;
    let text = std::fs::read_to_string(&mesh.far.log).unwrap();
    assert!(!text.contains("policy_missing"), "{text}");
}

#[tokio::test]
async fn a_source_has_only_so_many_undecided() {
    let mesh = Mesh::with_limits(Limits {
        undecided_per_source: 3,
        ..Limits::default()
    });
    let server = undecided(&mesh).await;
    let uid = &server.handle.context.pod.pod_uid;
    let count = || mesh.far.proxy.registry.count(uid);
    let pair = mesh.authority.issue(&identity("client"));
    let tunnel = RawTunnel::open(&mesh, fresh_address(), &server, pair.clone()).await;
    let mut waiting = Vec::new();
    for _ in 0..3 {
        waiting.push(tunnel.request(server.application()).await.unwrap());
    }
    until("three wait", || count() == 3).await;
    assert_eq!(tunnel.connect(server.application()).await.unwrap().0, 503);
    mesh.far.logs_reason("limit").await;
    let other = RawTunnel::open(&mesh, fresh_address(), &server, pair).await;
    let another = other.request(server.application()).await.unwrap();
    until("another source's waits, too", || count() == 4).await;
    // Once decided, they do not count as undecided any more.
    let _echo = server.echo().await;
    mesh.tell(vec![Change::Workload(server.workload.clone())]);
    for (response, _send) in &mut waiting {
        assert_eq!(timeout(PATIENCE, response).await.unwrap().unwrap().status(), 200);
    }
    assert_eq!(tunnel.connect(server.application()).await.unwrap().0, 200);
    drop(another);
}
