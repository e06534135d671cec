//! The scratch folder: taken, marked, locked, and removed with all that is in it.

use std::env;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use walship::repository::RecordedBy;
use walship::{Error, Result};

use super::processes;
use crate::execute::restore::{blocking, make_private, threads_are_done};
use crate::target::shell_word;

/// The file that says whose a scratch folder is.
const MARKER: &str = "walship-scratch.json";

/// The longest marker that is read.
const MARKER_BYTES_MAX: u64 = 64 << 10;

/// Everything that is ever put into a scratch folder, beside the marker.
const ENTRIES: &[&str] = &[
    "data",
    "tablespaces",
    "settings",
    "socket",
    "hba.conf",
    "ident.conf",
    "postgresql.conf",
    "extract.dump",
];

/// The longest path of a socket: PostgreSQL's and the kernel's limit, without the zero behind it.
const SOCKET_PATH_MAX: usize = 107;

/// A socket's name in its folder, as long as its lock file's.
const SOCKET_NAME: &str = ".s.PGSQL.5432.lock";

/// How long is waited for threads of a restore that was broken off, and for what cannot be removed.
const REMOVE_PATIENCE: Duration = Duration::from_secs(60);
const REMOVE_EVERY: Duration = Duration::from_millis(100);

/// How often a marker that somebody removes at this moment is looked for anew.
const TRIES: usize = 20;

/// The marker's content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Marker {
    format: u32,
    /// 64 random bits: part of the server's name, by which its processes are known.
    id: String,
    /// What it is for: `drill` or `extract`.
    what: String,
    host: String,
    pid: u32,
    started: DateTime<Utc>,
    /// Whether the folder was made for it, and goes with it.
    folder_made: bool,
    /// The folder of the server's socket, where that lies elsewhere.
    socket_dir: Option<PathBuf>,
    /// Whether it was left on purpose.
    kept: bool,
}

/// A scratch folder that belongs to this program until it is dropped.
#[derive(Debug)]
pub struct Scratch {
    folder: PathBuf,
    marker: Marker,
    file: Flock<File>,
}

/// What was removed of a scratch folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removed {
    /// How many processes of its server were ended for it.
    pub processes: usize,
    /// What is left in the folder: nothing of ours.
    pub left: Vec<String>,
}

impl Scratch {
    /// Takes `folder`, which is absent or empty, or holds what a killed program left: that is removed first, and said
    /// in the text that is returned.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a folder that is in use, is or lies in a data directory, holds anything else, or was left
    /// on another machine or on purpose; [`Error::LocalIo`] when it cannot be made or cleaned up.
    /// # Durability
    /// The marker is durable before anything else is written.
    pub async fn take(folder: &Path, what: &str) -> Result<(Self, Option<String>)> {
        let folder = std::path::absolute(folder)
            .map_err(|error| Error::from_io(format!("resolving {}", folder.display()), error))?;
        refuse_data_directories(&folder)?;
        for _ in 0..TRIES {
            let made = make(&folder)?;
            let Some((mut file, found)) = lock_marker(&folder)? else { continue };
            let mut note = None;
            let mut folder_made = made;
            if let Some(left) = found {
                left.check_host(&folder)?;
                let removed = remove_left(&folder, &left).await?;
                check_nothing_else(&folder)?;
                folder_made = left.folder_made;
                note = Some(left.note(&folder, removed));
            }
            let id = format!("{:016x}", rand::random::<u64>());
            let socket_dir = socket_elsewhere(&folder, &id)?;
            let RecordedBy { host, .. } = RecordedBy::now();
            let marker = Marker {
                format: 1,
                id,
                what: what.to_owned(),
                host,
                pid: std::process::id(),
                started: Utc::now(),
                folder_made,
                socket_dir,
                kept: false,
            };
            write_marker(&mut file, &marker, &folder)?;
            make_private(marker.socket_dir.as_deref().unwrap_or(&folder.join("socket")))?;
            return Ok((Self { folder, marker, file }, note));
        }
        Err(in_use(&folder))
    }

