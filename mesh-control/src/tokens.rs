//! Node tokens: made by `node-token`, checked at every call.
//!
//! A secret is `<node>.<256 random bits>`, so that a check reads one small file; the file has only its SHA-256. (A fast hash
//! is enough for 256 random bits.)

use std::net::{IpAddr, SocketAddr};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rand::TryRngCore as _;
use rand::rngs::OsRng;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

use crate::limits::{MAX_NODES, MAX_TOKEN_BYTES};
use crate::registry::is_name;
use crate::state_dir::{StateDir, StateError};

#[cfg(test)]
mod tests;

const NODES: &str = "nodes";

#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    #[error("{0:?} is no node's name; give lower-case letters, digits, '-' and '.', at most 253")]
    NodeName(String),
    #[error("{0:?} is no address; give HOST:PORT as the node reaches this control plane, IPv6 in brackets")]
    Address(String),
    #[error("node {0:?} has a token already; --rotate replaces it (the agent with the old one is cut off within seconds)")]
    Exists(String),
    #[error("there are {MAX_NODES} nodes already")]
    TooMany,
    #[error("no randomness from the system: {0}")]
    Random(String),
    #[error(transparent)]
    State(#[from] StateError),
}

/// Why a caller was not let in. Callers are told none of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("no bearer token")]
    Missing,
    #[error("no such token")]
    Unknown,
    #[error("a token of another node")]
    OtherNode,
    #[error("the token's record cannot be read")]
    Unreadable,
    #[error("the token is over; the kubelet replaces an agent's long before, or a clock is wrong")]
    Expired,
    #[error("a token for another audience")]
    OtherAudience,
    #[error("a token of another service account")]
    OtherAccount,
    #[error("a token that is not bound to a Pod on a node; Kubernetes 1.32 and later name the node in a projected token")]
    Unbound,
    #[error("the API server cannot be asked whose token it is")]
    Unreviewed,
    #[error("too many callers wait for the API server's word")]
    Crowded,
}

impl Refusal {
    pub const ALL: [Self; 10] = [
        Self::Missing,
        Self::Unknown,
        Self::OtherNode,
        Self::Unreadable,
        Self::Expired,
        Self::OtherAudience,
        Self::OtherAccount,
        Self::Unbound,
        Self::Unreviewed,
        Self::Crowded,
    ];

    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Unknown => "unknown",
            Self::OtherNode => "other_node",
            Self::Unreadable => "unreadable",
            Self::Expired => "expired",
            Self::OtherAudience => "other_audience",
            Self::OtherAccount => "other_account",
            Self::Unbound => "unbound",
            Self::Unreviewed => "unreviewed",
            Self::Crowded => "crowded",
        }
    }

    /// Says nothing against the caller: the same call may be taken later.
    #[must_use]
    pub fn is_passing(self) -> bool {
        matches!(self, Self::Unreviewed | Self::Crowded)
    }
}

#[derive(Serialize, Deserialize)]
struct Record {
    node: String,
    secret_sha256: String,
    /// HOST:PORT by which the node reaches the control plane: its serving certificate must name the host.
    address: String,
}

/// What a node's agent starts from.
#[derive(Serialize, Deserialize)]
pub struct TokenFile {
    pub node: String,
    pub secret: String,
    pub root_sha256: String,
    pub address: String,
}

#[derive(Clone, Debug)]
pub struct Tokens {
    dir: StateDir,
}

impl Tokens {
    /// # Errors
    /// The state folder cannot be used.
    pub fn open(state: &StateDir) -> Result<Self, StateError> {
        Ok(Self {
            dir: state.sub_dir(NODES)?,
        })
    }

