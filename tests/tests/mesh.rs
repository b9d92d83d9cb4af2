//! The whole mesh on two nodes: what an application may rely on, every case over IPv4, IPv6 and v4-mapped addresses, with
//! applications that are unprivileged and in cgroups of their own.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test: a panic is its failure, and standard output its report"
)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::access_log::text;
use mesh_tests::app::{CLOSED_PORT, ECHO_PORT, HTTP_PORT};
use mesh_tests::demo::PODS;
use mesh_tests::manifests::{MESHED, policy, spiffe_id};
use mesh_tests::mesh::{Mesh, PodSpec};
use mesh_tests::poll::{self, SOON};
use mesh_tests::snapshot;
use mesh_tests::suite;
use mesh_tests::topology::{self, NodeName, WORLD_V4, WORLD_V6};

/// What a refusal may take on a machine with two busy cores; it takes about a millisecond.
const QUICKLY: Duration = Duration::from_secs(1);
/// EPROTONOSUPPORT: on it, applications fall back to TCP.
const PROTOCOL_NOT_SUPPORTED: i64 = 93;
const CONNECTIONS_AT_ONCE: usize = 1_000;
const BULK_BYTES: usize = 64 << 20;
/// mesh-agent's own: outbound, plaintext, tunnel, probe (ARCHITECTURE.md, Ports).
const AGENT_PORTS: [u16; 4] = [15001, 15006, TUNNEL_PORT, PROBE_PORT];
const TUNNEL_PORT: u16 = 15008;
const PROBE_PORT: u16 = 15009;

#[path = "mesh/web_server.rs"]
mod web_server;

fn main() -> ExitCode {
    suite::run(
        "mesh",
        || Mesh::start(&PODS, &mut |_| {}),
        Mesh::with_logs,
        &[
            ("every_family_reaches_both_nodes_by_tunnel", every_family),
            ("a_pod_reaches_itself_by_its_own_address", own_address),
            ("servers_see_the_true_client", true_client),
            ("a_thousand_connections_at_once", concurrent),
            ("bytes_arrive_unchanged_both_ways", bulk),
            ("a_closed_port_refuses_quickly", closed_port),
            ("agent_ports_are_refused", agent_ports),
            ("multipath_tcp_is_refused", multipath),
            ("datagrams_are_left_alone", datagrams),
            ("a_service_address_leads_to_its_endpoint", service_address),
            ("outside_destinations_pass_and_are_counted", outside),
            ("the_access_log_tells_the_whole_connection", access_log),
            ("metrics_and_readiness", metrics),
            ("a_denied_connection_names_its_policy", denied),
            ("a_broken_manifest_leaves_the_last_good_policy", broken_manifest),
            ("a_connection_has_one_log_line_on_each_side", one_line_each),
            ("an_ordinary_web_server_serves_through_the_mesh", web_server::serves),
            ("release_leaves_the_pod_as_it_was", release),
        ],
    )
}

fn every_family(mesh: &mut Mesh) -> Result<()> {
    let client = mesh.pod("client").place();
    for server in ["server", "local"] {
        for address in mesh.pod(server).forms() {
            let wanted = SocketAddr::new(address, ECHO_PORT).to_string();
            let log = mesh.access_log(NodeName::One);
            let position = log.position();
            let attempt = mesh.app.connect(&client, address, ECHO_PORT)?;
            let seen = attempt.expect_ok()?.report["peer"].as_str().unwrap_or_default().to_owned();
            ensure!(seen == wanted, "{wanted}: getpeername said {seen}");
            log.wait_for(
                position,
                &[("direction", "outbound"), ("path", "tunnel"), ("result", "ok")],
                SOON,
            )
            .with_context(|| format!("client → {wanted}"))?;
        }
    }
    Ok(())
}

fn own_address(mesh: &mut Mesh) -> Result<()> {
    let client = mesh.pod("client");
    for address in client.forms() {
        // It has a server of its own, and a connection to oneself never leaves the Pod.
        let body = mesh.app.get(&client.place(), address, "/")?;
        let seen = format!("server=client client={} ", address.to_canonical());
        ensure!(body.contains(&seen), "{body}");
    }
    for loopback in loopbacks() {
        mesh.app.get(&client.place(), loopback, "/")?;
    }
    Ok(())
}

