//! A connect of the agent's to an application that does not accept: it stays on its way, and so does its entry.

use std::io::Read;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use mesh_common::{AgentSocketValue, socket_kind};
use socket2::{Domain, SockAddr, Socket, Type};

use super::steered;
use super::testbed::*;

const PORT: u16 = 20_500;

/// An application on `port` that holds one connection that it has not accepted, and no more.
fn full_application(testbed: &Testbed, port: u16) -> (TcpListener, TcpStream) {
    within(&testbed.pod(), move || {
        let socket = Socket::new(Domain::IPV6, Type::STREAM, None).unwrap();
        socket.set_only_v6(false).unwrap();
        socket.set_reuse_address(true).unwrap();
        socket
            .bind(&SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port).into())
            .unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        socket.listen(0).unwrap();
        let held = TcpStream::connect(("127.0.0.1", port)).unwrap();
        (socket.into(), held)
    })
}

// A known limit, stated in ARCHITECTURE.md: sk_lookup sees addresses and ports alone, so whoever has the client's address and
// hits the very port of a connect that is on its way reaches the application as that client, whom policy has just allowed.
hook_test! {
    fn while_a_connect_is_on_its_way_its_tuple_alone_passes(testbed) {
        let (kernel, _tunnel, plaintext) = steered(&testbed);
        return_path(&testbed);
        // A port each: a child that another test's thread forks holds the first one's listener until it executes, so its port is
        // not free as soon as it is dropped.
        for (client, address, application_port) in [(OUTSIDER_V4, POD_V4, 8080), (OUTSIDER_V6, POD_V6, 8081)] {
            let (application, _held) = full_application(&testbed, application_port);
            let (ip, destination): (IpAddr, IpAddr) = (client.parse().unwrap(), address.parse().unwrap());
            let upstream = socket_in(&testbed.pod(), destination);
            let mark = AgentSocketValue { kind: socket_kind::INBOUND_UPSTREAM, slot: SLOT };
            kernel.mark_socket(upstream.as_fd(), mark).unwrap();
            upstream.set_mark(0x4356).unwrap();
            if ip.is_ipv4() { upstream.set_ip_transparent_v4(true).unwrap() } else { upstream.set_ip_transparent_v6(true).unwrap() }
            upstream.bind(&SockAddr::from(SocketAddr::new(ip, PORT))).unwrap();
            upstream.set_nonblocking(true).unwrap();
            upstream.connect(&SocketAddr::new(destination, application_port).into()).unwrap_err();
            assert_eq!(upstreams(&testbed).iter().count(), 1);
            let family = if ip.is_ipv4() { "4" } else { "6" };
            let connect = |port: u16| testbed.client(&testbed.outsider(), &["script", &format!(
                "s = stream('{family}'); s.bind(('{client}', {port})); s.connect(('{address}', {application_port})); ends(s); s.sendall(b'x'); told()"
            )]);
            // The port beside it: to the agent.
            let beside = connect(PORT + 1);
            assert!(beside.said().contains("from"), "{}", beside.said());
            assert_eq!(plaintext.accept().unwrap().1.port(), PORT + 1);
            drop(application.accept().unwrap());
            let same = connect(PORT);
            assert!(same.said().contains("from"), "{}", same.said());
            let (mut met, peer) = application.accept().unwrap();
            assert_eq!((peer.ip().to_canonical(), peer.port()), (ip, PORT));
            let mut byte = [0];
            met.read_exact(&mut byte).unwrap();
            // The application has one connection by that tuple: the agent's own connect is not also established, and a further
            // SYN of the client's is none of the agent's any more.
            assert_eq!(upstreams(&testbed).iter().count(), 0);
            assert!(upstream.peer_addr().is_err());
        }
    }
}
