//! The kernel programs: what there is, what each needs of the kernel, and loading them.

use aya::maps::Map;
use aya::programs::{Program, ProgramError};
use aya::{Ebpf, EbpfLoader};
use mesh_common::MAPS_OF_ABI;

use super::super::CaptureError;
use super::super::bpf_syscalls::AttachType;
use super::failed;
use super::versions::Pins;

/// The object that `cargo xtask build-ebpf` made; empty in an agent that was built without it.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/mesh-ebpf.o"));

/// The node's programs by function name in mesh-ebpf, where each attaches, and the kernel feature that it needs.
pub(super) const NODE_PROGRAMS: [(&str, AttachType, &str); 10] = [
    (
        "connect4",
        AttachType::CgroupConnect4,
        "cgroup/connect4 with bpf_get_netns_cookie and socket storage (5.14)",
    ),
    (
        "connect6",
        AttachType::CgroupConnect6,
        "cgroup/connect6 with bpf_get_netns_cookie and socket storage (5.14)",
    ),
    (
        "bind4",
        AttachType::CgroupBind4,
        "cgroup/bind4 with bpf_get_netns_cookie and socket storage (5.14)",
    ),
    (
        "bind6",
        AttachType::CgroupBind6,
        "cgroup/bind6 with bpf_get_netns_cookie and socket storage (5.14)",
    ),
    ("getpeername4", AttachType::CgroupGetpeername4, "cgroup/getpeername4 (5.8)"),
    ("getpeername6", AttachType::CgroupGetpeername6, "cgroup/getpeername6 (5.8)"),
    ("getsockname4", AttachType::CgroupGetsockname4, "cgroup/getsockname4 (5.8)"),
    ("getsockname6", AttachType::CgroupGetsockname6, "cgroup/getsockname6 (5.8)"),
    (
        "connection_events",
        AttachType::CgroupSockOps,
        "sockops with bpf_get_netns_cookie (5.15)",
    ),
    (
        "socket_create",
        AttachType::CgroupSockCreate,
        "cgroup/sock_create with bpf_get_netns_cookie (5.7)",
    ),
];
/// Before 5.8: CAP_SYS_ADMIN.
const RIGHTS: &str = "CAP_BPF, CAP_NET_ADMIN";
pub(super) const LOOKUP_PROGRAM: (&str, &str) = ("steer", "sk_lookup (5.9)");
pub(super) const BACKSTOP_PROGRAM: (&str, &str) = ("backstop", "tcx (6.6)");

/// Whether this agent was built with the kernel programs.
#[must_use]
pub fn has_programs() -> bool {
    !OBJECT.is_empty()
}

fn loader(pins: &Pins) -> EbpfLoader<'_> {
    let mut loader = EbpfLoader::new();
    loader.default_map_pin_directory(&pins.shared);
    // A map that is declared in BTF cannot ask for its pin by itself.
    let in_btf = [
        "AGENT_SOCKETS",
        "KUBELET_SOCKETS",
        "ORIGINAL_DESTINATIONS",
        "ORIGINAL_DESTINATIONS_OF_SOCKETS",
        "PROBE_VOUCHES",
    ];
    for name in in_btf.into_iter().chain(MAPS_OF_ABI) {
        loader.map_pin_path(name, pins.map(name));
    }
    loader
}

pub(super) fn load_node_programs(pins: &Pins, has_set_retval: bool) -> Result<Ebpf, CaptureError> {
    let has_set_retval = u32::from(has_set_retval);
    let mut programs = loader(pins)
        .override_global("HAS_SET_RETVAL", &has_set_retval, true)
        .load(OBJECT)
        .map_err(loading)?;
    for (name, _, feature) in NODE_PROGRAMS {
        let loaded = match programs.program_mut(name) {
            Some(Program::CgroupSockAddr(program)) => program.load(),
            Some(Program::CgroupSock(program)) => program.load(),
            Some(Program::SockOps(program)) => program.load(),
            _ => return Err(failed(name, "not in the object")),
        };
        loaded.map_err(|error| program_failed(name, feature, &error))?;
    }
    Ok(programs)
}

/// A Pod's instance of sk_lookup.
pub(super) fn load_lookup_program(pins: &Pins, slot: u32) -> Result<Ebpf, CaptureError> {
    let (name, feature) = LOOKUP_PROGRAM;
    let mut programs = loader(pins)
        .override_global("SLOT", &slot, true)
        .load(OBJECT)
        .map_err(loading)?;
    let Some(Program::SkLookup(program)) = programs.program_mut(name) else {
        return Err(failed(name, "not in the object"));
    };
    program.load().map_err(|error| program_failed(name, feature, &error))?;
    Ok(programs)
}

/// A Pod's instance of the backstop.
pub(super) fn load_backstop_program(pins: &Pins, netns_cookie: u64) -> Result<Ebpf, CaptureError> {
    let (name, feature) = BACKSTOP_PROGRAM;
    let mut programs = loader(pins)
        .override_global("NETNS_COOKIE", &netns_cookie, true)
        .load(OBJECT)
        .map_err(loading)?;
    let Some(Program::SchedClassifier(program)) = programs.program_mut(name) else {
        return Err(failed(name, "not in the object"));
    };
    program.load().map_err(|error| program_failed(name, feature, &error))?;
    Ok(programs)
}

fn loading(error: aya::EbpfError) -> CaptureError {
    failed(
        format!("making the maps of the kernel programs, which needs BTF, socket storage (5.2) and {RIGHTS}"),
        chain(&error),
    )
}

pub(super) fn program_failed(name: &str, feature: &str, error: &ProgramError) -> CaptureError {
    failed(
        format!("loading the kernel program {name}, which needs {feature} and {RIGHTS}"),
        chain(error),
    )
}

pub(super) fn attaching(name: &str, target: impl std::fmt::Display, error: &std::io::Error) -> CaptureError {
    failed(
        format!("attaching the kernel program {name} to {target}, which needs BPF links (5.7, for sk_lookup 5.9) and {RIGHTS}"),
        error,
    )
}

/// An error with its causes; aya keeps the reason in them.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

pub(super) fn take_map(programs: &mut Ebpf, name: &'static str) -> Result<Map, CaptureError> {
    programs.take_map(name).ok_or_else(|| failed(name, "not in the object"))
}

pub(super) fn typed<T: TryFrom<Map, Error: std::fmt::Display>>(map: Map) -> Result<T, CaptureError> {
    T::try_from(map).map_err(|error| failed("a kernel map is not of the expected type", error))
}
