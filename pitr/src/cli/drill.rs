//! `pitr drill`.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use tokio::sync::watch;
use walship::config::{Config, Objectives, parse_duration};
use walship::repository::{
    DrillReportForm, LineageRepository, RecordedBy, load_catalog, load_tails, new_backup_id,
};
use walship::{Error, Result};

use super::args::DrillArgs;
use super::before::Asked;
use super::hold::held_while;
use super::output;
use super::plan::refused;
use super::scratch::{self, Broken, Told};
use super::source::Source;
use super::{DAMAGED, DONE, FAILED, status_of};
use crate::drill::{Compared, DrillReport, Objective, Outcome, Span, Trouble, html, is_held, moment, text};
use crate::execute::drill::{Clock, Counted, ProofOptions, millis, prove, read_checks};
use crate::execute::info::{WindowInfo, read_info};
use crate::execute::scratch::{Private, Purpose, Scratch, Stage, bring_up, check};
use crate::execute::start::Replay;
use crate::execute::{Planned, Progress, Proof, make_plan};
use crate::log::{OidOrName, parse_table};
use crate::plan::{PlanOptions, Refusal, RestorePlan};
use crate::target::{RecoveryTarget, StopSide, TargetKind, TimelineChoice, Zone, shell_word};
use walship::pg::TimelineId;

/// How many moments are tried: one near a window's ends may turn out to lie outside.
const MOMENTS_MAX: usize = 8;

pub(super) async fn run(args: &DrillArgs) -> Result<u8> {
    let (started, clock) = (Utc::now(), Clock::start());
    let mut told = Told::listen()?;
    scratch::refuse_root("drill")?;
    let proofs = proof_options(args)?;
    scratch::settings(&args.scratch)?;
    let objectives = objectives(args)?;
    let folder = scratch::folder(&args.scratch, &args.source.overrides)?;
    let planning = plan(args, started);
    let planned = tokio::select! {
        planned = planning => planned?,
        signal = told.stop() => return Err(scratch::interrupted(signal).error),
    };
    let mut report = new_report(args, &planned, started, &objectives);
    let source = &planned.source;
    let plan = match planned.plan {
        Ok(plan) => plan,
        Err(refusal) => {
            report.outcome = Outcome::NoPlan;
            report.millis = clock.millis();
            report.trouble = Some(Trouble {
                error: refusal.reason.clone(),
                safe: "nothing was started".to_owned(),
                next: "Look at `pitr info` for what can be reached.".to_owned(),
            });
            store(&source.repository, &report, None).await;
            return refused(&refusal, args.source.json);
        }
    };
    describe(&mut report, &plan);
    clock.note(&mut report, "plan", 0, None);
    if !args.source.json {
        eprintln!(
            "drill: {} from backup {} ({})",
            output::clean(&report.target_words),
            plan.backup.id,
            output::bytes(plan.backup.data_bytes)
        );
    }
    let repository = &source.repository;
    let carried = carry_out(args, repository, &plan, &folder, &proofs, clock, &mut report, &mut told).await;
    report.notes.extend(repository.notes());
    let failure = match carried {
        Ok(()) => {
            report.outcome = report.judged();
            judgement(&report)
        }
        Err(Broken { interrupted, error }) => {
            report.outcome = if interrupted { Outcome::Interrupted } else { Outcome::Failed };
            report.trouble = Some(Trouble {
                error: error.to_string(),
                safe: error.safe().to_owned(),
                next: error.next().to_owned(),
            });
            Some(error)
        }
    };
    report.millis = clock.millis();
    store(repository, &report, Some(&plan)).await;
    if args.source.json {
        output::print_json(&serde_json::json!(report))?;
    } else {
        // What was in the way is said below, where errors are.
        output::print(&text(&DrillReport { trouble: None, ..report.clone() }))?;
    }
    let Some(error) = failure else { return Ok(DONE) };
    eprintln!("{}", output::clean(&error.report()));
    Ok(match report.outcome {
        Outcome::NotProven => DAMAGED,
        Outcome::ObjectiveMissed | Outcome::Interrupted => FAILED,
        _ => status_of(&error),
    })
}

