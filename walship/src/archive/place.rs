//! The data directory that a WAL file's path lies in, and which cluster it says it is.

use std::fs;
use std::io::{self, Read as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use crate::durable::folder_of;
use crate::error::{Error, Result};
use crate::pg::SegmentSize;
use crate::pg::control::ControlData;
#[cfg(feature = "store")]
use crate::repository::{ClusterRepository, LineageRepository};

/// More than anybody's `postgresql.auto.conf` holds.
const AUTO_CONF_BYTES_MAX: u64 = 4 << 20;

/// A PostgreSQL data directory, known from the path of a file in its `pg_wal`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataDirectory {
    path: PathBuf,
}

impl DataDirectory {
    /// Returns the data directory whose `pg_wal` holds (or will hold) the file at `path`; `None` when
    /// the file's folder has another name.
    ///
    /// `pg_wal` may be a link: the path's own words count, because they are what PostgreSQL says.
    pub fn of_wal_file(path: &Path) -> Option<Self> {
        let folder = path.parent()?;
        (folder.file_name()? == "pg_wal").then(|| Self { path: folder_of(folder).to_owned() })
    }

    /// Returns its path; `.` when PostgreSQL runs the command in it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the system identifier in its pg_control and, where this version is known, the segment
    /// size; `None` when there is no such file.
    ///
    /// Source: `src/include/catalog/pg_control.h`: the identifier comes first in every version.
    ///
    /// # Errors
    /// When the file is there but cannot be read, or holds no identifier: whose directory it is is not known.
    pub fn identity(&self) -> Result<Option<(u64, Option<SegmentSize>)>> {
        let path = self.path.join("global/pg_control");
        let failed = |error| Error::from_io(format!("reading {}", path.display()), error);
        let file = match fs::File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let mut bytes = Vec::new();
        file.take(ControlData::FILE_LEN as u64).read_to_end(&mut bytes).map_err(failed)?;
        match bytes.first_chunk().map(|first| u64::from_le_bytes(*first)) {
            Some(identifier) if identifier != 0 => {
                Ok(Some((identifier, ControlData::parse(&bytes).ok().map(|data| data.segment_size))))
            }
            _ => Err(Error::local_io(format!("{} holds no system identifier", path.display()))),
        }
    }

    /// Returns whether `postgresql.auto.conf`, where `pitr restore` writes it, gives recovery a target.
    ///
    /// # Errors
    /// When the file is there but cannot be read.
    pub fn has_recovery_target(&self) -> Result<bool> {
        let path = self.path.join("postgresql.auto.conf");
        let mut text = Vec::new();
        let read =
            fs::File::open(&path).and_then(|file| file.take(AUTO_CONF_BYTES_MAX).read_to_end(&mut text));
        match read {
            Ok(_) => Ok(sets_recovery_target(&String::from_utf8_lossy(&text))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(Error::from_io(format!("reading {}", path.display()), error)),
        }
    }
}

/// Returns whether a configuration gives recovery a target. PostgreSQL holds one at a time: the last line counts.
///
/// Source: `src/backend/access/transam/xlogrecovery.c`, assign_recovery_target and its siblings.
fn sets_recovery_target(text: &str) -> bool {
    let kinds = ["", "_name", "_time", "_xid", "_lsn"];
    let mut set = false;
    for line in text.lines() {
        let line = line.trim_start().to_ascii_lowercase();
        let Some(rest) = line.strip_prefix("recovery_target") else { continue };
        let (kind, value) =
            rest.split_at(rest.find(|c: char| c != '_' && !c.is_ascii_alphanumeric()).unwrap_or(rest.len()));
        if kinds.contains(&kind) {
            let value = value.trim_start_matches(|c: char| c == '=' || c.is_whitespace());
            set = !value.trim_start_matches('\'').trim_start().is_empty() && !value.starts_with("''");
        }
    }
    set
}

/// Returns this user's own folder for what is of no worth to anybody else: `state_dir`, or `walship-<uid>`
/// in the system's folder for temporary files. Made when it is not there.
///
/// # Errors
/// [`Error::Denied`] when it is a link, belongs to somebody else, or others may look into it.
pub fn own_folder(state_dir: Option<&Path>) -> Result<PathBuf> {
    let folder = match state_dir {
        Some(folder) => folder.to_owned(),
        None => std::env::temp_dir().join(format!("walship-{}", nix::unistd::geteuid())),
    };
    let shown = folder.display();
    let advise = |error: Error| {
        error.with_next("Set `state_dir` (WALSHIP_STATE_DIR) to a folder that this user owns alone.")
    };
    match fs::DirBuilder::new().mode(0o700).create(&folder) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(advise(Error::from_io(format!("making the folder {shown}"), error))),
    }
    let metadata = fs::symlink_metadata(&folder)
        .map_err(|error| advise(Error::from_io(format!("looking at {shown}"), error)))?;
    if !metadata.is_dir() || metadata.uid() != nix::unistd::geteuid().as_raw() || metadata.mode() & 0o077 != 0
    {
        return Err(advise(Error::denied(format!(
            "{shown} has to be a folder that only this user can use (owner {}, mode {:04o})",
            metadata.uid(),
            metadata.mode() & 0o7777
        ))));
    }
    Ok(folder)
}

#[cfg(feature = "store")]
/// Returns the lineage in `cluster` that a data directory belongs to; without one, the chosen or the
/// newest lineage.
pub(super) async fn lineage(
    cluster: &ClusterRepository,
    directory: Option<&DataDirectory>,
    chosen: Option<u32>,
) -> Result<LineageRepository> {
    if let Some(number) = chosen {
        return cluster.lineage(number).await;
    }
    match directory.map(DataDirectory::identity).transpose()?.flatten() {
        Some((identifier, Some(size))) => cluster.lineage_of(identifier, size).await,
        Some((identifier, None)) => cluster.lineage_of_system(identifier).await,
        None => cluster.newest_lineage().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_of_somebody_elses_is_refused() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().unwrap();
        let open = folder.path().join("open");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(matches!(own_folder(Some(&open)), Err(Error::Denied(_))));
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(folder.path(), &link).unwrap();
        assert!(matches!(own_folder(Some(&link)), Err(Error::Denied(_))));
        assert!(own_folder(Some(&folder.path().join("new"))).is_ok());
    }

    #[test]
    fn a_control_file_that_cannot_be_read_is_not_taken_for_none() {
        let folder = tempfile::tempdir().unwrap();
        let directory = DataDirectory::of_wal_file(&folder.path().join("pg_wal/x")).unwrap();
        assert_eq!(directory.identity().unwrap(), None);
        let control = folder.path().join("global/pg_control");
        fs::create_dir_all(&control).unwrap();
        directory.identity().unwrap_err();
        fs::remove_dir(&control).unwrap();
        fs::write(&control, [1, 2, 3]).unwrap();
        directory.identity().unwrap_err();
        fs::write(&control, 7_u64.to_le_bytes()).unwrap();
        assert_eq!(directory.identity().unwrap(), Some((7, None)));
    }

    #[test]
    fn data_directories_are_known_from_paths() {
        for (path, expected) in [
            ("pg_wal/RECOVERYXLOG", Some(".")),
            ("/srv/pg/pg_wal/000000010000000000000001", Some("/srv/pg")),
            ("./pg_wal/x", Some(".")),
            ("/tmp/x", None),
            ("x", None),
        ] {
            let found = DataDirectory::of_wal_file(Path::new(path));
            assert_eq!(found.as_ref().map(DataDirectory::path), expected.map(Path::new), "{path}");
        }
    }
}
