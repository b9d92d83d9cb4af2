//! What the whole of a mesh's addresses can be: services of one family, Pods of one family, ranges that are taken out; and what the
//! metrics say of bytes.
#![allow(clippy::print_stdout, reason = "a test: standard output is its report")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::app::ECHO_PORT;
use mesh_tests::demo::PODS;
use mesh_tests::manifests::{MESHED, PodManifest, ROOT_NAMESPACE, SERVICE_PORT, mesh_config, service};
use mesh_tests::mesh::Mesh;
use mesh_tests::poll::{self, SOON};
use mesh_tests::suite;
use mesh_tests::topology::NodeName;
use serde_json::json;

/// What a refusal may take on a machine with two busy cores; it takes about a millisecond.
const QUICKLY: Duration = Duration::from_secs(1);
const V4: Ipv4Addr = Ipv4Addr::new(10, 96, 9, 4);
const V6: Ipv6Addr = Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 9, 6);
const BULK_BYTES: usize = 3 * 1024 * 1024 + 17;

fn main() -> ExitCode {
    suite::run(
        "services",
        || Mesh::start(&PODS, &mut |_| {}),
        Mesh::with_logs,
        &[
            ("a_service_of_one_family_has_that_one_alone", single_family),
            ("an_endpoint_of_one_family_serves_that_one_alone", endpoint_of_one_family),
            ("an_excluded_range_goes_in_clear_also_under_strict", excluded_range),
            ("the_metrics_count_each_byte_once", bytes),
        ],
    )
}

/// As `manifests::service`, of one family.
fn service_at(name: &str, address: IpAddr) -> String {
    let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{ name: {name}, namespace: {MESHED} }}\n\
         spec:\n  clusterIP: \"{address}\"\n  clusterIPs: [\"{address}\"]\n  ipFamilies: [{family}]\n\
         \x20 selector: {{ app: server }}\n  ports: [{{ port: {SERVICE_PORT}, targetPort: {ECHO_PORT} }}]\n"
    )
}

/// Connects to a service's address; the endpoint is the server, at its address of the service's family.
fn reaches_the_server(mesh: &Mesh, asked: IpAddr, name: &str) -> Result<()> {
    let log = mesh.access_log(NodeName::One);
    let position = log.position();
    let attempt = mesh.app.connect(&mesh.pod("client").place(), asked, SERVICE_PORT)?;
    let wanted = SocketAddr::new(asked, SERVICE_PORT).to_string();
    let peer = &attempt.expect_ok()?.report["peer"];
    ensure!(*peer == wanted.as_str(), "getpeername said {peer}, expected {wanted}");
    let server = mesh.pod("server");
    let endpoint: IpAddr = if asked.to_canonical().is_ipv4() {
        server.v4.into()
    } else {
        server.v6.into()
    };
    let fields = [
        ("direction", "outbound"),
        ("path", "tunnel"),
        ("result", "ok"),
        ("destination_workload", "server"),
        ("destination_service", &format!("{name}.{MESHED}.svc.cluster.local")),
        ("destination_address", &SocketAddr::new(endpoint, ECHO_PORT).to_string()),
    ];
    log.wait_for(position, &fields, SOON)?;
    Ok(())
}

fn single_family(mesh: &mut Mesh) -> Result<()> {
    let (four, six) = ("four", "six");
    mesh.add_service(NodeName::One, four, &service_at(four, V4.into()))?;
    mesh.add_service(NodeName::One, six, &service_at(six, V6.into()))?;
    reaches_the_server(mesh, V4.into(), four)?;
    reaches_the_server(mesh, V4.to_ipv6_mapped().into(), four)?;
    reaches_the_server(mesh, V6.into(), six)?;
    for name in [four, six] {
        mesh.registry.remove(&format!("{name}.yaml"))?;
    }
    Ok(())
}

/// The server's Pod as its manifest tells, with these addresses.
fn announce_server(mesh: &Mesh, addresses: &[IpAddr]) -> Result<()> {
    mesh.registry.write_pod(&PodManifest {
        name: "server",
        namespace: MESHED,
        node: mesh.pod("server").node,
        addresses,
        annotations: "",
    })
}

fn endpoint_of_one_family(mesh: &mut Mesh) -> Result<()> {
    let name = "both";
    mesh.add_service(NodeName::One, name, &service(name, V4, V6, "app: server"))?;
    let (v4, v6): (IpAddr, IpAddr) = (V4.into(), V6.into());
    let server = mesh.pod("server");
    let (own4, own6): (IpAddr, IpAddr) = (server.v4.into(), server.v6.into());
    for (has, works, refused) in [(own4, v4, v6), (own6, v6, v4)] {
        announce_server(mesh, &[has])?;
        mesh.wait_for_outcome("client", refused, SERVICE_PORT, false)?;
        let log = mesh.access_log(NodeName::One);
        let position = log.position();
        mesh.app
            .connect(&mesh.pod("client").place(), refused, SERVICE_PORT)?
            .expect_refused(QUICKLY)?;
        log.wait_for(position, &[("reason", "no_healthy_endpoint")], SOON)?;
        mesh.wait_for_outcome("client", works, SERVICE_PORT, true)?;
        reaches_the_server(mesh, works, name).with_context(|| format!("the server has {has} alone"))?;
    }
    announce_server(mesh, &[own4, own6])?;
    for address in [v4, v6] {
        mesh.wait_for_outcome("client", address, SERVICE_PORT, true)?;
    }
    mesh.registry.remove(&format!("{name}.yaml"))?;
    mesh.wait_for_tunnel("client", "server")
}

