//! The bpf(2) commands that aya has no safe call for: links that are updated in place, taking a map entry in one step, and maps
//! whose layout is another version's.
//! Layouts and numbers: include/uapi/linux/bpf.h.
#![allow(unsafe_code, reason = "the bpf(2) system call")]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_GET_NEXT_KEY: libc::c_long = 4;
const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_MAP_LOOKUP_AND_DELETE_ELEM: libc::c_long = 21;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_LINK_UPDATE: libc::c_long = 29;
const BPF_LINK_DETACH: libc::c_long = 34;

const BPF_MAP_TYPE_PERCPU_ARRAY: u32 = 6;

const BPF_LINK_TYPE_CGROUP: u32 = 3;
const BPF_LINK_TYPE_NETNS: u32 = 5;
const BPF_LINK_TYPE_TCX: u32 = 11;

const BPF_TCX_INGRESS: u32 = 46;
/// With no other program named: before all of them.
const BPF_F_BEFORE: u32 = 1 << 3;

/// Entries of a hash map are allocated when they are added.
pub const BPF_F_NO_PREALLOC: u32 = 1;

/// Where a program is attached (`enum bpf_attach_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum AttachType {
    CgroupSockCreate = 2,
    CgroupSockOps = 3,
    CgroupBind4 = 8,
    CgroupBind6 = 9,
    CgroupConnect4 = 10,
    CgroupConnect6 = 11,
    CgroupGetpeername4 = 29,
    CgroupGetpeername6 = 30,
    CgroupGetsockname4 = 31,
    CgroupGetsockname6 = 32,
    SkLookup = 36,
}

/// What every command's attributes fit into: 64 bytes, zeroed beyond what is set.
type Attributes = [u64; 8];

/// Two 32-bit fields that lie next to each other.
fn pair(low: u32, high: u32) -> u64 {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&low.to_ne_bytes());
    bytes[4..].copy_from_slice(&high.to_ne_bytes());
    u64::from_ne_bytes(bytes)
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

fn bpf(command: libc::c_long, attributes: &mut Attributes) -> io::Result<libc::c_long> {
    // SAFETY: the attributes are as long as is said; every pointer in them is to memory that the caller borrows for the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), size_of::<Attributes>()) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// The descriptor that a command returned; the kernel sets CLOEXEC on it.
fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = i32::try_from(result).map_err(io::Error::other)?;
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

/// Attaches a program to a cgroup or a network namespace.
pub fn link_create(program: BorrowedFd<'_>, target: BorrowedFd<'_>, attach_type: AttachType) -> io::Result<OwnedFd> {
    let mut attributes = Attributes::default();
    attributes[0] = pair(raw(program), raw(target));
    attributes[1] = pair(attach_type as u32, 0);
    owned(bpf(BPF_LINK_CREATE, &mut attributes)?)
}

/// Attaches a program before all others to what an interface of the calling thread's namespace receives.
pub fn link_create_tcx(program: BorrowedFd<'_>, interface: u32) -> io::Result<OwnedFd> {
    let mut attributes = Attributes::default();
    attributes[0] = pair(raw(program), interface);
    attributes[1] = pair(BPF_TCX_INGRESS, BPF_F_BEFORE);
    owned(bpf(BPF_LINK_CREATE, &mut attributes)?)
}

/// Puts another program in the place of a link's, without a gap.
pub fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attributes = Attributes::default();
    attributes[0] = pair(raw(link), raw(program));
    bpf(BPF_LINK_UPDATE, &mut attributes).map(|_| ())
}

/// Detaches a link at once; dropping the last reference does it only some time later.
pub fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attributes = Attributes::default();
    attributes[0] = pair(raw(link), 0);
    bpf(BPF_LINK_DETACH, &mut attributes).map(|_| ())
}

/// What a link is attached to: the cgroup's id, the network namespace's inode or the interface's index; 0 when that is gone.
pub fn link_target(link: BorrowedFd<'_>) -> io::Result<u64> {
    link_state(link).map(|state| state.target)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkState {
    /// As [`link_target`].
    pub target: u64,
    /// The kernel's number of the program in it.
    pub program: u32,
}

pub fn link_state(link: BorrowedFd<'_>) -> io::Result<LinkState> {
    // type, id; prog_id, padding; then by type {cgroup_id: u64, …} or {netns_ino: u32, …} or {ifindex: u32, …}.
    let info = info(link)?;
    let target = match halves(info[0])[0] {
        BPF_LINK_TYPE_CGROUP => info[2],
        BPF_LINK_TYPE_NETNS | BPF_LINK_TYPE_TCX => u64::from(halves(info[2])[0]),
        other => return Err(io::Error::other(format!("a link of unexpected type {other}"))),
    };
    Ok(LinkState {
        target,
        program: halves(info[1])[0],
    })
}

/// The kernel's number of a program.
pub fn program_id(program: BorrowedFd<'_>) -> io::Result<u32> {
    // type, id; …
    Ok(halves(info(program)?[0])[1])
}

/// The beginning of what the kernel tells of an object: the first 128 bytes.
fn info(object: BorrowedFd<'_>) -> io::Result<[u64; 16]> {
    let mut info = [0_u64; 16];
    let mut attributes = Attributes::default();
    attributes[0] = pair(raw(object), u32::try_from(size_of_val(&info)).map_err(io::Error::other)?);
    attributes[1] = (&raw mut info) as u64;
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attributes)?;
    Ok(info)
}

