//! The time line of a lineage: a lane for each timeline, and one for what was done with the archive.
//!
//! Places are in hundredths of the width and heights in pixels, so that text keeps its size whatever the width of the page.

use std::fmt::Write as _;

use chrono::{DateTime, TimeDelta, Utc};
use walship::pg::Lsn;

use super::super::super::args::Deed;
use super::super::super::history::Entry;
use super::super::super::output::{bytes, short_time};
use super::LineageStatus;
use super::clock::Clock;
use super::health::{drill_tone, flaws, kind_of, plural, said, verification_tone};
use crate::execute::info::{Info, TimelineInfo};
use crate::page::{Scale, Tone, axis, clock_ticks, percent, shortened};
use crate::words::escaped;

/// More timelines would fill the page: the newest are drawn.
const TIMELINES_MAX: usize = 12;

/// Heights in pixels.
const LABEL: u32 = 18;
const BAND: u32 = 16;
const ROW: u32 = 16;
const SPACE: u32 = 12;

/// What is drawn less wide is not seen.
const WIDTH_MIN: f64 = 0.25;

/// Something with a begin and an end.
struct Span {
    from: DateTime<Utc>,
    to: DateTime<Utc>,
    class: &'static str,
    said: String,
}

/// Something at one moment.
struct Mark {
    at: DateTime<Utc>,
    class: &'static str,
    /// What stands for the others where there are many: the highest.
    rank: u8,
    said: String,
}

struct Lane {
    label: String,
    stored: Option<(DateTime<Utc>, DateTime<Utc>)>,
    spans: Vec<Span>,
    backups: Vec<Mark>,
    points: Vec<Mark>,
    /// When it left another, and which lane that is.
    fork: Option<(DateTime<Utc>, usize)>,
}

/// Returns from when to when there is something to draw; nothing of an archive that tells of no time.
pub(super) fn extent(status: &LineageStatus, is_current: bool) -> Option<(DateTime<Utc>, DateTime<Utc>)> {
    let info = &status.info;
    let clocks = info.timelines.iter().filter_map(|timeline| Clock::of(info, timeline).extent(Lsn(0)));
    let backups = info.backups.iter().map(|backup| (backup.started, backup.finished));
    let all: Vec<_> = clocks.chain(backups).collect();
    let from = all.iter().map(|(from, _)| *from).min()?;
    let to = match is_current {
        true => info.asked,
        false => all.iter().map(|(_, to)| *to).max()?,
    };
    // Something that is seconds old is drawn as that.
    Some((from.min(to - TimeDelta::minutes(5)), to))
}

/// Writes the drawing of what lies between two moments. `id` tells it from others on the page.
pub(super) fn draw(
    page: &mut String,
    status: &LineageStatus,
    id: &str,
    title: &str,
    (from, to): (DateTime<Utc>, DateTime<Utc>),
) {
    let info = &status.info;
    let scale = Scale::new(from.timestamp_millis(), to.timestamp_millis());
    let left_out = info.timelines.len().saturating_sub(TIMELINES_MAX);
    let lanes = lanes(info, left_out, (from, to));
    let deeds = deeds(&status.history, (from, to));
    // The more lanes the fewer marks on each: a page has an end.
    let cells = (720 / lanes.len().max(1)).clamp(60, 240);
    let (mut drawn, mut below) = (String::new(), String::new());
    let (mut y, mut bands) = (0, Vec::new());
    for lane in &lanes {
        bands.push(y + LABEL);
        y = lane_of(&mut drawn, lane, &scale, cells, y);
    }
    for (lane, band) in lanes.iter().zip(&bands) {
        if let Some((time, parent)) = lane.fork
            && let Some(above) = bands.get(parent)
        {
            let x = percent(scale.at_time(time));
            let _ = writeln!(
                below,
                "<line class=\"fork\" x1=\"{x}\" x2=\"{x}\" y1=\"{}\" y2=\"{}\"/>",
                above + BAND,
                band + BAND / 2
            );
        }
    }
    for (label, marks) in &deeds {
        let _ = writeln!(drawn, "<text class=\"lane\" x=\"0\" y=\"{}\">{label}</text>", y + 12);
        marks_of(&mut drawn, marks, &scale, cells, y + LABEL + ROW / 2);
        y += LABEL + ROW + SPACE;
    }
    let height = y + 36;
    let _ = writeln!(
        page,
        "<figure class=\"time\">\n<figcaption>{}</figcaption>\n<svg class=\"chart\" width=\"100%\" height=\"{height}\" role=\"img\" aria-labelledby=\"{id}-title {id}-text\">\n\
         <title id=\"{id}-title\">{}</title>\n<desc id=\"{id}-text\">{}</desc>",
        escaped(title),
        escaped(title),
        escaped(&in_words(&lanes, &deeds, (from, to)))
    );
    axis(page, |max| clock_ticks(from, to, max), 0, y);
    page.push_str(&below);
    page.push_str(&drawn);
    page.push_str("</svg>\n");
    key(page, &lanes, &deeds);
    if left_out > 0 {
        let _ = writeln!(
            page,
            "<p class=\"soft\">{} not drawn; below they are listed.</p>",
            plural(left_out as u64, "older timeline")
        );
    }
    page.push_str("</figure>\n");
}

