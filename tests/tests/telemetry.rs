//! What an operator reads: the access log's addresses, every metric that is documented, and how TCP fares on the wire.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test: a panic is its failure, and standard output its report"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use mesh_tests::access_log::text;
use mesh_tests::app::{CLOSED_PORT, ECHO_PORT};
use mesh_tests::demo::PODS;
use mesh_tests::exposition::{self, Family};
use mesh_tests::manifests::{policy, spiffe_id};
use mesh_tests::mesh::Mesh;
use mesh_tests::poll::{self, SOON};
use mesh_tests::suite;
use mesh_tests::topology::NodeName;

fn main() -> ExitCode {
    suite::run(
        "telemetry",
        || Mesh::start(&PODS, &mut |_| {}),
        Mesh::with_logs,
        &[
            ("a_line_has_the_pods_own_address_and_the_applications_port", addresses),
            ("the_tables_of_metrics_are_true_both_ways", documented),
            ("bytes_are_counted_as_they_were_sent", bytes),
            ("gauges_tell_how_the_agent_stands", gauges),
            ("a_slow_and_lossy_wire_is_seen", wire),
        ],
    )
}

fn addresses(mesh: &mut Mesh) -> Result<()> {
    for to in ["server", "local", "outsider"] {
        for address in mesh.pod(to).forms() {
            let client = mesh.pod("client");
            let log = mesh.access_log(client.node);
            let there = mesh.access_log(mesh.pod(to).node);
            let (position, before) = (log.position(), there.position());
            let attempt = mesh.app.connect(&client.place(), address, ECHO_PORT)?;
            let local: SocketAddr = attempt.expect_ok()?.report["local"].as_str().unwrap_or_default().parse()?;
            let own = SocketAddr::new(client.own_address(address), local.port()).to_string();
            let fields = [("direction", "outbound"), ("source_address", own.as_str()), ("result", "ok")];
            log.wait_for(position, &fields, SOON)
                .with_context(|| format!("client → {address}"))?;
            if to == "outsider" {
                continue;
            }
            // The destination knows the Pod for sure; the port is that of the tunnel, which many connections share.
            let fields = [("direction", "inbound"), ("destination_workload", to)];
            let line = there.wait_for(before, &fields, SOON)?;
            let source: SocketAddr = text(&line, "source_address").parse()?;
            ensure!(client.addresses().contains(&source.ip()), "{line}");
        }
    }
    Ok(())
}

/// On both sides, to the byte; what comes back is an echo.
fn bytes(mesh: &mut Mesh) -> Result<()> {
    const BYTES: [usize; 3] = [1, 100_003, 5_000_011];
    let (client, server) = (mesh.pod("client").place(), mesh.pod("server"));
    let count = |mesh: &Mesh, name: &str| -> Result<Vec<f64>> {
        [("source", NodeName::One), ("destination", NodeName::Two)]
            .into_iter()
            .map(|(reporter, node)| {
                let labels = [
                    ("reporter", reporter),
                    ("source_workload", "client"),
                    ("destination_workload", "server"),
                ];
                mesh.metric(node, name, &labels)
            })
            .collect()
    };
    let counted = |mesh: &Mesh| -> Result<Vec<f64>> {
        let [sent, received, closed] = [
            "mesh_tcp_sent_bytes_total",
            "mesh_tcp_received_bytes_total",
            "mesh_tcp_connections_closed_total",
        ]
        .map(|name| count(mesh, name));
        Ok([sent?, received?, closed?].concat())
    };
    for (address, bytes) in server.forms().into_iter().cycle().zip(BYTES) {
        let before = counted(mesh)?;
        let report = mesh.app.bulk(&client, address, bytes)?;
        ensure!(
            report["received"] == bytes && report["sent_sha256"] == report["received_sha256"],
            "{report}"
        );
        let moved = bytes as f64;
        let expected = [moved, moved, moved, moved, 1.0, 1.0];
        let mut rose = Vec::new();
        poll::until_true("all bytes are counted", SOON, || {
            rose = counted(mesh)?
                .iter()
                .zip(&before)
                .map(|(after, before)| after - before)
                .collect();
            Ok(rose[4..] == expected[4..])
        })?;
        ensure!(
            rose == expected,
            "{bytes} bytes there and back by {address}: expected {expected:?}, saw {rose:?}"
        );
    }
    Ok(())
}

/// A row of a table in docs/METRICS.md.
struct Documented {
    labels: BTreeSet<String>,
    once: bool,
}

