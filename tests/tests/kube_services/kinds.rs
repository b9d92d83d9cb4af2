//! Kinds of Services, as their clients in the mesh meet them.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::poll;
use serde_json::Value;

use crate::world::{PATIENCE, SHOP, World};

/// Enough that each of two endpoints is chosen, but for one run in 2¹⁹.
const MANY: u32 = 20;

fn set(answers: &[String]) -> BTreeSet<&str> {
    answers.iter().map(String::as_str).collect()
}

/// Where a URL leads: the servers that may answer, and the Service that the access log names. A Pod's address is no Service's.
struct Kind {
    url: String,
    servers: &'static [&'static str],
    service: &'static str,
}

pub fn every_kind(world: &mut World) -> Result<()> {
    const WEB: &[&str] = &["web-a", "web-b"];
    let (v4, v6) = world.addresses("web")?;
    ensure!(v6.contains(':'), "web has no IPv6 address: {v4}, {v6}");
    let kind = |host: &str, servers, service| Kind {
        url: format!("http://{host}/"),
        servers,
        service,
    };
    let kinds = [
        kind(&v4, WEB, "web"),
        kind(&format!("[{v6}]"), WEB, "web"),
        kind("web", WEB, "web"),
        kind(&format!("web.{SHOP}.svc.cluster.local"), WEB, "web"),
        // What is only preferred is not in the way.
        kind("near-first", WEB, "near-first"),
        // A name for another Service, by DNS alone.
        kind("elsewhere", WEB, "web"),
        kind("by-hand", &["web-b"], "by-hand"),
        kind("by-hand-outside", &["host"], "by-hand-outside"),
        kind("headless:8080", WEB, ""),
        kind("headless-by-hand:8080", &["web-a"], ""),
        kind("db-0.db:8080", &["db-0"], ""),
        kind("db-1.db:8080", &["db-1"], ""),
    ];
    let urls: Vec<String> = kinds.iter().map(|kind| kind.url.clone()).collect();
    // Slices and records of DNS spread.
    poll::until_true("every kind answers", PATIENCE, || {
        let answers = world.ask("client", &urls, 1)?;
        Ok(kinds
            .iter()
            .all(|kind| kind.servers.contains(&answers[&kind.url][0].as_str())))
    })?;
    let before = world.lines_from("client")?;
    let begin = before
        .iter()
        .filter_map(|line| line["time"].as_str())
        .max()
        .unwrap_or_default()
        .to_owned();
    let answers = world.ask("client", &urls, 3)?;
    for kind in &kinds {
        let servers = set(&answers[&kind.url]);
        ensure!(
            servers.iter().all(|server| kind.servers.contains(server)),
            "{} was answered by {servers:?}, not by {:?}",
            kind.url,
            kind.servers
        );
    }
    // Two lines each, but for the one that left the mesh.
    let expected = before.len() + 2 * 3 * kinds.len() - 3;
    let lines = poll::until("their lines in the access log", PATIENCE, || {
        let lines = world.lines_from("client")?;
        Ok((lines.len() >= expected).then_some(lines))
    })?;
    let lines: Vec<Value> = lines
        .into_iter()
        .filter(|line| line["time"].as_str() > Some(&begin))
        .collect();
    for kind in &kinds {
        let hostname = format!("{}.{SHOP}.svc.cluster.local", kind.service);
        let is_of_kind = |line: &&Value| {
            let named = if kind.service.is_empty() { "" } else { hostname.as_str() };
            let workload = line["destination_workload"].as_str().unwrap_or_default();
            let by_owner = |server: &&str| *server == workload || server.starts_with(&format!("{workload}-"));
            line["direction"] == "outbound" && line["destination_service"] == named && kind.servers.iter().any(by_owner)
        };
        let of_kind: Vec<&Value> = lines.iter().filter(is_of_kind).collect();
        if kind.service == "by-hand-outside" {
            let left = lines.iter().filter(|line| line["destination_service"] == hostname.as_str());
            let mut left = left.filter(|line| line["result"] == "ok");
            let line = left.next().context("nothing went to the outside")?;
            ensure!(line["path"] == "passthrough", "{line}");
            continue;
        }
        let mut of_kind = of_kind.into_iter().filter(|line| line["result"] == "ok").peekable();
        ensure!(of_kind.peek().is_some(), "no connection to {} is in the log", kind.url);
        for line in of_kind {
            ensure!(
                line["connection_security_policy"] == "mutual_tls"
                    && line["source_principal"] == format!("spiffe://cluster.local/ns/{SHOP}/sa/client"),
                "{} was reached without mutual TLS: {line}",
                kind.url
            );
        }
    }
    let in_clear = |line: &&Value| line["direction"] == "inbound" && line["path"] != "tunnel";
    if let Some(line) = lines.iter().find(in_clear) {
        anyhow::bail!("a connection of the client's has arrived in clear: {line}");
    }
    Ok(())
}