fn loopbacks() -> [IpAddr; 3] {
    topology::forms(Ipv4Addr::LOCALHOST, Ipv6Addr::LOCALHOST)
}

fn true_client(mesh: &mut Mesh) -> Result<()> {
    for from in ["client", "local", "outsider"] {
        let client = mesh.pod(from);
        for address in mesh.pod("server").forms() {
            let own = client.own_address(address);
            let body = mesh.app.get(&client.place(), address, "/")?;
            ensure!(
                body.contains(&format!("client={own} ")),
                "expected {from} as {own}, the server saw {body}"
            );
        }
    }
    Ok(())
}

fn concurrent(mesh: &mut Mesh) -> Result<()> {
    for server in ["server", "local"] {
        for address in mesh.pod(server).forms() {
            let report = mesh.app.swarm(&mesh.pod("client").place(), address, CONNECTIONS_AT_ONCE)?;
            ensure!(report["ok"] == CONNECTIONS_AT_ONCE, "client → {address}: {report}");
        }
    }
    Ok(())
}

fn bulk(mesh: &mut Mesh) -> Result<()> {
    for address in mesh.pod("server").forms() {
        let report = mesh.app.bulk(&mesh.pod("client").place(), address, BULK_BYTES)?;
        ensure!(
            report["received"] == BULK_BYTES && report["sent_sha256"] == report["received_sha256"],
            "{address}: {report}"
        );
    }
    Ok(())
}

fn closed_port(mesh: &mut Mesh) -> Result<()> {
    for server in ["server", "local"] {
        for address in mesh.pod(server).forms() {
            for from in ["client", "outsider"] {
                let attempt = mesh.app.connect(&mesh.pod(from).place(), address, CLOSED_PORT)?;
                attempt
                    .expect_refused(QUICKLY)
                    .with_context(|| format!("{from} → {address}"))?;
            }
        }
    }
    Ok(())
}

/// An application never reaches the agent's own ports: not another Pod's, not (where no destination is recorded, and none is
/// guessed) those of its own.
fn agent_ports(mesh: &mut Mesh) -> Result<()> {
    for (from, to) in [
        ("client", mesh.pod("server").forms()),
        ("client", mesh.pod("local").forms()),
        ("client", mesh.pod("client").forms()),
        ("client", loopbacks()),
        ("outsider", mesh.pod("server").forms()),
    ] {
        for (address, port) in to.into_iter().flat_map(|address| AGENT_PORTS.map(|port| (address, port))) {
            let attempt = mesh.app.connect(&mesh.pod(from).place(), address, port)?;
            if from == "outsider" && [TUNNEL_PORT, PROBE_PORT].contains(&port) {
                // Open to all: who speaks no TLS gets TLS's own alert, and who has no nonce of a probe gets nothing.
                ensure!(!attempt.ok(), "{from} → {address} port {port}: {}", attempt.report);
                continue;
            }
            attempt
                .expect_refused(QUICKLY)
                .with_context(|| format!("{from} → {address} port {port}"))?;
        }
    }
    Ok(())
}

fn multipath(mesh: &mut Mesh) -> Result<()> {
    for address in mesh.pod("server").forms() {
        // A kernel without it refuses as well: only beside a Pod that gets one does a refusal say something.
        let outsider = mesh.app.mptcp(&mesh.pod("outsider").place(), address)?;
        if outsider["socket"] == false {
            return Err(suite::skip(&format!("this kernel has no multipath TCP: {outsider}")));
        }
        let report = mesh.app.mptcp(&mesh.pod("client").place(), address)?;
        let unsupported = report["errno"] == PROTOCOL_NOT_SUPPORTED;
        ensure!(
            report["socket"] == false && unsupported,
            "expected EPROTONOSUPPORT, saw {report}"
        );
    }
    Ok(())
}

