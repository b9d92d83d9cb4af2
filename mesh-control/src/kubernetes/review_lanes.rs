//! Whose turn it is to be asked about at the API server.
//!
//! Tokens that were accepted lately have turns of their own, and of all others each host has a few at a time: a flood of bad tokens
//! neither keeps known agents waiting, nor new ones of other hosts for long.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{MutexGuard, Semaphore, SemaphorePermit};
use tokio::time::timeout;

use super::review_cache::TokenHash;
use crate::limits::{MAX_REVIEWS, MAX_REVIEWS_OF_HOST, MAX_REVIEWS_WAITING, MAX_REVIEWS_WAITING_OF_HOST, REVIEW_TIMEOUT};
use crate::tokens::Refusal;

/// A review is made under the lock that its token falls to: so many at once, and the same token's callers share one.
type Turns = [tokio::sync::Mutex<()>; MAX_REVIEWS];

pub struct Lanes {
    known: Turns,
    strangers: Turns,
    pub(super) waiting: Semaphore,
    hosts: Mutex<HashMap<IpAddr, OfHost>>,
}

struct OfHost {
    turns: Arc<Semaphore>,
    callers: usize,
}

/// The right to ask; it ends with this.
pub struct Turn<'a> {
    _turn: MutexGuard<'a, ()>,
    _host: Option<(HostPlace<'a>, tokio::sync::OwnedSemaphorePermit)>,
    _waiting: Option<SemaphorePermit<'a>>,
}

/// A caller of a host; the host is forgotten with its last one.
struct HostPlace<'a> {
    hosts: &'a Mutex<HashMap<IpAddr, OfHost>>,
    host: IpAddr,
}

impl Drop for HostPlace<'_> {
    fn drop(&mut self) {
        let mut hosts = self.hosts.lock();
        if let Some(of_host) = hosts.get_mut(&self.host) {
            of_host.callers -= 1;
            if of_host.callers == 0 {
                hosts.remove(&self.host);
            }
        }
    }
}

impl Default for Lanes {
    fn default() -> Self {
        Self {
            known: std::array::from_fn(|_| tokio::sync::Mutex::default()),
            strangers: std::array::from_fn(|_| tokio::sync::Mutex::default()),
            waiting: Semaphore::new(MAX_REVIEWS_WAITING),
            hosts: Mutex::default(),
        }
    }
}

impl Lanes {
    /// Waits for a turn.
    ///
    /// # Errors
    /// Too many wait already, or for too long.
    pub async fn enter(&self, token: &TokenHash, host: IpAddr, is_known: bool) -> Result<Turn<'_>, Refusal> {
        let turns = if is_known { &self.known } else { &self.strangers };
        let turn = turns[usize::from(token[0]) % MAX_REVIEWS].lock();
        if is_known {
            // As many as there are streams of agents.
            let turn = timeout(REVIEW_TIMEOUT, turn).await.map_err(|_| Refusal::Crowded)?;
            return Ok(Turn {
                _turn: turn,
                _host: None,
                _waiting: None,
            });
        }
        let waiting = self.waiting.try_acquire().map_err(|_| Refusal::Crowded)?;
        let (place, of_host) = self.place(host)?;
        let entered = timeout(REVIEW_TIMEOUT, async {
            let of_host = of_host.acquire_owned().await;
            (of_host, turn.await)
        });
        let (of_host, turn) = entered.await.map_err(|_| Refusal::Crowded)?;
        Ok(Turn {
            _turn: turn,
            _host: Some((place, of_host.map_err(|_| Refusal::Crowded)?)),
            _waiting: Some(waiting),
        })
    }

    fn place(&self, host: IpAddr) -> Result<(HostPlace<'_>, Arc<Semaphore>), Refusal> {
        let mut hosts = self.hosts.lock();
        let of_host = hosts.entry(host).or_insert_with(|| OfHost {
            turns: Arc::new(Semaphore::new(MAX_REVIEWS_OF_HOST)),
            callers: 0,
        });
        if of_host.callers >= MAX_REVIEWS_WAITING_OF_HOST {
            return Err(Refusal::Crowded);
        }
        of_host.callers += 1;
        let turns = Arc::clone(&of_host.turns);
        let hosts = &self.hosts;
        Ok((HostPlace { hosts, host }, turns))
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn host(n: u8) -> IpAddr {
        Ipv4Addr::new(10, 0, 0, n).into()
    }

    fn token(n: u8) -> TokenHash {
        [n; 32]
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_with_many_bad_tokens_keeps_nobody_else_waiting() {
        let lanes = Lanes::default();
        // Two of one host are asked about, and do not end; all of its others wait for these, and for no turn of others.
        let held = [
            lanes.enter(&token(0), host(1), false).await.expect("its first"),
            lanes.enter(&token(1), host(1), false).await.expect("its second"),
        ];
        let tokens: Vec<TokenHash> = (2..50).map(token).collect();
        let flood = tokens.iter().map(|token| lanes.enter(token, host(1), false));
        let flood = futures_of(flood);
        let honest = async {
            // Of those two's turns the flood has the most that it gets.
            for n in (2..50).filter(|n| n % 16 > 1) {
                let turn = lanes.enter(&token(n), host(2), false).await;
                assert!(turn.is_ok(), "a new agent on another host was kept waiting by a flood");
            }
        };
        let (refused, ()) = tokio::join!(flood, honest);
        assert_eq!(refused, 48, "the flood waits for its own");
        drop(held);
        assert!(lanes.hosts.lock().is_empty(), "no host is remembered");
        assert!(lanes.enter(&token(2), host(1), false).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn known_tokens_wait_for_no_stranger() {
        let lanes = Lanes::default();
        let mut held = Vec::new();
        for n in 0..16 {
            held.push(lanes.enter(&token(n), host(n), false).await.expect("a stranger"));
        }
        assert!(
            lanes.enter(&token(0), host(99), false).await.is_err(),
            "the strangers' turns are taken"
        );
        for n in 0..16 {
            // Of a host with as many strangers as it may have, too.
            let turn = lanes.enter(&token(n), host(0), true).await;
            assert!(turn.is_ok(), "a known agent was kept waiting by strangers");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_has_a_bounded_crowd() {
        let lanes = Lanes::default();
        let places: Vec<_> = (0..MAX_REVIEWS_WAITING_OF_HOST).map(|_| lanes.place(host(1))).collect();
        assert!(places.iter().all(Result::is_ok));
        assert!(lanes.place(host(1)).is_err());
        assert!(lanes.place(host(2)).is_ok());
        drop(places);
        assert!(lanes.place(host(1)).is_ok());
    }

    /// How many were refused; those that were not keep their turns until the last one is answered.
    async fn futures_of<'a>(turns: impl Iterator<Item = impl Future<Output = Result<Turn<'a>, Refusal>>>) -> usize {
        let mut turns: Vec<_> = turns.map(Box::pin).collect();
        let (mut refused, mut held) = (0, Vec::new());
        std::future::poll_fn(|cx| {
            turns.retain_mut(|turn| match turn.as_mut().poll(cx) {
                std::task::Poll::Ready(Ok(turn)) => {
                    held.push(turn);
                    false
                }
                std::task::Poll::Ready(Err(_)) => {
                    refused += 1;
                    false
                }
                std::task::Poll::Pending => true,
            });
            if turns.is_empty() {
                std::task::Poll::Ready(())
            } else {
                std::task::Poll::Pending
            }
        })
        .await;
        refused
    }
}
