//! Every bound of the control plane, with its arithmetic.

use std::time::Duration;

pub use mesh_proto::{MAX_REQUEST_BYTES, MAX_RESOURCES, MAX_REVOKED, MAX_TRUSTED_ROOTS};

/// Files read from the registry folder. More: those that sort last are refused and said.
pub const MAX_FILES: usize = 4096;
/// Bytes of a manifest file: a Pod as `kubectl get -o yaml` prints it has about 6 KiB, so some 170 Pods a file.
pub const MAX_FILE_BYTES: u64 = 1 << 20;
/// Bytes of all manifest files together: held once as objects, and once more while they are read.
pub const MAX_FOLDER_BYTES: u64 = 256 << 20;
/// Bytes of the file of last good forms: a manifest may be in it in several forms, and JSON escapes some characters. More is not
/// written: the forms kept before stay on disk, counted and logged.
pub const MAX_LAST_GOOD_BYTES: u64 = 4 * MAX_FOLDER_BYTES;
/// Bytes of the file that says that the registry had content: its being there is all that it says.
pub const MAX_FILLED_BYTES: u64 = 64;
/// Documents of a file, a List's items counted.
pub const MAX_DOCUMENTS: usize = 2048;
/// Rejections that are kept for `/status` (about 512 B each: 512 KiB); all are counted.
pub const MAX_REJECTIONS: usize = 1024;
/// Warnings about Services in `/status` (about 128 B each); one more line says that there are more.
pub const MAX_SERVICE_WARNINGS: usize = 32;

/// Change events that wait. One is as good as many: what it says is only "read again".
pub const FOLDER_EVENTS: usize = 1;
/// Quiet time after a change in the folder before it is read, so that a program that writes many files is read once.
pub const FOLDER_DEBOUNCE: Duration = Duration::from_millis(150);
/// The longest that a stream of changes can put off reading.
pub const FOLDER_DEBOUNCE_MOST: Duration = Duration::from_secs(2);
/// The folder is read again even when no event came: events can be lost.
pub const FOLDER_RESCAN: Duration = Duration::from_secs(10);

/// Connections at once: one or two a node. 10,000 × about 64 KiB (TLS, HTTP/2) = 640 MiB at worst.
pub const MAX_CONNECTIONS: usize = 10_000;
/// Connections from one address (IPv6: one /64, which is what one host may have), so that one host cannot take them all.
pub const MAX_CONNECTIONS_PER_ADDRESS: usize = 256;
pub const TLS_HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection without an authenticated call within this is closed: who has no token cannot keep others out for long.
pub const AUTHENTICATE_TIMEOUT: Duration = Duration::from_secs(10);
/// Finished handshakes that wait for the server to take them.
pub const ACCEPTED_WAITING: usize = 16;
/// A TCP accept that failed for want of descriptors is tried again after this.
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// gRPC streams of one connection.
pub const MAX_STREAMS_PER_CONNECTION: u32 = 64;
/// HTTP/2 pings find peers that vanished.
pub const HTTP2_KEEPALIVE: Duration = Duration::from_secs(30);
pub const HTTP2_KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);

/// Bytes of resources in one discovery response; gRPC clients refuse messages beyond 4 MiB by default. The rest follows once
/// this part is acknowledged.
pub const MAX_RESPONSE_BYTES: usize = 3 << 20;
/// Discovery streams, and streams of reports and of Pods, of one node: one each, and those that have yet to be found dead.
pub const MAX_STREAMS_PER_NODE: usize = 4;
/// Responses that wait for a client to read them. One, so that the next is made of the newest state.
pub const RESPONSES_WAITING: usize = 1;
/// Receipts that wait for an agent to read them.
pub const RECEIPTS_WAITING: usize = 4;
/// Resource types of a stream; the mesh has three, and of others nothing is remembered. At worst a node makes us remember
/// 4 streams × 3 types × one request of [`MAX_REQUEST_BYTES`] = 192 MiB, until [`ACKNOWLEDGE_TIMEOUT`].
pub const MAX_TYPES: usize = 4;
/// Names subscribed to, of a type in a stream, that are no resource's at present: 4,096 × 512 B = 2 MiB.
pub const MAX_ABSENT_NAMES: usize = 4096;
/// Bytes of a resource's name.
pub const MAX_NAME_BYTES: usize = 512;
/// A client that does not acknowledge a response within this is cut off; it comes back and resumes.
pub const ACKNOWLEDGE_TIMEOUT: Duration = Duration::from_secs(60);
/// A client that does not read a response within this is cut off.
pub const SEND_TIMEOUT: Duration = Duration::from_secs(30);
/// Open streams check this often whether their node's token still stands.
pub const TOKEN_RECHECK: Duration = Duration::from_secs(15);
/// Bytes of a text of an agent's (a NACK's message, a version, a name) that are logged and kept.
pub const MAX_NACK_BYTES: usize = 1024;

