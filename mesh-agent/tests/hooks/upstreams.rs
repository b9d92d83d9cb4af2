//! The agent's connects to applications: passed by the Pod's sk_lookup, them alone, and only while they are on their way.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::time::Duration;

use mesh_agent::capture::kernel::Kernel;
use mesh_common::limits::MAX_UPSTREAM_CONNECTIONS;
use mesh_common::{AgentSocketValue, UpstreamConnectionKey, socket_kind};
use socket2::{SockAddr, Socket};

use super::steered;
use super::testbed::*;

/// A connect from outside the Pod by the agent, from a port of choice.
fn agent_connects(
    testbed: &Testbed,
    kernel: &Kernel,
    mark: Option<AgentSocketValue>,
    from_port: u16,
    to: &str,
) -> socket2::Socket {
    let destination: IpAddr = to.parse().unwrap();
    let socket = socket_in(&testbed.outsider(), destination);
    socket.set_reuse_address(true).unwrap();
    let any = if destination.is_ipv4() { "0.0.0.0" } else { "::" };
    socket
        .bind(&SockAddr::from(SocketAddr::new(any.parse().unwrap(), from_port)))
        .unwrap();
    if let Some(mark) = mark {
        kernel.mark_socket(socket.as_fd(), mark).unwrap();
    }
    socket.connect(&SocketAddr::new(destination, 8080).into()).unwrap();
    socket
}

hook_test! {
    fn only_upstream_connects_to_this_pod_pass(testbed) {
        let (kernel, _tunnel, plaintext) = steered(&testbed);
        let application = listen(&testbed.pod(), 8080);
        let mark = |kind, slot| Some(AgentSocketValue { kind, slot });
        for (i, address) in [POD_V4, POD_V6, "::ffff:10.99.0.2"].into_iter().enumerate() {
            let port = 20_000 + 10 * i as u16;
            let upstream = agent_connects(&testbed, &kernel, mark(socket_kind::INBOUND_UPSTREAM, SLOT), port, address);
            application.accept().unwrap();
            assert_eq!(counter(&kernel, "passed_upstream"), 1 + i as u64);
            // Another kind of mark, another Pod's slot, no mark: to the agent.
            let _others = [
                agent_connects(&testbed, &kernel, mark(socket_kind::OUTBOUND, SLOT), port + 1, address),
                agent_connects(&testbed, &kernel, mark(socket_kind::INBOUND_UPSTREAM, SLOT + 1), port + 2, address),
                agent_connects(&testbed, &kernel, None, port + 3, address),
            ];
            (0..3).for_each(|_| drop(plaintext.accept().unwrap()));
            // Closed by reset, so that the port is free at once: its mark is gone.
            upstream.set_linger(Some(Duration::ZERO)).unwrap();
            drop(upstream);
            let _again = agent_connects(&testbed, &kernel, None, port, address);
            plaintext.accept().unwrap();
        }
        assert_eq!(counter(&kernel, "passed_upstream"), 3);
    }
}

const FAMILIES: [(&str, &str); 2] = [(OUTSIDER_V4, POD_V4), (OUTSIDER_V6, POD_V6)];

/// The agent's connect from within the Pod, under the true client's address.
fn upstream(testbed: &Testbed, kernel: &Kernel, client: &str, port: u16, application: &str) -> io::Result<Socket> {
    let (client, application): (IpAddr, IpAddr) = (client.parse().unwrap(), application.parse().unwrap());
    let socket = socket_in(&testbed.pod(), application);
    let mark = AgentSocketValue {
        kind: socket_kind::INBOUND_UPSTREAM,
        slot: SLOT,
    };
    kernel.mark_socket(socket.as_fd(), mark).unwrap();
    socket.set_mark(0x4356).unwrap();
    if client.is_ipv4() {
        socket.set_ip_transparent_v4(true).unwrap();
    } else {
        socket.set_ip_transparent_v6(true).unwrap();
    }
    socket.bind(&SockAddr::from(SocketAddr::new(client, port))).unwrap();
    socket.connect(&SocketAddr::new(application, 8080).into())?;
    Ok(socket)
}

