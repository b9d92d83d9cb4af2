//! The command line's half of the socket.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use hyper_util::rt::TokioIo;
use mesh_proto::local::pod_enrolment_client::PodEnrolmentClient;
use mesh_proto::local::{EnrollRequest, EnrolledPod, ListRequest, ReleaseRequest};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

use super::socket::socket_path;
use crate::config::EnrollArgs;

/// Longer than an enrolment may take at the agent, which then says why.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);

async fn connect(run_dir: &Path) -> anyhow::Result<PodEnrolmentClient<Channel>> {
    let path = socket_path(run_dir);
    let connector = {
        let path = path.clone();
        tower::service_fn(move |_: Uri| {
            let path: PathBuf = path.clone();
            async move { Ok::<_, io::Error>(TokioIo::new(UnixStream::connect(path).await?)) }
        })
    };
    // The name is only the :authority.
    let channel = Endpoint::from_static("http://localhost")
        .timeout(REQUEST_TIMEOUT)
        .connect_with_connector(connector)
        .await;
    let channel = channel.with_context(|| {
        format!(
            "no agent answers at {} (does it run, with this --run-dir, and are you root?)",
            path.display()
        )
    })?;
    Ok(PodEnrolmentClient::new(channel))
}

fn failed(status: &tonic::Status) -> anyhow::Error {
    anyhow!("{}", status.message())
}

/// The Pod's netns cookie.
///
/// # Errors
/// No agent answers, or it says why the Pod is not in the mesh.
pub async fn enroll(args: EnrollArgs) -> anyhow::Result<u64> {
    let text = |path: &Path, flag: &str| {
        // The agent has another working directory.
        let path = std::path::absolute(path)?;
        path.to_str().map(str::to_owned).ok_or_else(|| anyhow!("{flag} is not UTF-8"))
    };
    let request = EnrollRequest {
        netns_path: text(&args.netns, "--netns")?,
        cgroup_path: args
            .cgroup
            .as_deref()
            .map_or(Ok(String::new()), |path| text(path, "--cgroup"))?,
        uid: args.uid,
        namespace: args.namespace,
        name: args.name,
        addresses: args.addresses.iter().map(ToString::to_string).collect(),
        service_account: args.service_account,
    };
    let mut client = connect(&args.local.run_dir).await?;
    let response = client.enroll(request).await.map_err(|status| failed(&status))?;
    Ok(response.into_inner().netns_cookie)
}

/// Whether the Pod was enrolled.
///
/// # Errors
/// No agent answers, or it says what could not be undone.
pub async fn release(run_dir: &Path, uid: String) -> anyhow::Result<bool> {
    let response = connect(run_dir)
        .await?
        .release(ReleaseRequest { uid })
        .await
        .map_err(|status| failed(&status))?;
    Ok(response.into_inner().was_enrolled)
}

/// # Errors
/// No agent answers.
pub async fn list(run_dir: &Path) -> anyhow::Result<Vec<EnrolledPod>> {
    let response = connect(run_dir)
        .await?
        .list(ListRequest {})
        .await
        .map_err(|status| failed(&status))?;
    Ok(response.into_inner().pods)
}
