//! `walship wal give-up NAME|PATH`.

use std::io::{BufRead as _, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};

use chrono::Utc;
use serde::Serialize;
use walship::archive::give_up::{Place, Survey, survey};
use walship::archive::push::{EncodedFile, PushReport, encode_file, push_encoded};
use walship::catalog::GapRecord;
use walship::config::Overrides;
use walship::error::{Error, Result};
use walship::pg::{SegmentName, WalFileName};
use walship::repository::CAUSE_BYTES_MAX;

use super::open::Configured;

/// The longest answer that is read.
const ANSWER_BYTES_MAX: u64 = 100;

pub(super) const HELP: &str = "\
A segment that archive-cmd cannot store, because its file is damaged or its name is taken by other content, holds up
the archiver for ever. Giving it up writes a record into every repository; only then does archive-cmd exit 0 for that
segment without storing it, with a warning each time. No restore crosses such a gap, no standby takes it for the end of
the archive. A file that can be stored is stored instead. When the whole segment turns up, push it: the gap is closed.

  walship wal give-up pg_wal/00000001000000A10000004C --reason 'bad block on /dev/sdb' --dry-run
  walship wal give-up pg_wal/00000001000000A10000004C --reason 'bad block on /dev/sdb'

Take a base backup afterwards: WAL behind the gap can be restored only with one.

Exit status:
  0  recorded in every repository; or the file could be stored and nothing was given up
  1  not given up, the message says why; PostgreSQL keeps the segment and asks again
  2  the command line makes no sense";

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The segment: its file in pg_wal, or only its name when there is no such file
    #[arg(value_name = "NAME|PATH")]
    segment: PathBuf,
    /// Why it is given up: one line that everybody will read who restores
    #[arg(long, value_name = "TEXT")]
    reason: String,
    /// The lineage, by number, instead of that of the file's data directory, else the newest
    #[arg(long, value_name = "NUMBER")]
    lineage: Option<u32>,
    /// Do not ask
    #[arg(long)]
    yes: bool,
    /// Say what would be done, and write nothing
    #[arg(long)]
    dry_run: bool,
    /// Print what was done as JSON
    #[arg(long)]
    json: bool,
}

/// What was done.
#[derive(Debug, Serialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
enum Report {
    /// Recorded in every repository.
    GivenUp { segment: SegmentName, record: GapRecord, repositories: Vec<Place> },
    /// Nothing was written.
    WouldGiveUp { segment: SegmentName, record: GapRecord, repositories: Vec<Place> },
    /// It could be stored.
    Stored { segment: SegmentName, push: PushReport },
}

pub(super) async fn run(args: &Args, overrides: &Overrides) -> Result<u8> {
    let segment = named(&args.segment)?;
    check_reason(&args.reason)?;
    let config = super::config(overrides)?;
    let options = super::wal::push_options(&config, args.lineage)?;
    let clusters = Configured::new(&config)?.open_all().await.map_err(unreachable)?;

    let path = is_path(&args.segment).then_some(&*args.segment);
    let local = match path {
        Some(path) => {
            let (path, options) = (path.to_owned(), options.clone());
            let encode = tokio::task::spawn_blocking(move || encode_file(&path, &options));
            Some(encode.await.map_err(|error| Error::local_io(format!("reading was broken off: {error}")))?)
        }
        None => None,
    };
    let mut why_not = None;
    match &local {
        Some(Ok(local)) if !args.dry_run => match push_encoded(&clusters, local, &options).await {
            Ok(push) if push.whole => return said(args, &Report::Stored { segment, push }),
            Ok(push) => why_not = push.warnings.into_iter().next(),
            Err(error @ (Error::Conflict(_) | Error::Mismatch(_) | Error::Corrupt(_))) => {
                why_not = Some(error.to_string());
            }
            Err(error) => return Err(unreachable(error)),
        },
        Some(Err(error)) => why_not = Some(error.to_string()),
        _ => {}
    }
    let readable = local.as_ref().and_then(|local| local.as_ref().ok());
    let found = survey(&clusters, segment, path, readable, args.lineage).await.map_err(unreachable)?;
    check_missing(&found, readable)?;
    let record = found.record(args.reason.trim(), Utc::now());
    let repositories = found.places.clone();
    if args.dry_run {
        return said(args, &Report::WouldGiveUp { segment, record, repositories });
    }
    if !args.yes {
        confirm(segment, &record, &found, why_not.as_deref())?;
    }
    found.write(&record).await?;
    let what = format!("{segment}: timeline {}, {} to {}", record.timeline, record.start_lsn, record.end_lsn);
    super::record::change(found.lineages(), "wal_given_up", what, Some(args.reason.trim())).await;
    said(args, &Report::GivenUp { segment, record, repositories })
}

