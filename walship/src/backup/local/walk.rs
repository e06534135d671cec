//! Which files of a running server's data directory belong to a base backup.
//!
//! Source: `src/backend/backup/basebackup.c`: sendDir, excludeDirContents, excludeFiles.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use crate::catalog::listed;
use crate::error::{Error, Result};
use crate::pg::Oid;
use crate::pg::page::{Fork, RelationFile};

/// Folders that are stored empty: what is in them means nothing to another server.
const EMPTIED: &[&str] =
    &["pg_stat_tmp", "pg_replslot", "pg_dynshmem", "pg_notify", "pg_serial", "pg_snapshots", "pg_subtrans"];

/// Files that are left out.
const LEFT_OUT: &[&str] = &[
    "postgresql.auto.conf.tmp",
    "current_logfiles.tmp",
    "backup_label",
    "tablespace_map",
    "backup_manifest",
    "postmaster.pid",
    "postmaster.opts",
];

/// What names of temporary files and folders begin with.
const TEMPORARY: &str = "pgsql_tmp";

/// More files than any cluster has; what is remembered of each takes memory.
const ENTRIES_MAX: usize = 20_000_000;

/// So often a tablespace's folder is looked for while its link is there.
const LOOKS: u32 = 20;

/// The pause between two looks.
const LOOK_PAUSE: Duration = Duration::from_millis(50);

/// Something to store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// The tablespace that it lies in; `None` for the data directory.
    pub(super) tablespace: Option<Oid>,
    /// Its path below the data directory, or below the tablespace's folder.
    pub(super) path: PathBuf,
    /// Where it is read.
    pub(super) source: PathBuf,
    pub(super) kind: EntryKind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum EntryKind {
    Folder {
        mode: u32,
    },
    /// A tablespace's link, and where it leads.
    Link(PathBuf),
    /// A file; its length when it was seen.
    File {
        bytes: u64,
    },
}

impl Entry {
    /// Returns its path as the manifest names it.
    pub(super) fn listed(&self) -> PathBuf {
        listed(self.tablespace, &self.path)
    }
}

impl Entry {
    /// Returns whether this file is part of an unlogged relation whose beginning the backup has in another file. The
    /// relation may have been made after its folder was listed: it is looked for when the file is open, as the server does.
    pub(super) fn is_unlogged(&self) -> bool {
        RelationFile::of(&self.listed()).filter(|file| file.fork != Fork::Init).is_some_and(|file| {
            self.source.with_file_name(format!("{}_init", file.filenode)).symlink_metadata().is_ok()
        })
    }
}

/// Everything that belongs into the backup, but for `global/pg_control`.
#[derive(Debug, Default)]
pub(super) struct Walk {
    /// Folders before what is in them; no order otherwise.
    pub(super) entries: Vec<Entry>,
    /// Tablespaces outside the data directory, and where they are.
    pub(super) tablespaces: Vec<(Oid, PathBuf)>,
    /// What is neither file nor folder, and left out.
    pub(super) odd: Vec<PathBuf>,
}

/// Lists a data directory. `version_folder` is what the server calls its own folder in each tablespace, `emptied` another
/// folder whose contents are left out.
///
/// # Errors
/// [`Error::LocalIo`] for a folder that cannot be read; one that vanishes meanwhile is none.
pub(super) fn walk(data_directory: &Path, version_folder: &str, emptied: Option<&Path>) -> Result<Walk> {
    let mut walk = Walk::default();
    walk.folder(data_directory, None, Path::new(""), emptied)?;
    // PostgreSQL lets a tablespace lie inside the data directory: it is stored once.
    let inside: Vec<PathBuf> = walk.tablespaces.iter().map(|(_, place)| place.clone()).collect();
    walk.entries.retain(|entry| !inside.iter().any(|place| entry.source.starts_with(place)));
    for (oid, place) in std::mem::take(&mut walk.tablespaces) {
        let link = data_directory.join("pg_tblspc").join(oid.to_string());
        if !is_seen(&link, &place, version_folder)? {
            walk.entries.retain(|entry| entry.source != link);
            continue;
        }
        let (path, source) = (PathBuf::from(version_folder), place.join(version_folder));
        walk.add(Some(oid), path.clone(), source.clone(), EntryKind::Folder { mode: 0o700 })?;
        walk.folder(&source, Some(oid), &path, None)?;
        walk.tablespaces.push((oid, place));
    }
    Ok(walk)
}

