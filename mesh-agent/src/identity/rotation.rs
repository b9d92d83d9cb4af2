//! When certificates are fetched, renewed and dropped, without clock or I/O: `now` comes in, decisions go out.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::Identity;

/// Waits between failed attempts: doubled from the first up to the longest.
const FIRST_RETRY: Duration = Duration::from_millis(500);
const LONGEST_RETRY: Duration = Duration::from_secs(60);
/// A certificate is renewed at half of its life, earlier by up to this part of its life.
const RENEWAL_JITTER: f64 = 0.1;
/// An authority that hands out certificates that are almost over must not make us ask in a loop.
const SHORTEST_RENEWAL: Duration = Duration::from_secs(1);

/// When the control plane is back, what failed is tried within this: it meets every node's identities, which must not come as one.
pub const RETURN_SPREAD: Duration = Duration::from_secs(5);

/// One certificate an identity, however many Pods have it.
#[derive(Debug, Default)]
pub struct Rotation {
    identities: BTreeMap<Identity, Entry>,
    /// Nothing is asked for in their name.
    revoked: BTreeSet<Identity>,
    /// The last `now`. A clock that goes back must not make waits longer.
    latest: Option<SystemTime>,
}

#[derive(Debug)]
struct Entry {
    /// uids of the Pods that have this identity; never empty.
    pods: BTreeSet<Arc<str>>,
    attempt: Attempt,
    failures: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Attempt {
    /// The next one starts then.
    At(SystemTime),
    Running,
}

impl Rotation {
    /// A Pod needs this identity. A new identity is due at once; returns whether it is one.
    pub fn want(&mut self, identity: &Identity, pod_uid: &Arc<str>, now: SystemTime) -> bool {
        let is_new = !self.identities.contains_key(identity);
        self.identities
            .entry(identity.clone())
            .or_insert_with(|| Entry {
                pods: BTreeSet::new(),
                attempt: Attempt::At(now),
                failures: 0,
            })
            .pods
            .insert(pod_uid.clone());
        is_new
    }

    /// A Pod is gone; returns the identities that no Pod has any longer, whose certificates are to be dropped.
    pub fn unwant(&mut self, pod_uid: &str) -> Vec<Identity> {
        let mut dropped = Vec::new();
        self.identities.retain(|identity, entry| {
            if entry.pods.remove(pod_uid) && entry.pods.is_empty() {
                dropped.push(identity.clone());
                return false;
            }
            true
        });
        dropped
    }

    /// Whose service accounts are deleted; those that are so no longer are due at once.
    pub fn revoke(&mut self, revoked: &BTreeSet<Identity>, now: SystemTime) {
        let before = std::mem::replace(&mut self.revoked, revoked.clone());
        for back in before.difference(revoked) {
            self.lost(back, now);
        }
    }

    #[must_use]
    pub fn is_revoked(&self, identity: &Identity) -> bool {
        self.revoked.contains(identity)
    }

    /// What is held is of no use any longer: another one is due at once.
    pub fn lost(&mut self, identity: &Identity, now: SystemTime) {
        if let Some(entry) = self.identities.get_mut(identity)
            && entry.attempt != Attempt::Running
        {
            entry.attempt = Attempt::At(now);
        }
    }

    /// Takes the identities that are due at the authority, at most `limit`; each is answered by [`Self::fetched`] or [`Self::failed`].
    pub fn take_due(&mut self, now: SystemTime, limit: usize) -> Vec<Identity> {
        self.follow_clock(now);
        self.identities
            .iter_mut()
            .filter(|(identity, entry)| matches!(entry.attempt, Attempt::At(at) if at <= now) && !self.revoked.contains(identity))
            .take(limit)
            .map(|(identity, entry)| {
                entry.attempt = Attempt::Running;
                identity.clone()
            })
            .collect()
    }

    /// When [`Self::take_due`] has something next.
    #[must_use]
    pub fn next_due(&self) -> Option<SystemTime> {
        self.identities
            .iter()
            .filter(|(identity, _)| !self.revoked.contains(identity))
            .filter_map(|(_, entry)| match entry.attempt {
                Attempt::At(at) => Some(at),
                Attempt::Running => None,
            })
            .min()
    }

