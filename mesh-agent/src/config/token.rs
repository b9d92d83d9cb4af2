//! The token file: everything that a node needs to trust, and to be trusted by, its control plane.

use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use serde::Deserialize;

/// A token file is some 200 bytes.
const MAX_TOKEN_FILE_BYTES: u64 = 16 * 1024;

/// A text that never shows itself in logs.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    #[must_use]
    pub fn new(text: String) -> Self {
        Self(text)
    }
    /// For the one place that sends it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[secret]")
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeToken {
    /// The node's name.
    pub node: String,
    /// Proves to the control plane that the caller is this node.
    pub secret: Secret,
    /// SHA-256 of the DER of the one root that may vouch for the control plane.
    pub root_sha256: [u8; 32],
    /// `host:port` of the control plane.
    pub address: String,
}

#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    #[error("--token-file: {0}")]
    Io(#[from] std::io::Error),
    #[error("--token-file: mode {0:03o} lets others than its owner use it; it must be 0600 or stricter")]
    Permissions(u32),
    #[error("--token-file: {0}")]
    Invalid(String),
}

#[derive(Deserialize)]
struct TokenFile {
    node: String,
    secret: String,
    root_sha256: String,
    address: String,
}

impl NodeToken {
    /// # Errors
    /// The file cannot be read, others may read it, or a field is missing or malformed.
    pub fn read(path: &Path) -> Result<Self, TokenError> {
        let file = File::open(path)?;
        // Of the open file: what is checked is what is read.
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(TokenError::Invalid("is not a regular file".to_owned()));
        }
        let mode = metadata.mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(TokenError::Permissions(mode));
        }
        let mut text = String::new();
        file.take(MAX_TOKEN_FILE_BYTES + 1).read_to_string(&mut text)?;
        if text.len() as u64 > MAX_TOKEN_FILE_BYTES {
            return Err(TokenError::Invalid(format!("has more than {MAX_TOKEN_FILE_BYTES} bytes")));
        }
        Self::parse(&text)
    }

    fn parse(text: &str) -> Result<Self, TokenError> {
        // serde_json's message gives line and field, never a value of a text field that parsed.
        let file: TokenFile = serde_json::from_str(text).map_err(|e| {
            TokenError::Invalid(format!(
                "is no token file: {}",
                e.to_string().split(':').next().unwrap_or_default()
            ))
        })?;
        let field = |name: &str, why: &str| TokenError::Invalid(format!("field `{name}` {why}"));
        if file.node.is_empty() {
            return Err(field("node", "is empty"));
        }
        if file.secret.is_empty() || !file.secret.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(field("secret", "is empty or holds characters that a header cannot"));
        }
        let mut root_sha256 = [0; 32];
        hex::decode_to_slice(&file.root_sha256, &mut root_sha256)
            .map_err(|_| field("root_sha256", "is not 64 hexadecimal digits"))?;
        super::host_and_port(&file.address).map_err(|why| field("address", &why))?;
        Ok(Self {
            node: file.node,
            secret: Secret(file.secret),
            root_sha256,
            address: file.address,
        })
    }
}

/// What is taken can be sent in a header, and names a server.
#[cfg(fuzzing)]
pub(crate) fn fuzz(text: &str) {
    if let Ok(token) = NodeToken::parse(text) {
        assert!(!token.node.is_empty() && token.address.contains(':'));
        assert!(http::HeaderValue::try_from(format!("Bearer {}", token.secret.expose())).is_ok());
    }
}
