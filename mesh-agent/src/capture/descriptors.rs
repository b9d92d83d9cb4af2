//! Descriptors that one process hands to another over a Unix socket (SCM_RIGHTS, unix(7)).
#![allow(unsafe_code, reason = "received descriptors are raw")]

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

/// Of one message; the kernel takes up to 253.
pub const MAX_DESCRIPTORS: usize = 8;

/// Sends bytes with descriptors; they arrive with the first of these bytes.
///
/// # Errors
/// The peer is gone, or does not read.
pub fn send(stream: &UnixStream, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let raw: Vec<RawFd> = descriptors.iter().map(|fd| fd.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[][..] } else { &rights[..] };
    let slices = [IoSlice::new(bytes)];
    let sent = loop {
        match sendmsg::<()>(stream.as_raw_fd(), &slices, control, MsgFlags::MSG_NOSIGNAL, None) {
            Err(Errno::EINTR) => {}
            sent => break sent?,
        }
    };
    io::Write::write_all(&mut &*stream, &bytes[sent..])
}

/// Fills `bytes`, and returns the descriptors that came with them.
///
/// # Errors
/// The peer is gone, is silent for longer than the socket's timeout, or sends more descriptors than [`MAX_DESCRIPTORS`].
pub fn receive(stream: &UnixStream, bytes: &mut [u8]) -> io::Result<Vec<OwnedFd>> {
    loop {
        match receive_once(stream, bytes) {
            // A signal, of a child that ended: nothing was taken.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            received => return received,
        }
    }
}

fn receive_once(stream: &UnixStream, bytes: &mut [u8]) -> io::Result<Vec<OwnedFd>> {
    let mut space = nix::cmsg_space!([RawFd; MAX_DESCRIPTORS]);
    let (received, descriptors, is_cut) = {
        let mut slices = [IoSliceMut::new(bytes)];
        let message = recvmsg::<()>(stream.as_raw_fd(), &mut slices, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
        let mut descriptors = Vec::new();
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = control {
                // SAFETY: the kernel has just made these descriptors for this process; nobody else knows of them.
                descriptors.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        (message.bytes, descriptors, message.flags.contains(MsgFlags::MSG_CTRUNC))
    };
    if is_cut {
        return Err(io::Error::other("descriptors were lost on the way"));
    }
    if received == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    io::Read::read_exact(&mut &*stream, &mut bytes[received..])?;
    Ok(descriptors)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn descriptors_arrive_with_their_message_and_are_closed_on_exec() {
        let (here, there) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        send(&here, b"two ", &[file.as_fd(), here.as_fd()]).unwrap();
        send(&here, b"none", &[]).unwrap();
        let mut bytes = [0; 4];
        let descriptors = receive(&there, &mut bytes).unwrap();
        assert_eq!((&bytes, descriptors.len()), (b"two ", 2));
        for fd in &descriptors {
            let flags = nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_GETFD).unwrap();
            assert_eq!(flags, libc::FD_CLOEXEC);
        }
        assert!(receive(&there, &mut bytes).unwrap().is_empty());
        drop(here);
        drop(descriptors);
        assert!(receive(&there, &mut bytes).is_err());
    }
}
