//! `cargo xtask tidy`: the rules that compilers and lints don't know. Textual on purpose: quick, and plain to read.

use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::Result;

use crate::tools;
use crate::workspace::Workspace;

const MAX_LINES: usize = 600;
/// Written in halves, so that this file does not name them.
const FORBIDDEN: [&str; 6] = [
    concat!("todo", "!("),
    concat!("unimplemented", "!("),
    concat!("dbg", "!("),
    concat!("for ", "now"),
    concat!("crates", ".io"),
    concat!("being", " written"),
];
/// Where `unsafe` may be: the kernel programs, the system-call wrappers, the ABI's marker traits, and the testbed.
const UNSAFE: [&str; 7] = [
    "mesh-ebpf/",
    "mesh-agent/src/capture/",
    "mesh-agent/tests/",
    "mesh-common/src/lib.rs",
    "tests/",
    "xtask/src/tidy.rs",
    // As text: what is written into mutated kernel programs.
    "xtask/src/mutants/table/kernel.rs",
];

/// A word that only some files of mesh-agent may use (DESIGN.md: dependencies run downwards).
struct Knows {
    word: &'static str,
    only: &'static [&'static str],
}

const KNOWS: [Knows; 6] = [
    // Wiring: whoever is wired does not know by whom.
    Knows {
        word: "crate::app",
        only: &["mesh-agent/src/app"],
    },
    Knows {
        word: "crate::pods",
        only: &["mesh-agent/src/app", "mesh-agent/src/local"],
    },
    Knows {
        word: "aya::",
        only: &["mesh-agent/src/capture/"],
    },
    Knows {
        word: "mesh_proto::",
        only: &[
            "mesh-agent/src/proto",
            "mesh-agent/src/fuzz.rs",
            "mesh-agent/src/discovery/",
            "mesh-agent/src/local",
            "mesh-agent/src/identity/",
            "mesh-agent/src/memory/",
        ],
    },
    Knows {
        word: "tonic::",
        only: &[
            "mesh-agent/src/discovery/",
            "mesh-agent/src/local",
            "mesh-agent/src/main.rs",
            "mesh-agent/src/identity/",
            "mesh-agent/src/app",
        ],
    },
    Knows {
        word: "clap::",
        only: &["mesh-agent/src/config", "mesh-agent/src/main.rs"],
    },
];

const FUZZ_METADATA: [&str; 6] = [
    "metadata",
    "--locked",
    "--format-version",
    "1",
    "--manifest-path",
    "fuzz/Cargo.toml",
];

/// Modules of mesh-agent that decide, and so do no I/O.
const PURE: [&str; 5] = [
    "mesh-agent/src/policy",
    "mesh-agent/src/state/mod.rs",
    "mesh-agent/src/workload.rs",
    "mesh-agent/src/addr.rs",
    "mesh-agent/src/identity/rotation.rs",
];
const IMPURE_WORDS: [&str; 4] = ["tokio::net", "std::fs", "SystemTime::now", "Instant::now"];

