//! A drill's report as one page: nothing outside it is needed, nothing in it runs.

use std::fmt::Write as _;

use super::text::{checked_word, facts, verdict_word};
use super::{Checked, DrillReport, Outcome, Verdict, title};
use crate::page::{self, Cell, Column, Scale, Tone, axis, elapsed_ticks, percent, pill, table};
use crate::words::{bytes, duration, escaped};

/// The height of a row of the time line: its name above, its bar below.
const ROW: u32 = 40;

/// A bar that is less wide is not seen.
const WIDTH_MIN: f64 = 0.25;

/// Returns the page.
pub fn html(report: &DrillReport) -> String {
    let mut page = page::begin(&format!("Drill of {}: {}", report.cluster, report.outcome.said()));
    let tone = match report.outcome {
        Outcome::Proven => Tone::Good,
        Outcome::ObjectiveMissed | Outcome::Interrupted => Tone::Warn,
        Outcome::NotProven | Outcome::Failed | Outcome::NoPlan => Tone::Bad,
    };
    let _ = writeln!(
        page,
        "<header>\n<h1>Restore drill of {} {}</h1>\n<p class=\"soft\">{}</p>\n</header>\n<div class=\"card\">",
        escaped(&report.cluster),
        pill(tone, report.outcome.said()),
        escaped(&report.id)
    );
    let facts = facts(report).into_iter().map(|(name, value)| {
        let tone = match name {
            "RTO" => objective_tone(report.objectives.rto.met),
            "RPO" => objective_tone(report.objectives.rpo.met),
            _ => Tone::Plain,
        };
        (name, Cell::toned(tone, value))
    });
    page::facts(&mut page, facts);
    if let Some(trouble) = &report.trouble {
        let _ = writeln!(
            page,
            "<pre>error: {}\nsafe:  {}\nnext:  {}</pre>",
            escaped(&trouble.error),
            escaped(&trouble.safe),
            escaped(&trouble.next)
        );
    }
    page.push_str("</div>\n");
    time_line(report, &mut page);
    proofs(report, &mut page);
    checks(report, &mut page);
    counts(report, &mut page);
    if !report.notes.is_empty() {
        page.push_str("<h2>Notes</h2>\n<ul class=\"plain\">\n");
        for note in &report.notes {
            let _ = writeln!(page, "<li>{}</li>", escaped(note));
        }
        page.push_str("</ul>\n");
    }
    page::end(&mut page);
    page
}

fn objective_tone(met: Option<bool>) -> Tone {
    match met {
        Some(true) => Tone::Good,
        Some(false) => Tone::Bad,
        None => Tone::Plain,
    }
}

/// Draws each step where it lies in the drill; what counts as recovery time has a colour of its own, and the objective
/// is a line across.
fn time_line(report: &DrillReport, page: &mut String) {
    if report.steps.is_empty() {
        return;
    }
    let end = report.steps.iter().map(|step| step.from_millis.saturating_add(step.millis)).max().unwrap_or(0);
    let limit = report.objectives.rto.objective_seconds.map(|seconds| seconds.saturating_mul(1000));
    // The objective is shown where it does not squeeze everything else to nothing.
    let limit = limit.filter(|limit| *limit <= end.saturating_mul(3));
    let total = end.max(limit.unwrap_or(0)).max(1);
    let scale = Scale::new(0, signed(total));
    let mut drawn = String::new();
    let mut y = 0;
    let mut said = Vec::new();
    for step in &report.steps {
        let counts = ["plan", "restore", "recovery"].contains(&step.name);
        let (from, to) = (
            scale.at(signed(step.from_millis)),
            scale.at(signed(step.from_millis.saturating_add(step.millis))),
        );
        let rate = step.bytes.map_or_else(String::new, |of| {
            let rate = (of as f64 * 1000.0 / step.millis.max(1) as f64) as u64;
            format!(": {}, {}/s", bytes(of), bytes(rate))
        });
        said.push(format!(
            "{} began after {} and took {}{rate}.",
            title(step.name),
            duration(step.from_millis),
            duration(step.millis)
        ));
        let width = (to - from).max(WIDTH_MIN);
        let _ = writeln!(
            drawn,
            "<text class=\"lane\" x=\"0\" y=\"{}\">{} <tspan>{}{}</tspan></text>\n\
             <rect class=\"{}\" x=\"{}\" y=\"{}\" width=\"{}\" height=\"12\" rx=\"2\"/>",
            y + 12,
            escaped(title(step.name)),
            duration(step.millis),
            rate,
            if counts { "counts" } else { "bar" },
            percent(from.min(100.0 - width)),
            y + 18,
            percent(width),
        );
        y += ROW;
    }
    let _ = writeln!(
        page,
        "<h2>Time</h2>\n<figure class=\"time\">\n<svg class=\"chart\" width=\"100%\" height=\"{}\" role=\"img\" aria-labelledby=\"time-title time-text\">\n\
         <title id=\"time-title\">What the drill spent its time on</title>\n<desc id=\"time-text\">{}</desc>",
        y + 22,
        escaped(&said.join(" "))
    );
    axis(page, |max| elapsed_ticks(total, max), 0, y);
    // Below the names.
    if let Some(limit) = limit {
        let x = percent(scale.at(signed(limit)));
        let _ = writeln!(page, "<line class=\"limit\" x1=\"{x}\" x2=\"{x}\" y1=\"0\" y2=\"{y}\"/>");
    }
    page.push_str(&drawn);
    page.push_str("</svg>\n<ul class=\"key\">\n");
    let key = |page: &mut String, drawn: &str, word: &str| {
        let _ = writeln!(
            page,
            "<li><svg width=\"18\" height=\"16\" viewBox=\"-9 -8 18 16\" aria-hidden=\"true\">{drawn}</svg> {word}</li>"
        );
    };
    let bar = |class: &str| {
        format!("<rect class=\"{class}\" x=\"-8\" y=\"-5\" width=\"16\" height=\"10\" rx=\"2\"/>")
    };
    key(page, &bar("counts"), "counts as recovery time");
    key(page, &bar("bar"), "proof and clean-up");
    if limit.is_some() {
        key(page, "<line class=\"limit\" x1=\"0\" x2=\"0\" y1=\"-8\" y2=\"8\"/>", "the objective (rto)");
    }
    page.push_str("</ul>\n</figure>\n");
}

