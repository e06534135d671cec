//! `pitr info`.

mod draw;
mod status;
#[cfg(test)]
mod tests;

use std::fmt::Write as _;

use chrono::{DateTime, TimeDelta, Utc};
use walship::catalog::{Catalog, StoredTail};
use walship::config::Config;
use walship::replication::{ConnectOptions, Connection, ServerPosition, SessionKind, server_position};
use walship::repository::{load_catalog, load_tails};
use walship::{Error, Result};

use super::DONE;
use super::args::InfoArgs;
use super::output::{self, Style};
use super::source::open_lineages;
use crate::execute::info::{Info, ServerInfo, TailInfo, TimelineInfo, WindowInfo, read_info};
use crate::plan::{Window, WindowEnd};

/// How many lines of one kind are printed: all of them are in the JSON.
const LINES_MAX: usize = 8;

pub(super) async fn run(args: &InfoArgs) -> Result<u8> {
    let (repository, cluster) = open_lineages(&args.source).await?;
    let lineages = cluster.lineages().await?;
    let lineages = lineages.iter().map(|other| other.lineage().clone()).collect();
    // The server first: what it has written by then must be in what is looked at afterwards.
    let asked = if args.server { Some(ask(args).await) } else { None };
    let mut catalog = load_catalog(&repository).await?;
    let tails = load_tails(&repository, &mut catalog).await?;
    super::source::say_notes(&repository);
    let server = asked.map(|asked| compare(&catalog, asked));
    let info = read_info(&repository, catalog, tails, lineages, server, Utc::now()).await?;
    if let Some(target) = &args.html {
        status::run(args, target, &repository, info).await?;
    } else if args.source.json {
        let value = serde_json::to_value(&info)
            .map_err(|error| Error::invalid(format!("what is stored cannot be shown as JSON: {error}")))?;
        output::print_json(&value)?;
    } else {
        let mut text = text(&info, Style::of_stdout());
        if let Some(canvas) = draw::Canvas::of_stdout() {
            let _ = write!(text, "\n{}", draw::timeline(&info, canvas));
        }
        output::print(&text)?;
    }
    Ok(DONE)
}

async fn ask(args: &InfoArgs) -> Result<ServerPosition> {
    let options = match Config::load(&args.source.overrides)?.connection {
        Some(connection) if connection.is_argument => ConnectOptions::from_env_and_uri(&connection.text)?,
        Some(connection) => ConnectOptions::from_private(&connection.text)?,
        None => ConnectOptions::from_private("")?,
    };
    let mut connection = Connection::connect(&options, SessionKind::Ordinary).await?;
    let position = server_position(&mut connection).await?;
    connection.close().await;
    Ok(position)
}

/// A server that cannot be asked is no reason not to show the archive.
fn compare(catalog: &Catalog, asked: Result<ServerPosition>) -> ServerInfo {
    match asked {
        Ok(position) => ServerInfo::compare(catalog, &position),
        Err(error) => ServerInfo::problem(format!("the server could not be asked: {error}")),
    }
}

fn text(info: &Info, style: Style) -> String {
    let mut text = String::new();
    let _ =
        writeln!(text, "{} {} in {}", style.bold("Cluster"), info.cluster, output::clean(&info.repository));
    for lineage in &info.lineages {
        let shown = if lineage.number == info.lineage { "" } else { "  (--lineage shows it)" };
        let _ = writeln!(
            text,
            "  lineage {}: system {}, PostgreSQL {}, segments of {}, since {}{shown}",
            lineage.number,
            lineage.system_identifier,
            lineage.postgres_major,
            lineage.segment_size,
            output::short_time(lineage.created)
        );
    }
    for timeline in &info.timelines {
        timeline_text(&mut text, info, timeline, style);
    }
    backups_text(&mut text, info, style);
    let names = info
        .incomplete_segments
        .iter()
        .map(|name| format!("  {name} was kept apart as incomplete; it is never used as the whole segment"));
    let damaged =
        info.unreadable_segments.iter().map(|name| format!("  {name} is damaged where it is stored"));
    let notes: Vec<String> = names.chain(damaged).collect();
    if !notes.is_empty() {
        let _ = writeln!(text, "\n{}", style.bold("Take care"));
        lines(&mut text, &notes);
    }
    if let Some(server) = &info.server {
        server_text(&mut text, server, style);
    }
    text
}

