//! Files that appear whole or not at all: temporary name, fsync, rename, fsync of the folder.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use nix::fcntl::AT_FDCWD;

use crate::error::{Error, Result};

/// What the names of temporary files end with.
const NAME_END: &str = ".walship-tmp";

/// A temporary file this old belongs to nobody any more.
const STALE: Duration = Duration::from_secs(3600);

/// A file that is being written where it will appear; it is gone when it is dropped before that.
///
/// Where the file system can, it has no name until then: a process that is killed (PostgreSQL stops
/// its `restore_command` with SIGTERM) leaves nothing behind. Elsewhere it has a temporary name.
#[derive(Debug)]
pub struct TempFile {
    file: File,
    path: PathBuf,
    target: PathBuf,
    /// Whether there is something at `path` to be removed.
    named: bool,
}

impl TempFile {
    /// Returns an empty file in `target`'s folder, readable by its owner only. What a killed process
    /// left behind for the same target more than an hour ago is removed.
    pub fn beside(target: &Path) -> Result<Self> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let name = target
            .file_name()
            .and_then(|name| name.to_str())
            .ok_or_else(|| Error::invalid(format!("{} is not the name of a file", target.display())))?;
        let folder = folder_of(target);
        remove_stale(folder, name);
        let unnamed = open_unnamed(folder);
        for _ in 0..1000 {
            let number = COUNTER.fetch_add(1, Ordering::Relaxed);
            let path = folder.join(format!("{name}.{}-{number}{NAME_END}", std::process::id()));
            if let Some(file) = unnamed {
                return Ok(Self { file, path, target: target.to_owned(), named: false });
            }
            match OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path) {
                Ok(file) => return Ok(Self { file, path, target: target.to_owned(), named: true }),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(Error::from_io(format!("creating {}", path.display()), error)),
            }
        }
        Err(Error::local_io(format!("{} is full of temporary files", folder.display())))
    }

    /// Returns the open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Gives the file its name, replacing what has it.
    ///
    /// # Durability
    /// After `Ok` the file is there, whole, also after a crash of the machine.
    pub fn publish(mut self) -> Result<()> {
        let failed =
            |doing: &str, path: &Path, error| Error::from_io(format!("{doing} {}", path.display()), error);
        self.file.sync_all().map_err(|error| failed("syncing", &self.path, error))?;
        if !self.named {
            let _ = fs::remove_file(&self.path);
            let flags = nix::fcntl::AtFlags::AT_SYMLINK_FOLLOW;
            nix::unistd::linkat(AT_FDCWD, &*in_proc(&self.file), AT_FDCWD, &self.path, flags)
                .map_err(|errno| failed("naming", &self.path, errno.into()))?;
            self.named = true;
        }
        fs::rename(&self.path, &self.target).map_err(|error| failed("renaming to", &self.target, error))?;
        self.named = false;
        sync_folder(folder_of(&self.target))
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        if self.named {
            // Nothing relies on it; what stays is removed later.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Returns a file without a name in `folder`; `None` where there is no such thing, or no way to name it.
fn open_unnamed(folder: &Path) -> Option<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600).custom_flags(nix::libc::O_TMPFILE);
    options.open(folder).ok().filter(|file| in_proc(file).exists())
}

/// The path under which the kernel shows an open file.
fn in_proc(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Writes a small file whole or not at all.
///
/// # Durability
/// As [`TempFile::publish`].
pub fn write(target: &Path, bytes: &[u8]) -> Result<()> {
    let temp = TempFile::beside(target)?;
    let mut file = temp.file();
    file.write_all(bytes).map_err(|error| Error::from_io(format!("writing {}", target.display()), error))?;
    temp.publish()
}

/// Makes a folder's entries durable.
pub fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder)
        .and_then(|opened| opened.sync_all())
        .map_err(|error| Error::from_io(format!("syncing the folder {}", folder.display()), error))
}

/// Returns the folder that holds `path`, `.` for a bare name.
pub fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn remove_stale(folder: &Path, name: &str) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let file_name = entry.file_name();
        let ours = file_name.to_str().is_some_and(|text| {
            text.strip_prefix(name).is_some_and(|rest| rest.starts_with('.') && rest.ends_with(NAME_END))
        });
        let modified = || entry.metadata().ok()?.modified().ok();
        if ours
            && modified()
                .and_then(|at| SystemTime::now().duration_since(at).ok())
                .is_some_and(|age| age > STALE)
        {
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_appears_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("RECOVERYXLOG");
        let temp = TempFile::beside(&target).unwrap();
        temp.file().write_all(b"half").unwrap();
        assert!(!target.exists());
        drop(temp);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        write(&target, b"one").unwrap();
        write(&target, b"two").unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"two");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn only_old_temporaries_of_the_same_target_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let old = SystemTime::now() - Duration::from_secs(7200);
        for (name, is_old) in [
            ("x.1-0.walship-tmp", true),
            ("x.2-0.walship-tmp", false),
            ("y.1-0.walship-tmp", true),
            ("x.1", true),
        ] {
            let file = File::create(folder.path().join(name)).unwrap();
            if is_old {
                file.set_modified(old).unwrap();
            }
        }
        write(&folder.path().join("x"), b"").unwrap();
        let mut left: Vec<_> = fs::read_dir(folder.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(left, ["x", "x.1", "x.2-0.walship-tmp", "y.1-0.walship-tmp"]);
    }

    #[test]
    fn a_missing_folder_is_an_error() {
        assert!(matches!(write(Path::new("/nowhere/x"), b""), Err(Error::LocalIo(_))));
        assert!(matches!(write(Path::new("/"), b""), Err(Error::Invalid(_))));
    }
}
