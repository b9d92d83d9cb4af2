//! Whom the control plane lets in.

use std::time::Duration;

use anyhow::{Result, ensure};
use mesh_control::limits::Bounds;
use mesh_tests::kube::agent_client::{AgentClient, Followed};
use mesh_tests::poll::{self, SOON};
use tonic::Code;

use crate::{Bench, Control, NAMESPACE, refused, short_reviews, taken};

const AUDIENCE: &str = "culvert";
/// The API server repeats for ten seconds what it has said of a token.
const FORGOTTEN: Duration = Duration::from_secs(60);
/// What every Pod's own token is made for.
const API_SERVER: &str = "https://kubernetes.default.svc";

impl Bench {
    fn token(&self, account: &str, audience: &str, pod: Option<&str>) -> Result<String> {
        self.server.token(NAMESPACE, account, audience, pod)
    }

    /// A right one, of a Pod on node-a that it makes.
    fn right_token(&self, pod: &str) -> Result<String> {
        self.pod(pod, "mesh-agent", Some("node-a"))?;
        self.token("mesh-agent", AUDIENCE, Some(pod))
    }
}

pub fn right(bench: &mut Bench) -> Result<()> {
    let control = bench.control(Bounds::default())?;
    let pair = taken("the agent's token", control.try_with(&bench.right_token("right")?)?)?;
    ensure!(pair.identity.to_string() == "spiffe://cluster.local/ns/shop/sa/web");
    Ok(())
}

pub fn identity_of_another_node(bench: &mut Bench) -> Result<()> {
    let control = bench.control(Bounds::default())?;
    let agent = control.agent_with(&bench.right_token("of-node-a")?)?;
    refused(
        "an agent of node-a, for a Pod on node-b,",
        &agent.ask("api")?,
        Code::PermissionDenied,
    )?;
    bench.pod("of-node-b", "mesh-agent", Some("node-b"))?;
    let other = control.agent_with(&bench.token("mesh-agent", AUDIENCE, Some("of-node-b"))?)?;
    refused(
        "an agent of node-b, for a Pod on node-a,",
        &other.ask("web")?,
        Code::PermissionDenied,
    )?;
    taken("an agent of node-b, for a Pod there,", other.ask("api")?).map(drop)
}

pub fn other_audience(bench: &mut Bench) -> Result<()> {
    let control = bench.control(Bounds::default())?;
    bench.pod("audience", "mesh-agent", Some("node-a"))?;
    for audience in [API_SERVER, "vault"] {
        let token = bench.token("mesh-agent", audience, Some("audience"))?;
        refused(
            &format!("a token for {audience}"),
            &control.try_with(&token)?,
            Code::Unauthenticated,
        )?;
    }
    Ok(())
}

pub fn other_account(bench: &mut Bench) -> Result<()> {
    let control = bench.control(Bounds::default())?;
    bench.pod("another", "another", Some("node-a"))?;
    let token = bench.token("another", AUDIENCE, Some("another"))?;
    refused("another account's token", &control.try_with(&token)?, Code::Unauthenticated)?;
    ensure!(control.refused("other_account") == 1);
    // The same name elsewhere is somebody else.
    let kubectl = bench.server.kubectl();
    kubectl.apply("{apiVersion: v1, kind: Namespace, metadata: {name: elsewhere}}")?;
    bench.account("elsewhere", "mesh-agent")?;
    kubectl.apply(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: agent, namespace: elsewhere}\n\
         spec: {nodeName: node-a, serviceAccountName: mesh-agent, containers: [{name: c, image: 'nowhere.test/agent:1'}]}\n",
    )?;
    let token = bench.server.token("elsewhere", "mesh-agent", AUDIENCE, Some("agent"))?;
    refused(
        "mesh-agent of another namespace",
        &control.try_with(&token)?,
        Code::Unauthenticated,
    )?;
    ensure!(control.refused("other_account") == 2);
    Ok(())
}

pub fn unbound(bench: &mut Bench) -> Result<()> {
    let control = bench.control(Bounds::default())?;
    let token = bench.token("mesh-agent", AUDIENCE, None)?;
    refused(
        "a token that is bound to nothing",
        &control.try_with(&token)?,
        Code::Unauthenticated,
    )?;
    bench.pod("unscheduled", "mesh-agent", None)?;
    let token = bench.token("mesh-agent", AUDIENCE, Some("unscheduled"))?;
    refused(
        "a token of a Pod on no node",
        &control.try_with(&token)?,
        Code::Unauthenticated,
    )?;
    ensure!(control.refused("unbound") == 2);
    Ok(())
}

