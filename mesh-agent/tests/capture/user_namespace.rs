//! A Pod with `hostUsers: false`: its network namespace belongs to a user namespace of its own, in which its root is nobody of the
//! node's.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::bed::{Bed, NODE_OF_SECOND_V4, SECOND_V4, run, serve};

const A_WHILE: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_with_a_user_namespace_is_captured_and_left_as_it_was() {
    let Some(bed) = Bed::new("a_pod_with_a_user_namespace_is_captured_and_left_as_it_was") else {
        return;
    };
    let (pod, other) = bed.second_pod_with_users("uid-1");
    // Only what belongs to the namespace's own users: the control that it is no namespace of the node's.
    let owner = run(&format!(
        "nsenter --net=/run/netns/{0} stat -c %u /proc/sys/net/ipv4/ip_local_port_range",
        other.name()
    ));
    assert_eq!(owner.trim(), "100000", "the namespace's root is not another user");
    let state = || {
        run(&format!(
            "nsenter --net=/run/netns/{} sh -c '
                ip -d rule; ip -6 -d rule; ip -d route show table all; ss -Htan state listening
                cd /proc/sys/net
                cat ipv4/tcp_fwmark_accept ipv4/fwmark_reflect ipv6/fwmark_reflect ipv4/ip_local_reserved_ports'",
            other.name()
        ))
    };
    let before = state();
    let capture = bed.start();
    let enrolled = capture.enroll(pod.clone()).await.unwrap();
    let tasks = serve(&capture, enrolled);
    capture.prove("uid-1").await.unwrap();
    assert_ne!(state(), before);
    let application = bed.application_at(&pod.netns_path, "[::]:8080");
    let mut client = timeout(A_WHILE, TcpStream::connect((SECOND_V4, 8080)))
        .await
        .unwrap()
        .unwrap();
    let (mut served, peer) = timeout(A_WHILE, application.accept()).await.unwrap().unwrap();
    assert_eq!(peer.ip().to_canonical().to_string(), NODE_OF_SECOND_V4);
    client.write_all(b"x").await.unwrap();
    assert_eq!(timeout(A_WHILE, served.read_u8()).await.unwrap().unwrap(), b'x');
    drop((client, served, application, tasks));
    assert!(capture.release("uid-1").await.unwrap());
    for _ in 0..100 {
        if state() == before {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(state(), before);
}
