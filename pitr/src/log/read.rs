//! Reads a log, step after step along the way to a timeline.

use std::collections::BTreeSet;

use chrono::{DateTime, Utc};
use walship::catalog::Catalog;
use walship::pg::{Lsn, SegmentName, TimelineHistory, TimelineId, Xid};
use walship::wal::event::{EventKind, WalEvent};
use walship::wal::rollup::{Class, Facts};

use super::describe::{Drops, Surroundings, deletes_of, entry_of, names_databases, record_of, time_of};
use super::heavy::Heavy;
use super::names::{Documents, NamesAt};
use super::{Entry, Kind, Line, Log, PreparedEnd, Query, RELATIONS_MAX};
use crate::plan::{
    Chain, ChainEnding, Evidence, Halt, Known, Surveyed, Walk, Wanted, chains_of, resolve_timeline,
};
use crate::target::TimelineChoice;

/// How far behind the transactions that end in a segment a subtransaction is looked for that ends there.
const SUBXID_NEAR: Xid = 64;

/// What must be known before a log goes on.
#[derive(Debug)]
pub(crate) enum Need {
    /// What the planner's rooms ask for, or why there is no way.
    Halt(Halt),
    /// The names saved beside the backup with this id.
    Names(String),
}

impl From<Halt> for Need {
    fn from(halt: Halt) -> Self {
        Self::Halt(halt)
    }
}

/// A log on its way: what was found so far, and where it goes on.
#[derive(Debug)]
pub(crate) struct Reading {
    log: Log,
    query: Query,
    classes: Vec<Class>,
    history: Option<TimelineHistory>,
    /// The timeline that targets name, where there is more than one.
    pinned: Option<TimelineId>,
    chains: Vec<Chain>,
    /// The chain and the step that come next.
    chain: usize,
    step: usize,
    forks_told: usize,
    /// The last known time before that step.
    last_time: Option<DateTime<Utc>>,
    drops: Drops,
    heavy: Heavy,
    /// Prepared transactions among the lines whose end was not read.
    open: BTreeSet<Xid>,
}

/// What one stretch of the way added.
struct Found {
    lines: Vec<Line>,
    /// The step behind it; `None` behind the last of a chain.
    next: Option<usize>,
    /// The last known time in or before it.
    last_time: Option<DateTime<Utc>>,
    /// The drops that began in or before it.
    drops: Drops,
    /// The deletes of transactions that did not end in or before it.
    heavy: Heavy,
    /// Deleted rows in it of which it is not known who deleted them.
    deletes_uncounted: u64,
    /// Ends of prepared transactions in it.
    prepared_ends: Vec<(Xid, PreparedEnd)>,
}

impl Reading {
    /// Returns a log of which nothing was read.
    ///
    /// # Errors
    /// [`Halt::Refuse`] when the way to the timeline is not known.
    pub(crate) fn new(catalog: &Catalog, query: Query) -> Result<Self, Halt> {
        let timelines = catalog.timelines();
        let empty = timelines.is_empty() && query.timeline == TimelineChoice::Latest;
        let history = if empty { None } else { Some(resolve_timeline(catalog, query.timeline)?) };
        let chains = history.as_ref().map(|history| chains_of(catalog, history)).unwrap_or_default();
        let timeline = history.as_ref().map(|history| history.timeline);
        let on_the_way = |timeline: &TimelineId| {
            history.as_ref().is_some_and(|history| {
                history.timeline == *timeline || history.switch_lsn_of(*timeline).is_some()
            })
        };
        let mut left_out = timelines.clone();
        left_out.retain(|timeline| catalog.has_wal_of(*timeline));
        left_out.retain(|timeline| !on_the_way(timeline));
        let log = Log {
            cluster: catalog.cluster.clone(),
            lineage: catalog.lineage.number,
            timeline,
            from_lsn: chains.first().map(|chain| chain.start),
            until_lsn: chains.first().map(|chain| chain.start),
            lines: Vec::new(),
            more: false,
            timelines_left_out: left_out,
            deletes_uncounted: 0,
            names_unread: Vec::new(),
        };
        Ok(Self {
            classes: classes_of(&query.kinds),
            log,
            query,
            pinned: timeline.filter(|_| timelines.len() > 1),
            history,
            chains,
            chain: 0,
            step: 0,
            forks_told: 0,
            last_time: None,
            drops: Drops::default(),
            heavy: Heavy::default(),
            open: BTreeSet::new(),
        })
    }

