//! What reviews of agents' tokens meet.

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use mesh_tests::kube::agent_client::Followed;
use mesh_tests::kube::faults::{Fault, Target};
use mesh_tests::poll::{self, SOON};
use tonic::Code;

use crate::Bench;
use crate::control::{Control, PATIENCE};

pub fn reviews(bench: &mut Bench) -> Result<()> {
    let control = Control::start(bench)?;
    let followed = control.followed(bench, "reviews")?;
    let other = control.agent_with("reviews-other", &bench.token("reviews-other")?)?;
    let failed = || control.metrics.token_reviews.with_label_values(&["failed"]).get();
    let spared = || control.metrics.token_reviews_spared.get();
    for fault in [Fault::Status(500), Fault::RetryAfter(429, 1), Fault::Hang] {
        let (failed_before, spared_before) = (failed(), spared());
        control.proxy.break_with(Target::TokenReviews, fault.clone());
        poll::until_true("reviews fail, and the open stream is spared", PATIENCE, || {
            Ok(failed() > failed_before && spared() >= spared_before + 5)
        })?;
        let answer = other.ask("web")?;
        let refused = answer
            .err()
            .with_context(|| format!("{fault:?}: nobody can tell, and a certificate was signed"))?;
        ensure!(
            refused.code() == Code::Unavailable && refused.message().contains("API server"),
            "{fault:?}: {refused:?}"
        );
        followed.ensure_uncut()?;
        control.proxy.heal();
        poll::until_true("the other agent is let in", SOON, || Ok(other.ask("web")?.is_ok()))?;
    }
    followed.ensure_uncut()
}

/// The token is one that has run out as far as it says itself; the API server, which knows its signature not, says no all the same.
pub fn expired(bench: &mut Bench) -> Result<()> {
    let control = Control::start(bench)?;
    let good = bench.token("expired")?;
    let [header, claims, signature]: [&str; 3] = good
        .split('.')
        .collect::<Vec<_>>()
        .try_into()
        .map_err(|_| anyhow::anyhow!("no JWT"))?;
    let mut claims: serde_json::Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims)?)?;
    claims["exp"] = 1_700_000_000.into();
    let over = format!("{header}.{}.{signature}", URL_SAFE_NO_PAD.encode(claims.to_string()));
    let agent = control.agent_with("expired", &over)?;
    let answer = agent.ask("web")?;
    let refused = answer.err().context("a token that is over was taken")?;
    ensure!(refused.code() == Code::Unauthenticated, "{refused:?}");
    let counted = control.metrics.authentication_failed.with_label_values(&["expired"]).get();
    ensure!(counted >= 1, "it was not counted as expired");
    let followed = Followed::start(&agent);
    poll::until_true("the agent tries again", SOON, || {
        let failed = control.metrics.authentication_failed.with_label_values(&["expired"]).get();
        Ok(failed >= counted + 2)
    })?;
    ensure!(!followed.status.borrow().connected, "a token that is over has a stream");
    // The kubelet's next one.
    std::fs::write(control.token_file("expired"), &good)?;
    poll::until_true("the agent is let in by the newer token", PATIENCE, || {
        Ok(followed.status.borrow().connected)
    })
}
