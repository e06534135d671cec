//! A drill's report as one page: nothing outside it is needed, nothing in it runs.

use std::fmt::Write as _;

use super::text::{checked_word, facts, verdict_word};
use super::{Checked, DrillReport, Outcome, Verdict, title};
use crate::words::{bytes, duration, escaped};

/// Whatever a name in the report may look like, a browser is told to load and run nothing.
const HEAD: &str = r#"<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
"#;

const STYLE: &str = r#"<style>
:root { color-scheme: light dark; --page: #fff; --text: #1c2430; --soft: #5b6675; --line: #d8dee6; --tint: #f3f5f8;
  --good: #1a7f37; --bad: #c4232d; --warn: #9a6700; --bar: #2f6fd0; --part: #7a8797; }
@media (prefers-color-scheme: dark) { :root { --page: #12161c; --text: #e4e9f0; --soft: #9aa6b5; --line: #2d3641;
  --tint: #1a2029; --good: #4cc26b; --bad: #ff7b83; --warn: #e0b33d; --bar: #6aa5ff; --part: #76839a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 64rem; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.35rem; margin: 0 0 .25rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
.outcome { display: inline-block; padding: .1rem .6rem; border: 2px solid currentColor; border-radius: .4rem; font-weight: 600; }
.good { color: var(--good); } .bad { color: var(--bad); } .warn { color: var(--warn); } .soft { color: var(--soft); }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .15rem 1rem; margin: 1rem 0; }
dt { color: var(--soft); } dd { margin: 0; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0;
  border-bottom: 1px solid var(--line); } th { color: var(--soft); font-weight: 500; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { margin: .25rem 0 0; padding: .4rem .6rem; background: var(--tint); border-radius: .3rem; white-space: pre-wrap;
  font: 13px/1.4 ui-monospace, monospace; }
svg { display: block; width: 100%; height: 1.1rem; }
.time { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr minmax(6rem, max-content); gap: .2rem .8rem;
  align-items: center; } .time .took { text-align: right; font-variant-numeric: tabular-nums; }
.track { background: var(--tint); border-radius: .2rem; overflow: hidden; }
.bar { fill: var(--part); } .counts { fill: var(--bar); } .limit { stroke: var(--bad); stroke-width: 3; }
@media (max-width: 34rem) { .time { grid-template-columns: 1fr max-content; } .time .track { grid-column: 1 / -1; grid-row: auto; }
  .time .took { grid-column: 2; } .time .name { grid-column: 1; } }
</style>
"#;

/// How wide the time line is drawn, in units of its own.
const WIDTH: u64 = 10_000;

/// Returns the page.
pub fn html(report: &DrillReport) -> String {
    let mut page = String::from(HEAD);
    let what = format!("Drill of {}: {}", report.cluster, report.outcome.said());
    let _ = writeln!(page, "<title>{}</title>", escaped(&what));
    page.push_str(STYLE);
    let class = match report.outcome {
        Outcome::Proven => "good",
        Outcome::ObjectiveMissed | Outcome::Interrupted => "warn",
        Outcome::NotProven | Outcome::Failed | Outcome::NoPlan => "bad",
    };
    let _ = writeln!(
        page,
        "</head>\n<body>\n<h1>Restore drill of {}</h1>\n<p><span class=\"outcome {class}\">{}</span> \
         <span class=\"soft\">{}</span></p>",
        escaped(&report.cluster),
        escaped(report.outcome.said()),
        escaped(&report.id)
    );
    page.push_str("<dl>\n");
    for (name, value) in facts(report) {
        let class = match name {
            "RTO" => objective_class(report.objectives.rto.met),
            "RPO" => objective_class(report.objectives.rpo.met),
            _ => "",
        };
        let _ = writeln!(page, "<dt>{}</dt><dd class=\"{class}\">{}</dd>", escaped(name), escaped(&value));
    }
    page.push_str("</dl>\n");
    if let Some(trouble) = &report.trouble {
        let _ = writeln!(
            page,
            "<pre>error: {}\nsafe:  {}\nnext:  {}</pre>",
            escaped(&trouble.error),
            escaped(&trouble.safe),
            escaped(&trouble.next)
        );
    }
    time_line(report, &mut page);
    proofs(report, &mut page);
    checks(report, &mut page);
    counts(report, &mut page);
    if !report.notes.is_empty() {
        page.push_str("<h2>Notes</h2>\n<ul>\n");
        for note in &report.notes {
            let _ = writeln!(page, "<li>{}</li>", escaped(note));
        }
        page.push_str("</ul>\n");
    }
    page.push_str("</body>\n</html>\n");
    page
}

fn objective_class(met: Option<bool>) -> &'static str {
    match met {
        Some(true) => "good",
        Some(false) => "bad",
        None => "",
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
    let x = |millis: u64| (u128::from(millis) * u128::from(WIDTH) / u128::from(total)) as u64;
    page.push_str("<h2>Time</h2>\n<div class=\"time\">\n");
    for step in &report.steps {
        let counts = ["plan", "restore", "recovery"].contains(&step.name);
        let (from, width) = (x(step.from_millis), x(step.millis).max(WIDTH / 250));
        let rate = step.bytes.map_or_else(String::new, |of| {
            let rate = (of as f64 * 1000.0 / step.millis.max(1) as f64) as u64;
            format!(": {}, {}/s", bytes(of), bytes(rate))
        });
        let line = limit.map_or_else(String::new, |limit| {
            let at = x(limit);
            format!("<line class=\"limit\" x1=\"{at}\" x2=\"{at}\" y1=\"0\" y2=\"100\" vector-effect=\"non-scaling-stroke\"/>")
        });
        let _ = writeln!(
            page,
            "<span class=\"name\">{}</span><span class=\"track\"><svg viewBox=\"0 0 {WIDTH} 100\" \
             preserveAspectRatio=\"none\" role=\"img\" aria-label=\"{} began after {} and took {}\"><rect class=\"{}\" \
             x=\"{}\" y=\"10\" width=\"{width}\" height=\"80\"/>{line}</svg></span><span class=\"took\" title=\"{}{rate}\">{}</span>",
            escaped(title(step.name)),
            escaped(title(step.name)),
            duration(step.from_millis),
            duration(step.millis),
            if counts { "counts" } else { "bar" },
            from.min(WIDTH - WIDTH / 250),
            duration(step.millis),
            duration(step.millis),
        );
    }
    page.push_str("</div>\n<p class=\"soft\">Blue: what counts as recovery time.");
    if limit.is_some() {
        page.push_str(" Red line: its objective.");
    }
    page.push_str("</p>\n");
}

fn proofs(report: &DrillReport, page: &mut String) {
    page.push_str("<h2>Proofs</h2>\n<table>\n");
    for proof in &report.proofs {
        let class = match proof.verdict {
            Verdict::Proven => "good",
            Verdict::Failed => "bad",
            Verdict::Skipped => "soft",
        };
        let _ = writeln!(
            page,
            "<tr><td class=\"{class}\">{}</td><td>{}</td><td>{}</td></tr>",
            verdict_word(proof.verdict),
            escaped(title(proof.what)),
            escaped(&proof.detail)
        );
    }
    page.push_str("</table>\n");
}

fn checks(report: &DrillReport, page: &mut String) {
    if report.checks.is_empty() {
        return;
    }
    page.push_str("<h2>SQL checks</h2>\n<table>\n");
    for check in &report.checks {
        let class = if check.result == Checked::Passed { "good" } else { "bad" };
        let detail = check.detail.as_ref().map(|detail| format!("<pre>{}</pre>", escaped(detail)));
        let _ = writeln!(
            page,
            "<tr><td class=\"{class}\">{}</td><td>{}{}</td><td>{}</td><td class=\"number\">{}</td></tr>",
            checked_word(check.result),
            escaped(&check.name),
            detail.unwrap_or_default(),
            escaped(&check.database),
            duration(check.millis)
        );
    }
    page.push_str("</table>\n");
}

fn counts(report: &DrillReport, page: &mut String) {
    if report.row_counts.is_empty() {
        return;
    }
    page.push_str(
        "<h2>Rows</h2>\n<table>\n<tr><th>Database</th><th>Table</th><th class=\"number\">Rows</th></tr>\n",
    );
    for count in &report.row_counts {
        let rows = count.rows.map_or_else(|| "not counted".to_owned(), |rows| rows.to_string());
        let _ = writeln!(
            page,
            "<tr><td>{}</td><td>{}</td><td class=\"number\">{rows}</td></tr>",
            escaped(&count.database),
            escaped(&count.table)
        );
    }
    page.push_str("</table>\n");
}

#[cfg(test)]
mod tests {
    use super::super::tests::report;
    use super::*;

    #[test]
    fn nothing_of_a_name_becomes_part_of_the_page() {
        let page = html(&report());
        insta::assert_snapshot!(page);
        for hostile in ["<script", "<drill>", "<Name>", "\u{1b}"] {
            assert!(!page.contains(hostile), "{hostile}");
        }
        for outside in ["http:", "https:", "src=", "href=", "url(", "@import", "onload"] {
            assert!(!page.contains(outside), "{outside}");
        }
    }

    #[test]
    fn the_page_is_well_formed() {
        let page = html(&report());
        let body = page.split_once("<body>").unwrap().1;
        for tag in ["dl", "table", "tr", "td", "span", "svg", "div", "pre", "ul", "li", "p", "h2", "title"] {
            let opened =
                page.matches(&format!("<{tag}>")).count() + page.matches(&format!("<{tag} ")).count();
            assert_eq!(opened, page.matches(&format!("</{tag}>")).count(), "{tag}");
        }
        // Every bar lies within the drawing.
        for bar in body.split("<rect ").skip(1) {
            let number = |name: &str| -> u64 {
                let text = bar.split(&format!(" {name}=\"")).nth(1).unwrap();
                text.split('"').next().unwrap().parse().unwrap()
            };
            assert!(number("x") + number("width") <= WIDTH + WIDTH / 250, "{bar}");
        }
    }

    #[test]
    fn a_drill_that_ended_at_once_is_a_page_too() {
        let mut empty = report();
        (empty.steps, empty.proofs) = (Vec::new(), Vec::new());
        (empty.checks, empty.row_counts, empty.notes) = (Vec::new(), Vec::new(), Vec::new());
        assert!(html(&empty).ends_with("</html>\n"));
        empty.steps = vec![super::super::Step { name: "plan", from_millis: 0, millis: 0, bytes: None }];
        assert!(html(&empty).contains("<rect"));
    }
}
