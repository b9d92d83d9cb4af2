//! A control plane that comes to the API server by the proxy, and agents of it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Parser as _;
use mesh_control::app::{self, Running, Source};
use mesh_control::config::Cli;
use mesh_control::control_plane::ControlPlane;
use mesh_control::limits::Bounds;
use mesh_control::metrics::Metrics;
use mesh_control::trust::Trust;
use mesh_tests::kube::agent_client::{AgentClient, Followed};
use mesh_tests::kube::faults::FaultyApiServer;
use mesh_tests::poll::{self, SOON};
use tokio::runtime::Handle;

use crate::{Bench, NAMESPACE};

/// Longer than the longest pause between two tries, twice, and a slow machine.
pub const PATIENCE: Duration = Duration::from_secs(90);
const POLICIES: &str = mesh_proto::AUTHORIZATION_TYPE_URL;

/// A word of the API server is repeated for a moment only, and a watch is short.
pub fn bounds() -> Bounds {
    Bounds {
        review_life: Duration::from_millis(200),
        token_recheck: Duration::from_millis(100),
        api_timeout: Duration::from_secs(4),
        watch_seconds: 4,
        watch_grace: Duration::from_secs(2),
        ..Bounds::default()
    }
}

/// It ends with this.
pub struct Control {
    running: Option<Running>,
    pub proxy: Arc<FaultyApiServer>,
    pub metrics: Arc<Metrics>,
    folder: tempfile::TempDir,
    runtime: Handle,
}

impl Drop for Control {
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            self.runtime.block_on(running.stop());
        }
    }
}

pub fn proxy(bench: &Bench) -> Result<Arc<FaultyApiServer>> {
    let proxy = bench.runtime.block_on(FaultyApiServer::start(&bench.kubeconfig))?;
    Ok(Arc::new(proxy))
}

impl Control {
    /// One that has read everything.
    pub fn start(bench: &Bench) -> Result<Self> {
        let control = Self::start_by(bench, proxy(bench)?)?;
        poll::until_true("the roots are published", SOON, || {
            let map = bench.server.kubectl().get(&["-n", NAMESPACE, "configmap", "culvert-roots"])?;
            let published = map["data"]["roots.pem"].as_str().context("roots.pem")?;
            std::fs::write(control.roots_file(), published)?;
            Ok(published == control.control().trust_bundle().concat())
        })?;
        Ok(control)
    }

    pub fn start_by(bench: &Bench, proxy: Arc<FaultyApiServer>) -> Result<Self> {
        let args = [
            "mesh-control",
            "--kubernetes",
            "--listen",
            "127.0.0.1:0",
            "--admin",
            "127.0.0.1:0",
        ];
        let args = Cli::try_parse_from(args)?.serve;
        let metrics = Arc::new(Metrics::new()?);
        let running = bench.runtime.block_on(async {
            let client = proxy.client()?;
            let trust = Trust::of_cluster(&args, &client, NAMESPACE, &metrics, &bounds()).await?;
            app::start_with(&args, Source::Cluster(client), trust, Arc::clone(&metrics), bounds()).await
        })?;
        let control = Self {
            running: Some(running),
            proxy,
            metrics,
            folder: tempfile::tempdir()?,
            runtime: bench.runtime.handle().clone(),
        };
        poll::until_true("the cluster is read", PATIENCE, || Ok(control.control().is_ready()))?;
        Ok(control)
    }

    pub fn control(&self) -> &ControlPlane {
        &self.running.as_ref().unwrap().control
    }

    fn roots_file(&self) -> PathBuf {
        self.folder.path().join("roots.pem")
    }

    pub fn token_file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn has_policy(&self, name: &str) -> bool {
        let snapshot = self.control().snapshot();
        let policies = snapshot.types.get(POLICIES);
        policies.is_some_and(|policies| policies.resources.contains_key(&format!("shop/{name}")))
    }

    pub fn until_policy(&self, name: &str) -> Result<()> {
        poll::until_true(&format!("policy {name} is in force"), PATIENCE, || Ok(self.has_policy(name)))
            .with_context(|| format!("{:?}", self.control().registry_problem()))
    }

    /// What is wrong is said, with all of these words, and counted.
    pub fn until_said(&self, words: &[&str]) -> Result<()> {
        let said = || self.control().registry_problem().unwrap_or_default();
        poll::until_true(&format!("{words:?} is said"), PATIENCE, || {
            let text = said();
            Ok(words.iter().all(|word| text.contains(word)))
        })
        .with_context(said)?;
        ensure!(self.metrics.registry_stale.get() == 1, "it is not counted");
        Ok(())
    }

    pub fn until_well(&self) -> Result<()> {
        poll::until_true("all is well again", PATIENCE, || {
            Ok(self.control().registry_problem().is_none())
        })
        .with_context(|| format!("{:?}", self.control().registry_problem()))
    }

    pub fn lists_of(&self, kind: &str) -> u64 {
        self.metrics.lists.with_label_values(&[kind]).get()
    }

    pub fn agent(&self, token_file: &Path) -> Result<AgentClient> {
        let listen = self.running.as_ref().unwrap().listen.to_string();
        AgentClient::new(token_file, &self.roots_file(), &listen, &self.runtime)
    }

    pub fn agent_with(&self, name: &str, token: &str) -> Result<AgentClient> {
        let file = self.token_file(name);
        std::fs::write(&file, token)?;
        self.agent(&file)
    }

    /// An agent with a stream that has brought it everything.
    pub fn followed(&self, bench: &Bench, name: &str) -> Result<Followed> {
        let followed = Followed::start(&self.agent_with(name, &bench.token(name)?)?);
        poll::until_true("the stream opens", SOON, || Ok(followed.status.borrow().connected))?;
        Ok(followed)
    }
}

/// Lets so much time pass, for what is counted in it.
pub fn let_pass(since: Instant, time: Duration) {
    std::thread::sleep(time.saturating_sub(since.elapsed()));
}
