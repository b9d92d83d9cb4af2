//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use ipnet::IpNet;

use crate::kubernetes::reviews::ServiceAccount;
use crate::limits::{MAX_CERTIFICATE_LIFETIME, MIN_CERTIFICATE_LIFETIME};
use crate::roots::Step;

/// Culvert's control plane: compiles a cluster, or a folder of Kubernetes manifests, to what the node agents must know, serves it to
/// them, and signs their certificates.
///
/// On its first start it makes its root of trust in the state directory. A node's agent starts from a token file alone, which
/// `mesh-control node-token` writes. RUST_LOG sets what is logged (default `info`).
#[derive(Debug, Parser)]
#[command(
    name = "mesh-control",
    version,
    subcommand_negates_reqs = true,
    args_conflicts_with_subcommands = true
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub serve: ServeArgs,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Writes the token file that a node's agent starts from.
    ///
    /// It works whether or not mesh-control is running on the state directory; a running one accepts the token within seconds.
    /// The file holds a secret: bring it to its node by a safe way.
    NodeToken(NodeTokenArgs),
    /// Replaces the root of trust, in three steps, under a running mesh.
    ///
    /// `prepare` makes the next root, which every agent then trusts beside the present one; `activate` lets it sign; `retire` stops
    /// trusting every other, and cuts what still depends on one. Between `activate` and `retire`, wait until certificates were renewed
    /// (half of their lifetime), and give each node a new token. (In a cluster, with --kubernetes, the agents read the new root from
    /// the ConfigMap `culvert-roots` by themselves.)
    RotateRoot(RotateRootArgs),
    /// Waits until the DaemonSet `mesh-uninstall` has cleaned every node; fails, naming those that are not, when its time is over.
    ///
    /// By KUBECONFIG, or as the service account of the Pod that this is.
    AwaitUninstall(AwaitUninstallArgs),
}

#[derive(Clone, Debug, Args)]
pub struct AwaitUninstallArgs {
    /// The mesh's own namespace.
    #[arg(long, env = "CULVERT_NAMESPACE", value_name = "NAME", default_value = "culvert-system", value_parser = namespace)]
    pub namespace: String,
    /// How long to wait, in seconds.
    #[arg(long, env = "CULVERT_TIMEOUT_SECONDS", value_name = "SECONDS", default_value_t = 240, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub timeout_seconds: u64,
}

