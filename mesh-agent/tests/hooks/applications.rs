//! Connects as applications make them: Fast Open, again, elsewhere in the cgroups, before the enrolment, MPTCP.

use std::io::Read;
use std::{fs, str};

use mesh_agent::addr::ip_from_bytes;
use mesh_common::OUTBOUND_PORT;

use super::FAMILIES;
use super::testbed::*;

hook_test! {
    fn mptcp_is_refused_in_the_pod_only(testbed) {
        let kernel = testbed.enrolled();
        for (refused, family) in (1..).zip(["4", "6"]) {
            let outside = testbed.client(&testbed.outsider(), &["mptcp", family]).said().to_owned();
            assert_eq!(testbed.client(&testbed.pod(), &["mptcp", family]).said(), "EPROTONOSUPPORT");
            assert_ne!(outside, "EPERM");
            // Where the kernel has no MPTCP the socket fails by itself, after our program.
            assert_eq!(counter(&kernel, "refused_mptcp"), refused);
        }
        // Applications then ask for TCP.
        let _listener = listen_as_agent(&kernel, &testbed.pod(), OUTBOUND_PORT);
        for (family, address, _, own) in FAMILIES {
            let script = format!(
                "
try:
    s = socket.socket(family['{family}'], socket.SOCK_STREAM, 262)
except OSError:
    s = stream('{family}')
s.connect(('{address}', 80)); ends(s)"
            );
            assert_eq!(testbed.script(&script).said(), format!("{address} 80 from {own}"));
        }
    }
}

hook_test! {
    fn a_socket_that_is_disconnected_goes_where_it_is_sent_next(testbed) {
        let kernel = testbed.enrolled();
        let cookie = testbed.cookie();
        let listener = listen_as_agent(&kernel, &testbed.pod(), OUTBOUND_PORT);
        let server = listen(&testbed.pod(), 8080);
        for (family, address, meant, own) in FAMILIES {
            // connect() to AF_UNSPEC disconnects.
            let script = format!(
                "
libc = ctypes.CDLL(None)
s = stream('{family}')
def again():
    if libc.connect(s.fileno(), struct.pack('H26x', socket.AF_UNSPEC), 28) != 0: say('no disconnect')
s.connect(('{address}', 80)); ends(s); again()
s.connect(('{address}', 81)); ends(s); told(); again()
s.connect(('{own}', 8080)); ends(s)"
            );
            let mut client = testbed.script(&script);
            assert_eq!(client.said(), format!("{address} 80 from {own}"));
            assert_eq!(client.hear(), format!("{address} 81 from {own}"));
            let first = accept(&listener, cookie).1;
            let (_stream, second) = accept(&listener, cookie);
            // The first was reset: its entry is gone with it.
            assert_eq!(kernel.take_original_destination(&first).unwrap(), None);
            let taken = kernel.take_original_destination(&second).unwrap().unwrap();
            assert_eq!((ip_from_bytes(taken.address).to_string().as_str(), taken.port), (meant, 81));
            client.tell();
            assert_eq!(client.hear(), format!("{own} 8080 from {own}"));
            server.accept().unwrap();
        }
        assert_eq!(counter(&kernel, "redirected"), 6);
        assert_eq!(destinations(&testbed, cookie).iter().count(), 0);
    }
}

hook_test! {
    fn fast_open_is_redirected_with_its_data(testbed) {
        let kernel = testbed.enrolled();
        let cookie = testbed.cookie();
        // Data in the SYN is sent and taken without a cookie, by every listener: the most that an application can bring about.
        within(&testbed.pod(), || fs::write("/proc/sys/net/ipv4/tcp_fastopen", "1543").unwrap());
        let listener = listen_as_agent(&kernel, &testbed.pod(), OUTBOUND_PORT);
        // MSG_FASTOPEN, and TCP_FASTOPEN_CONNECT (30), whose SYN leaves at the first write. Bit 5: data in the SYN was taken.
        for connect in [
            "s.sendto(b'hello', 0x20000000, to)",
            "s.setsockopt(socket.IPPROTO_TCP, 30, 1); s.connect(to); s.sendall(b'hello')",
        ] {
            for (family, address, meant, own) in FAMILIES {
                let mut client = testbed.script(&format!(
                    "s = stream('{family}'); to = ('{address}', 80); {connect}; ends(s); told()
say(s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[5] & 32)"
                ));
                assert_eq!(client.said(), format!("{address} 80 from {own}"));
                let (mut stream, key) = accept(&listener, cookie);
                let taken = kernel.take_original_destination(&key).unwrap().unwrap();
                assert_eq!((ip_from_bytes(taken.address).to_string().as_str(), taken.port), (meant, 80));
                let mut data = [0; 5];
                stream.read_exact(&mut data).unwrap();
                assert_eq!(str::from_utf8(&data).unwrap(), "hello");
                client.tell();
                assert_eq!(client.hear(), "32", "no Fast Open");
            }
        }
    }
}

hook_test! {
    fn another_cgroup_and_an_older_socket_change_nothing(testbed) {
        let kernel = testbed.loaded();
        testbed.live();
        let server = listen(&testbed.outsider(), 8080);
        let elsewhere = testbed.cgroup.join("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        let outsiders = [OUTSIDER_V4, OUTSIDER_V6, "::ffff:10.99.0.1"];
        for ((family, address, meant, own), outsider) in super::FAMILIES.into_iter().zip(outsiders) {
            let mut client = testbed.script(&format!(
                "
old = stream('{family}'); old.connect(('{outsider}', 8080)); ends(old)
unused = stream('{family}')
told()
unused.connect(('{address}', 80)); ends(unused)
s = stream('{family}'); s.connect(('{address}', 81)); ends(s)
old.sendall(b'still here'); ends(old)"
            ));
            assert_eq!(client.said(), format!("{outsider} 8080 from {own}"));
            let (mut older, _) = server.accept().unwrap();
            kernel.add_pod(testbed.cookie(), &pod_value()).unwrap();
            let listener = listen_as_agent(&kernel, &testbed.pod(), OUTBOUND_PORT);
            fs::write(elsewhere.join("cgroup.procs"), client.pid().to_string()).unwrap();
            client.tell();
            assert_eq!(client.hear(), format!("{address} 80 from {own}"));
            assert_eq!(client.hear(), format!("{address} 81 from {own}"));
            assert_eq!(client.hear(), format!("{outsider} 8080 from {own}"));
            for port in [80, 81] {
                let (_stream, key) = accept(&listener, testbed.cookie());
                let taken = kernel.take_original_destination(&key).unwrap().unwrap();
                assert_eq!((ip_from_bytes(taken.address).to_string().as_str(), taken.port), (meant, port));
            }
            let mut data = [0; 10];
            older.read_exact(&mut data).unwrap();
            assert_eq!(&data, b"still here");
            kernel.remove_pod(testbed.cookie()).unwrap();
        }
    }
}
