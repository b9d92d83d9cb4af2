//! Where a Pod stands, decided from nothing but the outcomes of its proofs.

use crate::discovery::report::Proof;

/// A proof that fails so often in a row is lost.
const FAILURES_UNTIL_LOST: u32 = 2;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Standing {
    proof: Proof,
    /// Why it is not proven; empty when it is.
    reason: String,
    /// An earlier agent may have proven it, so a failed proof is a lost one.
    was_proven: bool,
    failures: u32,
}

/// What an outcome changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    Proven,
    Lost,
    /// Nothing that others are told at once.
    None,
}

impl Standing {
    /// `recovered`: found at the start, with a past that is not known.
    pub(super) fn new(recovered: bool, reason: String) -> Self {
        Self {
            proof: Proof::Pending,
            reason,
            was_proven: recovered,
            failures: 0,
        }
    }

    pub(super) fn proof(&self) -> Proof {
        self.proof
    }

    pub(super) fn reason(&self) -> &str {
        &self.reason
    }

    /// In a row.
    pub(super) fn failures(&self) -> u32 {
        self.failures
    }

    /// Why it is not even tried.
    pub(super) fn explain(&mut self, reason: String) {
        if self.proof != Proof::Proven {
            self.reason = reason;
        }
    }

    /// Its release has begun: it is protected no longer.
    pub(super) fn leave(&mut self) {
        if self.proof == Proof::Proven {
            self.proof = Proof::Lost;
        }
        self.reason = "it is being released".to_owned();
    }

    pub(super) fn settle(&mut self, outcome: Result<(), String>) -> Turn {
        match outcome {
            Ok(()) => {
                self.failures = 0;
                self.was_proven = true;
                self.reason.clear();
                if std::mem::replace(&mut self.proof, Proof::Proven) == Proof::Proven {
                    Turn::None
                } else {
                    Turn::Proven
                }
            }
            Err(reason) => {
                self.failures = self.failures.saturating_add(1);
                let is_lost = self.was_proven && self.failures >= FAILURES_UNTIL_LOST;
                let turn = if is_lost && self.proof != Proof::Lost {
                    self.proof = Proof::Lost;
                    Turn::Lost
                } else {
                    Turn::None
                };
                self.explain(reason);
                turn
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_leaves_is_protected_no_longer() {
        for (outcome, left) in [(Ok(()), Proof::Lost), (Err("why".to_owned()), Proof::Pending)] {
            let mut standing = Standing::new(false, "new".to_owned());
            standing.settle(outcome);
            standing.leave();
            assert_eq!((standing.proof(), standing.reason()), (left, "it is being released"));
        }
    }

    #[test]
    fn a_pod_stands_where_its_proofs_say() {
        use Proof::{Lost, Pending, Proven};
        // Recovered; the outcomes (+ a proof, - a failure); after each, where it stands.
        let table: &[(bool, &str, &[Proof])] = &[
            // Never proven: it stays pending, and is spoken to in clear, as before its enrolment.
            (false, "---", &[Pending, Pending, Pending]),
            (false, "-+", &[Pending, Proven]),
            // One failure may be chance.
            (false, "+-+", &[Proven, Proven, Proven]),
            (false, "+--", &[Proven, Proven, Lost]),
            (false, "+-+-", &[Proven, Proven, Proven, Proven]),
            (false, "+---+", &[Proven, Proven, Lost, Lost, Proven]),
            (false, "+--+-", &[Proven, Proven, Lost, Proven, Proven]),
            (false, "+--+--", &[Proven, Proven, Lost, Proven, Proven, Lost]),
            // An earlier agent may have proven it: never pending for long.
            (true, "--", &[Pending, Lost]),
            (true, "-+", &[Pending, Proven]),
            (true, "--+", &[Pending, Lost, Proven]),
            // Failures before the first proof do not count for its loss.
            (false, "--+-", &[Pending, Pending, Proven, Proven]),
        ];
        for (recovered, outcomes, expected) in table {
            let mut standing = Standing::new(*recovered, "new".to_owned());
            let mut before = standing.proof();
            for (step, (outcome, expected)) in outcomes.chars().zip(*expected).enumerate() {
                let turn = standing.settle(if outcome == '+' { Ok(()) } else { Err("why".to_owned()) });
                let at = format!("{outcomes} at {step}, recovered: {recovered}");
                assert_eq!(standing.proof(), *expected, "{at}");
                let told = match (before, *expected) {
                    (before, now) if before == now => Turn::None,
                    (_, Proven) => Turn::Proven,
                    (_, Lost) => Turn::Lost,
                    _ => Turn::None,
                };
                assert_eq!(turn, told, "{at}");
                assert_eq!(standing.reason(), if *expected == Proven { "" } else { "why" }, "{at}");
                before = *expected;
            }
        }
    }

    #[test]
    fn a_proven_pod_needs_no_reason() {
        let mut standing = Standing::new(true, "cannot be taken over".to_owned());
        standing.explain("still not".to_owned());
        assert_eq!(standing.reason(), "still not");
        standing.settle(Ok(()));
        standing.explain("late".to_owned());
        assert_eq!(standing.reason(), "");
    }
}
