//! The plugin's commands (CNI specification 1.1): what is asked of whom, and what the runtime is told. Pure, but for the seam
//! [`Node`].

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::agent::Patience;
use crate::protocol::{Answer, Command, NamespaceList, Request, list_path, socket_path};

/// From 0.3.0 on, results have the form that is handed on here; many networks are still configured with 0.3.1, which has no CHECK.
pub const SUPPORTED_VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
const DEFAULT_RUN_DIR: &str = "/run/culvert";

/// Error codes of the specification, section 5; from 100 on they are the plugin's own.
const INCOMPATIBLE_VERSION: u32 = 1;
const INVALID_ENVIRONMENT: u32 = 4;
const UNDECODABLE: u32 = 6;
const INVALID_CONFIGURATION: u32 = 7;
const TRY_AGAIN: u32 = 11;
const NOT_ENROLLED: u32 = 100;

/// A Pod of the mesh: an agent that restarts is waited for; then longer than an enrolment may take at the agent, which says why.
const OF_THE_MESH: Patience = Patience {
    reach: Duration::from_secs(10),
    answer: Duration::from_secs(45),
};
/// Any other: the agent may know better, but is not waited for.
const OF_OTHERS: Patience = Patience {
    reach: Duration::ZERO,
    answer: Duration::from_secs(2),
};
/// A release is asked for, and never waited for long: what is left the agent's list removes. Longer than an agent waits for another one
/// that drains.
pub const AT_THE_END: Patience = Patience {
    reach: Duration::ZERO,
    answer: Duration::from_secs(8),
};

/// What the plugin asks of its node.
pub trait Node {
    /// # Errors
    /// It is there and cannot be read.
    fn list(&self, path: &std::path::Path) -> std::io::Result<Option<NamespaceList>>;
    /// # Errors
    /// No agent answers.
    fn ask(&self, socket: &std::path::Path, request: &Request, patience: Patience) -> std::io::Result<Answer>;
}

/// What the runtime is told.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// For standard output.
    pub result: Option<Value>,
    pub failed: bool,
    /// For standard error, which runtimes keep in their logs.
    pub remark: Option<String>,
}

#[derive(Debug, PartialEq, Eq)]
struct Failure {
    code: u32,
    message: String,
}

impl Failure {
    fn new(code: u32, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Configuration {
    cni_version: String,
    #[serde(default)]
    run_dir: Option<PathBuf>,
    #[serde(default)]
    namespace_list: Option<PathBuf>,
    #[serde(default)]
    prev_result: Option<Value>,
}

/// What `CNI_ARGS` says of the Pod.
#[derive(Debug, PartialEq, Eq)]
struct Pod {
    uid: String,
    namespace: String,
    name: String,
}

/// Where a Pod's namespace stands, by the list that the agent has left.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Standing {
    InMesh {
        best_effort: bool,
    },
    Outside,
    /// Nobody knows: an agent never ran here, or its list is damaged.
    Unknown(String),
}

/// Runs the command that the environment names, on the configuration from standard input.
#[must_use]
pub fn run(environment: &BTreeMap<String, String>, input: &[u8], node: &dyn Node) -> Outcome {
    let command = environment.get("CNI_COMMAND").map(String::as_str).unwrap_or_default();
    if command == "VERSION" {
        let asked: Option<Value> = serde_json::from_slice(input).ok();
        let version = asked
            .as_ref()
            .and_then(|asked| asked["cniVersion"].as_str())
            .unwrap_or("1.1.0");
        return Outcome {
            result: Some(json!({"cniVersion": version, "supportedVersions": SUPPORTED_VERSIONS})),
            ..Outcome::default()
        };
    }
    let configuration = match configuration(input) {
        Ok(configuration) => configuration,
        // A DEL that fails would be tried for ever.
        Err(failure) if command == "DEL" => {
            return Outcome {
                remark: Some(failure.message),
                ..Outcome::default()
            };
        }
        Err(failure) => return failed("1.0.0", failure),
    };
    let done = match command {
        "ADD" => add(environment, &configuration, node),
        "CHECK" => check(environment, &configuration, node),
        "DEL" => Ok(del(environment, &configuration, node)),
        // Nothing is kept beside what DEL removes; and a runtime that took our word for the whole network would start no Pod at all.
        "GC" | "STATUS" => Ok(Outcome::default()),
        other => Err(Failure::new(
            INVALID_ENVIRONMENT,
            format!("CNI_COMMAND: {other:?} is none of ADD, CHECK, DEL, GC, STATUS, VERSION"),
        )),
    };
    done.unwrap_or_else(|failure| failed(&configuration.cni_version, failure))
}

fn failed(version: &str, failure: Failure) -> Outcome {
    Outcome {
        result: Some(json!({"cniVersion": version, "code": failure.code, "msg": failure.message})),
        failed: true,
        remark: None,
    }
}

fn configuration(input: &[u8]) -> Result<Configuration, Failure> {
    let configuration: Configuration = serde_json::from_slice(input)
        .map_err(|error| Failure::new(UNDECODABLE, format!("the configuration on standard input: {error}")))?;
    if !SUPPORTED_VERSIONS.contains(&configuration.cni_version.as_str()) {
        return Err(Failure::new(
            INCOMPATIBLE_VERSION,
            format!(
                "cniVersion: {:?} is none of {}",
                configuration.cni_version,
                SUPPORTED_VERSIONS.join(", ")
            ),
        ));
    }
    Ok(configuration)
}

impl Configuration {
    fn run_dir(&self) -> PathBuf {
        self.run_dir.clone().unwrap_or_else(|| DEFAULT_RUN_DIR.into())
    }

