//! What an agent finds at its start that is not as its predecessor left it: nothing that may live is let go.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use mesh_agent::capture::kernel::inspect::LookupTarget;
use mesh_agent::capture::netns::NetNamespace;

use super::*;

/// A process in the Pod's namespace, ended when dropped.
struct Inhabitant(Child);

impl Inhabitant {
    fn of(path: &Path) -> Self {
        let child = Command::new("nsenter")
            .arg(format!("--net={}", path.display()))
            .args(["sleep", "1000"])
            .spawn()
            .unwrap();
        let inhabitant = Self(child);
        let wanted = fs::metadata(path).unwrap();
        // It enters a moment after it starts.
        for _ in 0..100 {
            if fs::metadata(inhabitant.path()).is_ok_and(|inside| inside.ino() == wanted.ino()) {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        inhabitant
    }

    fn path(&self) -> PathBuf {
        format!("/proc/{}/ns/net", self.0.id()).into()
    }
}

fn path_of(file: &fs::File) -> PathBuf {
    format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()).into()
}

/// Another process's listener on a port of the agent's.
fn application_at(netns: &Path) -> std::net::TcpListener {
    let netns = NetNamespace::open(netns).unwrap();
    netns
        .run(|| Ok(std::net::TcpListener::bind("127.0.0.1:15008").unwrap()))
        .unwrap()
}

impl Drop for Inhabitant {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn unlink(bed: &Bed) {
    let path = bed.netns_path();
    run(&format!("umount -l {0} && rm {0}", path.display()));
}

/// The Pod's entry and link are as they were.
fn assert_captured(bed: &Bed, cookie: u64) {
    let hand = Kernel::load(&bed.kernel_config()).unwrap();
    assert!(
        hand.pods().unwrap().iter().any(|(of, _)| *of == cookie),
        "the Pod speaks in clear"
    );
    assert!(
        matches!(hand.lookup_target("uid-1"), Ok(LookupTarget::Netns(_))),
        "the Pod is open"
    );
}

fn counted(capture: &Capture, name: &str) -> u64 {
    let counters = capture.counters();
    counters.iter().find(|(of, _)| *of == name).map(|(_, count)| *count).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_living_namespace_is_found_again_without_its_path() {
    let Some(bed) = Bed::new("a_living_namespace_is_found_again_without_its_path") else {
        return;
    };
    let capture = bed.start();
    let cookie = capture.enroll(bed.pod("uid-1")).await.unwrap().netns_cookie;
    drop(capture);
    let inhabitant = Inhabitant::of(&bed.netns_path());
    unlink(&bed);

    let capture = bed.start();
    let pod = capture.recover().await.remove(0).unwrap();
    assert_eq!(pod.netns_cookie, cookie);
    let _tasks = serve(&capture, pod);
    capture.prove("uid-1").await.unwrap();
    assert_captured(&bed, cookie);
    assert!(capture.release("uid-1").await.unwrap());
    drop(inhabitant);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_living_namespace_that_is_not_found_stays_closed() {
    let Some(bed) = Bed::new("a_living_namespace_that_is_not_found_stays_closed") else {
        return;
    };
    let capture = bed.start();
    let cookie = capture.enroll(bed.pod("uid-1")).await.unwrap().netns_cookie;
    drop(capture);
    // Only this descriptor holds it: no process is inside, nothing is mounted.
    let held = fs::File::open(bed.netns_path()).unwrap();
    unlink(&bed);

    let capture = bed.start();
    let (pod, error) = capture.recover().await.remove(0).unwrap_err();
    assert_eq!(pod.uid, "uid-1");
    assert!(error.to_string().contains("not known to be gone"), "{error}");
    assert_eq!(counted(&capture, "kept_closed"), 1);
    assert_captured(&bed, cookie);
    let refused = timeout(A_WHILE, TcpStream::connect((POD_V4, 8080))).await.unwrap();
    assert!(refused.is_err(), "{refused:?}");
    assert!(capture.take_over("uid-1").await.is_err());

    // Whoever enters it makes it visible.
    let inhabitant = Inhabitant::of(&path_of(&held));
    let pod = capture.take_over("uid-1").await.unwrap().unwrap();
    let mut tasks = serve(&capture, pod);
    capture.prove("uid-1").await.unwrap();
    // Until they are closed: a socket keeps its namespace.
    tasks.shutdown().await;
    drop((capture, held, inhabitant));
    // Now it is gone, and the kernel says so.
    let capture = bed.start();
    assert!(capture.recover().await.is_empty());
    let hand = Kernel::load(&bed.kernel_config()).unwrap();
    assert!(hand.pods().unwrap().is_empty());
    assert!(hand.attached_pods().unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_whose_record_is_unreadable_stays_closed_and_can_be_enrolled_again() {
    let Some(bed) = Bed::new("a_pod_whose_record_is_unreadable_stays_closed_and_can_be_enrolled_again") else {
        return;
    };
    let capture = bed.start();
    let pod = capture.enroll(bed.pod("uid-1")).await.unwrap();
    let (cookie, slot) = (pod.netns_cookie, pod.slot);
    drop((capture, pod));
    let record = bed.config().run_dir.join("pods/uid-1.json");
    let text = fs::read(&record).unwrap();
    fs::write(&record, &text[..text.len() / 2]).unwrap();
    // And once no process is seen in it.
    let held = fs::File::open(bed.netns_path()).unwrap();
    unlink(&bed);

    let capture = bed.start();
    assert!(capture.recover().await.is_empty());
    assert_eq!(counted(&capture, "kept_closed"), 1);
    assert_captured(&bed, cookie);
    let refused = timeout(A_WHILE, TcpStream::connect((POD_V4, 8080))).await.unwrap();
    assert!(refused.is_err(), "{refused:?}");

    // Its slot is not another Pod's meanwhile.
    let (second, _netns) = bed.second_pod("uid-2");
    let other = capture.enroll(second).await.unwrap();
    assert_ne!(other.slot, slot);
    let inhabitant = Inhabitant::of(&path_of(&held));
    let mut again = bed.pod("uid-1");
    again.netns_path = inhabitant.path();
    // An enrolment that fails does not let it go, either.
    // Out of the programs' reach: they refuse it the port otherwise.
    bed.leave_cgroup();
    let taken = application_at(&inhabitant.path());
    bed.enter_cgroup();
    assert!(capture.enroll(again.clone()).await.is_err());
    assert_captured(&bed, cookie);
    drop(taken);
    let _tasks = serve(&capture, capture.enroll(again).await.unwrap());
    capture.prove("uid-1").await.unwrap();
    assert!(capture.release("uid-1").await.unwrap());
    assert!(capture.release("uid-2").await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn another_run_directory_releases_nothing() {
    let Some(bed) = Bed::new("another_run_directory_releases_nothing") else {
        return;
    };
    let capture = bed.start();
    let cookie = capture.enroll(bed.pod("uid-1")).await.unwrap().netns_cookie;
    drop(capture);
    let mut elsewhere = bed.config();
    elsewhere.run_dir = bed.folder.path().join("another");
    let capture = Capture::start(elsewhere).unwrap();
    assert!(capture.recover().await.is_empty());
    assert_captured(&bed, cookie);
    drop(capture);
    let capture = bed.start();
    drop(capture.recover().await.remove(0).unwrap());
    assert!(capture.release("uid-1").await.unwrap());
}
