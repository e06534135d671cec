//! Which backup an incremental one builds on, and what that one holds.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::catalog::{BackupRecord, ParentBackup, parents_of};
use crate::error::{Error, Result};
use crate::pg::page::PAGE_BYTES;
use crate::repository::{BackupBlocks, BackupObjects, FileBlocks, LineageRepository};

use super::progress::BackupEvent;
use super::{About, BackupSource};

/// That a backup is to hold only what another does not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Incremental {
    /// The backup that it builds on, by its id; `None` for the newest.
    pub parent: Option<String>,
    /// On one full backup at most so many incremental ones build, each on the one before; then a full one is taken.
    pub chain_max: u32,
}

/// The backup that an incremental one builds on.
pub(super) struct Parent {
    /// What the incremental one's record says of it.
    pub(super) link: ParentBackup,
    /// Its whole record.
    pub(super) record: BackupRecord,
    /// Its objects and those of what it builds on.
    pub(super) levels: Arc<[BackupObjects]>,
    blocks: BackupBlocks,
    /// In which of its objects each file is, and where among that one's files, by the path in the manifest.
    objects: HashMap<PathBuf, (u32, u32)>,
}

impl Parent {
    /// Returns in which of its objects a file is, by the path in the manifest.
    pub(super) fn object_of(&self, listed: &Path) -> Option<u32> {
        self.place_of(listed).map(|(object, _)| object)
    }

    /// Returns in which of its objects a file is, and where among that one's files.
    pub(super) fn place_of(&self, listed: &Path) -> Option<(u32, u32)> {
        self.objects.get(listed).copied()
    }

    /// Returns what a file is made of, by its path in the tar stream of an object.
    ///
    /// # Errors
    /// As [`BackupBlocks::file`].
    pub(super) async fn file(&self, object: u32, path: &Path) -> Result<FileBlocks> {
        self.blocks.file(object, path).await
    }
}

/// Looks for the backup to build on; `None`, and a word to the operator why, when there is none and a full backup is to be
/// taken.
///
/// # Errors
/// What a repository answers; [`Error::Invalid`] when the backup that was asked for cannot be built on.
pub(super) async fn find(
    repositories: &[LineageRepository],
    about: &About,
    source: &BackupSource,
    wanted: &Incremental,
    progress: &(dyn Fn(BackupEvent) + Send + Sync),
) -> Result<Option<Parent>> {
    match choose(repositories, about, source, wanted).await? {
        Ok(parent) => Ok(Some(parent)),
        Err(why) if wanted.parent.is_some() => Err(Error::invalid(why)
            .with_safe("no backup was begun; older backups are untouched")
            .with_next("Name another with --parent (`pitr info` lists them), or take a full one without --incremental.")),
        Err(why) => {
            progress(BackupEvent::Note(format!("a full backup is taken: {why}")));
            Ok(None)
        }
    }
}

/// Returns the backup to build on, or why there is none.
async fn choose(
    repositories: &[LineageRepository],
    about: &About,
    source: &BackupSource,
    wanted: &Incremental,
) -> Result<Result<Parent, String>> {
    let Some((first, others)) = repositories.split_first() else {
        return Err(Error::invalid("no repository is given"));
    };
    if about.block_size as usize != PAGE_BYTES {
        return Ok(Err(format!(
            "incremental ones are made of pages of {PAGE_BYTES} bytes, and this server's have {}",
            about.block_size
        )));
    }
    let major = about.server_version / 10_000;
    if matches!(source, BackupSource::Stream) && major < 17 {
        return Ok(Err(format!("PostgreSQL {major} sends no incremental ones (--source local makes them)")));
    }
    let mut complete = first.complete_backups().await?;
    for other in others {
        let there = other.complete_backups().await?;
        complete.retain(|backup| there.iter().any(|known| known.id == backup.id));
    }
    let found = match &wanted.parent {
        Some(id) => complete.iter().find(|backup| &backup.id == id),
        None => {
            let whole = complete.iter().filter(|backup| parents_of(&complete, backup).is_ok());
            whole.max_by(|a, b| (a.finished, &a.id).cmp(&(b.finished, &b.id)))
        }
    };
    let Some(found) = found else {
        let which = wanted.parent.as_ref().map_or(String::new(), |id| format!(" {id:?}"));
        return Ok(Err(format!("there is no complete backup{which} in every repository to build on")));
    };
    let id = &found.id;
    if found.server_version / 10_000 != about.server_version / 10_000 {
        return Ok(Err(format!("backup {id} is of PostgreSQL {}", found.server_version / 10_000)));
    }
    let parents = match parents_of(&complete, found) {
        Ok(parents) => parents,
        Err(missing) => {
            return Ok(Err(format!("backup {id} builds on {missing}, which is not in every repository")));
        }
    };
    let depth = parents.len() as u32 + 1;
    if depth > wanted.chain_max {
        let count = parents.len();
        return Ok(Err(format!(
            "{count} incremental backups, up to {id}, build on the last full one (--chain-max)"
        )));
    }
    // What pg_checksums has changed is in no summary.
    if matches!(source, BackupSource::Stream) && found.data_checksums != about.data_checksums {
        return Ok(Err(format!("data checksums were turned on or off since backup {id}")));
    }
    let mut records = Vec::with_capacity(parents.len() + 1);
    for record in std::iter::once(found).chain(parents) {
        records.push(first.whole_record(record).await?);
    }
    if let Some(old) =
        records.iter().find(|record| record.objects.iter().any(|object| object.index.is_none()))
    {
        return Ok(Err(format!("backup {} was taken before backups had an index", old.id)));
    }
    for repository in repositories {
        for record in &records {
            match repository.check_backup_objects(record).await {
                Ok(()) => {}
                Err(error @ (Error::Corrupt(_) | Error::Missing(_))) => {
                    return Ok(Err(format!("backup {} is damaged: {error}", record.id)));
                }
                Err(error) => return Err(error),
            }
        }
    }
    let link = ParentBackup { id: id.clone(), timeline: found.timeline, start_lsn: found.start_lsn, depth };
    let levels: Arc<[BackupObjects]> = records.iter().map(BackupObjects::from).collect();
    let blocks = BackupBlocks::new(first.clone(), levels.clone());
    match blocks.objects_of_files().await {
        Ok(objects) => Ok(Ok(Parent { link, record: records.swap_remove(0), levels, blocks, objects })),
        Err(error @ (Error::Corrupt(_) | Error::Missing(_))) => {
            Ok(Err(format!("backup {id} is damaged: {error}")))
        }
        Err(error) => Err(error),
    }
}
