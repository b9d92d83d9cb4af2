use super::*;
use prost_types::Any;

const TYPE: &str = "type.googleapis.com/test.Thing";

#[derive(Debug, PartialEq)]
enum Change {
    Set(String),
    Remove(String),
}

fn resource(name: &str, version: &str) -> Resource {
    Resource {
        name: name.to_owned(),
        version: version.to_owned(),
        resource: Some(Any {
            type_url: TYPE.to_owned(),
            value: Vec::new(),
        }),
        ..Resource::default()
    }
}

fn response(nonce: &str, resources: Vec<Resource>, removed: &[&str]) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        nonce: nonce.to_owned(),
        type_url: TYPE.to_owned(),
        system_version_info: format!("v-{nonce}"),
        resources,
        removed_resources: removed.iter().map(|&r| r.to_owned()).collect(),
    }
}

/// Resources whose name holds "bad" cannot be used.
fn receive(subscription: &mut Subscription, response: DeltaDiscoveryResponse) -> Received<Change> {
    subscription.receive(
        response,
        |r| {
            if r.name.contains("bad") {
                Err("is bad".to_owned())
            } else {
                Ok(Change::Set(r.name.clone()))
            }
        },
        |name| Some(Change::Remove(name)),
        |name| name.contains("policy").then(|| Change::Set(format!("denies for {name}"))),
    )
}

fn held(subscription: &mut Subscription) -> BTreeMap<String, String> {
    subscription
        .open(Node::default())
        .initial_resource_versions
        .into_iter()
        .collect()
}

fn versions(of: &[(&str, &str)]) -> BTreeMap<String, String> {
    of.iter().map(|&(n, v)| (n.to_owned(), v.to_owned())).collect()
}

#[test]
fn the_first_request_is_the_wildcard() {
    let request = Subscription::new(TYPE).open(Node {
        id: "me".to_owned(),
        ..Node::default()
    });
    assert_eq!(request.type_url, TYPE);
    assert!(request.resource_names_subscribe.is_empty() && request.resource_names_unsubscribe.is_empty());
    assert!(request.initial_resource_versions.is_empty() && request.response_nonce.is_empty());
    assert_eq!(request.node.unwrap().id, "me");
}

#[test]
fn a_usable_response_is_acknowledged_and_held_for_the_next_stream() {
    let mut subscription = Subscription::new(TYPE);
    assert!(!subscription.answered());
    let received = receive(
        &mut subscription,
        response("1", vec![resource("a", "1"), resource("b", "7")], &[]),
    );
    assert_eq!(received.changes, [Change::Set("a".into()), Change::Set("b".into())]);
    assert_eq!(
        (received.reply.response_nonce.as_str(), received.reply.error_detail),
        ("1", None)
    );
    assert!(received.reply.resource_names_subscribe.is_empty());
    let received = receive(
        &mut subscription,
        response("2", vec![resource("a", "2")], &["b", "never-known"]),
    );
    assert_eq!(
        received.changes,
        [
            Change::Remove("b".into()),
            Change::Remove("never-known".into()),
            Change::Set("a".into())
        ]
    );
    assert_eq!(held(&mut subscription), versions(&[("a", "2")]));
    assert_eq!(subscription.version(), "v-2");
}

#[test]
fn an_empty_response_answers() {
    let mut subscription = Subscription::new(TYPE);
    let received = receive(&mut subscription, response("1", vec![], &[]));
    assert!(subscription.answered() && received.changes.is_empty() && received.reply.error_detail.is_none());
}

#[test]
fn what_cannot_be_used_is_named_and_the_rest_applies() {
    let mut subscription = Subscription::new(TYPE);
    let mut foreign = resource("foreign", "1");
    foreign.resource = Some(Any {
        type_url: "other".to_owned(),
        value: vec![0xff],
    });
    let mut empty = resource("empty", "1");
    empty.resource = None;
    let all = vec![
        resource("bad-1", "1"),
        resource("good", "1"),
        foreign,
        empty,
        resource("", "1"),
    ];
    let received = receive(&mut subscription, response("1", all, &[]));
    assert_eq!(received.changes, [Change::Set("good".into())]);
    let detail = received.reply.error_detail.unwrap();
    assert_eq!((received.reply.response_nonce.as_str(), detail.code), ("1", 3));
    for named in ["bad-1: is bad", "foreign: is a `other`", "empty: is empty"] {
        assert!(detail.message.contains(named), "{}", detail.message);
    }
    assert_eq!(received.rejected.len(), 4);
    assert_eq!(held(&mut subscription), versions(&[("good", "1")]));
}

