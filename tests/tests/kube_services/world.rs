//! The cluster that all checks share: who is there, and how they are asked.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::kube::{Cluster, culvert, manifests};
use mesh_tests::poll;
use serde_json::Value;

/// In the mesh.
pub const SHOP: &str = "shop";
/// Images are started, certificates signed, captures proven, and written to the API server.
pub const PATIENCE: Duration = Duration::from_secs(120);

pub struct World {
    pub cluster: Cluster,
}

impl World {
    pub fn start() -> Result<Self> {
        let cluster = Cluster::start(2)?;
        match culvert::deploy(&cluster).and_then(|()| populate(&cluster)) {
            Ok(()) => Ok(Self { cluster }),
            Err(error) => {
                culvert::say_logs(&cluster);
                Err(cluster.with_logs(error))
            }
        }
    }

    pub fn with_logs(&self, error: anyhow::Error) -> anyhow::Error {
        culvert::say_logs(&self.cluster);
        self.cluster.with_logs(error)
    }

    pub fn kubectl(&self) -> &mesh_tests::kube::Kubectl {
        self.cluster.kubectl()
    }

    /// Runs a script in a Pod, and answers what it printed.
    pub fn sh(&self, pod: &str, script: &str) -> Result<String> {
        let output = self.kubectl().exec(SHOP, pod, &["sh", "-c", script])?;
        output.ok(&format!("{script} in {pod}"))
    }

    /// What a Pod is answered at each URL, asked so many times; "refused" where it gets no answer.
    pub fn ask(&self, pod: &str, urls: &[String], times: u32) -> Result<BTreeMap<String, Vec<String>>> {
        let list = urls.join("' '");
        let script = format!(
            "for u in '{list}'; do n=0; while [ $n -lt {times} ]; do n=$((n+1)); echo \"$u $(mesh-test-app get \"$u\" 2>&1 || echo refused)\"; done; done"
        );
        let mut answers: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for line in self.sh(pod, &script)?.lines() {
            // What a failed one says takes a line of its own.
            let Some((url, answer)) = line.split_once(' ').filter(|(url, _)| urls.iter().any(|asked| asked == url)) else {
                continue;
            };
            let server = answer.strip_prefix("server=").and_then(|rest| rest.split(' ').next());
            answers
                .entry(url.to_owned())
                .or_default()
                .push(server.unwrap_or("refused").to_owned());
        }
        for url in urls {
            let count = answers.get(url).map_or(0, Vec::len);
            ensure!(count == times as usize, "{count} answers of {times} from {url}: {answers:?}");
        }
        Ok(answers)
    }

    /// As [`World::ask`], of one URL.
    pub fn ask_one(&self, pod: &str, url: &str, times: u32) -> Result<Vec<String>> {
        let mut answers = self.ask(pod, &[url.to_owned()], times)?;
        answers.remove(url).context("its answers")
    }

    /// The access-log lines of connections from a workload.
    pub fn lines_from(&self, source: &str) -> Result<Vec<Value>> {
        culvert::access_log(&self.cluster, |line| line["source_workload"] == source)
    }

    /// Waits for an access-log line.
    pub fn until_logged(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        poll::until(what, PATIENCE, || {
            Ok(culvert::access_log(&self.cluster, &wanted)?.into_iter().next())
        })
    }

    /// Of a Service: its addresses, the IPv4 one first.
    pub fn addresses(&self, service: &str) -> Result<(String, String)> {
        let service = self.kubectl().get(&["-n", SHOP, "service", service])?;
        let address = |n: usize| service["spec"]["clusterIPs"][n].as_str().map(str::to_owned);
        Ok((address(0).context("an address")?, address(1).unwrap_or_default()))
    }

    pub fn until_proven(&self, pods: &[&str]) -> Result<()> {
        culvert::until_proven(&self.cluster, SHOP, pods)
    }

    /// The value of a metric of a node's agent, of the first series that has all of these words in it.
    pub fn metric(&self, node: usize, name: &str, words: &[&str]) -> Result<Option<f64>> {
        let text = culvert::metrics(&self.cluster, node)?;
        let line = text.lines().find(|line| {
            let rest = line.strip_prefix(name);
            rest.is_some_and(|rest| rest.starts_with(['{', ' '])) && words.iter().all(|word| line.contains(word))
        });
        line.map(|line| Ok(line.rsplit(' ').next().unwrap_or_default().parse()?))
            .transpose()
    }
}

/// As [`manifests::pod`], of [`SHOP`].
pub fn pod(name: &str, node: u8, labels: &str, command: &str, spec: &str) -> String {
    manifests::pod(SHOP, name, node, labels, command, spec)
}

/// One whose container declares its HTTP port by the name "http".
fn server(name: &str, node: u8, app: &str, port: u16) -> String {
    let command = format!(
        r#"[mesh-test-app, serve, {name}, "{port}", "9000"]
      ports: [{{name: http, containerPort: {port}}}]"#
    );
    pod(name, node, &format!("app: {app}"), &command, "")
}

