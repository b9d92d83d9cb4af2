//! The agent's ports in an enrolled Pod are the agent's, and refusals on a kernel that cannot choose the error.

use mesh_agent::capture::kernel::Kernel;
use mesh_common::{OUTBOUND_PORT, PLAINTEXT_INBOUND_PORT, PROBE_PORT, TUNNEL_PORT};

use super::testbed::*;

const PORTS: [u16; 4] = [OUTBOUND_PORT, PLAINTEXT_INBOUND_PORT, TUNNEL_PORT, PROBE_PORT];
const ADDRESSES: [(&str, &str); 7] = [
    ("4", "0.0.0.0"),
    ("4", "127.0.0.1"),
    ("4", POD_V4),
    ("6", "::"),
    ("6", "::1"),
    ("6", "::ffff:127.0.0.1"),
    ("6", POD_V6),
];

fn bind(family: &str, address: &str, port: u16) -> String {
    format!("s = stream('{family}'); s.bind(('{address}', {port})); s.listen(); say('listens')")
}

hook_test! {
    fn an_application_cannot_have_a_port_of_the_agent(testbed) {
        let kernel = testbed.enrolled();
        let mut refused = 0;
        for port in PORTS {
            for (family, address) in ADDRESSES {
                assert_eq!(testbed.script(&bind(family, address, port)).said(), "EADDRINUSE", "{address} {port}");
                refused += 1;
                assert_eq!(counter(&kernel, "refused_bind"), refused);
            }
            let reused = testbed.script(&format!(
                "s = stream(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1); s.bind(('', {port})); say('bound')"
            ));
            assert_eq!(reused.said(), "EADDRINUSE");
            refused += 1;
            assert_eq!(testbed.script_as_root(&testbed.pod(), &bind("4", "0.0.0.0", port)).said(), "EADDRINUSE");
            refused += 1;
            // The agent's own sockets are marked.
            close(listen_as_agent(&kernel, &testbed.pod(), port));
        }
        // Other ports, UDP, and other network namespaces are left alone.
        assert_eq!(testbed.script(&bind("4", "0.0.0.0", 8080)).said(), "listens");
        assert_eq!(testbed.script(&bind("6", "::", 0)).said(), "listens");
        let udp = format!("s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('', {OUTBOUND_PORT})); say('bound')");
        assert_eq!(testbed.script(&udp).said(), "bound");
        let outside = testbed.client(&testbed.outsider(), &["script", &bind("6", "::", OUTBOUND_PORT)]);
        assert_eq!(outside.said(), "listens");
        assert_eq!(counter(&kernel, "refused_bind"), refused);
        kernel.remove_pod(testbed.cookie()).unwrap();
        assert_eq!(testbed.script(&bind("6", "::", OUTBOUND_PORT)).said(), "listens");
    }
}

hook_test! {
    fn the_ports_of_a_dead_agent_are_not_free(testbed) {
        let kernel = testbed.enrolled();
        let listener = listen_as_agent(&kernel, &testbed.pod(), OUTBOUND_PORT);
        close(listener);
        drop(kernel);
        assert_eq!(testbed.script(&bind("4", "0.0.0.0", OUTBOUND_PORT)).said(), "EADDRINUSE");
        assert_eq!(testbed.script(&bind("6", "::1", OUTBOUND_PORT)).said(), "EADDRINUSE");
        assert_eq!(testbed.connect("4", "203.0.113.9", 80).said(), "ECONNREFUSED");
    }
}

hook_test! {
    fn nobody_but_the_agent_gets_what_is_redirected(testbed) {
        let kernel = testbed.loaded();
        testbed.live();
        // Redirected is a connect to 127.0.0.1, ::1 or ::ffff:127.0.0.1: who listens there, by the family of its socket.
        let impostors = [("4", "127.0.0.1"), ("6", "::1"), ("6", "::ffff:127.0.0.1")];
        let mut refused = 0;
        for ((family, address, _, own), (own_family, loopback)) in super::FAMILIES.into_iter().zip(impostors) {
            // Bound before the enrolment, not listening: the agent's own bind does not fail by it.
            let mut impostor = testbed.script(&format!(
                "
def bound(device):
    s = stream('{own_family}'); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if device: s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device)
    s.bind(('{loopback}', {OUTBOUND_PORT})); return s
plain, on_lo = bound(None), bound(b'lo\\0')
say('bound'); told()
plain.listen(); say('listens'); told()
plain.close(); on_lo.listen(); say('listens')"
            ));
            assert_eq!(impostor.said(), "bound");
            kernel.add_pod(testbed.cookie(), &pod_value()).unwrap();
            let listener = listen_as_agent(&kernel, &testbed.pod(), OUTBOUND_PORT);
            assert_eq!(testbed.connect(family, address, 80).said(), format!("{address} 80 from {own}"));
            close(listener);
            for _ in 0..2 {
                impostor.tell();
                assert_eq!(impostor.hear(), "listens");
                assert_eq!(testbed.connect(family, address, 80).said(), "ECONNREFUSED");
                refused += 1;
                assert_eq!(counter(&kernel, "refused_no_listener"), refused);
            }
            drop(impostor);
            kernel.remove_pod(testbed.cookie()).unwrap();
        }
        kernel.add_pod(testbed.cookie(), &pod_value()).unwrap();
        // The same where nobody listens.
        for (refused, (family, address, _, _)) in (refused + 1..).zip(super::FAMILIES) {
            assert_eq!(testbed.connect(family, address, 80).said(), "ECONNREFUSED");
            assert_eq!(counter(&kernel, "refused_no_listener"), refused);
        }
    }
}

hook_test! {
    fn a_kernel_that_cannot_choose_the_error_refuses_all_the_same(testbed) {
        let kernel = Kernel::load_as_before_set_retval(&testbed.config()).unwrap();
        kernel.add_pod(testbed.cookie(), &pod_value()).unwrap();
        let _listener = listen_as_agent(&kernel, &testbed.pod(), OUTBOUND_PORT);
        for (family, address, _, _) in super::FAMILIES {
            assert_eq!(testbed.connect(family, address, 80).said(), "EPERM", "the agent is silent");
            assert_eq!(testbed.connect(family, address, TUNNEL_PORT).said(), "EPERM");
        }
        assert_eq!(testbed.client(&testbed.pod(), &["mptcp", "4"]).said(), "EPERM");
        assert_eq!(testbed.client(&testbed.pod(), &["mptcp", "6"]).said(), "EPERM");
        assert_eq!(testbed.script(&bind("4", "0.0.0.0", OUTBOUND_PORT)).said(), "EPERM");
        assert_eq!(testbed.script(&bind("6", "::", OUTBOUND_PORT)).said(), "EPERM");
        assert_eq!(counter(&kernel, "redirected"), 0);
        // What is not refused goes as ever.
        testbed.live();
        assert!(testbed.connect("4", "203.0.113.9", 80).said().contains("from"));
    }
}
