//! `weftctl install-cni`: plugin, loopback and network configuration in a runtime's folders, from a container that has
//! no shell. The init container of conf/kubernetes/weft.yaml.
//!
//! scripts/install is for hosts: it finds runtimes, keeps a ledger, puts other networks away and back. Here an operator
//! has said all of that in a manifest. Common to both is what must not differ: the files, and that they appear by a
//! rename within their folder (containerd ignores what is created or moved in); a test compares what the two leave.

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use serde_json::Value;
use weft_shared::replace::{Survive, is_leftover, replace_file};

use super::conflist;
use super::render::printable;

const PLUGIN: &str = "weft";
const LOOPBACK: &str = "loopback";
const CONFLIST: &str = include_str!("../../../conf/10-weft.conflist");
/// Of names that a runtime reads as a network configuration (libcni's ConfFiles).
const READ_BY_RUNTIMES: [&str; 3] = ["conf", "conflist", "json"];

#[derive(Debug, Args)]
pub(super) struct InstallCni {
    /// The runtime's plugin folder
    #[arg(long, value_name = "DIR", value_parser = absolute)]
    bin_dir: PathBuf,
    /// The runtime's folder of network configurations
    #[arg(long, value_name = "DIR", value_parser = absolute)]
    conf_dir: PathBuf,
    /// The name of weft's there. A runtime uses the first by name
    #[arg(long, value_name = "NAME", default_value = "10-weft.conflist", value_parser = conf_name)]
    conf_file: String,
    /// Its content, instead of the one that weftctl brings
    #[arg(long, value_name = "FILE")]
    conflist: Option<PathBuf>,
    /// The plugin, instead of the one beside weftctl
    #[arg(long, value_name = "FILE")]
    plugin: Option<PathBuf>,
    /// Remove what it has installed. After `weftctl uninstall`
    #[arg(long, conflicts_with_all = ["conflist", "plugin"])]
    remove: bool,
}

#[derive(Debug, thiserror::Error)]
enum Wrong {
    #[error("--{0} means nothing here: no weftd is asked, and what is printed is text")]
    Meaningless(&'static str),
    #[error("{option} = {path}: {why}")]
    Given { option: &'static str, path: PathBuf, why: String },
    #[error("{path}: {error}")]
    File { path: PathBuf, error: io::Error },
    #[error("{0} calls weft, and without the plugin it would fail: remove it first")]
    StillCalled(PathBuf),
}

/// One thing that was looked at.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    what: &'static str,
    text: String,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<10} {}", self.what, printable(&self.text))
    }
}

fn absolute(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if path.is_absolute() { Ok(path) } else { Err("expected an absolute path".to_owned()) }
}

fn conf_name(text: &str) -> Result<String, String> {
    let is_name = |stem: &str| !stem.is_empty() && !stem.starts_with('.') && !stem.contains('/');
    if text.strip_suffix(".conflist").is_some_and(is_name) {
        Ok(text.to_owned())
    } else {
        Err("expected a file's name that ends in .conflist, without a folder and without a dot before it"
            .to_owned())
    }
}

impl InstallCni {
    pub(super) fn run(&self, json: bool, socket: Option<&Path>) -> ExitCode {
        let carry_out = || if self.remove { self.remove() } else { self.install() };
        match refuse(json, socket).and_then(|()| carry_out()) {
            Ok(lines) => {
                let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
                super::write_out(&text);
                ExitCode::SUCCESS
            }
            Err(wrong) => {
                super::write_err(&format!("weftctl install-cni: {wrong}"));
                ExitCode::from(if matches!(wrong, Wrong::Meaningless(_)) { 2 } else { 1 })
            }
        }
    }

    fn conf(&self) -> PathBuf {
        self.conf_dir.join(&self.conf_file)
    }

    /// The plugin comes before what calls it.
    fn install(&self) -> Result<Vec<Line>, Wrong> {
        let (plugin, conflist) = (self.plugin_content()?, self.conflist_content()?);
        let mut lines = vec![put(&self.bin_dir.join(PLUGIN), &plugin, 0o755)?];
        lines.push(put_loopback(&self.bin_dir.join(LOOPBACK))?);
        lines.push(put(&self.conf(), conflist.as_bytes(), 0o644)?);
        for name in preferred(&self.conf_dir, &self.conf_file) {
            let (dir, own) = (self.conf_dir.display(), &self.conf_file);
            lines.push(Line {
                what: "WARNING",
                text: format!(
                    "{dir}/{name} comes before {own}: a runtime uses that, not weft, until it is removed"
                ),
            });
        }
        Ok(lines)
    }

