//! What the file says, and what of it may be believed. Without I/O: bytes and the time come in.

use std::time::{Duration, SystemTime};

use mesh_proto::discovery::DeltaDiscoveryResponse;
use prost::Message as _;
use sha2::{Digest, Sha256};

use crate::identity::Identity;
use crate::identity::renewal::RememberedCertificate;

/// Raised when the meaning of the content changes: another version's file is not guessed at.
const MAGIC: &[u8] = b"culvert-memory 1\n";
const DIGEST_BYTES: usize = 32;
/// 100,000 workloads × some 400 B = 40 MB. On tmpfs this is the node's memory. What is larger is not remembered.
pub const MAX_FILE_BYTES: usize = 64 << 20;
/// A state nobody has stood by for so long says little of the mesh now: the life of the certificates beside it. The file of an
/// agent that runs is never older than [`super::REFRESH`], however long its control plane is away.
pub const LONGEST_ABSENCE: Duration = Duration::from_secs(24 * 3600);

/// Why a file is not believed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FileError {
    #[error("it is no memory of this version of the agent")]
    Format,
    #[error("it is damaged")]
    Damaged,
    #[error("it is of the node `{0}`")]
    OtherNode(String),
    #[error("it is of another mesh: its control plane has another root")]
    OtherMesh,
    #[error("it was made before the node started")]
    OtherBoot,
    #[error("it is from more than {} h ago, or from the future", LONGEST_ABSENCE.as_secs() / 3600)]
    Old,
    #[error("it is larger than {MAX_FILE_BYTES} bytes")]
    TooLarge,
}

impl FileError {
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Format => "format",
            Self::Damaged => "damaged",
            Self::OtherNode(_) => "other_node",
            Self::OtherMesh => "other_mesh",
            Self::OtherBoot => "other_boot",
            Self::Old => "old",
            Self::TooLarge => "too_large",
        }
    }
}

/// Whose memory it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    pub node: String,
    /// Of the control plane's root.
    pub root_sha256: [u8; 32],
    /// Addresses and namespaces mean nothing after a reboot.
    pub boot_id: String,
}

/// What is remembered.
#[derive(Debug, Default, PartialEq)]
pub struct Remembered {
    /// By type; see `discovery::Subscriptions::snapshot`.
    pub snapshot: Vec<DeltaDiscoveryResponse>,
    pub certificates: Vec<(Identity, RememberedCertificate)>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Content {
    #[prost(string, tag = "1")]
    node: String,
    #[prost(bytes = "vec", tag = "2")]
    root_sha256: Vec<u8>,
    #[prost(string, tag = "3")]
    boot_id: String,
    #[prost(uint64, tag = "4")]
    written_unix_seconds: u64,
    #[prost(message, repeated, tag = "5")]
    snapshot: Vec<DeltaDiscoveryResponse>,
    #[prost(message, repeated, tag = "6")]
    certificates: Vec<Certificate>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Certificate {
    #[prost(string, tag = "1")]
    identity: String,
    #[prost(string, repeated, tag = "2")]
    answer: Vec<String>,
    #[prost(bytes = "vec", tag = "3")]
    key: Vec<u8>,
}

/// # Errors
/// It would be too large.
pub fn encode(owner: &Owner, remembered: Remembered, now: SystemTime) -> Result<Vec<u8>, FileError> {
    let content = Content {
        node: owner.node.clone(),
        root_sha256: owner.root_sha256.to_vec(),
        boot_id: owner.boot_id.clone(),
        written_unix_seconds: seconds(now),
        snapshot: remembered.snapshot,
        certificates: remembered
            .certificates
            .into_iter()
            .map(|(identity, certificate)| Certificate {
                identity: identity.to_string(),
                answer: certificate.answer,
                key: certificate.key,
            })
            .collect(),
    };
    let head = MAGIC.len() + DIGEST_BYTES;
    let length = head + content.encoded_len();
    if length > MAX_FILE_BYTES {
        return Err(FileError::TooLarge);
    }
    let mut bytes = Vec::with_capacity(length);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&[0; DIGEST_BYTES]);
    content.encode(&mut bytes).map_err(|_| FileError::TooLarge)?;
    let digest = Sha256::digest(&bytes[head..]);
    bytes[MAGIC.len()..head].copy_from_slice(&digest);
    Ok(bytes)
}

/// # Errors
/// It is not to be believed.
pub fn decode(bytes: &[u8], owner: &Owner, now: SystemTime) -> Result<Remembered, FileError> {
    let rest = bytes.strip_prefix(MAGIC).ok_or(FileError::Format)?;
    let (digest, content) = rest.split_at_checked(DIGEST_BYTES).ok_or(FileError::Damaged)?;
    if Sha256::digest(content).as_slice() != digest {
        return Err(FileError::Damaged);
    }
    let content = Content::decode(content).map_err(|_| FileError::Damaged)?;
    if content.node != owner.node {
        return Err(FileError::OtherNode(content.node.chars().take(253).collect()));
    }
    if content.root_sha256 != owner.root_sha256 {
        return Err(FileError::OtherMesh);
    }
    if content.boot_id != owner.boot_id {
        return Err(FileError::OtherBoot);
    }
    if seconds(now).abs_diff(content.written_unix_seconds) > LONGEST_ABSENCE.as_secs() {
        return Err(FileError::Old);
    }
    let certificate = |certificate: Certificate| {
        let identity = Identity::parse(&certificate.identity).map_err(|_| FileError::Damaged)?;
        let Certificate { answer, key, .. } = certificate;
        Ok((identity, RememberedCertificate { answer, key }))
    };
    Ok(Remembered {
        snapshot: content.snapshot,
        certificates: content.certificates.into_iter().map(certificate).collect::<Result<_, _>>()?,
    })
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// A file with a right head. What is believed says the same when it is written again.
#[cfg(fuzzing)]
pub fn fuzz(content: &[u8]) {
    let owner = Owner {
        node: "n".to_owned(),
        root_sha256: [7; 32],
        boot_id: "b".to_owned(),
    };
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
    let file = [MAGIC, &Sha256::digest(content), content].concat();
    if let Ok(remembered) = decode(&file, &owner, now) {
        let again = encode(&owner, remembered, now).and_then(|bytes| {
            let remembered = decode(&bytes, &owner, now)?;
            Ok((encode(&owner, remembered, now)?, bytes))
        });
        let (second, first) = again.unwrap_or_else(|error| panic!("what was believed cannot be written: {error}"));
        assert!(first == second, "what is written is not what was believed");
    }
}
