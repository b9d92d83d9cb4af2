use std::collections::BTreeMap;
use std::convert::Infallible;

use bytes::Bytes;
use http_body_util::Full;
use hyper::{Request, Response};
use k8s_openapi::api::authentication::v1::UserInfo;
use kube::client::Body;

use super::*;
use crate::limits::{MAX_REVIEWS_WAITING, REVIEW_GRACE, REVIEW_LIFE};

const HOST: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);
const AGENTS: &str = "system:serviceaccount:culvert-system:mesh-agent";

fn reviewer() -> Reviewer {
    // Nobody is asked: a verdict is made of an answer.
    let config = kube::Config::new("http://127.0.0.1:9".parse().expect("address"));
    reviewer_by(Client::try_from(config).expect("client"))
}

/// Whoever is asked about, this is what is said.
fn reviewer_told(status: &TokenReviewStatus) -> Reviewer {
    let review = TokenReview {
        status: Some(status.clone()),
        ..TokenReview::default()
    };
    let text = Bytes::from(serde_json::to_vec(&review).expect("JSON"));
    let server = tower::service_fn(move |_: Request<Body>| {
        let answer = Response::new(Full::new(text.clone()));
        std::future::ready(Ok::<_, Infallible>(answer))
    });
    reviewer_by(Client::new(server, "default"))
}

fn reviewer_by(client: Client) -> Reviewer {
    let agents = "culvert-system/mesh-agent".parse().expect("account");
    Reviewer::new(client, agents, Arc::new(Metrics::new().expect("metrics")), &Bounds::default())
}

fn answer(change: impl FnOnce(&mut TokenReviewStatus, &mut UserInfo, &mut BTreeMap<String, Vec<String>>)) -> TokenReviewStatus {
    let mut extra = BTreeMap::from([
        (NODE_NAME.to_owned(), vec!["node-a".to_owned()]),
        (POD_NAME.to_owned(), vec!["mesh-agent-x".to_owned()]),
    ]);
    let mut user = UserInfo {
        username: Some(AGENTS.to_owned()),
        ..UserInfo::default()
    };
    let mut status = TokenReviewStatus {
        authenticated: Some(true),
        audiences: Some(vec![AUDIENCE.to_owned()]),
        ..TokenReviewStatus::default()
    };
    change(&mut status, &mut user, &mut extra);
    if status.user.is_none() {
        user.extra = Some(extra);
        status.user = Some(user);
    }
    status
}

/// That ends then.
fn token(end_unix_seconds: u64) -> String {
    format!("x.{}.y", URL_SAFE_NO_PAD.encode(format!("{{\"exp\":{end_unix_seconds}}}")))
}

fn is_refused(what: &str, answer: &TokenReviewStatus, refusal: Refusal) {
    match reviewer().verdict(answer) {
        Ok(node) => panic!("{what} was taken, as of {node}"),
        Err(error) => assert_eq!(error, refusal, "{what}"),
    }
}

#[tokio::test]
async fn an_agents_token_is_its_nodes() {
    assert_eq!(reviewer().verdict(&answer(|_, _, _| {})), Ok("node-a".to_owned()));
}

#[tokio::test]
async fn what_the_api_server_does_not_know_is_refused() {
    is_refused("nothing", &TokenReviewStatus::default(), Refusal::Unknown);
    let unknown = answer(|status, _, _| status.authenticated = Some(false));
    is_refused("an unknown token", &unknown, Refusal::Unknown);
}

#[tokio::test]
async fn a_token_for_another_audience_is_refused() {
    // None, as of an API server that does not know of audiences.
    for audiences in [None, Some(vec![]), Some(vec!["https://kubernetes.default.svc".to_owned()])] {
        let other = answer(|status, _, _| status.audiences = audiences);
        is_refused("a token for another audience", &other, Refusal::OtherAudience);
    }
}

#[tokio::test]
async fn a_token_of_another_account_is_refused() {
    for user in [
        "",
        "mesh-agent",
        "system:node:node-a",
        "system:serviceaccount:culvert-system:mesh-agent2",
        "system:serviceaccount:other:mesh-agent",
    ] {
        let other = answer(|_, info, _| info.username = Some(user.to_owned()));
        is_refused(&format!("a token of {user:?}"), &other, Refusal::OtherAccount);
    }
}

#[tokio::test]
async fn a_token_without_a_pod_and_one_node_is_refused() {
    for nodes in [vec![], vec![""], vec!["a", "b"], vec!["../node"]] {
        let nodes: Vec<String> = nodes.into_iter().map(str::to_owned).collect();
        let other = answer(|_, _, extra| drop(extra.insert(NODE_NAME.to_owned(), nodes)));
        is_refused("a token without one node", &other, Refusal::Unbound);
    }
    // As Kubernetes before 1.32 gives them; and one that does not end with a Pod.
    for key in [NODE_NAME, POD_NAME] {
        let other = answer(|_, _, extra| drop(extra.remove(key)));
        is_refused(&format!("a token without {key}"), &other, Refusal::Unbound);
    }
}

