//! The thread that follows the registry folder.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{Folder, LastGood, Registry};
use crate::control_plane::ControlPlane;
use crate::limits::MAX_FILLED_BYTES;
use crate::state_dir::{StateDir, StateError};

/// There once something was in force; see [`Registry::emptied`].
const FILLED: &str = "registry-filled";

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
        let folder = Folder::new(path, control.bounds.folder_bytes);
        let mut watch = folder.watch();
        let kept = LastGood::load(&state, control.bounds.last_good_bytes)?;
        let mut registry = kept.clone().map(Registry::restore).unwrap_or_default();
        let filled = state.read(FILLED, MAX_FILLED_BYTES)?.is_some();
        if filled {
            registry = registry.filled_before();
        }
        let mut kept = Kept {
            state,
            last_good: kept,
            filled,
            failed: false,
        };
        registry.apply(&folder.scan()?);
        if registry.emptied() {
            control.set_registry_problem(Some(emptied(path)));
            // Last good forms are all that was in force. Without them nothing is told: who has a state keeps it.
            if !registry.world().is_empty() {
                control.set_world(&registry);
            }
        } else {
            kept.keep(&registry, &control);
            control.set_world(&registry);
        }
        let wake = Box::new(watch.waker());
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let path = path.to_owned();
        let follow = move || loop {
            watch.wait();
            if stopped.load(Ordering::Acquire) {
                return;
            }
            let scan = folder.scan().map_err(|error| error.to_string());
            let read = scan.and_then(|scan| {
                let changed = registry.apply(&scan);
                if registry.emptied() {
                    Err(emptied(&path))
                } else {
                    Ok(changed)
                }
            });
            match read {
                Ok(changed) => {
                    if control.registry_problem().is_some() {
                        // Another directory may be there now; the old watch sees nothing of it.
                        watch = watch.renewed(&folder);
                        control.set_registry_problem(None);
                    }
                    if changed || !control.is_ready() {
                        kept.keep(&registry, &control);
                        control.set_world(&registry);
                    } else if kept.failed {
                        // The disk may have room again.
                        kept.keep(&registry, &control);
                    }
                }
                Err(problem) => control.set_registry_problem(Some(problem)),
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

fn emptied(path: &Path) -> String {
    format!(
        "registry folder {}: nothing in it is for the mesh, though there was before, so it is taken for lost; \
         to empty the mesh leave one manifest in it, such as a Namespace",
        path.display()
    )
}

/// What is written down because the folder alone would not say it after a restart.
struct Kept {
    state: StateDir,
    last_good: Option<LastGood>,
    filled: bool,
    /// The last try.
    failed: bool,
}

impl Kept {
    /// Call before it comes into force.
    fn keep(&mut self, registry: &Registry, control: &ControlPlane) {
        let failed = |error: StateError, what: &str| {
            control.metrics.state_writes_failed.inc();
            tracing::error!(%error, "{what}");
            true
        };
        self.failed = false;
        if !self.filled && !registry.world().is_empty() {
            match self.state.write(FILLED, b"") {
                Ok(()) => self.filled = true,
                Err(error) => {
                    self.failed = failed(
                        error,
                        "it cannot be kept that the registry has content; after a restart, an empty folder would be believed",
                    );
                }
            }
        }
        let now = registry.last_good();
        if now == self.last_good {
            return;
        }
        match LastGood::save(now.as_ref(), &self.state, control.bounds.last_good_bytes) {
            Ok(()) => self.last_good = now,
            // Another try would change nothing: the next is when the manifests have changed.
            Err(error @ StateError::TooLarge { .. }) => {
                failed(
                    error,
                    "too many broken or contested manifests for their last good forms to be kept: mend them; after a restart, what is \
                     broken now would be in force as it was last kept, or not at all",
                );
            }
            Err(error) => {
                self.failed = failed(
                    error,
                    "last good forms cannot be kept; after a restart, what is broken now would not be in force",
                );
            }
        }
    }
}
