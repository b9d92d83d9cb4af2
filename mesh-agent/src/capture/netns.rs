//! Entering a Pod's network namespace, for as long as a few system calls take.

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::sched::{CloneFlags, setns};
use socket2::{Domain, Socket, Type};

use super::network::{CaptureError, IoContext};

/// A network namespace, kept alive by its descriptor, and its cookie.
#[derive(Debug)]
pub struct NetNamespace {
    fd: OwnedFd,
    cookie: u64,
}

impl NetNamespace {
    /// # Errors
    /// The path cannot be opened or is no network namespace.
    pub fn open(path: &Path) -> Result<Self, CaptureError> {
        // Non-blocking: a FIFO in place of the namespace must not hang the agent.
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .step("opening the network namespace")?;
        let fd = OwnedFd::from(file);
        let cookie = {
            let _inside = Inside::enter(fd.as_fd()).step("entering the network namespace")?;
            cookie_of_this_thread()?
        };
        Ok(Self { fd, cookie })
    }

    /// # Errors
    /// No descriptor is free.
    pub fn try_clone(&self) -> Result<Self, CaptureError> {
        Ok(Self {
            fd: self.fd.try_clone().step("duplicating a network namespace's descriptor")?,
            cookie: self.cookie,
        })
    }

    /// Unique over the life of the kernel, unlike the inode, and what the programs know a Pod by.
    #[must_use]
    pub fn cookie(&self) -> u64 {
        self.cookie
    }

    /// Runs `work` on this thread inside the namespace. What it makes (sockets) stays there; it must not block for long.
    ///
    /// # Errors
    /// The namespace cannot be entered, or what `work` returns.
    pub fn run<T>(&self, work: impl FnOnce() -> Result<T, CaptureError>) -> Result<T, CaptureError> {
        let _inside = Inside::enter(self.fd.as_fd()).step("entering the network namespace")?;
        work()
    }
}

impl AsFd for NetNamespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The cookie of the namespace that the calling thread is in.
///
/// # Errors
/// No socket can be made, or the kernel is older than 5.14.
pub fn cookie_of_this_thread() -> Result<u64, CaptureError> {
    // A Unix socket belongs to a network namespace like any other, and needs no IP in it.
    let socket = Socket::new(Domain::UNIX, Type::DGRAM, None).step("making a socket in the network namespace")?;
    netns_cookie(socket.as_fd()).step("reading SO_NETNS_COOKIE (Linux 5.14 or newer is needed)")
}

#[allow(unsafe_code, reason = "neither nix nor socket2 knows SO_NETNS_COOKIE")]
fn netns_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    /// include/uapi/asm-generic/socket.h
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: `cookie` and `length` live through the call, and `length` is the size of `cookie`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 {
        Ok(cookie)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The calling thread is inside another namespace until this is dropped. Not `Send`: it must end on its own thread, and so
/// cannot be held over an await in a spawned task.
struct Inside {
    home: OwnedFd,
    _of_this_thread: PhantomData<*const ()>,
}

impl Inside {
    fn enter(namespace: BorrowedFd<'_>) -> io::Result<Self> {
        let home = OwnedFd::from(File::open("/proc/thread-self/ns/net")?);
        setns(namespace, CloneFlags::CLONE_NEWNET)?;
        Ok(Self {
            home,
            _of_this_thread: PhantomData,
        })
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        if let Err(error) = setns(&self.home, CloneFlags::CLONE_NEWNET) {
            // Whatever this thread did next would happen in a Pod's namespace: worse than an agent that is started again.
            tracing::error!(%error, "cannot return to the node's network namespace: aborting");
            std::process::abort();
        }
    }
}
