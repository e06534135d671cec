//! What the DBA asked for: a recovery target, parsed from words. Pure: no clock, no environment.
//!
//! Nothing is guessed here. A time without an offset or zone is refused with the readings it could
//! have; a local time that a clock change made ambiguous or impossible is refused with the reason.

mod time;

use std::fmt;

use chrono::{DateTime, FixedOffset, NaiveDateTime, Utc};
use serde::{Deserialize, Serialize};
use walship::pg::{Lsn, TimelineId, Xid};

pub use time::{Zone, parse_time, utc_text};

/// The longest restore point name that PostgreSQL stores, in bytes.
///
/// Source: `src/include/access/xlog_internal.h`, MAXFNAMELEN less the final zero byte.
pub const RESTORE_POINT_NAME_MAX: usize = 63;

/// Where recovery is to stop, and on which timeline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecoveryTarget {
    /// What to stop at.
    pub kind: TargetKind,
    /// Whether what the target names is still replayed.
    pub stop: StopSide,
    /// The timeline to follow.
    pub timeline: TimelineChoice,
}

impl RecoveryTarget {
    /// Returns an inclusive target on the latest timeline.
    pub fn new(kind: TargetKind) -> Self {
        Self { kind, stop: StopSide::Inclusive, timeline: TimelineChoice::Latest }
    }

    /// Returns the command-line options that spell this target.
    pub fn options(&self) -> String {
        let mut text = match &self.kind {
            TargetKind::Time { time, .. } => format!("--to-time '{}'", utc_text(*time)),
            TargetKind::Lsn(lsn) => format!("--to-lsn {lsn}"),
            TargetKind::Xid(xid) => format!("--to-xid {xid}"),
            TargetKind::Name(name) => format!("--to-name {}", shell_word(name)),
            TargetKind::Latest => "--latest".to_owned(),
            TargetKind::Immediate => "--immediate".to_owned(),
        };
        if self.stop == StopSide::Exclusive {
            text.push_str(" --exclusive");
        }
        if let TimelineChoice::Number(timeline) = self.timeline {
            text.push_str(&format!(" --timeline {timeline}"));
        }
        text
    }
}

impl fmt::Display for RecoveryTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let before = self.stop == StopSide::Exclusive;
        match &self.kind {
            TargetKind::Time { time, zone } => {
                f.write_str(if before { "everything before " } else { "time " })?;
                f.write_str(&zone.both(*time))
            }
            TargetKind::Lsn(lsn) => {
                write!(f, "{} LSN {lsn}", if before { "everything before" } else { "the record at" })
            }
            TargetKind::Xid(xid) => {
                write!(f, "{} transaction {xid}", if before { "just before" } else { "just after" })
            }
            TargetKind::Name(name) => write!(f, "restore point {name:?}"),
            TargetKind::Latest => f.write_str("the latest commit in the repository"),
            TargetKind::Immediate => f.write_str("the earliest consistent moment of the backup"),
        }
    }
}

/// What recovery stops at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetKind {
    /// The last moment to keep.
    Time {
        /// The moment, in whole microseconds.
        time: DateTime<Utc>,
        /// The zone it was given in, for output.
        zone: Zone,
    },
    /// The record that starts at or first after a position.
    Lsn(Lsn),
    /// The end of a transaction.
    Xid(Xid),
    /// A restore point made with `pg_create_restore_point`.
    Name(String),
    /// The end of the archived WAL.
    Latest,
    /// The moment the backup becomes consistent.
    Immediate,
}

/// Whether the record that a target names is still replayed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopSide {
    /// Stop just after the target.
    Inclusive,
    /// Stop just before the target.
    Exclusive,
}

/// Which timeline to follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimelineChoice {
    /// The highest that is stored; resolved to a number by the plan, shown, and pinned.
    Latest,
    /// This one.
    Number(TimelineId),
}

/// Why words are no recovery target: a fact, and what to write instead.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}")]
pub struct TargetError {
    what: String,
    /// What to do about it, a sentence.
    pub next: String,
}