fn lanes(info: &Info, left_out: usize, (from, to): (DateTime<Utc>, DateTime<Utc>)) -> Vec<Lane> {
    let drawn = &info.timelines[left_out..];
    let lanes = drawn.iter().map(|timeline| {
        let clock = Clock::of(info, timeline);
        let begin = timeline.begin_lsn.unwrap_or(Lsn(0));
        let began = timeline.begin_lsn.and_then(|lsn| clock.before(lsn).or_else(|| clock.behind(lsn)));
        let stored = clock
            .extent(begin)
            .map(|(first, last)| (began.map_or(first, |began| began.max(first).min(last)), last));
        let parent =
            timeline.parent.and_then(|parent| drawn.iter().position(|other| other.timeline == parent));
        let mut spans = windows(timeline, &clock, began);
        spans.extend(gaps(timeline, &clock, info.asked));
        spans.retain(|span| span.to >= from && span.from <= to);
        let (mut backups, mut points) = (backups(info, timeline), points(timeline));
        for marks in [&mut backups, &mut points] {
            marks.retain(|mark| mark.at >= from && mark.at <= to);
        }
        let fork = began.zip(parent).filter(|(began, _)| *began >= from && *began <= to);
        let origin = timeline.parent.map_or_else(String::new, |parent| format!(", forked from {parent}"));
        Lane {
            label: format!("Timeline {}{origin}", timeline.timeline),
            stored: stored.filter(|(first, last)| *last >= from && *first <= to),
            spans,
            backups,
            points,
            fork,
        }
    });
    lanes.collect()
}

fn windows(timeline: &TimelineInfo, clock: &Clock, began: Option<DateTime<Utc>>) -> Vec<Span> {
    let spans = timeline.windows.iter().map(|found| {
        let window = &found.window;
        let until =
            found.latest_transaction.map(|latest| latest.time).or_else(|| clock.before(window.until_lsn));
        // What lies on an ancestor is drawn there.
        let from = began.map_or(window.from_time, |began| window.from_time.max(began));
        let to = until.unwrap_or(from).max(from);
        let said = format!("Every commit from {} to {}", short_time(window.from_time), short_time(to));
        Span { from, to, class: "window", said }
    });
    spans.collect()
}

/// Returns gaps as wide as they may be: WAL that is missing has no times of its own.
fn gaps(timeline: &TimelineInfo, clock: &Clock, now: DateTime<Utc>) -> Vec<Span> {
    let spans = timeline.gaps.iter().filter_map(|gap| {
        let behind = clock.behind(gap.to);
        let from = clock.before(gap.from).or(behind)?;
        let (class, what) = if gap.expired { ("expired", "Removed by retention") } else { ("gap", "Gap") };
        let said = format!("{what}: {} to {}, {}", gap.from, gap.to, when(Some(from), behind));
        Some(Span { from, to: behind.unwrap_or(now).max(from), class, said })
    });
    spans.collect()
}

/// Returns between which moments something was written.
pub(super) fn when(before: Option<DateTime<Utc>>, behind: Option<DateTime<Utc>>) -> String {
    match (before, behind) {
        (Some(before), Some(behind)) => format!("between {} and {}", short_time(before), short_time(behind)),
        (Some(before), None) => format!("after {}", short_time(before)),
        (None, Some(behind)) => format!("before {}", short_time(behind)),
        (None, None) => "not known when".to_owned(),
    }
}

fn backups(info: &Info, timeline: &TimelineInfo) -> Vec<Mark> {
    let own = info.backups.iter().filter(|backup| backup.timeline == timeline.timeline);
    let marks = own.map(|backup| {
        let flaws = flaws(info, backup);
        let (class, rank) = match (&*flaws, &backup.parent) {
            ([], Some(_)) => ("incremental", 0),
            ([], None) => ("full", 1),
            _ => ("damaged", 2),
        };
        let flaw = if flaws.is_empty() { String::new() } else { format!(", {}", flaws.join(", ")) };
        let size = bytes(backup.data_bytes);
        let said = format!(
            "{} backup {}, complete {}, {size}{flaw}",
            kind_of(backup),
            backup.id,
            short_time(backup.finished)
        );
        Mark { at: backup.finished, class, rank, said }
    });
    marks.collect()
}