    /// Makes a node's token.
    ///
    /// # Errors
    /// The name or the address is none, the node has one already, or the disk's.
    pub fn issue(&self, node: &str, address: &str, root_sha256: &str, rotate: bool) -> Result<TokenFile, TokenError> {
        if !is_name(node) {
            return Err(TokenError::NodeName(node.to_owned()));
        }
        host_of(address).ok_or_else(|| TokenError::Address(address.to_owned()))?;
        if !rotate && self.dir.list(MAX_NODES)?.len() >= MAX_NODES {
            return Err(TokenError::TooMany);
        }
        let mut random = [0; 32];
        OsRng
            .try_fill_bytes(&mut random)
            .map_err(|error| TokenError::Random(error.to_string()))?;
        let secret = format!("{node}.{}", URL_SAFE_NO_PAD.encode(random));
        let record = Record {
            node: node.to_owned(),
            secret_sha256: hex::encode(Sha256::digest(secret.as_bytes())),
            address: address.to_owned(),
        };
        let name = format!("{node}.json");
        let content = serde_json::to_vec_pretty(&record).map_err(|error| StateError::content(self.dir.path(), error))?;
        if rotate {
            self.dir.write(&name, &content)?;
        } else if !self.dir.write_new(&name, &content)? {
            return Err(TokenError::Exists(node.to_owned()));
        }
        Ok(TokenFile {
            node: node.to_owned(),
            secret,
            root_sha256: root_sha256.to_owned(),
            address: address.to_owned(),
        })
    }

    /// The node that a secret belongs to.
    ///
    /// # Errors
    /// Why not.
    pub fn authenticate(&self, secret: &str) -> Result<String, Refusal> {
        let (node, _) = secret.rsplit_once('.').ok_or(Refusal::Unknown)?;
        // The name becomes a path.
        if !is_name(node) {
            return Err(Refusal::Unknown);
        }
        let record = match self.record(&format!("{node}.json")) {
            Ok(Some(record)) => record,
            Ok(None) => return Err(Refusal::Unknown),
            Err(error) => {
                tracing::error!(%error, "a node's token cannot be checked");
                return Err(Refusal::Unreadable);
            }
        };
        let known = hex::decode(&record.secret_sha256).unwrap_or_default();
        let given = Sha256::digest(secret.as_bytes());
        if record.node == node && bool::from(known.as_slice().ct_eq(given.as_slice())) {
            Ok(record.node)
        } else {
            Err(Refusal::Unknown)
        }
    }

    /// Hosts by which nodes reach the control plane.
    ///
    /// # Errors
    /// The folder cannot be read. Records that cannot be are left out.
    pub fn hosts(&self) -> Result<Vec<String>, StateError> {
        let mut hosts = Vec::new();
        for name in self.dir.list(MAX_NODES)? {
            if let Ok(Some(record)) = self.record(&name) {
                hosts.extend(host_of(&record.address));
            }
        }
        hosts.sort();
        hosts.dedup();
        Ok(hosts)
    }

    fn record(&self, name: &str) -> Result<Option<Record>, StateError> {
        let Some(bytes) = self.dir.read(name, MAX_TOKEN_BYTES)? else {
            return Ok(None);
        };
        serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|error| StateError::content(&self.dir.path().join(name), error))
    }
}

/// The host of HOST:PORT.
fn host_of(address: &str) -> Option<String> {
    if let Ok(address) = address.parse::<SocketAddr>() {
        return (address.port() != 0).then(|| address.ip().to_string());
    }
    let (host, port) = address.rsplit_once(':')?;
    let is_host = is_name(&host.to_ascii_lowercase()) && host.parse::<IpAddr>().is_err();
    (is_host && port.parse::<u16>().is_ok_and(|port| port != 0)).then(|| host.to_owned())
}

/// A node's record. The host in it is one that a certificate can name.
#[cfg(fuzzing)]
pub(crate) fn fuzz(bytes: &[u8]) {
    if let Ok(record) = serde_json::from_slice::<Record>(bytes)
        && let Some(host) = host_of(&record.address)
    {
        assert!(host.parse::<IpAddr>().is_ok() || is_name(&host.to_ascii_lowercase()));
    }
}
