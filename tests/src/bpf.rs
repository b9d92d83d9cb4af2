//! bpf(2) by hand: what an operator with other eBPF software, or a clumsy one, does to the kernel's half of the mesh. Numbers and
//! layouts are of include/uapi/linux/bpf.h.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use anyhow::{Context as _, Result};

const MAP_CREATE: libc::c_long = 0;
const MAP_LOOKUP_ELEM: libc::c_long = 1;
const MAP_UPDATE_ELEM: libc::c_long = 2;
const MAP_DELETE_ELEM: libc::c_long = 3;
const MAP_GET_NEXT_KEY: libc::c_long = 4;
const PROG_LOAD: libc::c_long = 5;
const OBJ_GET: libc::c_long = 7;
const PROG_ATTACH: libc::c_long = 8;
const PROG_DETACH: libc::c_long = 9;
const PROG_GET_NEXT_ID: libc::c_long = 11;
const PROG_GET_FD_BY_ID: libc::c_long = 13;
const OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const LINK_GET_FD_BY_ID: libc::c_long = 30;
const LINK_GET_NEXT_ID: libc::c_long = 31;
const LINK_DETACH: libc::c_long = 34;

const MAP_TYPE_ARRAY: u32 = 2;
/// Larger than any value here.
const MAX_VALUE_BYTES: usize = 1024;

/// How a program is attached to a cgroup beside, or instead of, others.
pub const ALLOW_MULTI: u32 = 2;
pub const EXCLUSIVE: u32 = 0;

type Attributes = [u64; 18];

fn bpf(command: libc::c_long, attributes: &mut Attributes) -> io::Result<i32> {
    // SAFETY: the attributes live during the call and are as long as is said; each pointer in them is to a value that the caller
    // holds for the call, and as long as the object says.
    #[allow(unsafe_code, reason = "the bpf(2) system call")]
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), size_of::<Attributes>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    i32::try_from(result).map_err(io::Error::other)
}

fn owned(descriptor: i32) -> OwnedFd {
    // SAFETY: a new descriptor that nobody else owns.
    #[allow(unsafe_code, reason = "a descriptor from a system call")]
    unsafe {
        OwnedFd::from_raw_fd(descriptor)
    }
}

fn pair(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

fn raw(descriptor: &OwnedFd) -> u32 {
    descriptor.as_raw_fd().cast_unsigned()
}

/// Opens what is pinned.
///
/// # Errors
/// Nothing is, or no rights.
pub fn open(pin: &Path) -> Result<OwnedFd> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let mut attributes = Attributes::default();
    attributes[0] = path.as_ptr() as u64;
    let descriptor = bpf(OBJ_GET, &mut attributes).with_context(|| format!("opening {}", pin.display()))?;
    Ok(owned(descriptor))
}

/// Detaches a link, and leaves its pin.
///
/// # Errors
/// It is no link.
pub fn detach(pin: &Path) -> Result<()> {
    let link = open(pin)?;
    let mut attributes = Attributes::default();
    attributes[0] = pair(raw(&link), 0);
    bpf(LINK_DETACH, &mut attributes).with_context(|| format!("detaching {}", pin.display()))?;
    Ok(())
}

fn element(map: &OwnedFd, key: &[u8], value: &mut [u8; MAX_VALUE_BYTES]) -> Attributes {
    let mut attributes = Attributes::default();
    attributes[0] = pair(raw(map), 0);
    attributes[1] = key.as_ptr() as u64;
    attributes[2] = value.as_mut_ptr() as u64;
    attributes
}

/// A value, and zeros after it.
///
/// # Errors
/// No such entry.
pub fn read(map: &OwnedFd, key: &[u8]) -> Result<[u8; MAX_VALUE_BYTES]> {
    let mut value = [0; MAX_VALUE_BYTES];
    bpf(MAP_LOOKUP_ELEM, &mut element(map, key, &mut value)).context("reading an entry")?;
    Ok(value)
}

/// As long as the map's values are; the rest is not looked at.
///
/// # Errors
/// The map refuses.
pub fn write(map: &OwnedFd, key: &[u8], mut value: [u8; MAX_VALUE_BYTES]) -> Result<()> {
    bpf(MAP_UPDATE_ELEM, &mut element(map, key, &mut value)).context("writing an entry")?;
    Ok(())
}

/// # Errors
/// No such entry.
pub fn erase(map: &OwnedFd, key: &[u8]) -> Result<()> {
    let mut attributes = Attributes::default();
    attributes[0] = pair(raw(map), 0);
    attributes[1] = key.as_ptr() as u64;
    bpf(MAP_DELETE_ELEM, &mut attributes).context("erasing an entry")?;
    Ok(())
}

