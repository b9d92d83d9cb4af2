//! The tcx program at the node's end of each Pod's veth. A Pod may have several such ends; each link is pinned in the Pod's folder
//! below `backstops/`, by the interface's index.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;

use aya::programs::Program;

use super::pin_names::{pin_name, pod_uid};
use super::pins::{detach, names_in};
use super::programs::{BACKSTOP_PROGRAM, load_backstop_program};
use super::{Kernel, bpf_syscalls, failed};
use crate::capture::{CaptureError, heap};

/// Below the storage version's directory.
pub(super) const DIRECTORY: &str = "backstops";

impl Kernel {
    /// Attaches the Pod's own instance of the program to interfaces of the calling thread's network namespace, before any other
    /// program that is there; where it is attached already it is replaced without a gap.
    ///
    /// # Errors
    /// The kernel has no tcx (6.6), or an interface is gone.
    pub fn attach_backstop(&self, netns_cookie: u64, pod_uid: &str, interfaces: &[u32]) -> Result<(), CaptureError> {
        let (name, feature) = BACKSTOP_PROGRAM;
        let programs = load_backstop_program(&self.pins, netns_cookie)?;
        let Some(Program::SchedClassifier(program)) = programs.program(name) else {
            return Err(failed(name, "not in the object"));
        };
        let program = program.fd().map_err(|error| failed(name, error))?;
        let directory = self.backstops_of(pod_uid);
        match DirBuilder::new().mode(0o700).create(&directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(directory.display(), error)),
            _ => {}
        }
        for interface in interfaces {
            let pin = directory.join(interface.to_string());
            let attached = match bpf_syscalls::object_get(&pin) {
                Ok(link) if bpf_syscalls::link_target(link.as_fd()).is_ok_and(|target| target == u64::from(*interface)) => {
                    bpf_syscalls::link_update(link.as_fd(), program.as_fd())
                }
                // Detached, or its interface is gone and another has the number.
                Ok(link) => detach(link.as_fd(), &pin).and_then(|()| attach_new(program.as_fd(), *interface, &pin)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => attach_new(program.as_fd(), *interface, &pin),
                Err(error) => Err(error),
            };
            let noted = attached.and_then(|()| self.note_program(pin, program.as_fd()));
            noted.map_err(|error| {
                failed(
                    format!("attaching {name}, which needs {feature}, to interface {interface} of Pod {pod_uid}"),
                    error,
                )
            })?;
        }
        drop(programs);
        heap::trim();
        Ok(())
    }

    /// The interfaces that a Pod's program is attached to. Pins of links that are detached, or whose interface is gone, are removed.
    ///
    /// # Errors
    /// The pins cannot be read.
    pub fn backstops(&self, pod_uid: &str) -> Result<Vec<u32>, CaptureError> {
        let directory = self.backstops_of(pod_uid);
        let names = match names_in(&directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            names => names.map_err(|error| failed(directory.display(), error))?,
        };
        let mut attached = Vec::new();
        for name in names {
            let pin = directory.join(&name);
            let target = || {
                let link = bpf_syscalls::object_get(&pin)?;
                match bpf_syscalls::link_target(link.as_fd())? {
                    0 => {
                        self.own_programs.lock().remove(&pin);
                        detach(link.as_fd(), &pin).map(|()| None)
                    }
                    interface => Ok(u32::try_from(interface).ok()),
                }
            };
            attached.extend(target().map_err(|error| failed(pin.display(), error))?);
        }
        Ok(attached)
    }

    /// Whether all of a Pod's programs are this agent's.
    ///
    /// # Errors
    /// A pin cannot be opened: nothing is known then.
    pub fn has_own_backstops(&self, pod_uid: &str, interfaces: &[u32]) -> Result<bool, CaptureError> {
        for interface in interfaces {
            let pin = self.backstops_of(pod_uid).join(interface.to_string());
            if !self.has_own_program(&pin).map_err(|error| failed(pin.display(), error))? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Detaches a Pod's programs; `false`: it had none.
    ///
    /// # Errors
    /// A pin cannot be opened or removed.
    pub fn detach_backstops(&self, pod_uid: &str) -> Result<bool, CaptureError> {
        let directory = self.backstops_of(pod_uid);
        let names = match names_in(&directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            names => names.map_err(|error| failed(directory.display(), error))?,
        };
        for name in &names {
            let pin = directory.join(name);
            self.own_programs.lock().remove(&pin);
            bpf_syscalls::object_get(&pin)
                .and_then(|link| detach(link.as_fd(), &pin))
                .map_err(|error| failed(pin.display(), error))?;
        }
        fs::remove_dir(&directory).map_err(|error| failed(directory.display(), error))?;
        Ok(!names.is_empty())
    }

    /// The uids of the Pods that have a folder of pins.
    ///
    /// # Errors
    /// They cannot be listed.
    pub fn pods_with_backstops(&self) -> Result<Vec<String>, CaptureError> {
        let directory = self.pins.shared.join(DIRECTORY);
        let names = names_in(&directory).map_err(|error| failed(directory.display(), error))?;
        Ok(names.iter().map(|name| pod_uid(name)).collect())
    }

    fn backstops_of(&self, pod_uid: &str) -> PathBuf {
        self.pins.shared.join(DIRECTORY).join(pin_name(pod_uid))
    }
}

fn attach_new(program: std::os::fd::BorrowedFd<'_>, interface: u32, pin: &std::path::Path) -> io::Result<()> {
    let link = bpf_syscalls::link_create_tcx(program, interface)?;
    bpf_syscalls::object_pin(link.as_fd(), pin)
}
