//! Timelines and timeline history files.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{Lsn, ParseError};

/// A timeline id: 1 for a fresh cluster, never 0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct TimelineId(u32);

impl TimelineId {
    /// The timeline every cluster starts on.
    pub const FIRST: Self = Self(1);

    /// Returns the timeline with this number, or `None` for 0.
    pub fn new(number: u32) -> Option<Self> {
        (number != 0).then_some(Self(number))
    }

    /// Returns the number.
    pub fn get(self) -> u32 {
        self.0
    }

    /// Returns the eight upper-case hex digits that stand in file names.
    pub fn hex(self) -> String {
        format!("{:08X}", self.0)
    }
}

impl TryFrom<u32> for TimelineId {
    type Error = ParseError;

    fn try_from(number: u32) -> Result<Self, ParseError> {
        Self::new(number).ok_or_else(|| ParseError::new("timeline 0 does not exist"))
    }
}

impl From<TimelineId> for u32 {
    fn from(timeline: TimelineId) -> Self {
        timeline.0
    }
}

impl fmt::Display for TimelineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Debug for TimelineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "timeline {}", self.0)
    }
}

/// One line of a history file: `timeline` was left at `switch_lsn` (exclusive end).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistoryEntry {
    /// The ancestor timeline.
    pub timeline: TimelineId,
    /// The first position that no longer belongs to the ancestor.
    pub switch_lsn: Lsn,
    /// The human text that PostgreSQL wrote behind it.
    pub reason: String,
}

/// The ancestry of one timeline: what its `.history` file says, oldest ancestor first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimelineHistory {
    /// The timeline whose history this is.
    pub timeline: TimelineId,
    /// Its ancestors, oldest first, with strictly growing timeline ids and switch points that do not go
    /// backwards; empty for timeline 1.
    pub ancestors: Vec<HistoryEntry>,
}

impl TimelineHistory {
    /// The longest history file that is read; PostgreSQL has no limit, a hostile store must meet one.
    pub const MAX_BYTES: usize = 1 << 20;

    /// Returns the history of a timeline that has no ancestors.
    pub fn root(timeline: TimelineId) -> Self {
        Self { timeline, ancestors: Vec::new() }
    }

    /// Parses the text of `<timeline>.history`.
    ///
    /// Switch points may go backwards: a server that recovers along timeline 2 and stops before it begins
    /// writes a copy of 2's history and its own earlier switch point behind it. What a later line cuts off
    /// never happened on this path, so no ancestor's switch point is kept beyond a later one's.
    ///
    /// # Errors
    /// [`ParseError`] for a line PostgreSQL would refuse: no id, no LSN, ids that do not grow, an
    /// ancestor that is not older than the timeline itself.
    /// Source: `src/backend/access/transam/timeline.c`, readTimeLineHistory.
    pub fn parse(timeline: TimelineId, text: &str) -> Result<Self, ParseError> {
        if text.len() > Self::MAX_BYTES {
            return Err(ParseError::new(format!("history file of {timeline:?} has {} bytes", text.len())));
        }
        let mut ancestors: Vec<HistoryEntry> = Vec::new();
        for line in text.lines() {
            let line = line.trim_start();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let bad =
                |why: &str| ParseError::new(format!("history file of {timeline:?}: {why} in line {line:?}"));
            let (id, rest) =
                line.split_once(|c: char| c.is_whitespace()).ok_or_else(|| bad("no switch point"))?;
            let id = id.parse::<u32>().ok().and_then(TimelineId::new).ok_or_else(|| bad("no timeline id"))?;
            let rest = rest.trim_start();
            let (lsn, reason) = rest.split_once(|c: char| c.is_whitespace()).unwrap_or((rest, ""));
            let switch_lsn = lsn.parse::<Lsn>().map_err(|_| bad("no switch point"))?;
            if ancestors.last().is_some_and(|last| id <= last.timeline) {
                return Err(bad("timeline ids do not grow"));
            }
            ancestors.push(HistoryEntry { timeline: id, switch_lsn, reason: reason.trim().to_owned() });
        }
        if ancestors.last().is_some_and(|last| last.timeline >= timeline) {
            return Err(ParseError::new(format!(
                "history file of {timeline:?} names an ancestor that is not older"
            )));
        }
        let mut cut_at = Lsn(u64::MAX);
        for entry in ancestors.iter_mut().rev() {
            cut_at = cut_at.min(entry.switch_lsn);
            entry.switch_lsn = cut_at;
        }
        Ok(Self { timeline, ancestors })
    }

