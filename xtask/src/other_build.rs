//! A second build of this checkout with another eBPF ABI version, other layouts, and words that the first does not know: what an
//! upgrade is tried with, either way. Made as the mutants are: texts replaced in a copy, kept in `<target>/other` and built again
//! where they changed.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, Result};

use crate::mutants::build::{self, lend_dependencies};
use crate::mutants::table::{Edit, Mutant};
use crate::mutants::tree::Tree;
use crate::tools;
use crate::workspace::Workspace;

/// Names the folder of its binaries.
pub const FOLDER_VARIABLE: &str = "CULVERT_OTHER_BIN_DIR";

const BINARIES: [&str; 3] = ["mesh-agent", "mesh-cni", "mesh-control"];

/// What the next version may have: each kind of change that is additive.
const NEXT: Mutant = Mutant {
    name: "the other build",
    attacks: &[],
    without: "this version's layouts and messages",
    edits: &[
        // The maps: a longer value, one more counter.
        Edit {
            file: "mesh-common/src/lib.rs",
            from: "pub const ABI_VERSION: u32 = 5;",
            to: "pub const ABI_VERSION: u32 = 6;",
        },
        Edit {
            file: "mesh-common/src/lib.rs",
            from: "    pub addresses: [AddressBytes; limits::MAX_POD_ADDRESSES],\n}",
            to: "    pub addresses: [AddressBytes; limits::MAX_POD_ADDRESSES],\n    pub added: [u64; 3],\n}",
        },
        Edit {
            file: "mesh-common/src/lib.rs",
            from: "size_of::<PodValue>() == 8 + 16",
            to: "size_of::<PodValue>() == 32 + 16",
        },
        Edit {
            file: "mesh-common/src/lib.rs",
            from: "    ProbeExpired = 21,\n",
            to: "    ProbeExpired = 21,\n    RedirectedByTheOther = 22,\n",
        },
        Edit {
            file: "mesh-common/src/lib.rs",
            from: "[(Counter, &'static str); 22]",
            to: "[(Counter, &'static str); 23]",
        },
        Edit {
            file: "mesh-common/src/lib.rs",
            from: "        (Counter::ProbeExpired, \"probe_expired\"),\n",
            to: "        (Counter::ProbeExpired, \"probe_expired\"),\n        (Counter::RedirectedByTheOther, \"redirected_by_the_other\"),\n",
        },
        Edit {
            file: "mesh-ebpf/src/connect.rs",
            from: "    count(Counter::Redirected);\n",
            to: "    count(Counter::Redirected);\n    count(Counter::RedirectedByTheOther);\n",
        },
        Edit {
            file: "mesh-agent/src/capture/enrol.rs",
            from: ".min(MAX_POD_ADDRESSES) as u32,\n        addresses,\n",
            to: ".min(MAX_POD_ADDRESSES) as u32,\n        addresses,\n        added: [7; 3],\n",
        },
        // The handover.
        Edit {
            file: "mesh-agent/src/local/handover.rs",
            from: "const VERSION: u32 = 3;",
            to: "const VERSION: u32 = 4;",
        },
        Edit {
            file: "mesh-agent/src/local/handover.rs",
            from: "    #[serde(default)]\n    abi: u32,\n}",
            to: "    #[serde(default)]\n    abi: u32,\n    #[serde(default)]\n    added: Vec<u32>,\n}",
        },
        Edit {
            file: "mesh-agent/src/local/handover.rs",
            from: "            abi: ABI_VERSION,\n",
            to: "            abi: ABI_VERSION,\n            added: vec![1, 2],\n",
        },
        Edit {
            file: "mesh-agent/src/local/handover.rs",
            from: "struct PodOffered {\n    uid: String,\n}",
            to: "struct PodOffered {\n    uid: String,\n    #[serde(default)]\n    added: bool,\n}",
        },
        Edit {
            file: "mesh-agent/src/local/handover.rs",
            from: "&PodOffered { uid: uid.to_string() }",
            to: "&PodOffered { uid: uid.to_string(), added: true }",
        },
        // What is on the node's disk and in its memory file.
        Edit {
            file: "mesh-agent/src/capture/enrolments.rs",
            from: "    pub before: Before,\n",
            to: "    pub before: Before,\n    #[serde(default)]\n    pub added: Option<String>,\n",
        },
        Edit {
            file: "mesh-agent/src/capture/enrol.rs",
            from: "                before: netns.run(routing::observe)?,\n",
            to: "                before: netns.run(routing::observe)?,\n                added: Some(\"by the other\".to_owned()),\n",
        },
        Edit {
            file: "mesh-agent/src/memory/file.rs",
            from: "    certificates: Vec<Certificate>,\n}\n\n#[derive",
            to: "    certificates: Vec<Certificate>,\n    #[prost(string, tag = \"15\")]\n    added: String,\n}\n\n#[derive",
        },
        Edit {
            file: "mesh-agent/src/memory/file.rs",
            from: "        snapshot: remembered.snapshot,\n        certificates: remembered",
            to: "        snapshot: remembered.snapshot,\n        added: \"by the other\".to_owned(),\n        certificates: remembered",
        },
        // Between agents and control plane: settings and reports.
        Edit {
            file: "mesh-proto/proto/culvert/mesh.proto",
            from: "  repeated string revoked_identities = 8;\n",
            to: "  repeated string revoked_identities = 8;\n  map<string, string> added = 15;\n",
        },
        Edit {
            file: "mesh-control/src/proto.rs",
            from: "unwrap_or(&default);\n    let message = mesh::Settings {\n",
            to: "unwrap_or(&default);\n    let message = mesh::Settings {\n        added: std::collections::HashMap::from([(\"by\".to_owned(), \"the other\".to_owned())]),\n",
        },
        Edit {
            file: "mesh-proto/proto/culvert/mesh.proto",
            from: "  string pod_uid = 2;\n}",
            to: "  string pod_uid = 2;\n  uint64 added = 15;\n}",
        },
        Edit {
            file: "mesh-control/src/proto.rs",
            from: "            pod_uid,\n        };\n        let config",
            to: "            pod_uid,\n            added: 7,\n        };\n        let config",
        },
        Edit {
            file: "mesh-proto/proto/culvert/node.proto",
            from: "  repeated string rejected = 4;\n",
            to: "  repeated string rejected = 4;\n  repeated PodReport added = 15;\n",
        },
        Edit {
            file: "mesh-agent/src/discovery/report.rs",
            from: "    NodeReport {\n        sequence,\n",
            to: "    NodeReport {\n        sequence,\n        added: vec![PodReport::default(); 2],\n",
        },
    ],
    noticed_by: &[],
};

/// The folder of its binaries.
pub fn folder(workspace: &Workspace) -> Result<PathBuf> {
    let start = Instant::now();
    let folder = workspace.target.join("other");
    let tree = Tree::new(workspace, &folder.join("tree"))?;
    let built = Workspace::at(folder.join("tree"), folder.join("target"));
    tree.mutate(&[&NEXT])
        .context("the other build: an edit in xtask/src/other_build.rs")?;
    lend_dependencies(workspace, &built)?;
    let object = crate::ebpf::build(&built)?;
    let mut cargo = build::cargo(workspace, &built, &object, &["build", "--locked", "--quiet"]);
    tools::run(cargo.args(BINARIES.iter().flat_map(|name| ["--bin", name])))?;
    built.build_plugin()?;
    tools::say(&format!("-- the other build: {} s", start.elapsed().as_secs()));
    Ok(built.binaries())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mutants::tree::edited;

    #[test]
    fn every_edit_of_the_other_build_applies() {
        let root = Workspace::find().unwrap().root;
        for edit in NEXT.edits {
            let text = std::fs::read_to_string(root.join(edit.file)).unwrap();
            edited(&text, edit).unwrap();
        }
    }
}
