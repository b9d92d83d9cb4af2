//! Records of enrolments: what a later agent needs to take a Pod over, or to release it. One file a Pod,
//! `<run_dir>/pods/<uid>.json`, 0600, written before anything is changed for the Pod and removed after everything is undone. Another
//! build's agent reads them as well: fields are only added, each with a meaning for where it is missing. Beside it is the file by which
//! agents tell that they carry the Pod's connections (`carried.rs`).

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read as _, Write};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::network::{CaptureError, IoContext};
use super::routing::Before;

/// Kubernetes uids have 36 characters.
pub(super) const MAX_UID_LEN: usize = 128;
/// Bytes of a record: two paths of 4,096, names, and some settings. Larger: it is none, and ignored like any other that cannot be read.
const MAX_RECORD_BYTES: u64 = 64 * 1024;

/// What a caller tells of a Pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodToEnroll {
    pub uid: String,
    pub namespace: String,
    pub name: String,
    pub service_account: String,
    pub netns_path: PathBuf,
    pub addresses: Vec<IpAddr>,
    /// A container's cgroup, where there is one: the outbound probe runs there.
    pub cgroup_path: Option<PathBuf>,
    /// Absent in records of earlier versions.
    #[serde(default)]
    pub origin: Origin,
}

/// Who asked for an enrolment, and so may end it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", from = "String")]
pub enum Origin {
    /// Somebody at the local socket, who releases it as well. Also one that only a later version knows: no list ends it.
    #[default]
    Local,
    /// The control plane's list of the node's Pods.
    Following,
    /// The CNI plugin, when the Pod was made; from then on the list counts.
    Cni,
}

impl From<String> for Origin {
    fn from(text: String) -> Self {
        let known = [Self::Local, Self::Following, Self::Cni];
        known.into_iter().find(|origin| origin.as_str() == text).unwrap_or_default()
    }
}

impl Origin {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Following => "following",
            Self::Cni => "cni",
        }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct EnrolmentRecord {
    /// Cookies and slots mean nothing after a reboot.
    pub boot_id: String,
    pub pod: PodToEnroll,
    pub netns_cookie: u64,
    pub slot: u32,
    pub before: Before,
    /// Sockets by inode that were connected before: what goes over them is not protected.
    #[serde(default)]
    pub open_before: Vec<u64>,
    /// Its release has begun: it is not put back, and an agent that finds it so completes that.
    #[serde(default)]
    pub is_leaving: bool,
    /// Milliseconds since the node's start until which an agent that drains leaves a Pod that is leaving as it is. Missing: it cuts at once.
    #[serde(default)]
    pub cut_after_ms: u64,
}

/// What is in the folder of enrolments.
#[derive(Debug, Default)]
pub(super) struct Loaded {
    /// By uid.
    pub records: HashMap<String, EnrolmentRecord>,
    /// Files that should be records, and why they are none.
    pub unreadable: Vec<(PathBuf, String)>,
}

#[derive(Debug)]
pub(super) struct Enrolments {
    directory: PathBuf,
}

impl Enrolments {
    pub(super) fn open(run_dir: &Path) -> Result<Self, CaptureError> {
        let directory = run_dir.join("pods");
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)
            .step("making the folder of enrolments")?;
        Ok(Self { directory })
    }

    /// A file that is no record is reported and left; it never hinders the others.
    pub(super) fn load(&self) -> Result<Loaded, CaptureError> {
        let mut loaded = Loaded::default();
        for entry in fs::read_dir(&self.directory).step("reading the folder of enrolments")? {
            let path = entry.step("reading the folder of enrolments")?.path();
            self.remove_if_nobodys(&path);
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let why = match read(&path) {
                Ok(record) if path == self.path(&record.pod.uid) => {
                    loaded.records.insert(record.pod.uid.clone(), record);
                    continue;
                }
                Ok(record) => format!("it is that of {}", record.pod.uid),
                Err(error) => error.to_string(),
            };
            tracing::error!(path = %path.display(), error = why, "an enrolment's record cannot be read: ignored");
            loaded.unreadable.push((path, why));
        }
        Ok(loaded)
    }

    /// A file of who carries a Pod, of which nothing else is left: an older build does not remove it.
    fn remove_if_nobodys(&self, path: &Path) {
        let is_carried = path.extension().is_some_and(|extension| extension == "carried");
        let uid = path.file_stem().and_then(|stem| stem.to_str());
        if let (true, Some(uid)) = (is_carried, uid)
            && !self.path(uid).exists()
            && !self.is_carried(uid)
            && let Err(error) = fs::remove_file(path)
        {
            tracing::warn!(path = %path.display(), %error, "what an earlier agent has left cannot be removed");
        }
    }

    pub(super) fn save(&self, record: &EnrolmentRecord) -> Result<(), CaptureError> {
        const STEP: &str = "writing an enrolment's record";
        check_uid(&record.pod.uid)?;
        let path = self.path(&record.pod.uid);
        let temporary = path.with_extension("json.new");
        let text = serde_json::to_vec_pretty(record).map_err(io::Error::other).step(STEP)?;
        let mut file = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)
            .step(STEP)?;
        file.write_all(&text)
            .and_then(|()| file.sync_all())
            .and_then(|()| fs::rename(&temporary, &path))
            .step(STEP)
    }

    /// Neither released nor about to be, but for its time of grace. What cannot be read is taken to be kept.
    pub(super) fn is_kept(&self, uid: &str) -> bool {
        match read(&self.path(uid)) {
            Ok(record) => !record.is_leaving || uptime_ms() < record.cut_after_ms,
            Err(error) => error.kind() != io::ErrorKind::NotFound,
        }
    }

    pub(super) fn remove(&self, uid: &str) -> Result<(), CaptureError> {
        // The record goes last: until then it is removed again.
        for path in [self.carried_path(uid), self.path(uid)] {
            match fs::remove_file(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                result => result.step("removing an enrolment's record")?,
            }
        }
        Ok(())
    }

    pub(super) fn carried_path(&self, uid: &str) -> PathBuf {
        self.directory.join(format!("{uid}.carried"))
    }

    fn path(&self, uid: &str) -> PathBuf {
        self.directory.join(format!("{uid}.json"))
    }
}

