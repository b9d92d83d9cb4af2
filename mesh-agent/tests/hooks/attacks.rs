//! Ways out of the Pod past the agent, each tried by a process without privileges, or with exactly the CAP_NET_RAW that runtimes
//! grant, towards a server that would answer.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::time::Duration;
use std::{fs, thread};

use mesh_agent::addr::ip_from_bytes;
use mesh_agent::capture::kernel::Kernel;
use mesh_common::OUTBOUND_PORT;

use super::backstop;
use super::testbed::*;

/// The server outside, as applications may write it.
const OUTSIDE: [(&str, &str); 3] = [("4", OUTSIDER_V4), ("6", OUTSIDER_V6), ("6", "::ffff:10.99.0.1")];
const PORT: u16 = 8080;

/// The agent's listener in the Pod and the server outside.
struct Ends {
    kernel: Kernel,
    agent: TcpListener,
    server: TcpListener,
    cookie: u64,
}

impl Ends {
    fn new(testbed: &Testbed, kernel: Kernel) -> Ends {
        let agent = listen_as_agent(&kernel, &testbed.pod(), OUTBOUND_PORT);
        let server = listen(&testbed.outsider(), PORT);
        server.set_nonblocking(true).unwrap();
        Ends {
            kernel,
            agent,
            server,
            cookie: testbed.cookie(),
        }
    }

    /// What was connected went to the agent, with its destination, and not to the server.
    fn expect_captured(&self, how: &str, address: &str, said: &str) {
        if let Ok((_, from)) = self.server.accept() {
            panic!("{how} to {address}: past the agent, in clear, from {from}");
        }
        assert!(
            said.starts_with(&format!("{address} {PORT} from ")),
            "{how} to {address}: {said}"
        );
        let (_stream, key) = accept(&self.agent, self.cookie);
        let taken = self.kernel.take_original_destination(&key).unwrap().unwrap();
        let meant = SocketAddr::new(address.parse::<std::net::IpAddr>().unwrap().to_canonical(), PORT);
        assert_eq!(SocketAddr::new(ip_from_bytes(taken.address), taken.port), meant);
    }
}

/// What connects `s` to `to`, of the family `f`; `s` is there before.
const PLAIN: &str = "s.connect(to)";
const FAST_OPEN: &str = "s.sendto(b'x', 0x20000000, to)";
const MARKED: &str = "s.setsockopt(socket.SOL_SOCKET, 36, 0x4356); s.connect(to)";
/// The Python of Debian has no io_uring: its three system calls' memory by hand (io_uring_setup(2), IORING_OP_CONNECT = 16).
const IO_URING: &str = "
import mmap
libc = ctypes.CDLL(None, use_errno=True)
parameters = ctypes.create_string_buffer(120)
ring = libc.syscall(425, 1, parameters)
if ring < 0: raise OSError(ctypes.get_errno(), 'io_uring_setup')
entries, cq_entries = struct.unpack_from('2I', parameters)
sq, cq = struct.unpack_from('7I', parameters, 40), struct.unpack_from('6I', parameters, 80)
submissions = mmap.mmap(ring, sq[6] + 4 * entries, offset=0)
completions = mmap.mmap(ring, cq[5] + 16 * cq_entries, offset=0x8000000)
entry = mmap.mmap(ring, 64 * entries, offset=0x10000000)
packed = socket.inet_pton(family[f], to[0])
port = socket.htons(to[1])
name = struct.pack('HH4s8x', 2, port, packed) if f == '4' else struct.pack('HHI16sI', 10, port, 0, packed, 0)
memory = ctypes.create_string_buffer(name, len(name))
s.settimeout(None)
entry[0:64] = struct.pack('BBHiQQ40x', 16, 0, 0, s.fileno(), len(name), ctypes.addressof(memory))
submissions[sq[6]:sq[6] + 4] = struct.pack('I', 0)
submissions[sq[1]:sq[1] + 4] = struct.pack('I', 1)
if libc.syscall(426, ring, 1, 1, 1, None, 0) < 0: raise OSError(ctypes.get_errno(), 'io_uring_enter')
result = struct.unpack_from('i', completions, cq[5] + 8)[0]
if result < 0: raise OSError(-result, 'connect')";

/// Every way, over every form of address.
fn try_all(testbed: &Testbed, how: &str, make: &str, connect: &str, is_privileged: bool) {
    let ends = Ends::new(testbed, testbed.enrolled());
    for (family, address) in OUTSIDE {
        let script = format!("f = '{family}'; to = ('{address}', {PORT})\n{make}\n{connect}\nends(s)");
        let client = if is_privileged {
            testbed.script_with_net_raw(&script)
        } else {
            testbed.script(&script)
        };
        ends.expect_captured(how, address, client.said());
    }
}

hook_test! {
    fn a_plain_connect_in_every_form_of_address(testbed) {
        try_all(&testbed, "connect", "s = stream(f)", PLAIN, false);
    }
}

hook_test! {
    fn fast_open_does_not_get_past(testbed) {
        // Data in the SYN without a cookie, in both namespaces: the most that an application can bring about.
        for netns in [testbed.pod(), testbed.outsider()] {
            within(&netns, || fs::write("/proc/sys/net/ipv4/tcp_fastopen", "1543").unwrap());
        }
        try_all(&testbed, "Fast Open", "s = stream(f)", FAST_OPEN, false);
    }
}

hook_test! {
    fn io_uring_does_not_get_past(testbed) {
        try_all(&testbed, "io_uring", "s = stream(f)", IO_URING, false);
    }
}

hook_test! {
    fn a_firewall_mark_does_not_get_past(testbed) {
        try_all(&testbed, "SO_MARK", "s = stream(f)", MARKED, true);
    }
}

