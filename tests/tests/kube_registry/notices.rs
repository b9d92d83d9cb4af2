//! What owners of Pods, and operators, find in the API server: Events, and annotations that tell what is wrong.

use anyhow::{Result, ensure};
use mesh_control::capture_states::Proof;
use mesh_control::troubles::{Problem, Repaired};
use mesh_tests::poll::{self, SOON};
use serde_json::Value;

use crate::{Bench, Replica};

const PROBLEM: &str = "culvert.dev/problem";

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
        Ok(pod["metadata"]["annotations"][PROBLEM].as_str().map(str::to_owned))
    }

    fn until_problem(&self, namespace: &str, pod: &str, text: Option<&str>) -> Result<()> {
        poll::until_true(&format!("{namespace}/{pod} says {text:?}"), SOON, || {
            Ok(self.problem(namespace, pod)?.as_deref() == text)
        })
    }

    fn say(&self, replica: &Replica, pod: (&str, &str), proof: Proof, repaired: &[&str]) -> Result<()> {
        let mut words = self.word(pod.0, pod.1, proof)?;
        words[0].problem = Problem::InboundNotCaptured;
        let repaired: Vec<String> = repaired.iter().map(ToString::to_string).collect();
        words[0].repaired = Repaired::of(&repaired);
        // As by its agent's stream, without which it is not told.
        replica.control.with_node("node-a", |status| status.report_streams = 1);
        replica.control.set_report("node-a", words);
        Ok(())
    }
}

fn note(event: &Value) -> &str {
    event["note"].as_str().unwrap_or_default()
}

pub fn told(bench: &mut Bench) -> Result<()> {
    bench.namespace("told")?;
    for (name, ip) in [("a", "10.244.7.1"), ("waits", "10.244.7.2")] {
        bench.pod("told", name, &[ip])?;
    }
    let (replica, other) = (bench.replica()?, bench.replica()?);
    let why = Problem::InboundNotCaptured.text();
    bench.say(&replica, ("told", "a"), Proof::Proven, &[])?;
    replica.until("told/a", "proven")?;
    ensure!(bench.problem("told", "a")?.is_none());

    bench.say(&replica, ("told", "a"), Proof::Lost, &["sk_lookup", "call this number"])?;
    let lost = bench.until_told("told", "a", "MeshProtectionLost")?;
    let pod = bench.server.kubectl().get(&["-n", "told", "pod", "a"])?;
    ensure!(lost["regarding"]["uid"] == pod["metadata"]["uid"], "{lost}");
    ensure!(
        lost["type"] == "Warning" && lost["reportingController"] == "culvert.dev/mesh-control",
        "{lost}"
    );
    ensure!(note(&lost).contains(why), "{lost}");
    let repaired = bench.until_told("told", "a", "MeshProtectionRepaired")?;
    ensure!(
        note(&repaired).contains("sk_lookup and 1 more") && !note(&repaired).contains("number"),
        "{repaired}"
    );
    bench.until_problem("told", "a", Some(&format!("lost: {why}")))?;
    // As people look for it.
    let described = bench.run(&["-n", "told", "describe", "pod", "a"])?;
    ensure!(
        described.contains("MeshProtectionLost") && described.contains(PROBLEM),
        "{described}"
    );
    // The same again is counted in the same Event.
    bench.say(&replica, ("told", "a"), Proof::Lost, &["sk_lookup", "call this number"])?;
    poll::until_true("it is counted", SOON, || {
        let events = bench.events("told", "a", "MeshProtectionRepaired")?;
        Ok(events.len() == 1 && events[0]["series"]["count"] == 2)
    })?;

    // The agent has gone to the other replica, which tells the end of what it has not told.
    other.until("told/a", "lost")?;
    bench.say(&other, ("told", "a"), Proof::Proven, &[])?;
    bench.until_told("told", "a", "MeshProtected")?;
    bench.until_problem("told", "a", None)?;
    ensure!(bench.events("told", "a", "MeshProtectionLost")?.len() == 1);

    bench.say(&replica, ("told", "waits"), Proof::Pending, &[])?;
    let waits = bench.until_told("told", "waits", "MeshNotEnrolled")?;
    ensure!(note(&waits).contains(why), "{waits}");
    bench.until_problem("told", "waits", Some(&format!("not enrolled: {why}")))?;
    // It leaves the mesh.
    bench.run(&["-n", "told", "label", "pod", "waits", "culvert.dev/mesh=disabled"])?;
    bench.until_problem("told", "waits", None)
}

