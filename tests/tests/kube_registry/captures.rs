//! What agents have proven, and which accounts are deleted, over replicas and restarts.

use anyhow::{Context as _, Result, ensure};
use mesh_control::capture_states::Proof;
use mesh_control::proto::PodWord;
use mesh_control::troubles::{Problem, Repaired};
use mesh_tests::poll::{self, SOON};

use crate::{Bench, NAMESPACE, Replica};

const ANNOTATION: &str = "culvert.dev/capture";

impl Bench {
    pub fn annotation(&self, namespace: &str, pod: &str) -> Result<Option<String>> {
        let pod = self.server.kubectl().get(&["-n", namespace, "pod", pod])?;
        Ok(pod["metadata"]["annotations"][ANNOTATION].as_str().map(str::to_owned))
    }

    pub fn word(&self, namespace: &str, name: &str, proof: Proof) -> Result<Vec<PodWord>> {
        let pod = self.server.kubectl().get(&["-n", namespace, "pod", name])?;
        let uid = pod["metadata"]["uid"].as_str().context("a uid")?.to_owned();
        let (namespace, name) = (namespace.to_owned(), name.to_owned());
        Ok(vec![PodWord {
            uid,
            namespace,
            name,
            proof,
            problem: Problem::Other,
            repaired: Repaired::default(),
        }])
    }
}

impl Replica {
    pub fn state(&self, pod: &str) -> String {
        self.control.status()["pods"][pod].as_str().unwrap_or("no member").to_owned()
    }

    pub fn until(&self, pod: &str, state: &str) -> Result<()> {
        poll::until_true(&format!("{pod} is {state}"), SOON, || Ok(self.state(pod) == state))
    }

    fn revoked(&self) -> Vec<String> {
        let status = self.control.status();
        let revoked = status["revoked_identities"].as_array().cloned().unwrap_or_default();
        revoked.iter().filter_map(|id| id.as_str().map(str::to_owned)).collect()
    }
}

pub fn two_replicas(bench: &mut Bench) -> Result<()> {
    bench.namespace("two")?;
    bench.pod("two", "a", &["10.244.3.1"])?;
    let (one, other) = (bench.replica()?, bench.replica()?);
    ensure!(one.state("two/a") == "pending", "{}", one.state("two/a"));
    let proven = bench.word("two", "a", Proof::Proven)?;
    one.control.set_report("node-b", proven.clone());
    one.control.set_report("node-a", proven);
    one.until("two/a", "proven")?;
    other.until("two/a", "proven")?;
    ensure!(bench.annotation("two", "a")?.as_deref() == Some("proven"));
    // The agent has gone to the other replica, which hears of the loss; the first one's older word does not come back.
    other.control.set_report("node-a", bench.word("two", "a", Proof::Lost)?);
    other.until("two/a", "lost")?;
    one.until("two/a", "lost")?;
    bench.namespace("two-more")?;
    poll::until_true("the first one has compiled since", SOON, || {
        Ok(one.control.metrics.objects.with_label_values(&["Namespace"]).get()
            == other.control.metrics.objects.with_label_values(&["Namespace"]).get())
    })?;
    ensure!(one.state("two/a") == "lost" && other.state("two/a") == "lost");
    ensure!(bench.annotation("two", "a")?.as_deref() == Some("lost"));
    Ok(())
}

pub fn restart(bench: &mut Bench) -> Result<()> {
    bench.namespace("restart")?;
    bench.pod("restart", "a", &["10.244.3.5"])?;
    bench.pod("restart", "b", &["10.244.3.6"])?;
    let before = bench.replica()?;
    let mut words = bench.word("restart", "a", Proof::Proven)?;
    words.extend(bench.word("restart", "b", Proof::Lost)?);
    before.control.set_report("node-a", words);
    before.until("restart/a", "proven")?;
    before.until("restart/b", "lost")?;
    poll::until_true("both are written", SOON, || {
        Ok(bench.annotation("restart", "a")?.is_some() && bench.annotation("restart", "b")?.is_some())
    })?;
    drop(before);
    let after = bench.replica()?;
    ensure!((after.state("restart/a").as_str(), after.state("restart/b").as_str()) == ("proven", "lost"));
    // Somebody takes it away: what was proven stays so, and is written again.
    bench.run(&["-n", "restart", "annotate", "pod", "a", "culvert.dev/capture-"])?;
    poll::until_true("it is written again", SOON, || {
        Ok(bench.annotation("restart", "a")?.is_some())
    })?;
    ensure!(after.state("restart/a") == "proven");
    Ok(())
}

pub fn made_anew(bench: &mut Bench) -> Result<()> {
    bench.namespace("anew")?;
    bench.pod("anew", "a", &["10.244.3.7"])?;
    let replica = bench.replica()?;
    let proven = bench.word("anew", "a", Proof::Proven)?;
    replica.control.set_report("node-a", proven.clone());
    replica.until("anew/a", "proven")?;
    bench.run(&["-n", "anew", "delete", "pod", "a", "--force", "--grace-period=0"])?;
    bench.pod("anew", "a", &["10.244.3.7"])?;
    replica.until("anew/a", "pending")?;
    // A late word of the one before.
    replica.control.set_report("node-a", proven);
    ensure!(bench.annotation("anew", "a")?.is_none() && replica.state("anew/a") == "pending");
    Ok(())
}

