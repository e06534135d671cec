//! Planning in a store of ten million segments: generated behind the storage trait, requests counted as S3 would,
//! CPU time and memory taken from a process that sees nothing but the recorded answers.

mod copy;
mod replay;
mod store;
mod stored;
mod world;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use pitr::execute::info::read_info;
use pitr::execute::{Planned, Proof, make_plan};
use pitr::plan::{PlanOptions, RefusalKind};
use pitr::target::{RecoveryTarget, StopSide, TargetKind, TimelineChoice, Zone};
use walship::pg::{Lsn, TimelineId};
use walship::repository::{ClusterRepository, load_catalog};
use walship::storage::Storage;

use crate::measure;
use store::GeneratedStore;
pub use stored::stored_table;
use world::{Shape, World, xid};

/// The first argument that makes a bench program the process that is measured.
const CHILD: &str = "--scale-child";

/// What is asked of the archive.
const QUESTIONS: [(&str, &str); 15] = [
    ("info", "`pitr info`"),
    ("before", "`pitr plan --to-time`, in the middle"),
    ("repeated", "the same within the hour that the clock ran through twice"),
    ("late", "the same near the end, on the third timeline"),
    ("past-end", "the same past the end: refused"),
    ("before-first", "the same before the first backup: refused"),
    ("xid", "`--to-xid`, in the middle"),
    ("before-xid", "`--before-xid`, in the middle"),
    ("unknown-xid", "`--to-xid` of a transaction that never ended: refused"),
    ("future-xid", "`--to-xid` past the end: refused"),
    ("unknown-name", "`--to-name` that there is not: refused"),
    ("lsn", "`--to-lsn`, in the middle"),
    ("lsn-past-end", "`--to-lsn` past the end: refused"),
    ("latest", "`--latest`"),
    ("immediate", "`--immediate`"),
];

/// The questions that are asked of an index with a flaw as well.
const WITH_A_FLAW: [&str; 5] = ["before", "past-end", "unknown-xid", "unknown-name", "latest"];

/// What is wrong with the index.
#[derive(Debug, Clone, Copy)]
enum Flaw {
    None,
    /// The fullest roll-up of this level around the middle of the archive cannot be read.
    Damaged(u8),
    /// A segment in the middle of the archive came late, and nobody ran `pitr index` since.
    Late,
}

impl Flaw {
    fn described(self) -> &'static str {
        match self {
            Self::None => "",
            Self::Damaged(1) => ", the log's roll-up damaged",
            Self::Damaged(_) => ", the top roll-up damaged",
            Self::Late => ", a segment out of order",
        }
    }

    fn shape(self, shape: Shape) -> Shape {
        let late = matches!(self, Self::Late).then(|| middle(shape) + 3);
        Shape { late, ..shape }
    }
}

/// Returns a segment that is asked for, some way into the archive.
fn middle(shape: Shape) -> u64 {
    shape.segments / 4 + 17
}

/// Returns the table: requests, CPU time and memory of cold plans and of what `pitr info` collects.
///
/// # Panics
/// When an answer is not right.
pub fn table() -> String {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let mut text =
        String::from("| question | requests | LIST | GET | CPU ms | peak MiB |\n|---|---|---|---|---|---|\n");
    for flaws in [&[Flaw::None, Flaw::Damaged(3), Flaw::Damaged(1)][..], &[Flaw::Late]] {
        let shape = flaws[0].shape(Shape::LARGE);
        let store = runtime.block_on(GeneratedStore::new(Arc::new(World::new(shape))));
        for flaw in flaws {
            for (question, described) in asked(*flaw) {
                let folder = tempfile::tempdir().expect("a folder for the answers");
                let (lists, gets) = runtime.block_on(count(&store, shape, question, *flaw, folder.path()));
                let samples = samples(folder.path(), question, 5);
                let peak = samples.iter().filter_map(|sample| sample.peak_bytes).max().unwrap_or(0);
                text.push_str(&format!(
                    "| {described}{} | {} | {lists} | {gets} | {:.0} | {} |\n",
                    flaw.described(),
                    lists + gets,
                    samples[samples.len() / 2].cpu.as_secs_f64() * 1e3,
                    peak >> 20
                ));
            }
        }
    }
    text
}