fn tables() -> Result<BTreeMap<String, Documented>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/METRICS.md");
    let document = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let expand = |set: &str| -> Result<BTreeSet<String>> {
        let start = format!("*{set} labels*: ");
        let line = document
            .lines()
            .find_map(|line| line.strip_prefix(&start))
            .context("the labels' list")?;
        // Values stand in brackets.
        let mut depth = 0;
        let names: String = line
            .chars()
            .filter(|character| {
                depth += i32::from(*character == '(');
                let outside = depth == 0;
                depth -= i32::from(*character == ')');
                outside
            })
            .collect();
        Ok(quoted(&names))
    };
    let (connection, pair) = (expand("Connection")?, expand("Pair")?);
    let mut rows = BTreeMap::new();
    for line in document.lines().filter(|line| line.starts_with("| `mesh_")) {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let &[_, name, labels, meaning, _] = cells.as_slice() else {
            bail!("not a row of three cells: {line}");
        };
        let mut names = quoted(labels);
        for (word, set) in [("connection", &connection), ("pair", &pair)] {
            if labels.split(", ").any(|label| label == word) {
                names.extend(set.iter().cloned());
            }
        }
        let row = Documented {
            labels: names,
            once: meaning.starts_with("*once*"),
        };
        let name = name.trim_matches('`').to_owned();
        ensure!(rows.insert(name, row).is_none(), "twice: {line}");
    }
    Ok(rows)
}

