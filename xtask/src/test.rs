//! `cargo xtask test`: every test that this machine can run, counted; what it cannot run is said, and never counts as passed.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, Result, bail};
use clap::{Args, ValueEnum};

use crate::helm::Helm;
use crate::workspace::{USER_HALF, Workspace};
use crate::{chart, demo, ebpf, fuzz, images, kind, kube, mutants, other_build, prometheus, tools};

#[derive(Args)]
pub struct Arguments {
    /// A part of the tests; without it, all of them
    part: Option<Part>,
    /// Only tests whose name contains this
    #[arg(requires = "part")]
    filter: Option<String>,
    /// With `kube`: the README's quick start on a cluster that is made for it by another maker's tool, and no other suite
    #[arg(long, requires = "part", conflicts_with = "filter")]
    cluster: Option<Maker>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Maker {
    /// Kubernetes in Docker: <https://kind.sigs.k8s.io>. Docker runs, `kind` and `kubectl` are in PATH
    Kind,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Seconds, no root: tables, protocol state machines, the tunnel on loopback
    Unit,
    /// Every parser of bytes from outside: its corpus, and seconds of what comes of it
    Fuzz,
    /// Minutes, root: the kernel programs, two nodes of namespaces, the demo's claims
    Net,
    /// Minutes, root: builds without a defence, in which the attack's test must fail
    Mutants,
    /// Half an hour, root, Go: what stands on a real Kubernetes; the first time, that is built, which takes as long again
    Kube,
}

#[derive(Default)]
struct Totals {
    passed: usize,
    failed: usize,
    skipped: Vec<String>,
    /// How many of them were in the harness's summaries.
    reported_skips: usize,
    broken: Vec<String>,
}

/// What decides whether a skip is one that had to be.
#[derive(Clone, Copy)]
struct Machine {
    root: bool,
    ci: bool,
}

/// How the names of the suites begin that stand on a real Kubernetes.
const KUBE_SUITES: &str = "kube";
/// The part of `kube` that is no suite, and needs no cluster.
const CHART: &str = "chart";
/// The suites that need the other build as well, which takes minutes where much has changed.
const UPGRADE_SUITE: &str = "upgrade";
const KUBE_UPGRADE_SUITE: &str = "kube_upgrade";
/// Those that mostly wait: how patient a control plane is, they try. They run beside the others, and are shown after them.
const PATIENT_SUITES: [&str; 1] = ["kube_faults"];
/// Where the suites have the images from, of this build and of the other.
const IMAGES_VARIABLE: &str = "CULVERT_IMAGE_DIR";
const OTHER_IMAGES_VARIABLE: &str = "CULVERT_OTHER_IMAGE_DIR";
/// Where the suites have Helm from.
const HELM_VARIABLE: &str = "CULVERT_HELM";

pub fn run(workspace: &Workspace, arguments: &Arguments) -> Result<ExitCode> {
    let mut totals = Totals::default();
    let wants = |part| arguments.part.is_none_or(|wanted| wanted == part);
    let filter = arguments.filter.as_deref();
    if wants(Part::Unit) {
        unit(workspace, filter, &mut totals)?;
    }
    if wants(Part::Net) {
        net(workspace, filter, &mut totals)?;
    }
    // Last: it shares what the others have built.
    if wants(Part::Fuzz) {
        heading("fuzz targets");
        match fuzz::test(workspace, filter) {
            Ok(targets) => targets
                .into_iter()
                .for_each(|(target, is_clean)| totals.add(&format!("the fuzz target {target}"), is_clean)),
            Err(error) => totals.add(&format!("the fuzz targets could not be run: {error:#}"), false),
        }
    }
    if wants(Part::Mutants) {
        mutants(workspace, filter, &mut totals)?;
    }
    match arguments.cluster {
        Some(Maker::Kind) if arguments.part == Some(Part::Kube) => on_kind(workspace, &mut totals)?,
        Some(Maker::Kind) => bail!("--cluster is for `cargo xtask test kube`"),
        None if wants(Part::Kube) => kube(workspace, filter, &mut totals)?,
        None => {}
    }
    let machine = Machine {
        root: tools::is_root(),
        ci: std::env::var_os("CI").is_some(),
    };
    for line in totals.lines() {
        tools::say(&line);
    }
    Ok(match totals.verdict(machine, filter.is_some()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            tools::say(why);
            ExitCode::FAILURE
        }
    })
}

