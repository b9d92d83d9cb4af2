//! What owners of Pods, and operators, find in the API server: Events, and annotations that tell what is wrong.

use anyhow::{Context as _, Result, ensure};
use mesh_control::capture_states::Proof;
use mesh_tests::poll::{self, SOON};
use serde_json::Value;

use crate::{Bench, Replica};

impl Bench {
    /// Events of this reason about the thing.
    fn events(&self, namespace: &str, name: &str, reason: &str) -> Result<Vec<Value>> {
        let list = self.server.kubectl().get(&["-n", namespace, "events.events.k8s.io"])?;
        let items = list["items"].as_array().cloned().unwrap_or_default();
        let is_it = |event: &Value| event["regarding"]["name"] == name && event["reason"] == reason;
        Ok(items.into_iter().filter(is_it).collect())
    }

    fn until_told(&self, namespace: &str, name: &str, reason: &str) -> Result<Value> {
        poll::until(&format!("{reason} about {namespace}/{name}"), SOON, || {
            Ok(self.events(namespace, name, reason)?.into_iter().next())
        })
    }

    fn problem(&self, namespace: &str, pod: &str) -> Result<Option<String>> {
        let pod = self.server.kubectl().get(&["-n", namespace, "pod", pod])?;
        Ok(pod["metadata"]["annotations"]["culvert.dev/problem"]
            .as_str()
            .map(str::to_owned))
    }

    fn until_problem(&self, namespace: &str, pod: &str, text: Option<&str>) -> Result<()> {
        poll::until_true(&format!("{namespace}/{pod} says {text:?}"), SOON, || {
            Ok(self.problem(namespace, pod)?.as_deref() == text)
        })
    }

    fn say(&self, replica: &Replica, pod: (&str, &str), proof: Proof, why: &str, repaired: &[&str]) -> Result<()> {
        let mut words = self.word(pod.0, pod.1, proof)?;
        words[0].reason = why.to_owned();
        words[0].repaired = repaired.iter().map(ToString::to_string).collect();
        replica.control.set_report("node-a", words);
        Ok(())
    }
}

pub fn told(bench: &mut Bench) -> Result<()> {
    bench.namespace("told")?;
    for (name, ip) in [("a", "10.244.7.1"), ("waits", "10.244.7.2")] {
        bench.pod("told", name, &[ip])?;
    }
    let (replica, other) = (bench.replica()?, bench.replica()?);
    bench.say(&replica, ("told", "a"), Proof::Proven, "", &[])?;
    replica.until("told/a", "proven")?;
    ensure!(bench.problem("told", "a")?.is_none());

    bench.say(&replica, ("told", "a"), Proof::Lost, "somebody else answers", &["sk_lookup"])?;
    let lost = bench.until_told("told", "a", "MeshProtectionLost")?;
    let pod = bench.server.kubectl().get(&["-n", "told", "pod", "a"])?;
    ensure!(lost["regarding"]["uid"] == pod["metadata"]["uid"], "{lost}");
    ensure!(
        lost["type"] == "Warning" && lost["reportingController"] == "culvert.dev/mesh-control",
        "{lost}"
    );
    ensure!(
        lost["note"]
            .as_str()
            .is_some_and(|note| note.contains("somebody else answers")),
        "{lost}"
    );
    let repaired = bench.until_told("told", "a", "MeshProtectionRepaired")?;
    ensure!(
        repaired["note"].as_str().is_some_and(|note| note.contains("sk_lookup")),
        "{repaired}"
    );
    bench.until_problem("told", "a", Some("lost: somebody else answers"))?;
    // As people look for it.
    let described = bench.run(&["-n", "told", "describe", "pod", "a"])?;
    ensure!(
        described.contains("MeshProtectionLost") && described.contains("culvert.dev/problem"),
        "{described}"
    );

    // The agent has gone to the other replica, which tells the end of what it has not told.
    other.until("told/a", "lost")?;
    bench.say(&other, ("told", "a"), Proof::Proven, "", &[])?;
    bench.until_told("told", "a", "MeshProtected")?;
    bench.until_problem("told", "a", None)?;

    bench.say(&replica, ("told", "waits"), Proof::Pending, "no room on the node", &[])?;
    let waits = bench.until_told("told", "waits", "MeshNotEnrolled")?;
    ensure!(
        waits["note"]
            .as_str()
            .is_some_and(|note| note.contains("no room on the node")),
        "{waits}"
    );
    bench.until_problem("told", "waits", Some("pending: no room on the node"))?;
    ensure!(replica.control.status()["unprotected"]["told/waits"] == "pending: no room on the node");
    // It leaves the mesh.
    bench.run(&["-n", "told", "label", "pod", "waits", "culvert.dev/mesh=disabled"])?;
    bench.until_problem("told", "waits", None)?;
    ensure!(bench.events("told", "a", "MeshProtectionLost")?.len() == 1);
    Ok(())
}

