//! The CNI plugin's socket: one request and one answer a connection, root only; and the list of namespaces that the plugin decides
//! by when no agent answers.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mesh_cni::protocol::{Answer, Command, MAX_MESSAGE_BYTES, NamespaceList, Request, list_path, socket_path};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tracing::{debug, error, warn};

use super::socket::{LocalSocket, is_allowed};
use crate::cni_install;
use crate::discovery::node_pods::{NodeList, NodeLists};
use crate::pods::Pods;
use crate::pods::cni::{CniPod, Verdict};

/// Pods that start or end at the same time; more wait in the socket's queue.
const CONCURRENT: usize = 64;
/// A request comes at once, or not.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
const ACCEPT_RETRY: Duration = Duration::from_millis(50);
/// A list that could not be written is tried again after this.
const LIST_RETRY: Duration = Duration::from_secs(5);

/// In the place of what an agent before has left.
///
/// # Errors
/// The socket cannot be made.
pub fn listen(run_dir: &Path) -> io::Result<UnixListener> {
    super::listen_at(&socket_path(run_dir))
}

/// For ever.
pub async fn serve(listener: UnixListener, counted_by: Arc<LocalSocket>, pods: Arc<Pods>, lists: NodeLists) {
    let turns = Arc::new(Semaphore::new(CONCURRENT));
    loop {
        let Ok(turn) = turns.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) if stream.peer_cred().is_ok_and(|peer| is_allowed(peer.uid())) => {
                let (pods, lists) = (pods.clone(), lists.clone());
                // In a task of its own: a plugin that is killed leaves no half-made enrolment.
                tokio::spawn(async move {
                    if let Err(error) = answer(stream, &pods, lists).await {
                        debug!(%error, "a request of the CNI plugin");
                    }
                    drop(turn);
                });
            }
            Ok(_) => {
                counted_by.count_refused();
                warn!("the CNI plugin's socket is root's only; connection refused");
            }
            Err(error) => {
                warn!(%error, "accept on the CNI plugin's socket");
                sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

async fn answer(mut stream: UnixStream, pods: &Arc<Pods>, lists: NodeLists) -> io::Result<()> {
    let mut line = Vec::new();
    let (reader, mut writer) = stream.split();
    let mut reader = BufReader::new(reader).take(MAX_MESSAGE_BYTES as u64);
    timeout(REQUEST_TIMEOUT, reader.read_until(b'\n', &mut line))
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    let answer = match serde_json::from_slice::<Request>(&line) {
        Ok(request) => handle(request, pods, lists).await,
        Err(error) => Answer::Failed {
            why: format!("the request is none that this agent knows: {error}"),
        },
    };
    let mut text = serde_json::to_vec(&answer).map_err(io::Error::other)?;
    text.push(b'\n');
    writer.write_all(&text).await
}

async fn handle(request: Request, pods: &Arc<Pods>, lists: NodeLists) -> Answer {
    let Request {
        command,
        uid,
        namespace,
        name,
        netns,
        addresses,
    } = request;
    let pod = CniPod {
        uid: uid.as_str().into(),
        namespace,
        name,
        netns: PathBuf::from(netns),
        addresses,
    };
    let verdict = match command {
        Command::Add => pods.clone().add_by_cni(pod, lists).await,
        Command::Check => pods.check_by_cni(&pod, &lists),
        Command::Del => pods.clone().delete_by_cni(pod).await,
    };
    match verdict {
        Verdict::Done => Answer::Done,
        Verdict::NotAMember(why) => Answer::NotAMember { why },
        Verdict::Failed(why) => {
            warn!(%uid, ?command, "the CNI plugin is told that it failed: {why}");
            Answer::Failed { why }
        }
    }
}

/// Writes the list at each change, for ever. While the control plane is away, and when the agent ends, it stays.
pub async fn keep_list(run_dir: PathBuf, elsewhere: Option<PathBuf>, mut lists: NodeLists) {
    let path = elsewhere.unwrap_or_else(|| list_path(&run_dir));
    loop {
        let list = lists.borrow_and_update().clone();
        let written = match list {
            Some(list) => {
                let path = path.clone();
                tokio::task::spawn_blocking(move || write_list(&path, &list))
                    .await
                    .unwrap_or(Ok(()))
            }
            None => Ok(()),
        };
        if let Err(error) = written {
            error!(path = %path.display(), %error, "the list for the CNI plugin cannot be written: it decides by an older one");
            sleep(LIST_RETRY).await;
        } else if lists.changed().await.is_err() {
            return;
        }
    }
}

fn write_list(path: &Path, list: &NodeList) -> io::Result<()> {
    let namespaces = list.namespaces.clone();
    let text = serde_json::to_vec(&NamespaceList { namespaces }).map_err(io::Error::other)?;
    // Nothing secret: and who debugs a Pod that does not start reads it.
    cni_install::replace(path, &text, 0o644, None)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn the_plugin_reads_the_list_that_the_agent_writes() {
        let folder = tempfile::tempdir().unwrap();
        let path = list_path(folder.path());
        assert_eq!(NamespaceList::read(&path).unwrap(), None);
        let namespaces = [("shop".to_owned(), false), ("batch".to_owned(), true)].into();
        let list = NodeList {
            namespaces,
            ..NodeList::default()
        };
        for _ in 0..2 {
            write_list(&path, &list).unwrap();
            assert_eq!(NamespaceList::read(&path).unwrap().unwrap().namespaces, list.namespaces);
        }
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "a temporary file stayed");
        fs::write(&path, "{").unwrap();
        assert!(NamespaceList::read(&path).is_err());
    }
}
