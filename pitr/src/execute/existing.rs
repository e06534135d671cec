//! A data directory that a restore goes over: whether it may, and what of it must go.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use chrono::{DateTime, Utc};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::kill;
use nix::unistd::{AccessFlags, Pid, access};
use walship::pg::Oid;
use walship::pg::control::ControlData;
use walship::{Error, Result};

use super::restore::{INCOMPLETE_MARKER, make_private};
use super::unpack::{CONTROL_FILE, Destination};

/// The folders of a data directory in which everything is PostgreSQL's. Not `pg_wal`, and no other whose name begins so:
/// it may be the operator's.
pub(super) const OWN_FOLDERS: &[&str] = &[
    "base",
    "global",
    "pg_commit_ts",
    "pg_dynshmem",
    "pg_logical",
    "pg_multixact",
    "pg_notify",
    "pg_replslot",
    "pg_serial",
    "pg_snapshots",
    "pg_stat",
    "pg_stat_tmp",
    "pg_subtrans",
    "pg_tblspc",
    "pg_twophase",
    "pg_xact",
];

/// Files beside the data that tell PostgreSQL what it is to do; the backup's own are kept.
const STATE_FILES: &[&str] = &[
    "backup_label",
    "backup_label.old",
    "tablespace_map",
    "tablespace_map.old",
    "backup_manifest",
    "recovery.signal",
    "standby.signal",
    "postmaster.pid",
    "postmaster.opts",
];

/// What the names of the thin commands' own files begin with.
const OWN_FILES: &str = "pgsql_tmp_walship_";

/// What a folder in `pg_wal` is called that holds the WAL from before a restore.
pub(super) const OLD_WAL: &str = "walship-before-";

/// What stands behind the name of a folder that was set aside, before the time.
const SET_ASIDE: &str = ".before-";

/// What a restore has done to what was there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Cleared {
    /// Files removed: the backup does not have them.
    pub(super) removed: u64,
    /// Where WAL was set aside, when there was any.
    pub(super) old_wal: Option<PathBuf>,
    /// Other folders that were set aside, under their new names: the server's logs, for one, which the backup has as they
    /// were.
    pub(super) set_aside: Vec<PathBuf>,
}

/// A data directory that no other restore may touch, until this is dropped.
#[derive(Debug)]
pub(super) struct Locked {
    _folder: Flock<File>,
}

/// Locks a data directory against other restores. The kernel lets go of it when the program ends, however it does.
///
/// # Errors
/// [`Error::Invalid`] while another restore is at work on it.
pub(super) fn lock(data_dir: &Path) -> Result<Locked> {
    let failed = |error| Error::from_io(format!("locking {}", data_dir.display()), error);
    let folder = File::open(data_dir).map_err(failed)?;
    match Flock::lock(folder, FlockArg::LockExclusiveNonblock) {
        Ok(folder) => Ok(Locked { _folder: folder }),
        Err((_, Errno::EWOULDBLOCK)) => {
            Err(Error::invalid(format!("another restore is at work on {}", data_dir.display()))
                .with_safe("nothing was written by this one")
                .with_next("Wait for it, or stop it and run this one again."))
        }
        Err((_, error)) => Err(failed(error.into())),
    }
}

