//! Addresses that must not be mixed up are types of their own.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use mesh_common::AddressBytes;

/// The normal form of an address in kernel maps: 16 bytes, IPv4 as v4-mapped.
#[must_use]
pub fn address_bytes(ip: IpAddr) -> AddressBytes {
    match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// The address behind its normal form; v4-mapped becomes IPv4.
#[must_use]
pub fn ip_from_bytes(bytes: AddressBytes) -> IpAddr {
    IpAddr::V6(Ipv6Addr::from(bytes)).to_canonical()
}

/// A socket address with v4-mapped turned into IPv4, as a dual-stack listener's peers need it.
#[must_use]
pub fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

macro_rules! address_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        pub struct $name(SocketAddr);

        impl $name {
            /// v4-mapped addresses become IPv4.
            #[must_use]
            pub fn new(addr: SocketAddr) -> Self {
                Self(canonical(addr))
            }
            #[must_use]
            pub fn socket_addr(self) -> SocketAddr {
                self.0
            }
            #[must_use]
            pub fn ip(self) -> IpAddr {
                self.0.ip()
            }
            #[must_use]
            pub fn port(self) -> u16 {
                self.0.port()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

address_type! {
    /// Where a connection comes from: the application's end (outbound) or the true client (inbound).
    ClientAddr
}
address_type! {
    /// Where the application, or the client of a plaintext connection, wanted to go.
    OriginalDst
}
address_type! {
    /// The local end of an accepted connection, as the listener sees it.
    ListenerAddr
}
