//! The whole of policy on two nodes: STRICT and what is excluded, connections that live, dry runs, and services' addresses.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test: a panic is its failure, and standard output its report"
)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::app::{ECHO_PORT, HTTP_PORT};
use mesh_tests::demo::PODS;
use mesh_tests::manifests::{MESHED, ROOT_NAMESPACE, SERVICE_PORT, mesh_config, policy, principal, service};
use mesh_tests::mesh::Mesh;
use mesh_tests::poll::{self, SOON};
use mesh_tests::process::Conversation;
use mesh_tests::suite;
use mesh_tests::topology::{NodeName, forms};

#[path = "policy/revocation.rs"]
mod revocation;
#[path = "policy/services.rs"]
mod services;

/// What a refusal may take on a machine with two busy cores; it takes about a millisecond.
const QUICKLY: Duration = Duration::from_secs(1);
const POOL: (Ipv4Addr, Ipv6Addr) = (Ipv4Addr::new(10, 96, 9, 9), Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 9, 9));
const OWN: (Ipv4Addr, Ipv6Addr) = (Ipv4Addr::new(10, 96, 9, 10), Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 9, 0x10));
/// Two endpoints: that none of them is the stopped one's happens once in 2³⁰ runs.
const TRIES: usize = 30;

fn main() -> ExitCode {
    suite::run(
        "policy",
        || Mesh::start(&PODS, &mut |_| {}),
        Mesh::with_logs,
        &[
            ("strict_keeps_plaintext_out_and_permissive_takes_it", strict),
            ("a_namespace_overrides_the_mesh", namespace_override),
            ("an_excluded_port_goes_in_clear_also_under_strict", exclusion),
            ("an_excluded_range_goes_in_clear_also_under_strict", services::excluded_range),
            ("a_broken_mesh_config_leaves_the_last_good_one", broken_config),
            ("a_live_connection_is_cut_by_a_deny_and_another_goes_on", live_deny),
            ("a_live_connection_is_cut_where_no_allow_matches", live_allow),
            ("a_live_plaintext_connection_is_cut_by_strict", live_strict),
            ("a_dry_run_is_counted_and_logged_and_not_enforced", dry_run),
            ("a_service_goes_on_with_one_of_two_endpoints", one_of_two_endpoints),
            ("a_service_of_one_family_reaches_its_endpoint_by_it", services::one_family),
            (
                "an_endpoint_of_one_family_serves_that_one_alone",
                services::endpoint_of_one_family,
            ),
            ("a_service_leads_back_to_its_own_client", own_service),
            ("a_hundred_changes_leave_who_is_not_meant", revocation::hundred_changes),
            ("a_deleted_service_account_cuts_its_connections", revocation::deleted_account),
            ("a_removed_root_cuts_what_depends_on_it", revocation::removed_root),
        ],
    )
}

fn configure(mesh: &Mesh, namespace: &str, spec: &str) -> Result<()> {
    mesh.registry
        .write(&format!("config-{namespace}.yaml"), &mesh_config(namespace, spec))
}

fn unconfigure(mesh: &Mesh, namespace: &str) -> Result<()> {
    mesh.registry.remove(&format!("config-{namespace}.yaml"))
}

/// The plaintext outsider gets in, or not, in every form of address, on both nodes; the meshed client does.
fn outsider_gets_in(mesh: &Mesh, works: bool) -> Result<()> {
    for server in ["server", "local"] {
        for address in mesh.pod(server).forms() {
            let reached = || {
                format!(
                    "{address}, expecting that plaintext {}",
                    if works { "works" } else { "is refused" }
                )
            };
            mesh.wait_for_outcome("outsider", address, ECHO_PORT, works)
                .with_context(reached)?;
            let log = mesh.access_log(mesh.pod(server).node);
            let position = log.position();
            let attempt = mesh.app.connect(&mesh.pod("outsider").place(), address, ECHO_PORT)?;
            if works {
                attempt.expect_ok().with_context(reached)?;
                log.wait_for(position, &[("path", "plaintext"), ("result", "ok")], SOON)?;
            } else {
                attempt.expect_refused(QUICKLY).with_context(reached)?;
                let fields = [("path", "plaintext"), ("result", "refused"), ("reason", "plaintext_refused")];
                log.wait_for(position, &fields, SOON)?;
            }
            mesh.app
                .connect(&mesh.pod("client").place(), address, ECHO_PORT)?
                .expect_ok()
                .context("the meshed client")?;
        }
    }
    Ok(())
}

