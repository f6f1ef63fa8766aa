//! Files that are replaced at once (rename(2)): a reader, and whoever comes after a writer that was killed at any
//! instruction, finds the old content or the new one, never a part.

use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// What the content must survive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Survive {
    /// The death of the writer.
    Crash,
    /// That of the machine too: fsync(2) before the rename.
    PowerCut,
}

/// Replaces the file; its mode is exact, whatever the umask.
pub fn replace_file(path: &Path, content: &[u8], mode: u32, survive: Survive) -> io::Result<()> {
    // A writer's own, so that two of them never write into one.
    let temporary = path.with_extension(format!("tmp{}", std::process::id()));
    if fs::symlink_metadata(path).is_ok_and(|m| !m.is_file() && !m.is_symlink()) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "is there and is no regular file"));
    }
    let written = || {
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&temporary)?;
        file.write_all(content)?;
        file.set_permissions(Permissions::from_mode(mode))?;
        if survive == Survive::PowerCut {
            file.sync_all()?;
        }
        fs::rename(&temporary, path)
    };
    written().inspect_err(|_| {
        // The error that stopped the write is the one that matters.
        let _ = fs::remove_file(&temporary);
    })
}

/// Whether the file is what a writer that died in [`replace_file`] left beside its target.
pub fn is_leftover(path: &Path) -> bool {
    path.extension()
        .and_then(|e| e.to_str())
        .and_then(|e| e.strip_prefix("tmp"))
        .is_some_and(|pid| pid.bytes().all(|b| b.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).expect("directory");
        entries.map(|e| e.expect("entry").file_name().to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn content_and_mode_are_new_and_nothing_else_is_left() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("state.json");
        for (content, mode, survive) in
            [("long content", 0o600, Survive::Crash), ("new", 0o666, Survive::PowerCut)]
        {
            replace_file(&path, content.as_bytes(), mode, survive).expect("replace");
            assert_eq!(fs::read_to_string(&path).expect("read"), content);
            assert_eq!(fs::metadata(&path).expect("stat").permissions().mode() & 0o7777, mode);
            assert_eq!(names(dir.path()), ["state.json"]);
        }
    }

    #[test]
    fn a_failure_leaves_the_target_and_nothing_else() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("taken");
        fs::create_dir(&path).expect("directory");
        replace_file(&path, b"x", 0o600, Survive::Crash).expect_err("a directory is in the way");
        assert_eq!(names(dir.path()), ["taken"]);
    }

    #[test]
    fn leftovers_are_known_by_name() {
        for (name, leftover) in
            [("a.tmp12", true), ("a.tmp", true), ("a.json", false), ("a.tmpl", false), ("tmp1", false)]
        {
            assert_eq!(is_leftover(Path::new(name)), leftover, "{name}");
        }
    }
}
