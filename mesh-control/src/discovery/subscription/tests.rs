use super::*;

/// (name, version) pairs; a service lists its endpoints as `ns/svc>a,b`.
fn snapshot(resources: &[(&str, &str)]) -> TypeSnapshot {
    let mut snapshot = TypeSnapshot {
        version: format!("{resources:?}"),
        ..TypeSnapshot::default()
    };
    for (name, version) in resources {
        let resource = CompiledResource {
            name: (*name).to_owned(),
            version: (*version).to_owned(),
            aliases: vec![format!("/{name}")],
            value: version.as_bytes().to_vec(),
        };
        snapshot.aliases.insert(format!("/{name}"), (*name).to_owned());
        snapshot.resources.insert((*name).to_owned(), Arc::new(resource));
    }
    snapshot
}

fn names(list: &[&str]) -> Vec<String> {
    list.iter().map(ToString::to_string).collect()
}

/// Takes a request while there is nothing.
fn request(subscription: &mut Subscription, request: Request) -> Result<Answer, TooMuch> {
    subscription.request(request, Some(&TypeSnapshot::default()))
}

fn ack(subscription: &mut Subscription, response: &Response) {
    let answer = request(
        subscription,
        Request {
            nonce: response.nonce.clone(),
            ..Request::default()
        },
    );
    assert_eq!(answer, Ok(Answer::Acknowledged));
}

/// Names sent and names removed, then acknowledged.
fn exchange(subscription: &mut Subscription, snapshot: &TypeSnapshot) -> Option<(Vec<String>, Vec<String>)> {
    let response = subscription.next(snapshot)?;
    ack(subscription, &response);
    Some((
        response.resources.iter().map(|resource| resource.name.clone()).collect(),
        response.removed,
    ))
}

#[test]
fn a_wildcard_gets_everything_then_only_what_changes() {
    let mut subscription = Subscription::default();
    assert!(subscription.next(&snapshot(&[("a", "1")])).is_none(), "nobody has asked yet");
    assert_eq!(request(&mut subscription, Request::default()), Ok(Answer::None));
    let first = snapshot(&[("a", "1"), ("b", "1")]);
    assert_eq!(exchange(&mut subscription, &first), Some((names(&["a", "b"]), vec![])));
    assert_eq!(exchange(&mut subscription, &first), None);
    let second = snapshot(&[("a", "2"), ("c", "1")]);
    assert_eq!(
        exchange(&mut subscription, &second),
        Some((names(&["a", "c"]), names(&["b"])))
    );
    assert_eq!(exchange(&mut subscription, &second), None);
}

#[test]
fn a_type_with_nothing_still_answers_once() {
    let mut subscription = Subscription::default();
    request(&mut subscription, Request::default()).expect("request");
    assert_eq!(exchange(&mut subscription, &snapshot(&[])), Some((vec![], vec![])));
    assert_eq!(exchange(&mut subscription, &snapshot(&[])), None);
}

#[test]
fn a_resumed_client_gets_what_it_lacks_and_hears_what_is_gone() {
    let mut subscription = Subscription::default();
    let held = [("a", "1"), ("b", "old"), ("gone", "1")];
    let initial_versions = held
        .iter()
        .map(|(name, version)| (name.to_string(), version.to_string()))
        .collect();
    request(
        &mut subscription,
        Request {
            initial_versions,
            ..Request::default()
        },
    )
    .expect("request");
    let now = snapshot(&[("a", "1"), ("b", "2"), ("c", "1")]);
    assert_eq!(
        exchange(&mut subscription, &now),
        Some((names(&["b", "c"]), names(&["gone"])))
    );

    let mut current = Subscription::default();
    let initial_versions = [("a".to_owned(), "1".to_owned())].into();
    request(
        &mut current,
        Request {
            initial_versions,
            ..Request::default()
        },
    )
    .expect("request");
    assert_eq!(
        exchange(&mut current, &snapshot(&[("a", "1")])),
        Some((vec![], vec![])),
        "or it would never be ready"
    );
}

