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
    capture.set_probe_ports([("uid-1".into(), vec![8080])].into()).await.unwrap();
    capture.prove("uid-1").await.unwrap();
    let whole = bed.snapshot();
    assert_eq!(capture.repair("uid-1").await.unwrap(), Repairs::default());

    let hand = Kernel::load(&bed.kernel_config()).unwrap();
    let slot = hand.pods().unwrap().first().unwrap().1.slot;
    let no_ports = PodProbePorts {
        slot,
        addresses: &[],
        ports: &[],
    };
    let pin = bed.folder.path().join("bpf/culvert/v*/pods/uid-1");
    let backstop = bed.folder.path().join("bpf/culvert/v*/backstops/uid-1/*");
    let inside = |command: &str| {
        run(&format!("ip netns exec {} sh -c '{command}'", bed.name));
    };
    let pieces: [(&[&str], &dyn Fn()); 14] = [
        (&["probe_ports"], &|| hand.set_probe_ports(&[no_ports]).unwrap()),
        (&["probe_vouches", "probe_ports"], &|| hand.forget_probes(slot).unwrap()),
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

#[tokio::test(flavor = "multi_thread")]
async fn a_release_that_has_begun_is_completed_by_the_next_agent() {
    let Some(bed) = Bed::new("a_release_that_has_begun_is_completed_by_the_next_agent") else {
        return;
    };
    let before = bed.snapshot();
    let capture = bed.start();
    let mut tasks = serve(&capture, capture.enroll(bed.pod("uid-1")).await.unwrap());
    capture.prove("uid-1").await.unwrap();
    let hand = Kernel::load(&bed.kernel_config()).unwrap();
    let steered = || {
        hand.counters()
            .into_iter()
            .find(|(name, _)| *name == "steered_plaintext")
            .unwrap()
            .1
    };
    let application = bed.application("[::]:8080");
    assert!(
        !capture.let_go("uid-2", Duration::ZERO).await.unwrap(),
        "nobody of that name is served"
    );
    let served = steered();
    assert!(served > 0, "its proofs are steered");
    assert!(capture.let_go("uid-1", A_WHILE).await.unwrap());
    assert!(
        capture.is_kept("uid-1"),
        "an agent that drains cuts it before its grace is over"
    );
    let is_open = || hand.pods().unwrap().is_empty() && hand.attached_pods().unwrap().is_empty();
    assert!(is_open(), "the kernel still captures it");
    let client = timeout(A_WHILE, TcpStream::connect((POD_V4, 8080))).await.unwrap().unwrap();
    let (_served, peer) = timeout(A_WHILE, application.accept()).await.unwrap().unwrap();
    assert_eq!((peer.port(), steered()), (client.local_addr().unwrap().port(), served));
    // Whoever still takes it for a member reaches the agent.
    drop(timeout(A_WHILE, TcpStream::connect((POD_V4, 15008))).await.unwrap().unwrap());
    // What was let go is not put back, and beginning again changes nothing.
    assert_eq!(capture.repair("uid-1").await.unwrap(), Repairs::default());
    assert!(capture.let_go("uid-1", Duration::ZERO).await.unwrap());
    assert!(!capture.is_kept("uid-1"), "a release without grace waits for it");
    assert!(is_open(), "a repair captured it again");

    // The agent ends before it has completed it.
    drop((client, application));
    tasks.shutdown().await;
    drop(capture);
    let capture = bed.start();
    assert!(capture.recover().await.is_empty(), "it is captured again");
    assert!(is_open());
    assert!(capture.complete_releases().await.is_empty());
    settle_to(&bed, &before).await;
    assert!(!capture.release("uid-1").await.unwrap(), "its record stays");
}

/// Rules and routes stay until no agent carries connections of the Pod: those of one that drains are cut first, and it is told to.
#[tokio::test(flavor = "multi_thread")]
async fn a_pod_is_undone_once_an_agent_that_drains_has_cut_it() {
    let Some(bed) = Bed::new("a_pod_is_undone_once_an_agent_that_drains_has_cut_it") else {
        return;
    };
    let before = bed.snapshot();
    let (run_dir, pin_path) = (bed.config().run_dir, bed.kernel_config().pin_path);
    // As the agent before, which drains beside this one.
    let carry = || {
        let file = std::fs::File::open(run_dir.join("pods/uid-1.carried")).unwrap();
        file.lock_shared().unwrap();
        file
    };
    let expect_waiting = async || {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let record = std::fs::read_to_string(run_dir.join("pods/uid-1.json")).unwrap();
        assert!(
            record.contains("\"is_leaving\": true"),
            "whoever drains is not told: {record}"
        );
        let rules = run(&format!("ip -n {} rule", bed.name));
        assert!(rules.contains("fwmark"), "nobody is waited for: {rules}");
    };

    // By the agent that runs.
    let capture = bed.start();
    for is_let_go in [false, true] {
        drop(capture.enroll(bed.pod("uid-1")).await.unwrap());
        let carried = carry();
        if is_let_go {
            assert!(capture.let_go("uid-1", Duration::ZERO).await.unwrap());
        }
        let releasing = tokio::spawn({
            let capture = Arc::clone(&capture);
            async move { capture.release("uid-1").await.unwrap() }
        });
        expect_waiting().await;
        assert!(!releasing.is_finished() && !capture.is_kept("uid-1"));
        drop(carried);
        assert!(timeout(A_WHILE, releasing).await.unwrap().unwrap());
        settle_to(&bed, &before).await;
    }

    // By the next one, after a release that had begun.
    drop(capture.enroll(bed.pod("uid-1")).await.unwrap());
    let carried = carry();
    assert!(capture.let_go("uid-1", Duration::ZERO).await.unwrap());
    drop(capture);
    let capture = bed.start();
    let recovering = tokio::spawn({
        let capture = Arc::clone(&capture);
        async move {
            assert!(capture.recover().await.is_empty(), "it is captured again");
            capture.complete_releases().await.len()
        }
    });
    expect_waiting().await;
    drop(carried);
    assert_eq!(timeout(A_WHILE, recovering).await.unwrap().unwrap(), 0);
    settle_to(&bed, &before).await;

    // Without any.
    drop(capture.enroll(bed.pod("uid-1")).await.unwrap());
    let carried = carry();
    drop(capture);
    let cleaning = tokio::spawn({
        let run_dir = run_dir.clone();
        async move { Capture::cleanup(&run_dir, &pin_path).await.unwrap().released }
    });
    expect_waiting().await;
    drop(carried);
    assert_eq!(timeout(A_WHILE, cleaning).await.unwrap().unwrap(), ["uid-1"]);
    settle_to(&bed, &before).await;
}
