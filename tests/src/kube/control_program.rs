//! mesh-control itself, with a cluster as its registry, on loopback.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::binaries;
use crate::process::{Place, Process};

/// It ends with this.
pub struct ControlProgram {
    pub process: Process,
    /// Where agents reach it; at an address of its own, as its pages.
    pub listen: SocketAddr,
    pub admin: SocketAddr,
    pub log: PathBuf,
}

impl ControlProgram {
    /// # Errors
    /// It cannot be started.
    pub fn start(name: &str, kubeconfig: &Path, log: PathBuf) -> Result<Self> {
        let place = Place::here();
        let [a, b, c] = rand::random::<[u8; 3]>();
        let address = |port| SocketAddr::new(Ipv4Addr::new(127, a.max(1), b, c.clamp(1, 254)).into(), port);
        let (listen, admin) = (address(15012), address(15014));
        let flags = ["--kubernetes", "--listen", &listen.to_string(), "--admin", &admin.to_string()];
        let mut command = place.command(&binaries::path("mesh-control")?, &flags)?;
        command.env("KUBECONFIG", kubeconfig);
        let process = Process::start(name, command, log.clone())?;
        Ok(Self {
            process,
            listen,
            admin,
            log,
        })
    }
}
