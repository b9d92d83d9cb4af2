//! The kubelet's probes: passed to the application at the ports that the Pod has declared, and nobody else's. The outsider's
//! namespace is the node's, and the clients' cgroup the kubelet's.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use aya::maps::{HashMap, HashOfMaps, Map, MapData};
use mesh_agent::addr::address_bytes;
use mesh_agent::capture::kernel::{Kernel, PodProbePorts};
use mesh_common::limits::MAX_PROBE_VOUCHES_PER_POD;
use mesh_common::{PROBE_VOUCH_NS, UpstreamConnectionKey};

use super::steered;
use super::testbed::*;

const DECLARED: u16 = 8080;
const UNDECLARED: u16 = 8081;
const FORMS: [(&str, &str); 3] = [("4", POD_V4), ("6", POD_V6), ("6", "::ffff:10.99.0.2")];
const FAMILIES: [(&str, &str, &str); 2] = [("4", OUTSIDER_V4, POD_V4), ("6", OUTSIDER_V6, POD_V6)];

/// Out of the kubelet's cgroup into the one beside it. From outside: inside a namespace of `ip netns` no cgroups are mounted.
fn leave(testbed: &Testbed, client: &Client) {
    fs::write(testbed.elsewhere.join("cgroup.procs"), client.pid().to_string()).unwrap();
}

fn id(cgroup: &Path) -> u64 {
    fs::metadata(cgroup).unwrap().ino()
}

fn node_cookie(testbed: &Testbed) -> u64 {
    testbed.client(&testbed.outsider(), &["cookie"]).lines[0].parse().unwrap()
}

fn declare(kernel: &Kernel, ports: &[u16]) {
    let value = pod_value();
    let of_pod = PodProbePorts {
        slot: SLOT,
        addresses: &value.addresses[..2],
        ports,
    };
    kernel.set_probe_ports(&[of_pod]).unwrap();
}

/// A node whose kubelet is known, and a Pod with one probe port.
fn probed(testbed: &Testbed) -> (Kernel, TcpListener) {
    let (kernel, tunnel, plaintext) = steered(testbed);
    kernel.set_kubelet(node_cookie(testbed), Some(id(&testbed.cgroup))).unwrap();
    declare(&kernel, &[DECLARED]);
    // Not this test's: it only has to stay.
    std::mem::forget(tunnel);
    (kernel, plaintext)
}

/// Who has the connection that was just made, and from which port.
fn reached(application: &TcpListener, agent: &TcpListener) -> (&'static str, u16) {
    let mut found = None;
    wait_until("the connection arrives", || {
        for (name, listener) in [("application", application), ("agent", agent)] {
            listener.set_nonblocking(true).unwrap();
            match listener.accept() {
                Ok((_, peer)) => found = Some((name, peer.port())),
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
        }
        found.is_some()
    });
    found.unwrap()
}

/// Who connects.
#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    Kubelet,
    /// Root of the node's, with all capabilities, in another cgroup.
    Imitator,
}

/// A connect from the node, from a port of choice.
fn connects(testbed: &Testbed, by: By, family: &str, from: (&str, u16), to: (&str, u16)) -> Client {
    let ((own, own_port), (address, port)) = (from, to);
    let mut client = testbed.script_as_root(
        &testbed.outsider(),
        &format!(
            "s = stream('{family}'); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); s.bind(('{own}', {own_port}))
s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
say('ready'); told(); s.connect(('{address}', {port})); ends(s); told()"
        ),
    );
    assert_eq!(client.said(), "ready");
    if by == By::Imitator {
        leave(testbed, &client);
    }
    client.tell();
    client.lines = vec![client.hear()];
    client
}

type Vouches = HashMap<MapData, UpstreamConnectionKey, u64>;

fn vouches(testbed: &Testbed) -> Vouches {
    let map = MapData::from_pin(testbed.pins().join("PROBE_VOUCHES")).unwrap();
    let map: HashOfMaps<_, u32, Vouches> = Map::HashOfMaps(map).try_into().unwrap();
    map.get(&SLOT, 0).unwrap()
}

fn vouch(from: (&str, u16), to: &str) -> UpstreamConnectionKey {
    let bytes = |text: &str| address_bytes(text.parse::<IpAddr>().unwrap());
    UpstreamConnectionKey {
        slot: SLOT,
        client_port: from.1,
        application_port: DECLARED,
        client_address: bytes(from.0),
        application_address: bytes(to),
    }
}

