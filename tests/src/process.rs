//! Processes in their place: a network namespace, a cgroup, a user. Ended by their id when their owner is dropped.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::poll::SOON;

/// "nobody": what an application in a Pod runs as.
const UNPRIVILEGED_UID: u32 = 65_534;

/// Where a process runs.
#[derive(Clone, Debug)]
pub struct Place {
    pub netns: PathBuf,
    pub cgroup: Option<PathBuf>,
    pub unprivileged: bool,
}

impl Place {
    /// Where this process is.
    #[must_use]
    pub fn here() -> Self {
        Self {
            netns: "/proc/self/ns/net".into(),
            cgroup: None,
            unprivileged: false,
        }
    }

    /// A command that will start here.
    ///
    /// # Errors
    /// The namespace or cgroup is gone.
    pub fn command(&self, program: &Path, arguments: &[&str]) -> Result<Command> {
        let netns = File::open(&self.netns).with_context(|| format!("opening {}", self.netns.display()))?;
        let cgroup = match &self.cgroup {
            None => None,
            Some(path) => {
                let procs = path.join("cgroup.procs");
                Some(
                    OpenOptions::new()
                        .write(true)
                        .open(&procs)
                        .with_context(|| format!("opening {}", procs.display()))?,
                )
            }
        };
        let unprivileged = self.unprivileged;
        let mut command = Command::new(program);
        // A group of its own: Ctrl-C on the terminal reaches the testbed, which then ends its processes in order.
        command.args(arguments).current_dir("/").process_group(0);
        let prepare = move || {
            // SAFETY: plain system calls on descriptors that this closure owns; none allocates or takes a lock, as is
            // required between fork and exec.
            #[allow(unsafe_code, reason = "system calls between fork and exec")]
            unsafe {
                // The testbed blocks signals to take them in one thread; a child starts with none blocked.
                let mut none = std::mem::zeroed::<libc::sigset_t>();
                libc::sigemptyset(&raw mut none);
                check(libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()))?;
                // Should the testbed be killed, so is this.
                check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
                if let Some(cgroup) = &cgroup
                    && libc::write(cgroup.as_raw_fd(), b"0".as_ptr().cast(), 1) != 1
                {
                    return Err(std::io::Error::last_os_error());
                }
                check(libc::setns(netns.as_raw_fd(), libc::CLONE_NEWNET))?;
                if unprivileged {
                    check(libc::setgroups(0, std::ptr::null()))?;
                    check(libc::setgid(UNPRIVILEGED_UID))?;
                    check(libc::setuid(UNPRIVILEGED_UID))?;
                    // Changing the user clears the death signal.
                    check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
                }
            }
            Ok(())
        };
        // SAFETY: see the closure.
        #[allow(unsafe_code, reason = "the child enters its place before it executes")]
        unsafe {
            command.pre_exec(prepare);
        }
        Ok(command)
    }

    /// Runs a program to its end.
    ///
    /// # Errors
    /// It cannot start, or is still running at the deadline (then it is killed).
    pub fn run(&self, program: &Path, arguments: &[&str], deadline: Duration) -> Result<Output> {
        let mut command = self.command(program, arguments)?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = spawn(command)?;
        let (mut stdout, mut stderr) = (child.stdout.take().context("stdout")?, child.stderr.take().context("stderr")?);
        let errors = std::thread::spawn(move || {
            let mut text = String::new();
            let _ = stderr.read_to_string(&mut text);
            text
        });
        let output = std::thread::spawn(move || {
            let mut text = String::new();
            let _ = stdout.read_to_string(&mut text);
            text
        });
        let status = wait(&mut child, deadline);
        if status.is_none() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let output = Output {
            stdout: output.join().unwrap_or_default(),
            stderr: errors.join().unwrap_or_default(),
            status: status.with_context(|| {
                format!(
                    "{} {} was still running after {deadline:?}",
                    program.display(),
                    arguments.join(" ")
                )
            })?,
        };
        Ok(output)
    }
}

