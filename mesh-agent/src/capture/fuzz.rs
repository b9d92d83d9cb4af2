//! The private parsers of this module, for `cargo xtask fuzz` alone.

/// A datagram of the kernel's.
pub fn netlink(bytes: &[u8]) {
    super::netlink::fuzz(bytes);
}
