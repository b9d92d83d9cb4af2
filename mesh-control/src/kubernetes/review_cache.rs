//! What the API server has said of tokens lately. Pure: the time is given.
//!
//! Two stores, so that a flood of bad tokens takes no room from good ones.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use tokio::time::Instant;

use crate::limits::{Bounds, MAX_ACCEPTED_TOKENS, MAX_REFUSED_TOKENS, REFUSED_LIFE};
use crate::tokens::Refusal;

#[cfg(test)]
mod tests;

/// SHA-256 of a token.
pub type TokenHash = [u8; 32];

/// A token that was accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Accepted {
    pub node: String,
    /// `exp` of its claims; none where it has none.
    pub expires_unix_seconds: Option<u64>,
}

impl Accepted {
    #[must_use]
    pub fn is_over(&self, now_unix_seconds: u64) -> bool {
        self.expires_unix_seconds.is_some_and(|end| now_unix_seconds >= end)
    }
}

#[derive(Debug)]
pub struct ReviewCache {
    life: Duration,
    grace: Duration,
    accepted: Store<Accepted>,
    refused: Store<Refusal>,
}

impl ReviewCache {
    #[must_use]
    pub fn new(bounds: &Bounds) -> Self {
        Self::with_room(bounds, MAX_ACCEPTED_TOKENS, MAX_REFUSED_TOKENS)
    }

    fn with_room(bounds: &Bounds, accepted: usize, refused: usize) -> Self {
        let (life, grace) = (bounds.review_life, bounds.review_grace);
        Self {
            life,
            grace,
            accepted: Store::new(accepted, life + grace),
            refused: Store::new(refused, REFUSED_LIFE),
        }
    }

    /// What was said, if it was said lately enough to be repeated.
    #[must_use]
    pub fn verdict(&self, token: &TokenHash, now: Instant, now_unix_seconds: u64) -> Option<Result<String, Refusal>> {
        if let Some(refusal) = self.refused.within(token, REFUSED_LIFE, now) {
            return Some(Err(*refusal));
        }
        let accepted = self.accepted.within(token, self.life, now)?;
        Some(if accepted.is_over(now_unix_seconds) {
            Err(Refusal::Expired)
        } else {
            Ok(accepted.node.clone())
        })
    }

    /// Whether an open stream may go on by what was said before, while the API server cannot be asked.
    ///
    /// # Errors
    /// The token's own end has come; or it was accepted too long ago, or never.
    pub fn in_grace(&self, token: &TokenHash, now: Instant, now_unix_seconds: u64) -> Result<(), Refusal> {
        match self.accepted.within(token, self.life + self.grace, now) {
            Some(accepted) if accepted.is_over(now_unix_seconds) => Err(Refusal::Expired),
            Some(_) => Ok(()),
            None => Err(Refusal::Unreviewed),
        }
    }

    pub fn keep(&mut self, token: TokenHash, verdict: Result<Accepted, Refusal>, now: Instant) {
        match verdict {
            Ok(accepted) => {
                self.refused.remove(&token);
                self.accepted.insert(token, accepted, now);
            }
            Err(refusal) => {
                // A token that is refused now has no grace from when it was good.
                self.accepted.remove(&token);
                self.refused.insert(token, refusal, now);
            }
        }
    }

    /// How many are held: accepted, refused.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        (self.accepted.entries.len(), self.refused.entries.len())
    }
}

#[derive(Debug)]
struct Store<T> {
    most: usize,
    kept_for: Duration,
    entries: HashMap<TokenHash, (Instant, T)>,
    by_age: BTreeSet<(Instant, TokenHash)>,
}

impl<T> Store<T> {
    fn new(most: usize, kept_for: Duration) -> Self {
        Self {
            most,
            kept_for,
            entries: HashMap::new(),
            by_age: BTreeSet::new(),
        }
    }

    fn within(&self, token: &TokenHash, life: Duration, now: Instant) -> Option<&T> {
        let (at, value) = self.entries.get(token)?;
        (now.saturating_duration_since(*at) < life).then_some(value)
    }

    fn remove(&mut self, token: &TokenHash) {
        if let Some((at, _)) = self.entries.remove(token) {
            self.by_age.remove(&(at, *token));
        }
    }

    /// Forgets what is too old, and where there is no room the oldest: it is asked for again.
    fn insert(&mut self, token: TokenHash, value: T, now: Instant) {
        self.remove(&token);
        while let Some((at, oldest)) = self.by_age.first().copied() {
            if self.entries.len() < self.most && now.saturating_duration_since(at) < self.kept_for {
                break;
            }
            self.remove(&oldest);
        }
        self.by_age.insert((now, token));
        self.entries.insert(token, (now, value));
    }
}
