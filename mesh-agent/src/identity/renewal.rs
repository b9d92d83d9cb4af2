//! The task that keeps a current certificate for every identity of the node's Pods, as [`Rotation`] decides.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use mesh_proto::ca::IstioCertificateRequest;
use parking_lot::Mutex;
use prost_types::{Struct, Value, value::Kind};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::Identity;
use super::certificate::{CertificateError, KeyAndRequest};
use super::rotation::Rotation;
use super::store::{CertificateStore, CertifiedKeyPair};
use super::trust::TrustBundle;
use crate::discovery::transport::ControlPlane;

/// Requests to the authority at a time.
const CONCURRENT_REQUESTS: usize = 8;
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// What is asked for; the authority decides.
const WANTED_LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// Longest sleep, so that a step of the wall clock is noticed.
const LONGEST_SLEEP: Duration = Duration::from_secs(30);

/// Signs requests: the control plane, or a test's authority.
pub trait Authority: Clone + Send + Sync + 'static {
    fn sign(&self, identity: &Identity, csr_pem: String) -> impl Future<Output = Result<Vec<String>, CertificateError>> + Send;
}

impl Authority for ControlPlane {
    async fn sign(&self, identity: &Identity, csr_pem: String) -> Result<Vec<String>, CertificateError> {
        let identity = Value {
            kind: Some(Kind::StringValue(identity.to_string())),
        };
        let request = IstioCertificateRequest {
            csr: csr_pem,
            validity_duration: WANTED_LIFETIME.as_secs().cast_signed(),
            metadata: Some(Struct {
                fields: BTreeMap::from([("ImpersonatedIdentity".to_owned(), identity)]),
            }),
        };
        let answer = self.certificates().create_certificate(request).await.map_err(Box::new)?;
        Ok(answer.into_inner().cert_chain)
    }
}

/// A certificate as the agent after this one can take it over.
#[derive(Clone, PartialEq, Eq)]
pub struct RememberedCertificate {
    /// PEM, as the authority sent it.
    pub answer: Vec<String>,
    /// PKCS #8.
    pub key: Vec<u8>,
}

impl std::fmt::Debug for RememberedCertificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RememberedCertificate([secret])")
    }
}

/// What Pods ask of certificates, and what the task does for them.
#[derive(Debug)]
pub struct Certificates {
    store: Arc<CertificateStore>,
    rotation: Mutex<Rotation>,
    /// Wakes the task: something became due.
    due: Notify,
    /// Raised after each attempt, with the last failure of each identity beside it.
    attempts: watch::Sender<u64>,
    failures: Mutex<BTreeMap<Identity, String>>,
    /// The authority's answers that certificates in the store came from: what is remembered is checked anew by the next agent.
    answers: Mutex<BTreeMap<Identity, Vec<String>>>,
    /// Of the agent before, until a Pod wants them.
    remembered: Mutex<BTreeMap<Identity, RememberedCertificate>>,
    /// The roots that the control plane names, if it names any.
    bundle: Mutex<Option<Arc<TrustBundle>>>,
    pub fetched_total: AtomicU64,
    pub failed_total: AtomicU64,
}

impl Certificates {
    #[must_use]
    pub fn new(store: Arc<CertificateStore>) -> Arc<Self> {
        Arc::new(Self {
            store,
            rotation: Mutex::default(),
            due: Notify::new(),
            attempts: watch::Sender::new(0),
            failures: Mutex::default(),
            answers: Mutex::default(),
            remembered: Mutex::default(),
            bundle: Mutex::default(),
            fetched_total: AtomicU64::new(0),
            failed_total: AtomicU64::new(0),
        })
    }

    /// A Pod has this identity from now on.
    pub fn want(&self, identity: &Identity, pod_uid: &Arc<str>) {
        let now = SystemTime::now();
        {
            // Held while the store is written, as when an answer comes.
            let mut rotation = self.rotation.lock();
            let remembered = self.remembered.lock().remove(identity);
            if rotation.want(identity, pod_uid, now)
                && !rotation.is_revoked(identity)
                && let Some(remembered) = remembered
            {
                match take_again(identity, &remembered, now).and_then(|pair| self.trusted(pair, now)) {
                    Ok(pair) => {
                        rotation.fetched(identity, pair.not_before, pair.not_after, now, rand::random());
                        info!(%identity, fingerprint = %pair.fingerprint(), lifetime = ?pair.remaining(now), "remembered certificate in use");
                        self.answers.lock().insert(identity.clone(), remembered.answer);
                        self.store.insert(Arc::new(pair));
                    }
                    Err(error) => warn!(%identity, %error, "a remembered certificate is not used"),
                }
            }
        }
        self.due.notify_one();
    }

