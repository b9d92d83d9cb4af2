//! Attacks by a Pod that has a good place in the mesh, and by processes of a node without rights: on tunnels, whose far end is an
//! HTTP/2 and a TLS implementation that are not ours, on the agent's pages and on its sockets. docs/ATTACKS.md has them all.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test: a panic is its failure, and standard output its report"
)]

use std::fs::Permissions;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_common::{OUTBOUND_PORT, PLAINTEXT_INBOUND_PORT};
use mesh_tests::access_log::text;
use mesh_tests::app::ECHO_PORT;
use mesh_tests::binaries;
use mesh_tests::foreign::{Certificates, Claims, FOREIGN, Files, PYTHON, Validity, connect};
use mesh_tests::manifests::policy;
use mesh_tests::mesh::{Mesh, PodSpec};
use mesh_tests::poll::{self, SOON};
use mesh_tests::process::Place;
use mesh_tests::suite;
use mesh_tests::topology::NodeName;
use serde_json::Value;

const PODS: [PodSpec; 3] = [
    PodSpec::new("client", NodeName::One, 10, true),
    PodSpec::new("server", NodeName::Two, 20, true),
    PodSpec::new("neighbour", NodeName::Two, 21, true),
];
const ADMIN_PORT: u16 = 15000;
/// Nobody's, but an attacker's claim.
const CLAIMED: &str = "203.0.113.9";
const COMMAND_DEADLINE: Duration = Duration::from_secs(20);

struct Shared {
    certificates: Certificates,
    mesh: Mesh,
}

fn main() -> ExitCode {
    suite::run(
        "attacks",
        set_up,
        |shared, error| shared.mesh.with_logs(error),
        &[
            ("a_good_peer_is_served", good_peer),
            ("an_authority_that_names_another_pod", another_pods_authority),
            ("an_authority_that_names_the_agent", agents_authority),
            ("a_certificate_of_another_nodes_pod", another_nodes_certificate),
            ("a_certificate_of_another_trust_domain", another_trust_domain),
            ("an_expired_certificate", expired),
            ("a_certificate_that_is_not_valid_yet", not_yet_valid),
            ("no_certificate", no_certificate),
            ("tls_1_2", tls12),
            ("no_alpn", no_alpn),
            ("a_forwarded_header_that_lies", lying_forwarded),
            ("plaintext_to_the_agents_ports", agents_ports),
            ("the_nodes_admin_page_from_a_pod", admin_page),
            ("the_local_socket_without_rights", local_socket),
            ("the_handover_socket_without_rights", handover_socket),
            ("the_plugins_socket_without_rights", plugins_socket),
        ],
    )
}

fn set_up() -> Result<Shared> {
    let mut mesh = Mesh::start(&PODS, &mut |_| {})?;
    mesh.topology.add_pod(FOREIGN.name, FOREIGN.node, FOREIGN.host)?;
    let certificates = Certificates::new(&mesh)?;
    mesh.write_pod(&FOREIGN)?;
    let shared = Shared { certificates, mesh };
    // Until the server's agent knows its address, nobody is served at it.
    let good = shared.certificates.issue(FOREIGN.name)?;
    let mut last = Value::Null;
    let known = poll::until_true("the foreign Pod is known", SOON, || {
        last = connect(&shared.mesh, &good, server(&shared)[0], &Claims::default())?;
        Ok(last["echoed"] == true)
    });
    known
        .with_context(|| format!("last seen: {last}"))
        .map_err(|error| shared.mesh.with_logs(error))?;
    Ok(shared)
}

fn server(shared: &Shared) -> [IpAddr; 3] {
    shared.mesh.pod("server").forms()
}

/// What each attack differs from in one thing.
fn good_peer(shared: &mut Shared) -> Result<()> {
    let files = shared.certificates.issue(FOREIGN.name)?;
    for address in server(shared) {
        let report = connect(&shared.mesh, &files, address, &Claims::default())?;
        ensure!(report["status"] == "200" && report["echoed"] == true, "{address}: {report}");
    }
    Ok(())
}

