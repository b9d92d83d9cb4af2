//! The points of the accept path between which the world may change. Tests change it there; to everybody else a step is nothing.

#[cfg(test)]
use parking_lot::Mutex;

/// What has just been done for a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(test), allow(dead_code, reason = "named for tests"))]
pub(super) enum Step {
    Accepted,
    Registered,
    Confirmed,
    Evaluated,
    Decided,
    Connected,
    /// Outbound: it is about to be let out in clear.
    Resolved,
    /// Outbound: it is registered as one in clear, and was looked at once more.
    LetOut,
    /// A review has noted that something changed, and has not looked at what.
    Reviewing,
}

#[cfg(test)]
pub(super) type Meanwhile = Box<dyn FnOnce() + Send>;

#[derive(Default)]
pub(super) struct Steps {
    #[cfg(test)]
    next: Mutex<Option<(Step, Meanwhile)>>,
}

impl std::fmt::Debug for Steps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Steps")
    }
}

impl Steps {
    #[cfg(not(test))]
    pub(super) fn done(&self, _: Step) {}

    #[cfg(test)]
    pub(super) fn done(&self, step: Step) {
        let meanwhile = {
            let mut next = self.next.lock();
            if next.as_ref().is_none_or(|(wanted, _)| *wanted != step) {
                return;
            }
            next.take()
        };
        if let Some((_, meanwhile)) = meanwhile {
            meanwhile();
        }
    }

    /// Once, when this step is done the next time.
    #[cfg(test)]
    pub(super) fn at(&self, step: Step, meanwhile: Meanwhile) {
        *self.next.lock() = Some((step, meanwhile));
    }

    /// Whether the step was not yet done.
    #[cfg(test)]
    pub(super) fn is_waiting(&self) -> bool {
        self.next.lock().is_some()
    }
}
