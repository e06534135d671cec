//! The status page of `pitr info --html`: one file that anybody can read, made of what `pitr info` and `pitr history` tell.

mod clock;
mod drawing;
mod file;
mod health;
mod tables;
#[cfg(test)]
mod tests;

use std::fmt::Write as _;
use std::io::IsTerminal as _;
use std::path::Path;

use chrono::{DateTime, TimeDelta, Utc};
use clap::ValueEnum as _;
use walship::Result;
use walship::catalog::{Lineage, VerifyRecord};
use walship::config::{Config, Objectives};
use walship::repository::{LineageRepository, load_catalog, load_tails};
use walship::watch::Limits;

use super::super::args::{Deed, InfoArgs};
use super::super::history::{Entry, entries_of};
use super::super::output::{self, short_time};
use super::super::source::open_lineage;
use crate::execute::info::{Info, read_info};
use crate::page::{self, Tone, pill};
use crate::words::escaped;

/// So many entries of the history of each kind are on the page.
const ENTRIES_MAX: usize = 100;

/// So many older lineages are read for the page; others are only named.
const OLDER_MAX: usize = 4;

/// Where the archive tells of more than four times as long, the last days are drawn once more by themselves.
const LATELY: TimeDelta = TimeDelta::days(7);

/// What a page is made of.
struct Status {
    cluster: String,
    asked: DateTime<Utc>,
    /// What watching measures by, too.
    limits: Limits,
    /// The one that was asked for, or the newest; then older ones.
    lineages: Vec<LineageStatus>,
    /// Lineages of which only the name is on the page, and why.
    not_read: Vec<(Lineage, String)>,
}

/// What is known of a lineage.
struct LineageStatus {
    lineage: Lineage,
    info: Info,
    history: Vec<Entry>,
    /// Its folder in each repository that can be read, with the verifications on record there, the newest first.
    verifications: Vec<(String, Vec<VerifyRecord>)>,
    /// Whether there is more history of a kind than is read.
    more_history: bool,
    /// What is to be known of its repositories, and what could not be read.
    notes: Vec<String>,
}

/// Makes the page and puts it where it was asked for.
pub(super) async fn run(
    args: &InfoArgs,
    target: &Path,
    repository: &LineageRepository,
    info: Info,
) -> Result<()> {
    let status = collect(args, repository, info).await?;
    let page = html(&status);
    if target == Path::new("-") {
        return output::print(&page);
    }
    file::write(target, &page)?;
    // Under a timer it is quiet.
    if std::io::stderr().is_terminal() {
        eprintln!("wrote {} ({})", target.display(), output::bytes(page.len() as u64));
    }
    Ok(())
}

async fn collect(args: &InfoArgs, repository: &LineageRepository, info: Info) -> Result<Status> {
    let limits = Limits::of(&Config::load(&args.source.overrides)?);
    let (cluster, asked, all) = (info.cluster.clone(), info.asked, info.lineages.clone());
    let number = info.lineage;
    let mut lineages = vec![with_history(repository, info).await];
    let mut not_read = Vec::new();
    // The one that was asked for is the page; else it is about the cluster.
    let older = all.iter().rev().filter(|other| other.number != number);
    for other in older {
        if args.source.lineage.is_some() || lineages.len() > OLDER_MAX {
            not_read.push((other.clone(), format!("`pitr info --lineage {} --html` shows it", other.number)));
            continue;
        }
        match read(args, other.number, &all, asked).await {
            Ok(status) => lineages.push(status),
            Err(error) => not_read.push((other.clone(), format!("it cannot be read: {error}"))),
        }
    }
    Ok(Status { cluster, asked, limits, lineages, not_read })
}

/// Reads an older lineage.
async fn read(args: &InfoArgs, number: u32, all: &[Lineage], asked: DateTime<Utc>) -> Result<LineageStatus> {
    let repository = open_lineage(&args.source, number).await?;
    let mut catalog = load_catalog(&repository).await?;
    let tails = load_tails(&repository, &mut catalog).await?;
    let info = read_info(&repository, catalog, tails, all.to_vec(), None, asked).await?;
    Ok(with_history(&repository, info).await)
}