fn strict(mesh: &mut Mesh) -> Result<()> {
    outsider_gets_in(mesh, true)?;
    configure(mesh, ROOT_NAMESPACE, "{ mtls: Strict }")?;
    outsider_gets_in(mesh, false)?;
    let refused = mesh.metric(NodeName::Two, "mesh_policy_denied_total", &[("policy", "_strict")])?;
    ensure!(refused >= 3.0, "expected 3 refusals to be counted, saw {refused}");
    let labels = [("reason", "plaintext_refused"), ("destination_workload", "server")];
    let failed = mesh.metric(NodeName::Two, "mesh_tcp_connections_failed_total", &labels)?;
    ensure!(failed >= 3.0, "expected 3 failures to be counted, saw {failed}");
    configure(mesh, ROOT_NAMESPACE, "{ mtls: Permissive }")?;
    outsider_gets_in(mesh, true)?;
    unconfigure(mesh, ROOT_NAMESPACE)
}

fn namespace_override(mesh: &mut Mesh) -> Result<()> {
    configure(mesh, ROOT_NAMESPACE, "{ mtls: Strict }")?;
    outsider_gets_in(mesh, false)?;
    configure(mesh, MESHED, "{ mtls: Permissive }")?;
    outsider_gets_in(mesh, true)?;
    unconfigure(mesh, ROOT_NAMESPACE)?;
    configure(mesh, MESHED, "{ mtls: Strict }")?;
    outsider_gets_in(mesh, false)?;
    unconfigure(mesh, MESHED)?;
    outsider_gets_in(mesh, true)
}

fn exclusion(mesh: &mut Mesh) -> Result<()> {
    configure(
        mesh,
        ROOT_NAMESPACE,
        &format!("{{ mtls: Strict, excludedPorts: [{ECHO_PORT}] }}"),
    )?;
    for address in mesh.pod("server").forms() {
        mesh.wait_for_outcome("outsider", address, HTTP_PORT, false)?;
        mesh.wait_for_path("client", address, "excluded")?;
        mesh.wait_for_outcome("outsider", address, ECHO_PORT, true)?;
        // The other port is as it was.
        let log = mesh.access_log(NodeName::One);
        let position = log.position();
        mesh.app.get(&mesh.pod("client").place(), address, "/")?;
        log.wait_for(position, &[("direction", "outbound"), ("path", "tunnel")], SOON)?;
    }
    let state = mesh.agent_state(NodeName::One)?;
    ensure!(
        state["mtls"] == "Strict" && state["excluded_ports"] == serde_json::json!([ECHO_PORT]),
        "{state}"
    );
    let excluded = mesh.metric(NodeName::One, "mesh_exclusions", &[("kind", "port")])?;
    ensure!(
        excluded == 1.0,
        "expected that the metric tells of one excluded port, saw {excluded}"
    );
    let counted = mesh.metric(
        NodeName::One,
        "mesh_passthrough_connections_total",
        &[("destination", "excluded")],
    )?;
    ensure!(counted >= 3.0, "expected 3 excluded connections to be counted, saw {counted}");
    // Who comes in clear still meets policy.
    let rule = format!("[{{ to: [{{ ports: [{ECHO_PORT}] }}] }}]");
    mesh.registry
        .write("deny.yaml", &policy("deny-port", "server", "Deny", &rule))?;
    let server: IpAddr = mesh.pod("server").v4.into();
    for from in ["client", "outsider"] {
        mesh.wait_for_outcome(from, server, ECHO_PORT, false)?;
    }
    mesh.registry.remove("deny.yaml")?;
    mesh.wait_for_outcome("client", server, ECHO_PORT, true)?;
    // With the exclusion ends what it let out in clear.
    let mut chat = mesh.app.chat(&mesh.pod("client").place(), server)?;
    ensure!(chat.ask("in clear", SOON)? == "in clear");
    let log = mesh.access_log(NodeName::One);
    let position = log.position();
    unconfigure(mesh, ROOT_NAMESPACE)?;
    let end = chat.hear(SOON).context("what was excluded goes on in clear")?;
    ensure!(end.contains("error"), "expected a reset, saw {end}");
    log.wait_for(position, &[("path", "excluded"), ("reason", "cut_by_protection")], SOON)?;
    mesh.wait_for_path("client", server, "tunnel")?;
    outsider_gets_in(mesh, true)
}

