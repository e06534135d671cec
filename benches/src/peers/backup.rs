//! How long a base backup takes.

use std::fmt::Write as _;
use std::time::Duration;

use walship_tests::postgres::PgServer;

use super::bases::{Kind, Taker};
use super::cost::cpu_of_tree;
use super::database::{Database, Rows, gigabytes, rest};
use super::tools::{Place, Store};
use super::waiting::archive_with;
use super::{Line, Run, seconds};
use crate::measure::median;
use crate::tables::Effort;

const TAKERS: [Taker; 8] = [
    Taker::WalshipLocal,
    Taker::WalshipStream,
    Taker::PgBackRest,
    Taker::PgBackRestBundled,
    Taker::PgBasebackup,
    Taker::WalRusLocal,
    Taker::WalRusStream,
    Taker::Barman,
];

const STORES: [Store; 3] = [Store::Folder, Store::S3(0), Store::S3Tls];

/// What one backup cost and left.
pub(super) struct Taken {
    pub(super) run: Run,
    /// Of the server with its `archive_command`, meanwhile.
    server_cpu: Duration,
    pub(super) stored_bytes: u64,
}

/// A base backup of more than 2 GB, into a folder and S3.
pub fn base_backups(effort: Effort) -> String {
    let database = Database::new(Rows::Pgbench, effort);
    let server = database.server();
    let rounds = if effort.long_rounds > 1 { 3 } else { 1 };
    let gigabytes = gigabytes(&server);
    let mut text = format!("\n{}\n", database.title(&server));
    for store in STORES {
        let lines = lines(&server, store, rounds);
        let _ = write!(text, "\n{}", table(&lines, store, gigabytes));
    }
    text
}

/// A line, and what else is known of each of its runs.
type Known = (Line, Vec<(Duration, u64)>);

fn lines(server: &PgServer, store: Store, rounds: usize) -> Vec<Known> {
    let mut lines: Vec<Known> = TAKERS
        .into_iter()
        .map(|taker| {
            let look = taker.look(store);
            let settings = look.clone().unwrap_or_default();
            (Line { name: taker.title().to_owned(), settings, runs: look.map(|_| Vec::new()) }, Vec::new())
        })
        .collect();
    // The round before the first warms up and does not count.
    for round in 0..=rounds {
        for turn in 0..TAKERS.len() {
            let index = (round + turn) % TAKERS.len();
            let (line, known) = &mut lines[index];
            let Ok(runs) = &mut line.runs else { continue };
            let mut place = Place::new(TAKERS[index].tool(), store, server);
            let taken = take(TAKERS[index], Kind::Full, &mut place, server);
            eprintln!("{}, {}: {:?}", line.name, store.title(), taken.run);
            if round > 0 {
                runs.push(taken.run);
                known.push((taken.server_cpu, taken.stored_bytes));
            }
        }
    }
    lines
}

/// Takes a backup, with the tool's own `archive_command` at work.
pub(super) fn take(taker: Taker, kind: Kind, place: &mut Place, server: &PgServer) -> Taken {
    place.serve_beside(server);
    archive_with(server, &taker.archive_command(place));
    // Its checkpoint has nothing left to write, nor has the disk.
    server.psql("CHECKPOINT");
    nix::unistd::sync();
    let server_before = cpu_of_tree(server.pid());
    let stored_before = taker.stored_bytes(place);
    let run = taker.take(kind, place, server);
    let server_cpu = cpu_of_tree(server.pid()).saturating_sub(server_before);
    let stored_bytes = taker.stored_bytes(place).saturating_sub(stored_before);
    rest(server);
    place.rest();
    Taken { run, server_cpu, stored_bytes }
}

/// Takes a backup of which only the result is wanted.
pub(super) fn prepare(taker: Taker, store: Store, server: &PgServer) -> Place {
    let mut place = Place::new(taker.tool(), store, server);
    take(taker, Kind::Full, &mut place, server);
    place
}

fn table(lines: &[Known], store: Store, gigabytes: f64) -> String {
    let mut text = format!(
        "| {} | s | beside the first | CPU s per GB | beside the first | the server's CPU s per GB meanwhile | \
         peak MiB | stored MB | settings |\n|---|---|---|---|---|---|---|---|---|\n",
        store.title()
    );
    let first = &lines[0].0;
    for (line, known) in lines {
        if let Err(why) = &line.runs {
            let _ = writeln!(text, "| {} | {why} | | | | | | | |", line.name);
            continue;
        }
        let beside = |value: fn(&Run) -> f64| {
            line.beside(first, value).map_or_else(String::new, |ratio| format!("{ratio:.2}"))
        };
        let _ = writeln!(
            text,
            "| {} | {:.2} | {} | {:.2} | {} | {:.2} | {} | {:.0} | {} |",
            line.name,
            line.median_of(|run| seconds(run.wall)),
            beside(|run| seconds(run.wall)),
            line.median_of(|run| seconds(run.cpu)) / gigabytes,
            beside(|run| seconds(run.cpu)),
            median(known.iter().map(|(cpu, _)| seconds(*cpu)).collect()) / gigabytes,
            line.runs().iter().map(|run| run.peak_bytes).max().unwrap_or(0) >> 20,
            median(known.iter().map(|(_, bytes)| *bytes as f64).collect()) / 1e6,
            line.settings
        );
    }
    text
}