/// Any key of a map whose keys are so long; none where it is empty.
///
/// # Errors
/// The map refuses.
pub fn first_key(map: &OwnedFd, key_bytes: usize) -> Result<Option<Vec<u8>>> {
    let mut key = vec![0; key_bytes];
    let mut attributes = Attributes::default();
    attributes[0] = pair(raw(map), 0);
    attributes[2] = key.as_mut_ptr() as u64;
    match bpf(MAP_GET_NEXT_KEY, &mut attributes) {
        Ok(_) => Ok(Some(key)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).context("asking for a key"),
    }
}

/// The programs that use a map, and their links, of all that the kernel has: who holds them, and whether anybody does, is not asked.
///
/// # Errors
/// No rights.
pub fn users(map: &OwnedFd) -> Result<(usize, usize)> {
    // `struct bpf_map_info`, `bpf_prog_info` and `bpf_link_info`: the id is the second number, a link's program the third.
    let map = info(map, [0; INFO_WORDS])?[0] >> 32;
    let mut programs = Vec::new();
    for program in objects(PROG_GET_NEXT_ID, PROG_GET_FD_BY_ID)? {
        let mut maps = [0_u32; 64];
        let mut asked = [0; INFO_WORDS];
        // nr_map_ids; map_ids.
        asked[6] = pair(0, 64);
        asked[7] = maps.as_mut_ptr() as u64;
        let told = info(&program, asked)?;
        if maps.iter().any(|id| u64::from(*id) == map) {
            programs.push(told[0] >> 32);
        }
    }
    let mut links = 0;
    for link in objects(LINK_GET_NEXT_ID, LINK_GET_FD_BY_ID)? {
        let program = info(&link, [0; INFO_WORDS])?[1] & u64::from(u32::MAX);
        links += usize::from(programs.contains(&program));
    }
    Ok((programs.len(), links))
}

/// The kernel's number of the program in a pinned link.
///
/// # Errors
/// Nothing is pinned there.
pub fn program_in(pin: &Path) -> Result<u64> {
    // `struct bpf_link_info`: the program's id is the third number.
    Ok(info(&open(pin)?, [0; INFO_WORDS])?[1] & u64::from(u32::MAX))
}

/// Enough for what is asked here.
const INFO_WORDS: usize = 16;

fn info(object: &OwnedFd, mut asked: [u64; INFO_WORDS]) -> Result<[u64; INFO_WORDS]> {
    let mut attributes = Attributes::default();
    attributes[0] = pair(raw(object), u32::try_from(size_of_val(&asked))?);
    attributes[1] = asked.as_mut_ptr() as u64;
    bpf(OBJ_GET_INFO_BY_FD, &mut attributes).context("asking of an object")?;
    Ok(asked)
}

/// How often a link that is just being made is asked for again; that takes the kernel microseconds.
const ATTEMPTS: usize = 1_000;

/// All of a kind that are there while it asks; what goes away meanwhile is left out.
fn objects(next: libc::c_long, open: libc::c_long) -> Result<Vec<OwnedFd>> {
    let gone = |error: &io::Error| error.raw_os_error() == Some(libc::ENOENT);
    let mut found = Vec::new();
    let mut id = 0;
    loop {
        let mut attributes = Attributes::default();
        attributes[0] = pair(id, 0);
        match bpf(next, &mut attributes) {
            Err(error) if gone(&error) => return Ok(found),
            result => result.context("walking through the objects")?,
        };
        id = u32::try_from(attributes[0] >> 32)?;
        let mut attempts = ATTEMPTS;
        loop {
            attributes[0] = pair(id, 0);
            match bpf(open, &mut attributes) {
                Err(error) if gone(&error) => break,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && attempts > 0 => {
                    attempts -= 1;
                    std::thread::yield_now();
                }
                result => {
                    found.push(owned(result.context("opening an object")?));
                    break;
                }
            }
        }
    }
}

/// One number that programs count in.
#[derive(Debug)]
pub struct Count(OwnedFd);

impl Count {
    /// # Errors
    /// No rights.
    pub fn new() -> Result<Self> {
        let mut attributes = Attributes::default();
        // map_type, key_size; value_size, max_entries.
        attributes[0] = pair(MAP_TYPE_ARRAY, 4);
        attributes[1] = pair(8, 1);
        let map = bpf(MAP_CREATE, &mut attributes).context("making a map")?;
        Ok(Self(owned(map)))
    }

    /// # Errors
    /// The map cannot be read.
    pub fn get(&self) -> Result<u64> {
        let value = read(&self.0, &0_u32.to_ne_bytes())?;
        Ok(u64::from_ne_bytes(value[..8].try_into()?))
    }
}

