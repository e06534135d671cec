//! The root and the folders of a key, opened one by one so that no link is followed.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat, mkdirat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, fsync, geteuid, unlinkat};

use super::TMP;
use crate::error::{Error, Result};

const FOLDER: OFlag = OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_CLOEXEC);

/// What a folder of the repository may be used for: by its owner, and read by the group.
pub(super) const FOLDER_MODE: u32 = 0o750;

/// The folder that holds everything. It is opened anew by each call: a descriptor kept open would
/// keep a disk from being unmounted, and would go on writing to one that was.
#[derive(Debug)]
pub(super) struct Root {
    path: PathBuf,
    /// Whether the first call found the folder of temporaries.
    had_tmp: OnceLock<bool>,
}

impl Root {
    /// Returns the root without a look at it: that may block without end.
    pub(super) fn at(path: &Path) -> Self {
        Self { path: path.to_owned(), had_tmp: OnceLock::new() }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The root itself, for one call.
    pub(super) fn descriptor(&self) -> Result<OwnedFd> {
        // The root itself may be a link: its path is the operator's own.
        let opened = open(&self.path, FOLDER, Mode::empty()).map_err(|errno| match errno {
            Errno::ENOENT => self.not_there(),
            errno => self.failed("cannot open the repository folder", "", errno),
        })?;
        let has_tmp = has_tmp(&opened);
        if *self.had_tmp.get_or_init(|| has_tmp) && !has_tmp {
            return Err(self.not_there());
        }
        Ok(opened)
    }

    /// The folder of temporaries.
    pub(super) fn tmp(&self) -> Result<OwnedFd> {
        let root = self.descriptor()?;
        openat(&root, TMP, FOLDER | OFlag::O_NOFOLLOW, Mode::empty()).map_err(|errno| match errno {
            Errno::ENOENT => Error::unavailable(format!(
                "{} is no repository: its folder {TMP} is not there; is it mounted?",
                self.path.display()
            ))
            .with_next(format!(
                "Mount it, or create it with `walship init`; if it is a copied repository: mkdir {}/{TMP}",
                self.path.display()
            )),
            errno => self.failed("cannot open", TMP, errno),
        })
    }

    /// Gives what root has made to the owner and the group of the repository's folder: they could not read it otherwise.
    pub(super) fn give(&self, made: impl AsFd, below: &str) -> Result<()> {
        if !geteuid().is_root() {
            return Ok(());
        }
        give_from_root(self.descriptor()?, made).map_err(|errno| self.not_given(below, errno))
    }

    fn not_given(&self, below: &str, errno: Errno) -> Error {
        self.failed("cannot give to the owner of the repository's folder", below, errno)
            .with_next("Run it as the user that the repository's folder belongs to.")
    }

    fn not_there(&self) -> Error {
        Error::unavailable(format!(
            "the repository folder {} is not there; is it mounted?",
            self.path.display()
        ))
        .with_next("Mount it, correct the configured path, or create it with `walship init`.")
    }

    /// The error of a failed operation on something below the root.
    pub(super) fn failed(&self, what: &str, below: &str, error: impl Into<io::Error>) -> Error {
        let error = error.into();
        let path = if below.is_empty() { self.path.clone() } else { self.path.join(below) };
        let text = format!("{what} {}: {error}", path.display());
        match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ENOSPC | Errno::EDQUOT) => {
                Error::local_io(text).with_source(error).with_next(format!(
                    "Free space on the file system of {} (or raise its quota), then try again.",
                    self.path.display()
                ))
            }
            // A network or FUSE mount that lost its server.
            Some(
                Errno::ESTALE
                | Errno::ENOTCONN
                | Errno::ETIMEDOUT
                | Errno::EHOSTDOWN
                | Errno::EHOSTUNREACH
                | Errno::ECONNREFUSED
                | Errno::EINTR
                | Errno::EAGAIN,
            ) => Error::unavailable(text).with_source(error),
            Some(Errno::ELOOP) => self.link(below),
            Some(Errno::EACCES) => {
                let root = self.path.display();
                Error::from_io(format_args!("{what} {}", path.display()), error).with_next(format!(
                    "Run it as the user that the repository's folder belongs to. Where only something in it belongs to \
                     another, as root: chown -R --reference={root} {root}"
                ))
            }
            _ => Error::from_io(format_args!("{what} {}", path.display()), error),
        }
    }

    fn link(&self, below: &str) -> Error {
        Error::denied(format!("{} is a symbolic link", self.path.join(below).display()))
            .with_next("Links inside a repository are not followed: put the data itself there.")
    }
}