    /// Returns the name that only this scratch server has, as its `cluster_name`.
    pub fn server_name(&self) -> String {
        self.marker.server_name()
    }

    /// Returns the folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Returns the data directory in it.
    pub fn data_dir(&self) -> PathBuf {
        self.folder.join("data")
    }

    /// Returns the folder of the server's socket.
    pub fn socket_dir(&self) -> PathBuf {
        self.marker.socket_dir.clone().unwrap_or_else(|| self.folder.join("socket"))
    }

    /// Ends the server, whatever state it is in.
    ///
    /// # Errors
    /// [`Error::LocalIo`] when it does not end.
    pub async fn end(&self) -> Result<()> {
        processes::end(&self.server_name()).await.map(drop)
    }

    /// Ends the server, whatever state it is in, and removes everything.
    ///
    /// # Errors
    /// [`Error::LocalIo`] when something cannot be removed: the marker stays then, and the next program that takes
    /// the folder tries again.
    pub async fn remove(self) -> Result<Removed> {
        let Self { folder, marker, file } = self;
        let processes = remove_left(&folder, &marker).await?;
        let left = remove_marker(&folder, marker.folder_made)?;
        drop(file);
        Ok(Removed { processes, left })
    }

    /// Leaves everything where it is, on purpose; returns how to get rid of it. The server is stopped already.
    ///
    /// # Errors
    /// [`Error::LocalIo`] when the marker cannot be written.
    pub fn keep(mut self) -> Result<String> {
        self.marker.kept = true;
        write_marker(&mut self.file, &self.marker, &self.folder)?;
        let mut removed = vec![shell_word(&self.folder.to_string_lossy())];
        removed.extend(self.marker.socket_dir.iter().map(|socket| shell_word(&socket.to_string_lossy())));
        Ok(format!("rm -r {}", removed.join(" ")))
    }
}

impl Marker {
    fn server_name(&self) -> String {
        format!("walship-scratch-{}", self.id)
    }

    fn check_host(&self, folder: &Path) -> Result<()> {
        let host = RecordedBy::now().host;
        if self.kept {
            return Err(refused(
                format!(
                    "{} holds what a {} of {} left there on purpose (--keep)",
                    folder.display(),
                    self.what,
                    self.started
                ),
                format!(
                    "Choose another folder with --scratch; or stop its server, remove it with rm -r {}, and run this again.",
                    shell_word(&folder.to_string_lossy())
                ),
            ));
        }
        if self.host != host {
            return Err(refused(
                format!(
                    "{} was left by a {} on {}, and may be in use there",
                    folder.display(),
                    self.what,
                    self.host
                ),
                "Choose another folder with --scratch, or run this on that machine: it cleans up there.",
            ));
        }
        Ok(())
    }

    fn note(&self, folder: &Path, processes: usize) -> String {
        let server = if processes > 0 { " and its server, which was still running," } else { "" };
        format!(
            "what a {} of {} left in {}{server} was removed: it had been killed",
            self.what,
            self.started.format("%Y-%m-%d %H:%M:%SZ"),
            folder.display()
        )
    }
}

fn refused(what: impl Into<String>, next: impl Into<String>) -> Error {
    Error::invalid(what).with_safe("nothing was written").with_next(next)
}

fn in_use(folder: &Path) -> Error {
    refused(
        format!("another drill or extract is at work in {}", folder.display()),
        "Wait for it, or choose another folder with --scratch.",
    )
}

/// Refuses a folder that is a data directory, or lies in one: a mistake there is nothing to be cleaned up after.
fn refuse_data_directories(folder: &Path) -> Result<()> {
    for place in folder.ancestors() {
        if place.join("PG_VERSION").exists() {
            let what = match place == folder {
                true => format!("{} is a data directory of PostgreSQL", folder.display()),
                false => {
                    format!(
                        "{} lies in {}, a data directory of PostgreSQL",
                        folder.display(),
                        place.display()
                    )
                }
            };
            return Err(refused(what, "Choose a folder of its own with --scratch: empty, or not there yet."));
        }
    }
    Ok(())
}

