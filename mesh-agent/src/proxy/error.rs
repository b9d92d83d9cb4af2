use std::sync::Arc;

use super::proof::Broken;
use crate::capture::CaptureError;
use crate::telemetry::Metrics;
use crate::tls::TlsError;

/// Why a connection is refused, or failed. Cloned to all that waited for the same tunnel.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ProxyError {
    /// A decision, not a failure: named by its reason.
    #[error("{}", .0.reason())]
    Refused(Refusal),
    #[error("capture: {0}")]
    Capture(Arc<CaptureError>),
    #[error("{what}: {source}")]
    Connect {
        what: &'static str,
        source: Arc<std::io::Error>,
    },
    #[error("{0} timed out")]
    Timeout(Phase),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("tunnel: {0}")]
    Tunnel(Arc<h2::Error>),
    /// The far side's answer to our CONNECT.
    #[error("the far side answered {0}")]
    Answer(http::StatusCode),
    #[error("reset while open: {0}")]
    Reset(ResetBy),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    NoOriginalDestination,
    AgentPort,
    DeniedByPolicy,
    PolicyMissing,
    IdentityMismatch,
    /// Discovery knows nobody at the address of a tunnel's peer.
    IdentityUnknown,
    /// The service has no such port.
    ServicePortUnknown,
    /// No endpoint of the service can be given a connection.
    NoHealthyEndpoint,
    /// The service is for its own node's clients, and has endpoints on other nodes only.
    NoLocalEndpoint,
    DestinationUnknown,
    DestinationLost,
    /// Not protected yet, where nothing is taken in clear.
    DestinationPending,
    /// In clear, to a Pod that takes only mutual TLS.
    PlaintextRefused,
    CertificateMissing,
    CertificateExpired,
    /// The service account of one of both ends was deleted.
    IdentityRevoked,
    /// A root that one of both certificates depends on is trusted no longer.
    RootRemoved,
    Limit,
    /// A connection of the agent's own that came back to it.
    UpstreamLoop,
    BadRequest,
    /// Much data before the answer to a CONNECT.
    EarlyData,
}

/// What took too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Connect,
    Handshake,
    Response,
}

/// Who ended an open connection with a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetBy {
    Source,
    Destination,
    /// The connection's bounds: half-closed and silent for too long.
    Idle,
    /// Held too much for an end that does not read.
    Memory,
    /// Cut by the agent: a changed policy denies it.
    Policy,
    /// Cut by the agent: in clear, and its Pod now takes only mutual TLS.
    Settings,
    /// Cut by the agent: the service account of one of its ends was deleted.
    Revocation,
    /// Cut by the agent: a root that it depends on is trusted no longer.
    RemovedRoot,
    /// Cut by the agent: its peer's address is somebody else's, or nobody's.
    NewHolder,
    /// Cut by the agent: in clear, and its destination is protected now.
    Protection,
}

impl From<Refusal> for ProxyError {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<Broken> for ProxyError {
    fn from(broken: Broken) -> Self {
        Self::Refused(match broken {
            Broken::Revoked => Refusal::IdentityRevoked,
            Broken::RootRemoved => Refusal::RootRemoved,
        })
    }
}

impl From<CaptureError> for ProxyError {
    fn from(error: CaptureError) -> Self {
        match error {
            CaptureError::NoOriginalDestination => Self::Refused(Refusal::NoOriginalDestination),
            CaptureError::UpstreamLimit(of) => {
                tracing::debug!(of, "too many connections to applications: one refused");
                Self::Refused(Refusal::Limit)
            }
            error => Self::Capture(error.into()),
        }
    }
}

impl From<h2::Error> for ProxyError {
    fn from(error: h2::Error) -> Self {
        Self::Tunnel(error.into())
    }
}

impl ProxyError {
    /// The destination, or its node, did not take the connection: another endpoint may. What was decided, by policy or
    /// identity, is final.
    #[must_use]
    pub fn is_refusal_to_connect(&self) -> bool {
        match self {
            Self::Connect { .. } | Self::Timeout(Phase::Connect) | Self::Tunnel(_) => true,
            Self::Answer(status) => *status == http::StatusCode::SERVICE_UNAVAILABLE,
            Self::Refused(_) | Self::Capture(_) | Self::Timeout(_) | Self::Tls(_) | Self::Reset(_) => false,
        }
    }

