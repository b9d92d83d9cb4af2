//! To which Pod a process belongs: what the kubelet writes into the names of its cgroups, in /proc/<pid>/cgroup. Pure.
//!
//! ```text
//! cgroupfs  0::/kubepods/burstable/pod5e2c…-…/<container>            (guaranteed Pods: without the class)
//! systemd   0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod5e2c…_….slice/cri-containerd-<container>.scope
//! ```
//! Version 1 has a line for each controller, of the same form. A reader in a cgroup namespace of its own, as the agent's container is
//! on version 2, sees paths from its own cgroup on: `0::/../../pod5e2c…/<container>` for a Pod of the same class.

use super::enrolments::MAX_UID_LEN;

/// Folders of the kubelet's; guaranteed Pods have none.
const CLASSES: [&str; 2] = ["burstable", "besteffort"];

/// What a process's cgroup file tells of its Pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PodCgroup {
    /// As systemd's names have it in place of dashes, underscores are dashes.
    pub uid: String,
    /// Of the version 2 hierarchy, as the reader's cgroup namespace sees it; `None` on version 1 alone, or outside of what the
    /// reader sees.
    pub path: Option<String>,
}

/// `None`: no Pod's process, or lines that contradict each other.
pub(super) fn parse(cgroup_file: &str) -> Option<PodCgroup> {
    let mut found: Option<PodCgroup> = None;
    for line in cgroup_file.lines() {
        // hierarchy-id:controllers:path, cgroups(7); a path may have colons.
        let mut fields = line.splitn(3, ':');
        let (Some(hierarchy), Some(_), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        let Some(uid) = uid_of_path(path) else { continue };
        let is_v2 = hierarchy == "0";
        let path = (is_v2 && !path.starts_with("/..")).then(|| path.to_owned());
        match &mut found {
            None => found = Some(PodCgroup { uid, path }),
            Some(before) if before.uid != uid => return None,
            Some(before) => before.path = before.path.take().or(path),
        }
    }
    found
}

/// The outermost counts: what a container makes below its own cgroup can have any name.
fn uid_of_path(path: &str) -> Option<String> {
    let mut is_kubelets = false;
    // Upwards from the reader's own container: what follows is beside it, below the kubelet's own root or above of that.
    if let Some(beside) = path.strip_prefix("/..") {
        let mut components = beside
            .split('/')
            .filter(|component| !component.is_empty())
            .skip_while(|component| *component == "..");
        let first = components.next()?;
        let first = if CLASSES.contains(&first) { components.next()? } else { first };
        if let Some(uid) = first.strip_prefix("pod").and_then(normal_uid) {
            return Some(uid);
        }
    }
    for component in path.split('/') {
        is_kubelets |= component.contains("kubepods");
        if is_kubelets && let Some(uid) = uid_of_component(component) {
            return Some(uid);
        }
    }
    None
}

fn uid_of_component(component: &str) -> Option<String> {
    // slice:prefix:container, where a runtime took systemd's form for a path.
    let component = component.split(':').next()?;
    let uid = match component.strip_suffix(".slice") {
        // kubepods-burstable-pod<uid>.slice, with a prefix where the kubelet has a root of its own.
        Some(slice) => {
            let (parents, uid) = slice.rsplit_once("-pod")?;
            parents.contains("kubepods").then_some(uid)?
        }
        None => component.strip_prefix("pod")?,
    };
    normal_uid(uid)
}

/// One form for uids of either source.
pub(super) fn normal_uid(uid: &str) -> Option<String> {
    let valid =
        !uid.is_empty() && uid.len() <= MAX_UID_LEN && uid.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
    valid.then(|| uid.replace('_', "-"))
}

#[cfg(fuzzing)]
pub(super) fn fuzz(text: &str) {
    if let Some(found) = parse(text) {
        assert_eq!(normal_uid(&found.uid), Some(found.uid.clone()));
        assert!(found.path.is_none_or(|path| text.contains(&path) && !path.starts_with("/..")));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "5e2c1f6a-07d9-4c36-9f0e-0a7d2c6a7c11";
    const UID_OF_SYSTEMD: &str = "5e2c1f6a_07d9_4c36_9f0e_0a7d2c6a7c11";

    #[test]
    fn every_form_that_the_kubelet_writes() {
        for (line, path) in [
            (format!("0::/kubepods/pod{UID}/c0ffee"), true),
            (format!("0::/kubepods/besteffort/pod{UID}/c0ffee"), true),
            (format!("0::/kubepods/burstable/pod{UID}"), true),
            (
                format!("0::/kubepods.slice/kubepods-pod{UID_OF_SYSTEMD}.slice/crio-c0ffee.scope"),
                true,
            ),
            (
                format!(
                    "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UID_OF_SYSTEMD}.slice/cri-containerd-c0ffee.scope"
                ),
                true,
            ),
            (
                format!(
                    "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod{UID_OF_SYSTEMD}.slice/cri-containerd-c0ffee.scope/init.scope"
                ),
                true,
            ),
            // containerd with systemd's driver, on version 1.
            (
                format!(
                    "3:cpu,cpuacct:/system.slice/containerd.service/kubepods-burstable-pod{UID_OF_SYSTEMD}.slice:cri-containerd:c0ffee\n2:memory:/kubepods/burstable/pod{UID}/c0ffee"
                ),
                false,
            ),
            (format!("12:pids:/kubepods/burstable/pod{UID}/c0ffee\n0::/"), false),
            (format!("12:pids:/kubepods/pod{UID}/c\n0::/kubepods/pod{UID}/c"), true),
            // Read from a cgroup namespace of the reader's own.
            (format!("0::/../../../kubepods/burstable/pod{UID}/c0ffee"), false),
            (format!("0::/../../pod{UID}/c0ffee"), false),
            (format!("0::/../../../pod{UID}/c0ffee"), false),
            (format!("0::/../../../besteffort/pod{UID}/c0ffee/nested/podother"), false),
            (
                format!(
                    "0::/../../kubepods-besteffort.slice/kubepods-besteffort-pod{UID_OF_SYSTEMD}.slice/cri-containerd-c0ffee.scope"
                ),
                false,
            ),
        ] {
            let found = parse(&line).unwrap_or_else(|| panic!("no Pod in {line}"));
            assert_eq!((found.uid.as_str(), found.path.is_some()), (UID, path), "{line}");
        }
    }

    #[test]
    fn others_are_nobodys() {
        for line in [
            "0::/",
            "0::/system.slice/sshd.service",
            "0::/user.slice/podman-pod5e2c.slice",
            "0::/machine.slice/pod5e2c/c0ffee",
            "0::/kubepods.slice/kubepods-burstable.slice",
            "0::/kubepods/burstable/pod",
            "0::/kubepods/burstable/pod../x",
            "0::/../..",
            "0::/../c0ffee/pod5e2c",
            "0::/../../burstable",
            "0::/../../../machine.slice/pod5e2c/c0ffee",
            "0::/kubepods/podcast.slice",
            "nonsense",
            "",
        ] {
            assert_eq!(parse(line), None, "{line}");
        }
        let long = format!("0::/kubepods/pod{}", "a".repeat(MAX_UID_LEN + 1));
        assert_eq!(parse(&long), None);
    }

    #[test]
    fn a_container_cannot_pass_for_another_pods() {
        let nested = format!("0::/kubepods/burstable/pod{UID}/c0ffee/kubepods/podother/x");
        assert_eq!(parse(&nested).map(|found| found.uid), Some(UID.to_owned()));
        // Nor do two hierarchies of different Pods make one.
        assert_eq!(parse("2:memory:/kubepods/poda/x\n0::/kubepods/podb/x"), None);
    }
}