    fn plugin_content(&self) -> Result<Vec<u8>, Wrong> {
        let path = match &self.plugin {
            Some(path) => path.clone(),
            None => {
                let own = std::env::current_exe();
                let own = own.map_err(|error| Wrong::File { path: "/proc/self/exe".into(), error })?;
                own.with_file_name(PLUGIN)
            }
        };
        let given = |why: String| Wrong::Given { option: "--plugin", path: path.clone(), why };
        let content = fs::read(&path).map_err(|e| given(format!("expected weft's plugin: {e}")))?;
        if !content.starts_with(b"\x7fELF") {
            return Err(given("expected weft's plugin: this is no program".to_owned()));
        }
        Ok(content)
    }

    fn conflist_content(&self) -> Result<String, Wrong> {
        let Some(path) = &self.conflist else { return Ok(CONFLIST.to_owned()) };
        let given = |why: String| Wrong::Given { option: "--conflist", path: path.clone(), why };
        let text = fs::read_to_string(path).map_err(|e| given(e.to_string()))?;
        conflist::check(&text).map_err(given)?;
        Ok(text)
    }

    /// The plugin goes after what calls it, and stays where somebody else's configuration calls it.
    fn remove(&self) -> Result<Vec<Line>, Wrong> {
        let mut gone = Vec::new();
        let conf = self.conf();
        if configuration(&conf).is_some_and(|json| calls_weft(&json)) {
            gone.push(conf.clone());
        }
        let others = configurations(&self.conf_dir).into_iter().map(|name| self.conf_dir.join(name));
        let mut others = others.filter(|path| *path != conf);
        if let Some(path) = others.find(|path| configuration(path).is_some_and(|json| calls_weft(&json))) {
            return Err(Wrong::StillCalled(path));
        }
        let loopback = self.bin_dir.join(LOOPBACK);
        if leads_to_weft(&loopback) {
            gone.push(loopback);
        }
        gone.push(self.bin_dir.join(PLUGIN));
        gone.extend(leftovers(&self.bin_dir, PLUGIN));
        gone.extend(leftovers(&self.conf_dir, conf.file_stem().and_then(|s| s.to_str()).unwrap_or_default()));
        let mut lines = Vec::new();
        for path in gone {
            match fs::remove_file(&path) {
                Ok(()) => lines.push(Line { what: "removed", text: path.display().to_string() }),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(Wrong::File { path, error }),
            }
        }
        if lines.is_empty() {
            lines
                .push(Line { what: "absent", text: "nothing of weft's is left in these folders".to_owned() });
        }
        Ok(lines)
    }
}

/// Options of the other commands.
fn refuse(json: bool, socket: Option<&Path>) -> Result<(), Wrong> {
    match (json, socket) {
        (true, _) => Err(Wrong::Meaningless("json")),
        (_, Some(_)) => Err(Wrong::Meaningless("socket")),
        (false, None) => Ok(()),
    }
}

/// A file with this content and mode; one that is so already is not touched.
fn put(path: &Path, content: &[u8], mode: u32) -> Result<Line, Wrong> {
    let failed = |error| Wrong::File { path: path.to_owned(), error };
    let there = fs::symlink_metadata(path).is_ok_and(|m| m.is_file());
    let same = there
        && fs::metadata(path).is_ok_and(|m| m.permissions().mode() & 0o7777 == mode)
        && fs::read(path).is_ok_and(|found| found == content);
    if !same {
        let dir = path.parent().unwrap_or(Path::new("/"));
        fs::DirBuilder::new().recursive(true).mode(0o755).create(dir).map_err(failed)?;
        // A running plugin is no obstacle: its program lives on under no name.
        replace_file(path, content, mode, Survive::PowerCut).map_err(failed)?;
    }
    let what = match (same, there) {
        (true, _) => "unchanged",
        (false, true) => "replaced",
        (false, false) => "installed",
    };
    Ok(Line { what, text: path.display().to_string() })
}

