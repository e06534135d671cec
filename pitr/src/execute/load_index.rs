//! Answers what the planner asks of the index, and notices when the index is wrong.

use std::collections::BTreeMap;

use walship::Result;
use walship::catalog::Catalog;
use walship::pg::{SegmentName, SegmentSize};
use walship::repository::index::write::fullest_readable;
use walship::repository::index::{ListedSegment, StoredRollup};
use walship::repository::{LineageRepository, Summarized};
use walship::wal::rollup::{Place, Rollup, span};

use crate::plan::Evidence;

/// What is known of the index beside the evidence that the planner sees: where its details lie, and of which
/// segments it speaks.
pub(super) struct Index {
    size: SegmentSize,
    /// The roll-up that tells in detail of the block that begins with this segment.
    details: BTreeMap<SegmentName, StoredRollup>,
    /// The digest that the index names for a segment.
    digests: BTreeMap<SegmentName, String>,
    /// The length of a segment's object as its head says, of those that were read.
    lengths: BTreeMap<SegmentName, u64>,
}

impl Index {
    /// Returns what the catalog was read from.
    pub(super) fn of(catalog: &Catalog) -> Self {
        let size = catalog.lineage.segment_size;
        let mut index =
            Self { size, details: BTreeMap::new(), digests: BTreeMap::new(), lengths: BTreeMap::new() };
        catalog.rollups.iter().for_each(|rollup| index.note(rollup));
        index
    }

    fn note(&mut self, rollup: &Rollup) {
        for entry in &rollup.entries {
            let Some(run) = entry.runs.first() else { continue };
            match StoredRollup::of_entry(rollup, entry) {
                Some(stored) => drop(self.details.insert(run.first, stored)),
                None => drop(self.digests.insert(run.first, entry.digest.clone())),
            }
        }
    }

    /// Adds the details of the block that begins with `first` to the evidence; where they cannot be read, what
    /// other roll-ups say of it, and where none do, nothing: then the segments' own summaries tell.
    pub(super) async fn refine(
        &mut self,
        repository: &LineageRepository,
        first: SegmentName,
        evidence: &mut Evidence,
    ) -> Result<()> {
        let Some(last) = evidence.blocks.get(&first).map(|block| block.last) else { return Ok(()) };
        evidence.forget_blocks(first, last);
        let Some(stored) = self.details.remove(&first) else { return Ok(()) };
        match repository.read_sound_rollup(&stored).await? {
            Some(known) => self.add(&known.rollup, evidence),
            None => self.rescue(repository, stored.place(), evidence).await?,
        }
        Ok(())
    }

    /// Adds what can still be read of the index about a place whose roll-up cannot.
    async fn rescue(
        &mut self,
        repository: &LineageRepository,
        place: Place,
        evidence: &mut Evidence,
    ) -> Result<()> {
        let mut unknown = vec![place];
        while let Some(place) = unknown.pop() {
            let versions = repository.rollups(place.timeline, place.level, place.first, place.end()).await?;
            match fullest_readable(repository, &versions).await? {
                Some(known) => self.add(&known.rollup, evidence),
                None if place.level > 1 => {
                    let below = span(place.level - 1);
                    let level = place.level - 1;
                    let listed = repository.rollups(place.timeline, level, place.first, place.end()).await?;
                    let mut places: Vec<Place> = listed.iter().map(StoredRollup::place).collect();
                    places.dedup();
                    places.retain(|place| place.first.is_multiple_of(below));
                    unknown.extend(places);
                }
                None => {}
            }
        }
        Ok(())
    }

    /// Drops what is known of segments before this one.
    pub(super) fn forget_before(&mut self, segment: SegmentName) {
        self.details = self.details.split_off(&segment);
        self.digests = self.digests.split_off(&segment);
        self.lengths = self.lengths.split_off(&segment);
    }

    /// Returns how long a segment's object is: as its own head says, or the index.
    pub(super) fn stored_bytes(&self, name: SegmentName, evidence: &Evidence) -> Option<u64> {
        let block = evidence.blocks.get(&name).filter(|block| block.is_segment);
        self.lengths.get(&name).copied().or_else(|| block.map(|block| block.facts.stored_bytes))
    }

    /// Returns the blocks of many segments, all of them between `first` and `last`, of whose objects' length
    /// together the index says something else than a listing.
    pub(super) fn lengths_that_differ(
        &self,
        evidence: &Evidence,
        first: SegmentName,
        last: SegmentName,
        listed: &[ListedSegment],
    ) -> Vec<SegmentName> {
        let inside = evidence
            .blocks
            .range(first..=last)
            .filter(|(_, block)| !block.is_segment && !block.has_gaps && block.last <= last);
        let differing = inside.filter(|(first, block)| {
            let from = listed.partition_point(|one| one.name < **first);
            let to = listed.partition_point(|one| one.name <= block.last);
            let own = listed.get(from..to).unwrap_or_default();
            let sum = own.iter().fold(0u64, |sum, one| sum.saturating_add(one.stored_bytes));
            sum != block.facts.stored_bytes
        });
        differing.map(|(first, _)| *first).collect()
    }

    fn add(&mut self, rollup: &Rollup, evidence: &mut Evidence) {
        evidence.add_rollup(rollup);
        self.note(rollup);
    }

    /// Compares what the index says of a segment with the segment itself; where it speaks of another content
    /// the whole log is left to the segments' own summaries.
    pub(super) fn check(&mut self, name: SegmentName, read: &Summarized, evidence: &mut Evidence) {
        self.lengths.insert(name, read.stored_bytes);
        if self.digests.get(&name).is_some_and(|digest| *digest != read.digest) {
            tracing::debug!(%name, "the index speaks of another segment");
            let place = Place::of(name, self.size, 1);
            let first = SegmentName::from_number(name.timeline, place.first, self.size);
            let last = SegmentName::from_number(name.timeline, place.end() - 1, self.size);
            if let Some((first, last)) = first.zip(last) {
                evidence.forget_blocks(first, last);
            }
        }
    }
}
