//! The agent's socket on its node: who starts and stops Pods (a CNI plugin, a person) enrols and releases them here. Root only.

mod client;
pub mod cni;
pub mod handover;
mod socket;
#[cfg(test)]
mod tests;

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use mesh_proto::local::pod_enrolment_server::{PodEnrolment, PodEnrolmentServer};
use mesh_proto::local::{EnrollRequest, EnrollResponse, EnrolledPod, ListRequest, ListResponse, ReleaseRequest, ReleaseResponse};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status};

pub use client::{enroll, list, release};
pub use socket::{
    LEAVING_FILE, LOCK_FILE, LocalSocket, SOCKET_FILE, SocketError, has_left, is_abandoned, is_of_agents, leave, listen_at, lock,
    stay,
};

use crate::capture::{Origin, PodToEnroll};
use crate::pods::{PodError, Pods};

/// Accepted connections that wait for the server.
const ACCEPT_QUEUE: usize = 16;
/// Requests at a time on one connection.
const REQUESTS_PER_CONNECTION: usize = 64;
/// Addresses of a request; a Pod has a few.
const MAX_ADDRESSES: usize = 16;

/// Serves the socket until `stop`.
///
/// # Errors
/// The server fails as a whole.
pub async fn serve(socket: Arc<LocalSocket>, pods: Arc<Pods>, stop: CancellationToken) -> Result<(), tonic::transport::Error> {
    let (accepted, incoming) = mpsc::channel::<std::io::Result<UnixStream>>(ACCEPT_QUEUE);
    let accepting = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            () = accepting.cancelled() => {}
            () = socket.accept_root(accepted) => {}
        }
    });
    tonic::transport::Server::builder()
        .concurrency_limit_per_connection(REQUESTS_PER_CONNECTION)
        .add_service(PodEnrolmentServer::new(Enrolment { pods }))
        .serve_with_incoming_shutdown(ReceiverStream::new(incoming), stop.cancelled_owned())
        .await
}

struct Enrolment {
    pods: Arc<Pods>,
}

#[tonic::async_trait]
impl PodEnrolment for Enrolment {
    async fn enroll(&self, request: Request<EnrollRequest>) -> Result<Response<EnrollResponse>, Status> {
        let pod = pod_to_enroll(request.into_inner())?;
        // In a task of its own: a caller that hangs up does not leave a half-made enrolment.
        let enrolment = tokio::spawn(self.pods.clone().enroll(pod));
        let netns_cookie = finished(enrolment.await)?;
        Ok(Response::new(EnrollResponse { netns_cookie }))
    }

    async fn release(&self, request: Request<ReleaseRequest>) -> Result<Response<ReleaseResponse>, Status> {
        let uid = request.into_inner().uid;
        if uid.is_empty() {
            return Err(Status::invalid_argument("uid: is empty"));
        }
        let pods = self.pods.clone();
        let release = tokio::spawn(async move { pods.release(&uid).await });
        let was_enrolled = finished(release.await)?;
        Ok(Response::new(ReleaseResponse { was_enrolled }))
    }

    async fn list(&self, _request: Request<ListRequest>) -> Result<Response<ListResponse>, Status> {
        let pods = self
            .pods
            .list()
            .into_iter()
            .map(|pod| EnrolledPod {
                proven: pod.proof == "proven",
                uid: pod.uid,
                namespace: pod.namespace,
                name: pod.name,
                netns_cookie: pod.netns_cookie,
                reason: pod.reason,
            })
            .collect();
        Ok(Response::new(ListResponse { pods }))
    }
}

fn finished<T>(result: Result<Result<T, PodError>, tokio::task::JoinError>) -> Result<T, Status> {
    match result {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => {
            tracing::warn!(%error, reason = error.reason(), "a request on the local socket failed");
            let code = match error {
                PodError::Invalid { .. } => Code::InvalidArgument,
                PodError::Busy => Code::Aborted,
                PodError::Capture(_) | PodError::AnotherNamespace => Code::FailedPrecondition,
                PodError::Pending { .. } => Code::Unavailable,
            };
            Err(Status::new(code, error.to_string()))
        }
        Err(_) => Err(Status::internal("the request's task failed; see the agent's log")),
    }
}

fn pod_to_enroll(request: EnrollRequest) -> Result<PodToEnroll, Status> {
    if request.addresses.len() > MAX_ADDRESSES {
        return Err(Status::invalid_argument(format!("addresses: more than {MAX_ADDRESSES}")));
    }
    let addresses = request
        .addresses
        .iter()
        .map(|text| {
            text.parse::<IpAddr>()
                .map_err(|_| Status::invalid_argument(format!("addresses: `{text}` is no IP address")))
        })
        .collect::<Result<_, _>>()?;
    Ok(PodToEnroll {
        uid: request.uid,
        namespace: request.namespace,
        name: request.name,
        service_account: if request.service_account.is_empty() {
            "default".to_owned()
        } else {
            request.service_account
        },
        netns_path: PathBuf::from(request.netns_path),
        addresses,
        origin: Origin::Local,
        cgroup_path: (!request.cgroup_path.is_empty()).then(|| PathBuf::from(request.cgroup_path)),
    })
}

/// A request on the local socket. What is taken can be enrolled: names that Kubernetes has, and absolute paths.
#[cfg(fuzzing)]
pub fn fuzz(bytes: &[u8]) {
    use prost::Message as _;
    let Ok(request) = EnrollRequest::decode(bytes) else { return };
    let asked = request.addresses.len();
    let Ok(pod) = pod_to_enroll(request) else { return };
    assert!(pod.addresses.len() == asked && asked <= MAX_ADDRESSES);
    if crate::pods::validate(&pod).is_ok() {
        assert!(pod.netns_path.is_absolute() && !pod.uid.is_empty() && !pod.addresses.is_empty());
        for name in [&pod.namespace, &pod.name, &pod.service_account] {
            assert!((1..=253).contains(&name.len()) && !name.contains(['/', '\n', '"', '\0']));
        }
    }
}
