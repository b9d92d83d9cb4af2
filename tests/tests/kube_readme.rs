//! The README's quick start, word for word and without the testbed's means: on a cluster that is given
//! (`cargo xtask test kube --cluster kind`), or on the testbed's own.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test: a panic is its failure, and standard output its report"
)]

use std::process::ExitCode;

use anyhow::{Context as _, Result, bail, ensure};
use mesh_tests::binaries::Build;
use mesh_tests::kube::given::Given;
use mesh_tests::kube::shop::{MESH, PATIENCE, SHOP};
use mesh_tests::kube::{Cluster, Kubectl, culvert};
use mesh_tests::readme::run_block;
use mesh_tests::{poll, suite};
use serde_json::{Value, json};

/// As `cargo xtask images` names and fills it.
const APP_IMAGE: &str = concat!("mesh-test-app:", env!("CARGO_PKG_VERSION"));
const APP: &str = "/mesh-test-app";

enum Bed {
    Given(Given),
    Own(Box<Cluster>),
}

impl Bed {
    fn set_up() -> Result<Self> {
        let bed = if let Some(given) = Given::find()? {
            Self::Given(given)
        } else {
            let cluster = Cluster::start(2)?;
            culvert::prepare(&cluster)?;
            cluster.load_archive(&Build::This.image("mesh-test-app")?)?;
            Self::Own(Box::new(cluster))
        };
        bed.deploy().map_err(|error| explain(&bed, error))?;
        Ok(bed)
    }

    fn kubectl(&self) -> &Kubectl {
        match self {
            Self::Given(given) => given.kubectl(),
            Self::Own(cluster) => cluster.kubectl(),
        }
    }

    fn readme(&self, with: &str) -> Result<String> {
        match self {
            Self::Given(given) => run_block(given.kubectl(), given.folder(), with),
            Self::Own(cluster) => run_block(cluster.kubectl(), &culvert::folder(cluster), with),
        }
    }

    /// A client, and a server on another node, before the mesh is there.
    fn deploy(&self) -> Result<()> {
        let [one, other] = two_workers(&self.kubectl().get(&["nodes"])?)?;
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SHOP}});
        let service = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "server", "namespace": SHOP},
            "spec": {"selector": {"app": "server"}, "ports": [{"port": 80, "targetPort": 8080}]},
        });
        let mut all = vec![namespace, service];
        for (name, node) in [("client", one), ("server", other)] {
            all.push(json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": SHOP}}));
            all.push(pod(name, &node));
        }
        let all: Vec<String> = all.iter().map(Value::to_string).collect();
        self.kubectl().apply(&all.join("\n---\n"))?;
        self.kubectl().wait_for(SHOP, "Ready", &["pod/client", "pod/server"])
    }

    fn get(&self) -> Result<String> {
        let url = format!("http://server.{SHOP}/");
        self.kubectl().exec(SHOP, "client", &[APP, "get", &url])?.ok(&url)
    }

    fn until_answered(&self, what: &str) -> Result<()> {
        poll::until_true(what, PATIENCE, || Ok(self.get()?.starts_with("server=server ")))
    }

    fn capture(&self, pod: &str) -> Result<Value> {
        let pod = self.kubectl().get(&["-n", SHOP, "pod", pod])?;
        Ok(pod["metadata"]["annotations"]["culvert.dev/capture"].clone())
    }
}

fn explain(bed: &Bed, error: anyhow::Error) -> anyhow::Error {
    for arguments in [
        &["get", "pods", "-A", "-o", "wide"][..],
        &["-n", SHOP, "describe", "pods"],
        &[
            "-n",
            MESH,
            "logs",
            "daemonset/mesh-agent",
            "--all-pods=true",
            "--all-containers",
            "--prefix",
            "--tail=25",
        ],
        &[
            "-n",
            MESH,
            "logs",
            "deployment/mesh-control",
            "--all-pods=true",
            "--prefix",
            "--tail=25",
        ],
    ] {
        let said = bed.kubectl().run(arguments);
        suite::say(&said.unwrap_or_else(|error| format!("none: {error:#}")));
    }
    error
}

