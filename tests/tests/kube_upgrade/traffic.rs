//! What is open and what is new while agents are replaced, and what of it is on the wire.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::app::HTTP_PORT;
use mesh_tests::binaries;
use mesh_tests::kube::Cluster;
use mesh_tests::kube::load::under_load;
use mesh_tests::kube::open::{Open, addresses, marker};
use mesh_tests::poll::SOON;
use mesh_tests::wire::Recorder;

/// While something is done, no new connection fails, every open one goes on, and nothing of them can be read between the nodes.
pub fn under_traffic(cluster: &Cluster, open: &Open, what: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let recorder = Recorder::start(cluster.node(1).netns(), "eth0")?;
    under_load(cluster, what, work)?;
    open.expect_progress().with_context(|| format!("after {what}"))?;
    // The search is not blind: what the node itself asks for goes in clear.
    let outside = marker();
    let server = SocketAddr::new(addresses(cluster, "server")?[0], HTTP_PORT);
    let program = binaries::path("mesh-test-app")?.display().to_string();
    let ask = [program.as_str(), "get", &format!("http://{server}/{outside}")];
    cluster.node(1).run(&ask, SOON)?.ok("the node's own request")?;
    let recording = recorder.finish()?;
    ensure!(
        recording.contains(outside.as_bytes()),
        "the node's marker is not on the wire: the search is blind"
    );
    ensure!(
        !recording.contains(open.marker().as_bytes()),
        "during {what} the client's marker passed between the nodes in clear"
    );
    Ok(())
}
