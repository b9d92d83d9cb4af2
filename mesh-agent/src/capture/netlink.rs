//! The few rtnetlink requests that a Pod's namespace needs, synchronous: they run between two setns on one thread, where an
//! asynchronous client (whose socket and task live longer) has no place. Formats: rtnetlink(7), linux/fib_rules.h.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};

/// The loopback device has this index in every network namespace.
const LOOPBACK_INDEX: u32 = 1;
const HEADER_LEN: usize = 16;
/// The kernel's dumps come in datagrams of at most 32 KiB.
const RECEIVE_BUFFER_LEN: usize = 32 * 1024;
/// Datagrams of one answer. 1,024 × 32 KiB holds far more addresses than a Pod has.
const MAX_DATAGRAMS: usize = 1024;
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_DUMP: u16 = 0x300;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWNSID: u16 = 88;
const RTM_GETNSID: u16 = 90;
const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_NEWRULE: u16 = 32;
const RTM_DELRULE: u16 = 33;

const IFA_F_OPTIMISTIC: u32 = 0x04;
const IFA_F_DADFAILED: u32 = 0x08;
const IFA_F_TENTATIVE: u32 = 0x40;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    V4,
    V6,
}

impl Family {
    fn number(self) -> u8 {
        match self {
            Self::V4 => libc::AF_INET as u8,
            Self::V6 => libc::AF_INET6 as u8,
        }
    }
}

/// Whether an address of the namespace can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AddressState {
    Usable,
    /// Duplicate address detection is under way.
    Tentative,
    Duplicate,
}

/// One end of a veth pair: where its other end is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct VethPeer {
    pub interface: u32,
    /// What the namespace that was asked calls the peer's namespace.
    pub nsid: i32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Add,
    Remove,
}

#[derive(Debug)]
pub(super) struct Netlink {
    socket: Socket,
}

impl Netlink {
    /// A socket to the namespace that the calling thread is in.
    pub(super) fn open() -> io::Result<Self> {
        let socket = Socket::new(
            Domain::from(libc::AF_NETLINK),
            Type::RAW,
            Some(Protocol::from(libc::NETLINK_ROUTE)),
        )?;
        socket.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        Ok(Self { socket })
    }

    pub(super) fn is_loopback_up(&self) -> io::Result<bool> {
        let mut info = [0_u8; 16]; // struct ifinfomsg
        info[4..8].copy_from_slice(&LOOPBACK_INDEX.to_ne_bytes());
        let mut up = false;
        self.request(RTM_GETLINK, NLM_F_REQUEST | NLM_F_ACK, &info, |kind, body| {
            if kind == RTM_NEWLINK && u32_at(body, 4) == Some(LOOPBACK_INDEX) {
                up = u32_at(body, 8).is_some_and(|flags| flags & libc::IFF_UP as u32 != 0);
            }
        })?;
        Ok(up)
    }

    /// The other ends of this namespace's veths that lie in another namespace.
    pub(super) fn veth_peers(&self) -> io::Result<Vec<VethPeer>> {
        let mut peers = Vec::new();
        self.request(RTM_GETLINK, NLM_F_REQUEST | NLM_F_DUMP, &[0; 16], |kind, body| {
            if kind == RTM_NEWLINK {
                peers.extend(parse_veth_peer(body));
            }
        })?;
        Ok(peers)
    }

    /// What this namespace calls another one; `None` while it has no name for it.
    pub(super) fn nsid_of(&self, netns: BorrowedFd<'_>) -> io::Result<Option<i32>> {
        const NETNSA_FD: u16 = 3;
        let mut body = vec![0; 4]; // struct rtgenmsg
        push_attribute(&mut body, NETNSA_FD, netns.as_raw_fd().cast_unsigned());
        let mut nsid = None;
        self.request(RTM_GETNSID, NLM_F_REQUEST | NLM_F_ACK, &body, |kind, body| {
            if kind == RTM_NEWNSID {
                nsid = parse_nsid(body);
            }
        })?;
        Ok(nsid)
    }

