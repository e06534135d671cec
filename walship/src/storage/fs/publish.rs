//! Temporaries and how one becomes an object.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, RenameFlags, openat, renameat2};
use nix::sys::stat::{Mode, SFlag, fstat, fstatat};
use nix::unistd::{UnlinkatFlags, linkat, unlinkat};

use super::folder::{Folders, Root, is};
use super::{KeyPath, PutOutcome, TMP, Unfinished};
use crate::error::{Error, Result};

/// What the names of our temporaries look like: this, 16 hexadecimal digits, the ending.
const NAME_START: &str = "put-";
const NAME_END: &str = ".tmp";

/// A temporary that nobody wrote to for this long is left over from a process that died.
const STALE_AFTER: Duration = Duration::from_secs(24 * 3600);

/// More than anybody wants to read about.
const UNFINISHED_MAX: usize = 1000;

/// A file without a key as yet; dropping it removes it.
#[derive(Debug)]
pub(super) struct Temporary {
    root: Arc<Root>,
    folder: OwnedFd,
    name: String,
    file: File,
    bytes: u64,
}

impl Temporary {
    pub(super) fn create(root: &Arc<Root>) -> Result<Self> {
        let folder = root.tmp()?;
        let name = format!("{NAME_START}{:016x}{NAME_END}", rand::random::<u64>());
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = openat(&folder, name.as_str(), flags, Mode::from_bits_truncate(0o640))
            .map_err(|errno| root.failed("cannot make a file in", TMP, errno))?;
        let temporary = Self { root: Arc::clone(root), folder, name, file: File::from(file), bytes: 0 };
        root.give(&temporary.file, &format!("{TMP}/{}", temporary.name))?;
        Ok(temporary)
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|error| self.failed("cannot write to", error))?;
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Gives the file its key unless that is taken.
    ///
    /// # Durability
    /// After [`PutOutcome::Stored`] content and name survive a crash.
    pub(super) fn publish(self, path: &KeyPath<'_>) -> Result<PutOutcome> {
        self.file.sync_all().map_err(|error| self.failed("cannot sync", error))?;
        let folders = Folders::create(&self.root, &path.folders)?;
        if self.give_name(&folders, path.name)? == PutOutcome::Exists {
            return Ok(PutOutcome::Exists);
        }
        folders.sync()?;
        Ok(PutOutcome::Stored)
    }

    fn give_name(&self, folders: &Folders, name: &str) -> Result<PutOutcome> {
        let link = linkat(&self.folder, self.name.as_str(), folders.last(), name, AtFlags::empty());
        match link {
            Ok(()) => return Ok(PutOutcome::Stored),
            // On NFS the answer to a link that was made may be lost and the repeated request be
            // told that the name is taken: by this very file then.
            Err(Errno::EEXIST) if self.is_at(folders, name) => return Ok(PutOutcome::Stored),
            Err(Errno::EEXIST) => return Ok(PutOutcome::Exists),
            // What file systems without hard links answer.
            Err(Errno::EPERM | Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EMLINK | Errno::EINVAL) => {}
            Err(errno) => return Err(folders.failed("cannot link", name, errno)),
        }
        let flags = RenameFlags::RENAME_NOREPLACE;
        match renameat2(&self.folder, self.name.as_str(), folders.last(), name, flags) {
            Ok(()) => Ok(PutOutcome::Stored),
            Err(Errno::EEXIST) => Ok(PutOutcome::Exists),
            Err(Errno::EINVAL | Errno::ENOSYS | Errno::EOPNOTSUPP) => Err(Error::invalid(format!(
                "the file system of {} has neither hard links nor a rename that replaces nothing",
                self.root.path().display()
            ))
            .with_next("Keep the repository on another file system: here one archiver could overwrite another's segments unnoticed.")),
            Err(errno) => Err(folders.failed("cannot rename to", name, errno)),
        }
    }

    /// Whether this name is one of the file's.
    fn is_at(&self, folders: &Folders, name: &str) -> bool {
        let there = fstatat(folders.last(), name, AtFlags::AT_SYMLINK_NOFOLLOW);
        matches!((fstat(&self.file), there), (Ok(own), Ok(there)) if (own.st_dev, own.st_ino) == (there.st_dev, there.st_ino))
    }

