//! What is in the mesh by address alone, for those who see only packets.

use std::net::Ipv6Addr;

use ipnet::{IpNet, Ipv6Net};

use super::State;
use crate::workload::Membership;

impl State {
    /// Prefixes that are in the mesh (`true`), or taken out of it: of those that an address is in, the longest counts. What is in
    /// none is outside. Before everything was told once, everything is in the mesh. Ports that are excluded do not show here: the
    /// address stays the mesh's.
    #[must_use]
    pub fn prefixes(&self) -> Vec<(IpNet, bool)> {
        if !self.synced {
            return vec![(everything(), true)];
        }
        let excluded = &self.settings.excluded.ranges;
        let ranges = &self.settings.pod_ranges;
        let members = self.addresses.iter().filter_map(|(ip, holders)| {
            let holder = holders.last()?;
            (holder.membership != Membership::Outside).then_some(ip)
        });
        let addresses = members
            .chain(self.vips.keys())
            .filter(|ip| !ranges.iter().any(|range| range.contains(*ip)))
            .map(|ip| IpNet::from(*ip));
        let mut prefixes: Vec<_> = ranges
            .iter()
            .copied()
            .chain(addresses)
            .filter(|prefix| !excluded.iter().any(|range| range.contains(prefix)))
            .map(|prefix| (prefix.trunc(), true))
            .chain(excluded.iter().map(|range| (range.trunc(), false)))
            .collect();
        prefixes.sort_unstable();
        prefixes.dedup();
        prefixes
    }
}

/// IPv4 as well: addresses are v4-mapped in the kernel.
fn everything() -> IpNet {
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 0))
}
