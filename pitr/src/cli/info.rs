//! `pitr info`.

use std::fmt::Write as _;

use chrono::{DateTime, Utc};
use serde::Serialize;
use walship::catalog::{BackupRecord, Catalog, Lineage};
use walship::pg::{Lsn, SegmentName, TimelineId};
use walship::repository::{LineageRepository, load_catalog};
use walship::{Error, Result};

use super::DONE;
use super::args::InfoArgs;
use super::output::{self, Style};
use super::source::open_lineages;
use crate::plan::{Gap, Window, gaps_of, windows};

/// How many segments are looked at for the newest commit of a window.
const LOOK_BACK_MAX: usize = 32;

/// What a cluster's part of the repository holds.
#[derive(Debug, Serialize)]
struct Info {
    repository: String,
    cluster: String,
    lineages: Vec<Lineage>,
    /// The lineage that the rest is about.
    lineage: u32,
    timelines: Vec<TimelineInfo>,
    backups: Vec<BackupRecord>,
    unfinished_backups: Vec<UnfinishedBackup>,
    partial_segments: Vec<SegmentName>,
    incomplete_segments: Vec<SegmentName>,
}

#[derive(Debug, Serialize)]
struct UnfinishedBackup {
    id: String,
    started: DateTime<Utc>,
}

#[derive(Debug, Serialize)]
struct TimelineInfo {
    timeline: TimelineId,
    parent: Option<TimelineId>,
    begin_lsn: Option<Lsn>,
    /// Whether its history file is stored, or it needs none.
    has_history: bool,
    segments: u64,
    stored_bytes: u64,
    first_segment: Option<SegmentName>,
    last_segment: Option<SegmentName>,
    windows: Vec<WindowInfo>,
    gaps: Vec<Gap>,
}

#[derive(Debug, Serialize)]
struct WindowInfo {
    #[serde(flatten)]
    window: Window,
    /// The latest time of a commit or abort in the window's last segments.
    newest_commit: Option<DateTime<Utc>>,
}

pub(super) async fn run(args: &InfoArgs) -> Result<u8> {
    let (repository, cluster) = open_lineages(&args.source).await?;
    let lineages = cluster.lineages().await?;
    let lineages = lineages.iter().map(|other| other.lineage().clone()).collect();
    let catalog = load_catalog(&repository).await?;
    let info = collect(&repository, catalog, lineages).await?;
    if args.source.json {
        let value = serde_json::to_value(&info)
            .map_err(|error| Error::invalid(format!("what is stored cannot be shown as JSON: {error}")))?;
        output::print_json(&value)?;
    } else {
        output::print(&text(&info, Style::of_stdout()))?;
    }
    Ok(DONE)
}

async fn collect(repository: &LineageRepository, catalog: Catalog, lineages: Vec<Lineage>) -> Result<Info> {
    let mut timelines = Vec::new();
    for timeline in catalog.timelines() {
        timelines.push(timeline_info(repository, &catalog, timeline).await?);
    }
    Ok(Info {
        repository: repository.location(),
        cluster: catalog.cluster,
        lineages,
        lineage: catalog.lineage.number,
        timelines,
        backups: catalog.backups,
        unfinished_backups: catalog
            .unfinished_backups
            .into_iter()
            .map(|(id, started)| UnfinishedBackup { id, started })
            .collect(),
        partial_segments: catalog.partials,
        incomplete_segments: catalog.incomplete,
    })
}

async fn timeline_info(
    repository: &LineageRepository,
    catalog: &Catalog,
    timeline: TimelineId,
) -> Result<TimelineInfo> {
    let history = catalog.history(timeline);
    let runs = catalog.segments.runs(timeline);
    let parent = history.as_ref().and_then(|history| history.ancestors.last());
    let begin = parent.map_or(Lsn(0), |entry| entry.switch_lsn);
    let mut found = Vec::new();
    for window in windows(catalog, timeline) {
        let newest_commit = newest_commit(repository, catalog, &window).await?;
        found.push(WindowInfo { window, newest_commit });
    }
    // Gaps before the fork are the ancestor's and shown there.
    let gaps = history.as_ref().map(|history| gaps_of(catalog, history)).unwrap_or_default();
    Ok(TimelineInfo {
        timeline,
        parent: parent.map(|entry| entry.timeline),
        begin_lsn: parent.map(|entry| entry.switch_lsn),
        has_history: history.is_some(),
        segments: runs
            .iter()
            .map(|run| {
                run.last.number(catalog.lineage.segment_size) - run.first.number(catalog.lineage.segment_size)
                    + 1
            })
            .sum(),
        stored_bytes: runs.iter().map(|run| run.stored_bytes).sum(),
        first_segment: runs.first().map(|run| run.first),
        last_segment: runs.last().map(|run| run.last),
        windows: found,
        gaps: gaps.into_iter().filter(|gap| gap.to > begin).collect(),
    })
}

/// Returns the latest time in the newest of the window's segments that has any.
async fn newest_commit(
    repository: &LineageRepository,
    catalog: &Catalog,
    window: &Window,
) -> Result<Option<DateTime<Utc>>> {
    let mut name = window.last_segment;
    for _ in 0..LOOK_BACK_MAX {
        let Some(segment) = name.filter(|segment| catalog.segments.contains(*segment)) else { break };
        let summary = repository.segment_summary(segment).await?;
        if let Some(newest) = summary.and_then(|summary| summary.max_time) {
            return Ok(Some(newest.time));
        }
        name = segment.previous(catalog.lineage.segment_size);
    }
    Ok(None)
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
        for WindowInfo { window, newest_commit } in &timeline.windows {
            let until = newest_commit.map(output::short_time).unwrap_or_else(|| "no commit yet".to_owned());
            let _ = writeln!(
                text,
                "  window   {} ({}) to {} ({until}), {} backup(s)",
                output::short_time(window.from_time),
                window.from_lsn,
                window.until_lsn,
                window.backups
            );
        }
        if timeline.windows.is_empty() {
            let _ = writeln!(text, "  window   none: no complete backup leads here");
        }
        for gap in &timeline.gaps {
            let _ = writeln!(text, "  gap      {gap}");
        }
    }
    let _ = writeln!(text, "\n{}", style.bold("Backups"));
    if info.backups.is_empty() {
        let _ = writeln!(text, "  none: `walship backup` takes one");
    }
    for backup in &info.backups {
        let _ = writeln!(
            text,
            "  {}  timeline {}  {} to {}  {} ({} stored)  {}",
            backup.id,
            backup.timeline,
            backup.start_lsn,
            backup.stop_lsn,
            output::bytes(backup.data_bytes),
            output::bytes(backup.stored_bytes),
            output::short_time(backup.finished)
        );
    }
    for backup in &info.unfinished_backups {
        let _ = writeln!(
            text,
            "  {}  not complete (started {}), never restored from",
            output::clean(&backup.id),
            output::short_time(backup.started)
        );
    }
    for name in &info.incomplete_segments {
        let _ =
            writeln!(text, "\n{name} was kept apart as incomplete; it is never used as the whole segment");
    }
    text
}
