//! What can be reached on both sides of what is in the way, each as options that lead to a plan.
//!
//! Nothing is offered that would be refused in its turn: WAL that recovery cannot cross ends what a backup
//! leads to here as it does in a plan.

use walship::catalog::BackupRecord;
use walship::pg::{Lsn, SegmentName};
use walship::wal::event::{EventKind, WalEvent};
use walship::wal::rollup::Class;

use super::assemble::COMMITS;
use super::chain::build_chain;
use super::extras::{begins_anew, is_minimal};
use super::gap::is_on_path;
use super::reach::aligned;
use super::walk::{Seek, Walk};
use super::{Candidate, ChainEnding, Halt, PlanOptions, Question, RefusalKind, Suggestion};
use crate::target::{TimelineChoice, shell_word, utc_text};

/// What is offered for one question.
pub(super) struct Offers<'a> {
    question: &'a Question<'a>,
    options: &'a PlanOptions,
    /// Damaged segments that were met.
    pub(super) damaged: Vec<SegmentName>,
}

/// What recovery cannot cross.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Obstacle {
    /// The record at which `wal_level` became minimal.
    Minimal(Lsn),
    /// The record at which WAL begins anew.
    Reset(Lsn),
    /// A segment that cannot be decoded; from here on the chain uses it.
    Undecoded(Lsn),
    /// A segment that is damaged where it is stored.
    Damaged(Lsn, SegmentName),
}

impl Obstacle {
    fn lsn(self) -> Lsn {
        match self {
            Self::Minimal(lsn) | Self::Reset(lsn) | Self::Undecoded(lsn) | Self::Damaged(lsn, _) => lsn,
        }
    }
}

/// How far a backup leads.
pub(super) struct Usable {
    /// Every record that ends here or before can be replayed.
    pub(super) end: Lsn,
    obstacle: Option<Obstacle>,
}

impl<'a> Offers<'a> {
    pub(super) fn new(question: &'a Question<'a>, options: &'a PlanOptions) -> Self {
        Self { question, options, damaged: Vec::new() }
    }