impl TargetError {
    pub(crate) fn new(what: impl Into<String>, next: impl Into<String>) -> Self {
        Self { what: what.into(), next: next.into() }
    }
}

impl From<TargetError> for walship::Error {
    fn from(error: TargetError) -> Self {
        Self::invalid(error.what.clone()).with_next(error.next)
    }
}

/// The target options of a command line as they were typed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TargetWords {
    /// `--to-time`.
    pub time: Option<String>,
    /// `--to-lsn`.
    pub lsn: Option<String>,
    /// `--to-xid`.
    pub xid: Option<String>,
    /// `--to-name`.
    pub name: Option<String>,
    /// `--latest`.
    pub latest: bool,
    /// `--immediate`.
    pub immediate: bool,
    /// `--timeline`.
    pub timeline: Option<String>,
    /// `--exclusive`.
    pub exclusive: bool,
}

impl TargetWords {
    /// Returns the target that the words spell. `local_offset` answers which offsets this machine's
    /// zone has at a local time (two where clocks are put back, none where that is not known); they are used
    /// only to name likely readings, never to choose one.
    ///
    /// # Errors
    /// [`TargetError`] when no target or more than one is given, when one does not parse, when a time
    /// has no offset or zone, and for `--exclusive` where it means nothing.
    pub fn parse(
        &self,
        local_offset: impl Fn(NaiveDateTime) -> Vec<FixedOffset>,
    ) -> Result<RecoveryTarget, TargetError> {
        let mut kinds = Vec::new();
        if let Some(text) = &self.time {
            let (time, zone) = parse_time(text, local_offset)?;
            kinds.push(TargetKind::Time { time, zone });
        }
        if let Some(text) = &self.lsn {
            kinds.push(TargetKind::Lsn(parse_lsn(text)?));
        }
        if let Some(text) = &self.xid {
            kinds.push(TargetKind::Xid(parse_xid(text)?));
        }
        if let Some(text) = &self.name {
            kinds.push(TargetKind::Name(parse_name(text)?));
        }
        if self.latest {
            kinds.push(TargetKind::Latest);
        }
        if self.immediate {
            kinds.push(TargetKind::Immediate);
        }
        const CHOICES: &str =
            "Give exactly one of --to-time, --to-lsn, --to-xid, --to-name, --latest, --immediate.";
        if kinds.len() > 1 {
            return Err(TargetError::new("more than one recovery target is given", CHOICES));
        }
        let kind = kinds.pop().ok_or_else(|| TargetError::new("no recovery target is given", CHOICES))?;
        let takes_exclusive =
            matches!(kind, TargetKind::Time { .. } | TargetKind::Lsn(_) | TargetKind::Xid(_));
        if self.exclusive && !takes_exclusive {
            return Err(TargetError::new(
                "--exclusive has no meaning for this target",
                "Use --exclusive with --to-time, --to-lsn or --to-xid only.",
            ));
        }
        let timeline = match self.timeline.as_deref() {
            None | Some("latest") => TimelineChoice::Latest,
            Some(text) => TimelineChoice::Number(parse_timeline(text)?),
        };
        let stop = if self.exclusive { StopSide::Exclusive } else { StopSide::Inclusive };
        Ok(RecoveryTarget { kind, stop, timeline })
    }
}

fn parse_lsn(text: &str) -> Result<Lsn, TargetError> {
    let lsn: Lsn = text.trim().parse().map_err(|_| {
        TargetError::new(format!("{text:?} is not an LSN"), "Write an LSN as PostgreSQL does: 16/B374D848.")
    })?;
    if !lsn.is_valid() {
        return Err(TargetError::new("LSN 0/0 means \"no position\"", "Give the position of a WAL record."));
    }
    Ok(lsn)
}

