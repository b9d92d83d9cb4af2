//! New connections in Pods while something happens to them, and what became of each.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use super::Cluster;
use super::shop::{PATIENCE, SHOP};
use crate::poll;
use crate::process::{Conversation, Output};
use crate::suite;

/// A Pod's only container, entered by its node: without the API server.
#[derive(Clone, Debug)]
pub struct Inside {
    /// Counted from 1.
    node: usize,
    /// As the node counts.
    pid: String,
}

/// # Errors
/// It does not run.
pub fn inside(cluster: &Cluster, pod: &str) -> Result<Inside> {
    let object = cluster.kubectl().get(&["-n", SHOP, "pod", pod])?;
    let name = object["spec"]["nodeName"].as_str().context("a node")?;
    let at = cluster.nodes().iter().position(|node| node.name() == name);
    let node = at.context("a node's name")? + 1;
    let id = object["status"]["containerStatuses"][0]["containerID"]
        .as_str()
        .context("a container")?;
    let id = id.rsplit('/').next().context("a container's id")?;
    let find = format!("grep -ls {id} /proc/[0-9]*/cgroup | cut -d/ -f3 | sort -n | head -n 1");
    let pid = cluster
        .node(node)
        .run(&["sh", "-c", &find], poll::SOON)?
        .ok("its first process")?;
    ensure!(!pid.trim().is_empty(), "{pod}: no process of {id} on {name}");
    let pid = pid.trim().to_owned();
    Ok(Inside { node, pid })
}

/// Programs of the mesh are attached to cgroups: it is the container's that counts, not that of this test.
const ENTER: &str = "for root in /sys/fs/cgroup/unified /sys/fs/cgroup; do [ ! -f $root/cgroup.controllers ] || break; done; \
                     echo 0 > $root$(sed -n s/^0:://p /proc/$0/cgroup)/cgroup.procs && \
                     exec nsenter -t $0 -m -n -u -i -p /bin/sh -c \"$1\"";

impl Inside {
    /// Its network namespace, as this machine sees it.
    ///
    /// # Errors
    /// The node is off.
    pub fn netns(&self, cluster: &Cluster) -> Result<PathBuf> {
        let node = cluster.node(self.node).pid()?;
        let seen_by_node = Path::new("proc").join(&self.pid).join("ns/net");
        Ok(Path::new("/proc").join(node.to_string()).join("root").join(seen_by_node))
    }

    /// # Errors
    /// It cannot start, or does not end.
    pub fn shell(&self, cluster: &Cluster, script: &str) -> Result<Output> {
        let command = ["sh", "-c", ENTER, &self.pid, script];
        cluster.node(self.node).run(&command, PATIENCE)
    }

    /// One connection to an echo server, that is talked on.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn chat(&self, cluster: &Cluster, to: SocketAddr) -> Result<Conversation> {
        let script = format!("exec /bin/mesh-test-app chat {to}");
        let command = ["sh", "-c", ENTER, &self.pid, &script];
        Conversation::chat(cluster.node(self.node).command(&command)?).with_context(|| format!("a conversation with {to}"))
    }
}

/// New connections, one after the other, in a Pod, until it is ended. Needs no API server.
#[derive(Debug)]
pub struct Load {
    pod: Inside,
    folder: String,
}

/// New connections from the client to the server while something is done: none fails.
///
/// # Errors
/// What is done does, or a connection.
pub fn under_load(cluster: &Cluster, what: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let load = Load::begin(cluster, "client", "http://server/")?;
    let worked = work();
    let counted = load.end(cluster)?;
    worked?;
    suite::say(&format!(
        "{} connections during {what}, {} failed",
        counted.made, counted.failed
    ));
    counted.none_failed(what)
}

#[derive(Debug)]
pub struct Counted {
    pub made: u32,
    pub failed: u32,
    /// The last of them.
    pub errors: String,
    /// What was answered, a line each.
    pub answers: String,
}

impl Load {
    /// # Errors
    /// The Pod does not run.
    pub fn begin(cluster: &Cluster, pod: &str, url: &str) -> Result<Self> {
        Self::begin_in(cluster, inside(cluster, pod)?, url)
    }

    /// # Errors
    /// As [`Inside::shell`].
    pub fn begin_in(cluster: &Cluster, pod: Inside, url: &str) -> Result<Self> {
        let folder = format!("/tmp/load-{:08x}", rand::random::<u32>());
        let each = format!("/bin/mesh-test-app get {url} >>answers 2>>errors || f=$((f+1))");
        let all = format!("n=0; f=0; while [ ! -e stop ]; do n=$((n+1)); {each}; done; echo \"$n $f\" > count; mv count done");
        let begin = format!("mkdir -p {folder} && cd {folder} && ({all}) </dev/null >/dev/null 2>&1 &");
        pod.shell(cluster, &begin)?.ok("the load")?;
        Ok(Self { pod, folder })
    }

    /// # Errors
    /// It does not end.
    pub fn end(self, cluster: &Cluster) -> Result<Counted> {
        let read = |file: &str| {
            let script = format!("tail -c 60000 {}/{file} 2>/dev/null; true", self.folder);
            self.pod.shell(cluster, &script)?.ok(file)
        };
        let stop = format!("touch {}/stop", self.folder);
        self.pod.shell(cluster, &stop)?.ok("its end")?;
        let done = poll::until("the load's count", PATIENCE, || {
            let text = read("done")?;
            Ok((!text.trim().is_empty()).then_some(text))
        })?;
        let (made, failed) = done.trim().split_once(' ').context("two numbers")?;
        Ok(Counted {
            made: made.parse()?,
            failed: failed.parse()?,
            errors: read("errors")?.chars().take(2_000).collect(),
            answers: read("answers")?,
        })
    }
}

impl Counted {
    /// # Errors
    /// One failed, or there were too few for that to say anything.
    pub fn none_failed(&self, during: &str) -> Result<()> {
        ensure!(self.made > 20, "only {} connections during {during}", self.made);
        ensure!(
            self.failed == 0,
            "{} of {} failed during {during}: {}",
            self.failed,
            self.made,
            self.errors
        );
        Ok(())
    }
}
