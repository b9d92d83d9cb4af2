//! Places for connections: so many in all, and so many of them for one address, so that one host cannot take them all.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use parking_lot::Mutex;
use prometheus::IntGauge;

#[derive(Clone)]
pub struct Places {
    open: Arc<Mutex<Open>>,
    most: usize,
    most_of_address: usize,
    /// Goes with how many are taken.
    gauge: Option<IntGauge>,
}

#[derive(Default)]
struct Open {
    total: usize,
    by_address: HashMap<IpAddr, usize>,
}

/// A place among the open connections, until it is dropped.
pub struct Place {
    places: Places,
    address: IpAddr,
}

impl Places {
    #[must_use]
    pub fn new(most: usize, most_of_address: usize, gauge: Option<IntGauge>) -> Self {
        Self {
            open: Arc::default(),
            most,
            most_of_address,
            gauge,
        }
    }

    /// `None` at either bound.
    #[must_use]
    pub fn take(&self, peer: IpAddr) -> Option<Place> {
        let address = host_of(peer);
        let mut open = self.open.lock();
        let of_address = open.by_address.get(&address).copied().unwrap_or(0);
        if open.total >= self.most || of_address >= self.most_of_address {
            return None;
        }
        open.total += 1;
        open.by_address.insert(address, of_address + 1);
        if let Some(gauge) = &self.gauge {
            gauge.inc();
        }
        Some(Place {
            places: self.clone(),
            address,
        })
    }
}

impl Place {
    /// For whom it is: an address, or an IPv6 /64.
    #[must_use]
    pub fn host(&self) -> IpAddr {
        self.address
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(gauge) = &self.places.gauge {
            gauge.dec();
        }
        let mut open = self.places.open.lock();
        open.total -= 1;
        if let Some(of_address) = open.by_address.get_mut(&self.address) {
            *of_address -= 1;
            if *of_address == 0 {
                open.by_address.remove(&self.address);
            }
        }
    }
}

/// What counts as one host: an IPv6 host may take any address of its /64.
fn host_of(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V4(v4) => v4.into(),
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv6_host_is_its_64_and_another_one_is_not() {
        let places = Places::new(5, 2, None);
        let take = |peer: &str| places.take(peer.parse().expect("address"));
        let first = take("2001:db8::1").expect("room");
        let _second = take("2001:db8::ffff:2").expect("room");
        assert!(take("2001:db8::3").is_none(), "the same /64");
        let _other = take("2001:db8:0:1::1").expect("another /64");
        let _mapped = take("::ffff:10.0.0.1").expect("room");
        let _v4 = take("10.0.0.1").expect("room");
        assert!(take("10.0.0.1").is_none(), "IPv4 counts as one address however it is written");
        assert!(take("10.0.0.2").is_none(), "all places are taken");
        drop(first);
        assert!(take("2001:db8::3").is_some(), "given back");
    }
}
