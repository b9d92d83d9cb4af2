//! The private parsers of this module, for `cargo xtask fuzz` alone.

use std::net::{IpAddr, SocketAddr};

/// Whether the parts of a CONNECT name a destination at `local`.
pub fn requested_destination(method: &[u8], authority: &[u8], local: IpAddr) -> Option<SocketAddr> {
    let uri = http::Uri::builder().authority(authority).build().ok()?;
    let request = http::Request::builder().method(method).uri(uri).body(()).ok()?;
    super::inbound::requested_destination(&request, local)
}
