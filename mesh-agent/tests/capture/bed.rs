//! One Pod in a network namespace of its own, joined to this one by a veth pair; a cgroup and a bpffs of the test's own. A stand-in
//! for the proxy serves its listeners.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard};

use mesh_agent::addr::{ClientAddr, ListenerAddr, OriginalDst};
use mesh_agent::capture::kernel::{self, KernelConfig};
use mesh_agent::capture::netns::NetNamespace;
use mesh_agent::capture::{
    Capture, CaptureConfig, CapturedPod, Origin, PodNamespace, PodNetwork, PodToEnroll, Probes, UpstreamLease, is_probe,
};
use nix::fcntl::{Flock, FlockArg};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

pub const POD_V4: &str = "10.213.77.2";
pub const POD_V6: &str = "fd13:77::2";
pub const NODE_V4: &str = "10.213.77.1";
pub const NODE_V6: &str = "fd13:77::1";
pub const SECOND_V4: &str = "10.213.78.2";
pub const NODE_OF_SECOND_V4: &str = "10.213.78.1";

/// Upstream connections that were steered back to their agent.
pub static CAME_BACK: LazyLock<Arc<Mutex<u32>>> = LazyLock::new(Arc::default);

/// The tests share this process's cgroup,
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
/// and with another run of them this machine's addresses.
const ONE_RUN_AT_A_TIME: &str = "/run/culvert-capture-tests.lock";

/// Of everything that these tests make.
const PREFIX: &str = "cvcap";

