//! Planning in a store of ten million segments: generated behind the storage trait, requests counted as S3 would,
//! CPU time and memory taken from a process that sees nothing but the recorded answers.

mod replay;
mod store;
mod world;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use pitr::execute::info::read_info;
use pitr::execute::{Planned, Proof, make_plan};
use pitr::plan::PlanOptions;
use pitr::target::{RecoveryTarget, TargetKind, TimelineChoice, Zone};
use walship::pg::TimelineId;
use walship::repository::{ClusterRepository, load_catalog};
use walship::storage::Storage;

use crate::measure;
use store::GeneratedStore;
use world::{STEP_BACK_AT, World};

/// The first argument that makes a bench program the process that is measured.
const CHILD: &str = "--scale-child";

/// What is asked of the archive.
const QUESTIONS: [&str; 4] = ["info", "before", "repeated", "late"];

/// Returns the table: requests, CPU time and memory of cold plans and of what `pitr info` collects.
///
/// # Panics
/// When an answer is not right.
pub fn table() -> String {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let world = Arc::new(World::new());
    let store = runtime.block_on(GeneratedStore::new(world));
    let mut text =
        String::from("| question | requests | LIST | GET | CPU ms | peak MiB |\n|---|---|---|---|---|---|\n");
    for question in QUESTIONS {
        let folder = tempfile::tempdir().expect("a folder for the answers");
        // Which parts of the index are looked at is found out by asking until all of them are there.
        let counted = loop {
            let recorded = Arc::new(replay::Recorder::new(Arc::new(store.clone()), folder.path()));
            let asked = runtime.block_on(ask(recorded.clone(), question));
            if !store.took_wishes() {
                asked.unwrap_or_else(|error| panic!("{question}: {error}"));
                break recorded.counts();
            }
        };
        let path = folder.path().to_str().expect("a temporary folder has a plain name");
        let this = std::env::current_exe().expect("a running program knows its own path");
        let this = this.to_str().expect("this program has a plain name");
        let mut samples: Vec<_> =
            (0..5).map(|_| measure::process(&[this, CHILD, path, question], &[], Path::new("/"))).collect();
        samples.sort_by_key(|sample| sample.cpu);
        let peak = samples.iter().filter_map(|sample| sample.peak_bytes).max().unwrap_or(0);
        let (lists, gets) = counted;
        text.push_str(&format!(
            "| {} | {} | {lists} | {gets} | {:.0} | {} |\n",
            described(question),
            lists + gets,
            samples[samples.len() / 2].cpu.as_secs_f64() * 1e3,
            peak >> 20
        ));
    }
    text
}

/// Does the work of the measured process and ends, when the arguments say that this is one.
pub fn be_the_measured_process_if_asked() {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, first, folder, question] = &arguments[..] else { return };
    if first != CHILD {
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    let answers = Arc::new(replay::Replay::new(Path::new(folder)));
    runtime.block_on(ask(answers, question)).expect("the question was answered before");
    std::process::exit(0);
}

fn described(question: &str) -> &'static str {
    match question {
        "info" => "`pitr info`",
        "before" => "`pitr plan --to-time`, in the middle",
        "repeated" => "the same within the hour that the clock ran through twice",
        _ => "the same near the end, on the third timeline",
    }
}

/// Answers one question from cold and checks the answer.
async fn ask(storage: Arc<dyn Storage>, question: &str) -> walship::Result<()> {
    let cluster = ClusterRepository::open(storage, &"main".parse()?).await?;
    let repository = cluster.newest_lineage().await?;
    let catalog = load_catalog(&repository).await?;
    assert_eq!(catalog.backups.len(), world::BACKUPS);
    if question == "info" {
        let now = world::commit_time(world::SEGMENTS);
        let info = read_info(&repository, catalog, Vec::new(), None, now).await?;
        assert_eq!(info.timelines.iter().map(|timeline| timeline.segments).sum::<u64>(), world::SEGMENTS);
        for timeline in &info.timelines {
            assert!(timeline.gaps.is_empty() && !timeline.windows.is_empty());
            assert!(timeline.windows.iter().all(|window| window.latest_transaction.is_some()));
        }
        return Ok(());
    }
    // Between the two commits of a segment.
    let (number, expected) = match question {
        "before" => (STEP_BACK_AT / 2 + 17, STEP_BACK_AT / 2 + 17),
        // The clock says this time again later; recovery stops at the first record past it.
        "repeated" => (STEP_BACK_AT - 450, STEP_BACK_AT - 450),
        _ => (world::SEGMENTS - 100, world::SEGMENTS - 100),
    };
    let time = world::commit_time(number) + chrono::TimeDelta::milliseconds(500);
    let target = RecoveryTarget {
        timeline: TimelineChoice::Latest,
        ..RecoveryTarget::new(TargetKind::Time { time, zone: Zone::Utc })
    };
    match make_plan(&repository, &catalog, &target, &PlanOptions::default(), Proof::Bounded).await? {
        Planned::Plan(plan) => {
            let last = plan.last_included.expect("there is a commit before");
            assert_eq!(u64::from(last.xid), world::xid(expected), "{question}: {:?}", plan.warnings);
        }
        Planned::Refused(refusal) => panic!("{question}: {}", refusal.reason),
    }
    Ok(())
}

/// Returns the timelines of the world.
fn timelines() -> BTreeSet<TimelineId> {
    world::TIMELINES.iter().filter_map(|(number, ..)| TimelineId::new(*number)).collect()
}