#[test]
fn a_rejected_update_leaves_the_version_that_is_still_in_force() {
    let mut subscription = Subscription::new(TYPE);
    receive(&mut subscription, response("1", vec![resource("x", "1")], &[]));
    let received = subscription.receive(
        response("2", vec![resource("x", "2")], &[]),
        |_| Err::<Change, _>("broken".to_owned()),
        |_| None,
        |_| None,
    );
    assert!(received.changes.is_empty() && received.reply.error_detail.is_some());
    assert_eq!(held(&mut subscription), versions(&[("x", "1")]));
}

fn rejected(subscription: &Subscription) -> Vec<String> {
    subscription.rejected().collect()
}

#[test]
fn what_cannot_be_used_stays_named_until_it_can_or_is_gone() {
    let mut subscription = Subscription::new(TYPE);
    let both = vec![resource("bad-1", "1"), resource("bad-2", "1")];
    receive(&mut subscription, response("1", both, &[]));
    receive(&mut subscription, response("2", vec![resource("x", "1")], &[]));
    assert_eq!(
        rejected(&subscription),
        ["bad-1: is bad", "bad-2: is bad"],
        "something else has arrived"
    );
    receive(&mut subscription, response("3", vec![], &["bad-1"]));
    assert_eq!(rejected(&subscription), ["bad-2: is bad"]);
    // Another server: what it does not send again is what was held all the time, or is gone; but not before it has answered.
    drop(subscription.open(Node::default()));
    assert_eq!(rejected(&subscription), ["bad-2: is bad"]);
    let mut part = response("4", vec![], &[]);
    part.system_version_info.push_str(PARTIAL_VERSION);
    receive(&mut subscription, part);
    assert_eq!(rejected(&subscription), ["bad-2: is bad"]);
    receive(&mut subscription, response("4", vec![resource("bad-3", "1")], &[]));
    assert_eq!(rejected(&subscription), ["bad-3: is bad"]);
    // It is the same as before on the next one.
    drop(subscription.open(Node::default()));
    receive(&mut subscription, response("5", vec![resource("bad-3", "1")], &[]));
    assert_eq!(rejected(&subscription), ["bad-3: is bad"]);
}

