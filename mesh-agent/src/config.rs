//! What a person may set: the command line, the environment (`CULVERT_*`) and the token file. Parsed and checked here, once.

mod credentials;
#[cfg(test)]
mod tests;
mod token;

/// The private parsers of this module, for `cargo xtask fuzz` alone.
#[cfg(fuzzing)]
pub(crate) mod fuzz {
    pub fn token(bytes: &[u8]) {
        if let Ok(text) = std::str::from_utf8(bytes) {
            super::token::fuzz(text);
        }
    }
}

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::telemetry::MetricsPrefix;

pub use credentials::{Credentials, FileProblem, RootsFollower, ServiceAccount, TokenFollower};
pub use token::{NodeToken, Secret, TokenError};

/// The node agent of the Culvert mesh: enrols Pods, carries their TCP through mutual TLS, authorizes and measures it.
#[derive(Debug, Parser)]
#[command(name = "mesh-agent", version, propagate_version = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Runs the agent of this node until SIGTERM or SIGINT. Needs root.
    ///
    /// Enrolled Pods outlive it: while no agent runs, their new connections are refused at once, and the next agent on the same
    /// --run-dir and --pin-path carries on with them. `mesh-agent cleanup` is what undoes everything.
    Run(Box<RunArgs>),
    /// Brings a Pod of this node into the mesh; answers when its capture is proven, or says why not. Needs root and a running agent.
    Enroll(EnrollArgs),
    /// Takes a Pod out of the mesh and leaves its network namespace as it was before. Needs root and a running agent.
    Release(ReleaseArgs),
    /// Lists the enrolled Pods, one JSON object a line. Needs root and a running agent.
    List(LocalArgs),
    /// Releases every Pod and removes every program, map and file of any version, without a running agent. Needs root.
    Cleanup(CleanupArgs),
    /// Leaves this node as it was before the mesh: takes over from the agent that runs, if one does, releases every Pod, and removes the
    /// CNI plugin, every program, map, pin and file of any version. Says what it removed; what it could not, it names, and fails.
    /// Needs root; doing it again changes nothing.
    Uninstall(UninstallArgs),
    /// Asks one agent by its --ready-socket whether it is ready; fails if it is not, and says why.
    Ready(ReadyArgs),
    /// Puts the CNI plugin onto this node: its binary, and its entry into the first network configuration list. Pods of the mesh then
    /// start only once the agent has enrolled them. Needs root; doing it again changes nothing.
    InstallCni(InstallCniArgs),
    /// Takes the CNI plugin's entry out of every network configuration list, and removes its binary. End the agent first: it would
    /// put the entry back.
    UninstallCni(CniPlaces),
    /// Started by the agent itself, inside a Pod, to prove that the Pod's connections are captured.
    #[command(hide = true)]
    ProbeConnect(ProbeConnectArgs),
}