pub(crate) fn parse_xid(text: &str) -> Result<Xid, TargetError> {
    const NEXT: &str = "Give the 32-bit number that logs and WAL show, from 3 on; of a 64-bit \
                        pg_current_xact_id() take the remainder of division by 4294967296.";
    let wide: u64 = text
        .trim()
        .parse()
        .map_err(|_| TargetError::new(format!("{text:?} is not a transaction id"), NEXT))?;
    match u32::try_from(wide) {
        Err(_) => Err(TargetError::new(
            format!("{wide} has more than 32 bits: WAL knows it as {}", wide & 0xFFFF_FFFF),
            NEXT,
        )),
        Ok(0..=2) => Err(TargetError::new(format!("{wide} is not the id of a normal transaction"), NEXT)),
        Ok(xid) => Ok(xid),
    }
}

fn parse_name(text: &str) -> Result<String, TargetError> {
    if text.is_empty() || text.len() > RESTORE_POINT_NAME_MAX || text.contains(['\n', '\r', '\0']) {
        return Err(TargetError::new(
            format!("{text:?} cannot be the name of a restore point"),
            format!("A name has 1 to {RESTORE_POINT_NAME_MAX} bytes and no line breaks."),
        ));
    }
    Ok(text.to_owned())
}

pub(crate) fn parse_timeline(text: &str) -> Result<TimelineId, TargetError> {
    text.parse::<u32>().ok().and_then(TimelineId::new).ok_or_else(|| {
        TargetError::new(
            format!("{text:?} is not a timeline"),
            "Give a decimal number from 1 on, or \"latest\"; `pitr info` lists the timelines.",
        )
    })
}

/// Returns `text` as one word of a POSIX shell, quoted only when it has to be.
pub fn shell_word(text: &str) -> String {
    let plain = |b: u8| {
        b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'/' | b':' | b'@' | b'+' | b'=' | b',')
    };
    if !text.is_empty() && text.bytes().all(plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn no_local(_: NaiveDateTime) -> Vec<FixedOffset> {
        Vec::new()
    }

    #[test]
    fn exactly_one_target_and_exclusive_only_where_it_means_something() {
        let words = TargetWords { latest: true, ..TargetWords::default() };
        assert_eq!(words.parse(no_local).unwrap(), RecoveryTarget::new(TargetKind::Latest));
        assert!(TargetWords::default().parse(no_local).is_err());
        assert!(TargetWords { immediate: true, ..words.clone() }.parse(no_local).is_err());
        for (latest, immediate, name) in [(true, false, None), (false, true, None), (false, false, Some("x"))]
        {
            let words = TargetWords {
                latest,
                immediate,
                name: name.map(str::to_owned),
                exclusive: true,
                ..TargetWords::default()
            };
            assert!(words.parse(no_local).is_err());
        }
        let words = TargetWords {
            xid: Some("731".into()),
            exclusive: true,
            timeline: Some("3".into()),
            ..TargetWords::default()
        };
        let target = words.parse(no_local).unwrap();
        assert_eq!(target.stop, StopSide::Exclusive);
        assert_eq!(target.options(), "--to-xid 731 --exclusive --timeline 3");
    }

    #[test]
    fn xids_lsns_names_and_timelines_have_their_bounds() {
        assert_eq!(parse_xid("4294967295").unwrap(), u32::MAX);
        assert!(parse_xid("4294967299").unwrap_err().to_string().contains("WAL knows it as 3"));
        assert!(["", "-1", "0", "2", "x"].iter().all(|text| parse_xid(text).is_err()));
        assert!(parse_lsn("0/0").is_err() && parse_lsn("zz").is_err());
        assert!(parse_name(&"x".repeat(63)).is_ok() && parse_name(&"x".repeat(64)).is_err());
        assert!(parse_name("").is_err() && parse_name("a\nb").is_err());
        assert!(["0", "-1", "newest", ""].iter().all(|text| parse_timeline(text).is_err()));
    }

    #[test]
    fn shell_words_survive_a_shell() {
        assert_eq!(shell_word("before_drop"), "before_drop");
        assert_eq!(shell_word("it's late"), r"'it'\''s late'");
        assert_eq!(shell_word(""), "''");
    }
}