#[derive(Clone, Debug, Args)]
pub struct ServeArgs {
    /// Folder of Kubernetes manifests (*.yaml, *.yml, *.json; no sub-folders): Namespaces, Nodes, Pods, Services,
    /// ServiceAccounts and AuthorizationPolicies. Changes are followed without a restart.
    // An option for clap's sake: a subcommand goes without it.
    #[arg(
        long,
        env = "CULVERT_REGISTRY",
        value_name = "DIR",
        required_unless_present = "kubernetes",
        conflicts_with = "kubernetes"
    )]
    pub registry: Option<PathBuf>,
    /// Follow the cluster instead of a folder: by KUBECONFIG, or as the service account of the Pod that this is. Kubernetes 1.32 or
    /// newer.
    #[arg(long, env = "CULVERT_KUBERNETES")]
    pub kubernetes: bool,
    /// The mesh's own namespace in the cluster.
    #[arg(long, env = "CULVERT_NAMESPACE", value_name = "NAME", default_value = "culvert-system", value_parser = namespace)]
    pub namespace: String,
    /// Folder for the root of trust, node tokens and capture states; made with mode 0700 when it is missing. (With --kubernetes the
    /// API server has them.)
    #[arg(
        long,
        env = "CULVERT_STATE_DIR",
        value_name = "DIR",
        required_unless_present = "kubernetes",
        conflicts_with = "kubernetes"
    )]
    pub state_dir: Option<PathBuf>,
    /// Where agents connect (gRPC over TLS).
    #[arg(long, env = "CULVERT_LISTEN", value_name = "ADDR:PORT", default_value = "0.0.0.0:15012")]
    pub listen: SocketAddr,
    /// /metrics, /healthz/ready and /status over plain HTTP; loopback only.
    #[arg(long, env = "CULVERT_ADMIN", value_name = "ADDR:PORT", default_value = "127.0.0.1:15014")]
    pub admin: SocketAddr,
    /// /metrics and /healthz/ready alone, for those who are not on this machine: a scraper, the kubelet.
    #[arg(long, env = "CULVERT_METRICS", value_name = "ADDR:PORT")]
    pub metrics: Option<SocketAddr>,
    /// First part of every identity of this mesh.
    #[arg(long, env = "CULVERT_TRUST_DOMAIN", value_name = "NAME", default_value = "cluster.local", value_parser = trust_domain)]
    pub trust_domain: String,
    /// The cluster's name in workload ids and telemetry.
    #[arg(long, env = "CULVERT_CLUSTER", value_name = "NAME", default_value = "Kubernetes")]
    pub cluster: String,
    /// Longest lifetime of workload certificates, such as 30m, 24h or 7d.
    #[arg(long, env = "CULVERT_CERTIFICATE_LIFETIME", value_name = "TIME", default_value = "24h", value_parser = lifetime)]
    pub certificate_lifetime: Duration,
    /// A range that Pods get addresses from, beside the podCIDRs of Node manifests. May be given several times.
    #[arg(long, env = "CULVERT_POD_CIDR", value_name = "CIDR", value_delimiter = ',')]
    pub pod_cidr: Vec<IpNet>,
    /// Another name or address of this control plane for its serving certificate, beside those in node tokens. May be given
    /// several times.
    #[arg(long, env = "CULVERT_SERVER_NAME", value_name = "NAME", value_delimiter = ',')]
    pub server_name: Vec<String>,
    /// In a cluster: the service account of the agents. Nobody else's token is taken.
    #[arg(
        long,
        env = "CULVERT_AGENT_SERVICE_ACCOUNT",
        value_name = "NAMESPACE/NAME",
        default_value = "culvert-system/mesh-agent"
    )]
    pub agent_service_account: ServiceAccount,
}

#[derive(Clone, Debug, Args)]
pub struct NodeTokenArgs {
    /// The node's name, as in the Pods' spec.nodeName.
    pub node: String,
    /// The state directory of the control plane.
    #[arg(long, env = "CULVERT_STATE_DIR", value_name = "DIR")]
    pub state_dir: PathBuf,
    /// Where the node reaches the control plane; the serving certificate will name it.
    #[arg(long, env = "CULVERT_ADDRESS", value_name = "HOST:PORT")]
    pub address: String,
    /// The token file to write, with mode 0600; without it, NODE.token.json in the current directory.
    #[arg(long, env = "CULVERT_OUTPUT", value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Replace the node's token: the agent that uses the old one is cut off within seconds.
    #[arg(long)]
    pub rotate: bool,
}

#[derive(Clone, Debug, Args)]
pub struct RotateRootArgs {
    #[arg(value_enum)]
    pub step: Step,
    /// The state directory of the control plane.
    #[arg(
        long,
        env = "CULVERT_STATE_DIR",
        value_name = "DIR",
        required_unless_present = "kubernetes",
        conflicts_with = "kubernetes"
    )]
    pub state_dir: Option<PathBuf>,
    /// The root is in the cluster, in the Secret `culvert-root`; by KUBECONFIG, or as the service account of the Pod that this is.
    #[arg(long, env = "CULVERT_KUBERNETES")]
    pub kubernetes: bool,
    /// With --kubernetes: the mesh's own namespace.
    #[arg(long, env = "CULVERT_NAMESPACE", value_name = "NAME", default_value = "culvert-system", value_parser = namespace)]
    pub namespace: String,
    /// As the control plane has it; the next root names it.
    #[arg(long, env = "CULVERT_TRUST_DOMAIN", value_name = "NAME", default_value = "cluster.local", value_parser = trust_domain)]
    pub trust_domain: String,
}