fn has_tmp(root: &OwnedFd) -> bool {
    fstatat(root, TMP, AtFlags::AT_SYMLINK_NOFOLLOW).is_ok_and(|stat| is(&stat, SFlag::S_IFDIR))
}

/// Gives what belongs to root to the owner and the group of the repository's folder.
///
/// Where root's files are another's from the start (a network mount that trusts no root), there is nothing to give.
fn give_from_root(root: impl AsFd, made: impl AsFd) -> nix::Result<()> {
    let (root, own) = (fstat(root)?, fstat(&made)?);
    if own.st_uid != 0 || (own.st_uid, own.st_gid) == (root.st_uid, root.st_gid) {
        return Ok(());
    }
    fchown(made, Some(Uid::from_raw(root.st_uid)), Some(Gid::from_raw(root.st_gid)))
}

/// Whether it is a thing of this kind.
pub(super) fn is(stat: &FileStat, kind: SFlag) -> bool {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) == kind
}

/// The root (index 0) and, below it, each folder of a key, all held open.
#[derive(Debug)]
pub(super) struct Folders {
    root: Arc<Root>,
    opened: Vec<OwnedFd>,
    names: Vec<String>,
}

impl Folders {
    /// Opens folders that exist; `None` when one of them does not.
    pub(super) fn open(root: &Arc<Root>, names: &[&str]) -> Result<Option<Self>> {
        let mut folders = Self::root(root)?;
        for name in names {
            if !folders.enter(name)? {
                return Ok(None);
            }
        }
        Ok(Some(folders))
    }