/// Returns whether there is a data directory to go over; `false` where the folder is empty or not there.
///
/// # Errors
/// [`Error::Invalid`] for a folder that is no data directory, and while a server runs on it; [`Error::Mismatch`] for
/// another cluster's.
pub(super) fn check(data_dir: &Path, system_identifier: u64) -> Result<bool> {
    let refused = |what: String, next: &str| {
        Err(Error::invalid(what).with_safe("nothing was written").with_next(next.to_owned()))
    };
    match fs::symlink_metadata(data_dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(Error::from_io(format!("looking at {}", data_dir.display()), error)),
        Ok(meta) if !meta.is_dir() => {
            return refused(
                format!("{} is not a folder", data_dir.display()),
                "Name the data directory itself, not a link to it.",
            );
        }
        Ok(_) => {}
    }
    check_stopped(data_dir)?;
    let control = match fs::read(data_dir.join(CONTROL_FILE)) {
        Ok(bytes) => ControlData::parse(&bytes).map_err(|error| {
            Error::from(error).with_safe("nothing was written").with_next(
                "Whose directory it is cannot be told. Move it away and restore into a new one, or remove its \
                 global/pg_control and everything else yourself.",
            )
        })?,
        Err(error) if error.kind() == io::ErrorKind::NotFound && data_dir.join(INCOMPLETE_MARKER).exists() => {
            return Ok(true);
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let mut entries = fs::read_dir(data_dir)
                .map_err(|error| Error::from_io(format!("reading {}", data_dir.display()), error))?;
            return match entries.next() {
                None => Ok(false),
                Some(_) => refused(
                    format!(
                        "{} is not empty, and no data directory: it has no {CONTROL_FILE}",
                        data_dir.display()
                    ),
                    "Name the data directory to restore over, or one that is empty or does not exist.",
                ),
            };
        }
        Err(error) => {
            return Err(Error::from_io(format!("reading {CONTROL_FILE} in {}", data_dir.display()), error));
        }
    };
    match control.system_identifier == system_identifier {
        true => Ok(true),
        false => Err(Error::mismatch(format!(
            "{} belongs to another cluster: its system identifier is {}, the backup's {system_identifier}",
            data_dir.display(),
            control.system_identifier
        ))
        .with_safe("nothing was written")
        .with_next("Name the data directory of the cluster that is restored, or one that is empty.")),
    }
}

/// Returns a folder with the name that it gets when it is set aside, beside itself.
///
/// # Errors
/// [`Error::Invalid`] for a folder that cannot be renamed.
pub(super) fn name_aside(folder: &Path, now: DateTime<Utc>) -> Result<(PathBuf, PathBuf)> {
    let cannot = |why: &str| {
        Error::invalid(format!("{} cannot be set aside: {why}", folder.display()))
            .with_safe("nothing was written")
            .with_next("Use --delta, move it away yourself, or restore into other folders.")
    };
    let looked_at = |path: &Path| {
        fs::symlink_metadata(path)
            .map_err(|error| Error::from_io(format!("looking at {}", path.display()), error))
    };
    let (Some(name), Some(parent)) = (folder.file_name(), folder.parent()) else {
        return Err(cannot("it has no folder above it"));
    };
    let (own, above) =
        (looked_at(folder)?, looked_at(&fs::canonicalize(parent).unwrap_or(parent.to_owned()))?);
    if !own.is_dir() {
        return Err(cannot("it is a link"));
    }
    if own.dev() != above.dev() {
        return Err(cannot("a file system is mounted there"));
    }
    if access(parent, AccessFlags::W_OK).is_err() {
        return Err(cannot("the folder above it cannot be written to"));
    }
    let mut aside = name.to_owned();
    aside.push(before(now));
    Ok((folder.to_owned(), parent.join(aside)))
}

/// Gives folders the names that [`name_aside`] found, all of them or none: the first one, the data directory, last. Its links
/// lead to where its tablespaces are then.
///
/// # Errors
/// [`Error::LocalIo`] when one cannot be renamed; those that were have their names again.
/// # Durability
/// The new names survive a crash.
pub(super) fn set_aside(folders: &[(PathBuf, PathBuf)]) -> Result<()> {
    let mut done: Vec<&(PathBuf, PathBuf)> = Vec::new();
    for pair in folders.iter().rev() {
        let (folder, aside) = pair;
        if let Err(error) = fs::rename(folder, aside) {
            let back = done.iter().rev().all(|(folder, aside)| fs::rename(aside, folder).is_ok());
            let error = Error::from_io(format!("setting {} aside", folder.display()), error);
            let names: Vec<String> = done.iter().map(|(_, aside)| aside.display().to_string()).collect();
            return Err(match back {
                true => error.with_safe("nothing was changed: every folder has its old name"),
                false => error.with_safe(format!("nothing was removed; look for {}", names.join(" and "))),
            });
        }
        done.push(pair);
    }
    let Some(((_, data_dir), spaces)) = folders.split_first() else { return Ok(()) };
    for (_, link) in entries(&data_dir.join("pg_tblspc"))? {
        let place = fs::read_link(&link).ok();
        if let Some((_, aside)) = spaces.iter().find(|(folder, _)| Some(folder) == place.as_ref()) {
            fs::remove_file(&link)
                .and_then(|()| symlink(aside, &link))
                .map_err(|error| Error::from_io(format!("leading {} elsewhere", link.display()), error))?;
        }
    }
    for (_, aside) in folders {
        let parent = aside.parent().unwrap_or(Path::new("/"));
        File::open(parent)
            .and_then(|parent| parent.sync_all())
            .map_err(|error| Error::from_io(format!("syncing {}", parent.display()), error))?;
    }
    Ok(())
}