    pub(super) fn addresses(&self) -> io::Result<Vec<(IpAddr, AddressState)>> {
        let mut addresses = Vec::new();
        // struct ifaddrmsg; family 0 asks for all.
        self.request(RTM_GETADDR, NLM_F_REQUEST | NLM_F_DUMP, &[0; 8], |kind, body| {
            if kind == RTM_NEWADDR {
                addresses.extend(parse_address(body));
            }
        })?;
        Ok(addresses)
    }

    /// `ip rule add pref <preference> fwmark <mark> lookup <table>`; one that exists is fine, and told by `false`.
    pub(super) fn add_mark_rule(&self, family: Family, preference: u32, mark: u32, table: u32) -> io::Result<bool> {
        self.change_mark_rule(Change::Add, family, preference, mark, table)
    }

    /// One that is gone is fine.
    pub(super) fn remove_mark_rule(&self, family: Family, preference: u32, mark: u32, table: u32) -> io::Result<bool> {
        self.change_mark_rule(Change::Remove, family, preference, mark, table)
    }

    fn change_mark_rule(&self, change: Change, family: Family, preference: u32, mark: u32, table: u32) -> io::Result<bool> {
        const FR_ACT_TO_TBL: u8 = 1;
        const FRA_PRIORITY: u16 = 6;
        const FRA_FWMARK: u16 = 10;
        const FRA_TABLE: u16 = 15;
        const FRA_FWMASK: u16 = 16;
        // struct fib_rule_hdr; the table (more than 8 bits) goes as an attribute.
        let mut body = vec![family.number(), 0, 0, 0, 0, 0, 0, FR_ACT_TO_TBL, 0, 0, 0, 0];
        for (kind, value) in [
            (FRA_PRIORITY, preference),
            (FRA_FWMARK, mark),
            (FRA_FWMASK, u32::MAX),
            (FRA_TABLE, table),
        ] {
            push_attribute(&mut body, kind, value);
        }
        self.change(change, (RTM_NEWRULE, RTM_DELRULE), &body)
    }

    /// `ip route add local default dev lo table <table>`; one that exists is fine, and told by `false`.
    pub(super) fn add_local_default(&self, family: Family, table: u32) -> io::Result<bool> {
        self.change_local_default(Change::Add, family, table)
    }

    /// One that is gone is fine.
    pub(super) fn remove_local_default(&self, family: Family, table: u32) -> io::Result<bool> {
        self.change_local_default(Change::Remove, family, table)
    }

    fn change_local_default(&self, change: Change, family: Family, table: u32) -> io::Result<bool> {
        const RTA_OIF: u16 = 4;
        const RTA_TABLE: u16 = 15;
        const RTPROT_STATIC: u8 = 4;
        const RT_SCOPE_HOST: u8 = 254;
        const RTN_LOCAL: u8 = 2;
        // struct rtmsg
        let mut body = vec![
            family.number(),
            0,
            0,
            0,
            0,
            RTPROT_STATIC,
            RT_SCOPE_HOST,
            RTN_LOCAL,
            0,
            0,
            0,
            0,
        ];
        push_attribute(&mut body, RTA_TABLE, table);
        push_attribute(&mut body, RTA_OIF, LOOPBACK_INDEX);
        self.change(change, (RTM_NEWROUTE, RTM_DELROUTE), &body)
    }

    /// Whether anything changed.
    fn change(&self, change: Change, (add, remove): (u16, u16), body: &[u8]) -> io::Result<bool> {
        let result = match change {
            Change::Add => self.request(add, NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, body, |_, _| {}),
            Change::Remove => self.request(remove, NLM_F_REQUEST | NLM_F_ACK, body, |_, _| {}),
        };
        match (change, result.as_ref().err().and_then(io::Error::raw_os_error)) {
            (Change::Add, Some(libc::EEXIST)) => Ok(false),
            // No such rule; no such route; no such device; the family is gone with its rules and routes.
            (Change::Remove, Some(libc::ENOENT | libc::ESRCH | libc::ENODEV | libc::EAFNOSUPPORT)) => Ok(false),
            _ => result.map(|()| true),
        }
    }

