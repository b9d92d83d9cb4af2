//! What somebody takes from a living Pod's capture is put back, piece by piece.

use mesh_agent::capture::Repairs;

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn each_piece_that_is_taken_away_is_put_back() {
    let Some(bed) = Bed::new("each_piece_that_is_taken_away_is_put_back") else {
        return;
    };
    let capture = bed.start();
    let pod = capture.enroll(bed.pod("uid-1")).await.unwrap();
    let cookie = pod.netns_cookie;
    let mut tasks = serve(&capture, pod);
    capture.prove("uid-1").await.unwrap();
    let whole = bed.snapshot();
    assert_eq!(capture.repair("uid-1").await.unwrap(), Repairs::default());

    let hand = Kernel::load(&bed.kernel_config()).unwrap();
    let pin = bed.folder.path().join("bpf/culvert/v*/pods/uid-1");
    let backstop = bed.folder.path().join("bpf/culvert/v*/backstops/uid-1/*");
    let inside = |command: &str| {
        run(&format!("ip netns exec {} sh -c '{command}'", bed.name));
    };
    let pieces: [(&[&str], &dyn Fn()); 12] = [
        (&["pods_entry", "original_destinations"], &|| hand.remove_pod(cookie).unwrap()),
        (&["sk_lookup"], &|| assert!(hand.detach_lookup("uid-1").unwrap())),
        (&["sk_lookup"], &|| {
            run(&format!("rm {}", pin.display()));
        }),
        (&["backstop"], &|| assert!(hand.detach_backstops("uid-1").unwrap())),
        (&["backstop"], &|| {
            run(&format!("rm {}", backstop.display()));
        }),
        (&["return_rule"], &|| inside("ip rule del pref 100")),
        (&["return_rule"], &|| inside("ip -6 rule del pref 100")),
        (&["return_route"], &|| inside("ip route flush table 17238")),
        (&["return_route"], &|| inside("ip -6 route flush table 17238")),
        (&["net/ipv4/tcp_fwmark_accept"], &|| {
            inside("echo 0 > /proc/sys/net/ipv4/tcp_fwmark_accept");
        }),
        (&["net/ipv4/ip_local_reserved_ports"], &|| {
            inside("echo > /proc/sys/net/ipv4/ip_local_reserved_ports");
        }),
        (&["net/ipv6/fwmark_reflect"], &|| {
            inside("echo 0 > /proc/sys/net/ipv6/fwmark_reflect")
        }),
    ];
    let mut count = 0;
    for (pieces, take) in pieces {
        take();
        let repairs = capture.repair("uid-1").await.unwrap();
        assert_eq!((repairs.repaired.as_slice(), repairs.is_listener_lost), (pieces, false));
        capture
            .prove("uid-1")
            .await
            .unwrap_or_else(|error| panic!("{pieces:?}: {error}"));
        assert_eq!(bed.snapshot(), whole, "{pieces:?}");
        count += pieces.len() as u64;
        assert!(capture.counters().contains(&("repaired", count)));
        assert_eq!(capture.repair("uid-1").await.unwrap(), Repairs::default());
    }

    tasks.shutdown().await;
    let repairs = capture.repair("uid-1").await.unwrap();
    assert!(repairs.is_listener_lost && repairs.repaired.is_empty(), "{repairs:?}");
    let refused = timeout(A_WHILE, TcpStream::connect((POD_V4, 8080))).await.unwrap();
    assert!(refused.is_err(), "{refused:?}");
    let _tasks = serve(&capture, capture.reopen("uid-1").await.unwrap());
    capture.prove("uid-1").await.unwrap();
    assert_eq!(capture.repair("uid-1").await.unwrap(), Repairs::default());
    assert!(capture.release("uid-1").await.unwrap());
}
