//! How long recovery takes that asks for each segment, beside one that finds them in `pg_wal`.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use walship_tests::postgres::PgServer;
use walship_tests::{process, wait};

use super::cost::Meter;
use super::tools::{Place, Store, Tool};
use super::waiting::drain;
use super::world::World;
use super::{Line, Run, seconds};
use crate::tables::Effort;

/// Where recovery gets its segments.
#[derive(Debug, Clone, Copy)]
enum Source {
    /// They lie in `pg_wal`.
    InPlace,
    /// Each gets a second name there, by `ln`.
    Linked,
    Stored(Tool, Store),
}

/// Barman's restore fetches one segment at a time in a third of a second, which needs no table.
const SOURCES: [Source; 11] = [
    Source::InPlace,
    Source::Linked,
    Source::Stored(Tool::Copy, Store::Folder),
    Source::Stored(Tool::WalshipAgent, Store::Folder),
    Source::Stored(Tool::Walship, Store::Folder),
    Source::Stored(Tool::PgBackRest, Store::Folder),
    Source::Stored(Tool::WalRus, Store::Folder),
    Source::Stored(Tool::WalshipAgent, Store::S3(0)),
    Source::Stored(Tool::WalshipAgent, Store::S3(20)),
    Source::Stored(Tool::WalRus, Store::S3(20)),
    Source::Stored(Tool::PgBackRest, Store::S3Tls),
];

/// A source at work.
struct Contender {
    source: Source,
    name: String,
    /// Its version and the settings that matter, or why it cannot be had.
    settings: Result<String, String>,
    /// A store in which all segments are.
    place: Option<Place>,
}

/// Recovery through all segments, by a server that syncs and by one that does not.
pub fn replays(effort: Effort) -> String {
    let world = World::new();
    let rounds = if effort.long_rounds > 1 { 3 } else { 1 };
    let mut contenders: Vec<Contender> = {
        let server = world.server();
        SOURCES.into_iter().map(|source| prepare(&world, &server, source)).collect()
    };
    let mut text = format!("\n{} segments\n", world.names.len());
    for fsync in ["on", "off"] {
        let mut lines: Vec<Line> = contenders
            .iter()
            .map(|Contender { name, settings, .. }| Line {
                name: name.clone(),
                settings: settings.clone().unwrap_or_default(),
                runs: settings.as_ref().map(|_| Vec::new()).map_err(Clone::clone),
            })
            .collect();
        // It warms the page cache.
        recover(&world, fsync, Source::InPlace, None);
        for round in 0..rounds {
            for turn in 0..contenders.len() {
                let index = (round + turn) % contenders.len();
                let (contender, line) = (&mut contenders[index], &mut lines[index]);
                let Ok(runs) = &mut line.runs else { continue };
                let run = recover(&world, fsync, contender.source, contender.place.as_mut());
                eprintln!("fsync = {fsync}, {}: {run:?}", line.name);
                runs.push(run);
            }
        }
        let _ = write!(text, "\n`fsync = {fsync}`\n\n{}", table(&lines, world.names.len()));
    }
    text
}

fn prepare(world: &World, server: &PgServer, source: Source) -> Contender {
    let (tool, store) = match source {
        Source::InPlace | Source::Linked => {
            let name = match source {
                Source::Linked => "`ln`: nothing is read or written",
                _ => "no `restore_command`: the segments are in `pg_wal`",
            };
            return Contender { source, name: name.to_owned(), settings: Ok(String::new()), place: None };
        }
        Source::Stored(tool, store) => (tool, store),
    };
    let settings = tool.look(store);
    let place = settings.is_ok().then(|| {
        let mut place = Place::new(tool, store, server);
        place.latency(0);
        drain(world, server, &mut place, world.names.len());
        place.rest();
        if let Store::S3(millis) = store {
            place.latency(millis);
        }
        place
    });
    Contender { source, name: format!("{}, {}", tool.title(), store.title()), settings, place }
}

