//! What is said on a connection between two Pods of the mesh, with somebody who listens on the wire between their nodes.

use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};

use crate::mesh::Mesh;
use crate::poll::SOON;
use crate::suite;
use crate::topology::NodeName;
use crate::wire::Recorder;

/// Fewer answers say that it was cut at once.
const LEAST: u32 = 100;

/// One word and its answer, again and again.
#[derive(Debug)]
pub struct Talk {
    word: String,
    recorder: Recorder,
    answers: JoinHandle<u32>,
}

impl Talk {
    /// From a Pod of node-1 to one of the other.
    ///
    /// # Errors
    /// They cannot speak.
    pub fn begin(mesh: &Mesh, from: &str, to: &str) -> Result<Self> {
        let word = format!("marker-{:016x}", rand::random::<u64>());
        let recorder = Recorder::start(&mesh.topology.node(NodeName::One).netns, "uplink")?;
        let mut chat = mesh.app.chat(&mesh.pod(from).place(), mesh.pod(to).v4.into())?;
        let said = word.clone();
        let answers = std::thread::spawn(move || {
            let mut answers = 0;
            while chat.ask(&said, SOON).is_ok_and(|answer| answer == said) {
                answers += 1;
                std::thread::sleep(Duration::from_millis(1));
            }
            answers
        });
        Ok(Self { word, recorder, answers })
    }

    /// Waits until nobody answers any more.
    ///
    /// # Errors
    /// It was cut at once, or went in clear: when is in the message.
    pub fn end(self, when: &str) -> Result<()> {
        let answers = self.answers.join().map_err(|_| anyhow!("the talk panicked"))?;
        let recording = self.recorder.finish()?;
        suite::say(&format!(
            "{answers} answers until the connection was cut, {} bytes on the wire",
            recording.len_bytes()
        ));
        ensure!(answers > LEAST, "it was cut at once, after {answers} answers");
        ensure!(
            !recording.contains(self.word.as_bytes()),
            "what was said under mutual TLS went in clear when {when}"
        );
        Ok(())
    }
}
