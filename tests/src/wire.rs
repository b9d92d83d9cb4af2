//! Everything that passes a network device, as a packet socket sees it.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::netns::Netns;

/// A recording ends here; the demo's whole traffic is far less.
const MAX_RECORDING_BYTES: usize = 64 << 20;
/// Large enough for a frame that segmentation offload has not cut yet.
const MAX_FRAME_BYTES: usize = 1 << 17;

#[derive(Debug)]
pub struct Recorder {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<io::Result<Recording>>,
}

/// The frames of a stretch of time, one after the other.
#[derive(Debug, Default)]
pub struct Recording {
    pub frames: usize,
    bytes: Vec<u8>,
}

impl Recorder {
    /// Records what comes and goes on a device; when this returns, the recording runs.
    ///
    /// # Errors
    /// No such device, or no right to a packet socket.
    pub fn start(netns: &Netns, device: &str) -> Result<Self> {
        let socket = netns.run(|| packet_socket(device).with_context(|| format!("a packet socket on {device}")))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || record(File::from(socket), &stopped));
        Ok(Self { stop, thread })
    }

    /// # Errors
    /// The recording failed, or is not complete.
    pub fn finish(self) -> Result<Recording> {
        // Frames that were sent before this call are in the socket's queue, and are read.
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.join() {
            Ok(recording) => Ok(recording?),
            Err(_) => bail!("the recorder's thread panicked"),
        }
    }
}

impl Recording {
    #[must_use]
    pub fn contains(&self, needle: &[u8]) -> bool {
        self.bytes.windows(needle.len()).any(|window| window == needle)
    }

    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.bytes.len()
    }
}

fn record(mut socket: File, stop: &AtomicBool) -> io::Result<Recording> {
    let mut recording = Recording::default();
    let mut frame = vec![0; MAX_FRAME_BYTES];
    // How many frames there were when it was told to stop, and how many of those were lost. A wire need not fall silent then.
    let mut wanted = None;
    loop {
        if wanted.is_none() && stop.load(Ordering::Relaxed) {
            wanted = Some(statistics(&socket)?);
        }
        if let Some((frames, dropped)) = wanted {
            if dropped > 0 {
                return Err(io::Error::other(format!(
                    "{dropped} frames were lost: the recording proves nothing"
                )));
            }
            if recording.frames >= usize::try_from(frames).map_err(io::Error::other)? {
                return Ok(recording);
            }
        }
        match socket.read(&mut frame) {
            Ok(length) => {
                recording.frames += 1;
                recording.bytes.extend_from_slice(&frame[..length]);
                if recording.bytes.len() > MAX_RECORDING_BYTES {
                    return Err(io::Error::other("the recording grew too long"));
                }
            }
            // The read's time limit passed with the queue empty: time to look whether it is to stop.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

#[allow(unsafe_code, reason = "packet sockets have no safe wrapper with a device")]
fn packet_socket(device: &str) -> io::Result<OwnedFd> {
    let name = std::ffi::CString::new(device).map_err(io::Error::other)?;
    // SAFETY: system calls with pointers to live local values of the sizes given; the descriptor is owned at once.
    unsafe {
        let every_protocol = (libc::ETH_P_ALL as u16).to_be();
        let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let socket = OwnedFd::from_raw_fd(fd);
        let index = libc::if_nametoindex(name.as_ptr());
        if index == 0 {
            return Err(io::Error::last_os_error());
        }
        let limit = libc::timeval {
            tv_sec: 0,
            tv_usec: Duration::from_millis(50).subsec_micros().into(),
        };
        set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVTIMEO, &limit)?;
        let queue_bytes: libc::c_int = 32 << 20;
        set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &queue_bytes)?;
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = every_protocol;
        address.sll_ifindex = i32::try_from(index).map_err(io::Error::other)?;
        let length = std::mem::size_of_val(&address) as libc::socklen_t;
        if libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(socket)
    }
}

#[allow(unsafe_code, reason = "a socket option without a safe wrapper")]
fn set_option<T>(socket: &OwnedFd, level: i32, name: i32, value: &T) -> io::Result<()> {
    let length = std::mem::size_of::<T>() as libc::socklen_t;
    // SAFETY: `value` lives during the call and has the length given.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, std::ptr::from_ref(value).cast(), length) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Frames since the last call of this, and how many of them were lost.
#[allow(unsafe_code, reason = "a socket option without a safe wrapper")]
fn statistics(socket: &File) -> io::Result<(u32, u32)> {
    // struct tpacket_stats (linux/if_packet.h): packets, drops.
    let mut statistics = [0_u32; 2];
    let mut length = std::mem::size_of_val(&statistics) as libc::socklen_t;
    // SAFETY: the buffer lives during the call and has the length given.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            statistics.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result == 0 {
        Ok((statistics[0], statistics[1]))
    } else {
        Err(io::Error::last_os_error())
    }
}
