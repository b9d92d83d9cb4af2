//! Putting the CNI plugin onto the node and into its network configuration, keeping it there, and taking both away again.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use mesh_cni::conflist;
use mesh_cni::protocol::PLUGIN;
use tracing::{error, info};

use crate::config::CniPlaces;

/// Between two looks at whether the entry is still there.
const LOOK: Duration = Duration::from_secs(5);
/// A file that another tool writes while we edit it is read again.
const TRIES: usize = 5;
/// Bytes of a network configuration; they have some kilobytes.
const MAX_CONFLIST_BYTES: u64 = 1 << 20;
/// What runtimes take for network configurations, first in the order of their names.
const ENDINGS: [&str; 3] = ["conf", "conflist", "json"];

/// What was found and done.
#[derive(Debug, PartialEq, Eq)]
pub enum Entry {
    Put(PathBuf),
    WasThere(PathBuf),
    /// The plugin that makes the network has not come yet.
    NoConfiguration,
    /// It cannot be put there now, and why: its own init step does not keep an agent from starting, which tries again for ever.
    Postponed(String),
}

/// Puts the binary and the entry in place.
///
/// # Errors
/// The binary cannot be. An entry that cannot is told of; nothing of a malformed configuration is changed.
pub fn install(places: &CniPlaces, run_dir: &Path, binary: Option<&Path>) -> anyhow::Result<Entry> {
    let source = match binary {
        Some(path) => path.to_owned(),
        None => std::env::current_exe()?.with_file_name(PLUGIN),
    };
    let content = fs::read(&source).with_context(|| format!("the plugin's binary {}", source.display()))?;
    let target = plugin(places);
    if fs::read(&target).is_ok_and(|there| there == content) {
        fs::set_permissions(&target, fs::Permissions::from_mode(0o755))?;
    } else {
        replace(&target, &content, 0o755, None).with_context(|| format!("--cni-bin-dir: {}", target.display()))?;
    }
    let entry = put_entry(&places.conf_dir, run_dir, places.namespace_list.as_deref());
    Ok(entry.unwrap_or_else(|error| Entry::Postponed(format!("{error:#}"))))
}

/// # Errors
/// As [`install`].
pub fn put_entry(conf_dir: &Path, run_dir: &Path, namespace_list: Option<&Path>) -> anyhow::Result<Entry> {
    let entry = conflist::entry(run_dir, namespace_list);
    let Some(path) = configurations(conf_dir)?.into_iter().next() else {
        return Ok(Entry::NoConfiguration);
    };
    ensure!(
        path.extension().is_some_and(|ending| ending == "conflist"),
        "{}: it is a single plugin's configuration, behind which none can stand; make it a .conflist",
        path.display()
    );
    let changed = edit(&path, |text| conflist::insert(text, &entry))?;
    Ok(if changed { Entry::Put(path) } else { Entry::WasThere(path) })
}

/// Removes every entry, the binary, and the list of namespaces where it has a place of its own. Tells which configurations were changed.
///
/// # Errors
/// Something cannot be removed; what can be is.
pub fn uninstall(places: &CniPlaces) -> anyhow::Result<Vec<PathBuf>> {
    let (mut changed, mut failed) = (Vec::new(), Vec::new());
    for path in configurations(&places.conf_dir)? {
        match edit(&path, conflist::remove) {
            Ok(true) => changed.push(path),
            Ok(false) => {}
            // Of another form, and so without an entry of ours.
            Err(_) if !mentions_plugin(&path) => {}
            Err(error) => failed.push(format!("{error:#}")),
        }
    }
    ensure!(failed.is_empty(), "{}", failed.join("; "));
    // Last: a runtime cannot start a Pod by an entry whose binary is gone.
    remove_file(&plugin(places)).context("--cni-bin-dir")?;
    if let Some(list) = &places.namespace_list {
        remove_file(list).context("--cni-namespace-list")?;
    }
    Ok(changed)
}

/// Where its binary is on the node.
#[must_use]
pub fn plugin(places: &CniPlaces) -> PathBuf {
    places.bin_dir.join(PLUGIN)
}

fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

fn mentions_plugin(path: &Path) -> bool {
    fs::read_to_string(path).is_ok_and(|text| text.contains(PLUGIN))
}

