//! The demo's claims. Each gathers its evidence at the moment it is made, and fails with what it expected and saw.

mod attack;
mod policy;
mod restart;

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use crate::access_log::text;
use crate::app::{ECHO_PORT, HTTP_PORT};
use crate::firewall;
use crate::manifests::{self, principal, spiffe_id};
use crate::mesh::Mesh;
use crate::poll;
use crate::topology::NodeName;
use crate::wire::Recorder;

pub struct Claim {
    pub says: &'static str,
    /// Answers the evidence, line by line.
    pub prove: fn(&mut Mesh) -> Result<Vec<String>>,
}

pub const ALL: &[Claim] = &[
    Claim {
        says: "HTTP by Pod IP works, across nodes and within a node, over IPv4 and IPv6",
        prove: http_works,
    },
    Claim {
        says: "the server sees the client's true IP",
        prove: true_client_ip,
    },
    Claim {
        says: "the application sees the address that it asked for, not the agent's",
        prove: addresses_are_true,
    },
    Claim {
        says: "between the nodes the bytes are encrypted",
        prove: wire_is_encrypted,
    },
    Claim {
        says: "the same search finds the marker of a Pod outside the mesh",
        prove: wire_shows_the_outsider,
    },
    Claim {
        says: "no rule of iptables or nftables, in no node and no Pod",
        prove: no_firewall_rules,
    },
    Claim {
        says: "the access log names both SPIFFE identities",
        prove: identities_are_logged,
    },
    Claim {
        says: "a Deny policy dropped into the folder refuses, its removal allows",
        prove: deny_and_allow,
    },
    Claim {
        says: "a policy that names principals keeps the plaintext outsider out",
        prove: outsider_is_denied,
    },
    Claim {
        says: "a Service's address reaches its endpoint, and the application sees the address that it asked for",
        prove: policy::service_address,
    },
    Claim {
        says: "STRICT mutual TLS keeps the plaintext outsider out, the mesh goes on",
        prove: policy::strict,
    },
    Claim {
        says: "a Deny policy cuts a connection that is open, and another one goes on",
        prove: policy::live_cut,
    },
    Claim {
        says: "a dry-run policy is counted and logged, and refuses nobody",
        prove: policy::dry_run,
    },
    Claim {
        says: "an agent is replaced under load, on either node, and no connection fails",
        prove: restart::graceful,
    },
    Claim {
        says: "an attack: multipath TCP, whose second path no kernel program sees, is not to be had in a Pod of the mesh",
        prove: attack::multipath,
    },
    Claim {
        says: "an attack: who comes to the agent's port without a certificate gets nothing, is counted and logged",
        prove: attack::agents_port,
    },
    Claim {
        says: "with its agent killed, a Pod's new connections are refused at once",
        prove: dead_agent_refuses,
    },
    Claim {
        says: "with the agent back, traffic flows again",
        prove: restarted_agent_works,
    },
];

/// What "at once" means on a machine with two busy cores.
const AT_ONCE: Duration = Duration::from_millis(500);

fn http_works(mesh: &mut Mesh) -> Result<Vec<String>> {
    let mut evidence = Vec::new();
    let client = mesh.pod("client").place();
    for server in ["server", "local"] {
        for address in mesh.pod(server).addresses() {
            let body = mesh.app.get(&client, address, "/hello")?;
            ensure!(
                body.contains(&format!("server={server} ")),
                "expected an answer of {server}, saw {body}"
            );
            evidence.push(format!("client → {}: {}", SocketAddr::new(address, HTTP_PORT), body.trim()));
        }
    }
    Ok(evidence)
}

fn true_client_ip(mesh: &mut Mesh) -> Result<Vec<String>> {
    let mut evidence = Vec::new();
    let client = mesh.pod("client");
    for server in ["server", "local"] {
        for (address, from) in mesh.pod(server).addresses().into_iter().zip(client.addresses()) {
            let body = mesh.app.get(&client.place(), address, "/who-am-i")?;
            ensure!(
                body.contains(&format!("client={from} ")),
                "expected that {server} saw {from}, it answered {body}"
            );
            evidence.push(format!("{server} saw {from}"));
        }
    }
    Ok(evidence)
}