    fn request(&self, kind: u16, flags: u16, body: &[u8], mut each: impl FnMut(u16, &[u8])) -> io::Result<()> {
        let length = u32::try_from(HEADER_LEN + body.len()).map_err(io::Error::other)?;
        let mut message = Vec::with_capacity(HEADER_LEN + body.len());
        message.extend(length.to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend(flags.to_ne_bytes());
        message.extend(1_u32.to_ne_bytes()); // sequence: one request at a time
        message.extend(0_u32.to_ne_bytes()); // to the kernel
        message.extend(body);
        (&self.socket).write_all(&message)?;
        let mut buffer = vec![0; RECEIVE_BUFFER_LEN];
        for _ in 0..MAX_DATAGRAMS {
            let received = (&self.socket).read(&mut buffer)?;
            let mut rest = &buffer[..received];
            while !rest.is_empty() {
                let (kind, body, next) = split_message(rest).ok_or(io::ErrorKind::InvalidData)?;
                match kind {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => {
                        let code = u32_at(body, 0).ok_or(io::ErrorKind::InvalidData)?.cast_signed();
                        return if code == 0 {
                            Ok(())
                        } else {
                            Err(io::Error::from_raw_os_error(-code))
                        };
                    }
                    _ => each(kind, body),
                }
                rest = next;
            }
        }
        Err(io::Error::new(io::ErrorKind::InvalidData, "the answer does not end"))
    }
}

/// (kind, body, what follows) of the first message.
fn split_message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = usize::try_from(u32_at(bytes, 0)?).ok()?;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let body = bytes.get(HEADER_LEN..length)?;
    let next = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((kind, body, next))
}

/// A veth whose other end is in another namespace, in a struct ifinfomsg with its attributes.
fn parse_veth_peer(body: &[u8]) -> Option<VethPeer> {
    const IFLA_LINK: u16 = 5;
    const IFLA_LINKINFO: u16 = 18;
    const IFLA_LINK_NETNSID: u16 = 37;
    const IFLA_INFO_KIND: u16 = 1;
    let (mut interface, mut nsid, mut is_veth) = (None, None, false);
    for_each_attribute(body.get(16..)?, |kind, value| {
        match kind {
            IFLA_LINK => interface = Some(u32_at(value, 0)?),
            IFLA_LINK_NETNSID => nsid = Some(u32_at(value, 0)?.cast_signed()),
            IFLA_LINKINFO => for_each_attribute(value, |kind, value| {
                is_veth |= kind == IFLA_INFO_KIND && value == b"veth\0";
                Some(())
            })?,
            _ => {}
        }
        Some(())
    })?;
    is_veth.then_some(VethPeer {
        interface: interface?,
        nsid: nsid?,
    })
}

/// In a struct rtgenmsg with its attributes; negative where there is none.
fn parse_nsid(body: &[u8]) -> Option<i32> {
    const NETNSA_NSID: u16 = 1;
    let mut nsid = None;
    for_each_attribute(body.get(4..)?, |kind, value| {
        if kind == NETNSA_NSID {
            nsid = Some(u32_at(value, 0)?.cast_signed());
        }
        Some(())
    })?;
    nsid.filter(|nsid| *nsid >= 0)
}

fn parse_address(body: &[u8]) -> Option<(IpAddr, AddressState)> {
    const IFA_ADDRESS: u16 = 1;
    const IFA_LOCAL: u16 = 2;
    const IFA_FLAGS: u16 = 8;
    let mut flags = u32::from(*body.get(2)?);
    let (mut address, mut local) = (None, None);
    for_each_attribute(body.get(8..)?, |kind, value| {
        match kind {
            IFA_ADDRESS => address = parse_ip(value),
            IFA_LOCAL => local = parse_ip(value),
            IFA_FLAGS => flags = u32_at(value, 0)?,
            _ => {}
        }
        Some(())
    })?;
    let state = if flags & IFA_F_DADFAILED != 0 {
        AddressState::Duplicate
    } else if flags & IFA_F_TENTATIVE != 0 && flags & IFA_F_OPTIMISTIC == 0 {
        AddressState::Tentative
    } else {
        AddressState::Usable
    };
    // On a point-to-point device IFA_ADDRESS is the peer's.
    Some((local.or(address)?, state))
}

