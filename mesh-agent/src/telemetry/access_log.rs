use std::fs::OpenOptions;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use super::Metrics;

/// Lines that wait for the writer: 8,192 × about 800 B = 6.5 MB at most. Full: the line is dropped and counted.
pub const QUEUE_LINES: usize = 8_192;

/// One JSON object a line, written by a thread of its own: a slow disk or pipe holds up no connection.
#[derive(Clone, Debug)]
pub struct AccessLog {
    lines: SyncSender<String>,
    metrics: Arc<Metrics>,
}

impl AccessLog {
    /// Appends to a file that only root can read: it tells who talks to whom.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn to_file(path: &Path, metrics: Arc<Metrics>) -> io::Result<Self> {
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
        Self::start(file, metrics)
    }

    /// # Errors
    /// The writer's thread cannot be started.
    pub fn to_stdout(metrics: Arc<Metrics>) -> io::Result<Self> {
        Self::start(io::stdout(), metrics)
    }

    fn start(output: impl Write + Send + 'static, metrics: Arc<Metrics>) -> io::Result<Self> {
        let (sender, receiver) = sync_channel(QUEUE_LINES);
        let writer_metrics = metrics.clone();
        std::thread::Builder::new()
            .name("access-log".into())
            .spawn(move || write_lines(output, &receiver, &writer_metrics))?;
        Ok(Self { lines: sender, metrics })
    }

    pub(super) fn write(&self, line: String) {
        if self.lines.try_send(line).is_err() {
            self.metrics.access_log_dropped.inc();
        }
    }

    pub(super) fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }
}

fn write_lines(output: impl Write, lines: &Receiver<String>, metrics: &Metrics) {
    let mut output = BufWriter::with_capacity(64 * 1024, output);
    while let Ok(first) = lines.recv() {
        // Everything that waits goes into one write; then the reader sees it.
        let mut batch = 1;
        let mut result = writeln!(output, "{first}");
        for line in lines.try_iter().take(QUEUE_LINES) {
            batch += 1;
            result = result.and_then(|()| writeln!(output, "{line}"));
        }
        if let Err(error) = result.and_then(|()| output.flush()) {
            metrics.access_log_dropped.inc_by(batch);
            tracing::warn!(%error, "the access log cannot be written");
        }
    }
}
