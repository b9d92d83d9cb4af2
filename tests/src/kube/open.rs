//! Connections of Pods that stay open while something happens to them.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result};

use super::Cluster;
use super::load::inside;
use super::shop::SHOP;
use crate::app::ECHO_PORT;
use crate::stream::Stream;

/// With a word on its way on each all the time.
#[derive(Debug)]
pub struct Open {
    marker: String,
    streams: Vec<Stream>,
}

impl Open {
    /// One over IPv4, one over IPv6.
    ///
    /// # Errors
    /// As [`Open::more`].
    pub fn between(cluster: &Cluster, from: &str, to: &str) -> Result<Self> {
        let mut open = Self {
            marker: marker(),
            streams: Vec::new(),
        };
        open.more(cluster, from, to)?;
        Ok(open)
    }

    /// Two more.
    ///
    /// # Errors
    /// A Pod does not run, or nothing comes back.
    pub fn more(&mut self, cluster: &Cluster, from: &str, to: &str) -> Result<()> {
        let pod = inside(cluster, from)?;
        for (own, peer) in addresses(cluster, from)?.into_iter().zip(addresses(cluster, to)?) {
            let chat = pod.chat(cluster, SocketAddr::new(peer, ECHO_PORT))?;
            let ends = [own, peer].map(|end| end.to_string());
            self.streams.push(Stream::start(chat, ends, &self.marker)?);
        }
        Ok(())
    }

    /// In each word.
    #[must_use]
    pub fn marker(&self) -> &str {
        &self.marker
    }

    /// # Errors
    /// One has ended, or does not go on.
    pub fn expect_progress(&self) -> Result<()> {
        self.streams.iter().try_for_each(Stream::expect_progress)
    }

    /// How many words came back on each.
    ///
    /// # Errors
    /// As [`Stream::finish`].
    pub fn finish(self) -> Result<Vec<u64>> {
        self.streams.into_iter().map(Stream::finish).collect()
    }
}

/// What nobody else says.
#[must_use]
pub fn marker() -> String {
    format!("marker-{:032x}", rand::random::<u128>())
}

/// Of a Pod of [`SHOP`]: the IPv4 one first.
///
/// # Errors
/// There is no such Pod, or it has not both.
pub fn addresses(cluster: &Cluster, pod: &str) -> Result<[IpAddr; 2]> {
    let pod = cluster.kubectl().get(&["-n", SHOP, "pod", pod])?;
    let address = |n: usize| -> Result<IpAddr> {
        let address = pod["status"]["podIPs"][n]["ip"].as_str().context("an address")?;
        Ok(address.parse()?)
    };
    Ok([address(0)?, address(1)?])
}
