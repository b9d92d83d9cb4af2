//! A layer of an image, or its archive: files, folders and links as tar has them, the same bytes for the same content.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use tar::{Builder, EntryType, Header};

#[derive(Debug)]
enum Entry {
    Folder,
    File { mode: u32, content: Vec<u8> },
    Link(String),
}

/// By path, so that folders come before what is in them.
#[derive(Debug, Default)]
pub struct Layer {
    entries: BTreeMap<String, Entry>,
}

impl Layer {
    /// The folders above it are made, too.
    pub fn file(&mut self, path: &str, mode: u32, content: Vec<u8>) -> Result<()> {
        self.add(path, Entry::File { mode, content })
    }

    pub fn folder(&mut self, path: &str) -> Result<()> {
        self.add(path, Entry::Folder)
    }

    pub fn link(&mut self, path: &str, to: &str) -> Result<()> {
        self.add(path, Entry::Link(to.to_owned()))
    }

    fn add(&mut self, path: &str, entry: Entry) -> Result<()> {
        let path = path.trim_start_matches('/');
        ensure!(!path.is_empty(), "an image's root is there already");
        for (end, _) in path.match_indices('/') {
            self.entries.entry(path[..end].to_owned()).or_insert(Entry::Folder);
        }
        self.entries.insert(path.to_owned(), entry);
        Ok(())
    }

    pub fn bytes(&self) -> Result<Vec<u8>> {
        let mut archive = Builder::new(Vec::new());
        for (path, entry) in &self.entries {
            // Owner root, and no time: 1970.
            let mut header = Header::new_ustar();
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(0);
            let content: &[u8] = match entry {
                Entry::Folder => {
                    header.set_entry_type(EntryType::Directory);
                    header.set_mode(0o755);
                    &[]
                }
                Entry::Link(to) => {
                    header.set_entry_type(EntryType::Symlink);
                    header.set_mode(0o777);
                    header.set_link_name(to)?;
                    &[]
                }
                Entry::File { mode, content } => {
                    header.set_mode(*mode);
                    content
                }
            };
            header.set_size(content.len() as u64);
            header.set_path(path).with_context(|| format!("{path} in an archive"))?;
            header.set_cksum();
            archive.append(&header, content)?;
        }
        Ok(archive.into_inner()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_come_first_and_bytes_are_the_same_each_time() {
        let made = || {
            let mut layer = Layer::default();
            layer.link("/a/d", "/x").unwrap();
            layer.file("/a/b/c", 0o644, b"text".to_vec()).unwrap();
            layer.bytes().unwrap()
        };
        let bytes = made();
        assert_eq!(bytes, made());
        let mut archive = tar::Archive::new(bytes.as_slice());
        let found: Vec<(String, EntryType, u32)> = archive
            .entries()
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let header = entry.header();
                let path = String::from_utf8(entry.path_bytes().into_owned()).unwrap();
                (path, header.entry_type(), header.mode().unwrap())
            })
            .collect();
        let expected = [
            ("a", EntryType::Directory, 0o755),
            ("a/b", EntryType::Directory, 0o755),
            ("a/b/c", EntryType::Regular, 0o644),
            ("a/d", EntryType::Symlink, 0o777),
        ]
        .map(|(path, kind, mode)| (path.to_owned(), kind, mode));
        assert_eq!(found, expected);
        assert!(Layer::default().folder("/").is_err());
        let mut too_long = Layer::default();
        too_long.file(&"x".repeat(300), 0o644, vec![]).unwrap();
        assert!(too_long.bytes().is_err());
    }
}
