//! What a Pod, or one with the capability that runtimes grant by default, may try in order not to be steered or to be taken for another.

use std::fmt::Write as _;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;

use mesh_common::{OUTBOUND_PORT, PLAINTEXT_INBOUND_PORT, PLAINTEXT_LISTENER};

use super::testbed::*;
use super::{FAMILIES, steered};

/// SO_MARK with the agent's firewall mark.
const MARKED: &str = "s.setsockopt(socket.SOL_SOCKET, 36, 0x4356)";

hook_test! {
    fn a_firewall_mark_proves_nothing(testbed) {
        let (kernel, _tunnel, _plaintext) = steered(&testbed);
        let outbound = listen_as_agent(&kernel, &testbed.pod(), OUTBOUND_PORT);
        for (family, address, _, own) in FAMILIES {
            let script = format!("s = stream('{family}'); {MARKED}; s.connect(('{address}', 80)); ends(s)");
            let client = testbed.script_with_net_raw(&script);
            assert_eq!(client.said(), format!("{address} 80 from {own}"));
            let (_stream, key) = accept(&outbound, testbed.cookie());
            assert_eq!(kernel.take_original_destination(&key).unwrap().unwrap().port, 80);
        }
    }
}

hook_test! {
    fn a_firewall_mark_does_not_lead_to_the_application(testbed) {
        let (kernel, _tunnel, plaintext) = steered(&testbed);
        return_path(&testbed);
        let application = listen(&testbed.pod(), 8080);
        application.set_nonblocking(true).unwrap();
        // From outside, and from within the Pod under another's address, as the agent's own upstream connects look.
        for (family, address, outsider) in [("4", POD_V4, OUTSIDER_V4), ("6", POD_V6, OUTSIDER_V6)] {
            let script = format!("s = stream('{family}'); {MARKED}; s.connect(('{address}', 8080)); ends(s)");
            let _client = testbed.script_with_net_raw_in(&testbed.outsider(), &script);
            let (_stream, client) = plaintext.accept().unwrap();
            assert_eq!(client.ip().to_canonical().to_string(), outsider);
            let (level, option) = if family == "4" { ("IP", 19) } else { ("IPV6", 75) };
            let mut script = format!("s = stream('{family}'); {MARKED}; ");
            write!(
                script,
                "s.setsockopt(socket.IPPROTO_{level}, {option}, 1); s.bind(('{outsider}', 20001)); s.connect(('{address}', 8080)); ends(s)"
            ).unwrap();
            let client = testbed.script_with_net_raw(&script);
            assert_eq!(client.said(), format!("{address} 8080 from {outsider}"));
            assert!(application.accept().is_err(), "the application was reached past its agent");
            let (_stream, client) = plaintext.accept().unwrap();
            assert_eq!((client.ip().to_canonical().to_string().as_str(), client.port()), (outsider, 20_001));
        }
        assert_eq!(application.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
        assert_eq!(counter(&kernel, "passed_upstream"), 0);
    }
}

hook_test! {
    fn a_reuseport_group_of_the_pod_gets_nothing_of_what_is_steered(testbed) {
        let kernel = testbed.loaded();
        let grouped = || listen_with(&testbed.pod(), PLAINTEXT_INBOUND_PORT, |socket| {
            nix::sys::socket::setsockopt(socket, nix::sys::socket::sockopt::ReusePort, &true).unwrap();
            mark_listener(&kernel, socket);
            socket.set_nonblocking(true).unwrap();
        });
        // Seven of eight are not in the map of listeners.
        let others: Vec<_> = (0..7).map(|_| grouped()).collect();
        let plaintext = grouped();
        kernel.add_pod(testbed.cookie(), &pod_value()).unwrap();
        testbed.live();
        kernel.set_listener(SLOT, PLAINTEXT_LISTENER, plaintext.as_fd()).unwrap();
        kernel.attach_lookup(SLOT, "pod.uid", netns_file(&testbed.pod()).as_fd()).unwrap();
        for address in [POD_V4, POD_V6] {
            let to = SocketAddr::new(address.parse().unwrap(), 8080);
            let streams: Vec<_> = within(&testbed.outsider(), || (0..16).map(|_| TcpStream::connect(to).unwrap()).collect());
            let handed_over = others.iter().filter(|other| other.accept().is_ok()).count();
            assert_eq!(handed_over, 0, "other sockets of the group were handed connections");
            for _ in &streams {
                wait_until("an accept", || plaintext.accept().is_ok());
            }
        }
        drop(others);
    }
}

hook_test! {
    fn another_pods_address_on_lo_does_not_make_it_that_pod(testbed) {
        let (kernel, _tunnel, plaintext) = steered(&testbed);
        const OTHER_V4: &str = "10.99.0.3";
        const OTHER_V6: &str = "fd99::3";
        // The other Pod's listener lies where a choice by destination address would find one that can be had.
        let others = listen(&testbed.pod(), 4000);
        others.set_nonblocking(true).unwrap();
        kernel.add_pod(4711, &value_of(SLOT + 1, [OTHER_V4, OTHER_V6])).unwrap();
        kernel.set_listener(SLOT + 1, PLAINTEXT_LISTENER, others.as_fd()).unwrap();
        let (pod, outsider) = (testbed.pod(), testbed.outsider());
        run(&format!(
            "ip -n {pod} addr add {OTHER_V4}/32 dev lo; ip -n {pod} addr add {OTHER_V6}/128 dev lo nodad
             ip -n {outsider} route add {OTHER_V4}/32 via {POD_V4}; ip -n {outsider} route add {OTHER_V6}/128 via {POD_V6}"
        ));
        for (family, address) in [("4", OTHER_V4), ("6", OTHER_V6)] {
            let client = testbed.client(&outsider, &["connect", family, &format!("{address}|8080")]);
            assert!(client.said().contains("from"), "{}", client.said());
            assert!(others.accept().is_err(), "the other Pod's listener was handed it");
            let (stream, _) = plaintext.accept().unwrap();
            assert_eq!(stream.local_addr().unwrap().ip().to_canonical().to_string(), address);
        }
        kernel.remove_pod(4711).unwrap();
    }
}
