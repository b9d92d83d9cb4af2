//! Whom the agent trusts, as the mesh's settings change.

use std::sync::Arc;

use crate::discovery::transport::ControlPlane;
use crate::identity::Identity;
use crate::identity::renewal::Certificates;
use crate::proxy::Proxy;
use crate::state::{Settings, SharedState};

/// Whom the settings say to trust, for those who are no readers of the state.
pub(super) struct Trust {
    pub(super) state: Arc<SharedState>,
    pub(super) control: ControlPlane,
    pub(super) certificates: Arc<Certificates>,
}

impl Trust {
    pub(super) fn apply(&self) -> (Arc<Settings>, Vec<Identity>) {
        let settings = self.state.read(|state| state.settings().clone());
        self.control.trust(settings.trust_bundle.as_ref());
        let dropped = self.certificates.trust(settings.trust_bundle.as_ref(), &settings.revoked);
        (settings, dropped)
    }

    /// For ever.
    pub(super) async fn follow(self, proxy: Arc<Proxy>) {
        let mut changed = self.state.changed();
        let mut applied: Option<Arc<Settings>> = None;
        loop {
            changed.mark_unchanged();
            let told = self.state.read(|state| state.settings().clone());
            if !applied.as_ref().is_some_and(|applied| Arc::ptr_eq(applied, &told)) {
                let (settings, dropped) = self.apply();
                proxy.forget(&dropped);
                applied = Some(settings);
            }
            if changed.changed().await.is_err() {
                return;
            }
        }
    }
}