fn addresses_are_true(mesh: &mut Mesh) -> Result<Vec<String>> {
    let mut evidence = Vec::new();
    let client = mesh.pod("client");
    for address in mesh.pod("server").addresses() {
        let wanted = SocketAddr::new(address, ECHO_PORT).to_string();
        let attempt = mesh.app.connect(&client.place(), address, ECHO_PORT)?;
        let peer = attempt.expect_ok()?.report["peer"].as_str().unwrap_or_default().to_owned();
        ensure!(peer == wanted, "expected getpeername to say {wanted}, it said {peer}");
        evidence.push(format!("getpeername says {peer}"));
    }
    Ok(evidence)
}

fn marker() -> String {
    format!("marker-{:032x}", rand::random::<u128>())
}

/// Sends a marker to the server's both addresses and records the wire between the nodes meanwhile.
fn send_marker(mesh: &Mesh, from: &str, marker: &str) -> Result<crate::wire::Recording> {
    let recorder = Recorder::start(&mesh.topology.node(NodeName::One).netns, "uplink")?;
    for address in mesh.pod("server").addresses() {
        let body = mesh.app.get(&mesh.pod(from).place(), address, &format!("/{marker}"))?;
        ensure!(body.contains(marker), "expected the marker in the answer, saw {body}");
    }
    recorder.finish()
}

fn wire_is_encrypted(mesh: &mut Mesh) -> Result<Vec<String>> {
    let marker = marker();
    let recording = send_marker(mesh, "client", &marker)?;
    ensure!(
        recording.frames > 0,
        "nothing passed between the nodes: the recording proves nothing"
    );
    ensure!(
        !recording.contains(marker.as_bytes()),
        "the marker passed between the nodes in clear"
    );
    Ok(vec![format!(
        "{marker} arrived and came back; it is in none of the {} frames ({} bytes) between the nodes",
        recording.frames,
        recording.len_bytes()
    )])
}

fn wire_shows_the_outsider(mesh: &mut Mesh) -> Result<Vec<String>> {
    let marker = marker();
    let recording = send_marker(mesh, "outsider", &marker)?;
    ensure!(
        recording.contains(marker.as_bytes()),
        "the outsider's marker was not found: the search is blind"
    );
    Ok(vec![format!(
        "{marker}, sent by the Pod outside the mesh, is among the {} frames",
        recording.frames
    )])
}

fn no_firewall_rules(mesh: &mut Mesh) -> Result<Vec<String>> {
    let nodes = NodeName::ALL.map(|node| (node.as_str(), &mesh.topology.node(node).netns));
    let pods = mesh.topology.pods().map(|(name, pod)| (name, &pod.netns));
    let mut asked = Vec::new();
    for (name, netns) in nodes.into_iter().chain(pods) {
        let tables = firewall::tables(netns)?;
        ensure!(tables.is_empty(), "expected no table of rules in {name}, saw {tables:?}");
        asked.push(name);
    }
    Ok(vec![format!(
        "asked of the kernel (netlink for nftables, /proc for legacy iptables): no table, so no rule, in {}",
        asked.join(", ")
    )])
}

fn identities_are_logged(mesh: &mut Mesh) -> Result<Vec<String>> {
    let server = mesh.pod("server");
    let log = mesh.access_log(NodeName::Two);
    let position = log.position();
    mesh.app
        .connect(&mesh.pod("client").place(), server.v4.into(), ECHO_PORT)?
        .expect_ok()?;
    let (source, destination) = (spiffe_id("client"), spiffe_id("server"));
    let line = log.wait_for(
        position,
        &[
            ("direction", "inbound"),
            ("path", "tunnel"),
            ("result", "ok"),
            ("source_principal", &source),
            ("destination_principal", &destination),
            ("connection_security_policy", "mutual_tls"),
        ],
        poll::SOON,
    )?;
    Ok(["source_principal", "destination_principal", "connection_security_policy"]
        .map(|field| format!("{field}: {}", text(&line, field)))
        .to_vec())
}