fn named(word: &Path) -> Result<SegmentName> {
    let name = word.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    match name.parse() {
        Ok(WalFileName::Segment(segment)) => Ok(segment),
        _ => Err(Error::invalid(format!("{name:?} is not the name of a segment"))
            .with_safe("nothing was given up")
            .with_next(
                "Only whole segments, of 24 hexadecimal digits, can be given up: without a history file the \
                 way to its timeline is lost, and other files hold up nobody.",
            )),
    }
}

/// A word without a folder is a path when such a file is there.
fn is_path(word: &Path) -> bool {
    word.components().count() > 1 || word.symlink_metadata().is_ok()
}

fn check_reason(reason: &str) -> Result<()> {
    let reason = reason.trim();
    if reason.is_empty() || reason.len() > CAUSE_BYTES_MAX || reason.chars().any(char::is_control) {
        return Err(Error::invalid(format!(
            "the reason has to be one line of at most {CAUSE_BYTES_MAX} bytes, and not empty"
        ))
        .with_safe("nothing was given up"));
    }
    Ok(())
}

fn unreachable(error: Error) -> Error {
    let next = error.next().to_owned();
    error
        .context("nothing can be given up now")
        .with_safe(
            "nothing was given up: that takes a record in every repository first; PostgreSQL keeps the segment \
             and asks again",
        )
        .with_next(next)
}

/// A segment that is stored whole everywhere, and of which nothing else is known, is not missing.
fn check_missing(found: &Survey, local: Option<&EncodedFile>) -> Result<()> {
    let stored = found.places.iter().all(|place| place.stored_digest.is_some());
    let known_other = found.places.iter().any(|place| place.other_content);
    if stored && !known_other && local.is_some_and(EncodedFile::is_whole) {
        return Err(Error::invalid("the segment is stored in every repository, with this very content")
            .with_safe("nothing was given up")
            .with_next("Nothing: archive-cmd will succeed with it."));
    }
    Ok(())
}

fn confirm(segment: SegmentName, record: &GapRecord, found: &Survey, why_not: Option<&str>) -> Result<()> {
    let not_given_up = |what: &str| {
        Err(Error::invalid(what)
            .with_safe("nothing was given up")
            .with_next("Run it on a terminal and type the segment's name, or add --yes."))
    };
    if !std::io::stdin().is_terminal() {
        return not_given_up("giving WAL up has to be confirmed");
    }
    let mut question = String::new();
    if let Some(why_not) = why_not {
        question += &format!("It cannot be stored: {why_not}\n");
    }
    question += &text(segment, record, &found.places);
    question += &format!("Type {segment} to give it up: ");
    let mut stderr = std::io::stderr();
    let _ = write!(stderr, "{question}").and_then(|()| stderr.flush());
    let mut answer = Vec::new();
    let mut input = std::io::Read::take(std::io::stdin().lock(), ANSWER_BYTES_MAX);
    input.read_until(b'\n', &mut answer).map_err(|error| Error::from_io("reading the answer", error))?;
    if String::from_utf8_lossy(&answer).trim() == segment.to_string() {
        return Ok(());
    }
    not_given_up("the answer was not the segment's name")
}

fn text(segment: SegmentName, record: &GapRecord, places: &[Place]) -> String {
    let mut text = format!(
        "{segment}: WAL of timeline {} from {} to {}\n",
        record.timeline, record.start_lsn, record.end_lsn
    );
    for place in places {
        let stored = match (&place.stored_digest, place.other_content) {
            (Some(digest), true) => format!("other content is stored under its name (digest {digest})"),
            (Some(digest), false) => {
                format!("a whole segment is stored there (digest {digest}): no gap there")
            }
            (None, _) => "not stored".to_owned(),
        };
        let recorded = if place.recorded.is_some() { "; recorded before" } else { "" };
        text += &format!("  {}: {stored}{recorded}\n", place.location);
    }
    text + "Commits in it are lost to every restore, and so is the way across it to later ones.\n"
}

fn said(args: &Args, report: &Report) -> Result<u8> {
    super::print_report(report, args.json, || match report {
        Report::Stored { segment, .. } => {
            format!("{segment} is stored in every repository; nothing was given up")
        }
        Report::WouldGiveUp { segment, record, repositories } => {
            text(*segment, record, repositories)
                + "Nothing was written. A file that can be read would be pushed first, and given up only if that fails."
        }
        Report::GivenUp { segment, record, repositories } => {
            text(*segment, record, repositories)
                + "It is given up, and archive-cmd lets it go from now on. Take a base backup now: `walship backup`."
        }
    })?;
    Ok(0)
}
