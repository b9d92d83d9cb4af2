//! The README's commands, to be run as they stand there: a block's mark, a comment on the line before it, says who runs it.

use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};

use crate::kube::Kubectl;

/// Who runs a block: `<!-- run by NAME -->`.
const MARK: &str = "<!-- run by ";
/// The suite that runs the quick start on a real Kubernetes, and nothing else; `kube_mesh` runs the same with more around it.
const ON_KUBERNETES: &str = "kube_readme";

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// "console", "yaml", …
    pub language: String,
    pub run_by: Option<String>,
    pub text: String,
}

/// # Errors
/// The README is not there.
pub fn blocks() -> Result<Vec<Block>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    Ok(parse(&text))
}

/// The blocks that `name` runs, in order.
///
/// # Errors
/// There is none: a mark was lost, and with it a test.
pub fn run_by(name: &str) -> Result<Vec<Block>> {
    let blocks: Vec<Block> = blocks()?
        .into_iter()
        .filter(|block| block.run_by.as_deref() == Some(name))
        .collect();
    ensure!(!blocks.is_empty(), "no block of the README is marked `{MARK}{name} -->`");
    Ok(blocks)
}

/// Runs the block that has this in it, of those that are run on Kubernetes, in a folder that has `deploy`; answers what it printed. A
/// manifest is saved there as `deny.yaml`.
///
/// # Errors
/// There is not just one, or it fails.
pub fn run_block(kubectl: &Kubectl, folder: &Path, with: &str) -> Result<String> {
    let blocks = run_by(ON_KUBERNETES)?;
    let mut chosen = blocks.iter().filter(|block| block.text.contains(with));
    let (Some(block), None) = (chosen.next(), chosen.next()) else {
        bail!("not one block of the README that {ON_KUBERNETES} runs has {with:?}");
    };
    if block.language == "yaml" {
        std::fs::write(folder.join("deny.yaml"), &block.text)?;
        return Ok(String::new());
    }
    kubectl.shell(folder, &block.text)?.ok(&block.text)
}

fn parse(text: &str) -> Vec<Block> {
    let mut blocks = Vec::new();
    let (mut open, mut mark): (Option<Block>, Option<String>) = (None, None);
    for line in text.lines() {
        if let Some(block) = &mut open {
            if line == "```" {
                blocks.extend(open.take());
            } else {
                block.text.push_str(line);
                block.text.push('\n');
            }
        } else if let Some(language) = line.strip_prefix("```") {
            open = Some(Block {
                language: language.to_owned(),
                run_by: mark.take(),
                text: String::new(),
            });
        } else {
            mark = line
                .strip_prefix(MARK)
                .and_then(|rest| rest.strip_suffix(" -->"))
                .map(str::to_owned);
        }
    }
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_belong_to_the_next_line_only() {
        let text = "<!-- run by x -->\n```console\na\nb\n```\n<!-- run by y -->\n\n```yaml\nc\n```\n";
        let seen: Vec<_> = parse(text)
            .into_iter()
            .map(|block| (block.language, block.run_by, block.text))
            .collect();
        assert_eq!(
            seen,
            [
                ("console".to_owned(), Some("x".to_owned()), "a\nb\n".to_owned()),
                ("yaml".to_owned(), None, "c\n".to_owned())
            ]
        );
    }

    #[test]
    fn every_command_of_the_readme_is_run_by_something() {
        let runners = ["demo", "hand", "fresh", ON_KUBERNETES];
        for block in blocks().unwrap() {
            let runner = block.run_by.as_deref().unwrap_or_default();
            assert!(runners.contains(&runner), "nothing runs this block:\n{}", block.text);
        }
        // The two commands are run on the fresh machine.
        let fresh = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../xtask/src/fresh.rs")).unwrap();
        for block in run_by("fresh").unwrap() {
            for command in block.text.lines() {
                assert!(
                    fresh.contains(&format!("\"{command}")),
                    "`cargo xtask fresh` does not run `{command}`"
                );
            }
        }
    }
}
