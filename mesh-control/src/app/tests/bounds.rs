//! What one peer can take of the control plane, and how it is told.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::limits::{MAX_ABSENT_NAMES, MAX_REPORTED_PODS, MAX_STREAMS_PER_NODE, MAX_TYPES};

const SHORT: Duration = Duration::from_millis(200);
/// Longer than any test.
const NEVER: Duration = Duration::from_secs(3600);

/// Everything else waits for ever, so that what ends is ended by the bound under test.
pub(super) fn patient() -> Bounds {
    Bounds {
        authenticate: NEVER,
        acknowledge: NEVER,
        send: NEVER,
        token_recheck: NEVER,
        tls_handshake: NEVER,
        admin: NEVER,
        publish_interval: Duration::ZERO,
        ..Bounds::default()
    }
}

impl Bench {
    pub(super) fn metric(&self, line: &str) -> bool {
        let metrics = self.running.control.metrics.text().expect("metrics");
        metrics.lines().any(|given| given == line)
    }

    pub(super) async fn until_metric(&self, line: &str) {
        let seen = timeout(PATIENCE, async {
            while !self.metric(line) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        let all = || self.running.control.metrics.text();
        assert!(seen.await.is_ok(), "{line} is not in {:?}", all());
    }

    /// A channel over which the server can send next to nothing until its messages are read.
    async fn narrow_channel(&self) -> Channel {
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(self.running.control.trust_bundle()[0].clone()))
            .domain_name("localhost");
        Endpoint::from_shared(format!("https://{}", self.running.listen))
            .expect("URI")
            .tls_config(tls)
            .expect("TLS")
            .initial_stream_window_size(16)
            .connect()
            .await
            .expect("connect")
    }
}

pub(super) fn web() -> String {
    pod("web", "10.0.0.1", "node-a")
}

#[tokio::test]
async fn a_connection_without_a_token_is_closed_and_one_with_a_token_stays() {
    let bounds = Bounds {
        authenticate: SHORT,
        ..patient()
    };
    let bench = Bench::start_within(&web(), bounds).await;
    let token = bench.token("node-a");
    let mut own = bench.discovery(&token, vec![first(ADDRESS_TYPE_URL, "node-a")]).await;
    own.take().await;
    let idle = bench.channel().await;
    bench
        .until_metric("mesh_control_connections_refused_total{reason=\"unauthenticated\"} 1")
        .await;
    bench.until_metric("mesh_control_connections 1").await;
    // Calls that are refused buy no time.
    let refused = Client::open(idle.clone(), "wrong", vec![first(ADDRESS_TYPE_URL, "node-a")]).await;
    assert!(refused.is_err());
    bench
        .until_metric("mesh_control_connections_refused_total{reason=\"unauthenticated\"} 2")
        .await;
    bench.write("more.yaml", &pod("late", "10.0.0.2", "node-b"));
    assert_eq!(own.take().await.resources.len(), 1, "the authenticated one goes on");
    bench.running.stop().await;
}

/// True once the other side has closed; false when it has sent something.
async fn is_closed(stream: &mut tokio::net::TcpStream) -> bool {
    use tokio::io::AsyncReadExt as _;
    let read = timeout(PATIENCE, stream.read_u8()).await;
    read.expect("neither closed nor answered").is_err()
}

#[tokio::test]
async fn a_handshake_that_does_not_end_is_ended() {
    use tokio::io::AsyncWriteExt as _;
    let bounds = Bounds {
        tls_handshake: SHORT,
        ..patient()
    };
    let bench = Bench::start_within(&web(), bounds).await;
    let mut silent = tokio::net::TcpStream::connect(bench.running.listen).await.expect("connect");
    let mut begun = tokio::net::TcpStream::connect(bench.running.listen).await.expect("connect");
    // The beginning of a handshake's record.
    begun.write_all(&[0x16, 0x03, 0x01, 0x02]).await.expect("sent");
    assert!(is_closed(&mut silent).await && is_closed(&mut begun).await);
    bench
        .until_metric("mesh_control_connections_refused_total{reason=\"handshake_timeout\"} 2")
        .await;
    bench.until_metric("mesh_control_connections 0").await;
    bench.running.stop().await;
}

#[tokio::test]
async fn pages_have_so_many_connections_and_one_that_asks_nothing_is_closed() {
    let bounds = Bounds {
        admin_connections: 2,
        ..patient()
    };
    let bench = Bench::start_within(&web(), bounds).await;
    let open = async || tokio::net::TcpStream::connect(bench.running.admin).await.expect("connect");
    let (first, _second) = (open().await, open().await);
    assert!(is_closed(&mut open().await).await);
    assert!(bench.metric("mesh_control_connections_refused_total{reason=\"admin_too_many\"} 1"));
    drop(first);
    let answered = timeout(PATIENCE, async {
        while !ask_if_open(bench.running.admin).await.contains("200 OK") {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    answered.await.expect("a place is given back");
    bench.running.stop().await;

    // All the others are for other addresses.
    let bounds = Bounds {
        admin_connections_per_address: 1,
        ..patient()
    };
    let bench = Bench::start_within(&web(), bounds).await;
    let open = async || tokio::net::TcpStream::connect(bench.running.admin).await.expect("connect");
    let _first = open().await;
    assert!(is_closed(&mut open().await).await, "one address has one place");
    bench.running.stop().await;

    let bounds = Bounds {
        admin: SHORT,
        ..patient()
    };
    let bench = Bench::start_within(&web(), bounds).await;
    let mut silent = tokio::net::TcpStream::connect(bench.running.admin).await.expect("connect");
    assert!(is_closed(&mut silent).await, "it has asked nothing");
    bench.running.stop().await;
}

/// The answer, or nothing where the connection was closed.
async fn ask_if_open(admin: SocketAddr) -> String {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(admin).await.expect("connect");
    let mut text = String::new();
    // A place that is not free yet: the write or the read fails.
    let asked = stream.write_all(b"GET /healthz/ready HTTP/1.1\r\nhost: a\r\n\r\n").await;
    match asked {
        Ok(()) => stream.read_to_string(&mut text).await.map_or(String::new(), |_| text),
        Err(_) => String::new(),
    }
}

#[tokio::test]
async fn connections_are_bounded_in_all_and_of_one_address() {
    for bounds in [
        Bounds {
            connections: 2,
            ..patient()
        },
        Bounds {
            connections_per_address: 2,
            ..patient()
        },
    ] {
        let bench = Bench::start_within(&web(), bounds).await;
        let first = bench.channel().await;
        let _second = bench.channel().await;
        let root = bench.running.control.trust_bundle()[0].clone();
        assert!(connect(bench.running.listen, root).await.is_err(), "{bounds:?}");
        assert!(bench.metric("mesh_control_connections_refused_total{reason=\"too_many\"} 1"));
        drop(first);
        bench.until_metric("mesh_control_connections 1").await;
        let _third = bench.channel().await;
        bench.running.stop().await;
    }
}

#[tokio::test]
async fn a_node_has_only_so_many_streams() {
    let bench = Bench::start_within(&web(), patient()).await;
    let (a, b) = (bench.token("node-a"), bench.token("node-b"));
    let mut open = Vec::new();
    for _ in 0..MAX_STREAMS_PER_NODE {
        open.push(bench.discovery(&a, vec![first(ADDRESS_TYPE_URL, "node-a")]).await);
    }
    let fifth = Client::open(bench.channel().await, &a.secret, vec![first(ADDRESS_TYPE_URL, "node-a")]).await;
    assert_eq!(fifth.err().expect("refused").code(), Code::ResourceExhausted);
    assert!(bench.metric("mesh_control_discovery_streams_cut_total{reason=\"too_many\"} 1"));
    // Another node has its own.
    bench
        .discovery(&b, vec![first(ADDRESS_TYPE_URL, "node-b")])
        .await
        .take()
        .await;
    drop(open.pop());
    let again = timeout(PATIENCE, async {
        loop {
            match Client::open(bench.channel().await, &a.secret, vec![first(ADDRESS_TYPE_URL, "node-a")]).await {
                Ok(client) => return client,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    });
    again.await.expect("a place is given back").take().await;

    // Reports have places of their own.
    let empty = || NodeReport {
        sequence: 1,
        ..NodeReport::default()
    };
    let mut open = Vec::new();
    for _ in 0..MAX_STREAMS_PER_NODE {
        open.push(reports(&bench, &a, empty()).await);
    }
    let (_sender, receiver) = mpsc::channel::<NodeReport>(1);
    let fifth = NodeReportsClient::new(bench.channel().await)
        .report(authorized(ReceiverStream::new(receiver), &a.secret))
        .await;
    assert_eq!(fifth.expect_err("refused").code(), Code::ResourceExhausted);
    bench.running.stop().await;
}

#[tokio::test]
async fn of_types_that_do_not_exist_nothing_is_remembered_and_they_are_few() {
    let bench = Bench::start_within(&web(), patient()).await;
    let token = bench.token("node-a");
    let other = |n: usize| DeltaDiscoveryRequest {
        resource_names_subscribe: (0..=MAX_ABSENT_NAMES).map(|i| format!("name-{i}")).collect(),
        ..first(&format!("type.googleapis.com/other-{n}"), "node-a")
    };
    let mut client = bench.discovery(&token, (0..MAX_TYPES).map(other).collect()).await;
    for _ in 0..MAX_TYPES {
        let response = client.take().await;
        assert!(response.resources.is_empty() && response.removed_resources.is_empty());
    }
    client.requests.send(other(MAX_TYPES)).await.expect("an open stream");
    assert_eq!(client.next().await.expect_err("cut").code(), Code::ResourceExhausted);
    assert!(bench.metric("mesh_control_discovery_streams_cut_total{reason=\"too_much\"} 1"));
    // Of a type that exists, they are bounded.
    let names = DeltaDiscoveryRequest {
        type_url: ADDRESS_TYPE_URL.to_owned(),
        ..other(0)
    };
    let mut client = bench.discovery(&token, vec![names]).await;
    assert_eq!(client.next().await.expect_err("cut").code(), Code::ResourceExhausted);
    bench.running.stop().await;
}

#[tokio::test]
async fn a_client_that_acknowledges_nothing_is_cut() {
    let bounds = Bounds {
        acknowledge: SHORT,
        ..patient()
    };
    let bench = Bench::start_within(&web(), bounds).await;
    let token = bench.token("node-a");
    let mut client = bench.discovery(&token, vec![first(ADDRESS_TYPE_URL, "node-a")]).await;
    assert_eq!(client.next().await.expect("a response").resources.len(), 1);
    assert_eq!(client.next().await.expect_err("cut").code(), Code::DeadlineExceeded);
    assert!(bench.metric("mesh_control_discovery_streams_cut_total{reason=\"unacknowledged\"} 1"));
    bench.running.stop().await;
}

#[tokio::test]
async fn a_client_that_reads_nothing_is_cut() {
    let bounds = Bounds {
        send: SHORT,
        ..patient()
    };
    // The first response is more than gRPC gathers for one write and fills the connection; two more may wait behind it.
    let many: String = (1..=500)
        .map(|i| pod(&format!("web-{i}"), &format!("10.0.{}.{}", i / 250, i % 250 + 1), "node-a"))
        .collect();
    let bench = Bench::start_within(&many, bounds).await;
    let token = bench.token("node-a");
    let channel = bench.narrow_channel().await;
    let types = [
        ADDRESS_TYPE_URL,
        SETTINGS_TYPE_URL,
        AUTHORIZATION_TYPE_URL,
        "type.googleapis.com/of.others",
    ];
    let types = types.map(|url| first(url, "node-a"));
    let _client = Client::open(channel, &token.secret, types.into()).await.expect("stream");
    bench
        .until_metric("mesh_control_discovery_streams_cut_total{reason=\"unread\"} 1")
        .await;
    bench.until_metric("mesh_control_discovery_streams 0").await;
    bench.running.stop().await;
}

#[tokio::test]
async fn an_agent_that_reads_no_receipts_is_cut() {
    let bounds = Bounds {
        send: SHORT,
        ..patient()
    };
    let bench = Bench::start_within(&web(), bounds).await;
    let token = bench.token("node-a");
    let (sender, receiver) = mpsc::channel(64);
    for sequence in 1..=32 {
        let report = NodeReport {
            sequence,
            ..NodeReport::default()
        };
        sender.send(report).await.expect("room");
    }
    let _receipts = NodeReportsClient::new(bench.narrow_channel().await)
        .report(authorized(ReceiverStream::new(receiver), &token.secret))
        .await
        .expect("stream");
    bench
        .until_metric("mesh_control_report_streams_cut_total{reason=\"unread\"} 1")
        .await;
    bench.running.stop().await;
}

#[tokio::test]
async fn a_report_has_only_so_many_pods() {
    let bench = Bench::start_within(&web(), patient()).await;
    let token = bench.token("node-a");
    let of = |count: usize| NodeReport {
        sequence: 1,
        pods: vec![PodReport::default(); count],
        ..NodeReport::default()
    };
    let (_open, mut receipts) = reports(&bench, &token, of(MAX_REPORTED_PODS)).await;
    receipts.message().await.expect("taken");
    let (_open, mut receipts) = reports(&bench, &token, of(MAX_REPORTED_PODS + 1)).await;
    assert_eq!(receipts.message().await.expect_err("refused").code(), Code::ResourceExhausted);
    assert!(bench.metric("mesh_control_report_streams_cut_total{reason=\"too_much\"} 1"));
    bench.running.stop().await;
}

#[tokio::test]
async fn a_token_that_is_replaced_ends_its_streams() {
    let bounds = Bounds {
        token_recheck: SHORT,
        ..patient()
    };
    let bench = Bench::start_within(&web(), bounds).await;
    let (a, b) = (bench.token("node-a"), bench.token("node-b"));
    let mut client = bench.discovery(&a, vec![first(ADDRESS_TYPE_URL, "node-a")]).await;
    client.take().await;
    let mut other = bench.discovery(&b, vec![first(ADDRESS_TYPE_URL, "node-b")]).await;
    other.take().await;
    let (_open, mut receipts) = reports(&bench, &a, NodeReport::default()).await;
    receipts.message().await.expect("taken");
    let tokens = Tokens::open(&StateDir::open(&bench.dir.path().join("state")).expect("state")).expect("tokens");
    tokens.issue("node-a", "10.0.0.1:15012", "00", true).expect("rotated");
    assert_eq!(client.next().await.expect_err("cut").code(), Code::Unauthenticated);
    let cut = timeout(PATIENCE, receipts.message()).await.expect("in time");
    assert_eq!(cut.expect_err("cut").code(), Code::Unauthenticated);
    for metric in ["discovery_streams_cut", "report_streams_cut"] {
        bench
            .until_metric(&format!("mesh_control_{metric}_total{{reason=\"token\"}} 1"))
            .await;
    }
    bench.write("more.yaml", &pod("late", "10.0.0.2", "node-b"));
    assert_eq!(other.take().await.resources.len(), 1, "the other node's stream goes on");
    bench.running.stop().await;
}

#[tokio::test]
async fn a_registry_that_is_emptied_takes_nothing_out_of_force_not_even_over_a_restart() {
    let mut bench = Bench::start_within(&web(), patient()).await;
    let token = bench.token("node-a");
    let mut client = bench.discovery(&token, vec![first(ADDRESS_TYPE_URL, "node-a")]).await;
    let version = client.take().await.resources[0].version.clone();
    let folder = bench.dir.path().join("registry");
    let aside = bench.dir.path().join("aside");
    std::fs::rename(folder.join("mesh.yaml"), &aside).expect("unmounted");
    bench.until_metric("mesh_control_registry_stale 1").await;
    assert_eq!(bench.running.control.snapshot().pods.len(), 1);
    let told = super::ask(bench.running.admin, "/healthz/ready").await;
    assert!(told.contains("200 OK") && told.contains("leave one manifest"), "{told}");

    bench.restart().await;
    assert!(bench.metric("mesh_control_registry_stale 1"));
    let told = super::ask(bench.running.admin, "/healthz/ready").await;
    assert!(told.contains("503") && told.contains("leave one manifest"), "{told}");
    let held = DeltaDiscoveryRequest {
        initial_resource_versions: [(WEB.to_owned(), version)].into(),
        ..first(ADDRESS_TYPE_URL, "node-a")
    };
    let mut client = bench.discovery(&token, vec![held]).await;
    // Mounted again: the first thing that the agent hears is that all is as it was.
    std::fs::rename(&aside, folder.join("mesh.yaml")).expect("mounted");
    let resumed = client.take().await;
    assert!(
        resumed.removed_resources.is_empty() && resumed.resources.is_empty(),
        "{resumed:?}"
    );
    bench.until_metric("mesh_control_registry_stale 0").await;
    // Emptied for good.
    std::fs::rename(folder.join("mesh.yaml"), &aside).expect("removed");
    bench.write("last.yaml", "apiVersion: v1\nkind: Namespace\nmetadata: {name: last}\n");
    assert_eq!(client.take().await.removed_resources, [WEB]);
    bench.running.stop().await;
}

#[tokio::test]
async fn what_others_may_read_is_refused_and_secrets_are_written_for_the_owner_alone() {
    use std::os::unix::fs::PermissionsExt as _;
    let bench = Bench::start_within(&web(), patient()).await;
    let token = bench.token("node-a");
    let (_open, mut receipts) = reports(
        &bench,
        &token,
        NodeReport {
            pods: vec![PodReport {
                uid: "uid-web".into(),
                namespace: "shop".into(),
                name: "web".into(),
                proof: Proof::Proven.into(),
                ..PodReport::default()
            }],
            ..NodeReport::default()
        },
    )
    .await;
    receipts.message().await.expect("taken");
    bench.until_metric("mesh_control_pods{state=\"proven\"} 1").await;
    let state = bench.dir.path().join("state");
    let mode = |path: &std::path::Path| std::fs::metadata(path).expect("file").permissions().mode() & 0o7777;
    let files = AtomicUsize::new(0);
    fn walk(dir: &std::path::Path, visit: &impl Fn(&std::path::Path)) {
        visit(dir);
        for entry in std::fs::read_dir(dir).expect("folder") {
            let path = entry.expect("entry").path();
            if path.is_dir() { walk(&path, visit) } else { visit(&path) }
        }
    }
    walk(&state, &|path| {
        let expected = if path.is_dir() { 0o700 } else { 0o600 };
        assert_eq!(mode(path), expected, "{}", path.display());
        files.fetch_add(usize::from(path.is_file()), Ordering::Relaxed);
    });
    assert!(
        files.load(Ordering::Relaxed) >= 4,
        "root, token, capture states, that the registry has content"
    );
    let args = bench.args.clone();
    bench.running.stop().await;

    let open = |path: &std::path::Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("mode");
    };
    let refused = async || start(&args).await.err().map(|error| format!("{error:#}"));
    open(&state, 0o750);
    let said = refused().await.expect("refused");
    assert!(said.contains("chmod 700"), "{said}");
    open(&state, 0o700);
    for file in ["root.pem", "capture-states.json"] {
        open(&state.join(file), 0o640);
        let said = refused().await.expect("refused");
        assert!(said.contains("chmod 600") && said.contains(file), "{said}");
        open(&state.join(file), 0o600);
    }
    assert_eq!(refused().await, None);
}