/// PEM of the root and its key: about 1 KiB.
pub const MAX_PEM_BYTES: u64 = 64 << 10;
/// Bytes of the file of service accounts that have, or had, a manifest: 100,000 × two names of at most 253 B. More is not written,
/// counted and logged.
pub const MAX_ACCOUNTS_FILE_BYTES: u64 = 64 << 20;
/// PEM of a certificate request; a P-256 request has about 400 B.
pub const MAX_CSR_BYTES: usize = 16 << 10;
pub const MIN_CERTIFICATE_LIFETIME: Duration = Duration::from_secs(60);
pub const MAX_CERTIFICATE_LIFETIME: Duration = Duration::from_secs(90 * 24 * 3600);
/// Certificates count as valid from this long ago, for clocks that are behind: an agent's that checks the control plane or a certificate of
/// its own, and that of another node, to which a Pod shows one that was just renewed.
pub const CLOCK_SKEW: Duration = Duration::from_secs(15 * 60);
pub const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Lifetime of the serving certificate; it is made anew at half of it.
pub const SERVING_LIFETIME: Duration = Duration::from_secs(30 * 24 * 3600);
/// Names in the serving certificate (about 64 B each): its own first, then those in node tokens. Those that find no room are counted
/// and logged.
pub const MAX_SERVER_NAMES: usize = 256;
/// The serving certificate is looked at this often: a new token may bring a new name.
pub const SERVING_CHECK: Duration = Duration::from_secs(2);

/// A projected service-account token has about 1 KiB; what is longer, or no JWT, is refused without asking anybody.
pub const MAX_SERVICE_ACCOUNT_TOKEN_BYTES: usize = 16 << 10;
/// What the API server has said of a token is repeated for this long: a node whose agent has two or three streams open and rechecks
/// them all asks once a minute. A deleted Pod's token is let in for no longer.
pub const REVIEW_LIFE: Duration = Duration::from_secs(60);
/// The API server's refusals are repeated for this long.
pub const REFUSED_LIFE: Duration = Duration::from_secs(10);
/// Streams that are open while the API server cannot be asked go on for this long after [`REVIEW_LIFE`], if their token lasts.
pub const REVIEW_GRACE: Duration = Duration::from_secs(10 * 60);
/// Accepted tokens that are remembered: two for each of 5,000 nodes (a rotated one is replaced at the next stream) × about 256 B =
/// 2.5 MiB. At the bound the oldest is asked for again.
pub const MAX_ACCEPTED_TOKENS: usize = 2 * MAX_NODES;
/// Refused tokens that are remembered (about 128 B each: 512 KiB). At the bound the oldest is asked for again.
pub const MAX_REFUSED_TOKENS: usize = 4096;
/// Reviews at the API server at once: of tokens that were accepted lately, and as many of others.
pub const MAX_REVIEWS: usize = 16;
/// Of others, of one host at once, and of its callers that wait; more of it are refused as unavailable. A node's agent has one token and
/// a few streams.
pub const MAX_REVIEWS_OF_HOST: usize = 2;
pub const MAX_REVIEWS_WAITING_OF_HOST: usize = 64;
/// Calls with unknown tokens that wait for a review. More are refused as unavailable: an agent tries again.
pub const MAX_REVIEWS_WAITING: usize = 1024;
/// A review that the API server does not answer within this has failed.
pub const REVIEW_TIMEOUT: Duration = Duration::from_secs(5);
/// After a failed review, rechecks of open streams do not ask again for this long.
pub const REVIEW_RETRY: Duration = Duration::from_secs(10);
/// The ConfigMap of the trusted roots is put right this often, should a hand have changed it; and after a failure.
pub const ROOTS_PUBLISH_INTERVAL: Duration = Duration::from_secs(30);
/// A call about the root's Secret or ConfigMap that is not answered within this has failed.
pub const ROOT_CALL_TIMEOUT: Duration = Duration::from_secs(15);

