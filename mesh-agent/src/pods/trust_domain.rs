//! The trust domain of the mesh, remembered across restarts: enrolled Pods are served before the control plane has answered.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tracing::{error, warn};

use crate::discovery::DiscoveryStatus;
use crate::identity::Identity;
use crate::proto::DEFAULT_TRUST_DOMAIN;
use crate::state::SharedState;

pub const FILE: &str = "trust-domain";

#[derive(Debug)]
pub struct TrustDomain {
    path: PathBuf,
    /// `None`: neither told nor remembered.
    current: watch::Sender<Option<Arc<str>>>,
}

impl TrustDomain {
    #[must_use]
    pub fn open(run_dir: &Path) -> Arc<Self> {
        let path = run_dir.join(FILE);
        let remembered = fs::read_to_string(&path)
            .ok()
            .map(|text| text.trim().to_owned())
            .filter(|text| Identity::parse(&Identity::new(text, "x", "x").to_string()).is_ok());
        Arc::new(Self {
            path,
            current: watch::Sender::new(remembered.map(Into::into)),
        })
    }

    #[must_use]
    pub fn current(&self) -> Arc<str> {
        self.current.borrow().clone().unwrap_or_else(|| DEFAULT_TRUST_DOMAIN.into())
    }

    /// Waits, up to `patience`, for the control plane to tell it, unless it is remembered.
    pub async fn known(&self, patience: Duration) {
        let mut current = self.current.subscribe();
        // Not told in time: the default holds.
        let _ = tokio::time::timeout(patience, current.wait_for(Option::is_some)).await;
    }

    /// Takes over what discovery tells, for ever.
    pub async fn follow(self: Arc<Self>, state: Arc<SharedState>, mut discovery: watch::Receiver<DiscoveryStatus>) {
        let mut changed = state.changed();
        if discovery.wait_for(|status| status.synced).await.is_err() {
            return;
        }
        let mut last = None;
        loop {
            let told = state.read(|state| state.settings().trust_domain.clone());
            if last.as_ref() != Some(&told) {
                self.learn(if told.is_empty() { DEFAULT_TRUST_DOMAIN } else { &told });
                last = Some(told);
            }
            if changed.changed().await.is_err() {
                return;
            }
        }
    }

    fn learn(&self, told: &str) {
        let before = self.current.borrow().clone();
        if before.as_deref() == Some(told) {
            return;
        }
        match before {
            None => {
                self.current.send_replace(Some(told.into()));
            }
            // Pods that are served have identities of the old one.
            Some(before) => {
                error!(%before, now = told, "the control plane's trust domain has changed; restart the agent to take it over")
            }
        }
        if let Err(error) = fs::write(&self.path, told) {
            warn!(%error, path = %self.path.display(), "the trust domain cannot be remembered");
        }
    }
}
