//! The thread that follows the registry folder.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{Folder, LastGood, Registry};
use crate::control_plane::ControlPlane;
use crate::state_dir::StateDir;

pub struct Follow {
    stop: Arc<AtomicBool>,
    wake: Box<dyn Fn() + Send + Sync>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Follow {
    /// The folder must be readable at start: a wrong path is said at once. Later it may vanish and come back.
    ///
    /// # Errors
    /// The folder cannot be read, or [`LastGood::load`] fails: what was in force is then not known.
    pub fn start(path: &Path, state: StateDir, control: Arc<ControlPlane>) -> anyhow::Result<Self> {
        let folder = Folder::new(path);
        let mut watch = folder.watch();
        let mut kept = LastGood::load(&state)?;
        let mut registry = kept.clone().map(Registry::restore).unwrap_or_default();
        registry.apply(&folder.scan()?);
        keep(&registry, &mut kept, &state, &control);
        control.set_world(registry.world(), registry.rejections());
        let wake = Box::new(watch.waker());
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let follow = move || {
            let mut was_readable = true;
            loop {
                watch.wait();
                if stopped.load(Ordering::Acquire) {
                    return;
                }
                match folder.scan() {
                    Ok(scan) => {
                        if !was_readable {
                            // Another directory may be there now; the old watch sees nothing of it.
                            watch = watch.renewed(&folder);
                            tracing::info!("the registry folder can be read again");
                        }
                        was_readable = true;
                        if registry.apply(&scan) {
                            keep(&registry, &mut kept, &state, &control);
                            control.set_world(registry.world(), registry.rejections());
                        }
                    }
                    Err(error) => {
                        control.metrics.registry_reads_failed.inc();
                        if was_readable {
                            tracing::error!("{error}; everything that was read stays in force");
                        }
                        was_readable = false;
                    }
                }
            }
        };
        let thread = std::thread::Builder::new().name("registry".to_owned()).spawn(follow)?;
        Ok(Self {
            stop,
            wake,
            thread: Some(thread),
        })
    }

    pub fn stop(mut self) {
        self.stop.store(true, Ordering::Release);
        (self.wake)();
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// Writes down what the folder alone would not say after a restart; before it comes into force.
fn keep(registry: &Registry, kept: &mut Option<LastGood>, state: &StateDir, control: &ControlPlane) {
    let now = registry.last_good();
    if now == *kept {
        return;
    }
    match LastGood::save(now.as_ref(), state) {
        Ok(()) => *kept = now,
        Err(error) => {
            control.metrics.state_writes_failed.inc();
            tracing::error!(%error, "last good forms cannot be kept; after a restart, what is broken now would not be in force");
        }
    }
}
