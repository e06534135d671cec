//! `pitr plan`.

use walship::Result;
use walship::config::Overrides;
use walship::repository::LineageRepository;

use super::args::{PlanArgs, SourceArgs, TargetArgs};
use super::before::{Asked, Unproven};
use super::output::{self, Style, Way};
use super::source::{Source, open_lineages, say_notes};
use super::surviving::only_archived;
use super::{DONE, NO_PLAN, forecast};
use crate::execute::{Planned, Proof, make_plan};
use crate::plan::{PlanOptions, Refusal, RestorePlan};
use crate::target::{RecoveryTarget, shell_word};

pub(super) async fn run(args: &PlanArgs) -> Result<u8> {
    let asked = Asked::of(&args.target)?;
    let source = Source::open(&args.source).await?;
    let target = match asked.target(&source).await? {
        Ok(target) => target,
        Err(refusal) => return refused(&refusal, args.source.json),
    };
    let options = PlanOptions { backup: args.target.backup.clone() };
    match make_plan(&source.repository, &source.catalog, &target, &options, Proof::Bounded).await? {
        Planned::Plan(mut plan) => {
            forecast::add(&source.repository, &mut plan).await;
            plan.warnings.extend(source.repository.notes());
            plan.reasons.extend(args.target.is_latest().then(only_archived));
            if args.source.json {
                output::print_json(&output::plan_json(&plan))?;
            } else {
                let next = restore_command_line(&plan, &args.source.overrides);
                output::print(&output::plan_text(&plan, Way::ToItsEnd, Some(&next), Style::of_stdout()))?;
            }
            Ok(DONE)
        }
        Planned::Refused(refusal) => {
            say_notes(&source.repository);
            refused(&refusal, args.source.json)
        }
    }
}

/// Opens the repository and makes a plan whose whole chain is looked for, to be carried out at once; or says why there is none.
/// The repository goes into `opened` as soon as it is open.
pub(super) async fn open_and_plan(
    source: &SourceArgs,
    target: &TargetArgs,
    opened: &mut Option<LineageRepository>,
) -> Result<Result<(Source, Box<RestorePlan>), Box<Refusal>>> {
    let asked = Asked::of(target)?;
    let source = opened_in(opened, source).await?;
    match asked.target(&source).await? {
        Ok(found) => plan_whole(source, target, &found).await,
        Err(refusal) => Ok(Err(refusal)),
    }
}

/// As [`open_and_plan`]; also where a drop without a name may be the one, which has to be proven where recovery ended.
#[allow(clippy::type_complexity, reason = "what was asked for, or why not, as above")]
pub(super) async fn open_and_plan_to_prove(
    source: &SourceArgs,
    target: &TargetArgs,
    opened: &mut Option<LineageRepository>,
) -> Result<Result<(Source, Box<RestorePlan>, Option<Unproven>), Box<Refusal>>> {
    let asked = Asked::of(target)?;
    let source = opened_in(opened, source).await?;
    let (found, unproven) = match asked.target_to_prove(&source).await? {
        Ok(found) => found,
        Err(refusal) => return Ok(Err(refusal)),
    };
    Ok(plan_whole(source, target, &found).await?.map(|(source, plan)| (source, plan, unproven)))
}

async fn opened_in(opened: &mut Option<LineageRepository>, source: &SourceArgs) -> Result<Source> {
    Source::of(opened.insert(open_lineages(source).await?.0).clone()).await
}

async fn plan_whole(
    source: Source,
    args: &TargetArgs,
    target: &RecoveryTarget,
) -> Result<Result<(Source, Box<RestorePlan>), Box<Refusal>>> {
    let options = PlanOptions { backup: args.backup.clone() };
    let planned = make_plan(&source.repository, &source.catalog, target, &options, Proof::Whole).await?;
    Ok(match planned {
        Planned::Plan(plan) => Ok((source, plan)),
        Planned::Refused(refusal) => Err(refusal),
    })
}

/// Reports a refusal and returns its exit status.
pub(super) fn refused(refusal: &Refusal, json: bool) -> Result<u8> {
    if json {
        output::print_json(&output::refusal_json(refusal))?;
    }
    eprintln!("{}", output::refusal_text(refusal));
    Ok(NO_PLAN)
}

/// Returns the command that carries a plan out, everything that was chosen pinned.
fn restore_command_line(plan: &RestorePlan, overrides: &Overrides) -> String {
    let mut words = vec!["pitr restore".to_owned(), plan.target_options.clone()];
    words.push(format!("--backup {}", shell_word(&plan.backup.id)));
    // A lineage that is registered later must not be meant by it.
    words.push(format!("--lineage {}", plan.lineage));
    if let Some(config) = &overrides.config {
        words.push(format!("--config {}", shell_word(&config.to_string_lossy())));
    }
    for repository in &overrides.repo {
        words.push(format!("--repo {}", shell_word(repository)));
    }
    for repository in &overrides.without_repo {
        words.push(format!("--without-repo {}", shell_word(repository)));
    }
    if let Some(cluster) = &overrides.cluster {
        words.push(format!("--cluster {}", shell_word(cluster)));
    }
    words.push("-D DIR".to_owned());
    words.join(" ")
}
