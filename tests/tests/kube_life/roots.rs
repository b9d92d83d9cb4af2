//! The root of trust is replaced under traffic, by the commands of docs/TRUST.md.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::dashboards::checkout;
use mesh_tests::kube::load::{Load, under_load};
use mesh_tests::kube::open::Open;
use mesh_tests::kube::shop::{MESH, PATIENCE, SHOP, get, server, until_mutual_tls, until_proven};
use mesh_tests::kube::{Cluster, Node};
use mesh_tests::{poll, suite};
use serde_json::Value;

use super::{agent_page, expect_mesh, report};

const AGENT_ADMIN: u16 = 15000;
/// Its certificate is the first one by the next root.
const NEWCOMER: &str = "newcomer";
/// For connections after the replacement.
const SETTLE: Duration = Duration::from_secs(3);

/// By the first two steps nothing fails, and what is open stays so. The last one cuts what still relies on the former root, and here
/// that is nearly everything, since certificates are renewed at half of their lifetime, hours from now: it is done once the traffic has
/// ended, without the wait that docs/TRUST.md asks for.
pub fn replaced(cluster: &mut Cluster) -> Result<()> {
    let open = Open::between(cluster, "client", "server")?;
    let done = prepare_and_activate(cluster, &open);
    let words = open.finish();
    done?;
    suite::say(&format!("words of the open connections that came back: {:?}", words?));
    retire(cluster)?;
    poll::until_true("the client is answered again", PATIENCE, || {
        Ok(get(cluster, "http://server/").is_ok())
    })?;
    until_proven(cluster, &["client", "near", "server", NEWCOMER])?;
    expect_mesh(cluster)?;
    let after = Load::begin(cluster, "client", "http://server/")?;
    std::thread::sleep(SETTLE);
    let after = after.end(cluster)?;
    report(cluster, "after a root's replacement", &after);
    after.none_failed("the time after a root's replacement")?;
    cluster
        .kubectl()
        .run(&["-n", SHOP, "delete", "pod,service", NEWCOMER, "--timeout=60s"])
        .map(drop)
}

fn prepare_and_activate(cluster: &Cluster, open: &Open) -> Result<()> {
    under_load(cluster, "a root's preparation and activation", || {
        step(cluster, "prepare")?;
        until_trusted(cluster, 2)?;
        let said = step(cluster, "activate")?;
        until_signed_by(cluster, &said)?;
        cluster.kubectl().apply(&server(NEWCOMER, 2))?;
        cluster.kubectl().wait_for(SHOP, "Ready", &[&format!("pod/{NEWCOMER}")])?;
        until_proven(cluster, &[NEWCOMER])?;
        // The client's certificate is by the former root, the newcomer's by the next one.
        let url = format!("http://{NEWCOMER}/");
        poll::until_true("the newcomer answers", PATIENCE, || {
            Ok(get(cluster, &url)?.starts_with(&format!("server={NEWCOMER} ")))
        })?;
        until_mutual_tls(cluster, NEWCOMER)?;
        until_trusted(cluster, 2)?;
        open.expect_progress().context("what was open before")
    })
}

/// What was signed by the next root stays; everything else is made anew at once.
fn retire(cluster: &Cluster) -> Result<()> {
    let before = certificates(cluster)?;
    let newcomer = identity(NEWCOMER);
    ensure!(before.contains_key(&newcomer), "the newcomer has no certificate: {before:?}");
    step(cluster, "retire")?;
    until_trusted(cluster, 1)?;
    let mut now = BTreeMap::new();
    poll::until_true("the certificates of before are replaced", PATIENCE, || {
        now = certificates(cluster)?;
        let mut old = ["client", "near", "server"].map(identity).into_iter();
        Ok(old.all(|identity| now.contains_key(&identity) && now.get(&identity) != before.get(&identity)))
    })
    .with_context(|| format!("{before:?}, then {now:?}"))?;
    ensure!(
        now.get(&newcomer) == before.get(&newcomer),
        "the newcomer's certificate was not by the root that signed when it came"
    );
    Ok(())
}

/// What mesh-control says, asked as docs/TRUST.md has it.
fn step(cluster: &Cluster, step: &str) -> Result<String> {
    let text = std::fs::read_to_string(checkout("docs/TRUST.md"))?;
    let asked = format!("/mesh-control rotate-root {step}");
    let command = text
        .lines()
        .map(str::trim)
        .find(|line| line.starts_with("kubectl ") && line.contains(&asked));
    let command = command.with_context(|| format!("docs/TRUST.md has no command of kubectl with {asked:?}"))?;
    cluster.kubectl().shell(cluster.folder(), command)?.ok(command)
}

/// Every agent trusts so many roots: the wait before the next step that docs/TRUST.md asks for.
fn until_trusted(cluster: &Cluster, roots: u64) -> Result<()> {
    cluster.nodes().iter().try_for_each(|node| {
        poll::until_true(
            &format!("the agent of {} trusts {roots} roots", node.name()),
            PATIENCE,
            || Ok(config_dump(node)?["state"]["trusted_roots"] == roots),
        )
    })
}

/// Every replica signs with the root that `activate` has named: its log names who signs, at each change.
fn until_signed_by(cluster: &Cluster, said: &str) -> Result<()> {
    let named = said.split_once("SHA-256 ").map(|(_, rest)| rest);
    let root = named.and_then(|rest| rest.split(' ').next()).unwrap_or_default();
    ensure!(root.len() == 64, "no SHA-256: {said}");
    let pods = cluster.pods(MESH, "app.kubernetes.io/name=mesh-control")?;
    ensure!(pods.len() == 2, "expected two control planes, saw {}", pods.len());
    for pod in pods {
        let name = pod["metadata"]["name"].as_str().context("a name")?;
        poll::until_true(&format!("{name} signs with the next root"), PATIENCE, || {
            Ok(cluster.kubectl().logs(MESH, name)?.contains(root))
        })?;
    }
    Ok(())
}

fn identity(account: &str) -> String {
    format!("spiffe://cluster.local/ns/{SHOP}/sa/{account}")
}

/// Identity → fingerprint, of both agents.
fn certificates(cluster: &Cluster) -> Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    for node in cluster.nodes() {
        let page = config_dump(node)?;
        for certificate in page["certificates"].as_array().context("certificates")? {
            let text = |key: &str| certificate[key].as_str().map(str::to_owned).context("a text");
            found.insert(text("identity")?, text("fingerprint")?);
        }
    }
    Ok(found)
}

fn config_dump(node: &Node) -> Result<Value> {
    Ok(serde_json::from_str(&agent_page(node, AGENT_ADMIN, "/config_dump")?)?)
}
