//! Connections that a Pod had open before it was enrolled. They are left alone, and counted until they close.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use super::network::{CaptureError, IoContext as _};

/// Remembered of a Pod: 8 B each, 20 as text in its record. Of more, the count is a lower bound.
const MAX_REMEMBERED: usize = 8192;
const STEP: &str = "looking for the Pod's open connections";

/// Inodes of the sockets in the namespace of the calling thread that are connected to elsewhere; at most [`MAX_REMEMBERED`].
pub(super) fn open_connections() -> Result<Vec<u64>, CaptureError> {
    let mut open = Vec::new();
    for_each_line(|line| {
        if open.len() < MAX_REMEMBERED {
            open.extend(connected_elsewhere(line));
        }
    })?;
    Ok(open)
}

/// Of these, those that are still open.
pub(super) fn still_open(before: &[u64]) -> Result<Vec<u64>, CaptureError> {
    let mut open = Vec::new();
    for_each_line(|line| open.extend(connected_elsewhere(line).filter(|inode| before.contains(inode))))?;
    Ok(open)
}

fn for_each_line(mut each: impl FnMut(&str)) -> Result<(), CaptureError> {
    for table in ["tcp", "tcp6"] {
        let file = match File::open(Path::new("/proc/thread-self/net").join(table)) {
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            file => file.step(STEP)?,
        };
        for line in BufReader::new(file).lines().skip(1) {
            each(&line.step(STEP)?);
        }
    }
    Ok(())
}

/// A line of proc_net_tcp(5): number, local address, remote address, state, queues, timer, retransmits, uid, timeout, inode.
fn connected_elsewhere(line: &str) -> Option<u64> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let [_, local, remote, state, _, _, _, _, _, inode, ..] = *fields.as_slice() else {
        return None;
    };
    // include/net/tcp_states.h: established, the two that wait for the peer's FIN, and the one that waits for its own.
    let is_connected = matches!(state, "01" | "04" | "05" | "08");
    let (local, remote) = (address(local)?, address(remote)?);
    let stays = remote.is_loopback() || remote == local;
    // An orphan, which its application has closed already, has inode 0.
    inode.parse().ok().filter(|inode| is_connected && !stays && *inode != 0)
}

/// Words in the machine's byte order, of bytes in the network's.
fn address(text: &str) -> Option<IpAddr> {
    let hex = text.split(':').next()?;
    let words: Option<Vec<[u8; 4]>> = (0..hex.len() / 8)
        .map(|i| Some(u32::from_str_radix(hex.get(i * 8..i * 8 + 8)?, 16).ok()?.to_ne_bytes()))
        .collect();
    let ip = match *words?.as_slice() {
        [v4] => Ipv4Addr::from(v4).into(),
        [a, b, c, d] => {
            let mut bytes = [0; 16];
            for (chunk, word) in bytes.chunks_exact_mut(4).zip([a, b, c, d]) {
                chunk.copy_from_slice(&word);
            }
            IpAddr::from(Ipv6Addr::from(bytes))
        }
        _ => return None,
    };
    Some(ip.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As a little-endian machine shows them.
    #[cfg(target_endian = "little")]
    #[test]
    fn only_living_connections_that_leave_the_pod_count() {
        let line = |remote: &str, state: &str, inode: &str| {
            format!(
                "   3: 0201A8C0:1F90 {remote} {state} 00000000:00000000 00:00000000 00000000     0        0 {inode} 1 0000 100"
            )
        };
        for (remote, state, inode, expected) in [
            ("0101A8C0:C350", "01", "4711", Some(4711)),
            ("0101A8C0:C350", "08", "4711", Some(4711)),
            ("0101A8C0:C350", "0A", "4711", None),
            ("0101A8C0:C350", "06", "0", None),
            ("0101A8C0:C350", "04", "0", None),
            ("0100007F:C350", "01", "4711", None),
            ("0201A8C0:C350", "01", "4711", None),
            ("000080FE00000000FF565002FD16F8FE:C350", "01", "4711", Some(4711)),
            ("0000000000000000FFFF00000100007F:C350", "01", "4711", None),
            ("00000000000000000000000001000000:C350", "01", "4711", None),
            ("nonsense", "01", "4711", None),
        ] {
            assert_eq!(connected_elsewhere(&line(remote, state, inode)), expected, "{remote} {state}");
        }
        assert_eq!(connected_elsewhere(""), None);
    }
}