/// Returns whether a tablespace is there; `false` when it was dropped meanwhile, and its link with it.
///
/// A live one always has the server's own folder: CREATE TABLESPACE makes it. A location that cannot be seen from here,
/// because it is mounted elsewhere, must not pass for an empty one.
///
/// # Errors
/// [`Error::LocalIo`] when it cannot be seen.
pub(super) fn is_seen(link: &Path, place: &Path, version_folder: &str) -> Result<bool> {
    let folder = place.join(version_folder);
    for attempt in 1..=LOOKS {
        match fs::symlink_metadata(&folder) {
            Ok(meta) if meta.is_dir() => return Ok(true),
            Ok(_) => return Err(Error::invalid(format!("{} is no folder", folder.display()))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(unreadable(&folder, error)),
        }
        if fs::symlink_metadata(link).is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
            return Ok(false);
        }
        // DROP TABLESPACE removes the folder first and the link then.
        if attempt < LOOKS {
            sleep(LOOK_PAUSE);
        }
    }
    Err(Error::local_io(format!("the tablespace at {} cannot be seen from here: it has no {version_folder}", place.display()))
        .with_safe("the server is untouched; no backup was recorded")
        .with_next("Run the backup where the server's tablespaces are mounted as they are for the server, or without --source local."))
}

impl Walk {
    fn add(
        &mut self,
        tablespace: Option<Oid>,
        path: PathBuf,
        source: PathBuf,
        kind: EntryKind,
    ) -> Result<()> {
        if self.entries.len() >= ENTRIES_MAX {
            return Err(Error::invalid(format!("the cluster has more than {ENTRIES_MAX} files")));
        }
        self.entries.push(Entry { tablespace, path, source, kind });
        Ok(())
    }

    fn folder(
        &mut self,
        source: &Path,
        tablespace: Option<Oid>,
        path: &Path,
        emptied: Option<&Path>,
    ) -> Result<()> {
        let listing = match fs::read_dir(source) {
            Ok(listing) => listing,
            Err(error) if error.kind() == io::ErrorKind::NotFound && path != Path::new("") => return Ok(()),
            Err(error) => return Err(unreadable(source, error)),
        };
        let mut found = Vec::new();
        for entry in listing {
            let entry = entry.map_err(|error| unreadable(source, error))?;
            let name = entry.file_name();
            if !is_left_out(&name) {
                found.push((name, entry.path()));
            }
        }
        let listed_as = |name: &OsStr| listed(tablespace, &path.join(name));
        let unlogged: HashSet<Oid> = found
            .iter()
            .filter_map(|(name, _)| RelationFile::of(&listed_as(name)))
            .filter(|file| file.fork == Fork::Init)
            .map(|file| file.filenode)
            .collect();
        for (name, source) in found {
            let here = path.join(&name);
            // The file that makes the folder a data directory comes last.
            if tablespace.is_none() && here == Path::new("global/pg_control") {
                continue;
            }
            if RelationFile::of(&listed_as(&name))
                .is_some_and(|file| file.fork != Fork::Init && unlogged.contains(&file.filenode))
            {
                continue;
            }
            let meta = match fs::symlink_metadata(&source) {
                Ok(meta) => meta,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(unreadable(&source, error)),
            };
            let is_emptied = tablespace.is_none()
                && (EMPTIED.iter().any(|name| here == Path::new(name)) || emptied == Some(&here));
            if tablespace.is_none() && here == Path::new("pg_wal") {
                self.wal_folder(&source, meta.mode())?;
            } else if is_emptied && (meta.is_dir() || meta.is_symlink()) {
                self.add(tablespace, here, source, EntryKind::Folder { mode: 0o700 })?;
            } else if meta.is_dir() {
                self.add(tablespace, here.clone(), source.clone(), EntryKind::Folder { mode: meta.mode() })?;
                self.folder(&source, tablespace, &here, emptied)?;
            } else if meta.is_file() {
                self.add(tablespace, here, source, EntryKind::File { bytes: meta.len() })?;
            } else if let Some(oid) = tablespace_of(tablespace, path, &name).filter(|_| meta.is_symlink()) {
                match fs::read_link(&source) {
                    Ok(place) => {
                        self.tablespaces.push((oid, place.clone()));
                        self.add(None, here, source, EntryKind::Link(place))?;
                    }
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(unreadable(&source, error)),
                }
            } else if !meta.file_type().is_socket() {
                self.odd.push(source);
            }
        }
        Ok(())
    }

    /// `pg_wal`, or what a link of that name leads to, is stored as empty folders.
    fn wal_folder(&mut self, source: &Path, mode: u32) -> Result<()> {
        let mode = 0o700 | (mode & 0o050);
        for folder in ["pg_wal", "pg_wal/archive_status", "pg_wal/summaries"] {
            let below = folder.strip_prefix("pg_wal").unwrap_or_default().trim_start_matches('/');
            if below.is_empty() || source.join(below).is_dir() {
                self.add(None, folder.into(), source.join(below), EntryKind::Folder { mode })?;
            }
        }
        Ok(())
    }
}

fn is_left_out(name: &OsStr) -> bool {
    let Some(name) = name.to_str() else { return false };
    LEFT_OUT.contains(&name)
        || name.starts_with(TEMPORARY)
        || name.starts_with("pg_internal.init")
        || is_temporary_relation(name)
}

