//! Folders of a repository that cannot be read: nobody knows what lies in them, and nothing is missing because of them.

use std::collections::BTreeMap;

use walship::catalog::StoredSegments;
use walship::pg::{SegmentName, SegmentSize, TimelineId};
use walship::wal::rollup::Run;

use super::{Finding, FindingKind, Takes};

/// What listings of a repository leave out because it cannot be read: paths below the lineage's folder (empty: all of it),
/// with why.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Unlisted(pub BTreeMap<String, String>);

/// What is told of in the ledger, and where removals are.
const LEDGERS: [&str; 2] = ["gaps", "expiring"];

impl Unlisted {
    /// Returns whether everything can be read.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns whether backups may lie in it of which nothing is known.
    pub fn hides_backups(&self) -> bool {
        self.0.keys().any(|path| overlaps(path, "backups/catalog"))
    }

    /// Returns the path where what a finding says is missing may lie, or what tells why it is.
    pub fn may_hold(&self, finding: &Finding) -> Option<&str> {
        if !matches!(finding.kind, FindingKind::Missing | FindingKind::MissingEnd) {
            return None;
        }
        self.0.keys().find(|path| holds(path, &finding.takes)).map(String::as_str)
    }

    /// Returns those of these segments that may lie in it.
    pub fn among(&self, segments: &StoredSegments) -> StoredSegments {
        let size = segments.size();
        let mut among = StoredSegments::new(size);
        for timeline in segments.timelines() {
            for (from, until) in self.0.keys().filter_map(|path| numbers(path, timeline, size)) {
                for run in segments.runs(timeline) {
                    let (first, end) = (run.first.number(size).max(from), run.last.number(size) + 1);
                    let segments = end.min(until).saturating_sub(first);
                    if let (1.., Some(first)) = (segments, SegmentName::from_number(timeline, first, size)) {
                        among.insert_runs(&[Run { first, segments }], 0);
                    }
                }
            }
        }
        among
    }
}

/// Returns whether one of two paths is, or lies below, the other.
fn overlaps(path: &str, other: &str) -> bool {
    let below = |path: &str, folder: &str| {
        folder.is_empty()
            || path == folder
            || path.strip_prefix(folder).is_some_and(|rest| rest.starts_with('/'))
    };
    below(path, other) || below(other, path)
}

/// Returns the numbers of a timeline's segments that may lie there, the end excluded.
fn numbers(path: &str, timeline: TimelineId, size: SegmentSize) -> Option<(u64, u64)> {
    let folders = ["wal", "tail"].map(|folder| format!("{folder}/{}", timeline.hex()));
    let folder = folders.iter().find(|folder| overlaps(path, folder))?;
    let below = path.strip_prefix(&**folder).and_then(|rest| rest.strip_prefix('/'));
    let log = below.and_then(|below| below.split('/').next()).filter(|_| folder.starts_with("wal"));
    let Some(log) = log.and_then(|log| u32::from_str_radix(log, 16).ok()) else { return Some((0, u64::MAX)) };
    let first = SegmentName { timeline, log, seg: 0 }.number(size);
    let next = log.checked_add(1).map(|log| SegmentName { timeline, log, seg: 0 }.number(size));
    Some((first, next.unwrap_or(u64::MAX)))
}

fn holds(path: &str, takes: &Takes) -> bool {
    let ledger = LEDGERS.iter().any(|folder| overlaps(path, folder));
    let of_wal = |first: SegmentName, last: SegmentName| {
        let timelines = [first.timeline, last.timeline];
        // Segments are as many in each log as they are in any other: logs can be compared.
        let logs = first.log..=last.log.max(first.log);
        timelines.iter().any(|timeline| {
            let numbers = numbers(path, *timeline, SegmentSize::DEFAULT);
            let in_log = |log| SegmentName { timeline: *timeline, log, seg: 0 }.number(SegmentSize::DEFAULT);
            numbers.is_some_and(|(from, until)| in_log(*logs.start()) < until && from <= in_log(*logs.end()))
        })
    };
    match takes {
        Takes::Nothing => false,
        Takes::Segments { first, last } => ledger || of_wal(*first, *last),
        Takes::Tail(segment) => ledger || of_wal(*segment, *segment),
        Takes::History(timeline) => overlaps(path, &format!("wal/{}.history", timeline.hex())),
        Takes::Backup { id, .. } => {
            let folders = ["backups/catalog", "history/expires", "expiring", &*format!("backups/{id}")];
            folders.iter().any(|folder| overlaps(path, folder))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unlisted(path: &str) -> Unlisted {
        Unlisted(BTreeMap::from([(path.to_owned(), "no".to_owned())]))
    }

    #[test]
    fn what_may_lie_there_is_not_missing() {
        let name = |text: &str| text.parse::<SegmentName>().unwrap();
        let (first, last) = (name("0000000100000002000000F0"), name("000000010000000400000001"));
        let id = "20261121T010203Z-0123456789abcdef".to_owned();
        let wal = Takes::Segments { first, last };
        let tail = Takes::Tail(last);
        let history = Takes::History(TimelineId::new(2).unwrap());
        let backup = Takes::Backup { id: id.clone(), part: "record".to_owned() };
        let own = format!("backups/{id}/data");
        for (path, held) in [
            ("", &[&wal, &tail, &history, &backup][..]),
            ("wal", &[&wal, &tail, &history]),
            ("wal/00000001", &[&wal, &tail]),
            ("wal/00000002", &[]),
            ("wal/00000001/00000001", &[]),
            ("wal/00000001/00000002", &[&wal]),
            ("wal/00000001/00000003", &[&wal]),
            ("wal/00000001/00000004", &[&wal, &tail]),
            ("wal/00000001/00000004/000000010000000400000000.wal", &[&wal, &tail]),
            ("wal/00000001/00000005", &[]),
            ("wal/00000002.history", &[&history]),
            ("tail/00000001", &[&wal, &tail]),
            ("tail/00000001/000000010000000400000001", &[&wal, &tail]),
            ("tail/00000002", &[]),
            ("gaps/00000001", &[&wal, &tail]),
            ("expiring", &[&wal, &tail, &backup]),
            ("history", &[&backup]),
            ("history/restores", &[]),
            ("backups", &[&backup]),
            ("backups/catalog", &[&backup]),
            (&own, &[&backup]),
            ("backups/20261121T010203Z-0123456789abcdee", &[]),
            ("index", &[]),
        ] {
            for takes in [&wal, &tail, &history, &backup] {
                let of_kind = |kind| Finding::damage(kind, "here", "x", "gone", takes.clone());
                let holds = unlisted(path).may_hold(&of_kind(FindingKind::Missing)).is_some();
                assert_eq!(holds, held.contains(&takes), "{path} {takes:?}");
                assert!(unlisted(path).may_hold(&of_kind(FindingKind::Damaged)).is_none());
            }
        }
        assert!(unlisted("backups").hides_backups() && !unlisted(&own).hides_backups());
    }

    #[test]
    fn segments_are_found_by_their_log() {
        let size = SegmentSize::DEFAULT;
        let mut seen = StoredSegments::new(size);
        let first = "0000000100000001000000F0".parse().unwrap();
        seen.insert_runs(&[Run { first, segments: 300 }], 0);
        let count = |path: &str| unlisted(path).among(&seen).count(TimelineId::FIRST, 0, u64::MAX);
        let counts = ["wal/00000001/00000001", "wal/00000001/00000002", "wal/00000001/00000003"].map(count);
        assert_eq!(counts, [16, 256, 28]);
        assert_eq!([count("wal"), count("wal/00000002"), count("backups")], [300, 0, 0]);
    }
}
