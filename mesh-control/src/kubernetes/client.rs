//! The connection to the API server.

use anyhow::Context as _;

/// By the service account of the Pod, or KUBECONFIG.
///
/// # Errors
/// Neither says where the API server is.
pub async fn connect() -> anyhow::Result<kube::Client> {
    kube::Client::try_default()
        .await
        .context("no way to the API server: run in a Pod, or set KUBECONFIG")
}