#[test]
fn one_response_is_in_flight_and_changes_coalesce() {
    let mut subscription = Subscription::default();
    request(&mut subscription, Request::default()).expect("request");
    let first = subscription.next(&snapshot(&[("a", "1")])).expect("first");
    for version in ["2", "3", "4"] {
        assert!(subscription.next(&snapshot(&[("a", version), ("b", version)])).is_none());
    }
    ack(&mut subscription, &first);
    let second = subscription.next(&snapshot(&[("a", "4"), ("b", "4")])).expect("second");
    assert_eq!(second.resources.len(), 2);
    assert_eq!(second.resources[0].version, "4");
    assert_ne!(first.nonce, second.nonce);
    // An answer to an old response settles nothing.
    let stale = Request {
        nonce: first.nonce,
        ..Request::default()
    };
    assert_eq!(request(&mut subscription, stale), Ok(Answer::None));
    assert!(subscription.in_flight());
}

#[test]
fn what_was_rejected_comes_again_only_when_it_changes() {
    let mut subscription = Subscription::default();
    request(&mut subscription, Request::default()).expect("request");
    let good = snapshot(&[("a", "1")]);
    exchange(&mut subscription, &good);
    let bad = snapshot(&[("a", "2")]);
    let response = subscription.next(&bad).expect("update");
    let nack = Request {
        nonce: response.nonce,
        error: Some("cannot".into()),
        ..Request::default()
    };
    assert_eq!(
        request(&mut subscription, nack),
        Ok(Answer::Rejected {
            names: names(&["a"]),
            error: "cannot".into()
        })
    );
    assert!(subscription.next(&bad).is_none(), "not again and again");
    assert_eq!(
        exchange(&mut subscription, &good),
        Some((names(&["a"]), vec![])),
        "the old form is a change"
    );
    let response = subscription.next(&bad).expect("update");
    request(
        &mut subscription,
        Request {
            nonce: response.nonce,
            error: Some("cannot".into()),
            ..Request::default()
        },
    )
    .expect("nack");
    assert_eq!(
        exchange(&mut subscription, &snapshot(&[])),
        Some((vec![], names(&["a"]))),
        "its end is told"
    );
}

#[test]
fn on_demand_serves_names_and_aliases_and_answers_for_what_is_not_there() {
    let mut subscription = Subscription::default();
    request(
        &mut subscription,
        Request {
            subscribe: names(&["*"]),
            unsubscribe: names(&["*"]),
            ..Request::default()
        },
    )
    .expect("request");
    let now = snapshot(&[("a", "1"), ("b", "1"), ("c", "1")]);
    assert_eq!(
        exchange(&mut subscription, &now),
        Some((vec![], vec![])),
        "ready, with nothing"
    );
    request(
        &mut subscription,
        Request {
            subscribe: names(&["a", "/b", "none"]),
            ..Request::default()
        },
    )
    .expect("request");
    assert_eq!(
        exchange(&mut subscription, &now),
        Some((names(&["a", "b"]), names(&["none"])))
    );
    assert_eq!(exchange(&mut subscription, &now), None);
    // What was not there comes when it is.
    let later = snapshot(&[("a", "1"), ("b", "2"), ("c", "2"), ("none", "1")]);
    assert_eq!(exchange(&mut subscription, &later), Some((names(&["b", "none"]), vec![])));
    // A second question for the same is answered again.
    request(
        &mut subscription,
        Request {
            subscribe: names(&["a", "/b"]),
            ..Request::default()
        },
    )
    .expect("request");
    assert_eq!(exchange(&mut subscription, &later), Some((names(&["a", "b"]), vec![])));
    // Unsubscribed: nothing more of it.
    request(
        &mut subscription,
        Request {
            unsubscribe: names(&["a"]),
            ..Request::default()
        },
    )
    .expect("request");
    assert_eq!(
        exchange(&mut subscription, &snapshot(&[("a", "9"), ("b", "2"), ("none", "1")])),
        None
    );
    assert_eq!(
        exchange(&mut subscription, &snapshot(&[("none", "1")])),
        Some((vec![], names(&["b"])))
    );
}

