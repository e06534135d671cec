//! The same questions asked by the real `pitr` of a real S3 server that holds the world object by object.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pitr::execute::info::read_info;
use pitr::execute::{Planned, Proof, make_plan};
use pitr::plan::PlanOptions;
use serde_json::{Value, json};
use walship::repository::{ClusterRepository, load_catalog};
use walship::storage::{self, Storage};
use walship_tests::bins;
use walship_tests::proxy::Proxy;
use walship_tests::requests::Requests;
use walship_tests::stage::Stage;
use walship_tests::weed::WeedServer;

use super::copy::copy;
use super::store::GeneratedStore;
use super::world::{Shape, World};
use super::{QUESTIONS, target_of};
use crate::measure::{self, Measurement};

/// How often each question is asked to measure it.
const ROUNDS: usize = 5;

/// A world in a real S3 server, and as it is generated.
struct Stored {
    generated: GeneratedStore,
    /// Counts what `pitr` asks; the configuration of `counted` leads through it.
    proxy: Proxy,
    counted: Stage,
    /// Leads straight to the server.
    straight: Stage,
    server: WeedServer,
    objects: usize,
    filled: Duration,
}

impl Stored {
    /// Stores a world in a server of its own, and in `others`.
    async fn new(shape: Shape, others: &[Arc<dyn Storage>]) -> Self {
        let generated = GeneratedStore::new(Arc::new(World::new(shape))).await;
        let server = WeedServer::start();
        let mut targets = vec![storage::open(&server.config("walship")).expect("the configuration is right")];
        targets.extend_from_slice(others);
        let started = Instant::now();
        let objects = copy(&generated, &targets).await.expect("the server takes everything");
        let filled = started.elapsed();
        let proxy = Proxy::start(server.address());
        let counted = Stage::s3("main", &proxy.endpoint());
        let straight = Stage::s3("main", &server.endpoint());
        Self { generated, proxy, counted, straight, server, objects, filled }
    }

    fn shape(&self) -> Shape {
        self.generated.shape()
    }

    /// Lets `pitr` answer, and returns the answer and what it asked the server.
    fn ask(&self, question: &str) -> (Value, Requests) {
        let before = self.proxy.requests();
        let output = self.counted.run(&mut shell(&self.counted, self.shape(), question));
        let answer = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
            panic!("{question}: {error}: {}", String::from_utf8_lossy(&output.stderr))
        });
        (comparable(answer), self.proxy.requests().since(before))
    }

    /// Returns what the library says of the generated world.
    async fn expected(&self, question: &str) -> Value {
        let storage: Arc<dyn Storage> = Arc::new(self.generated.clone());
        comparable(answer(storage, self.shape(), question).await.expect("the generated store answers"))
    }

    fn measure(&self, question: &str) -> Vec<Measurement> {
        let command = words(self.shape(), question);
        let config = self.straight.config();
        let config = config.to_str().expect("a temporary folder has a plain name");
        let once =
            || measure::process(&["sh", "-c", &command], &[("WALSHIP_CONFIG", config)], Path::new("/"));
        let mut samples: Vec<_> = (0..ROUNDS).map(|_| once()).collect();
        samples.sort_by_key(|sample| sample.cpu);
        samples
    }
}

/// Returns what a shell runs to have a question answered; a refusal is an answer.
fn words(shape: Shape, question: &str) -> String {
    let pitr = bins::pitr();
    let pitr = pitr.to_str().expect("programs have plain names");
    if question == "info" {
        return format!("exec '{pitr}' info --json");
    }
    let (target, _) = target_of(shape, question);
    format!("'{pitr}' plan --json {}; status=$?; [ $status = 3 ] || exit $status", target.options())
}

fn shell(stage: &Stage, shape: Shape, question: &str) -> Command {
    let mut command = stage.command(Path::new("sh"));
    command.args(["-c", &words(shape, question)]);
    command
}

/// Answers a question as `pitr --json` does.
async fn answer(storage: Arc<dyn Storage>, shape: Shape, question: &str) -> walship::Result<Value> {
    let cluster = ClusterRepository::open(storage, &"main".parse()?).await?;
    let repository = cluster.newest_lineage().await?;
    let catalog = load_catalog(&repository).await?;
    if question == "info" {
        let lineages = vec![repository.lineage().clone()];
        let info = read_info(&repository, catalog, Vec::new(), lineages, None, shape.commit_time(1)).await?;
        return Ok(json!(info));
    }
    let (target, _) = target_of(shape, question);
    let planned = make_plan(&repository, &catalog, &target, &PlanOptions::default(), Proof::Bounded).await?;
    Ok(match planned {
        Planned::Plan(plan) => json!({ "outcome": "plan", "target": plan.target.to_string(), "plan": plan }),
        Planned::Refused(refusal) => json!({ "outcome": "refused", "refusal": refusal }),
    })
}

/// Returns an answer without what tells when and where it was asked.
fn comparable(mut answer: Value) -> Value {
    if let Some(fields) = answer.as_object_mut() {
        fields.retain(|name, _| !["repository", "asked"].contains(&&**name));
    }
    // The command says so, not the planner.
    let is_of_command =
        |reason: &Value| reason.as_str().is_some_and(|text| text.starts_with("what is archived counts"));
    if let Some(reasons) = answer.pointer_mut("/plan/reasons").and_then(Value::as_array_mut) {
        reasons.retain(|reason| !is_of_command(reason));
    }
    for timeline in answer.get_mut("timelines").and_then(Value::as_array_mut).into_iter().flatten() {
        for window in timeline.get_mut("windows").and_then(Value::as_array_mut).into_iter().flatten() {
            window["latest_age_seconds"] = Value::Null;
        }
    }
    answer
}

/// Returns the table: requests on the wire, time and memory of `pitr` on a real S3 server.
///
/// # Panics
/// When an answer is not that of the generated world, or there is no server.
pub fn stored_table() -> String {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let stored = runtime.block_on(Stored::new(Shape::STORED, &[]));
    let mut text = format!(
        "{} objects, put in {:.0} s\n\n| question | requests | LIST | GET | wall ms | CPU ms | peak MiB |\n\
         |---|---|---|---|---|---|---|\n",
        stored.objects,
        stored.filled.as_secs_f64()
    );
    for (question, described) in QUESTIONS {
        let (answer, requests) = stored.ask(question);
        assert_eq!(answer, runtime.block_on(stored.expected(question)), "{question}");
        let samples = stored.measure(question);
        let median = samples[samples.len() / 2];
        let peak = samples.iter().filter_map(|sample| sample.peak_bytes).max().unwrap_or(0);
        let _ = writeln!(
            text,
            "| {described} | {} | {} | {} | {:.0} | {:.0} | {} |",
            requests.all(),
            requests.lists,
            requests.gets,
            median.wall.as_secs_f64() * 1e3,
            median.cpu.as_secs_f64() * 1e3,
            peak >> 20
        );
    }
    drop(stored.server);
    text
}

#[cfg(test)]
mod tests;