/// The handshake ends without an HTTP/2 frame of the server's.
fn expect_no_handshake(shared: &Shared, who: &str, files: &Files, claims: &Claims<'_>) -> Result<()> {
    for address in server(shared) {
        let report = connect(&shared.mesh, files, address, claims)?;
        ensure!(
            report["answered"].is_null(),
            "{who} got through the handshake: {address}: {report}"
        );
        ensure!(report["echoed"] == false, "{report}");
    }
    Ok(())
}

/// The CONNECT is answered, and with this.
fn expect_status(shared: &Shared, who: &str, files: &Files, claims: &Claims<'_>, address: IpAddr, status: &str) -> Result<()> {
    let report = connect(&shared.mesh, files, address, claims)?;
    ensure!(report["status"] != "200", "{who} was answered 200: {address}: {report}");
    ensure!(report["status"] == status, "{who}: expected {status}: {address}: {report}");
    Ok(())
}

/// No attempt is made: what gets further is held by the capture and the backstop (503).
fn expect_bad_request(shared: &Shared, files: &Files, claims: &Claims<'_>, address: IpAddr) -> Result<()> {
    let report = connect(&shared.mesh, files, address, claims)?;
    let authority = claims.authority.context("an authority")?;
    ensure!(
        report["status"] == "400",
        "the agent at {address} tried to connect to {authority}: {report}"
    );
    Ok(())
}

fn another_pods_authority(shared: &mut Shared) -> Result<()> {
    let files = shared.certificates.issue(FOREIGN.name)?;
    let neighbour = shared.mesh.pod("neighbour");
    for address in server(shared) {
        let authority = Some(SocketAddr::new(neighbour.own_address(address), ECHO_PORT));
        let claims = Claims {
            authority,
            ..Claims::default()
        };
        expect_bad_request(shared, &files, &claims, address)?;
    }
    Ok(())
}

fn agents_authority(shared: &mut Shared) -> Result<()> {
    let files = shared.certificates.issue(FOREIGN.name)?;
    for address in server(shared) {
        let claims = Claims {
            authority: Some(SocketAddr::new(address.to_canonical(), OUTBOUND_PORT)),
            ..Claims::default()
        };
        expect_bad_request(shared, &files, &claims, address)?;
    }
    Ok(())
}

/// As stolen from another node: a good certificate, of a Pod that does not live at this address.
fn another_nodes_certificate(shared: &mut Shared) -> Result<()> {
    let files = shared.certificates.issue("neighbour")?;
    for address in server(shared) {
        expect_status(shared, "another node's Pod", &files, &Claims::default(), address, "401")?;
    }
    Ok(())
}

fn another_trust_domain(shared: &mut Shared) -> Result<()> {
    let files = shared.certificates.of_another_trust_domain(FOREIGN.name)?;
    expect_no_handshake(shared, "another trust domain's", &files, &Claims::default())
}

fn expired(shared: &mut Shared) -> Result<()> {
    let validity = Validity {
        from: "20200101000000Z",
        until: "20200102000000Z",
    };
    let files = shared.certificates.dated(FOREIGN.name, &validity)?;
    expect_no_handshake(shared, "an expired one", &files, &Claims::default())
}

fn not_yet_valid(shared: &mut Shared) -> Result<()> {
    let validity = Validity {
        from: "20480101000000Z",
        until: "20480102000000Z",
    };
    let files = shared.certificates.dated(FOREIGN.name, &validity)?;
    expect_no_handshake(shared, "one that is not valid yet", &files, &Claims::default())?;
    // It is the time, and nothing else of how the certificate was made.
    let validity = Validity {
        from: "20200101000000Z",
        until: "20480102000000Z",
    };
    let files = shared.certificates.dated(FOREIGN.name, &validity)?;
    let report = connect(&shared.mesh, &files, server(shared)[0], &Claims::default())?;
    ensure!(report["echoed"] == true, "a valid one made alike: {report}");
    Ok(())
}

fn no_certificate(shared: &mut Shared) -> Result<()> {
    let claims = Claims {
        without_certificate: true,
        ..Claims::default()
    };
    expect_no_handshake(
        shared,
        "one without a certificate",
        &shared.certificates.issue(FOREIGN.name)?,
        &claims,
    )
}

