//! What others may do to the agent, and what a node may be like.

use std::fs;
use std::ops::Range;
use std::process::Command;

use mesh_agent::capture::CaptureConfig;
use mesh_agent::capture::kernel::KernelConfig;
use mesh_agent::proxy::ProxyError;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use socket2::{Domain, Socket, Type};
use tokio::net::TcpSocket;
use tokio::task::JoinSet;

use super::bed::{CAME_BACK, SECOND_V4};
use super::*;

const SILENT: usize = 200;

#[tokio::test(flavor = "multi_thread")]
async fn silent_connections_take_no_pods_proof() {
    let Some(bed) = Bed::new("silent_connections_take_no_pods_proof") else {
        return;
    };
    let capture = bed.start();
    let _of_a = serve(&capture, capture.enroll(bed.pod("uid-1")).await.unwrap());
    let (second, _netns) = bed.second_pod("uid-2");
    let _of_b = serve(&capture, capture.enroll(second).await.unwrap());
    let mut silent = Vec::new();
    for _ in 0..SILENT {
        silent.push(TcpStream::connect((POD_V4, 15009)).await.unwrap());
        let from_a = bed.netns().run(|| Ok(TcpSocket::new_v4().unwrap())).unwrap();
        silent.push(from_a.connect("192.0.2.1:9".parse().unwrap()).await.unwrap());
    }
    // And more of them, to the very destination of the inbound probe, while it is under way.
    let mut flood = JoinSet::new();
    flood.spawn(async {
        let mut held = Vec::new();
        while held.len() < SILENT {
            held.push(TcpStream::connect((POD_V4, 15009)).await);
        }
        std::future::pending::<()>().await;
    });
    for uid in ["uid-2", "uid-1", "uid-2", "uid-1"] {
        capture.prove(uid).await.unwrap();
    }
    drop((silent, flood));
    assert!(capture.release("uid-2").await.unwrap());
    let gone = timeout(A_WHILE, TcpStream::connect((SECOND_V4, 15009))).await.unwrap();
    assert!(gone.is_err());
    assert!(capture.release("uid-1").await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_probe_runs_where_the_pod_runs() {
    let Some(bed) = Bed::new("the_probe_runs_where_the_pod_runs") else {
        return;
    };
    let capture = bed.start();
    let inside = bed.cgroup().join("pod");
    let outside = bed.cgroup().with_file_name(format!("{}x", bed.name));
    for cgroup in [&inside, &outside] {
        fs::create_dir_all(cgroup).unwrap();
    }
    for (cgroup, is_proven) in [(&inside, true), (&outside, false)] {
        let mut pod = bed.pod("uid-1");
        pod.cgroup_path = Some(cgroup.clone());
        let tasks = serve(&capture, capture.enroll(pod).await.unwrap());
        let proof = capture.prove("uid-1").await;
        match proof {
            Ok(()) => assert!(is_proven),
            Err(error) => assert_eq!((error.reason(), is_proven), ("outbound_not_captured", false), "{error}"),
        }
        drop(tasks);
        assert!(capture.release("uid-1").await.unwrap());
    }
    for cgroup in [&inside, &outside] {
        // Its last process is gone, and the kernel counts it for a moment yet.
        run(&format!(
            "for i in $(seq 100); do rmdir {0} 2>/dev/null && exit; sleep 0.1; done; rmdir {0}",
            cgroup.display()
        ));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_outside_of_its_cgroup_root_does_not_start() {
    let Some(bed) = Bed::new("an_agent_outside_of_its_cgroup_root_does_not_start") else {
        return;
    };
    let elsewhere = bed.cgroup().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let mut config = bed.config();
    config.kernel.cgroup_root = Some(elsewhere);
    let error = Capture::start(config).unwrap_err().to_string();
    assert!(error.contains("--cgroup-root"), "{error}");
    drop(bed.start());
}

/// Set for the second process of the next test.
const DETECT: &str = "CULVERT_TEST_DETECTS_CGROUP_ROOT";

#[tokio::test(flavor = "multi_thread")]
async fn the_root_of_a_private_cgroup_namespace_is_not_taken_for_the_nodes() {
    let folder = tempfile::tempdir().unwrap();
    if std::env::var_os(DETECT).is_some() {
        let kernel = KernelConfig {
            pin_path: folder.path().into(),
            cgroup_root: None,
        };
        println!(
            "{}",
            Capture::start(CaptureConfig::new(kernel, folder.path().join("run"))).unwrap_err()
        );
        return;
    }
    let Some(_bed) = Bed::new("the_root_of_a_private_cgroup_namespace_is_not_taken_for_the_nodes") else {
        return;
    };
    let detect = |prefix: &[&str]| {
        let name = "defences::the_root_of_a_private_cgroup_namespace_is_not_taken_for_the_nodes";
        let exe = std::env::current_exe().unwrap();
        let words: Vec<_> = prefix.iter().map(std::ffi::OsStr::new).chain([exe.as_os_str()]).collect();
        let output = Command::new(words[0])
            .args(&words[1..])
            .args(["--exact", name, "--nocapture"])
            .env(DETECT, "1")
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    // Here the root is found; what then fails is the next step.
    let in_the_nodes = detect(&["env"]);
    assert!(in_the_nodes.contains("BPF file system"), "{in_the_nodes}");
    let script = format!(
        "mount -t cgroup2 none {} && umount -l $(findmnt -nt cgroup2 -o TARGET | head -1) && exec \"$0\" \"$@\"",
        folder.path().display()
    );
    let in_a_private_one = detect(&["unshare", "--cgroup", "--mount", "sh", "-c", &script]);
    assert!(in_a_private_one.contains("--cgroup-root"), "{in_a_private_one}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_connection_that_comes_back_goes_no_further_round() {
    let Some(bed) = Bed::new("an_upstream_connection_that_comes_back_goes_no_further_round") else {
        return;
    };
    let capture = bed.start();
    let _tasks = serve(&capture, capture.enroll(bed.pod("uid-1")).await.unwrap());
    let _application = bed.application("[::]:8080");
    let before = *CAME_BACK.lock().unwrap();
    // As if the map were full: what connects from here is not noted.
    bed.leave_cgroup();
    for (round, pod) in [POD_V4, POD_V6].into_iter().enumerate() {
        let mut client = timeout(A_WHILE, TcpStream::connect((pod, 8080))).await.unwrap().unwrap();
        let ended = timeout(A_WHILE, client.read(&mut [0; 8])).await.unwrap();
        assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
        assert_eq!(*CAME_BACK.lock().unwrap() - before, u32::try_from(round).unwrap() + 1);
    }
    bed.enter_cgroup();
    assert!(capture.release("uid-1").await.unwrap());
}

/// Sockets that are bound to these ports of the Pod.
fn take_ports(bed: &Bed, ports: Range<u16>) -> Vec<Socket> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    let bound = |port| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::from(([0, 0, 0, 0], port)).into()).unwrap();
        socket
    };
    bed.netns().run(|| Ok(ports.map(bound).collect())).unwrap()
}

/// A client that ends its connections first leaves each port in TIME_WAIT for a minute, in which it must serve again.
#[tokio::test(flavor = "multi_thread")]
async fn local_ports_are_used_again() {
    const FREE: u16 = 1_000;
    const CONNECTIONS: u32 = 3 * FREE as u32;
    /// Of the agent's eighty random tries for a port none is free, once in 600 connections.
    const FAILURES: u32 = 60;
    let Some(bed) = Bed::new("local_ports_are_used_again") else {
        return;
    };
    let capture = bed.start();
    let pod = capture.enroll(bed.pod("uid-1")).await.unwrap();
    let _taken = take_ports(&bed, 20_000 + FREE..32_768);
    let listener = bed.application("0.0.0.0:8080");
    let application = SocketAddr::new(POD_V4.parse().unwrap(), 8080);
    let (mut worked, mut failed) = (0, 0);
    while worked < CONNECTIONS {
        let connected = match pod.network.upstream_socket(NODE_V4.parse().unwrap(), application) {
            Ok(upstream) => upstream.socket.connect(application).await.map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        match connected {
            Ok(client) => {
                let (mut served, _) = timeout(A_WHILE, listener.accept()).await.unwrap().unwrap();
                drop(client);
                assert_eq!(timeout(A_WHILE, served.read(&mut [0; 8])).await.unwrap().unwrap(), 0);
                worked += 1;
            }
            Err(error) => {
                failed += 1;
                assert!(failed <= FAILURES, "{error}, after {worked} connections from {FREE} ports");
            }
        }
    }
    drop(pod);
    assert!(capture.release("uid-1").await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn local_ports_that_run_out_are_named() {
    let Some(bed) = Bed::new("local_ports_that_run_out_are_named") else {
        return;
    };
    let capture = bed.start();
    let pod = capture.enroll(bed.pod("uid-1")).await.unwrap();
    let application = SocketAddr::new(POD_V4.parse().unwrap(), 8080);
    let client = NODE_V4.parse().unwrap();
    assert!(pod.network.upstream_socket(client, application).is_ok());
    let taken = take_ports(&bed, 20_000..32_768);
    let error = pod.network.upstream_socket(client, application).unwrap_err();
    assert_eq!(error.reason(), "local_ports_exhausted", "{error}");
    assert_eq!(ProxyError::from(error).reason(), "local_ports_exhausted");
    drop(taken);
    assert!(pod.network.upstream_socket(client, application).is_ok());
    drop(pod);
    assert!(capture.release("uid-1").await.unwrap());
}