fn unit(workspace: &Workspace, filter: Option<&str>, totals: &mut Totals) -> Result<()> {
    heading("unit tests");
    // The object only changes what mesh-agent embeds; without it here, mesh-agent would be built twice.
    let object = if tools::is_root() {
        Some(ebpf::object(workspace)?)
    } else {
        None
    };
    let mut cargo = workspace.cargo(&["test", "--locked", "--no-fail-fast", "--lib", "--bins"]);
    // With it a test that skips itself is heard.
    cargo.args(USER_HALF).args(["--", "--nocapture"]).args(filter);
    if let Some(object) = &object {
        cargo.env(ebpf::OBJECT_VARIABLE, object);
    }
    totals.count("the unit tests", &mut cargo)?;
    Ok(())
}

fn net(workspace: &Workspace, filter: Option<&str>, totals: &mut Totals) -> Result<()> {
    heading("tests with network namespaces and eBPF");
    if !tools::is_root() {
        totals
            .skipped
            .push("net: everything: root is missing (network namespaces, cgroups and eBPF need it)".to_owned());
        return Ok(());
    }
    prepare(workspace)?;
    let object = ebpf::object(workspace)?;
    // Every suite needs the kernel, so those that need no more are of this part.
    let mut cargo = suites(workspace, &object, filter, |name| !is_kube(name) && name != UPGRADE_SUITE)?;
    match prometheus::folder(workspace) {
        Ok(folder) => {
            cargo.env(prometheus::FOLDER_VARIABLE, folder);
        }
        // Its suite skips itself, which CI does not let pass.
        Err(error) => tools::say(&format!("no Prometheus: {error:#}")),
    }
    totals.count("the integration tests", &mut cargo)?;
    upgrades(workspace, &object, filter, UPGRADE_SUITE, &[], totals)?;
    if filter.is_some() {
        return Ok(());
    }
    heading("the demo's claims");
    let mut command = Command::new(workspace.binaries().join("mesh-demo"));
    command.arg("--check").env("CULVERT_BIN_DIR", workspace.binaries());
    let is_good = command.status().context("starting the demo")?.success();
    totals.add("the demo", is_good);
    heading("the images");
    for content in &images::IMAGES {
        let tried = images::test(workspace, content);
        totals.try_add(&format!("the image of {}", content.name), tried);
    }
    Ok(())
}

fn kube(workspace: &Workspace, filter: Option<&str>, totals: &mut Totals) -> Result<()> {
    if filter == Some(CHART) {
        let helm = Helm::find(workspace);
        try_chart(workspace, helm, totals);
        return Ok(());
    }
    heading("tests on a real Kubernetes");
    if !tools::is_root() {
        totals
            .skipped
            .push("kube: everything: root is missing (the nodes are namespaces of this machine)".to_owned());
        return Ok(());
    }
    prepare(workspace)?;
    let folder = match kube::tools(workspace)? {
        kube::Tools::Here(folder) => folder,
        kube::Tools::Impossible(why) => {
            totals.skipped.push(format!("kube: everything: {why}"));
            return Ok(());
        }
    };
    let object = ebpf::object(workspace)?;
    let [agent, control] = &images::IMAGES;
    let images = images::Made::of(
        workspace,
        &[agent, control, &images::APP_IMAGE],
        &workspace.binaries(),
        "this",
    )?;
    let mut environment = vec![(kube::DIR_VARIABLE, folder), (IMAGES_VARIABLE, images.0.clone())];
    let helm = Helm::find(workspace);
    if let Ok(Some(helm)) = &helm {
        environment.push((HELM_VARIABLE, helm.program().to_owned()));
    }
    let is_patient = |name: &str| PATIENT_SUITES.contains(&name);
    let mut patient = suites(workspace, &object, filter, is_patient)?;
    patient.envs(environment.clone()).stderr(Stdio::inherit());
    let mut cargo = suites(workspace, &object, filter, |name| {
        is_kube(name) && name != KUBE_UPGRADE_SUITE && !is_patient(name)
    })?;
    cargo.envs(environment.clone());
    let beside = std::thread::scope(|scope| {
        let beside = scope.spawn(|| patient.output());
        totals.count("the tests on a real Kubernetes", &mut cargo)?;
        upgrades(workspace, &object, filter, KUBE_UPGRADE_SUITE, &environment, totals)?;
        anyhow::Ok(beside.join())
    })?;
    let beside = beside
        .map_err(|_| anyhow::anyhow!("the thread that ran them panicked"))?
        .context("starting cargo")?;
    heading("what ran beside them");
    totals.read(beside.stdout.as_slice(), &mut std::io::stdout())?;
    if !beside.status.success() {
        totals.broken.push(PATIENT_SUITES.join(", "));
    }
    if filter.is_none() {
        try_chart(workspace, helm, totals);
    }
    Ok(())
}