    /// Opens folders, making those that do not exist. Nothing is durable before [`Folders::sync`].
    pub(super) fn create(root: &Arc<Root>, names: &[&str]) -> Result<Self> {
        let mut folders = Self::root(root)?;
        for name in names {
            if folders.enter(name)? {
                folders.give_last()?;
                continue;
            }
            match mkdirat(folders.last(), *name, Mode::from_bits_truncate(FOLDER_MODE)) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(errno) => return Err(folders.failed("cannot make the folder", name, errno)),
            }
            if !folders.enter(name)? {
                return Err(folders.failed("cannot open", name, Errno::ENOENT));
            }
            folders.give_last()?;
        }
        Ok(folders)
    }

    /// As [`Root::give`], for the innermost folder: also for one that was there, because whoever made it may have been
    /// killed before it was given.
    fn give_last(&self) -> Result<()> {
        match (geteuid().is_root(), self.opened.first()) {
            (true, Some(root)) => give_from_root(root, self.last())
                .map_err(|errno| self.root.not_given(&self.names.join("/"), errno)),
            _ => Ok(()),
        }
    }

    /// Syncs every folder, the innermost first: afterwards the names in them survive a crash,
    /// whoever made them.
    pub(super) fn sync(&self) -> Result<()> {
        for (depth, folder) in self.opened.iter().enumerate().rev() {
            fsync(folder).map_err(|errno| {
                self.root.failed("cannot sync the folder", &self.names[..depth].join("/"), errno)
            })?;
        }
        Ok(())
    }

    /// Syncs the innermost folder: afterwards names that were taken out of it stay out.
    pub(super) fn sync_last(&self) -> Result<()> {
        fsync(self.last())
            .map_err(|errno| self.root.failed("cannot sync the folder", &self.names.join("/"), errno))
    }

    /// The innermost folder.
    pub(super) fn last(&self) -> &OwnedFd {
        self.opened.last().expect("the root is always there")
    }

    /// Whether anything at all has this name.
    pub(super) fn exists(&self, name: &str) -> Result<bool> {
        match fstatat(self.last(), name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(_) => Ok(true),
            Err(Errno::ENOENT) => Ok(false),
            Err(errno) => Err(self.failed("cannot look at", name, errno)),
        }
    }

    /// Opens a file and tells its length; `None` when it does not exist.
    pub(super) fn open_file(&self, name: &str) -> Result<Option<(File, u64)>> {
        // Without O_NONBLOCK a pipe somebody left there would block for ever.
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let opened = match openat(self.last(), name, flags, Mode::empty()) {
            Ok(opened) => opened,
            Err(Errno::ENOENT) => return Ok(None),
            Err(errno) => return Err(self.failed("cannot open", name, errno)),
        };
        let stat = fstat(&opened).map_err(|errno| self.failed("cannot look at", name, errno))?;
        if !is(&stat, SFlag::S_IFREG) {
            return Err(Error::local_io(format!("{} is not a regular file", self.path(name).display())));
        }
        Ok(Some((File::from(opened), u64::try_from(stat.st_size).unwrap_or(0))))
    }

    pub(super) fn remove(&self, name: &str) -> Result<()> {
        match unlinkat(self.last(), name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(errno) => Err(self.failed("cannot delete", name, errno)),
        }
    }

    pub(super) fn failed(&self, what: &str, name: &str, error: impl Into<io::Error>) -> Error {
        self.root.failed(what, &self.below(name), error)
    }

    fn root(root: &Arc<Root>) -> Result<Self> {
        Ok(Self { opened: vec![root.descriptor()?], root: Arc::clone(root), names: Vec::new() })
    }

    fn enter(&mut self, name: &str) -> Result<bool> {
        match openat(self.last(), name, FOLDER | OFlag::O_NOFOLLOW, Mode::empty()) {
            Ok(folder) => {
                self.opened.push(folder);
                self.names.push(name.to_owned());
                Ok(true)
            }
            Err(Errno::ENOENT) => Ok(false),
            // For a link the answer is ENOTDIR or ELOOP.
            Err(errno) => {
                let stat = fstatat(self.last(), name, AtFlags::AT_SYMLINK_NOFOLLOW);
                Err(match stat {
                    Ok(stat) if is(&stat, SFlag::S_IFLNK) => self.root.link(&self.below(name)),
                    _ => self.failed("cannot open the folder", name, errno),
                })
            }
        }
    }

    fn below(&self, name: &str) -> String {
        self.names.iter().map(String::as_str).chain([name]).collect::<Vec<_>>().join("/")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path.join(self.below(name))
    }
}

/// Makes the root and its folder of temporaries, durably.
pub(super) fn create_root(path: &Path) -> Result<()> {
    let make = |path: &Path| match DirBuilder::new().mode(FOLDER_MODE).create(path) {
        Ok(()) => Ok(()),
        Err(_) if path.is_dir() => Ok(()),
        Err(error) => Err(Error::from_io(format_args!("cannot make the folder {}", path.display()), error)),
    };
    let sync = |path: &Path| {
        File::open(path)
            .and_then(|folder| folder.sync_all())
            .map_err(|error| Error::from_io(format_args!("cannot sync the folder {}", path.display()), error))
    };
    make(path).map_err(|error| match path.parent() {
        Some(parent) if fs::metadata(parent).is_err_and(|e| e.kind() == io::ErrorKind::NotFound) => {
            error.with_next(format!("Make the folder {} first (or mount what holds it).", parent.display()))
        }
        _ => error,
    })?;
    let tmp = path.join(TMP);
    make(&tmp)?;
    let root = Root::at(path);
    root.give(root.tmp()?, TMP)?;
    sync(&tmp)?;
    sync(path)?;
    path.parent().map_or(Ok(()), sync)
}
