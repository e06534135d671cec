//! From the target options to one target; an event's name is looked up in the archived WAL first.

use walship::Result;

use super::args::TargetArgs;
use super::output::clean;
use super::source::Source;
use crate::execute::{Logged, read_log};
use crate::log::Before;
use crate::plan::Refusal;
use crate::target::{RecoveryTarget, StopSide, TargetKind, TimelineChoice, utc_text};

/// What was asked for.
pub(super) enum Asked {
    Target(RecoveryTarget),
    Before(Before, TimelineChoice),
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
        let (before, timeline) = match self {
            Self::Target(target) => return Ok(Ok(target.clone())),
            Self::Before(before, timeline) => (before, *timeline),
        };
        let log = match read_log(&source.repository, &source.catalog, &before.query(timeline), None).await? {
            Logged::Log(log) => log,
            Logged::Refused(refusal) => return Ok(Err(refusal)),
        };
        let entry = match before.choose(&log) {
            Ok(entry) => entry,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let time = entry.time.map_or_else(String::new, |time| format!(" at {}", utc_text(time)));
        eprintln!("before: {}{time}: {}", clean(&entry.what), entry.just_before);
        if let Some(sql) = &entry.afterwards {
            eprintln!("        then, on the restored server: {sql}");
        }
        if log.is_unknown_behind(entry.lsn) {
            eprintln!("        WAL behind it is missing or cannot be read: a later such event may lie there");
        }
        Ok(Ok(RecoveryTarget {
            kind: TargetKind::Lsn(entry.just_before_lsn),
            stop: StopSide::Exclusive,
            timeline,
        }))
    }
}