/// What stands in backticks.
fn quoted(text: &str) -> BTreeSet<String> {
    text.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

fn documented(mesh: &mut Mesh) -> Result<()> {
    // Of each kind at least one.
    let (client, server) = (mesh.pod("client").place(), mesh.pod("server").v4.into());
    mesh.app.connect(&client, server, ECHO_PORT)?.expect_ok()?;
    ensure!(
        !mesh.app.connect(&client, server, CLOSED_PORT)?.ok(),
        "the closed port is open"
    );
    let tables = tables()?;
    let mut served: BTreeMap<String, Family> = BTreeMap::new();
    poll::until_true("the failed connection is counted", SOON, || {
        Ok(mesh.metric(NodeName::One, "mesh_tcp_connections_failed_total", &[])? > 0.0)
    })?;
    for page in [
        mesh.metrics(NodeName::One)?,
        mesh.metrics(NodeName::Two)?,
        mesh.control_page("/metrics")?.body,
    ] {
        for (name, family) in exposition::parse(&page).map_err(anyhow::Error::msg)? {
            let Some(row) = tables.get(&name) else {
                bail!("{name} is served, and not in docs/METRICS.md");
            };
            for sample in &family.samples {
                let labels: BTreeSet<String> = sample.labels.keys().filter(|label| *label != "le").cloned().collect();
                ensure!(
                    labels == row.labels,
                    "{name} is documented with {:?} and has {labels:?}",
                    row.labels
                );
            }
            served.insert(name, family);
        }
    }
    let missing: Vec<&String> = tables
        .iter()
        .filter(|(name, row)| !row.once && !served.contains_key(*name))
        .map(|(name, _)| name)
        .collect();
    ensure!(missing.is_empty(), "documented, and not served: {missing:?}");
    Ok(())
}

fn gauges(mesh: &mut Mesh) -> Result<()> {
    mesh.wait_for_tunnel("client", "server")?;
    let metric = |name: &str, labels: &[(&str, &str)]| mesh.metric(NodeName::One, name, labels);
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
    for pod in ["client", "local"] {
        let id = spiffe_id(pod);
        let end = metric("mesh_certificate_expiry_timestamp_seconds", &[("identity", &id)])?;
        ensure!(end > now, "the certificate of {pod} ends at {end}, and now is {now}");
    }
    ensure!(
        metric(
            "mesh_certificate_expiry_timestamp_seconds",
            &[("identity", &spiffe_id("server"))]
        )? == 0.0,
        "the certificate of another node's Pod is here"
    );
    ensure!(metric("mesh_discovery_connected", &[])? == 1.0, "not connected");
    for kind in ["Address", "Authorization"] {
        ensure!(
            metric("mesh_discovery_enforced_info", &[("type", kind)])? == 1.0,
            "no version of {kind}"
        );
    }
    expect_version_to_follow(mesh)?;
    ensure!(
        metric("mesh_tunnels_open", &[("direction", "outbound")])? >= 1.0,
        "no tunnel is open"
    );
    ensure!(
        metric("mesh_tunnel_handshakes_total", &[("direction", "outbound"), ("result", "ok")])? >= 1.0,
        "no handshake was counted"
    );
    ensure!(
        metric("mesh_capture_map_entries", &[("map", "pods")])? == 2.0,
        "two Pods are enrolled"
    );
    ensure!(
        metric("mesh_capture_map_entries_max", &[("map", "pods")])? > 2.0,
        "room for more"
    );
    ensure!(metric("mesh_pods", &[("proof", "proven")])? == 2.0, "both are proven");
    ensure!(metric("mesh_build_info", &[])? == 1.0, "no build");
    // A change makes the control plane speak, and the age small again.
    mesh.kill_control();
    let killed = Instant::now();
    poll::until_true("the agent sees that the control plane is away", SOON, || {
        Ok(mesh.metric(NodeName::One, "mesh_discovery_connected", &[])? == 0.0)
    })?;
    let age = |mesh: &Mesh| mesh.metric(NodeName::One, "mesh_discovery_last_word_age_seconds", &[]);
    let before = age(mesh)?;
    ensure!(before > 0.0 && age(mesh)? > before, "the age does not rise");
    mesh.start_control()?;
    poll::until_true("the control plane's word is young again", SOON, || {
        let connected = mesh.metric(NodeName::One, "mesh_discovery_connected", &[])? == 1.0;
        let since_killed = killed.elapsed().as_secs_f64();
        Ok(connected && age(mesh)? < since_killed)
    })
}

/// The version that the agent says to enforce is another one once a policy has come, and once it has gone.
fn expect_version_to_follow(mesh: &Mesh) -> Result<()> {
    let version = || {
        let page = mesh.metrics(NodeName::One)?;
        let of_policies =
            |line: &&str| line.starts_with("mesh_discovery_enforced_info{") && line.contains("type=\"Authorization\"");
        let line = page.lines().find(of_policies).context("no version of Authorization")?;
        Ok::<_, anyhow::Error>(line.to_owned())
    };
    let file = "said-in-a-version.yaml";
    let mut before = version()?;
    for comes in [true, false] {
        if comes {
            mesh.registry
                .write(file, &policy("said-in-a-version", "nobody", "Allow", "[]"))?;
        } else {
            mesh.registry.remove(file)?;
        }
        poll::until_true("the version of the policies is another", SOON, || Ok(version()? != before))?;
        before = version()?;
    }
    Ok(())
}

/// Of the tunnel from the client to the server, as the client's node counts.
#[derive(Clone, Copy, Debug)]
struct Health {
    samples: f64,
    rtt_sum: f64,
    sent: f64,
    retransmitted: f64,
}

impl Health {
    fn of(mesh: &Mesh) -> Result<Self> {
        let labels = [
            ("reporter", "source"),
            ("source_workload", "client"),
            ("destination_workload", "server"),
        ];
        let metric = |name: &str| mesh.metric(NodeName::One, name, &labels);
        Ok(Self {
            samples: metric("mesh_tcp_smoothed_rtt_seconds_count")?,
            rtt_sum: metric("mesh_tcp_smoothed_rtt_seconds_sum")?,
            sent: metric("mesh_tcp_sent_segments_total")?,
            retransmitted: metric("mesh_tcp_retransmitted_segments_total")?,
        })
    }

    /// What this much traffic added.
    fn of_bulk(mesh: &Mesh, bytes: usize) -> Result<Self> {
        let before = Self::of(mesh)?;
        let (client, server) = (mesh.pod("client").place(), mesh.pod("server").v4.into());
        let report = mesh.app.bulk(&client, server, bytes)?;
        ensure!(report["received"] == bytes, "{report}");
        let segments = (bytes / 65_536) as f64;
        poll::until("the tunnel is measured", SOON, || {
            // The kernel is asked when something passes.
            mesh.app.connect(&client, server, ECHO_PORT)?.expect_ok()?;
            let now = Self::of(mesh)?;
            let grown = Self {
                samples: now.samples - before.samples,
                rtt_sum: now.rtt_sum - before.rtt_sum,
                sent: now.sent - before.sent,
                retransmitted: now.retransmitted - before.retransmitted,
            };
            Ok((grown.samples > 0.0 && grown.sent >= segments).then_some(grown))
        })
    }

    fn rtt(&self) -> f64 {
        self.rtt_sum / self.samples
    }
}

/// A bucket filter on the node's uplink: what waits in it is late, and what finds no room is lost.
fn wire(mesh: &mut Mesh) -> Result<()> {
    let healthy = Health::of_bulk(mesh, 8 << 20)?;
    ensure!(
        healthy.retransmitted <= healthy.sent / 100.0,
        "on a wire without loss: {healthy:?}"
    );
    // 40 KB at 8 Mbit/s: up to 40 ms. Eight seconds of traffic, so that the kernel is asked in its midst.
    let filter = [
        "qdisc", "add", "dev", "uplink", "root", "tbf", "rate", "8mbit", "burst", "16kb", "limit", "40kb",
    ];
    tc(mesh, &filter)?;
    let shaped = Health::of_bulk(mesh, 8 << 20);
    tc(mesh, &["qdisc", "del", "dev", "uplink", "root"])?;
    let shaped = shaped?;
    ensure!(
        shaped.retransmitted > healthy.retransmitted,
        "{healthy:?}, then with loss {shaped:?}"
    );
    ensure!(shaped.retransmitted > 0.0 && shaped.retransmitted < shaped.sent, "{shaped:?}");
    ensure!(
        shaped.rtt() > 0.005 && shaped.rtt() > healthy.rtt(),
        "{healthy:?}, then delayed {shaped:?}"
    );
    Ok(())
}

fn tc(mesh: &Mesh, arguments: &[&str]) -> Result<()> {
    let output = mesh.topology.node(NodeName::One).netns.run(|| {
        Command::new("tc")
            .args(arguments)
            .output()
            .context("starting `tc` (package iproute2)")
    })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("qdisc kind is unknown") || said.contains("No such file") {
        return Err(suite::skip(&format!(
            "this kernel has no token bucket filter (CONFIG_NET_SCH_TBF): {said}"
        )));
    }
    bail!("tc {arguments:?}: {said}")
}
