//! `cargo xtask bench control`: mesh-control, as a process of its own, on a real API server with a large cluster in it.
//!
//! There are no controllers and no nodes: what is measured is mesh-control alone, though beside etcd and the API server on one machine.
//! A change counts as told when the state that has it was compiled and published to the streams.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::report::{Format, Samples, progress};
use crate::exposition::{self, Family};
use crate::http;
use crate::kube::{ApiServer, ControlProgram};
use crate::process::tail;

const NAMESPACES: usize = 10;
const NODES: usize = 100;
/// Requests at once that make the cluster.
const AT_ONCE: usize = 32;
/// Between two changes: after quiet.
const QUIET: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(5);
const DEADLINE: Duration = Duration::from_secs(600);

type Exposed = BTreeMap<String, Family>;

/// How large the cluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    pub pods: usize,
    /// Of each kind, in a round. At most half as many as there are policies.
    pub changes: usize,
}

impl Size {
    fn services(self) -> usize {
        self.pods / 10
    }

    fn policies(self) -> usize {
        self.pods / 20
    }
}

/// Makes the cluster, runs so many rounds, and prints the results.
///
/// # Errors
/// What is missing on this machine, or the first measurement that failed.
pub fn run(rounds: usize, size: Size, format: Format) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let mut samples = Samples::new("mesh-control");
    samples.add("load_average", "processes", load_average()?);
    let server = ApiServer::start()?;
    let bench = Bench::set_up(&server, &runtime, size)?;
    bench.make(&mut samples)?;
    for round in 1..=rounds {
        progress(&format!("round {round} of {rounds}"));
        bench.round(round, &mut samples)?;
    }
    samples.add("load_average", "processes", load_average()?);
    let (pods, services, policies) = (size.pods, size.services(), size.policies());
    samples.print(
        format,
        &format!(
            "{pods} Pods, {services} Services, {policies} policies, {NAMESPACES} namespaces, {NODES} nodes; median [least–most]"
        ),
    )
}

struct Bench<'a> {
    server: &'a ApiServer,
    runtime: &'a Runtime,
    client: Client,
    size: Size,
}

/// A running mesh-control.
struct Control(ControlProgram);

impl<'a> Bench<'a> {
    fn set_up(server: &'a ApiServer, runtime: &'a Runtime, size: Size) -> Result<Self> {
        let kubectl = server.kubectl();
        for definition in mesh_api::custom_resource_definitions() {
            kubectl.apply(&serde_json::to_string(&definition)?)?;
        }
        kubectl.run(&["wait", "--for=condition=Established", "--timeout=60s", "crd", "--all"])?;
        let mut all = "apiVersion: v1\nkind: Namespace\nmetadata: {name: culvert-system}\n".to_owned();
        for n in 0..NAMESPACES {
            all += &format!(
                "---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: ns{n}, labels: {{culvert.dev/mesh: enabled}}}}\n---\n\
                 apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: web, namespace: ns{n}}}\n"
            );
        }
        for n in 0..NODES {
            all += &format!(
                "---\napiVersion: v1\nkind: Node\nmetadata: {{name: node-{n}}}\nspec: {{podCIDRs: [{}.0.0/16]}}\n",
                network(n)
            );
        }
        kubectl.apply(&all)?;
        Ok(Self {
            server,
            runtime,
            client: runtime.block_on(server.client())?,
            size,
        })
    }

    /// Makes the cluster while one mesh-control follows it.
    fn make(&self, samples: &mut Samples) -> Result<()> {
        let control = self.start("maker")?;
        control.until_ready()?;
        let before = control.metrics()?;
        progress(&format!("making {} Pods", self.size.pods));
        let began = Instant::now();
        let cpu = control.cpu()?;
        self.runtime.block_on(async {
            let places = Arc::new(Semaphore::new(AT_ONCE));
            let mut tasks = JoinSet::new();
            for n in 0..self.size.pods {
                let (client, places, size) = (self.client.clone(), Arc::clone(&places), self.size);
                tasks.spawn(async move {
                    let _place = places.acquire().await?;
                    make_one(&client, n, size).await
                });
            }
            while let Some(done) = tasks.join_next().await {
                done??;
            }
            anyhow::Ok(())
        })?;
        samples.add("making", "s", began.elapsed().as_secs_f64());
        control.until(|exposed| Ok(count(exposed, "mesh_control_objects", &[("kind", "Pod")])? >= self.size.pods as f64))?;
        let after = control.metrics()?;
        let of = |name: &str, labels: &[(&str, &str)]| anyhow::Ok(count(&after, name, labels)? - count(&before, name, labels)?);
        samples.add("making_compilations", "", of("mesh_control_snapshots_total", &[])?);
        samples.add(
            "making_lists_of_pods",
            "",
            of("mesh_control_lists_total", &[("kind", "Pod")])?,
        );
        samples.add("making_cpu", "s", control.cpu()? - cpu);
        samples.add("making_rss_peak", "MiB", control.memory("VmHWM:", "status")?);
        Ok(())
    }