fn halves(word: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = word.to_ne_bytes();
    [u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h])]
}

/// What a map's entries look like, whoever made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapShape {
    pub kind: u32,
    pub key_bytes: usize,
    /// Of a value as system calls have it: with a part for each CPU, where each has its own.
    pub value_bytes: usize,
    pub max_entries: u32,
}

pub fn map_shape(map: BorrowedFd<'_>) -> io::Result<MapShape> {
    // type, id; key_size, value_size; max_entries, …
    let info = info(map)?;
    let kind = halves(info[0])[0];
    let [key_bytes, value_bytes] = halves(info[1]).map(|bytes| bytes as usize);
    let value_bytes = if kind == BPF_MAP_TYPE_PERCPU_ARRAY {
        let cpus = aya::util::nr_cpus().map_err(|(_, error)| error)?;
        value_bytes.next_multiple_of(8) * cpus
    } else {
        value_bytes
    };
    Ok(MapShape {
        kind,
        key_bytes,
        value_bytes,
        max_entries: halves(info[2])[0],
    })
}

/// The key after `last`, or the first; `None` at the end.
pub fn map_next_key(map: BorrowedFd<'_>, last: Option<&[u8]>, shape: MapShape) -> io::Result<Option<Vec<u8>>> {
    let mut next = vec![0_u8; shape.key_bytes];
    if last.is_some_and(|last| last.len() != shape.key_bytes) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut attributes = Attributes::default();
    attributes[0] = pair(raw(map), 0);
    attributes[1] = last.map_or(0, |last| last.as_ptr() as u64);
    attributes[2] = next.as_mut_ptr() as u64;
    match bpf(BPF_MAP_GET_NEXT_KEY, &mut attributes) {
        Ok(_) => Ok(Some(next)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// `None`: there is no such entry. `shape` must be the map's.
pub fn map_read(map: BorrowedFd<'_>, key: &[u8], shape: MapShape) -> io::Result<Option<Vec<u8>>> {
    if key.len() != shape.key_bytes {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut value = vec![0_u8; shape.value_bytes];
    let mut attributes = Attributes::default();
    attributes[0] = pair(raw(map), 0);
    attributes[1] = key.as_ptr() as u64;
    attributes[2] = value.as_mut_ptr() as u64;
    match bpf(BPF_MAP_LOOKUP_ELEM, &mut attributes) {
        Ok(_) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// How an entry is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Flags {
    Any = 0,
    /// Only where nothing is.
    NoExist = 1,
}

/// Key and value must be as long as the map's.
pub fn map_write(map: BorrowedFd<'_>, key: &[u8], value: &[u8], flags: Flags) -> io::Result<()> {
    let shape = map_shape(map)?;
    if key.len() != shape.key_bytes || value.len() != shape.value_bytes {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut attributes = Attributes::default();
    attributes[0] = pair(raw(map), 0);
    attributes[1] = key.as_ptr() as u64;
    attributes[2] = value.as_ptr() as u64;
    attributes[3] = flags as u64;
    bpf(BPF_MAP_UPDATE_ELEM, &mut attributes).map(|_| ())
}

/// Pins a link.
pub fn object_pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attributes = Attributes::default();
    attributes[0] = path.as_ptr() as u64;
    attributes[1] = pair(raw(object), 0);
    bpf(BPF_OBJ_PIN, &mut attributes).map(|_| ())
}

/// Opens what is pinned.
pub fn object_get(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attributes = Attributes::default();
    attributes[0] = path.as_ptr() as u64;
    owned(bpf(BPF_OBJ_GET, &mut attributes)?)
}

/// Removes an entry of a hash map and returns its value (kernel 5.14). `K` and `V` must be the map's.
pub fn map_take<K: aya::Pod, V: aya::Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<Option<V>> {
    let mut value = std::mem::MaybeUninit::<V>::zeroed();
    let mut attributes = Attributes::default();
    attributes[0] = pair(raw(map), 0);
    attributes[1] = std::ptr::from_ref(key) as u64;
    attributes[2] = value.as_mut_ptr() as u64;
    match bpf(BPF_MAP_LOOKUP_AND_DELETE_ELEM, &mut attributes) {
        // SAFETY: `Pod` is plain integers, for which zeroes and whatever the kernel wrote are values.
        Ok(_) => Ok(Some(unsafe { value.assume_init() })),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}