    /// Returns what was found.
    pub(crate) fn into_log(self) -> Log {
        self.log
    }

    /// Says that a backup's names cannot be read.
    pub(crate) fn note_unread(&mut self, backup: &str, why: String) {
        self.log.names_unread.push((backup.to_owned(), why));
    }

    /// Returns the segment before which nothing needs to be known any more.
    pub(crate) fn at(&self) -> Option<SegmentName> {
        let chain = self.chains.get(self.chain)?;
        (self.step < chain.len()).then(|| chain.step(self.step).segment)
    }

    /// Reads what is known together; returns whether there is more to read.
    ///
    /// # Errors
    /// What must be known first; nothing was read then.
    pub(crate) fn advance(
        &mut self,
        catalog: &Catalog,
        evidence: &Evidence,
        documents: &Documents,
    ) -> Result<bool, Need> {
        let Some(chain) = self.chains.get(self.chain) else { return Ok(false) };
        let Found { mut lines, next, last_time, drops, heavy, deletes_uncounted, prepared_ends } =
            if self.step < chain.len() {
                self.survey(chain, catalog, evidence, documents)?
            } else {
                let gap = match &chain.ending {
                    ChainEnding::Gap(gap) => Some(Line::Gap(gap.clone())),
                    ChainEnding::EndOfArchive => None,
                };
                // What a clock said before a gap says nothing of what comes behind it.
                let (lines, drops, heavy) = (gap.into_iter().collect(), Drops::default(), Heavy::default());
                Found {
                    lines,
                    next: None,
                    last_time: None,
                    drops,
                    heavy,
                    deletes_uncounted: 0,
                    prepared_ends: Vec::new(),
                }
            };
        let until = match next {
            Some(next) => chain.step(next - 1).to,
            None => chain.end(),
        };
        self.tell_forks(until, next.is_none(), &mut lines);
        for line in lines {
            if self.log.lines.len() >= self.query.limit {
                self.log.more = true;
                return Ok(false);
            }
            self.log.until_lsn = Some(position(&line));
            if let Line::Event(entry) = &line
                && entry.kinds.contains(&Kind::Prepare)
            {
                self.open.extend(entry.xid);
            }
            self.log.lines.push(line);
        }
        for (xid, end) in prepared_ends {
            self.open.remove(&xid);
            self.log.end_prepared(xid, end);
        }
        self.log.until_lsn = Some(until);
        (self.last_time, self.drops, self.heavy) = (last_time, drops, heavy);
        self.log.deletes_uncounted = self.log.deletes_uncounted.saturating_add(deletes_uncounted);
        match next {
            Some(next) => self.step = next,
            None => (self.chain, self.step) = (self.chain + 1, 0),
        }
        let goes_on = self.at().is_some() || self.chain < self.chains.len();
        if goes_on && self.log.lines.len() >= self.query.limit {
            self.log.more = self.at().is_some() || self.chain + 1 < self.chains.len();
        }
        Ok(goes_on && !self.log.more)
    }

