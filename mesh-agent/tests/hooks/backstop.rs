//! What leaves a Pod, by processes that pass no socket hook: an unprivileged one with CAP_NET_RAW, which runtimes grant by default.
//! Each attack is first made without the backstop, where it must arrive: else it would show nothing.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::time::Duration;

use mesh_agent::capture::kernel::Kernel;
use mesh_common::{ABI_VERSION, AgentSocketValue, limits, socket_kind};
use socket2::{Domain, Protocol, Socket, Type};

use super::testbed::*;

const UID: &str = "pod.uid";
const OUTSIDE_V4: &str = "198.51.100.9";
const OUTSIDE_V6: &str = "2001:db8:7::9";
/// Where the packet goes that ends a look for others.
const LAST_PORT: u16 = 9;

/// The Pod, enrolled; the addresses of the testbed are the mesh, and what lies behind the outsider is outside.
fn open(testbed: &Testbed) -> Kernel {
    let kernel = testbed.enrolled();
    let (pod, outsider) = (testbed.pod(), testbed.outsider());
    run(&format!(
        "ip -n {outsider} addr add {OUTSIDE_V4}/32 dev lo; ip -n {outsider} addr add {OUTSIDE_V6}/128 dev lo nodad
         ip -n {pod} route add default via {OUTSIDER_V4}; ip -n {pod} -6 route add default via {OUTSIDER_V6}"
    ));
    // Until then it does not ask for its neighbours.
    let is_tentative = || {
        let output = std::process::Command::new("ip").args(["-n", &pod, "addr"]).output().unwrap();
        String::from_utf8(output.stdout).unwrap().contains("tentative")
    };
    wait_until("its link-local address", || !is_tentative());
    kernel
        .set_mesh_destinations(&[("10.99.0.0/24".parse().unwrap(), true), ("fd99::/64".parse().unwrap(), true)])
        .unwrap();
    kernel
}

pub fn attach(testbed: &Testbed, kernel: &Kernel) {
    let cookie = testbed.cookie();
    let interface = interface(testbed);
    within(&testbed.outsider(), || {
        kernel.attach_backstop(cookie, UID, &[interface]).unwrap()
    });
}

/// The node's end of the Pod's veth.
fn interface(testbed: &Testbed) -> u32 {
    within(&testbed.outsider(), || nix::net::if_::if_nametoindex("eth0").unwrap())
}

fn attacker(testbed: &Testbed, text: &str) -> Client {
    let mac = within(&testbed.outsider(), || {
        let output = std::process::Command::new("ip")
            .args(["-br", "link", "show", "eth0"])
            .output()
            .unwrap();
        let line = String::from_utf8(output.stdout).unwrap();
        line.split_whitespace().nth(2).unwrap().replace(':', "")
    });
    let text = format!(
        "PEER_MAC = bytes.fromhex('{mac}'); POD_V4, POD_V6, PEER_V4, PEER_V6 = '{POD_V4}', '{POD_V6}', '{OUTSIDER_V4}', '{OUTSIDER_V6}'\n\
         OUT_V4, OUT_V6 = '{OUTSIDE_V4}', '{OUTSIDE_V6}'\n{}\n{text}\nsay('sent')",
        include_str!("backstop/packets.py")
    );
    testbed.script_with_net_raw(&text)
}

/// Every TCP segment that reaches the outsider, of both families.
struct Arrivals([Socket; 2]);

impl Arrivals {
    fn new(testbed: &Testbed) -> Self {
        let open = |domain| {
            within(&testbed.outsider(), || {
                let socket = Socket::new(domain, Type::RAW, Some(Protocol::TCP)).unwrap();
                socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
                socket
            })
        };
        Self([open(Domain::IPV4), open(Domain::IPV6)])
    }

    /// The ports that SYNs came for, until the last packet of an attack.
    fn syns(&self, is_v4: bool) -> Vec<u16> {
        let socket = &self.0[usize::from(!is_v4)];
        let mut ports = Vec::new();
        loop {
            let mut buffer = [0_u8; 256];
            let read = io::Read::read(&mut &*socket, &mut buffer).expect("the last packet does not arrive");
            // Only IPv4 shows its header.
            let tcp = if is_v4 {
                &buffer[usize::from(buffer[0] & 0xf) * 4..read]
            } else {
                &buffer[..read]
            };
            let (port, flags) = (u16::from_be_bytes([tcp[2], tcp[3]]), tcp[13]);
            if port == LAST_PORT {
                return ports;
            }
            if flags & 2 != 0 {
                ports.push(port);
            }
        }
    }
}

