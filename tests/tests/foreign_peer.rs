//! The tunnel against an HTTP/2 and a TLS implementation that are not ours, at both ends: Python's `h2` over OpenSSL.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test: a panic is its failure, and standard output its report"
)]

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use mesh_tests::access_log::text;
use mesh_tests::app::ECHO_PORT;
use mesh_tests::manifests::spiffe_id;
use mesh_tests::mesh::{Mesh, PodSpec};
use mesh_tests::poll::{self, SOON};
use mesh_tests::process::{Process, tail};
use mesh_tests::suite;
use mesh_tests::topology::NodeName;
use serde_json::Value;

/// Debian's own, which has python3-h2; another python in the PATH may not.
const PYTHON: &str = "/usr/bin/python3";

const PODS: [PodSpec; 2] = [
    PodSpec {
        name: "client",
        node: NodeName::One,
        host: 10,
        meshed: true,
        annotations: "",
    },
    PodSpec {
        name: "server",
        node: NodeName::Two,
        host: 20,
        meshed: true,
        annotations: "",
    },
];
/// In the mesh by another maker's agent, which says so by the annotation.
const FOREIGN: PodSpec = PodSpec {
    name: "foreign",
    node: NodeName::One,
    host: 40,
    meshed: true,
    annotations: "ambient.istio.io/redirection: enabled",
};

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
    let script = script(mesh)?;
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

/// Where unprivileged users can read it.
fn script(mesh: &Mesh) -> Result<String> {
    let target = mesh.topology.folder().join("peer.py");
    std::fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("foreign/peer.py"), &target)?;
    Ok(target.display().to_string())
}

/// A CONNECT from the foreign Pod with these files; the client's report, of a refusal as well. A client that crashes has not
/// been refused.
fn connect(shared: &Shared, files: &Files, to: IpAddr) -> Result<Value> {
    let (script, host) = (script(&shared.mesh)?, to.to_string());
    let authority = SocketAddr::new(to.to_canonical(), ECHO_PORT).to_string();
    let arguments = [
        script.as_str(),
        "client",
        files.certificate()?,
        files.key()?,
        files.root()?,
        host.as_str(),
        authority.as_str(),
    ];
    let place = shared.mesh.pod("foreign").place();
    let output = place.run(Path::new(PYTHON), &arguments, Duration::from_secs(30))?;
    let report = output.ok("the foreign client")?;
    serde_json::from_str(&report).with_context(|| format!("the foreign client said {report}"))
}

fn foreign_client(shared: &mut Shared) -> Result<()> {
    let files = shared.certificates.issue("foreign")?;
    let mesh = &shared.mesh;
    for address in mesh.pod("server").forms() {
        let log = mesh.access_log(NodeName::Two);
        let position = log.position();
        let report = connect(shared, &files, address)?;
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
    let report = connect(shared, files, to)?;
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

/// Signs with the root key in the control plane's state folder, by openssl.
struct Certificates {
    folder: PathBuf,
    root: PathBuf,
}

struct Files {
    certificate: PathBuf,
    key: PathBuf,
    root: PathBuf,
}

impl Files {
    fn certificate(&self) -> Result<&str> {
        self.certificate.to_str().context("a path")
    }
    fn key(&self) -> Result<&str> {
        self.key.to_str().context("a path")
    }
    fn root(&self) -> Result<&str> {
        self.root.to_str().context("a path")
    }
}

impl Certificates {
    fn new(mesh: &Mesh) -> Result<Self> {
        let folder = mesh.topology.folder().join("foreign");
        std::fs::create_dir(&folder)?;
        let root = mesh.control_state_dir().join("root.pem");
        // What peers may read is the certificate alone.
        openssl(&[
            "x509",
            "-in",
            path(&root)?,
            "-out",
            path(&folder.join("root-certificate.pem"))?,
        ])?;
        Ok(Self { folder, root })
    }

    fn issue(&self, service_account: &str) -> Result<Files> {
        self.sign(service_account, service_account, &self.root)
    }

    fn of_another_authority(&self, service_account: &str) -> Result<Files> {
        let (key, certificate) = (self.folder.join("other-root.key"), self.folder.join("other-root.crt"));
        openssl(&[
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "1",
            "-subj",
            "/O=another",
            "-keyout",
            path(&key)?,
            "-out",
            path(&certificate)?,
        ])?;
        let both = self.folder.join("other-root.pem");
        std::fs::write(&both, [std::fs::read(&key)?, std::fs::read(&certificate)?].concat())?;
        self.sign("other", service_account, &both)
    }

    fn sign(&self, name: &str, service_account: &str, root: &Path) -> Result<Files> {
        let at = |ending: &str| self.folder.join(format!("{name}{ending}"));
        let (key, request, certificate, extensions) = (at(".key"), at(".csr"), at(".crt"), at(".ext"));
        std::fs::write(
            &extensions,
            format!(
                "subjectAltName=critical,URI:{}\nextendedKeyUsage=serverAuth,clientAuth\n\
                 keyUsage=critical,digitalSignature\nbasicConstraints=critical,CA:FALSE\n",
                spiffe_id(service_account)
            ),
        )?;
        openssl(&[
            "req",
            "-new",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-subj",
            "/",
            "-keyout",
            path(&key)?,
            "-out",
            path(&request)?,
        ])?;
        openssl(&[
            "x509",
            "-req",
            "-in",
            path(&request)?,
            "-CA",
            path(root)?,
            "-CAkey",
            path(root)?,
            "-CAcreateserial",
            "-CAserial",
            path(&at(".srl"))?,
            "-days",
            "1",
            "-extfile",
            path(&extensions)?,
            "-out",
            path(&certificate)?,
        ])?;
        // The peer runs unprivileged.
        std::os::unix::fs::chown(&key, Some(65_534), None)?;
        Ok(Files {
            certificate,
            key,
            root: self.folder.join("root-certificate.pem"),
        })
    }
}

fn path(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is UTF-8")
}

fn openssl(arguments: &[&str]) -> Result<()> {
    let output = Command::new("openssl").args(arguments).output().context("starting openssl")?;
    if !output.status.success() {
        bail!("openssl {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
