//! A changed policy and the connections that live.

use super::*;
use crate::proxy::step::Step;

const CHANGES: usize = 100;
/// All the points at which a policy may change while a connection is let in.
const STEPS: [Step; 7] = [
    Step::Accepted,
    Step::Registered,
    Step::Confirmed,
    Step::Evaluated,
    Step::Decided,
    Step::Connected,
    Step::Reviewing,
];

/// How a client of the mesh comes to a server: by its agent's tunnel, or around it, in plaintext from its own address.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Tunnel,
    Plaintext,
}

/// A connection to a server that echoes, until the test says that it is over.
async fn open(way: Way, mesh: &Mesh, client: &Pod, server: &Pod) -> (TcpStream, Option<JoinHandle<()>>) {
    match way {
        Way::Tunnel => {
            let echo = server.echo().await;
            (client.connect(server.application()).await, Some(echo))
        }
        Way::Plaintext => (refuse::plaintext_to_echo(mesh, client.ip, server).await, None),
    }
}

pub(super) async fn assert_cut(stream: &mut TcpStream) {
    let mut byte = [0];
    let read = timeout(PATIENCE, stream.read(&mut byte))
        .await
        .expect("neither cut nor served");
    assert_eq!(read.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_changed_policy_cuts_whom_it_denies_and_nobody_else() {
    let mesh = Mesh::new();
    let denied = mesh.pod(&mesh.near, "denied").await;
    let unaffected = mesh.pod(&mesh.near, "unaffected").await;
    let server = mesh.pod(&mesh.far, "server").await;
    let _application = server.echo().await;
    let mut survivor = unaffected.connect(server.application()).await;
    let mut victim = denied.connect(server.application()).await;
    assert_echo(&mut victim, "before").await;
    for change in 0..CHANGES {
        // Each is a change of the policies that apply, and about somebody else.
        mesh.tell(vec![deny("shop/other", &format!("nobody-{change}"))]);
        assert_echo(&mut survivor, &format!("byte for byte, {change}")).await;
        assert_echo(&mut victim, "still").await;
    }
    mesh.tell(vec![deny("shop/other", "denied")]);
    assert_cut(&mut victim).await;
    assert_echo(&mut survivor, "and on").await;
    let line = mesh.far.logs_reason("cut_by_policy").await;
    assert_eq!(
        (line["policy"].as_str(), line["result"].as_str()),
        (Some("shop/other"), Some("failed"))
    );

    // ALLOW policies of which none matches deny by being there.
    let Change::Policy(policy) = deny("shop/only", "somebody-else") else {
        unreachable!()
    };
    let allow = Policy {
        action: Action::Allow,
        ..(*policy).clone()
    };
    mesh.tell(vec![Change::Policy(Arc::new(allow))]);
    assert_cut(&mut survivor).await;
    let metrics = mesh.far.metrics.render();
    assert!(
        metrics.contains(r#"mesh_policy_cut_total{policy="_no_allow_matched"} 1"#),
        "{metrics}"
    );
}

#[tokio::test]
async fn a_policy_that_changes_while_a_connection_is_let_in_still_holds() {
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let server = mesh.pod(&mesh.far, "server").await;
    for way in [Way::Tunnel, Way::Plaintext] {
        for step in STEPS {
            if (way, step) == (Way::Plaintext, Step::Confirmed) {
                continue;
            }
            let policy = format!("shop/late-{way:?}-{step:?}");
            let (state, late) = (mesh.far.state.clone(), deny(&policy, "client"));
            let steps = &mesh.far.proxy.steps;
            steps.at(step, Box::new(move || state.apply(vec![late])));
            if step == Step::Reviewing {
                mesh.far.state.apply(vec![deny("shop/other", "nobody")]);
            }
            let (mut stream, echo) = open(way, &mesh, &client, &server).await;
            assert_cut(&mut stream).await;
            assert!(!steps.is_waiting(), "{way:?}: {step:?} was never done");
            // Refused, or cut, by this policy and no other.
            let line = mesh.far.log_line(|line| line["policy"] == policy.as_str()).await;
            let reason = line["reason"].as_str().unwrap();
            assert!(
                ["denied_by_policy", "cut_by_policy"].contains(&reason),
                "{way:?}, {step:?}: {line}"
            );
            assert_eq!(line["bytes_received"], 0, "{way:?}, {step:?}: {line}");
            mesh.far.state.apply(vec![Change::RemovePolicy(policy)]);
            if let Some(echo) = echo {
                echo.abort();
                let _ = echo.await;
            }
        }
    }
}

#[tokio::test]
async fn a_policy_that_arrives_while_it_is_waited_for_holds() {
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let mut server = mesh.pod(&mesh.far, "server").await;
    server.workload.policies = vec!["shop/late".into()];
    mesh.tell(vec![Change::Workload(server.workload.clone())]);
    for way in [Way::Tunnel, Way::Plaintext] {
        let (stream, echo) = open(way, &mesh, &client, &server).await;
        while mesh.far.proxy.registry.count(&server.handle.context.pod.pod_uid) == 0 {
            sleep(Duration::from_millis(1)).await;
        }
        mesh.far.state.apply(vec![deny("shop/late", "client")]);
        assert_refused(stream).await;
        mesh.far.logs_reason("denied_by_policy").await;
        mesh.far.state.apply(vec![Change::RemovePolicy("shop/late".into())]);
        if let Some(echo) = echo {
            echo.abort();
            let _ = echo.await;
        }
    }
}

/// A policy that is absent may allow: nothing is cut for that. What is known denies all the same.
#[tokio::test]
async fn what_is_known_cuts_while_a_policy_is_absent() {
    let mesh = Mesh::new();
    let denied = mesh.pod(&mesh.near, "denied").await;
    let unaffected = mesh.pod(&mesh.near, "unaffected").await;
    let mut server = mesh.pod(&mesh.far, "server").await;
    let mut plaintext = refuse::plaintext_to_echo(&mesh, fresh_address(), &server).await;
    assert_echo(&mut plaintext, "in clear").await;
    let second = mesh.pod(&mesh.far, "second").await;
    let _application = second.echo().await;
    let mut victim = denied.connect(second.application()).await;
    assert_echo(&mut victim, "before").await;
    let mut survivor = unaffected.connect(second.application()).await;
    assert_echo(&mut survivor, "before").await;
    server.workload.policies = vec!["shop/absent".into()];
    let mut second = second.workload.clone();
    second.policies = vec!["shop/absent".into()];
    mesh.far
        .state
        .apply(vec![Change::Workload(server.workload.clone()), Change::Workload(second)]);
    for stream in [&mut plaintext, &mut victim, &mut survivor] {
        assert_echo(stream, "while it is absent").await;
    }
    mesh.far.state.apply(vec![deny("shop/known", "denied")]);
    assert_cut(&mut victim).await;
    mesh.far.logs_reason("cut_by_policy").await;
    mesh.far.state.apply(vec![Change::Settings(Settings {
        trust_domain: "cluster.local".into(),
        mtls: crate::state::Mtls::Strict,
        ..Settings::default()
    })]);
    assert_cut(&mut plaintext).await;
    mesh.far.logs_reason("cut_by_settings").await;
    assert_echo(&mut survivor, "and on").await;
}
