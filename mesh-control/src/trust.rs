//! By what the control plane is believed, and by what it knows its agents: a state directory's root and node tokens, or in a cluster the
//! root's Secret and service-account tokens.

use std::sync::Arc;

use anyhow::Context as _;
use kube::Client;
use time::OffsetDateTime;
use tokio::task::JoinHandle;

use crate::authentication::Authenticator;
use crate::config::ServeArgs;
use crate::control_plane::ControlPlane;
use crate::kubernetes::reviews::Reviewer;
use crate::kubernetes::root_secret::RootSecret;
use crate::limits::Bounds;
use crate::metrics::Metrics;
use crate::roots::Roots;
use crate::state_dir::{StateDir, StateError};
use crate::tokens::Tokens;

/// Names that the serving certificate always has.
const OWN_NAMES: [&str; 4] = ["localhost", "127.0.0.1", "::1", "mesh-control.culvert-system.svc"];
/// The Service of the control plane in a cluster.
const SERVICE: &str = "mesh-control";

pub struct Trust {
    pub roots: Arc<Roots>,
    pub authenticator: Authenticator,
    pub names: ServerNames,
    secret: Option<RootSecret>,
}

impl Trust {
    /// # Errors
    /// The state directory cannot be used.
    pub fn of_state(args: &ServeArgs, state: &StateDir, metrics: &Arc<Metrics>) -> anyhow::Result<Self> {
        let roots = Arc::new(Roots::open(state, &args.trust_domain, OffsetDateTime::now_utc())?);
        let tokens = Tokens::open(state).context("state directory")?;
        Ok(Self {
            roots,
            authenticator: Authenticator::new(tokens.clone(), Arc::clone(metrics)),
            names: ServerNames {
                tokens: Some(tokens),
                fixed: args.server_name.clone(),
            },
            secret: None,
        })
    }

    /// In the mesh's `namespace` of a cluster.
    ///
    /// # Errors
    /// The root's Secret cannot be made, or is there and cannot be used.
    pub async fn of_cluster(
        args: &ServeArgs,
        client: &Client,
        namespace: &str,
        metrics: &Arc<Metrics>,
        bounds: &Bounds,
    ) -> anyhow::Result<Self> {
        let secret = RootSecret::new(client.clone(), namespace, &args.trust_domain);
        let roots = Arc::new(Roots::new(secret.open_once_told().await?));
        let reviewer = Reviewer::new(
            client.clone(),
            args.agent_service_account.clone(),
            Arc::clone(metrics),
            bounds,
        );
        let mut fixed = args.server_name.clone();
        fixed.extend(service_names(namespace));
        Ok(Self {
            roots,
            authenticator: Authenticator::by_reviews(Arc::new(reviewer), Arc::clone(metrics)),
            names: ServerNames { tokens: None, fixed },
            secret: Some(secret),
        })
    }

    /// Follows the root's Secret, where it is one.
    pub fn follow(&mut self, control: &Arc<ControlPlane>) -> Option<JoinHandle<()>> {
        let secret = self.secret.take()?;
        Some(tokio::spawn(secret.follow(Arc::clone(&self.roots), Arc::clone(control))))
    }
}

fn service_names(namespace: &str) -> [String; 4] {
    [
        SERVICE.to_owned(),
        format!("{SERVICE}.{namespace}"),
        format!("{SERVICE}.{namespace}.svc"),
        format!("{SERVICE}.{namespace}.svc.cluster.local"),
    ]
}

/// By which names agents reach the control plane.
#[derive(Clone)]
pub struct ServerNames {
    /// Each names the host by which its node comes.
    tokens: Option<Tokens>,
    fixed: Vec<String>,
}

impl ServerNames {
    /// # Errors
    /// The tokens cannot be read.
    pub fn current(&self) -> Result<Vec<String>, StateError> {
        let own = OWN_NAMES.iter().map(ToString::to_string);
        let mut names: Vec<String> = own.chain(self.fixed.iter().cloned()).collect();
        if let Some(tokens) = &self.tokens {
            names.extend(tokens.hosts()?);
        }
        Ok(names)
    }
}
