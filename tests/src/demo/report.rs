//! What the demo says, for people: progress, claims and their evidence. Colours only on a terminal.

use std::io::{IsTerminal as _, Write as _};
use std::time::Instant;

use super::running;
use crate::app::{ECHO_PORT, HTTP_PORT};
use crate::mesh::Mesh;
use crate::topology::NodeName;

pub(super) struct Report {
    colours: bool,
    start: Instant,
}

impl Report {
    pub(super) fn new() -> Self {
        let colours = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Self {
            colours,
            start: Instant::now(),
        }
    }

    pub(super) fn heading(&mut self, text: &str) {
        self.say(&format!("\n{}", self.coloured("1", text)));
    }

    pub(super) fn progress(&mut self, step: &str) {
        let seconds = self.start.elapsed().as_secs_f32();
        self.say(&format!("  {} {step}", self.coloured("2", &format!("{seconds:5.1} s"))));
    }

    pub(super) fn proven(&mut self, claim: &str, evidence: &[String]) {
        self.say(&format!("  {} {claim}", self.coloured("32", "proven")));
        for line in evidence {
            self.say(&format!("         {}", self.coloured("2", line)));
        }
    }

    pub(super) fn failed(&mut self, claim: &str, error: &anyhow::Error) {
        self.say(&format!("  {} {claim}\n         {error:#}", self.coloured("31", "FAILED")));
    }

    pub(super) fn try_this(&mut self, mesh: &Mesh) {
        let server = mesh.pod("server");
        let registry = mesh.registry.folder().display();
        let logs = mesh.topology.folder().display();
        let node = mesh.topology.node(NodeName::One).netns.name();
        self.heading("It stays up until Ctrl-C. Try this in another terminal:");
        for (what, command) in [
            (
                "a request through the mesh",
                format!(
                    "cargo xtask demo exec client -- mesh-test-app get http://{}:{HTTP_PORT}/",
                    server.v4
                ),
            ),
            (
                "and over IPv6",
                format!(
                    "cargo xtask demo exec client -- mesh-test-app get http://[{}]:{HTTP_PORT}/",
                    server.v6
                ),
            ),
            (
                "what the application sees of its connection",
                format!(
                    "cargo xtask demo exec client -- mesh-test-app connect {}:{ECHO_PORT}",
                    server.v4
                ),
            ),
            (
                "what the mesh has put into the client's network namespace: routing, and no firewall rule",
                format!("ip -n {} rule", mesh.pod("client").netns.name()),
            ),
            (
                "the access log of the server's node",
                format!("tail -n 3 {logs}/node-2/access.log"),
            ),
            (
                "the metrics of node-1's agent",
                format!("nsenter --net=/run/netns/{node} mesh-test-app get http://127.0.0.1:15020/metrics")
                    .replace("mesh-test-app", &mesh.app.binary().display().to_string()),
            ),
            (
                "deny the client: put this into a file of the registry",
                format!("cp {logs}/{} {registry}/", running::EXAMPLE_POLICY),
            ),
            ("allow it again", format!("rm {registry}/{}", running::EXAMPLE_POLICY)),
        ] {
            self.say(&format!("  {}\n    {command}", self.coloured("2", &format!("# {what}"))));
        }
        self.say(&format!("\n  The folder to edit: {registry}\n  All logs: {logs}"));
    }

    fn coloured(&self, code: &str, text: &str) -> String {
        if self.colours {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    fn say(&mut self, line: &str) {
        let mut stdout = std::io::stdout().lock();
        let _ = writeln!(stdout, "{line}");
        let _ = stdout.flush();
    }
}
