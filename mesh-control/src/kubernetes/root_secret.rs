//! The Secret of the root of trust: made when there is none, followed, and changed by `rotate-root --kubernetes`. What it says is trusted
//! is published for the agents in a ConfigMap.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{Config, Event, watcher};
use kube::{Api, Client, ResourceExt as _};
use time::OffsetDateTime;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tokio_stream::StreamExt as _;

use crate::control_plane::ControlPlane;
use crate::kubernetes::root::{self, RootError};
use crate::kubernetes::watch::{Backoff, retry_after};
use crate::limits::{ROOT_CALL_TIMEOUT, ROOTS_PUBLISH_INTERVAL, WATCH_SECONDS};
use crate::roots::{InForce, Roots, Step};

pub const SECRET: &str = "culvert-root";
pub const CONFIG_MAP: &str = "culvert-roots";
/// Its key: PEM of every trusted root, the signing one first.
pub const ROOTS_PEM: &str = "roots.pem";
/// As this program signs what it writes at the API server.
const MANAGER: &str = "mesh-control";
/// Whoever cert-manager keeps a Secret for.
const CERT_MANAGER: &str = "cert-manager.io/certificate-name";

#[derive(Debug, thiserror::Error)]
pub enum RootSecretError {
    #[error("Secret {namespace}/{SECRET}, {error}")]
    Content { namespace: String, error: RootError },
    #[error("{object}: {error}")]
    Call {
        object: String,
        #[source]
        error: Box<kube::Error>,
    },
    #[error("{0}: the API server did not answer within {ROOT_CALL_TIMEOUT:?}")]
    Timeout(String),
    #[error("Secret {0}/{SECRET} was deleted")]
    Vanished(String),
    #[error(
        "Secret {0}/{SECRET} is kept by cert-manager, which would undo this. Put the next issuer's root beside ca.crt, under the key \
         {trusted}; once every agent trusts it, let cert-manager issue from it; once every certificate was renewed, remove that key",
        trusted = root::TRUSTED
    )]
    CertManagers(String),
    #[error("Secret {0}/{SECRET} was changed by somebody else meanwhile; look at it, and try again")]
    Conflict(String),
}

impl RootSecretError {
    fn may_pass(&self) -> bool {
        match self {
            Self::Call { error, .. } => match error.as_ref() {
                kube::Error::Api(status) => status.code == 429 || status.code >= 500,
                kube::Error::Service(_) | kube::Error::HyperError(_) => true,
                _ => false,
            },
            Self::Timeout(_) => true,
            _ => false,
        }
    }
}

pub struct RootSecret {
    secrets: Api<Secret>,
    config_maps: Api<ConfigMap>,
    namespace: String,
    trust_domain: String,
}

impl RootSecret {
    #[must_use]
    pub fn new(client: Client, namespace: &str, trust_domain: &str) -> Self {
        Self {
            secrets: Api::namespaced(client.clone(), namespace),
            config_maps: Api::namespaced(client, namespace),
            namespace: namespace.to_owned(),
            trust_domain: trust_domain.to_owned(),
        }
    }

    /// What is in the Secret. Where there is none, it is made; of two that make it at once, both go on with what the first wrote.
    ///
    /// # Errors
    /// The API server's; the Secret is there and cannot be used: another root in its place would cut off every node.
    pub async fn open(&self, now: OffsetDateTime) -> Result<InForce, RootSecretError> {
        let secret = match self.call(self.secrets.get_opt(SECRET)).await? {
            Some(secret) => secret,
            None => self.create(now).await?,
        };
        self.read(&secret, now)
    }

    /// As [`Self::open`]; an API server that is away, or has too much to do, is waited for.
    ///
    /// # Errors
    /// As [`Self::open`], but for what may pass.
    pub async fn open_once_told(&self) -> Result<InForce, RootSecretError> {
        let mut backoff = Backoff::default();
        loop {
            let error = match self.open(OffsetDateTime::now_utc()).await {
                Err(error) if error.may_pass() => error,
                opened => return opened,
            };
            let asked = match &error {
                RootSecretError::Call { error, .. } => retry_after(error),
                _ => None,
            };
            tracing::warn!("the root of trust is waited for: {error}");
            sleep(backoff.after(asked.unwrap_or_default())).await;
        }
    }

