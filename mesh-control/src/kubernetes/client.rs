//! The way to the API server.

use std::time::Duration;

use anyhow::{Context as _, bail};
use kube::client::ClientBuilder;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use tokio::time::{sleep, timeout};
use tower::util::MapResponseLayer;

use super::answers;
use super::watch::{Backoff, describe};
use crate::limits::{API_TIMEOUT, WATCH_GRACE, WATCH_SECONDS};

/// The oldest minor version of Kubernetes 1 that serves: since it, service-account tokens name their node, by which agents are known, and
/// CEL knows addresses and ranges, by which policies are checked at admission.
const OLDEST_MINOR: u32 = 32;

/// Without a byte from the API server. Whoever watches has the watch end before.
pub(super) const READ_TIMEOUT: Duration = Duration::from_secs(WATCH_SECONDS as u64 + 2 * WATCH_GRACE.as_secs());

/// A client by `KUBECONFIG`, or as a Pod of the cluster has it. An API server that is away is waited for.
///
/// # Errors
/// There is no way to an API server, or it is too old.
pub async fn connect() -> anyhow::Result<Client> {
    let config = match std::env::var_os("KUBECONFIG") {
        Some(path) if !path.is_empty() => {
            let options = KubeConfigOptions::default();
            let kubeconfig = Kubeconfig::from_env().context("KUBECONFIG")?.unwrap_or_default();
            Config::from_custom_kubeconfig(kubeconfig, &options)
                .await
                .context("KUBECONFIG")?
        }
        _ => Config::incluster()
            .context("--kubernetes: this is no Pod with a service account's token, and KUBECONFIG is not set")?,
    };
    checked(client(config)?).await
}

/// The same client, once its API server has said how old it is.
///
/// # Errors
/// It is too old.
async fn checked(client: Client) -> anyhow::Result<Client> {
    let mut backoff = Backoff::default();
    let version = loop {
        let problem = match timeout(API_TIMEOUT, client.apiserver_version()).await {
            Ok(Ok(version)) => break version,
            Ok(Err(error)) => describe(&error),
            Err(_) => format!("no answer within {API_TIMEOUT:?}"),
        };
        tracing::warn!("the API server is waited for: {problem}");
        sleep(backoff.next()).await;
    };
    check_version(&version.major, &version.minor)?;
    tracing::info!(version = version.git_version, "the API server is the registry");
    Ok(client)
}

/// # Errors
/// The configuration cannot be used.
pub fn client(mut config: Config) -> anyhow::Result<Client> {
    // What is tried again, and when, is decided where the answer is known.
    config.default_retry = false;
    // Whoever reads has a shorter patience of his own where it matters; nothing is waited for for ever.
    config.read_timeout = Some(READ_TIMEOUT);
    let builder = ClientBuilder::try_from(config).context("a client of the API server")?;
    Ok(builder.with_layer(&MapResponseLayer::new(answers::mend)).build())
}

fn check_version(major: &str, minor: &str) -> anyhow::Result<()> {
    // Some distributions write `32+`.
    let number = |text: &str| {
        let digits: String = text.chars().take_while(char::is_ascii_digit).collect();
        digits
            .parse::<u32>()
            .with_context(|| format!("the API server's version {major}.{minor} is no version"))
    };
    if (number(major)?, number(minor)?) < (1, OLDEST_MINOR) {
        bail!(
            "the API server is Kubernetes {major}.{minor}, and 1.{OLDEST_MINOR} or newer is needed: before it, service-account \
             tokens do not name their node, by which agents are known, and CEL does not know addresses, by which policies are \
             checked; upgrade the cluster"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use bytes::Bytes;
    use http_body_util::Full;
    use hyper::{Request, Response};
    use kube::client::Body;

    use super::*;

    /// Of an API server that knows no more than its own version, 1.`minor`.
    fn of_version(minor: &'static str) -> Client {
        let server = tower::service_fn(move |request: Request<Body>| async move {
            assert_eq!(request.uri().path(), "/version");
            let version = serde_json::json!({
                "major": "1", "minor": minor, "gitVersion": format!("v1.{minor}.0"), "gitCommit": "none", "gitTreeState": "clean",
                "buildDate": "1970-01-01T00:00:00Z", "goVersion": "go1.24", "compiler": "gc", "platform": "linux/amd64",
            });
            Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(version.to_string()))))
        });
        Client::new(server, "default")
    }

    #[tokio::test]
    async fn whoever_connects_asks_for_the_version_first() {
        for minor in ["32", "34", "32+"] {
            let connected = checked(of_version(minor)).await;
            assert!(connected.is_ok(), "1.{minor}: {:?}", connected.err());
        }
        for minor in ["31", "9"] {
            let Err(error) = checked(of_version(minor)).await else {
                panic!("1.{minor} serves");
            };
            let error = error.to_string();
            assert!(
                error.contains("1.32 or newer is needed") && error.contains(&format!("Kubernetes 1.{minor}")),
                "{error}"
            );
        }
    }

    #[test]
    fn a_kubernetes_that_is_too_old_is_refused_with_the_reason() {
        for (major, minor) in [("1", "32"), ("1", "34"), ("1", "32+"), ("2", "0")] {
            check_version(major, minor).expect("new enough");
        }
        for (major, minor) in [("1", "31"), ("1", "9+"), ("0", "40")] {
            let error = check_version(major, minor).expect_err("too old").to_string();
            assert!(
                error.contains("1.32 or newer is needed") && error.contains(&format!("{major}.{minor}")),
                "{error}"
            );
        }
        for (major, minor) in [("", ""), ("1", "x"), ("1", "99999999999")] {
            check_version(major, minor).expect_err("no version");
        }
    }
}
