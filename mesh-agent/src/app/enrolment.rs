//! What `--follow-pods` starts: the list of the node's Pods, who follows it, and the CNI plugin's side of it.

use std::sync::Arc;

use anyhow::Context as _;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::until;
use crate::cni_install;
use crate::config::RunArgs;
use crate::discovery::node_pods;
use crate::discovery::transport::ControlPlane;
use crate::local::{self, LocalSocket};
use crate::pods::following::{Followed, Following};
use crate::pods::{Pods, probe_ports};

pub(super) struct Parts {
    pub control: ControlPlane,
    pub pods: Arc<Pods>,
    pub socket: Arc<LocalSocket>,
    pub shown: Arc<Mutex<Followed>>,
}

/// Until `alone` is over: of two agents only one may.
///
/// # Errors
/// The CNI plugin's socket cannot be made.
pub(super) fn follow(args: &RunArgs, parts: Parts, tasks: &TaskTracker, alone: &CancellationToken) -> anyhow::Result<()> {
    let (lists, of_node) = watch::channel(None);
    tasks.spawn(node_pods::run(parts.control, lists, alone.clone()));
    let namespace_list = args.cni_namespace_list.clone();
    tasks.spawn(until(
        alone.clone(),
        local::cni::keep_list(args.run_dir.clone(), namespace_list.clone(), of_node.clone()),
    ));
    if let Some(conf_dir) = args.cni_conf_dir.clone() {
        tasks.spawn(until(
            alone.clone(),
            cni_install::keep(conf_dir, args.run_dir.clone(), namespace_list),
        ));
    }
    let plugins = local::cni::listen(&args.run_dir).context("the CNI plugin's socket")?;
    tasks.spawn(until(
        alone.clone(),
        local::cni::serve(plugins, parts.socket, parts.pods.clone(), of_node.clone()),
    ));
    tasks.spawn(until(alone.clone(), probe_ports::follow(parts.pods.clone(), of_node.clone())));
    tasks.spawn(until(alone.clone(), Following::new(parts.pods, of_node, parts.shown).run()));
    Ok(())
}
