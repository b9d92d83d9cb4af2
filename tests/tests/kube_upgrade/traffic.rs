//! What is open and what is new while agents are replaced, and what of it is on the wire.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::app::{ECHO_PORT, HTTP_PORT};
use mesh_tests::binaries;
use mesh_tests::kube::Cluster;
use mesh_tests::kube::load::{inside, under_load};
use mesh_tests::kube::shop::SHOP;
use mesh_tests::poll::SOON;
use mesh_tests::stream::Stream;
use mesh_tests::wire::Recorder;

/// Connections of Pods that stay open, with a word on its way on each all the time.
pub struct Open {
    marker: String,
    streams: Vec<Stream>,
}

impl Open {
    /// One over IPv4, one over IPv6.
    pub fn between(cluster: &Cluster, from: &str, to: &str) -> Result<Self> {
        let mut open = Self {
            marker: marker(),
            streams: Vec::new(),
        };
        open.more(cluster, from, to)?;
        Ok(open)
    }

    /// Two more.
    pub fn more(&mut self, cluster: &Cluster, from: &str, to: &str) -> Result<()> {
        let pod = inside(cluster, from)?;
        for (own, peer) in addresses(cluster, from)?.into_iter().zip(addresses(cluster, to)?) {
            let chat = pod.chat(cluster, SocketAddr::new(peer, ECHO_PORT))?;
            let ends = [own, peer].map(|end| end.to_string());
            self.streams.push(Stream::start(chat, ends, &self.marker)?);
        }
        Ok(())
    }

    fn expect_progress(&self) -> Result<()> {
        self.streams.iter().try_for_each(Stream::expect_progress)
    }

    /// How many words came back on each.
    pub fn finish(self) -> Result<Vec<u64>> {
        self.streams.into_iter().map(Stream::finish).collect()
    }
}

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
        !recording.contains(open.marker.as_bytes()),
        "during {what} the client's marker passed between the nodes in clear"
    );
    Ok(())
}

fn marker() -> String {
    format!("marker-{:032x}", rand::random::<u128>())
}

/// Of a Pod: the IPv4 one first.
fn addresses(cluster: &Cluster, pod: &str) -> Result<[IpAddr; 2]> {
    let pod = cluster.kubectl().get(&["-n", SHOP, "pod", pod])?;
    let address = |n: usize| -> Result<IpAddr> {
        let address = pod["status"]["podIPs"][n]["ip"].as_str().context("an address")?;
        Ok(address.parse()?)
    };
    Ok([address(0)?, address(1)?])
}