/// Fails while a server runs on a data directory.
///
/// # Errors
/// [`Error::Invalid`].
pub(super) fn check_stopped(data_dir: &Path) -> Result<()> {
    match running(data_dir)? {
        None => Ok(()),
        Some(pid) => Err(Error::invalid(format!("a server runs on {} (process {pid})", data_dir.display()))
            .with_safe("nothing was written")
            .with_next(
                "Stop it first: pg_ctl stop. If process and server are not the same, remove postmaster.pid.",
            )),
    }
}

/// Returns the process id, in its own container, of a server that runs on a data directory.
pub(super) fn running(data_dir: &Path) -> Result<Option<i32>> {
    let path = data_dir.join("postmaster.pid");
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::from_io(format!("reading {}", path.display()), error)),
    };
    // In another container its process cannot be seen, but perhaps its socket.
    let line = |number| text.lines().nth(number).unwrap_or_default().trim();
    let socket = Path::new(line(4)).join(format!(".s.PGSQL.{}", line(3)));
    let answers = socket.is_absolute() && UnixStream::connect(&socket).is_ok();
    let pid = text.lines().next().and_then(|line| line.trim().parse::<i32>().ok());
    // A server without a postmaster (postgres --single) writes its id with a minus.
    let pid = pid.map(i32::saturating_abs);
    // What another user's process is cannot be told, and it is there.
    let is_there = |pid: &i32| *pid > 0 && (answers || kill(Pid::from_raw(*pid), None) != Err(Errno::ESRCH));
    Ok(pid.filter(is_there))
}

/// Returns whether a tablespace's folder is the one that the data directory's own link leads to.
pub(super) fn is_linked(data_dir: &Path, oid: Oid, path: &Path) -> bool {
    fs::read_link(data_dir.join("pg_tblspc").join(oid.to_string())).is_ok_and(|place| place == path)
}

/// Makes a marked data directory ready for the backup's files: WAL is set aside, files that the backup does not have and
/// that PostgreSQL would read are removed, and links lead to where the tablespaces go. What is not PostgreSQL's stays.
/// `cleared` says what was done, also after an error.
///
/// # Errors
/// [`Error::LocalIo`].
pub(super) fn clear(
    data_dir: &Path,
    tablespaces: &BTreeMap<Oid, PathBuf>,
    destination: &Destination,
    now: DateTime<Utc>,
    cleared: &mut Cleared,
) -> Result<()> {
    set_wal_aside(&data_dir.join("pg_wal"), now, &mut cleared.old_wal)?;
    for (name, path) in entries(data_dir)? {
        let is_folder = fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_dir());
        if name.starts_with(OWN_FILES) {
            let removed = if is_folder { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(|error| Error::from_io(format!("removing {}", path.display()), error))?;
        } else if STATE_FILES.contains(&&*name) {
            cleared.remove_unless_listed(Path::new(&name), &path, destination)?;
        } else if is_folder && OWN_FOLDERS.contains(&&*name) {
            cleared.folder(Path::new(&name), &path, destination)?;
        } else if is_folder && destination.lists_below(Path::new(&name)) {
            let aside = path.with_file_name(format!("{name}{}", before(now)));
            fs::rename(&path, &aside)
                .map_err(|error| Error::from_io(format!("setting {} aside", path.display()), error))?;
            cleared.set_aside.push(aside);
        }
    }
    for (oid, place) in tablespaces {
        let listed = Path::new("pg_tblspc").join(oid.to_string());
        for (name, path) in entries(place)? {
            // Another version's folder is another cluster's, perhaps the one from before an upgrade.
            let is_folder = fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_dir());
            if is_folder && destination.lists_below(&listed.join(&name)) {
                cleared.folder(&listed.join(&name), &path, destination)?;
            }
        }
    }
    link_tablespaces(data_dir, tablespaces)
}

