//! Enrolment with real network namespaces and the real programs. Needs root and an agent built with EBPF_OBJECT.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test: a panic is its failure, and standard output its report"
)]

#[path = "capture/backstop.rs"]
mod backstop;
#[path = "capture/bed.rs"]
mod bed;
#[path = "capture/defences.rs"]
mod defences;
#[path = "capture/ports.rs"]
mod ports;
#[path = "capture/recovery.rs"]
mod recovery;
#[path = "capture/repair.rs"]
mod repair;
#[path = "capture/user_namespace.rs"]
mod user_namespace;

use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use std::time::Duration;

use aya::maps::{Array, Map, MapData};
use bed::{Bed, NODE_V4, NODE_V6, POD_V4, POD_V6, run, serve};
use mesh_agent::capture::kernel::{Kernel, PodProbePorts};
use mesh_agent::capture::{Capture, CaptureError, PodNetwork, ProofError};
use mesh_common::KubeletValue;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

const A_WHILE: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread")]
async fn a_release_leaves_no_trace() {
    let Some(bed) = Bed::new("a_release_leaves_no_trace") else {
        return;
    };
    let before = bed.snapshot();
    let capture = bed.start();
    for _ in 0..2 {
        let pod = capture.enroll(bed.pod("uid-1")).await.unwrap();
        let tasks = serve(&capture, pod);
        capture.prove("uid-1").await.unwrap();
        assert_ne!(bed.snapshot(), before);
        drop(tasks);
        assert!(capture.release("uid-1").await.unwrap());
        settle_to(&bed, &before).await;
    }
    assert!(!capture.release("uid-1").await.unwrap());
    settle_to(&bed, &before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_setting_that_was_there_before_stays() {
    let Some(bed) = Bed::new("a_setting_that_was_there_before_stays") else {
        return;
    };
    run(&format!(
        "ip netns exec {0} sh -c 'echo 1 > /proc/sys/net/ipv4/tcp_fwmark_accept
             echo 8000-8002,15001 > /proc/sys/net/ipv4/ip_local_reserved_ports' && ip -n {0} rule add pref 77 fwmark 9 lookup 9",
        bed.name
    ));
    let before = bed.snapshot();
    let capture = bed.start();
    drop(capture.enroll(bed.pod("uid-1")).await.unwrap());
    assert!(capture.release("uid-1").await.unwrap());
    settle_to(&bed, &before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_enrolment_leaves_no_trace_and_names_the_port() {
    let Some(bed) = Bed::new("a_failed_enrolment_leaves_no_trace_and_names_the_port") else {
        return;
    };
    let capture = bed.start();
    for port in [15001, 15006, 15008] {
        let application = bed.application(&format!("127.0.0.1:{port}"));
        let before = bed.snapshot();
        let error = capture.enroll(bed.pod("uid-1")).await.unwrap_err().to_string();
        assert!(
            error.contains(&format!("port {port} ")) && error.contains("another port"),
            "{error}"
        );
        assert_eq!(bed.snapshot(), before);
        drop(application);
    }
    let before = bed.snapshot();
    let mut elsewhere = bed.pod("uid-1");
    elsewhere.addresses = vec!["10.213.77.99".parse().unwrap()];
    let error = capture.enroll(elsewhere).await.unwrap_err().to_string();
    assert!(error.contains("10.213.77.99"), "{error}");
    assert_eq!(bed.snapshot(), before);
    // Nothing hinders the next attempt.
    drop(capture.enroll(bed.pod("uid-2")).await.unwrap());
    assert!(capture.release("uid-2").await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn contradicting_enrolments_are_refused() {
    let Some(bed) = Bed::new("contradicting_enrolments_are_refused") else {
        return;
    };
    let capture = bed.start();
    let mut host = bed.pod("uid-host");
    host.netns_path = "/proc/self/ns/net".into();
    assert!(capture.enroll(host).await.unwrap_err().to_string().contains("hostNetwork"));
    let mut escaping = bed.pod("../uid");
    assert!(matches!(
        capture.enroll(escaping.clone()).await,
        Err(CaptureError::Refused(_))
    ));
    escaping.uid = "uid-1".into();
    let pod = capture.enroll(escaping).await.unwrap();
    assert!(matches!(
        capture.enroll(bed.pod("uid-1")).await,
        Err(CaptureError::AlreadyEnrolled(_))
    ));
    let error = capture.enroll(bed.pod("uid-2")).await.unwrap_err().to_string();
    assert!(error.contains("uid-1"), "{error}");

    let other = format!("{}b", bed.name);
    run(&format!(
        "ip netns add {other} && ip -n {other} link set lo up && ip -n {other} addr add {POD_V4}/32 dev lo"
    ));
    let mut moved = bed.pod("uid-1");
    moved.netns_path = format!("/run/netns/{other}").into();
    moved.addresses = vec![POD_V4.parse().unwrap()];
    let error = capture.enroll(moved).await.unwrap_err().to_string();
    run(&format!("ip netns del {other}"));
    assert!(error.contains("another network namespace"), "{error}");
    drop(pod);
    assert!(capture.release("uid-1").await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_application_sees_the_true_client() {
    let Some(bed) = Bed::new("the_application_sees_the_true_client") else {
        return;
    };
    let capture = bed.start();
    let enrolled = capture.enroll(bed.pod("uid-1")).await.unwrap();
    let network = Arc::clone(&enrolled.network);
    let _tasks = serve(&capture, enrolled);
    let application = bed.application("[::]:8080");
    for (pod, node) in [(POD_V4, NODE_V4), (POD_V6, NODE_V6)] {
        let mut client = timeout(A_WHILE, TcpStream::connect((pod, 8080))).await.unwrap().unwrap();
        let (mut served, peer) = timeout(A_WHILE, application.accept()).await.unwrap().unwrap();
        assert_eq!(peer.ip().to_canonical().to_string(), node);
        assert!((20_000..32_768).contains(&peer.port()), "{peer}");
        client.write_all(b"there").await.unwrap();
        client.shutdown().await.unwrap();
        let mut heard = String::new();
        timeout(A_WHILE, served.read_to_string(&mut heard)).await.unwrap().unwrap();
        served.write_all(b"and back").await.unwrap();
        drop(served);
        let mut answer = String::new();
        timeout(A_WHILE, client.read_to_string(&mut answer)).await.unwrap().unwrap();
        assert_eq!((heard.as_str(), answer.as_str()), ("there", "and back"));
        // A closed port is told at once: without fwmark_reflect its reset would not come back to the agent.
        let closed = SocketAddr::new(pod.parse().unwrap(), 81);
        let upstream = network.upstream_socket(node.parse().unwrap(), closed).unwrap();
        let refused = timeout(Duration::from_secs(1), upstream.socket.connect(closed))
            .await
            .unwrap()
            .unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
        let mut refused = timeout(A_WHILE, TcpStream::connect(closed)).await.unwrap().unwrap();
        let ended = timeout(A_WHILE, refused.read(&mut [0; 8])).await.unwrap();
        assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
    }
    // The Pod itself as client, as when it reaches itself through a service.
    for pod in [POD_V4, POD_V6] {
        let own = SocketAddr::new(pod.parse().unwrap(), 8080);
        let upstream = network.upstream_socket(own.ip(), own).unwrap();
        let mut itself = timeout(A_WHILE, upstream.socket.connect(own)).await.unwrap().unwrap();
        let (mut served, peer) = timeout(A_WHILE, application.accept()).await.unwrap().unwrap();
        assert_eq!(peer.ip().to_canonical(), own.ip());
        itself.write_all(b"x").await.unwrap();
        assert_eq!(timeout(A_WHILE, served.read_u8()).await.unwrap().unwrap(), b'x');
    }
    assert!(capture.release("uid-1").await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proof_fails_where_the_capture_is_broken() {
    let Some(bed) = Bed::new("a_proof_fails_where_the_capture_is_broken") else {
        return;
    };
    let capture = bed.start();
    assert!(matches!(capture.prove("uid-1").await, Err(ProofError::NotEnrolled(_))));
    let pod = capture.enroll(bed.pod("uid-1")).await.unwrap();
    let cookie = pod.netns_cookie;
    let _tasks = serve(&capture, pod);
    capture.prove("uid-1").await.unwrap();

    let hand = Kernel::load(&bed.kernel_config()).unwrap();
    let entry = hand.pods().unwrap().into_iter().find(|(of, _)| *of == cookie).unwrap();
    hand.remove_pod(cookie).unwrap();
    let error = capture.prove("uid-1").await.unwrap_err();
    assert_eq!(error.reason(), "outbound_not_captured", "{error}");
    hand.add_pod(cookie, &entry.1).unwrap();
    capture.prove("uid-1").await.unwrap();

    hand.detach_lookup("uid-1").unwrap();
    let error = capture.prove("uid-1").await.unwrap_err();
    assert_eq!(error.reason(), "inbound_not_captured", "{error}");
    assert!(capture.release("uid-1").await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_later_agent_takes_over_and_releases() {
    let Some(bed) = Bed::new("a_later_agent_takes_over_and_releases") else {
        return;
    };
    let before = bed.snapshot();
    let capture = bed.start();
    // Until they are closed: its listeners would take the connection.
    serve(&capture, capture.enroll(bed.pod("uid-1")).await.unwrap())
        .shutdown()
        .await;
    drop(capture);
    // In between: closed, not open.
    let _application = bed.application("[::]:8080");
    let refused = timeout(A_WHILE, TcpStream::connect((POD_V4, 8080))).await.unwrap();
    assert!(refused.is_err(), "{refused:?}");

    let capture = bed.start();
    let mut recovered = capture.recover().await;
    let pod = recovered.remove(0).unwrap();
    assert_eq!((pod.pod.uid.as_str(), recovered.len()), ("uid-1", 0));
    let tasks = serve(&capture, pod);
    capture.prove("uid-1").await.unwrap();
    drop((tasks, _application));
    assert!(capture.release("uid-1").await.unwrap());
    settle_to(&bed, &before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_pod_inherits_no_probe_ports_of_its_slot() {
    let Some(bed) = Bed::new("a_new_pod_inherits_no_probe_ports_of_its_slot") else {
        return;
    };
    let capture = bed.start();
    // As an agent leaves them that released a Pod and did not know of them.
    let hand = Kernel::load(&bed.kernel_config()).unwrap();
    let probe_ports = || {
        hand.map_fill()
            .into_iter()
            .find(|map| map.name == "probe_ports")
            .unwrap()
            .entries
    };
    let left = PodProbePorts {
        slot: 0,
        addresses: &[[1; 16]],
        ports: &[8080],
    };
    hand.set_probe_ports(&[left]).unwrap();
    assert_eq!(probe_ports(), 1);
    drop(capture.enroll(bed.pod("uid-1")).await.unwrap());
    assert_eq!(probe_ports(), 0);
    assert!(capture.release("uid-1").await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kubelet_that_is_erased_by_hand_is_told_again() {
    let Some(bed) = Bed::new("a_kubelet_that_is_erased_by_hand_is_told_again") else {
        return;
    };
    let capture = bed.start();
    let hand = Kernel::load(&bed.kernel_config()).unwrap();
    let shared = bed
        .config()
        .kernel
        .pin_path
        .join(format!("v{}", mesh_common::STORAGE_VERSION));
    let map = Map::Array(MapData::from_pin(shared.join("KUBELET")).unwrap());
    let map: Array<_, KubeletValue> = map.try_into().unwrap();
    let following = tokio::spawn(Arc::clone(&capture).follow_kubelet(Some("/agent".into())));
    let id = bed.cgroup().join("agent").metadata().unwrap().ino();
    for _ in 0..2 {
        timeout(A_WHILE, async {
            while map.get(&0, 0).unwrap().cgroup_id != id {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        })
        .await
        .unwrap();
        hand.set_kubelet(0, None).unwrap();
    }
    following.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_is_detached_by_hand_is_missed() {
    let Some(bed) = Bed::new("a_program_that_is_detached_by_hand_is_missed") else {
        return;
    };
    let capture = bed.start();
    assert!(capture.detached_programs().is_empty());
    let links = bed
        .config()
        .kernel
        .pin_path
        .join(format!("v{}", mesh_common::STORAGE_VERSION))
        .join("links");
    std::fs::remove_file(links.join("connect4")).unwrap();
    assert_eq!(capture.detached_programs(), ["connect4"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cleanup_needs_no_agent() {
    let Some(bed) = Bed::new("a_cleanup_needs_no_agent") else {
        return;
    };
    let before = bed.snapshot();
    let capture = bed.start();
    drop(capture.enroll(bed.pod("uid-1")).await.unwrap());
    drop(capture);
    let config = bed.config();
    let summary = Capture::cleanup(&config.run_dir, &config.kernel.pin_path).await.unwrap();
    assert_eq!(summary.released, ["uid-1"]);
    assert!(summary.failed.is_empty(), "{:?}", summary.failed);
    settle_to(&bed, &before).await;
    let again = Capture::cleanup(&config.run_dir, &config.kernel.pin_path).await.unwrap();
    assert!(again.released.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vanished_namespace_is_released_at_recovery() {
    let Some(bed) = Bed::new("a_vanished_namespace_is_released_at_recovery") else {
        return;
    };
    let capture = bed.start();
    let cookie = {
        let pod = capture.enroll(bed.pod("uid-1")).await.unwrap();
        pod.netns_cookie
    };
    drop(capture);
    run(&format!("ip netns del {}", bed.name));
    let capture = bed.start();
    assert!(capture.recover().await.is_empty());
    assert!(!capture.release("uid-1").await.unwrap());
    let hand = Kernel::load(&bed.kernel_config()).unwrap();
    assert!(hand.pods().unwrap().iter().all(|(of, _)| *of != cookie));
    assert!(hand.attached_pods().unwrap().is_empty());
}

/// The listeners close with their tasks, which end a moment after they are dropped.
async fn settle_to(bed: &Bed, before: &str) {
    for _ in 0..50 {
        if bed.snapshot() == before {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(bed.snapshot(), before);
}