    /// The Pod is gone; a certificate that no other Pod needs is dropped. Returns whose they were.
    #[must_use = "what was made of these certificates is to be dropped, too"]
    pub fn unwant(&self, pod_uid: &str) -> Vec<Identity> {
        let mut rotation = self.rotation.lock();
        let dropped = rotation.unwant(pod_uid);
        for identity in &dropped {
            self.failures.lock().remove(identity);
            self.answers.lock().remove(identity);
            self.store.remove(identity);
            info!(%identity, "certificate dropped: its last Pod is gone");
        }
        drop(rotation);
        if !dropped.is_empty() {
            self.attempts.send_modify(|attempts| *attempts += 1);
        }
        dropped
    }

    /// Other roots are trusted from now on, or other service accounts are deleted: certificates that count no longer are dropped, and
    /// asked for again where that can help. Returns whose they were.
    #[must_use = "what was made of these certificates is to be dropped, too"]
    pub fn trust(&self, bundle: Option<&Arc<TrustBundle>>, revoked: &BTreeSet<Identity>) -> Vec<Identity> {
        let now = SystemTime::now();
        let mut rotation = self.rotation.lock();
        *self.bundle.lock() = bundle.cloned();
        rotation.revoke(revoked, now);
        let mut dropped = Vec::new();
        for pair in self.store.all() {
            let identity = &pair.identity;
            let why = if revoked.contains(identity) {
                "its service account was deleted"
            } else if bundle.is_some_and(|bundle| !bundle.vouches_for(&pair.chain, now)) {
                "its root is trusted no longer"
            } else {
                continue;
            };
            warn!(%identity, why, "certificate dropped");
            self.store.remove(identity);
            self.answers.lock().remove(identity);
            self.failures.lock().insert(identity.clone(), why.to_owned());
            rotation.lost(identity, now);
            dropped.push(identity.clone());
        }
        drop(rotation);
        self.due.notify_one();
        if !dropped.is_empty() {
            self.attempts.send_modify(|attempts| *attempts += 1);
        }
        dropped
    }

    fn trusted(&self, pair: CertifiedKeyPair, now: SystemTime) -> Result<CertifiedKeyPair, CertificateError> {
        match &*self.bundle.lock() {
            Some(bundle) if !bundle.vouches_for(&pair.chain, now) => Err(CertificateError::Answer(
                "it is by a root that the mesh does not trust".to_owned(),
            )),
            _ => Ok(pair),
        }
    }

    /// What the agent before had, before its Pods are served again.
    pub fn remember(&self, certificates: Vec<(Identity, RememberedCertificate)>) {
        *self.remembered.lock() = certificates.into_iter().collect();
    }

    /// Every Pod of before is served again, or gone: what none of them wanted is not to be had any longer.
    pub fn forget_remembered(&self) {
        self.remembered.lock().clear();
    }

    /// What the agent after this one is to have.
    #[must_use]
    pub fn to_remember(&self) -> Vec<(Identity, RememberedCertificate)> {
        let answers = self.answers.lock();
        let held = answers.iter().filter_map(|(identity, answer)| {
            let pair = self.store.current(identity)?;
            let remembered = RememberedCertificate {
                answer: answer.clone(),
                key: pair.key.secret_der().to_vec(),
            };
            Some((identity.clone(), remembered))
        });
        held.collect()
    }

