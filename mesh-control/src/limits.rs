//! Every bound of the control plane, with its arithmetic.

use std::time::Duration;

/// Files read from the registry folder. More: those that sort last are refused and said.
pub const MAX_FILES: usize = 4096;
/// Bytes of a manifest file: a Pod as `kubectl get -o yaml` prints it has about 6 KiB, so some 170 Pods a file.
pub const MAX_FILE_BYTES: u64 = 1 << 20;
/// Bytes of all manifest files together: held once as objects, and once more while they are read.
pub const MAX_FOLDER_BYTES: u64 = 256 << 20;
/// Documents of a file, a List's items counted.
pub const MAX_DOCUMENTS: usize = 2048;
/// Rejections that are kept for `/status` (about 512 B each: 512 KiB); all are counted.
pub const MAX_REJECTIONS: usize = 1024;

/// Quiet time after a change in the folder before it is read, so that a program that writes many files is read once.
pub const FOLDER_DEBOUNCE: Duration = Duration::from_millis(150);
/// The longest that a stream of changes can put off reading.
pub const FOLDER_DEBOUNCE_MOST: Duration = Duration::from_secs(2);
/// The folder is read again even when no event came: events can be lost.
pub const FOLDER_RESCAN: Duration = Duration::from_secs(10);

/// Connections at once: one or two a node. 10,000 × about 64 KiB (TLS, HTTP/2) = 640 MiB at worst.
pub const MAX_CONNECTIONS: usize = 10_000;
/// Connections from one address, so that one host cannot take them all.
pub const MAX_CONNECTIONS_PER_ADDRESS: usize = 256;
pub const TLS_HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// A TCP accept that failed for want of descriptors is tried again after this.
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// gRPC streams of one connection.
pub const MAX_STREAMS_PER_CONNECTION: u32 = 64;
/// HTTP/2 pings find peers that vanished.
pub const HTTP2_KEEPALIVE: Duration = Duration::from_secs(30);
pub const HTTP2_KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);

/// Bytes of a discovery request: 100,000 initial versions of about 110 B.
pub const MAX_REQUEST_BYTES: usize = 16 << 20;
/// Bytes of resources in one discovery response; gRPC clients refuse messages beyond 4 MiB by default. The rest follows once
/// this part is acknowledged.
pub const MAX_RESPONSE_BYTES: usize = 3 << 20;
/// Resource types of a stream; the mesh has three.
pub const MAX_TYPES: usize = 16;
/// Names subscribed to, and resources known of, of a type in a stream: 200,000 × about 128 B = 25 MiB.
pub const MAX_NAMES: usize = 200_000;
/// Bytes of a resource's name.
pub const MAX_NAME_BYTES: usize = 512;
/// A client that does not acknowledge a response within this is cut off; it comes back and resumes.
pub const ACKNOWLEDGE_TIMEOUT: Duration = Duration::from_secs(60);
/// A client that does not read a response within this is cut off.
pub const SEND_TIMEOUT: Duration = Duration::from_secs(30);
/// Open streams check this often whether their node's token still stands.
pub const TOKEN_RECHECK: Duration = Duration::from_secs(15);
/// Bytes of a NACK's message that are logged and kept.
pub const MAX_NACK_BYTES: usize = 1024;

/// PEM of a certificate request; a P-256 request has about 400 B.
pub const MAX_CSR_BYTES: usize = 16 << 10;
pub const MIN_CERTIFICATE_LIFETIME: Duration = Duration::from_secs(60);
pub const MAX_CERTIFICATE_LIFETIME: Duration = Duration::from_secs(90 * 24 * 3600);
/// Certificates count as valid from this long ago, for clocks that are behind.
pub const CLOCK_SKEW: Duration = Duration::from_secs(60);
pub const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Lifetime of the serving certificate; it is made anew at half of it.
pub const SERVING_LIFETIME: Duration = Duration::from_secs(30 * 24 * 3600);
/// Names in the serving certificate (about 64 B each).
pub const MAX_SERVER_NAMES: usize = 256;
/// The serving certificate is looked at this often: a new token may bring a new name.
pub const SERVING_CHECK: Duration = Duration::from_secs(2);

/// Nodes with a token.
pub const MAX_NODES: usize = 5000;
/// Bytes of a token record.
pub const MAX_TOKEN_BYTES: u64 = 4096;

/// Pods in a node's report (mesh-common's limit of Pods on a node).
pub const MAX_REPORTED_PODS: usize = 1024;
/// Bytes of a report: 1,024 Pods × about 512 B, doubled.
pub const MAX_REPORT_BYTES: usize = 1 << 20;
/// Capture states kept, also of Pods that are gone; about 128 B each: 8 MiB.
pub const MAX_CAPTURE_STATES: usize = 65_536;
/// Bytes of the file of capture states.
pub const MAX_CAPTURE_FILE_BYTES: u64 = 32 << 20;

/// Admin connections at once.
pub const MAX_ADMIN_CONNECTIONS: usize = 64;
pub const ADMIN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long streams may go on after SIGTERM.
pub const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);