hook_test! {
    fn the_kubelet_reaches_the_port_that_is_declared_and_no_other(testbed) {
        let (kernel, agent) = probed(&testbed);
        let (application, other) = (listen(&testbed.pod(), DECLARED), listen(&testbed.pod(), UNDECLARED));
        for (i, (family, address)) in (1..).zip(FORMS) {
            let mut probe = testbed.client(&testbed.outsider(), &["connect", family, &format!("{address}|{DECLARED}")]);
            assert!(probe.said().contains("from"), "{}", probe.said());
            assert_eq!(reached(&application, &agent).0, "application", "the kubelet's probe by {address}");
            assert_eq!(counter(&kernel, "passed_probe"), i);
            assert_eq!(vouches(&testbed).iter().count(), 0, "a vouch outlives its handshake");
            probe.tell();
            let elsewhere = testbed.client(&testbed.outsider(), &["connect", family, &format!("{address}|{UNDECLARED}")]);
            assert!(elsewhere.said().contains("from"), "{}", elsewhere.said());
            assert_eq!(reached(&other, &agent).0, "agent", "an undeclared port of {address}: past the agent");
        }
        // And not when it is declared no longer.
        declare(&kernel, &[]);
        let probe = testbed.client(&testbed.outsider(), &["connect", "4", &format!("{POD_V4}|{DECLARED}")]);
        assert!(probe.said().contains("from"), "{}", probe.said());
        assert_eq!(reached(&application, &agent).0, "agent", "a port that was declared once: past the agent");
        assert_eq!(counter(&kernel, "passed_probe"), 3);
    }
}

hook_test! {
    fn who_imitates_the_kubelet_is_steered_to_the_agent(testbed) {
        let (kernel, agent) = probed(&testbed);
        let application = listen(&testbed.pod(), DECLARED);
        for (port, (family, own, address)) in (21_000..).zip(FAMILIES) {
            let imitator = connects(&testbed, By::Imitator, family, (own, port), (address, DECLARED));
            assert!(imitator.said().contains("from"), "{}", imitator.said());
            assert_eq!(reached(&application, &agent), ("agent", port), "another cgroup to {address}: past the agent");
        }
        // While the kubelet is not known nobody is taken for it.
        kernel.set_kubelet(node_cookie(&testbed), None).unwrap();
        let unknown = connects(&testbed, By::Kubelet, "4", (OUTSIDER_V4, 21_101), (POD_V4, DECLARED));
        assert!(unknown.said().contains("from"), "{}", unknown.said());
        assert_eq!(reached(&application, &agent), ("agent", 21_101), "a kubelet that is not known: past the agent");
        assert_eq!(counter(&kernel, "passed_probe"), 0);
    }
}

hook_test! {
    fn the_kubelet_of_another_node_on_this_kernel_is_steered_to_the_agent(testbed) {
        let (kernel, agent) = probed(&testbed);
        let application = listen(&testbed.pod(), DECLARED);
        // In the kubelet's cgroup, and in another network namespace than the node's.
        kernel.set_kubelet(node_cookie(&testbed) + 1, Some(id(&testbed.cgroup))).unwrap();
        for (port, (family, own, address)) in (21_200..).zip(FAMILIES) {
            let foreign = connects(&testbed, By::Kubelet, family, (own, port), (address, DECLARED));
            assert!(foreign.said().contains("from"), "{}", foreign.said());
            assert_eq!(reached(&application, &agent), ("agent", port), "another namespace to {address}: past the agent");
        }
        assert_eq!(counter(&kernel, "passed_probe"), 0);
    }
}

hook_test! {
    fn a_socket_that_was_the_kubelets_is_anybodys_once_another_connects_it(testbed) {
        let (_kernel, agent) = probed(&testbed);
        let application = listen(&testbed.pod(), DECLARED);
        for (family, _, address) in FAMILIES {
            let mut inherited = testbed.script_as_root(&testbed.outsider(), &format!(
                "s = stream('{family}'); s.connect(('{address}', {DECLARED})); ends(s); told()
libc = ctypes.CDLL(None, use_errno=True)
assert libc.connect(s.fileno(), struct.pack('H14x', socket.AF_UNSPEC), 16) == 0
s.connect(('{address}', {DECLARED})); ends(s); told()"
            ));
            assert!(inherited.said().contains("from"), "{}", inherited.said());
            assert_eq!(reached(&application, &agent).0, "application", "its first connect");
            leave(&testbed, &inherited);
            inherited.tell();
            let said = inherited.hear();
            assert!(said.contains("from"), "{said}");
            assert_eq!(reached(&application, &agent).0, "agent", "a socket that was the kubelet's to {address}: past the agent");
        }
    }
}

