//! Which endpoint a client keeps (`sessionAffinity: ClientIP`). Pure: the time is given.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};

#[cfg(test)]
mod tests;

/// What connections have in common that go to one endpoint: as kube-proxy has it, each port of a service has its own.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct AffinityKey {
    pub client: IpAddr,
    pub service: Arc<str>,
    pub port: u16,
}

#[derive(Debug)]
struct Kept {
    endpoint: Arc<str>,
    until: Instant,
}

/// The endpoints that clients keep. A client's first one is chosen by its address, so that an agent that does not know of an earlier
/// choice (it was restarted, or has no room) chooses the same while the endpoints are the same.
#[derive(Debug)]
pub struct Affinities {
    kept: HashMap<AffinityKey, Kept>,
    bound: usize,
}

impl Affinities {
    #[must_use]
    pub fn new(bound: usize) -> Self {
        Self {
            kept: HashMap::new(),
            bound,
        }
    }

    /// Takes the endpoint that the client keeps out of `candidates`, or where it is not among them the one that its address chooses.
    /// A weight of 0 is never chosen.
    pub fn take<T>(
        &self,
        key: &AffinityKey,
        candidates: &mut Vec<T>,
        name: impl Fn(&T) -> &str,
        weight: impl Fn(&T) -> u32,
        now: Instant,
    ) -> Option<T> {
        let kept = self.kept.get(key).filter(|kept| now < kept.until);
        let is_kept = |candidate: &T| kept.is_some_and(|kept| *kept.endpoint == *name(candidate));
        let usable = |candidate: &&T| weight(candidate) > 0;
        let position = candidates
            .iter()
            .position(|candidate| is_kept(candidate) && usable(&candidate))
            .or_else(|| {
                let candidates = candidates.iter().enumerate().filter(|(_, candidate)| usable(candidate));
                let scored = candidates.map(|(i, candidate)| (i, score(key, name(candidate), weight(candidate))));
                scored.min_by(|(_, a), (_, b)| a.total_cmp(b)).map(|(i, _)| i)
            })?;
        Some(candidates.swap_remove(position))
    }

    /// The client was connected to this endpoint. False: there is no room to remember it.
    #[must_use]
    pub fn keep(&mut self, key: AffinityKey, endpoint: Arc<str>, now: Instant, timeout: Duration) -> bool {
        if self.kept.len() >= self.bound && !self.kept.contains_key(&key) {
            self.kept.retain(|_, kept| now < kept.until);
            if self.kept.len() >= self.bound {
                return false;
            }
        }
        let until = now + timeout;
        self.kept.insert(key, Kept { endpoint, until });
        true
    }
}

/// Weighted rendezvous hashing: the lowest is chosen, each as often as its weight says; one that is added or taken away changes the
/// choice of those clients alone whose choice it is or was. The hash is the same in every build: an upgraded agent chooses the same.
fn score(key: &AffinityKey, endpoint: &str, weight: u32) -> f64 {
    let mut hasher = Sha256::new();
    match key.client {
        IpAddr::V4(client) => hasher.update(client.octets()),
        IpAddr::V6(client) => hasher.update(client.octets()),
    }
    hasher.update(key.port.to_be_bytes());
    for text in [&key.service, endpoint] {
        hasher.update((text.len() as u64).to_be_bytes());
        hasher.update(text);
    }
    let mut first = [0; 8];
    first.copy_from_slice(&hasher.finalize()[..8]);
    // 53 bits are what a double holds; never 0, whose logarithm is none.
    let uniform = ((u64::from_be_bytes(first) >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
    -uniform.ln() / f64::from(weight)
}