fn tls12(shared: &mut Shared) -> Result<()> {
    let claims = Claims {
        tls12: true,
        ..Claims::default()
    };
    expect_no_handshake(
        shared,
        "one that speaks TLS 1.2",
        &shared.certificates.issue(FOREIGN.name)?,
        &claims,
    )
}

fn no_alpn(shared: &mut Shared) -> Result<()> {
    let claims = Claims {
        without_alpn: true,
        ..Claims::default()
    };
    expect_no_handshake(shared, "one without ALPN", &shared.certificates.issue(FOREIGN.name)?, &claims)
}

/// An address that a policy allows is claimed in a header, and not believed.
fn lying_forwarded(shared: &mut Shared) -> Result<()> {
    let files = shared.certificates.issue(FOREIGN.name)?;
    let mesh = &shared.mesh;
    let rule = format!("[{{ from: [{{ ipBlocks: [\"{CLAIMED}/32\"] }}] }}]");
    mesh.registry
        .write("only-claimed.yaml", &policy("only-claimed", "server", "Allow", &rule))?;
    mesh.wait_for_outcome("client", mesh.pod("server").v4.into(), ECHO_PORT, false)?;
    let outcome = server(shared).into_iter().try_for_each(|address| {
        let claims = Claims {
            forwarded: Some("for=\"203.0.113.9:1\""),
            ..Claims::default()
        };
        expect_status(shared, "who claims another address", &files, &claims, address, "401")
    });
    mesh.registry.remove("only-claimed.yaml")?;
    mesh.wait_for_outcome("client", mesh.pod("server").v4.into(), ECHO_PORT, true)?;
    outcome
}

/// From outside of any capture.
fn agents_ports(shared: &mut Shared) -> Result<()> {
    let mesh = &shared.mesh;
    let log = mesh.access_log(NodeName::Two);
    for address in server(shared) {
        let position = log.position();
        let attempt = mesh
            .app
            .connect(&mesh.pod(FOREIGN.name).place(), address, PLAINTEXT_INBOUND_PORT)?;
        ensure!(!attempt.ok(), "{address}: {}", attempt.report);
        let destination = SocketAddr::new(address.to_canonical(), PLAINTEXT_INBOUND_PORT).to_string();
        let fields = [("direction", "inbound"), ("destination_address", destination.as_str())];
        let line = log.wait_for(position, &fields, SOON)?;
        ensure!(
            text(&line, "reason") == "agent_port",
            "{address} port {PLAINTEXT_INBOUND_PORT} was not refused as an agent's port: {line}"
        );
        // The outbound one knows of no destination for what was not redirected.
        let attempt = mesh.app.connect(&mesh.pod(FOREIGN.name).place(), address, OUTBOUND_PORT)?;
        ensure!(!attempt.ok(), "{address}: {}", attempt.report);
    }
    Ok(())
}

fn admin_page(shared: &mut Shared) -> Result<()> {
    let mesh = &shared.mesh;
    for node in NodeName::ALL {
        ensure!(
            mesh.agent_page(node, ADMIN_PORT, "/config_dump")?.status == 200,
            "the page is not there at all"
        );
        let (v4, v6) = node.addresses();
        for address in [v4.into(), v6.into(), IpAddr::from(v4.to_ipv6_mapped())] {
            for from in ["client", "foreign"] {
                let page = SocketAddr::new(address, ADMIN_PORT);
                let got = mesh.app.get_at(&mesh.pod(from).place(), page, "/config_dump");
                ensure!(got.is_err(), "{from} reached the admin page of {}: {got:?}", node.as_str());
            }
        }
    }
    // What a Pod has at its own loopback is its own.
    for port in [ADMIN_PORT, 15020, 15021] {
        let attempt = mesh
            .app
            .connect_to(&mesh.pod("client").place(), &format!("127.0.0.1:{port}"))?;
        ensure!(!attempt.ok(), "a page of the agent is in the Pod: {}", attempt.report);
    }
    Ok(())
}