#[derive(Debug)]
pub struct Output {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    /// # Errors
    /// The program failed: tells what it said.
    pub fn ok(self, what: &str) -> Result<String> {
        if !self.status.success() {
            bail!("{what} ended with {}: {}{}", self.status, self.stdout, self.stderr);
        }
        Ok(self.stdout)
    }
}

/// A process that runs until its owner is dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts it with its output appended to `log`.
    ///
    /// # Errors
    /// It cannot start.
    pub fn start(name: &str, mut command: Command, log: PathBuf) -> Result<Self> {
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("opening {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = spawn(command).with_context(|| format!("starting {name}"))?;
        Ok(Self {
            name: name.to_owned(),
            child,
            log,
        })
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// # Errors
    /// It has ended by itself: tells how, and the end of its log.
    pub fn check_running(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} ended by itself with {status}:\n{}", self.name, tail(&self.log, 25)),
        }
    }

    /// `kill -9`, at once.
    pub fn kill(mut self) {
        self.kill_and_wait();
    }

    /// Asks it to end (SIGTERM).
    ///
    /// # Errors
    /// It did not end in time.
    pub fn terminate(self, deadline: Duration) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        self.wait(deadline)
    }

    /// # Errors
    /// It has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).context("a process id")?);
        kill(pid, signal).with_context(|| format!("{signal} to {}", self.name))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It did not end in time.
    pub fn wait(mut self, deadline: Duration) -> Result<ExitStatus> {
        wait(&mut self.child, deadline).with_context(|| format!("{} had not ended after {deadline:?}", self.name))
    }

    fn kill_and_wait(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill_and_wait();
    }
}

/// A process that is talked to line by line.
#[derive(Debug)]
pub struct Conversation {
    child: Child,
    answers: std::sync::mpsc::Receiver<String>,
}

impl Conversation {
    /// # Errors
    /// It cannot start.
    pub fn start(mut command: Command) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = spawn(command)?;
        let stdout = child.stdout.take().context("stdout")?;
        let (sender, answers) = channel();
        std::thread::spawn(move || {
            for line in std::io::BufRead::lines(std::io::BufReader::new(stdout)).map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self { child, answers })
    }

    /// With a `mesh-test-app chat`, whose connection is open then.
    ///
    /// # Errors
    /// It cannot start, or cannot connect.
    pub fn chat(command: Command) -> Result<Self> {
        let conversation = Self::start(command)?;
        let first = conversation.hear(SOON)?;
        if first != "connected" {
            bail!("it began with {first:?}");
        }
        Ok(conversation)
    }

    /// # Errors
    /// No line came in time, or the process has ended.
    pub fn hear(&self, deadline: Duration) -> Result<String> {
        self.answers
            .recv_timeout(deadline)
            .context("waiting for a line of the conversation")
    }

    /// # Errors
    /// The process has ended, or does not answer in time.
    pub fn ask(&mut self, line: &str, deadline: Duration) -> Result<String> {
        let input = self.child.stdin.as_mut().context("stdin")?;
        writeln!(input, "{line}")?;
        self.hear(deadline)
    }
}

impl Drop for Conversation {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The last lines of a log, for failure output.
#[must_use]
pub fn tail(log: &Path, lines: usize) -> String {
    let text = std::fs::read(log)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

fn wait(child: &mut Child, deadline: Duration) -> Option<ExitStatus> {
    let start = Instant::now();
    loop {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        if start.elapsed() >= deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn check(result: i32) -> std::io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

/// The kernel sends the death signal when the *thread* that forked ends, so one thread that never ends forks them all.
fn spawn(command: Command) -> Result<Child> {
    type Order = (Command, Sender<std::io::Result<Child>>);
    static SPAWNER: OnceLock<Sender<Order>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (orders, incoming) = channel::<Order>();
        std::thread::spawn(move || {
            for (mut command, reply) in incoming {
                let _ = reply.send(command.spawn());
            }
        });
        orders
    });
    let program = command.get_program().to_owned();
    let (reply, answer) = channel();
    spawner
        .send((command, reply))
        .map_err(|_| anyhow::anyhow!("the spawner's thread is gone"))?;
    answer.recv()?.with_context(|| format!("starting {}", program.display()))
}
