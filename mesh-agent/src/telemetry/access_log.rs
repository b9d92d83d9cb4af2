use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use super::Metrics;

/// Lines that wait for the writer: 8,192 × about 800 B = 6.5 MB at most. Full: the line is dropped and counted.
pub const QUEUE_LINES: usize = 8_192;
/// Of those, only for connections that were refused or failed: a flood of others does not push them out.
const RESERVED_LINES: usize = QUEUE_LINES / 4;

/// One JSON object a line, written by a thread of its own: a slow disk or pipe holds up no connection.
#[derive(Clone, Debug)]
pub struct AccessLog {
    lines: SyncSender<String>,
    waiting: Arc<AtomicUsize>,
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
        let waiting = Arc::<AtomicUsize>::default();
        let taken = waiting.clone();
        std::thread::Builder::new()
            .name("access-log".into())
            .spawn(move || write_lines(output, &receiver, &taken, &writer_metrics))?;
        Ok(Self {
            lines: sender,
            waiting,
            metrics,
        })
    }

    pub(super) fn write(&self, line: String, is_ok: bool) {
        let room = if is_ok { QUEUE_LINES - RESERVED_LINES } else { QUEUE_LINES };
        let waiting = self.waiting.fetch_add(1, Ordering::Relaxed);
        if waiting >= room || self.lines.try_send(line).is_err() {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            self.metrics.access_log_dropped.inc();
        }
    }

    pub(super) fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }
}

/// Lines that wait are written together, as many whole ones as fit: two agents that write to one file do not tear each other's.
const WRITE_BYTES: usize = 64 * 1024;

fn write_lines(mut output: impl Write, lines: &Receiver<String>, waiting: &AtomicUsize, metrics: &Metrics) {
    let mut is_failing = false;
    while let Ok(first) = lines.recv() {
        let mut text = String::new();
        if is_failing {
            // What failed may have left a part of a line.
            text.push('\n');
        }
        let mut batch = 0_usize;
        for line in std::iter::once(first).chain(lines.try_iter()) {
            text.push_str(&line);
            text.push('\n');
            batch += 1;
            if text.len() >= WRITE_BYTES {
                break;
            }
        }
        waiting.fetch_sub(batch, Ordering::Relaxed);
        let result = output.write_all(text.as_bytes()).and_then(|()| output.flush());
        if let Err(error) = &result {
            metrics.access_log_dropped.inc_by(batch as u64);
            if !is_failing {
                tracing::warn!(%error, "the access log cannot be written; what is lost is counted");
            }
        }
        is_failing = result.is_err();
    }
}

#[cfg(test)]
mod tests {
    use parking_lot::{Condvar, Mutex};

    use super::*;

    /// Whether it takes anything, and what it took.
    type Taken = Mutex<(bool, Vec<u8>)>;

    /// A disk that takes nothing until it is let go.
    #[derive(Clone, Default)]
    struct Disk(Arc<(Taken, Condvar)>);

    impl Disk {
        fn release(&self) {
            self.0.0.lock().0 = true;
            self.0.1.notify_all();
        }

        fn text(&self) -> String {
            String::from_utf8(self.0.0.lock().1.clone()).unwrap()
        }
    }

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut disk = self.0.0.lock();
            while !disk.0 {
                self.0.1.wait(&mut disk);
            }
            disk.1.extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    struct Broken;

    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::Error::other("no space left"))
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn until(what: &str, holds: impl Fn() -> bool) {
        let start = std::time::Instant::now();
        while !holds() {
            assert!(start.elapsed() < std::time::Duration::from_secs(60), "{what}");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }

    #[test]
    fn a_flood_before_a_slow_disk_pushes_out_no_refusal() {
        let (disk, metrics) = (Disk::default(), Metrics::new());
        let log = AccessLog::start(disk.clone(), metrics.clone()).unwrap();
        let flood = 3 * QUEUE_LINES;
        for n in 0..flood {
            log.write(format!("ok {n}"), true);
        }
        let lost = metrics.access_log_dropped.get();
        assert!(
            lost >= (flood - 2 * QUEUE_LINES) as u64,
            "the queue has a bound: {lost} were dropped"
        );
        for n in 0..RESERVED_LINES {
            log.write(format!("refused {n}"), false);
        }
        assert_eq!(metrics.access_log_dropped.get(), lost, "no refusal is among what was dropped");
        disk.release();
        let last = format!("refused {}\n", RESERVED_LINES - 1);
        until("the last refusal is written", || disk.text().ends_with(&last));
        let text = disk.text();
        assert_eq!(
            text.lines().filter(|line| line.starts_with("refused")).count(),
            RESERVED_LINES
        );
        let ok = text.lines().filter(|line| line.starts_with("ok")).count();
        assert_eq!(ok as u64 + lost, flood as u64, "what is not written is counted");
        // And room again for everybody.
        log.write("after".to_owned(), true);
        until("written", || disk.text().ends_with("after\n"));
    }

    #[test]
    fn what_a_broken_disk_loses_is_counted() {
        let metrics = Metrics::new();
        let log = AccessLog::start(Broken, metrics.clone()).unwrap();
        for n in 0..10 {
            log.write(format!("{n}"), n % 2 == 0);
        }
        until("all are counted", || metrics.access_log_dropped.get() == 10);
    }

    /// A disk with room for so many bytes; then full, until it is given more.
    #[derive(Clone)]
    struct Full(Arc<Mutex<(usize, Vec<u8>)>>);

    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let (room, text) = &mut *self.0.lock();
            if *room == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            let some = bytes.len().min(*room);
            *room -= some;
            text.extend_from_slice(&bytes[..some]);
            Ok(some)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn after_a_full_disk_lines_are_whole_again() {
        let (disk, metrics) = (Full(Arc::new(Mutex::new((5, Vec::new())))), Metrics::new());
        let log = AccessLog::start(disk.clone(), metrics.clone()).unwrap();
        log.write("torn by the end of the disk".to_owned(), true);
        until("it is full", || metrics.access_log_dropped.get() == 1);
        disk.0.lock().0 = usize::MAX;
        log.write("whole".to_owned(), true);
        until("written", || disk.0.lock().1.ends_with(b"whole\n"));
        let text = String::from_utf8(disk.0.lock().1.clone()).unwrap();
        assert_eq!(text.lines().collect::<Vec<_>>(), ["torn ", "whole"]);
    }
}