    /// Returns what is known together from the next step on.
    fn survey(
        &self,
        chain: &Chain,
        catalog: &Catalog,
        evidence: &Evidence,
        documents: &Documents,
    ) -> Result<Found, Need> {
        let walk = Walk { chain, evidence, size: catalog.lineage.segment_size, cut: None };
        let query = &self.query;
        let wanted = Wanted {
            classes: &self.classes,
            deletes: query.wants_deletes(),
            ends: &|facts| {
                let heavy = query.wants_deletes() && self.heavy.may_end_in(facts, query.delete_rows);
                let prepared = query.wants_prepared()
                    && (facts.counts.prepares > 0
                        || facts
                            .ended_xids
                            .is_some_and(|(low, high)| self.open.range(low..=high).next().is_some()));
                heavy || prepared || may_hold_ends(query, facts)
            },
            matches: &|event| {
                let end = query.wants_deletes() && event.kind.stop_time().is_some();
                let prepared = query.wants_prepared() && prepared_end(event).is_some();
                prepared
                    || (end || query.needs(event)) && time_of(event).is_none_or(|time| query.covers(time))
            },
        };
        let known = match walk.survey(self.step, &wanted)? {
            Surveyed::Known(known) => known,
            Surveyed::Unknown { segment, undecoded } => {
                let step = chain.step(self.step);
                let damaged = undecoded.is_none();
                let why = undecoded.unwrap_or_else(|| "it is damaged where it is stored".to_owned());
                let line = Line::Unknown { segment, from: step.from, to: step.to, damaged, why };
                let next = Some(self.step + 1);
                let (last_time, drops, heavy) = (self.last_time, self.drops.clone(), self.heavy.clone());
                return Ok(Found {
                    lines: vec![line],
                    next,
                    last_time,
                    drops,
                    heavy,
                    deletes_uncounted: 0,
                    prepared_ends: Vec::new(),
                });
            }
        };
        let (mut lines, mut drops, mut heavy) = (Vec::new(), self.drops.clone(), self.heavy.clone());
        let mut prepared_ends = Vec::new();
        heavy.add(&known.deletes);
        for event in &known.events {
            drops.note(event);
            prepared_ends.extend(prepared_end(event).filter(|_| query.wants_prepared()));
            if time_of(event).is_some_and(|time| !query.covers(time)) {
                continue;
            }
            if let EventKind::WalBegins { time } = event.kind {
                // initdb writes one as well, into the first segment of all; pg_resetwal never does.
                if query.picks(event) && event.lsn >= Lsn(2 * catalog.lineage.segment_size.bytes()) {
                    let timeline = self.timeline_at(event.lsn);
                    lines.push(Line::WalBegins { lsn: event.lsn, timeline, time });
                }
                continue;
            }
            let mut deleted = heavy.end(event, query.delete_rows);
            deleted.retain(|_| query.wants_deletes() && query.is_of_transaction(event));
            if deleted.is_empty() && !query.picks(event) {
                continue;
            }
            let names = match names_databases(event) || !deleted.is_empty() {
                true => documents.at(catalog, self.history.as_ref(), event.lsn).map_err(Need::Names)?,
                false => NamesAt::default(),
            };
            let timeline = self.timeline_at(event.lsn);
            let around = Surroundings { timeline, pinned: self.pinned, drops: &drops, names };
            let mut found = Vec::new();
            if !deleted.is_empty() {
                found.push(deletes_of(event, &deleted, &around));
            }
            if query.picks(event) {
                found.push(entry_of(event, &around));
            }
            found.retain(|(entry, relations)| query.names(entry, relations));
            for (mut entry, relations) in found {
                entry.open = chain.step_of(event.lsn).is_some_and(|step| chain.is_open(step));
                if let Some(table) = &query.table {
                    // What is asked for is among those that are listed.
                    let mut sorted = relations;
                    sorted.sort_by_key(|relation| !table.matches(relation));
                    sorted.truncate(RELATIONS_MAX);
                    entry.relations = sorted;
                }
                if query.whole {
                    entry.record = record_of(event);
                }
                if let Some(xid) = query.xid.filter(|xid| entry.xid != Some(*xid)) {
                    entry.what.push_str(&format!("; {xid} is a subtransaction of it"));
                }
                if entry.time.is_some() || self.give_bounds(&mut entry, &known, &walk)? {
                    lines.push(Line::Event(Box::new(entry)));
                }
            }
        }
        let last_time = known.times.last().map(|(_, time)| *time).or(self.last_time);
        let (next, deletes_uncounted) = (Some(known.next), known.deletes_uncounted);
        Ok(Found { lines, next, last_time, drops, heavy, deletes_uncounted, prepared_ends })
    }

    /// Says between what times an entry without one of its own lies; returns whether that may be asked for.
    fn give_bounds(&self, entry: &mut Entry, known: &Known, walk: &Walk<'_>) -> Result<bool, Halt> {
        let behind = known.times.partition_point(|(lsn, _)| *lsn <= entry.lsn);
        entry.after = match behind.checked_sub(1).and_then(|at| known.times.get(at)) {
            Some((_, time)) => Some(*time),
            None => self.last_time,
        };
        entry.before = match known.times.get(behind) {
            Some((_, time)) => Some(*time),
            None => walk.next_time(known.next)?,
        };
        Ok(may_be_covered(&self.query, entry.after, entry.before))
    }

