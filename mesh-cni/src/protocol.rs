//! What plugin and agent say to each other: one line of JSON each, over a Unix socket that is root's alone; and the list of
//! namespaces that the agent leaves for the times when it does not answer.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Name of the plugin's binary, and its `type` in a network configuration.
pub const PLUGIN: &str = "mesh-cni";
/// Bytes of a request or an answer: some names, some addresses, a reason.
pub const MAX_MESSAGE_BYTES: usize = 16 * 1024;
/// Bytes of the list: 4,096 names of at most 253 B, as JSON.
const MAX_LIST_BYTES: u64 = 4 << 20;

/// In the agent's run directory.
#[must_use]
pub fn socket_path(run_dir: &Path) -> PathBuf {
    run_dir.join("cni.sock")
}

/// In the agent's run directory, unless it was told another place.
#[must_use]
pub fn list_path(run_dir: &Path) -> PathBuf {
    run_dir.join("cni-namespaces.json")
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Command {
    Add,
    Check,
    Del,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    pub command: Command,
    /// The Pod's `metadata.uid`.
    pub uid: String,
    pub namespace: String,
    pub name: String,
    /// Path of the network namespace; may be empty or gone at DEL.
    pub netns: String,
    /// What the plugins before have given the Pod; none at DEL.
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "snake_case")]
pub enum Answer {
    /// ADD: captured, proven and with a certificate. CHECK: still so. DEL: nothing of it is left.
    Done,
    /// Not to be in the mesh.
    NotAMember {
        why: String,
    },
    Failed {
        why: String,
    },
}

/// Which namespaces are in the mesh, as the agent last knew.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamespaceList {
    /// Name → whether its Pods start even where they cannot be enrolled.
    pub namespaces: BTreeMap<String, bool>,
}

impl NamespaceList {
    /// `None`: there is none.
    ///
    /// # Errors
    /// It cannot be read, or is no such list.
    pub fn read(path: &Path) -> io::Result<Option<Self>> {
        let file = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        let mut text = Vec::new();
        file.take(MAX_LIST_BYTES).read_to_end(&mut text)?;
        serde_json::from_slice(&text).map(Some).map_err(io::Error::other)
    }
}