/// Nodes with a token, and nodes whose last word is remembered.
pub const MAX_NODES: usize = 5000;
/// Bytes of a token record.
pub const MAX_TOKEN_BYTES: u64 = 4096;

/// After a change, the next one waits at least this long, and in the long run [`PUBLISH_SHARE`] times as long as compiling it took: an
/// agent whose Pods go to and fro makes few compilations, writes and pushes of it.
pub const PUBLISH_INTERVAL: Duration = Duration::from_millis(250);
pub const PUBLISH_SHARE: u32 = 4;
/// So many pauses may be owed: a change that comes soon after another one need not wait for its pause.
pub const PUBLISH_BURST: u32 = 2;
/// A stream's next report is read this long after the last.
pub const REPORT_PACE: Duration = Duration::from_millis(20);
/// Rejected resources in a report; as the interface says.
pub const MAX_REJECTED: usize = 64;
/// Pods in a node's report (mesh-common's limit of Pods on a node).
pub const MAX_REPORTED_PODS: usize = 1024;
/// Pods that a node is told of (mesh-common's limit of Pods on a node), members before others. Beyond: left out, told as a number,
/// and never taken for gone.
pub const MAX_NODE_PODS: usize = MAX_REPORTED_PODS;
/// Addresses of a Pod that its node is told of.
pub const MAX_ADDRESSES_TOLD: usize = 16;
/// Probe ports of a Pod that its node is told of (mesh-common's limit), the lowest ones. Beyond: said in the log and on `/status`.
pub const MAX_PROBE_PORTS_TOLD: usize = 16;
/// Namespaces in the mesh that nodes are told of; beyond, those that sort last are left out, and told as a number. A whole list is
/// at worst 1,024 × (128 B of uid + 3 × 253 B of names + 16 × 45 B of addresses + 48 B of ports + 100 B) + 4,096 × 257 B = 2.8 MiB, below the 4 MiB
/// of a gRPC message.
pub const MAX_MESH_NAMESPACES: usize = 4096;
/// Refused Pods that are named in `/status` and the log; the metric counts all.
pub const MAX_REFUSED_SHOWN: usize = 256;
/// A change waits this long for others before nodes are told of it.
pub const NODE_PODS_DEBOUNCE: Duration = Duration::from_millis(50);
/// Bytes of a report: 1,024 Pods × about 512 B, doubled.
pub const MAX_REPORT_BYTES: usize = 1 << 20;
/// Capture states kept, also of Pods that are gone; about 128 B each: 8 MiB.
pub const MAX_CAPTURE_STATES: usize = 65_536;
/// Bytes of the file of capture states. More is not written, counted and logged.
pub const MAX_CAPTURE_FILE_BYTES: u64 = 32 << 20;