pub fn run(workspace: &Workspace) -> Result<ExitCode> {
    let files = tools::output(
        Command::new("git")
            .args(["ls-files", "--cached", "--others", "--exclude-standard"])
            .current_dir(&workspace.root),
    )?;
    let private = private_paths(&workspace.root);
    let mut faults = Vec::new();
    for file in files.lines() {
        let Ok(text) = std::fs::read_to_string(workspace.root.join(file)) else {
            continue;
        };
        check(file, &text, &private, &mut faults);
        if file.ends_with(".md") {
            check_links(&workspace.root, file, &text, &mut faults);
        }
    }
    // The fuzz targets are a workspace of their own, which an ordinary build does not look at.
    if let Err(error) = tools::output(&mut workspace.cargo(&FUZZ_METADATA)) {
        faults.push(format!(
            "fuzz/Cargo.lock: {error:#}; `cargo update --workspace` in fuzz/ mends it"
        ));
    }
    for fault in &faults {
        tools::say(fault);
    }
    tools::say(&format!("tidy: {} files, {} faults", files.lines().count(), faults.len()));
    Ok(if faults.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// This machine's own folders, which mean nothing elsewhere.
fn private_paths(root: &Path) -> Vec<String> {
    let parent = root.parent().and_then(Path::to_str).unwrap_or_default();
    let home = std::env::var("HOME").unwrap_or_default();
    // "/" is in every path, and every Debian has "/root".
    [parent, &home]
        .into_iter()
        .filter(|path| path.len() > 1 && *path != "/root")
        .map(|path| format!("{path}/"))
        .collect()
}

fn check(file: &str, text: &str, private: &[String], faults: &mut Vec<String>) {
    let is_rust = file.ends_with(".rs");
    if is_rust && text.lines().count() > MAX_LINES {
        faults.push(format!(
            "{file}: {} lines; past {MAX_LINES}, ask what two things it holds",
            text.lines().count()
        ));
    }
    if file.ends_with("Cargo.lock") {
        return;
    }
    for (number, line) in (1..).zip(text.lines()) {
        let mut fault = |what: String| faults.push(format!("{file}:{number}: {what}"));
        for word in FORBIDDEN.iter().filter(|word| line.to_lowercase().contains(**word)) {
            fault(format!("\"{word}\""));
        }
        for path in private.iter().filter(|path| line.contains(path.as_str())) {
            fault(format!("a path of this machine: {path}"));
        }
        if !is_rust {
            continue;
        }
        let code = line.split("//").next().unwrap_or_default();
        if has_unsafe(code) && !UNSAFE.iter().any(|place| file.starts_with(place)) {
            fault("`unsafe` outside its places".to_owned());
        }
        for Knows { word, only } in &KNOWS {
            let of_agent = file.starts_with("mesh-agent/src/");
            if of_agent && code.contains(word) && !only.iter().any(|place| file.starts_with(place)) {
                fault(format!("`{word}` is known only to {}", only.join(", ")));
            }
        }
        let is_test = file.ends_with("tests.rs");
        if !is_test && PURE.iter().any(|place| file.starts_with(place)) {
            for word in IMPURE_WORDS.iter().filter(|word| code.contains(**word)) {
                fault(format!("`{word}` in a module that only decides"));
            }
        }
    }
}

fn has_unsafe(code: &str) -> bool {
    ["unsafe {", "unsafe fn ", "unsafe impl ", "unsafe extern "]
        .iter()
        .any(|form| code.contains(form))
}

/// Relative links in Markdown lead somewhere.
fn check_links(root: &Path, file: &str, text: &str, faults: &mut Vec<String>) {
    let folder = root.join(file).parent().map(Path::to_owned).unwrap_or_default();
    for (number, line) in (1..).zip(text.lines()) {
        for link in line.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let path = link.split('#').next().unwrap_or_default();
            if !path.is_empty() && !path.contains("://") && !folder.join(path).exists() {
                faults.push(format!("{file}:{number}: the link to {path} leads nowhere"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(file: &str, text: &str) -> usize {
        let mut faults = Vec::new();
        check(file, text, &["/home/somebody/".to_owned()], &mut faults);
        faults.len()
    }

    #[test]
    fn faults_are_found_and_nothing_else() {
        assert_eq!(faults("mesh-agent/src/proxy/mod.rs", "unsafe { x() }\n// unsafe { y() }"), 1);
        assert_eq!(faults("mesh-ebpf/src/maps.rs", "unsafe { x() }"), 0);
        assert_eq!(faults("mesh-agent/src/proxy/mod.rs", "use aya::maps;"), 1);
        assert_eq!(faults("mesh-agent/src/capture/kernel.rs", "use aya::maps;"), 0);
        assert_eq!(faults("README.md", "see /home/somebody/notes"), 1);
        assert_eq!(faults("a.rs", &format!("// {} a constant", FORBIDDEN[3])), 1);
        assert_eq!(faults("a.rs", &"x\n".repeat(MAX_LINES + 1)), 1);
        assert_eq!(faults("mesh-agent/src/policy/mod.rs", "let now = Instant::now();"), 1);
    }
}