/// What the names of what is set aside end with.
fn before(now: DateTime<Utc>) -> String {
    format!("{SET_ASIDE}{}", now.format("%Y%m%dT%H%M%SZ"))
}

impl Cleared {
    /// Removes what is in a folder and not in the backup, and folders that become empty.
    fn folder(&mut self, listed: &Path, path: &Path, destination: &Destination) -> Result<()> {
        for (name, path) in entries(path)? {
            let listed = listed.join(&name);
            let meta = fs::symlink_metadata(&path)
                .map_err(|error| Error::from_io(format!("looking at {}", path.display()), error))?;
            if meta.is_dir() {
                self.folder(&listed, &path, destination)?;
                // It is made again where the backup has it; one that is not empty stays.
                let _ = fs::remove_dir(&path);
            } else if !(meta.is_symlink() && listed.parent() == Some(Path::new("pg_tblspc"))) {
                self.remove_unless_listed(&listed, &path, destination)?;
            }
        }
        Ok(())
    }

    fn remove_unless_listed(&mut self, listed: &Path, path: &Path, destination: &Destination) -> Result<()> {
        if destination.is_expected(listed) {
            return Ok(());
        }
        fs::remove_file(path)
            .map_err(|error| Error::from_io(format!("removing {}", path.display()), error))?;
        self.removed += 1;
        Ok(())
    }
}

/// Returns the folders of a data directory, and of those that were set aside beside it, that may hold WAL from before
/// restores: each `pg_wal`, and what was set aside in it. Beside them what could not be looked into.
pub(crate) fn wal_folders(data_dir: &Path) -> (Vec<PathBuf>, Vec<Error>) {
    let data_dir = std::path::absolute(data_dir).unwrap_or_else(|_| data_dir.to_owned());
    let (mut found, mut unreadable) = (Vec::new(), Vec::new());
    let mut data_dirs = vec![data_dir.clone()];
    if let (Some(name), Some(parent)) = (data_dir.file_name(), data_dir.parent()) {
        match folders(parent, &format!("{}{SET_ASIDE}", name.to_string_lossy())) {
            Ok(beside) => data_dirs.extend(beside),
            Err(error) => unreadable.push(error),
        }
    }
    for pg_wal in data_dirs.iter().map(|dir| dir.join("pg_wal")) {
        match fs::metadata(&pg_wal) {
            Ok(meta) if meta.is_dir() => match old_wal(&pg_wal) {
                Ok(old) => found.extend(std::iter::once(pg_wal).chain(old)),
                Err(error) => unreadable.push(error),
            },
            Err(error) if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                unreadable.push(Error::from_io(format!("looking at {}", pg_wal.display()), error));
            }
            _ => {}
        }
    }
    (found, unreadable)
}

/// Returns the folders in a `pg_wal` that hold WAL from before restores.
///
/// # Errors
/// [`Error::LocalIo`] and [`Error::Denied`] for a folder that cannot be read.
pub(crate) fn old_wal(pg_wal: &Path) -> Result<Vec<PathBuf>> {
    folders(pg_wal, OLD_WAL)
}

