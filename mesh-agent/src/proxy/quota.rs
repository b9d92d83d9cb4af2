//! How many of something at a time: in all, from one address, and from strangers together, so that whoever has no name in the mesh
//! leaves room for those who have, and no member takes the others' places.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use parking_lot::Mutex;

use super::limits::QuotaLimits;

#[derive(Debug)]
pub(super) struct Quota {
    limits: QuotaLimits,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    total: usize,
    strangers: usize,
    /// Bounded by `total`.
    by_address: HashMap<IpAddr, usize>,
}

/// A place; given back when dropped.
#[derive(Debug)]
pub(super) struct Place {
    quota: Arc<Quota>,
    address: IpAddr,
    is_member: bool,
}

impl Quota {
    pub(super) fn new(limits: QuotaLimits) -> Arc<Self> {
        Arc::new(Self {
            limits,
            taken: Mutex::default(),
        })
    }

    pub(super) fn take(self: &Arc<Self>, address: IpAddr, is_member: bool) -> Option<Place> {
        let mut taken = self.taken.lock();
        let from_address = taken.by_address.get(&address).copied().unwrap_or(0);
        if taken.total >= self.limits.total
            || from_address >= self.limits.per_address
            || !is_member && taken.strangers >= self.limits.strangers
        {
            return None;
        }
        taken.total += 1;
        taken.strangers += usize::from(!is_member);
        taken.by_address.insert(address, from_address + 1);
        Some(Place {
            quota: self.clone(),
            address,
            is_member,
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.quota.taken.lock();
        taken.total -= 1;
        taken.strangers -= usize::from(!self.is_member);
        if let Some(from_address) = taken.by_address.get_mut(&self.address) {
            *from_address -= 1;
            if *from_address == 0 {
                taken.by_address.remove(&self.address);
            }
        }
    }
}
