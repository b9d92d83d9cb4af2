//! How often states are compiled. Pure: the time is given.
//!
//! Over a while, compiling has a fifth of a core. After quiet a change goes at once, and so do the one or two that come right after it.

use std::time::Duration;

use tokio::time::Instant;

use crate::limits::{PUBLISH_BURST, PUBLISH_SHARE};

#[derive(Debug)]
pub struct Pace {
    interval: Duration,
    /// When all compilations so far have had their pauses.
    paid: Instant,
    next: Instant,
}

impl Pace {
    #[must_use]
    pub fn new(interval: Duration, now: Instant) -> Self {
        Self {
            interval,
            paid: now,
            next: now,
        }
    }

    /// Before, no state is to be compiled.
    #[must_use]
    pub fn next(&self) -> Instant {
        self.next
    }

    /// One was compiled, and took so long.
    pub fn compiled(&mut self, now: Instant, took: Duration) {
        let pause = took.saturating_mul(PUBLISH_SHARE);
        // What is owed is not paid by compiling.
        self.paid = (self.paid + took).max(now) + pause;
        let ahead = pause.saturating_mul(PUBLISH_BURST);
        self.next = self.paid.checked_sub(ahead).unwrap_or(now).max(now + self.interval);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_millis(250);
    const TOOK: Duration = Duration::from_secs(4);

    #[tokio::test(start_paused = true)]
    async fn a_change_after_quiet_goes_at_once_and_many_are_held_back() {
        let began = Instant::now();
        let mut pace = Pace::new(INTERVAL, began);
        assert_eq!(pace.next(), began);
        let mut now = began;
        let mut waits = Vec::new();
        for _ in 0..20 {
            now += TOOK;
            pace.compiled(now, TOOK);
            waits.push(pace.next() - now);
            now = pace.next();
        }
        assert_eq!(waits[..2], [INTERVAL, INTERVAL], "the first ones");
        assert_eq!(waits[19], TOOK * PUBLISH_SHARE, "in the long run");
        let compiling = TOOK * 20;
        assert!(
            now - began >= compiling * (PUBLISH_SHARE + 1) - TOOK * PUBLISH_SHARE * PUBLISH_BURST,
            "{:?}",
            now - began
        );
        // Quiet for as long as all was owed.
        now += TOOK * PUBLISH_SHARE * PUBLISH_BURST;
        pace.compiled(now, TOOK);
        assert_eq!(pace.next() - now, INTERVAL);
    }

    #[tokio::test(start_paused = true)]
    async fn quick_compilations_wait_for_the_interval_alone() {
        let now = Instant::now();
        let mut pace = Pace::new(INTERVAL, now);
        for n in 0..100 {
            let now = now + INTERVAL * n;
            pace.compiled(now, Duration::from_millis(5));
            assert_eq!(pace.next(), now + INTERVAL);
        }
    }
}
