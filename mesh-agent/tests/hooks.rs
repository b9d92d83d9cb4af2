//! Each hook with real sockets in network namespaces: IPv4, IPv6 and v4-mapped. Needs root and the kernel programs.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test file")]

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::time::Duration;
use std::{fs, io, thread};

use mesh_agent::addr::ip_from_bytes;
use mesh_agent::capture::kernel::{CleanupReport, Kernel};
use mesh_common::{
    AgentSocketValue, HEARTBEAT_LEASE_NS, OUTBOUND_PORT, PLAINTEXT_INBOUND_PORT, PLAINTEXT_LISTENER, TUNNEL_LISTENER,
    TUNNEL_PORT, socket_kind,
};
use testbed::*;

#[path = "hooks/testbed.rs"]
mod testbed;

/// A test that says so loudly where it cannot run.
macro_rules! hook_test {
    (fn $name:ident($testbed:ident) $body:block) => {
        #[test]
        fn $name() {
            if let Some(why) = obstacle() {
                println!("SKIPPED: hooks::{}: {why}", stringify!($name));
                return;
            }
            let $testbed = Testbed::new();
            $body
        }
    };
}

#[path = "hooks/applications.rs"]
mod applications;
#[path = "hooks/attacks.rs"]
mod attacks;
#[path = "hooks/backlog.rs"]
mod backlog;
#[path = "hooks/backstop.rs"]
mod backstop;
#[path = "hooks/bounds.rs"]
mod bounds;
#[path = "hooks/disguises.rs"]
mod disguises;
#[path = "hooks/memory.rs"]
mod memory;
#[path = "hooks/ports.rs"]
mod ports;
#[path = "hooks/probes.rs"]
mod probes;
#[path = "hooks/upstreams.rs"]
mod upstreams;
#[path = "hooks/versions.rs"]
mod versions;

/// What an application's socket family and address look like, and the addresses that they stand for.
const FAMILIES: [(&str, &str, &str, &str); 3] = [
    ("4", "203.0.113.9", "203.0.113.9", POD_V4),
    ("6", "2001:db8:9::9", "2001:db8:9::9", POD_V6),
    ("6", "::ffff:203.0.113.9", "203.0.113.9", "::ffff:10.99.0.2"),
];

hook_test! {
    fn a_connect_is_redirected_and_the_application_sees_what_it_asked_for(testbed) {
        let kernel = testbed.enrolled();
        let cookie = testbed.cookie();
        let listener = listen_as_agent(&kernel, &testbed.pod(), OUTBOUND_PORT);
        for (family, address, meant, own) in FAMILIES {
            let client = testbed.connect(family, address, 8080);
            assert_eq!(client.said(), format!("{address} 8080 from {own}"));
            let (_stream, key) = accept(&listener, cookie);
            let taken = kernel.take_original_destination(&key).unwrap().unwrap();
            assert_eq!((ip_from_bytes(taken.address).to_string().as_str(), taken.port), (meant, 8080));
            assert_eq!(kernel.take_original_destination(&key).unwrap(), None, "taken twice");
        }
        assert_eq!(counter(&kernel, "redirected"), 3);
    }
}

hook_test! {
    fn a_connection_that_closed_before_it_was_accepted_keeps_its_destination(testbed) {
        let kernel = testbed.enrolled();
        let cookie = testbed.cookie();
        let listener = listen_as_agent(&kernel, &testbed.pod(), OUTBOUND_PORT);
        for (family, address, meant, _) in FAMILIES {
            testbed.connect(family, address, 80).end();
            let (_stream, key) = accept(&listener, cookie);
            let taken = kernel.take_original_destination(&key).unwrap().unwrap();
            assert_eq!((ip_from_bytes(taken.address).to_string().as_str(), taken.port), (meant, 80));
        }
    }
}