/// Writes the newest lines, and how many there are beside.
fn lines(text: &mut String, all: &[String]) {
    let left_out = all.len().saturating_sub(LINES_MAX);
    if left_out > 0 {
        let _ = writeln!(text, "  ({left_out} more: --json shows all)");
    }
    for line in &all[left_out..] {
        let _ = writeln!(text, "{}", output::clean(line));
    }
}

fn timeline_text(text: &mut String, info: &Info, timeline: &TimelineInfo, style: Style) {
    let origin = match (timeline.parent, timeline.begin_lsn) {
        (Some(parent), Some(lsn)) => format!(", forked from {parent} at {lsn}"),
        _ if !timeline.has_history => ", its history file is missing: no plan can follow it".to_owned(),
        _ => String::new(),
    };
    let _ = writeln!(
        text,
        "\n{} {}{origin}: {} segments, {}",
        style.bold("Timeline"),
        timeline.timeline,
        timeline.segments,
        output::bytes(timeline.stored_bytes)
    );
    if let (Some(first), Some(last)) = (timeline.first_segment, timeline.last_segment) {
        let _ = writeln!(text, "  stored   {first} to {last}");
    }
    if let Some(TailInfo { tail, is_end }) = &timeline.tail {
        let not =
            if *is_end { "" } else { ", which is no end of the archive: WAL before or behind it is missing" };
        let _ = writeln!(
            text,
            "  open     {} to {} ({} part(s), {}){not}",
            tail.segment,
            tail.until_lsn,
            tail.parts,
            output::bytes(tail.stored_bytes)
        );
        if let Some(flaw) = tail.flaw_text() {
            let _ = writeln!(text, "           {}", output::clean(&flaw));
        }
    }
    let stranded = timeline.stranded.iter().map(|tail| {
        let StoredTail { segment, until_lsn, parts, stored_bytes, .. } = tail;
        let flaw = tail.flaw_text().map_or_else(String::new, |flaw| format!("\n           {flaw}"));
        format!(
            "  parts    {segment} to {until_lsn} ({parts} part(s), {}), behind which WAL is lost{flaw}",
            output::bytes(*stored_bytes)
        )
    });
    lines(text, &stranded.collect::<Vec<_>>());
    if timeline.windows.is_empty() {
        let _ = writeln!(text, "  window   none: no complete backup leads here");
    }
    let windows: Vec<String> =
        timeline.windows.iter().map(|window| window_text(window, info.asked)).collect();
    lines(text, &windows);
    let (expired, gaps): (Vec<_>, Vec<_>) = timeline.gaps.iter().partition(|gap| gap.expired);
    lines(text, &gaps.iter().map(|gap| format!("  gap      {gap}")).collect::<Vec<_>>());
    lines(text, &expired.iter().map(|gap| format!("  expired  {gap}")).collect::<Vec<_>>());
    let points = timeline.restore_points.iter().map(|point| {
        format!("  point    {:?}  {}  {}", point.name, output::short_time(point.time), point.lsn)
    });
    lines(text, &points.collect::<Vec<_>>());
    if timeline.segments_not_looked_at > 0 {
        let _ = writeln!(
            text,
            "  ({} segments were not looked at for restore points: `pitr index` makes that cheap)",
            timeline.segments_not_looked_at
        );
    }
}

fn window_text(found: &WindowInfo, now: DateTime<Utc>) -> String {
    let window = &found.window;
    let until = match &found.latest_transaction {
        Some(latest) => format!(
            "{} (xid {}, {} ago)",
            output::short_time(latest.time),
            latest.xid,
            age(now.signed_duration_since(latest.time))
        ),
        None => "no commit seen".to_owned(),
    };
    let backups =
        if window.backups == 1 { "1 backup".to_owned() } else { format!("{} backups", window.backups) };
    let end = match &*end_of(window) {
        "" => String::new(),
        end => format!(", {end}"),
    };
    format!(
        "  window   {} ({}) to {until}\n           WAL to {}, {backups}{end}",
        output::short_time(window.from_time),
        window.from_lsn,
        window.until_lsn
    )
}