    fn round(&self, round: usize, samples: &mut Samples) -> Result<()> {
        let control = self.start("replica")?;
        let began = Instant::now();
        control.until_ready()?;
        samples.add("ready", "s", began.elapsed().as_secs_f64());
        samples.add("ready_cpu", "s", control.cpu()?);
        let first = control.metrics()?;
        samples.add(
            "first_compilation",
            "s",
            count(&first, "mesh_control_compile_seconds_total", &[])?,
        );
        // What is freed again is by then.
        std::thread::sleep(QUIET);
        samples.add("rss", "MiB", control.memory("VmRSS:", "status")?);
        samples.add("pss", "MiB", control.memory("Pss:", "smaps_rollup")?);
        samples.add("rss_peak", "MiB", control.memory("VmHWM:", "status")?);
        // They were ready when they were made.
        let ready = round.is_multiple_of(2);
        for n in 0..self.size.changes {
            std::thread::sleep(QUIET);
            self.change("pod_change", &control, samples, || self.change_pod(n, ready))?;
            // With no quiet before it.
            self.change("pod_change_at_once", &control, samples, || {
                self.change_pod(n + self.size.changes, ready)
            })?;
            std::thread::sleep(QUIET);
            self.change("policy_change", &control, samples, || self.change_policy(n))?;
        }
        let last = control.metrics()?;
        let of = |name: &str| anyhow::Ok(count(&last, name, &[])? - count(&first, name, &[])?);
        let compilations = of("mesh_control_snapshots_total")?;
        samples.add("compilation", "s", of("mesh_control_compile_seconds_total")? / compilations);
        samples.add("compilations_per_change", "", compilations / (3 * self.size.changes) as f64);
        samples.add(
            "lists_of_pods",
            "",
            count(&last, "mesh_control_lists_total", &[("kind", "Pod")])?,
        );
        Ok(())
    }

    fn change(&self, measure: &str, control: &Control, samples: &mut Samples, make: impl FnOnce() -> Result<()>) -> Result<()> {
        const SNAPSHOTS: &str = "mesh_control_snapshots_total";
        let before = count(&control.metrics()?, SNAPSHOTS, &[])?;
        let cpu = control.cpu()?;
        let began = Instant::now();
        make()?;
        control.until(|exposed| Ok(count(exposed, SNAPSHOTS, &[])? > before))?;
        samples.add(measure, "s", began.elapsed().as_secs_f64());
        // In hundredths of a second, and with the questions of the measurement itself.
        samples.add(&format!("{measure}_cpu"), "s", control.cpu()? - cpu);
        Ok(())
    }

    fn change_pod(&self, n: usize, ready: bool) -> Result<()> {
        let status = json!({"status": {"conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}]}});
        let api = api(&self.client, "", "v1", "Pod", &namespace(n));
        self.runtime
            .block_on(api.patch_status(&format!("w{n}"), &PatchParams::default(), &Patch::Merge(status)))?;
        Ok(())
    }

    fn change_policy(&self, n: usize) -> Result<()> {
        let port: u16 = rand::random_range(1000..60_000);
        let patch = json!({"spec": {"rules": [{"to": [{"ports": [port]}]}]}});
        let kind = ApiResource::erase::<mesh_api::AuthorizationPolicy>(&());
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), &namespace(n), &kind);
        self.runtime
            .block_on(api.patch(&format!("p{n}"), &PatchParams::default(), &Patch::Merge(patch)))?;
        Ok(())
    }

    fn start(&self, name: &str) -> Result<Control> {
        let log = self.server.folder().join(format!("{name}.log"));
        ControlProgram::start(name, self.server.kubeconfig(), log).map(Control)
    }
}

impl Control {
    fn until_ready(&self) -> Result<()> {
        self.wait(|| Ok(http::request(self.0.admin, "/healthz/ready").is_ok_and(|response| response.status == 200)))
    }

    fn until(&self, is: impl Fn(&Exposed) -> Result<bool>) -> Result<()> {
        self.wait(|| is(&self.metrics()?))
    }