/// Returns the folders in one whose names begin so, those with the latest names first.
fn folders(parent: &Path, prefix: &str) -> Result<Vec<PathBuf>> {
    let mut found = entries(parent)?;
    found.retain(|(name, path)| name.starts_with(prefix) && path.is_dir());
    found.sort_unstable_by(|a, b| b.cmp(a));
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

/// Moves what is in `pg_wal` into a folder of its own there, and says where. It may be the only copy of the last
/// transactions.
fn set_wal_aside(pg_wal: &Path, now: DateTime<Utc>, old_wal: &mut Option<PathBuf>) -> Result<()> {
    let found: Vec<_> = match fs::symlink_metadata(pg_wal) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        _ => entries(pg_wal)?.into_iter().filter(|(name, _)| !name.starts_with(OLD_WAL)).collect(),
    };
    let has_files = found.iter().any(|(_, path)| path.is_file());
    if !has_files {
        return Ok(());
    }
    let aside = pg_wal.join(format!("{OLD_WAL}{}", now.format("%Y%m%dT%H%M%S%.6fZ")));
    make_private(&aside)?;
    *old_wal = Some(aside.clone());
    // In both places first: broken off at any moment, one of them has all of it. What cannot be linked is renamed below.
    let link =
        |(name, path): &(String, PathBuf)| path.is_file() && fs::hard_link(path, aside.join(name)).is_ok();
    let linked: Vec<bool> = found.iter().map(link).collect();
    File::open(&aside)
        .and_then(|aside| aside.sync_all())
        .map_err(|error| Error::from_io(format!("syncing {}", aside.display()), error))?;
    for ((name, path), is_linked) in found.into_iter().zip(linked) {
        let moved = if is_linked { fs::remove_file(&path) } else { fs::rename(&path, aside.join(&name)) };
        moved.map_err(|error| Error::from_io(format!("setting {} aside", path.display()), error))?;
    }
    Ok(())
}

fn link_tablespaces(data_dir: &Path, tablespaces: &BTreeMap<Oid, PathBuf>) -> Result<()> {
    let links = data_dir.join("pg_tblspc");
    if fs::symlink_metadata(&links).is_ok_and(|meta| meta.is_symlink()) {
        fs::remove_file(&links)
            .map_err(|error| Error::from_io(format!("removing {}", links.display()), error))?;
    }
    make_private(&links)?;
    for (name, path) in entries(&links)? {
        let oid = name.parse::<Oid>().ok();
        let is_right =
            oid.is_some_and(|oid| tablespaces.get(&oid).is_some_and(|place| is_linked(data_dir, oid, place)));
        let is_link = fs::symlink_metadata(&path).is_ok_and(|meta| meta.file_type().is_symlink());
        if is_link && !is_right {
            fs::remove_file(&path)
                .map_err(|error| Error::from_io(format!("removing {}", path.display()), error))?;
        }
    }
    for (oid, place) in tablespaces {
        make_private(place)?;
        if !is_linked(data_dir, *oid, place) {
            symlink(place, links.join(oid.to_string()))
                .map_err(|error| Error::from_io(format!("linking tablespace {oid}"), error))?;
        }
    }
    Ok(())
}

