//! Whose a service-account token is: the API server is asked (TokenReview), and its word remembered for a short while.
//!
//! It verifies the token and that the Pod which it is bound to is still there. What is ours: that it was made for this mesh (its
//! audience), for the agents (its service account), and which node it names.

use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;
use std::time::SystemTime;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::api::PostParams;
use kube::{Api, Client};
use parking_lot::Mutex;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use tokio::time::{Instant, timeout};

use crate::kubernetes::review_cache::{Accepted, ReviewCache, TokenHash};
use crate::kubernetes::review_lanes::Lanes;
use crate::limits::{Bounds, MAX_SERVICE_ACCOUNT_TOKEN_BYTES, REVIEW_RETRY, REVIEW_TIMEOUT};
use crate::metrics::Metrics;
use crate::registry::is_name;
use crate::tokens::Refusal;

#[cfg(test)]
mod tests;

/// What the agents' tokens must be made for.
pub const AUDIENCE: &str = "culvert";
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";

/// A service account, as `NAMESPACE/NAME`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceAccount {
    pub namespace: String,
    pub name: String,
}

impl ServiceAccount {
    /// Its name as a user of the API server.
    #[must_use]
    pub fn username(&self) -> String {
        format!("system:serviceaccount:{}:{}", self.namespace, self.name)
    }
}

impl FromStr for ServiceAccount {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('/') {
            Some((namespace, name)) if is_name(namespace) && is_name(name) => Ok(Self {
                namespace: namespace.to_owned(),
                name: name.to_owned(),
            }),
            _ => Err("give NAMESPACE/NAME of a service account, as culvert-system/mesh-agent".to_owned()),
        }
    }
}

impl std::fmt::Display for ServiceAccount {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

pub struct Reviewer {
    reviews: Api<TokenReview>,
    agents: ServiceAccount,
    metrics: Arc<Metrics>,
    cache: Mutex<ReviewCache>,
    lanes: Lanes,
    /// When the API server last failed to say; none since it last said something.
    failed_at: Mutex<Option<Instant>>,
}

impl Reviewer {
    #[must_use]
    pub fn new(client: Client, agents: ServiceAccount, metrics: Arc<Metrics>, bounds: &Bounds) -> Self {
        Self {
            reviews: Api::all(client),
            agents,
            metrics,
            cache: Mutex::new(ReviewCache::new(bounds)),
            lanes: Lanes::default(),
            failed_at: Mutex::default(),
        }
    }

    /// The node that a token names, which a caller on `host` brings.
    ///
    /// # Errors
    /// Why the caller is none of ours; or nobody can say at present.
    pub async fn authenticate(&self, token: &str, host: IpAddr) -> Result<String, Refusal> {
        if !is_shaped_like_a_token(token) {
            return Err(Refusal::Unknown);
        }
        let hash = hash(token);
        if let Some(known) = self.known(&hash) {
            return known;
        }
        let is_known = self.cache.lock().in_grace(&hash, Instant::now(), unix_seconds()).is_ok();
        let _turn = self.lanes.enter(&hash, host, is_known).await?;
        // Another caller with this token may have asked meanwhile.
        if let Some(known) = self.known(&hash) {
            return known;
        }
        let verdict = self.review(token).await?;
        let node = verdict
            .as_ref()
            .map(|accepted| accepted.node.clone())
            .map_err(|refusal| *refusal);
        let mut cache = self.cache.lock();
        cache.keep(hash, verdict, Instant::now());
        self.metrics.set_known_tokens(cache.counts());
        node
    }

    /// Whether an open stream's token still stands.
    ///
    /// # Errors
    /// As [`Self::authenticate`]; but while nobody can say, a token that was good lately is for a while.
    pub async fn recheck(&self, token: &str, host: IpAddr) -> Result<(), Refusal> {
        // A stream does nothing else while it is rechecked: they do not all wait for an API server that is known to be away.
        let is_away = self.failed_at.lock().is_some_and(|at| at.elapsed() < REVIEW_RETRY);
        let checked = match self.known(&hash(token)) {
            None if is_away => Err(Refusal::Unreviewed),
            None => self.authenticate(token, host).await,
            Some(known) => known,
        };
        match checked {
            Err(refusal) if refusal.is_passing() => {
                let spared = self.cache.lock().in_grace(&hash(token), Instant::now(), unix_seconds());
                if spared.is_ok() {
                    self.metrics.token_reviews_spared.inc();
                }
                spared
            }
            checked => checked.map(drop),
        }
    }

