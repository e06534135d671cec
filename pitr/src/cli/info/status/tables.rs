//! The figures below the drawing.

use std::fmt::Write as _;

use walship::catalog::Lineage;
use walship::pg::Lsn;

use super::super::super::args::Deed;
use super::super::super::history::Entry;
use super::super::super::output::{bytes, short_time, version};
use super::super::{age, end_of};
use super::LineageStatus;
use super::clock::Clock;
use super::drawing::when;
use super::health::{drill_tone, flaws, kind_of, plural, said, verification_tone};
use crate::execute::info::{Info, TimelineInfo};
use crate::page::{Cell, Column, Tone, facts, table};
use crate::words::{duration, escaped};

const INFO_JSON: &str = "`pitr info --json` has all of them";

/// Returns a lineage in words.
pub(super) fn lineage_name(lineage: &Lineage) -> String {
    format!(
        "Lineage {} (system {}, PostgreSQL {})",
        lineage.number, lineage.system_identifier, lineage.postgres_major
    )
}

/// Writes every table of a lineage that has a row.
pub(super) fn all(page: &mut String, status: &LineageStatus) {
    let info = &status.info;
    windows(page, info);
    gaps(page, info);
    backups(page, info);
    history(page, &status.history);
    holds(page, info);
    timelines(page, status);
    points(page, info);
    server(page, info);
}

fn begin(page: &mut String, title: &str) {
    let _ = writeln!(page, "<h2>{}</h2>\n<div class=\"card\">", escaped(title));
}

fn end(page: &mut String) {
    page.push_str("</div>\n");
}

fn windows(page: &mut String, info: &Info) {
    begin(page, "What can be reached");
    let mut rows = Vec::new();
    for timeline in info.timelines.iter().rev() {
        for found in timeline.windows.iter().rev() {
            let window = &found.window;
            let (until, length) = match &found.latest_transaction {
                Some(latest) => (
                    format!("{} (xid {})", short_time(latest.time), latest.xid),
                    age(latest.time.signed_duration_since(window.from_time)),
                ),
                None => ("no commit seen".to_owned(), "not known".to_owned()),
            };
            rows.push(vec![
                timeline.timeline.to_string().into(),
                short_time(window.from_time).into(),
                until.into(),
                length.into(),
                window.backups.to_string().into(),
                format!("{} to {}", window.from_lsn, window.until_lsn).into(),
                match &*end_of(window) {
                    "" => "the archive's end".into(),
                    end => Cell::toned(Tone::Warn, end),
                },
            ]);
        }
    }
    if rows.is_empty() {
        page.push_str("<p>Nothing: no complete backup leads anywhere.</p>\n");
    } else {
        let columns = [
            ("Timeline", Column::Number),
            ("From", Column::Words),
            ("To the commit of", Column::Words),
            ("Length", Column::Number),
            ("Backups", Column::Number),
            ("WAL", Column::Code),
            ("Ends with", Column::Words),
        ];
        table(page, "Windows: in each, every commit can be reached", &columns, &rows, INFO_JSON);
    }
    end(page);
}

fn gaps(page: &mut String, info: &Info) {
    let mut rows = Vec::new();
    for timeline in info.timelines.iter().rev() {
        let clock = Clock::of(info, timeline);
        for gap in timeline.gaps.iter().rev() {
            let tone = if gap.expired { Tone::Soft } else { Tone::Bad };
            rows.push(vec![
                timeline.timeline.to_string().into(),
                Cell::toned(tone, if gap.expired { "removed on purpose" } else { "missing" }),
                when(clock.before(gap.from), clock.behind(gap.to)).into(),
                format!("{} to {}", gap.from, gap.to).into(),
                bytes(gap.to.0.saturating_sub(gap.from.0)).into(),
                gap.to_string().into(),
            ]);
        }
    }
    if rows.is_empty() {
        return;
    }
    begin(page, "Gaps");
    let columns = [
        ("Timeline", Column::Number),
        ("What", Column::Words),
        ("Written", Column::Words),
        ("WAL", Column::Code),
        ("Size", Column::Number),
        ("Why it is known", Column::Words),
    ];
    table(page, "WAL that is missing", &columns, &rows, INFO_JSON);
    end(page);
}