fn table(lines: &[Line], segments: usize) -> String {
    let mut text = String::from(
        "| | s | beside `pg_wal` | CPU ms a segment, without the server's | peak MiB | settings |\n|---|---|---|---|---|---|\n",
    );
    for line in lines {
        let _ = match &line.runs {
            Ok(runs) => writeln!(
                text,
                "| {} | {:.2} | {:.2} | {:.1} | {} | {} |",
                line.name,
                line.median_of(|run| seconds(run.wall)),
                line.beside(&lines[0], |run| seconds(run.wall)).unwrap_or(f64::NAN),
                line.median_of(|run| seconds(run.cpu)) * 1e3 / segments as f64,
                runs.iter().map(|run| run.peak_bytes).max().unwrap_or(0) >> 20,
                line.settings
            ),
            Err(why) => writeln!(text, "| {} | {why} | | | | |", line.name),
        };
    }
    text
}

fn recover(world: &World, fsync: &str, source: Source, place: Option<&mut Place>) -> Run {
    let scratch = tempfile::Builder::new().prefix("walship-replay").tempdir().expect("a temporary folder");
    let data = scratch.path().join("data");
    process::copy_tree(&world.base(), &data);
    let wal = data.join("pg_wal");
    for entry in
        fs::read_dir(&wal).expect("it is the backup's").flatten().filter(|entry| entry.path().is_file())
    {
        fs::remove_file(entry.path()).expect("it is ours");
    }
    let mut server = PgServer::from_data_dir(&data)
        .setting("fsync", fsync)
        .setting("archive_mode", "off")
        .setting("hot_standby", "off")
        .setting("checkpoint_timeout", "1h")
        .setting("max_wal_size", "64GB");
    let command = match (source, &place) {
        (Source::Linked, _) => Some(format!("ln {}/%f %p", world.data().join("pg_wal").display())),
        (_, place) => place.as_ref().map(|place| place.restore_command()),
    };
    if let Some(command) = command {
        fs::write(data.join("recovery.signal"), "").expect("the scratch folder has room");
        server = server.setting("restore_command", command);
    } else {
        for name in &world.names {
            // The server goes on behind the last one, and writes in none of them.
            let to = wal.join(name.to_string());
            if fs::hard_link(world.segment(*name), &to).is_err() {
                process::run_ok(Command::new("cp").arg(world.segment(*name)).arg(&to));
            }
        }
    }
    for (name, value) in place.as_ref().map(|place| place.environment()).unwrap_or_default() {
        server = server.env(name, value);
    }
    let mut server = server.prepare();
    let mut daemon = None;
    if let Some(place) = place {
        place.serve(&data);
        daemon = place.daemon();
    }
    let daemon_before = daemon.map_or(Duration::ZERO, super::cost::cpu_of);
    // What the run before left to be written is not for this one to wait for.
    nix::unistd::sync();
    let mut old_children = super::cost::children_now();
    server.launch();
    old_children.insert(server.pid());
    let startup = wait::some("the startup process is there", || startup(server.pid()));
    let meter = Meter::start_late(startup, Duration::ZERO, daemon, old_children);
    let mut own = Duration::ZERO;
    let done = wait::some_within("recovery is done", Duration::from_secs(600), || {
        own = super::cost::own_cpu_of(startup).max(own);
        elapsed(&server.log())
    });
    let daemon = daemon.map_or(Duration::ZERO, super::cost::cpu_of).saturating_sub(daemon_before);
    let (cpu, peak_bytes) = meter.finish();
    server.kill9();
    Run { wall: done, cpu: (cpu + daemon).saturating_sub(own), peak_bytes }
}

/// Returns what the server says about its replay: `redo done at ... elapsed: 12.34 s`.
fn elapsed(log: &str) -> Option<Duration> {
    let line = log.lines().find(|line| line.contains("redo done at"))?;
    let text = line.split("elapsed: ").nth(1)?.split(' ').next()?;
    text.parse().ok().map(Duration::from_secs_f64)
}

fn startup(postmaster: u32) -> Option<u32> {
    process::descendants(postmaster).into_iter().find(|pid| {
        let line = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("cmdline"));
        line.is_ok_and(|line| line.contains("startup"))
    })
}
