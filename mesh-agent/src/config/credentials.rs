//! How the agent proves itself to its control plane, and the control plane to it: by a node's token file, or on Kubernetes by the
//! Pod's service-account token and the mesh's published roots. These two files are written anew while the agent runs.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};
use tracing::{info, warn};

use super::{NodeToken, RunArgs, Secret};
use crate::identity::trust::TrustBundle;

#[cfg(test)]
mod tests;

/// A projected service-account token has about 1 KiB.
const MAX_TOKEN_BYTES: u64 = 16 << 10;
/// Sixteen roots of about 1 KiB, and room for verbose ones.
const MAX_ROOTS_BYTES: u64 = 256 << 10;

#[derive(Debug, thiserror::Error)]
#[error("{flag} {}: {problem}", path.display())]
pub struct FileProblem {
    flag: &'static str,
    path: PathBuf,
    problem: String,
}

/// By what this node and its control plane know each other.
#[derive(Debug)]
pub enum Credentials {
    Node {
        token: NodeToken,
        /// Instead of the token's.
        control: Option<String>,
    },
    ServiceAccount(ServiceAccount),
}

/// A Pod's credentials.
#[derive(Debug)]
pub struct ServiceAccount {
    node: String,
    control: String,
    pub token: Arc<TokenFollower>,
    pub roots: Arc<RootsFollower>,
}

impl Credentials {
    /// # Errors
    /// A file of a secret cannot be read.
    pub fn read(args: &RunArgs) -> anyhow::Result<Self> {
        if let Some(path) = &args.token_file {
            return Ok(Self::Node {
                token: NodeToken::read(path)?,
                control: args.control.clone(),
            });
        }
        let (Some(token), Some(roots), Some(control), Some(node)) =
            (&args.service_account_token, &args.control_roots, &args.control, &args.node)
        else {
            anyhow::bail!("give --token-file, or --service-account-token with --control-roots, --control and --node");
        };
        let account = ServiceAccount {
            node: node.clone(),
            control: control.clone(),
            token: Arc::new(TokenFollower::open(token)?),
            roots: Arc::new(RootsFollower::new(roots)),
        };
        // They may not be published yet: then the control plane is tried again until they are.
        if let Err(error) = account.roots.newest() {
            warn!("{error}; the control plane is not believed before");
        }
        Ok(Self::ServiceAccount(account))
    }

    /// The node's name.
    #[must_use]
    pub fn node(&self) -> &str {
        match self {
            Self::Node { token, .. } => &token.node,
            Self::ServiceAccount(account) => &account.node,
        }
    }

    /// `HOST:PORT` of the control plane.
    #[must_use]
    pub fn control(&self) -> &str {
        match self {
            Self::Node { token, control } => control.as_deref().unwrap_or(&token.address),
            Self::ServiceAccount(account) => &account.control,
        }
    }

    /// Tells one mesh from another: what an agent of another one remembered is not believed.
    #[must_use]
    pub fn mesh(&self) -> [u8; 32] {
        match self {
            Self::Node { token, .. } => token.root_sha256,
            // Its roots change over time. Where another mesh took the place of this one, its control plane's first word ends what is
            // remembered.
            Self::ServiceAccount(account) => Sha256::digest(account.control.as_bytes()).into(),
        }
    }
}

/// The token's file, which the kubelet replaces long before the token's end.
#[derive(Debug)]
pub struct TokenFollower {
    path: PathBuf,
    newest: Mutex<Secret>,
}

impl TokenFollower {
    /// # Errors
    /// There is no token in it.
    pub fn open(path: &Path) -> Result<Self, FileProblem> {
        Ok(Self {
            newest: Mutex::new(read_token(path)?),
            path: path.to_owned(),
        })
    }

    /// What the file holds now; while it cannot be read, what it held last. A small file on a tmpfs, at a few calls a minute.
    #[must_use]
    pub fn newest(&self) -> Secret {
        let mut newest = self.newest.lock();
        match read_token(&self.path) {
            Ok(token) => {
                if token != *newest {
                    info!(file = %self.path.display(), "a newer service-account token is in use");
                    *newest = token;
                }
            }
            Err(error) => warn!("{error}; the token of before is sent"),
        }
        if let Some(seconds) = over_for(newest.expose(), unix_seconds()) {
            warn!(
                file = %self.path.display(),
                "the service-account token was over {seconds} s ago: the kubelet has not replaced it, or this node's clock is ahead; \
                 the control plane refuses it until the file holds a newer one"
            );
        }
        newest.clone()
    }
}

fn unix_seconds() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.unwrap_or_default().as_secs()
}

/// Since when a token is over by its own word, in seconds. What is no JWT has none.
fn over_for(token: &str, now_unix_seconds: u64) -> Option<u64> {
    #[derive(serde::Deserialize)]
    struct Claims {
        exp: u64,
    }
    let claims = URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?;
    let end = serde_json::from_slice::<Claims>(&claims).ok()?.exp;
    (end <= now_unix_seconds).then(|| now_unix_seconds - end)
}

fn read_token(path: &Path) -> Result<Secret, FileProblem> {
    let problem = |problem: String| FileProblem {
        flag: "--service-account-token",
        path: path.to_owned(),
        problem,
    };
    let text = read(path, MAX_TOKEN_BYTES).map_err(problem)?;
    let token = text.trim();
    if token.is_empty() || !token.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(problem("is empty or holds characters that a header cannot".to_owned()));
    }
    Ok(Secret::new(token.to_owned()))
}

/// The file of the mesh's roots, which the kubelet replaces when the control plane publishes others.
#[derive(Debug)]
pub struct RootsFollower {
    path: PathBuf,
    newest: Mutex<Option<Arc<TrustBundle>>>,
}

impl RootsFollower {
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            newest: Mutex::default(),
        }
    }

    /// What the file holds now; while it cannot be used, what it held last.
    ///
    /// # Errors
    /// It never held any roots.
    pub fn newest(&self) -> Result<Arc<TrustBundle>, FileProblem> {
        let read = read(&self.path, MAX_ROOTS_BYTES).and_then(|text| TrustBundle::from_pem(&[text]));
        let mut newest = self.newest.lock();
        match (read, newest.as_ref()) {
            (Ok(read), Some(known)) if read == **known => Ok(known.clone()),
            (Ok(read), _) => {
                info!(file = %self.path.display(), roots = read.len(), "the control plane proves itself by these roots");
                Ok(newest.insert(Arc::new(read)).clone())
            }
            (Err(problem), Some(known)) => {
                warn!("{}; the roots of before count", self.problem(problem));
                Ok(known.clone())
            }
            (Err(problem), None) => Err(self.problem(problem)),
        }
    }

    fn problem(&self, problem: String) -> FileProblem {
        FileProblem {
            flag: "--control-roots",
            path: self.path.clone(),
            problem,
        }
    }
}

/// A whole file of text, bounded.
fn read(path: &Path, most: u64) -> Result<String, String> {
    let mut text = String::new();
    let file = File::open(path).map_err(|error| error.to_string())?;
    file.take(most + 1)
        .read_to_string(&mut text)
        .map_err(|error| error.to_string())?;
    if text.len() as u64 > most {
        return Err(format!("is larger than {most} bytes"));
    }
    Ok(text)
}
