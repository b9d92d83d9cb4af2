//! The tunnel against an HTTP/2 and a TLS implementation that are not ours, at both ends: Python's `h2` over OpenSSL.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test: a panic is its failure, and standard output its report"
)]

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::access_log::text;
use mesh_tests::app::ECHO_PORT;
use mesh_tests::foreign::{self, Certificates, FOREIGN, Files, PYTHON};
use mesh_tests::manifests::spiffe_id;
use mesh_tests::mesh::{Mesh, PodSpec};
use mesh_tests::poll::{self, SOON};
use mesh_tests::process::{Process, tail};
use mesh_tests::suite;
use mesh_tests::topology::NodeName;
use serde_json::Value;

const PODS: [PodSpec; 2] = [
    PodSpec::new("client", NodeName::One, 10, true),
    PodSpec::new("server", NodeName::Two, 20, true),
];
struct Shared {
    server: Process,
    certificates: Certificates,
    mesh: Mesh,
}

fn main() -> ExitCode {
    suite::run(
        "foreign_peer",
        set_up,
        |shared, error| {
            let log = tail(shared.server.log(), 20);
            shared
                .mesh
                .with_logs(error)
                .context(format!("--- the foreign server:\n{log}"))
        },
        &[
            ("a_foreign_client_tunnels_to_our_agent", foreign_client),
            ("our_agent_tunnels_to_a_foreign_server", foreign_server),
            ("an_identity_of_another_address_is_refused", stolen_identity),
            ("another_authority_is_refused", another_authority),
        ],
    )
}

fn set_up() -> Result<Shared> {
    let mut mesh = Mesh::start(&PODS, &mut |_| {})?;
    mesh.topology.add_pod(FOREIGN.name, FOREIGN.node, FOREIGN.host)?;
    let certificates = Certificates::new(&mesh)?;
    let server = start_server(&mesh, &certificates.issue("foreign")?)?;
    mesh.write_pod(&FOREIGN)?;
    Ok(Shared {
        server,
        certificates,
        mesh,
    })
}

fn start_server(mesh: &Mesh, files: &Files) -> Result<Process> {
    let script = foreign::script(mesh)?;
    let arguments = [script.as_str(), "server", files.certificate()?, files.key()?, files.root()?];
    let place = mesh.pod("foreign").place();
    let log = mesh.topology.folder().join("foreign.log");
    let mut server = Process::start(
        "the foreign server",
        place.command(Path::new(PYTHON), &arguments)?,
        log.clone(),
    )?;
    poll::until_true("the foreign server listens", SOON, || {
        server.check_running()?;
        Ok(std::fs::read_to_string(&log)?.contains("listening"))
    })?;
    Ok(server)
}

fn foreign_client(shared: &mut Shared) -> Result<()> {
    let files = shared.certificates.issue("foreign")?;
    let mesh = &shared.mesh;
    for address in mesh.pod("server").forms() {
        let log = mesh.access_log(NodeName::Two);
        let position = log.position();
        let report = foreign::connect(mesh, &files, address, &foreign::Claims::default())?;
        for (field, wanted) in [
            ("status", Value::from("200")),
            ("alpn", "h2".into()),
            ("version", "TLSv1.3".into()),
            ("echoed", true.into()),
            ("half_close_answered", true.into()),
            ("server", vec![spiffe_id("server")].into()),
        ] {
            ensure!(
                report[field] == wanted,
                "{address}: expected {field} to be {wanted}, saw {report}"
            );
        }
        let source = spiffe_id("foreign");
        let fields = [
            ("direction", "inbound"),
            ("path", "tunnel"),
            ("result", "ok"),
            ("source_principal", source.as_str()),
        ];
        let line = log.wait_for(position, &fields, SOON)?;
        // The client's address is the tunnel's peer, never what the `forwarded` header claims.
        ensure!(
            !line.to_string().contains("203.0.113.9"),
            "a header's claim is in the log: {line}"
        );
    }
    Ok(())
}

fn foreign_server(shared: &mut Shared) -> Result<()> {
    let mesh = &shared.mesh;
    mesh.wait_for_tunnel("client", "foreign")?;
    for address in mesh.pod("foreign").forms() {
        let bulk = mesh.app.bulk(&mesh.pod("client").place(), address, 256 << 10)?;
        ensure!(bulk["sent_sha256"] == bulk["received_sha256"], "{address}: {bulk}");
        let authority = SocketAddr::new(address.to_canonical(), ECHO_PORT).to_string();
        let seen = std::fs::read_to_string(shared.server.log())?;
        let request = seen
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .find(|line| line["headers"][":authority"] == authority.as_str())
            .with_context(|| format!("the foreign server saw no CONNECT for {authority}"))?;
        ensure!(request["client"] == Value::from(vec![spiffe_id("client")]), "{request}");
        ensure!(
            request["alpn"] == "h2" && request["headers"][":method"] == "CONNECT",
            "{request}"
        );
        for absent in [":scheme", ":path"] {
            ensure!(request["headers"][absent].is_null(), "a CONNECT has no {absent}: {request}");
        }
        let baggage = request["headers"]["baggage"].as_str().unwrap_or_default();
        ensure!(baggage.contains("k8s.namespace.name=shop"), "{request}");
        let forwarded = request["headers"]["forwarded"].as_str().unwrap_or_default();
        ensure!(forwarded.starts_with("for="), "{request}");
    }
    Ok(())
}

/// The client is told no, nothing comes through, and the server's agent says why: once, for this reason and no other.
fn expect_refused(shared: &Shared, files: &Files, to: IpAddr, reason: &str) -> Result<()> {
    let log = shared.mesh.access_log(NodeName::Two);
    let position = log.position();
    let report = foreign::connect(&shared.mesh, files, to, &foreign::Claims::default())?;
    ensure!(
        report["status"] != "200" && report["echoed"] == false,
        "expected a refusal, saw {report}"
    );
    log.wait_for(position, &[("direction", "inbound"), ("reason", reason)], SOON)?;
    let lines = log.since(position, &[]);
    ensure!(
        lines.len() == 1 && text(&lines[0], "result") != "ok",
        "expected one refusal in the log, saw {lines:?}"
    );
    Ok(())
}

fn stolen_identity(shared: &mut Shared) -> Result<()> {
    // A good certificate, of another Pod than the one that lives at this address.
    let files = shared.certificates.issue("client")?;
    for address in shared.mesh.pod("server").forms() {
        expect_refused(shared, &files, address, "identity_mismatch")?;
    }
    Ok(())
}

fn another_authority(shared: &mut Shared) -> Result<()> {
    let own = shared.certificates.of_another_authority("foreign")?;
    for address in shared.mesh.pod("server").forms() {
        expect_refused(shared, &own, address, "handshake_failed")?;
    }
    Ok(())
}