hook_test! {
    fn nothing_stays_of_a_connect_that_failed(testbed) {
        let kernel = testbed.enrolled();
        let _listener = listen_as_agent(&kernel, &testbed.pod(), OUTBOUND_PORT);
        let entries = || destinations(&testbed, testbed.cookie()).iter().count();
        // From an address that answers do not come back to: it stays in SYN_SENT until it is given up.
        // IP_TRANSPARENT, IPV6_TRANSPARENT: by either, an IPv6 socket takes a v4-mapped address.
        for (family, option, from, address) in [
            ("4", "IP, 19", "203.0.113.1", "203.0.113.9"),
            ("6", "IPV6, 75", "2001:db8:9::1", "2001:db8:9::9"),
            ("6", "IPV6, 75", "::ffff:203.0.113.1", "::ffff:203.0.113.9"),
        ] {
            let mut client = testbed.script_as_root(&testbed.pod(), &format!(
                "s = stream('{family}'); s.setsockopt(socket.IPPROTO_{option}, 1); s.bind(('{from}', 0)); s.setblocking(False)
say(errno.errorcode[s.connect_ex(('{address}', 80))]); told(); s.close(); say('closed')"
            ));
            assert_eq!((client.said(), entries()), ("EINPROGRESS", 1));
            client.tell();
            assert_eq!((client.hear().as_str(), entries()), ("closed", 0));
        }
    }
}

hook_test! {
    fn traffic_within_the_pod_is_left_alone(testbed) {
        let kernel = testbed.enrolled();
        let _server = listen(&testbed.pod(), 8080);
        for (family, address, own) in [
            ("4", "127.0.0.1", "127.0.0.1"),
            ("4", "127.0.0.9", "127.0.0.1"),
            ("6", "::1", "::1"),
            ("6", "::ffff:127.0.0.1", "::ffff:127.0.0.1"),
            ("4", POD_V4, POD_V4),
            ("6", POD_V6, POD_V6),
            ("6", "::ffff:10.99.0.2", "::ffff:10.99.0.2"),
        ] {
            assert_eq!(testbed.connect(family, address, 8080).said(), format!("{address} 8080 from {own}"));
        }
        for (family, address) in [("4", "0.0.0.0"), ("6", "::")] {
            assert!(testbed.connect(family, address, 8080).said().contains(" 8080 from "));
        }
        assert_eq!(counter(&kernel, "redirected"), 0);
    }
}

hook_test! {
    fn the_ports_of_the_agent_are_refused_everywhere(testbed) {
        let kernel = testbed.enrolled();
        let _listener = listen_as_agent(&kernel, &testbed.pod(), OUTBOUND_PORT);
        let mut refused = 0;
        for port in [OUTBOUND_PORT, PLAINTEXT_INBOUND_PORT, TUNNEL_PORT, mesh_common::PROBE_PORT] {
            for (family, address) in [
                ("4", "127.0.0.1"), ("6", "::1"), ("6", "::ffff:127.0.0.1"), ("4", POD_V4), ("6", POD_V6),
                ("4", OUTSIDER_V4), ("6", OUTSIDER_V6), ("6", "::ffff:10.99.0.1"),
            ] {
                assert_eq!(testbed.connect(family, address, port).said(), "ECONNREFUSED", "{address} {port}");
                refused += 1;
                assert_eq!(counter(&kernel, "refused_agent_port"), refused);
            }
        }
    }
}

hook_test! {
    fn link_local_is_left_alone_and_counted(testbed) {
        let kernel = testbed.enrolled();
        // No such neighbour on lo: the error is the network's own.
        let said = testbed.connect("6", "fe80::1%lo", 8080).said().to_owned();
        assert!(!said.contains("from"), "{said}");
        assert_eq!((counter(&kernel, "link_local_left_alone"), counter(&kernel, "redirected")), (1, 0));
    }
}

hook_test! {
    fn a_silent_agent_means_refusal(testbed) {
        let kernel = testbed.loaded();
        kernel.add_pod(testbed.cookie(), &pod_value()).unwrap();
        let _listener = listen_as_agent(&kernel, &testbed.pod(), OUTBOUND_PORT);
        let all_refused = || FAMILIES.iter().all(|(family, address, _, _)| testbed.connect(family, address, 80).said() == "ECONNREFUSED");
        assert!(all_refused(), "before the first beat");
        testbed.live();
        assert!(testbed.connect("4", "203.0.113.9", 80).said().contains("from"));
        testbed.fall_silent();
        thread::sleep(Duration::from_nanos(HEARTBEAT_LEASE_NS) + Duration::from_millis(100));
        assert!(all_refused(), "after the lease");
        assert_eq!(counter(&kernel, "refused_agent_silent"), 6);
    }
}

