//! Receiving with a spool: WAL counts as durable when it is there, and goes on into the repositories from there.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::watch;

use super::prepare::no_archive;
use super::ship::Shipping;
use super::{Progress, Receiver, stopped};
use crate::archive::push::PushOptions;
use crate::codec::TailPart;
use crate::error::{Error, Result};
use crate::feed::{Piece, Start};
use crate::pg::{Lsn, SegmentName};
use crate::repository::{ClusterRepository, LineageRepository};
use crate::spool::{Parts, Spool, SpoolFolder};
use crate::storage::blocking;

/// The spool, and what brings it into the repositories.
pub(super) struct Spooled {
    pub(super) spool: Arc<Spool>,
    pub(super) shipping: Shipping,
}

impl Spooled {
    pub(super) fn new(
        spool: Arc<Spool>,
        (lineages, push, interval): (Arc<[LineageRepository]>, PushOptions, Option<Duration>),
        progress: Progress,
    ) -> Self {
        let shipping = Shipping::start(Arc::clone(&spool), lineages, push, interval, progress);
        Self { spool, shipping }
    }

    /// Returns the segments that the spool has all of, and the length of their files.
    pub(super) fn whole_segments(&self) -> Vec<(SegmentName, u64)> {
        let size = self.spool.segment_size();
        let whole = self.spool.segments().into_iter().filter(|held| held.is_whole(size));
        whole.map(|held| (held.segment, held.file_bytes)).collect()
    }

    /// Says what is not in every repository yet.
    pub(super) fn left(&self) -> String {
        format!(
            "{} bytes in the spool {} are not in every repository yet: they stay there, and `walship receive` (or \
             `walship receive --drain`) stores them",
            self.spool.file_bytes(),
            self.spool.path().display()
        )
    }
}

/// A segment that the spool holds the beginning of, compared with what the server sends of it again.
#[derive(Debug)]
pub(super) struct Again {
    segment: SegmentName,
    parts: Parts,
    part: Option<TailPart>,
    /// What is held ends here.
    end: u64,
}

impl Again {
    /// Returns what is held of a segment; `None` where nothing is.
    fn of(spool: &Spool, segment: SegmentName) -> Result<Option<Self>> {
        let held = spool.segment(segment).zip(spool.parts(segment)?);
        Ok(held.map(|(held, parts)| Self { segment, parts, part: None, end: held.end }))
    }

    /// Compares bytes at an offset with those that are held. Offsets grow from call to call.
    fn compare(&mut self, mut offset: u64, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let part = match &self.part {
                Some(part) if part.offset() + part.bytes.len() as u64 > offset => part,
                _ => {
                    self.part = self.parts.next_part()?;
                    match &self.part {
                        Some(_) => continue,
                        None => return Err(self.differs(offset, "less is there than was acknowledged")),
                    }
                }
            };
            let from = usize::try_from(offset - part.offset()).unwrap_or(usize::MAX);
            let held = part.bytes.get(from..).unwrap_or_default();
            let length = held.len().min(bytes.len());
            if held[..length] != bytes[..length] {
                return Err(self.differs(offset, "the server sends other bytes now"));
            }
            (offset, bytes) = (offset + length as u64, &bytes[length..]);
        }
        Ok(())
    }

    fn differs(&self, offset: u64, how: &str) -> Error {
        Error::conflict(format!(
            "{} in the spool does not fit the server's, at {offset}: {how}",
            self.segment
        ))
        .with_safe("nothing was overwritten: the spool and the repositories keep what they have")
        .with_next(
            "Find out whether the server is an older copy of the cluster, or its disk has lost WAL that was \
                 synced. If the server is right, move the file of this segment out of the spool.",
        )
    }
}

impl Receiver {
    /// Waits until what was taken in a session that is over is in the spool; returns whether the time to stop has
    /// come meanwhile. The next session goes on from what is there.
    pub(super) async fn settle(&mut self) -> Result<bool> {
        while let Some(archive) = &mut self.archive
            && archive.spooled.is_some()
            && !archive.uploads.is_empty()
        {
            tokio::select! {
                stored = archive.next() => self.note(stored?),
                _ = stopped(&mut self.stop) => return Ok(true),
            }
        }
        Ok(false)
    }

