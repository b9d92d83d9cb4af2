//! The demo as a person meets it, every command that the README and the demo tell a person to type, and the benchmarks' output.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test: a panic is its failure, and standard output its report"
)]

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use mesh_tests::binaries;
use mesh_tests::cgroup::{self, Cgroup};
use mesh_tests::demo::running::{self, CHOICE_VARIABLE};
use mesh_tests::poll;
use mesh_tests::process::{Output, Place, Process, tail};
use mesh_tests::readme;
use mesh_tests::run_id::RunId;
use mesh_tests::suite;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

/// Bringing up and all claims take some 15 s on a quiet machine.
const DEMO: Duration = Duration::from_secs(120);
const COMMAND: Duration = Duration::from_secs(60);
/// For a change in the registry to reach a node.
const TRIES: usize = 100;

struct Shared {
    folder: TempDir,
}

fn main() -> ExitCode {
    suite::run(
        "demo",
        || Ok(Shared { folder: TempDir::new()? }),
        |_, error| error,
        &[
            ("it_stays_up_to_be_tried_until_interrupted", stays_up),
            ("an_interrupt_during_the_claims_leaves_nothing", interrupted_early),
            ("a_claim_that_fails_says_what_it_saw_and_fails_the_demo", failing_claim),
            ("without_root_it_names_root", without_root),
            ("the_readme_by_hand", by_hand),
            ("the_benchmarks_measure_everything", benchmarks),
        ],
    )
}

/// The demo's process, as it is started from a script: no terminal, its output in a file.
struct Demo {
    process: Process,
    log: PathBuf,
}

/// Where this process is.
impl Demo {
    fn start(shared: &Shared, name: &str) -> Result<Self> {
        let log = shared.folder.path().join(name);
        let mut command = Place::here().command(&binaries::path("mesh-demo")?, &[])?;
        // Terminals of one machine need not agree on these.
        command.env("XDG_RUNTIME_DIR", shared.folder.path());
        let process = Process::start("the demo", command, log.clone())?;
        Ok(Self { process, log })
    }

    fn wait_for(&mut self, text: &str) -> Result<String> {
        let (process, log) = (&mut self.process, &self.log);
        poll::until(&format!("the demo says {text:?}"), DEMO, || {
            let said = std::fs::read_to_string(log)?;
            if !said.contains(text) {
                process.check_running()?;
            }
            Ok(said.contains(text).then_some(said))
        })
        .with_context(|| tail(&self.log, 40))
    }

    /// Its exit code and all it said, once nothing of it is left.
    fn end(self, signal: Option<Signal>) -> Result<(i32, String)> {
        let id = self.process.id();
        if let Some(signal) = signal {
            self.process.signal(signal)?;
        }
        let status = self.process.wait(DEMO)?;
        let said = std::fs::read_to_string(&self.log)?;
        let left = left_behind(id)?;
        ensure!(left.is_empty(), "the demo left behind: {left:?}\n{said}");
        Ok((
            status
                .code()
                .with_context(|| format!("the demo ended with {status}\n{said}"))?,
            said,
        ))
    }
}

/// Everything on this machine that carries the run id of a process: namespaces, cgroups, folders, mounts (and with them
/// what is pinned there), processes.
fn left_behind(maker: u32) -> Result<Vec<String>> {
    let mut left = Vec::new();
    for folder in ["/run/netns".into(), cgroup::mount_point()?, RunId::base()] {
        let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
        left.extend(
            entries
                .filter(|entry| entry.file_name().to_str().and_then(RunId::maker_of) == Some(maker))
                .map(|entry| entry.path().display().to_string()),
        );
    }
    let mark = format!("cv{maker}x");
    let mounts = std::fs::read_to_string("/proc/self/mounts")?;
    left.extend(mounts.lines().filter(|line| line.contains(&mark)).map(str::to_owned));
    for process in std::fs::read_dir("/proc")?.flatten() {
        let command = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        if command.contains(&mark) {
            left.push(format!("{}: {command}", process.path().display()));
        }
    }
    let announcement = format!("{}/{maker}.json", running::FOLDER);
    if std::path::Path::new(&announcement).exists() {
        left.push(announcement);
    }
    Ok(left)
}