fn trust_domain(text: &str) -> Result<String, String> {
    // SPIFFE ID, 2.1.
    let good = !text.is_empty()
        && text.len() <= 255
        && text
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-._".contains(&b));
    if good {
        Ok(text.to_owned())
    } else {
        Err("give lower-case letters, digits, '-', '_' and '.'".to_owned())
    }
}

fn namespace(text: &str) -> Result<String, String> {
    if crate::registry::is_name(text) {
        Ok(text.to_owned())
    } else {
        Err("give a namespace's name: lower-case letters, digits and '-'".to_owned())
    }
}

fn lifetime(text: &str) -> Result<Duration, String> {
    let (number, unit) = text.split_at(text.len() - text.chars().next_back().map_or(0, char::len_utf8));
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 24 * 3600,
        _ => return Err("give a number and s, m, h or d, such as 24h".to_owned()),
    };
    let number: u64 = number
        .parse()
        .map_err(|_| "give a number and s, m, h or d, such as 24h".to_owned())?;
    let lifetime = Duration::from_secs(number.saturating_mul(seconds));
    if (MIN_CERTIFICATE_LIFETIME..=MAX_CERTIFICATE_LIFETIME).contains(&lifetime) {
        Ok(lifetime)
    } else {
        Err("give from 60s to 90d".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lifetimes_are_read_within_bounds() {
        assert_eq!(lifetime("24h"), Ok(Duration::from_secs(86_400)));
        assert_eq!(lifetime("90d"), Ok(MAX_CERTIFICATE_LIFETIME));
        for bad in ["", "h", "24", "1s", "91d", "-1h", "1é", "99999999999999999999d"] {
            assert!(lifetime(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn both_forms_of_the_command_line_are_read() {
        let cli = Cli::try_parse_from([
            "mesh-control",
            "--registry",
            "r",
            "--state-dir",
            "s",
            "--pod-cidr",
            "10.0.0.0/8",
        ]);
        let serve = cli.expect("serve").serve;
        assert_eq!(serve.admin.port(), 15014);
        assert_eq!(serve.pod_cidr.len(), 1);
        assert_eq!(serve.certificate_lifetime, Duration::from_secs(24 * 3600));
        let cli = Cli::try_parse_from(["mesh-control", "node-token", "n", "--state-dir", "s", "--address", "h:1"]);
        assert!(matches!(cli.expect("token").command, Some(Command::NodeToken(_))));
        assert!(
            Cli::try_parse_from(["mesh-control", "--registry", "r"]).is_err(),
            "the state directory is needed"
        );
        let cli = Cli::try_parse_from(["mesh-control", "--kubernetes"]);
        let serve = cli.expect("serve").serve;
        assert!(serve.kubernetes && serve.registry.is_none());
        assert_eq!(serve.namespace, "culvert-system");
        for both_or_neither in [&["--registry", "r", "--kubernetes"][..], &[]] {
            let args = ["mesh-control", "--state-dir", "s"].iter().chain(both_or_neither);
            assert!(Cli::try_parse_from(args).is_err(), "{both_or_neither:?}");
        }
        let rotate = |more: &[&str]| {
            let args = ["mesh-control", "rotate-root", "prepare"].iter().chain(more).copied();
            Cli::try_parse_from(args).map(|cli| cli.command)
        };
        assert!(matches!(rotate(&["--kubernetes"]), Ok(Some(Command::RotateRoot(args))) if args.namespace == "culvert-system"));
        assert!(rotate(&["--state-dir", "s"]).is_ok());
        assert!(rotate(&[]).is_err(), "a folder or the cluster");
        assert!(rotate(&["--state-dir", "s", "--kubernetes"]).is_err(), "one of them");
    }
}