fn proof_options(args: &DrillArgs) -> Result<ProofOptions> {
    let counted = match (&*args.count, args.no_count) {
        (_, true) => Counted::None,
        ([], false) => Counted::All,
        (tables, false) => Counted::Tables(tables.iter().map(|word| table(word)).collect::<Result<_>>()?),
    };
    Ok(ProofOptions {
        checks: args.checks.as_deref().map(read_checks).transpose()?.unwrap_or_default(),
        checks_database: args.dbname.clone(),
        check_patience: Duration::from_secs(args.check_timeout),
        amcheck: !args.no_amcheck,
        counted,
        proof_patience: Duration::from_secs(args.proof_timeout),
        pg_bin: args.scratch.pg_bin.clone(),
    })
}

/// Returns the schema and the name of a table that is to be counted.
fn table(word: &str) -> Result<(String, String)> {
    let filter = parse_table(word)?;
    match (filter.schema, filter.table) {
        (Some(schema), OidOrName::Name(name)) => Ok((schema, name)),
        _ => Err(Error::invalid(format!("--count {word:?} does not say the schema"))
            .with_next("Write SCHEMA.NAME, as in --count public.orders.")),
    }
}

fn objectives(args: &DrillArgs) -> Result<Objectives> {
    let configured = Config::load(&args.source.overrides)?.objectives;
    let given = |text: &Option<String>| text.as_deref().map(parse_duration).transpose();
    Ok(Objectives {
        recovery_time: given(&args.rto)?.or(configured.recovery_time),
        recovery_point: given(&args.rpo)?.or(configured.recovery_point),
    })
}

/// What is to be restored, and what was found out on the way.
struct Drilled {
    source: Source,
    plan: Result<Box<RestorePlan>, Box<Refusal>>,
    by_chance: bool,
    /// The end of the newest transaction that can be reached.
    newest: Option<DateTime<Utc>>,
    asked: String,
}

async fn plan(args: &DrillArgs, now: DateTime<Utc>) -> Result<Drilled> {
    let given = args.target.is_given().then(|| Asked::of(&args.target)).transpose()?;
    let source = Source::open(&args.source).await?;
    let asked_timeline = args.target.timeline()?;
    let (timeline, windows) = windows(&source, asked_timeline, now).await?;
    let newest = windows.iter().filter_map(|window| Some(window.latest_transaction?.time)).max();
    let options = PlanOptions { backup: args.target.backup.clone() };
    let (by_chance, asked) = (given.is_none(), asked_words(args));
    let plan = match &given {
        None => by_chance_plan(&source, timeline, &windows, &options).await?,
        Some(asked) => match asked.target(&source).await? {
            Err(refusal) => Err(refusal),
            Ok(target) => make(&source, &target, &options).await?,
        },
    };
    Ok(Drilled { source, plan, by_chance, newest, asked })
}

/// Returns the target as it was asked for, for a drill that has no plan.
fn asked_words(args: &DrillArgs) -> String {
    match args.target.is_given() {
        true => "a given target".to_owned(),
        false => "a moment by chance".to_owned(),
    }
}

async fn make(
    source: &Source,
    target: &RecoveryTarget,
    options: &PlanOptions,
) -> Result<Result<Box<RestorePlan>, Box<Refusal>>> {
    Ok(match make_plan(&source.repository, &source.catalog, target, options, Proof::Whole).await? {
        Planned::Plan(plan) => Ok(plan),
        Planned::Refused(refusal) => Err(refusal),
    })
}

/// Returns the timeline that is asked for, else the newest that has windows; and its windows.
async fn windows(
    source: &Source,
    asked: TimelineChoice,
    now: DateTime<Utc>,
) -> Result<(TimelineChoice, Vec<WindowInfo>)> {
    let mut catalog = source.catalog.clone();
    let tails = load_tails(&source.repository, &mut catalog).await?;
    let lineages = vec![catalog.lineage.clone()];
    let info = read_info(&source.repository, catalog, tails, lineages, None, now).await?;
    let is_meant = |timeline: TimelineId, has_windows: bool| match asked {
        TimelineChoice::Number(number) => timeline == number,
        TimelineChoice::Latest => has_windows,
    };
    let meant = info.timelines.into_iter().rev().find(|one| is_meant(one.timeline, !one.windows.is_empty()));
    Ok(meant.map_or((asked, Vec::new()), |one| (TimelineChoice::Number(one.timeline), one.windows)))
}