fn backups(page: &mut String, info: &Info) {
    begin(page, "Backups");
    let mut all: Vec<_> = info.backups.iter().collect();
    all.sort_by_key(|backup| std::cmp::Reverse((backup.finished, backup.stop_lsn)));
    let rows = all.into_iter().map(|backup| {
        let flaws = flaws(info, backup);
        let kind = match &backup.parent {
            Some(parent) => format!("incremental ({} below it)", parent.depth),
            None => kind_of(backup).to_owned(),
        };
        vec![
            short_time(backup.finished).into(),
            kind.into(),
            bytes(backup.data_bytes).into(),
            bytes(backup.stored_bytes).into(),
            took(backup.finished - backup.started).into(),
            format!("{}, PostgreSQL {}", backup.timeline, version(backup.server_version)).into(),
            match &*flaws {
                [] => Cell::toned(Tone::Good, "usable"),
                flaws => Cell::toned(Tone::Bad, flaws.join(", ")),
            },
            backup.id.clone().into(),
        ]
    });
    let orphaned = info.orphaned_backups.iter().map(|backup| {
        let state = format!("never restored from: it builds on {}, which is gone", backup.missing);
        incomplete(short_time(backup.finished), "incremental", state, &backup.id)
    });
    let unfinished = info.unfinished_backups.iter().map(|backup| {
        let state = format!("not complete, never restored from; begun {}", short_time(backup.started));
        incomplete(String::new(), "", state, &backup.id)
    });
    let rows: Vec<_> = unfinished.chain(orphaned).chain(rows).collect();
    if rows.is_empty() {
        page.push_str("<p>None: <code>walship backup</code> takes one.</p>\n");
    } else {
        let columns = [
            ("Complete", Column::Words),
            ("Kind", Column::Words),
            ("Size", Column::Number),
            ("Stored", Column::Number),
            ("Took", Column::Number),
            ("Timeline", Column::Words),
            ("State", Column::Words),
            ("Id", Column::Code),
        ];
        table(page, "Backups, the newest first", &columns, &rows, INFO_JSON);
    }
    end(page);
}

fn incomplete(complete: String, kind: &str, state: String, id: &str) -> Vec<Cell> {
    let none = || Cell::from("");
    vec![
        complete.into(),
        kind.into(),
        none(),
        none(),
        none(),
        none(),
        Cell::toned(Tone::Warn, state),
        id.into(),
    ]
}

fn took(took: chrono::TimeDelta) -> String {
    duration(u64::try_from(took.num_milliseconds()).unwrap_or(0))
}

fn history(page: &mut String, history: &[Entry]) {
    begin(page, "What was done");
    let rows = history.iter().map(|entry| {
        let tone = match (entry.kind, &*entry.outcome) {
            (Deed::Drill, outcome) => drill_tone(outcome),
            (Deed::Verify, outcome) => verification_tone(outcome),
            (_, "failed") => Tone::Bad,
            (_, "interrupted" | "not_ended") => Tone::Warn,
            _ => Tone::Plain,
        };
        let mut about: Vec<String> = entry.target.iter().chain(&entry.what).cloned().collect();
        about.extend(entry.reason.iter().map(|reason| format!("reason: {reason}")));
        about.extend(entry.problems.iter().cloned());
        let by = entry.user.iter().zip(&entry.host).map(|(user, host)| format!("{user} on {host}"));
        vec![
            short_time(entry.started).into(),
            entry.kind.word().into(),
            Cell::toned(tone, said(&entry.outcome)),
            entry.millis.map_or_else(|| "-".to_owned(), duration).into(),
            entry.recovery_millis.map_or_else(|| "-".to_owned(), duration).into(),
            by.collect::<String>().into(),
            about.join("; ").into(),
        ]
    });
    let rows: Vec<_> = rows.collect();
    if rows.is_empty() {
        page.push_str("<p>No restore, drill, extract or removal is on record.</p>\n");
    } else {
        let columns = [
            ("When", Column::Words),
            ("What", Column::Words),
            ("Outcome", Column::Words),
            ("Took", Column::Number),
            ("Open after", Column::Number),
            ("By", Column::Words),
            ("About", Column::Words),
        ];
        table(page, "Restores, drills, extracts and removals", &columns, &rows, "`pitr history` lists them");
    }
    end(page);
}

fn holds(page: &mut String, info: &Info) {
    let holds = info.holds.iter().filter(|hold| hold.holds_at(info.asked)).map(|hold| {
        vec![
            hold.backup.clone().into(),
            hold.until.map_or_else(|| "it is released".to_owned(), short_time).into(),
            format!("{} on {}", hold.user, hold.host).into(),
            hold.reason.clone().into(),
            hold.id.clone().into(),
        ]
    });
    let rows: Vec<Vec<Cell>> = holds.collect();
    if rows.is_empty() {
        return;
    }
    begin(page, "Holds");
    let columns = [
        ("Backup", Column::Code),
        ("Until", Column::Words),
        ("By", Column::Words),
        ("Reason", Column::Words),
        ("Hold", Column::Code),
    ];
    table(page, "Holds in force", &columns, &rows, INFO_JSON);
    end(page);
}

