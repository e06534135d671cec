//! "Just before the drop of public.orders": from words to the event that is meant, or to the events that may
//! be meant.

use std::collections::BTreeSet;

use walship::pg::Oid;

use super::{Entry, Kind, Line, Log, OidOrName, Query, TableFilter, oid_or_name, parse_table};
use crate::plan::{Refusal, RefusalKind};
use crate::target::{TargetError, TimelineChoice};

/// How many events that may be meant are named.
const CANDIDATES_MAX: usize = 8;

/// More events than this are not looked through.
const EVENTS_MAX: usize = 100_000;

/// Which event is meant.
#[derive(Debug, PartialEq, Eq)]
pub enum Choice<'l> {
    /// This one: it is known by name.
    Known(&'l Entry),
    /// This one or none: its names are not known, and no other may be meant. Whether it is, a server tells that was
    /// recovered to just before it; where it is not, the refusal stands.
    Unproven(&'l Entry, Box<Refusal>),
}

/// An event that a restore is to stop just before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Before {
    /// As it was written.
    words: String,
    kind: Kind,
    database: Option<OidOrName>,
    /// `None` when the database itself is meant.
    table: Option<TableFilter>,
}

impl Before {
    /// Returns the event that `text` names: `drop:`, `truncate:` or `delete:` (of many rows), then a table as
    /// [`parse_table`] takes it, with `DATABASE/` before it where several databases have such a one;
    /// `drop:DATABASE/` is the database itself.
    ///
    /// # Errors
    /// [`TargetError`] for everything else.
    pub fn parse(text: &str) -> Result<Self, TargetError> {
        let bad = || {
            TargetError::new(
                format!("{text:?} names no event to stop before"),
                "Write drop:public.orders, truncate:public.orders, delete:public.orders, drop:DATABASE/public.orders, or \
                 drop:DATABASE/ for a database.",
            )
        };
        let (verb, object) = text.split_once(':').ok_or_else(bad)?;
        let kind = match verb {
            "drop" => Kind::Drop,
            "truncate" => Kind::Truncate,
            "delete" => Kind::DeleteHeavy,
            _ => return Err(bad()),
        };
        let (database, table) = match object.rsplit_once('/') {
            Some((database, table)) => (Some(database), table),
            None => (None, object),
        };
        if database == Some("") || (table.is_empty() && (database.is_none() || kind != Kind::Drop)) {
            return Err(bad());
        }
        Ok(Self {
            words: text.to_owned(),
            kind,
            database: database.map(oid_or_name),
            table: (!table.is_empty()).then(|| parse_table(table)).transpose()?,
        })
    }

    /// Returns the database that the words name.
    pub fn database(&self) -> Option<&str> {
        match &self.database {
            Some(OidOrName::Name(name)) => Some(name),
            _ => None,
        }
    }

    /// Returns how it was written, and the table that is meant.
    pub fn table(&self) -> Option<(&str, &TableFilter)> {
        Some((&self.words, self.table.as_ref()?))
    }

    /// Returns what must be asked of the log to know all that the record of such an event names.
    pub fn whole_query(&self, timeline: TimelineChoice, entry: &Entry) -> Query {
        Query { xid: entry.xid, whole: true, ..self.query(timeline) }
    }

    /// Returns what must be asked of the log.
    pub fn query(&self, timeline: TimelineChoice) -> Query {
        Query {
            since: None,
            until: None,
            xid: None,
            database: self.database.clone(),
            table: self.table.clone(),
            unnamed_too: true,
            relation: None,
            delete_rows: Query::DELETE_ROWS,
            kinds: vec![self.kind],
            timeline,
            limit: EVENTS_MAX,
            whole: false,
        }
    }

