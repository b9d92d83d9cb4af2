//! A connection that stays open, with a word on its way all the time.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use mesh_tests::mesh::Mesh;
use mesh_tests::poll::{self, SOON};
use mesh_tests::process::Conversation;

/// mesh-test-app answers it by itself, with the names of its socket's ends.
const NAMES: &str = "?names";

pub struct Stream {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    thread: JoinHandle<Result<()>>,
}

impl Stream {
    pub fn start(mesh: &Mesh, from: &str, to: IpAddr, marker: &str) -> Result<Self> {
        let chat = mesh.app.chat(&mesh.pod(from).place(), to)?;
        let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counted, marker) = (stop.clone(), answered.clone(), marker.to_owned());
        let (own, to) = (mesh.pod(from).own_address(to).to_string(), to.to_string());
        let thread = std::thread::spawn(move || talk(chat, &marker, [&own, &to], &stopped, &counted));
        let stream = Self { stop, answered, thread };
        stream.expect_progress()?;
        Ok(stream)
    }

    /// A hundred words more.
    pub fn expect_progress(&self) -> Result<()> {
        let before = self.answered.load(Ordering::Relaxed);
        poll::until_true("the open connection goes on", SOON, || {
            ensure!(!self.thread.is_finished(), "it has ended");
            Ok(self.answered.load(Ordering::Relaxed) >= before + 100)
        })
    }

    /// How many words came back, each as it was sent.
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

fn talk(mut chat: Conversation, marker: &str, ends: [&str; 2], stop: &AtomicBool, answered: &AtomicU64) -> Result<()> {
    let names = chat.ask(NAMES, SOON)?;
    let [own, peer] = ends;
    let as_asked = names
        .split_once(' ')
        .is_some_and(|(local, remote)| local.contains(own) && remote.contains(peer));
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
