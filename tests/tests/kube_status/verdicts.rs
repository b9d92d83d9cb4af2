//! What is said of a policy, and when.

use anyhow::{Context as _, Result, ensure};
use mesh_tests::poll;

use crate::agents::Mouth;
use crate::{Bench, PATIENCE, ROUNDS, SHOP, condition, install_definitions, policy, writer, writes};

pub fn accepted(bench: &mut Bench) -> Result<()> {
    bench.apply(&policy("deny", "web", "80"))?;
    bench.run(&[
        "-n",
        SHOP,
        "wait",
        "authorizationpolicy/deny",
        "--for=condition=Accepted",
        "--timeout=60s",
    ])?;
    let said = bench.until("both nodes enforce it", "deny", |said| said.nodes == Some(2))?;
    ensure!(
        condition(&said) == ("True", "Accepted") && said.workloads == Some(1),
        "{said:?}"
    );
    // As its users see it.
    let table = bench.run(&["-n", SHOP, "get", "authorizationpolicies"])?;
    let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let mut lines = table.lines();
    let (head, row) = (words(lines.next().context("a head")?), words(lines.next().context("a row")?));
    let column = |name: &str| {
        head.iter()
            .position(|head| head == name)
            .and_then(|place| row.get(place))
            .cloned()
    };
    // (Mode is empty where it is not given.)
    ensure!(
        head == ["NAME", "ACTION", "MODE", "ACCEPTED", "REASON", "WORKLOADS", "NODES", "AGE"],
        "{table}"
    );
    ensure!(column("NAME").as_deref() == Some("deny"), "{table}");
    ensure!(row.windows(4).any(|four| *four == ["True", "Accepted", "1", "2"]), "{table}");
    let everywhere = bench.run(&["get", "authorizationpolicies,meshconfigs", "--all-namespaces"])?;
    ensure!(everywhere.contains("authorizationpolicy.culvert.dev/deny"), "{everywhere}");
    let explained = bench.run(&["explain", "authorizationpolicy.status"])?;
    for field in ["conditions", "observedGeneration", "workloadsSelected", "nodesEnforcing"] {
        ensure!(explained.contains(field), "{explained}");
    }
    // Once it is written, nothing is written any more.
    writer(bench)?;
    let before = writes(bench)?;
    bench.apply("{apiVersion: v1, kind: Namespace, metadata: {name: noise}}")?;
    bench.apply(&policy("more", "web", "81"))?;
    bench.until("another one is accepted", "more", |said| said.nodes == Some(2))?;
    ensure!(bench.status("deny")? == said, "{:?}", bench.status("deny")?);
    let after = writes(bench)?;
    // The other one: accepted, and each node's word.
    ensure!(after - before <= 4.0, "{} writes for one policy", after - before);
    bench.run(&["-n", SHOP, "delete", "authorizationpolicy", "more"]).map(drop)
}

pub fn selects_nothing(bench: &mut Bench) -> Result<()> {
    bench.apply(&policy("nobody", "nobody", "80"))?;
    let said = bench.until("it selects nothing", "nobody", |said| said.nodes == Some(2))?;
    ensure!(
        condition(&said) == ("True", "SelectsNothing") && said.workloads == Some(0),
        "{said:?}"
    );
    ensure!(said.message.contains("selects no workload"), "{said:?}");
    // A Pod that is outside of the mesh is no workload of it.
    bench.run(&["-n", SHOP, "label", "pod", "web", "culvert.dev/mesh=disabled"])?;
    let out = bench.until("its only workload has left", "deny", |said| said.workloads == Some(0))?;
    ensure!(out.reason == "SelectsNothing", "{out:?}");
    bench.run(&["-n", SHOP, "label", "pod", "web", "culvert.dev/mesh-"])?;
    let back = bench.until("it is back", "deny", |said| said.workloads == Some(1))?;
    ensure!(back.reason == "Accepted" && back.since == out.since, "{back:?}");
    bench.run(&["-n", SHOP, "delete", "authorizationpolicy", "nobody"]).map(drop)
}