    /// Returns a backup with the WAL behind it.
    pub(super) fn behind<'b>(&self, backup: &'b BackupRecord) -> Candidate<'b> {
        let chain = build_chain(self.question.catalog, self.question.history, backup.start_lsn);
        Candidate { backup, chain }
    }

    /// Returns what can be reached on both sides of a position that recovery cannot cross.
    pub(super) fn around(&mut self, at: Lsn) -> Result<(Option<Suggestion>, Option<Suggestion>), Halt> {
        let asked = |backup: &&BackupRecord| {
            is_on_path(self.question.history, backup)
                && self.options.backup.as_ref().is_none_or(|id| id == &backup.id)
        };
        let mut backups: Vec<_> = self.question.catalog.backups.iter().filter(asked).collect();
        backups.sort_by(|a, b| super::newest_first(a, b));
        let (behind, ahead): (Vec<_>, Vec<_>) = backups.into_iter().partition(|backup| backup.stop_lsn > at);
        Ok((self.first_before(ahead)?, self.first_after(behind.into_iter().rev())?))
    }

    /// Returns the last commit that the first of these backups leads to which leads to any.
    pub(super) fn first_before<'b>(
        &mut self,
        newest_first: impl IntoIterator<Item = &'b BackupRecord>,
    ) -> Result<Option<Suggestion>, Halt> {
        for backup in newest_first {
            if let Some(suggestion) = self.last_reachable(backup)? {
                return Ok(Some(suggestion));
            }
        }
        Ok(None)
    }

    /// Returns the first moment of the first of these backups that has one.
    pub(super) fn first_after<'b>(
        &mut self,
        oldest_first: impl IntoIterator<Item = &'b BackupRecord>,
    ) -> Result<Option<Suggestion>, Halt> {
        for backup in oldest_first {
            if let Some(suggestion) = self.consistent_point(&self.behind(backup))? {
                return Ok(Some(suggestion));
            }
        }
        Ok(None)
    }

    /// Returns the last commit that can be reached from a backup, as a target.
    fn last_reachable(&mut self, backup: &BackupRecord) -> Result<Option<Suggestion>, Halt> {
        let candidate = &self.behind(backup);
        let chain = &candidate.chain;
        if chain.is_empty() || chain.end() < backup.stop_lsn {
            return Ok(None);
        }
        let walk = Walk::new(self.question, chain);
        let mut usable = self.usable(&walk, chain.len() - 1)?;
        let commit = loop {
            if usable.end < backup.stop_lsn {
                return Ok(None);
            }
            let end = usable.end;
            let whole = |event: &WalEvent| event.end_lsn <= end && (COMMITS.matches)(event);
            let seek = Seek { maybe: COMMITS.maybe, matches: &whole };
            let found = walk.last(chain.step_reaching(end), end, &seek);
            match found.and_then(|found| Ok((found, self.is_open_end(&usable, &walk)?))) {
                Ok((found, true)) => return Ok(Some(self.latest(found.map(|(_, event)| event)))),
                Ok((found, false)) => break found.map(|(_, event)| event),
                Err(Halt::Unreadable(name)) => {
                    self.damaged.push(name);
                    let from = name.start(walk.size).max(chain.start);
                    usable = Usable { end: from, obstacle: Some(Obstacle::Damaged(from, name)) };
                }
                Err(halt) => return Err(halt),
            }
        };
        let Some(event) = commit.filter(|event| aligned(event.end_lsn) >= backup.stop_lsn) else {
            return self.consistent_point(candidate);
        };
        let before = match usable.obstacle {
            None => "the gap",
            Some(Obstacle::Minimal(_)) => "wal_level became minimal",
            Some(Obstacle::Reset(_)) => "pg_resetwal was run",
            Some(Obstacle::Undecoded(_)) => "WAL that cannot be decoded",
            Some(Obstacle::Damaged(..)) => "WAL that is damaged where it is stored",
        };
        Ok(Some(Suggestion {
            options: format!("--to-lsn {}{}", event.lsn, self.pinned()),
            what: format!("{}, the last before {before}", named(event)),
        }))
    }

    /// Returns whether all that is archived can be replayed, and nothing is known to be missing behind it.
    fn is_open_end(&self, usable: &Usable, walk: &Walk<'_>) -> Result<bool, Halt> {
        Ok(usable.obstacle.is_none()
            && walk.chain.ending == ChainEnding::EndOfArchive
            && walk.end_of_records().map(|_| true)?)
    }

    fn latest(&self, last: Option<&WalEvent>) -> Suggestion {
        let last = last.map_or_else(String::new, |event| format!("; the last is {}", named(event)));
        Suggestion {
            options: format!("--latest{}", self.pinned()),
            what: format!("everything archived{last}"),
        }
    }

    /// Returns the first moment that can be reached from a backup, as a target.
    fn consistent_point(&mut self, candidate: &Candidate<'_>) -> Result<Option<Suggestion>, Halt> {
        match self.try_consistent_point(candidate) {
            Err(Halt::Unreadable(name)) => {
                self.damaged.push(name);
                Ok(None)
            }
            Err(Halt::Refuse(refusal)) if refusal.kind == RefusalKind::Undecoded => Ok(None),
            other => other,
        }
    }

    fn try_consistent_point(&mut self, candidate: &Candidate<'_>) -> Result<Option<Suggestion>, Halt> {
        let (backup, chain) = (candidate.backup, &candidate.chain);
        if chain.end() < backup.stop_lsn {
            return Ok(None);
        }
        let walk = Walk::new(self.question, chain);
        let own = self.usable(&walk, chain.step_reaching(backup.stop_lsn))?;
        if own.end < backup.stop_lsn {
            return Ok(None);
        }
        let what = format!("the backup of {}, consistent at {}", utc_text(backup.finished), backup.stop_lsn);
        let id = shell_word(&backup.id);
        let timeline = self.asked_timeline();
        // Recovery notices consistency when it reads the record behind it.
        if let Some(next) = walk.record_at(backup.stop_lsn)? {
            let options = format!("--immediate --backup {id}{timeline}");
            let served = match self.usable(&walk, chain.step_reaching(next.end_lsn))?.obstacle {
                None => true,
                // It is read, and not applied.
                Some(Obstacle::Minimal(lsn)) => lsn >= next.lsn,
                Some(Obstacle::Reset(lsn)) => lsn >= next.end_lsn,
                Some(_) => false,
            };
            return Ok(served.then_some(Suggestion { options, what }));
        }
        let usable = self.usable(&walk, chain.len() - 1)?;
        let ends = self.is_open_end(&usable, &walk)? && walk.end_of_records()? >= backup.stop_lsn;
        let options = format!("--latest --backup {id}{timeline}");
        Ok(ends.then_some(Suggestion { options, what }))
    }

    /// Returns how far the steps `0..=last` of a chain can be replayed.
    pub(super) fn usable(&mut self, walk: &Walk<'_>, last: usize) -> Result<Usable, Halt> {
        let obstacle = first_obstacle(walk, last)?;
        if let Some(Obstacle::Damaged(_, name)) = obstacle {
            self.damaged.push(name);
        }
        let end = obstacle.map_or(walk.chain.end(), Obstacle::lsn);
        Ok(Usable { end, obstacle })
    }

    /// Returns the options that keep a suggestion to the backup and the timeline that were asked for.
    pub(super) fn pinned(&self) -> String {
        let backup = self.options.backup.as_ref();
        let backup = backup.map_or_else(String::new, |id| format!(" --backup {}", shell_word(id)));
        format!("{backup}{}", self.asked_timeline())
    }

    fn asked_timeline(&self) -> String {
        match self.question.target.timeline {
            TimelineChoice::Number(timeline) => format!(" --timeline {timeline}"),
            TimelineChoice::Latest => String::new(),
        }
    }
}

fn named(event: &WalEvent) -> String {
    let time = event.kind.stop_time().map(utc_text).unwrap_or_default();
    let xid = event.kind.ended_xid(event.xid).unwrap_or(event.xid);
    format!("the commit of transaction {xid} at {time}")
}

/// Returns the first thing in the steps `0..=last` that recovery cannot cross.
fn first_obstacle(walk: &Walk<'_>, last: usize) -> Result<Option<Obstacle>, Halt> {
    let mut at = 0;
    while at <= last && at < walk.chain.len() {
        let to = walk.listed_together(at, last, Class::Planning);
        match walk.notable(at, to, Class::Planning) {
            Ok(events) => {
                let found = events.iter().find_map(|event| match &event.kind {
                    EventKind::ParameterChange { settings } if is_minimal(settings) => {
                        Some(Obstacle::Minimal(event.lsn))
                    }
                    _ => begins_anew(event, walk.chain.start).then_some(Obstacle::Reset(event.lsn)),
                });
                if found.is_some() {
                    return Ok(found);
                }
            }
            Err(Halt::Refuse(refusal)) if refusal.kind == RefusalKind::Undecoded => {
                return Ok(Some(Obstacle::Undecoded(refusal.at.unwrap_or(walk.chain.step(at).from))));
            }
            Err(Halt::Unreadable(name)) => {
                let from = name.start(walk.size).max(walk.chain.start);
                return Ok(Some(Obstacle::Damaged(from, name)));
            }
            Err(halt) => return Err(halt),
        }
        at = to + 1;
    }
    Ok(None)
}