fn broken_config(mesh: &mut Mesh) -> Result<()> {
    let file = format!("config-{ROOT_NAMESPACE}.yaml");
    configure(mesh, ROOT_NAMESPACE, "{ mtls: Strict }")?;
    outsider_gets_in(mesh, false)?;
    let (server, local): (IpAddr, IpAddr) = (mesh.pod("server").v4.into(), mesh.pod("local").v4.into());
    for broken in [
        "apiVersion: [".to_owned(),
        mesh_config(ROOT_NAMESPACE, "{ mtls: Maybe }"),
        mesh_config(ROOT_NAMESPACE, "{ mtls: Permissive, excludedPorts: [0] }"),
        mesh_config(ROOT_NAMESPACE, "{ mtls: Permissive, unknown: 1 }"),
    ] {
        mesh.registry.write(&file, &broken)?;
        // A change elsewhere arrives, so the broken file was read, and is still without effect.
        let rule = format!("[{{ to: [{{ ports: [{ECHO_PORT}] }}] }}]");
        mesh.registry.write("other.yaml", &policy("other", "local", "Deny", &rule))?;
        mesh.wait_for_outcome("client", local, ECHO_PORT, false)?;
        mesh.registry.remove("other.yaml")?;
        mesh.wait_for_outcome("client", local, ECHO_PORT, true)?;
        let attempt = mesh.app.connect(&mesh.pod("outsider").place(), server, ECHO_PORT)?;
        attempt.expect_refused(QUICKLY).context(broken)?;
    }
    unconfigure(mesh, ROOT_NAMESPACE)?;
    outsider_gets_in(mesh, true)
}

/// A conversation with the server, and its log's field for the cut.
fn open(mesh: &Mesh, from: &str, address: IpAddr) -> Result<Conversation> {
    let mut chat = mesh.app.chat(&mesh.pod(from).place(), address)?;
    ensure!(chat.ask("hello", SOON)? == "hello");
    Ok(chat)
}

/// The application is told while it says nothing; nothing is left at the server; the destination's log and metric name what cut it.
fn expect_cut(mesh: &Mesh, chat: &Conversation, change: impl FnOnce() -> Result<()>, reason: &str, policy: &str) -> Result<()> {
    let label = match (reason, policy) {
        ("cut_by_settings", _) => "_strict",
        (_, "") => "_no_allow_matched",
        (_, policy) => policy,
    };
    let count = || mesh.metric(NodeName::Two, "mesh_policy_cut_total", &[("policy", label)]);
    let (log, before, served) = (mesh.access_log(NodeName::Two), count()?, at_the_server(mesh)?);
    let position = log.position();
    change()?;
    let end = chat.hear(SOON).context("the client is not told")?;
    ensure!(end.contains("ConnectionReset"), "expected a reset, the client said {end:?}");
    let fields = [
        ("direction", "inbound"),
        ("result", "failed"),
        ("reason", reason),
        ("policy", policy),
    ];
    log.wait_for(position, &fields, SOON)?;
    ensure!(count()? == before + 1.0, "expected one more cut by {label} to be counted");
    poll::until_true("the server's end is closed, too", SOON, || Ok(at_the_server(mesh)? < served))
}