/// Also a Pod that is itself the endpoint.
pub fn node_local(world: &mut World) -> Result<()> {
    for (client, server) in [
        ("client", "web-a"),
        ("client-2", "web-b"),
        ("web-a", "web-a"),
        ("web-b", "web-b"),
    ] {
        let answers = world.ask_one(client, "http://local/", MANY)?;
        ensure!(
            set(&answers) == BTreeSet::from([server]),
            "{client} was answered by {answers:?}"
        );
    }
    // Endpoints are on the other node alone.
    let reason = ["reason=\"no_local_endpoint\"", "destination_service=\"far-local."];
    let failed = || world.metric(1, "mesh_tcp_connections_failed_total", &reason);
    let before = failed()?.unwrap_or_default();
    ensure!(
        world.ask_one("client", "http://far-local/", 1)? == ["refused"],
        "another node's endpoint was chosen"
    );
    ensure!(
        world.ask_one("client-2", "http://far-local/", 1)? == ["far"],
        "where the endpoint is"
    );
    world.until_logged("the refusal's reason", |line| {
        line["source_workload"] == "client"
            && line["reason"] == "no_local_endpoint"
            && line["destination_service"] == format!("far-local.{SHOP}.svc.cluster.local")
    })?;
    let after = failed()?.context("it is not counted")?;
    ensure!(after > before, "it is not counted: {before}, then {after}");
    Ok(())
}

pub fn affinity(world: &mut World) -> Result<()> {
    // The control: without it both are chosen.
    let answers = world.ask_one("client", "http://web/", MANY)?;
    ensure!(set(&answers) == BTreeSet::from(["web-a", "web-b"]), "{answers:?}");
    for client in ["client", "client-2"] {
        let answers = world.ask_one(client, "http://sticky/", MANY)?;
        ensure!(
            set(&answers).len() == 1 && answers[0].starts_with("web-"),
            "{client} was sent to {answers:?}"
        );
    }
    Ok(())
}

pub fn named_ports(world: &mut World) -> Result<()> {
    let answers = world.ask_one("client", "http://named/", MANY)?;
    ensure!(set(&answers) == BTreeSet::from(["named-a", "named-b"]), "{answers:?}");
    Ok(())
}

pub fn udp(world: &mut World) -> Result<()> {
    let (v4, v6) = world.addresses("web")?;
    for address in [format!("{v4}:9000"), format!("[{v6}]:9000")] {
        let said = world.sh("client", &format!("mesh-test-app udp {address}"))?;
        ensure!(said.contains("\"ok\":true"), "{address}: {said}");
    }
    // The same port by TCP is the mesh's.
    let said = world.sh("client", &format!("mesh-test-app connect {v4}:9000"))?;
    ensure!(
        said.contains("\"ok\":true") && said.contains(&format!("\"peer\":\"{v4}:9000\"")),
        "{said}"
    );
    Ok(())
}