fn timelines(page: &mut String, status: &LineageStatus) {
    let info = &status.info;
    begin(page, "Timelines");
    let _ = writeln!(
        page,
        "<p class=\"soft\">{}, segments of {}, since {}</p>",
        escaped(&lineage_name(&status.lineage)),
        status.lineage.segment_size,
        short_time(status.lineage.created)
    );
    let rows: Vec<Vec<Cell>> = info.timelines.iter().rev().map(timeline).collect();
    if rows.is_empty() {
        page.push_str("<p>Nothing is archived yet.</p>\n");
    } else {
        let columns = [
            ("Timeline", Column::Number),
            ("Comes from", Column::Words),
            ("Segments", Column::Number),
            ("Stored", Column::Number),
            ("First to last", Column::Code),
            ("Open segment", Column::Words),
        ];
        table(page, "Timelines, the newest first", &columns, &rows, INFO_JSON);
    }
    end(page);
}

fn timeline(timeline: &TimelineInfo) -> Vec<Cell> {
    let origin = match (timeline.parent, timeline.begin_lsn) {
        (Some(parent), Some(lsn)) => format!("{parent} at {lsn}").into(),
        _ if !timeline.has_history => Cell::toned(Tone::Bad, "not known: its history file is missing"),
        _ => "the beginning".into(),
    };
    let stored = timeline.first_segment.zip(timeline.last_segment);
    let tail = timeline.tail.as_ref().map(|tail| {
        let end = if tail.is_end { "" } else { ", which is no end of the archive" };
        format!("to {}: {}{end}", tail.tail.until_lsn, plural(tail.tail.parts, "part"))
    });
    vec![
        timeline.timeline.to_string().into(),
        origin,
        timeline.segments.to_string().into(),
        bytes(timeline.stored_bytes).into(),
        stored.map_or_else(|| "none".to_owned(), |(first, last)| format!("{first} {last}")).into(),
        tail.unwrap_or_else(|| "not stored".to_owned()).into(),
    ]
}

fn points(page: &mut String, info: &Info) {
    let all = info.timelines.iter().rev().flat_map(|timeline| {
        timeline.restore_points.iter().rev().map(|point| {
            vec![
                short_time(point.time).into(),
                format!("{:?}", point.name).into(),
                timeline.timeline.to_string().into(),
                point.lsn.to_string().into(),
            ]
        })
    });
    let rows: Vec<Vec<Cell>> = all.collect();
    if rows.is_empty() {
        return;
    }
    begin(page, "Restore points");
    let columns = [
        ("When", Column::Words),
        ("Name", Column::Words),
        ("Timeline", Column::Number),
        ("LSN", Column::Code),
    ];
    table(page, "Restore points, the newest first", &columns, &rows, INFO_JSON);
    end(page);
}

fn server(page: &mut String, info: &Info) {
    let Some(server) = &info.server else { return };
    begin(page, "Server");
    let mut lines: Vec<(&str, Cell)> = Vec::new();
    if let Some(problem) = &server.problem {
        lines.push(("Problem", Cell::toned(Tone::Warn, problem.clone())));
    }
    if let (Some(timeline), Some(lsn)) = (server.timeline, server.wal_lsn) {
        let kind = if server.in_recovery == Some(true) { "standby, " } else { "" };
        lines.push(("Now", format!("{kind}timeline {timeline}, WAL to {lsn}").into()));
    }
    if let (Some(until), Some(behind)) = (server.archive_until_lsn, server.behind_bytes) {
        let until: Lsn = until;
        lines.push(("Archive", format!("to {until}, {} behind", bytes(behind)).into()));
    }
    if let Some(archiver) = &server.archiver {
        let last = match (&archiver.last_archived_wal, archiver.last_archived_time) {
            (Some(file), Some(time)) => format!("last {file} at {}", short_time(time)),
            _ => "nothing archived yet".to_owned(),
        };
        let cell = match &archiver.failing_wal {
            Some(file) => Cell::toned(Tone::Bad, format!("{last}; it fails with {file}")),
            None => last.into(),
        };
        lines.push(("Archiver", cell));
    }
    for slot in &server.slots {
        let active = if slot.active { "active" } else { "inactive" };
        lines
            .push(("Slot", format!("{} keeps WAL from {} on, {active}", slot.name, slot.restart_lsn).into()));
    }
    facts(page, lines);
    end(page);
}