/// Somebody else from that address and port, with what the application or the agent has of it.
fn imitate(
    testbed: &Testbed,
    application: &TcpListener,
    agent: &TcpListener,
    family: &str,
    from: (&str, u16),
    to: &str,
) -> &'static str {
    let imitator = connects(testbed, By::Imitator, family, from, (to, DECLARED));
    assert!(imitator.said().contains("from"), "{}", imitator.said());
    let (who, port) = reached(application, agent);
    assert_eq!(port, from.1);
    who
}

hook_test! {
    fn a_vouch_is_of_no_use_to_who_has_its_tuple_next(testbed) {
        let (_kernel, agent) = probed(&testbed);
        for (i, (family, own, address)) in (0..).zip(FAMILIES) {
            let port = 22_000 + 10 * i;
            // Refused: nobody listens.
            assert_eq!(connects(&testbed, By::Kubelet, family, (own, port), (address, DECLARED)).said(), "ECONNREFUSED");
            let application = listen(&testbed.pod(), DECLARED);
            let next = imitate(&testbed, &application, &agent, family, (own, port), address);
            assert_eq!(next, "agent", "the tuple of a refused probe of {address}: past the agent");
            // Closed by the kubelet.
            let probe = connects(&testbed, By::Kubelet, family, (own, port + 1), (address, DECLARED));
            assert_eq!(reached(&application, &agent), ("application", port + 1), "{}", probe.said());
            probe.end();
            let next = imitate(&testbed, &application, &agent, family, (own, port + 1), address);
            assert_eq!(next, "agent", "the tuple of a probe that is over: past the agent");
            assert_eq!(vouches(&testbed).iter().count(), 0);
        }
    }
}

hook_test! {
    fn a_vouch_whose_end_nobody_saw_counts_for_a_while_alone(testbed) {
        let (kernel, agent) = probed(&testbed);
        let application = listen(&testbed.pod(), DECLARED);
        for (port, (family, own, address)) in (22_100..).step_by(10).zip(FAMILIES) {
            let mut map = vouches(&testbed);
            // While it is young it counts, which shows that it is what counts.
            map.insert(vouch((own, port), address), now_ns(), 0).unwrap();
            assert_eq!(imitate(&testbed, &application, &agent, family, (own, port), address), "application");
            map.insert(vouch((own, port + 1), address), now_ns() - PROBE_VOUCH_NS, 0).unwrap();
            let next = imitate(&testbed, &application, &agent, family, (own, port + 1), address);
            assert_eq!(next, "agent", "an old vouch for {address}: past the agent");
        }
        assert_eq!(counter(&kernel, "probe_expired"), 2);
        // What is too old, and nobody uses, is swept by the beat, in time.
        let mut map = vouches(&testbed);
        map.insert(vouch((OUTSIDER_V4, 22_200), POD_V4), now_ns() - PROBE_VOUCH_NS, 0).unwrap();
        for _ in 0..120 {
            kernel.beat().unwrap();
        }
        assert_eq!(vouches(&testbed).iter().count(), 0);
    }
}

hook_test! {
    fn a_probe_that_finds_the_map_full_is_counted_and_steered(testbed) {
        let (kernel, agent) = probed(&testbed);
        let application = listen(&testbed.pod(), DECLARED);
        let mut map = vouches(&testbed);
        for port in 0..MAX_PROBE_VOUCHES_PER_POD {
            map.insert(vouch(("10.99.0.77", port as u16), POD_V4), now_ns(), 0).unwrap();
        }
        for (full, (family, own, address)) in (1..).zip(FAMILIES) {
            let probe = connects(&testbed, By::Kubelet, family, (own, 23_000), (address, DECLARED));
            assert!(probe.said().contains("from"), "{}", probe.said());
            assert_eq!(reached(&application, &agent), ("agent", 23_000));
            assert_eq!(counter(&kernel, "probes_full"), full);
        }
        assert_eq!(counter(&kernel, "passed_probe"), 0);
        map.remove(&vouch(("10.99.0.77", 0), POD_V4)).unwrap();
        let probe = connects(&testbed, By::Kubelet, "4", (OUTSIDER_V4, 23_001), (POD_V4, DECLARED));
        assert_eq!(reached(&application, &agent), ("application", 23_001), "{}", probe.said());
    }
}