fn read(path: &Path) -> io::Result<EnrolmentRecord> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_RECORD_BYTES + 1).read_to_end(&mut bytes)?;
    parse(&bytes)
}

fn parse(bytes: &[u8]) -> io::Result<EnrolmentRecord> {
    if bytes.len() as u64 > MAX_RECORD_BYTES {
        return Err(io::Error::other(format!("it has more than {MAX_RECORD_BYTES} bytes")));
    }
    let record: EnrolmentRecord = serde_json::from_slice(bytes)?;
    check_uid(&record.pod.uid).map_err(io::Error::other)?;
    Ok(record)
}

/// A file of the folder of enrolments. What is taken names a file and a pin, and is taken again as it was written.
#[cfg(fuzzing)]
pub(super) fn fuzz(bytes: &[u8]) {
    let Ok(record) = parse(bytes) else { return };
    assert!(!record.pod.uid.contains(['/', '.', '\0']));
    let text = serde_json::to_vec(&record).unwrap_or_default();
    let again = parse(&text).unwrap_or_else(|error| panic!("what was taken is not taken again: {error}"));
    assert_eq!((again.pod, again.before), (record.pod, record.before));
}

/// A uid names a file and a pin.
pub(super) fn check_uid(uid: &str) -> Result<(), CaptureError> {
    let safe =
        !uid.is_empty() && uid.len() <= MAX_UID_LEN && uid.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
    if safe {
        Ok(())
    } else {
        Err(CaptureError::Refused(format!(
            "a Pod's uid has letters, digits, `-` and `_`, at most {MAX_UID_LEN}: not {:?}",
            uid.chars().take(MAX_UID_LEN).collect::<String>()
        )))
    }
}