hook_test! {
    fn a_namespace_that_is_not_enrolled_is_untouched(testbed) {
        let kernel = testbed.enrolled();
        let _server = listen(&testbed.pod(), 8080);
        for (family, address, own) in
            [("4", POD_V4, OUTSIDER_V4), ("6", POD_V6, OUTSIDER_V6), ("6", "::ffff:10.99.0.2", "::ffff:10.99.0.1")]
        {
            let client = testbed.client(&testbed.outsider(), &["connect", family, &format!("{address}|8080")]);
            assert_eq!(client.said(), format!("{address} 8080 from {own}"));
        }
        assert!(kernel.counters().iter().all(|(_, count)| *count == 0), "{:?}", kernel.counters());
        kernel.remove_pod(testbed.cookie()).unwrap();
        kernel.remove_pod(testbed.cookie()).unwrap();
        let _server = listen(&testbed.outsider(), 8080);
        assert_eq!(testbed.connect("4", OUTSIDER_V4, 8080).said(), format!("{OUTSIDER_V4} 8080 from {POD_V4}"));
    }
}

hook_test! {
    fn the_agents_own_sockets_pass(testbed) {
        let kernel = testbed.enrolled();
        let server = listen(&testbed.outsider(), 8080);
        for address in [OUTSIDER_V4, OUTSIDER_V6, "::ffff:10.99.0.1"] {
            let destination: IpAddr = address.parse().unwrap();
            let socket = socket_in(&testbed.pod(), destination);
            kernel.mark_socket(socket.as_fd(), AgentSocketValue { kind: socket_kind::OUTBOUND, slot: SLOT }).unwrap();
            socket.connect(&SocketAddr::new(destination, 8080).into()).unwrap();
            server.accept().unwrap();
        }
        assert_eq!(counter(&kernel, "redirected"), 0);
    }
}

/// The Pod with its sk_lookup program and the agent's listeners.
fn steered(testbed: &Testbed) -> (Kernel, TcpListener, TcpListener) {
    let kernel = testbed.enrolled();
    let (tunnel, plaintext) = (
        listen_as_agent(&kernel, &testbed.pod(), TUNNEL_PORT),
        listen_as_agent(&kernel, &testbed.pod(), PLAINTEXT_INBOUND_PORT),
    );
    kernel.set_listener(SLOT, TUNNEL_LISTENER, tunnel.as_fd()).unwrap();
    kernel.set_listener(SLOT, PLAINTEXT_LISTENER, plaintext.as_fd()).unwrap();
    kernel
        .attach_lookup(SLOT, "pod.uid", netns_file(&testbed.pod()).as_fd())
        .unwrap();
    (kernel, tunnel, plaintext)
}

