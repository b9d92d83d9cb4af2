//! The agent's own discovery and reports, without Pods; what it says can be held back, and changed.

use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use clap::Parser as _;
use mesh_agent::config::{Cli, Command, Credentials};
use mesh_agent::discovery::transport::ControlPlane;
use mesh_agent::discovery::{self, DiscoveryStatus, NodeName, report};
use mesh_agent::state::SharedState;
use mesh_tests::poll;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{Bench, NAMESPACE, NODES, PATIENCE};

/// It ends with this.
pub struct Agent {
    stop: CancellationToken,
    /// What the agent makes of what it is told.
    status: watch::Receiver<DiscoveryStatus>,
    mouth: watch::Sender<Mouth>,
}

/// What of it is reported.
#[derive(Clone, Debug, Default)]
pub struct Mouth {
    pub is_shut: bool,
    /// Beside what it rejects itself.
    pub rejects: Vec<String>,
}

impl Agent {
    pub fn speak(&self, mouth: Mouth) {
        self.mouth.send_replace(mouth);
    }

    /// The version of the policies that it enforces.
    pub fn enforces(&self) -> Option<String> {
        self.version(mesh_proto::AUTHORIZATION_TYPE_URL)
    }

    /// The version of the workloads that it knows, which say what selects them.
    pub fn knows(&self) -> Option<String> {
        self.version(mesh_proto::ADDRESS_TYPE_URL)
    }

    fn version(&self, type_url: &str) -> Option<String> {
        self.status.borrow().enforced_versions.get(type_url).cloned()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Bench {
    /// The agent of a node, served by a replica.
    pub fn agent(&self, node: usize, control: usize) -> Result<Agent> {
        let listen = self.control(control)?.0.listen.to_string();
        let node = NODES[node];
        let pod = format!("mesh-agent-{node}");
        self.apply(&format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: {pod}, namespace: {NAMESPACE}}}, spec: {{nodeName: {node}, \
             serviceAccountName: mesh-agent, containers: [{{name: c, image: 'nowhere.test/agent:1'}}]}}}}"
        ))?;
        let folder = self.server.folder();
        let (token, roots) = (folder.join(format!("{node}.token")), folder.join("roots.pem"));
        std::fs::write(&token, self.server.token(NAMESPACE, "mesh-agent", "culvert", Some(&pod))?)?;
        let map = self.server.kubectl().get(&["-n", NAMESPACE, "configmap", "culvert-roots"])?;
        std::fs::write(&roots, map["data"]["roots.pem"].as_str().context("roots.pem")?)?;
        let [token, roots] = [token, roots].map(|path| path.to_string_lossy().into_owned());
        let flags = [
            "mesh-agent",
            "run",
            "--service-account-token",
            &token,
            "--control-roots",
            &roots,
            "--node",
            node,
        ];
        let Command::Run(args) = Cli::try_parse_from(flags.into_iter().chain(["--control", &listen]))?.command else {
            bail!("not run");
        };
        // Its channel is of the runtime that it is made in.
        let _runtime = self.runtime.enter();
        let control = ControlPlane::new(&Credentials::read(&args)?)?;
        let stop = CancellationToken::new();
        let (sender, status) = watch::channel(DiscoveryStatus::default());
        let (told, tells) = watch::channel(DiscoveryStatus::default());
        let (mouth, says) = watch::channel(Mouth::default());
        tokio::spawn(discovery::run(
            control.clone(),
            NodeName(node.into()),
            Arc::default(),
            SharedState::new(),
            sender,
            stop.clone(),
        ));
        let (no_pods, pods) = watch::channel(Arc::default());
        tokio::spawn(report::run(control, pods, tells, Arc::default(), stop.clone()));
        let passing = pass_on(status.clone(), says, told, stop.clone());
        tokio::spawn(async move {
            passing.await;
            drop(no_pods);
        });
        let agent = Agent { stop, status, mouth };
        poll::until_true(&format!("the agent of {node} has everything"), PATIENCE, || {
            Ok(agent.status.borrow().synced)
        })?;
        Ok(agent)
    }
}

async fn pass_on(
    mut status: watch::Receiver<DiscoveryStatus>,
    mut mouth: watch::Receiver<Mouth>,
    told: watch::Sender<DiscoveryStatus>,
    stop: CancellationToken,
) {
    loop {
        let (mut next, mouth_now) = (status.borrow_and_update().clone(), mouth.borrow_and_update().clone());
        if !mouth_now.is_shut {
            next.rejected.extend(mouth_now.rejects);
            told.send_replace(next);
        }
        tokio::select! {
            () = stop.cancelled() => return,
            changed = status.changed() => if changed.is_err() { return },
            changed = mouth.changed() => if changed.is_err() { return },
        }
    }
}
