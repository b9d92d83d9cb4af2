//! What a careless hand, or other software, takes from a capture while its agent runs: seen, said, counted and put back.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use mesh_tests::app::ECHO_PORT;
use mesh_tests::bpf;
use mesh_tests::manifests::pod_uid;
use mesh_tests::mesh::Mesh;
use mesh_tests::poll::{self, SOON};
use mesh_tests::process::Place;
use mesh_tests::suite;
use mesh_tests::topology::NodeName;

use super::{Shared, pin_of, pins};

const NODE: NodeName = NodeName::Two;
const POD: &str = "server";
const LINKS: [&str; 10] = [
    "connect4",
    "connect6",
    "bind4",
    "bind6",
    "getpeername4",
    "getpeername6",
    "getsockname4",
    "getsockname6",
    "connection_events",
    "socket_create",
];
const MAPS: [&str; 13] = [
    "PODS",
    "HEARTBEAT",
    "AGENT_SOCKETS",
    "ORIGINAL_DESTINATIONS",
    "ORIGINAL_DESTINATIONS_OF_SOCKETS",
    "UPSTREAM_CONNECTIONS",
    "LISTENERS",
    "KUBELET",
    "KUBELET_SOCKETS",
    "PROBE_PORTS",
    "PROBE_VOUCHES",
    "MESH_DESTINATIONS",
    "COUNTERS",
];
/// What an operator is told: within this what is broken by hand is seen, said and put back. (5 s pass between two looks.)
const SEEN_WITHIN: Duration = Duration::from_secs(10);
/// A key of a map of prefixes: its length, and an address.
const PREFIX_BYTES: usize = 4 + 16;

pub fn broken_by_hand(shared: &mut Shared) -> Result<()> {
    let mesh = &mut shared.mesh;
    let pins = pins(mesh, NODE);
    let link = |name: &str| pins.join("links").join(name);
    let of_pod = pins.join("pods").join(pod_uid(POD));
    let listed = mesh.listed(POD)?.context("the agent lists its Pod")?;
    let cookie = listed["netns_cookie"].as_u64().context("its cookie")?.to_ne_bytes();
    let slot = u32::from_ne_bytes(bpf::read(&bpf::open(&pins.join(pin_of("PODS")))?, &cookie)?[..4].try_into()?);

    // Of the node: every program's link, with and without its pin; the maps' pins; the heartbeat.
    expect_repair(mesh, &LINKS, || LINKS.iter().try_for_each(|name| bpf::detach(&link(name))))?;
    expect_repair(mesh, &["connect4", "connection_events"], || {
        remove_all(&[link("connect4"), link("connection_events")])
    })?;
    let pins_of_maps = MAPS.map(|name| format!("pin of {name}"));
    expect_repair(mesh, &pins_of_maps.each_ref().map(String::as_str), || {
        remove_all(&MAPS.map(|name| pins.join(pin_of(name))))
    })?;
    for falsified in [0_u64, u64::MAX] {
        expect_repair(mesh, &["heartbeat"], || {
            let heartbeat = bpf::open(&pins.join("HEARTBEAT"))?;
            write_number(&heartbeat, &0_u32.to_ne_bytes(), &falsified.to_ne_bytes())
        })?;
    }
    // Whose connects are taken for the kubelet's probes.
    expect_repair(mesh, &["kubelet"], || {
        let kubelet = bpf::open(&pins.join("KUBELET"))?;
        write_number(&kubelet, &0_u32.to_ne_bytes(), &u64::MAX.to_ne_bytes())
    })?;
    // What the backstop takes for the mesh: without it every raw SYN would pass.
    expect_repair(mesh, &["mesh_destinations"], || {
        let map = bpf::open(&pins.join(pin_of("MESH_DESTINATIONS")))?;
        while let Some(key) = bpf::first_key(&map, PREFIX_BYTES)? {
            bpf::erase(&map, &key)?;
        }
        Ok(())
    })?;

    // Of the Pod: its entries, its program, its way back, the agent's listeners.
    let listeners = [slot * 2, slot * 2 + 1];
    expect_repair(
        mesh,
        &["pods_entry", "original_destinations", "listeners_entry", "sk_lookup"],
        || {
            bpf::erase(&bpf::open(&pins.join(pin_of("PODS")))?, &cookie)?;
            bpf::erase(&bpf::open(&pins.join("ORIGINAL_DESTINATIONS"))?, &cookie)?;
            let map = bpf::open(&pins.join("LISTENERS"))?;
            listeners
                .iter()
                .try_for_each(|index| bpf::erase(&map, &index.to_ne_bytes()))?;
            bpf::detach(&of_pod)
        },
    )?;
    let settings = [
        "net/ipv4/tcp_fwmark_accept",
        "net/ipv4/fwmark_reflect",
        "net/ipv6/fwmark_reflect",
    ];
    let mut all = vec!["pods_entry", "sk_lookup", "backstop", "return_rule", "return_route"];
    all.extend(settings);
    expect_repair(mesh, &all, || {
        let pods = bpf::open(&pins.join(pin_of("PODS")))?;
        let mut value = bpf::read(&pods, &cookie)?;
        value[..4].copy_from_slice(&(slot + 1).to_ne_bytes());
        bpf::write(&pods, &cookie, value)?;
        remove_all(std::slice::from_ref(&of_pod))?;
        let backstops = std::fs::read_dir(pins.join("backstops").join(pod_uid(POD)))?;
        remove_all(&backstops.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?)?;
        let rules = ["rule del pref 100", "route flush table 17238"];
        let commands = rules.iter().flat_map(|rule| [format!("ip {rule}"), format!("ip -6 {rule}")]);
        let commands = commands.chain(settings.iter().map(|setting| format!("echo 0 > /proc/sys/{setting}")));
        in_pod(mesh, &commands.collect::<Vec<_>>().join(" && "))
    })?;
    // A socket that listens is closed only by who has it, or by this.
    expect_repair_said(
        mesh,
        "a listener of the agent in the Pod was closed: new ones are open",
        1,
        || in_pod(mesh, "ss --kill --listening --tcp --no-header 'sport = :15008' >&2"),
    )?;

    // What was pinned again is what the next agent takes over.
    mesh.kill_agent(NODE);
    mesh.start_agent(NODE)?;
    works(mesh)
}

