use std::os::unix::fs::PermissionsExt as _;

use super::file::{decode, encode};
use super::*;
use crate::identity::Identity;
use crate::identity::renewal::RememberedCertificate;
use mesh_proto::discovery::{DeltaDiscoveryResponse, Resource};

fn owner() -> Owner {
    Owner {
        node: "node-a".to_owned(),
        root_sha256: [7; 32],
        boot_id: "boot".to_owned(),
    }
}

fn remembered() -> Remembered {
    Remembered {
        snapshot: vec![DeltaDiscoveryResponse {
            type_url: "t".to_owned(),
            resources: vec![Resource {
                name: "a".to_owned(),
                version: "1".to_owned(),
                ..Resource::default()
            }],
            ..DeltaDiscoveryResponse::default()
        }],
        certificates: vec![(
            Identity::new("cluster.local", "shop", "web"),
            RememberedCertificate {
                answer: vec!["chain".to_owned(), "roots".to_owned()],
                key: b"a very secret key".to_vec(),
            },
        )],
    }
}

fn bytes() -> Vec<u8> {
    encode(&owner(), remembered(), SystemTime::now()).unwrap()
}

#[test]
fn what_is_written_is_recalled_and_is_its_owners_alone() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(recall(folder.path(), &owner()), None);
    // Of an agent that died while it wrote, with a mode that must not be taken over.
    let leftover = folder.path().join("memory.new");
    fs::write(&leftover, "half").unwrap();
    fs::set_permissions(&leftover, fs::Permissions::from_mode(0o666)).unwrap();
    let memory = Memory::new(folder.path(), owner(), || Some(remembered()));
    memory.write_now();
    let path = folder.path().join("memory");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(recall(folder.path(), &owner()), Some(remembered()));
    assert!(!format!("{memory:?} {:?}", remembered()).contains("secret key"));
    remove(folder.path()).unwrap();
    remove(folder.path()).unwrap();
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn what_others_may_use_is_not_believed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("memory");
    fs::write(&path, bytes()).unwrap();
    for mode in [0o644, 0o620, 0o602] {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        assert_eq!(recall(folder.path(), &owner()), None, "{mode:o}");
    }
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    assert!(recall(folder.path(), &owner()).is_some());
    let elsewhere = folder.path().join("elsewhere");
    fs::rename(&path, &elsewhere).unwrap();
    std::os::unix::fs::symlink(&elsewhere, &path).unwrap();
    assert_eq!(recall(folder.path(), &owner()), None, "a link");
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert_eq!(recall(folder.path(), &owner()), None, "a folder");
}

#[test]
fn a_tmpfs_is_known_as_one() {
    assert!(is_on_tmpfs(Path::new("/dev/shm")));
    // Of the mount points that every Linux has, the one that holds no keys.
    assert!(!is_on_tmpfs(Path::new("/proc")));
    assert!(!is_on_tmpfs(Path::new("/not/there")));
}

#[test]
fn nothing_is_written_before_there_is_everything() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("memory"), "of before").unwrap();
    Memory::new(folder.path(), owner(), || None).write_now();
    assert_eq!(fs::read(folder.path().join("memory")).unwrap(), b"of before");
}

#[test]
fn what_cannot_be_written_leaves_nothing_that_is_no_longer_so() {
    let folder = tempfile::tempdir().unwrap();
    Memory::new(folder.path(), owner(), || Some(remembered())).write_now();
    let too_large = || {
        let mut remembered = remembered();
        remembered.certificates[0].1.key = vec![0; MAX_FILE_BYTES];
        Some(remembered)
    };
    Memory::new(folder.path(), owner(), too_large).write_now();
    assert_eq!(recall(folder.path(), &owner()), None);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn anything_but_this_agents_own_memory_is_refused_with_its_reason() {
    let now = SystemTime::now();
    let reason = |owner: &Owner, now| decode(&bytes(), owner, now).unwrap_err().reason();
    let other = |change: fn(&mut Owner)| {
        let mut other = owner();
        change(&mut other);
        other
    };
    assert_eq!(decode(&bytes(), &owner(), now).unwrap(), remembered());
    assert_eq!(reason(&other(|o| o.node = "node-b".to_owned()), now), "other_node");
    assert_eq!(reason(&other(|o| o.root_sha256[31] = 0), now), "other_mesh");
    assert_eq!(reason(&other(|o| o.boot_id = "next".to_owned()), now), "other_boot");
    let minute = Duration::from_secs(60);
    for old in [now + LONGEST_ABSENCE + minute, now - LONGEST_ABSENCE - minute] {
        assert_eq!(reason(&owner(), old), "old");
    }
    for usable in [now + LONGEST_ABSENCE - minute, now - LONGEST_ABSENCE + minute] {
        assert!(decode(&bytes(), &owner(), usable).is_ok());
    }
    for format in [&b""[..], b"culvert-memory 0\nx", b"{}"] {
        assert_eq!(decode(format, &owner(), now).unwrap_err().reason(), "format");
    }
}

/// No flipped bit and no cut goes unseen.
#[test]
fn a_damaged_file_is_refused() {
    let whole = bytes();
    for at in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[at] ^= 1 << (at % 8);
        assert!(decode(&damaged, &owner(), SystemTime::now()).is_err(), "byte {at}");
        assert!(decode(&whole[..at], &owner(), SystemTime::now()).is_err(), "cut at {at}");
    }
    let longer = [&whole[..], b"x"].concat();
    assert_eq!(decode(&longer, &owner(), SystemTime::now()), Err(FileError::Damaged));
}

#[tokio::test(start_paused = true)]
async fn changes_are_written_and_an_unchanged_state_is_stood_by() {
    let folder = tempfile::tempdir().unwrap();
    let writes = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let counted = writes.clone();
    let memory = Memory::new(folder.path(), owner(), move || {
        counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Some(remembered())
    });
    let (state, certificates) = (watch::Sender::new(0), watch::Sender::new(0));
    let keeping = tokio::spawn(memory.keep([state.subscribe(), certificates.subscribe()]));
    let count = || writes.load(std::sync::atomic::Ordering::Relaxed);
    let until = async |wanted: u64| {
        while count() < wanted {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    until(1).await;
    for change in [&state, &certificates] {
        let before = count();
        change.send_modify(|version| *version += 1);
        until(before + 1).await;
    }
    let before = count();
    until(before + 1).await;
    keeping.abort();
}