/// A cluster of kind, which is gone at the end.
fn on_kind(workspace: &Workspace, totals: &mut Totals) -> Result<()> {
    kind::expect_tools()?;
    prepare(workspace)?;
    let object = ebpf::object(workspace)?;
    heading("a cluster of kind");
    let cluster = kind::Cluster::create(workspace)?;
    heading("the README's quick start on it");
    let mut cargo = suites(workspace, &object, None, |name| name == kind::SUITE)?;
    totals.count(kind::SUITE, cargo.env(kind::KUBECONFIG_VARIABLE, cluster.kubeconfig()))
}

fn try_chart(workspace: &Workspace, helm: Result<Option<Helm>>, totals: &mut Totals) {
    heading("the chart");
    match helm {
        Ok(Some(helm)) => totals.try_add("the chart", chart::test(workspace, &helm)),
        Ok(None) => totals
            .skipped
            .push("kube: the chart: no Helm, and no Go to build it with".to_owned()),
        Err(error) => totals.try_add("the chart", Err(error)),
    }
}

/// A suite that goes to the other build and back. That is built only if a test of the suite is wanted.
fn upgrades(
    workspace: &Workspace,
    object: &Path,
    filter: Option<&str>,
    suite: &str,
    environment: &[(&str, PathBuf)],
    totals: &mut Totals,
) -> Result<()> {
    let cargo = || suites(workspace, object, filter, |name| name == suite);
    if filter.is_some() && !tools::output(cargo()?.arg("--list"))?.contains(": test") {
        return Ok(());
    }
    heading("upgrades to another build, and back");
    let other = other_build::folder(workspace).and_then(|folder| {
        let images = is_kube(suite).then(|| images::Made::of(workspace, &images::IMAGES.each_ref(), &folder, "other"));
        Ok((folder, images.transpose()?))
    });
    match other {
        Ok((folder, images)) => {
            let mut cargo = cargo()?;
            cargo
                .envs(environment.iter().cloned())
                .env(other_build::FOLDER_VARIABLE, folder);
            if let Some(images) = &images {
                cargo.env(OTHER_IMAGES_VARIABLE, &images.0);
            }
            totals.count(suite, &mut cargo)
        }
        Err(error) => {
            totals.add(&format!("the other build: {error:#}"), false);
            Ok(())
        }
    }
}

fn is_kube(suite: &str) -> bool {
    suite.starts_with(KUBE_SUITES)
}

/// Cargo on those suites that are wanted.
fn suites(workspace: &Workspace, object: &Path, filter: Option<&str>, wanted: impl Fn(&str) -> bool) -> Result<Command> {
    let mut cargo = workspace.cargo(&["test", "--locked", "--no-fail-fast"]);
    for suite in workspace.suites()?.iter().filter(|suite| wanted(suite)) {
        cargo.args(["--test", suite]);
    }
    cargo
        .args(USER_HALF)
        .args(["--", "--nocapture"])
        .args(filter)
        .env(ebpf::OBJECT_VARIABLE, object)
        .env("CULVERT_BIN_DIR", workspace.binaries());
    Ok(cargo)
}

