//! As much of the tar format (POSIX.1-1988, "ustar") as an image needs.

use std::fs::File;
use std::io::{BufWriter, Read as _, Write};
use std::path::Path;

use anyhow::{Context as _, Result, ensure};

const BLOCK: usize = 512;
const MAX_NAME: usize = 100;
/// Eleven octal digits.
const MAX_SIZE: u64 = 1 << 33;

#[derive(Clone, Copy)]
pub(super) enum Entry<'a> {
    File(&'a Path, u32),
    Bytes(&'a [u8], u32),
    Folder(u32),
    /// To a path, as a symbolic link.
    Link(&'a str),
}

pub(super) struct Archive(BufWriter<File>);

impl Archive {
    pub(super) fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("writing {}", path.display()))?;
        Ok(Self(BufWriter::new(file)))
    }

    pub(super) fn add(&mut self, name: &str, entry: Entry<'_>) -> Result<()> {
        match entry {
            Entry::File(path, mode) => {
                let file = File::open(path).with_context(|| format!("reading {}", path.display()))?;
                let size = file.metadata()?.len();
                self.0.write_all(&header(name, b'0', mode, size, "")?)?;
                // No more than was announced, should it grow.
                let copied = std::io::copy(&mut file.take(size), &mut self.0)?;
                ensure!(copied == size, "{} shrank while it was read", path.display());
                self.pad(size)
            }
            Entry::Bytes(bytes, mode) => {
                let size = bytes.len() as u64;
                self.0.write_all(&header(name, b'0', mode, size, "")?)?;
                self.0.write_all(bytes)?;
                self.pad(size)
            }
            Entry::Folder(mode) => Ok(self.0.write_all(&header(&format!("{name}/"), b'5', mode, 0, "")?)?),
            Entry::Link(to) => Ok(self.0.write_all(&header(name, b'2', 0o777, 0, to)?)?),
        }
    }

    pub(super) fn finish(mut self) -> Result<()> {
        self.0.write_all(&[0; 2 * BLOCK])?;
        Ok(self.0.flush()?)
    }

    fn pad(&mut self, size: u64) -> Result<()> {
        let over = usize::try_from(size % BLOCK as u64)?;
        if over != 0 {
            self.0.write_all(&[0; BLOCK][over..])?;
        }
        Ok(())
    }
}

/// Owned by root, made in 1970: the same content gives the same bytes.
fn header(name: &str, kind: u8, mode: u32, size: u64, link: &str) -> Result<[u8; BLOCK]> {
    ensure!(
        name.len() <= MAX_NAME && link.len() <= MAX_NAME,
        "too long for an archive: {name} {link}"
    );
    ensure!(size < MAX_SIZE, "{name} is too large for an archive");
    let mut block = [0; BLOCK];
    let mut put = |at: usize, text: &str| block[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, name);
    put(100, &format!("{mode:07o}"));
    put(108, "0000000");
    put(116, "0000000");
    put(124, &format!("{size:011o}"));
    put(136, "00000000000");
    // The checksum is made as if it were blank itself.
    put(148, "        ");
    put(157, link);
    put(257, "ustar\u{0}00");
    block[156] = kind;
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    Ok(block)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn tar_unpacks_what_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let whole_blocks = folder.path().join("in");
        std::fs::write(&whole_blocks, vec![b'x'; 2 * BLOCK]).unwrap();
        let path = folder.path().join("a.tar");
        let mut archive = Archive::create(&path).unwrap();
        archive.add("sub", Entry::Folder(0o1777)).unwrap();
        archive.add("sub/bytes", Entry::Bytes(b"abc", 0o640)).unwrap();
        archive.add("sub/file", Entry::File(&whole_blocks, 0o755)).unwrap();
        archive.add("sub/link", Entry::Link("bytes")).unwrap();
        let too_long = archive.add(&"x".repeat(MAX_NAME + 1), Entry::Bytes(b"", 0));
        archive.finish().unwrap();
        assert!(too_long.is_err());
        let output = Command::new("tar").args(["-tvf"]).arg(&path).output().unwrap();
        let listed = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{listed}");
        for (mode, rest) in [
            ("drwxrwxrwt", "sub/"),
            ("-rw-r-----", "sub/bytes"),
            ("-rwxr-xr-x", "sub/file"),
            ("lrwxrwxrwx", "sub/link -> bytes"),
        ] {
            let found = listed.lines().any(|line| line.starts_with(mode) && line.ends_with(rest));
            assert!(found, "{mode} {rest} in {listed}");
        }
        let unpacked = Command::new("tar")
            .arg("-xf")
            .arg(&path)
            .current_dir(folder.path())
            .status()
            .unwrap();
        assert!(unpacked.success());
        assert_eq!(std::fs::read(folder.path().join("sub/file")).unwrap(), vec![b'x'; 2 * BLOCK]);
        assert_eq!(std::fs::read(folder.path().join("sub/link")).unwrap(), b"abc");
    }
}
