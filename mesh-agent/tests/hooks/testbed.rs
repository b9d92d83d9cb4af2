//! A Pod and an outsider as network namespaces that are joined by a veth pair, an unprivileged client in a cgroup of its own,
//! and a bpffs for the pins. Everything has a unique name and is removed on drop, also by a panic.

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Mutex, Once};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use aya::maps::{Array, HashMap, HashOfMaps, Map, MapData};
use mesh_agent::addr::address_bytes;
use mesh_agent::capture::kernel::{Kernel, KernelConfig, has_programs};
use mesh_common::{
    AgentSocketValue, HEARTBEAT_INTERVAL_MS, OriginalDestinationValue, PodValue, RedirectedConnectionKey, STORAGE_VERSION,
    UpstreamConnectionKey, limits, socket_kind,
};
use nix::sched::{CloneFlags, setns};
use nix::time::{ClockId, clock_gettime};
use socket2::{Domain, SockRef, Socket, Type};

pub const POD_V4: &str = "10.99.0.2";
pub const POD_V6: &str = "fd99::2";
pub const OUTSIDER_V4: &str = "10.99.0.1";
pub const OUTSIDER_V6: &str = "fd99::1";
pub const SLOT: u32 = 7;
const PATIENCE: Duration = Duration::from_secs(30);

/// An application in Python: `connect <4|6> <address> <port>` prints both its ends as it sees them, or the error's name, and
/// stays until its standard input ends; `script <text>` does what the text says, with what is defined here.
const CLIENT: &str = r#"
import ctypes, errno, socket, struct, sys
family = {"4": socket.AF_INET, "6": socket.AF_INET6}
def show(name): return "%s %d" % (name[0], name[1])
def say(text): print(text, flush=True)
def ends(s): say("%s from %s" % (show(s.getpeername()), s.getsockname()[0]))
def stream(of="4"):
    s = socket.socket(family[of], socket.SOCK_STREAM)
    s.settimeout(10)
    return s
def told(): return sys.stdin.readline()
try:
    if sys.argv[1] == "cookie":
        print(int.from_bytes(socket.socket().getsockopt(socket.SOL_SOCKET, 71, 8), sys.byteorder))
    elif sys.argv[1] == "mptcp":
        socket.socket(family[sys.argv[2]], socket.SOCK_STREAM, 262)
        print("ok")
    elif sys.argv[1] == "script":
        exec(sys.argv[2])
    else:
        s = socket.socket(family[sys.argv[2]], socket.SOCK_STREAM)
        s.settimeout(10)
        for target in sys.argv[3:]:
            address, port = target.split("|")
            s.connect((address, int(port)))
            s.sendall(b"x")
            print("%s from %s" % (show(s.getpeername()), s.getsockname()[0]))
except OSError as e:
    print(errno.errorcode.get(e.errno, "timeout"))
sys.stdout.flush()
sys.stdin.read()
"#;

/// Why the hooks cannot be tested here, if they cannot.
pub fn obstacle() -> Option<&'static str> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root (network namespaces, eBPF)");
    }
    if !has_programs() {
        return Some("built without EBPF_OBJECT (`cargo xtask build-ebpf`)");
    }
    None
}

