use super::pins::{cgroup2_mount, prepare_pins, storage_version};
use aya::programs::ProgramError;

use super::programs::{BACKSTOP_PROGRAM, LOOKUP_PROGRAM, NODE_PROGRAMS, program_failed};
use super::*;

#[test]
fn the_cgroup_root_is_found_on_pure_and_hybrid_machines() {
    let pure = "26 25 0:23 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
    assert_eq!(cgroup2_mount(pure), Some("/sys/fs/cgroup".into()));
    let hybrid = "30 24 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                  31 24 0:27 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";
    assert_eq!(cgroup2_mount(hybrid), Some("/sys/fs/cgroup/unified".into()));
    let bind_of_a_child = "32 24 0:27 /kubepods /mnt rw - cgroup2 cgroup2 rw\n33 24 0:27 / /a\\040b rw - cgroup2 none rw\n";
    assert_eq!(cgroup2_mount(bind_of_a_child), Some("/a b".into()));
    assert_eq!(
        cgroup2_mount("30 24 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"),
        None
    );
}

#[test]
fn a_pod_uid_survives_its_pin_name() {
    for uid in ["8c2f7a52-58c1-4a0e-9d5e-0b1d5d6e7f80", "team.a/web_0", "%41", "später", ""] {
        let name = pin_name(uid);
        assert!(!name.contains(['.', '/']), "{name}");
        assert_eq!(pod_uid(&name), uid);
    }
}

#[test]
fn only_version_directories_are_versions() {
    assert_eq!(storage_version("v1"), Some(1));
    assert_eq!(storage_version("v17"), Some(17));
    assert_eq!(storage_version("version"), None);
    assert_eq!(storage_version("1"), None);
}

#[test]
fn a_kernel_that_cannot_load_a_program_is_told_what_it_lacks() {
    let programs = NODE_PROGRAMS.map(|(name, _, feature)| (name, feature));
    for (name, feature) in programs.into_iter().chain([LOOKUP_PROGRAM, BACKSTOP_PROGRAM]) {
        let refused = ProgramError::IOError(std::io::Error::from_raw_os_error(libc::EINVAL));
        let error = program_failed(name, feature, &refused).to_string();
        // The program, the feature with the kernel that brought it, and the kernel's own words.
        assert!(feature.ends_with(')') && feature.contains('('), "{feature}");
        for part in [name, feature, "CAP_BPF", "Invalid argument"] {
            assert!(error.contains(part), "{part} is missing in {error}");
        }
    }
}

#[test]
fn a_directory_that_is_no_bpffs_is_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let error = prepare_pins(&directory.path().join("culvert")).unwrap_err().to_string();
    assert!(error.contains("not on a BPF file system"), "{error}");
}

#[test]
fn programs_that_are_put_back_are_told_by_words_that_the_control_plane_knows() {
    for (name, ..) in NODE_PROGRAMS {
        assert!(crate::discovery::noticed::PIECES.contains(&name), "{name}");
    }
}