/// For [`EnrolmentRecord::cut_after_ms`]: the same for all processes of the node, and nobody sets it.
pub(super) fn uptime_ms() -> u64 {
    // Every kernel that runs the programs has this clock.
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// Of this start of the node.
///
/// # Errors
/// The kernel does not tell.
pub fn boot_id() -> Result<String, CaptureError> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").step("reading the boot id")?;
    Ok(text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn record(uid: &str) -> EnrolmentRecord {
        EnrolmentRecord {
            boot_id: "boot".into(),
            pod: PodToEnroll {
                uid: uid.into(),
                namespace: "shop".into(),
                name: "web-0".into(),
                service_account: "web".into(),
                netns_path: "/run/netns/web-0".into(),
                addresses: vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
                cgroup_path: None,
                origin: Origin::Following,
            },
            netns_cookie: 7,
            slot: 3,
            before: Before {
                ipv6: true,
                settings: vec![("net/ipv4/fwmark_reflect".into(), "0".into())],
            },
            open_before: vec![4711],
            is_leaving: false,
            cut_after_ms: 0,
        }
    }

    #[test]
    fn a_record_is_found_again_private_and_beside_broken_files() {
        let folder = tempfile::tempdir().unwrap();
        let enrolments = Enrolments::open(folder.path()).unwrap();
        enrolments.save(&record("a-1")).unwrap();
        fs::write(folder.path().join("pods/b.json"), "{").unwrap();
        fs::write(
            folder.path().join("pods/c.json"),
            serde_json::to_vec(&record("other")).unwrap(),
        )
        .unwrap();

        let mut all = enrolments.load().unwrap();
        let (loaded, unreadable) = (&all.records, &mut all.unreadable);
        assert_eq!(loaded.keys().collect::<Vec<_>>(), ["a-1"]);
        unreadable.sort();
        let names: Vec<_> = unreadable.iter().map(|(path, _)| path.file_name().unwrap()).collect();
        assert_eq!(names, ["b.json", "c.json"]);
        assert!(unreadable[1].1.contains("other"), "{unreadable:?}");
        assert_eq!(loaded["a-1"].pod, record("a-1").pod);
        assert_eq!(loaded["a-1"].before, record("a-1").before);
        let mode = fs::metadata(folder.path().join("pods/a-1.json"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);

        assert!(enrolments.is_kept("a-1"));
        // Of Pods without a record, as an older build's agent leaves them: one that nobody carries, and one that somebody does.
        drop(enrolments.carry("gone").unwrap());
        let _carried = enrolments.carry("draining").unwrap();
        enrolments.load().unwrap();
        let is_there = |uid: &str| enrolments.carried_path(uid).exists();
        assert!(!is_there("gone") && is_there("draining"));
        drop(enrolments.carry("a-1").unwrap());
        enrolments.load().unwrap();
        assert!(is_there("a-1"));
        enrolments.remove("a-1").unwrap();
        assert!(!folder.path().join("pods/a-1.carried").exists());
        enrolments.remove("a-1").unwrap();
        assert!(!enrolments.is_kept("a-1"));
        assert!(enrolments.load().unwrap().records.is_empty());
    }

    #[test]
    fn a_pod_that_leaves_is_kept_for_its_grace() {
        let folder = tempfile::tempdir().unwrap();
        let enrolments = Enrolments::open(folder.path()).unwrap();
        let is_kept = |is_leaving: bool, cut_after_ms: u64| {
            let record = EnrolmentRecord {
                is_leaving,
                cut_after_ms,
                ..record("a-1")
            };
            enrolments.save(&record).unwrap();
            enrolments.is_kept("a-1")
        };
        assert!(is_kept(true, uptime_ms() + 60_000));
        assert!(!is_kept(true, uptime_ms()));
        assert!(!is_kept(true, 0));
        assert!(is_kept(false, 0));
    }

    #[test]
    fn a_record_of_another_version_is_read() {
        let mut newer = serde_json::to_value(record("a-1")).unwrap();
        newer["added"] = serde_json::json!({ "later": [1, 2] });
        newer["pod"]["added"] = true.into();
        newer["pod"]["origin"] = "somebody_new".into();
        let read = parse(&serde_json::to_vec(&newer).unwrap()).unwrap();
        assert_eq!((read.netns_cookie, read.slot, read.pod.origin), (7, 3, Origin::Local));
        assert_eq!(
            parse(&serde_json::to_vec(&record("a-1")).unwrap()).unwrap().pod.origin,
            Origin::Following
        );

        let mut older = serde_json::to_value(record("a-1")).unwrap();
        older.as_object_mut().unwrap().remove("open_before");
        older.as_object_mut().unwrap().remove("cut_after_ms");
        older["pod"].as_object_mut().unwrap().remove("origin");
        let read = parse(&serde_json::to_vec(&older).unwrap()).unwrap();
        assert_eq!((read.open_before, read.pod.origin), (Vec::new(), Origin::Local));
    }

    #[test]
    fn a_record_has_a_size() {
        let folder = tempfile::tempdir().unwrap();
        let enrolments = Enrolments::open(folder.path()).unwrap();
        let text = serde_json::to_string(&record("a-1")).unwrap();
        let padded = |bytes: u64| {
            let room = usize::try_from(bytes).unwrap() - text.len();
            fs::write(folder.path().join("pods/a-1.json"), text.clone() + &" ".repeat(room)).unwrap();
        };
        padded(MAX_RECORD_BYTES);
        assert_eq!(enrolments.load().unwrap().records.len(), 1);
        padded(MAX_RECORD_BYTES + 1);
        assert!(enrolments.load().unwrap().records.is_empty());
    }

    #[test]
    fn a_uid_that_is_no_file_name_is_refused() {
        for uid in ["", ".", "..", "a/b", "../x", "a b", "a\0", &"x".repeat(MAX_UID_LEN + 1)] {
            assert!(check_uid(uid).is_err(), "{uid:?}");
        }
        assert!(check_uid("3f0b6a9e-6f44-4f3a-9a0c-1a2b3c4d5e6f").is_ok());
    }
}