#[tokio::test]
async fn what_is_no_token_is_refused_without_a_question() {
    let reviewer = reviewer();
    let long = format!("a.b.{}", "c".repeat(MAX_SERVICE_ACCOUNT_TOKEN_BYTES));
    for text in ["", "x", "a.b", "a.b.c.d", "a..c", "a.b/.c", "a.b c.d", long.as_str()] {
        assert_eq!(reviewer.authenticate(text, HOST).await, Err(Refusal::Unknown), "{text:.20}");
    }
    assert_eq!(reviewer.metrics.token_reviews.with_label_values(&["failed"]).get(), 0);
    // Nobody listens there.
    assert_eq!(reviewer.authenticate("a.b.c", HOST).await, Err(Refusal::Unreviewed));
    assert_eq!(reviewer.metrics.token_reviews.with_label_values(&["failed"]).get(), 1);
}

#[tokio::test]
async fn a_crowd_is_refused_and_asked_to_come_back() {
    let reviewer = reviewer();
    let places = reviewer
        .lanes
        .waiting
        .try_acquire_many(u32::try_from(MAX_REVIEWS_WAITING).expect("a count"));
    assert_eq!(reviewer.authenticate("a.b.c", HOST).await, Err(Refusal::Crowded));
    assert!(Refusal::Crowded.is_passing());
    drop(places);
    assert_eq!(
        reviewer.authenticate("a.b.c", HOST).await,
        Err(Refusal::Unreviewed),
        "room again"
    );
}

#[tokio::test(start_paused = true)]
async fn while_nobody_can_say_an_open_stream_goes_on_for_a_while_and_no_new_call_does() {
    let reviewer = reviewer();
    let accepted = Accepted {
        node: "node-a".to_owned(),
        expires_unix_seconds: None,
    };
    reviewer.cache.lock().keep(hash("a.b.c"), Ok(accepted), Instant::now());
    let spared = || reviewer.metrics.token_reviews_spared.get();
    assert_eq!(reviewer.authenticate("a.b.c", HOST).await, Ok("node-a".to_owned()));
    assert_eq!((reviewer.recheck("a.b.c", HOST).await, spared()), (Ok(()), 0));
    tokio::time::advance(REVIEW_LIFE).await;
    let refusal = reviewer.authenticate("a.b.c", HOST).await.expect_err("nobody can say");
    assert!(refusal.is_passing(), "{refusal}");
    assert_eq!((reviewer.recheck("a.b.c", HOST).await, spared()), (Ok(()), 1));
    assert_eq!(
        reviewer.recheck("x.y.z", HOST).await,
        Err(Refusal::Unreviewed),
        "never accepted"
    );
    tokio::time::advance(REVIEW_GRACE).await;
    assert_eq!(
        (reviewer.recheck("a.b.c", HOST).await, spared()),
        (Err(Refusal::Unreviewed), 1)
    );
}

#[tokio::test]
async fn a_token_that_is_over_is_refused_for_that_whatever_is_said_of_it() {
    let yes = answer(|_, _, _| {});
    let no = answer(|status, _, _| status.authenticated = Some(false));
    let over = token(unix_seconds() - 1);
    for said in [&yes, &no] {
        let reviewer = reviewer_told(said);
        for _ in 0..2 {
            assert_eq!(reviewer.authenticate(&over, HOST).await, Err(Refusal::Expired));
            assert_eq!(reviewer.recheck(&over, HOST).await, Err(Refusal::Expired));
        }
        assert_eq!(reviewer.cache.lock().counts(), (0, 1), "it is remembered as a good one");
    }
    // Before its end it is the API server's word that counts.
    let current = token(unix_seconds() + 3600);
    let taken = reviewer_told(&yes).authenticate(&current, HOST).await;
    assert_eq!(taken, Ok("node-a".to_owned()));
    let refused = reviewer_told(&no).authenticate(&current, HOST).await;
    assert_eq!(refused, Err(Refusal::Unknown));
}

/// Where the API server would still say yes, and where nobody can say.
#[tokio::test(start_paused = true)]
async fn a_good_token_that_ends_while_it_is_remembered_is_refused_and_has_no_grace() {
    let end = unix_seconds() - 1;
    for reviewer in [reviewer_told(&answer(|_, _, _| {})), reviewer()] {
        let accepted = Accepted {
            node: "node-a".to_owned(),
            expires_unix_seconds: Some(end),
        };
        reviewer.cache.lock().keep(hash(&token(end)), Ok(accepted), Instant::now());
        assert_eq!(reviewer.authenticate(&token(end), HOST).await, Err(Refusal::Expired));
        assert_eq!(reviewer.recheck(&token(end), HOST).await, Err(Refusal::Expired));
        tokio::time::advance(REVIEW_LIFE).await;
        assert_eq!(reviewer.recheck(&token(end), HOST).await, Err(Refusal::Expired));
        assert_eq!(reviewer.metrics.token_reviews_spared.get(), 0);
    }
}

#[test]
fn a_service_account_is_namespace_and_name() {
    let account: ServiceAccount = "culvert-system/mesh-agent".parse().expect("account");
    assert_eq!(account.username(), AGENTS);
    for bad in ["", "mesh-agent", "/x", "x/", "a/b/c", "A/b"] {
        assert!(bad.parse::<ServiceAccount>().is_err(), "{bad}");
    }
}

#[test]
fn the_end_of_a_token_is_read_from_its_claims() {
    let claims = |json: &str| format!("x.{}.y", URL_SAFE_NO_PAD.encode(json));
    assert_eq!(
        expiry(&claims(r#"{"exp":1700000000,"aud":["culvert"]}"#)),
        Some(1_700_000_000)
    );
    for without in [claims("{}"), claims("no JSON"), "x.!.y".to_owned()] {
        assert_eq!(expiry(&without), None);
    }
}
