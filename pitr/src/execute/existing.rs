//! A data directory that a restore goes over: whether it may, and what of it must go.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, symlink};
use std::path::{Path, PathBuf};

use chrono::{DateTime, Utc};
use nix::sys::signal::kill;
use nix::unistd::Pid;
use walship::pg::Oid;
use walship::pg::control::ControlData;
use walship::{Error, Result};

use super::restore::{INCOMPLETE_MARKER, make_private};
use super::unpack::{CONTROL_FILE, Destination, is_version_folder};

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
const OLD_WAL: &str = "walship-before-";

/// What a restore has done to what was there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Cleared {
    /// Files removed: the backup does not have them.
    pub(super) removed: u64,
    /// Where WAL was set aside, when there was any.
    pub(super) old_wal: Option<PathBuf>,
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
    if let Some(pid) = running(data_dir)? {
        return refused(
            format!("a server runs on {} (process {pid})", data_dir.display()),
            "Stop it first: pg_ctl stop. If process and server are not the same, remove postmaster.pid.",
        );
    }
    if data_dir.join(INCOMPLETE_MARKER).exists() {
        return Ok(true);
    }
    let control = match fs::read(data_dir.join(CONTROL_FILE)) {
        Ok(bytes) => ControlData::parse(&bytes)?,
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
/// [`Error::Invalid`] for a folder that cannot be renamed: the root of a file system.
pub(super) fn name_aside(folder: &Path, now: DateTime<Utc>) -> Result<(PathBuf, PathBuf)> {
    let cannot = || {
        Error::invalid(format!("{} cannot be set aside: a file system is mounted there", folder.display()))
            .with_safe("nothing was written")
            .with_next("Use --delta, or restore into another folder.")
    };
    let name = folder.file_name().ok_or_else(cannot)?;
    let parent = folder.parent().ok_or_else(cannot)?;
    let device = |path: &Path| {
        fs::metadata(path)
            .map(|meta| meta.dev())
            .map_err(|error| Error::from_io(format!("looking at {}", path.display()), error))
    };
    if device(folder)? != device(parent)? {
        return Err(cannot());
    }
    let mut aside = name.to_owned();
    aside.push(now.format(".before-%Y%m%dT%H%M%SZ").to_string());
    Ok((folder.to_owned(), parent.join(aside)))
}

/// Gives folders the names that [`name_aside`] found.
///
/// # Durability
/// The new names survive a crash.
pub(super) fn set_aside(folders: &[(PathBuf, PathBuf)]) -> Result<()> {
    for (folder, aside) in folders {
        let failed = |error| Error::from_io(format!("setting {} aside", folder.display()), error);
        fs::rename(folder, aside).map_err(failed)?;
        if let Some(parent) = aside.parent() {
            fs::File::open(parent).and_then(|parent| parent.sync_all()).map_err(failed)?;
        }
    }
    Ok(())
}

/// Returns the process id of a server that runs on a data directory.
fn running(data_dir: &Path) -> Result<Option<i32>> {
    let path = data_dir.join("postmaster.pid");
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::from_io(format!("reading {}", path.display()), error)),
    };
    let pid = text.lines().next().and_then(|line| line.trim().parse::<i32>().ok());
    // What another user's process is cannot be told, and it is there.
    Ok(pid.filter(|pid| *pid > 0 && kill(Pid::from_raw(*pid), None) != Err(nix::errno::Errno::ESRCH)))
}

/// Returns whether a tablespace's folder is the one that the data directory's own link leads to.
pub(super) fn is_linked(data_dir: &Path, oid: Oid, path: &Path) -> bool {
    fs::read_link(data_dir.join("pg_tblspc").join(oid.to_string())).is_ok_and(|place| place == path)
}

/// Makes a marked data directory ready for the backup's files: WAL is set aside, files that the backup does not have and
/// that PostgreSQL would read are removed, and links lead to where the tablespaces go. What is not PostgreSQL's stays.
///
/// # Errors
/// [`Error::LocalIo`].
pub(super) fn clear(
    data_dir: &Path,
    tablespaces: &BTreeMap<Oid, PathBuf>,
    destination: &Destination,
    now: DateTime<Utc>,
) -> Result<Cleared> {
    let mut cleared = Cleared { removed: 0, old_wal: set_wal_aside(&data_dir.join("pg_wal"), now)? };
    for (name, path) in entries(data_dir)? {
        let is_folder = fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_dir());
        if name.starts_with(OWN_FILES) {
            let removed = if is_folder { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(|error| Error::from_io(format!("removing {}", path.display()), error))?;
        } else if STATE_FILES.contains(&&*name) {
            cleared.remove_unless_listed(Path::new(&name), &path, destination)?;
        } else if is_folder
            && name != "pg_wal"
            && (name.starts_with("pg_") || name == "base" || name == "global")
        {
            cleared.folder(Path::new(&name), &path, destination)?;
        }
    }
    for (oid, place) in tablespaces {
        let listed = Path::new("pg_tblspc").join(oid.to_string());
        for (name, path) in entries(place)? {
            if is_version_folder(&name) {
                cleared.folder(&listed.join(&name), &path, destination)?;
            }
        }
    }
    link_tablespaces(data_dir, tablespaces)?;
    Ok(cleared)
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

/// Moves what is in `pg_wal` into a folder of its own there. It may be the only copy of the last transactions.
fn set_wal_aside(pg_wal: &Path, now: DateTime<Utc>) -> Result<Option<PathBuf>> {
    let found: Vec<_> = match fs::symlink_metadata(pg_wal) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        _ => entries(pg_wal)?.into_iter().filter(|(name, _)| !name.starts_with(OLD_WAL)).collect(),
    };
    let has_files = found.iter().any(|(_, path)| path.is_file());
    if !has_files {
        return Ok(None);
    }
    let aside = pg_wal.join(format!("{OLD_WAL}{}", now.format("%Y%m%dT%H%M%S%.6fZ")));
    make_private(&aside)?;
    for (name, path) in found {
        fs::rename(&path, aside.join(&name))
            .map_err(|error| Error::from_io(format!("setting {} aside", path.display()), error))?;
    }
    Ok(Some(aside))
}

fn link_tablespaces(data_dir: &Path, tablespaces: &BTreeMap<Oid, PathBuf>) -> Result<()> {
    let links = data_dir.join("pg_tblspc");
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
fn entries(folder: &Path) -> Result<Vec<(String, PathBuf)>> {
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
    fn wal_is_set_aside_once_and_never_removed() {
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
        fs::write(data.join("postmaster.pid"), "999999999\n").unwrap();
        assert!(check(&data, 7).unwrap());
    }
}
