//! Deleted service accounts, kept in a ConfigMap of the mesh's own namespace. Those that Pods still name are known from the cluster
//! itself (`Accounts::presume_deleted`); this is for the certificates of others, until none can hold any longer.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::PostParams;
use kube::{Api, Client, Error};
use tokio::time::{sleep, timeout};

use super::watch::{Backoff, describe};
use crate::accounts::Accounts;
use crate::control_plane::{ControlPlane, Shared};
use crate::limits::{ACCOUNTS_RETRY, API_TIMEOUT};

const NAME: &str = "culvert-deleted-accounts";
const KEY: &str = "accounts.json";

enum Failure {
    Api(Box<Error>),
    Timeout,
    /// It holds something else.
    Content(serde_json::Error),
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Api(error) => f.write_str(&describe(error)),
            Self::Timeout => write!(f, "no answer within {API_TIMEOUT:?}"),
            Self::Content(error) => write!(
                f,
                "its key {KEY} holds something else ({error}); mend or remove the ConfigMap"
            ),
        }
    }
}

async fn answered<T>(request: impl Future<Output = Result<T, Error>>) -> Result<T, Failure> {
    match timeout(API_TIMEOUT, request).await {
        Ok(done) => done.map_err(|error| Failure::Api(Box::new(error))),
        Err(_) => Err(Failure::Timeout),
    }
}

async fn read(api: &Api<ConfigMap>) -> Result<(Option<ConfigMap>, Accounts), Failure> {
    let found = answered(api.get_opt(NAME)).await?;
    let text = found.as_ref().and_then(|map| map.data.as_ref()?.get(KEY));
    let accounts = match text {
        Some(text) => Accounts::from_json(text.as_bytes()).map_err(Failure::Content)?,
        None => Accounts::default(),
    };
    Ok((found, accounts))
}

/// Accounts that were deleted before this replica started. Waits for an API server that is away.
pub async fn deleted_accounts(client: &Client, namespace: &str) -> Accounts {
    let api = Api::namespaced(client.clone(), namespace);
    let mut backoff = Backoff::default();
    loop {
        match read(&api).await {
            Ok((_, accounts)) => return accounts,
            // Without it nobody would be trusted less than with it lost: those that Pods name are known all the same.
            Err(failure @ Failure::Content(_)) => {
                tracing::error!("ConfigMap {namespace}/{NAME}: {failure}; deleted accounts in it are not known");
                return Accounts::default();
            }
            Err(failure) => {
                tracing::warn!("ConfigMap {namespace}/{NAME} is waited for: {failure}");
                sleep(backoff.next()).await;
            }
        }
    }
}

/// Writes what has changed, for ever.
pub async fn keep(client: Client, namespace: String, control: Arc<ControlPlane>, shared: Arc<Shared>) {
    let api: Api<ConfigMap> = Api::namespaced(client, &namespace);
    let mut newest = shared.accounts();
    loop {
        if newest.changed().await.is_err() {
            return;
        }
        loop {
            let accounts = newest.borrow_and_update().clone().unwrap_or_default();
            match write(&api, &accounts).await {
                Ok(()) => break,
                Err(failure) => {
                    let conflict = matches!(&failure, Failure::Api(error) if matches!(error.as_ref(), Error::Api(status) if status.code == 409));
                    // Another replica was quicker; that is no failure.
                    if !conflict {
                        control.metrics.state_writes_failed.inc();
                        tracing::error!(
                            "ConfigMap {namespace}/{NAME}: {failure}; after a restart, deleted accounts without Pods would be trusted"
                        );
                    }
                    sleep(ACCOUNTS_RETRY).await;
                }
            }
        }
    }
}

async fn write(api: &Api<ConfigMap>, accounts: &Accounts) -> Result<(), Failure> {
    let (found, kept) = read(api).await?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let wanted = accounts.to_share(&kept, now.as_secs());
    if wanted == kept {
        return Ok(());
    }
    let json = wanted.to_json().map_err(Failure::Content)?;
    let text = String::from_utf8_lossy(&json).into_owned();
    let data = Some(BTreeMap::from([(KEY.to_owned(), text)]));
    let params = PostParams::default();
    match found {
        Some(map) => {
            let map = ConfigMap { data, ..map };
            answered(api.replace(NAME, &params, &map)).await?;
        }
        None => {
            let metadata = ObjectMeta {
                name: Some(NAME.to_owned()),
                ..ObjectMeta::default()
            };
            let map = ConfigMap {
                metadata,
                data,
                ..ConfigMap::default()
            };
            answered(api.create(&params, &map)).await?;
        }
    }
    Ok(())
}