/// A connect of the true client itself from the very same address and port.
fn goes_to_the_agent(testbed: &Testbed, client: &str, port: u16, application: &str, listeners: [&TcpListener; 2]) {
    let [plaintext, applications] = listeners;
    let family = if client.contains(':') { "6" } else { "4" };
    let script = format!("s = stream('{family}'); s.bind(('{client}', {port})); s.connect(('{application}', 8080)); ends(s)");
    let direct = testbed.client(&testbed.outsider(), &["script", &script]);
    assert!(direct.said().contains("from"), "{}", direct.said());
    let (_stream, peer) = plaintext.accept().unwrap();
    assert_eq!((peer.ip().to_canonical().to_string().as_str(), peer.port()), (client, port));
    applications.set_nonblocking(true).unwrap();
    assert_eq!(applications.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    applications.set_nonblocking(false).unwrap();
}

/// Waits until the application's end of a connection with `port` is gone, TIME_WAIT included.
fn wait_until_gone(testbed: &Testbed, port: u16) {
    let gone = || {
        within(&testbed.pod(), || {
            let remote = format!(":{port:04X}");
            ["tcp", "tcp6"].iter().all(|table| {
                let table = fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap();
                table.lines().all(|line| {
                    let mut fields = line.split_whitespace().skip(1);
                    let (local, peer) = (fields.next().unwrap(), fields.next().unwrap());
                    !local.ends_with(":1F90") || !peer.ends_with(&remote)
                })
            })
        })
    };
    wait_until("the application's end is gone", gone);
}

hook_test! {
    fn a_tuple_is_the_true_clients_once_the_application_has_closed(testbed) {
        let (kernel, _tunnel, plaintext) = steered(&testbed);
        return_path(&testbed);
        within(&testbed.pod(), || fs::write("/proc/sys/net/ipv4/tcp_fin_timeout", "1").unwrap());
        let application = listen(&testbed.pod(), 8080);
        for (port, (client, address)) in (20_100..).zip(FAMILIES) {
            let mut upstream = upstream(&testbed, &kernel, client, port, address).unwrap();
            let (mut accepted, peer) = application.accept().unwrap();
            assert_eq!((peer.ip().to_canonical().to_string().as_str(), peer.port()), (client, port));
            // What the application said before it closed arrives; the agent's end stays half open.
            accepted.write_all(b"goodbye").unwrap();
            drop(accepted);
            let mut answer = String::new();
            upstream.read_to_string(&mut answer).unwrap();
            assert_eq!(answer, "goodbye");
            wait_until_gone(&testbed, port);
            goes_to_the_agent(&testbed, client, port, address, [&plaintext, &application]);
        }
    }
}

hook_test! {
    fn nothing_passes_by_a_connection_that_is_established_or_over(testbed) {
        let (kernel, _tunnel, plaintext) = steered(&testbed);
        return_path(&testbed);
        let none_left = || assert_eq!(upstreams(&testbed).iter().count(), 0);
        for (i, (client, address)) in (0..).zip(FAMILIES) {
            let first = 20_200 + 10 * i;
            // Refused: nobody listens.
            upstream(&testbed, &kernel, client, first, address).unwrap_err();
            none_left();
            let application = listen(&testbed.pod(), 8080);
            let listeners = [&plaintext, &application];
            let connect = |port| {
                let upstream = upstream(&testbed, &kernel, client, port, address).unwrap();
                let accepted = application.accept().unwrap().0;
                none_left();
                (upstream, accepted)
            };
            let reset = |socket: &Socket| socket.set_linger(Some(Duration::ZERO)).unwrap();
            // By the agent's reset, the application's reset, the agent's FIN first, the application's FIN first.
            let (upstream, mut accepted) = connect(first + 1);
            reset(&upstream);
            drop(upstream);
            assert_eq!(accepted.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
            goes_to_the_agent(&testbed, client, first + 1, address, listeners);
            let (mut upstream, accepted) = connect(first + 2);
            let accepted = Socket::from(accepted);
            reset(&accepted);
            drop(accepted);
            assert_eq!(upstream.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
            goes_to_the_agent(&testbed, client, first + 2, address, listeners);
            let (upstream, mut accepted) = connect(first + 3);
            drop(upstream);
            assert_eq!(accepted.read(&mut [0]).unwrap(), 0);
            drop(accepted);
            goes_to_the_agent(&testbed, client, first + 3, address, listeners);
            let (mut upstream, accepted) = connect(first + 4);
            drop(accepted);
            assert_eq!(upstream.read(&mut [0]).unwrap(), 0);
            drop(upstream);
            // The application's end is in TIME_WAIT: the SYN is taken for a new connection.
            goes_to_the_agent(&testbed, client, first + 4, address, listeners);
        }
        assert_eq!(counter(&kernel, "passed_upstream"), 10);
    }
}

hook_test! {
    fn a_connect_that_finds_the_map_full_is_counted_and_steered(testbed) {
        let (kernel, _tunnel, plaintext) = steered(&testbed);
        return_path(&testbed);
        let application = listen(&testbed.pod(), 8080);
        let mut map = upstreams(&testbed);
        for i in 0..MAX_UPSTREAM_CONNECTIONS {
            let key = UpstreamConnectionKey {
                slot: i,
                client_port: 1,
                application_port: 2,
                client_address: [1; 16],
                application_address: [2; 16],
            };
            map.insert(key, u64::MAX, 0).unwrap();
        }
        for (full, (client, address)) in (1..).zip(FAMILIES) {
            let upstream = upstream(&testbed, &kernel, client, 20_400, address).unwrap();
            let (_stream, peer) = plaintext.accept().unwrap();
            assert_eq!((peer.ip().to_canonical().to_string().as_str(), peer.port()), (client, 20_400));
            assert_eq!(counter(&kernel, "upstreams_full"), full);
            drop(upstream);
        }
        application.set_nonblocking(true).unwrap();
        assert_eq!(application.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert_eq!(counter(&kernel, "passed_upstream"), 0);
    }
}

hook_test! {
    fn a_handshake_with_syn_cookies_passes_to_its_end(testbed) {
        let (kernel, _tunnel, _plaintext) = steered(&testbed);
        return_path(&testbed);
        // 2: always.
        within(&testbed.pod(), || fs::write("/proc/sys/net/ipv4/tcp_syncookies", "2").unwrap());
        let application = listen(&testbed.pod(), 8080);
        for (i, (client, address)) in (0..).zip(FAMILIES) {
            for port in 20_300 + 100 * i..20_300 + 100 * i + 50 {
                let mut upstream = upstream(&testbed, &kernel, client, port, address).unwrap();
                upstream.write_all(b"hello").unwrap();
                let (mut accepted, _) = application.accept().unwrap();
                let mut data = [0; 5];
                accepted.read_exact(&mut data).unwrap();
                accepted.write_all(&data).unwrap();
                upstream.read_exact(&mut data).unwrap();
                assert_eq!(&data, b"hello");
                assert_eq!(upstreams(&testbed).iter().count(), 0);
            }
        }
        // Each handshake was looked up twice.
        assert_eq!(counter(&kernel, "passed_upstream"), 200);
    }
}
