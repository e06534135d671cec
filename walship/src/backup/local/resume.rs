//! What a backup that did not complete has stored already, and this one need not store again.
//!
//! A file is taken over when every block of it is, by its digest, what is on disk now: nothing is asked of time, size or the
//! WAL between. So it does not matter whose backup it was, or why it ended; even one that is still being taken may be used.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::runtime::Handle;

use crate::catalog::DamagedPage;
use crate::codec::backup_index::block_digests;
use crate::error::{Error, Result};
use crate::repository::{BackupBlocks, BackupObjects, FileBlocks, LineageRepository, REMAINS_LOOKED_AT_MAX};

use super::super::parent::Parent;
use super::read::{self, Opened, Passing, READ_BYTES, ReadFile};
use super::walk::Entry;
use super::{Share, Shared};

/// An object is taken over when so much of it, in percent, is what is on disk now: the rest of it would be kept for nothing.
const USED_PERCENT_MIN: u64 = 50;

/// What backups that did not complete have stored.
pub(in super::super) struct Leftovers {
    /// Their objects, those of the newest backup last.
    blocks: BackupBlocks,
    /// The next object to look at.
    next: AtomicUsize,
}

/// What one object has that is on disk now.
pub(super) struct Kept {
    number: usize,
    /// The files, and how much of the object each is.
    files: Vec<(ReadFile, u64)>,
    damaged: Vec<DamagedPage>,
    all_bytes: u64,
}

impl Leftovers {
    /// Looks for backups that did not complete, build on the same one, and have stored anything in every repository.
    ///
    /// # Errors
    /// What a repository answers.
    pub(in super::super) async fn find(
        repositories: &[LineageRepository],
        parent: Option<&Parent>,
    ) -> Result<Option<Self>> {
        let Some((first, others)) = repositories.split_first() else { return Ok(None) };
        let mut started = first.unfinished_backups().await?;
        started.retain(|one| one.parent.as_deref() == parent.map(|parent| &*parent.link.id));
        if !started.is_empty() {
            // What retention is about to remove, wherever, is as good as gone.
            for repository in repositories {
                let going = repository.expiring().await?;
                started.retain(|one| !going.contains(&one.id));
            }
        }
        started.sort_by(|a, b| (a.started, &a.id).cmp(&(b.started, &b.id)));
        let mut all = Vec::new();
        for started in started.into_iter().rev().take(REMAINS_LOOKED_AT_MAX).rev() {
            let mut objects = first.stored_objects(&started.id).await?;
            for other in others {
                let there = other.stored_objects(&started.id).await?;
                objects.retain(|object| there.contains(object));
            }
            objects.iter_mut().for_each(|object| object.backup = Some(started.id.clone()));
            all.extend(objects);
        }
        if all.is_empty() {
            return Ok(None);
        }
        let top = BackupObjects { id: String::new(), objects: all };
        let below = parent.map_or(&[][..], |parent| &parent.levels);
        let levels = std::iter::once(top).chain(below.iter().cloned()).collect();
        Ok(Some(Self { blocks: BackupBlocks::new(first.clone(), levels), next: AtomicUsize::new(0) }))
    }

    /// Compares the files of the objects that no other thread has taken with what is on disk now. Blocking.
    ///
    /// # Errors
    /// [`Error::LocalIo`] for files that cannot be read; what the repository fails with.
    pub(super) fn compare(
        &self,
        shared: &Shared,
        handle: &Handle,
        entries: &HashMap<PathBuf, Entry>,
    ) -> Result<Vec<Kept>> {
        let (mut all, mut buffer) = (Vec::new(), Vec::with_capacity(READ_BYTES));
        while let number = self.next.fetch_add(1, Ordering::Relaxed)
            && let Some(object) = self.blocks.objects().get(number)
        {
            match self.compare_object(shared, handle, entries, number, &mut buffer) {
                Ok(kept) => all.push(kept),
                // What cannot be read is stored again.
                Err(error @ (Error::Corrupt(_) | Error::Missing(_) | Error::Invalid(_))) => {
                    tracing::warn!(%error, "{} of a backup that did not complete is not used", object.name);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(all)
    }

    fn compare_object(
        &self,
        shared: &Shared,
        handle: &Handle,
        entries: &HashMap<PathBuf, Entry>,
        number: usize,
        buffer: &mut Vec<u8>,
    ) -> Result<Kept> {
        let mut kept = Kept { number, files: Vec::new(), damaged: Vec::new(), all_bytes: 0 };
        let (_, object) = self.blocks.object(0, number as u32)?;
        let files = handle.block_on(self.blocks.files_of(0, number as u32))?;
        for (file, _) in files.index.files() {
            kept.all_bytes += file.bytes;
            let path = file.whole_path();
            let listed = object.listed(&path);
            let Some(entry) = entries.get(&listed) else { continue };
            let Some(opened) = read::open(&entry.source)? else { continue };
            if opened.bytes != file.whole_bytes() || entry.is_unlogged() {
                continue;
            }
            let stored = handle.block_on(self.blocks.file_in(number as u32, &files, &path))?;
            if let Some((crc, damaged)) = same(shared, &opened, entry, &listed, &stored, buffer)? {
                kept.damaged.extend(damaged);
                let read = ReadFile { listed, bytes: opened.bytes, crc, modified: opened.modified };
                kept.files.push((read, file.bytes));
            }
        }
        Ok(kept)
    }

    /// Takes the objects over of which most is on disk now; returns them in their order, and what they have.
    pub(super) fn take_over(&self, mut kept: Vec<Kept>) -> Share {
        let (mut share, mut seen) = (Share::default(), HashSet::new());
        // Of two objects that have a file the later one counts.
        kept.sort_by_key(|kept| std::cmp::Reverse(kept.number));
        for Kept { number, mut files, mut damaged, all_bytes } in kept {
            files.retain(|(file, _)| !seen.contains(&file.listed));
            let used: u64 = files.iter().map(|(_, bytes)| bytes).sum();
            let Some(object) = self.blocks.objects().get(number) else { continue };
            if files.is_empty() || used * 100 < all_bytes * USED_PERCENT_MIN {
                continue;
            }
            seen.extend(files.iter().map(|(file, _)| file.listed.clone()));
            damaged.retain(|page| files.iter().any(|(file, _)| file.listed == page.path));
            share.damaged.add(damaged.into());
            share.files.extend(files.into_iter().map(|(file, _)| file));
            share.objects.push(object.clone());
        }
        share.objects.reverse();
        share
    }
}

/// Reads a file until it differs from what is stored; returns its CRC-32C and its damaged pages when it does not.
fn same(
    shared: &Shared,
    opened: &Opened,
    entry: &Entry,
    listed: &Path,
    stored: &FileBlocks,
    buffer: &mut Vec<u8>,
) -> Result<Option<(u32, Vec<DamagedPage>)>> {
    let (mut blocks, mut differs) = (stored.blocks.iter(), false);
    let mut take = |bytes: &[u8]| {
        differs = !block_digests(bytes)
            .all(|digest| blocks.next().copied().flatten().is_some_and(|place| place.digest == digest));
        match differs {
            // Nothing more is to be read; the error goes no further than here.
            true => Err(Error::invalid("the file differs")),
            false => shared.has_read(bytes.len() as u64),
        }
    };
    match read::read(opened, &entry.source, listed, shared.check, &mut Passing { buffer, take: &mut take }) {
        Err(_) if differs => Ok(None),
        read => read.map(Some),
    }
}