/// Returns what is asked of an index with this flaw.
fn asked(flaw: Flaw) -> impl Iterator<Item = (&'static str, &'static str)> {
    let all = QUESTIONS.into_iter();
    all.filter(move |(question, _)| matches!(flaw, Flaw::None) || WITH_A_FLAW.contains(question))
}

/// Asks one question from cold, keeps the answers and returns how often was listed and read.
async fn count(
    store: &GeneratedStore,
    shape: Shape,
    question: &str,
    flaw: Flaw,
    folder: &Path,
) -> (u64, u64) {
    store.damage(match flaw {
        Flaw::Damaged(level) => Some((level, middle(shape))),
        Flaw::None | Flaw::Late => None,
    });
    // Which parts of the index are looked at is found out by asking until all of them are there.
    loop {
        let recorded = Arc::new(replay::Recorder::new(Arc::new(store.clone()), folder));
        let asked = ask(recorded.clone(), shape, question).await;
        if !store.took_wishes() {
            asked.unwrap_or_else(|error| panic!("{question}, {flaw:?}: {error}"));
            return recorded.counts();
        }
    }
}

/// Lets a process of its own ask the question of the recorded answers, so many times; by CPU time.
fn samples(folder: &Path, question: &str, times: usize) -> Vec<measure::Measurement> {
    let path = folder.to_str().expect("a temporary folder has a plain name");
    let this = std::env::current_exe().expect("a running program knows its own path");
    let this = this.to_str().expect("this program has a plain name");
    let mut samples: Vec<_> =
        (0..times).map(|_| measure::process(&[this, CHILD, path, question], &[], Path::new("/"))).collect();
    samples.sort_by_key(|sample| sample.cpu);
    samples
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
    runtime.block_on(ask(answers, Shape::LARGE, question)).expect("the question was answered before");
    std::process::exit(0);
}

/// What must come of a question.
enum Expected {
    /// A plan whose last transaction is this one.
    Last(u64),
    /// Any plan.
    Plan,
    Refused(RefusalKind),
}

/// Returns what a question asks for, and what must come of it.
fn target_of(shape: Shape, question: &str) -> (RecoveryTarget, Expected) {
    // Between the two commits of a segment.
    let time = |number| {
        let time = shape.commit_time(number) + chrono::TimeDelta::milliseconds(500);
        TargetKind::Time { time, zone: Zone::Utc }
    };
    let middle = middle(shape);
    let number = |xid: u64| u32::try_from(xid).expect("a transaction of the first epoch");
    // The clock says this time again later; recovery stops at the first record past it, unless a backup was begun
    // within that hour.
    let repeated = shape.step_back_at - shape.step_back_by / 2;
    let of_first_pass =
        if shape.has_backup_at_repeated_times() { Expected::Plan } else { Expected::Last(xid(repeated)) };
    let (kind, expected) = match question {
        "before" => (time(middle), Expected::Last(xid(middle))),
        "repeated" => (time(repeated), of_first_pass),
        "late" => (time(shape.segments - 100), Expected::Last(xid(shape.segments - 100))),
        "past-end" => (time(shape.segments * 2), Expected::Refused(RefusalKind::PastEnd)),
        "before-first" => {
            let day = chrono::TimeDelta::days(1);
            let kind = TargetKind::Time { time: shape.commit_time(1) - day, zone: Zone::Utc };
            (kind, Expected::Refused(RefusalKind::BeforeFirst))
        }
        "xid" => (TargetKind::Xid(number(xid(middle))), Expected::Last(xid(middle))),
        "before-xid" => (TargetKind::Xid(number(xid(middle))), Expected::Last(xid(middle - 1) + 1)),
        "unknown-xid" => {
            (TargetKind::Xid(number(xid(middle) + 2)), Expected::Refused(RefusalKind::UnknownXid))
        }
        "future-xid" => (TargetKind::Xid(4_000_000_000), Expected::Refused(RefusalKind::UnknownXid)),
        "unknown-name" => (TargetKind::Name("nowhere".into()), Expected::Refused(RefusalKind::UnknownName)),
        "lsn" => (TargetKind::Lsn(Lsn(middle * shape.size.bytes() + 4096)), Expected::Plan),
        "lsn-past-end" => {
            let lsn = Lsn((shape.segments + 1000) * shape.size.bytes());
            (TargetKind::Lsn(lsn), Expected::Refused(RefusalKind::PastEnd))
        }
        "latest" => (TargetKind::Latest, Expected::Last(xid(shape.segments) + 1)),
        "immediate" => (TargetKind::Immediate, Expected::Plan),
        other => panic!("{other} is no question"),
    };
    let stop = if question == "before-xid" { StopSide::Exclusive } else { StopSide::Inclusive };
    (RecoveryTarget { kind, stop, timeline: TimelineChoice::Latest }, expected)
}