pub fn refused(bench: &mut Bench) -> Result<()> {
    bench.namespace("refused")?;
    bench.apply(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: refused}\n\
         spec: {nodeName: node-a, serviceAccountName: web, containers: [{name: app, image: 'nowhere.test/a:1'}, {name: istio-proxy, image: 'nowhere.test/a:1'}]}\n",
    )?;
    // Both see it, and one Event is what there is of it.
    let replicas = (bench.replica()?, bench.replica()?);
    let event = bench.until_told("refused", "a", "MeshNotEnrolled")?;
    ensure!(event["note"].as_str().is_some_and(|note| note.contains("sidecar")), "{event}");
    poll::until_true("its annotation says it", SOON, || {
        Ok(bench
            .problem("refused", "a")?
            .is_some_and(|text| text.starts_with("refused: it has another mesh's sidecar")))
    })?;
    ensure!(bench.events("refused", "a", "MeshNotEnrolled")?.len() == 1);
    drop(replicas);
    Ok(())
}

/// Somebody copies a Pod's manifest with all that stands on it, or writes it there by hand.
pub fn copied(bench: &mut Bench) -> Result<()> {
    bench.namespace("copied")?;
    bench.pod("copied", "a", &["10.244.7.5"])?;
    let replica = bench.replica()?;
    bench.say(&replica, ("copied", "a"), Proof::Proven, "", &[])?;
    replica.until("copied/a", "proven")?;
    let mut pod = bench.server.kubectl().get(&["-n", "copied", "pod", "a"])?;
    ensure!(pod["metadata"]["annotations"]["culvert.dev/capture"] == "proven", "{pod}");
    pod["metadata"]["name"] = "b".into();
    for field in ["uid", "resourceVersion", "creationTimestamp"] {
        pod["metadata"].as_object_mut().context("metadata")?.remove(field);
    }
    pod["status"] = serde_json::json!({});
    bench.apply(&pod.to_string())?;
    bench.set_ready("copied", "b", &["10.244.7.6"], true)?;
    replica
        .until("copied/b", "pending")
        .context("a copy of what was proven counts as proven")?;
    poll::until_true("nothing of it stays", SOON, || Ok(bench.annotation("copied", "b")?.is_none()))?;
    // And one that starts reads it no other way.
    let fresh = bench.replica()?;
    ensure!(fresh.state("copied/b") == "pending" && fresh.state("copied/a") == "proven");
    // No state's name: what is known stays, and is written again.
    bench.run(&[
        "-n",
        "copied",
        "annotate",
        "--overwrite",
        "pod",
        "a",
        "culvert.dev/capture=protected",
    ])?;
    poll::until_true("it is put right", SOON, || {
        Ok(bench.annotation("copied", "a")?.as_deref() == Some("proven"))
    })?;
    ensure!(replica.state("copied/a") == "proven" && fresh.state("copied/a") == "proven");
    Ok(())
}

