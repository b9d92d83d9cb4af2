//! A real Prometheus in the world between the nodes: it scrapes both agents and mesh-control by the jobs of
//! `deploy/prometheus/scrape.yaml` and evaluates the rules.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use serde_norway::Value as Yaml;

use crate::app;
use crate::mesh::Mesh;
use crate::netns::Netns;
use crate::poll;
use crate::process::Process;
use crate::topology::NodeName;

/// The folder of `prometheus` and `promtool`, if they are not in PATH. `cargo xtask test net` sees to it.
pub const FOLDER_VARIABLE: &str = "CULVERT_PROMETHEUS_DIR";
const PORT: u16 = 9090;
const SCRAPE: &str = "deploy/prometheus/scrape.yaml";
/// What Kubernetes would tell of mesh-control's Pods: one that serves, at both of its ports, and one that was evicted.
const PODS: &str = r#"
- targets: ["127.0.0.1:15014"]
  labels:
    __meta_kubernetes_pod_label_app_kubernetes_io_name: mesh-control
    __meta_kubernetes_pod_container_port_name: metrics
    __meta_kubernetes_pod_phase: Running
- targets: ["127.0.0.1:15012"]
  labels:
    __meta_kubernetes_pod_label_app_kubernetes_io_name: mesh-control
    __meta_kubernetes_pod_container_port_name: grpc
    __meta_kubernetes_pod_phase: Running
- targets: ["127.0.0.1:15999"]
  labels:
    __meta_kubernetes_pod_label_app_kubernetes_io_name: mesh-control
    __meta_kubernetes_pod_container_port_name: metrics
    __meta_kubernetes_pod_phase: Failed
"#;

/// # Errors
/// It is neither in the folder nor in PATH.
pub fn program(name: &str) -> Result<PathBuf> {
    let own = std::env::var_os(FOLDER_VARIABLE).map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders = own.into_iter().chain(std::env::split_paths(&path));
    folders
        .find_map(|folder| Some(folder.join(name)).filter(|program| program.is_file()))
        .with_context(|| format!("`{name}` is missing (Debian's package prometheus)"))
}

/// Runs promtool; answers what it said, good or bad.
///
/// # Errors
/// It is missing.
pub fn promtool(arguments: &[&str], files: &[PathBuf]) -> Result<(bool, String)> {
    let output = Command::new(program("promtool")?)
        .args(arguments)
        .args(files)
        .stdin(Stdio::null())
        .output()
        .context("starting promtool")?;
    let said = [output.stdout, output.stderr].concat();
    Ok((output.status.success(), String::from_utf8_lossy(&said).into_owned()))
}

/// A series of an answer.
#[derive(Clone, Debug)]
pub struct Series {
    pub labels: BTreeMap<String, String>,
    pub value: f64,
}

#[derive(Debug)]
pub struct Prometheus {
    process: Process,
}

impl Prometheus {
    /// # Errors
    /// It does not become ready.
    pub fn start(mesh: &Mesh, rules: &Path) -> Result<Self> {
        let folder = mesh.topology.folder().join("prometheus");
        std::fs::create_dir_all(&folder)?;
        let config = folder.join("prometheus.yaml");
        std::fs::write(&config, configuration(&super::read(&super::checkout(SCRAPE))?, rules)?)?;
        let arguments = [
            format!("--config.file={}", config.display()),
            format!("--storage.tsdb.path={}", folder.join("data").display()),
            format!("--web.listen-address={}:{PORT}", Ipv4Addr::LOCALHOST),
            "--log.level=warn".to_owned(),
        ];
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let command = mesh.topology.world_place().command(&program("prometheus")?, &arguments)?;
        let mut process = Process::start("Prometheus", command, folder.join("prometheus.log"))?;
        poll::until_true("Prometheus is ready", poll::SOON, || {
            process.check_running()?;
            let page = app::page(mesh.topology.world(), Ipv4Addr::LOCALHOST.into(), PORT, "/-/ready")?;
            Ok(page.status == 200)
        })?;
        Ok(Self { process })
    }

    #[must_use]
    pub fn log(&self) -> &Path {
        self.process.log()
    }

    /// Asks its API.
    ///
    /// # Errors
    /// It says no, as an error of the expression: with its words.
    pub fn ask(&self, world: &Netns, path: &str) -> Result<Value> {
        let page = app::page(world, Ipv4Addr::LOCALHOST.into(), PORT, path)?;
        let mut answer: Value = serde_json::from_str(&page.body).with_context(|| page.body.clone())?;
        if answer["status"] != "success" {
            bail!("{}", answer["error"].as_str().unwrap_or(&page.body));
        }
        Ok(answer["data"].take())
    }