/// Makes the folder; returns whether it was not there.
fn make(folder: &Path) -> Result<bool> {
    let failed = |error| Error::from_io(format!("creating {}", folder.display()), error);
    match fs::symlink_metadata(folder) {
        Ok(meta) if meta.is_dir() && meta.uid() != nix::unistd::geteuid().as_raw() => {
            return Err(refused(
                format!("{} belongs to another user", folder.display()),
                "Choose a folder of this user with --scratch, or one that is not there yet.",
            ));
        }
        Ok(meta) if meta.is_dir() => return Ok(false),
        Ok(_) => {
            return Err(refused(
                format!("{} is not a folder", folder.display()),
                "Choose a folder with --scratch: empty, or not there yet.",
            ));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(Error::from_io(format!("looking at {}", folder.display()), error)),
    }
    if let Some(parent) = folder.parent() {
        DirBuilder::new().recursive(true).mode(0o755).create(parent).map_err(failed)?;
    }
    match DirBuilder::new().mode(0o700).create(folder) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(failed(error)),
    }
}

/// Makes and locks the marker, or locks the one that is there and returns what it says. `None`: whoever had it removed
/// it at this moment.
fn lock_marker(folder: &Path) -> Result<Option<(Flock<File>, Option<Marker>)>> {
    let path = folder.join(MARKER);
    let failed = |error| Error::from_io(format!("making {}", path.display()), error);
    if !path.exists() {
        check_nothing_else(folder)?;
    }
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
    let file = match file {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(failed)?,
    };
    let mut file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(file) => file,
        Err((_, Errno::EWOULDBLOCK)) => return Err(in_use(folder)),
        Err((_, error)) => return Err(failed(error.into())),
    };
    let own = file.metadata().map_err(failed)?;
    let same = fs::metadata(&path).is_ok_and(|meta| (meta.dev(), meta.ino()) == (own.dev(), own.ino()));
    if !same {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    io::Read::by_ref(&mut *file).take(MARKER_BYTES_MAX).read_to_end(&mut bytes).map_err(failed)?;
    let marker = serde_json::from_slice::<Marker>(&bytes).ok().filter(Marker::is_sound);
    if marker.is_none() {
        // It is the first thing that is written: whoever was killed while writing it wrote nothing else.
        check_nothing_else(folder)?;
    }
    Ok(Some((file, marker)))
}

impl Marker {
    /// Returns whether it is one that this program writes: it names what is going to be removed.
    fn is_sound(&self) -> bool {
        let socket = self.socket_dir.as_ref().is_none_or(|socket| {
            socket.is_absolute()
                && socket.file_name().is_some_and(|name| name == &*socket_folder_name(&self.id))
        });
        self.format == 1
            && self.id.len() == 16
            && self.id.bytes().all(|byte| byte.is_ascii_hexdigit())
            && socket
    }
}

/// Refuses a folder that holds anything but a marker.
fn check_nothing_else(folder: &Path) -> Result<()> {
    let left = entries(folder)?;
    match left.iter().find(|name| *name != MARKER) {
        None => Ok(()),
        Some(name) => Err(refused(
            format!("{} is not empty: it holds {name:?}", folder.display()),
            "Choose a folder of its own with --scratch: empty, or not there yet.",
        )),
    }
}

fn entries(folder: &Path) -> Result<Vec<String>> {
    let failed = |error| Error::from_io(format!("reading {}", folder.display()), error);
    let names = fs::read_dir(folder).map_err(failed)?.map(|entry| entry.map(|entry| entry.file_name()));
    let names: Vec<_> = names.collect::<io::Result<_>>().map_err(failed)?;
    Ok(names.iter().map(|name| name.to_string_lossy().into_owned()).collect())
}

fn write_marker(file: &mut File, marker: &Marker, folder: &Path) -> Result<()> {
    let failed = |error| Error::from_io(format!("writing {MARKER} in {}", folder.display()), error);
    let text = serde_json::to_vec(marker)
        .map_err(|error| Error::local_io(format!("{MARKER} cannot be written as JSON: {error}")))?;
    file.set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| file.write_all(&text))
        .and_then(|()| file.sync_all())
        .and_then(|()| File::open(folder)?.sync_all())
        .map_err(failed)
}