    /// Returns the timeline that the byte at `lsn` belongs to on the way to this timeline.
    ///
    /// A position exactly at a switch point belongs to the descendant.
    /// Source: `timeline.c`, tliOfPointInHistory.
    pub fn timeline_of(&self, lsn: Lsn) -> TimelineId {
        self.ancestors
            .iter()
            .find(|entry| lsn < entry.switch_lsn)
            .map_or(self.timeline, |entry| entry.timeline)
    }

    /// Returns where `timeline` was left on the way to this timeline; `None` when it was not left
    /// (it is this timeline) or is no ancestor.
    pub fn switch_lsn_of(&self, timeline: TimelineId) -> Option<Lsn> {
        self.ancestors.iter().find(|entry| entry.timeline == timeline).map(|entry| entry.switch_lsn)
    }

    /// Returns where this timeline itself begins; `None` for one without ancestors.
    pub fn begin_lsn(&self) -> Option<Lsn> {
        self.ancestors.last().map(|entry| entry.switch_lsn)
    }

    /// Returns whether `timeline` is this timeline or one of its ancestors.
    pub fn contains(&self, timeline: TimelineId) -> bool {
        timeline == self.timeline || self.ancestors.iter().any(|entry| entry.timeline == timeline)
    }
}

/// The file name of a timeline's history: `00000002.history`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HistoryFileName(pub TimelineId);

impl fmt::Display for HistoryFileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.history", self.0.hex())
    }
}

impl FromStr for HistoryFileName {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let bad = || ParseError::new(format!("{text:?} is not the name of a history file"));
        let digits = text.strip_suffix(".history").ok_or_else(bad)?;
        super::segment::upper_hex(digits, 8).and_then(TimelineId::new).map(Self).ok_or_else(bad)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tli(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    #[test]
    fn history_follows_postgres_rules() {
        let text =
            "# comment\n1\t0/5000000\tno recovery target specified\n\n3\t0/7000028\tbefore 2026-01-01\n";
        let history = TimelineHistory::parse(tli(4), text).unwrap();
        assert_eq!(history.ancestors.len(), 2);
        assert_eq!(history.timeline_of(Lsn(0x0500_0000 - 1)), tli(1));
        assert_eq!(history.timeline_of(Lsn(0x0500_0000)), tli(3));
        assert_eq!(history.timeline_of(Lsn(0x0700_0028)), tli(4));
        assert_eq!(history.switch_lsn_of(tli(3)), Some(Lsn(0x0700_0028)));
        assert_eq!(history.begin_lsn(), Some(Lsn(0x0700_0028)));
        assert!(history.contains(tli(1)) && !history.contains(tli(2)));
    }

    #[test]
    fn a_switch_point_that_goes_backwards_cuts_off_what_came_before() {
        // Recovered along timeline 2, which begins at 0/7000000, and stopped before that.
        let text = "1\t0/7000000\tno recovery target specified\n\n2\t0/5000000\tafter LSN 0/4FFFFD8\n";
        let history = TimelineHistory::parse(tli(3), text).unwrap();
        assert_eq!(history.timeline_of(Lsn(0x0500_0000 - 1)), tli(1));
        for lsn in [0x0500_0000, 0x0600_0000, 0x0700_0000, 0x0800_0000] {
            assert_eq!(history.timeline_of(Lsn(lsn)), tli(3), "{lsn:X}");
        }
        assert_eq!(history.switch_lsn_of(tli(1)), Some(Lsn(0x0500_0000)));
        assert_eq!(history.begin_lsn(), Some(Lsn(0x0500_0000)));
    }

    #[test]
    fn history_refuses_nonsense() {
        for text in ["x 0/1", "1", "1\tzz", "2\t0/1\n1\t0/2", "5\t0/1", "0\t0/1"] {
            assert!(TimelineHistory::parse(tli(5), text).is_err(), "{text:?}");
        }
    }
}