fn datagrams(mesh: &mut Mesh) -> Result<()> {
    for address in mesh.pod("server").forms() {
        let report = mesh.app.udp(&mesh.pod("client").place(), address)?;
        ensure!(report["ok"] == true, "{address}: {report}");
    }
    Ok(())
}

/// In every form of address; what it does not have is refused with a reason.
fn service_address(mesh: &mut Mesh) -> Result<()> {
    const PORT: u16 = 80;
    let (v4, v6) = (Ipv4Addr::new(10, 96, 7, 7), Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 7, 7));
    let service = |app: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{ name: shop, namespace: {MESHED} }}\n\
             spec:\n  clusterIP: {v4}\n  clusterIPs: [{v4}, \"{v6}\"]\n  ipFamilies: [IPv4, IPv6]\n\
             \x20 selector: {{ app: {app} }}\n  ports: [{{ port: {PORT}, targetPort: {ECHO_PORT} }}]\n"
        )
    };
    let log = mesh.access_log(NodeName::One);
    mesh.registry.write("service.yaml", &service("server"))?;
    for address in topology::forms(v4, v6) {
        mesh.wait_for_outcome("client", address, PORT, true)?;
        let client = mesh.pod("client").place();
        let position = log.position();
        let attempt = mesh.app.connect(&client, address, PORT)?;
        let wanted = SocketAddr::new(address, PORT).to_string();
        ensure!(attempt.expect_ok()?.report["peer"] == wanted.as_str(), "{}", attempt.report);
        let fields = [("path", "tunnel"), ("result", "ok"), ("destination_workload", "server")];
        log.wait_for(position, &fields, SOON)?;
        let position = log.position();
        mesh.app.connect(&client, address, PORT + 1)?.expect_refused(QUICKLY)?;
        log.wait_for(position, &[("reason", "service_port_unknown")], SOON)?;
    }
    mesh.registry.write("service.yaml", &service("nobody"))?;
    for address in topology::forms(v4, v6) {
        mesh.wait_for_outcome("client", address, PORT, false)?;
        let position = log.position();
        let attempt = mesh.app.connect(&mesh.pod("client").place(), address, PORT)?;
        attempt.expect_refused(QUICKLY)?;
        log.wait_for(position, &[("reason", "no_healthy_endpoint")], SOON)?;
    }
    mesh.registry.remove("service.yaml")
}

fn outside(mesh: &mut Mesh) -> Result<()> {
    let log_file = mesh.topology.folder().join("world.log");
    let _server = mesh.app.serve("world", &mesh.topology.world_place(), log_file)?;
    let client = mesh.pod("client");
    for address in topology::forms(WORLD_V4, WORLD_V6) {
        let own = client.own_address(address);
        let log = mesh.access_log(NodeName::One);
        let position = log.position();
        let body = mesh.app.get(&client.place(), address, "/")?;
        ensure!(body.contains(&format!("client={own} ")), "{body}");
        log.wait_for(
            position,
            &[("direction", "outbound"), ("path", "passthrough"), ("result", "ok")],
            SOON,
        )?;
    }
    let labels = [("source_workload", "client"), ("connection_security_policy", "none")];
    let opened = mesh.metric(NodeName::One, "mesh_tcp_connections_opened_total", &labels)?;
    ensure!(
        opened >= 3.0,
        "expected at least 3 connections outside to be counted, saw {opened}"
    );
    Ok(())
}

