//! What is removed, and which test must notice: an entry a defence. CONTRIBUTING.md tells how to add one.

mod kernel;
mod tunnel;

/// A change that takes a defence away.
pub struct Mutant {
    pub name: &'static str,
    /// As docs/ATTACKS.md names them.
    pub attacks: &'static [&'static str],
    pub without: &'static str,
    pub edits: &'static [Edit],
    pub noticed_by: &'static [Noticed],
}

/// `from` occurs exactly once in the file, which keeps the table true.
pub struct Edit {
    pub file: &'static str,
    pub from: &'static str,
    pub to: &'static str,
}

/// A test that must fail, and what it must say: the attack's success, not just any failure.
pub struct Noticed {
    pub suite: Suite,
    pub test: &'static str,
    pub says: &'static str,
}

/// Mutants that are built together: none hides another.
pub struct Group {
    pub name: &'static str,
    pub mutants: &'static [Mutant],
    /// Harmless, in each suite that is run: these must pass in the mutated build, or it is no more than broken.
    pub controls: &'static [(Suite, &'static str)],
}

pub const GROUPS: [Group; 4] = [kernel::CAPTURE, kernel::REDIRECT, kernel::KUBELET, tunnel::TUNNEL];

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Suite {
    /// Unit tests.
    Agent,
    Control,
    /// mesh-agent/tests.
    Hooks,
    /// tests/tests.
    Attacks,
    Enrolment,
}

impl Suite {
    const ALL: [Self; 5] = [Self::Agent, Self::Control, Self::Hooks, Self::Attacks, Self::Enrolment];

    pub fn name(self) -> &'static str {
        match self {
            Self::Agent => "mesh_agent",
            Self::Control => "mesh_control",
            Self::Hooks => "hooks",
            Self::Attacks => "attacks",
            Self::Enrolment => "enrolment",
        }
    }

    pub fn of_target(name: &str, is_library: bool) -> Option<Self> {
        let of_library = |suite: &Self| matches!(suite, Self::Agent | Self::Control) == is_library;
        Self::ALL.into_iter().filter(of_library).find(|suite| suite.name() == name)
    }

    pub fn cargo_target(self) -> Vec<&'static str> {
        match self {
            Self::Agent | Self::Control => vec!["--lib"],
            Self::Hooks | Self::Attacks | Self::Enrolment => vec!["--test", self.name()],
        }
    }

    /// tests/src/suite.rs: one set-up for all checks, and so one process. Others run a process for each test.
    pub fn has_own_runner(self) -> bool {
        matches!(self, Self::Attacks | Self::Enrolment)
    }
}
