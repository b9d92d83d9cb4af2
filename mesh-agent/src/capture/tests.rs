use super::addresses::unready;
use super::enrol::free_slot;
use super::netlink::AddressState;
use super::*;
use mesh_common::limits::MAX_PODS;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn addresses_are_normal_unique_and_bounded() {
    let normal = normal_addresses(&[ip("::ffff:10.0.0.1"), ip("10.0.0.1"), ip("fd00::1")]).unwrap();
    assert_eq!(normal, [ip("10.0.0.1"), ip("fd00::1")]);
    let five: Vec<_> = (1..=5).map(|i| ip(&format!("10.0.0.{i}"))).collect();
    for bad in [&[][..], &five, &[ip("127.0.0.1")], &[ip("::")], &[ip("ff02::1")]] {
        assert!(normal_addresses(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn a_missing_address_is_refused_and_a_tentative_one_waited_for() {
    let present = [
        (ip("10.0.0.1"), AddressState::Usable),
        (ip("fd00::1"), AddressState::Tentative),
        (ip("fd00::2"), AddressState::Duplicate),
    ];
    assert_eq!(unready(&present, &[ip("10.0.0.1")]).unwrap(), None);
    assert_eq!(
        unready(&present, &[ip("10.0.0.1"), ip("fd00::1")]).unwrap(),
        Some(ip("fd00::1"))
    );
    assert!(unready(&present, &[ip("fd00::2")]).is_err());
    assert!(unready(&present, &[ip("10.0.0.2")]).is_err());
}

#[test]
fn slots_run_out() {
    assert_eq!(free_slot([0, 1, 3].into_iter()), Some(2));
    assert_eq!(free_slot(0..MAX_PODS), None);
    assert_eq!(free_slot([MAX_PODS + 5].into_iter()), Some(0));
}