fn access_log(mesh: &mut Mesh) -> Result<()> {
    let (client, server) = (mesh.pod("client"), mesh.pod("server"));
    let (source, destination) = (mesh.access_log(NodeName::One), mesh.access_log(NodeName::Two));
    let positions = (source.position(), destination.position());
    let bytes = (1 << 20).to_string();
    mesh.app.bulk(&client.place(), server.v6.into(), 1 << 20)?;
    let address = SocketAddr::new(server.v6.into(), ECHO_PORT).to_string();
    let (client_id, server_id) = (spiffe_id("client"), spiffe_id("server"));
    let common: &[(&str, &str)] = &[
        ("path", "tunnel"),
        ("result", "ok"),
        ("source_principal", &client_id),
        ("source_workload", "client"),
        ("source_workload_namespace", MESHED),
        ("destination_principal", &server_id),
        ("destination_address", &address),
        ("destination_workload", "server"),
        ("destination_workload_namespace", MESHED),
        ("bytes_sent", &bytes),
        ("bytes_received", &bytes),
        ("connection_security_policy", "mutual_tls"),
    ];
    source.wait_for(positions.0, &[common, &[("direction", "outbound")]].concat(), SOON)?;
    let line = destination.wait_for(positions.1, &[common, &[("direction", "inbound")]].concat(), SOON)?;
    let from = text(&line, "source_address");
    ensure!(
        from.contains(&client.v6.to_string()),
        "expected the source {}, saw {from}",
        client.v6
    );
    for field in ["time", "duration_ms"] {
        ensure!(!text(&line, field).is_empty(), "no {field} in {line}");
    }
    Ok(())
}

fn metrics(mesh: &mut Mesh) -> Result<()> {
    mesh.app
        .connect(&mesh.pod("client").place(), mesh.pod("server").v4.into(), ECHO_PORT)?
        .expect_ok()?;
    for (node, reporter) in [(NodeName::One, "source"), (NodeName::Two, "destination")] {
        let labels = [
            ("reporter", reporter),
            ("source_workload", "client"),
            ("destination_workload", "server"),
            ("connection_security_policy", "mutual_tls"),
        ];
        for name in [
            "mesh_tcp_connections_opened_total",
            "mesh_tcp_connections_closed_total",
            "mesh_tcp_sent_bytes_total",
            "mesh_tcp_received_bytes_total",
        ] {
            poll::until_true(&format!("{name} counts at the {reporter}"), SOON, || {
                Ok(mesh.metric(node, name, &labels)? > 0.0)
            })?;
        }
        ensure!(
            mesh.agent_page(node, 15021, "/healthz/ready")?.status == 200,
            "{node:?} is not ready"
        );
    }
    let redirected = mesh.metric(NodeName::One, "mesh_capture_events_total", &[("event", "redirected")])?;
    ensure!(redirected > 0.0, "the kernel counted no redirected connection");
    let protected = mesh.metric(
        NodeName::One,
        "mesh_pod_protected",
        &[("namespace", MESHED), ("pod", "client")],
    )?;
    ensure!(protected == 1.0, "mesh_pod_protected of the client is {protected}");
    ensure!(
        mesh.control_page("/metrics")?.body.contains("# TYPE"),
        "mesh-control serves no metrics"
    );
    Ok(())
}

fn denied(mesh: &mut Mesh) -> Result<()> {
    mesh.registry.write(
        "deny.yaml",
        &policy(
            "deny-port",
            "server",
            "Deny",
            &format!("[{{ to: [{{ ports: [{ECHO_PORT}] }}] }}]"),
        ),
    )?;
    for address in mesh.pod("server").forms() {
        for from in ["client", "outsider"] {
            mesh.wait_for_outcome(from, address, ECHO_PORT, false)?;
            let log = mesh.access_log(NodeName::Two);
            let position = log.position();
            let attempt = mesh.app.connect(&mesh.pod(from).place(), address, ECHO_PORT)?;
            attempt
                .expect_refused(QUICKLY)
                .with_context(|| format!("{from} → {address}"))?;
            let policy = format!("{MESHED}/deny-port");
            let fields = [("direction", "inbound"), ("result", "refused"), ("policy", policy.as_str())];
            log.wait_for(position, &fields, SOON)?;
            // Another port is none of the policy's business.
            mesh.app.get(&mesh.pod(from).place(), address, "/")?;
        }
    }
    mesh.registry.remove("deny.yaml")?;
    mesh.wait_for_outcome("client", mesh.pod("server").v4.into(), ECHO_PORT, true)
}

