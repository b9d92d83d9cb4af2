//! The backstop follows a Pod's life: attached at the node's ends of its veths, put back, taken over, and gone with the release.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use ipnet::IpNet;
use mesh_agent::capture::Backstop;
use mesh_common::limits::MAX_MESH_DESTINATIONS;

use super::*;

/// What the programs have dropped for its source.
fn dropped(capture: &Capture) -> u64 {
    let counters = capture.counters();
    counters.iter().find(|(name, _)| *name == "dropped_foreign_source").unwrap().1
}

/// Sends a datagram from an address that is not the Pod's; whether it was dropped.
fn is_dropped(bed: &Bed, capture: &Capture) -> bool {
    let before = dropped(capture);
    run(&format!(
        "ip netns exec {} python3 -c 'import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.setsockopt(socket.IPPROTO_IP, 19, 1)
s.bind((\"10.213.77.77\", 0)); s.sendto(b\"x\", (\"{NODE_V4}\", 4444))'",
        bed.name
    ));
    dropped(capture) > before
}

fn pins(bed: &Bed) -> PathBuf {
    let version = format!("v{}", mesh_common::STORAGE_VERSION);
    bed.kernel_config().pin_path.join(version).join("backstops")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backstop_comes_and_goes_with_the_enrolment() {
    let Some(bed) = Bed::new("a_backstop_comes_and_goes_with_the_enrolment") else {
        return;
    };
    let capture = bed.start();
    assert!(!is_dropped(&bed, &capture));
    drop(capture.enroll(bed.pod("uid-1")).await.unwrap());
    assert_eq!(capture.backstops(), [("uid-1".to_owned(), Backstop::Attached)]);
    assert!(is_dropped(&bed, &capture));
    // Another agent takes it over where it is.
    drop(capture);
    let capture = bed.start();
    assert!(is_dropped(&bed, &capture), "without an agent that serves");
    drop(capture.recover().await.remove(0).unwrap());
    assert_eq!(capture.backstops(), [("uid-1".to_owned(), Backstop::Attached)]);
    assert!(is_dropped(&bed, &capture));
    assert_eq!(std::fs::read_dir(pins(&bed).join("uid-1")).unwrap().count(), 1);
    assert!(capture.release("uid-1").await.unwrap());
    assert!(!is_dropped(&bed, &capture));
    assert_eq!(std::fs::read_dir(pins(&bed)).unwrap().count(), 0);

    drop(capture.enroll(bed.pod("uid-1")).await.unwrap());
    assert!(is_dropped(&bed, &capture));
    let config = bed.config();
    let kept = capture.counters();
    drop(capture);
    let summary = Capture::cleanup(&config.run_dir, &config.kernel.pin_path).await.unwrap();
    assert!(
        summary.failed.is_empty() && !config.kernel.pin_path.exists(),
        "{summary:?} {kept:?}"
    );
    assert!(!is_dropped(&bed, &bed.start()));
}

#[tokio::test(flavor = "multi_thread")]
async fn more_of_the_mesh_than_the_map_takes_is_counted() {
    let Some(bed) = Bed::new("more_of_the_mesh_than_the_map_takes_is_counted") else {
        return;
    };
    let capture = bed.start();
    let times_full = || {
        let counters = capture.counters();
        counters.iter().find(|(name, _)| *name == "mesh_destinations_full").unwrap().1
    };
    for (prefixes, full) in [(MAX_MESH_DESTINATIONS - 1, 0), (MAX_MESH_DESTINATIONS, 1)] {
        let addresses = (0..prefixes).map(|n| IpAddr::from(Ipv4Addr::from(0x0b00_0000 + n)));
        let prefixes = addresses.map(|address| (IpNet::from(address), true)).collect();
        capture.set_mesh_destinations(prefixes).await.unwrap();
        assert_eq!(times_full(), full);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_veth_that_is_made_anew_has_its_backstop_again() {
    let Some(bed) = Bed::new("a_veth_that_is_made_anew_has_its_backstop_again") else {
        return;
    };
    let capture = bed.start();
    let _tasks = serve(&capture, capture.enroll(bed.pod("uid-1")).await.unwrap());
    let name = &bed.name;
    // A veth between the Pod and a namespace within it is none of the node's.
    run(&format!(
        "ip netns add {name}i && ip -n {name} link add inner type veth peer name eth0 netns {name}i"
    ));
    assert!(capture.repair("uid-1").await.unwrap().repaired.is_empty());
    // A Pod that moves its veth into it stays behind the program.
    run(&format!("ip -n {name} link set eth0 netns {name}i name moved"));
    assert!(capture.repair("uid-1").await.unwrap().repaired.is_empty());
    assert_eq!(capture.backstops(), [("uid-1".to_owned(), Backstop::Attached)]);
    run(&format!(
        "ip netns del {name}i
         ip link del {name}n 2>/dev/null || true
         ip link add {name}n type veth peer name eth0 netns {name} && ip addr add {NODE_V4}/24 dev {name}n && ip link set {name}n up \
         && ip -n {name} addr add {POD_V4}/24 dev eth0 && ip -n {name} link set eth0 up"
    ));
    assert!(!is_dropped(&bed, &capture));
    assert_eq!(capture.repair("uid-1").await.unwrap().repaired, ["backstop"]);
    assert!(is_dropped(&bed, &capture));
    assert_eq!(
        std::fs::read_dir(pins(&bed).join("uid-1")).unwrap().count(),
        1,
        "of the old one nothing is left"
    );
    assert!(capture.release("uid-1").await.unwrap());
    assert!(!is_dropped(&bed, &capture));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_without_a_veth_is_enrolled_and_shown() {
    let Some(bed) = Bed::new("a_pod_without_a_veth_is_enrolled_and_shown") else {
        return;
    };
    let capture = bed.start();
    let (mut second, _netns) = bed.second_pod("uid-2");
    let name = &bed.name;
    run(&format!(
        "ip -n {name}b link del eth0; ip link add {name}m type dummy 2>/dev/null || true
         ip -n {name}b addr add {POD_V4}/32 dev lo"
    ));
    second.addresses = vec![POD_V4.parse().unwrap()];
    drop(capture.enroll(second).await.unwrap());
    assert_eq!(capture.backstops(), [("uid-2".to_owned(), Backstop::NoVeth)]);
    assert_eq!(capture.backstops()[0].1.missing(), Some("no_veth"));
    assert!(capture.repair("uid-2").await.unwrap().repaired.is_empty());
    assert!(capture.release("uid-2").await.unwrap());
}
