//! From the target options to one target; an event's name is looked up in the archived WAL first.

use walship::{Error, Result};

use super::args::TargetArgs;
use super::output::clean;
use super::source::Source;
use crate::execute::{Logged, read_log};
use crate::log::{Before, Choice, Entry, Line, RemovalRecord};
use crate::plan::Refusal;
use crate::target::{RecoveryTarget, StopSide, TargetKind, TimelineChoice, utc_text};

/// What was asked for.
pub(super) enum Asked {
    Target(RecoveryTarget),
    Before(Before, TimelineChoice),
}

/// A drop whose names are not known: where recovery ends just before it, it has to be shown that it is the one that is
/// meant, else the refusal stands.
#[derive(Debug)]
pub(super) struct Unproven {
    /// What was asked for.
    pub(super) before: Before,
    /// What its record says it took away.
    pub(super) record: RemovalRecord,
    /// What is said where it is not the one.
    pub(super) refusal: Box<Refusal>,
}

/// What becomes of the only drop that may be meant and has no name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unnamed {
    /// It is a refusal.
    Refused,
    /// It is a target that has to be proven.
    Proven,
}

impl Asked {
    /// Reads the options; nothing is looked up yet.
    pub(super) fn of(args: &TargetArgs) -> Result<Self> {
        Ok(match args.before()? {
            Some((before, timeline)) => Self::Before(before, timeline),
            None => Self::Target(args.target()?),
        })
    }

    /// Returns the target, or why the words do not tell which event is meant.
    pub(super) async fn target(&self, source: &Source) -> Result<Result<RecoveryTarget, Box<Refusal>>> {
        Ok(self.resolve(source, Unnamed::Refused).await?.map(|(target, _)| target))
    }

    /// Returns the target, and what must be proven of it when recovery ended there; or why the words do not tell which
    /// event is meant.
    pub(super) async fn target_to_prove(
        &self,
        source: &Source,
    ) -> Result<Result<(RecoveryTarget, Option<Unproven>), Box<Refusal>>> {
        self.resolve(source, Unnamed::Proven).await
    }

    async fn resolve(
        &self,
        source: &Source,
        unnamed: Unnamed,
    ) -> Result<Result<(RecoveryTarget, Option<Unproven>), Box<Refusal>>> {
        let (before, timeline) = match self {
            Self::Target(target) => return Ok(Ok((target.clone(), None))),
            Self::Before(before, timeline) => (before, *timeline),
        };
        let log = match read_log(&source.repository, &source.catalog, &before.query(timeline), None).await? {
            Logged::Log(log) => log,
            Logged::Refused(refusal) => return Ok(Err(refusal)),
        };
        let (entry, unproven) = match before.choose(&log) {
            Ok(Choice::Known(entry)) => (entry, None),
            Ok(Choice::Unproven(entry, refusal)) if unnamed == Unnamed::Proven => {
                let record = record_of(source, before, timeline, entry).await?;
                (entry, Some(Unproven { before: before.clone(), record, refusal }))
            }
            Ok(Choice::Unproven(_, refusal)) | Err(refusal) => return Ok(Err(refusal)),
        };
        let time = entry.time.map_or_else(String::new, |time| format!(" at {}", utc_text(time)));
        eprintln!("before: {}{time}: {}", clean(&entry.what), entry.just_before);
        if unproven.is_some() {
            eprintln!(
                "        it has no name in the archive: whether it is the one is seen when recovery ended there"
            );
        }
        if let Some(sql) = &entry.afterwards {
            eprintln!("        then, on the restored server: {sql}");
        }
        if log.is_unknown_behind(entry.lsn) {
            eprintln!("        WAL behind it is missing or cannot be read: a later such event may lie there");
        }
        let target = RecoveryTarget {
            kind: TargetKind::Lsn(entry.just_before_lsn),
            stop: StopSide::Exclusive,
            timeline,
        };
        Ok(Ok((target, unproven)))
    }
}

/// Returns all that the record of an event of the log says it took away.
async fn record_of(
    source: &Source,
    before: &Before,
    timeline: TimelineChoice,
    entry: &Entry,
) -> Result<RemovalRecord> {
    let query = before.whole_query(timeline, entry);
    let record = match read_log(&source.repository, &source.catalog, &query, None).await? {
        Logged::Log(log) => log.lines.into_iter().find_map(|line| match line {
            Line::Event(again) if again.lsn == entry.lsn => again.record,
            _ => None,
        }),
        Logged::Refused(_) => None,
    };
    record.ok_or_else(|| {
        Error::missing(format!("the record at {} is not in the archived WAL any more", entry.lsn))
    })
}