fn socket_folder_name(id: &str) -> String {
    format!("walship-socket-{id}")
}

/// Returns a folder for the server's socket, where the scratch folder's path is too long for one.
fn socket_elsewhere(folder: &Path, id: &str) -> Result<Option<PathBuf>> {
    let fits =
        |socket: &Path| socket.join(SOCKET_NAME).as_os_str().as_encoded_bytes().len() <= SOCKET_PATH_MAX;
    if fits(&folder.join("socket")) {
        return Ok(None);
    }
    let elsewhere = env::temp_dir().join(socket_folder_name(id));
    match elsewhere.is_absolute() && fits(&elsewhere) {
        true => Ok(Some(elsewhere)),
        false => Err(refused(
            format!("the path {} is too long for a socket, and so is that of TMPDIR", folder.display()),
            "Choose a folder with a shorter path with --scratch.",
        )),
    }
}

/// Ends the server of a marker and removes everything but the marker; returns how many processes were ended.
async fn remove_left(folder: &Path, marker: &Marker) -> Result<usize> {
    let processes = processes::end(&marker.server_name()).await?;
    let mut places: Vec<PathBuf> = ENTRIES.iter().map(|name| folder.join(name)).collect();
    places.extend(marker.socket_dir.clone());
    // Of a restore that was broken off nothing is to come to be behind the clean-up.
    let begun = Instant::now();
    while !threads_are_done() && begun.elapsed() < REMOVE_PATIENCE {
        tokio::time::sleep(REMOVE_EVERY).await;
    }
    blocking(move || {
        let begun = Instant::now();
        for place in places {
            while let Err(error) = remove(&place) {
                if begun.elapsed() > REMOVE_PATIENCE {
                    return Err(Error::from_io(format!("removing {}", place.display()), error)
                        .with_safe("the repository and every other folder are as they were")
                        .with_next("See why, then run this again: it removes what is left."));
                }
                std::thread::sleep(REMOVE_EVERY);
            }
        }
        Ok(())
    })
    .await?;
    Ok(processes)
}

/// Removes a file or a folder with everything in it; links are removed, not followed.
fn remove(place: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(place) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(place),
        Ok(_) => fs::remove_file(place),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound && fs::symlink_metadata(place).is_err() => {
            Ok(())
        }
        other => other,
    }
}