pub fn service(name: &str, spec: &str) -> String {
    format!("apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {SHOP}}}\nspec: {spec}\n---\n")
}

/// For a Service without a selector.
pub fn slice(service: &str, address: &str, port: u16) -> String {
    format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n\
         metadata: {{name: {service}-1, namespace: {SHOP}, labels: {{kubernetes.io/service-name: {service}}}}}\n\
         ports: [{{name: http, port: {port}}}]\nendpoints: [{{addresses: [\"{address}\"], conditions: {{ready: true}}}}]\n---\n"
    )
}

/// On port 80.
fn http(selector: &str, more: &str) -> String {
    format!("{{selector: {{app: {selector}}}, ports: [{{name: http, port: 80, targetPort: http}}]{more}}}")
}

const STATEFUL_SET: &str = r#"
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db, namespace: shop}
spec:
  serviceName: db
  replicas: 2
  podManagementPolicy: Parallel
  selector: {matchLabels: {app: db}}
  template:
    metadata: {labels: {app: db}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
        - name: app
          image: culvert.test/app:1
          command: [sh, -c, 'exec mesh-test-app serve "$HOSTNAME" 8080 9000']
          resources: {requests: {cpu: 1m, memory: 4Mi}, limits: {memory: 64Mi}}
---
"#;

/// On the node's own network: no member, though its namespace is in the mesh.
pub const HOST_PORT: u16 = 18_080;

fn populate(cluster: &Cluster) -> Result<()> {
    let kubectl = cluster.kubectl();
    let mut manifests = format!(
        "apiVersion: v1\nkind: Namespace\nmetadata: {{name: {SHOP}, labels: {{culvert.dev/mesh: enabled}}}}\n---\n{STATEFUL_SET}"
    );
    manifests += &pod("client", 1, "app: client", "[sleep, inf]", "");
    manifests += &pod("client-2", 2, "app: client", "[sleep, inf]", "");
    manifests += &server("web-a", 1, "web", 8080);
    manifests += &server("web-b", 2, "web", 8080);
    manifests += &server("named-a", 1, "named", 8181);
    manifests += &server("named-b", 2, "named", 8282);
    manifests += &server("far", 2, "far", 8080);
    let host = format!(r#"[mesh-test-app, serve, host, "{HOST_PORT}", "19000"]"#);
    manifests += &pod(
        "host",
        1,
        "app: host",
        &host,
        "  hostNetwork: true\n  dnsPolicy: ClusterFirstWithHostNet",
    );
    let web_ports = "ports: [{name: http, port: 80, targetPort: http, appProtocol: kubernetes.io/h2c}, \
                     {name: echo, port: 9000}, {name: datagrams, port: 9000, protocol: UDP}]";
    manifests += &service(
        "web",
        &format!("{{selector: {{app: web}}, ipFamilyPolicy: RequireDualStack, {web_ports}}}"),
    );
    manifests += &service("named", &http("named", ""));
    manifests += &service("headless", &http("web", ", clusterIP: None"));
    manifests += &service(
        "db",
        "{selector: {app: db}, clusterIP: None, ports: [{name: http, port: 8080}]}",
    );
    let sticky = ", sessionAffinity: ClientIP, sessionAffinityConfig: {clientIP: {timeoutSeconds: 600}}";
    manifests += &service("sticky", &http("web", sticky));
    manifests += &service("local", &http("web", ", internalTrafficPolicy: Local"));
    manifests += &service("far-local", &http("far", ", internalTrafficPolicy: Local"));
    manifests += &service("near-first", &http("web", ", trafficDistribution: PreferClose"));
    manifests += &service(
        "elsewhere",
        &format!("{{type: ExternalName, externalName: web.{SHOP}.svc.cluster.local}}"),
    );
    for by_hand in ["by-hand", "by-hand-outside"] {
        manifests += &service(by_hand, "{ports: [{name: http, port: 80}]}");
    }
    manifests += &service("headless-by-hand", "{clusterIP: None, ports: [{name: http, port: 8080}]}");
    kubectl.apply(&manifests)?;
    let pods = [
        "client", "client-2", "web-a", "web-b", "named-a", "named-b", "far", "db-0", "db-1",
    ];
    let named: Vec<String> = pods.iter().chain(&["host"]).map(|pod| format!("pod/{pod}")).collect();
    poll::until_true("the StatefulSet's Pods are made", PATIENCE, || {
        Ok(kubectl.output(&["-n", SHOP, "get", "pod", "db-0", "db-1"])?.status.success())
    })?;
    kubectl.wait_for(SHOP, "Ready", &named.iter().map(String::as_str).collect::<Vec<_>>())?;
    culvert::until_proven(cluster, SHOP, &pods)?;
    let outside = cluster.node(1).address().to_string();
    let slices = slice("by-hand", &cluster.pod_address(SHOP, "web-b")?, 8080)
        + &slice("by-hand-outside", &outside, HOST_PORT)
        + &slice("headless-by-hand", &cluster.pod_address(SHOP, "web-a")?, 8080);
    kubectl.apply(&slices).map(drop)
}