    fn standing(&self, namespace: &str, node: &dyn Node) -> Standing {
        let path = self.namespace_list.clone().unwrap_or_else(|| list_path(&self.run_dir()));
        match node.list(&path) {
            Ok(Some(list)) => match list.namespaces.get(namespace) {
                Some(best_effort) => Standing::InMesh {
                    best_effort: *best_effort,
                },
                None => Standing::Outside,
            },
            Ok(None) => Standing::Unknown(format!("no agent has left a list at {}", path.display())),
            Err(error) => Standing::Unknown(format!("the list {}: {error}", path.display())),
        }
    }

    /// What the plugins before have made, handed on.
    fn handed_on(&self) -> Result<Value, Failure> {
        let mut result = self.prev_result.clone().ok_or_else(|| {
            Failure::new(
                INVALID_CONFIGURATION,
                "prevResult is missing: mesh-cni has to stand behind a plugin that makes the Pod's network, in a list of plugins",
            )
        })?;
        match result.as_object_mut() {
            Some(result) => {
                result.insert("cniVersion".to_owned(), self.cni_version.clone().into());
            }
            None => return Err(Failure::new(UNDECODABLE, "prevResult is no object")),
        }
        Ok(result)
    }

    fn addresses(&self) -> Result<Vec<IpAddr>, Failure> {
        let ips = self.prev_result.as_ref().and_then(|result| result["ips"].as_array());
        let parse = |ip: &Value| {
            let text = ip["address"].as_str().unwrap_or_default();
            let address = text.split('/').next().unwrap_or_default();
            address
                .parse()
                .map_err(|_| Failure::new(UNDECODABLE, format!("prevResult.ips: {text:?} is no address")))
        };
        ips.into_iter().flatten().map(parse).collect()
    }
}

fn pod(environment: &BTreeMap<String, String>) -> Option<Pod> {
    let arguments: BTreeMap<&str, &str> = environment
        .get("CNI_ARGS")
        .into_iter()
        .flat_map(|arguments| arguments.split(';'))
        .filter_map(|pair| pair.split_once('='))
        .collect();
    let of = |key| arguments.get(key).filter(|value| !value.is_empty()).map(ToString::to_string);
    Some(Pod {
        uid: of("K8S_POD_UID")?,
        namespace: of("K8S_POD_NAMESPACE")?,
        name: of("K8S_POD_NAME")?,
    })
}

fn request(command: Command, environment: &BTreeMap<String, String>, pod: &Pod, addresses: Vec<IpAddr>) -> Request {
    Request {
        command,
        uid: pod.uid.clone(),
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        netns: environment.get("CNI_NETNS").cloned().unwrap_or_default(),
        addresses,
    }
}

fn add(environment: &BTreeMap<String, String>, configuration: &Configuration, node: &dyn Node) -> Result<Outcome, Failure> {
    let result = configuration.handed_on()?;
    let passed = |remark: Option<String>| Outcome {
        result: Some(result.clone()),
        failed: false,
        remark,
    };
    let Some(pod) = pod(environment) else {
        return Ok(passed(Some("CNI_ARGS names no Kubernetes Pod: left alone".to_owned())));
    };
    if environment.get("CNI_NETNS").is_none_or(String::is_empty) {
        return Err(Failure::new(INVALID_ENVIRONMENT, "CNI_NETNS: is missing"));
    }
    let standing = configuration.standing(&pod.namespace, node);
    let request = request(Command::Add, environment, &pod, configuration.addresses()?);
    let answer = node.ask(&socket_path(&configuration.run_dir()), &request, patience(&standing));
    verdict(&pod, &standing, answer).map(passed)
}

fn patience(standing: &Standing) -> Patience {
    match standing {
        Standing::InMesh { .. } => OF_THE_MESH,
        Standing::Outside | Standing::Unknown(_) => OF_OTHERS,
    }
}

/// Whether the Pod may start: with a remark, or not, with the reason.
fn verdict(pod: &Pod, standing: &Standing, answer: std::io::Result<Answer>) -> Result<Option<String>, Failure> {
    let (code, why) = match answer {
        Ok(Answer::Done) => return Ok(None),
        Ok(Answer::NotAMember { why }) if why.is_empty() => return Ok(None),
        Ok(Answer::NotAMember { why }) => return Ok(Some(format!("not in the mesh: {why}"))),
        Ok(Answer::Failed { why }) => (NOT_ENROLLED, why),
        Err(error) => (TRY_AGAIN, format!("the mesh's agent on this node does not answer ({error})")),
    };
    match standing {
        Standing::InMesh { best_effort: false } => Err(Failure::new(
            code,
            format!(
                "Pod {}/{} is to be in the mesh and cannot be enrolled: {why}. (Its namespace's label culvert.dev/enrolment=best-effort \
                 would let it start all the same.)",
                pod.namespace, pod.name
            ),
        )),
        Standing::InMesh { best_effort: true } => Ok(Some(format!("started outside of the mesh, as its namespace asks: {why}"))),
        Standing::Outside => Ok(Some(format!("namespace {} is not in the mesh: {why}", pod.namespace))),
        Standing::Unknown(unknown) => Ok(Some(format!(
            "whether it is to be in the mesh is not known: {unknown}; {why}"
        ))),
    }
}

fn check(environment: &BTreeMap<String, String>, configuration: &Configuration, node: &dyn Node) -> Result<Outcome, Failure> {
    let Some(pod) = pod(environment) else {
        return Ok(Outcome::default());
    };
    let standing = configuration.standing(&pod.namespace, node);
    let request = request(Command::Check, environment, &pod, configuration.addresses()?);
    let answer = node.ask(&socket_path(&configuration.run_dir()), &request, OF_OTHERS);
    let remark = verdict(&pod, &standing, answer)?;
    Ok(Outcome {
        remark,
        ..Outcome::default()
    })
}

fn del(environment: &BTreeMap<String, String>, configuration: &Configuration, node: &dyn Node) -> Outcome {
    let Some(pod) = pod(environment) else {
        return Outcome::default();
    };
    let request = request(Command::Del, environment, &pod, Vec::new());
    let remark = match node.ask(&socket_path(&configuration.run_dir()), &request, AT_THE_END) {
        Ok(Answer::Done | Answer::NotAMember { .. }) => None,
        Ok(Answer::Failed { why }) => Some(why),
        Err(error) => Some(format!("the agent does not answer, and releases it by its list: {error}")),
    };
    Outcome {
        remark,
        ..Outcome::default()
    }
}

#[cfg(test)]
mod tests;