pub struct Bed {
    pub folder: tempfile::TempDir,
    pub name: String,
    cgroup: PathBuf,
    cgroup_before: PathBuf,
    _turn: (MutexGuard<'static, ()>, Flock<fs::File>),
}

pub fn run(command: &str) -> String {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    assert!(
        output.status.success(),
        "{command}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Removes what a run that was killed left behind: with its addresses still on this machine, a probe would arrive at its Pod, whose
/// pinned programs refuse it. Whoever holds [`ONE_RUN_AT_A_TIME`] knows that nothing of these names is in use.
fn sweep(unified: &Path) {
    let temporary = std::env::temp_dir();
    run(&format!(
        "ip netns list | awk '/^{PREFIX}/ {{ print $1 }}' | xargs -r -n1 ip netns del
         ip -o link show type veth | awk -F '[:@ ]+' '$2 ~ /^{PREFIX}/ {{ print $2 }}' | xargs -r -n1 ip link del
         for folder in {temporary}/{PREFIX}*; do
             [ -d $folder ] || continue
             if mountpoint -q $folder/bpf; then rm -rf $folder/bpf/*; umount $folder/bpf; fi
             rm -rf $folder
         done
         for cgroup in {unified}/{PREFIX}*; do
             [ ! -d $cgroup ] || find $cgroup -depth -type d -exec rmdir {{}} + || true
         done",
        temporary = temporary.display(),
        unified = unified.display(),
    ));
}

impl Bed {
    /// `None`: skipped, and said so.
    pub fn new(test: &str) -> Option<Self> {
        let missing = if !nix_is_root() {
            "root"
        } else if !kernel::has_programs() {
            "EBPF_OBJECT at build time"
        } else {
            ""
        };
        if !missing.is_empty() {
            println!("SKIPPED: capture::{test}: missing {missing}");
            return None;
        }
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let lock = fs::File::create(ONE_RUN_AT_A_TIME).unwrap();
        let lock = Flock::lock(lock, FlockArg::LockExclusive)
            .map_err(|(_, error)| error)
            .unwrap();
        let unified = run("findmnt -nt cgroup2 -o TARGET | head -1");
        let unified = PathBuf::from(unified.trim());
        sweep(&unified);
        let name = format!("{PREFIX}{}", std::process::id());
        let folder = tempfile::Builder::new().prefix(PREFIX).tempdir().unwrap();
        let bpf = folder.path().join("bpf");
        fs::create_dir(&bpf).unwrap();
        run(&format!("mount -t bpf bpf {}", bpf.display()));
        let relative = fs::read_to_string("/proc/self/cgroup").unwrap();
        let relative = relative
            .lines()
            .find_map(|line| line.strip_prefix("0::/"))
            .unwrap()
            .to_owned();
        let cgroup = unified.join(&name);
        fs::create_dir_all(cgroup.join("agent")).unwrap();
        fs::write(cgroup.join("agent/cgroup.procs"), "0").unwrap();
        run(&format!(
            "ip netns add {name} && ip -n {name} link set lo up \
             && ip link add {name}n type veth peer name eth0 netns {name} \
             && ip addr add {NODE_V4}/24 dev {name}n && ip -6 addr add {NODE_V6}/64 dev {name}n nodad && ip link set {name}n up \
             && ip -n {name} addr add {POD_V4}/24 dev eth0 && ip -n {name} -6 addr add {POD_V6}/64 dev eth0 nodad \
             && ip -n {name} link set eth0 up && ip -n {name} route add default via {NODE_V4} \
             && ip -n {name} -6 route add default via {NODE_V6}"
        ));
        // The kernel's own addresses (link-local, after duplicate address detection) are part of the snapshots.
        for _ in 0..100 {
            let addresses = run(&format!("ip -n {name} addr; ip addr show dev {name}n"));
            if !addresses.contains("tentative") && addresses.matches("fe80::").count() == 2 {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        Some(Self {
            folder,
            name,
            cgroup,
            cgroup_before: unified.join(relative),
            _turn: (turn, lock),
        })
    }

    pub fn netns_path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    pub fn kernel_config(&self) -> KernelConfig {
        KernelConfig {
            pin_path: self.folder.path().join("bpf/culvert"),
            cgroup_root: Some(self.cgroup.clone()),
        }
    }

    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// Moves this process out of the cgroup that the programs are attached to.
    pub fn leave_cgroup(&self) {
        fs::write(self.cgroup_before.join("cgroup.procs"), "0").unwrap();
    }

    pub fn enter_cgroup(&self) {
        fs::write(self.cgroup.join("agent/cgroup.procs"), "0").unwrap();
    }

    pub fn config(&self) -> CaptureConfig {
        let mut config = CaptureConfig::new(self.kernel_config(), self.folder.path().join("run"));
        config.probe_program = env!("CARGO_BIN_EXE_mesh-agent").into();
        config
    }

    pub fn start(&self) -> Arc<Capture> {
        Capture::start(self.config()).unwrap()
    }

    pub fn pod(&self, uid: &str) -> PodToEnroll {
        PodToEnroll {
            uid: uid.into(),
            namespace: "shop".into(),
            name: "web-0".into(),
            service_account: "web".into(),
            netns_path: self.netns_path(),
            addresses: vec![POD_V4.parse().unwrap(), POD_V6.parse().unwrap()],
            cgroup_path: None,
            origin: Origin::Local,
        }
    }

    pub fn netns(&self) -> NetNamespace {
        NetNamespace::open(&self.netns_path()).unwrap()
    }

    /// All that an enrolment may touch.
    pub fn snapshot(&self) -> String {
        run(&format!(
            "ip netns exec {} sh -c '
                ip -d addr; ip -d link
                ip -d rule; ip -6 -d rule
                ip -d route show table all; ip -6 -d route show table all
                ss -Htan state listening
                grep -r . /proc/sys/net 2>/dev/null | grep -vE \"nf_conntrack_count|dev_snmp|stats\"'",
            self.name
        ))
    }

    /// A second Pod of the node, in a namespace `<name>b`, that lives until the returned value is dropped.
    pub fn second_pod(&self, uid: &str) -> (PodToEnroll, OtherNetns) {
        self.second_pod_in(uid, &format!("ip netns add {}b", self.name))
    }

    /// The same, whose namespace belongs to a user namespace that has users of its own, as the runtime makes it for `hostUsers: false`.
    pub fn second_pod_with_users(&self, uid: &str) -> (PodToEnroll, OtherNetns) {
        let make = format!(
            "unshare --user --net sleep 60 > /dev/null 2>&1 & \
             until [ \"$(readlink /proc/$!/ns/user)\" != \"$(readlink /proc/self/ns/user)\" ]; do sleep 0.02; done; \
             echo 0 100000 65536 > /proc/$!/uid_map && echo 0 100000 65536 > /proc/$!/gid_map \
             && until [ \"$(readlink /proc/$!/ns/net)\" != \"$(readlink /proc/self/ns/net)\" ]; do sleep 0.02; done; \
             touch /run/netns/{name}b && mount --bind /proc/$!/ns/net /run/netns/{name}b && kill $!",
            name = self.name
        );
        self.second_pod_in(uid, &make)
    }

    fn second_pod_in(&self, uid: &str, make: &str) -> (PodToEnroll, OtherNetns) {
        let name = &self.name;
        let other = OtherNetns(format!("{name}b"), format!("{name}m"));
        run(&format!(
            "{make} && ip -n {name}b link set lo up \
             && ip link add {name}m type veth peer name eth0 netns {name}b \
             && ip addr add {NODE_OF_SECOND_V4}/24 dev {name}m && ip link set {name}m up \
             && ip -n {name}b addr add {SECOND_V4}/24 dev eth0 && ip -n {name}b link set eth0 up \
             && ip -n {name}b route add default via {NODE_OF_SECOND_V4}"
        ));
        let mut pod = self.pod(uid);
        pod.netns_path = format!("/run/netns/{name}b").into();
        pod.addresses = vec![SECOND_V4.parse().unwrap()];
        (pod, other)
    }

    /// A listener of the application in the Pod.
    pub fn application(&self, address: &str) -> TcpListener {
        self.application_at(&self.netns_path(), address)
    }

    /// The same in another namespace.
    pub fn application_at(&self, netns: &Path, address: &str) -> TcpListener {
        let address: SocketAddr = address.parse().unwrap();
        let listener = NetNamespace::open(netns)
            .unwrap()
            .run(|| Ok(std::net::TcpListener::bind(address).unwrap()))
            .unwrap();
        listener.set_nonblocking(true).unwrap();
        TcpListener::from_std(listener).unwrap()
    }
}

/// A namespace and the link to it.
pub struct OtherNetns(String, String);

impl OtherNetns {
    pub fn name(&self) -> &str {
        &self.0
    }
}

impl Drop for OtherNetns {
    fn drop(&mut self) {
        let _ = Command::new("sh")
            .args(["-c", &format!("ip netns del {}; ip link del {}", self.0, self.1)])
            .output();
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let _ = fs::write(self.cgroup_before.join("cgroup.procs"), "0");
        let _ = Command::new("sh")
            .args([
                "-c",
                &format!(
                    "rm -rf {bpf}/culvert; umount {bpf}; ip netns del {name}; ip link del {name}n; \
                     rmdir {cgroup}/* {cgroup}",
                    bpf = self.folder.path().join("bpf").display(),
                    name = self.name,
                    cgroup = self.cgroup.display()
                ),
            ])
            .output();
    }
}

fn nix_is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Serves the listeners as the proxy does: probes are answered, plaintext is carried to the application as its client, and an
/// outbound connection to where it wanted. Stops when dropped.
pub fn serve(capture: &Capture, pod: CapturedPod) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    let uid: Arc<str> = pod.pod.uid.into();
    let (outbound, plaintext) = (pod.listeners.outbound, pod.listeners.plaintext);
    let (probes, network) = (capture.probes(), Arc::clone(&pod.network));
    let uid_outbound = Arc::clone(&uid);
    tasks.spawn(async move {
        loop {
            let (stream, peer) = outbound.accept().await.unwrap();
            let local = stream.local_addr().unwrap();
            match network.take_original_destination(ClientAddr::new(peer), ListenerAddr::new(local)) {
                Ok(destination) => hand(&probes, &network, &uid_outbound, destination, stream, None),
                Err(error) => println!("outbound refused: {error}"),
            }
        }
    });
    let (probes, network) = (capture.probes(), pod.network);
    let came_back = Arc::clone(&CAME_BACK);
    tasks.spawn(async move {
        loop {
            let (stream, peer) = plaintext.accept().await.unwrap();
            let destination = OriginalDst::new(stream.local_addr().unwrap());
            if network.is_own_upstream(ClientAddr::new(peer), destination) {
                println!("came back: {peer} -> {destination}");
                *came_back.lock().unwrap() += 1;
                continue;
            }
            hand(&probes, &network, &uid, destination, stream, Some(ClientAddr::new(peer).ip()));
        }
    });
    // Kept open: closing it would take it out of the map.
    let tunnel = pod.listeners.tunnel;
    tasks.spawn(async move {
        loop {
            let _ = tunnel.accept().await;
        }
    });
    tasks
}

fn hand(
    probes: &Arc<Probes>,
    network: &Arc<PodNamespace>,
    uid: &Arc<str>,
    destination: OriginalDst,
    mut stream: TcpStream,
    client: Option<IpAddr>,
) {
    let (probes, network, uid) = (Arc::clone(probes), Arc::clone(network), Arc::clone(uid));
    tokio::spawn(async move {
        if is_probe(destination) {
            return probes.answer(&uid, destination, stream).await;
        }
        let (socket, _lease) = match client {
            Some(client) => {
                let upstream = network.upstream_socket(client, destination.socket_addr()).unwrap();
                (upstream.socket, upstream.lease)
            }
            None => (network.outbound_socket(destination.ip()).unwrap(), UpstreamLease::default()),
        };
        match socket.connect(destination.socket_addr()).await {
            Ok(mut upstream) => {
                let _ = tokio::io::copy_bidirectional(&mut stream, &mut upstream).await;
            }
            Err(error) => println!("upstream {destination}: {error}"),
        }
    });
}