fn mutants(workspace: &Workspace, filter: Option<&str>, totals: &mut Totals) -> Result<()> {
    heading("builds without a defence");
    if !tools::is_root() {
        totals
            .skipped
            .push("mutants: everything: root is missing (network namespaces, cgroups and eBPF need it)".to_owned());
        return Ok(());
    }
    prepare(workspace)?;
    let report = mutants::run(workspace, filter)?;
    totals.passed += report.noticed;
    totals.failed += report.faults.len();
    let first_line = |fault: &String| fault.lines().next().map(str::to_owned);
    totals.broken.extend(report.faults.iter().filter_map(first_line));
    Ok(())
}

/// What the suites need of the machine, and the binaries that they start.
fn prepare(workspace: &Workspace) -> Result<()> {
    demo::prepare(workspace)?;
    if !PathBuf::from("/usr/lib/python3/dist-packages/h2").exists() {
        tools::install(
            &["python3", "python3-h2", "openssl"],
            "an HTTP/2 stack that is not ours, to test the tunnel against",
        )?;
    }
    tools::ensure_command("openssl", "openssl", "certificates for the foreign peer")
}

impl Totals {
    /// Something that is one test by itself.
    fn add(&mut self, name: &str, is_good: bool) {
        if is_good {
            self.passed += 1;
        } else {
            self.failed += 1;
            self.broken.push(name.to_owned());
        }
    }

    /// The same, with the reason.
    fn try_add(&mut self, name: &str, tried: Result<()>) {
        match tried {
            Ok(()) => self.add(name, true),
            Err(error) => self.add(&format!("{name}: {error:#}"), false),
        }
    }

    /// Runs a test command, shows its output and counts by the harness's own summary lines.
    fn count(&mut self, name: &str, command: &mut Command) -> Result<()> {
        let mut child = command.stdout(Stdio::piped()).spawn().context("starting cargo")?;
        let output = child.stdout.take().context("the output of cargo")?;
        self.read(BufReader::new(output), &mut std::io::stdout())?;
        if !child.wait()?.success() {
            self.broken.push(name.to_owned());
        }
        Ok(())
    }

    /// A test command's output, which is also shown.
    fn read(&mut self, output: impl BufRead, shown: &mut impl Write) -> Result<()> {
        let before = (self.passed, self.skipped.len(), self.reported_skips);
        for line in output.split(b'\n') {
            let line = String::from_utf8_lossy(&line?).into_owned();
            let _ = writeln!(shown, "{line}");
            self.take(&line);
        }
        // A test of Rust's own harness that skips itself counts as passed there; not here. Suites with our runner say
        // themselves how many they skipped.
        let skipped_themselves = (self.skipped.len() - before.1).saturating_sub(self.reported_skips - before.2);
        self.passed = self.passed.saturating_sub(skipped_themselves).max(before.0);
        Ok(())
    }

    fn take(&mut self, line: &str) {
        // With --nocapture a test's own line may follow the harness's on one line.
        if let Some((_, skipped)) = line.split_once("SKIPPED: ") {
            self.skipped.push(skipped.to_owned());
        }
        if let Some(summary) = line.strip_prefix("test result: ") {
            self.passed += number_before(summary, " passed");
            self.failed += number_before(summary, " failed");
            self.reported_skips += number_before(summary, " ignored");
        }
    }

    /// What a person is told.
    fn lines(&self) -> Vec<String> {
        let skipped = self.skipped.iter().map(|skipped| format!("skipped: {skipped}"));
        let broken = self.broken.iter().map(|broken| format!("failed: {broken}"));
        let (passed, failed, skips) = (self.passed, self.failed, self.skipped.len());
        let sum = format!("{passed} passed, {failed} failed, {skips} skipped");
        skipped.chain(broken).chain([sum]).collect()
    }

