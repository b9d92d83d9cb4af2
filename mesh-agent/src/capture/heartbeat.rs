//! Tells the programs that the agent lives: its process by a thread of its own, which no busy runtime holds up, and its runtime by
//! a task, without which that thread falls silent. A runtime whose workers all hang answers nobody, and must not look alive.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use mesh_common::{HEARTBEAT_INTERVAL_MS, HEARTBEAT_LEASE_NS};
use tokio::task::AbortHandle;

use super::kernel::Kernel;
use super::network::{CaptureError, IoContext};

const INTERVAL: Duration = Duration::from_millis(HEARTBEAT_INTERVAL_MS);
/// A runtime without a tick for so long hangs. As long as the lease: from the last tick, connections are refused after twice that.
const LONGEST_SILENCE: Duration = Duration::from_nanos(HEARTBEAT_LEASE_NS);

/// Beats until it is dropped.
pub(super) struct Heartbeat {
    _stop: Sender<()>,
    ticker: AbortHandle,
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        self.ticker.abort();
    }
}

impl Heartbeat {
    /// The first beat is done when this returns. To be called in the runtime whose life it tells.
    pub(super) fn start(kernel: Arc<Kernel>) -> Result<Self, CaptureError> {
        let runtime = tokio::runtime::Handle::try_current().map_err(|error| CaptureError::Other(error.to_string()))?;
        kernel.beat()?;
        let ticks = Arc::new(Ticks::new());
        let ticker = runtime.spawn(tick(ticks.clone())).abort_handle();
        let stop = beat_on_a_thread(ticks, LONGEST_SILENCE, move || kernel.beat())?;
        Ok(Self { _stop: stop, ticker })
    }
}

async fn tick(ticks: Arc<Ticks>) {
    loop {
        ticks.tick();
        tokio::time::sleep(INTERVAL).await;
    }
}

/// Ends when the sender is dropped.
fn beat_on_a_thread(
    ticks: Arc<Ticks>,
    longest_silence: Duration,
    beat: impl Fn() -> Result<(), CaptureError> + Send + 'static,
) -> Result<Sender<()>, CaptureError> {
    let (stop, stopped) = channel();
    let mut is_silent = false;
    let work = move || {
        while stopped.recv_timeout(INTERVAL.min(longest_silence)) == Err(RecvTimeoutError::Timeout) {
            let was_silent = std::mem::replace(&mut is_silent, ticks.silence() > longest_silence);
            if is_silent {
                if !was_silent {
                    tracing::error!(
                        "no task of the agent runs any more: connections will be refused when the heartbeat's lease ends"
                    );
                }
                continue;
            }
            if let Err(error) = beat() {
                tracing::error!(%error, "the heartbeat cannot be written: connections will be refused when its lease ends");
            }
        }
    };
    thread::Builder::new()
        .name("heartbeat".into())
        .spawn(work)
        .step("starting the heartbeat's thread")?;
    Ok(stop)
}

/// When the runtime ran last.
struct Ticks {
    since: Instant,
    last_ms: AtomicU64,
}

impl Ticks {
    fn new() -> Self {
        Self {
            since: Instant::now(),
            last_ms: AtomicU64::new(0),
        }
    }

    fn tick(&self) {
        self.last_ms.store(self.now_ms(), Ordering::Relaxed);
    }

    fn silence(&self) -> Duration {
        Duration::from_millis(self.now_ms().saturating_sub(self.last_ms.load(Ordering::Relaxed)))
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONGEST: Duration = Duration::from_millis(20);

    /// The next beat; none once its thread has been silent for many times as long as it may wait.
    fn next(beats: &std::sync::mpsc::Receiver<()>) -> Option<()> {
        beats.recv_timeout(LONGEST * 50).ok()
    }

    #[test]
    fn a_runtime_that_no_longer_ticks_falls_silent_and_one_that_ticks_again_beats_again() {
        let ticks = Arc::new(Ticks::new());
        let (send, beats) = channel();
        let _stop = beat_on_a_thread(ticks.clone(), LONGEST, move || {
            let _ = send.send(());
            Ok(())
        })
        .unwrap();
        // Stopped from the start: what was sent before it was too long ago comes to an end.
        let stopped = (0..1000).any(|_| next(&beats).is_none());
        assert!(stopped, "it beats though nothing ticks");
        let again = (0..1000).any(|_| {
            ticks.tick();
            beats.try_recv().is_ok() || {
                thread::sleep(LONGEST / 10);
                false
            }
        });
        assert!(again, "it stays silent though the runtime ticks");
    }

    #[test]
    fn a_runtime_ticks() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_time()
            .worker_threads(1)
            .build()
            .unwrap();
        let ticks = Arc::new(Ticks::new());
        thread::sleep(Duration::from_millis(5));
        let ticking = runtime.spawn(tick(ticks.clone()));
        let ticked = (0..10_000).any(|_| {
            thread::sleep(Duration::from_millis(1));
            ticks.last_ms.load(Ordering::Relaxed) > 0
        });
        ticking.abort();
        assert!(ticked);
    }
}