/// Names of two nodes on which any Pod may be.
fn two_workers(nodes: &Value) -> Result<[String; 2]> {
    let nodes = nodes["items"].as_array().context("a list of nodes")?;
    let workers = nodes
        .iter()
        .filter(|node| node["spec"]["taints"].as_array().is_none_or(Vec::is_empty));
    let mut names = workers.filter_map(|node| node["metadata"]["name"].as_str().map(str::to_owned));
    match (names.next(), names.next()) {
        (Some(one), Some(other)) => Ok([one, other]),
        _ => bail!("two nodes without taints are needed, of {}", nodes.len()),
    }
}

fn pod(name: &str, node: &str) -> Value {
    let command = [APP, "serve", name, "8080", "9000"];
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": SHOP, "labels": {"app": name}},
        "spec": {
            "serviceAccountName": name, "nodeName": node, "terminationGracePeriodSeconds": 1,
            "containers": [{"name": "app", "image": APP_IMAGE, "command": command}],
        },
    })
}

fn main() -> ExitCode {
    suite::run(
        "kube_readme",
        Bed::set_up,
        explain,
        &[
            ("install", install),
            ("label", label),
            ("see_mutual_tls", see),
            ("deny", deny),
            ("remove", remove),
        ],
    )
}

fn install(bed: &mut Bed) -> Result<()> {
    let said = bed.readme("rollout status daemonset/mesh-agent")?;
    ensure!(said.contains("successfully rolled out"), "{said}");
    ensure!(bed.capture("client")?.is_null(), "a Pod without the label is in the mesh");
    bed.until_answered("the server answers as before")
}

fn label(bed: &mut Bed) -> Result<()> {
    bed.readme("culvert.dev/mesh=enabled")?;
    for pod in ["client", "server"] {
        ensure!(bed.capture(pod)? == "proven", "{pod} was waited for and is not proven");
    }
    bed.until_answered("the server answers through the mesh")
}

fn see(bed: &mut Bed) -> Result<()> {
    let principals = [format!("ns/{SHOP}/sa/client"), format!("ns/{SHOP}/sa/server")];
    // `grep` fails until there is such a line.
    poll::until_true("who spoke with whom is seen", PATIENCE, || {
        let said = bed.readme("mutual_tls").unwrap_or_default();
        Ok(said
            .lines()
            .any(|line| principals.iter().all(|principal| line.contains(principal))))
    })
}

fn deny(bed: &mut Bed) -> Result<()> {
    bed.readme("kind: AuthorizationPolicy")?;
    let said = bed.readme("kubectl apply -f deny.yaml")?;
    ensure!(said.contains("NODES"), "{said}");
    poll::until_true("the client is denied", PATIENCE, || Ok(bed.get().is_err()))?;
    bed.readme("kubectl delete -f deny.yaml")?;
    poll::until_true("the client is let in again", PATIENCE, || Ok(bed.get().is_ok()))
}

fn remove(bed: &mut Bed) -> Result<()> {
    bed.readme("culvert.dev/mesh-")?;
    for pod in ["client", "server"] {
        poll::until_true(&format!("{pod} is out of the mesh"), PATIENCE, || {
            Ok(bed.capture(pod)?.is_null())
        })?;
    }
    let said = bed.readme("mesh-uninstall")?;
    ensure!(said.contains("successfully rolled out"), "it was not waited for");
    let kinds = "clusterrole,clusterrolebinding,crd,namespace,validatingadmissionpolicy";
    let left = bed.kubectl().run(&["get", kinds, "-o", "name"])?;
    ensure!(!left.contains("culvert"), "left in the cluster:\n{left}");
    bed.until_answered("the server answers without the mesh")
}