pub fn mesh_config(bench: &mut Bench) -> Result<()> {
    // With the defaults, agents are told nothing new: they have it.
    bench.apply(&format!(
        "apiVersion: culvert.dev/v1alpha1\nkind: MeshConfig\nmetadata: {{name: default, namespace: {SHOP}}}\nspec: {{mtls: Permissive}}\n"
    ))?;
    let what = ["-n", SHOP, "meshconfig", "default"];
    let until = |generation: i64| {
        poll::until("the MeshConfig is enforced", PATIENCE, || {
            let said = bench.said(&what)?;
            Ok((said.nodes == Some(2) && said.observed == Some(generation)).then_some(said))
        })
    };
    let said = until(1)?;
    ensure!(
        condition(&said) == ("True", "Accepted") && said.workloads == Some(2),
        "{said:?}"
    );
    bench.run(&[
        "-n",
        SHOP,
        "patch",
        "meshconfig",
        "default",
        "--type=merge",
        "-p",
        r#"{"spec":{"mtls":"Strict"}}"#,
    ])?;
    until(2)?;
    bench.run(&["-n", SHOP, "delete", "meshconfig", "default"]).map(drop)
}

pub fn generations(bench: &mut Bench) -> Result<()> {
    bench.apply(&policy("changes", "web", "80"))?;
    let first = bench.until("the first form is enforced", "changes", |said| said.nodes == Some(2))?;
    let held = bench.agents[1].enforces();
    bench.agents[1].speak(Mouth {
        is_shut: true,
        ..Mouth::default()
    });
    bench.apply(&policy("changes", "web", "81"))?;
    poll::until_true("the silent node has it", PATIENCE, || Ok(bench.agents[1].enforces() != held))?;
    let one = bench.until("the node that says so enforces the second", "changes", |said| {
        said.nodes == Some(1)
    })?;
    ensure!(
        (one.generation, one.since.as_str()) == (first.generation + 1, first.since.as_str()),
        "{one:?}"
    );
    // What has not changed is in force there still.
    ensure!(bench.status("deny")?.nodes == Some(2), "{:?}", bench.status("deny")?);
    // Several rounds of everything later it does not count yet.
    bench.apply(&policy("later", "web", "82"))?;
    bench.until("another one", "later", |said| said.nodes == Some(1))?;
    ensure!(
        bench.status("changes")?.nodes == Some(1),
        "a node counts before it says that it enforces"
    );
    bench.agents[1].speak(Mouth::default());
    for name in ["changes", "later"] {
        bench.until("the node has said so", name, |said| said.nodes == Some(2))?;
    }
    bench
        .run(&["-n", SHOP, "delete", "authorizationpolicy", "changes", "later"])
        .map(drop)
}

pub fn selectors(bench: &mut Bench) -> Result<()> {
    bench.apply(&policy("moves", "web", "85"))?;
    bench.until("both nodes enforce it", "moves", |said| said.nodes == Some(2))?;
    bench.agents[1].speak(Mouth {
        is_shut: true,
        ..Mouth::default()
    });
    // The policy's own resource is the same: what differs is told with the workloads.
    let (policies, workloads) = (bench.agents[1].enforces(), bench.agents[1].knows());
    bench.apply(&policy("moves", "db", "85"))?;
    poll::until_true(
        "the silent node has it",
        PATIENCE,
        || Ok(bench.agents[1].knows() != workloads),
    )?;
    ensure!(
        bench.agents[1].enforces() == policies,
        "the policies' version has changed, so nothing is shown of the workloads'"
    );
    let one = bench.until("the node that says so enforces it", "moves", |said| said.nodes == Some(1))?;
    ensure!(one.generation == 2 && one.workloads == Some(1), "{one:?}");
    // Several rounds of everything later it does not count yet.
    std::thread::sleep(ROUNDS);
    ensure!(
        bench.status("moves")?.nodes == Some(1),
        "a node counts before it says that it enforces"
    );
    bench.agents[1].speak(Mouth::default());
    bench.until("the node has said so", "moves", |said| said.nodes == Some(2))?;
    bench.run(&["-n", SHOP, "delete", "authorizationpolicy", "moves"]).map(drop)
}

