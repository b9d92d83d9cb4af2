use super::*;

fn destination(text: &str) -> OriginalDst {
    OriginalDst::new(text.parse().unwrap())
}

#[test]
fn probe_destinations_are_known() {
    for probe in [
        "192.0.2.1:80",
        "[2001:db8::1]:443",
        "[::ffff:192.0.2.1]:1",
        "10.0.0.1:15009",
        "[fd00::1]:15009",
    ] {
        assert!(is_probe(destination(probe)), "{probe}");
    }
    for other in ["192.0.2.2:80", "10.0.0.1:80", "[fd00::1]:15008"] {
        assert!(!is_probe(destination(other)), "{other}");
    }
}

const OUTBOUND: &str = "192.0.2.1:20000";
const USER: u32 = 65_534;

fn said(nonce: &Nonce, user: u32) -> [u8; GREETING_LEN] {
    let mut said = greeting(nonce);
    said[NONCE_LEN..].copy_from_slice(&user.to_be_bytes());
    said
}

#[test]
fn a_nonce_counts_once_and_only_from_its_pod_for_its_destination() {
    let probes = Arc::new(Probes::default());
    let mut expectation = probes.expect("uid", OUTBOUND.parse().unwrap(), true);
    let said = said(&expectation.nonce, USER);
    assert!(probes.settle("other", destination(OUTBOUND), &said).is_none());
    assert!(probes.settle("uid", destination("192.0.2.1:20001"), &said).is_none());
    assert!(probes.settle("uid", destination(OUTBOUND), &[0; GREETING_LEN]).is_none());
    assert!(expectation.arrived.try_recv().is_err());
    assert_eq!(probes.settle("uid", destination(OUTBOUND), &said), Some(expectation.nonce));
    assert!(expectation.arrived.try_recv().is_ok());
    assert!(probes.settle("uid", destination(OUTBOUND), &said).is_none());
}

#[test]
fn a_privileged_process_in_the_pod_proves_nothing() {
    let probes = Arc::new(Probes::default());
    let expectation = probes.expect("uid", OUTBOUND.parse().unwrap(), true);
    let as_root = said(&expectation.nonce, 0);
    assert!(probes.settle("uid", destination(OUTBOUND), &as_root).is_none());
    let as_nobody = said(&expectation.nonce, USER);
    assert!(probes.settle("uid", destination(OUTBOUND), &as_nobody).is_some());
    // Inbound it is the agent itself that connects.
    let inbound = probes.expect("uid", "10.0.0.1:15009".parse().unwrap(), false);
    let as_root = said(&inbound.nonce, 0);
    assert!(probes.settle("uid", destination("10.0.0.1:15009"), &as_root).is_some());
}

#[test]
fn what_is_no_longer_waited_for_is_forgotten() {
    let probes = Arc::new(Probes::default());
    drop(probes.expect("uid", OUTBOUND.parse().unwrap(), true));
    assert!(probes.expected.lock().is_empty());
}

/// Both ends of a connection.
async fn pair() -> (TcpStream, TcpStream) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    (client, listener.accept().await.unwrap().0)
}

#[tokio::test]
async fn a_connection_that_no_probe_waits_for_is_dropped_at_once() {
    let probes = Arc::new(Probes::default());
    let _of_another = probes.expect("other", OUTBOUND.parse().unwrap(), true);
    let _elsewhere = probes.expect("uid", "192.0.2.1:20001".parse().unwrap(), true);
    let (_silent, served) = pair().await;
    // Ready at its first poll: nothing is waited for.
    let answered = futures_util::FutureExt::now_or_never(probes.answer("uid", destination(OUTBOUND), served));
    assert!(answered.is_some());
}

#[tokio::test]
async fn a_probe_is_heard_through_any_number_of_silent_connections() {
    let probes = Arc::new(Probes::default());
    let mut expectation = probes.expect("uid", OUTBOUND.parse().unwrap(), true);
    let mut silent = Vec::new();
    for _ in 0..4 * MAX_ANSWERS {
        let (client, served) = pair().await;
        let probes = probes.clone();
        silent.push((
            client,
            tokio::spawn(async move { probes.answer("uid", destination(OUTBOUND), served).await }),
        ));
        tokio::task::yield_now().await;
    }
    assert!(probes.answers.lock()["uid"].len() <= MAX_ANSWERS);
    let (mut probe, served) = pair().await;
    probe.write_all(&said(&expectation.nonce, USER)).await.unwrap();
    probes.answer("uid", destination(OUTBOUND), served).await;
    assert!(expectation.arrived.try_recv().is_ok());
    silent.into_iter().for_each(|(_, task)| task.abort());
}

#[test]
fn the_child_refuses_odd_arguments() {
    assert!(child([]).is_err());
    assert!(child(["nowhere".to_owned(), "00".to_owned()]).is_err());
    assert!(child(["127.0.0.1:1".to_owned(), "xy".to_owned()]).is_err());
}