    fn known(&self, hash: &TokenHash) -> Option<Result<String, Refusal>> {
        self.cache.lock().verdict(hash, Instant::now(), unix_seconds())
    }

    /// # Errors
    /// The API server cannot say.
    async fn review(&self, token: &str) -> Result<Result<Accepted, Refusal>, Refusal> {
        let review = TokenReview {
            spec: TokenReviewSpec {
                audiences: Some(vec![AUDIENCE.to_owned()]),
                token: token.to_owned(),
            },
            ..TokenReview::default()
        };
        let count = |result| self.metrics.token_reviews.with_label_values(&[result]).inc();
        let parameters = PostParams::default();
        let answer = match timeout(REVIEW_TIMEOUT, self.reviews.create(&parameters, &review)).await {
            Ok(Ok(review)) => Ok(review.status.unwrap_or_default()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no answer within {REVIEW_TIMEOUT:?}")),
        };
        let status = match answer {
            Ok(status) => status,
            Err(error) => {
                count("failed");
                if self.failed_at.lock().replace(Instant::now()).is_none() {
                    tracing::error!(
                        error,
                        "the API server cannot be asked who calls: open streams go on for a while, new calls are refused"
                    );
                }
                return Err(Refusal::Unreviewed);
            }
        };
        if self.failed_at.lock().take().is_some() {
            tracing::info!("the API server says again who calls");
        }
        let now = unix_seconds();
        let named = |refusal| match refusal {
            // The API server does not say which of its reasons it was.
            Refusal::Unknown if expiry(token).is_some_and(|end| end <= now) => Refusal::Expired,
            refusal => refusal,
        };
        let accepted = |node| {
            let accepted = Accepted {
                node,
                expires_unix_seconds: expiry(token),
            };
            // The API server's clock may be another one; but once it is remembered, it would be refused by ours.
            if accepted.is_over(now) {
                Err(Refusal::Expired)
            } else {
                Ok(accepted)
            }
        };
        let verdict = self.verdict(&status).map_err(named).and_then(accepted);
        count(if verdict.is_ok() { "accepted" } else { "refused" });
        Ok(verdict)
    }

    fn verdict(&self, status: &TokenReviewStatus) -> Result<String, Refusal> {
        if status.authenticated != Some(true) {
            return Err(Refusal::Unknown);
        }
        // An API server that knows nothing of audiences names none.
        if !status.audiences.iter().flatten().any(|audience| audience == AUDIENCE) {
            return Err(Refusal::OtherAudience);
        }
        let user = status.user.as_ref().ok_or(Refusal::OtherAccount)?;
        if user.username.as_deref() != Some(self.agents.username().as_str()) {
            return Err(Refusal::OtherAccount);
        }
        let one = |key: &str| match user.extra.as_ref().and_then(|extra| extra.get(key)).map(Vec::as_slice) {
            Some([value]) if !value.is_empty() => Some(value.clone()),
            _ => None,
        };
        // Bound to a Pod: it ends with the agent's Pod.
        one(POD_NAME).ok_or(Refusal::Unbound)?;
        one(NODE_NAME).filter(|node| is_name(node)).ok_or(Refusal::Unbound)
    }
}

fn hash(token: &str) -> TokenHash {
    Sha256::digest(token.as_bytes()).into()
}

fn unix_seconds() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

/// A JWT, as every service-account token is: for anything else nobody need be asked.
fn is_shaped_like_a_token(token: &str) -> bool {
    let is_base64 = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
    token.len() <= MAX_SERVICE_ACCOUNT_TOKEN_BYTES && token.split('.').count() == 3 && token.split('.').all(is_base64)
}

/// When a token ends. Of one that the API server has not verified it says no more than what is written there.
fn expiry(token: &str) -> Option<u64> {
    #[derive(Deserialize)]
    struct Claims {
        exp: u64,
    }
    let claims = URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?;
    serde_json::from_slice::<Claims>(&claims).ok().map(|claims| claims.exp)
}