/// Returns a plan for a moment by chance; for all there is, where no moment can be named.
async fn by_chance_plan(
    source: &Source,
    timeline: TimelineChoice,
    windows: &[WindowInfo],
    options: &PlanOptions,
) -> Result<Result<Box<RestorePlan>, Box<Refusal>>> {
    // With a backup that is given: only what lies behind it.
    let given = options.backup.as_ref();
    let backup = given.and_then(|id| source.catalog.backups.iter().find(|backup| &backup.id == id));
    let spans: Vec<Span> = windows
        .iter()
        .filter_map(|window| {
            let from =
                backup.map_or(window.window.from_time, |backup| backup.finished.max(window.window.from_time));
            Some((from, window.latest_transaction?.time))
        })
        .collect();
    for _ in 0..MOMENTS_MAX {
        let Some(time) = moment(&spans, rand::random()) else { break };
        let kind = TargetKind::Time { time, zone: Zone::Utc };
        let target = RecoveryTarget { kind, stop: StopSide::Inclusive, timeline };
        // On some ways replay would write outside the scratch folder: another moment will do.
        if let Ok(plan) = make(source, &target, options).await?
            && plan.tablespace_paths.is_empty()
        {
            return Ok(Ok(plan));
        }
    }
    let all = RecoveryTarget { kind: TargetKind::Latest, stop: StopSide::Inclusive, timeline };
    make(source, &all, options).await
}

fn new_report(
    args: &DrillArgs,
    drilled: &Drilled,
    started: DateTime<Utc>,
    objectives: &Objectives,
) -> DrillReport {
    let RecordedBy { host, user } = RecordedBy::now();
    let age = drilled.newest.map(|newest| u64::try_from((started - newest).num_milliseconds()).unwrap_or(0));
    let seconds = |objective: Option<Duration>| objective.map(|time| time.as_secs());
    DrillReport {
        format: 1,
        id: new_backup_id(started, rand::random()),
        outcome: Outcome::Failed,
        cluster: drilled.source.catalog.cluster.clone(),
        lineage: drilled.source.catalog.lineage.number,
        host,
        user,
        reason: args.scratch.reason.clone(),
        started,
        millis: 0,
        target_by_chance: drilled.by_chance,
        target: drilled.asked.clone(),
        target_words: drilled.asked.clone(),
        backup: None,
        restored_bytes: 0,
        server_version: None,
        last_included: None,
        planned_lsn: None,
        ended_lsn: None,
        steps: Vec::new(),
        proofs: Vec::new(),
        checks: Vec::new(),
        row_counts: Vec::new(),
        objectives: Compared {
            rto: Objective::compare(seconds(objectives.recovery_time), None),
            rpo: Objective::compare(seconds(objectives.recovery_point), age),
        },
        trouble: None,
        kept: None,
        notes: Vec::new(),
    }
}

fn describe(report: &mut DrillReport, plan: &RestorePlan) {
    report.target = format!("{} --backup {}", plan.target_options, shell_word(&plan.backup.id));
    report.target_words = plan.target.to_string();
    report.backup = Some(plan.backup.id.clone());
    report.server_version = Some(plan.backup.server_version);
    report.last_included = plan.last_included.clone();
    report.planned_lsn = Some(plan.stop.final_lsn);
    report.notes.extend(plan.warnings.iter().cloned());
}

/// Restores, recovers, proves, and removes everything; whatever ends it, the last of these is done.
#[allow(clippy::too_many_arguments, reason = "each is one thing of the drill, and they meet only here")]
async fn carry_out(
    args: &DrillArgs,
    repository: &LineageRepository,
    plan: &RestorePlan,
    folder: &std::path::Path,
    proofs: &ProofOptions,
    clock: Clock,
    report: &mut DrillReport,
    told: &mut Told,
) -> Result<(), Broken> {
    let private =
        scratch::private(&args.scratch, &args.source.overrides, repository, plan, Purpose::Drill).await?;
    let work = carry_out_held(args, &private, folder, proofs, clock, report, told);
    held_while(repository, plan, "pitr drill", work).await?
}