/// A history that cannot be read is no reason not to show the archive.
async fn with_history(repository: &LineageRepository, info: Info) -> LineageStatus {
    let (mut history, mut more_history) = (Vec::new(), false);
    let mut unknown = Vec::new();
    for kind in Deed::value_variants().iter().filter(|kind| **kind != Deed::Backup) {
        match entries_of(repository, *kind, ENTRIES_MAX + 1).await {
            Ok(mut entries) => {
                more_history |= entries.len() > ENTRIES_MAX;
                entries.truncate(ENTRIES_MAX);
                history.extend(entries);
            }
            Err(error) => {
                unknown.push(format!("the history of each {} cannot be read: {error}", kind.word()))
            }
        }
    }
    let mut verifications = Vec::new();
    for one in repository.each() {
        match one.recent_verifications(ENTRIES_MAX).await {
            Ok(records) => verifications.push((one.location(), records)),
            Err(error) => {
                unknown.push(format!("the verifications of {} cannot be read: {error}", one.location()))
            }
        }
    }
    history.sort_by(|one, other| other.started.cmp(&one.started).then_with(|| other.id.cmp(&one.id)));
    let notes = repository.notes().into_iter().chain(unknown).collect();
    LineageStatus { lineage: repository.lineage().clone(), info, history, verifications, more_history, notes }
}

/// Returns the page. Pure.
fn html(status: &Status) -> String {
    let mut page = page::begin(&format!("{}: walship archive", status.cluster));
    let Some((current, older)) = status.lineages.split_first() else {
        page::end(&mut page);
        return page;
    };
    let health = health::judge(current, &status.limits);
    let tone = health.tone();
    let word = match tone {
        Tone::Bad => "something is wrong",
        Tone::Warn => "needs a look",
        Tone::Soft => "no fault found, not all is known",
        Tone::Plain | Tone::Good => "in order",
    };
    let _ = writeln!(
        page,
        "<header>\n<h1>{} {}</h1>\n<p class=\"soft\">{}</p>\n<p class=\"soft\">As of <time datetime=\"{}\">{}</time>. All times are UTC.</p>\n</header>",
        escaped(&status.cluster),
        pill(tone, word),
        escaped(&current.info.repository),
        status.asked.to_rfc3339(),
        short_time(status.asked)
    );
    findings(&mut page, &health, &current.notes);
    figures(&mut page, &health);
    let is_newest = current.info.lineages.iter().all(|other| other.number <= current.lineage.number);
    drawings(&mut page, current, is_newest);
    tables::all(&mut page, current);
    for other in older {
        let _ = writeln!(
            page,
            "<details class=\"lineage\"><summary>{}: {}</summary>",
            escaped(&tables::lineage_name(&other.lineage)),
            health::plural(other.info.backups.len() as u64, "backup")
        );
        notes(&mut page, &other.notes);
        drawings(&mut page, other, false);
        tables::all(&mut page, other);
        page.push_str("</details>\n");
    }
    if !status.not_read.is_empty() {
        page.push_str("<h2>Other lineages</h2>\n<ul class=\"plain\">\n");
        for (lineage, why) in &status.not_read {
            let _ = writeln!(
                page,
                "<li>{}: {}</li>",
                escaped(&tables::lineage_name(lineage)),
                page::with_commands(why)
            );
        }
        page.push_str("</ul>\n");
    }
    not_known(&mut page, status, current);
    let _ = writeln!(
        page,
        "<footer>Made by pitr {}. The page shows one moment and does not renew itself.</footer>",
        env!("CARGO_PKG_VERSION")
    );
    page::end(&mut page);
    page
}