/// Answers one question from cold and checks the answer.
async fn ask(storage: Arc<dyn Storage>, shape: Shape, question: &str) -> walship::Result<()> {
    let cluster = ClusterRepository::open(storage, &"main".parse()?).await?;
    let repository = cluster.newest_lineage().await?;
    let catalog = load_catalog(&repository).await?;
    assert_eq!(catalog.backups.len() as u64, shape.backups());
    if question == "info" {
        let now = shape.commit_time(shape.segments);
        let info = read_info(&repository, catalog, Vec::new(), Vec::new(), None, now).await?;
        assert_eq!(info.timelines.iter().map(|timeline| timeline.segments).sum::<u64>(), shape.segments);
        for timeline in &info.timelines {
            assert!(timeline.gaps.is_empty() && !timeline.windows.is_empty());
            assert!(timeline.windows.iter().all(|window| window.latest_transaction.is_some()));
        }
        return Ok(());
    }
    let (target, expected) = target_of(shape, question);
    let options = PlanOptions::default();
    match (make_plan(&repository, &catalog, &target, &options, Proof::Bounded).await?, expected) {
        (Planned::Plan(plan), Expected::Last(xid)) => {
            let last = plan.last_included.expect("there is a commit before");
            assert_eq!(u64::from(last.xid), xid, "{question}: {:?}", plan.warnings);
        }
        (Planned::Plan(_), Expected::Plan) => {}
        (Planned::Refused(refusal), Expected::Refused(kind)) => {
            assert_eq!(refusal.kind, kind, "{question}: {}", refusal.reason);
        }
        (other, _) => panic!("{question}: {other:?}"),
    }
    Ok(())
}

/// Returns the timelines of an archive.
fn timelines(shape: Shape) -> BTreeSet<TimelineId> {
    shape.timelines.iter().filter_map(|(number, ..)| TimelineId::new(*number)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a question may cost, whatever the number of backups and segments: some thirty requests to learn what
    /// is stored on three timelines, a few roll-ups of each, and up to sixteen for the segments at the end of the last
    /// one that archiving alone has not rolled up.
    const REQUESTS_MAX: u64 = 90;

    #[test]
    fn no_question_costs_a_request_for_each_backup_or_segment() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let shape = Shape::SMALL;
        assert!(shape.backups() > REQUESTS_MAX, "{} backups tell nothing", shape.backups());
        let store = runtime.block_on(GeneratedStore::new(Arc::new(World::new(shape))));
        // What would cost a request for each backup, for each segment, if anything did.
        for question in ["past-end", "unknown-name"] {
            let folder = tempfile::tempdir().unwrap();
            let (lists, gets) = runtime.block_on(count(&store, shape, question, Flaw::None, folder.path()));
            assert!(lists + gets <= REQUESTS_MAX, "{question}: {lists} LIST, {gets} GET");
        }
    }
}
