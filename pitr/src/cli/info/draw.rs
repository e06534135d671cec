//! The archive drawn to scale: one line for each timeline, from the first stored byte of WAL to the last.

use std::fmt::Write as _;
use std::io::IsTerminal as _;

use walship::pg::Lsn;

use super::output;
use crate::execute::info::{Info, TimelineInfo};

/// Wider drawings say no more.
const COLUMNS_MAX: usize = 120;

/// Narrower ones say nothing.
const COLUMNS_MIN: usize = 32;

/// More timelines would fill the screen.
const TIMELINES_MAX: usize = 12;

/// What is drawn on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Canvas {
    pub(super) columns: usize,
    pub(super) is_utf8: bool,
}

impl Canvas {
    /// Returns the terminal that standard output is; `None` when it is none, or too narrow.
    pub(super) fn of_stdout() -> Option<Self> {
        let stdout = std::io::stdout();
        if !stdout.is_terminal() {
            return None;
        }
        let columns = terminal_size::terminal_size_of(&stdout).map_or(80, |(width, _)| usize::from(width.0));
        // As setlocale() chooses: the first that is set and not empty.
        let locale = ["LC_ALL", "LC_CTYPE", "LANG"].into_iter().filter_map(|name| std::env::var(name).ok());
        let locale = locale.into_iter().find(|value| !value.is_empty()).unwrap_or_default().to_lowercase();
        let is_utf8 = locale.contains("utf-8") || locale.contains("utf8");
        (columns >= COLUMNS_MIN).then_some(Self { columns: columns.min(COLUMNS_MAX), is_utf8 })
    }
}

/// The marks of a drawing.
struct Marks {
    stored: char,
    window: char,
    gap: char,
    expired: char,
    fork: char,
    backup: char,
    point: char,
}

const UTF8: Marks =
    Marks {
        stored: '─', window: '━', gap: '×', expired: '·', fork: '└', backup: '▲', point: '◆'
    };
const ASCII: Marks =
    Marks { stored: '-', window: '=', gap: 'x', expired: '.', fork: '+', backup: 'B', point: 'R' };

/// From what to what a drawing goes.
struct Scale {
    from: Lsn,
    to: Lsn,
    columns: usize,
}

impl Scale {
    fn column(&self, lsn: Lsn) -> usize {
        let along = u128::from(lsn.0.clamp(self.from.0, self.to.0) - self.from.0);
        let length = u128::from(self.to.0 - self.from.0).max(1);
        (along * (self.columns as u128 - 1) / length) as usize
    }
}

/// Returns the drawing, or nothing when nothing is stored.
pub(super) fn timeline(info: &Info, canvas: Canvas) -> String {
    let marks = if canvas.is_utf8 { &UTF8 } else { &ASCII };
    let left_out = info.timelines.len().saturating_sub(TIMELINES_MAX);
    let timelines = &info.timelines[left_out..];
    let spans: Vec<(Lsn, Lsn)> = timelines.iter().filter_map(|timeline| span(info, timeline)).collect();
    let (Some(from), Some(to)) =
        (spans.iter().map(|span| span.0).min(), spans.iter().map(|span| span.1).max())
    else {
        return String::new();
    };
    let label = timelines.iter().map(|timeline| timeline.timeline.to_string().len()).max().unwrap_or(1);
    let scale = Scale { from, to, columns: canvas.columns.saturating_sub(label + 4).max(1) };
    let mut text = String::new();
    for timeline in timelines {
        let line: String = line(info, timeline, &scale, marks).into_iter().collect();
        let _ = writeln!(text, "  {:>label$}  {}", timeline.timeline, line.trim_end());
    }
    let (first, last) = (from.to_string(), to.to_string());
    let room = scale.columns.saturating_sub(first.len() + last.len());
    let _ = writeln!(text, "  {:label$}  {first}{:room$}{last}", "", "");
    let expired = timelines.iter().any(|timeline| timeline.gaps.iter().any(|gap| gap.expired));
    let words = [
        (marks.window, "every commit"),
        (marks.stored, "stored only"),
        (marks.gap, "gap"),
        (marks.expired, "expired"),
        (marks.backup, "backup"),
        (marks.point, "restore point"),
    ];
    let mut key = String::new();
    for (mark, word) in words.into_iter().filter(|(mark, _)| expired || *mark != marks.expired) {
        let next = format!("  {mark} {word}");
        let used = key.lines().last().map_or(0, |line| line.chars().count());
        if used + next.chars().count() > canvas.columns {
            key.push('\n');
        }
        key += &next;
    }
    let _ = writeln!(text, "{key}");
    if left_out > 0 {
        let _ = writeln!(text, "  ({left_out} older timelines are not drawn)");
    }
    output::clean(&text)
}

/// Returns from where to where there is something to draw of a timeline.
fn span(info: &Info, timeline: &TimelineInfo) -> Option<(Lsn, Lsn)> {
    let size = info.lineages.iter().find(|lineage| lineage.number == info.lineage)?.segment_size;
    let stored = timeline.first_segment.zip(timeline.last_segment);
    let stored = stored.map(|(first, last)| (first.start(size), last.end(size)));
    let gaps = timeline.gaps.iter().map(|gap| (gap.from, gap.to));
    let all: Vec<_> = stored.into_iter().chain(gaps).collect();
    Some((all.iter().map(|span| span.0).min()?, all.iter().map(|span| span.1).max()?))
}

fn line(info: &Info, timeline: &TimelineInfo, scale: &Scale, marks: &Marks) -> Vec<char> {
    let mut line = vec![' '; scale.columns];
    let begin = timeline.begin_lsn.unwrap_or(Lsn(0));
    let Some((from, to)) = span(info, timeline) else { return line };
    let mut fill = |from: Lsn, to: Lsn, mark: char| {
        let from = from.max(begin);
        if to > from {
            line[scale.column(from)..=scale.column(to)].fill(mark);
        }
    };
    fill(from, to, marks.stored);
    for found in &timeline.windows {
        fill(found.window.from_lsn, found.window.until_lsn, marks.window);
    }
    for gap in &timeline.gaps {
        fill(gap.from, gap.to, if gap.expired { marks.expired } else { marks.gap });
    }
    if timeline.begin_lsn.is_some() {
        line[scale.column(begin)] = marks.fork;
    }
    for backup in info.backups.iter().filter(|backup| backup.timeline == timeline.timeline) {
        line[scale.column(backup.start_lsn)] = marks.backup;
    }
    for point in &timeline.restore_points {
        line[scale.column(point.lsn)] = marks.point;
    }
    line
}