/// Runs lines as a person types them in a shell of the repository; `cargo xtask` is the one that is built already.
fn shell(lines: &str, demo: u32) -> Result<Output> {
    let folder = binaries::path("xtask")?;
    let folder = folder.parent().context("a folder")?;
    let target = folder.parent().context("a target folder")?;
    let script = format!("set -e\ncargo() {{ shift; xtask \"$@\"; }}\n{lines}");
    let run = |choice: Option<u32>| -> Result<Output> {
        let mut environment = vec![
            format!("PATH={}:{}", folder.display(), std::env::var("PATH")?),
            format!("CARGO_TARGET_DIR={}", target.display()),
        ];
        environment.extend(choice.map(|id| format!("{CHOICE_VARIABLE}={id}")));
        let mut arguments = vec!["-u", CHOICE_VARIABLE, "-u", "XDG_RUNTIME_DIR"];
        arguments.extend(environment.iter().map(String::as_str));
        arguments.extend(["sh", "-c", &script]);
        Place::here().run("/usr/bin/env".as_ref(), &arguments, COMMAND)
    };
    let output = run(None)?;
    // Another demo on this machine at this moment: a person is told to choose, and so do we.
    if output.stderr.contains("several demos are up") {
        return run(Some(demo));
    }
    Ok(output)
}

fn stays_up(shared: &mut Shared) -> Result<()> {
    let mut demo = Demo::start(shared, "stays-up.log")?;
    let said = demo.wait_for("All logs:")?;
    let id = demo.process.id();
    let registry = said
        .lines()
        .find_map(|line| line.trim().strip_prefix("The folder to edit: "))
        .context("the demo names no folder to edit")?;
    try_the_readme(id, registry)?;
    // Each line that it prints to be tried comes after a comment.
    let lines: Vec<&str> = said.lines().collect();
    let tried: Vec<&str> = lines
        .windows(2)
        .filter(|pair| pair[0].starts_with("  # "))
        .map(|pair| pair[1].trim())
        .collect();
    ensure!(tried.len() >= 7, "expected commands to try, saw {tried:?}\n{said}");
    for command in tried {
        let output = shell(command, id)?.ok(command)?;
        let changes_files = command.starts_with("cp ") || command.starts_with("rm ");
        ensure!(changes_files == output.is_empty(), "{command} printed {output:?}");
    }
    let unknown = shell("cargo xtask demo exec nobody -- true", id)?;
    ensure!(
        !unknown.status.success() && unknown.stderr.contains("client"),
        "expected the Pods' names, saw {unknown:?}"
    );
    let (code, said) = demo.end(Some(Signal::SIGINT))?;
    ensure!(code == 0, "after Ctrl-C the demo ended with {code}:\n{said}");
    Ok(())
}

/// The section "Try it": both commands work; with the policy, the second is refused and the first is not. The outsider is let in, but
/// for STRICT.
fn try_the_readme(demo: u32, registry: &str) -> Result<()> {
    let blocks = readme::run_by("demo")?;
    let [commands, policy, outsider, strict] = blocks.as_slice() else {
        bail!("expected commands, a policy, a command and a configuration, saw {blocks:?}")
    };
    let commands: Vec<&str> = commands.text.lines().collect();
    let [get, connect] = commands.as_slice() else {
        bail!("expected two commands, saw {commands:?}")
    };
    let body = shell(get, demo)?.ok(get)?;
    ensure!(body.contains("client=10.61.1.10 "), "{get}: {body}");
    let works = |report: &str| report.contains("\"ok\":true");
    let report = shell(connect, demo)?.ok(connect)?;
    ensure!(
        works(&report) && report.contains("\"peer\":\"10.61.2.20:9000\""),
        "{connect}: {report}"
    );
    let file = std::path::Path::new(registry).join("only-http.yaml");
    std::fs::write(&file, &policy.text)?;
    wait_for(connect, demo, "is refused", |output| output.stdout.contains("\"ok\":false"))?;
    shell(get, demo)?.ok(get).context("the policy allows this")?;
    std::fs::remove_file(&file)?;
    wait_for(connect, demo, "works again", |output| works(&output.stdout))?;

    let outsider = outsider.text.trim();
    let report = shell(outsider, demo)?.ok(outsider)?;
    ensure!(works(&report), "{outsider}: {report}");
    let file = std::path::Path::new(registry).join("strict.yaml");
    std::fs::write(&file, &strict.text)?;
    wait_for(outsider, demo, "is refused", |output| output.stdout.contains("\"ok\":false"))?;
    let report = shell(connect, demo)?.ok(connect)?;
    ensure!(works(&report), "STRICT leaves the mesh alone; {connect}: {report}");
    std::fs::remove_file(&file)?;
    wait_for(outsider, demo, "works again", |output| works(&output.stdout))
}