    /// Returns what of a piece the spool does not have yet. What it has is compared.
    pub(super) async fn not_in_the_spool(
        &mut self,
        again: &mut Option<Again>,
        piece: Piece,
    ) -> Result<Option<Piece>> {
        let archive = self.archive.as_mut().ok_or_else(no_archive)?;
        let Some(spooled) = &archive.spooled else { return Ok(Some(piece)) };
        if piece.offset == 0 {
            *again = Again::of(&spooled.spool, piece.segment)?;
        }
        let Some(mut held) =
            again.take_if(|again| again.segment == piece.segment && piece.offset < again.end)
        else {
            return Ok(Some(piece));
        };
        let length = (held.end - piece.offset).min(piece.bytes.len() as u64);
        let rest = piece.bytes.slice(usize::try_from(length).unwrap_or(usize::MAX)..);
        let (offset, bytes) = (piece.offset, piece.bytes.slice(..piece.bytes.len() - rest.len()));
        *again = Some(
            blocking(move || {
                held.compare(offset, &bytes)?;
                Ok(held)
            })
            .await?,
        );
        let start = Lsn(piece.segment.start(archive.size).0 + offset);
        archive.frontier.add(start, Lsn(start.0 + length));
        self.report.durable_lsn = archive.frontier.durable();
        if piece.completes && rest.is_empty() {
            let lsn = piece.segment.end(archive.size);
            archive.next = Some(Start { timeline: piece.segment.timeline, lsn });
        }
        Ok((!rest.is_empty()).then(|| Piece { offset: offset + length, bytes: rest, ..piece }))
    }

    /// Notes in the spool that a timeline ended at `switch_lsn`, in the middle of `segment`.
    pub(super) async fn end_in_the_spool(&mut self, segment: SegmentName, switch_lsn: Lsn) -> Result<()> {
        let archive = self.archive.as_ref().ok_or_else(no_archive)?;
        let Some(spooled) = &archive.spooled else { return Ok(()) };
        let (spool, end) = (Arc::clone(&spooled.spool), archive.size.offset_of(switch_lsn));
        match end {
            0 => Ok(()),
            end => blocking(move || spool.end_timeline(segment, end)).await,
        }
    }
}

/// What came of emptying a spool.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Emptied {
    /// Segments stored whole.
    pub segments: u64,
    /// Parts of open segments stored.
    pub parts: u64,
    /// The length of the segments as stored.
    pub stored_bytes: u64,
    /// The length of what is still in the spool, because it was time to stop.
    pub left_bytes: u64,
}

/// Stores all that a spool holds of the clusters' name in every cluster repository. No server is needed.
///
/// # Errors
/// [`Error::Denied`] while a receiver uses the spool, [`Error::Corrupt`] when what was acknowledged is damaged, and what no
/// repetition can mend; outages of stores are waited for until `stop` turns true.
pub async fn empty_spool(
    folder: &Path,
    clusters: &[ClusterRepository],
    push: &PushOptions,
    mut stop: watch::Receiver<bool>,
    progress: Progress,
) -> Result<Emptied> {
    let mut emptied = Emptied::default();
    let Some(cluster) = clusters.first() else { return Err(no_archive()) };
    let mut folder = SpoolFolder::lock(folder, cluster.name().as_str())?;
    for identifier in folder.system_identifiers()? {
        let Some(size) = folder.segment_size(identifier)? else { continue };
        let mut lineages = Vec::new();
        for cluster in clusters {
            lineages.push(cluster.lineage_of(identifier, size).await?);
        }
        let spool = blocking(move || folder.open(identifier, size, u64::MAX)).await?;
        let shipped = (lineages.into(), push.clone(), Some(Duration::ZERO));
        let mut spooled = Spooled::new(Arc::new(spool), shipped, Arc::clone(&progress));
        tokio::select! {
            done = spooled.shipping.everything() => done?,
            _ = stopped(&mut stop) => {}
        }
        let shipped = spooled.shipping.so_far();
        emptied.segments += shipped.segments;
        emptied.parts += shipped.parts;
        emptied.stored_bytes += shipped.stored_bytes;
        emptied.left_bytes += spooled.spool.file_bytes();
        if *stop.borrow() {
            return Ok(emptied);
        }
        let Spooled { spool, shipping } = spooled;
        drop(shipping);
        folder =
            Arc::into_inner(spool).ok_or_else(|| Error::local_io("the spool is still in use"))?.into_folder();
    }
    Ok(emptied)
}