/// Removes the marker, and the folder when it was made for it; returns what is left in it.
fn remove_marker(folder: &Path, folder_made: bool) -> Result<Vec<String>> {
    let failed = |error| Error::from_io(format!("removing {}", folder.display()), error);
    let left: Vec<String> = entries(folder)?.into_iter().filter(|name| name != MARKER).collect();
    fs::remove_file(folder.join(MARKER)).map_err(failed)?;
    if folder_made && left.is_empty() {
        // Somebody who takes the folder at this moment has put a marker into it: then it is theirs.
        match fs::remove_dir(folder) {
            Err(error) if error.kind() != io::ErrorKind::DirectoryNotEmpty => return Err(failed(error)),
            _ => {}
        }
    }
    Ok(left)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn says(taken: Result<(Scratch, Option<String>)>) -> String {
        match taken {
            Err(error @ Error::Invalid(_)) => error.report(),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_scratch_folder_is_one_programs_and_goes_with_it() {
        let home = tempfile::tempdir().unwrap();
        let folder = home.path().join("a/scratch");
        let (scratch, note) = Scratch::take(&folder, "drill").await.unwrap();
        assert_eq!(note, None);
        assert!(says(Scratch::take(&folder, "drill").await).contains("at work"));
        fs::create_dir_all(scratch.data_dir().join("base/1")).unwrap();
        fs::write(scratch.data_dir().join("base/1/2"), "x").unwrap();
        assert_eq!(scratch.remove().await.unwrap(), Removed { processes: 0, left: Vec::new() });
        assert!(!folder.exists() && home.path().join("a").exists());
        // One that was there stays, empty.
        fs::create_dir(&folder).unwrap();
        let (scratch, _) = Scratch::take(&folder, "drill").await.unwrap();
        scratch.remove().await.unwrap();
        assert_eq!(entries(&folder).unwrap(), Vec::<String>::new());
    }

    #[tokio::test]
    async fn what_a_killed_one_left_is_removed_and_nothing_else() {
        let home = tempfile::tempdir().unwrap();
        let folder = home.path().join("scratch");
        let outside = home.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("precious"), "x").unwrap();
        let leave = async || {
            let (scratch, _) = Scratch::take(&folder, "drill").await.unwrap();
            fs::create_dir_all(scratch.data_dir().join("pg_tblspc")).unwrap();
            std::os::unix::fs::symlink(&outside, scratch.data_dir().join("pg_tblspc/1")).unwrap();
            drop(scratch);
        };
        leave().await;
        let (scratch, note) = Scratch::take(&folder, "extract").await.unwrap();
        assert!(note.unwrap().contains("what a drill of"));
        assert!(!scratch.data_dir().exists() && outside.join("precious").exists());
        scratch.remove().await.unwrap();
        assert!(!folder.exists());
        // What somebody else put there is a reason to stop, before and afterwards.
        leave().await;
        fs::write(folder.join("notes.txt"), "x").unwrap();
        assert!(says(Scratch::take(&folder, "drill").await).contains("notes.txt"));
        assert!(folder.join("notes.txt").exists());
    }

    #[tokio::test]
    async fn folders_of_others_are_refused() {
        let home = tempfile::tempdir().unwrap();
        let data = home.path().join("data");
        fs::create_dir(&data).unwrap();
        fs::write(data.join("PG_VERSION"), "15\n").unwrap();
        for place in [data.clone(), data.join("base/scratch")] {
            assert!(says(Scratch::take(&place, "drill").await).contains("data directory"));
        }
        let full = home.path().join("full");
        fs::create_dir(&full).unwrap();
        fs::write(full.join("x"), "").unwrap();
        assert!(says(Scratch::take(&full, "drill").await).contains("not empty"));
        assert!(says(Scratch::take(&full.join("x"), "drill").await).contains("not a folder"));
        // Left on purpose, or elsewhere.
        let kept = home.path().join("kept");
        let (scratch, _) = Scratch::take(&kept, "drill").await.unwrap();
        assert!(scratch.keep().unwrap().starts_with("rm -r "));
        assert!(says(Scratch::take(&kept, "drill").await).contains("--keep"));
        let marker =
            fs::read_to_string(kept.join(MARKER)).unwrap().replace("\"kept\":true", "\"kept\":false");
        let host = RecordedBy::now().host;
        let marker = marker.replace(&format!("\"host\":\"{host}\""), "\"host\":\"other\"");
        fs::write(kept.join(MARKER), &marker).unwrap();
        assert!(says(Scratch::take(&kept, "drill").await).contains("on other"));
        // A marker that would have something else removed is none.
        let hostile = marker.replace("\"socket_dir\":null", "\"socket_dir\":\"/etc\"");
        fs::write(kept.join(MARKER), hostile).unwrap();
        assert!(says(Scratch::take(&kept, "drill").await).contains("not empty"));
        assert!(kept.join("socket").exists());
    }

    #[tokio::test]
    async fn a_socket_has_a_short_path_wherever_the_folder_is() {
        let home = tempfile::tempdir().unwrap();
        let folder = home.path().join("x".repeat(100));
        let (scratch, _) = Scratch::take(&folder, "drill").await.unwrap();
        let socket = scratch.socket_dir();
        assert!(!socket.starts_with(&folder) && socket.is_dir());
        drop(scratch);
        let (scratch, _) = Scratch::take(&folder, "drill").await.unwrap();
        assert!(!socket.exists());
        let socket = scratch.socket_dir();
        scratch.remove().await.unwrap();
        assert!(!socket.exists());
    }
}
