//! Whether *this* process is ready: while one agent takes over from another, the port for readiness is that of one of them, and
//! who asks there learns nothing of the other. So each listens on a Unix socket of its own, too (in a Pod: in a volume of the
//! Pod's alone), and `mesh-agent ready` asks there.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use http::StatusCode;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::{sleep, timeout};
use tracing::warn;

use crate::admin::Page;

/// One is answered after the other; who does not read its answer is let go of.
const PATIENCE: Duration = Duration::from_secs(2);
const ACCEPT_RETRY: Duration = Duration::from_millis(50);
/// Of an answer: a status and a line of text.
const MAX_ANSWER: u64 = 4_096;

/// Listens; a socket that an earlier process of this container left is replaced.
///
/// # Errors
/// The path cannot be listened on.
pub fn listen(path: &Path) -> anyhow::Result<UnixListener> {
    let failed = || format!("--ready-socket {}", path.display());
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error).with_context(failed),
        _ => {}
    }
    let listener = UnixListener::bind(path).with_context(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).with_context(failed)?;
    Ok(listener)
}

/// Answers until it is dropped.
pub async fn serve(listener: UnixListener, readiness: impl Fn() -> Page) {
    loop {
        let mut stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                warn!(%error, "accept on the --ready-socket");
                sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        let page = readiness();
        let answer = format!("{} {}", page.status.as_u16(), page.body);
        drop(timeout(PATIENCE, stream.write_all(answer.as_bytes())).await);
    }
}

/// What the process there says; with `only_alive`, any answer will do.
///
/// # Errors
/// Nobody answers, or it is not ready: as it says.
pub async fn ask(path: &Path, only_alive: bool) -> anyhow::Result<String> {
    let asked = async {
        let stream = UnixStream::connect(path).await?;
        let mut answer = String::new();
        stream.take(MAX_ANSWER).read_to_string(&mut answer).await?;
        Ok::<_, io::Error>(answer)
    };
    let answer = match timeout(PATIENCE, asked).await {
        Ok(answer) => answer.with_context(|| path.display().to_string())?,
        Err(_) => bail!("{}: no answer within {PATIENCE:?}", path.display()),
    };
    let (status, text) = answer.split_once(' ').context("an answer without a status")?;
    let text = text.trim().to_owned();
    if only_alive || status == StatusCode::OK.as_str() {
        Ok(text)
    } else {
        bail!("{text}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(status: StatusCode, text: &str) -> Page {
        Page::text(status, format!("{text}\n"))
    }

    #[tokio::test]
    async fn it_tells_of_the_process_that_listens_there() {
        let folder = tempfile::tempdir().expect("a folder");
        let (one, other) = (folder.path().join("one"), folder.path().join("other"));
        let serving = [
            tokio::spawn(serve(listen(&one).expect("listens"), || page(StatusCode::OK, "ready"))),
            tokio::spawn(serve(listen(&other).expect("listens"), || {
                page(StatusCode::SERVICE_UNAVAILABLE, "missing: discovery")
            })),
        ];
        assert_eq!(ask(&one, false).await.expect("ready"), "ready");
        let error = ask(&other, false).await.expect_err("not ready").to_string();
        assert_eq!(error, "missing: discovery");
        assert_eq!(ask(&other, true).await.expect("alive"), "missing: discovery");
        serving.iter().for_each(tokio::task::JoinHandle::abort);
        for task in serving {
            drop(task.await);
        }
        // The file is there still, and nobody behind it.
        let error = format!("{:#}", ask(&one, true).await.expect_err("dead"));
        assert!(error.contains("one") && error.contains("refused"), "{error}");
        drop(listen(&one).expect("the next process listens there"));
        assert!(ask(&folder.path().join("none"), true).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn who_answers_nothing_is_not_alive() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        let _silent = listen(&path).expect("listens");
        let error = ask(&path, true).await.expect_err("no answer").to_string();
        assert!(error.contains("no answer within"), "{error}");
    }
}