/// A process of the node, with its files opened to all by mistake: SO_PEERCRED still tells who asks.
fn without_rights(shared: &Shared, socket: &str, attack: impl FnOnce(&Mesh, &Place, &Path) -> Result<()>) -> Result<()> {
    let mesh = &shared.mesh;
    let node = mesh.topology.node(NodeName::Two);
    let nobody = Place {
        netns: node.netns.path(),
        cgroup: None,
        unprivileged: true,
    };
    let (folder, socket) = (node.run_dir(), node.run_dir().join(socket));
    let refused = || mesh.metric(NodeName::Two, "mesh_local_refused_total", &[]);
    let before = refused()?;
    let reach = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])";
    let reached = nobody.run(
        Path::new(PYTHON),
        &["-c", reach, socket.to_str().context("a path")?],
        COMMAND_DEADLINE,
    )?;
    ensure!(
        !reached.status.success() && reached.stderr.contains("PermissionError"),
        "nobody may look into --run-dir: {reached:?}"
    );
    ensure!(
        refused()? == before,
        "what never reached the socket was counted as refused there"
    );
    let set_mode = |path: &Path, mode| std::fs::set_permissions(path, Permissions::from_mode(mode));
    set_mode(&folder, 0o711)?;
    set_mode(&socket, 0o666)?;
    let outcome = attack(mesh, &nobody, &socket);
    set_mode(&folder, 0o700)?;
    set_mode(&socket, 0o600)?;
    outcome?;
    ensure!(refused()? > before, "a refusal that mesh_local_refused_total does not count");
    Ok(())
}

fn local_socket(shared: &mut Shared) -> Result<()> {
    let agent = shared.mesh.topology.folder().join("mesh-agent");
    std::fs::copy(binaries::path("mesh-agent")?, &agent)?;
    without_rights(shared, "agent.sock", |_, nobody, socket| {
        let folder = socket.parent().and_then(Path::to_str).context("a path")?;
        let output = nobody.run(&agent, &["list", "--run-dir", folder], COMMAND_DEADLINE)?;
        ensure!(
            !output.status.success() && output.stdout.is_empty(),
            "the agent answered nobody: {output:?}"
        );
        Ok(())
    })
}

/// As a successor would ask; the running agent answers it with descriptors, or with why not.
fn handover_socket(shared: &mut Shared) -> Result<()> {
    let hello = br#"{"version":0,"node":"node-2","pin_path":"/"}"#;
    let length = u32::try_from(hello.len())?.to_be_bytes();
    without_rights(shared, "handover.sock", |_, nobody, socket| {
        expect_no_answer(nobody, socket, "a successor", &[&length, &hello[..]].concat())
    })
}

/// As the CNI plugin would ask, of an agent that has a socket for it.
fn plugins_socket(shared: &mut Shared) -> Result<()> {
    const REQUEST: &[u8] = br#"{"command":"CHECK","uid":"nobodys","namespace":"shop","name":"nobodys","netns":""}"#;
    let node = NodeName::Two;
    shared.mesh.terminate_agent(node)?;
    shared.mesh.launch_agent_with(node, &["--follow-pods"])?;
    shared.mesh.wait_until_ready(node)?;
    without_rights(shared, "cni.sock", |_, nobody, socket| {
        expect_no_answer(nobody, socket, "a plugin", &[REQUEST, b"\n"].concat())
    })
}

fn expect_no_answer(nobody: &Place, socket: &Path, who: &str, request: &[u8]) -> Result<()> {
    const ASK: &str = "import socket, sys
s = socket.socket(socket.AF_UNIX)
s.settimeout(10)
s.connect(sys.argv[1])
try:
    s.sendall(bytes.fromhex(sys.argv[2]))
    data = s.recv(4096)
except (ConnectionResetError, BrokenPipeError): data = b''
print(len(data))";
    let request: String = request.iter().map(|byte| format!("{byte:02x}")).collect();
    let arguments = ["-c", ASK, socket.to_str().context("a path")?, &request];
    let output = nobody.run(Path::new(PYTHON), &arguments, COMMAND_DEADLINE)?;
    ensure!(output.ok(who)?.trim() == "0", "the agent answered {who} without rights");
    Ok(())
}