/// Returns whether this is a temporary relation's file, like `t3_16390_fsm.1`.
///
/// Source: `src/backend/storage/file/fd.c`, looks_like_temp_rel_name.
fn is_temporary_relation(name: &str) -> bool {
    let Some((backend, rest)) = name.strip_prefix('t').and_then(|rest| rest.split_once('_')) else {
        return false;
    };
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let rest = rest.split_once('.').map_or(Some(rest), |(rest, segment)| digits(segment).then_some(rest));
    let (filenode, fork) = match rest.map(|rest| rest.split_once('_').unwrap_or((rest, "main"))) {
        Some(parts) => parts,
        None => return false,
    };
    digits(backend) && digits(filenode) && matches!(fork, "main" | "fsm" | "vm" | "init")
}

fn tablespace_of(tablespace: Option<Oid>, path: &Path, name: &OsStr) -> Option<Oid> {
    if tablespace.is_some() || path != Path::new("pg_tblspc") {
        return None;
    }
    name.to_str()?.parse().ok()
}

fn unreadable(path: &Path, error: io::Error) -> Error {
    Error::from_io(format!("reading {}", path.display()), error)
        .with_safe("the server is untouched; no backup was recorded")
        .with_next("Run the backup as the user that PostgreSQL runs as.")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn what_postgresql_leaves_out_is_left_out() {
        let home = tempfile::tempdir().unwrap();
        let (data, space) = (home.path().join("data"), home.path().join("space"));
        let write = |path: &Path| {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, b"x").unwrap();
        };
        for path in [
            "PG_VERSION",
            "backup_label",
            "postmaster.pid",
            "global/pg_control",
            "global/1262",
            "global/pg_internal.init",
            "base/5/1259",
            "base/5/t3_99",
            "base/5/t3_99_fsm.1",
            "base/5/t3_x",
            "base/5/500",
            "base/5/500.1",
            "base/5/500_fsm",
            "base/5/500_init",
            "base/5/pg_internal.init.77",
            "base/pgsql_tmp/pgsql_tmp1.0",
            "pgsql_tmp_walship_spool/000000010000000000000001",
            "pg_wal/000000010000000000000001",
            "pg_wal/archive_status/x.ready",
            "pg_replslot/s/state",
            "pg_stat_tmp/global.stat",
            "stats/there",
            "pg_xact/0000",
        ] {
            write(&data.join(path));
        }
        write(&space.join("PG_15_202209061/5/77"));
        write(&space.join("PG_14_202107181/5/77"));
        fs::create_dir(data.join("pg_tblspc")).unwrap();
        symlink(&space, data.join("pg_tblspc/16400")).unwrap();
        symlink("/etc/passwd", data.join("link")).unwrap();
        symlink(home.path(), data.join("pg_notify")).unwrap();
        let walk = walk(&data, "PG_15_202209061", Some(Path::new("stats"))).unwrap();
        let mut listed: Vec<_> = walk
            .entries
            .iter()
            .map(|entry| {
                let mark = match entry.kind {
                    EntryKind::Folder { .. } => "/",
                    EntryKind::Link(_) => "@",
                    EntryKind::File { .. } => "",
                };
                format!("{}{mark}", entry.listed().display())
            })
            .collect();
        listed.sort();
        assert_eq!(
            listed,
            [
                "PG_VERSION",
                "base/",
                "base/5/",
                "base/5/1259",
                "base/5/500_init",
                "base/5/t3_x",
                "global/",
                "global/1262",
                "pg_notify/",
                "pg_replslot/",
                "pg_stat_tmp/",
                "pg_tblspc/",
                "pg_tblspc/16400/PG_15_202209061/",
                "pg_tblspc/16400/PG_15_202209061/5/",
                "pg_tblspc/16400/PG_15_202209061/5/77",
                "pg_tblspc/16400@",
                "pg_wal/",
                "pg_wal/archive_status/",
                "pg_xact/",
                "pg_xact/0000",
                "stats/",
            ]
        );
        assert_eq!(walk.tablespaces, [(16400, space.clone())]);
        assert_eq!(walk.odd, [data.join("link")]);

        // What was made unlogged after the listing, and a tablespace that is mounted elsewhere.
        let file = walk.entries.iter().find(|entry| entry.path == Path::new("base/5/1259")).unwrap();
        assert!(!file.is_unlogged());
        write(&data.join("base/5/1259_init"));
        assert!(file.is_unlogged());
        fs::rename(&space, home.path().join("elsewhere")).unwrap();
        let error = super::walk(&data, "PG_15_202209061", None).unwrap_err();
        assert!(error.to_string().contains("cannot be seen from here"), "{error}");
        fs::remove_file(data.join("pg_tblspc/16400")).unwrap();
        assert!(super::walk(&data, "PG_15_202209061", None).unwrap().tablespaces.is_empty());
    }
}