    /// Returns the last such event of the log that answers [`Before::query`].
    ///
    /// # Errors
    /// A refusal that names the events that may be meant, when the words do not tell which, when several that
    /// have no name may be it or were behind the last, or when there is none.
    pub fn choose<'l>(&self, log: &'l Log) -> Result<Choice<'l>, Box<Refusal>> {
        let entries: Vec<&Entry> = log
            .lines
            .iter()
            .filter_map(|line| match line {
                Line::Event(entry) => Some(&**entry),
                _ => None,
            })
            .collect();
        let matching: Vec<&Entry> = entries.iter().copied().filter(|entry| self.is_meant(entry)).collect();
        let may_be = |entry: &&&Entry| self.may_be_meant(entry);
        if log.more {
            return Err(self.refuse(
                "there are more such events than can be looked through",
                &matching,
                false,
            ));
        }
        let Some(last) = matching.last().copied() else {
            let unnamed: Vec<&Entry> = entries.iter().filter(may_be).copied().collect();
            let reason = match unnamed.len() {
                0 => "no such event is in the archived WAL, or its names are not known",
                _ => "no event is known to be that, but some without a name may be",
            };
            return self.only(&unnamed, self.refuse(reason, &unnamed, unnamed.is_empty()));
        };
        let objects: BTreeSet<(Oid, Option<String>)> =
            matching.iter().flat_map(|entry| self.objects(entry)).collect();
        if objects.len() > 1 {
            let reason = "more than one object was called that: name the database, the schema";
            return Err(self.refuse(reason, &matching, false));
        }
        let later: Vec<&Entry> = entries
            .iter()
            .filter(|entry| entry.lsn > last.lsn && self.may_be_meant(entry))
            .filter(|entry| {
                self.table.is_none() || entry.databases.iter().any(|one| in_one_of(&objects, one.oid))
            })
            .copied()
            .collect();
        if later.is_empty() {
            return Ok(Choice::Known(last));
        }
        let candidates: Vec<&Entry> = std::iter::once(last).chain(later.iter().copied()).collect();
        let reason =
            "what was removed behind it has no name that is known: it may be that as well, made anew";
        self.only(&later, self.refuse(reason, &candidates, false))
    }

    /// Returns the drop that alone may be meant, among those without a name.
    fn only<'l>(&self, unnamed: &[&'l Entry], refusal: Box<Refusal>) -> Result<Choice<'l>, Box<Refusal>> {
        match unnamed {
            [one] if self.kind == Kind::Drop && self.table.is_some() => Ok(Choice::Unproven(one, refusal)),
            _ => Err(refusal),
        }
    }

    /// Returns whether an event is known to be one that is meant.
    fn is_meant(&self, entry: &Entry) -> bool {
        entry.kinds.contains(&self.kind)
            && match &self.table {
                Some(table) => {
                    entry.relations.iter().any(|relation| table.matches(relation)) && self.is_in(entry)
                }
                None => entry.relation_count == 0 && !entry.databases.is_empty() && self.is_in(entry),
            }
    }

    fn is_in(&self, entry: &Entry) -> bool {
        self.database.as_ref().is_none_or(|wanted| {
            entry.databases.iter().any(|database| match wanted {
                OidOrName::Oid(oid) => database.oid == *oid,
                OidOrName::Name(name) => database.name.as_ref() == Some(name),
            })
        })
    }

    /// Returns whether an event without a name may be meant.
    fn may_be_meant(&self, entry: &Entry) -> bool {
        let unnamed = match &self.table {
            Some(_) => entry.unnamed_count > 0,
            None => entry.relation_count == 0 && entry.databases.iter().any(|one| one.name.is_none()),
        };
        unnamed && entry.kinds.contains(&self.kind)
    }

    /// Returns what a meant event did it to.
    fn objects(&self, entry: &Entry) -> Vec<(Oid, Option<String>)> {
        match &self.table {
            None => entry.databases.iter().map(|database| (database.oid, None)).collect(),
            Some(table) => {
                let own = entry.relations.iter().filter(|relation| table.matches(relation));
                own.map(|one| (one.database, one.of.clone().or_else(|| one.full_name()))).collect()
            }
        }
    }

    fn refuse(&self, reason: &str, candidates: &[&Entry], none: bool) -> Box<Refusal> {
        let kind = if none { RefusalKind::UnknownEvent } else { RefusalKind::AmbiguousEvent };
        let mut refusal = Refusal::new(kind, format!("--before {}: {reason}", self.words));
        let shown = candidates.len().saturating_sub(CANDIDATES_MAX);
        for entry in &candidates[shown..] {
            let time =
                entry.time.map_or_else(String::new, |time| format!("{}: ", crate::target::utc_text(time)));
            refusal.hints.push(format!("{}   ({time}{})", entry.just_before, entry.what));
        }
        if shown > 0 {
            refusal.hints.push(format!("and {shown} earlier; `pitr log` shows them."));
        }
        if none {
            let only = match self.kind {
                Kind::Drop => "drop",
                Kind::Truncate => "truncate",
                _ => "delete-heavy",
            };
            refusal
                .hints
                .push(format!("Look for it with `pitr log --only {only}`; each event has its target."));
        }
        Box::new(refusal)
    }
}

fn in_one_of(objects: &BTreeSet<(Oid, Option<String>)>, database: Oid) -> bool {
    objects.iter().any(|(oid, _)| *oid == database)
}
