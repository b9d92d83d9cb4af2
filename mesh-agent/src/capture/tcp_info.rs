//! What the kernel knows of a TCP connection's health. Asked of the socket by its owner: the agent's tunnels live for minutes and
//! carry many connections, so a sockops program could tell of them only at each of its 16 callbacks (0.65 µs) or too late, at
//! their close, and the workloads' names are known here and not there. One `getsockopt` is about a microsecond.
#![allow(unsafe_code, reason = "getsockopt(TCP_INFO) has no safe wrapper")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

/// The first 160 bytes of `struct tcp_info` (include/uapi/linux/tcp.h), up to `tcpi_data_segs_out`; since Linux 4.6.
const WORDS: usize = 40;
const SRTT_US: usize = 17;
const TOTAL_RETRANS: usize = 25;
const DATA_SEGS_OUT: usize = 39;

#[cfg(target_env = "gnu")]
const _: () = {
    use core::mem::offset_of;
    assert!(offset_of!(libc::tcp_info, tcpi_rtt) == 4 * SRTT_US);
    assert!(offset_of!(libc::tcp_info, tcpi_total_retrans) == 4 * TOTAL_RETRANS);
    assert!(offset_of!(libc::tcp_info, tcpi_data_segs_out) == 4 * DATA_SEGS_OUT);
};

/// Counted since the connection began; the kernel's counters wrap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpInfo {
    pub smoothed_rtt: Duration,
    /// With data, retransmissions included.
    pub sent_segments: u32,
    pub retransmitted_segments: u32,
}

/// # Errors
/// Not a TCP socket.
pub fn tcp_info(socket: &impl AsFd) -> io::Result<TcpInfo> {
    let mut words = [0_u32; WORDS];
    let mut length = size_of_val(&words) as libc::socklen_t;
    // SAFETY: the buffer lives during the call and has the length given; any bytes make integers.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            words.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(TcpInfo {
        smoothed_rtt: Duration::from_micros(words[SRTT_US].into()),
        sent_segments: words[DATA_SEGS_OUT],
        retransmitted_segments: words[TOTAL_RETRANS],
    })
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_connection_on_loopback_has_a_round_trip_and_loses_nothing() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut far, _) = listener.accept().unwrap();
        near.write_all(b"x").unwrap();
        far.read_exact(&mut [0]).unwrap();
        far.write_all(b"y").unwrap();
        near.read_exact(&mut [0]).unwrap();
        let info = tcp_info(&near).unwrap();
        assert_eq!((info.sent_segments, info.retransmitted_segments), (1, 0));
        assert!(info.smoothed_rtt > Duration::ZERO && info.smoothed_rtt < Duration::from_secs(1));
        assert!(tcp_info(&std::net::UdpSocket::bind("127.0.0.1:0").unwrap()).is_err());
    }
}