    async fn create(&self, now: OffsetDateTime) -> Result<Secret, RootSecretError> {
        let data = root::made(&self.trust_domain, now).map_err(|error| self.content(error))?;
        let secret = Secret {
            metadata: self.metadata(SECRET),
            type_: Some("kubernetes.io/tls".to_owned()),
            data: Some(data),
            ..Secret::default()
        };
        let parameters = PostParams {
            field_manager: Some(MANAGER.to_owned()),
            ..PostParams::default()
        };
        match self.call(self.secrets.create(&parameters, &secret)).await {
            Ok(made) => {
                tracing::info!(secret = SECRET, namespace = self.namespace, "made a new root");
                Ok(made)
            }
            Err(RootSecretError::Call { error, .. }) if is_reason(&error, "AlreadyExists") => {
                self.call(self.secrets.get(SECRET)).await
            }
            Err(error) => Err(error),
        }
    }

    fn metadata(&self, name: &str) -> ObjectMeta {
        ObjectMeta {
            name: Some(name.to_owned()),
            namespace: Some(self.namespace.clone()),
            labels: Some(BTreeMap::from([(
                "app.kubernetes.io/managed-by".to_owned(),
                MANAGER.to_owned(),
            )])),
            ..ObjectMeta::default()
        }
    }

    fn read(&self, secret: &Secret, now: OffsetDateTime) -> Result<InForce, RootSecretError> {
        let nothing = root::Data::new();
        root::read(secret.data.as_ref().unwrap_or(&nothing), now).map_err(|error| self.content(error))
    }

    fn content(&self, error: RootError) -> RootSecretError {
        RootSecretError::Content {
            namespace: self.namespace.clone(),
            error,
        }
    }

    async fn call<T>(&self, call: impl Future<Output = kube::Result<T>>) -> Result<T, RootSecretError> {
        let object = || format!("Secret {}/{SECRET} or ConfigMap {CONFIG_MAP}", self.namespace);
        match timeout(ROOT_CALL_TIMEOUT, call).await {
            Ok(answer) => answer.map_err(|error| RootSecretError::Call {
                object: object(),
                error: Box::new(error),
            }),
            Err(_) => Err(RootSecretError::Timeout(object())),
        }
    }

    /// One step of a root's replacement, whole or not at all; returns what an operator should know.
    ///
    /// # Errors
    /// As [`root::rotate`]; the Secret is somebody else's, or was changed meanwhile.
    pub async fn rotate(&self, step: Step, now: OffsetDateTime) -> Result<String, RootSecretError> {
        let mut secret = match self.call(self.secrets.get_opt(SECRET)).await? {
            Some(secret) => secret,
            None => self.create(now).await?,
        };
        if secret.annotations().contains_key(CERT_MANAGER) {
            return Err(RootSecretError::CertManagers(self.namespace.clone()));
        }
        let mut data = secret.data.take().unwrap_or_default();
        let done = root::rotate(&mut data, step, &self.trust_domain, now).map_err(|error| self.content(error))?;
        secret.data = Some(data);
        // With the version that was read: the API server refuses it if another one was written meanwhile.
        match self.call(self.secrets.replace(SECRET, &PostParams::default(), &secret)).await {
            Ok(_) => Ok(done),
            Err(RootSecretError::Call { error, .. }) if is_reason(&error, "Conflict") => {
                Err(RootSecretError::Conflict(self.namespace.clone()))
            }
            Err(error) => Err(error),
        }
    }

