//! A copy of the checkout in which defences are removed. The checkout itself is only read.

use std::collections::BTreeMap;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use super::table::{Edit, Mutant};
use crate::workspace::Workspace;

/// What is no source.
const LEFT_OUT: [&str; 2] = [".git", "target"];

pub struct Tree {
    root: PathBuf,
    folder: PathBuf,
    /// Relative to both.
    files: Vec<PathBuf>,
}

impl Tree {
    pub fn new(workspace: &Workspace, folder: &Path) -> Result<Self> {
        let mut files = Vec::new();
        list(&workspace.root, Path::new(""), &mut files)?;
        Ok(Self {
            root: workspace.root.clone(),
            folder: folder.to_owned(),
            files,
        })
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Brings the copy to the checkout's state, but for what these mutants change. A file that stays as it is keeps its time, so
    /// that cargo builds what changed.
    pub fn mutate(&self, mutants: &[&Mutant]) -> Result<()> {
        let mut mutated = self.mutated(mutants)?;
        for file in &self.files {
            let from = self.root.join(file);
            if from.is_symlink() {
                link(&std::fs::read_link(&from)?, &self.folder.join(file))?;
                continue;
            }
            let bytes = match mutated.remove(file.as_path()) {
                Some(text) => text.into_bytes(),
                None => std::fs::read(&from).with_context(|| format!("reading {}", from.display()))?,
            };
            let to = self.folder.join(file);
            if std::fs::read(&to).is_ok_and(|there| there == bytes) {
                continue;
            }
            std::fs::create_dir_all(to.parent().context("a file lies in a folder")?)?;
            std::fs::write(&to, bytes)?;
            std::fs::set_permissions(&to, std::fs::metadata(&from)?.permissions())?;
        }
        if let Some(file) = mutated.keys().next() {
            bail!("{} is not in the checkout", file.display());
        }
        self.remove_what_left()
    }

    /// The changed files' texts.
    fn mutated(&self, mutants: &[&Mutant]) -> Result<BTreeMap<&'static Path, String>> {
        let mut texts = BTreeMap::new();
        for mutant in mutants {
            for edit in mutant.edits {
                let path = Path::new(edit.file);
                if !texts.contains_key(path) {
                    texts.insert(path, std::fs::read_to_string(self.root.join(path)).context(edit.file)?);
                }
                let text = texts.get_mut(path).context("inserted above")?;
                *text = edited(text, edit).with_context(|| format!("the mutant {}", mutant.name))?;
            }
        }
        Ok(texts)
    }

    /// A test file that is gone from the checkout would still be built.
    fn remove_what_left(&self) -> Result<()> {
        let mut there = Vec::new();
        list(&self.folder, Path::new(""), &mut there)?;
        for file in there.iter().filter(|file| self.files.binary_search(file).is_err()) {
            std::fs::remove_file(self.folder.join(file))?;
        }
        Ok(())
    }
}

/// The text with its one occurrence replaced: an entry whose text is gone, or is there twice, no longer says what it removes.
pub fn edited(text: &str, edit: &Edit) -> Result<String> {
    match text.matches(edit.from).count() {
        1 => Ok(text.replacen(edit.from, edit.to, 1)),
        count => bail!(
            "{}: the text to replace occurs {count} times, not once (another mutant of its group may have changed it):\n{}",
            edit.file,
            edit.from
        ),
    }
}

fn link(target: &Path, at: &Path) -> Result<()> {
    if std::fs::read_link(at).is_ok_and(|there| there == target) {
        return Ok(());
    }
    std::fs::create_dir_all(at.parent().context("a link lies in a folder")?)?;
    // A copy of before, when it was no link.
    if at.exists() {
        std::fs::remove_file(at)?;
    }
    symlink(target, at).with_context(|| format!("linking {}", at.display()))
}

/// Every file and link below, sorted.
fn list(root: &Path, below: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let folder = root.join(below);
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))? {
        let entry = entry?;
        names.push((entry.file_name(), entry.file_type()?.is_dir()));
    }
    for (name, is_folder) in names {
        let path = below.join(&name);
        if LEFT_OUT.iter().any(|left_out| name == *left_out) {
            continue;
        }
        if is_folder {
            list(root, &path, files)?;
        } else {
            files.push(path);
        }
    }
    if below.as_os_str().is_empty() {
        files.sort();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_text_that_occurs_once_is_replaced() {
        let edit = Edit {
            file: "a.rs",
            from: "uid == 0",
            to: "true",
        };
        assert_eq!(edited("if uid == 0 {}", &edit).unwrap(), "if true {}");
        assert!(edited("if gid == 0 {}", &edit).is_err());
        assert!(edited("uid == 0 || uid == 0", &edit).is_err());
    }
}
