//! Agents of one build under a control plane of the other.

use anyhow::{Context as _, Result, ensure};
use mesh_tests::app::HTTP_PORT;
use mesh_tests::binaries::Build;
use mesh_tests::kube::Cluster;
use mesh_tests::kube::builds::{agents_of, control_of};
use mesh_tests::kube::load::under_load;
use mesh_tests::kube::shop::{PATIENCE, SHOP, get, lines_of, server, until_enforced, until_mutual_tls, until_proven};
use mesh_tests::manifests::{policy, principal};
use mesh_tests::poll;

pub fn control_plane_ahead(cluster: &mut Cluster) -> Result<()> {
    agents_of(cluster, Build::This)?;
    under_load(cluster, "the control plane's upgrade", || control_of(cluster, Build::Other))?;
    whole(cluster, "control-ahead").context("agents of This under a control plane of Other")
}

/// What goes from the one to the other, each way: a Pod that is new, traffic, a policy, and what is said of it.
pub fn whole(cluster: &Cluster, name: &str) -> Result<()> {
    cluster.kubectl().apply(&server(name, 2))?;
    cluster.kubectl().wait_for(SHOP, "Ready", &[&format!("pod/{name}")])?;
    until_proven(cluster, &[name, "client", "near", "server"])?;
    until_answer(cluster, name, true)?;
    until_mutual_tls(cluster, name)?;
    denied(cluster, name)?;
    cluster
        .kubectl()
        .run(&["-n", SHOP, "delete", "pod,service", name, "--timeout=60s"])
        .map(drop)
}

/// A policy is for one Pod, then for another, then gone; beside it is one that is for nobody.
fn denied(cluster: &Cluster, late: &str) -> Result<()> {
    let client = principal("client");
    let rules = format!("[{{ from: [{{ principals: [\"{client}\"] }}], to: [{{ ports: [{HTTP_PORT}] }}] }}]");
    let no_client = |target: &str| policy("no-client", target, "Deny", &rules);
    cluster.kubectl().apply(&no_client("near"))?;
    cluster.kubectl().apply(&policy("for-nobody", "nobody", "Deny", &rules))?;
    until_enforced(cluster, "no-client", 1)?;
    until_condition(cluster, "no-client", "Accepted")?;
    until_condition(cluster, "for-nobody", "SelectsNothing")?;
    until_answer(cluster, "near", false)?;
    ensure!(is_answered(cluster, late), "a policy for another Pod denies");

    cluster.kubectl().apply(&no_client(late))?;
    until_enforced(cluster, "no-client", 2)?;
    // It says that both nodes enforce it: at once, then.
    ensure!(
        !is_answered(cluster, late),
        "the client is let in by a policy that every node is said to enforce"
    );
    until_answer(cluster, "near", true)?;
    poll::until_true("the log names the policy", PATIENCE, || {
        Ok(lines_of(cluster, late)?
            .iter()
            .any(|line| line["policy"] == format!("{SHOP}/no-client") && line["result"] == "refused"))
    })?;
    cluster
        .kubectl()
        .run(&["-n", SHOP, "delete", "authorizationpolicy", "no-client", "for-nobody"])?;
    until_answer(cluster, late, true)
}

fn until_condition(cluster: &Cluster, policy: &str, reason: &str) -> Result<()> {
    let mut status = String::new();
    poll::until_true(&format!("the status of {policy} is {reason}"), PATIENCE, || {
        let policy = cluster.kubectl().get(&["-n", SHOP, "authorizationpolicy", policy])?;
        status = policy["status"].to_string();
        let conditions = policy["status"]["conditions"].as_array().context("conditions")?;
        let accepted = conditions.iter().find(|condition| condition["type"] == "Accepted");
        Ok(accepted.is_some_and(|accepted| accepted["status"] == "True" && accepted["reason"] == reason))
    })
    .with_context(|| format!("it is {status}"))
}

fn is_answered(cluster: &Cluster, server: &str) -> bool {
    get(cluster, &format!("http://{server}/")).is_ok_and(|answer| answer.starts_with(&format!("server={server} ")))
}

fn until_answer(cluster: &Cluster, server: &str, answered: bool) -> Result<()> {
    let what = if answered { "answered" } else { "denied" };
    poll::until_true(&format!("the client is {what} by {server}"), PATIENCE, || {
        Ok(is_answered(cluster, server) == answered)
    })
}