fn wait_for(command: &str, demo: u32, what: &str, holds: impl Fn(&Output) -> bool) -> Result<()> {
    let mut last = None;
    for _ in 0..TRIES {
        let output = shell(command, demo)?;
        if holds(&output) {
            return Ok(());
        }
        last = Some(output);
    }
    bail!("expected that `{command}` {what}, last seen: {last:?}")
}

fn interrupted_early(shared: &mut Shared) -> Result<()> {
    for text in ["control plane", "proven"] {
        let mut demo = Demo::start(shared, &format!("interrupted-at-{}.log", text.len()))?;
        demo.wait_for(text)?;
        let (code, said) = demo.end(Some(Signal::SIGINT))?;
        ensure!(
            code != 0 && said.contains("interrupted"),
            "interrupted at {text:?}, the demo ended with {code}:\n{said}"
        );
    }
    Ok(())
}

fn failing_claim(shared: &mut Shared) -> Result<()> {
    let mut demo = Demo::start(shared, "failing.log")?;
    demo.wait_for("proven")?;
    // The server's agent: every claim to come needs it, and nobody starts it again.
    let agent = child_of(demo.process.id(), "node-2")?;
    kill(agent, Signal::SIGKILL)?;
    let (code, said) = demo.end(None)?;
    ensure!(code != 0, "with a failed claim the demo ended with 0:\n{said}");
    let failed = said
        .split_once("FAILED")
        .with_context(|| format!("no claim FAILED:\n{said}"))?
        .1;
    ensure!(failed.contains("expected") && !failed.contains("All "), "{said}");
    Ok(())
}