fn drops(kernel: &Kernel) -> [u64; 3] {
    ["dropped_foreign_source", "dropped_foreign_syn", "dropped_hidden_header"].map(|name| counter(kernel, name))
}

/// Makes each attack without and with the backstop: what it does, and how many packets of it each counter counts.
fn attacks(testbed: &Testbed, attacks: &[(&str, &str, [u64; 3])]) {
    let kernel = open(testbed);
    let arrivals = Arrivals::new(testbed);
    for (is_attached, round) in [(false, 0), (true, 1)] {
        if is_attached {
            attach(testbed, &kernel);
        }
        for (number, (family, attack, expected)) in (0_u16..).zip(attacks) {
            let (is_v4, port) = (*family == "V4", 1000 + number * 2 + round);
            let before = drops(&kernel);
            let last = format!("send_packet({family}, [plain({family}, {LAST_PORT}, ACK)])");
            let client = attacker(testbed, &format!("port = {port}\n{attack}\n{last}"));
            assert_eq!(client.said(), "sent", "{attack}");
            let arrived = arrivals.syns(is_v4).contains(&port);
            assert_eq!(arrived, !is_attached, "{attack}: attached: {is_attached}");
            let counted: Vec<u64> = drops(&kernel).iter().zip(before).map(|(now, before)| now - before).collect();
            let expected = if is_attached { *expected } else { [0; 3] };
            assert_eq!(counted, expected, "{attack}");
        }
    }
}

const SOURCE: [u64; 3] = [1, 0, 0];
const A_SYN: [u64; 3] = [0, 1, 0];
const HIDDEN: [u64; 3] = [0, 0, 1];

hook_test! {
    fn a_syn_from_a_raw_or_a_packet_socket_is_dropped(testbed) {
        let mut all = Vec::new();
        for family in ["V4", "V6"] {
            for send in ["send_raw", "send_packet", "send_frame", "send_ring"] {
                all.push((family, format!("{send}({family}, [plain({family}, port)])"), A_SYN));
            }
            // ECN, push, and what else a listener ignores beside the SYN.
            all.push((family, format!("send_packet({family}, [plain({family}, port, 0xc0 | 8 | 32 | SYN)])"), A_SYN));
            // One tag that names no VLAN is taken off before the program, and a second one after it.
            all.push((family, format!("send_frame({family}, [plain({family}, port)], b'\\x81\\0\\0\\0')"), A_SYN));
            all.push((family, format!("send_frame({family}, [plain({family}, port)], b'\\x81\\0\\0\\0\\x81\\0\\0\\0')"), HIDDEN));
            all.push((family, format!("send_frame({family}, [plain({family}, port)], b'\\x88\\xa8\\0\\0\\x81\\0\\0\\0')"), HIDDEN));
        }
        all.push(("V6", "send_packet(V6, [plain(V6, port, source='fe80::77')])".to_owned(), A_SYN));
        let all: Vec<_> = all.iter().map(|(family, attack, expected)| (*family, attack.as_str(), *expected)).collect();
        attacks(&testbed, &all);
    }
}

hook_test! {
    fn a_foreign_source_is_dropped(testbed) {
        // What is not a SYN is dropped as well; without the backstop the SYN shows that such packets arrive.
        attacks(&testbed, &[
            // To the outside, where no SYN is asked about.
            ("V4", "send_packet(V4, [plain(V4, port, source='10.99.0.77', to=OUT_V4)])", SOURCE),
            ("V6", "send_packet(V6, [plain(V6, port, source='fd99::77', to=OUT_V6)])", SOURCE),
            ("V4", "send_raw(V4, [plain(V4, port, source='10.99.0.77')])", SOURCE),
            ("V4", "send_packet(V4, [plain(V4, port, source='203.0.113.7')])", SOURCE),
            ("V6", "send_raw(V6, [plain(V6, port, source='fd99::77')])", SOURCE),
            ("V6", "send_packet(V6, [plain(V6, port, source='2001:db8::7')])", SOURCE),
            ("V4", "send_packet(V4, [plain(V4, port, f, source='10.99.0.77') for f in (SYN, ACK, 4, SYN | ACK)])", [4, 0, 0]),
        ]);
    }
}