/// A Pod that is deleted, as its agent sees it end: the sandbox goes before the object does.
pub fn ended(bench: &mut Bench) -> Result<()> {
    bench.namespace("ended")?;
    bench.pod("ended", "a", &["10.244.7.5"])?;
    bench.pod("ended", "b", &["10.244.7.6"])?;
    let replica = bench.replica()?;
    for pod in ["a", "b"] {
        bench.say(&replica, ("ended", pod), Proof::Proven, &[])?;
        replica.until(&format!("ended/{pod}"), "proven")?;
    }
    let mut released = bench.word("ended", "a", Proof::Lost)?;
    released[0].problem = Problem::Released;
    replica.control.set_report("node-a", released);
    replica.until("ended/a", "lost")?;
    // A loss that is told shows that the other one would have been told before.
    bench.say(&replica, ("ended", "b"), Proof::Lost, &[])?;
    bench.until_told("ended", "b", "MeshProtectionLost")?;
    ensure!(
        bench.events("ended", "a", "MeshProtectionLost")?.is_empty(),
        "the normal end of a Pod is told as a loss"
    );
    Ok(())
}

pub fn refused(bench: &mut Bench) -> Result<()> {
    bench.namespace("refused")?;
    bench.apply(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: refused}\n\
         spec: {nodeName: node-a, serviceAccountName: web, containers: [{name: app, image: 'nowhere.test/a:1'}, {name: istio-proxy, image: 'nowhere.test/a:1'}]}\n",
    )?;
    // Both see it, and the one that has the Lease tells it.
    let replicas = (bench.replica()?, bench.replica()?);
    let event = bench.until_told("refused", "a", "MeshNotEnrolled")?;
    ensure!(note(&event).contains("sidecar"), "{event}");
    poll::until_true("its annotation says it", SOON, || {
        Ok(bench
            .problem("refused", "a")?
            .is_some_and(|text| text.starts_with("refused: it has another mesh's sidecar")))
    })?;
    drop(replicas);
    // Nor does the one that comes after them tell it again, which tells of another Pod.
    let after = bench.replica()?;
    bench.run(&["label", "namespace", "kube-system", "culvert.dev/mesh=enabled"])?;
    let event = bench.until_told("default", "kube-system", "MeshLabelIgnored")?;
    ensure!(event["regarding"]["kind"] == "Namespace", "{event}");
    bench.run(&["label", "namespace", "kube-system", "culvert.dev/mesh-"])?;
    let events = bench.events("refused", "a", "MeshNotEnrolled")?;
    ensure!(events.len() == 1 && events[0]["series"].is_null(), "{events:?}");
    drop(after);
    Ok(())
}

pub fn blocked(bench: &mut Bench) -> Result<()> {
    bench.namespace("blocked")?;
    bench.pod("blocked", "a", &["10.244.7.11"])?;
    let policy = |port: u16| {
        bench.apply(&format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: only-http, namespace: blocked}}\n\
             spec: {{podSelector: {{matchLabels: {{app: a}}}}, ingress: [{{ports: [{{port: {port}}}]}}]}}\n"
        ))
    };
    policy(8080)?;
    let replicas = (bench.replica()?, bench.replica()?);
    let event = bench.until_told("blocked", "only-http", "MeshPortBlocked")?;
    ensure!(
        event["regarding"]["kind"] == "NetworkPolicy" && note(&event).contains("15008"),
        "{event}"
    );
    // Another form of it, as wrong as the first, is told anew; each once.
    policy(8081)?;
    poll::until_true("its new form is told", SOON, || {
        Ok(bench.events("blocked", "only-http", "MeshPortBlocked")?.len() == 2)
    })?;
    let events = bench.events("blocked", "only-http", "MeshPortBlocked")?;
    ensure!(events.iter().all(|event| event["series"].is_null()), "{events:?}");
    drop(replicas);
    bench
        .run(&["-n", "blocked", "delete", "networkpolicy", "only-http"])
        .map(drop)
}