fn broken_manifest(mesh: &mut Mesh) -> Result<()> {
    let server: IpAddr = mesh.pod("server").v4.into();
    mesh.registry.write(
        "mine.yaml",
        &policy("mine", "server", "Deny", &format!("[{{ to: [{{ ports: [{ECHO_PORT}] }}] }}]")),
    )?;
    mesh.wait_for_outcome("client", server, ECHO_PORT, false)?;
    let good = policy("fine", "nobody", "Deny", "[]");
    let rule = "[{ to: [{ ports: [99999] }] }]";
    for (broken, said) in [
        (
            "apiVersion: [".to_owned(),
            &["document=1 ", "reason=\"syntax\"", "no YAML"][..],
        ),
        (
            policy("mine", "server", "Deny", rule),
            &["document=1 ", "reason=\"field\"", "shop/mine", "spec.rules[0].to[0].ports[0]"],
        ),
        (
            format!("{good}---\n{}", policy("mine", "server", "Maybe", "[]")),
            &["document=2 ", "reason=\"field\"", "shop/mine", "spec.action"],
        ),
    ] {
        let read = control_log(mesh)?.len();
        mesh.registry.write("mine.yaml", &broken)?;
        // A change elsewhere arrives, so the broken file was read, and is still without effect.
        let other = format!("[{{ to: [{{ ports: [{ECHO_PORT}] }}] }}]");
        mesh.registry.write("other.yaml", &policy("other", "local", "Deny", &other))?;
        mesh.wait_for_outcome("client", mesh.pod("local").v4.into(), ECHO_PORT, false)?;
        mesh.app
            .connect(&mesh.pod("client").place(), server, ECHO_PORT)?
            .expect_refused(QUICKLY)?;
        mesh.registry.remove("other.yaml")?;
        mesh.wait_for_outcome("client", mesh.pod("local").v4.into(), ECHO_PORT, true)?;
        mesh.app
            .connect(&mesh.pod("client").place(), server, ECHO_PORT)?
            .expect_refused(QUICKLY)?;
        // One line says all that is needed to find it.
        let log = control_log(mesh)?.split_off(read);
        let always = ["WARN", "manifest rejected", "file=mine.yaml", "last_good_in_force=true"];
        ensure!(
            log.lines()
                .any(|line| always.iter().chain(said).all(|part| line.contains(part))),
            "no line says {always:?} and {said:?}:\n{log}"
        );
    }
    mesh.registry.remove("mine.yaml")?;
    mesh.wait_for_outcome("client", server, ECHO_PORT, true)
}

fn control_log(mesh: &Mesh) -> Result<String> {
    Ok(std::fs::read_to_string(mesh.topology.folder().join("mesh-control.log"))?)
}

fn release(mesh: &mut Mesh) -> Result<()> {
    let guest = PodSpec {
        name: "guest",
        node: NodeName::Two,
        host: 30,
        meshed: true,
        annotations: "",
    };
    mesh.topology.add_pod(guest.name, guest.node, guest.host)?;
    mesh.start_server(guest.name)?;
    // The kernel is still checking the link-local address of the new link: that change is not the mesh's.
    poll::until_true("the Pod's addresses have settled", SOON, || {
        Ok(!snapshot::of(&mesh.pod("guest").netns)?.contains("tentative"))
    })?;
    let before = snapshot::of(&mesh.pod("guest").netns)?;
    mesh.write_pod(&guest)?;
    mesh.enroll("guest")?;
    mesh.wait_for_tunnel("client", "guest")?;
    mesh.wait_for_tunnel("guest", "client")?;
    ensure!(
        snapshot::of(&mesh.pod("guest").netns)? != before,
        "the enrolled Pod looks untouched: the snapshot is blind"
    );
    mesh.release("guest")?;
    poll::until_true("the released Pod is as it was", SOON, || {
        Ok(snapshot::of(&mesh.pod("guest").netns)? == before)
    })
    .or_else(|error| {
        let after = snapshot::of(&mesh.pod("guest").netns)?;
        Err(error.context(format!("before:\n{before}\nafter:\n{after}")))
    })?;
    outside_on_its_own(mesh)?;
    mesh.registry.remove("pod-guest.yaml")?;
    mesh.stop_server("guest");
    mesh.topology.remove_pod("guest");
    Ok(())
}