fn points(timeline: &TimelineInfo) -> Vec<Mark> {
    let marks = timeline.restore_points.iter().map(|point| {
        let said = format!("Restore point {:?} at {}", shortened(&point.name, 80), short_time(point.time));
        Mark { at: point.time, class: "point", rank: 0, said }
    });
    marks.collect()
}

/// What was done with the archive: a row for each kind of which there is something.
fn deeds(history: &[Entry], (from, to): (DateTime<Utc>, DateTime<Utc>)) -> Vec<(&'static str, Vec<Mark>)> {
    let rows: [(&'static str, &[Deed]); 4] = [
        ("Drills", &[Deed::Drill]),
        ("Verifications", &[Deed::Verify]),
        ("Restores and extracts", &[Deed::Restore, Deed::Extract]),
        ("Removals", &[Deed::Expire]),
    ];
    let rows = rows.into_iter().map(|(label, kinds)| {
        let inside =
            |entry: &&Entry| entry.started >= from && entry.started <= to && kinds.contains(&entry.kind);
        let marks = history.iter().filter(inside).map(|entry| {
            let (class, rank) = match (entry.kind, drill_tone(&entry.outcome)) {
                (Deed::Drill, Tone::Good) => ("proven", 0),
                (Deed::Drill, Tone::Warn) => ("missed", 1),
                (Deed::Drill, _) => ("failed", 2),
                (Deed::Verify, _) => match verification_tone(&entry.outcome) {
                    Tone::Bad => ("failed", 2),
                    Tone::Warn => ("missed", 1),
                    _ => ("proven", 0),
                },
                _ if ["failed", "refused", "not_ended", "interrupted"].contains(&&*entry.outcome) => {
                    ("failed", 2)
                }
                _ => ("done", 0),
            };
            let said =
                format!("{} at {}: {}", entry.kind.word(), short_time(entry.started), said(&entry.outcome));
            Mark { at: entry.started, class, rank, said }
        });
        let mut marks: Vec<Mark> = marks.collect();
        marks.sort_by_key(|mark| mark.at);
        (label, marks)
    });
    rows.filter(|(_, marks)| !marks.is_empty()).collect()
}

/// Draws a lane from `y` on; returns where the next one begins.
fn lane_of(drawn: &mut String, lane: &Lane, scale: &Scale, cells: usize, y: u32) -> u32 {
    let _ = writeln!(drawn, "<text class=\"lane\" x=\"0\" y=\"{}\">{}</text>", y + 12, escaped(&lane.label));
    let band = y + LABEL;
    if let Some((first, last)) = lane.stored {
        let (x1, x2) = (percent(scale.at_time(first)), percent(scale.at_time(last)));
        let middle = band + BAND / 2;
        let _ = writeln!(
            drawn,
            "<line class=\"stored\" x1=\"{x1}\" x2=\"{x2}\" y1=\"{middle}\" y2=\"{middle}\"/>"
        );
    }
    // Gaps last: none is hidden.
    for class in ["window", "expired", "gap"] {
        spans_of(drawn, lane.spans.iter().filter(|span| span.class == class), scale, cells, band);
    }
    let mut next = band + BAND + 4;
    for marks in [&lane.backups, &lane.points] {
        if !marks.is_empty() {
            marks_of(drawn, marks, scale, cells, next + ROW / 2);
            next += ROW + 2;
        }
    }
    next + SPACE
}

/// Draws spans; those that cannot be told apart at this scale are drawn as one.
fn spans_of<'a>(
    drawn: &mut String,
    spans: impl Iterator<Item = &'a Span>,
    scale: &Scale,
    cells: usize,
    y: u32,
) {
    let mut spans: Vec<&Span> = spans.collect();
    spans.sort_by_key(|span| span.from);
    let cell = 100.0 / cells as f64;
    let mut at = 0;
    while let Some(first) = spans.get(at) {
        let (from, mut to) = (scale.at_time(first.from), scale.at_time(first.to));
        let mut count = 1;
        // Few are all drawn.
        while let Some(next) = spans.get(at + count).filter(|_| spans.len() > cells) {
            if scale.at_time(next.from) > to.max(from + cell) {
                break;
            }
            to = to.max(scale.at_time(next.to));
            count += 1;
        }
        let said =
            if count == 1 { first.said.clone() } else { format!("{count} drawn as one. {}", first.said) };
        let width = (to - from).max(WIDTH_MIN);
        let _ = writeln!(
            drawn,
            "<rect class=\"{}\" x=\"{}\" y=\"{y}\" width=\"{}\" height=\"{BAND}\" rx=\"2\"><title>{}</title></rect>",
            first.class,
            percent(from.min(100.0 - width)),
            percent(width),
            escaped(&said)
        );
        at += count;
    }
}