fn findings(page: &mut String, health: &health::Health, said: &[String]) {
    if !health.findings.is_empty() || !said.is_empty() {
        page.push_str("<h2 class=\"unseen\">To look at</h2>\n");
    }
    if !health.findings.is_empty() {
        page.push_str("<ul class=\"findings\">\n");
        for finding in &health.findings {
            let word = match finding.tone {
                Tone::Bad => "Wrong",
                Tone::Warn => "Look at it",
                _ => "Not known",
            };
            let class = finding.tone.class();
            let _ = writeln!(
                page,
                "<li class=\"{class}\"><b class=\"{class}\">{word}:</b> {} <span class=\"next\">{}</span></li>",
                page::with_commands(&page::shortened(&finding.what, 600)),
                page::with_commands(&finding.next)
            );
        }
        page.push_str("</ul>\n");
    }
    notes(page, said);
}

fn notes(page: &mut String, said: &[String]) {
    if said.is_empty() {
        return;
    }
    page.push_str("<ul class=\"findings\">\n");
    for note in said {
        let _ = writeln!(
            page,
            "<li class=\"warn\"><b class=\"warn\">Note:</b> {}</li>",
            page::with_commands(&page::shortened(note, 600))
        );
    }
    page.push_str("</ul>\n");
}

fn figures(page: &mut String, health: &health::Health) {
    page.push_str("<h2 class=\"unseen\">At a glance</h2>\n<dl class=\"figures\">\n");
    for figure in &health.figures {
        let _ = write!(
            page,
            "<div><dt>{}</dt><dd class=\"value {}\">{}</dd>",
            escaped(figure.name),
            figure.tone.class(),
            escaped(&figure.value)
        );
        for detail in &figure.details {
            let _ = write!(page, "<dd>{}</dd>", page::with_commands(&page::shortened(detail, 200)));
        }
        page.push_str("</div>\n");
    }
    page.push_str("</dl>\n");
}

fn drawings(page: &mut String, status: &LineageStatus, is_newest: bool) {
    page.push_str("<h2>Time line</h2>\n");
    let Some((from, to)) = drawing::extent(status, is_newest) else {
        page.push_str("<p class=\"card soft\">There is nothing to draw: no backup, and no moment that the archive tells of.</p>\n");
        return;
    };
    let id = format!("lineage-{}", status.lineage.number);
    drawing::draw(page, status, &id, "Everything that is archived", (from, to));
    if is_newest && to - from > LATELY * 4 {
        let title = format!("The last {} days", LATELY.num_days());
        drawing::draw(page, status, &format!("{id}-lately"), &title, (to - LATELY, to));
    }
}

/// Says what is not on the page, so that silence is not taken for good news.
fn not_known(page: &mut String, status: &Status, current: &LineageStatus) {
    let info = &current.info;
    let mut unknown = Vec::new();
    if info.server.is_none() {
        unknown.push("What the server has written and the archive does not hold: the server was not asked (--server asks it).".to_owned());
    }
    if status.limits.objectives == Objectives::default() {
        unknown.push("Whether recovery is fast enough and loses little enough: no objectives are set (rto, rpo in the configuration).".to_owned());
    }
    let unlooked: u64 = info.timelines.iter().map(|timeline| timeline.segments_not_looked_at).sum();
    if unlooked > 0 {
        unknown.push(format!("Restore points and changes of wal_level in {unlooked} segments: `pitr index` makes it cheap to look there."));
    }
    if current.more_history {
        unknown.push(format!(
            "Older history: the last {ENTRIES_MAX} of each kind are on the page, `pitr history` lists all."
        ));
    }
    unknown.push("What was dropped, truncated or deleted: `pitr log` tells.".to_owned());
    unknown.push(
        "Whether what is stored can be read to its last byte at this moment: `pitr verify` reads it, and `pitr drill` restores a backup and its WAL."
            .to_owned(),
    );
    unknown.push(
        "When exactly WAL in a gap was written: a gap is drawn between the nearest moments that are known."
            .to_owned(),
    );
    page.push_str("<h2>What this page does not know</h2>\n<ul class=\"plain\">\n");
    for line in unknown {
        let _ = writeln!(page, "<li>{}</li>", page::with_commands(&line));
    }
    page.push_str("</ul>\n");
}