    /// Follows the Secret and publishes what it trusts, for ever. What cannot be used is said; what was in force before stays so.
    pub async fn follow(self, roots: Arc<Roots>, control: Arc<ControlPlane>) {
        let events = watcher(self.secrets.clone(), watched()).default_backoff();
        tokio::pin!(events);
        let mut publish = interval(ROOTS_PUBLISH_INTERVAL);
        publish.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut said = Said::default();
        let mut is_listed = true;
        loop {
            let taken = tokio::select! {
                event = events.next() => match event {
                    Some(Ok(Event::Apply(secret) | Event::InitApply(secret))) => {
                        is_listed = true;
                        self.take(&secret, &roots, &control).await
                    }
                    Some(Ok(Event::Init)) => {
                        is_listed = false;
                        continue;
                    }
                    Some(Ok(Event::InitDone)) if is_listed => continue,
                    Some(Ok(Event::InitDone | Event::Delete(_))) => Err(RootSecretError::Vanished(self.namespace.clone()).to_string()),
                    Some(Err(error)) => Err(format!("Secret {}/{SECRET} cannot be watched: {error}", self.namespace)),
                    None => return,
                },
                _ = publish.tick() => {
                    let published = self.publish(&roots.in_force()).await;
                    control.metrics.roots_unpublished.set(i64::from(published.is_err()));
                    if let Err(error) = published {
                        tracing::error!("the trusted roots are not published for the agents: {error}");
                    }
                    continue;
                }
            };
            match taken {
                Ok(true) => publish.reset_immediately(),
                Ok(false) => {}
                Err(_) => control.metrics.roots_failed.inc(),
            }
            said.say(taken.err());
        }
    }

    async fn take(&self, secret: &Secret, roots: &Arc<Roots>, control: &Arc<ControlPlane>) -> Result<bool, String> {
        let read = self
            .read(secret, OffsetDateTime::now_utc())
            .map_err(|error| error.to_string())?;
        if !roots.replace(read) {
            return Ok(false);
        }
        let (control, bundle) = (Arc::clone(control), roots.in_force().bundle.clone());
        tokio::task::spawn_blocking(move || control.set_trust_bundle(bundle))
            .await
            .map_err(|error| error.to_string())?;
        Ok(true)
    }

    /// Every replica writes what it trusts; all of them follow one Secret, so that they come to write the same.
    ///
    /// # Errors
    /// The API server's.
    pub async fn publish(&self, in_force: &InForce) -> Result<(), RootSecretError> {
        let config_map = ConfigMap {
            metadata: self.metadata(CONFIG_MAP),
            data: Some(BTreeMap::from([(ROOTS_PEM.to_owned(), in_force.bundle.concat())])),
            ..ConfigMap::default()
        };
        let parameters = PatchParams::apply(MANAGER).force();
        self.call(self.config_maps.patch(CONFIG_MAP, &parameters, &Patch::Apply(&config_map)))
            .await?;
        Ok(())
    }
}

fn is_reason(error: &kube::Error, reason: &str) -> bool {
    matches!(error, kube::Error::Api(status) if status.reason == reason)
}

/// The Secret, by watches that end before the client takes their silence for a failure.
fn watched() -> Config {
    Config::default()
        .fields(&format!("metadata.name={SECRET}"))
        .timeout(WATCH_SECONDS)
}

/// A problem is said once, and so is its end.
#[derive(Default)]
struct Said(Option<String>);

impl Said {
    fn say(&mut self, problem: Option<String>) {
        match &problem {
            Some(text) if self.0.as_ref() != Some(text) => {
                tracing::error!("{text}; the roots of before stay in force");
            }
            None if self.0.is_some() => tracing::info!("the root's Secret can be used again"),
            _ => {}
        }
        self.0 = problem;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::kubernetes::client::READ_TIMEOUT;

    #[test]
    fn a_secret_that_does_not_change_is_no_failure() {
        let watch = watched().timeout.expect("an end");
        assert!(Duration::from_secs(watch.into()) < READ_TIMEOUT, "{watch} s of silence");
    }
}
