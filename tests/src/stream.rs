//! A connection that stays open, with a word on its way all the time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Result, bail, ensure};

use crate::poll::{self, SOON};
use crate::process::Conversation;

/// mesh-test-app answers it by itself, with the names of its socket's ends.
const NAMES: &str = "?names";

#[derive(Debug)]
pub struct Stream {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    thread: JoinHandle<Result<()>>,
}

impl Stream {
    /// On a `mesh-test-app chat`. The marker is in each word; `ends` are in the names of the socket's own end and of its peer.
    ///
    /// # Errors
    /// Nothing comes back.
    pub fn start(chat: Conversation, ends: [String; 2], marker: &str) -> Result<Self> {
        let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counted, marker) = (stop.clone(), answered.clone(), marker.to_owned());
        let thread = std::thread::spawn(move || talk(chat, &marker, &ends, &stopped, &counted));
        let stream = Self { stop, answered, thread };
        stream.expect_progress()?;
        Ok(stream)
    }

    /// A hundred words more.
    ///
    /// # Errors
    /// They do not come, or the connection has ended.
    pub fn expect_progress(&self) -> Result<()> {
        let before = self.answered.load(Ordering::Relaxed);
        poll::until_true("the open connection goes on", SOON, || {
            ensure!(!self.thread.is_finished(), "it has ended");
            Ok(self.answered.load(Ordering::Relaxed) >= before + 100)
        })
    }

    /// How many words came back, each as it was sent.
    ///
    /// # Errors
    /// One did not, or came otherwise, or the socket was another one.
    pub fn finish(self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.join() {
            Ok(talked) => talked.map(|()| self.answered.load(Ordering::Relaxed)),
            Err(_) => bail!("the stream's thread panicked"),
        }
    }
}

/// Between two words: some hundred a second tell whether one is lost.
const PAUSE: Duration = Duration::from_millis(4);

fn talk(mut chat: Conversation, marker: &str, ends: &[String; 2], stop: &AtomicBool, answered: &AtomicU64) -> Result<()> {
    let names = chat.ask(NAMES, SOON)?;
    let [own, peer] = ends;
    let as_asked = names
        .split_once(' ')
        .is_some_and(|(local, remote)| local.contains(own.as_str()) && remote.contains(peer.as_str()));
    ensure!(as_asked, "from {own} to {peer}, and the socket says {names}");
    let mut number = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        let word = format!("{marker} {number}");
        let heard = chat.ask(&word, SOON)?;
        ensure!(heard == word, "sent {word:?}, heard {heard:?}");
        let now = chat.ask(NAMES, SOON)?;
        ensure!(now == names, "the socket's names were {names}, and are {now}");
        number += 1;
        answered.store(number, Ordering::Relaxed);
        // The wire is recorded, within a bound.
        std::thread::sleep(PAUSE);
    }
    Ok(())
}
