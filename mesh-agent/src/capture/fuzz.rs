//! The private parsers of this module, for `cargo xtask fuzz` alone.

/// A datagram of the kernel's.
pub fn netlink(bytes: &[u8]) {
    super::netlink::fuzz(bytes);
}

/// A file of the folder of enrolments.
pub fn enrolment(bytes: &[u8]) {
    super::enrolments::fuzz(bytes);
}

/// What comes to a probe's destination.
pub fn greeting(bytes: &[u8]) {
    super::probe::fuzz(bytes);
}

/// What the kernel tells of a process's cgroups, in whose names containers have a say.
pub fn cgroup(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        super::pod_cgroup::fuzz(text);
    }
}