/// containerd and CRI-O call a plugin of this name for every container. Under it weft is that plugin; one that is there
/// already stays.
fn put_loopback(path: &Path) -> Result<Line, Wrong> {
    let shown = path.display();
    let line = |what, text| Ok(Line { what, text });
    if leads_to_weft(path) {
        return line("unchanged", format!("{shown} (weft)"));
    }
    if path.exists() {
        return line("kept", format!("{shown}: it was there"));
    }
    if path.is_symlink() {
        let text = format!(
            "{shown} leads nowhere, and containerd and CRI-O call it for every container: remove it, and start this again"
        );
        return line("WARNING", text);
    }
    symlink(PLUGIN, path).map_err(|error| Wrong::File { path: path.to_owned(), error })?;
    line("linked", format!("{shown} to {PLUGIN}"))
}

fn leads_to_weft(path: &Path) -> bool {
    fs::read_link(path).is_ok_and(|to| to == Path::new(PLUGIN))
}

/// Names, in the order in which a runtime reads them.
fn configurations(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let read = |name: &String| {
        Path::new(name).extension().and_then(|e| e.to_str()).is_some_and(|e| READ_BY_RUNTIMES.contains(&e))
    };
    let mut names: Vec<String> =
        entries.filter_map(|e| e.file_name().into_string().ok()).filter(read).collect();
    names.sort();
    names
}

fn configuration(path: &Path) -> Option<Value> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

fn calls_weft(json: &Value) -> bool {
    let plugins = json["plugins"].as_array().map_or_else(|| std::slice::from_ref(json), Vec::as_slice);
    plugins.iter().any(|plugin| plugin["type"] == PLUGIN)
}

/// Other networks that a runtime prefers. One that calls weft is weft's as well.
fn preferred(dir: &Path, own: &str) -> Vec<String> {
    let before = configurations(dir).into_iter().take_while(|name| name.as_str() < own);
    let all: Vec<String> = before.collect();
    let first_of_weft =
        all.iter().position(|name| configuration(&dir.join(name)).is_some_and(|json| calls_weft(&json)));
    all.into_iter().take(first_of_weft.unwrap_or(usize::MAX)).collect()
}

