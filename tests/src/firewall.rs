//! Whether a network namespace has rules of nftables or of legacy iptables, asked of the kernel itself: the commands `nft` and
//! `iptables` may not be there, and see one kind each. (`iptables-nft` makes nftables tables.)

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use anyhow::{Context as _, Result, bail};

use crate::netns::Netns;

// linux/netfilter/nfnetlink.h and nf_tables.h.
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_NEWTABLE: u16 = 0;
const NFT_MSG_GETTABLE: u16 = 1;
const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
const NFTA_TABLE_NAME: u16 = 1;
/// struct nlmsghdr (16) and struct nfgenmsg (4).
const HEADER_BYTES: usize = 20;
/// Tables that are named; more would only make the same sentence longer.
const MAX_ANSWER_BYTES: usize = 64 << 10;

/// The tables of both kinds, as "nftables x" or "iptables filter". A rule lives in a table: without one there is none.
///
/// # Errors
/// The kernel does not answer: then nothing is known.
pub fn tables(netns: &Netns) -> Result<Vec<String>> {
    netns.run(|| {
        let mut tables = nftables().context("asking for the tables of nftables")?;
        for file in ["ip_tables_names", "ip6_tables_names", "arp_tables_names"] {
            // Not /proc/net: that is the main thread's. Without legacy iptables in the kernel there is no file.
            let names = std::fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap_or_default();
            let kind = file.trim_end_matches("_tables_names");
            tables.extend(names.lines().map(|name| format!("legacy {kind}tables {name}")));
        }
        Ok(tables)
    })
}

fn nftables() -> Result<Vec<String>> {
    let socket = match netlink() {
        Ok(socket) => socket,
        // A kernel without netfilter has no rules.
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let flags = libc::NLM_F_REQUEST | libc::NLM_F_DUMP;
    send(&socket, &message(nftables_type(NFT_MSG_GETTABLE), flags, 0, &[]))?;
    let mut tables = Vec::new();
    loop {
        for (kind, body) in messages(&receive(&socket)?)? {
            match i32::from(kind) {
                libc::NLMSG_DONE => return Ok(tables),
                // A kernel without nftables knows no such subsystem.
                libc::NLMSG_ERROR if errno(&body) == -libc::EINVAL => return Ok(tables),
                libc::NLMSG_ERROR => bail!("the kernel answered {}", errno(&body)),
                _ if kind == nftables_type(NFT_MSG_NEWTABLE) => tables.push(format!("nftables {}", table_name(&body))),
                _ => {}
            }
        }
    }
}

/// Makes an nftables table without chains: what the search must find.
///
/// # Errors
/// The kernel has no nftables, or refuses.
pub fn add_table(netns: &Netns, name: &str) -> Result<()> {
    let mut attribute = vec![0; 4];
    attribute.extend_from_slice(name.as_bytes());
    attribute.push(0);
    let length = u16::try_from(attribute.len())?;
    attribute[..2].copy_from_slice(&length.to_ne_bytes());
    attribute[2..4].copy_from_slice(&NFTA_TABLE_NAME.to_ne_bytes());
    attribute.resize(attribute.len().next_multiple_of(4), 0);
    let create = libc::NLM_F_REQUEST | libc::NLM_F_CREATE | libc::NLM_F_ACK;
    let batch = [
        message(NFNL_MSG_BATCH_BEGIN, libc::NLM_F_REQUEST, NFNL_SUBSYS_NFTABLES, &[]),
        message(nftables_type(NFT_MSG_NEWTABLE), create, 0, &attribute),
        message(NFNL_MSG_BATCH_END, libc::NLM_F_REQUEST, NFNL_SUBSYS_NFTABLES, &[]),
    ]
    .concat();
    netns.run(|| {
        let socket = netlink()?;
        send(&socket, &batch)?;
        for (kind, body) in messages(&receive(&socket)?)? {
            if i32::from(kind) == libc::NLMSG_ERROR && errno(&body) != 0 {
                bail!("making a table: the kernel answered {}", errno(&body));
            }
        }
        Ok(())
    })
}

fn nftables_type(message: u16) -> u16 {
    NFNL_SUBSYS_NFTABLES << 8 | message
}

fn message(kind: u16, flags: i32, resource: u16, attributes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADER_BYTES + attributes.len()).unwrap_or(u32::MAX);
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&length.to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(&(flags as u16).to_ne_bytes());
    // Sequence and port: the kernel fills in what it needs.
    bytes.extend_from_slice(&[0; 8]);
    // struct nfgenmsg: the family (tables are made for IPv4, and asked for in all), version 0, resource.
    let family = if kind == nftables_type(NFT_MSG_NEWTABLE) {
        libc::AF_INET
    } else {
        libc::AF_UNSPEC
    };
    bytes.extend_from_slice(&[family as u8, 0]);
    bytes.extend_from_slice(&resource.to_be_bytes());
    bytes.extend_from_slice(attributes);
    bytes
}

/// Each message's type and what follows its struct nlmsghdr.
fn messages(mut bytes: &[u8]) -> Result<Vec<(u16, Vec<u8>)>> {
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let length = bytes.first_chunk::<4>().context("a cut message")?;
        let length = u32::from_ne_bytes(*length) as usize;
        let kind = bytes
            .get(4..6)
            .and_then(|kind| kind.first_chunk::<2>())
            .context("a cut message")?;
        let body = bytes.get(16..length).context("a cut message")?;
        all.push((u16::from_ne_bytes(*kind), body.to_vec()));
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(all)
}

fn errno(body: &[u8]) -> i32 {
    body.first_chunk::<4>().map_or(i32::MIN, |code| i32::from_ne_bytes(*code))
}

/// The first attribute of a table is its name.
fn table_name(body: &[u8]) -> String {
    let name = body.get(8..).unwrap_or_default();
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    String::from_utf8_lossy(&name[..end]).into_owned()
}

#[allow(unsafe_code, reason = "netlink sockets have no safe wrapper here")]
fn netlink() -> io::Result<OwnedFd> {
    // SAFETY: a plain system call; the descriptor is owned at once.
    unsafe {
        let fd = libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_NETFILTER);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

fn send(socket: &OwnedFd, bytes: &[u8]) -> Result<()> {
    nix::sys::socket::send(socket.as_raw_fd(), bytes, nix::sys::socket::MsgFlags::empty()).context("sending")?;
    Ok(())
}

fn receive(socket: &OwnedFd) -> Result<Vec<u8>> {
    let mut buffer = vec![0; MAX_ANSWER_BYTES];
    let length =
        nix::sys::socket::recv(socket.as_raw_fd(), &mut buffer, nix::sys::socket::MsgFlags::empty()).context("receiving")?;
    buffer.truncate(length);
    Ok(buffer)
}