/// Another maker's program, attached to a cgroup until it is dropped.
#[derive(Debug)]
pub struct Attached {
    program: OwnedFd,
    cgroup: std::fs::File,
    attach_type: u32,
}

/// What it is attached as: program type and attach type.
#[derive(Clone, Copy, Debug)]
pub struct Hook(u32, u32);

pub const CONNECT4: Hook = Hook(18, 10);
pub const SOCK_OPS: Hook = Hook(13, 3);

impl Attached {
    /// A program that counts its calls and lets everything pass.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn counting(cgroup: &Path, hook: Hook, flags: u32, count: &Count) -> Result<Self> {
        let mut program = Vec::new();
        program.extend(add_one(&count.0));
        program.extend([MOV_R0_1, EXIT]);
        Self::attach(cgroup, hook, flags, &program)
    }

    /// A sockops program that asks to be called at every measured round trip of what connects, and counts these calls.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn counting_round_trips(cgroup: &Path, count: &Count) -> Result<Self> {
        const TCP_CONNECT_CB: u32 = 3;
        const RTT_CB: u32 = 12;
        const RTT_CB_FLAG: u32 = 1 << 3;
        const CB_FLAGS_SET: u32 = 59;
        let add = add_one(&count.0);
        let skip_add = u16::try_from(add.len())?;
        let mut program = vec![
            // r6 = the context, r7 = its `op`.
            instruction(0xbf, 6, 1, 0, 0),
            instruction(0x61, 7, 6, 0, 0),
            // At a connect: the flag.
            instruction(0x55, 7, 0, 3, TCP_CONNECT_CB),
            instruction(0xbf, 1, 6, 0, 0),
            instruction(0xb7, 2, 0, 0, RTT_CB_FLAG),
            instruction(0x85, 0, 0, 0, CB_FLAGS_SET),
            instruction(0x55, 7, 0, skip_add, RTT_CB),
        ];
        program.extend(add);
        program.extend([MOV_R0_1, EXIT]);
        Self::attach(cgroup, SOCK_OPS, ALLOW_MULTI, &program)
    }

    fn attach(cgroup: &Path, Hook(program_type, attach_type): Hook, flags: u32, instructions: &[u64]) -> Result<Self> {
        let cgroup = std::fs::File::open(cgroup)?;
        let mut attributes = Attributes::default();
        // prog_type, insn_cnt; insns; license; …; expected_attach_type.
        attributes[0] = pair(program_type, u32::try_from(instructions.len())?);
        attributes[1] = instructions.as_ptr() as u64;
        attributes[2] = c"GPL".as_ptr() as u64;
        attributes[8] = pair(0, attach_type);
        let program = owned(bpf(PROG_LOAD, &mut attributes).context("loading a program")?);
        let mut attributes = Attributes::default();
        // target_fd, attach_bpf_fd; attach_type, attach_flags.
        attributes[0] = pair(cgroup.as_raw_fd().cast_unsigned(), raw(&program));
        attributes[1] = pair(attach_type, flags);
        bpf(PROG_ATTACH, &mut attributes).context("attaching a program")?;
        Ok(Self {
            program,
            cgroup,
            attach_type,
        })
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let mut attributes = Attributes::default();
        attributes[0] = pair(self.cgroup.as_raw_fd().cast_unsigned(), raw(&self.program));
        attributes[1] = pair(self.attach_type, 0);
        // Its cgroup may be gone.
        let _ = bpf(PROG_DETACH, &mut attributes);
    }
}

const MOV_R0_1: u64 = instruction(0xb7, 0, 0, 0, 1);
const EXIT: u64 = instruction(0x95, 0, 0, 0, 0);

const fn instruction(opcode: u8, destination: u8, source: u8, offset: u16, immediate: u32) -> u64 {
    opcode as u64 | ((destination | source << 4) as u64) << 8 | (offset as u64) << 16 | (immediate as u64) << 32
}

/// The first entry of an array goes up by one; r6 to r9 stay.
fn add_one(map: &OwnedFd) -> Vec<u64> {
    const MAP_LOOKUP: u32 = 1;
    vec![
        // *(u32 *)(r10 - 4) = 0; r2 = r10 - 4; r1 = the map.
        instruction(0x62, 10, 0, (-4_i16).cast_unsigned(), 0),
        instruction(0xbf, 2, 10, 0, 0),
        instruction(0x07, 2, 0, 0, (-4_i32).cast_unsigned()),
        instruction(0x18, 1, 1, 0, raw(map)),
        0,
        instruction(0x85, 0, 0, 0, MAP_LOOKUP),
        // if r0 != 0: atomic *(u64 *)r0 += 1.
        instruction(0x15, 0, 0, 2, 0),
        instruction(0xb7, 1, 0, 0, 1),
        instruction(0xdb, 0, 1, 0, 0),
    ]
}