/// Objects of a kind that are taken from the API server: about 1 KiB each (a Pod), so 100 MiB. More are left out, counted and said;
/// agents take no more resources of a type either.
pub const MAX_OBJECTS: usize = MAX_RESOURCES;
/// Objects of a page of a list: what is decoded at a time; a Pod has about 10 KiB on the wire, so 5 MiB.
pub const LIST_PAGE: u32 = 500;
/// A request that is not answered within this has failed.
pub const API_TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of an answer, and of an event of a watch: 64 KiB for each object of a page, where a large Pod has 10 KiB: 32 MiB. A larger page is
/// asked for again in halves; any other answer is a failure, counted and said. One object has 3 MiB at most, by etcd's bound.
pub const MAX_ANSWER_BYTES: usize = LIST_PAGE as usize * (64 << 10);
/// The API server is asked to end a watch after a number of seconds between half of this and all, drawn at random so that replicas and
/// kinds do not all come back at one time. It is then resumed. A peer that is silently gone is found out by it, so it is not longer.
pub const WATCH_SECONDS: u32 = 60;
/// A watch that is still open this long after its end has a peer that vanished.
pub const WATCH_GRACE: Duration = Duration::from_secs(15);
/// Pause before a failed list or watch is tried again, at first and at most; each is drawn between half of it and all.
pub const WATCH_RETRY: Duration = Duration::from_millis(200);
pub const WATCH_RETRY_MOST: Duration = Duration::from_secs(15);
/// The longest pause that the API server may ask for; whoever asks for more is asked again after it.
pub const RETRY_AFTER_MOST: Duration = Duration::from_secs(60);
/// A watch that the API server refuses this often in a row is not resumed: its list is read again.
pub const WATCH_REFUSALS: u32 = 4;
/// The same for an API server that is in trouble (5xx): a list of everything would be more of it.
pub const WATCH_FAILURES: u32 = 16;
/// A watch that was granted and has told nothing counts as working after this.
pub const WATCH_STANDS: Duration = Duration::from_secs(1);
/// Whether kinds of the mesh's own have been installed is looked at this often.
pub const ABSENT_KIND_CHECK: Duration = Duration::from_secs(5);
/// Quiet time after a change in the cluster before it is compiled: a rollout changes many objects at once. More gather while it is not
/// time yet for another compilation.
pub const CLUSTER_DEBOUNCE: Duration = Duration::from_millis(50);

/// Annotations of Pods that are to be written, or were just now; about 256 B each: 4 MiB. Further ones wait for the next report or
/// compilation, counted.
pub const MAX_CAPTURE_WRITES: usize = 16_384;
/// Writes at a time, and the pause after each start: at most 100 a second of a replica.
pub const CAPTURE_WRITES_AT_ONCE: usize = 4;
pub const CAPTURE_WRITE_PACE: Duration = Duration::from_millis(10);
/// A write that failed is tried again after this, doubled each time, at most after [`CAPTURE_RETRY_MOST`].
pub const CAPTURE_RETRY: Duration = Duration::from_millis(250);
pub const CAPTURE_RETRY_MOST: Duration = Duration::from_secs(30);
/// How long a write may take to come back by the watch.
pub const CAPTURE_ECHO: Duration = Duration::from_secs(10);
/// Versions of a type whose content is remembered, so that what an agent says it enforces can be told: about 64 B each, and 200,000
/// forms of policies in all that differ, of at most about 400 B each (their names are tenants' to choose): 80 MiB for all types, since they
/// share them. An agent that enforces an older one does not count until it has the next.
pub const MAX_VERSIONS_KEPT: usize = 1024;
pub const MAX_FORMS_KEPT: usize = 200_000;
/// A node whose report stream has ended counts for this long: its agent comes back, here or at another replica, within seconds.
pub const ENFORCED_GRACE: Duration = Duration::from_secs(20);
/// Bytes of what a replica tells the others of its agents, in an annotation of its Lease: 5,000 nodes × 16 B + 500 forms × 16 B = 86 KiB
/// (a Kubernetes object has at most 256 KiB of annotations). Beyond it the smallest groups of nodes are left out, counted.
pub const MAX_SHARED_BYTES: usize = 200 << 10;
/// Forms of policies and MeshConfigs in it; beyond, namespaces with many are told of less of them, and no count is written: counted.
pub const MAX_SHARED_FORMS: usize = 4000;
/// What has changed is told at most this often; what has not is renewed this often, and counts for [`SHARE_LIFE`] after.
pub const SHARE_PACE: Duration = Duration::from_secs(2);
pub const SHARE_RENEWAL: Duration = Duration::from_secs(10);
pub const SHARE_LIFE: Duration = Duration::from_secs(30);
/// Leases that are read at a time: one of each replica, and of those that have just ended. More: the others are left out.
pub const MAX_REPLICAS: u32 = 64;
/// Who writes statuses renews its Lease this often.
pub const ELECTION_PACE: Duration = Duration::from_secs(2);
/// Nobody else takes the Lease that was renewed within this, as seen by its own clock.
pub const ELECTION_LIFE: Duration = Duration::from_secs(15);
/// Who has not renewed it for this long does not write any more. The difference is for a write on its way ([`STATUS_TIMEOUT`]).
pub const ELECTION_DEADLINE: Duration = Duration::from_secs(9);
/// A request about a Lease or a status that is not answered within this has failed.
pub const STATUS_TIMEOUT: Duration = Duration::from_secs(5);
/// Statuses are compared, and those that differ written, this often; at most [`STATUS_WRITES`] each time, what is more than a count first.
/// The others wait for the next time, counted.
pub const STATUS_PACE: Duration = Duration::from_secs(1);
pub const STATUS_WRITES: usize = 20;
/// Of one object counts are written so many times in a window: each write is another version, for which users who change it must look
/// again.
pub const STATUS_COUNT_WRITES: u32 = 4;
pub const STATUS_COUNT_WINDOW: Duration = Duration::from_secs(40);
/// A status that the API server refuses is tried again after this, or once its object has changed.
pub const STATUS_REFUSED_PAUSE: Duration = Duration::from_secs(60);