hook_test! {
    fn inbound_connections_go_to_the_agents_listeners_with_their_destination(testbed) {
        let (kernel, tunnel, plaintext) = steered(&testbed);
        // The application's listener is there and must not be reached.
        let application = listen(&testbed.pod(), 8080);
        application.set_nonblocking(true).unwrap();
        for address in [POD_V4, POD_V6] {
            let family = if address.contains(':') { "6" } else { "4" };
            for (port, listener) in [(8080, &plaintext), (4711, &plaintext), (TUNNEL_PORT, &tunnel)] {
                let client = testbed.client(&testbed.outsider(), &["connect", family, &format!("{address}|{port}")]);
                assert!(client.said().contains("from"), "{address} {port}: {}", client.said());
                let (stream, _) = listener.accept().unwrap();
                let local = stream.local_addr().unwrap();
                assert_eq!((local.ip().to_canonical().to_string().as_str(), local.port()), (address, port));
            }
        }
        assert_eq!(application.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert_eq!((counter(&kernel, "steered_plaintext"), counter(&kernel, "steered_tunnel")), (4, 2));
        // Within the Pod nothing is steered.
        assert!(testbed.connect("4", POD_V4, 8080).said().contains("from"));
        application.accept().unwrap();
    }
}

hook_test! {
    fn without_listeners_or_beats_inbound_connections_are_refused(testbed) {
        let (kernel, _tunnel, _plaintext) = steered(&testbed);
        let _application = listen(&testbed.pod(), 8080);
        let refused = |port: u16| {
            [("4", POD_V4), ("6", POD_V6)].iter().all(|(family, address)| {
                testbed.client(&testbed.outsider(), &["connect", family, &format!("{address}|{port}")]).said() == "ECONNREFUSED"
            })
        };
        kernel.clear_listeners(SLOT);
        kernel.clear_listeners(SLOT);
        assert!(refused(8080) && refused(TUNNEL_PORT));
        assert_eq!(counter(&kernel, "dropped_no_listener"), 4);
        testbed.fall_silent();
        thread::sleep(Duration::from_nanos(HEARTBEAT_LEASE_NS) + Duration::from_millis(100));
        assert!(refused(8080));
        assert_eq!(counter(&kernel, "dropped_agent_silent"), 2);
        // Detached, the Pod is as it was.
        assert_eq!(kernel.attached_pods().unwrap(), ["pod.uid"]);
        assert!(kernel.detach_lookup("pod.uid").unwrap());
        assert!(!kernel.detach_lookup("pod.uid").unwrap());
        let client = testbed.client(&testbed.outsider(), &["connect", "4", &format!("{POD_V4}|8080")]);
        assert!(client.said().contains("from"));
    }
}

hook_test! {
    fn pins_outlive_the_agent_and_a_new_one_takes_over(testbed) {
        let (first, tunnel, plaintext) = steered(&testbed);
        let cookie = testbed.cookie();
        let outbound = listen_as_agent(&first, &testbed.pod(), OUTBOUND_PORT);
        drop(first);
        // Nobody is there: still redirected, to the listener that lives.
        let between = testbed.connect("4", "203.0.113.9", 80);
        assert!(between.said().contains("from"));
        let second = testbed.loaded();
        let (_stream, key) = accept(&outbound, cookie);
        assert_eq!(second.take_original_destination(&key).unwrap().unwrap().port, 80);
        // What was recorded for live sockets is not lost, and only one program redirects.
        testbed.live();
        let redirected = counter(&second, "redirected");
        let after = testbed.connect("6", "2001:db8:9::9", 81);
        assert_eq!(after.said(), format!("2001:db8:9::9 81 from {POD_V6}"));
        assert_eq!(counter(&second, "redirected"), redirected + 1);
        assert_eq!(second.pods().unwrap(), [(cookie, pod_value())]);
        assert_eq!(second.attached_pods().unwrap(), ["pod.uid"]);
        second.attach_lookup(SLOT, "pod.uid", netns_file(&testbed.pod()).as_fd()).unwrap();
        let client = testbed.client(&testbed.outsider(), &["connect", "4", &format!("{POD_V4}|8080")]);
        assert!(client.said().contains("from"));
        plaintext.accept().unwrap();
        // The same uid in another namespace: the old one is let go.
        second.attach_lookup(SLOT, "pod.uid", netns_file(&testbed.outsider()).as_fd()).unwrap();
        let refused = testbed.client(&testbed.outsider(), &["connect", "4", &format!("{POD_V4}|8080")]);
        assert_eq!(refused.said(), "ECONNREFUSED");
        drop(tunnel);
    }
}

hook_test! {
    fn another_version_is_refused_and_cleanup_leaves_nothing(testbed) {
        let kernel = testbed.enrolled();
        kernel.attach_lookup(SLOT, "pod.uid", netns_file(&testbed.pod()).as_fd()).unwrap();
        backstop::attach(&testbed, &kernel);
        drop(kernel);
        fs::rename(testbed.pins(), testbed.pin_path.join("v999")).unwrap();
        let error = Kernel::load(&testbed.config()).unwrap_err().to_string();
        assert!(error.contains("v999") && error.contains("mesh-agent cleanup"), "{error}");
        let report = Kernel::cleanup(&testbed.pin_path).unwrap();
        assert_eq!((report.links_detached, report.maps_removed), (12, 13));
        assert!(!testbed.pin_path.exists());
        assert_eq!(Kernel::cleanup(&testbed.pin_path).unwrap(), CleanupReport::default());
        // The Pod is as it was: its connects go where they are sent.
        let _server = listen(&testbed.outsider(), 8080);
        assert_eq!(testbed.connect("4", OUTSIDER_V4, 8080).said(), format!("{OUTSIDER_V4} 8080 from {POD_V4}"));
    }
}