/// What a run that was cut off has left.
fn leftovers(dir: &Path, stem: &str) -> Vec<PathBuf> {
    let paths = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    paths.filter(|path| is_leftover(path) && path.file_stem().is_some_and(|found| found == stem)).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use clap::Parser as _;

    use super::super::{Cli, Verb};
    use super::*;

    const OTHER: &str = r#"{"cniVersion":"1.0.0","name":"cbr0","plugins":[{"type":"flannel"}]}"#;

    struct Folders {
        dir: tempfile::TempDir,
    }

    impl Folders {
        fn new() -> Self {
            let dir = tempfile::tempdir().expect("tempdir");
            fs::write(dir.path().join("weft"), b"\x7fELF 1").expect("plugin");
            Self { dir }
        }

        fn bin(&self, name: &str) -> PathBuf {
            self.dir.path().join("opt/cni/bin").join(name)
        }

        fn conf(&self, name: &str) -> PathBuf {
            self.dir.path().join("etc/cni/net.d").join(name)
        }

        fn put_conf(&self, name: &str, text: &str) {
            fs::create_dir_all(self.conf("")).expect("folder");
            fs::write(self.conf(name), text).expect("configuration");
        }

        fn verb(&self, more: &[&str]) -> InstallCni {
            let (bin, conf) = (self.bin("").display().to_string(), self.conf("").display().to_string());
            let args = ["weftctl", "install-cni", "--bin-dir", &bin, "--conf-dir", &conf];
            let cli = Cli::try_parse_from(args.iter().chain(more)).expect("usage");
            match cli.verb {
                Verb::InstallCni(verb) => verb,
                other => panic!("{other:?}"),
            }
        }

        fn install(&self, more: &[&str]) -> Result<Vec<String>, String> {
            let plugin = self.dir.path().join("weft").display().to_string();
            said(self.verb(&[&["--plugin", &plugin], more].concat()).install())
        }

        fn remove(&self) -> Result<Vec<String>, String> {
            said(self.verb(&["--remove"]).remove())
        }

        /// Everything below, with what tells whether it was touched.
        fn state(&self) -> Vec<(PathBuf, u64, i64, i64, u32)> {
            let mut found = Vec::new();
            for dir in [self.bin(""), self.conf("")] {
                for entry in fs::read_dir(dir).expect("folder").flatten() {
                    let m = fs::symlink_metadata(entry.path()).expect("stat");
                    found.push((entry.path(), m.ino(), m.ctime(), m.ctime_nsec(), m.mode()));
                }
            }
            found.sort();
            found
        }
    }

    fn said(done: Result<Vec<Line>, Wrong>) -> Result<Vec<String>, String> {
        let text = |line: Line| {
            let name =
                line.text.split(": ").next().unwrap_or_default().rsplit('/').next().unwrap_or_default();
            format!("{} {name}", line.what)
        };
        done.map(|lines| lines.into_iter().map(text).collect()).map_err(|wrong| wrong.to_string())
    }

    #[test]
    fn everything_is_put_once_and_a_second_run_touches_nothing() {
        let folders = Folders::new();
        let first = folders.install(&[]).expect("installed");
        assert_eq!(first, ["installed weft", "linked loopback to weft", "installed 10-weft.conflist"]);
        assert_eq!(fs::read_to_string(folders.conf("10-weft.conflist")).expect("conflist"), CONFLIST);
        assert_eq!(fs::metadata(folders.bin("loopback")).expect("stat").mode() & 0o7777, 0o755);
        let before = folders.state();
        assert_eq!(before.len(), 3, "{before:?}");
        let second = folders.install(&[]).expect("installed");
        assert_eq!(second, ["unchanged weft", "unchanged loopback (weft)", "unchanged 10-weft.conflist"]);
        assert_eq!(folders.state(), before);
    }

    #[test]
    fn an_upgrade_replaces_by_rename() {
        let folders = Folders::new();
        folders.install(&[]).expect("installed");
        let running = fs::File::open(folders.bin("weft")).expect("plugin");
        fs::write(folders.dir.path().join("weft"), b"\x7fELF 2").expect("plugin");
        folders.put_conf("10-weft.conflist", "{}");
        let lines = folders.install(&[]).expect("installed");
        assert_eq!(lines, ["replaced weft", "unchanged loopback (weft)", "replaced 10-weft.conflist"]);
        assert_eq!(fs::read(folders.bin("weft")).expect("plugin"), b"\x7fELF 2");
        let (old, new) =
            (running.metadata().expect("stat"), fs::metadata(folders.bin("weft")).expect("stat"));
        assert!(old.ino() != new.ino() && old.nlink() == 0, "written into, not replaced");
        assert_eq!(folders.state().len(), 3, "nothing else is left");
    }

    #[test]
    fn what_a_runtime_prefers_is_named_and_stays() {
        let folders = Folders::new();
        folders.put_conf("05-first.conflist", OTHER);
        folders.put_conf("10-flannel.conflist", OTHER);
        folders.put_conf("20-later.conf", OTHER);
        folders.put_conf("01-not-read.bak", OTHER);
        let lines = folders.install(&[]).expect("installed");
        let named = ["05-first.conflist", "10-flannel.conflist"]
            .map(|name| format!("WARNING {name} comes before 10-weft.conflist"));
        assert_eq!(lines[3..], named);
        assert_eq!(fs::read_to_string(folders.conf("05-first.conflist")).expect("other"), OTHER);
        // What calls weft is no other network, and hides those behind it.
        folders.put_conf("06-mine.conf", r#"{"name":"mine","type":"weft"}"#);
        assert_eq!(folders.install(&[]).expect("installed").len(), 4);
        assert_eq!(folders.install(&["--conf-file", "00-weft.conflist"]).expect("installed").len(), 3);
    }

    #[test]
    fn a_loopback_that_is_there_stays() {
        let folders = Folders::new();
        fs::create_dir_all(folders.bin("")).expect("folder");
        fs::write(folders.bin("loopback"), "stock").expect("loopback");
        assert_eq!(folders.install(&[]).expect("installed")[1], "kept loopback");
        folders.remove().expect("removed");
        assert_eq!(fs::read_to_string(folders.bin("loopback")).expect("loopback"), "stock");
        fs::remove_file(folders.bin("loopback")).expect("remove");
        symlink("/nowhere/loopback", folders.bin("loopback")).expect("link");
        assert!(folders.install(&[]).expect("installed")[1].starts_with("WARNING loopback leads nowhere"));
        assert_eq!(fs::read_link(folders.bin("loopback")).expect("link"), Path::new("/nowhere/loopback"));
    }

    #[test]
    fn removal_takes_what_was_installed_and_refuses_under_a_caller() {
        let folders = Folders::new();
        folders.put_conf("20-later.conf", OTHER);
        folders.install(&[]).expect("installed");
        fs::write(folders.bin("weft.tmp1"), "torn").expect("leftover");
        folders.put_conf("10-weft.tmp1", "torn");
        folders.put_conf("30-mine.conf", r#"{"name":"mine","type":"weft"}"#);
        let refused = folders.remove().expect_err("still called");
        assert!(refused.contains("30-mine.conf calls weft"), "{refused}");
        assert!(folders.bin("weft").exists() && folders.conf("10-weft.conflist").exists());
        fs::remove_file(folders.conf("30-mine.conf")).expect("remove");
        let removed = ["10-weft.conflist", "loopback", "weft", "weft.tmp1", "10-weft.tmp1"]
            .map(|n| format!("removed {n}"));
        assert_eq!(folders.remove().expect("removed"), removed);
        let left: Vec<PathBuf> = folders.state().into_iter().map(|(path, ..)| path).collect();
        assert_eq!(left, [folders.conf("20-later.conf")]);
        assert!(folders.remove().expect("twice")[0].starts_with("absent"));
    }

    #[test]
    fn wrong_input_is_named_and_nothing_is_installed() {
        let folders = Folders::new();
        let file = folders.dir.path().join("given.conflist");
        let conflist = |text: &str| {
            fs::write(&file, text).expect("write");
            folders.install(&["--conflist", file.to_str().expect("UTF-8")]).expect_err(text)
        };
        for (text, said) in [
            ("{", "expected JSON"),
            (r#"{"cniVersion":"9.9","name":"x","plugins":[{"type":"weft"}]}"#, "\"9.9\" is not one of 0.1.0"),
            (r#"{"name":"../x/y","plugins":[{"type":"weft"}]}"#, "\"../x/y\" must begin with"),
            (r#"{"name":"x","plugins":[{"type":"weft"},3,"x"]}"#, "plugins[1] = 3: expected an object"),
            (OTHER, "plugins[0].type = \"flannel\": expected \"weft\""),
        ] {
            let wrong = conflist(text);
            assert!(wrong.starts_with("--conflist = ") && wrong.contains(said), "{wrong}");
        }
        fs::write(folders.dir.path().join("weft"), "#!/bin/sh").expect("write");
        let wrong = folders.install(&[]).expect_err("a script");
        assert!(wrong.contains("--plugin = ") && wrong.contains("this is no program"), "{wrong}");
        assert!(!folders.bin("").exists() && !folders.conf("").exists());
        for (json, socket, named) in [(true, None, "--json"), (false, Some(Path::new("/x")), "--socket")] {
            let wrong = refuse(json, socket).expect_err(named).to_string();
            assert!(wrong.starts_with(named), "{wrong}");
        }
        for wrong in [
            &["--bin-dir=opt", "--conf-dir=/x"][..],
            &["--bin-dir=/x"],
            &["--bin-dir=/x", "--conf-dir=/x", "--conf-file=a/b.conflist"],
            &["--bin-dir=/x", "--conf-dir=/x", "--conf-file=10-weft.conf"],
            &["--bin-dir=/x", "--conf-dir=/x", "--conf-file=..conflist"],
            &["--bin-dir=/x", "--conf-dir=/x", "--conf-file=.weft.conflist"],
            &["--bin-dir=/x", "--conf-dir=/x", "--conf-file=.conflist"],
            &["--bin-dir=/x", "--conf-dir=/x", "--remove", "--plugin=/x"],
        ] {
            assert!(
                Cli::try_parse_from(["weftctl", "install-cni"].iter().chain(wrong)).is_err(),
                "{wrong:?}"
            );
        }
    }
}