pub fn run(command: &str) {
    let output = Command::new("sh").args(["-ec", command]).output().unwrap();
    assert!(
        output.status.success(),
        "{command}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Of everything that a testbed makes; then the process that made it, and `x`.
const PREFIX: &str = "cvh";

/// Removes what runs that were killed left behind: namespaces, cgroups, and bpffs with what is pinned there.
fn sweep() {
    for folder in [Path::new("/run/netns"), &cgroup_root(), &env::temp_dir()] {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if !is_left_behind(&name) {
                continue;
            }
            let path = entry.path();
            let path = path.display();
            // Beside another run that sweeps as well, somebody is first.
            let _ = Command::new("sh")
                .args([
                    "-c",
                    &format!(
                        "case {path} in
                         /run/netns/*) ip netns del {name};;
                         {temporary}/*) rm -rf {path}/culvert; umount {path}; rmdir {path};;
                         *) rmdir {path};;
                         esac 2> /dev/null",
                        temporary = env::temp_dir().display()
                    ),
                ])
                .status();
        }
    }
}

fn is_left_behind(name: &str) -> bool {
    let pid = name.strip_prefix(PREFIX).and_then(|rest| rest.split_once('x'));
    pid.is_some_and(|(pid, _)| pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists())
}

pub struct Testbed {
    name: String,
    pub pin_path: PathBuf,
    bpffs: PathBuf,
    /// Where its clients run.
    pub cgroup: PathBuf,
    /// Beside that one.
    pub elsewhere: PathBuf,
    /// What beats; it ends when this is dropped.
    life: Mutex<Option<(Sender<()>, JoinHandle<()>)>>,
}

impl Testbed {
    pub fn new() -> Testbed {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        static SWEPT: Once = Once::new();
        SWEPT.call_once(sweep);
        let name = format!("{PREFIX}{}x{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let bpffs = env::temp_dir().join(&name);
        let cgroup = cgroup_root().join(&name);
        let testbed = Testbed {
            pin_path: bpffs.join("culvert"),
            bpffs,
            cgroup,
            elsewhere: cgroup_root().join(format!("{name}e")),
            life: Mutex::default(),
            name,
        };
        let (pod, outsider) = (testbed.pod(), testbed.outsider());
        fs::create_dir_all(&testbed.bpffs).unwrap();
        fs::create_dir(&testbed.cgroup).unwrap();
        fs::create_dir(&testbed.elsewhere).unwrap();
        run(&format!("mount -t bpf bpf {}", testbed.bpffs.display()));
        run(&format!(
            "ip netns add {pod}; ip netns add {outsider}
             ip -n {pod} link set lo up; ip -n {outsider} link set lo up
             ip -n {pod} link add eth0 type veth peer name eth0 netns {outsider}
             ip -n {pod} addr add {POD_V4}/24 dev eth0; ip -n {pod} addr add {POD_V6}/64 dev eth0 nodad
             ip -n {outsider} addr add {OUTSIDER_V4}/24 dev eth0; ip -n {outsider} addr add {OUTSIDER_V6}/64 dev eth0 nodad
             ip -n {pod} link set eth0 up; ip -n {outsider} link set eth0 up"
        ));
        testbed
    }

    pub fn pod(&self) -> String {
        format!("{}p", self.name)
    }

    pub fn outsider(&self) -> String {
        format!("{}o", self.name)
    }

    pub fn config(&self) -> KernelConfig {
        KernelConfig {
            pin_path: self.pin_path.clone(),
            cgroup_root: None,
        }
    }

    /// Where links are pinned, and the maps that all ABI versions share.
    pub fn pins(&self) -> PathBuf {
        self.pin_path.join(format!("v{STORAGE_VERSION}"))
    }

    /// Where an ABI version's own maps are pinned.
    pub fn pins_of_abi(&self, version: u32) -> PathBuf {
        self.pins().join(format!("abi{version}"))
    }

    /// The programs loaded, the Pod enrolled, the agent alive.
    pub fn enrolled(&self) -> Kernel {
        let kernel = self.loaded();
        kernel.add_pod(self.cookie(), &pod_value()).unwrap();
        self.live();
        kernel
    }

    /// As an agent that lives: its lease does not end, however slow the machine is.
    pub fn live(&self) {
        let mut life = self.life.lock().unwrap();
        if life.is_some() {
            return;
        }
        let mut heartbeat = heartbeat(self);
        heartbeat.set(0, now_ns(), 0).unwrap();
        let (alive, end) = mpsc::channel();
        let beats = thread::spawn(move || {
            while end.recv_timeout(Duration::from_millis(HEARTBEAT_INTERVAL_MS)) == Err(RecvTimeoutError::Timeout) {
                heartbeat.set(0, now_ns(), 0).unwrap();
            }
        });
        *life = Some((alive, beats));
    }

    /// The last beat has been.
    pub fn fall_silent(&self) {
        if let Some((alive, beats)) = self.life.lock().unwrap().take() {
            drop(alive);
            beats.join().unwrap();
        }
    }

    pub fn loaded(&self) -> Kernel {
        Kernel::load(&self.config()).unwrap()
    }

    pub fn cookie(&self) -> u64 {
        self.client(&self.pod(), &["cookie"]).lines[0].parse().unwrap()
    }

    /// Starts an unprivileged client in a namespace and in a cgroup of its own, and waits for what it prints.
    pub fn client(&self, netns: &str, arguments: &[&str]) -> Client {
        let unprivileged = [
            "setpriv",
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "--no-new-privs",
        ];
        self.start(netns, &unprivileged, arguments)
    }

    /// An unprivileged application of the Pod that runs a text.
    pub fn script(&self, text: &str) -> Client {
        self.client(&self.pod(), &["script", text])
    }

    /// The same with the one capability that most container runtimes grant for packets.
    pub fn script_with_net_raw(&self, text: &str) -> Client {
        self.script_with_net_raw_in(&self.pod(), text)
    }

    pub fn script_with_net_raw_in(&self, netns: &str, text: &str) -> Client {
        let with_net_raw = [
            "setpriv",
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "--no-new-privs",
            "--bounding-set=-all,+net_raw",
            "--inh-caps=-all,+net_raw",
            "--ambient-caps=-all,+net_raw",
        ];
        self.start(netns, &with_net_raw, &["script", text])
    }

    /// The same as root, with every capability.
    pub fn script_as_root(&self, netns: &str, text: &str) -> Client {
        self.start(netns, &[], &["script", text])
    }

    fn start(&self, netns: &str, wrapper: &[&str], arguments: &[&str]) -> Client {
        let lines = if arguments[0] == "connect" { arguments.len() - 2 } else { 1 };
        let mut child = Command::new("sh")
            .args(["-ec", "echo $$ > \"$1/cgroup.procs\"; shift; exec \"$@\"", "sh"])
            .arg(&self.cgroup)
            .args(["ip", "netns", "exec", netns])
            .args(wrapper)
            .args(["/usr/bin/python3", "-c", CLIENT])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut client = Client {
            child,
            output,
            lines: Vec::new(),
        };
        for _ in 0..lines {
            let line = client.hear();
            // The error of one connect is the client's last word.
            let is_error = line.starts_with('E') || line.starts_with("timeout");
            client.lines.push(line);
            if is_error {
                break;
            }
        }
        client
    }

    /// What a connect of the Pod's application comes to: its peer and its own address, or an error.
    pub fn connect(&self, family: &str, address: &str, port: u16) -> Client {
        self.client(&self.pod(), &["connect", family, &format!("{address}|{port}")])
    }
}

impl Drop for Testbed {
    fn drop(&mut self) {
        let _ = Kernel::cleanup(&self.pin_path);
        let (pod, outsider) = (self.pod(), self.outsider());
        let (bpffs, cgroup, elsewhere) = (self.bpffs.display(), self.cgroup.display(), self.elsewhere.display());
        let _ = Command::new("sh")
            .args([
                "-c",
                &format!(
                    "ip netns del {pod}; ip netns del {outsider}; umount {bpffs}; rmdir {bpffs} {cgroup}/* {cgroup} {elsewhere} 2>/dev/null"
                ),
            ])
            .status();
    }
}

pub struct Client {
    child: Child,
    output: BufReader<ChildStdout>,
    pub lines: Vec<String>,
}

impl Client {
    pub fn said(&self) -> &str {
        &self.lines[0]
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it prints next.
    pub fn hear(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    /// Gives a script its `told()`.
    pub fn tell(&mut self) {
        self.child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    }

    /// Lets the application end, and with it its connection.
    pub fn end(mut self) {
        drop(self.child.stdin.take());
        self.child.wait().unwrap();
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

fn cgroup_root() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    mounts
        .lines()
        .find(|line| line.split(' ').nth(2) == Some("cgroup2"))
        .unwrap()
        .split(' ')
        .nth(1)
        .unwrap()
        .into()
}

pub fn pod_value() -> PodValue {
    value_of(SLOT, [POD_V4, POD_V6])
}

pub fn value_of(slot: u32, own: [&str; 2]) -> PodValue {
    let mut addresses = [[0; 16]; limits::MAX_POD_ADDRESSES];
    for (bytes, address) in addresses.iter_mut().zip(own) {
        *bytes = address_bytes(address.parse().unwrap());
    }
    PodValue {
        slot,
        address_count: 2,
        addresses,
    }
}

pub fn netns_file(netns: &str) -> fs::File {
    fs::File::open(Path::new("/run/netns").join(netns)).unwrap()
}

/// Runs something on a thread of its own inside a network namespace.
pub fn within<T: Send>(netns: &str, work: impl FnOnce() -> T + Send) -> T {
    let netns = netns_file(netns);
    let enter = move || {
        setns(netns, CloneFlags::CLONE_NEWNET).unwrap();
        work()
    };
    thread::scope(|scope| scope.spawn(enter).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// An application's dual-stack listener; accepts give up after a while instead of hanging a test.
pub fn listen(netns: &str, port: u16) -> TcpListener {
    listen_with(netns, port, |_| {})
}

/// The same of the agent.
pub fn listen_as_agent(kernel: &Kernel, netns: &str, port: u16) -> TcpListener {
    listen_with(netns, port, |socket| mark_listener(kernel, socket))
}

pub fn mark_listener(kernel: &Kernel, socket: &Socket) {
    let mark = AgentSocketValue {
        kind: socket_kind::LISTENER,
        slot: SLOT,
    };
    kernel.mark_socket(socket.as_fd(), mark).unwrap();
}

pub fn listen_with(netns: &str, port: u16, before_bind: impl FnOnce(&Socket) + Send) -> TcpListener {
    within(netns, || {
        let socket = Socket::new(Domain::IPV6, Type::STREAM, None).unwrap();
        socket.set_only_v6(false).unwrap();
        socket.set_reuse_address(true).unwrap();
        before_bind(&socket);
        socket
            .bind(&SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port).into())
            .unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.listen(128).unwrap();
        socket.into()
    })
}

/// Closes a listener at once: a child that another test has forked, and that has not yet become its program, holds it too.
pub fn close(listener: TcpListener) {
    SockRef::from(&listener).shutdown(Shutdown::Both).unwrap();
}

/// A stream socket of a namespace that gives up after a while.
pub fn socket_in(netns: &str, towards: IpAddr) -> Socket {
    within(netns, || {
        let socket = Socket::new(Domain::for_address(SocketAddr::new(towards, 0)), Type::STREAM, None).unwrap();
        socket.set_write_timeout(Some(PATIENCE)).unwrap();
        socket
    })
}

/// Accepts, and says how the kernel programs know the connection.
pub fn accept(listener: &TcpListener, netns_cookie: u64) -> (std::net::TcpStream, RedirectedConnectionKey) {
    let (stream, client) = listener.accept().unwrap();
    let local = stream.local_addr().unwrap();
    let key = RedirectedConnectionKey {
        netns_cookie,
        client_address: address_bytes(client.ip()),
        listener_address: address_bytes(local.ip()),
        client_port: client.port(),
        listener_port: local.port(),
        _pad: 0,
    };
    (stream, key)
}

pub fn counter(kernel: &Kernel, name: &str) -> u64 {
    kernel.counters().into_iter().find(|(counter, _)| *counter == name).unwrap().1
}

/// Waits for a condition that only time brings.
pub fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let patience = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < patience, "{what}: not within {PATIENCE:?}");
        thread::sleep(Duration::from_millis(20));
    }
}

pub type Destinations = HashMap<MapData, RedirectedConnectionKey, OriginalDestinationValue>;

/// A Pod's map of original destinations.
pub fn destinations(testbed: &Testbed, netns_cookie: u64) -> Destinations {
    let map = MapData::from_pin(testbed.pins().join("ORIGINAL_DESTINATIONS")).unwrap();
    let map: HashOfMaps<_, u64, Destinations> = Map::HashOfMaps(map).try_into().unwrap();
    map.get(&netns_cookie, 0).unwrap()
}

pub fn heartbeat(testbed: &Testbed) -> Array<MapData, u64> {
    let map = MapData::from_pin(testbed.pins().join("HEARTBEAT")).unwrap();
    Map::Array(map).try_into().unwrap()
}

/// As the kernel programs tell the time.
pub fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap();
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}

/// The agent's connects to applications that the Pods' sk_lookup passes.
pub fn upstreams(testbed: &Testbed) -> HashMap<MapData, UpstreamConnectionKey, u64> {
    let map = MapData::from_pin(testbed.pins().join("UPSTREAM_CONNECTIONS")).unwrap();
    Map::HashMap(map).try_into().unwrap()
}

/// What the agent sets up in a Pod so that answers to a transparent client come back to it.
pub fn return_path(testbed: &Testbed) {
    let pod = testbed.pod();
    run(&format!(
        "for family in -4 -6; do
             ip -n {pod} $family rule add pref 100 fwmark 0x4356 lookup 17238
             ip -n {pod} $family route add local default dev lo table 17238
         done"
    ));
    within(&pod, || {
        for setting in ["ipv4/tcp_fwmark_accept", "ipv4/fwmark_reflect", "ipv6/fwmark_reflect"] {
            fs::write(Path::new("/proc/sys/net").join(setting), "1").unwrap();
        }
    });
}
