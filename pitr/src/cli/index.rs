//! `pitr index`.

use std::fmt::Write as _;

use walship::repository::index::complete::{Options, Report, Task, complete};
use walship::{Error, Result};

use super::args::IndexArgs;
use super::output;
use super::source::open_lineages;
use super::{DAMAGED, DONE};

pub(super) async fn run(args: &IndexArgs) -> Result<u8> {
    let task = match (args.verify, args.rebuild) {
        (true, _) => Task::Verify,
        (_, true) => Task::Rebuild,
        _ => Task::Complete,
    };
    let options = Options { task, dry_run: args.dry_run };
    let (repository, _) = open_lineages(&args.source).await?;
    let report = complete(&repository, options).await?;
    if args.source.json {
        let value = serde_json::to_value(&report)
            .map_err(|error| Error::invalid(format!("what was done cannot be shown as JSON: {error}")))?;
        output::print_json(&value)?;
    } else {
        output::print(&text(&report, options, &repository.location()))?;
    }
    let replaced = task == Task::Rebuild && !args.dry_run;
    let damaged = !report.unreadable.is_empty() || (!report.wrong.is_empty() && !replaced);
    Ok(if damaged { DAMAGED } else { DONE })
}

fn text(report: &Report, options: Options, location: &str) -> String {
    let mut text = format!(
        "{}: {} segments; {} roll-ups present",
        output::clean(location),
        report.segments,
        report.present
    );
    let missing = report.missing.len();
    let _ = match (missing, options) {
        (0, _) => writeln!(text, ", none missing"),
        (_, Options { task: Task::Verify, .. }) => {
            writeln!(
                text,
                ", {missing} missing or behind: plans are right without them, only slower; \
                            `pitr index` makes them"
            )
        }
        (_, Options { dry_run: true, .. }) => writeln!(text, ", {missing} would be written:"),
        _ => writeln!(text, ", {} written", report.written),
    };
    if options.dry_run {
        for location in &report.missing {
            let _ = writeln!(text, "  {}", output::clean(location));
        }
    }
    for wrong in &report.wrong {
        let _ = writeln!(text, "wrong: {}: {}", output::clean(&wrong.location), output::clean(&wrong.what));
    }
    if !report.wrong.is_empty() {
        let _ = match (options.task, options.dry_run) {
            (Task::Rebuild, false) => writeln!(text, "They were removed; right ones are stored."),
            _ => writeln!(text, "`pitr index --rebuild` replaces them."),
        };
    }
    for segment in &report.unreadable {
        let _ = writeln!(
            text,
            "damaged: segment {}: {}",
            output::clean(&segment.location),
            output::clean(&segment.what)
        );
    }
    text
}