/// Returns what is in a folder, by name; nothing where there is no such folder. Sockets are left out.
pub(super) fn entries(folder: &Path) -> Result<Vec<(String, PathBuf)>> {
    let failed = |error| Error::from_io(format!("reading {}", folder.display()), error);
    let listing = match fs::read_dir(folder) {
        Ok(listing) => listing,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut found = Vec::new();
    for entry in listing {
        let entry = entry.map_err(failed)?;
        if !entry.file_type().map_err(failed)?.is_socket() {
            found.push((entry.file_name().to_string_lossy().into_owned(), entry.path()));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_folders_are_set_aside_or_none_and_links_follow() {
        let home = tempfile::tempdir().unwrap();
        let (data, space) = (home.path().join("data"), home.path().join("space"));
        fs::create_dir_all(data.join("pg_tblspc")).unwrap();
        fs::create_dir(&space).unwrap();
        symlink(&space, data.join("pg_tblspc/16400")).unwrap();
        let names = [&data, &space].map(|folder| name_aside(folder, DateTime::UNIX_EPOCH).unwrap());
        fs::write(&names[0].1, "in the way").unwrap();
        let error = set_aside(&names).unwrap_err();
        assert!(error.safe().contains("every folder has its old name"), "{error:?}");
        assert!(data.is_dir() && space.is_dir() && !names[1].1.exists());
        fs::remove_file(&names[0].1).unwrap();
        set_aside(&names).unwrap();
        assert_eq!(fs::read_link(names[0].1.join("pg_tblspc/16400")).unwrap(), names[1].1);
        assert!(!data.exists() && !space.exists());
        symlink(&names[0].1, &data).unwrap();
        assert!(name_aside(&data, DateTime::UNIX_EPOCH).is_err(), "a link");
    }

    #[test]
    fn one_restore_at_a_time() {
        let home = tempfile::tempdir().unwrap();
        let first = lock(home.path()).unwrap();
        assert!(lock(home.path()).unwrap_err().to_string().contains("another restore"));
        drop(first);
        lock(home.path()).unwrap();
    }

    #[test]
    fn wal_is_set_aside_once_and_never_removed() {
        let set_wal_aside = |wal: &Path, now| {
            let mut old_wal = None;
            set_wal_aside(wal, now, &mut old_wal).map(|()| old_wal)
        };
        let home = tempfile::tempdir().unwrap();
        let wal = home.path().join("pg_wal");
        assert_eq!(set_wal_aside(&wal, DateTime::UNIX_EPOCH).unwrap(), None);
        fs::create_dir_all(wal.join("archive_status")).unwrap();
        assert_eq!(set_wal_aside(&wal, DateTime::UNIX_EPOCH).unwrap(), None, "there is no WAL");
        fs::write(wal.join("000000010000000000000001"), b"precious").unwrap();
        fs::write(wal.join("archive_status/000000010000000000000001.ready"), b"").unwrap();
        let aside = set_wal_aside(&wal, DateTime::UNIX_EPOCH).unwrap().unwrap();
        assert_eq!(fs::read(aside.join("000000010000000000000001")).unwrap(), b"precious");
        assert!(aside.join("archive_status/000000010000000000000001.ready").exists());
        assert_eq!(set_wal_aside(&wal, Utc::now()).unwrap(), None, "what was set aside stays where it is");
        // It is found again, also when the whole directory was set aside since, and what is newer comes first.
        fs::write(wal.join("000000010000000000000002"), b"later").unwrap();
        let later = set_wal_aside(&wal, Utc::now()).unwrap().unwrap();
        assert_eq!(wal_folders(home.path()).0, [wal, later.clone(), aside.clone()]);
        let data = home.path().join("data");
        fs::create_dir(&data).unwrap();
        fs::rename(home.path().join("pg_wal"), data.join("pg_wal")).unwrap();
        set_aside(&[name_aside(&data, DateTime::UNIX_EPOCH).unwrap()]).unwrap();
        fs::create_dir(home.path().join("data.before")).unwrap();
        let (found, unreadable) = wal_folders(&data);
        assert!(unreadable.is_empty(), "{unreadable:?}");
        let names = |path: &PathBuf| path.strip_prefix(home.path()).unwrap().to_str().unwrap().to_owned();
        let moved = "data.before-19700101T000000Z/pg_wal";
        let inside = |folder: &Path| format!("{moved}/{}", folder.file_name().unwrap().to_str().unwrap());
        assert_eq!(
            found.iter().map(names).collect::<Vec<_>>(),
            [moved.to_owned(), inside(&later), inside(&aside)]
        );
    }

    #[test]
    fn only_a_data_directory_of_the_same_cluster_that_nobody_runs_on_is_gone_over() {
        let home = tempfile::tempdir().unwrap();
        let data = home.path().join("data");
        assert!(!check(&data, 7).unwrap());
        fs::create_dir_all(data.join("global")).unwrap();
        fs::remove_dir(data.join("global")).unwrap();
        assert!(!check(&data, 7).unwrap());
        fs::write(data.join("precious"), b"x").unwrap();
        assert!(matches!(check(&data, 7), Err(Error::Invalid(_))));
        fs::write(data.join(INCOMPLETE_MARKER), b"").unwrap();
        assert!(check(&data, 7).unwrap());
        fs::write(data.join("postmaster.pid"), format!("{}\n", std::process::id())).unwrap();
        assert!(check(&data, 7).unwrap_err().to_string().contains("a server runs"));
        fs::write(data.join("postmaster.pid"), format!("-{}\n", std::process::id())).unwrap();
        assert!(check(&data, 7).is_err(), "a server without a postmaster");
        let socket = home.path().join(".s.PGSQL.5432");
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let file = format!("999999999\n{}\n0\n5432\n{}\n", data.display(), home.path().display());
        fs::write(data.join("postmaster.pid"), file).unwrap();
        assert!(check(&data, 7).is_err(), "a server in another container");
        drop(listener);
        assert!(check(&data, 7).unwrap());
    }
}
