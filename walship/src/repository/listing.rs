//! Listings of WAL: parts of a timeline, and which timelines there are.

use crate::codec::ObjectKind;
use crate::error::Result;
use crate::pg::{SegmentName, TimelineId, WalFileName};

use super::LineageRepository;

/// One WAL object of a timeline, as a listing shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Listed {
    /// A whole segment and its stored size.
    Segment(SegmentName, u64),
    /// A `.partial` file.
    Partial(SegmentName),
    /// A segment's bytes that were kept apart as incomplete.
    Incomplete(SegmentName),
    /// A good copy beside a segment's damaged object.
    Copy(SegmentName),
    /// A backup history file.
    BackupHistory(SegmentName),
}

impl Listed {
    fn name(self) -> SegmentName {
        match self {
            Self::Segment(name, _)
            | Self::Partial(name)
            | Self::Incomplete(name)
            | Self::Copy(name)
            | Self::BackupHistory(name) => name,
        }
    }
}

impl LineageRepository {
    /// Shows what is stored of a timeline's segments from `from` on and before `until` (their numbers), in
    /// WAL order. One request for each thousand objects.
    pub(super) async fn wal_between(
        &self,
        timeline: TimelineId,
        from: u64,
        until: u64,
        mut show: impl FnMut(Listed),
    ) -> Result<()> {
        let size = self.lineage.segment_size;
        let prefix = self.layout.timeline_prefix(timeline);
        let Some(first) = SegmentName::from_number(timeline, from, size) else { return Ok(()) };
        let mut after = self.layout.before_segment(first);
        loop {
            let page = self.storage.list(&prefix, Some(&after)).await?;
            for meta in &page.objects {
                let Some(listed) = self.listed(&meta.key, meta.bytes) else { continue };
                if listed.name().number(size) >= until {
                    return Ok(());
                }
                show(listed);
            }
            match page.next {
                Some(next) => after = next,
                None => return Ok(()),
            }
        }
    }

    fn listed(&self, key: &crate::storage::ObjectKey, bytes: u64) -> Option<Listed> {
        let key = self.layout.parse_wal(key)?;
        match (key.name, key.kind) {
            (WalFileName::Segment(name), ObjectKind::Segment) => {
                let listed = if key.is_copy { Listed::Copy(name) } else { Listed::Segment(name, bytes) };
                name.is_legal(self.lineage.segment_size).then_some(listed)
            }
            (WalFileName::Segment(name), _) => Some(Listed::Incomplete(name)),
            (WalFileName::Partial(name), _) => Some(Listed::Partial(name)),
            (WalFileName::BackupHistory(name, _), _) => Some(Listed::BackupHistory(name)),
            (WalFileName::History(_), _) => None,
        }
    }

    /// Returns the first whole segment of a timeline whose number is at least `from`.
    pub(super) async fn first_segment(&self, timeline: TimelineId, from: u64) -> Result<Option<SegmentName>> {
        let Some(first) = SegmentName::from_number(timeline, from, self.lineage.segment_size) else {
            return Ok(None);
        };
        let prefix = self.layout.timeline_prefix(timeline);
        let mut after = self.layout.before_segment(first);
        loop {
            let page = self.storage.list(&prefix, Some(&after)).await?;
            let found = page.objects.iter().find_map(|meta| match self.listed(&meta.key, meta.bytes) {
                Some(Listed::Segment(name, _)) => Some(name),
                _ => None,
            });
            match (found, page.next) {
                (Some(name), _) => return Ok(Some(name)),
                (None, Some(next)) => after = next,
                (None, None) => return Ok(None),
            }
        }
    }

    /// Returns every timeline of which anything is stored, in ascending order, and whether its history file
    /// is. One or two requests for each.
    pub(super) async fn stored_timelines(&self) -> Result<Vec<TimelineId>> {
        let prefix = self.layout.wal_prefix();
        let mut timelines = Vec::new();
        let mut after = prefix.clone();
        loop {
            let page = self.storage.list(&prefix, Some(&after)).await?;
            // Stores that keep folders list `00000002/` before `00000002.history`, others after it.
            let behind = timelines.last().copied();
            let found = page.objects.iter().find_map(|meta| {
                let timeline = self.layout.parse_wal(&meta.key)?.name.timeline();
                (Some(timeline) > behind).then_some(timeline)
            });
            match (found, page.next) {
                (Some(found), _) => {
                    timelines.push(found);
                    after = self.layout.after_timeline(found);
                }
                (None, Some(next)) => after = next,
                (None, None) => return Ok(timelines),
            }
        }
    }
}
