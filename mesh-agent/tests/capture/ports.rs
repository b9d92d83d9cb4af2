//! Who asks the kernel for any port gets none of the agent's.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use socket2::{Domain, Socket, Type};

use super::*;

const AGENT_PORTS: [u16; 4] = [15001, 15006, 15008, 15009];

/// The port that a socket of the Pod gets without naming one, by each way to get one.
fn automatic_ports(application: SocketAddr) -> Vec<(String, io::Result<u16>)> {
    let socket = |address: SocketAddr| Socket::new(Domain::for_address(address), Type::STREAM, None).unwrap();
    let port = |socket: &Socket| socket.local_addr().unwrap().as_socket().unwrap().port();
    let mut got = Vec::new();
    for any in [
        SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
        (Ipv6Addr::UNSPECIFIED, 0).into(),
        (Ipv4Addr::LOCALHOST, 0).into(),
    ] {
        let (bound, listening) = (socket(any), socket(any));
        // Sharing makes the kernel look for ports differently.
        let shared = socket(any);
        shared.set_reuse_address(true).unwrap();
        got.push((format!("bind {any}"), bound.bind(&any.into()).map(|()| port(&bound))));
        got.push((format!("bind shared {any}"), shared.bind(&any.into()).map(|()| port(&shared))));
        got.push((format!("listen {any}"), listening.listen(1).map(|()| port(&listening))));
    }
    let connecting = socket(application);
    got.push((
        "connect".into(),
        connecting.connect(&application.into()).map(|()| port(&connecting)),
    ));
    got
}

#[tokio::test(flavor = "multi_thread")]
async fn automatic_binding_gives_no_port_of_the_agent() {
    let Some(bed) = Bed::new("automatic_binding_gives_no_port_of_the_agent") else {
        return;
    };
    let before = bed.snapshot();
    let capture = bed.start();
    // Its listeners are closed: the ports are free for who may have them.
    drop(capture.enroll(bed.pod("uid-1")).await.unwrap());
    let application = bed.application("127.0.0.1:8080");
    let loopback = application.local_addr().unwrap();
    let write = |setting: &str, value: &str| {
        run(&format!(
            "ip netns exec {} sh -c 'echo {value} > /proc/sys/net/ipv4/{setting}'",
            bed.name
        ));
    };
    let got = || bed.netns().run(|| Ok(automatic_ports(loopback))).unwrap();
    let before_range = run(&format!(
        "ip netns exec {} cat /proc/sys/net/ipv4/ip_local_port_range",
        bed.name
    ));
    for port in AGENT_PORTS {
        write("ip_local_port_range", &format!("{port} {port}"));
        for (way, result) in got() {
            assert!(result.is_err(), "{way}: {result:?}");
        }
    }
    // What the Pod takes away is put back; without it, the ports are given.
    write("ip_local_reserved_ports", "");
    let taken = got();
    assert!(taken.iter().any(|(_, port)| matches!(port, Ok(15009))), "{taken:?}");
    let repairs = capture.repair("uid-1").await.unwrap();
    assert_eq!(repairs.repaired, ["net/ipv4/ip_local_reserved_ports"]);
    assert!(got().iter().all(|(_, port)| port.is_err()));
    write("ip_local_port_range", before_range.trim());
    drop(application);
    // What another reserved meanwhile stays.
    write("ip_local_reserved_ports", "9000,15001,15006,15008,15009");
    assert!(capture.release("uid-1").await.unwrap());
    let list = run(&format!(
        "ip netns exec {} cat /proc/sys/net/ipv4/ip_local_reserved_ports",
        bed.name
    ));
    assert_eq!(list.trim(), "9000");
    write("ip_local_reserved_ports", "");
    settle_to(&bed, &before).await;
}

/// While a connect is on its way its tuple passes the Pod's sk_lookup (`hooks/backlog.rs`): nobody is to know the next port.
#[tokio::test(flavor = "multi_thread")]
async fn the_ports_of_the_agents_connects_are_not_foreseen() {
    const CONNECTS: usize = 32;
    let Some(bed) = Bed::new("the_ports_of_the_agents_connects_are_not_foreseen") else {
        return;
    };
    let capture = bed.start();
    let pod = capture.enroll(bed.pod("uid-1")).await.unwrap();
    for (client, application) in [(NODE_V4, POD_V4), (NODE_V6, POD_V6)] {
        let application = SocketAddr::new(application.parse().unwrap(), 8080);
        let upstreams: Vec<_> = (0..CONNECTS)
            .map(|_| pod.network.upstream_socket(client.parse().unwrap(), application).unwrap())
            .collect();
        let ports: Vec<i32> = upstreams
            .iter()
            .map(|upstream| upstream.socket.local_addr().unwrap().port().into())
            .collect();
        // Of 32 among 12,768 by chance: less than once in a hundred million runs.
        let followed = ports.windows(2).filter(|pair| pair[1] == pair[0] + 1).count();
        assert!(followed < 3, "{ports:?}");
        let spread = ports.iter().max().unwrap() - ports.iter().min().unwrap();
        assert!(spread > 2_000, "{ports:?}");
    }
    drop(pod);
    assert!(capture.release("uid-1").await.unwrap());
}
