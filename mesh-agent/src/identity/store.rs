//! The certificates that the agent holds, one for each identity of its Pods. Filled by rotation, read by the proxy at each new
//! tunnel, so that a renewed certificate serves the next one.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::RwLock;
use rustls::RootCertStore;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use sha2::{Digest, Sha256};
use tokio::sync::Notify;
use tokio::time::timeout;

use super::Identity;

/// A certificate with its key and the roots that the mesh trusts. Never changed: a renewal is another one.
pub struct CertifiedKeyPair {
    pub identity: Identity,
    /// Leaf first, without the root.
    pub chain: Vec<CertificateDer<'static>>,
    pub key: PrivateKeyDer<'static>,
    pub roots: Arc<RootCertStore>,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
}

impl CertifiedKeyPair {
    #[must_use]
    pub fn is_expired(&self, now: SystemTime) -> bool {
        now >= self.not_after
    }

    /// How long it still holds; zero when it is over.
    #[must_use]
    pub fn remaining(&self, now: SystemTime) -> Duration {
        self.not_after.duration_since(now).unwrap_or_default()
    }

    /// Of the leaf, in hexadecimal: what may be logged.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        self.chain
            .first()
            .map(|leaf| hex::encode(Sha256::digest(leaf)))
            .unwrap_or_default()
    }
}

impl fmt::Debug for CertifiedKeyPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CertifiedKeyPair")
            .field("identity", &self.identity)
            .field("fingerprint", &self.fingerprint())
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

/// Bounded by the identities of the node's Pods (`mesh_common::limits::MAX_PODS`).
#[derive(Debug, Default)]
pub struct CertificateStore {
    certificates: RwLock<HashMap<Identity, Arc<CertifiedKeyPair>>>,
    inserted: Notify,
}

impl CertificateStore {
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    #[must_use]
    pub fn current(&self, identity: &Identity) -> Option<Arc<CertifiedKeyPair>> {
        self.certificates.read().get(identity).cloned()
    }

    /// As [`CertificateStore::current`]; what is not there is waited for as long: a Pod that ran before it was enrolled opens
    /// connections while its first certificate is being signed.
    pub async fn current_within(&self, patience: Duration, identity: &Identity) -> Option<Arc<CertifiedKeyPair>> {
        if let Some(pair) = self.current(identity) {
            return Some(pair);
        }
        let arrives = async {
            loop {
                let inserted = self.inserted.notified();
                tokio::pin!(inserted);
                // Before the look: what comes in between is heard of.
                inserted.as_mut().enable();
                if let Some(pair) = self.current(identity) {
                    return pair;
                }
                inserted.await;
            }
        };
        timeout(patience, arrives).await.ok()
    }

    /// New tunnels use it from now on.
    pub fn insert(&self, pair: Arc<CertifiedKeyPair>) {
        self.certificates.write().insert(pair.identity.clone(), pair);
        self.inserted.notify_waiters();
    }

    pub fn remove(&self, identity: &Identity) -> Option<Arc<CertifiedKeyPair>> {
        self.certificates.write().remove(identity)
    }

    #[must_use]
    pub fn all(&self) -> Vec<Arc<CertifiedKeyPair>> {
        self.certificates.read().values().cloned().collect()
    }

    #[must_use]
    pub fn identities(&self) -> Vec<Identity> {
        self.certificates.read().keys().cloned().collect()
    }
}