    fn failed(&self, what: &str, error: std::io::Error) -> Error {
        self.root.failed(what, &format!("{TMP}/{}", self.name), error)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // After a rename there is nothing to remove, after a link the key stays.
        let _ = unlinkat(&self.folder, self.name.as_str(), UnlinkatFlags::NoRemoveDir);
    }
}

/// Removes temporaries that processes which died left behind.
pub(super) fn remove_stale(root: &Root) -> Result<()> {
    for_each_file(root, |folder, name, written| {
        let stale = SystemTime::now().duration_since(written).is_ok_and(|age| age > STALE_AFTER);
        if stale && is_ours(name) {
            let _ = unlinkat(folder, name, UnlinkatFlags::NoRemoveDir);
        }
    })
}

/// Returns the files in the folder of temporaries, oldest first, foreign ones too; a bounded number.
pub(super) fn temporaries(root: &Root) -> Result<Vec<Unfinished>> {
    let mut found = Vec::new();
    for_each_file(root, |_, name, written| {
        if found.len() == UNFINISHED_MAX {
            return;
        }
        let path = root.path().join(TMP).join(name);
        let mend = if is_ours(name) {
            "walship removes it when it is older than a day; so can you when nothing writes to it.".to_owned()
        } else {
            "It is none of walship's: remove it if nobody else needs it.".to_owned()
        };
        let what = format!("the temporary file {:?}", path);
        found.push(Unfinished { what, since: Some(written.into()), mend });
    })?;
    found.sort_by_key(|file| file.since);
    Ok(found)
}

/// Calls `visit` with the folder of temporaries, each regular file's name and when it was written to.
fn for_each_file(root: &Root, mut visit: impl FnMut(&OwnedFd, &str, SystemTime)) -> Result<()> {
    let failed = |errno| root.failed("cannot list", TMP, errno);
    let folder = root.tmp()?;
    let mut entries =
        Dir::openat(&folder, ".", OFlag::O_RDONLY | OFlag::O_DIRECTORY, Mode::empty()).map_err(failed)?;
    for entry in entries.iter() {
        let entry = entry.map_err(failed)?;
        let Ok(name) = entry.file_name().to_str() else { continue };
        let Ok(stat) = fstatat(&folder, name, AtFlags::AT_SYMLINK_NOFOLLOW) else { continue };
        // A time outside of what a clock can show is as good as none.
        let seconds = u64::try_from(stat.st_mtime).unwrap_or(0).min(1 << 36);
        if is(&stat, SFlag::S_IFREG) {
            visit(&folder, name, SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        }
    }
    Ok(())
}

fn is_ours(name: &str) -> bool {
    name.strip_prefix(NAME_START)
        .and_then(|rest| rest.strip_suffix(NAME_END))
        .is_some_and(|id| id.len() == 16 && id.bytes().all(|b| b.is_ascii_hexdigit()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::ObjectKey;

    #[test]
    fn a_second_name_elsewhere_is_not_the_key() {
        let folder = tempfile::tempdir().unwrap();
        super::super::folder::create_root(folder.path()).unwrap();
        let root = Arc::new(Root::at(folder.path()));
        let key = ObjectKey::new("a").unwrap();
        let path = KeyPath::new(&key).unwrap();
        let temporary = || {
            let mut temporary = Temporary::create(&root).unwrap();
            temporary.write(b"mine").unwrap();
            temporary
        };
        // As a backup tool that copies the folder with hard links would.
        let copied = temporary();
        std::fs::hard_link(folder.path().join(TMP).join(&copied.name), folder.path().join("copy")).unwrap();
        std::fs::write(folder.path().join("a"), "theirs").unwrap();
        assert_eq!(copied.publish(&path).unwrap(), PutOutcome::Exists);
        assert_eq!(std::fs::read(folder.path().join("a")).unwrap(), b"theirs");
        // The link was made, its answer lost, and the request repeated.
        std::fs::remove_file(folder.path().join("a")).unwrap();
        let repeated = temporary();
        std::fs::hard_link(folder.path().join(TMP).join(&repeated.name), folder.path().join("a")).unwrap();
        assert_eq!(repeated.publish(&path).unwrap(), PutOutcome::Stored);
    }

    #[test]
    fn only_own_names_are_tidied() {
        assert!(is_ours("put-0123456789abcdef.tmp"));
        for name in
            ["put-.tmp", "put-0123456789abcde.tmp", "put-0123456789abcdeg.tmp", "x", "put-0123456789abcdef"]
        {
            assert!(!is_ours(name), "{name}");
        }
    }
}
