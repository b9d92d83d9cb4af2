//! The agent's sockets inside a Pod's namespace. Every function here runs inside it (`NetNamespace::run`).

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::Path;

use mesh_common::{AgentSocketValue, OUTBOUND_PORT, PLAINTEXT_INBOUND_PORT, TUNNEL_PORT, socket_kind};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::stat::fstat;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpSocket;

use super::kernel::Kernel;
use super::network::{CaptureError, IoContext};
use super::routing::RETURN_PATH_MARK;

/// Connections that the kernel keeps for us between their handshake and our accept; the kernel caps it at net.core.somaxconn.
const LISTEN_BACKLOG: i32 = 4096;

/// Local ports of transparent upstream sockets. Below Linux's ephemeral range (32768–60999), from which the true client takes
/// its own port: were they to meet, application and agent would hold mirrored connections with the very same 4-tuple, and the
/// connect would hang. Above the ports that applications commonly listen on.
const UPSTREAM_PORT_FIRST: u16 = 20_000;
const UPSTREAM_PORTS: u32 = 12_768;

/// How many ports to try for one that no other socket uses with this client's address, and then for one that is shared.
const EXCLUSIVE_TRIES: u32 = 16;
const SHARED_TRIES: u32 = 64;

/// The listeners of a Pod, before the runtime has them.
#[derive(Debug)]
pub(super) struct StdListeners {
    pub outbound: TcpListener,
    pub tunnel: TcpListener,
    pub plaintext: TcpListener,
}

impl From<[TcpListener; 3]> for StdListeners {
    fn from([outbound, tunnel, plaintext]: [TcpListener; 3]) -> Self {
        Self {
            outbound,
            tunnel,
            plaintext,
        }
    }
}

impl StdListeners {
    pub(super) fn open(kernel: &Kernel, slot: u32) -> Result<Self, CaptureError> {
        Ok(Self {
            outbound: listener(kernel, slot, OUTBOUND_PORT)?,
            tunnel: listener(kernel, slot, TUNNEL_PORT)?,
            plaintext: listener(kernel, slot, PLAINTEXT_INBOUND_PORT)?,
        })
    }

    pub(super) fn inodes(&self) -> Result<[u64; 3], CaptureError> {
        let inode = |listener: &TcpListener| {
            let status = fstat(listener).map_err(io::Error::from).step("looking at a listener")?;
            Ok(status.st_ino)
        };
        Ok([inode(&self.outbound)?, inode(&self.tunnel)?, inode(&self.plaintext)?])
    }
}

/// Whether all of these sockets listen in the namespace of the calling thread.
pub(super) fn are_listening(inodes: &[u64]) -> Result<bool, CaptureError> {
    const LISTEN: &str = "0A";
    let mut listening = Vec::new();
    for table in ["tcp", "tcp6"] {
        let file = match File::open(Path::new("/proc/thread-self/net").join(table)) {
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            file => file.step("looking for the listeners")?,
        };
        for line in BufReader::new(file).lines().skip(1) {
            let line = line.step("looking for the listeners")?;
            let mut fields = line.split_ascii_whitespace().skip(3);
            // The kernel shows listeners first; connections may be many.
            if fields.next() != Some(LISTEN) {
                break;
            }
            listening.extend(fields.nth(5).and_then(|inode| inode.parse::<u64>().ok()));
        }
    }
    Ok(inodes.iter().all(|inode| listening.contains(inode)))
}

/// Dual-stack where the kernel has IPv6. Never SO_REUSEPORT: another process of the Pod could join the group.
fn listener(kernel: &Kernel, slot: u32, port: u16) -> Result<TcpListener, CaptureError> {
    let (socket, address) = match Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP)) {
        Ok(socket) => {
            socket.set_only_v6(false).step("making a listener dual-stack")?;
            (socket, IpAddr::V6(Ipv6Addr::UNSPECIFIED))
        }
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).step("making a listener in the Pod")?;
            (socket, IpAddr::V4(Ipv4Addr::UNSPECIFIED))
        }
        Err(error) => return Err(error).step("making a listener in the Pod"),
    };
    // A restarted agent binds while connections of its predecessor are in TIME_WAIT. With a listening socket on the port,
    // Linux still refuses the second.
    socket.set_reuse_address(true).step("setting SO_REUSEADDR on a listener")?;
    // Accepted sockets inherit it.
    socket.set_tcp_nodelay(true).step("setting TCP_NODELAY on a listener")?;
    socket.set_nonblocking(true).step("making a listener non-blocking")?;
    mark(kernel, &socket, socket_kind::LISTENER, slot)?;
    socket
        .bind(&SocketAddr::new(address, port).into())
        .and_then(|()| socket.listen(LISTEN_BACKLOG))
        .map_err(|source| {
            if source.kind() == io::ErrorKind::AddrInUse {
                CaptureError::Refused(format!(
                    "port {port} is taken by a process of the Pod, and the mesh needs it there: let the application listen \
                     on another port than {OUTBOUND_PORT}, {PLAINTEXT_INBOUND_PORT} and {TUNNEL_PORT}, or leave the Pod \
                     out of the mesh with the label culvert.dev/mesh=disabled"
                ))
            } else {
                CaptureError::Io {
                    step: "listening in the Pod",
                    source,
                }
            }
        })?;
    Ok(socket.into())
}

/// A socket for a tunnel or a pass-through towards `towards`.
pub(super) fn outbound(kernel: &Kernel, slot: u32, towards: IpAddr) -> Result<TcpSocket, CaptureError> {
    let socket = stream_socket(towards)?;
    mark(kernel, &socket, socket_kind::OUTBOUND, slot)?;
    Ok(into_tokio(socket))
}

