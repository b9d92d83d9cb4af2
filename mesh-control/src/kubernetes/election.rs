//! Who of the replicas writes statuses: the holder of a Lease. Pure. By each replica's own clock: what counts is how long ago it saw
//! the Lease change, not what time stands in it.

use k8s_openapi::api::coordination::v1::Lease;
use tokio::time::Instant;

use crate::limits::{ELECTION_DEADLINE, ELECTION_LIFE};

#[cfg(test)]
mod tests;

/// What is to be done about the Lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// There is none.
    Create,
    Renew {
        resource_version: String,
    },
    /// Its holder is gone, or has let it go.
    Take {
        resource_version: String,
        transitions: i32,
    },
    /// Another one has it.
    Wait,
}

pub struct Election {
    identity: String,
    /// The version of the Lease that was read last, and when for the first time.
    seen: Option<(String, Instant)>,
    held_until: Option<Instant>,
}

impl Election {
    #[must_use]
    pub fn new(identity: String) -> Self {
        Self {
            identity,
            seen: None,
            held_until: None,
        }
    }

    #[must_use]
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// Whether this replica may write.
    #[must_use]
    pub fn is_held(&self, now: Instant) -> bool {
        self.held_until.is_some_and(|until| now < until)
    }

    /// The Lease was read.
    pub fn read(&mut self, lease: Option<&Lease>, now: Instant) -> Step {
        let Some(lease) = lease else {
            self.lost();
            return Step::Create;
        };
        let resource_version = lease.metadata.resource_version.clone().unwrap_or_default();
        let spec = lease.spec.clone().unwrap_or_default();
        let holder = spec.holder_identity.unwrap_or_default();
        if holder == self.identity {
            return Step::Renew { resource_version };
        }
        self.lost();
        let transitions = spec.lease_transitions.unwrap_or_default().saturating_add(1);
        let take = Step::Take {
            resource_version: resource_version.clone(),
            transitions,
        };
        if holder.is_empty() {
            return take;
        }
        match &self.seen {
            Some((version, since)) if *version == resource_version => {
                if now >= *since + ELECTION_LIFE {
                    return take;
                }
            }
            _ => self.seen = Some((resource_version, now)),
        }
        Step::Wait
    }

    /// A write of it was taken; `sent`: when it was begun.
    pub fn written(&mut self, sent: Instant) {
        self.seen = None;
        self.held_until = Some(sent + ELECTION_DEADLINE);
    }

    /// Somebody else has it.
    pub fn lost(&mut self) {
        self.held_until = None;
    }
}
