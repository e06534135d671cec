//! A server at work, whose WAL is archived meanwhile.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use walship_tests::postgres::{PgServer, primary_major};
use walship_tests::{process, wait};

use super::tools::{Place, Store, Tool};
use super::waiting::{archive_with, archiver};
use super::world::waiting_in;
use crate::measure::median;
use crate::streaming::tps;
use crate::tables::Effort;

const TOOLS: [Tool; 3] = [Tool::WalshipAgent, Tool::PgBackRest, Tool::WalRus];

/// Two-sided, 95 %, nine degrees of freedom: for ten pairs.
const STUDENT_T: f64 = 2.262;
const PAIRS: usize = 10;

/// How long pgbench works in each run.
const SECONDS: u64 = 12;

/// What became of one run.
#[derive(Debug, Clone, Copy)]
struct Load {
    tps: f64,
    /// The most segments that waited at once.
    waiting: usize,
    /// How long the last of them waited after the load had ended.
    rest: Duration,
}

/// Transactions a second, and segments that wait, while each tool archives into a folder.
pub fn load(effort: Effort) -> String {
    let pairs = if effort.long_rounds > 1 { PAIRS } else { 2 };
    let server = PgServer::builder(primary_major())
        .setting("fsync", "on")
        .setting("synchronous_commit", "off")
        .setting("archive_mode", "on")
        .setting("archive_command", "")
        .setting("autovacuum", "off")
        .setting("shared_buffers", "1GB")
        .setting("checkpoint_timeout", "1h")
        .setting("max_wal_size", "16GB")
        .start();
    server.pgbench(&["-i", "-q", "-s", "20"]);
    let mut runs: Vec<(Tool, Result<Vec<Load>, String>)> =
        TOOLS.into_iter().map(|tool| (tool, tool.look(Store::Folder).map(|_| Vec::new()))).collect();
    // What was not archived yet is for nobody.
    let mut place = Place::new(Tool::Copy, Store::Folder, &server);
    run(&server, &mut place);
    for round in 0..pairs {
        for turn in 0..TOOLS.len() {
            let (tool, loads) = &mut runs[(round + turn) % TOOLS.len()];
            let Ok(loads) = loads else { continue };
            let mut place = Place::new(*tool, Store::Folder, &server);
            let load = run(&server, &mut place);
            eprintln!("{}: {load:?}", tool.title());
            loads.push(load);
        }
    }
    let mut text = format!("\n{pairs} runs of {SECONDS} s each in turn, 8 clients\n\n");
    text.push_str(
        "| | transactions a second | walship's beside, mean (95 % interval) | segments waiting at most | s until none waits |\n\
         |---|---|---|---|---|\n",
    );
    let own: Vec<f64> = runs[0].1.iter().flatten().map(|load| load.tps).collect();
    for (tool, loads) in &runs {
        let _ = match loads {
            Ok(loads) => writeln!(
                text,
                "| {} | {:.0} | {} | {} | {:.1} |",
                tool.title(),
                median(loads.iter().map(|load| load.tps).collect()),
                interval(own.iter().zip(loads).map(|(own, load)| own / load.tps).collect()),
                loads.iter().map(|load| load.waiting).max().unwrap_or(0),
                loads.iter().map(|load| load.rest.as_secs_f64()).fold(0.0, f64::max),
            ),
            Err(why) => writeln!(text, "| {} | {why} | | | |", tool.title()),
        };
    }
    text
}

fn run(server: &PgServer, place: &mut Place) -> Load {
    server.psql("CHECKPOINT");
    let archiver = archiver(server);
    place.serve(server.data_dir());
    archive_with(server, &place.archive_command());
    let mut waiting = 0;
    let said = std::thread::scope(|scope| {
        let seconds = SECONDS.to_string();
        let pgbench = scope.spawn(move || server.pgbench(&["-n", "-c", "8", "-j", "2", "-T", &seconds]));
        while !pgbench.is_finished() {
            waiting = waiting_in(server.data_dir()).max(waiting);
            std::thread::sleep(Duration::from_millis(50));
        }
        pgbench.join().expect("pgbench ends well")
    });
    let ended = Instant::now();
    server.switch_wal();
    wait::until_within("nothing waits", Duration::from_secs(300), || waiting_in(server.data_dir()) == 0);
    let rest = ended.elapsed();
    archive_with(server, "");
    wait::until("the last call has ended", || process::descendants(archiver).is_empty());
    Load { tps: tps(&said), waiting, rest }
}

/// Returns the mean of ratios and the interval in which it lies with 95 %.
fn interval(ratios: Vec<f64>) -> String {
    let count = ratios.len() as f64;
    let mean = ratios.iter().sum::<f64>() / count;
    let variance = ratios.iter().map(|ratio| (ratio - mean).powi(2)).sum::<f64>() / (count - 1.0);
    let half = STUDENT_T * (variance / count).sqrt();
    if ratios.len() == PAIRS {
        format!("{mean:.3} ({:.3} to {:.3})", mean - half, mean + half)
    } else {
        format!("{mean:.3} (too few for an interval)")
    }
}
