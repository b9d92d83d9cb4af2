//! Many objects at once: nothing is listed twice, and not every event is a compilation. `CULVERT_TEST_PODS=10000` for the figures of a
//! large cluster, which are printed.

use std::io::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use mesh_tests::poll;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::{ADDRESSES, Bench, POLICIES};

const NAMESPACE: &str = "large";
const PATIENCE: Duration = Duration::from_secs(120);
const AT_ONCE: usize = 32;

fn pods() -> Result<usize> {
    match std::env::var("CULVERT_TEST_PODS") {
        Ok(text) => text.parse().context("CULVERT_TEST_PODS"),
        Err(_) => Ok(200),
    }
}

pub fn many(bench: &mut Bench) -> Result<()> {
    bench.install_kinds()?;
    bench.namespace(NAMESPACE)?;
    let count = pods()?;
    let (services, policies) = (count / 10, count / 20);
    let following = bench.replica()?;
    let lists = |kind: &str| following.control.metrics.lists.with_label_values(&[kind]).get();
    let (began, snapshots, listed) = (Instant::now(), following.control.metrics.snapshots.get(), lists("Pod"));
    bench.runtime.block_on(async {
        let client = bench.server.client().await?;
        let places = Arc::new(Semaphore::new(AT_ONCE));
        let mut tasks = JoinSet::new();
        for n in 0..count {
            let (client, places) = (client.clone(), Arc::clone(&places));
            tasks.spawn(async move {
                let _place = places.acquire().await?;
                make(&client, n, services, policies).await
            });
        }
        while let Some(done) = tasks.join_next().await {
            done??;
        }
        anyhow::Ok(())
    })?;
    let made = began.elapsed();
    let is_whole = |replica: &crate::Replica| {
        let snapshot = replica.control.snapshot();
        let of = |url: &str, part: &str| {
            let resources = snapshot.types.get(url).map(|of_type| of_type.resources.keys());
            resources.map_or(0, |names| names.filter(|name| name.contains(part)).count())
        };
        of(ADDRESSES, "//Pod/large/") == count && of(ADDRESSES, "large/s") == services && of(POLICIES, "large/p") == policies
    };
    poll::until_true("everything that was made is told", PATIENCE, || Ok(is_whole(&following)))?;
    let compiled = following.control.metrics.snapshots.get() - snapshots;
    let most = began.elapsed().as_secs() * 4 + 8;
    ensure!(compiled <= most, "{compiled} compilations in {:?}", began.elapsed());
    ensure!(lists("Pod") == listed, "the list of Pods was read again");
    drop(following);

    let (memory, began) = (resident_bytes()?, Instant::now());
    let replica = bench.replica()?;
    let ready = began.elapsed();
    poll::until_true("a new replica tells it all", PATIENCE, || Ok(is_whole(&replica)))?;
    let held = resident_bytes()?.saturating_sub(memory);
    let began = Instant::now();
    let changed = replica.control.snapshot().types[ADDRESSES].version.clone();
    bench.pod(NAMESPACE, "one-more", &["10.99.0.1"])?;
    let asked = began.elapsed();
    poll::until_true("one more is told", PATIENCE, || {
        Ok(replica.control.snapshot().types[ADDRESSES].version != changed)
    })?;
    writeln!(
        std::io::stdout(),
        "{count} Pods, {services} Services, {policies} policies: made in {made:.1?} with {compiled} compilations; a new replica \
         is ready after {ready:.1?} and holds {} MiB more; one more Pod is told {:.0?} after it was made (by kubectl, in {asked:.1?})",
        held >> 20,
        began.elapsed().saturating_sub(asked),
    )?;
    Ok(())
}

async fn make(client: &Client, n: usize, services: usize, policies: usize) -> Result<()> {
    let [a, b] = [n / 250, n % 250 + 1];
    let ip = format!("10.{}.{}.{b}", 100 + a / 250, a % 250);
    let labels = serde_json::json!({"app": format!("a{}", n % services.max(1))});
    let pod = serde_json::json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": format!("w{n}"), "namespace": NAMESPACE, "labels": labels},
        "spec": {"nodeName": "node-a", "serviceAccountName": "web", "containers": [{"name": "main", "image": "nowhere.test/a:1"}]},
    });
    create(client, "", "v1", "Pod", pod).await?;
    let status = serde_json::json!({"status": {
        "phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "conditions": [{"type": "Ready", "status": "True"}],
    }});
    let kind = ApiResource::from_gvk(&GroupVersionKind::gvk("", "v1", "Pod"));
    let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), NAMESPACE, &kind);
    api.patch_status(&format!("w{n}"), &PatchParams::default(), &Patch::Merge(status))
        .await?;
    if n < services {
        let service = serde_json::json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": format!("s{n}"), "namespace": NAMESPACE},
            "spec": {"selector": {"app": format!("a{n}")}, "ports": [{"name": "http", "port": 80, "targetPort": 8080}]},
        });
        create(client, "", "v1", "Service", service).await?;
        let text = crate::endpoints::slice(
            NAMESPACE,
            &format!("s{n}-1"),
            &format!("s{n}"),
            "IPv4",
            &[(&ip, Some(&format!("w{n}")), true)],
        );
        create(
            client,
            "discovery.k8s.io",
            "v1",
            "EndpointSlice",
            serde_json::from_str(&text)?,
        )
        .await?;
    }
    if n < policies {
        let policy = serde_json::json!({
            "apiVersion": "culvert.dev/v1alpha1", "kind": "AuthorizationPolicy",
            "metadata": {"name": format!("p{n}"), "namespace": NAMESPACE},
            "spec": {"selector": {"matchLabels": {"app": format!("a{n}")}}, "action": "Deny", "rules": [{"to": [{"ports": [81]}]}]},
        });
        create(client, "culvert.dev", "v1alpha1", "AuthorizationPolicy", policy).await?;
    }
    Ok(())
}

async fn create(client: &Client, group: &str, version: &str, kind: &str, object: serde_json::Value) -> Result<()> {
    let resource = if kind == "AuthorizationPolicy" {
        ApiResource::erase::<mesh_api::AuthorizationPolicy>(&())
    } else {
        ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind))
    };
    let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), NAMESPACE, &resource);
    api.create(&PostParams::default(), &serde_json::from_value(object)?).await?;
    Ok(())
}

fn resident_bytes() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).context("VmRSS")?;
    let kib: u64 = line.split_whitespace().nth(1).context("a number")?.parse()?;
    Ok(kib * 1024)
}