fn excluded_range(mesh: &mut Mesh) -> Result<()> {
    let server = mesh.pod("server");
    let ranges = [format!("{}/32", server.v4), format!("{}/128", server.v6)];
    let spec = format!("{{ mtls: Strict, excludedCidrs: [\"{}\", \"{}\"] }}", ranges[0], ranges[1]);
    let passed = |mesh: &Mesh| {
        let labels = [("destination", "excluded")];
        mesh.metric(NodeName::One, "mesh_passthrough_connections_total", &labels)
    };
    let before = passed(mesh)?;
    let file = "config.yaml";
    mesh.registry.write(file, &mesh_config(ROOT_NAMESPACE, &spec))?;
    for address in mesh.pod("local").forms() {
        mesh.wait_for_outcome("outsider", address, ECHO_PORT, false)
            .context("what is not excluded is as strict as before")?;
        mesh.wait_for_path("client", address, "tunnel")?;
    }
    for address in mesh.pod("server").forms() {
        mesh.wait_for_path("client", address, "excluded")?;
        mesh.wait_for_outcome("outsider", address, ECHO_PORT, true)?;
        // What arrives there in clear is taken, by the destination's word.
        let log = mesh.access_log(NodeName::Two);
        let position = log.position();
        mesh.app
            .connect(&mesh.pod("client").place(), address, ECHO_PORT)?
            .expect_ok()?;
        log.wait_for(position, &[("path", "plaintext"), ("result", "ok")], SOON)?;
    }
    for node in NodeName::ALL {
        let state = mesh.agent_state(node)?;
        ensure!(
            state["mtls"] == "Strict" && state["excluded_ranges"] == json!(ranges),
            "expected {ranges:?} as excluded ranges, saw {state}"
        );
        let told = mesh.metric(node, "mesh_exclusions", &[("kind", "range")])?;
        ensure!(told == 2.0, "expected that the metric tells of two ranges, saw {told}");
    }
    let counted = passed(mesh)? - before;
    ensure!(counted >= 6.0, "expected 6 excluded connections to be counted, saw {counted}");

    mesh.registry.remove(file)?;
    mesh.wait_for_tunnel("client", "server")?;
    for node in NodeName::ALL {
        poll::until_true("the metric tells of none", SOON, || {
            Ok(mesh.metric(node, "mesh_exclusions", &[("kind", "range")])? == 0.0)
        })?;
    }
    Ok(())
}

/// On both sides, each way, of one connection; once it is over, and not a byte more.
fn bytes(mesh: &mut Mesh) -> Result<()> {
    for address in mesh.pod("server").addresses() {
        let count = |mesh: &Mesh| -> Result<Vec<f64>> {
            let mut all = Vec::new();
            for (node, reporter) in [(NodeName::One, "source"), (NodeName::Two, "destination")] {
                let labels = [
                    ("reporter", reporter),
                    ("source_workload", "client"),
                    ("destination_workload", "server"),
                    ("connection_security_policy", "mutual_tls"),
                ];
                for metric in ["mesh_tcp_sent_bytes_total", "mesh_tcp_received_bytes_total"] {
                    all.push(mesh.metric(node, metric, &labels)?);
                }
            }
            Ok(all)
        };
        let position = mesh.access_log(NodeName::Two).position();
        let before = count(mesh)?;
        let report = mesh.app.bulk(&mesh.pod("client").place(), address, BULK_BYTES)?;
        ensure!(report["received"] == BULK_BYTES, "{report}");
        let fields = [("direction", "inbound"), ("source_workload", "client"), ("result", "ok")];
        mesh.access_log(NodeName::Two).wait_for(position, &fields, SOON)?;
        let rises = || -> Result<Vec<f64>> { Ok(count(mesh)?.iter().zip(&before).map(|(now, before)| now - before).collect()) };
        let wanted = vec![BULK_BYTES as f64; 4];
        let mut last = Vec::new();
        poll::until_true("all bytes are counted", SOON, || {
            last = rises()?;
            Ok(last.iter().zip(&wanted).all(|(rise, wanted)| rise >= wanted))
        })
        .with_context(|| format!("expected {wanted:?}, saw {last:?}"))?;
        ensure!(rises()? == wanted, "expected {wanted:?}, saw {:?}", rises()?);
    }
    Ok(())
}