/// A socket towards the application, bound to `client`'s own address: transparently unless the Pod itself is the client.
pub(super) fn upstream(
    kernel: &Kernel,
    slot: u32,
    client: IpAddr,
    client_is_pod: bool,
    towards: IpAddr,
) -> Result<TcpSocket, CaptureError> {
    let (client, towards) = (client.to_canonical(), towards.to_canonical());
    check_client(client, towards)?;
    let socket = stream_socket(towards)?;
    mark(kernel, &socket, socket_kind::INBOUND_UPSTREAM, slot)?;
    if client_is_pod {
        if client == towards {
            // The port is chosen at connect, per 4-tuple, out of the ephemeral range. The Pod's sk_lookup passes what an address
            // sends to itself: this one cannot come back, and need not be known by its port.
            setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)
                .map_err(io::Error::from)
                .step("setting IP_BIND_ADDRESS_NO_PORT")?;
        }
        socket
            .bind(&SocketAddr::new(client, 0).into())
            .step("binding to the Pod's address")?;
    } else {
        socket.set_mark(RETURN_PATH_MARK).step("setting SO_MARK")?;
        match client {
            IpAddr::V4(_) => socket.set_ip_transparent_v4(true).step("setting IP_TRANSPARENT")?,
            IpAddr::V6(_) => socket.set_ip_transparent_v6(true).step("setting IPV6_TRANSPARENT")?,
        }
        bind_in_own_range(&socket, client)?;
    }
    Ok(into_tokio(socket))
}

/// At random, so that nobody else's SYN meets one that is on its way but by trying thousands. First for a port that nothing else holds
/// with this address: then no 4-tuple can collide. When the tries run out (most of the range is busy, or in TIME_WAIT), for one that is
/// shared: the kernel then tells at connect (EADDRNOTAVAIL) if the very 4-tuple lives. One in TIME_WAIT is taken again, as the port is
/// asked for by name.
fn bind_in_own_range(socket: &Socket, client: IpAddr) -> Result<(), CaptureError> {
    for attempt in 0..EXCLUSIVE_TRIES + SHARED_TRIES {
        if attempt == EXCLUSIVE_TRIES {
            socket.set_reuse_address(true).step("setting SO_REUSEADDR")?;
        }
        let port = upstream_port(rand::random());
        match socket.bind(&SocketAddr::new(client, port).into()) {
            // From here on the port may be shared: with the application, should it want to listen there, too.
            Ok(()) => return socket.set_reuse_address(true).step("setting SO_REUSEADDR"),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            Err(error) => return Err(error).step("binding to the client's address"),
        }
    }
    Err(CaptureError::PortsExhausted(client))
}

fn upstream_port(random: u32) -> u16 {
    UPSTREAM_PORT_FIRST + u16::try_from(random % UPSTREAM_PORTS).unwrap_or(0)
}

fn check_client(client: IpAddr, towards: IpAddr) -> Result<(), CaptureError> {
    let link_local = matches!(client, IpAddr::V6(v6) if v6.is_unicast_link_local());
    if client.is_ipv4() != towards.is_ipv4() {
        return Err(CaptureError::Refused(format!(
            "client {client} and application {towards} differ in family"
        )));
    }
    if client.is_unspecified() || client.is_multicast() || client.is_loopback() || link_local {
        return Err(CaptureError::Refused(format!(
            "{client} cannot be shown to the application as its client"
        )));
    }
    Ok(())
}

fn stream_socket(towards: IpAddr) -> Result<Socket, CaptureError> {
    let domain = if towards.to_canonical().is_ipv4() {
        Domain::IPV4
    } else {
        Domain::IPV6
    };
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP)).step("making a socket in the Pod")?;
    socket.set_nonblocking(true).step("making a socket non-blocking")?;
    socket.set_tcp_nodelay(true).step("setting TCP_NODELAY")?;
    Ok(socket)
}

/// Before `connect()` or `listen()`: the programs look at the mark there.
fn mark(kernel: &Kernel, socket: &Socket, kind: u32, slot: u32) -> Result<(), CaptureError> {
    kernel.mark_socket(socket.as_fd(), AgentSocketValue { kind, slot })
}

fn into_tokio(socket: Socket) -> TcpSocket {
    TcpSocket::from_std_stream(TcpStream::from(socket))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upstream_ports_stay_in_their_range_and_below_the_ephemeral_one() {
        assert_eq!(upstream_port(0), UPSTREAM_PORT_FIRST);
        assert_eq!(upstream_port(UPSTREAM_PORTS - 1), 32_767);
        assert_eq!(upstream_port(UPSTREAM_PORTS), UPSTREAM_PORT_FIRST);
    }

    #[test]
    fn only_an_address_that_can_be_a_client_is_bound() {
        let v4: IpAddr = "10.0.0.1".parse().unwrap();
        let v6: IpAddr = "fd00::1".parse().unwrap();
        assert!(check_client(v4, v4).is_ok());
        assert!(check_client(v6, v6).is_ok());
        for (client, towards) in [
            ("10.0.0.1", "fd00::1"),
            ("127.0.0.1", "10.0.0.1"),
            ("0.0.0.0", "10.0.0.1"),
            ("::1", "fd00::1"),
            ("fe80::1", "fd00::1"),
            ("ff02::1", "fd00::1"),
        ] {
            assert!(
                check_client(client.parse().unwrap(), towards.parse().unwrap()).is_err(),
                "{client}"
            );
        }
    }
}
