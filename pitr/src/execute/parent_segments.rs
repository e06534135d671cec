//! Puts WAL from before a fork where PostgreSQL looks for what was prepared in it: into `pg_wal`, under the name
//! that the segment has on the timeline which was left. Behind the fork the file is empty: no server can follow
//! the older timeline by it.

use std::io::Write as _;
use std::path::Path;

use walship::repository::LineageRepository;
use walship::{Error, Result};

use super::restore::{blocking, make_private};
use super::unpack::create;
use crate::plan::ParentSegment;

/// Writes the files, each with a mark that the server's archiver takes for archived: none of them is its own.
///
/// # Errors
/// [`Error::Corrupt`] and what else the repository answers, [`Error::LocalIo`].
/// # Durability
/// Nothing is synced; the end of the restore syncs the file system.
pub(super) async fn put(
    repository: &LineageRepository,
    segments: &[ParentSegment],
    data_dir: &Path,
) -> Result<()> {
    let size = repository.lineage().segment_size;
    for ParentSegment { segment, stored, until } in segments {
        let kept = size.offset_of(*until) as usize;
        let read = match repository.segment_bytes(*stored).await? {
            None => repository.tail_bytes(*stored, kept as u64).await?,
            read => read,
        };
        let Some(mut bytes) = read else {
            return Err(Error::missing(format!(
                "segment {stored} was listed in {} a moment ago and is not there any more",
                repository.location()
            )));
        };
        let name = segment.to_string();
        bytes.resize(size.bytes() as usize, 0);
        let data_dir = data_dir.to_owned();
        blocking(move || {
            if let Some(behind) = bytes.get_mut(kept..) {
                behind.fill(0);
            }
            let folder = data_dir.join("pg_wal");
            let marks = folder.join("archive_status");
            make_private(&folder)?;
            make_private(&marks)?;
            let path = folder.join(&name);
            create(&path, 0o600)?
                .write_all(&bytes)
                .map_err(|error| Error::from_io(format!("writing {}", path.display()), error))?;
            create(&marks.join(format!("{name}.done")), 0o600)?;
            Ok(())
        })
        .await?;
    }
    Ok(())
}
