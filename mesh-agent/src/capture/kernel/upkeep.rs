//! Putting back what somebody took from the node's half of the capture while the agent runs: links at the cgroup root, pins. The
//! programs and maps live on in this process's descriptors, so that what is put back is what was there, with all that it holds.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use aya::Ebpf;

use super::super::CaptureError;
use super::super::bpf_syscalls::{self, AttachType};
use super::pins::{NewLinks, attach, prepare_pins};
use super::programs::{NODE_PROGRAMS, attaching};
use super::versions::{self, Pins};
use super::{Kernel, failed};

/// What an agent keeps open to be able to put it back: some 20 descriptors.
pub(super) struct Kept {
    programs: Vec<(&'static str, AttachType, OwnedFd)>,
    /// By the names of their pins.
    maps: Vec<(String, OwnedFd)>,
    cgroup: File,
    cgroup_id: u64,
    /// Looks at what is missing.
    turns: AtomicU32,
}

/// In how many looks the map of the mesh is compared once.
const DESTINATIONS_EVERY: u32 = 5;

impl Kept {
    /// After the programs are loaded, and with them the maps pinned.
    pub(super) fn of(programs: &Ebpf, pins: &Pins, cgroup: File, cgroup_id: u64) -> Result<Self, CaptureError> {
        let of_programs = NODE_PROGRAMS.iter().map(|(name, attach_type, _)| {
            let program = programs.program(name).ok_or_else(|| failed(name, "not in the object"))?;
            let fd = program.fd().map_err(|error| failed(name, error))?;
            let fd = fd.as_fd().try_clone_to_owned().map_err(|error| failed(name, error))?;
            Ok((*name, *attach_type, fd))
        });
        let of_programs = of_programs.collect::<Result<_, CaptureError>>()?;
        let names = pins.maps().map_err(|error| failed(pins.shared.display(), error))?;
        let maps = names
            .into_iter()
            .map(|name| versions::open(&pins.map(&name)).map(|map| (name, map)));
        let maps = maps.collect::<Result<_, _>>()?;
        Ok(Self {
            programs: of_programs,
            maps,
            cgroup,
            cgroup_id,
            turns: AtomicU32::new(0),
        })
    }
}

impl Kernel {
    /// Attaches and pins the programs that are no longer attached; `new_links` gets those that were not.
    pub(super) fn attach_all(&self, names: &[&'static str], new_links: &mut NewLinks) -> Result<(), CaptureError> {
        let Kept {
            programs,
            cgroup,
            cgroup_id,
            ..
        } = &self.kept;
        for (name, attach_type, program) in programs.iter().filter(|(name, ..)| names.contains(name)) {
            let pin = self.link_pin(name);
            let attached = attach(program.as_fd(), cgroup.as_fd(), *cgroup_id, *attach_type, &pin);
            let is_new = attached.map_err(|error| match error.kind() {
                // Root is refused only where somebody attached without BPF_F_ALLOW_MULTI, here or further up.
                io::ErrorKind::PermissionDenied => failed(
                    format!("attaching {name}"),
                    format!(
                        "{error}: another program may be attached to this cgroup, or to one above it, as the only one \
                             (`bpftool cgroup tree` shows it): let its owner attach it with BPF_F_ALLOW_MULTI or by a link"
                    ),
                ),
                _ => attaching(name, "the cgroup root", &error),
            })?;
            if is_new {
                new_links.add(pin.clone());
            }
            self.note_program(pin, program.as_fd()).map_err(|error| failed(name, error))?;
        }
        Ok(())
    }

    pub(super) fn link_pin(&self, program: &str) -> PathBuf {
        self.pins.shared.join("links").join(program)
    }

    /// Remembers what this agent has put into a link.
    pub(super) fn note_program(&self, pin: PathBuf, program: BorrowedFd<'_>) -> io::Result<()> {
        let id = bpf_syscalls::program_id(program)?;
        self.own_programs.lock().insert(pin, id);
        Ok(())
    }

    /// Whether the link that is pinned there has this agent's program. Not so after another agent began to take over, and ended: what
    /// that one's programs look at may be maps of its own, which nobody keeps.
    pub(super) fn has_own_program(&self, pin: &Path) -> io::Result<bool> {
        let link = bpf_syscalls::object_get(pin)?;
        let program = bpf_syscalls::link_state(link.as_fd())?.program;
        Ok(self.own_programs.lock().get(pin) == Some(&program))
    }

    /// No other agent runs here any more, but to drain: what other ABI versions left is removed, now and whenever it appears again.
    ///
    /// # Errors
    /// It cannot be removed; every repair tries again.
    pub fn stand_alone(&self) -> Result<(), CaptureError> {
        self.is_alone.store(true, Ordering::Relaxed);
        self.pins.remove_others().map(|_| ())
    }

    /// Puts back what is missing, and names it. What is only lost in the kernel's memory of beats is written by every beat; here it is
    /// told.
    ///
    /// # Errors
    /// Something is missing and cannot be put back.
    pub fn repair(&self) -> Result<Vec<String>, CaptureError> {
        let mut repaired = Vec::new();
        let detached = self.lost_programs();
        let unpinned: Vec<_> = self
            .kept
            .maps
            .iter()
            .filter(|(name, _)| !self.pins.map(name).exists())
            .collect();
        if !detached.is_empty() || !unpinned.is_empty() {
            // Its folders may be gone as well.
            if let Some(pin_path) = self.pins.shared.parent() {
                prepare_pins(pin_path)?;
            }
        }
        // Those that could be put back stay.
        let mut new_links = NewLinks::default();
        let attached = self.attach_all(&detached, &mut new_links);
        new_links.keep();
        attached?;
        repaired.extend(detached.into_iter().map(str::to_owned));
        for (name, map) in unpinned {
            bpf_syscalls::object_pin(map.as_fd(), &self.pins.map(name))
                .map_err(|error| failed(format!("pinning {name}"), error))?;
            repaired.push(format!("pin of {name}"));
        }
        if self.is_alone.load(Ordering::Relaxed) {
            self.pins.remove_others()?;
        }
        if self.erased_beats.swap(0, Ordering::Relaxed) > 0 {
            repaired.push("heartbeat".to_owned());
        }
        if self.probes.repair_kubelet(self.is_alone.load(Ordering::Relaxed))? {
            repaired.push("kubelet".to_owned());
        }
        // Two system calls an entry, and it may have thousands.
        let turn = self.kept.turns.fetch_add(1, Ordering::Relaxed);
        if turn.is_multiple_of(DESTINATIONS_EVERY) && self.mesh_destinations.lock().repair()? {
            repaired.push("mesh_destinations".to_owned());
        }
        Ok(repaired)
    }
}