/// What the owner of a Pod says of it where admission does not keep him from it: it is his Pod's alone, and its agent has the last word.
pub fn forged(bench: &mut Bench) -> Result<()> {
    bench.namespace("forged")?;
    for (name, ip) in [("mine", "10.244.7.8"), ("other", "10.244.7.9")] {
        bench.pod("forged", name, &[ip])?;
    }
    let replica = bench.replica()?;
    bench.say(&replica, ("forged", "other"), Proof::Proven, "", &[])?;
    bench.say(&replica, ("forged", "mine"), Proof::Proven, "", &[])?;
    replica.until("forged/other", "proven")?;
    replica.until("forged/mine", "proven")?;
    let other = bench.server.kubectl().get(&["-n", "forged", "pod", "other"])?;
    let other = other["metadata"]["uid"].as_str().context("a uid")?.to_owned();
    // In another Pod's name.
    let uid = format!("culvert.dev/capture-uid={other}");
    bench.run(&[
        "-n",
        "forged",
        "annotate",
        "--overwrite",
        "pod",
        "mine",
        "culvert.dev/capture=lost",
        &uid,
    ])?;
    poll::until_true("it is put right", SOON, || {
        Ok(bench.annotation("forged", "mine")?.as_deref() == Some("proven"))
    })?;
    ensure!(replica.state("forged/other") == "proven" && replica.state("forged/mine") == "proven");
    // In his own.
    bench.run(&[
        "-n",
        "forged",
        "annotate",
        "--overwrite",
        "pod",
        "mine",
        "culvert.dev/capture=lost",
    ])?;
    replica.until("forged/mine", "lost")?;
    ensure!(replica.state("forged/other") == "proven");
    bench.say(&replica, ("forged", "mine"), Proof::Proven, "", &[])?;
    replica.until("forged/mine", "proven")
}

pub fn kept_out(bench: &mut Bench) -> Result<()> {
    bench.run(&["label", "namespace", "kube-system", "culvert.dev/mesh=enabled"])?;
    let replica = bench.replica()?;
    let event = bench.until_told("default", "kube-system", "MeshLabelIgnored")?;
    ensure!(event["regarding"]["kind"] == "Namespace", "{event}");
    let warnings = replica.control.status()["warnings"].to_string();
    ensure!(
        warnings.contains("namespace kube-system") && warnings.contains("is ignored"),
        "{warnings}"
    );
    bench.run(&["label", "namespace", "kube-system", "culvert.dev/mesh-"])?;
    Ok(())
}

pub fn network_policies(bench: &mut Bench) -> Result<()> {
    bench.namespace("walled")?;
    bench.pod("walled", "a", &["10.244.7.11"])?;
    let policy = |ports: &str| {
        bench.apply(&format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: only-http, namespace: walled}}\n\
             spec: {{podSelector: {{matchLabels: {{app: a}}}}, ingress: [{{ports: [{ports}]}}]}}\n"
        ))
    };
    let replica = bench.replica()?;
    let named = |replica: &Replica| {
        let status = replica.control.status();
        let found = status["network_policies_in_the_way"].as_array().cloned().unwrap_or_default();
        found.into_iter().find(|finding| finding["policy"] == "walled/only-http")
    };
    policy("{port: 8080}")?;
    let finding = poll::until("the policy is found", SOON, || Ok(named(&replica)))?;
    ensure!(finding["pods"] == 1 && finding["direction"] == "ingress", "{finding}");
    let advice = finding["advice"].as_str().unwrap_or_default();
    ensure!(advice.contains("15008") && advice.contains("walled/only-http"), "{advice}");
    bench.until_told("walled", "only-http", "MeshPortNotAllowed")?;
    bench.until_told("walled", "a", "MeshPortNotAllowed")?;
    policy("{port: 8080}, {port: 15008}")?;
    poll::until_true("it is mended", SOON, || Ok(named(&replica).is_none()))
}