hook_test! {
    fn a_header_that_is_hidden_or_far_behind_does_not_pass(testbed) {
        attacks(&testbed, &[
            // RFC 1858: the flags are in the second fragment.
            ("V4", "send_packet(V4, v4_fragments(port, 8))", [0, 0, 2]),
            ("V4", "send_packet(V4, reversed(v4_fragments(port, 8)))", [0, 0, 2]),
            ("V4", "send_packet(V4, v4_fragments(port, 16))", [0, 0, 2]),
            // The whole header is in the first one.
            ("V4", "send_packet(V4, v4_fragments(port, 24, payload=b'x' * 16))", A_SYN),
            ("V6", "send_packet(V6, v6_fragments(port, 24, payload=b'x' * 16))", A_SYN),
            ("V6", "send_packet(V6, v6_fragments(port, 32, extension=b'\\6' + PADDED, payload=b'x' * 16))", [0, 1, 1]),
            ("V4", "send_packet(V4, [v4(POD_V4, PEER_V4, tcp(POD_V4, PEER_V4, port), options=b'\\1' * 40)])", A_SYN),
            ("V6", "send_packet(V6, [chained(port, (0, PADDED))])", A_SYN),
            ("V6", "send_packet(V6, [chained(port, (60, PADDED))])", A_SYN),
            ("V6", "send_packet(V6, [chained(port, (0, PADDED), (60, PADDED), (44, bytes(7)), (60, PADDED))])", A_SYN),
            ("V6", "send_packet(V6, [chained(port, *[(60, PADDED)] * 8)])", A_SYN),
            ("V6", "send_packet(V6, [chained(port, *[(60, PADDED)] * 9)])", HIDDEN),
        ]);
    }
}

hook_test! {
    fn what_another_kernel_may_take_for_a_syn_does_not_pass(testbed) {
        let kernel = open(&testbed);
        attach(&testbed, &kernel);
        for (attack, expected) in [
            // Flags in a later fragment, which this kernel does not put together.
            ("send_packet(V6, v6_fragments(port, 8))", [0, 0, 2]),
            ("send_packet(V6, v6_fragments(port, 16))", [0, 0, 2]),
            ("send_packet(V6, v6_fragments(port, 8, extension=b'\\6' + PADDED))", [0, 0, 2]),
            // Truncated, also by what the header says.
            ("send_packet(V4, [plain(V4, port)[:n] for n in (19, 20, 28, 33, 39)])", [0, 0, 5]),
            ("send_packet(V6, [plain(V6, port)[:n] for n in (39, 40, 53, 59)])", [0, 0, 4]),
            ("send_packet(V6, [chained(port, (0, PADDED))[:n] for n in (41, 47, 48, 67)])", [0, 0, 4]),
            ("send_packet(V4, [v4(POD_V4, PEER_V4, tcp(POD_V4, PEER_V4, port), version=5)])", HIDDEN),
            // An IPv4 address in an IPv6 header is nobody's.
            ("send_packet(V6, [plain(V6, port, source='::ffff:' + POD_V4)])", SOURCE),
            ("send_packet(V4, [plain(V4, port, source='0.0.0.0'), plain(V4, port, source='127.0.0.1')])", [2, 0, 0]),
            // On its way to the mesh by way of another's address.
            ("send_packet(V6, [chained(port, (43, b'\\2\\4\\1' + bytes(4) + packed(PEER_V6)), to=OUT_V6)])", A_SYN),
            ("send_packet(V4, [v4(POD_V4, OUT_V4, tcp(POD_V4, OUT_V4, port), options=b'\\x83\\7\\4' + packed(PEER_V4) + b'\\0')])", A_SYN),
        ] {
            let before = drops(&kernel);
            assert_eq!(attacker(&testbed, &format!("port = 7\n{attack}")).said(), "sent", "{attack}");
            let counted: Vec<u64> = drops(&kernel).iter().zip(before).map(|(now, before)| now - before).collect();
            assert_eq!(counted, expected, "{attack}");
        }
    }
}