    /// Tells of certificates that came, failed to come, or were dropped.
    #[must_use]
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.attempts.subscribe()
    }

    /// The control plane is back: what failed is tried soon.
    pub fn retry_failed(&self) {
        self.rotation.lock().retry_failed(SystemTime::now(), rand::random);
        self.due.notify_one();
    }

    /// Waits, up to `patience`, for a certificate that holds now.
    ///
    /// # Errors
    /// Why there is none yet; it goes on being asked for.
    pub async fn ready(&self, identity: &Identity, patience: Duration) -> Result<Arc<CertifiedKeyPair>, String> {
        let mut attempts = self.attempts.subscribe();
        let held = async {
            loop {
                if let Some(pair) = self.store.current(identity)
                    && !pair.is_expired(SystemTime::now())
                {
                    return pair;
                }
                if attempts.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        let waited = tokio::time::timeout(patience, held).await;
        waited.map_err(|_| {
            self.failures
                .lock()
                .get(identity)
                .cloned()
                .unwrap_or_else(|| "no certificate yet".to_owned())
        })
    }

    /// Why an identity has no fresh certificate; for the admin dump.
    #[must_use]
    pub fn failures(&self) -> BTreeMap<Identity, String> {
        self.failures.lock().clone()
    }

    /// Fetches and renews until `stop`.
    pub async fn run(self: Arc<Self>, authority: impl Authority, stop: CancellationToken) {
        let mut running = JoinSet::new();
        loop {
            let room = CONCURRENT_REQUESTS.saturating_sub(running.len());
            let due = self.rotation.lock().take_due(SystemTime::now(), room);
            for identity in due {
                let authority = authority.clone();
                running.spawn(async move {
                    let result = fetch(&authority, &identity).await;
                    (identity, result)
                });
            }
            // With no room only the end of a request makes anything happen.
            let sleep = match self.rotation.lock().next_due() {
                Some(at) if running.len() < CONCURRENT_REQUESTS => {
                    at.duration_since(SystemTime::now()).unwrap_or_default().min(LONGEST_SLEEP)
                }
                _ => LONGEST_SLEEP,
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.due.notified() => {}
                () = tokio::time::sleep(sleep) => {}
                Some(ended) = running.join_next() => {
                    if let Ok((identity, result)) = ended {
                        self.settle(&identity, result);
                    }
                }
            }
        }
    }

    fn settle(&self, identity: &Identity, result: Result<(CertifiedKeyPair, Vec<String>), CertificateError>) {
        let now = SystemTime::now();
        let random = rand::random::<f64>();
        // Held while the store is written, so that an identity dropped meanwhile is not put back.
        let mut rotation = self.rotation.lock();
        let result = result.and_then(|(pair, answer)| Ok((self.trusted(pair, now)?, answer)));
        match result {
            Ok((pair, answer)) => {
                self.fetched_total.fetch_add(1, Ordering::Relaxed);
                if rotation.fetched(identity, pair.not_before, pair.not_after, now, random) {
                    info!(%identity, fingerprint = %pair.fingerprint(), lifetime = ?pair.remaining(now), "certificate in use");
                    self.failures.lock().remove(identity);
                    self.answers.lock().insert(identity.clone(), answer);
                    self.store.insert(Arc::new(pair));
                }
            }
            Err(error) => {
                self.failed_total.fetch_add(1, Ordering::Relaxed);
                if let Some(retry_in) = rotation.failed(identity, now, random) {
                    warn!(%identity, %error, reason = error.reason(), ?retry_in, "no fresh certificate; the one held stays in use");
                    self.failures.lock().insert(identity.clone(), error.to_string());
                }
            }
        }
        drop(rotation);
        self.attempts.send_modify(|attempts| *attempts += 1);
    }
}

fn take_again(
    identity: &Identity,
    remembered: &RememberedCertificate,
    now: SystemTime,
) -> Result<CertifiedKeyPair, CertificateError> {
    KeyAndRequest::with_key(&remembered.key)?.certify(identity, &remembered.answer, now)
}

async fn fetch(authority: &impl Authority, identity: &Identity) -> Result<(CertifiedKeyPair, Vec<String>), CertificateError> {
    let request = KeyAndRequest::new(identity)?;
    let answer = tokio::time::timeout(REQUEST_TIMEOUT, authority.sign(identity, request.csr_pem.clone()))
        .await
        .map_err(|_| CertificateError::Timeout)??;
    let pair = request.certify(identity, &answer, SystemTime::now())?;
    Ok((pair, answer))
}
