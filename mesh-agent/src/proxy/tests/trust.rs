//! Deleted service accounts, removed roots and addresses that change hands: what then happens to connections that live.

use super::*;
use crate::identity::trust::TrustBundle;
use crate::proxy::step::Step;

fn settings(trusted: &[&Authority], revoked: &[&str]) -> Change {
    let bundle = TrustBundle::new(trusted.iter().map(|authority| authority.root.clone()).collect()).unwrap();
    Change::Settings(Settings {
        trust_domain: "cluster.local".into(),
        pod_ranges: vec!["127.250.0.0/16".parse().unwrap()],
        trust_bundle: (!bundle.is_empty()).then(|| Arc::new(bundle)),
        revoked: revoked.iter().map(|account| identity(account)).collect(),
        ..Settings::default()
    })
}

fn counts_a_cut(node: &Node, by: &str) {
    let metrics = node.metrics.render();
    let line = format!(r#"mesh_policy_cut_total{{policy="{by}"}} 1"#);
    assert!(metrics.contains(&line), "{line} in\n{metrics}");
}

/// Each side cuts by itself: the other may be slower to hear of it, or not ours.
#[tokio::test]
async fn a_deleted_service_account_cuts_what_is_its_on_either_side() {
    for (deleted, told) in [("client", "far"), ("client", "near"), ("server", "near"), ("server", "far")] {
        let mesh = Mesh::new();
        let client = mesh.pod(&mesh.near, "client").await;
        let other = mesh.pod(&mesh.near, "other").await;
        let server = mesh.pod(&mesh.far, "server").await;
        let second = mesh.pod(&mesh.far, "second").await;
        let (_server, _second) = (server.echo().await, second.echo().await);
        let mut victim = client.connect(server.application()).await;
        assert_echo(&mut victim, "before").await;
        let mut survivor = other.connect(second.application()).await;
        assert_echo(&mut survivor, "before").await;

        let node = if told == "far" { &mesh.far } else { &mesh.near };
        node.state.apply(vec![settings(&[], &[deleted])]);
        review::assert_cut(&mut victim).await;
        let line = node.logs_reason("cut_by_revocation").await;
        assert_eq!(line["result"], "failed", "{line}");
        counts_a_cut(node, "_identity_revoked");
        assert_echo(&mut survivor, "byte for byte").await;
        assert_refused(client.connect(server.application()).await).await;
        let line = node.logs_reason("identity_revoked").await;
        assert_eq!(line["result"], "refused", "{line}");

        // The account is back.
        node.state.apply(vec![settings(&[], &[])]);
        let mut again = client.connect(server.application()).await;
        assert_echo(&mut again, "after").await;
        assert_echo(&mut survivor, "after").await;
    }
}

/// A Pod that goes around its capture does not get around the end of its account.
#[tokio::test]
async fn a_deleted_service_account_does_not_come_in_without_its_tunnel() {
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let server = mesh.pod(&mesh.far, "server").await;
    let mut victim = refuse::plaintext_to_echo(&mesh, client.ip, &server).await;
    assert_echo(&mut victim, "before").await;
    mesh.far.state.apply(vec![settings(&[], &["client"])]);
    review::assert_cut(&mut victim).await;
    mesh.far.logs_reason("cut_by_revocation").await;
}

/// Two authorities, and Pods with a certificate of each.
#[tokio::test]
async fn a_removed_root_cuts_what_depends_on_it_on_either_side() {
    for (of_old, told) in [("client", "far"), ("client", "near"), ("server", "near"), ("server", "far")] {
        let (mesh, new) = (Mesh::new(), Authority::new());
        let client = mesh.pod(&mesh.near, "client").await;
        let other = mesh.pod(&mesh.near, "other").await;
        let server = mesh.pod(&mesh.far, "server").await;
        let second = mesh.pod(&mesh.far, "second").await;
        let (_server, _second) = (server.echo().await, second.echo().await);
        for (node, account) in [
            (&mesh.near, "client"),
            (&mesh.near, "other"),
            (&mesh.far, "server"),
            (&mesh.far, "second"),
        ] {
            if account != of_old {
                node.certificates.insert(new.issue(&identity(account)));
            }
        }
        // The new certificates' own roots are not the old ones': while both are trusted, everybody gets on.
        mesh.tell(vec![settings(&[&mesh.authority, &new], &[])]);
        let mut victim = client.connect(server.application()).await;
        assert_echo(&mut victim, "before").await;
        let mut survivor = other.connect(second.application()).await;
        assert_echo(&mut survivor, "before").await;

        let node = if told == "far" { &mesh.far } else { &mesh.near };
        node.state.apply(vec![settings(&[&new], &[])]);
        review::assert_cut(&mut victim).await;
        node.logs_reason("cut_by_removed_root").await;
        counts_a_cut(node, "_root_removed");
        assert_echo(&mut survivor, "byte for byte").await;
        assert_refused(client.connect(server.application()).await).await;

        // A certificate by the root that is left.
        let node = if of_old == "client" { &mesh.near } else { &mesh.far };
        node.certificates.insert(new.issue(&identity(of_old)));
        mesh.tell(vec![settings(&[&new], &[])]);
        let mut again = client.connect(server.application()).await;
        assert_echo(&mut again, "after").await;
        assert_echo(&mut survivor, "after").await;
    }
}

#[tokio::test]
async fn what_ends_while_a_connection_is_let_in_is_noticed() {
    let (mesh, other) = (Mesh::new(), Authority::new());
    let client = mesh.pod(&mesh.near, "client").await;
    let server = mesh.pod(&mesh.far, "server").await;
    let _echo = server.echo().await;
    let steps = [
        Step::Accepted,
        Step::Registered,
        Step::Confirmed,
        Step::Evaluated,
        Step::Decided,
        Step::Connected,
    ];
    for step in steps {
        let endings = [
            ("revoked", settings(&[], &["client"])),
            ("root", settings(&[&other], &[])),
            ("holder", Change::RemoveAddress(client.workload.uid.to_string())),
        ];
        for (what, ending) in endings {
            let state = mesh.far.state.clone();
            mesh.far.proxy.steps.at(step, Box::new(move || state.apply(vec![ending])));
            let mut stream = client.connect(server.application()).await;
            review::assert_cut(&mut stream).await;
            assert!(!mesh.far.proxy.steps.is_waiting(), "{what}: {step:?} was never done");
            until("it is over", || {
                mesh.far.proxy.registry.count(&server.handle.context.pod.pod_uid) == 0
            })
            .await;
            mesh.tell(vec![settings(&[], &[]), Change::Workload(client.workload.clone())]);
        }
    }
    let mut stream = client.connect(server.application()).await;
    assert_echo(&mut stream, "as before").await;
}

/// The source's side: the destination is about to answer, and a review of the source has nothing to cut yet.
#[tokio::test]
async fn what_ends_while_a_connection_is_let_out_is_noticed() {
    let (mesh, other) = (Mesh::new(), Authority::new());
    let client = mesh.pod(&mesh.near, "client").await;
    let server = mesh.pod(&mesh.far, "server").await;
    let _echo = server.echo().await;
    let endings = [
        ("revoked", settings(&[], &["server"])),
        ("root", settings(&[&other], &[])),
        ("holder", Change::RemoveAddress(server.workload.uid.to_string())),
    ];
    for (what, ending) in endings {
        // A review so soon after another one would wait, and cut what is decided by then.
        sleep(2 * crate::proxy::review::PACE).await;
        let state = mesh.near.state.clone();
        let steps = &mesh.far.proxy.steps;
        steps.at(Step::Connected, Box::new(move || state.apply(vec![ending])));
        let mut stream = client.connect(server.application()).await;
        review::assert_cut(&mut stream).await;
        assert!(!steps.is_waiting(), "{what}: never connected");
        mesh.tell(vec![settings(&[], &[]), Change::Workload(server.workload.clone())]);
        let mut stream = client.connect(server.application()).await;
        assert_echo(&mut stream, "as before").await;
    }
}

/// Somebody else has the address of the source, or nobody.
#[tokio::test]
async fn a_source_that_is_gone_is_cut() {
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let other = mesh.pod(&mesh.near, "other").await;
    let server = mesh.pod(&mesh.far, "server").await;
    let _echo = server.echo().await;
    let mut survivor = other.connect(server.application()).await;
    assert_echo(&mut survivor, "before").await;
    let gone = Change::RemoveAddress(client.workload.uid.to_string());
    for changes in [vec![gone.clone()], vec![gone, Change::Workload(workload("next", client.ip))]] {
        mesh.far.state.apply(vec![
            Change::RemoveAddress("Kubernetes//Pod/shop/next".into()),
            Change::Workload(client.workload.clone()),
        ]);
        let mut victim = client.connect(server.application()).await;
        assert_echo(&mut victim, "before").await;
        mesh.far.state.apply(changes);
        review::assert_cut(&mut victim).await;
        mesh.far.logs_reason("cut_by_new_holder").await;
        assert_echo(&mut survivor, "byte for byte").await;
    }
}