async fn carry_out_held(
    args: &DrillArgs,
    private: &Private<'_>,
    folder: &std::path::Path,
    proofs: &ProofOptions,
    clock: Clock,
    report: &mut DrillReport,
    told: &mut Told,
) -> Result<(), Broken> {
    let plan = private.plan;
    let (scratch, left) = Scratch::take(folder, "drill").await?;
    report.notes.extend(left);
    let work = async {
        check(&scratch, private)?;
        let (progress, replay) = (Arc::new(Progress::default()), Arc::new(Replay::default()));
        let (stage, watched) = watch::channel(Stage::Restoring);
        let from = clock.millis();
        let up = tokio::select! {
            up = bring_up(&scratch, private, progress.clone(), replay.clone(), &stage) => up?,
            () = scratch::show(&progress, &replay, plan, watched) => {
                return Err(Error::local_io("the progress display ended before the drill"));
            }
        };
        let (restored, recovered) = (millis(up.restored_in), millis(up.recovered_in));
        report.restored_bytes = up.report.data_bytes;
        let step = |name, from_millis, millis, bytes| crate::drill::Step { name, from_millis, millis, bytes };
        report.steps.push(step("restore", from, restored, Some(up.report.data_bytes)));
        report.steps.push(step("recovery", from + restored, recovered, up.started.replay_bytes));
        report.objectives.rto =
            Objective::compare(report.objectives.rto.objective_seconds, Some(from + restored + recovered));
        report.ended_lsn = up.started.replayed_lsn;
        prove(&scratch, private, &up, proofs, clock, report).await
    };
    let ended = tokio::select! {
        ended = work => ended.map_err(Broken::from),
        signal = told.stop() => Err(scratch::interrupted(signal)),
    };
    let from = clock.millis();
    let (ended, done) = scratch::clean_up(scratch, private, args.scratch.keep, ended).await;
    clock.note(report, "clean_up", from, None);
    report.kept = done.kept;
    report.notes.extend(done.notes);
    ended
}

/// Returns the error of a drill that was carried out and did not prove everything.
fn judgement(report: &DrillReport) -> Option<Error> {
    let problems = report.problems().join("; ");
    match report.outcome {
        Outcome::NotProven => Some(
            Error::corrupt(format!("the drill did not prove what it was to prove: {problems}"))
                .with_safe("the repository is unchanged; the restored copy was a scratch one")
                .with_next(
                    "Find out whether the archive or the original is damaged: run it again with --keep and look at the \
                     copy, and drill an older backup with --backup.",
                ),
        ),
        Outcome::ObjectiveMissed => Some(
            Error::unavailable(format!("an objective was missed: {problems}"))
                .with_safe("everything that was restored is proven")
                .with_next(
                    "See which step took how long (`pitr history --drill ID`); more frequent backups shorten replay, and \
                     `walship receive` makes the newest commit younger.",
                ),
        ),
        _ => None,
    }
}

/// Returns whether the first of several repositories has given everything. Others are asked only for what it cannot give; what
/// they hold is not proven by that.
async fn is_proven_alone(repository: &LineageRepository, plan: &RestorePlan) -> bool {
    let each = repository.each();
    let Some(first) = each.iter().find(|one| one.location() == repository.location()) else { return false };
    if each.len() == 1 {
        return true;
    }
    // What it lacks recovery has fetched elsewhere, in processes of its own.
    let own = async {
        let mut own = load_catalog(first).await?;
        load_tails(first, &mut own).await?;
        Ok::<_, Error>(own)
    };
    let holds_all = own.await.is_ok_and(|own| is_held(plan, &own));
    holds_all && repository.gave_all()
}

/// Puts the report into every repository, and then its record; where that cannot be, a line on standard error says so.
async fn store(repository: &LineageRepository, report: &DrillReport, plan: Option<&RestorePlan>) {
    let json = format!("{:#}\n", serde_json::json!(report));
    let is_proven = match plan {
        Some(plan) => is_proven_alone(repository, plan).await,
        None => false,
    };
    for one in repository.each() {
        let stored = async {
            let forms = [
                (DrillReportForm::Json, json.clone()),
                (DrillReportForm::Text, text(report)),
                (DrillReportForm::Html, html(report)),
            ];
            for (form, content) in forms {
                one.put_drill_report(&report.id, form, Bytes::from(content)).await?;
            }
            one.put_drill_record(&report.record(is_proven && one.location() == repository.location())).await
        };
        if let Err(error) = stored.await {
            eprintln!(
                "note:  the drill is not in the history of {}: {}",
                one.location(),
                output::clean(&error.to_string())
            );
        }
    }
}