/// Returns what lies behind a window; nothing where that is the archive's end.
fn end_of(window: &Window) -> String {
    match (window.ended_by, window.reset_lsn) {
        (WindowEnd::EndOfArchive, _) => String::new(),
        (WindowEnd::Gap, None) => "a gap behind it".to_owned(),
        (WindowEnd::Gap, Some(lsn)) => {
            format!("a gap behind it, where pg_resetwal made WAL begin anew at {lsn}")
        }
        (WindowEnd::Expired, _) => "what is behind it was expired".to_owned(),
        (WindowEnd::WalLevelMinimal, _) => "wal_level = minimal behind it".to_owned(),
        (WindowEnd::WalReset, _) => "pg_resetwal behind it".to_owned(),
    }
}

fn backups_text(text: &mut String, info: &Info, style: Style) {
    let _ = writeln!(text, "\n{}", style.bold("Backups"));
    if info.backups.is_empty() {
        let _ = writeln!(text, "  none: `walship backup` takes one");
    }
    let cells = info.backups.iter().map(|backup| {
        [
            backup.id.clone(),
            format!("timeline {}", backup.timeline),
            format!("{} to {}", backup.start_lsn, backup.stop_lsn),
            format!("{} ({} stored)", output::bytes(backup.data_bytes), output::bytes(backup.stored_bytes)),
            output::short_time(backup.finished),
            backup.parent.as_ref().map_or(String::new(), |parent| {
                format!("incremental on {} ({} below it)", parent.id, parent.depth)
            }),
        ]
    });
    let cells: Vec<_> = cells.collect();
    let widths: Vec<usize> =
        (0..6).map(|column| cells.iter().map(|row| row[column].chars().count()).max().unwrap_or(0)).collect();
    let rows = cells.iter().map(|row| {
        let padded = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        format!("  {}", padded.collect::<Vec<_>>().join("  ").trim_end())
    });
    lines(text, &rows.collect::<Vec<_>>());
    let orphaned = info.orphaned_backups.iter().map(|backup| {
        format!("  {}  never restored from: it builds on {}, which is not there", backup.id, backup.missing)
    });
    lines(text, &orphaned.collect::<Vec<_>>());
    let unfinished = info.unfinished_backups.iter().map(|backup| {
        let started = output::short_time(backup.started);
        format!("  {}  not complete (started {started}), never restored from", backup.id)
    });
    lines(text, &unfinished.collect::<Vec<_>>());
    let holds = info.holds.iter().filter(|hold| hold.holds_at(info.asked)).map(|hold| {
        let until = match hold.until {
            Some(until) => format!("until {}", output::short_time(until)),
            None => "until it is released".to_owned(),
        };
        format!(
            "  {}  held by {} on {}, {until}: {} (hold {})",
            hold.backup, hold.user, hold.host, hold.reason, hold.id
        )
    });
    lines(text, &holds.collect::<Vec<_>>());
}

fn server_text(text: &mut String, server: &ServerInfo, style: Style) {
    let _ = writeln!(text, "\n{}", style.bold("Server"));
    let mut say = |line: String| {
        let _ = writeln!(text, "  {}", output::clean(&line));
    };
    if let Some(problem) = &server.problem {
        say(problem.clone());
    }
    if let (Some(timeline), Some(wal_lsn)) = (server.timeline, server.wal_lsn) {
        let kind = if server.in_recovery == Some(true) { "a standby, " } else { "" };
        say(format!("{kind}on timeline {timeline}, WAL to {wal_lsn}"));
    }
    if let (Some(until), Some(bytes), Some(segments)) =
        (server.archive_until_lsn, server.behind_bytes, server.behind_segments)
    {
        say(match bytes {
            0 => format!("archive  to {until}: nothing is missing at its end"),
            _ => format!(
                "archive  to {until}: {} behind ({segments} full segments and what of the open one is not shipped)",
                output::bytes(bytes)
            ),
        });
    }
    if let Some(archiver) = &server.archiver {
        let last = match (&archiver.last_archived_wal, archiver.last_archived_time) {
            (Some(file), Some(time)) => format!("last {file} at {}", output::short_time(time)),
            _ => "nothing archived yet".to_owned(),
        };
        let failing = archiver.failing_wal.as_ref().map(|file| format!("; it FAILS with {file}"));
        say(format!("archiver {last}{}", failing.unwrap_or_default()));
    }
    for slot in &server.slots {
        let active = if slot.active { "active" } else { "inactive" };
        say(format!("slot     {} keeps WAL from {} on, {active}", slot.name, slot.restart_lsn));
    }
}

/// Returns a length of time in its largest unit.
fn age(age: TimeDelta) -> String {
    let seconds = age.num_seconds().max(0);
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}