/// The agent that a demo started on a node.
fn child_of(demo: u32, node: &str) -> Result<Pid> {
    for process in std::fs::read_dir("/proc")?.flatten() {
        let read = |file: &str| {
            let bytes = std::fs::read(process.path().join(file)).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let (status, command) = (read("status"), read("cmdline"));
        let is_child = status.lines().any(|line| line == format!("PPid:\t{demo}"));
        if is_child && status.starts_with("Name:\tmesh-agent\n") && command.contains(node) {
            let id = process.file_name().to_string_lossy().parse()?;
            return Ok(Pid::from_raw(id));
        }
    }
    bail!("the demo {demo} has no agent for {node}")
}

fn without_root(shared: &mut Shared) -> Result<()> {
    // Where "nobody" may run it.
    let folder = shared.folder.path();
    std::fs::set_permissions(folder, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let nobody = Place {
        unprivileged: true,
        ..Place::here()
    };
    for (name, commands) in [
        ("mesh-demo", &[&["--check"][..], &[]][..]),
        ("xtask", &[&["demo", "--check"], &["demo"], &["bench"], &["fresh"]]),
    ] {
        let binary = folder.join(name);
        std::fs::copy(binaries::path(name)?, &binary)?;
        for arguments in commands {
            let output = nobody.run(&binary, arguments, COMMAND)?;
            let said = format!("{}{}", output.stdout, output.stderr);
            ensure!(
                output.status.code() == Some(1) && said.contains("missing") && said.contains("root"),
                "{name} {arguments:?}: expected a failure that names root, saw {output:?}"
            );
            ensure!(
                !said.contains("Bringing up") && !said.contains("building") && !said.contains("panicked"),
                "{name} {arguments:?}: it began without root: {said}"
            );
        }
    }
    // What needs no root is not held back, and what was not tested is said; in CI that is a failure.
    let output = nobody.run(&folder.join("xtask"), &["test", "net"], COMMAND)?;
    let said = format!("{}{}", output.stdout, output.stderr);
    ensure!(
        said.contains("skipped: net: everything: root is missing") && said.contains("1 skipped"),
        "expected a skip that names root, saw {output:?}"
    );
    Ok(())
}

/// "By hand": the README's blocks as they are, one after the other in one shell, on a machine of their own as far as all
/// default paths and ports are concerned: /run, bpffs, network, process ids. The cgroup root is the machine's, as for any agent:
/// programs there act only on the Pods of their own agent.
fn by_hand(shared: &mut Shared) -> Result<()> {
    const BETWEEN: &str = "--- next block";
    let run = RunId::new();
    let cgroup = Cgroup::at_root(&run.name("hand"))?;
    let mut script = String::from("set -eu\nmount -t tmpfs tmpfs /run\nmount -t bpf bpf /sys/fs/bpf\nip link set lo up\n");
    for block in readme::run_by("hand")? {
        writeln!(script, "{}echo '{BETWEEN}'", block.text)?;
    }
    let agent = binaries::path("mesh-agent")?;
    let path = format!(
        "PATH={}:{}",
        agent.parent().context("a folder")?.display(),
        std::env::var("PATH")?
    );
    let temporary = format!("TMPDIR={}", shared.folder.path().display());
    let place = Place {
        cgroup: Some(cgroup.path().to_owned()),
        ..Place::here()
    };
    let arguments = [
        "-i",
        &path,
        &temporary,
        "unshare",
        "--mount",
        "--net",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        "--propagation",
        "private",
        "sh",
        "-c",
        &script,
    ];
    let output = place.run("/usr/bin/env".as_ref(), &arguments, COMMAND)?;
    let said = format!("{}{}", output.stdout, output.stderr);
    ensure!(output.status.success(), "{}:\n{said}", output.status);
    let blocks: Vec<&str> = output.stdout.split(BETWEEN).collect();
    let [_, mesh, away, _] = blocks.as_slice() else {
        bail!("expected three blocks: {said}")
    };
    for wanted in [
        "uid-client is in the mesh",
        "uid-server is in the mesh",
        "server=server client=10.0.0.2 ",
        "\"path\":\"tunnel\"",
        "spiffe://cluster.local/ns/shop/sa/client",
        "spiffe://cluster.local/ns/shop/sa/server",
    ] {
        ensure!(mesh.contains(wanted), "expected {wanted:?} in:\n{said}");
    }
    ensure!(
        mesh.matches("\"proven\":true").count() == 2,
        "expected two proven Pods in:\n{said}"
    );
    ensure!(
        away.contains("2 Pods released"),
        "expected that cleanup releases both:\n{said}"
    );
    Ok(())
}

/// What is measured, for each system that it is measured for; what the figures are is no test's concern.
fn benchmarks(_: &mut Shared) -> Result<()> {
    const SYSTEMS: [&str; 3] = ["direct", "mesh", "mesh_same_node"];
    let measures = [
        (
            "Gbit/s",
            &["bulk_up_1", "bulk_down_1", "bulk_up_8", "bulk_down_8"][..],
            &SYSTEMS[..],
        ),
        ("s/GB", &["bulk_up_1_cpu", "bulk_down_1_cpu"], &SYSTEMS[1..]),
        ("µs", &["pingpong_64_p50", "pingpong_64_p99", "connect_1_p50"], &SYSTEMS),
        ("s/10,000", &["pingpong_64_cpu", "connect_8_cpu"], &SYSTEMS),
        ("1/s", &["connect_8_rate"], &SYSTEMS),
        ("MB", &["rss_fresh", "rss_1000_idle"], &SYSTEMS[1..2]),
    ];
    let mut expected = BTreeSet::new();
    for (unit, names, systems) in measures {
        for name in names {
            expected.extend(systems.iter().map(|system| format!("{name} {system} {unit}")));
        }
    }
    let output = Place::here()
        .run(&binaries::path("mesh-bench")?, &["1", "--json", "--brief"], DEMO)?
        .ok("the benchmarks")?;
    let mut measured = BTreeSet::new();
    for line in output.lines() {
        let row: Value = serde_json::from_str(line).with_context(|| format!("not JSON: {line}"))?;
        let word = |field: &str| {
            row[field]
                .as_str()
                .map(str::to_owned)
                .with_context(|| format!("{field}: {line}"))
        };
        let number = |field: &str| row[field].as_f64().with_context(|| format!("{field}: {line}"));
        let (least, median, most) = (number("min")?, number("median")?, number("max")?);
        // CPU time is counted coarsely: of so little it may be none.
        ensure!(0.0 <= least && least <= median && median <= most && row["n"] == 1, "{line}");
        ensure!(
            median > 0.0 || row["measure"].as_str().is_some_and(|name| name.ends_with("_cpu")),
            "{line}"
        );
        let is_new = measured.insert(format!("{} {} {}", word("measure")?, word("system")?, word("unit")?));
        ensure!(is_new, "twice: {line}");
    }
    ensure!(measured == expected, "measured {measured:?}, not {expected:?}");
    let usage = Place::here().run(&binaries::path("mesh-bench")?, &["0"], COMMAND)?;
    ensure!(!usage.status.success() && usage.stderr.contains("<ROUNDS>"), "{usage:?}");
    Ok(())
}
