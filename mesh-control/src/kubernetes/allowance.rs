//! So many at once, and then one in each interval. Pure.

use std::time::Duration;

use tokio::time::Instant;

#[derive(Debug)]
pub struct Allowance {
    burst: u32,
    interval: Duration,
    left: u32,
    since: Instant,
}

impl Allowance {
    #[must_use]
    pub fn new(burst: u32, interval: Duration, now: Instant) -> Self {
        Self {
            burst,
            interval,
            left: burst,
            since: now,
        }
    }

    /// True: one more may be, and is counted.
    pub fn take(&mut self, now: Instant) -> bool {
        let more = now.saturating_duration_since(self.since).as_nanos() / self.interval.as_nanos().max(1);
        let more = u32::try_from(more).unwrap_or(u32::MAX);
        self.left = self.left.saturating_add(more).min(self.burst);
        self.since += self.interval.saturating_mul(more);
        let is_left = self.left > 0;
        self.left -= u32::from(is_left);
        is_left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_goes_at_once_and_the_rest_in_its_time() {
        let (now, second) = (Instant::now(), Duration::from_secs(1));
        let mut allowance = Allowance::new(3, second, now);
        let mut taken = |at: Instant| (0..10).filter(|_| allowance.take(at)).count();
        assert_eq!(taken(now), 3);
        assert_eq!(taken(now + second / 2), 0);
        assert_eq!(taken(now + second), 1);
        // Half an interval more is not lost between two looks.
        assert_eq!(taken(now + second * 3 / 2), 0);
        assert_eq!(taken(now + second * 2), 1);
        assert_eq!(
            taken(now + second * 1000),
            3,
            "what was not taken does not add up beyond the burst"
        );
    }
}