/// Established connections of the echo server.
fn at_the_server(mesh: &Mesh) -> Result<usize> {
    let port = format!(":{ECHO_PORT:04X}");
    mesh.pod("server").netns.run(|| {
        let mut count = 0;
        for table in ["tcp", "tcp6"] {
            let table = std::fs::read_to_string(format!("/proc/thread-self/net/{table}"))?;
            count += table
                .lines()
                .map(|line| line.split_whitespace().collect::<Vec<_>>())
                .filter(|fields| fields.get(1).is_some_and(|local| local.ends_with(&port)) && fields.get(3) == Some(&"01"))
                .count();
        }
        Ok(count)
    })
}

fn live_deny(mesh: &mut Mesh) -> Result<()> {
    for address in mesh.pod("server").forms() {
        let chat = open(mesh, "client", address)?;
        let mut unaffected = open(mesh, "local", address)?;
        let mut plaintext = open(mesh, "outsider", address)?;
        let rule = format!("[{{ from: [{{ principals: [{}] }}] }}]", principal("client"));
        let deny = || mesh.registry.write("live.yaml", &policy("live", "server", "Deny", &rule));
        expect_cut(mesh, &chat, deny, "cut_by_policy", &format!("{MESHED}/live"))?;
        for nth in 0..20 {
            let line = format!("byte for byte, {nth}");
            ensure!(unaffected.ask(&line, SOON)? == line);
            ensure!(plaintext.ask(&line, SOON)? == line);
        }
        mesh.registry.remove("live.yaml")?;
        mesh.wait_for_outcome("client", address, ECHO_PORT, true)?;
        ensure!(unaffected.ask("after", SOON)? == "after");
    }
    Ok(())
}

fn live_allow(mesh: &mut Mesh) -> Result<()> {
    let server: IpAddr = mesh.pod("server").v6.into();
    let chat = open(mesh, "client", server)?;
    let mut allowed = open(mesh, "local", server)?;
    let rule = format!("[{{ from: [{{ principals: [{}] }}] }}]", principal("local"));
    let allow = || mesh.registry.write("live.yaml", &policy("live", "server", "Allow", &rule));
    expect_cut(mesh, &chat, allow, "cut_by_policy", "")?;
    ensure!(allowed.ask("allowed", SOON)? == "allowed");
    mesh.registry.remove("live.yaml")?;
    mesh.wait_for_outcome("client", server, ECHO_PORT, true)
}

fn live_strict(mesh: &mut Mesh) -> Result<()> {
    for address in mesh.pod("server").forms() {
        let chat = open(mesh, "outsider", address)?;
        let mut meshed = open(mesh, "client", address)?;
        let strict = || configure(mesh, ROOT_NAMESPACE, "{ mtls: Strict }");
        expect_cut(mesh, &chat, strict, "cut_by_settings", "")?;
        ensure!(meshed.ask("and on", SOON)? == "and on");
        unconfigure(mesh, ROOT_NAMESPACE)?;
        mesh.wait_for_outcome("outsider", address, ECHO_PORT, true)?;
    }
    Ok(())
}

fn dry_run(mesh: &mut Mesh) -> Result<()> {
    let server: IpAddr = mesh.pod("server").v4.into();
    let rule = format!("[{{ from: [{{ principals: [{}] }}] }}]", principal("client"));
    let manifest = policy("trial", "server", "Deny", &rule) + "  mode: DryRun\n";
    let name = format!("{MESHED}/trial");
    let counted = || mesh.metric(NodeName::Two, "mesh_policy_dry_run_matches_total", &[("policy", &name)]);
    let mut chat = open(mesh, "client", server)?;
    mesh.registry.write("trial.yaml", &manifest)?;
    poll::until_true("the dry run is counted", SOON, || {
        mesh.app
            .connect(&mesh.pod("client").place(), server, ECHO_PORT)?
            .expect_ok()?;
        Ok(counted()? > 0.0)
    })?;
    let (before, log) = (counted()?, mesh.access_log(NodeName::Two));
    let position = log.position();
    mesh.app
        .connect(&mesh.pod("client").place(), server, ECHO_PORT)?
        .expect_ok()
        .context("a dry run enforces nothing")?;
    let logged = format!("[\"{name}\"]");
    let fields = [
        ("direction", "inbound"),
        ("result", "ok"),
        ("dry_run_policies", logged.as_str()),
        ("policy", ""),
    ];
    log.wait_for(position, &fields, SOON)?;
    ensure!(counted()? == before + 1.0, "expected one more match to be counted");
    ensure!(chat.ask("goes on", SOON)? == "goes on");
    let position = log.position();
    mesh.app.connect(&mesh.pod("local").place(), server, ECHO_PORT)?.expect_ok()?;
    log.wait_for(position, &[("result", "ok"), ("dry_run_policies", "[]")], SOON)?;
    mesh.registry.remove("trial.yaml")
}