#[test]
fn beyond_the_bound_it_is_said_that_more_cannot_be_used() {
    let mut subscription = Subscription::new(TYPE);
    let many = (0..=MAX_REJECTED_NAMED).map(|number| resource(&format!("bad-{number}"), "1"));
    receive(&mut subscription, response("1", many.collect(), &[]));
    let named = rejected(&subscription);
    assert_eq!(
        (named.len(), named[0].as_str()),
        (MAX_REJECTED_NAMED + 1, "*: there are more")
    );
    let names: Vec<String> = (0..MAX_REJECTED_NAMED).map(|number| format!("bad-{number}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    receive(&mut subscription, response("2", vec![], &names));
    assert_eq!(rejected(&subscription), ["*: there are more"]);
    // Everything that is not held comes again: then it is known.
    drop(subscription.open(Node::default()));
    assert_eq!(rejected(&subscription), ["*: there are more"], "nothing was answered yet");
    receive(&mut subscription, response("3", vec![], &[]));
    assert_eq!(rejected(&subscription), [] as [String; 0]);
}

#[test]
fn a_part_of_the_answer_does_not_answer() {
    let mut subscription = Subscription::new(TYPE);
    let mut part = response("1", vec![resource("a", "1")], &[]);
    part.system_version_info.push_str(PARTIAL_VERSION);
    assert_eq!(receive(&mut subscription, part.clone()).changes, [Change::Set("a".into())]);
    assert!(!subscription.answered());
    receive(&mut subscription, response("2", vec![resource("b", "1")], &[]));
    assert!(subscription.answered());
    receive(&mut subscription, part);
    assert!(subscription.answered(), "for good");
}

#[test]
fn a_stand_in_takes_the_place_of_what_never_was_good() {
    let mut subscription = Subscription::new(TYPE);
    let received = receive(&mut subscription, response("1", vec![resource("bad-policy", "1")], &[]));
    assert_eq!(received.changes, [Change::Set("denies for bad-policy".into())]);
    assert!(received.reply.error_detail.is_some());
    assert_eq!(subscription.held(), 0, "asked for again");
    let held = Held {
        version: "0".into(),
        resource: None,
    };
    subscription.held.insert("bad-policy".into(), held);
    subscription.held_bytes = entry_bytes("bad-policy", "0");
    let received = receive(&mut subscription, response("2", vec![resource("bad-policy", "2")], &[]));
    assert_eq!(received.changes, [], "its last good form stands");
}

#[test]
fn what_is_held_fits_the_request_that_resumes_it() {
    let mut subscription = Subscription::new(TYPE);
    let name = |i: usize| format!("{i}-{}", "x".repeat(MAX_NAME_BYTES - 10));
    let count = mesh_proto::MAX_REQUEST_BYTES / MAX_NAME_BYTES + 10;
    let all = (0..count).map(|i| resource(&name(i), "1")).collect();
    let received = receive(&mut subscription, response("1", all, &[]));
    assert!(
        received
            .reply
            .error_detail
            .unwrap()
            .message
            .contains("bytes of names and versions")
    );
    assert!(subscription.held() > count / 2 && subscription.held() < count);
    let resume = subscription.open(Node::default());
    assert!(prost::Message::encoded_len(&resume) < mesh_proto::MAX_REQUEST_BYTES);
    // What is held is still updated, and what goes makes room.
    let received = receive(&mut subscription, response("2", vec![resource(&name(0), "2")], &[]));
    assert_eq!(received.rejected, []);
    let (gone, new) = (name(1), name(count));
    let received = receive(&mut subscription, response("3", vec![resource(&new, "1")], &[&gone]));
    assert_eq!(received.rejected, []);
}

#[test]
fn so_many_resources_are_held_and_no_more() {
    let mut subscription = Subscription::new(TYPE);
    let all = (0..=MAX_RESOURCES).map(|i| resource(&i.to_string(), "1")).collect();
    let received = receive(&mut subscription, response("1", all, &[]));
    let complaint = received.reply.error_detail.unwrap().message;
    assert!(complaint.contains("more than 100000 resources of this type"), "{complaint}");
    assert_eq!(received.changes.len(), MAX_RESOURCES);
    assert_eq!(subscription.held(), MAX_RESOURCES);
    // What is held is still updated, and what goes makes room.
    let more = MAX_RESOURCES.to_string();
    let received = receive(&mut subscription, response("2", vec![resource("1", "2")], &[]));
    assert_eq!(received.rejected, []);
    let received = receive(&mut subscription, response("3", vec![resource(&more, "1")], &["2"]));
    assert_eq!(received.rejected, []);
    assert_eq!(subscription.held(), MAX_RESOURCES);
}

#[test]
fn what_is_no_resource_of_the_type_has_a_stand_in_too() {
    let mut subscription = Subscription::new(TYPE);
    let mut foreign = resource("foreign-policy", "1");
    foreign.resource = Some(Any {
        type_url: "other".to_owned(),
        value: vec![],
    });
    let mut empty = resource("empty-policy", "1");
    empty.resource = None;
    let received = receive(&mut subscription, response("1", vec![foreign, empty], &[]));
    assert_eq!(
        received.changes,
        [
            Change::Set("denies for foreign-policy".into()),
            Change::Set("denies for empty-policy".into())
        ]
    );
    assert_eq!(subscription.stand_ins().len(), 2);
}

#[test]
fn a_stand_in_ends_with_its_resource() {
    let mut subscription = Subscription::new(TYPE);
    let names = [
        "bad-policy-good-later",
        "bad-policy-removed",
        "bad-policy-gone",
        "bad-policy-still",
    ];
    let all = names.iter().map(|name| resource(name, "1")).collect();
    assert_eq!(receive(&mut subscription, response("1", all, &[])).changes.len(), 4);
    // On the stream: the server says so.
    receive(&mut subscription, response("2", vec![], &["bad-policy-removed"]));
    assert_eq!(subscription.stand_ins().len(), 3);

    // Deleted while there was no stream: nobody says so, for no server knows that it is held.
    assert!(held(&mut subscription).is_empty());
    let mut part = response("1", vec![resource("bad-policy-still", "1")], &[]);
    part.system_version_info.push_str(PARTIAL_VERSION);
    assert_eq!(
        receive(&mut subscription, part).changes,
        [Change::Set("denies for bad-policy-still".into())],
        "more may come"
    );
    let good = subscription.receive(
        response("2", vec![resource("bad-policy-good-later", "2")], &[]),
        |r| Ok(Change::Set(r.name.clone())),
        |name| Some(Change::Remove(name)),
        |_| None,
    );
    assert_eq!(
        good.changes,
        [
            Change::Set("bad-policy-good-later".into()),
            Change::Remove("bad-policy-gone".into())
        ]
    );
    assert_eq!(subscription.stand_ins(), &HashSet::from(["bad-policy-still".to_owned()]));
    assert!(
        receive(&mut subscription, response("3", vec![], &[])).changes.is_empty(),
        "once a stream"
    );
    assert_eq!(held(&mut subscription), versions(&[("bad-policy-good-later", "2")]));
}

#[test]
fn a_nack_stays_small_whatever_is_rejected() {
    let mut subscription = Subscription::new(TYPE);
    let all = (0..10_000)
        .map(|i| resource(&format!("bad-{i}-{}", "é".repeat(2000)), "1"))
        .collect();
    let received = receive(&mut subscription, response("1", all, &[]));
    let detail = received.reply.error_detail.unwrap();
    assert!(detail.message.len() < MAX_REJECTED_NAMED * 1300, "{}", detail.message.len());
    assert!(detail.message.ends_with("and 9936 more"));
    assert_eq!(subscription.held(), 0);
}

#[test]
fn a_type_that_was_not_asked_for_is_refused() {
    let reply = refuse_unknown_type(&response("9", vec![], &[]));
    assert!(reply.error_detail.is_some() && reply.response_nonce == "9" && reply.type_url == TYPE);
}

#[test]
fn a_snapshot_brings_another_agent_to_the_same_and_no_server_has_confirmed_it() {
    let mut subscription = Subscription::new(TYPE);
    let all = vec![resource("a", "1"), resource("bad-policy", "2"), resource("bad", "3")];
    receive(&mut subscription, response("1", all, &[]));
    // A newer form that cannot be used: the one before stands.
    receive(&mut subscription, response("2", vec![resource("b", "1")], &[]));
    assert!(subscription.confirmed());
    let mut next = Subscription::new(TYPE);
    let received = next.restore(
        subscription.snapshot(),
        |r| {
            r.resource
                .is_some()
                .then(|| Change::Set(r.name.clone()))
                .ok_or_else(|| "empty".to_owned())
        },
        |name| Some(Change::Set(format!("denies for {name}"))),
    );
    let mut changes: Vec<String> = received.changes.iter().map(|change| format!("{change:?}")).collect();
    changes.sort();
    assert_eq!(changes, ["Set(\"a\")", "Set(\"b\")", "Set(\"denies for bad-policy\")"]);
    assert!(next.answered() && !next.confirmed(), "known, by nobody's word");
    assert_eq!(held(&mut next), held(&mut subscription), "what the next server is told");
    assert_eq!(next.stand_ins(), subscription.stand_ins());
    assert_eq!(next.version(), subscription.version());
    // The stand-in is still one: a server that answers without it says that it is gone.
    let received = receive(&mut next, response("3", vec![], &[]));
    assert_eq!(received.changes, [Change::Remove("bad-policy".into())]);
    assert!(next.confirmed());
}