    /// A certificate came. `random` is in 0..1. Returns whether it is still wanted.
    pub fn fetched(
        &mut self,
        identity: &Identity,
        not_before: SystemTime,
        not_after: SystemTime,
        now: SystemTime,
        random: f64,
    ) -> bool {
        let Some(entry) = self.identities.get_mut(identity) else {
            return false;
        };
        entry.failures = 0;
        entry.attempt = Attempt::At(renewal(not_before, not_after, now, random));
        !self.revoked.contains(identity)
    }

    /// The attempt failed; what is held stays in use, and it is tried again. `random` is in 0..1. Returns the wait.
    pub fn failed(&mut self, identity: &Identity, now: SystemTime, random: f64) -> Option<Duration> {
        let entry = self.identities.get_mut(identity)?;
        let step = FIRST_RETRY.saturating_mul(1 << entry.failures.min(20)).min(LONGEST_RETRY);
        entry.failures = entry.failures.saturating_add(1);
        let wait = step.mul_f64(0.5 + 0.5 * random.clamp(0.0, 1.0));
        entry.attempt = Attempt::At(now + wait);
        Some(wait)
    }

    /// The control plane is back: what failed is tried soon, and no later than it would have been. `random` gives numbers in 0..1.
    pub fn retry_failed(&mut self, now: SystemTime, mut random: impl FnMut() -> f64) {
        for entry in self.identities.values_mut() {
            if entry.failures > 0
                && let Attempt::At(at) = entry.attempt
            {
                entry.attempt = Attempt::At(at.min(now + RETURN_SPREAD.mul_f64(random().clamp(0.0, 1.0))));
            }
        }
    }

