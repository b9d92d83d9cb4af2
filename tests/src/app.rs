//! Driving `mesh-test-app` in a Pod.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::http;
use crate::poll;
use crate::process::{Conversation, Output, Place, Process};

pub const HTTP_PORT: u16 = 8080;
pub const ECHO_PORT: u16 = 9000;
/// Nobody listens here.
pub const CLOSED_PORT: u16 = 9999;

/// Longer than the application's own limits.
const RUN_DEADLINE: Duration = Duration::from_secs(60);

/// The application's binary where unprivileged users can reach it.
#[derive(Clone, Debug)]
pub struct App {
    binary: PathBuf,
}

/// What became of a connection, as the application saw it.
#[derive(Clone, Debug)]
pub struct Attempt {
    pub report: Value,
}

impl Attempt {
    #[must_use]
    pub fn ok(&self) -> bool {
        self.report["ok"] == true
    }

    #[must_use]
    pub fn elapsed(&self) -> Duration {
        Duration::from_millis(self.report["elapsed_ms"].as_u64().unwrap_or(u64::MAX))
    }

    /// # Errors
    /// The connection failed.
    pub fn expect_ok(&self) -> Result<&Self> {
        if !self.ok() {
            bail!("expected a connection that works, saw {}", self.report);
        }
        Ok(self)
    }

    /// Refused at once, or reset after the local accept with no byte delivered; quickly.
    ///
    /// # Errors
    /// It worked, failed in another way, or took long.
    pub fn expect_refused(&self, within: Duration) -> Result<&Self> {
        // Not an orderly end: an application would take that for an empty answer. (EPIPE: the reset came before the write.)
        let error = self.report["error"].as_str().unwrap_or_default();
        let refused = matches!(error, "ConnectionRefused" | "ConnectionReset" | "BrokenPipe");
        if self.ok() || !refused || self.elapsed() > within {
            bail!("expected a refusal within {within:?}, saw {}", self.report);
        }
        Ok(self)
    }
}

impl App {
    /// Copies the binary into the run's folder: the build's may lie below a folder that only its owner may enter.
    ///
    /// # Errors
    /// The binary was not built.
    pub fn install(binary: &Path, folder: &Path) -> Result<Self> {
        let target = folder.join("mesh-test-app");
        std::fs::copy(binary, &target).with_context(|| format!("copying {}", binary.display()))?;
        Ok(Self { binary: target })
    }

    #[must_use]
    pub fn binary(&self) -> &Path {
        &self.binary
    }

    /// Starts the servers and waits until they answer.
    ///
    /// # Errors
    /// They do not.
    pub fn serve(&self, name: &str, place: &Place, log: PathBuf) -> Result<Process> {
        let arguments = ["serve", name, &HTTP_PORT.to_string(), &ECHO_PORT.to_string()];
        let mut process = Process::start(
            &format!("the server of {name}"),
            place.command(&self.binary, &arguments)?,
            log,
        )?;
        poll::until_true(&format!("the server of {name} answers"), poll::SOON, || {
            process.check_running()?;
            let response = self.run(place, &["get", &format!("http://127.0.0.1:{HTTP_PORT}/")])?;
            Ok(response.status.success())
        })?;
        Ok(process)
    }

    fn run(&self, place: &Place, arguments: &[&str]) -> Result<Output> {
        place.run(&self.binary, arguments, RUN_DEADLINE)
    }

    fn report(&self, place: &Place, arguments: &[&str]) -> Result<Value> {
        let output = self.run(place, arguments)?;
        serde_json::from_str(&output.stdout).with_context(|| format!("{arguments:?} answered {output:?}"))
    }

    /// # Errors
    /// The request failed: as the client said.
    pub fn get(&self, place: &Place, address: IpAddr, path: &str) -> Result<String> {
        self.get_at(place, SocketAddr::new(address, HTTP_PORT), path)
    }

    /// The same of another server than a Pod's.
    ///
    /// # Errors
    /// As [`App::get`].
    pub fn get_at(&self, place: &Place, address: SocketAddr, path: &str) -> Result<String> {
        let url = format!("http://{address}{path}");
        let what = format!("expected an answer to GET {url}; it");
        self.run(place, &["get", &url])?.ok(&what)
    }

    /// Connects to an address as written, so that "[::ffff:10.0.0.1]:80" goes through an IPv6 socket.
    ///
    /// # Errors
    /// The client itself failed; a refused connection is an answer.
    pub fn connect_to(&self, place: &Place, address: &str) -> Result<Attempt> {
        Ok(Attempt {
            report: self.report(place, &["connect", address])?,
        })
    }

    /// # Errors
    /// As [`App::connect_to`].
    pub fn connect(&self, place: &Place, address: IpAddr, port: u16) -> Result<Attempt> {
        self.connect_to(place, &SocketAddr::new(address, port).to_string())
    }

    /// # Errors
    /// The client failed.
    pub fn bulk(&self, place: &Place, address: IpAddr, bytes: usize) -> Result<Value> {
        self.report(
            place,
            &["bulk", &SocketAddr::new(address, ECHO_PORT).to_string(), &bytes.to_string()],
        )
    }

    /// # Errors
    /// The client failed.
    pub fn swarm(&self, place: &Place, address: IpAddr, count: usize) -> Result<Value> {
        self.report(
            place,
            &["swarm", &SocketAddr::new(address, ECHO_PORT).to_string(), &count.to_string()],
        )
    }

    /// Connections to the server of loads, one after the other in each of two threads, each with a message there and back. Answers how
    /// many were made.
    ///
    /// # Errors
    /// The client or one of them failed.
    pub fn connects(&self, place: &Place, address: SocketAddr, of_each: usize) -> Result<u64> {
        let report = self.report(place, &["load-connects", &address.to_string(), "2", &of_each.to_string()])?;
        report["count"].as_u64().with_context(|| report.to_string())
    }

    /// # Errors
    /// The client failed.
    pub fn mptcp(&self, place: &Place, address: IpAddr) -> Result<Value> {
        self.report(place, &["mptcp", &SocketAddr::new(address, ECHO_PORT).to_string()])
    }

    /// # Errors
    /// The client failed.
    pub fn udp(&self, place: &Place, address: IpAddr) -> Result<Value> {
        self.report(place, &["udp", &SocketAddr::new(address, ECHO_PORT).to_string()])
    }

    /// Whether a Unix socket closes a connection without a byte.
    ///
    /// # Errors
    /// The client failed.
    pub fn is_closed_by(&self, place: &Place, socket: &Path) -> Result<bool> {
        let report = self.report(place, &["unix", socket.to_str().context("a path")?])?;
        Ok(report["closed"] == true)
    }

    /// One connection that stays open.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn chat(&self, place: &Place, address: IpAddr) -> Result<Conversation> {
        let to = SocketAddr::new(address, ECHO_PORT).to_string();
        Conversation::chat(place.command(&self.binary, &["chat", &to])?).with_context(|| format!("a conversation with {to}"))
    }
}

/// A page of an agent or the control plane, asked for inside a network namespace.
///
/// # Errors
/// No connection or no response.
pub fn page(netns: &crate::netns::Netns, address: IpAddr, port: u16, path: &str) -> Result<http::Response> {
    netns.run(|| http::request(SocketAddr::new(address, port), path))
}
