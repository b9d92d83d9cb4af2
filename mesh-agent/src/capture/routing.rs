//! What the Pod's namespace needs so that the application's answers to a transparent client address come back to the agent: a rule,
//! a route and three settings; and a fourth that keeps the agent's ports. Everything here runs inside the namespace
//! (`NetNamespace::run`).
//!
//! The upstream socket's SYN carries our mark; `tcp_fwmark_accept` gives it to the application's accepted socket,
//! `fwmark_reflect` to a reset from a closed port; the rule sends what is marked to our table, which delivers it locally.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use mesh_common::{OUTBOUND_PORT, PLAINTEXT_INBOUND_PORT, PROBE_PORT, TUNNEL_PORT};
use serde::{Deserialize, Serialize};

use super::netlink::{Family, Netlink};
use super::network::{CaptureError, IoContext};

/// "CV". A Pod with NET_ADMIN that sets it on its own packets only delivers them to itself.
pub(super) const RETURN_PATH_MARK: u32 = 0x4356;
/// The same number, beyond the 255 tables that have names.
const TABLE: u32 = RETURN_PATH_MARK;
/// After `local` (0), before `main` (32766) and what CNI plugins commonly add.
const RULE_PREFERENCE: u32 = 100;

const SETTINGS_V4: [&str; 2] = ["net/ipv4/tcp_fwmark_accept", "net/ipv4/fwmark_reflect"];
const SETTINGS_V6: [&str; 1] = ["net/ipv6/fwmark_reflect"];
const WANTED: &str = "1";

const AGENT_PORTS: [u16; 4] = [OUTBOUND_PORT, PLAINTEXT_INBOUND_PORT, TUNNEL_PORT, PROBE_PORT];
/// Ports that the kernel gives nobody who asks for *any* port (IPv4 and IPv6): bind4/6 see only who asks for one by name. A Pod
/// whose port range holds one of the agent's would else have that port when the next agent wants to listen there.
const RESERVED: &str = "net/ipv4/ip_local_reserved_ports";

/// What was there before; written to the enrolment's record before anything is changed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Before {
    pub ipv6: bool,
    /// Setting and its value, of those that were not as wanted.
    pub settings: Vec<(String, String)>,
}

/// Looks at the namespace. `loopback` must be up: the redirected connects go there, and so does the return path.
pub(super) fn observe() -> Result<Before, CaptureError> {
    let netlink = Netlink::open().step("opening a netlink socket in the Pod")?;
    if !netlink.is_loopback_up().step("looking at the Pod's lo")? {
        return Err(CaptureError::Refused(
            "lo is down in the Pod's network namespace: set it up first (`ip link set lo up`)".into(),
        ));
    }
    let ipv6 = has_ipv6();
    let mut settings = Vec::new();
    let reserved = read_setting(RESERVED)?;
    if with_agent_ports(&reserved)? != ports(&reserved)? {
        settings.push((RESERVED.to_owned(), reserved));
    }
    for setting in wanted_settings(ipv6) {
        let value = read_setting(setting)?;
        if value != WANTED {
            settings.push((setting.to_owned(), value));
        }
    }
    Ok(Before { ipv6, settings })
}

/// What is there already is left as it is: a half-done attempt is completed. Names what was missing.
pub(super) fn set_up(before: &Before) -> Result<Vec<&'static str>, CaptureError> {
    let mut missing = Vec::new();
    let netlink = Netlink::open().step("opening a netlink socket in the Pod")?;
    for family in families(before.ipv6) {
        let added = netlink
            .add_local_default(family, TABLE)
            .step("adding the return route in the Pod")?;
        missing.extend(added.then_some("return_route"));
        let added = netlink
            .add_mark_rule(family, RULE_PREFERENCE, RETURN_PATH_MARK, TABLE)
            .step("adding the return rule in the Pod")?;
        missing.extend(added.then_some("return_rule"));
    }
    for setting in wanted_settings(before.ipv6) {
        if read_setting(setting)? != WANTED {
            write_setting(setting, WANTED)?;
            missing.push(setting);
        }
    }
    let reserved = read_setting(RESERVED)?;
    let wanted = with_agent_ports(&reserved)?;
    if wanted != ports(&reserved)? {
        write_setting(RESERVED, &ranges(&wanted))?;
        missing.push(RESERVED);
    }
    Ok(missing)
}

