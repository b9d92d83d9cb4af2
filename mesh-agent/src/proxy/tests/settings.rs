//! What the mesh's settings decide: mutual TLS only, and what is not the mesh's.

use super::refuse::plaintext_to_echo;
use super::review::assert_cut;
use super::*;
use crate::proxy::step::Step;
use crate::state::{Exclusions, Mtls};

fn settings(mtls: Mtls) -> Settings {
    Settings {
        trust_domain: "cluster.local".into(),
        mtls,
        ..Settings::default()
    }
}

fn excluding(port: u16) -> Settings {
    Settings {
        excluded: Exclusions {
            ports: [port].into(),
            ranges: vec![],
        },
        ..settings(Mtls::Strict)
    }
}

fn only_in(namespace: &str, mtls: Mtls) -> Settings {
    let otherwise = if mtls == Mtls::Strict {
        Mtls::Permissive
    } else {
        Mtls::Strict
    };
    Settings {
        namespaces: [(namespace.into(), mtls)].into(),
        ..settings(otherwise)
    }
}

fn metric(node: &Node, name: &str) -> u64 {
    let page = node.metrics.render();
    let value = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.map_or(0, |value| value.parse().unwrap())
}

#[tokio::test]
async fn strict_takes_nothing_in_clear_and_permissive_takes_it_again() {
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let server = mesh.pod(&mesh.far, "server").await;
    let outsider = fresh_address();
    for (wanted, allowed) in [
        (settings(Mtls::Permissive), true),
        (settings(Mtls::Strict), false),
        (only_in("shop", Mtls::Permissive), true),
        (only_in("shop", Mtls::Strict), false),
        (only_in("elsewhere", Mtls::Permissive), false),
        (excluding(APPLICATION_PORT), true),
        (excluding(APPLICATION_PORT + 1), false),
    ] {
        let shown = format!("{wanted:?}");
        let refused = metric(&mesh.far, r#"mesh_policy_denied_total{policy="_strict"}"#);
        mesh.far.state.apply(vec![Change::Settings(wanted)]);
        let mut plaintext = plaintext_to_echo(&mesh, outsider, &server).await;
        if allowed {
            assert_echo(&mut plaintext, &shown).await;
            drop(plaintext);
        } else {
            assert_refused(plaintext).await;
            let line = mesh.far.logs_reason("plaintext_refused").await;
            assert_eq!((&line["path"], &line["result"]), (&"plaintext".into(), &"refused".into()));
            let now = metric(&mesh.far, r#"mesh_policy_denied_total{policy="_strict"}"#);
            assert_eq!(now, refused + 1, "{shown}");
        }
        let echo = until_echo(&server).await;
        assert_echo(&mut client.connect(server.application()).await, &shown).await;
        echo.abort();
        let _ = echo.await;
    }
    assert!(mesh.far.metrics.render().contains(r#"reason="plaintext_refused""#));
}

/// Once the one before it has gone.
async fn until_echo(server: &Pod) -> JoinHandle<()> {
    loop {
        if let Ok(listener) = TcpListener::bind(server.application()).await {
            drop(listener);
            return server.echo().await;
        }
        sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn policy_still_decides_where_strict_lets_in() {
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let server = mesh.pod(&mesh.far, "server").await;
    mesh.tell(vec![
        Change::Settings(excluding(APPLICATION_PORT)),
        deny("shop/not-client", "client"),
    ]);
    assert_refused(plaintext_to_echo(&mesh, client.ip, &server).await).await;
    mesh.far.logs_reason("denied_by_policy").await;
}

#[tokio::test]
async fn strict_cuts_what_is_open_in_clear_and_nothing_else() {
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let (server, other) = (mesh.pod(&mesh.far, "server").await, mesh.pod(&mesh.far, "other").await);
    let mut plaintext = plaintext_to_echo(&mesh, fresh_address(), &server).await;
    assert_echo(&mut plaintext, "in clear").await;
    let _application = other.echo().await;
    let mut tunnelled = client.connect(other.application()).await;
    assert_echo(&mut tunnelled, "proven").await;
    for harmless in [only_in("elsewhere", Mtls::Strict), excluding(APPLICATION_PORT)] {
        mesh.far.state.apply(vec![Change::Settings(harmless)]);
        assert_echo(&mut plaintext, "still").await;
    }
    mesh.far.state.apply(vec![Change::Settings(settings(Mtls::Strict))]);
    assert_cut(&mut plaintext).await;
    let line = mesh.far.logs_reason("cut_by_settings").await;
    assert_eq!((&line["result"], &line["policy"]), (&"failed".into(), &"".into()));
    assert_eq!(metric(&mesh.far, r#"mesh_policy_cut_total{policy="_strict"}"#), 1);
    assert_echo(&mut tunnelled, "and on").await;
}

#[tokio::test]
async fn strict_that_comes_while_a_connection_is_let_in_still_holds() {
    let mesh = Mesh::new();
    let server = mesh.pod(&mesh.far, "server").await;
    let state = mesh.far.state.clone();
    mesh.far.proxy.steps.at(
        crate::proxy::step::Step::Decided,
        Box::new(move || state.apply(vec![Change::Settings(settings(Mtls::Strict))])),
    );
    let mut stream = plaintext_to_echo(&mesh, fresh_address(), &server).await;
    stream.write_all(b"must not arrive").await.unwrap();
    assert_cut(&mut stream).await;
    let line = mesh.far.logs_reason("cut_by_settings").await;
    assert_eq!(line["bytes_received"], 0, "{line}");
}

#[tokio::test]
async fn what_is_excluded_goes_in_clear_and_is_counted() {
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let server = mesh.pod(&mesh.far, "server").await;
    let _application = server.echo().await;
    let by_range = Settings {
        excluded: Exclusions {
            ports: [].into(),
            ranges: vec![server.ip.into()],
        },
        ..settings(Mtls::Permissive)
    };
    for (nth, settings) in [excluding(APPLICATION_PORT), by_range].into_iter().enumerate() {
        mesh.tell(vec![Change::Settings(settings)]);
        assert_echo(&mut client.connect(server.application()).await, "in clear").await;
        let counted = metric(&mesh.near, r#"mesh_passthrough_connections_total{destination="excluded"}"#);
        assert_eq!(counted, nth as u64 + 1);
    }
    let line = mesh.near.log_line(|line| line["path"] == "excluded").await;
    assert_eq!(
        (&line["destination_workload"], &line["connection_security_policy"]),
        (&"server".into(), &"none".into())
    );
    assert_eq!(line["destination_principal"], "", "nothing is proven");

    // The operator's word holds for one whose capture is lost, too; and for nothing else.
    let mut lost = server.workload.clone();
    lost.membership = Membership::Lost;
    mesh.tell(vec![Change::Workload(lost)]);
    assert_echo(&mut client.connect(server.application()).await, "in clear").await;
    mesh.tell(vec![Change::Settings(settings(Mtls::Permissive))]);
    assert_refused(client.connect(server.application()).await).await;
    mesh.near.logs_reason("destination_lost").await;
}

#[tokio::test]
async fn who_is_not_proven_yet_gets_nothing_in_clear_where_strict_holds() {
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let server = mesh.pod(&mesh.far, "server").await;
    let _application = server.echo().await;
    let mut pending = server.workload.clone();
    pending.membership = Membership::Pending;
    mesh.tell(vec![Change::Workload(pending)]);
    assert_echo(&mut client.connect(server.application()).await, "passed on").await;
    mesh.near.state.apply(vec![Change::Settings(settings(Mtls::Strict))]);
    assert_refused(client.connect(server.application()).await).await;
    mesh.near.logs_reason("destination_pending").await;
    // In time, it is waited for.
    let mut stream = client.connect(server.application()).await;
    sleep(Duration::from_millis(50)).await;
    mesh.tell(vec![Change::Workload(server.workload.clone())]);
    assert_echo(&mut stream, "by tunnel").await;
}

#[tokio::test]
async fn dry_run_policies_are_counted_and_logged_and_decide_nothing() {
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let server = mesh.pod(&mesh.far, "server").await;
    let _application = server.echo().await;
    let names: Vec<String> = (0..12).map(|nth| format!("shop/trial-{nth:02}")).collect();
    let policies = names.iter().map(|name| match deny(name, "client") {
        Change::Policy(policy) => Change::Policy(Arc::new(Policy {
            dry_run: true,
            ..(*policy).clone()
        })),
        _ => unreachable!(),
    });
    mesh.tell(policies.collect());
    assert_echo(&mut client.connect(server.application()).await, "let in").await;
    let line = mesh.far.log_line(|line| line["result"] == "ok").await;
    let logged: Vec<&str> = line["dry_run_policies"]
        .as_array()
        .unwrap()
        .iter()
        .map(|name| name.as_str().unwrap())
        .collect();
    assert_eq!(logged, names[..8], "bounded");
    assert_eq!(line["policy"], "");
    for name in &names {
        let counted = metric(&mesh.far, &format!("mesh_policy_dry_run_matches_total{{policy=\"{name}\"}}"));
        assert_eq!(counted, 1, "{name}");
    }
}

/// A clear-text connection ends where a new one would no longer be let out in clear, and nowhere else.
#[tokio::test]
async fn what_is_open_in_clear_ends_with_its_destinations_protection() {
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let server = mesh.pod(&mesh.far, "server").await;
    let other = mesh.pod(&mesh.far, "other").await;
    let (_application, _of_other) = (server.echo().await, other.echo().await);
    let standing = |pod: &Pod, membership| {
        let mut workload = pod.workload.clone();
        workload.membership = membership;
        Change::Workload(workload)
    };
    let of_another_pod = |membership| {
        let mut workload = server.workload.clone();
        (workload.membership, workload.pod_uid) = (membership, "another".into());
        Change::Workload(workload)
    };
    let permissive = || Change::Settings(settings(Mtls::Permissive));
    let excluded = || Change::Settings(excluding(APPLICATION_PORT));
    // Who decides is the source: the far side is told nothing.
    mesh.near.state.apply(vec![standing(&other, Membership::Outside)]);
    let mut outside = client.connect(other.application()).await;
    assert_echo(&mut outside, "outside").await;
    let table = [
        (
            "proven",
            standing(&server, Membership::Pending),
            vec![standing(&server, Membership::Proven)],
            true,
        ),
        (
            "lost",
            standing(&server, Membership::Pending),
            vec![standing(&server, Membership::Lost)],
            false,
        ),
        (
            "strict",
            standing(&server, Membership::Pending),
            vec![Change::Settings(settings(Mtls::Strict))],
            false,
        ),
        (
            "proven and strict",
            standing(&server, Membership::Pending),
            vec![
                standing(&server, Membership::Proven),
                Change::Settings(settings(Mtls::Strict)),
            ],
            false,
        ),
        ("included", excluded(), vec![permissive()], true),
        (
            "in the mesh after all",
            standing(&server, Membership::Outside),
            vec![standing(&server, Membership::Proven)],
            true,
        ),
        (
            "another Pod's",
            standing(&server, Membership::Pending),
            vec![of_another_pod(Membership::Proven)],
            false,
        ),
    ];
    for (nth, (what, before, after, has_grace)) in table.into_iter().enumerate() {
        mesh.near
            .state
            .apply(vec![permissive(), standing(&server, Membership::Proven), before]);
        let mut stream = client.connect(server.application()).await;
        assert_echo(&mut stream, "in clear").await;
        mesh.near.state.apply(after);
        if has_grace {
            // A request on its way is answered; what goes on is cut all the same.
            sleep(2 * crate::proxy::review::PACE).await;
            assert_echo(&mut stream, what).await;
            assert_cut(&mut stream).await;
        } else {
            let soon = crate::proxy::review::PROTECTION_GRACE / 2;
            timeout(soon, assert_cut(&mut stream)).await.expect(what);
        }
        let counted = || metric(&mesh.near, r#"mesh_policy_cut_total{policy="_destination_protected"}"#);
        assert_eq!(counted(), nth as u64 + 1, "{what}");
        assert_echo(&mut outside, "goes on").await;
    }
    let line = mesh.near.logs_reason("cut_by_protection").await;
    assert_eq!(
        (&line["destination_workload"], &line["result"]),
        (&"server".into(), &"failed".into())
    );

    // What was excluded by its port and still is by its range goes on, and so does what is not proven yet.
    let by_range = Settings {
        excluded: Exclusions {
            ports: [].into(),
            ranges: vec![server.ip.into()],
        },
        ..settings(Mtls::Permissive)
    };
    mesh.near.state.apply(vec![excluded()]);
    let mut stream = client.connect(server.application()).await;
    assert_echo(&mut stream, "by its port").await;
    mesh.near.state.apply(vec![Change::Settings(by_range)]);
    assert_echo(&mut stream, "by its range").await;
    mesh.near
        .state
        .apply(vec![standing(&server, Membership::Pending), permissive()]);
    assert_echo(&mut stream, "not proven yet").await;
    sleep(2 * crate::proxy::review::PACE).await;
    assert_echo(&mut stream, "still not").await;
}

/// In several threads: what is looked at once more has been missed by a review, which must have its turn for that.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn protection_that_comes_while_a_connection_is_let_out_in_clear_still_holds() {
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let server = mesh.pod(&mesh.far, "server").await;
    let _application = server.echo().await;
    for step in [Step::Resolved, Step::LetOut] {
        let mut pending = server.workload.clone();
        pending.membership = Membership::Pending;
        mesh.near.state.apply(vec![Change::Workload(pending)]);
        // A review so soon after another one would wait.
        sleep(2 * crate::proxy::review::PACE).await;
        let (state, proven) = (mesh.near.state.clone(), server.workload.clone());
        let steps = &mesh.near.proxy.steps;
        let meanwhile = move || {
            // By a thread that is none of the runtime's: what one of those wakes waits for it.
            let told = std::thread::spawn(move || state.apply(vec![Change::Workload(proven)]));
            told.join().unwrap();
            std::thread::sleep(2 * crate::proxy::review::PACE);
        };
        steps.at(step, Box::new(meanwhile));
        let mut stream = client.connect(server.application()).await;
        if step == Step::Resolved {
            // Nothing was sent: it goes by the tunnel that there can be now, and stays.
            assert_echo(&mut stream, "by the tunnel").await;
            sleep(crate::proxy::review::PROTECTION_GRACE + 2 * crate::proxy::review::PACE).await;
            assert_echo(&mut stream, "still").await;
        } else {
            assert_cut(&mut stream).await;
            mesh.near.logs_reason("cut_by_protection").await;
        }
        assert!(!steps.is_waiting(), "{step:?}: never let out");
    }
}
