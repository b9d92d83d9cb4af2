//! How an agent in a cluster speaks to its control plane, for suites that hold one against an API server.

use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser as _;
use mesh_agent::config::{Cli, Command, Credentials};
use mesh_agent::discovery::report::{self, PodStatus};
use mesh_agent::discovery::transport::ControlPlane;
use mesh_agent::discovery::{self, DiscoveryStatus, NodeName};
use mesh_agent::identity::Identity;
use mesh_agent::identity::certificate::{CertificateError, KeyAndRequest};
use mesh_agent::identity::renewal::Authority as _;
use mesh_agent::identity::store::CertifiedKeyPair;
use mesh_agent::state::SharedState;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::poll::{self, SOON};

/// The node of every one of these.
pub const NODE: &str = "node-a";

#[derive(Clone)]
pub struct AgentClient {
    pub control: ControlPlane,
    pub runtime: Handle,
}

/// A certificate, or how and why not.
pub type Answer = std::result::Result<CertifiedKeyPair, tonic::Status>;

impl AgentClient {
    /// One that reads its token and the mesh's roots from these files, as mounted into an agent's Pod.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn new(token: &Path, roots: &Path, control: &str, runtime: &Handle) -> Result<Self> {
        let (token, roots) = (token.to_str().context("a path")?, roots.to_str().context("a path")?);
        let args = [
            "mesh-agent",
            "run",
            "--service-account-token",
            token,
            "--control-roots",
            roots,
            "--control",
            control,
            "--node",
            NODE,
        ];
        let Command::Run(args) = Cli::try_parse_from(args)?.command else {
            bail!("not run");
        };
        // Its channel is of the runtime that it is made in.
        let _runtime = runtime.enter();
        Ok(Self {
            control: ControlPlane::new(&Credentials::read(&args)?)?,
            runtime: runtime.clone(),
        })
    }

    /// A certificate for a service account of `shop`, asked for and checked as the agent does it.
    ///
    /// # Errors
    /// No answer, or one that cannot be used.
    pub fn ask(&self, account: &str) -> Result<Answer> {
        let identity = Identity::new("cluster.local", "shop", account);
        let request = KeyAndRequest::new(&identity)?;
        let signed = self.runtime.block_on(async {
            let answer = self.control.sign(&identity, request.csr_pem.clone());
            tokio::time::timeout(SOON, answer).await
        })?;
        match signed {
            Ok(answer) => Ok(Ok(request.certify(&identity, &answer, SystemTime::now())?)),
            Err(CertificateError::Refused(status)) => Ok(Err(*status)),
            Err(error) => Err(error.into()),
        }
    }
}

/// Discovery as the agent follows it; it ends with this.
pub struct Followed {
    pub status: watch::Receiver<DiscoveryStatus>,
    stop: CancellationToken,
}

impl Followed {
    #[must_use]
    pub fn start(agent: &AgentClient) -> Self {
        let (sender, status) = watch::channel(DiscoveryStatus::default());
        let stop = CancellationToken::new();
        agent.runtime.spawn(discovery::run(
            agent.control.clone(),
            NodeName(NODE.into()),
            Arc::default(),
            SharedState::new(),
            sender,
            stop.clone(),
        ));
        Self { status, stop }
    }

    /// # Errors
    /// Not within [`SOON`].
    pub fn until(&self, what: &str, is: impl Fn(&DiscoveryStatus) -> bool) -> Result<()> {
        poll::until_true(what, SOON, || Ok(is(&self.status.borrow())))
    }

    /// # Errors
    /// It was opened more than once, or is not open.
    pub fn ensure_uncut(&self) -> Result<()> {
        let status = self.status.borrow();
        ensure!(status.connected && status.connections == 1, "an agent's stream was cut");
        Ok(())
    }
}

impl Drop for Followed {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Reports of Pods as the agent makes them; they end with this.
pub struct Reported {
    stop: CancellationToken,
    // Nothing more is said by them; who reports ends with them.
    _pods: watch::Sender<Arc<Vec<PodStatus>>>,
    _status: watch::Sender<DiscoveryStatus>,
}

impl Reported {
    /// All of them in one report.
    #[must_use]
    pub fn start(agent: &AgentClient, pods: Vec<PodStatus>) -> Self {
        let (pods, of_pods) = watch::channel(Arc::new(pods));
        let (status, of_status) = watch::channel(DiscoveryStatus::default());
        let stop = CancellationToken::new();
        agent.runtime.spawn(report::run(
            agent.control.clone(),
            of_pods,
            of_status,
            Arc::default(),
            stop.clone(),
        ));
        Self {
            stop,
            _pods: pods,
            _status: status,
        }
    }
}

impl Drop for Reported {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
