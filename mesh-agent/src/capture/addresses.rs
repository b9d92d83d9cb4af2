//! The addresses that a Pod is enrolled with: checked against its network namespace, and waited for while they are tentative.

use std::net::IpAddr;
use std::time::Duration;

use mesh_common::limits::MAX_POD_ADDRESSES;
use tokio::time::{Instant, sleep};

use super::CaptureError;
use super::netlink::{AddressState, Netlink};
use super::netns::NetNamespace;
use super::network::IoContext;

/// How long an enrolment waits for the duplicate address detection of IPv6 (1 s by default, and its random delay of up to 1 s).
const TENTATIVE_TIMEOUT: Duration = Duration::from_secs(3);
const TENTATIVE_POLL: Duration = Duration::from_millis(50);

/// The addresses of a Pod in canonical form, each once.
pub fn normal_addresses(addresses: &[IpAddr]) -> Result<Vec<IpAddr>, CaptureError> {
    let mut normal: Vec<IpAddr> = Vec::new();
    for address in addresses.iter().map(IpAddr::to_canonical) {
        if address.is_loopback() || address.is_unspecified() || address.is_multicast() {
            return Err(CaptureError::Refused(format!("{address} cannot be a Pod's address")));
        }
        if !normal.contains(&address) {
            normal.push(address);
        }
    }
    if normal.is_empty() || normal.len() > MAX_POD_ADDRESSES {
        return Err(CaptureError::Refused(format!(
            "a Pod has one to {MAX_POD_ADDRESSES} addresses, not {}",
            normal.len()
        )));
    }
    Ok(normal)
}

/// Each address must be the namespace's own, and usable.
pub async fn wait_for_addresses(netns: &NetNamespace, addresses: &[IpAddr]) -> Result<(), CaptureError> {
    let deadline = Instant::now() + TENTATIVE_TIMEOUT;
    loop {
        let present = netns.run(|| {
            Netlink::open()
                .and_then(|netlink| netlink.addresses())
                .step("reading the Pod's addresses")
        })?;
        match unready(&present, addresses)? {
            None => return Ok(()),
            Some(address) if Instant::now() >= deadline => {
                return Err(CaptureError::Refused(format!("address {address} is tentative for too long")));
            }
            Some(_) => sleep(TENTATIVE_POLL).await,
        }
    }
}

/// An address that is not usable yet.
pub fn unready(present: &[(IpAddr, AddressState)], wanted: &[IpAddr]) -> Result<Option<IpAddr>, CaptureError> {
    let mut tentative = None;
    for address in wanted {
        match present.iter().find(|(ip, _)| ip == address) {
            Some((_, AddressState::Usable)) => {}
            Some((_, AddressState::Tentative)) => tentative = Some(*address),
            Some((_, AddressState::Duplicate)) => {
                return Err(CaptureError::Refused(format!(
                    "address {address} is in use by another machine"
                )));
            }
            None => {
                return Err(CaptureError::Refused(format!(
                    "address {address} is not in the Pod's network namespace"
                )));
            }
        }
    }
    Ok(tentative)
}
