//! How many streams a node has open: counted and bounded, for one node's token must not take what all need.

use std::sync::Arc;

use tonic::Status;

use crate::control_plane::{ControlPlane, NodeStatus};
use crate::limits::MAX_STREAMS_PER_NODE;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamKind {
    Discovery,
    Reports,
    Pods,
}

/// A node's open stream, until it is dropped.
pub struct NodeStream {
    control: Arc<ControlPlane>,
    node: String,
    kind: StreamKind,
    /// Of reports: there is room for what they say of enforcement.
    has_room: bool,
}

impl NodeStream {
    /// # Errors
    /// `RESOURCE_EXHAUSTED`: the node has [`MAX_STREAMS_PER_NODE`] of the kind.
    pub fn open(control: &Arc<ControlPlane>, node: &str, kind: StreamKind) -> Result<Self, Status> {
        let opened = control.with_node(node, |status| {
            let count = count(status, kind);
            let room = *count < MAX_STREAMS_PER_NODE;
            *count += usize::from(room);
            room
        });
        if !opened {
            control.metrics.streams_cut.with_label_values(&["too_many"]).inc();
            tracing::warn!(node, ?kind, "a stream refused: the node has {MAX_STREAMS_PER_NODE} already");
            return Err(Status::resource_exhausted("the node has too many streams already"));
        }
        if kind == StreamKind::Discovery {
            control.metrics.streams.inc();
        }
        let has_room = kind == StreamKind::Reports && control.reports_begin(node);
        Ok(Self {
            control: Arc::clone(control),
            node: node.to_owned(),
            kind,
            has_room,
        })
    }
}

impl Drop for NodeStream {
    fn drop(&mut self) {
        self.control.with_node(&self.node, |status| *count(status, self.kind) -= 1);
        match self.kind {
            StreamKind::Discovery => self.control.metrics.streams.dec(),
            StreamKind::Reports => self.control.reports_end(&self.node, self.has_room),
            StreamKind::Pods => {}
        }
    }
}

fn count(status: &mut NodeStatus, kind: StreamKind) -> &mut usize {
    match kind {
        StreamKind::Discovery => &mut status.discovery_streams,
        StreamKind::Reports => &mut status.report_streams,
        StreamKind::Pods => &mut status.pods_streams,
    }
}
