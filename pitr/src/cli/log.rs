//! `pitr log`.

use std::fmt::Write as _;

use chrono::{DateTime, Utc};
use walship::backup::names::{NamesRead, read_names};
use walship::replication::ConnectOptions;
use walship::{Error, Result};

use super::args::LogArgs;
use super::output::{self, Style, clean};
use super::plan::refused;
use super::source::{Source, say_notes};
use super::{DAMAGED, DONE};
use crate::execute::{Logged, read_log};
use crate::log::{Entry, Kind, Line, Log, NameSource, Relation};
use crate::target::Zone;

/// `pg_default`, which need not be named.
const DEFAULT_TABLESPACE: u32 = 1663;

/// How many relations of one event are named in text.
const RELATIONS_SHOWN: usize = 4;

pub(super) async fn run(args: &LogArgs) -> Result<u8> {
    let (query, zone) = args.query()?;
    let source = Source::open(&args.source).await?;
    let server = match &args.server {
        Some(conninfo) => Some(live_names(conninfo, source.catalog.lineage.system_identifier).await?),
        None => None,
    };
    let log = match read_log(&source.repository, &source.catalog, &query, server).await? {
        Logged::Log(log) => log,
        Logged::Refused(refusal) => return refused(&refusal, args.source.json),
    };
    say_notes(&source.repository);
    if args.source.json {
        let value = serde_json::to_value(&log)
            .map_err(|error| Error::invalid(format!("what is stored cannot be shown as JSON: {error}")))?;
        output::print_json(&value)?;
    } else {
        output::print(&text(&log, zone, Style::of_stdout()))?;
    }
    let damaged = log.lines.iter().any(|line| matches!(line, Line::Unknown { damaged: true, .. }));
    Ok(if damaged { DAMAGED } else { DONE })
}

/// Returns what the live server calls its databases and relations.
async fn live_names(conninfo: &str, system_identifier: u64) -> Result<NamesRead> {
    let read = read_names(&ConnectOptions::from_env_and_uri(conninfo)?).await?;
    if read.system_identifier != system_identifier {
        return Err(Error::mismatch(format!(
            "the server has system identifier {}, the archived WAL is of {system_identifier}",
            read.system_identifier
        ))
        .with_next("Name the server that this cluster's WAL comes from, or leave out --server."));
    }
    Ok(read)
}

/// Returns the log for people.
fn text(log: &Log, zone: Zone, style: Style) -> String {
    let mut text = String::new();
    let (Some(timeline), Some(from), Some(until)) = (log.timeline, log.from_lsn, log.until_lsn) else {
        return format!("No WAL of {} is stored.\n", log.cluster);
    };
    let head = format!("{}, timeline {timeline}, WAL from {from} to {until}", log.cluster);
    let _ = writeln!(text, "{} {head}", style.bold("Log of"));
    for line in &log.lines {
        let _ = match line {
            Line::Event(entry) => write!(text, "\n{}", event(entry, zone, style)),
            Line::Gap(gap) => {
                let title = style.bold(if gap.expired { "WAL expired" } else { "WAL missing" });
                writeln!(text, "\n{title} from {} to {}; not known what happened\n  {gap}", gap.from, gap.to)
            }
            Line::Unknown { segment, from, to, why, .. } => {
                let title = style.bold("WAL not readable");
                let why = clean(why);
                writeln!(
                    text,
                    "\n{title} from {from} to {to}; not known what happened\n  segment {segment}: {why}"
                )
            }
            Line::WalBegins { lsn, timeline, time } => {
                let title = style.bold("WAL begins anew");
                let when = zone.both(*time);
                writeln!(
                    text,
                    "\n{title} at {lsn} on timeline {timeline}, {when}: pg_resetwal was run\n  no plan crosses that; what \
                     is behind it needs a backup behind it"
                )
            }
            Line::Fork { from, to, lsn, reason } => {
                let title = style.bold("timeline switch");
                let reason = clean(reason);
                writeln!(text, "\n{title} at {lsn}: timeline {from} is left for {to} ({reason})")
            }
        };
    }
    if log.lines.is_empty() {
        text.push_str("\nNothing that was asked for happened in it.\n");
    }
    if log.more {
        let _ = writeln!(
            text,
            "\nThe limit of {} lines ends this log at {until}; there is more WAL behind it. Raise --limit, or \
             narrow the log with --since, --only.",
            log.lines.len()
        );
    }
    if log.deletes_uncounted > 0 {
        let _ = writeln!(
            text,
            "\n{} rows were deleted in segments that an earlier release archived; by whom is not known.",
            log.deletes_uncounted
        );
    }
    for (backup, why) in &log.names_unread {
        let _ =
            writeln!(text, "\nThe names saved with backup {} cannot be read: {}", clean(backup), clean(why));
    }
    for timeline in &log.timelines_left_out {
        let _ = writeln!(
            text,
            "\nWAL of timeline {timeline} lies beside this way: --timeline {timeline} shows it."
        );
    }
    text
}