fn deny_and_allow(mesh: &mut Mesh) -> Result<Vec<String>> {
    let server: IpAddr = mesh.pod("server").v4.into();
    let rule = format!("[{{ from: [{{ principals: [{}] }}] }}]", principal("client"));
    mesh.app
        .connect(&mesh.pod("client").place(), server, ECHO_PORT)?
        .expect_ok()?;
    mesh.registry
        .write("deny-client.yaml", &manifests::policy("deny-client", "server", "Deny", &rule))?;
    let start = Instant::now();
    mesh.wait_for_outcome("client", server, ECHO_PORT, false)?;
    let mut evidence = vec![format!("refused {:?} after the file was written", start.elapsed())];
    let refused = mesh.app.connect(&mesh.pod("client").place(), server, ECHO_PORT)?;
    refused.expect_refused(AT_ONCE)?;
    evidence.push(format!(
        "the client saw: {}",
        refused.report["message"].as_str().unwrap_or_default()
    ));
    mesh.app
        .connect(&mesh.pod("local").place(), server, ECHO_PORT)?
        .expect_ok()
        .context("the Pod local, which no policy names")?;
    evidence.push("the Pod local, which the policy does not name, still connects".to_owned());
    mesh.registry.remove("deny-client.yaml")?;
    let start = Instant::now();
    mesh.wait_for_outcome("client", server, ECHO_PORT, true)?;
    evidence.push(format!("allowed {:?} after the file was removed", start.elapsed()));
    Ok(evidence)
}

fn outsider_is_denied(mesh: &mut Mesh) -> Result<Vec<String>> {
    let addresses = mesh.pod("server").addresses();
    let outsider = mesh.pod("outsider").place();
    mesh.app
        .connect(&outsider, addresses[0], ECHO_PORT)?
        .expect_ok()
        .context("before the policy")?;
    let rule = format!("[{{ from: [{{ principals: [{}] }}] }}]", principal("client"));
    mesh.registry.write(
        "allow-client.yaml",
        &manifests::policy("allow-client", "server", "Allow", &rule),
    )?;
    let mut evidence = Vec::new();
    for address in addresses {
        mesh.wait_for_outcome("outsider", address, ECHO_PORT, false)?;
        let refused = mesh.app.connect(&mesh.pod("outsider").place(), address, ECHO_PORT)?;
        refused.expect_refused(AT_ONCE)?;
        evidence.push(format!(
            "outsider → {address}: {}",
            refused.report["message"].as_str().unwrap_or_default()
        ));
        mesh.app
            .connect(&mesh.pod("client").place(), address, ECHO_PORT)?
            .expect_ok()
            .context("the principal allowed")?;
        evidence.push(format!("client → {address}: works, by its principal"));
    }
    mesh.registry.remove("allow-client.yaml")?;
    mesh.wait_for_outcome("outsider", addresses[0], ECHO_PORT, true)?;
    Ok(evidence)
}

fn dead_agent_refuses(mesh: &mut Mesh) -> Result<Vec<String>> {
    mesh.kill_agent(NodeName::One);
    let mut evidence = Vec::new();
    for address in mesh.pod("server").addresses() {
        let attempt = mesh.app.connect(&mesh.pod("client").place(), address, ECHO_PORT)?;
        attempt.expect_refused(AT_ONCE)?;
        evidence.push(format!(
            "client → {address}: {} after {} ms",
            attempt.report["error"].as_str().unwrap_or_default(),
            attempt.report["elapsed_ms"]
        ));
    }
    Ok(evidence)
}

fn restarted_agent_works(mesh: &mut Mesh) -> Result<Vec<String>> {
    let start = Instant::now();
    mesh.start_agent(NodeName::One)?;
    for server in ["server", "local"] {
        mesh.wait_for_tunnel("client", server)?;
    }
    Ok(vec![format!(
        "ready and tunnelling again {:?} after its start; its Pods needed nothing",
        start.elapsed()
    )])
}