    /// Whether all is well, and if not, why.
    fn verdict(&self, machine: Machine, has_filter: bool) -> Result<(), &'static str> {
        if self.failed > 0 || !self.broken.is_empty() {
            return Err("a test failed");
        }
        if machine.ci && machine.root && !self.skipped.is_empty() {
            return Err("a test was skipped in CI on a machine with root: that is a failure");
        }
        if self.passed == 0 && self.skipped.is_empty() {
            return Err(if has_filter {
                "no test has such a name"
            } else {
                "no test ran: that is a failure"
            });
        }
        Ok(())
    }
}

fn number_before(text: &str, word: &str) -> usize {
    text.split_once(word)
        .and_then(|(before, _)| before.rsplit(' ').next()?.parse().ok())
        .unwrap_or(0)
}

fn heading(text: &str) {
    tools::say(&format!("== {text}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_harness_is_read() {
        let mut totals = Totals::default();
        totals.take("test result: ok. 12 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s");
        totals.take("test a::b ... SKIPPED: a::b: no root");
        totals.take("test result: FAILED. 3 passed; 0 failed; 2 ignored");
        assert_eq!((totals.passed, totals.failed), (15, 1));
        assert_eq!(totals.skipped, ["a::b: no root"]);
    }

    #[test]
    fn a_test_that_skips_itself_has_not_passed() {
        let mut totals = Totals::default();
        let said = "test b ... ok\nnoise SKIPPED: a::b: only root can\ntest result: ok. 3 passed; 0 failed; 0 ignored\n";
        let mut shown = Vec::new();
        totals.read(said.as_bytes(), &mut shown).unwrap();
        assert_eq!((totals.passed, totals.failed), (2, 0));
        assert_eq!(
            totals.lines(),
            ["skipped: a::b: only root can", "2 passed, 0 failed, 1 skipped"]
        );
        assert_eq!(shown, said.as_bytes());
    }

    #[test]
    fn something_that_is_one_test_is_counted_as_one() {
        let mut totals = Totals::default();
        totals.add("good", true);
        totals.add("bad", false);
        assert_eq!(totals.lines(), ["failed: bad", "1 passed, 1 failed, 0 skipped"]);
    }

    #[test]
    fn the_verdict() {
        let root = |ci| Machine { root: true, ci };
        let nobody = |ci| Machine { root: false, ci };
        let totals = |passed, failed, skipped: &[&str], broken: &[&str]| Totals {
            passed,
            failed,
            skipped: skipped.iter().map(ToString::to_string).collect(),
            broken: broken.iter().map(ToString::to_string).collect(),
            ..Totals::default()
        };
        let all = false;
        for (what, totals, machine, has_filter, good) in [
            ("all passed", totals(3, 0, &[], &[]), root(true), all, true),
            ("one failed", totals(3, 1, &[], &[]), root(false), all, false),
            ("it did not build", totals(3, 0, &[], &["x"]), root(false), all, false),
            ("a skip in CI with root", totals(3, 0, &["x"], &[]), root(true), all, false),
            (
                "a skip in CI without root",
                totals(3, 0, &["x"], &[]),
                nobody(true),
                all,
                true,
            ),
            ("a skip at home with root", totals(3, 0, &["x"], &[]), root(false), all, true),
            (
                "a skip at home without root",
                totals(0, 0, &["x"], &[]),
                nobody(false),
                all,
                true,
            ),
            ("nothing ran", totals(0, 0, &[], &[]), root(false), all, false),
            ("a name that no test has", totals(0, 0, &[], &[]), root(false), true, false),
        ] {
            assert_eq!(totals.verdict(machine, has_filter).is_ok(), good, "{what}");
        }
    }

    #[test]
    fn skips_are_named_and_counted() {
        let mut totals = Totals::default();
        totals.take("SKIPPED: net: everything: root is missing");
        assert_eq!(
            totals.lines(),
            ["skipped: net: everything: root is missing", "0 passed, 0 failed, 1 skipped"]
        );
    }
}