    fn timeline_at(&self, lsn: Lsn) -> TimelineId {
        self.history.as_ref().map_or(TimelineId::FIRST, |history| history.timeline_of(lsn))
    }

    /// Adds the forks that lie before `until`, each where it belongs among the lines.
    fn tell_forks(&mut self, until: Lsn, through: bool, lines: &mut Vec<Line>) {
        let Some(history) = &self.history else { return };
        let begin = self.log.from_lsn.unwrap_or(Lsn(0));
        while let Some(fork) = history.ancestors.get(self.forks_told) {
            if fork.switch_lsn > until || (fork.switch_lsn == until && !through) {
                return;
            }
            self.forks_told += 1;
            if fork.switch_lsn < begin || !self.query.kinds.contains(&Kind::Timeline) {
                continue;
            }
            let line = Line::Fork {
                from: fork.timeline,
                to: history.ancestors.get(self.forks_told).map_or(history.timeline, |next| next.timeline),
                lsn: fork.switch_lsn,
                reason: fork.reason.clone(),
            };
            let at = lines.partition_point(|other| position(other) < fork.switch_lsn);
            lines.insert(at, line);
        }
    }
}

/// Returns where a line belongs.
fn position(line: &Line) -> Lsn {
    match line {
        Line::Event(entry) => entry.lsn,
        Line::Gap(gap) => gap.from,
        Line::Unknown { from, .. } => *from,
        Line::Fork { lsn, .. } | Line::WalBegins { lsn, .. } => *lsn,
    }
}

/// Returns whether the end of a transaction that is asked for may lie in WAL with these facts.
fn may_hold_ends(query: &Query, facts: &Facts) -> bool {
    let (Some(min), Some(max)) = (facts.min_time, facts.max_time) else { return false };
    let counted = (query.kinds.contains(&Kind::Commit) && facts.counts.commits > 0)
        || (query.kinds.contains(&Kind::Abort) && facts.counts.aborts > 0);
    query.wants_ends()
        && counted
        && query.since.is_none_or(|since| max.time >= since)
        && query.until.is_none_or(|until| min.time <= until)
        && query.xid.is_none_or(|xid| {
            // A subtransaction's id is taken soon after that of the transaction whose end ends it.
            facts.ended_xids.is_some_and(|(low, high)| low <= xid && xid.saturating_sub(high) <= SUBXID_NEAR)
        })
}

/// Returns which prepared transaction an event ends, and how.
fn prepared_end(event: &WalEvent) -> Option<(Xid, PreparedEnd)> {
    let (committed, time, xid) = match &event.kind {
        EventKind::Commit { time, prepared_xid, .. } => (true, *time, (*prepared_xid)?),
        EventKind::Abort { time, prepared_xid, .. } => (false, *time, (*prepared_xid)?),
        _ => return None,
    };
    Some((xid, PreparedEnd { committed, time, lsn: event.lsn }))
}

/// Returns whether something that happened between records of these times may be asked for. Where no time is
/// known it may have been any.
fn may_be_covered(query: &Query, after: Option<DateTime<Utc>>, before: Option<DateTime<Utc>>) -> bool {
    let (Some(after), Some(before)) = (after, before) else { return true };
    query.since.is_none_or(|since| after.max(before) >= since)
        && query.until.is_none_or(|until| after.min(before) <= until)
}

/// Returns the classes of events in which these kinds are listed.
fn classes_of(kinds: &[Kind]) -> Vec<Class> {
    let mut classes: Vec<Class> = kinds
        .iter()
        .filter_map(|kind| match kind {
            Kind::Drop | Kind::Truncate | Kind::Commit => Some(Class::Destructive),
            Kind::RestorePoint | Kind::Timeline => Some(Class::Planning),
            Kind::Checkpoint => Some(Class::Checkpoints),
            Kind::Abort | Kind::DeleteHeavy | Kind::Prepare => None,
        })
        .collect();
    classes.sort_unstable();
    classes.dedup();
    classes
}
