//! A layer: files, folders and links in the format of POSIX ustar, the same bytes for the same content.

use std::collections::BTreeMap;

use anyhow::{Result, bail};

const BLOCK: usize = 512;
/// What ustar has room for, without its prefix field.
const LONGEST_NAME: usize = 99;

#[derive(Debug)]
enum Entry {
    Folder,
    File { mode: u32, content: Vec<u8> },
    Link(String),
}

/// By path, so that folders come before what is in them.
#[derive(Debug, Default)]
pub struct Tar {
    entries: BTreeMap<String, Entry>,
}

impl Tar {
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
        if path.is_empty() || path.len() > LONGEST_NAME {
            bail!("{path:?} has no place in an archive: 1-{LONGEST_NAME} bytes");
        }
        for (end, _) in path.match_indices('/') {
            self.entries.entry(path[..end].to_owned()).or_insert(Entry::Folder);
        }
        self.entries.insert(path.to_owned(), entry);
        Ok(())
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (path, entry) in &self.entries {
            let (mode, kind, target, content): (u32, u8, &str, &[u8]) = match entry {
                Entry::Folder => (0o755, b'5', "", &[]),
                Entry::Link(to) => (0o777, b'2', to, &[]),
                Entry::File { mode, content } => (*mode, b'0', "", content),
            };
            bytes.extend(header(path, mode, kind, target, content.len()));
            bytes.extend_from_slice(content);
            bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        }
        // The end: two empty blocks.
        bytes.resize(bytes.len() + 2 * BLOCK, 0);
        bytes
    }
}

/// Owner root, and no time: 1970.
fn header(path: &str, mode: u32, kind: u8, target: &str, size: usize) -> [u8; BLOCK] {
    let mut header = [0; BLOCK];
    let mut put = |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, path);
    put(100, &format!("{mode:07o}"));
    put(108, "0000000");
    put(116, "0000000");
    put(124, &format!("{size:011o}"));
    put(136, "00000000000");
    // The sum counts itself as spaces.
    put(148, "        ");
    put(157, target);
    put(257, "ustar");
    put(263, "00");
    header[156] = kind;
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_come_first_and_names_are_bounded() {
        let mut tar = Tar::default();
        tar.file("/a/b/c", 0o644, b"text".to_vec()).unwrap();
        tar.link("/a/d", "/x").unwrap();
        let bytes = tar.bytes();
        let names: Vec<&str> = [0, 1, 2, 4]
            .map(|block| {
                std::str::from_utf8(&bytes[block * BLOCK..block * BLOCK + 5])
                    .unwrap()
                    .trim_end_matches('\0')
            })
            .to_vec();
        assert_eq!(names, ["a", "a/b", "a/b/c", "a/d"]);
        assert_eq!(&bytes[3 * BLOCK..3 * BLOCK + 4], b"text");
        assert_eq!(bytes.len(), 7 * BLOCK);
        assert!(tar.file(&"x".repeat(100), 0o644, vec![]).is_err());
        assert!(tar.folder("/").is_err());
    }
}