/// Pause before the deleted accounts are tried to be kept again.
pub const ACCOUNTS_RETRY: Duration = Duration::from_secs(2);

/// NetworkPolicies in the mesh's way that are named in `/status`; the metric counts all.
pub const MAX_NETWORK_POLICIES_NAMED: usize = 256;
/// Of those, newly found ones that are logged at a time.
pub const MAX_NETWORK_POLICIES_LOGGED: usize = 16;
/// What it may take to compare a namespace's NetworkPolicies with its members, and with those they name: parts of rules and selectors
/// of about 50 ns each, so 50 ms; and of all namespaces one second. What is beyond is not looked at, counted.
pub const NETWORK_POLICY_STEPS_OF_NAMESPACE: usize = 1_000_000;
pub const NETWORK_POLICY_STEPS: usize = 20_000_000;
/// Rules, ports, peers, labels and their values of a NetworkPolicy, about 100 B each. One that has more is kept without them, and its
/// namespace counts as not compared.
pub const MAX_NETWORK_POLICY_PARTS: usize = 4096;
/// NetworkPolicies are looked at this long after a change, so that a rollout is looked at once; and not before four times as long as
/// the last look took.
pub const NETWORK_POLICY_PACE: Duration = Duration::from_secs(2);
/// They are looked at again after this where not all of them could be told: by then a namespace may have 30 Events more.
pub const NETWORK_POLICY_UNTOLD: Duration = Duration::from_secs(60);

/// Bytes of the annotation that tells why a Pod is not protected, and of an Event's note (Kubernetes takes 1,024).
pub const MAX_PROBLEM_BYTES: usize = 512;
pub const MAX_EVENT_NOTE_BYTES: usize = 1000;
/// Pieces of a capture that a report names as put back, of a Pod and of the node. The others are a number.
pub const MAX_PIECES_NAMED: usize = 32;
/// Pods with which something is wrong, about 512 B each, and annotations that wait, about 1 KiB each: 24 MiB. Of further ones nobody is
/// told but the metrics; counted.
pub const MAX_PODS_IN_TROUBLE: usize = 16_384;
/// Of them in one namespace: thousands of such Pods in one take nobody else's room. Whoever has sixteen namespaces can take it all.
pub const MAX_PODS_IN_TROUBLE_OF_NAMESPACE: usize = 1_024;
/// Pods for which there is no room that are known to be counted, about 512 B each: 2 MiB. Of more, each counts as often as it is looked
/// at.
pub const MAX_PODS_LEFT_OUT: usize = 4_096;
/// A Pod that is not proven for this long is told to be so: CNI ADD waits 10 s for it. One that was proven before has a new agent, or
/// its node a new start.
pub const NOT_ENROLLED_AFTER: Duration = Duration::from_secs(15);
pub const NOT_PROVEN_AGAIN_AFTER: Duration = Duration::from_secs(60);
/// A Pod's annotation is written at most this often.
pub const PROBLEM_PACE: Duration = Duration::from_secs(10);
/// Events, and annotations: one write at a time of each, and the pause after it: at most 50 a second of a replica.
pub const NOTICE_WRITE_PACE: Duration = Duration::from_millis(20);
/// Events of a Pod (or whatever they are about): so many at once, then one in each interval. Others are dropped, and counted in the next.
pub const EVENTS_OF_SUBJECT_BURST: u32 = 8;
pub const EVENTS_OF_SUBJECT_INTERVAL: Duration = Duration::from_secs(60);
/// The same of a namespace, and of all that is in none, so that none takes the API server, or the others' turns.
pub const EVENTS_OF_NAMESPACE_BURST: u32 = 32;
pub const EVENTS_OF_NAMESPACE_INTERVAL: Duration = Duration::from_secs(2);
/// Namespaces that Events are remembered of. At the bound that one is forgotten of which nothing waits and of which nothing was said for
/// longest; where each has something waiting, further ones' Events are dropped, counted.
pub const MAX_EVENT_NAMESPACES: usize = 512;
/// Of each: Events that wait (about 1.5 KiB) and what Events were about (about 0.5 KiB, at the bound the one that is idle for longest is
/// forgotten): 512 × (32 × 1.5 KiB + 64 × 0.5 KiB) = 40 MiB.
pub const MAX_EVENTS_WAITING_OF_NAMESPACE: usize = 32;
pub const MAX_EVENT_SUBJECTS_OF_NAMESPACE: usize = 64;
/// Different Events of one subject that are counted up; of more, the oldest begins anew.
pub const MAX_EVENT_KINDS_OF_SUBJECT: usize = 8;
/// An Event that could not be written for so long is dropped, counted: an API server may be away for minutes.
pub const EVENT_LIFE: Duration = Duration::from_secs(15 * 60);