/// What is gone already is fine. A setting that somebody changed since is left to them. Goes on after an error, and returns the
/// first.
pub(super) fn undo(before: &Before) -> Result<(), CaptureError> {
    let mut first = Ok(());
    let mut keep = |result: Result<(), CaptureError>| {
        if first.is_ok() {
            first = result;
        }
    };
    for (setting, value) in &before.settings {
        keep(read_setting(setting).and_then(|now| match setting.as_str() {
            RESERVED => {
                // Others of the Pod may have reserved more since.
                let (mut now, before) = (ports(&now)?, ports(value)?);
                now.retain(|port| before.contains(port) || !AGENT_PORTS.contains(port));
                write_setting(setting, &ranges(&now))
            }
            _ if now == WANTED => write_setting(setting, value),
            _ => Ok(()),
        }));
    }
    match Netlink::open().step("opening a netlink socket in the Pod") {
        Ok(netlink) => {
            for family in families(before.ipv6) {
                keep(
                    netlink
                        .remove_mark_rule(family, RULE_PREFERENCE, RETURN_PATH_MARK, TABLE)
                        .step("removing the return rule in the Pod")
                        .map(|_| ()),
                );
                keep(
                    netlink
                        .remove_local_default(family, TABLE)
                        .step("removing the return route in the Pod")
                        .map(|_| ()),
                );
            }
        }
        Err(error) => keep(Err(error)),
    }
    first
}

fn families(ipv6: bool) -> impl Iterator<Item = Family> {
    std::iter::once(Family::V4).chain(ipv6.then_some(Family::V6))
}

fn wanted_settings(ipv6: bool) -> impl Iterator<Item = &'static str> {
    let v6: &[&str] = if ipv6 { &SETTINGS_V6 } else { &[] };
    SETTINGS_V4.iter().chain(v6).copied()
}

fn with_agent_ports(reserved: &str) -> Result<BTreeSet<u16>, CaptureError> {
    let mut ports = ports(reserved)?;
    ports.extend(AGENT_PORTS);
    Ok(ports)
}

/// A list as `8080,9000-9002`, as proc(5) has it.
fn ports(list: &str) -> Result<BTreeSet<u16>, CaptureError> {
    let mut ports = BTreeSet::new();
    for part in list.split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        match (first.parse(), last.parse()) {
            (Ok(first), Ok(last)) => ports.extend::<RangeInclusive<u16>>(first..=last),
            _ => {
                return Err(CaptureError::Other(format!(
                    "{RESERVED} in the Pod holds {part:?}, which is no port"
                )));
            }
        }
    }
    Ok(ports)
}

fn ranges(ports: &BTreeSet<u16>) -> String {
    let mut ranges: Vec<(u16, u16)> = Vec::new();
    for &port in ports {
        match ranges.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(port) => *last = port,
            _ => ranges.push((port, port)),
        }
    }
    let texts: Vec<String> = ranges.iter().map(|(first, last)| format!("{first}-{last}")).collect();
    texts.join(",")
}

fn has_ipv6() -> bool {
    read_setting("net/ipv6/conf/lo/disable_ipv6").is_ok_and(|value| value == "0")
}

/// Where the folder `net` of sysctls is: it shows those of the namespace that the reading thread is in, wherever it is mounted.
static SETTINGS: OnceLock<PathBuf> = OnceLock::new();

/// Instead of /proc/sys, which a container has read-only. Once, and before the first Pod.
pub fn use_settings_at(root: &Path) {
    // Who comes later finds what is in use already.
    let _ = SETTINGS.set(root.to_owned());
}

fn setting_path(setting: &str) -> PathBuf {
    SETTINGS.get().map_or(Path::new("/proc/sys"), PathBuf::as_path).join(setting)
}

fn read_setting(setting: &str) -> Result<String, CaptureError> {
    let text = fs::read_to_string(setting_path(setting)).step("reading a sysctl in the Pod")?;
    Ok(text.trim().to_owned())
}

fn write_setting(setting: &str, value: &str) -> Result<(), CaptureError> {
    // An empty list without its line end would be no write at all.
    let path = setting_path(setting);
    match fs::write(&path, format!("{value}\n")) {
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => Err(CaptureError::Refused(format!(
            "{} is read-only for the agent, which must set it in the Pod: mount the node's /proc/sys/net into its container, writable, \
             and name the folder above it with --sysctl-root",
            path.display()
        ))),
        result => result.step("writing a sysctl in the Pod"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_ports_are_read_and_written() {
        for (list, written) in [
            ("", ""),
            ("8080", "8080-8080"),
            ("8080,9000-9002", "8080-8080,9000-9002"),
            ("1-2,3,65534-65535", "1-3,65534-65535"),
        ] {
            assert_eq!(ranges(&ports(list).unwrap()), written);
        }
        for bad in ["a", "1-", "-1", "65536", "1,b"] {
            assert!(ports(bad).is_err(), "{bad}");
        }
        assert_eq!(ranges(&with_agent_ports("15007").unwrap()), "15001-15001,15006-15009");
        assert!(AGENT_PORTS.into_iter().all(mesh_common::is_agent_port));
    }
}