    /// # Errors
    /// As [`Prometheus::ask`].
    pub fn query(&self, world: &Netns, expression: &str) -> Result<Vec<Series>> {
        let data = self.ask(world, &format!("/api/v1/query?query={}", escaped(expression)))?;
        ensure!(data["resultType"] == "vector", "{expression} is no vector: {data}");
        let series = data["result"].as_array().context("a result")?.iter().map(|series| {
            let labels = series["metric"].as_object().context("labels")?;
            let value = series["value"][1].as_str().context("a value")?;
            Ok(Series {
                labels: labels
                    .iter()
                    .map(|(label, value)| (label.clone(), value.as_str().unwrap_or_default().to_owned()))
                    .collect(),
                value: value.parse()?,
            })
        });
        series.collect()
    }

    /// The values that a label of a metric has.
    ///
    /// # Errors
    /// As [`Prometheus::ask`].
    pub fn label_values(&self, world: &Netns, metric: &str, label: &str) -> Result<Vec<String>> {
        let data = self.ask(world, &format!("/api/v1/label/{label}/values?match[]={}", escaped(metric)))?;
        Ok(serde_json::from_value(data)?)
    }
}

/// The shipped jobs with what the testbed cannot have put in its place: Kubernetes's lists of nodes and of Pods. The second node goes
/// by its IPv6 address.
fn configuration(scrape: &str, rules: &Path) -> Result<String> {
    let mut config: Yaml = serde_norway::from_str(scrape).context(SCRAPE)?;
    let mut nodes = String::new();
    for node in NodeName::ALL {
        let (v4, v6) = node.addresses();
        let address = if node == NodeName::One {
            v4.to_string()
        } else {
            v6.to_string()
        };
        let name = node.as_str();
        writeln!(
            nodes,
            "- {{ targets: [{name}], labels: {{ __meta_kubernetes_node_name: {name}, \
             __meta_kubernetes_node_address_InternalIP: \"{address}\" }} }}"
        )?;
    }
    let jobs = config["scrape_configs"].as_sequence_mut().context("scrape_configs")?;
    for (name, targets) in [("mesh-agent", nodes.as_str()), ("mesh-control", PODS)] {
        let job = jobs
            .iter_mut()
            .find(|job| job["job_name"] == name)
            .and_then(Yaml::as_mapping_mut)
            .with_context(|| format!("the job {name}"))?;
        job.remove("kubernetes_sd_configs")
            .with_context(|| format!("the job {name} discovers by kubernetes_sd_configs"))?;
        job.insert("static_configs".into(), serde_norway::from_str(targets)?);
    }
    let global = "{ scrape_interval: 1s, evaluation_interval: 1s }";
    config["global"] = serde_norway::from_str(global)?;
    config["rule_files"] = Yaml::Sequence(vec![rules.to_str().context("a path")?.into()]);
    Ok(serde_norway::to_string(&config)?)
}

/// For a URL's query.
fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() {
            escaped.push(char::from(byte));
        } else {
            let _ = write!(escaped, "%{byte:02X}");
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_testbeds_configuration_is_the_shipped_one_with_its_nodes_and_pods() {
        let scrape = super::super::read(&super::super::checkout(SCRAPE)).unwrap();
        let config: Yaml = serde_norway::from_str(&configuration(&scrape, Path::new("/rules.yaml")).unwrap()).unwrap();
        let shipped: Yaml = serde_norway::from_str(&scrape).unwrap();
        let jobs = &config["scrape_configs"];
        for (job, targets) in [(0_usize, NodeName::ALL.len()), (1, 3)] {
            assert_eq!(
                jobs[job]["relabel_configs"],
                shipped["scrape_configs"][job]["relabel_configs"]
            );
            assert_eq!(jobs[job]["static_configs"].as_sequence().unwrap().len(), targets);
        }
        assert_eq!(jobs[0]["honor_labels"], true);
        assert_eq!(config["rule_files"][0], "/rules.yaml");
    }

    #[test]
    fn a_query_is_escaped() {
        assert_eq!(escaped("a{b=~\"ü\"}"), "a%7Bb%3D%7E%22%C3%BC%22%7D");
    }
}
