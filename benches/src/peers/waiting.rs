//! How fast PostgreSQL's archiver is rid of segments that wait.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use walship_tests::postgres::PgServer;
use walship_tests::{process, wait};

use super::cost::Meter;
use super::tools::{Place, Store, Tool};
use super::world::World;
use super::{Line, Run, seconds};
use crate::tables::Effort;

const TOOLS: [Tool; 6] =
    [Tool::WalshipAgent, Tool::Walship, Tool::PgBackRest, Tool::WalRus, Tool::Barman, Tool::Copy];

const STORES: [Store; 4] = [Store::Folder, Store::S3(0), Store::S3(20), Store::S3Tls];

/// A call of Barman's takes a third of a second: so many are enough.
const BARMAN_MAX: usize = 32;

/// All that waits, into a folder and S3.
pub fn waiting(effort: Effort) -> String {
    let world = World::new();
    let server = world.server();
    let mut text = format!("\n{} segments of 16 MiB wait\n", world.names.len());
    for store in STORES {
        let rounds = if effort.long_rounds > 1 { 3 } else { 1 };
        let lines = lines(&world, &server, store, rounds, world.names.len());
        let _ = write!(text, "\n{}\n\n{}", store.title(), table(&lines));
    }
    text
}

/// One segment that waits, with nothing at work yet.
pub fn first(effort: Effort) -> String {
    let world = World::new();
    let server = world.server();
    let mut text = String::new();
    for store in STORES {
        let lines = lines(&world, &server, store, effort.long_rounds, 1);
        let _ = write!(text, "\n{}\n\n| | ms | CPU ms | settings |\n|---|---|---|---|\n", store.title());
        for line in &lines {
            let _ = match &line.runs {
                Ok(_) => writeln!(
                    text,
                    "| {} | {:.0} | {:.0} | {} |",
                    line.name,
                    line.median_of(|run| seconds(run.wall)) * 1e3,
                    line.median_of(|run| seconds(run.cpu)) * 1e3,
                    line.settings
                ),
                Err(why) => writeln!(text, "| {} | {why} | | |", line.name),
            };
        }
    }
    text
}

fn lines(world: &World, server: &PgServer, store: Store, rounds: usize, count: usize) -> Vec<Line> {
    let mut lines: Vec<Line> = TOOLS
        .into_iter()
        .map(|tool| {
            let look = tool.look(store);
            let settings = look.clone().unwrap_or_default();
            Line { name: tool.title().to_owned(), settings, runs: look.map(|_| Vec::new()) }
        })
        .collect();
    for round in 0..rounds {
        for turn in 0..TOOLS.len() {
            let index = (round + turn) % TOOLS.len();
            let (tool, line) = (TOOLS[index], &mut lines[index]);
            let Ok(runs) = &mut line.runs else { continue };
            if tool == Tool::Barman && count > BARMAN_MAX && round > 0 {
                continue;
            }
            let count = if tool == Tool::Barman { count.min(BARMAN_MAX) } else { count };
            let mut place = Place::new(tool, store, server);
            let run = drain(world, server, &mut place, count);
            eprintln!("{}, {}: {run:?}", tool.title(), store.title());
            runs.push(Run {
                wall: run.wall.div_f64(count as f64),
                cpu: run.cpu.div_f64(count as f64),
                ..run
            });
        }
    }
    lines
}

/// Lets the server archive the first `count` segments.
pub(super) fn drain(world: &World, server: &PgServer, place: &mut Place, count: usize) -> Run {
    let archiver = archiver(server);
    place.serve(server.data_dir());
    world.mark(count);
    let daemon_before = place.daemon().map_or(Duration::ZERO, super::cost::cpu_of);
    set(server, &place.archive_command());
    let meter = Meter::start(archiver, place.daemon());
    let started = Instant::now();
    process::signal(server.pid(), Signal::SIGHUP);
    let deadline = started + Duration::from_secs(600);
    while world.waiting() > 0 {
        assert!(Instant::now() < deadline, "{} segments still wait:\n{}", world.waiting(), server.log());
        std::thread::sleep(Duration::from_millis(if count > 1 { 5 } else { 1 }));
    }
    let wall = started.elapsed();
    // The last call ends a moment after its segment is marked, where the tool marks it.
    archive_with(server, "");
    wait::until("the last call has ended", || process::descendants(archiver).is_empty());
    let daemon = place.daemon().map_or(Duration::ZERO, super::cost::cpu_of).saturating_sub(daemon_before);
    let (cpu, peak_bytes) = meter.finish();
    Run { wall, cpu: cpu + daemon, peak_bytes }
}

fn set(server: &PgServer, command: &str) {
    server.psql(&format!("ALTER SYSTEM SET archive_command = '{command}'"));
}

/// Has the server archive by `command` from now on.
pub(super) fn archive_with(server: &PgServer, command: &str) {
    set(server, command);
    process::signal(server.pid(), Signal::SIGHUP);
}

/// Returns the archiver's process.
pub(super) fn archiver(server: &PgServer) -> u32 {
    let query = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'archiver'";
    wait::some("the archiver is there", || server.psql(query).parse().ok())
}

fn table(lines: &[Line]) -> String {
    let mut text = String::from(
        "| | MB/s | ms a segment | beside walship, agent | CPU ms a segment | beside walship, agent | peak MiB | settings |\n\
         |---|---|---|---|---|---|---|---|\n",
    );
    for line in lines {
        if let Err(why) = &line.runs {
            let _ = writeln!(text, "| {} | {why} | | | | | | |", line.name);
            continue;
        }
        let wall = line.median_of(|run| seconds(run.wall));
        let beside = |value: fn(&Run) -> f64| {
            line.beside(&lines[0], value).map_or_else(String::new, |ratio| format!("{ratio:.2}"))
        };
        let _ = writeln!(
            text,
            "| {} | {:.0} | {:.1} | {} | {:.1} | {} | {} | {} |",
            line.name,
            16.777_216 / wall,
            wall * 1e3,
            beside(|run| seconds(run.wall)),
            line.median_of(|run| seconds(run.cpu)) * 1e3,
            beside(|run| seconds(run.cpu)),
            line.runs().iter().map(|run| run.peak_bytes).max().unwrap_or(0) >> 20,
            line.settings
        );
    }
    text
}
