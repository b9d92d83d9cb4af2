//! Tells the programs that the agent lives. A thread of its own: a runtime whose workers all hang must not look alive through its
//! timers, nor a busy one dead.

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use mesh_common::HEARTBEAT_INTERVAL_MS;

use super::kernel::Kernel;
use super::network::{CaptureError, IoContext};

/// Beats until it is dropped.
pub(super) struct Heartbeat {
    _stop: Sender<()>,
}

impl Heartbeat {
    /// The first beat is done when this returns.
    pub(super) fn start(kernel: Arc<Kernel>) -> Result<Self, CaptureError> {
        kernel.beat()?;
        let (stop, stopped) = channel();
        thread::Builder::new()
            .name("heartbeat".into())
            .spawn(move || {
                let interval = Duration::from_millis(HEARTBEAT_INTERVAL_MS);
                while stopped.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                    if let Err(error) = kernel.beat() {
                        tracing::error!(%error, "the heartbeat cannot be written: connections will be refused when its lease ends");
                    }
                }
            })
            .step("starting the heartbeat's thread")?;
        Ok(Self { _stop: stop })
    }
}