    /// The wall clock was set back: what was to come after some time still comes after that time, as it was left at the last look.
    fn follow_clock(&mut self, now: SystemTime) {
        if let Some(back) = self.latest.and_then(|latest| latest.duration_since(now).ok()) {
            for entry in self.identities.values_mut() {
                if let Attempt::At(at) = &mut entry.attempt {
                    *at = at.checked_sub(back).unwrap_or(now);
                }
            }
        }
        self.latest = Some(now);
    }
}

/// Half of the life that the certificate still has, less jitter. Authorities backdate certificates for skewed clocks: of a short
/// life that part would leave nothing.
fn renewal(not_before: SystemTime, not_after: SystemTime, now: SystemTime, random: f64) -> SystemTime {
    let start = not_before.max(now);
    let life = not_after.duration_since(start).unwrap_or_default();
    let part = 0.5 - RENEWAL_JITTER * random.clamp(0.0, 1.0);
    (start + life.mul_f64(part)).max(now + SHORTEST_RENEWAL)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn start() -> SystemTime {
        SystemTime::UNIX_EPOCH + HOUR * 480_000
    }

    fn identity(account: &str) -> Identity {
        Identity::new("cluster.local", "shop", account)
    }

    #[test]
    fn pods_share_the_certificate_of_their_identity() {
        let (mut rotation, now) = (Rotation::default(), start());
        rotation.want(&identity("a"), &"pod-1".into(), now);
        rotation.want(&identity("a"), &"pod-2".into(), now);
        assert_eq!(rotation.take_due(now, 8), [identity("a")]);
        assert!(rotation.take_due(now, 8).is_empty(), "an attempt runs once");
        assert!(rotation.fetched(&identity("a"), now, now + 24 * HOUR, now, 0.0));
        assert!(rotation.unwant("pod-1").is_empty());
        assert!(rotation.unwant("pod-1").is_empty());
        assert_eq!(rotation.unwant("pod-2"), [identity("a")]);
        assert_eq!(rotation.next_due(), None);
    }

    #[test]
    fn renewed_at_half_life_less_jitter() {
        for (random, hours) in [(0.0, 12.0), (0.5, 10.8), (1.0, 9.6)] {
            let (mut rotation, now) = (Rotation::default(), start());
            rotation.want(&identity("a"), &"p".into(), now);
            rotation.take_due(now, 8);
            rotation.fetched(&identity("a"), now, now + 24 * HOUR, now, random);
            let due = now + HOUR.mul_f64(hours);
            let second = Duration::from_secs(1);
            assert!(rotation.take_due(due - second, 8).is_empty());
            assert_eq!(rotation.take_due(due + second, 8), [identity("a")]);
        }
    }

    #[test]
    fn a_failed_renewal_backs_off_and_never_stops() {
        let (mut rotation, mut now) = (Rotation::default(), start());
        rotation.want(&identity("a"), &"p".into(), now);
        let mut waits = Vec::new();
        for _ in 0..40 {
            assert_eq!(rotation.take_due(now, 8), [identity("a")]);
            let wait = rotation.failed(&identity("a"), now, 1.0).unwrap();
            assert!(rotation.take_due(now, 8).is_empty());
            waits.push(wait);
            now += wait;
        }
        assert_eq!(waits[..3], [FIRST_RETRY, FIRST_RETRY * 2, FIRST_RETRY * 4]);
        assert!(waits.iter().all(|&w| w <= LONGEST_RETRY));
        rotation.take_due(now, 8);
        rotation.fetched(&identity("a"), now, now + HOUR, now, 0.0);
        let due = rotation.next_due().unwrap();
        rotation.take_due(due, 8);
        assert_eq!(
            rotation.failed(&identity("a"), due, 1.0),
            Some(FIRST_RETRY),
            "success starts the back-off over"
        );
    }

    #[test]
    fn what_failed_is_tried_soon_when_the_control_plane_is_back() {
        let (mut rotation, now) = (Rotation::default(), start());
        rotation.want(&identity("failed"), &"p".into(), now);
        rotation.want(&identity("held"), &"q".into(), now);
        rotation.take_due(now, 8);
        rotation.failed(&identity("failed"), now, 1.0);
        rotation.fetched(&identity("held"), now, now + HOUR, now, 0.0);
        rotation.retry_failed(now, || 0.0);
        assert_eq!(rotation.take_due(now, 8), [identity("failed")]);
    }

    /// Hours without the control plane: what is held stays until it is renewed in vain, nothing is given up, and what is asked when
    /// it is back does not come as one.
    #[test]
    fn after_hours_without_the_control_plane_a_nodes_identities_do_not_come_as_one() {
        const IDENTITIES: u32 = 200;
        let (mut rotation, mut now) = (Rotation::default(), start());
        for i in 0..IDENTITIES {
            rotation.want(&identity(&format!("a{i}")), &"p".into(), now);
        }
        for identity in rotation.take_due(now, usize::MAX) {
            rotation.fetched(&identity, now, now + 24 * HOUR, now, 0.0);
        }
        // It goes away; half of the life later all are asked for, and from then on again and again.
        let mut asked = 0;
        let away = now + 15 * HOUR;
        while let Some(at) = rotation.next_due().filter(|at| *at < away) {
            now = at;
            for identity in rotation.take_due(now, usize::MAX) {
                rotation.failed(&identity, now, rand::random());
                asked += 1;
            }
        }
        // 3 hours at a wait of 30 to 60 s, and some at the beginning.
        assert!(asked <= IDENTITIES * (3 * 120 + 10), "{asked}");
        rotation.retry_failed(away, rand::random);
        let mut waits = Vec::new();
        while waits.len() < IDENTITIES as usize {
            let at = rotation.next_due().unwrap();
            waits.extend(
                rotation
                    .take_due(at, usize::MAX)
                    .iter()
                    .map(|_| at.duration_since(away).unwrap_or_default()),
            );
        }
        assert!(waits.iter().all(|wait| *wait <= RETURN_SPREAD), "{waits:?}");
        let second = Duration::from_secs(1);
        let busiest = waits
            .iter()
            .map(|from| waits.iter().filter(|wait| *wait >= from && **wait < *from + second).count());
        // A fifth is 40; 80 would be seven deviations off.
        let busiest = busiest.max().unwrap();
        assert!(busiest < 80, "{busiest} of {IDENTITIES} within a second");
    }

    #[test]
    fn a_clock_that_jumps_back_a_day_makes_no_wait_longer() {
        let (mut rotation, now) = (Rotation::default(), start());
        rotation.want(&identity("failed"), &"p".into(), now);
        rotation.want(&identity("held"), &"q".into(), now);
        rotation.take_due(now, 8);
        let wait = rotation.failed(&identity("failed"), now, 1.0).unwrap();
        rotation.fetched(&identity("held"), now, now + 24 * HOUR, now, 0.0);
        let back = now - 24 * HOUR;
        assert!(rotation.take_due(back, 8).is_empty(), "what waits goes on waiting");
        assert_eq!(rotation.next_due(), Some(back + wait));
        assert_eq!(rotation.take_due(back + wait, 8), [identity("failed")]);
        assert_eq!(rotation.take_due(back + 12 * HOUR, 8), [identity("held")]);
    }

    #[test]
    fn a_clock_that_jumps_ahead_a_day_renews_at_once() {
        let (mut rotation, now) = (Rotation::default(), start());
        rotation.want(&identity("a"), &"p".into(), now);
        rotation.take_due(now, 8);
        rotation.fetched(&identity("a"), now, now + 24 * HOUR, now, 0.0);
        let ahead = now + 24 * HOUR;
        assert_eq!(rotation.take_due(ahead, 8), [identity("a")]);
        // The authority's clock is right: what it signs is over, here. Refused, and tried again; also when the clock is set right.
        let wait = rotation.failed(&identity("a"), ahead, 1.0).unwrap();
        assert!(rotation.take_due(now + wait / 2, 8).is_empty());
        assert_eq!(rotation.take_due(now + wait / 2 + wait, 8), [identity("a")]);
    }

    #[test]
    fn an_answer_for_an_identity_that_was_dropped_meanwhile_is_not_kept() {
        let (mut rotation, now) = (Rotation::default(), start());
        rotation.want(&identity("a"), &"p".into(), now);
        rotation.take_due(now, 8);
        rotation.unwant("p");
        assert!(!rotation.fetched(&identity("a"), now, now + HOUR, now, 0.0));
        assert_eq!(rotation.failed(&identity("a"), now, 0.0), None);
    }

    #[test]
    fn a_certificate_that_is_almost_over_is_not_asked_for_in_a_loop() {
        let (mut rotation, now) = (Rotation::default(), start());
        rotation.want(&identity("a"), &"p".into(), now);
        rotation.take_due(now, 8);
        rotation.fetched(&identity("a"), now - HOUR, now - HOUR / 2, now, 0.5);
        assert!(rotation.take_due(now, 8).is_empty());
        assert_eq!(rotation.next_due(), Some(now + SHORTEST_RENEWAL));
    }

    #[test]
    fn nothing_is_asked_for_in_the_name_of_a_deleted_account() {
        let (mut rotation, now) = (Rotation::default(), start());
        rotation.want(&identity("a"), &"p".into(), now);
        rotation.want(&identity("b"), &"q".into(), now);
        rotation.take_due(now, 8);
        // An answer that was under way is not kept.
        rotation.revoke(&[identity("a")].into(), now);
        assert!(!rotation.fetched(&identity("a"), now, now + HOUR, now, 0.0));
        assert!(rotation.fetched(&identity("b"), now, now + HOUR, now, 0.0));
        assert_eq!(rotation.take_due(now + HOUR, 8), [identity("b")]);
        assert_eq!(rotation.next_due(), None);
        // The account is back.
        rotation.revoke(&BTreeSet::new(), now);
        assert_eq!(rotation.take_due(now, 8), [identity("a")]);
    }

    #[test]
    fn at_most_the_limit_is_taken_at_once() {
        let (mut rotation, now) = (Rotation::default(), start());
        for i in 0..20 {
            rotation.want(&identity(&format!("a{i}")), &"p".into(), now);
        }
        assert_eq!(rotation.take_due(now, 8).len(), 8);
        assert_eq!(rotation.take_due(now, 20).len(), 12);
    }
}
