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
        self.wait(rand::rng().random_range(0.0..=1.0))
    }

    /// `random` is in 0..=1.
    fn wait(&mut self, random: f64) -> Duration {
        // 2^20 times anything sensible is beyond `longest`.
        let step = self.first.saturating_mul(1 << self.failures.min(20)).min(self.longest);
        self.failures = self.failures.saturating_add(1);
        step.mul_f64(0.5 + 0.5 * random)
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

    /// A thousand agents that lost their control plane at the same moment, hours ago, and one that comes back: how many connect
    /// in the busiest tenth of a second.
    #[test]
    fn a_fleet_does_not_come_back_as_one() {
        const AGENTS: u32 = 1000;
        let mut random = 0.123_f64;
        let mut next = || {
            random = (random * 9301.0 + 49297.0 / 233_280.0).fract();
            random
        };
        let back_at = Duration::from_secs(4 * 3600);
        let mut connects: Vec<u128> = (0..AGENTS)
            .map(|_| {
                let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
                let mut now = Duration::ZERO;
                while now < back_at {
                    now += backoff.wait(next());
                }
                (now - back_at).as_millis() / 100
            })
            .collect();
        connects.sort_unstable();
        let busiest = connects.chunk_by(|a, b| a == b).map(<[u128]>::len).max().unwrap();
        // Over 10 s, an even spread would be 10 in each tenth of a second.
        assert!(busiest <= 40, "{busiest} of {AGENTS} agents at once");
        assert!(connects.iter().all(|&tenth| tenth < 100), "each within its longest wait");
    }
}
