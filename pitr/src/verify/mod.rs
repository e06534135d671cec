//! What is to be proven of an archive, in which order, and what findings mean: which moments can no longer be reached.
//!
//! Pure: `execute::verify` reads, this room decides and judges. It repairs nothing, and it removes nothing.

pub mod affected;
mod histories;
mod known;
mod missing;
mod needed;
mod order;
mod proven;
mod report;
mod spans;
mod summaries;
#[cfg(test)]
mod tests;
pub mod text;
mod unlisted;

use serde::{Deserialize, Serialize};
use walship::pg::{SegmentName, TimelineId};

pub use histories::history_flaws;
pub use known::{known_damage, standing, told_again};
pub use missing::{behind_server, gaps_found, less_than_seen, may_come, still_missing};
pub use needed::Needed;
pub use order::{SEGMENTS_PER_PIECE, Work, WorkKind, order};
pub use proven::{ProvenState, SeenBefore};
pub use report::{Report, RepositoryReport, Unread, VerifiedRange};
pub use spans::{Piece, Spans};
pub use summaries::summary_difference;
pub use unlisted::Unlisted;

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What kind of thing it is.
    pub kind: FindingKind,
    /// Whether it counts as damage.
    pub weight: Weight,
    /// The lineage's folder in the repository that it was found in.
    pub repository: String,
    /// What it concerns: an object, a segment, a timeline, a backup.
    pub object: String,
    /// What is wrong.
    pub what: String,
    /// Where a copy is that counts in its place: readers go on with it. Empty where there is none.
    pub also_in: Vec<String>,
    /// What it takes away.
    #[serde(skip)]
    pub takes: Takes,
}

/// Kinds of findings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FindingKind {
    /// An object is not what was stored: its bytes, its length, its checksum, its digest, or what it says to be.
    Damaged,
    /// Something is gone that was stored, or that is needed by what is.
    Missing,
    /// The archive ends earlier than it should.
    MissingEnd,
    /// Objects are sound, and contradict each other.
    Contradiction,
    /// WAL does not go on as it should from one segment to the next.
    Broken,
    /// A data page in a backup has a wrong checksum.
    Page,
    /// A roll-up or a list of the index says something else than what it was made from.
    Index,
    /// Something is there that this format does not name.
    Stranger,
}

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Weight {
    /// To be known; nothing is lost by it, and nothing has to be done.
    Note,
    /// Something is damaged or missing: the exit status is 4.
    Damage,
}

/// What a finding takes away from those who read this repository alone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Takes {
    /// Nothing.
    #[default]
    Nothing,
    /// These consecutive segments: they are stored and cannot be used, or are not stored.
    Segments {
        /// The first.
        first: SegmentName,
        /// The last (inclusive).
        last: SegmentName,
    },
    /// What parts hold of the segment that a timeline ends in, from where it is damaged on.
    Tail(SegmentName),
    /// The way to a timeline.
    History(TimelineId),
    /// A part of a backup: an object, its manifest, its record.
    Backup {
        /// Its id.
        id: String,
        /// The part.
        part: String,
    },
}

impl Finding {
    /// Returns damage.
    pub fn damage(
        kind: FindingKind,
        repository: &str,
        object: impl Into<String>,
        what: impl Into<String>,
        takes: Takes,
    ) -> Self {
        Self {
            kind,
            weight: Weight::Damage,
            repository: repository.to_owned(),
            object: object.into(),
            what: what.into(),
            also_in: Vec::new(),
            takes,
        }
    }

    /// Returns something to be known.
    pub fn note(
        kind: FindingKind,
        repository: &str,
        object: impl Into<String>,
        what: impl Into<String>,
    ) -> Self {
        Self { weight: Weight::Note, ..Self::damage(kind, repository, object, what, Takes::Nothing) }
    }

    /// Returns whether it counts as damage.
    pub fn is_damage(&self) -> bool {
        self.weight == Weight::Damage
    }
}