fn signed(millis: u64) -> i64 {
    i64::try_from(millis).unwrap_or(i64::MAX)
}

fn proofs(report: &DrillReport, page: &mut String) {
    let rows = report.proofs.iter().map(|proof| {
        let tone = match proof.verdict {
            Verdict::Proven => Tone::Good,
            Verdict::Failed => Tone::Bad,
            Verdict::Skipped => Tone::Soft,
        };
        vec![
            Cell::toned(tone, verdict_word(proof.verdict)),
            title(proof.what).into(),
            proof.detail.clone().into(),
        ]
    });
    let rows: Vec<_> = rows.collect();
    if rows.is_empty() {
        return;
    }
    page.push_str("<h2>Proofs</h2>\n<div class=\"card\">\n");
    let columns = [("Verdict", Column::Words), ("What", Column::Words), ("Details", Column::Words)];
    table(page, "Proofs", &columns, &rows, IN_JSON);
    page.push_str("</div>\n");
}

const IN_JSON: &str = "`pitr history --drill ID --json` has all of them";

fn checks(report: &DrillReport, page: &mut String) {
    if report.checks.is_empty() {
        return;
    }
    let rows = report.checks.iter().map(|check| {
        let tone = if check.result == Checked::Passed { Tone::Good } else { Tone::Bad };
        vec![
            Cell::toned(tone, checked_word(check.result)),
            check.name.clone().into(),
            check.database.clone().into(),
            duration(check.millis).into(),
            Cell { pre: true, ..Cell::from(check.detail.clone().unwrap_or_default()) },
        ]
    });
    let mut rows: Vec<_> = rows.collect();
    // Those that did not pass are what is looked for.
    rows.sort_by_key(|row| row[0].tone == Tone::Good);
    page.push_str("<h2>SQL checks</h2>\n<div class=\"card\">\n");
    let columns = [
        ("Result", Column::Words),
        ("Check", Column::Words),
        ("Database", Column::Words),
        ("Took", Column::Number),
        ("Answer", Column::Words),
    ];
    table(page, "SQL checks", &columns, &rows, IN_JSON);
    page.push_str("</div>\n");
}

fn counts(report: &DrillReport, page: &mut String) {
    if report.row_counts.is_empty() {
        return;
    }
    let rows = report.row_counts.iter().map(|count| {
        let rows = count.rows.map_or_else(|| "not counted".to_owned(), |rows| rows.to_string());
        vec![count.database.clone().into(), count.table.clone().into(), rows.into()]
    });
    page.push_str("<h2>Rows</h2>\n<div class=\"card\">\n");
    let columns = [("Database", Column::Words), ("Table", Column::Words), ("Rows", Column::Number)];
    table(page, "Rows of each table", &columns, &rows.collect::<Vec<_>>(), IN_JSON);
    page.push_str("</div>\n");
}

#[cfg(test)]
mod tests {
    use super::super::tests::report;
    use super::*;
    use crate::page::tests::{assert_sound, percent_of};

    #[test]
    fn nothing_of_a_name_becomes_part_of_the_page() {
        let page = html(&report());
        insta::assert_snapshot!(page);
        assert_sound(&page);
        for hostile in ["<script", "<drill>", "<Name>", "\u{1b}"] {
            assert!(!page.contains(hostile), "{hostile}");
        }
        // What failed comes first.
        assert!(page.find("alert(1)").unwrap() < page.find("orders.sql").unwrap());
    }

    #[test]
    fn every_bar_lies_within_the_drawing() {
        let page = html(&report());
        let figure = page.split("<figure").nth(1).unwrap().split("</svg>").next().unwrap();
        assert_eq!(figure.matches("<rect ").count(), report().steps.len());
        for bar in figure.split("<rect ").skip(1) {
            let number = |name: &str| percent_of(bar, name);
            assert!(number("x") >= 0.0 && number("x") + number("width") <= 100.01, "{bar}");
        }
    }

    #[test]
    fn a_drill_that_ended_at_once_is_a_page_too() {
        let mut empty = report();
        (empty.steps, empty.proofs) = (Vec::new(), Vec::new());
        (empty.checks, empty.row_counts, empty.notes) = (Vec::new(), Vec::new(), Vec::new());
        assert_sound(&html(&empty));
        empty.steps = vec![super::super::Step { name: "plan", from_millis: 0, millis: 0, bytes: None }];
        let page = html(&empty);
        assert_sound(&page);
        assert!(page.contains("<rect class=\"counts\""));
    }
}
