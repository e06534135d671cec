//! Listing in the byte order of whole keys, as S3 does, one page at a time.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, SFlag, fstatat};

use super::TMP;
use super::folder::{Root, is};
use crate::error::{Error, Result};
use crate::storage::{ListPage, ObjectKey, ObjectMeta};

/// How many objects a page holds.
pub(super) const PAGE_OBJECTS: usize = 1000;

/// How many names a folder may hold: more do not come from us, and all are in memory for a while.
const FOLDER_NAMES_MAX: usize = 1_000_000;

/// How many things that are left out are named.
const SKIPPED_MAX: usize = 1000;

/// What listings have left out because it cannot be read, with why.
pub(super) type Skipped = Arc<Mutex<BTreeMap<String, String>>>;

/// Returns the objects under `prefix` whose keys come after `after`. With `skipped`, what cannot be read below the root is left
/// out and noted there.
pub(super) fn page(
    root: &Root,
    prefix: &str,
    after: Option<&str>,
    skipped: Option<&Skipped>,
) -> Result<ListPage> {
    let mut walk = Walk { root, prefix, after: after.unwrap_or(""), skipped, found: Vec::new() };
    walk.folder(&root.descriptor()?, "")?;
    let mut objects = walk.found;
    let next = (objects.len() > PAGE_OBJECTS).then(|| {
        objects.truncate(PAGE_OBJECTS);
        objects[PAGE_OBJECTS - 1].key.to_string()
    });
    Ok(ListPage { objects, next })
}

/// Notes that a path is left out; returns whether it may be, and there was room for it.
pub(super) fn note_skipped(skipped: &Skipped, path: &str, error: &Error) -> bool {
    // An outage is of all of it.
    if !matches!(error, Error::Denied(_) | Error::LocalIo(_)) {
        return false;
    }
    let mut skipped = skipped.lock().unwrap_or_else(PoisonError::into_inner);
    let has_room = skipped.len() < SKIPPED_MAX || skipped.contains_key(path);
    if has_room {
        skipped.insert(path.to_owned(), error.to_string());
    }
    has_room
}

struct Walk<'a> {
    root: &'a Root,
    prefix: &'a str,
    after: &'a str,
    skipped: Option<&'a Skipped>,
    found: Vec<ObjectMeta>,
}

impl Walk<'_> {
    /// Adds what lies in `folder`, whose path is `below` (empty, or with a slash at its end).
    fn folder(&mut self, folder: &OwnedFd, below: &str) -> Result<()> {
        for name in self.names(folder, below)? {
            if self.found.len() > PAGE_OBJECTS {
                return Ok(());
            }
            let path = format!("{below}{name}");
            let walked = match path.strip_suffix('/') {
                Some(inner) => {
                    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                    match openat(folder, name.trim_end_matches('/'), flags, Mode::empty()) {
                        Ok(opened) => self.folder(&opened, &path),
                        Err(Errno::ENOENT) => Ok(()),
                        Err(errno) => Err(self.root.failed("cannot open the folder", inner, errno)),
                    }
                }
                None => self.file(folder, &name, &path),
            };
            walked.or_else(|error| self.skip(&path, error))?;
        }
        Ok(())
    }

    fn skip(&self, path: &str, error: Error) -> Result<()> {
        match self.skipped {
            Some(skipped) if note_skipped(skipped, path.trim_end_matches('/'), &error) => Ok(()),
            _ => Err(error),
        }
    }

    fn file(&mut self, folder: &OwnedFd, name: &str, path: &str) -> Result<()> {
        let stat = match fstatat(folder, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            // Tidied away since the folder was read.
            Err(Errno::ENOENT) => return Ok(()),
            Err(errno) => return Err(self.root.failed("cannot look at", path, errno)),
        };
        if !is(&stat, SFlag::S_IFREG) {
            return Err(Error::denied(format!(
                "{} is neither a file nor a folder",
                self.root.path().join(path).display()
            ))
            .with_next(
                "Only files and folders may lie in a repository, links are not followed: move it away.",
            ));
        }
        let bytes = u64::try_from(stat.st_size).unwrap_or(0);
        self.found.push(ObjectMeta { key: ObjectKey::new(path)?, bytes });
        Ok(())
    }

    /// The names in a folder that can matter, in the order of the keys they lead to: a folder's
    /// name counts with its slash, because `a.b` comes before `a/b`.
    fn names(&self, folder: &OwnedFd, below: &str) -> Result<Vec<String>> {
        let failed = |errno| self.root.failed("cannot list the folder", below, errno);
        // A descriptor of its own: reading moves its position.
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut entries = Dir::openat(folder, ".", flags, Mode::empty()).map_err(failed)?;
        let mut names = Vec::new();
        for entry in entries.iter() {
            let entry = entry.map_err(failed)?;
            // What is no part of a key, like lost+found, is not ours.
            let Ok(name) = entry.file_name().to_str() else { continue };
            if ObjectKey::new(name).is_err() || (below.is_empty() && name == TMP) {
                continue;
            }
            let is_folder = match entry.file_type() {
                Some(kind) => kind == Type::Directory,
                None => match fstatat(folder, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
                    Ok(stat) => is(&stat, SFlag::S_IFDIR),
                    Err(Errno::ENOENT) => continue,
                    Err(errno) => return Err(failed(errno)),
                },
            };
            let name = if is_folder { format!("{name}/") } else { name.to_owned() };
            if self.wanted(&format!("{below}{name}"), is_folder) {
                if names.len() == FOLDER_NAMES_MAX {
                    return Err(Error::local_io(format!(
                        "more than {FOLDER_NAMES_MAX} names lie in {}",
                        self.root.path().join(below).display()
                    )));
                }
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    /// Whether this file, or anything in this folder, can belong to the page.
    fn wanted(&self, path: &str, is_folder: bool) -> bool {
        let fits = path.starts_with(self.prefix) || (is_folder && self.prefix.starts_with(path));
        fits && (path > self.after || (is_folder && self.after.starts_with(path)))
    }
}