hook_test! {
    fn multipath_tcp_does_not_get_past(testbed) {
        let ends = Ends::new(&testbed, testbed.enrolled());
        for (family, address) in OUTSIDE {
            let script = format!(
                "s = socket.socket(family['{family}'], socket.SOCK_STREAM, 262); s.settimeout(10); s.connect(('{address}', {PORT})); ends(s)"
            );
            // The kernel has it, or its refusal would say nothing.
            let outside = testbed.client(&testbed.outsider(), &["script", &script.replace(address, "127.0.0.1").replace("family['6']", "family['4']")]);
            assert!(outside.said().contains("from"), "this kernel has no multipath TCP: {}", outside.said());
            ends.server.accept().unwrap();
            let client = testbed.script(&script);
            if let Ok((_, from)) = ends.server.accept() {
                panic!("multipath TCP to {address}: past the agent, in clear, from {from}");
            }
            assert_eq!(client.said(), "EPROTONOSUPPORT");
        }
    }
}

hook_test! {
    fn a_socket_older_than_the_enrolment_does_not_get_past(testbed) {
        let kernel = testbed.loaded();
        testbed.live();
        let started: Vec<_> = OUTSIDE
            .iter()
            .map(|(family, address)| {
                let client = testbed.script(&format!("s = stream('{family}'); say('made'); told(); s.connect(('{address}', {PORT})); ends(s)"));
                assert_eq!(client.said(), "made");
                (*address, client)
            })
            .collect();
        kernel.add_pod(testbed.cookie(), &pod_value()).unwrap();
        let ends = Ends::new(&testbed, kernel);
        for (address, mut client) in started {
            client.tell();
            ends.expect_captured("a socket older than the enrolment", address, &client.hear());
        }
    }
}

hook_test! {
    fn moving_to_another_cgroup_does_not_get_past(testbed) {
        let ends = Ends::new(&testbed, testbed.enrolled());
        for (family, address) in OUTSIDE {
            let mut client = testbed.script(&format!("say('started'); told(); s = stream('{family}'); s.connect(('{address}', {PORT})); ends(s)"));
            assert_eq!(client.said(), "started");
            // Beside the Pod's, not below it.
            fs::write(testbed.elsewhere.join("cgroup.procs"), client.pid().to_string()).unwrap();
            client.tell();
            ends.expect_captured("from another cgroup", address, &client.hear());
        }
    }
}

hook_test! {
    fn a_socket_that_was_let_go_once_is_taken_the_next_time(testbed) {
        let ends = Ends::new(&testbed, testbed.enrolled());
        let _own = listen(&testbed.pod(), PORT);
        for ((family, address), own) in OUTSIDE.into_iter().zip([POD_V4, POD_V6, "::ffff:10.99.0.2"]) {
            // First within the Pod, which is left alone; then disconnected, by connect() to AF_UNSPEC, and out.
            let mut client = testbed.script(&format!(
                "s = stream('{family}'); s.connect(('{own}', {PORT})); ends(s)
if ctypes.CDLL(None).connect(s.fileno(), struct.pack('H26x', socket.AF_UNSPEC), 28) != 0: say('no disconnect')
s.connect(('{address}', {PORT})); ends(s)"
            ));
            assert_eq!(client.said(), format!("{own} {PORT} from {own}"));
            ends.expect_captured("after AF_UNSPEC", address, &client.hear());
        }
    }
}

hook_test! {
    fn a_freely_bound_address_does_not_leave_the_pod(testbed) {
        let kernel = testbed.enrolled();
        let server = within(&testbed.outsider(), || UdpSocket::bind(("::", PORT)).unwrap());
        server.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        // IPV6_FREEBIND, which nobody needs a right for. (Linux sends nothing over IPv4 from such an address.)
        let send_from = |source: &str| {
            let client = testbed.script(&format!(
                "s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); s.setsockopt(41, 78, 1)
s.bind(('{source}', 0)); s.sendto(b'x', ('{OUTSIDER_V6}', {PORT})); say('sent')"
            ));
            assert_eq!(client.said(), "sent");
        };
        let arrived_from = || server.recv_from(&mut [0; 8]).unwrap().1.ip().to_string();
        send_from("fd99::77");
        assert_eq!(arrived_from(), "fd99::77", "the attack is none here");
        backstop::attach(&testbed, &kernel);
        send_from("fd99::77");
        send_from(POD_V6);
        assert_eq!(arrived_from(), POD_V6, "a datagram from an address that is not the Pod's");
    }
}

hook_test! {
    fn a_pods_application_gets_no_connection_by_trying_often(testbed) {
        // Whatever races there are between socket(), the hooks and connect(): many at once, and none gets out.
        let ends = Ends::new(&testbed, testbed.enrolled());
        let script = format!(
            "
import threading
def attempt():
    for _ in range(50):
        s = stream(); s.settimeout(0)
        s.connect_ex(('{OUTSIDER_V4}', {PORT})); s.close()
threads = [threading.Thread(target=attempt) for _ in range(8)]
for t in threads: t.start()
for t in threads: t.join()
say('done')"
        );
        let client = thread::scope(|scope| {
            // The agent takes what comes, or its backlog is full.
            ends.agent.set_nonblocking(true).unwrap();
            let running = scope.spawn(|| testbed.script(&script));
            while !running.is_finished() {
                let _ = ends.agent.accept();
            }
            running.join().unwrap()
        });
        assert_eq!(client.said(), "done");
        let got_out = ends.server.accept().map_err(|error| error.kind());
        assert!(matches!(got_out, Err(ErrorKind::WouldBlock)), "one got past the agent: {got_out:?}");
    }
}
