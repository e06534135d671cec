//! `pitr restore --surviving-wal`: what is left of the lost server's WAL comes first.

use walship::archive::own_folder;
use walship::archive::push::PushOptions;
use walship::config::Config;
use walship::{Error, Result};

use super::args::RestoreArgs;
use super::source::Source;
use crate::execute::surviving::{push, survey};
use crate::plan::RestorePlan;
use crate::target::shell_word;

/// What is to be done now that the surviving WAL was looked at.
pub(super) enum Then {
    /// Go on with the plan.
    GoOn {
        /// What is to be said of it.
        note: Option<String>,
    },
    /// The repository has more now: plan again.
    PlanAgain {
        /// What was pushed.
        note: String,
    },
}

/// Refuses words that do not go together.
///
/// # Errors
/// [`Error::Invalid`] for a target that no later WAL can change.
pub(super) fn check_words(args: &RestoreArgs) -> Result<()> {
    if args.surviving_wal.is_none() || args.target.is_latest() {
        return Ok(());
    }
    Err(Error::invalid(
        "--surviving-wal goes with --latest only: it is about the WAL behind the archive's end",
    )
    .with_safe("nothing was written")
    .with_next("Give --latest; or push it first with `walship wal push`, and restore to any target in it."))
}

/// Looks at the surviving WAL, and pushes what is not archived when that is asked for.
///
/// # Errors
/// [`Error::Missing`], which names what was found, when it is to be decided what becomes of it; as [`survey`] and
/// [`push`].
pub(super) async fn look(args: &RestoreArgs, source: &Source, plan: &RestorePlan) -> Result<Then> {
    let Some(folder) = &args.surviving_wal else { return Ok(Then::GoOn { note: None }) };
    let found = survey(folder, &source.repository, plan).await?;
    if found.is_empty() {
        let note =
            format!("{} holds no WAL of timeline {} that is not stored", folder.display(), plan.timeline);
        return Ok(Then::GoOn { note: Some(note) });
    }
    let what = found.describe();
    if args.dry_run {
        let would = if args.push_surviving { "would be pushed" } else { "--push-surviving pushes it" };
        return Ok(Then::GoOn { note: Some(format!("not archived: {what}: {would}")) });
    }
    if !args.push_surviving {
        return Err(Error::missing(format!("the archive lacks WAL that is still there: {what}"))
            .with_safe("nothing was written and nothing pushed; the archive ends without it")
            .with_next(format!(
                "Push it and restore up to its end: the same command with --push-surviving (--surviving-wal {}). Or \
                 restore without it: leave --surviving-wal out.",
                shell_word(&folder.to_string_lossy())
            )));
    }
    let config = Config::load(&args.source.overrides)?;
    let spool_dir = match &config.state_dir {
        Some(folder) => own_folder(Some(folder))?,
        None => std::env::temp_dir(),
    };
    let lineage = Some(source.repository.lineage().number);
    let options = PushOptions { compression: config.compression, lineage, spool_dir };
    push(&found, &source.repository, plan, &options).await?;
    Ok(Then::PlanAgain { note: format!("pushed into every repository: {what}") })
}