    /// What it was to be let out to in clear takes nothing in clear any more.
    #[must_use]
    pub(super) fn is_protected_meanwhile(&self) -> bool {
        matches!(self, Self::Reset(ResetBy::Protection))
    }

    /// The label in metrics and the field in logs.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Refused(refusal) => refusal.reason(),
            Self::Capture(error) => match **error {
                CaptureError::PortsExhausted(_) => error.reason(),
                _ => "capture",
            },
            // No port is left for this destination.
            Self::Connect { source, .. } if source.kind() == std::io::ErrorKind::AddrNotAvailable => "local_ports_exhausted",
            Self::Connect { .. } => "connect_failed",
            Self::Timeout(Phase::Connect) => "connect_timeout",
            Self::Timeout(Phase::Handshake) => "handshake_timeout",
            Self::Timeout(Phase::Response) => "response_timeout",
            Self::Tls(_) => "handshake_failed",
            Self::Tunnel(_) => "tunnel_failed",
            Self::Answer(http::StatusCode::UNAUTHORIZED) => "denied_by_destination",
            Self::Answer(http::StatusCode::SERVICE_UNAVAILABLE) => "connect_failed_at_destination",
            Self::Answer(_) => "rejected_by_destination",
            Self::Reset(ResetBy::Source) => "reset_by_source",
            Self::Reset(ResetBy::Destination) => "reset_by_destination",
            Self::Reset(ResetBy::Idle) => "half_closed_idle",
            Self::Reset(ResetBy::Memory) => "memory_limit",
            Self::Reset(ResetBy::Policy) => "cut_by_policy",
            Self::Reset(ResetBy::Settings) => "cut_by_settings",
            Self::Reset(ResetBy::Revocation) => "cut_by_revocation",
            Self::Reset(ResetBy::RemovedRoot) => "cut_by_removed_root",
            Self::Reset(ResetBy::NewHolder) => "cut_by_new_holder",
            Self::Reset(ResetBy::Protection) => "cut_by_protection",
        }
    }
}

/// Of a tunnel that this side ended since its peer did not answer a ping, in [`Metrics::count_tunnel`].
pub(super) const UNANSWERED: &str = "unanswered";

/// Counts an open tunnel that ended by an error, where this side ended it: its peer broke a bound or the protocol.
pub(super) fn count_end(metrics: &Metrics, error: &h2::Error) {
    // The h2 library watches over streams that are reset, headers that do not end, and small frames; what it ends is its own error.
    if error.is_library() {
        let is_flood = error.reason() == Some(h2::Reason::ENHANCE_YOUR_CALM);
        metrics.count_tunnel(if is_flood { "flood" } else { "protocol_error" });
    }
}

impl Refusal {
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::NoOriginalDestination => "no_original_destination",
            Self::AgentPort => "agent_port",
            Self::DeniedByPolicy => "denied_by_policy",
            Self::PolicyMissing => "policy_missing",
            Self::IdentityMismatch => "identity_mismatch",
            Self::IdentityUnknown => "identity_unknown",
            Self::ServicePortUnknown => "service_port_unknown",
            Self::NoHealthyEndpoint => "no_healthy_endpoint",
            Self::NoLocalEndpoint => "no_local_endpoint",
            Self::DestinationUnknown => "destination_unknown",
            Self::DestinationLost => "destination_lost",
            Self::DestinationPending => "destination_pending",
            Self::PlaintextRefused => "plaintext_refused",
            Self::CertificateMissing => "certificate_missing",
            Self::CertificateExpired => "certificate_expired",
            Self::IdentityRevoked => "identity_revoked",
            Self::RootRemoved => "root_removed",
            Self::Limit => "limit",
            Self::UpstreamLoop => "upstream_loop",
            Self::BadRequest => "bad_request",
            Self::EarlyData => "early_data",
        }
    }
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Connect => "connect",
            Self::Handshake => "handshake",
            Self::Response => "the far side's answer",
        })
    }
}

impl std::fmt::Display for ResetBy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Source => "by the source",
            Self::Destination => "by the destination",
            Self::Idle => "half-closed and silent",
            Self::Memory => "its reader has stalled and memory is short",
            Self::Policy => "cut by a changed policy",
            Self::Settings => "cut by changed settings: its Pod takes nothing in clear",
            Self::Revocation => "cut: a service account was deleted",
            Self::RemovedRoot => "cut: a root is trusted no longer",
            Self::NewHolder => "cut: the peer's address has another holder",
            Self::Protection => "cut: in clear, and its destination is protected now",
        })
    }
}