    fn wait(&self, is: impl Fn() -> Result<bool>) -> Result<()> {
        let began = Instant::now();
        while !is()? {
            ensure!(
                began.elapsed() < DEADLINE,
                "mesh-control took too long\n{}",
                tail(&self.0.log, 20)
            );
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    fn metrics(&self) -> Result<Exposed> {
        exposition::parse(&http::request(self.0.admin, "/metrics")?.body).map_err(anyhow::Error::msg)
    }

    /// Seconds so far, of all its threads.
    fn cpu(&self) -> Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.process.id()))?;
        // After the name, which may hold anything, in parentheses.
        let (_, fields) = stat.rsplit_once(')').context("/proc/PID/stat")?;
        let fields: Vec<&str> = fields.split_whitespace().collect();
        let ticks: f64 = fields
            .get(11..13)
            .context("utime")?
            .iter()
            .filter_map(|text| text.parse::<f64>().ok())
            .sum();
        Ok(ticks / 100.0)
    }

    /// MiB of a line in a file of /proc/PID.
    fn memory(&self, line: &str, file: &str) -> Result<f64> {
        let text = std::fs::read_to_string(format!("/proc/{}/{file}", self.0.process.id()))?;
        let found = text
            .lines()
            .find_map(|text| text.strip_prefix(line))
            .context("no such line")?;
        let kib: f64 = found.split_whitespace().next().context("a number")?.parse()?;
        Ok(kib / 1024.0)
    }
}

fn count(exposed: &Exposed, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
    let has =
        |label: &(&str, &str), sample: &exposition::Sample| sample.labels.get(label.0).is_some_and(|value| value == label.1);
    let samples = exposed.get(name).into_iter().flat_map(|family| &family.samples);
    let found = samples
        .into_iter()
        .find(|sample| labels.iter().all(|label| has(label, sample)));
    Ok(found.with_context(|| format!("{name} is not told"))?.value)
}

fn load_average() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/loadavg")?;
    Ok(text.split_whitespace().next().context("a number")?.parse()?)
}

fn namespace(n: usize) -> String {
    format!("ns{}", n % NAMESPACES)
}

/// Of a node's Pods, apart from the range of Services.
fn network(node: usize) -> String {
    format!("10.{}", 100 + node)
}

fn api(client: &Client, group: &str, version: &str, kind: &str, namespace: &str) -> Api<DynamicObject> {
    let kind = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind));
    Api::namespaced_with(client.clone(), namespace, &kind)
}

/// A Pod, and with the first of them a Service with its slice, and a policy.
async fn make_one(client: &Client, n: usize, size: Size) -> Result<()> {
    let namespace = namespace(n);
    let ip = format!("{}.{}.{}", network(n % NODES), n / NODES / 250, n / NODES % 250 + 1);
    let app = format!("a{}", n % size.services().max(1));
    let create = async |api: Api<DynamicObject>, object: Value| {
        let object = serde_json::from_value(object)?;
        api.create(&PostParams::default(), &object).await?;
        anyhow::Ok(())
    };
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": format!("w{n}"), "namespace": namespace, "labels": {"app": app, "tier": "web"}},
        "spec": {
            "nodeName": format!("node-{}", n % NODES), "serviceAccountName": "web",
            "containers": [{"name": "main", "image": "nowhere.test/a:1"}],
        },
    });
    create(api(client, "", "v1", "Pod", &namespace), pod).await?;
    let status = json!({"status": {
        "phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "conditions": [{"type": "Ready", "status": "True"}],
    }});
    api(client, "", "v1", "Pod", &namespace)
        .patch_status(&format!("w{n}"), &PatchParams::default(), &Patch::Merge(status))
        .await?;
    if n < size.services() {
        let service = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": format!("s{n}"), "namespace": namespace},
            "spec": {"selector": {"app": app}, "ports": [{"name": "http", "port": 80, "targetPort": 8080}]},
        });
        create(api(client, "", "v1", "Service", &namespace), service).await?;
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {
                "name": format!("s{n}-1"), "namespace": namespace, "labels": {"kubernetes.io/service-name": format!("s{n}")},
            },
            "ports": [{"name": "http", "port": 8080}],
            "endpoints": [{
                "addresses": [ip], "conditions": {"ready": true},
                "targetRef": {"kind": "Pod", "name": format!("w{n}"), "namespace": namespace},
            }],
        });
        create(api(client, "discovery.k8s.io", "v1", "EndpointSlice", &namespace), slice).await?;
    }
    if n < size.policies() {
        let policy = json!({
            "apiVersion": "culvert.dev/v1alpha1", "kind": "AuthorizationPolicy",
            "metadata": {"name": format!("p{n}"), "namespace": namespace},
            "spec": {"selector": {"matchLabels": {"app": app}}, "action": "Deny", "rules": [{"to": [{"ports": [81]}]}]},
        });
        let kind = ApiResource::erase::<mesh_api::AuthorizationPolicy>(&());
        create(Api::namespaced_with(client.clone(), &namespace, &kind), policy).await?;
    }
    Ok(())
}