fn event(entry: &Entry, zone: Zone, style: Style) -> String {
    let mut text = format!("{}\n  {}\n", style.bold(&when(entry, zone)), clean(&entry.what));
    let mut facts = vec![format!("lsn {}", entry.lsn), format!("timeline {}", entry.timeline)];
    facts.extend(entry.xid.map(|xid| format!("xid {xid}")));
    facts.extend(entry.open.then(|| "in the open segment".to_owned()));
    let _ = writeln!(text, "  {}", facts.join(", "));
    for database in &entry.databases {
        let name = database.name.as_deref().map_or_else(|| "unknown".to_owned(), |name| format!("{name:?}"));
        let _ = writeln!(
            text,
            "  database {} (oid {}{})",
            clean(&name),
            database.oid,
            by(database.named_by.as_ref(), zone)
        );
    }
    for named in entry.relations.iter().take(RELATIONS_SHOWN) {
        let _ = writeln!(text, "  {}", relation(named, zone));
    }
    if let Some(others) = entry.relation_count.checked_sub(RELATIONS_SHOWN as u64).filter(|n| *n > 0) {
        let _ = writeln!(text, "  and {others} more");
    }
    if let Some(bytes) = entry.freed_bytes {
        let _ = writeln!(text, "  freed about {}: its files' size in that backup", output::bytes(bytes));
    }
    if entry.kinds.contains(&Kind::Prepare) {
        let _ = match &entry.outcome {
            Some(end) => writeln!(
                text,
                "  {} at {}, lsn {}",
                if end.committed { "committed" } else { "rolled back" },
                zone.both(end.time),
                end.lsn
            ),
            None => writeln!(text, "  still open where this log ends"),
        };
    }
    if entry.at_once {
        text.push_str(
            "  took effect at once, before its transaction ended and even if that was rolled back\n",
        );
    }
    let _ = writeln!(text, "  just before: {}", entry.just_before);
    if let Some(sql) = &entry.afterwards {
        let _ = writeln!(text, "  then, as DROP DATABASE had marked it invalid by there: {sql}");
    }
    text
}

/// Returns what is known of a relation.
fn relation(relation: &Relation, zone: Zone) -> String {
    let kind = match relation.kind {
        Some('r') => "table",
        Some('i') => "index",
        Some('S') => "sequence",
        Some('t') => "TOAST table",
        Some('m') => "materialized view",
        _ => "relation",
    };
    let name = relation.full_name().map_or_else(|| "name unknown".to_owned(), |name| clean(&name));
    let mut facts = Vec::new();
    facts.extend(relation.of.as_ref().map(|of| format!("of {}", clean(of))));
    facts.extend(relation.deleted_rows.map(|rows| format!("about {rows} rows")));
    facts.extend(relation.oid.map(|oid| format!("oid {oid}")));
    facts.extend(relation.relation.map(|number| format!("relfilenode {number}")));
    facts.extend(
        relation.tablespace.filter(|oid| *oid != DEFAULT_TABLESPACE).map(|oid| format!("tablespace {oid}")),
    );
    format!("{kind} {name} ({}{})", facts.join(", "), by(relation.named_by.as_ref(), zone))
}

/// Returns where a name is from.
fn by(source: Option<&NameSource>, zone: Zone) -> String {
    match source {
        None => String::new(),
        Some(NameSource::Wal) => ", named by the WAL".to_owned(),
        Some(NameSource::Backup { id, time }) => {
            format!(", so called at {} by backup {}", zone.text(*time), clean(id))
        }
        Some(NameSource::Server { time }) => format!(", called so by the server at {}", zone.text(*time)),
    }
}

/// Returns when an event happened; of one whose record does not say, between what.
fn when(entry: &Entry, zone: Zone) -> String {
    let shown = |time: DateTime<Utc>| zone.both(time);
    match (entry.time, entry.after, entry.before) {
        (Some(time), _, _) => shown(time),
        (None, Some(after), Some(before)) => format!("between {} and {}", shown(after), shown(before)),
        (None, Some(after), None) => format!("after {}", shown(after)),
        (None, None, Some(before)) => format!("before {}", shown(before)),
        (None, None, None) => "time not known".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::tests::one_of_each;

    #[test]
    fn a_log_reads_well() {
        let log = one_of_each();
        let zone = crate::target::parse_time("2026-03-01 13:00 Europe/Berlin", |_| Vec::new()).unwrap().1;
        insta::assert_snapshot!(text(&log, zone, Style::Plain));
        insta::assert_snapshot!("log_json", serde_json::to_string_pretty(&log).unwrap());
        assert!(text(&log, Zone::Utc, Style::Colour).contains("\x1b[1mLog of"));
    }
}