pub fn leaves(bench: &mut Bench) -> Result<()> {
    bench.namespace("leaves")?;
    bench.pod("leaves", "a", &["10.244.3.8"])?;
    let replica = bench.replica()?;
    replica
        .control
        .set_report("node-a", bench.word("leaves", "a", Proof::Proven)?);
    replica.until("leaves/a", "proven")?;
    // As an agent says when it has let it go.
    replica.control.set_report("node-a", vec![]);
    bench.run(&["label", "namespace", "leaves", "culvert.dev/mesh-"])?;
    replica.until("leaves/a", "no member")?;
    poll::until_true("nothing is left on it", SOON, || {
        Ok(bench.annotation("leaves", "a")?.is_none())
    })?;
    bench.run(&["label", "namespace", "leaves", "culvert.dev/mesh=enabled"])?;
    replica.until("leaves/a", "pending")
}

/// Somebody copies a Pod's manifest with all that stands on it.
pub fn copied(bench: &mut Bench) -> Result<()> {
    bench.namespace("copied")?;
    bench.pod("copied", "a", &["10.244.3.11"])?;
    let replica = bench.replica()?;
    replica
        .control
        .set_report("node-a", bench.word("copied", "a", Proof::Proven)?);
    replica.until("copied/a", "proven")?;
    let mut pod = bench.server.kubectl().get(&["-n", "copied", "pod", "a"])?;
    ensure!(pod["metadata"]["annotations"][ANNOTATION] == "proven", "{pod}");
    pod["metadata"]["name"] = "b".into();
    for field in ["uid", "resourceVersion", "creationTimestamp"] {
        pod["metadata"].as_object_mut().context("metadata")?.remove(field);
    }
    pod["status"] = serde_json::json!({});
    bench.apply(&pod.to_string())?;
    bench.set_ready("copied", "b", &["10.244.3.12"], true)?;
    replica
        .until("copied/b", "pending")
        .context("a copy of what was proven counts as proven")?;
    // And one that starts reads it no other way.
    drop(replica);
    let fresh = bench.replica()?;
    ensure!(
        fresh.state("copied/b") == "pending" && fresh.state("copied/a") == "proven",
        "{} and {}",
        fresh.state("copied/b"),
        fresh.state("copied/a")
    );
    // What its own agent proves takes the place of it.
    fresh.control.set_report("node-a", bench.word("copied", "b", Proof::Proven)?);
    fresh.until("copied/b", "proven")
}

/// What the owner of a Pod writes there is his Pod's alone, and its agent has the last word.
pub fn forged(bench: &mut Bench) -> Result<()> {
    bench.namespace("forged")?;
    for (name, ip) in [("mine", "10.244.3.13"), ("other", "10.244.3.14")] {
        bench.pod("forged", name, &[ip])?;
    }
    let replica = bench.replica()?;
    let mut words = bench.word("forged", "mine", Proof::Proven)?;
    words.extend(bench.word("forged", "other", Proof::Proven)?);
    replica.control.set_report("node-a", words.clone());
    for pod in ["mine", "other"] {
        replica.until(&format!("forged/{pod}"), "proven")?;
        poll::until_true("it is written", SOON, || Ok(bench.annotation("forged", pod)?.is_some()))?;
    }
    let write = |annotations: &[&str]| {
        let pod = ["-n", "forged", "annotate", "--overwrite", "pod", "mine"];
        bench.run(&[&pod[..], annotations].concat())
    };
    let until_right = || {
        poll::until_true("it is put right", SOON, || {
            Ok(bench.annotation("forged", "mine")?.as_deref() == Some("proven"))
        })
    };
    // In another Pod's name, and no state's name.
    let uid = format!("culvert.dev/capture-uid={}", words[1].uid);
    for annotations in [
        &["culvert.dev/capture=lost", uid.as_str()][..],
        &["culvert.dev/capture=protected"],
    ] {
        write(annotations)?;
        until_right()?;
        ensure!(replica.state("forged/other") == "proven" && replica.state("forged/mine") == "proven");
    }
    // In his own: that closes it, until its agent speaks.
    write(&["culvert.dev/capture=lost"])?;
    replica.until("forged/mine", "lost")?;
    ensure!(replica.state("forged/other") == "proven");
    replica.control.set_report("node-a", words);
    replica.until("forged/mine", "proven")
}

pub fn accounts(bench: &mut Bench) -> Result<()> {
    bench.namespace("accounts")?;
    bench.apply("apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: idle, namespace: accounts}\n")?;
    bench.pod("accounts", "a", &["10.244.3.9"])?;
    let id = |name: &str| format!("spiffe://cluster.local/ns/accounts/sa/{name}");
    let replica = bench.replica()?;
    ensure!(!replica.revoked().contains(&id("web")), "{:?}", replica.revoked());
    bench.run(&["-n", "accounts", "delete", "serviceaccount", "web", "idle"])?;
    let both = |replica: &Replica| [id("web"), id("idle")].iter().all(|id| replica.revoked().contains(id));
    poll::until_true("both are revoked", SOON, || Ok(both(&replica)))?;
    poll::until_true("it is kept", SOON, || {
        let kept =
            bench
                .server
                .kubectl()
                .output(&["-n", NAMESPACE, "get", "configmap", "culvert-deleted-accounts", "-o", "json"])?;
        Ok(kept.stdout.contains("idle") && kept.stdout.contains("web"))
    })?;
    drop(replica);
    let replica = bench.replica()?;
    ensure!(both(&replica), "{:?}", replica.revoked());
    drop(replica);
    // The cluster itself says it of accounts that Pods name.
    bench.run(&["-n", NAMESPACE, "delete", "configmap", "culvert-deleted-accounts"])?;
    let replica = bench.replica()?;
    ensure!(replica.revoked().contains(&id("web")), "{:?}", replica.revoked());
    bench.apply("apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: web, namespace: accounts}\n")?;
    poll::until_true("one that is back is trusted again", SOON, || {
        Ok(!replica.revoked().contains(&id("web")))
    })
}