pub fn rejected(bench: &mut Bench) -> Result<()> {
    bench.agents[1].speak(Mouth {
        rejects: vec![format!("Authorization {SHOP}/deny: unknown part: 7")],
        ..Mouth::default()
    });
    let said = bench.until("a node rejects it", "deny", |said| said.reason == "RejectedByNodes")?;
    ensure!(said.nodes == Some(1), "a node that rejects it counts: {said:?}");
    ensure!(
        said.accepted == "True" && said.message.contains("node-b") && said.message.contains("1 node cannot"),
        "{said:?}"
    );
    bench.agents[1].speak(Mouth::default());
    let back = bench.until("it can use it", "deny", |said| said.nodes == Some(2))?;
    ensure!(
        condition(&back) == ("True", "Accepted") && back.since == said.since,
        "{back:?}"
    );
    Ok(())
}

pub fn broken(bench: &mut Bench) -> Result<()> {
    bench.apply(&policy("breaks", "web", "80"))?;
    let good = bench.until("the good form", "breaks", |said| said.nodes == Some(2))?;
    let enforced = bench.agents[0].enforces();
    // As an older definition would have let it in.
    let name = "authorizationpolicies.culvert.dev";
    let loose = r#"[{"op": "replace", "path": "/spec/versions/0/schema/openAPIV3Schema", "value": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}]"#;
    bench.run(&["patch", "crd", name, "--type=json", "-p", loose])?;
    poll::until_true("nonsense passes admission", PATIENCE, || {
        Ok(bench.apply(&policy("breaks", "web", "0")).is_ok())
    })?;
    let said = bench.until("it is refused", "breaks", |said| said.accepted == "False")?;
    let restored = install_definitions(&bench.server);
    ensure!(
        said.reason == "Invalid" && said.message.contains("spec.rules[0].to[0].ports"),
        "{said:?}"
    );
    ensure!(said.message.contains("What stood before stays in force"), "{said:?}");
    ensure!(
        (said.workloads, said.nodes) == (None, None),
        "counts of what is not in force: {said:?}"
    );
    ensure!(
        said.observed == Some(good.generation + 1) && said.since >= good.since,
        "{said:?}"
    );
    ensure!(
        bench.agents[0].enforces() == enforced,
        "the last good form is not in force any longer"
    );
    restored?;
    bench.apply(&policy("breaks", "web", "82"))?;
    let mended = bench.until("it is mended", "breaks", |said| said.nodes == Some(2))?;
    ensure!(condition(&mended) == ("True", "Accepted"), "{mended:?}");
    bench.run(&["-n", SHOP, "delete", "authorizationpolicy", "breaks"]).map(drop)
}

pub fn others(bench: &mut Bench) -> Result<()> {
    let before = bench.status("deny")?;
    let theirs = r#"[{"op": "add", "path": "/status/conditions/-", "value": {"type": "Theirs", "status": "True", "reason": "So", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}}]"#;
    let patch = |kind: &str, change: &str| {
        let what = ["-n", SHOP, "patch", "authorizationpolicy", "deny", "--subresource=status"];
        bench.run(&[&what[..], &[&format!("--type={kind}"), "-p", change]].concat())
    };
    patch("json", theirs)?;
    // What somebody else writes into ours is put right.
    patch("merge", r#"{"status": {"nodesEnforcing": 77}}"#)?;
    let after = bench.until("it is put right", "deny", |said| said.nodes == Some(2))?;
    ensure!(after == before, "{after:?}");
    let object = bench.server.kubectl().get(&["-n", SHOP, "authorizationpolicy", "deny"])?;
    let conditions = object["status"]["conditions"].as_array().context("conditions")?;
    ensure!(
        conditions.iter().any(|condition| condition["type"] == "Theirs"),
        "another one's condition is gone"
    );
    Ok(())
}
