//! The certificate service: signs for an authenticated node, and only identities of Pods of the mesh that run on it.

use std::sync::Arc;
use std::time::Duration;

use mesh_proto::ca::istio_certificate_service_server::IstioCertificateService;
use mesh_proto::ca::{IstioCertificateRequest, IstioCertificateResponse};
use time::OffsetDateTime;
use tonic::{Request, Response, Status};

use crate::authentication::Authenticator;
use crate::authority::{AuthorityError, certificate_pem};
use crate::control_plane::ControlPlane;
use crate::proto;
use crate::roots::Roots;

pub struct Certificates {
    pub control: Arc<ControlPlane>,
    pub authenticator: Authenticator,
    pub roots: Arc<Roots>,
    /// Longest lifetime, and that of requests that name none.
    pub lifetime: Duration,
}

impl Certificates {
    fn refuse(&self, reason: &'static str, node: &str, status: Status) -> Status {
        self.control.metrics.certificates_refused.with_label_values(&[reason]).inc();
        tracing::warn!(node, reason, "certificate refused: {}", status.message());
        status
    }
}

#[tonic::async_trait]
impl IstioCertificateService for Certificates {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let caller = self.authenticator.authenticate(&request).await?;
        let request = request.into_inner();
        let node = &caller.node;
        let Some(identity) = proto::text_field(request.metadata.as_ref(), "ImpersonatedIdentity") else {
            let status = Status::invalid_argument("metadata: ImpersonatedIdentity is missing");
            return Err(self.refuse("malformed", node, status));
        };
        if !self.control.is_ready() {
            return Err(self.refuse(
                "not_ready",
                node,
                Status::unavailable("the registry is not read yet; try again"),
            ));
        }
        let snapshot = self.control.snapshot();
        if !snapshot
            .identities
            .get(node)
            .is_some_and(|identities| identities.contains(identity))
        {
            let shown: String = identity.chars().take(512).collect();
            let status = Status::permission_denied(format!("no Pod of the mesh with identity {shown:?} runs on node {node}"));
            return Err(self.refuse("foreign_identity", node, status));
        }
        let lifetime = match u64::try_from(request.validity_duration) {
            Ok(0) => self.lifetime,
            Ok(seconds) => Duration::from_secs(seconds).min(self.lifetime),
            Err(_) => {
                let status = Status::invalid_argument("validity_duration: is negative");
                return Err(self.refuse("malformed", node, status));
            }
        };
        let roots = self.roots.in_force();
        let signed = roots
            .authority
            .sign_workload(&request.csr, identity, lifetime, OffsetDateTime::now_utc())
            .map_err(|error| {
                let (reason, status) = match &error {
                    AuthorityError::Request(_) => ("malformed", Status::invalid_argument(format!("csr: {error}"))),
                    _ => ("failed", Status::internal(error.to_string())),
                };
                self.refuse(reason, node, status)
            })?;
        self.control.metrics.certificates_signed.inc();
        tracing::info!(node, identity, not_after = %signed.not_after, "certificate signed");
        let mut cert_chain = vec![signed.leaf_pem];
        cert_chain.extend(roots.authority.intermediates().iter().map(certificate_pem));
        cert_chain.push(roots.bundle.concat());
        Ok(Response::new(IstioCertificateResponse { cert_chain }))
    }
}
