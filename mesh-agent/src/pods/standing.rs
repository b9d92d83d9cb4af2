//! Where a Pod stands, decided from nothing but the outcomes of its proofs.

use super::PodError;
use crate::capture::CaptureError;
use crate::capture::probe::ProofError;
use crate::discovery::report::{Proof, RELEASED};

/// A proof that fails so often in a row is lost.
const FAILURES_UNTIL_LOST: u32 = 2;

/// Why a Pod is not proven, or not enrolled or released as it should be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Why {
    /// One of `discovery::noticed::PROBLEMS`, or another word, which people are told nothing of but where to look.
    pub problem: &'static str,
    /// For logs and the admin dump.
    pub text: String,
}

impl Why {
    pub(super) fn new(problem: &'static str, text: impl Into<String>) -> Self {
        Self {
            problem,
            text: text.into(),
        }
    }
}

impl From<CaptureError> for Why {
    fn from(error: CaptureError) -> Self {
        Self::new(error.reason(), error.to_string())
    }
}

impl From<ProofError> for Why {
    fn from(error: ProofError) -> Self {
        Self::new(error.reason(), error.to_string())
    }
}

impl From<PodError> for Why {
    fn from(error: PodError) -> Self {
        Self::new(error.reason(), error.to_string())
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Standing {
    proof: Proof,
    /// Why it is not proven; empty when it is.
    why: Why,
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
    pub(super) fn new(recovered: bool, why: Why) -> Self {
        Self {
            proof: Proof::Pending,
            why,
            was_proven: recovered,
            failures: 0,
        }
    }

    pub(super) fn proof(&self) -> Proof {
        self.proof
    }

    pub(super) fn reason(&self) -> &str {
        &self.why.text
    }

    pub(super) fn problem(&self) -> &'static str {
        self.why.problem
    }

    /// In a row.
    pub(super) fn failures(&self) -> u32 {
        self.failures
    }

    /// Why it is not even tried.
    pub(super) fn explain(&mut self, why: Why) {
        if self.proof != Proof::Proven {
            self.why = why;
        }
    }

    /// Its release has begun: it is protected no longer.
    pub(super) fn leave(&mut self) {
        if self.proof == Proof::Proven {
            self.proof = Proof::Lost;
        }
        self.why = Why::new(RELEASED, "it is being released");
    }

    pub(super) fn settle(&mut self, outcome: Result<(), Why>) -> Turn {
        match outcome {
            Ok(()) => {
                self.failures = 0;
                self.was_proven = true;
                self.why = Why::default();
                if std::mem::replace(&mut self.proof, Proof::Proven) == Proof::Proven {
                    Turn::None
                } else {
                    Turn::Proven
                }
            }
            Err(why) => {
                self.failures = self.failures.saturating_add(1);
                let is_lost = self.was_proven && self.failures >= FAILURES_UNTIL_LOST;
                let turn = if is_lost && self.proof != Proof::Lost {
                    self.proof = Proof::Lost;
                    Turn::Lost
                } else {
                    Turn::None
                };
                self.explain(why);
                turn
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::FindError;
    use crate::discovery::noticed::PROBLEMS;

    fn why(text: &str) -> Why {
        Why::new("io", text)
    }

    #[test]
    fn what_people_can_mend_is_told_by_a_word_that_the_control_plane_knows() {
        let destination = "127.0.0.1:1".parse().expect("an address");
        let (text, found) = (String::new(), 2);
        let words = [
            FindError::NoProcess.reason(),
            FindError::HostNetwork.reason(),
            FindError::NoAddress.reason(),
            FindError::Ambiguous(found).reason(),
            PodError::AnotherNamespace.reason(),
            ProofError::Outbound {
                destination,
                why: text.clone(),
            }
            .reason(),
            ProofError::Inbound { destination, why: text }.reason(),
        ];
        for word in words {
            assert!(PROBLEMS.contains(&word), "{word}");
        }
    }

    #[test]
    fn one_that_leaves_is_protected_no_longer() {
        for (outcome, left) in [(Ok(()), Proof::Lost), (Err(why("why")), Proof::Pending)] {
            let mut standing = Standing::new(false, why("new"));
            standing.settle(outcome);
            standing.leave();
            let told = (standing.proof(), standing.reason(), standing.problem());
            assert_eq!(told, (left, "it is being released", "released"));
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
            let mut standing = Standing::new(*recovered, why("new"));
            let mut before = standing.proof();
            for (step, (outcome, expected)) in outcomes.chars().zip(*expected).enumerate() {
                let turn = standing.settle(if outcome == '+' { Ok(()) } else { Err(why("why")) });
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
        let mut standing = Standing::new(true, why("cannot be taken over"));
        standing.explain(why("still not"));
        assert_eq!(standing.reason(), "still not");
        standing.settle(Ok(()));
        standing.explain(why("late"));
        assert_eq!((standing.reason(), standing.problem()), ("", ""));
    }
}