/// Gives a Pod one more label.
fn label(mesh: &Mesh, pod: &str, from: &str, to: &str) -> Result<()> {
    let file = format!("pod-{pod}.yaml");
    let manifest = std::fs::read_to_string(mesh.registry.folder().join(&file))?;
    ensure!(manifest.contains(from), "{manifest}");
    mesh.registry.write(&file, &manifest.replace(from, to))
}

fn one_of_two_endpoints(mesh: &mut Mesh) -> Result<()> {
    for pod in ["server", "local"] {
        label(mesh, pod, &format!("app: {pod}"), &format!("app: {pod}, pool: both"))?;
    }
    mesh.add_service(NodeName::One, "pool", &service("pool", POOL.0, POOL.1, "pool: both"))?;
    let log = mesh.access_log(NodeName::One);
    let service = format!("pool.{MESHED}.svc.cluster.local");
    let lines_to = |pod: &'static str| vec![("destination_service", service.as_str()), ("destination_workload", pod)];
    for address in forms(POOL.0, POOL.1) {
        mesh.wait_for_outcome("client", address, SERVICE_PORT, true)?;
        let wanted = SocketAddr::new(address, SERVICE_PORT).to_string();
        let position = log.position();
        poll::until_true("both endpoints are chosen", SOON, || {
            let attempt = mesh.app.connect(&mesh.pod("client").place(), address, SERVICE_PORT)?;
            let peer = &attempt.expect_ok()?.report["peer"];
            ensure!(*peer == wanted.as_str(), "getpeername said {peer}, expected {wanted}");
            Ok(["server", "local"]
                .into_iter()
                .all(|pod| !log.since(position, &lines_to(pod)).is_empty()))
        })?;
    }
    for stopped in ["server", "local"] {
        mesh.stop_server(stopped);
        for address in forms(POOL.0, POOL.1) {
            let before = mesh.metric(NodeName::One, "mesh_endpoint_retries_total", &[])?;
            for _ in 0..TRIES {
                let attempt = mesh.app.connect(&mesh.pod("client").place(), address, SERVICE_PORT)?;
                attempt
                    .expect_ok()
                    .with_context(|| format!("{stopped} is stopped, {address}"))?;
            }
            let retried = mesh.metric(NodeName::One, "mesh_endpoint_retries_total", &[])? - before;
            ensure!(retried > 0.0, "{stopped} is stopped, and no retry was counted for {address}");
        }
        mesh.start_server(stopped)?;
    }
    mesh.registry.remove("pool.yaml")?;
    for pod in ["server", "local"] {
        label(mesh, pod, ", pool: both", "")?;
    }
    Ok(())
}

fn own_service(mesh: &mut Mesh) -> Result<()> {
    mesh.add_service(NodeName::One, "own", &service("own", OWN.0, OWN.1, "app: client"))?;
    let log = mesh.access_log(NodeName::One);
    for address in forms(OWN.0, OWN.1) {
        mesh.wait_for_outcome("client", address, SERVICE_PORT, true)?;
        let position = log.position();
        let attempt = mesh.app.connect(&mesh.pod("client").place(), address, SERVICE_PORT)?;
        let wanted = SocketAddr::new(address, SERVICE_PORT).to_string();
        ensure!(attempt.expect_ok()?.report["peer"] == wanted.as_str(), "{}", attempt.report);
        let fields = [
            ("source_workload", "client"),
            ("destination_workload", "client"),
            ("result", "ok"),
        ];
        log.wait_for(position, &fields, SOON)?;
    }
    mesh.registry.remove("own.yaml")
}