/// Admin connections at once. 256 × about 20 KiB = 5 MiB.
pub const MAX_ADMIN_CONNECTIONS: usize = 256;
/// Of those, from one address (IPv6: one /64). The kubelet asks there whether to end the control plane: no Pod may take all places.
pub const MAX_ADMIN_CONNECTIONS_PER_ADDRESS: usize = 8;
pub const ADMIN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long streams may go on after SIGTERM.
pub const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);

/// Failed authentications are logged at most this often; all are counted.
pub const FAILURE_LOG_INTERVAL: Duration = Duration::from_secs(5);

/// Those that tests set smaller.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub folder_bytes: u64,
    pub last_good_bytes: u64,
    pub accounts_file_bytes: u64,
    pub capture_file_bytes: u64,
    pub rejections: usize,
    pub tls_handshake: Duration,
    pub admin_connections: usize,
    pub admin_connections_per_address: usize,
    pub admin: Duration,
    pub connections: usize,
    pub connections_per_address: usize,
    pub authenticate: Duration,
    pub acknowledge: Duration,
    pub send: Duration,
    pub token_recheck: Duration,
    pub review_life: Duration,
    pub review_grace: Duration,
    pub publish_interval: Duration,
    pub api_timeout: Duration,
    pub watch_seconds: u32,
    pub watch_grace: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            folder_bytes: MAX_FOLDER_BYTES,
            last_good_bytes: MAX_LAST_GOOD_BYTES,
            accounts_file_bytes: MAX_ACCOUNTS_FILE_BYTES,
            capture_file_bytes: MAX_CAPTURE_FILE_BYTES,
            rejections: MAX_REJECTIONS,
            tls_handshake: TLS_HANDSHAKE_TIMEOUT,
            admin_connections: MAX_ADMIN_CONNECTIONS,
            admin_connections_per_address: MAX_ADMIN_CONNECTIONS_PER_ADDRESS,
            admin: ADMIN_TIMEOUT,
            connections: MAX_CONNECTIONS,
            connections_per_address: MAX_CONNECTIONS_PER_ADDRESS,
            authenticate: AUTHENTICATE_TIMEOUT,
            acknowledge: ACKNOWLEDGE_TIMEOUT,
            send: SEND_TIMEOUT,
            token_recheck: TOKEN_RECHECK,
            review_life: REVIEW_LIFE,
            review_grace: REVIEW_GRACE,
            publish_interval: PUBLISH_INTERVAL,
            api_timeout: API_TIMEOUT,
            watch_seconds: WATCH_SECONDS,
            watch_grace: WATCH_GRACE,
        }
    }
}