/// Kind and value of each attribute. `None`: one is damaged, or `each` says so.
fn for_each_attribute(bytes: &[u8], mut each: impl FnMut(u16, &[u8]) -> Option<()>) -> Option<()> {
    const NLA_TYPE_MASK: u16 = 0x3fff;
    let mut rest = bytes;
    while rest.len() >= 4 {
        let length = usize::from(u16::from_ne_bytes([rest[0], rest[1]]));
        let value = rest.get(4..length)?;
        each(u16::from_ne_bytes([rest[2], rest[3]]) & NLA_TYPE_MASK, value)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(())
}

fn parse_ip(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(IpAddr::V4(Ipv4Addr::from(v4)));
    }
    <[u8; 16]>::try_from(bytes).ok().map(|v6| IpAddr::V6(Ipv6Addr::from(v6)))
}

fn push_attribute(body: &mut Vec<u8>, kind: u16, value: u32) {
    body.extend(8_u16.to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value.to_ne_bytes());
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(offset..offset + 4)?.try_into().ok()?))
}

#[cfg(fuzzing)]
pub(super) fn fuzz(bytes: &[u8]) {
    let mut rest = bytes;
    while let Some((_, body, further)) = split_message(rest) {
        assert!(further.len() < rest.len(), "no progress");
        fuzz_body(body);
        rest = further;
    }
    fuzz_body(bytes);
}

#[cfg(fuzzing)]
fn fuzz_body(body: &[u8]) {
    let _ = parse_address(body);
    let _ = parse_veth_peer(body);
    let _ = parse_nsid(body);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_parsed_with_its_wide_flags_and_its_local_end() {
        let mut body = vec![libc::AF_INET as u8, 24, 0, 0, 2, 0, 0, 0];
        push_attribute(&mut body, 1, u32::from_ne_bytes([10, 0, 0, 254]));
        push_attribute(&mut body, 2, u32::from_ne_bytes([10, 0, 0, 7]));
        push_attribute(&mut body, 8, IFA_F_TENTATIVE);
        assert_eq!(
            parse_address(&body),
            Some((IpAddr::V4(Ipv4Addr::new(10, 0, 0, 7)), AddressState::Tentative))
        );
    }

    #[test]
    fn only_a_veth_with_its_other_end_elsewhere_has_a_peer() {
        let link = |kind: &[u8], nsid: Option<u32>| {
            let mut body = vec![0; 16];
            push_attribute(&mut body, 5, 42);
            // IFLA_LINKINFO (nested) with IFLA_INFO_KIND.
            let length = 4 + kind.len() as u16;
            body.extend((4 + length.next_multiple_of(4)).to_ne_bytes());
            body.extend((18_u16 | 0x8000).to_ne_bytes());
            body.extend(length.to_ne_bytes());
            body.extend(1_u16.to_ne_bytes());
            body.extend(kind);
            body.resize(body.len().next_multiple_of(4), 0);
            if let Some(nsid) = nsid {
                push_attribute(&mut body, 37, nsid);
            }
            body
        };
        let peer = VethPeer { interface: 42, nsid: 3 };
        assert_eq!(parse_veth_peer(&link(b"veth\0", Some(3))), Some(peer));
        assert_eq!(parse_veth_peer(&link(b"veth\0", None)), None);
        assert_eq!(parse_veth_peer(&link(b"macvlan\0", Some(3))), None);
        assert_eq!(parse_veth_peer(&[0; 15]), None);
        let nsid = |nsid: i32| {
            let mut body = vec![0; 4];
            push_attribute(&mut body, 1, nsid.cast_unsigned());
            parse_nsid(&body)
        };
        assert_eq!((nsid(0), nsid(7), nsid(-1)), (Some(0), Some(7), None));
    }

    #[test]
    fn truncated_messages_are_no_messages() {
        for length in 0..HEADER_LEN {
            assert!(split_message(&vec![0xff; length]).is_none());
        }
        assert!(parse_address(&[2, 24, 0, 0, 2, 0, 0, 0, 200, 0, 1, 0]).is_none());
        assert!(parse_address(&[2, 24, 0, 0, 2, 0, 0, 0, 1, 0, 1, 0]).is_none());
    }
}