hook_test! {
    fn a_probe_passes_with_syn_cookies_and_while_no_agent_lives(testbed) {
        let (kernel, _agent) = probed(&testbed);
        let application = listen(&testbed.pod(), DECLARED);
        // 2: always.
        within(&testbed.pod(), || fs::write("/proc/sys/net/ipv4/tcp_syncookies", "2").unwrap());
        testbed.fall_silent();
        heartbeat(&testbed).set(0, 0, 0).unwrap();
        for (family, _, address) in FAMILIES {
            let probe = testbed.client(&testbed.outsider(), &["connect", family, &format!("{address}|{DECLARED}")]);
            assert!(probe.said().contains("from"), "{}", probe.said());
            let (mut accepted, _) = application.accept().unwrap();
            let mut said = [0];
            accepted.read_exact(&mut said).unwrap();
            accepted.write_all(&said).unwrap();
            // Everybody else is dropped: the client sees a reset.
            let port = 24_000;
            let own = if family == "4" { OUTSIDER_V4 } else { OUTSIDER_V6 };
            let imitator = connects(&testbed, By::Imitator, family, (own, port), (address, DECLARED));
            assert_eq!(imitator.said(), "ECONNREFUSED");
        }
        // Each handshake was looked up twice.
        assert_eq!(counter(&kernel, "passed_probe"), 4);
        assert_eq!(vouches(&testbed).iter().count(), 0);
    }
}

hook_test! {
    fn what_is_not_the_pods_to_declare_is_not_taken(testbed) {
        let (kernel, _agent) = probed(&testbed);
        let map = MapData::from_pin(testbed.pins().join("PROBE_PORTS")).unwrap();
        let map: HashMap<MapData, mesh_common::ProbePortKey, u32> = Map::HashMap(map).try_into().unwrap();
        let ports = || {
            let mut ports: Vec<u16> = map.keys().map(|key| key.unwrap().port).collect();
            ports.sort_unstable();
            ports
        };
        assert_eq!(ports(), [DECLARED, DECLARED]);
        // The agent's own ports, and more than a Pod may have.
        declare(&kernel, &[mesh_common::TUNNEL_PORT, mesh_common::PROBE_PORT, 9000]);
        assert_eq!(ports(), [9000, 9000]);
        declare(&kernel, &(1..=100).collect::<Vec<u16>>());
        assert_eq!(ports().len(), 2 * mesh_common::limits::MAX_PROBE_PORTS_PER_POD);
        // Another Pod's are another's. Of two at once each gets its own, and what it has no longer goes.
        let other = [address_bytes("10.99.0.9".parse().unwrap())];
        let addresses = &pod_value().addresses[..2];
        let of_other = PodProbePorts { slot: SLOT + 1, addresses: &other, ports: &[7000] };
        kernel.set_probe_ports(&[PodProbePorts { slot: SLOT, addresses, ports: &[9001] }, of_other]).unwrap();
        assert_eq!(ports(), [7000, 9001, 9001]);
        // With a vouch on its way.
        vouches(&testbed).insert(vouch((OUTSIDER_V4, 24_001), POD_V4), now_ns(), 0).unwrap();
        kernel.forget_probes(SLOT).unwrap();
        assert_eq!(ports(), [7000]);
        let outer = MapData::from_pin(testbed.pins().join("PROBE_VOUCHES")).unwrap();
        let outer: HashOfMaps<_, u32, Vouches> = Map::HashOfMaps(outer).try_into().unwrap();
        assert!(outer.get(&SLOT, 0).is_err(), "the vouches of a Pod that was released stay");
        let to = SocketAddr::new(POD_V4.parse().unwrap(), DECLARED);
        assert!(within(&testbed.outsider(), || std::net::TcpStream::connect(to)).is_ok(), "steered to the agent");
    }
}