/// The released guest talks to the world directly. With its node's agent dead: were it still among the captured, the kernel
/// would refuse.
fn outside_on_its_own(mesh: &mut Mesh) -> Result<()> {
    ensure!(mesh.listed("guest")?.is_none(), "the agent still lists the released Pod");
    let log_file = mesh.topology.folder().join("world.log");
    let _server = mesh.app.serve("world", &mesh.topology.world_place(), log_file)?;
    let log = mesh.access_log(NodeName::Two);
    let position = log.position();
    let reach = |mesh: &Mesh| -> Result<()> {
        let guest = mesh.pod("guest");
        for address in topology::forms(WORLD_V4, WORLD_V6) {
            let body = mesh.app.get(&guest.place(), address, "/")?;
            let own = guest.own_address(address);
            ensure!(body.contains(&format!("client={own} ")), "expected {own}, {body}");
        }
        Ok(())
    };
    reach(mesh).context("with the agent")?;
    let seen = log.since(position, &[("source_workload", "guest")]);
    ensure!(seen.is_empty(), "the agent carried the released Pod's connections: {seen:?}");
    mesh.kill_agent(NodeName::Two);
    let captured = mesh.app.connect(&mesh.pod("server").place(), WORLD_V4.into(), ECHO_PORT)?;
    captured.expect_refused(QUICKLY).context("an enrolled Pod of the same node")?;
    reach(mesh).context("without the agent")?;
    mesh.start_agent(NodeName::Two)?;
    mesh.wait_for_tunnel("client", "server")
}

/// By 5-tuple at the source, where each connection's own port is logged; by number at the destination.
fn one_line_each(mesh: &mut Mesh) -> Result<()> {
    const CONNECTIONS: usize = 5;
    for to in ["server", "local"] {
        for address in mesh.pod(to).forms() {
            let (client, destination) = (mesh.pod("client"), mesh.pod(to));
            let source_log = mesh.access_log(client.node);
            let destination_log = mesh.access_log(destination.node);
            // An earlier check's last connection may still be on its way into the log.
            let before = (source_log.quiet_position()?, destination_log.quiet_position()?);
            let mut ports = Vec::new();
            for _ in 0..CONNECTIONS {
                let attempt = mesh.app.connect(&client.place(), address, ECHO_PORT)?;
                let local: SocketAddr = attempt.expect_ok()?.report["local"].as_str().unwrap_or_default().parse()?;
                ports.push(local.port());
            }
            // One more, of another port: when its line is there, those of all before it are.
            mesh.app.get(&client.place(), address, "/")?;
            let (target, last) = (
                SocketAddr::new(address.to_canonical(), ECHO_PORT).to_string(),
                SocketAddr::new(address.to_canonical(), HTTP_PORT).to_string(),
            );
            for (log, position, direction) in [(&source_log, before.0, "outbound"), (&destination_log, before.1, "inbound")] {
                let all = [("direction", direction), ("destination_address", target.as_str())];
                poll::until_true("the lines are written", SOON, || {
                    Ok(log.since(position, &all).len() >= CONNECTIONS)
                })?;
                let fields = [("direction", direction), ("destination_address", last.as_str())];
                log.wait_for(position, &fields, SOON)?;
                let lines = log.since(position, &all);
                ensure!(
                    lines.len() == CONNECTIONS,
                    "expected {CONNECTIONS} {direction} lines for {target}, saw {lines:?}"
                );
                if direction == "inbound" {
                    // Its source is the tunnel's end, which all streams of the tunnel share.
                    continue;
                }
                let mut sources: Vec<String> = lines.iter().map(|line| text(line, "source_address")).collect();
                sources.sort();
                sources.dedup();
                ensure!(
                    sources.len() == CONNECTIONS,
                    "expected a line for each connection, saw {lines:?}"
                );
                for port in &ports {
                    let of_port = sources.iter().filter(|source| source.ends_with(&format!(":{port}"))).count();
                    ensure!(of_port == 1, "expected one line from port {port}, saw {lines:?}");
                }
            }
        }
    }
    Ok(())
}