#[test]
fn a_service_brings_its_endpoints() {
    let mut now = snapshot(&[("ns/svc", "1"), ("w1", "1"), ("w2", "1"), ("w3", "1")]);
    now.endpoints.insert("ns/svc".into(), names(&["w1", "w3"]));
    let mut subscription = Subscription::default();
    request(
        &mut subscription,
        Request {
            subscribe: names(&["/ns/svc"]),
            ..Request::default()
        },
    )
    .expect("request");
    assert_eq!(
        exchange(&mut subscription, &now),
        Some((names(&["ns/svc", "w1", "w3"]), vec![]))
    );
}

#[test]
fn a_wildcard_can_be_left_for_names() {
    let mut subscription = Subscription::default();
    request(&mut subscription, Request::default()).expect("request");
    let now = snapshot(&[("a", "1"), ("b", "1")]);
    exchange(&mut subscription, &now);
    request(
        &mut subscription,
        Request {
            subscribe: names(&["a"]),
            unsubscribe: names(&["*"]),
            ..Request::default()
        },
    )
    .expect("request");
    assert_eq!(exchange(&mut subscription, &now), Some((names(&["a"]), names(&["b"]))));
}

#[test]
fn large_states_are_split_and_all_arrives() {
    let value = "x".repeat(10_000);
    let count = 3 * MAX_RESPONSE_BYTES / value.len();
    let many: Vec<(String, &str)> = (0..count).map(|i| (format!("r{i:06}"), value.as_str())).collect();
    let many: Vec<(&str, &str)> = many.iter().map(|(name, value)| (name.as_str(), *value)).collect();
    let all = snapshot(&many);
    let mut subscription = Subscription::default();
    request(&mut subscription, Request::default()).expect("request");
    let (mut received, mut responses) = (0, 0);
    while let Some(response) = subscription.next(&all) {
        let bytes: usize = response.resources.iter().map(|resource| resource.value.len()).sum();
        assert!(bytes <= MAX_RESPONSE_BYTES);
        received += response.resources.len();
        responses += 1;
        assert_eq!(response.version.ends_with("+partial"), received < count);
        ack(&mut subscription, &response);
    }
    assert_eq!(received, count);
    assert!(responses >= 3);
    // Their end is split no less.
    let mut removed = 0;
    while let Some(response) = subscription.next(&snapshot(&[])) {
        removed += response.removed.len();
        ack(&mut subscription, &response);
    }
    assert_eq!(removed, count);
}

#[test]
fn subscriptions_are_bounded() {
    let mut subscription = Subscription::default();
    let long = Request {
        subscribe: vec!["x".repeat(MAX_NAME_BYTES + 1)],
        ..Request::default()
    };
    assert_eq!(request(&mut subscription, long), Err(TooMuch::NameLength));
    let many = Request {
        subscribe: vec!["x".to_owned(); MAX_RESOURCES + 1],
        ..Request::default()
    };
    assert_eq!(request(&mut subscription, many), Err(TooMuch::Names));
    // What is not there is remembered up to a bound, what is there is not counted.
    let absent = |from: usize, to: usize| Request {
        subscribe: (from..to).map(|i| format!("absent-{i}")).collect(),
        ..Request::default()
    };
    let there = snapshot(&[("a", "1")]);
    let mut subscription = Subscription::default();
    assert!(subscription.request(absent(0, MAX_ABSENT_NAMES), Some(&there)).is_ok());
    let known = Request {
        subscribe: names(&["a", "/a"]),
        ..Request::default()
    };
    assert!(subscription.request(known, Some(&there)).is_ok());
    assert_eq!(
        subscription.request(absent(MAX_ABSENT_NAMES, MAX_ABSENT_NAMES + 1), Some(&there)),
        Err(TooMuch::Absent)
    );
}

#[test]
fn an_agent_that_holds_all_it_may_is_resumed() {
    let held = (0..MAX_RESOURCES).map(|i| (format!("r{i}"), "1".to_owned())).collect();
    let resume = Request {
        initial_versions: held,
        ..Request::default()
    };
    assert_eq!(request(&mut Subscription::default(), resume), Ok(Answer::None));
}