fn write_number(map: &std::os::fd::OwnedFd, key: &[u8], number: &[u8]) -> Result<()> {
    let mut value = bpf::read(map, key)?;
    value[..number.len()].copy_from_slice(number);
    bpf::write(map, key, value)
}

fn remove_all(paths: &[PathBuf]) -> Result<()> {
    paths
        .iter()
        .try_for_each(|path| std::fs::remove_file(path).with_context(|| path.display().to_string()))
}

/// As the administrator of the node, in the Pod's network namespace.
fn in_pod(mesh: &Mesh, command: &str) -> Result<()> {
    let place = Place {
        netns: mesh.pod(POD).netns.path(),
        cgroup: None,
        unprivileged: false,
    };
    place.run(Path::new("/bin/sh"), &["-c", command], SOON)?.ok(command).map(drop)
}

/// Takes these pieces away, and waits until each is said to be put back, and counted.
fn expect_repair(mesh: &Mesh, pieces: &[&str], take: impl FnOnce() -> Result<()>) -> Result<()> {
    let quoted: Vec<String> = pieces.iter().map(|piece| format!("\"{piece}\"")).collect();
    let wanted: Vec<&str> = quoted.iter().map(String::as_str).collect();
    expect_all(mesh, &wanted, pieces.len(), take)
}

fn expect_repair_said(mesh: &Mesh, says: &str, pieces: usize, take: impl FnOnce() -> Result<()>) -> Result<()> {
    expect_all(mesh, &[says], pieces, take)
}

fn expect_all(mesh: &Mesh, wanted: &[&str], pieces: usize, take: impl FnOnce() -> Result<()>) -> Result<()> {
    let log = mesh.topology.node(NODE).folder.join("mesh-agent.log");
    let said = std::fs::metadata(&log)?.len();
    let repaired = || mesh.metric(NODE, "mesh_capture_events_total", &[("event", "repaired")]);
    let before = repaired()?;
    take().with_context(|| format!("taking away {wanted:?}"))?;
    let start = Instant::now();
    poll::until_true("what was taken away is put back", SEEN_WITHIN, || {
        let text = std::fs::read(&log)?;
        let text = String::from_utf8_lossy(&text[usize::try_from(said)?..]).into_owned();
        Ok(wanted.iter().all(|words| text.contains(words)) && repaired()? >= before + pieces as f64)
    })
    .with_context(|| format!("{wanted:?}; repaired before {before}"))?;
    suite::say(&format!("{wanted:?}: put back after {:.1} s", start.elapsed().as_secs_f32()));
    works(mesh).with_context(|| format!("after {wanted:?} were put back"))
}

fn works(mesh: &Mesh) -> Result<()> {
    mesh.wait_for_tunnel("client", POD)?;
    mesh.wait_for_outcome(POD, mesh.pod("client").v4.into(), ECHO_PORT, true)
}