/// Puts the entry back whenever another tool has written the configuration anew; for ever.
pub async fn keep(conf_dir: PathBuf, run_dir: PathBuf, namespace_list: Option<PathBuf>) {
    let mut said = String::new();
    loop {
        let (conf_dir, run_dir, list) = (conf_dir.clone(), run_dir.clone(), namespace_list.clone());
        let looked = tokio::task::spawn_blocking(move || put_entry(&conf_dir, &run_dir, list.as_deref())).await;
        let problem = match looked {
            Ok(Ok(Entry::Put(path))) => {
                info!(path = %path.display(), "the CNI plugin's entry is put into the network configuration");
                String::new()
            }
            Ok(Ok(Entry::WasThere(_))) => String::new(),
            Ok(Ok(Entry::NoConfiguration)) => "there is no network configuration yet".to_owned(),
            Ok(Ok(Entry::Postponed(why))) => why,
            Ok(Err(error)) => format!("{error:#}"),
            Err(error) => error.to_string(),
        };
        if !problem.is_empty() && problem != said {
            error!(
                "the CNI plugin's entry cannot be put into the network configuration, and Pods start without waiting: {problem}"
            );
        }
        said = problem;
        tokio::time::sleep(LOOK).await;
    }
}

/// By name, as runtimes take them.
fn configurations(conf_dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(conf_dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("--cni-conf-dir {}", conf_dir.display()))?,
    };
    let mut paths: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            path.extension()
                .is_some_and(|ending| ENDINGS.iter().any(|known| ending == *known))
        })
        .collect();
    paths.sort();
    Ok(paths)
}

/// True: it was changed. Written whole and with the owner and mode that it had; not over what somebody has written meanwhile.
fn edit(path: &Path, change: impl Fn(&str) -> Result<Option<String>, conflist::ConflistError>) -> anyhow::Result<bool> {
    for _ in 0..TRIES {
        let (text, before) = read(path)?;
        let Some(edited) = change(&text).with_context(|| format!("{}: nothing is changed", path.display()))? else {
            return Ok(false);
        };
        let unchanged = || -> io::Result<bool> { Ok(read(path)?.0 == text) };
        let metadata = (before.mode() & 0o7777, Some((before.uid(), before.gid())));
        if replace_if(path, edited.as_bytes(), metadata.0, metadata.1, unchanged).with_context(|| path.display().to_string())? {
            return Ok(true);
        }
    }
    bail!("{}: another tool writes it again and again", path.display())
}

fn read(path: &Path) -> io::Result<(String, fs::Metadata)> {
    let file = File::open(path)?;
    let metadata = file.metadata()?;
    let mut text = String::new();
    file.take(MAX_CONFLIST_BYTES).read_to_string(&mut text)?;
    Ok((text, metadata))
}

/// Whole, or as it was.
pub(crate) fn replace(path: &Path, content: &[u8], mode: u32, owner: Option<(u32, u32)>) -> io::Result<()> {
    replace_if(path, content, mode, owner, || Ok(true)).map(drop)
}

/// Beside a file that is written: hidden, and with an ending that no runtime takes for a configuration.
pub fn temporary(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.culvert-new"))
}

/// Writes beside and renames, if it still `may`.
fn replace_if(
    path: &Path,
    content: &[u8],
    mode: u32,
    owner: Option<(u32, u32)>,
    may: impl Fn() -> io::Result<bool>,
) -> io::Result<bool> {
    use std::io::Write as _;
    let temporary = temporary(path);
    let written = || -> io::Result<bool> {
        let mut file = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(mode)
            .open(&temporary)?;
        if let Some((user, group)) = owner {
            chown(&temporary, Some(user), Some(group))?;
        }
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.write_all(content)?;
        file.sync_all()?;
        drop(file);
        let may = may()?;
        if may {
            fs::rename(&temporary, path)?;
        }
        Ok(may)
    };
    let result = written();
    if !matches!(result, Ok(true)) {
        // It is ours alone; a leftover is written over.
        let _ = fs::remove_file(&temporary);
    }
    result
}