pub fn deleted_pod(bench: &mut Bench) -> Result<()> {
    let control = bench.control(short_reviews())?;
    let token = bench.right_token("deleted")?;
    let agent = control.agent_with(&token)?;
    let followed = Followed::start(&agent);
    followed.until("the stream opens", |status| status.connected)?;
    taken("the agent before its Pod is deleted", agent.ask("web")?)?;
    bench.delete_pod("deleted")?;
    poll::until_true("the open stream of a deleted Pod is cut", FORGOTTEN, || {
        let status = followed.status.borrow();
        Ok(status.connections >= 1 && !status.connected)
    })?;
    let cut = control.metrics.streams_cut.with_label_values(&["token"]);
    ensure!(cut.get() >= 1, "the stream was not cut for its token");
    refused("a deleted Pod's token", &agent.ask("web")?, Code::Unauthenticated)
}

pub fn rotated(bench: &mut Bench) -> Result<()> {
    let control = bench.control(short_reviews())?;
    let old = bench.right_token("old")?;
    let agent = control.agent_with(&old)?;
    taken("the first token", agent.ask("web")?)?;
    // The kubelet's new token; the old one is of a Pod that is gone, so that it would be seen if it were sent.
    let new = bench.right_token("new")?;
    std::fs::write(control.folder.path().join("token"), &new)?;
    bench.delete_pod("old")?;
    poll::until_true("the old token is refused", FORGOTTEN, || {
        Ok(control.agent_with_other_file(&old)?.ask("web")?.is_err())
    })?;
    taken("the newest token in the file", agent.ask("web")?)?;
    // A file that is broken for a moment is no reason to send nothing.
    std::fs::write(control.folder.path().join("token"), "")?;
    taken("the last good token", agent.ask("web")?).map(drop)
}

pub fn flood(bench: &mut Bench) -> Result<()> {
    let control = bench.control(Bounds::default())?;
    let before = control.reviews();
    let token = bench.token("mesh-agent", AUDIENCE, None)?;
    for _ in 0..20 {
        refused("a bad token", &control.try_with(&token)?, Code::Unauthenticated)?;
    }
    let reviews = control.reviews() - before;
    // It is forgotten after ten seconds, should this machine be that slow.
    ensure!((1..=5).contains(&reviews), "{reviews} reviews of one token");
    refused("no token at all", &control.try_with("garbage")?, Code::Unauthenticated)?;
    ensure!(
        control.reviews() - before == reviews,
        "the API server was asked about garbage"
    );
    Ok(())
}

pub fn away(bench: &mut Bench) -> Result<()> {
    let control = bench.control(short_reviews())?;
    let known = bench.right_token("known")?;
    let unknown = bench.right_token("unknown")?;
    let agent = control.agent_with(&known)?;
    let followed = Followed::start(&agent);
    followed.until("the stream opens", |status| status.connected)?;
    bench.server.stop();
    let other = control.agent_with_other_file(&unknown)?;
    let without = without_api_server(&control, &followed, &other);
    // For those who come after, too.
    bench.server.resume()?;
    without?;
    poll::until_true("the agent is let in again", SOON, || Ok(other.ask("web")?.is_ok()))?;
    ensure!(followed.status.borrow().connections == 1, "the stream was cut");
    Ok(())
}

fn without_api_server(control: &Control, followed: &Followed, other: &AgentClient) -> Result<()> {
    // Several times as long as what was said is repeated.
    let spared = || control.metrics.token_reviews_spared.get();
    poll::until_true("the open stream is spared", SOON, || Ok(spared() >= 5))?;
    ensure!(followed.status.borrow().connections == 1, "the stream was cut");
    let answer = other.ask("web")?;
    refused("an agent that nobody can tell", &answer, Code::Unavailable)?;
    let says_why = answer
        .as_ref()
        .err()
        .is_some_and(|status| status.message().contains("API server"));
    ensure!(says_why, "{:?}", answer.err());
    Ok(())
}
