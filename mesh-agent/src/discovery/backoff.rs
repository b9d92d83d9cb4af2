//! How long to wait before trying again: doubled at each failure up to a bound, with jitter, so that a fleet that lost its
//! control plane does not come back as one.

use std::time::Duration;

use rand::Rng as _;

#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    failures: u32,
}

impl Backoff {
    #[must_use]
    pub const fn new(first: Duration, longest: Duration) -> Self {
        Self {
            first,
            longest,
            failures: 0,
        }
    }

    /// After something worked.
    pub fn reset(&mut self) {
        self.failures = 0;
    }

    /// The wait after one more failure: between half of the step and the step.
    pub fn after_failure(&mut self) -> Duration {
        // 2^20 times anything sensible is beyond `longest`.
        let step = self.first.saturating_mul(1 << self.failures.min(20)).min(self.longest);
        self.failures = self.failures.saturating_add(1);
        step.mul_f64(rand::rng().random_range(0.5..=1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_up_to_its_bound_and_starts_over_after_success() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
        for expected in [100, 200, 400, 800, 1000, 1000] {
            let wait = backoff.after_failure().as_millis();
            assert!((expected / 2..=expected).contains(&wait), "{wait} for {expected}");
        }
        for _ in 0..100 {
            assert!(backoff.after_failure() <= Duration::from_secs(1));
        }
        backoff.reset();
        assert!(backoff.after_failure() <= Duration::from_millis(100));
    }
}