#[derive(Debug, Args)]
pub struct RunArgs {
    /// Token file of this node, as `mesh-control node-token` writes it; readable by its owner only.
    #[arg(
        long,
        env = "CULVERT_TOKEN_FILE",
        value_name = "FILE",
        required_unless_present = "service_account_token",
        conflicts_with_all = ["service_account_token", "control_roots", "node"]
    )]
    pub token_file: Option<PathBuf>,
    /// On Kubernetes, instead of --token-file: the Pod's service-account token, projected with the audience `culvert`. The file is
    /// read again at each call, so that the newest token is sent.
    #[arg(
        long,
        env = "CULVERT_SERVICE_ACCOUNT_TOKEN",
        value_name = "FILE",
        requires = "control_roots",
        requires = "control",
        requires = "node"
    )]
    pub service_account_token: Option<PathBuf>,
    /// With --service-account-token: PEM of the roots that the control plane's certificate may chain to, as mesh-control publishes
    /// them in the ConfigMap `culvert-roots`. The file is read again at each connection.
    #[arg(
        long,
        env = "CULVERT_CONTROL_ROOTS",
        value_name = "FILE",
        requires = "service_account_token"
    )]
    pub control_roots: Option<PathBuf>,
    /// With --service-account-token: the name of this node, as in its Pods' spec.nodeName.
    #[arg(long, env = "CULVERT_NODE", value_name = "NAME", requires = "service_account_token", value_parser = node_name)]
    pub node: Option<String>,
    /// Where the control plane is; with --token-file instead of the one that it names. Its certificate must still chain to a trusted
    /// root.
    #[arg(long, env = "CULVERT_CONTROL", value_name = "HOST:PORT", value_parser = host_and_port)]
    pub control: Option<String>,
    /// Folder for the local socket, the list of enrolled Pods, and what the next agent needs (with keys: best on a tmpfs); made
    /// with mode 0700. One agent a folder: a further one takes over from the one that runs.
    #[arg(long, env = "CULVERT_RUN_DIR", value_name = "DIR", default_value = "/run/culvert")]
    pub run_dir: PathBuf,
    /// Folder on a bpffs under which programs, maps and links are pinned.
    #[arg(long, env = "CULVERT_PIN_PATH", value_name = "DIR", default_value = "/sys/fs/bpf/culvert")]
    pub pin_path: PathBuf,
    /// Root of the cgroup-v2 hierarchy to attach to [default: where cgroup2 is mounted].
    #[arg(long, env = "CULVERT_CGROUP_ROOT", value_name = "DIR")]
    pub cgroup_root: Option<PathBuf>,
    /// The kubelet's cgroup, as a path below the cgroup root, where the kubelet is no process of that name, as /system.slice/k3s.service
    /// [default: that of the process `kubelet`]. Who is in it reaches the probe ports of Pods whatever policies say.
    #[arg(long, env = "CULVERT_KUBELET_CGROUP", value_name = "PATH")]
    pub kubelet_cgroup: Option<PathBuf>,
    /// Where to serve /metrics (Prometheus text).
    #[arg(long, env = "CULVERT_METRICS", value_name = "IP:PORT", default_value = "0.0.0.0:15020")]
    pub metrics: SocketAddr,
    /// What the names of all metrics begin with. (`istio_` makes those of connections the names that many dashboards know.)
    #[arg(long, env = "CULVERT_METRICS_PREFIX", value_name = "PREFIX", default_value = "mesh_")]
    pub metrics_prefix: MetricsPrefix,
    /// Where to serve /healthz/ready: 200 once the datapath is attached and discovery has answered.
    #[arg(long, env = "CULVERT_READY", value_name = "IP:PORT", default_value = "0.0.0.0:15021")]
    pub ready: SocketAddr,
    /// Where to serve /config_dump, what the agent knows; a loopback address, since whoever reaches it may read it.
    #[arg(long, env = "CULVERT_ADMIN", value_name = "IP:PORT", default_value = "127.0.0.1:15000", value_parser = loopback)]
    pub admin: SocketAddr,
    /// Where each connection's JSON line goes: a file that is appended to, or `-` for standard output.
    #[arg(long, env = "CULVERT_ACCESS_LOG", value_name = "PATH", default_value = "-")]
    pub access_log: PathBuf,
    /// How long open connections may go on after SIGTERM, in seconds.
    #[arg(long, env = "CULVERT_DRAIN_SECONDS", value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(0..=3600))]
    pub drain_seconds: u64,
    /// How long the connections of an agent may go on after another one on the same --run-dir has taken over, in seconds.
    #[arg(long, env = "CULVERT_HANDOVER_DRAIN_SECONDS", value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(0..=3600))]
    pub handover_drain_seconds: u64,
    /// Where this very process tells `mesh-agent ready` whether it is ready: a Unix socket in a folder that no other agent has. While
    /// one takes over from another, the --ready address is one agent's only.
    #[arg(long, env = "CULVERT_READY_SOCKET", value_name = "PATH")]
    pub ready_socket: Option<PathBuf>,
    /// After another agent has taken over, end only when told so: for whoever starts again what has ended, as a DaemonSet does.
    #[arg(long, env = "CULVERT_WAIT_FOR_SIGTERM")]
    pub wait_for_sigterm: bool,
    /// Where the settings of the network namespace that one is in can be written, as in /proc/sys: for a container, whose own is
    /// read-only.
    #[arg(long, env = "CULVERT_SYSCTL_ROOT", value_name = "DIR", default_value = "/proc/sys")]
    pub sysctl_root: PathBuf,
    /// Enrol and release the Pods of this node as the control plane says: those that run are found among the node's processes, so
    /// the agent must see them (`hostPID`). Without it Pods are enrolled by the local socket alone.
    #[arg(long, env = "CULVERT_FOLLOW_PODS")]
    pub follow_pods: bool,
    /// The container runtime's folder of network configurations: the CNI plugin's entry, as `install-cni` puts it in, is put back
    /// whenever another tool has written the configuration anew. With --follow-pods; --run-dir has to be the same path on the node.
    #[arg(long, env = "CULVERT_CNI_CONF_DIR", value_name = "DIR", requires = "follow_pods")]
    pub cni_conf_dir: Option<PathBuf>,
    /// Where the list of the mesh's namespaces goes by which the CNI plugin decides while no agent answers [default: a file in
    /// --run-dir, which a reboot empties].
    #[arg(long, env = "CULVERT_CNI_NAMESPACE_LIST", value_name = "FILE")]
    pub cni_namespace_list: Option<PathBuf>,
    /// Which messages to log to standard error, as `info` or `info,mesh_agent::discovery=debug`.
    #[arg(long, env = "CULVERT_LOG", value_name = "FILTER", default_value = "info")]
    pub log: String,
    #[arg(long, env = "CULVERT_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Args)]