/// What `install-cni` prints.
#[must_use]
pub fn told(entry: &Entry) -> String {
    match entry {
        Entry::Put(path) => format!("the plugin is in {}", path.display()),
        Entry::WasThere(path) => format!("the plugin was in {} already", path.display()),
        Entry::NoConfiguration => {
            "there is no network configuration yet; a running agent with --cni-conf-dir adds to it".to_owned()
        }
        Entry::Postponed(why) => {
            format!(
                "the plugin's entry cannot be put into the network configuration: {why}. A running agent with --cni-conf-dir tries again"
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const CONFLIST: &str = "{\"cniVersion\": \"1.0.0\", \"name\": \"n\", \"plugins\": [\n  {\"type\": \"bridge\"}\n]}\n";

    fn has_entry(text: &str) -> bool {
        let value: serde_json::Value = serde_json::from_str(text).unwrap();
        value["plugins"]
            .as_array()
            .unwrap()
            .iter()
            .any(|plugin| plugin["type"] == PLUGIN)
    }

    struct Bench {
        _folder: tempfile::TempDir,
        places: CniPlaces,
        binary: PathBuf,
    }

    fn bench() -> Bench {
        let folder = tempfile::tempdir().unwrap();
        let places = CniPlaces {
            conf_dir: folder.path().join("net.d"),
            bin_dir: folder.path().join("bin"),
            namespace_list: Some(folder.path().join("net.d/culvert-namespaces")),
        };
        fs::create_dir(&places.conf_dir).unwrap();
        fs::create_dir(&places.bin_dir).unwrap();
        let binary = folder.path().join("built");
        fs::write(&binary, "binary").unwrap();
        Bench {
            _folder: folder,
            places,
            binary,
        }
    }

    impl Bench {
        fn install(&self) -> anyhow::Result<Entry> {
            install(&self.places, Path::new("/run/culvert"), Some(&self.binary))
        }

        fn write(&self, file: &str, text: &str) -> PathBuf {
            let path = self.places.conf_dir.join(file);
            fs::write(&path, text).unwrap();
            path
        }
    }

    #[test]
    fn the_first_list_gets_the_entry_once_keeps_its_mode_and_is_left_as_it_was() {
        let bench = bench();
        let first = bench.write("10-net.conflist", CONFLIST);
        let second = bench.write("20-net.conflist", CONFLIST);
        bench.write("05-notes.txt", "no configuration");
        fs::set_permissions(&first, fs::Permissions::from_mode(0o640)).unwrap();
        assert_eq!(bench.install().unwrap(), Entry::Put(first.clone()));
        assert_eq!(bench.install().unwrap(), Entry::WasThere(first.clone()));
        assert!(has_entry(&fs::read_to_string(&first).unwrap()));
        assert_eq!(fs::read_to_string(&second).unwrap(), CONFLIST);
        assert_eq!(fs::metadata(&first).unwrap().mode() & 0o777, 0o640);
        let plugin = bench.places.bin_dir.join(PLUGIN);
        assert_eq!(fs::metadata(&plugin).unwrap().mode() & 0o777, 0o755);
        assert_eq!(
            fs::read_dir(&bench.places.conf_dir).unwrap().count(),
            3,
            "a temporary file stayed"
        );

        // As a running agent keeps it; it is no configuration.
        let list = bench.places.namespace_list.clone().unwrap();
        fs::write(&list, "{}").unwrap();
        assert_eq!(bench.install().unwrap(), Entry::WasThere(first.clone()));
        assert_eq!(uninstall(&bench.places).unwrap(), std::slice::from_ref(&first));
        assert!(!list.exists());
        assert_eq!(fs::read_to_string(&first).unwrap(), CONFLIST);
        assert!(!plugin.exists());
        assert_eq!(uninstall(&bench.places).unwrap(), [""; 0].map(PathBuf::from));
    }

    #[test]
    fn a_malformed_list_and_a_single_plugin_are_named_and_left() {
        let bench = bench();
        assert_eq!(bench.install().unwrap(), Entry::NoConfiguration);
        for (file, text, word) in [
            ("10-net.conflist", "{\"plugins\": [", "no JSON"),
            ("10-net.conflist", "{\"cniVersion\": \"1.0.0\", \"plugins\": []}", "plugins"),
            (
                "10-net.conf",
                "{\"cniVersion\": \"1.0.0\", \"type\": \"bridge\"}",
                "single plugin",
            ),
        ] {
            let path = bench.write(file, text);
            // The binary is there all the same, and the agent goes on to start.
            let Entry::Postponed(why) = bench.install().unwrap() else {
                panic!("{text} took the entry")
            };
            assert!(why.contains(word) && why.contains(file), "{why}");
            assert!(bench.places.bin_dir.join(PLUGIN).exists());
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
            assert_eq!(uninstall(&bench.places).unwrap().len(), 0);
            fs::remove_file(path).unwrap();
        }
    }

    /// The other tool's turn is between our reading and our writing, as often as it is told.
    #[test]
    fn what_another_tool_writes_meanwhile_is_not_written_over() {
        let bench = bench();
        let path = bench.write("10-net.conflist", CONFLIST);
        let entry = conflist::entry(Path::new("/run/culvert"), None);
        let other = |turn: usize| CONFLIST.replace("bridge", &format!("other-{turn}"));
        let turns = Cell::new(0);
        let edit_against = |most: usize| {
            turns.set(0);
            edit(&path, |text| {
                if turns.get() < most {
                    turns.set(turns.get() + 1);
                    fs::write(&path, other(turns.get())).unwrap();
                }
                conflist::insert(text, &entry)
            })
        };
        for most in [1, TRIES - 1] {
            assert!(edit_against(most).unwrap());
            let expected = conflist::insert(&other(most), &entry).unwrap();
            assert_eq!(Some(fs::read_to_string(&path).unwrap()), expected);
            bench.write("10-net.conflist", CONFLIST);
        }

        let error = edit_against(usize::MAX).unwrap_err().to_string();
        assert!(
            error.contains("10-net.conflist") && error.contains("again and again"),
            "{error}"
        );
        assert_eq!(turns.get(), TRIES);
        assert_eq!(fs::read_to_string(&path).unwrap(), other(TRIES));
        assert_eq!(
            fs::read_dir(&bench.places.conf_dir).unwrap().count(),
            1,
            "a temporary file stayed"
        );
    }

    /// Another name of the file keeps what a runtime has that opened it before: it never reads half of a list.
    #[test]
    fn the_list_is_replaced_as_a_whole() {
        let bench = bench();
        let path = bench.write("10-net.conflist", CONFLIST);
        let before = bench.places.bin_dir.join("before");
        fs::hard_link(&path, &before).unwrap();
        assert_eq!(bench.install().unwrap(), Entry::Put(path.clone()));
        let with_entry = fs::read_to_string(&path).unwrap();
        assert!(has_entry(&with_entry));
        assert_eq!(fs::read_to_string(&before).unwrap(), CONFLIST);

        fs::remove_file(&before).unwrap();
        fs::hard_link(&path, &before).unwrap();
        uninstall(&bench.places).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), CONFLIST);
        assert_eq!(fs::read_to_string(&before).unwrap(), with_entry);
    }

    #[tokio::test(start_paused = true)]
    async fn a_malformed_list_gets_the_entry_once_it_is_mended() {
        const MALFORMED: &str = "{\"plugins\": [";
        let bench = bench();
        let path = bench.write("10-net.conflist", MALFORMED);
        let keeping = tokio::spawn(keep(bench.places.conf_dir.clone(), "/run/culvert".into(), None));
        // Looked at more than once: virtual time stands while a look runs.
        tokio::time::sleep(LOOK * 3).await;
        assert!(!keeping.is_finished(), "it is given up");
        assert_eq!(fs::read_to_string(&path).unwrap(), MALFORMED);
        fs::write(&path, CONFLIST).unwrap();
        while !has_entry(&fs::read_to_string(&path).unwrap()) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        keeping.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn an_entry_that_another_tool_takes_out_is_put_back() {
        let bench = bench();
        let path = bench.write("10-net.conflist", CONFLIST);
        let keeping = tokio::spawn(keep(bench.places.conf_dir.clone(), "/run/culvert".into(), None));
        for _ in 0..2 {
            fs::write(&path, CONFLIST).unwrap();
            // Virtual time goes on by itself while the blocking look runs.
            while !has_entry(&fs::read_to_string(&path).unwrap()) {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        keeping.abort();
    }
}
