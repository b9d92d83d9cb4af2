//! `cargo xtask bench`: the same topology, direct and through the mesh, side by side in one run. Every round measures every system
//! once, so that what the machine does meanwhile happens to all of them.

pub mod control;
mod measure;
mod report;

use anyhow::{Result, bail};

use crate::mesh::{Mesh, PodSpec};
use crate::requirements;
use crate::topology::NodeName;
pub use measure::Amounts;
use measure::Bench;
pub use report::Format;
use report::Results;

const LOAD_PORT: u16 = 9100;

const PODS: [PodSpec; 5] = [
    PodSpec::new("client", NodeName::One, 10, true),
    PodSpec::new("local", NodeName::One, 11, true),
    PodSpec::new("server", NodeName::Two, 20, true),
    PodSpec::new("plain-client", NodeName::One, 12, false),
    PodSpec::new("plain-server", NodeName::Two, 21, false),
];

/// A way from a client to a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum System {
    /// Two Pods outside the mesh, on two nodes.
    Direct,
    /// Two Pods of the mesh, on two nodes.
    Mesh,
    /// Two Pods of the mesh, on one node.
    MeshSameNode,
}

impl System {
    pub const ALL: [Self; 3] = [Self::Direct, Self::Mesh, Self::MeshSameNode];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Mesh => "mesh",
            Self::MeshSameNode => "mesh_same_node",
        }
    }

    fn client(self) -> &'static str {
        match self {
            Self::Direct => "plain-client",
            Self::Mesh | Self::MeshSameNode => "client",
        }
    }

    fn server(self) -> &'static str {
        match self {
            Self::Direct => "plain-server",
            Self::Mesh => "server",
            Self::MeshSameNode => "local",
        }
    }
}

/// Runs so many rounds and prints the results.
///
/// # Errors
/// What is missing on this machine, or the first measurement that failed.
pub fn run(rounds: usize, amounts: Amounts, format: Format) -> Result<()> {
    let missing = requirements::missing();
    if !missing.is_empty() {
        bail!("the benchmarks cannot run here; missing:\n  - {}", missing.join("\n  - "));
    }
    let mut results = Results::default();
    let mut mesh = Mesh::start(&PODS, &mut |step| report::progress(step))?;
    let outcome = Bench::start(&mut mesh, amounts).and_then(|bench| bench.run(rounds, &mut results));
    outcome.map_err(|error| mesh.with_logs(error))?;
    results.print(format)
}