/// Draws marks around the height `y`, at most one in each cell: the one of the highest rank, which says how many there are.
fn marks_of(drawn: &mut String, marks: &[Mark], scale: &Scale, cells: usize, y: u32) {
    let mut placed: Vec<(usize, &Mark)> =
        marks.iter().map(|mark| ((scale.at_time(mark.at) * cells as f64 / 100.0) as usize, mark)).collect();
    placed.sort_by_key(|(cell, mark)| (*cell, std::cmp::Reverse(mark.rank)));
    for group in placed.chunk_by(|(one, _), (other, _)| one == other) {
        let Some((_, mark)) = group.first() else { continue };
        let said = match group.len() {
            1 => mark.said.clone(),
            count => format!("{count} here. {}", mark.said),
        };
        let _ = writeln!(
            drawn,
            "<svg class=\"mark\" x=\"{}\" y=\"{y}\"><title>{}</title>{}</svg>",
            percent(scale.at_time(mark.at)),
            escaped(&said),
            shape(mark.class)
        );
    }
}

/// Returns what a mark looks like: no two only differ in their colour.
fn shape(class: &str) -> String {
    let path = match class {
        "full" => "M-1.5-7h3v14h-3z",
        "incremental" => "M-1-1h2v8h-2z",
        "damaged" => "M-1.5-7h3v14h-3zM-4-7h8v3h-8z",
        "point" => "M0-5 4 0 0 5-4 0z",
        "proven" => "M0-5a5 5 0 1 0 .01 0z",
        "missed" => "M0-6 6 5H-6z",
        "failed" => "M-5-3-3-5 0-2 3-5 5-3 2 0 5 3 3 5 0 2-3 5-5 3-2 0z",
        _ => "M-4-4h8v8h-8z",
    };
    format!("<path class=\"{class}\" d=\"{path}\"/>")
}

/// Writes what the marks mean, as far as they occur.
fn key(page: &mut String, lanes: &[Lane], deeds: &[(&'static str, Vec<Mark>)]) {
    let spans = lanes.iter().flat_map(|lane| &lane.spans).map(|span| span.class);
    let marks = lanes.iter().flat_map(|lane| lane.backups.iter().chain(&lane.points));
    let marks = marks.chain(deeds.iter().flat_map(|(_, marks)| marks)).map(|mark| mark.class);
    let used: Vec<&str> = spans.chain(marks).collect();
    page.push_str("<ul class=\"key\">\n");
    for (class, word) in [
        ("window", "every commit can be reached"),
        ("gap", "gap: WAL is missing; as wide as it may be"),
        ("expired", "removed by retention"),
        ("full", "full backup"),
        ("incremental", "incremental backup"),
        ("damaged", "backup that is damaged or cannot be used"),
        ("point", "restore point"),
        ("proven", "drill: proven"),
        ("missed", "drill: objective missed, or interrupted"),
        ("failed", "failed"),
        ("done", "done"),
    ] {
        if !used.contains(&class) {
            continue;
        }
        let drawn = match class {
            "window" | "gap" | "expired" => {
                format!("<rect class=\"{class}\" x=\"-8\" y=\"-5\" width=\"16\" height=\"10\" rx=\"2\"/>")
            }
            class => shape(class),
        };
        let _ = writeln!(
            page,
            "<li><svg width=\"18\" height=\"16\" viewBox=\"-9 -8 18 16\" aria-hidden=\"true\">{drawn}</svg> {word}</li>"
        );
    }
    page.push_str("</ul>\n");
}

/// Returns the drawing for those who do not see it.
fn in_words(
    lanes: &[Lane],
    deeds: &[(&'static str, Vec<Mark>)],
    (from, to): (DateTime<Utc>, DateTime<Utc>),
) -> String {
    let mut text = format!("From {} to {}.", short_time(from), short_time(to));
    for lane in lanes {
        let count = |class: &str| lane.spans.iter().filter(|span| span.class == class).count() as u64;
        let _ = write!(
            text,
            " {}: {}, {}, {}.",
            lane.label,
            plural(count("window"), "window"),
            plural(count("gap"), "gap"),
            plural(lane.backups.len() as u64, "backup")
        );
        let newest = lane.spans.iter().rev().find(|span| span.class == "window");
        if let Some(window) = newest {
            let _ = write!(text, " The last window: {}.", window.said);
        }
    }
    for (label, marks) in deeds {
        let _ = write!(text, " {label}: {}.", marks.len());
    }
    text.push_str(" The tables below have all figures.");
    text
}