pub struct LocalArgs {
    /// The --run-dir of the running agent.
    #[arg(long, env = "CULVERT_RUN_DIR", value_name = "DIR", default_value = "/run/culvert")]
    pub run_dir: PathBuf,
}

#[derive(Debug, Args)]
pub struct EnrollArgs {
    #[command(flatten)]
    pub local: LocalArgs,
    /// The Pod's metadata.uid.
    #[arg(long, env = "CULVERT_POD_UID", value_name = "UID")]
    pub uid: String,
    /// The Pod's namespace.
    #[arg(long, env = "CULVERT_POD_NAMESPACE")]
    pub namespace: String,
    /// The Pod's name.
    #[arg(long, env = "CULVERT_POD_NAME")]
    pub name: String,
    /// Path to the Pod's network namespace, as /run/netns/x or /proc/1234/ns/net.
    #[arg(long, env = "CULVERT_POD_NETNS", value_name = "PATH")]
    pub netns: PathBuf,
    /// Address of the Pod; once for each.
    #[arg(long = "address", env = "CULVERT_POD_ADDRESSES", value_name = "IP", required = true, value_delimiter = ',', num_args = 1..)]
    pub addresses: Vec<IpAddr>,
    /// The Pod's service account.
    #[arg(long, env = "CULVERT_POD_SERVICE_ACCOUNT", value_name = "NAME", default_value = "default")]
    pub service_account: String,
    /// A cgroup-v2 folder of the Pod's, in which its capture is proven [default: one of the agent's own].
    #[arg(long, env = "CULVERT_POD_CGROUP", value_name = "PATH")]
    pub cgroup: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct ReleaseArgs {
    #[command(flatten)]
    pub local: LocalArgs,
    /// The Pod's metadata.uid.
    #[arg(long, env = "CULVERT_POD_UID", value_name = "UID")]
    pub uid: String,
}

#[derive(Debug, Args)]
pub struct CleanupArgs {
    /// The --run-dir that the agent had.
    #[arg(long, env = "CULVERT_RUN_DIR", value_name = "DIR", default_value = "/run/culvert")]
    pub run_dir: PathBuf,
    /// The --pin-path that the agent had.
    #[arg(long, env = "CULVERT_PIN_PATH", value_name = "DIR", default_value = "/sys/fs/bpf/culvert")]
    pub pin_path: PathBuf,
}

#[derive(Clone, Debug, Args)]
pub struct UninstallArgs {
    /// The --run-dir that the agent has; what agents make in it is removed, and the folder, unless something else is there.
    #[arg(long, env = "CULVERT_RUN_DIR", value_name = "DIR", default_value = "/run/culvert")]
    pub run_dir: PathBuf,
    /// The --pin-path that the agent has.
    #[arg(long, env = "CULVERT_PIN_PATH", value_name = "DIR", default_value = "/sys/fs/bpf/culvert")]
    pub pin_path: PathBuf,
    /// The --cgroup-root that the agent has [default: where cgroup2 is mounted].
    #[arg(long, env = "CULVERT_CGROUP_ROOT", value_name = "DIR")]
    pub cgroup_root: Option<PathBuf>,
    /// The --sysctl-root that the agent has.
    #[arg(long, env = "CULVERT_SYSCTL_ROOT", value_name = "DIR", default_value = "/proc/sys")]
    pub sysctl_root: PathBuf,
    #[command(flatten)]
    pub places: CniPlaces,
    /// The name of this node, as its agent has it: without it, a running agent is not taken over.
    #[arg(long, env = "CULVERT_NODE", value_name = "NAME", value_parser = node_name)]
    pub node: Option<String>,
    /// How long the connections that a running agent carries may go on, in seconds.
    #[arg(long, env = "CULVERT_DRAIN_SECONDS", value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(0..=3600))]
    pub drain_seconds: u64,
    /// Stay until SIGTERM, and tell `mesh-agent ready` by this Unix socket that the node is clean; what comes back meanwhile (an agent
    /// that is started again, say) is removed as well. For a DaemonSet.
    #[arg(long, env = "CULVERT_READY_SOCKET", value_name = "PATH")]
    pub ready_socket: Option<PathBuf>,
}

#[derive(Clone, Debug, Args)]
pub struct CniPlaces {
    /// The container runtime's folder of network configurations.
    #[arg(
        long = "cni-conf-dir",
        env = "CULVERT_CNI_CONF_DIR",
        value_name = "DIR",
        default_value = "/etc/cni/net.d"
    )]
    pub conf_dir: PathBuf,
    /// The container runtime's folder of CNI plugins.
    #[arg(
        long = "cni-bin-dir",
        env = "CULVERT_CNI_BIN_DIR",
        value_name = "DIR",
        default_value = "/opt/cni/bin"
    )]
    pub bin_dir: PathBuf,
    /// Where the agent leaves its list of namespaces, as the *node* sees it, if it was told another place than its --run-dir.
    #[arg(long = "cni-namespace-list", env = "CULVERT_CNI_NAMESPACE_LIST", value_name = "FILE")]
    pub namespace_list: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct InstallCniArgs {
    #[command(flatten)]
    pub places: CniPlaces,
    /// The --run-dir of the agent, as the *node* sees it: there the plugin finds its socket.
    #[arg(long, env = "CULVERT_RUN_DIR", value_name = "DIR", default_value = "/run/culvert")]
    pub run_dir: PathBuf,
    /// The plugin's binary [default: `mesh-cni` beside this program].
    #[arg(long, env = "CULVERT_CNI_BINARY", value_name = "FILE")]
    pub cni_binary: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct ReadyArgs {
    /// The --ready-socket of the agent.
    #[arg(long, env = "CULVERT_READY_SOCKET", value_name = "PATH")]
    pub ready_socket: PathBuf,
    /// Any answer will do.
    #[arg(long, env = "CULVERT_READY_ALIVE")]
    pub alive: bool,
}

#[derive(Debug, Args)]
pub struct ProbeConnectArgs {
    /// Handed to `capture` as they are.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub arguments: Vec<String>,
}

fn loopback(text: &str) -> Result<SocketAddr, String> {
    let address: SocketAddr = text.parse().map_err(|e| format!("{e}, expected IP:PORT"))?;
    if address.ip().to_canonical().is_loopback() {
        Ok(address)
    } else {
        Err("must be a loopback address (127.0.0.1 or [::1]): whoever reaches it may read what the agent knows".to_owned())
    }
}

fn node_name(text: &str) -> Result<String, String> {
    if text.is_empty() || text.len() > 253 || !text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-')) {
        return Err("expected a node's name: letters, digits, '-' and '.', at most 253".to_owned());
    }
    Ok(text.to_owned())
}

/// `host:port`, `1.2.3.4:port` or `[v6]:port`.
fn host_and_port(text: &str) -> Result<String, String> {
    let (host, port) = text.rsplit_once(':').ok_or("expected HOST:PORT")?;
    match port.parse::<u16>() {
        Ok(port) if port != 0 => {}
        _ => return Err(format!("`{port}` is no port")),
    }
    let bracketed = host.starts_with('[') && host.ends_with(']');
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let valid = if bracketed {
        bare.parse::<std::net::Ipv6Addr>().is_ok()
    } else {
        !host.is_empty()
            && host.len() <= 253
            && host
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
    };
    if valid {
        Ok(text.to_owned())
    } else {
        Err(format!("`{host}` is no host name or address"))
    }
}