hook_test! {
    fn the_agents_own_connects_pass_and_no_others(testbed) {
        let kernel = open(&testbed);
        attach(&testbed, &kernel);
        let server = listen(&testbed.outsider(), 8080);
        let marked = |destination: &str, kind, slot| {
            let destination = SocketAddr::new(destination.parse().unwrap(), 8080);
            let socket = socket_in(&testbed.pod(), destination.ip());
            kernel.mark_socket(socket.as_fd(), AgentSocketValue { kind, slot }).unwrap();
            (socket, destination)
        };
        for address in [OUTSIDER_V4, OUTSIDER_V6, "::ffff:10.99.0.1"] {
            let (socket, destination) = marked(address, socket_kind::OUTBOUND, SLOT);
            socket.connect(&destination.into()).unwrap();
            server.accept().unwrap();
        }
        assert_eq!(drops(&kernel), [0; 3]);
        // Another Pod's, and those that have no business outside.
        for address in [OUTSIDER_V4, OUTSIDER_V6, "::ffff:10.99.0.1"] {
            for (kind, slot) in [
                (socket_kind::OUTBOUND, SLOT + 1),
                (socket_kind::INBOUND_UPSTREAM, SLOT),
                (socket_kind::LISTENER, SLOT),
            ] {
                let before = drops(&kernel)[1];
                let (socket, destination) = marked(address, kind, slot);
                socket.set_nonblocking(true).unwrap();
                let _ = socket.connect(&destination.into());
                wait_until("its SYN", || drops(&kernel)[1] > before);
            }
        }
        server.set_nonblocking(true).unwrap();
        assert_eq!(server.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}

/// What a socket of the agent's asks for, which port of it, and to whose port 8080 the root of the Pod sends it instead.
type Rewritten = (&'static str, u16, &'static str);

fn rewritten_by_root(testbed: &Testbed, attacks: &[Rewritten]) {
    let kernel = open(testbed);
    let server = listen(&testbed.outsider(), 8080);
    let connect = |(address, port, to): Rewritten| {
        let text = format!(
            "{}\nrewrite('{to}', 8080)\nsay('rewritten')",
            include_str!("backstop/rewrite.py")
        );
        assert_eq!(testbed.script_as_root(&testbed.pod(), &text).said(), "rewritten");
        let asked = SocketAddr::new(address.parse().unwrap(), port);
        let socket = socket_in(&testbed.pod(), asked.ip());
        let mark = AgentSocketValue {
            kind: socket_kind::OUTBOUND,
            slot: SLOT,
        };
        kernel.mark_socket(socket.as_fd(), mark).unwrap();
        socket.set_nonblocking(true).unwrap();
        let _ = socket.connect(&asked.into());
        socket
    };
    for attack in attacks {
        let _socket = connect(*attack);
        server.accept().unwrap();
    }
    attach(testbed, &kernel);
    server.set_nonblocking(true).unwrap();
    let mut reached = Vec::new();
    for attack in attacks {
        let before = drops(&kernel)[1];
        let _socket = connect(*attack);
        wait_until("its SYN, there or dropped", || {
            let is_there = server.accept().is_ok();
            if is_there {
                reached.push(attack);
            }
            is_there || drops(&kernel)[1] > before
        });
    }
    assert!(reached.is_empty(), "reached the mesh in clear: {reached:?}");
}

hook_test! {
    fn a_pass_through_that_root_rewrites_does_not_reach_the_mesh(testbed) {
        rewritten_by_root(&testbed, &[(OUTSIDE_V4, 8080, OUTSIDER_V4), (OUTSIDE_V6, 8080, OUTSIDER_V6)]);
    }
}

hook_test! {
    fn a_tunnel_that_root_rewrites_does_not_reach_an_application(testbed) {
        rewritten_by_root(&testbed, &[(OUTSIDER_V4, 15008, OUTSIDER_V4), (OUTSIDER_V6, 15008, OUTSIDER_V6)]);
    }
}

hook_test! {
    fn a_raw_syn_to_the_outside_passes_once_it_is_known_to_be_outside(testbed) {
        let kernel = open(&testbed);
        let told: Vec<_> = [("10.99.0.0/24", true), ("fd99::/64", true)].map(|(prefix, is_in)| (prefix.parse().unwrap(), is_in)).into();
        attach(&testbed, &kernel);
        let arrivals = Arrivals::new(&testbed);
        let arrive = |to: &str, family: &str, port: u16| {
            let client = attacker(&testbed, &format!(
                "send_raw({family}, [])\nsend_packet({family}, [plain({family}, {port}, to={to}), plain({family}, {LAST_PORT}, ACK)])"
            ));
            assert_eq!(client.said(), "sent");
            arrivals.syns(family == "V4").contains(&port)
        };
        let outside = |port| [arrive("OUT_V4", "V4", port), arrive("OUT_V6", "V6", port)];
        assert_eq!(outside(1), [true; 2]);
        assert_eq!(drops(&kernel), [0; 3]);
        // Nothing is told, as when an agent starts without its discovery.
        let everything = || vec![("::/0".parse().unwrap(), true)];
        assert!(!kernel.set_mesh_destinations(&everything()).unwrap());
        assert_eq!(outside(2), [false; 2]);
        // One that is taken out of a wider one.
        let mut excluded = told.clone();
        excluded.push((format!("{OUTSIDER_V4}/32").parse().unwrap(), false));
        assert!(!kernel.set_mesh_destinations(&excluded).unwrap());
        assert_eq!((outside(3), arrive("PEER_V4", "V4", 4), arrive("PEER_V6", "V6", 4)), ([true; 2], true, false));
        // Another agent knows what this one has told.
        drop(kernel);
        let kernel = testbed.loaded();
        assert_eq!((outside(5), arrive("PEER_V4", "V4", 6), arrive("PEER_V6", "V6", 6)), ([true; 2], true, false));
        assert!(!kernel.set_mesh_destinations(&told).unwrap());
        assert_eq!((arrive("PEER_V4", "V4", 7), arrive("PEER_V6", "V6", 7)), (false, false));
        // As much as there is room for, and more; and all of it exchanged for others.
        let many = |net: u32, count: u32| -> Vec<_> {
            (0..count).map(|n| (ipnet::IpNet::from(std::net::IpAddr::from(std::net::Ipv4Addr::from(net + n))), true)).collect()
        };
        let most = limits::MAX_MESH_DESTINATIONS - 1;
        for net in [0x0b00_0000, 0x0c00_0000] {
            assert!(!kernel.set_mesh_destinations(&many(net, most)).unwrap());
            assert_eq!(outside(8), [true; 2]);
        }
        assert!(kernel.set_mesh_destinations(&many(0x0b00_0000, most + 1)).unwrap());
        assert_eq!(outside(10), [false; 2]);
        assert!(!kernel.set_mesh_destinations(&told).unwrap());
        assert_eq!(outside(11), [true; 2]);
        // An agent that finds no map takes everything for the mesh.
        drop(kernel);
        run(&format!("rm {}", testbed.pins_of_abi(ABI_VERSION).join("MESH_DESTINATIONS").display()));
        let kernel = testbed.loaded();
        attach(&testbed, &kernel);
        assert_eq!(outside(12), [false; 2]);
        // A Pod that is not enrolled is let alone.
        kernel.remove_pod(testbed.cookie()).unwrap();
        assert_eq!((outside(13), arrive("PEER_V4", "V4", 14)), ([true; 2], true));
    }
}

hook_test! {
    fn an_address_that_is_bound_freely_is_nobodys(testbed) {
        let kernel = open(&testbed);
        let outsider = within(&testbed.outsider(), || UdpSocket::bind("[::]:5353").unwrap());
        outsider.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let receive = || {
            let mut buffer = [0; 64];
            let (read, from) = outsider.recv_from(&mut buffer).unwrap();
            (String::from_utf8_lossy(&buffer[..read]).into_owned(), from.ip().to_canonical().to_string())
        };
        // Needs no rights at all; with IPv4 those of the Pod's root.
        let send = |family: &str, from: &str, to: &str, what: &str| {
            let option = if family == "4" { "IP, 19" } else { "IPV6, 78" };
            let script = format!(
                "s = socket.socket(family['{family}'], socket.SOCK_DGRAM); s.setsockopt(socket.IPPROTO_{option}, 1)
s.bind(('{from}', 0)); s.sendto(b'{what}', ('{to}', 5353)); say('sent')"
            );
            let client = if family == "4" { testbed.script_as_root(&testbed.pod(), &script) } else { testbed.script(&script) };
            assert_eq!(client.said(), "sent");
        };
        let foreign = [("4", "10.99.0.77", OUTSIDER_V4), ("6", "fd99::77", OUTSIDER_V6)];
        for (family, from, to) in foreign {
            send(family, from, to, "before");
            assert_eq!(receive(), ("before".to_owned(), from.to_owned()));
        }
        attach(&testbed, &kernel);
        for (family, from, to) in foreign {
            send(family, from, to, "after");
        }
        assert_eq!(drops(&kernel), [2, 0, 0]);
        for (family, from, to) in [("4", POD_V4, OUTSIDER_V4), ("6", POD_V6, OUTSIDER_V6)] {
            send(family, from, to, "own");
            assert_eq!(receive(), ("own".to_owned(), from.to_owned()));
        }
        assert_eq!(drops(&kernel), [2, 0, 0]);
    }
}

hook_test! {
    fn what_a_network_needs_passes(testbed) {
        let kernel = open(&testbed);
        attach(&testbed, &kernel);
        let (pod, outsider) = (testbed.pod(), testbed.outsider());
        // Duplicate address detection and multicast reports, whose source is `::` or link-local; ARP and neighbour discovery.
        let pod_solicits = format!("ip -n {pod} addr add fd99::55/64 dev eth0; ip -n {outsider} addr add {POD_V6}/64 dev eth0");
        run(&format!("{pod_solicits}; ip -n {pod} neigh flush all; ip -n {outsider} neigh flush all"));
        // The Pod must have answered for its address: the outsider may not have it.
        let addresses = || {
            let output = std::process::Command::new("ip").args(["-n", &outsider, "addr", "show", "dev", "eth0"]).output().unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        wait_until("a duplicate", || addresses().contains("dadfailed"));
        run(&format!("ip -n {outsider} addr del {POD_V6}/64 dev eth0"));
        // The other way round, what says `::` to all must arrive at the one who has the address.
        run(&format!("ip -n {pod} addr add {OUTSIDER_V6}/64 dev eth0"));
        let of_pod = || {
            let output = std::process::Command::new("ip").args(["-n", &pod, "addr", "show", "dev", "eth0"]).output().unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        wait_until("a duplicate of the Pod's", || of_pod().contains("dadfailed"));
        // A second address of the Pod's, once it is usable, may be chosen as source: that is another test's.
        run(&format!("ip -n {pod} addr del {OUTSIDER_V6}/64 dev eth0; ip -n {pod} addr del fd99::55/64 dev eth0"));
        // UDP to a closed port, and the ICMP error for it, in both directions.
        for (from, to) in [(&pod, OUTSIDER_V4), (&pod, OUTSIDER_V6), (&outsider, POD_V4), (&outsider, POD_V6)] {
            let error = within(from, || {
                let any = if to.contains(':') { "[::]:0" } else { "0.0.0.0:0" };
                let socket = UdpSocket::bind(any).unwrap();
                socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
                socket.connect(SocketAddr::new(to.parse().unwrap(), 4444)).unwrap();
                socket.send(b"x").unwrap();
                socket.recv(&mut [0; 8]).unwrap_err()
            });
            assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{to}");
        }
        // A connection from outside, and its answers.
        let server = listen(&pod, 8080);
        for address in [POD_V4, POD_V6] {
            let family = if address.contains(':') { "6" } else { "4" };
            let client = testbed.client(&outsider, &["connect", family, &format!("{address}|8080")]);
            assert!(client.said().contains("from"), "{}", client.said());
            server.accept().unwrap();
        }
        assert_eq!(drops(&kernel), [0; 3]);
    }
}

hook_test! {
    fn it_is_replaced_in_place_and_leaves_nothing(testbed) {
        let kernel = open(&testbed);
        attach(&testbed, &kernel);
        let interface = interface(&testbed);
        let pin = testbed.pins().join("backstops").join("pod%2euid").join(interface.to_string());
        let inode = |path: &std::path::Path| std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(path).unwrap());
        let first = inode(&pin);
        drop(kernel);
        let spoof = || assert_eq!(attacker(&testbed, "send_packet(V4, [plain(V4, 7, ACK, source='10.99.0.77')])").said(), "sent");
        // Nobody is there: it goes on.
        spoof();
        let kernel = testbed.loaded();
        assert_eq!(drops(&kernel), SOURCE);
        attach(&testbed, &kernel);
        assert_eq!((inode(&pin), kernel.backstops(UID).unwrap()), (first, vec![interface]));
        spoof();
        assert_eq!(drops(&kernel), [2, 0, 0], "one program, not two");
        // Its pin removed by hand, the program is gone, and can be put back.
        std::fs::remove_file(&pin).unwrap();
        wait_until("gone", || {
            let before = drops(&kernel);
            spoof();
            drops(&kernel) == before
        });
        assert!(kernel.backstops(UID).unwrap().is_empty());
        attach(&testbed, &kernel);
        let before = drops(&kernel)[0];
        spoof();
        assert_eq!(drops(&kernel)[0], before + 1);
        // Released.
        assert!(kernel.detach_backstops(UID).unwrap());
        assert!(!kernel.detach_backstops(UID).unwrap());
        spoof();
        assert_eq!((drops(&kernel)[0], kernel.pods_with_backstops().unwrap().len()), (before + 1, 0));
        // With the interface the link is gone.
        attach(&testbed, &kernel);
        run(&format!("ip -n {} link del eth0", testbed.pod()));
        assert!(kernel.backstops(UID).unwrap().is_empty());
        assert!(!kernel.detach_backstops(UID).unwrap());
    }
}
