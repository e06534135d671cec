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

/// Who restores from where. Barman's restore fetches one segment at a time in a third of a second, which needs
/// no table.
const CONTENDERS: [(Tool, Store); 9] = [
    (Tool::Copy, Store::Folder),
    (Tool::WalshipAgent, Store::Folder),
    (Tool::Walship, Store::Folder),
    (Tool::PgBackRest, Store::Folder),
    (Tool::WalRus, Store::Folder),
    (Tool::WalshipAgent, Store::S3(0)),
    (Tool::WalshipAgent, Store::S3(20)),
    (Tool::WalRus, Store::S3(20)),
    (Tool::PgBackRest, Store::S3Tls),
];

/// Recovery through all segments.
pub fn replays(effort: Effort) -> String {
    let world = World::new();
    let rounds = if effort.long_rounds > 1 { 3 } else { 1 };
    let mut places: Vec<(Line, Option<Place>)> = {
        let server = world.server();
        let place = |(tool, store): (Tool, Store)| {
            let name = format!("{}, {}", tool.title(), store.title());
            let look = tool.look(store);
            let place = look.is_ok().then(|| {
                let mut place = Place::new(tool, store, &server);
                place.latency(0);
                drain(&world, &server, &mut place, world.names.len());
                place.rest();
                if let Store::S3(millis) = store {
                    place.latency(millis);
                }
                place
            });
            (Line { name, settings: look.clone().unwrap_or_default(), runs: look.map(|_| Vec::new()) }, place)
        };
        CONTENDERS.into_iter().map(place).collect()
    };
    let in_place = Line {
        name: "no `restore_command`: the segments are in `pg_wal`".to_owned(),
        settings: String::new(),
        runs: Ok(Vec::new()),
    };
    places.insert(0, (in_place, None));
    for round in 0..=rounds {
        for turn in 0..places.len() {
            let index = (round + turn) % places.len();
            let (line, place) = &mut places[index];
            let Ok(runs) = &mut line.runs else { continue };
            // Round 0 warms the page cache.
            if round == 0 && index > 0 {
                continue;
            }
            let run = recover(&world, place.as_mut());
            eprintln!("{}: {run:?}", line.name);
            if round > 0 {
                runs.push(run);
            }
        }
    }
    let mut text = format!("\n{} segments\n\n", world.names.len());
    text.push_str(
        "| | s | beside `pg_wal` | CPU ms a segment, without the server's | peak MiB | settings |\n|---|---|---|---|---|---|\n",
    );
    for (line, _) in &places {
        let _ = match &line.runs {
            Ok(runs) => writeln!(
                text,
                "| {} | {:.2} | {:.2} | {:.1} | {} | {} |",
                line.name,
                line.median_of(|run| seconds(run.wall)),
                line.beside(&places[0].0, |run| seconds(run.wall)).unwrap_or(f64::NAN),
                line.median_of(|run| seconds(run.cpu)) * 1e3 / world.names.len() as f64,
                runs.iter().map(|run| run.peak_bytes).max().unwrap_or(0) >> 20,
                line.settings
            ),
            Err(why) => writeln!(text, "| {} | {why} | | | | |", line.name),
        };
    }
    text
}

fn recover(world: &World, place: Option<&mut Place>) -> Run {
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
        .setting("fsync", "on")
        .setting("archive_mode", "off")
        .setting("hot_standby", "off")
        .setting("checkpoint_timeout", "1h")
        .setting("max_wal_size", "64GB");
    match &place {
        None => world.names.iter().for_each(|name| {
            // The server goes on behind the last one, and writes in none of them.
            let to = wal.join(name.to_string());
            if fs::hard_link(world.segment(*name), &to).is_err() {
                process::run_ok(Command::new("cp").arg(world.segment(*name)).arg(&to));
            }
        }),
        Some(place) => {
            fs::write(data.join("recovery.signal"), "").expect("the scratch folder has room");
            server = server.setting("restore_command", place.restore_command());
            for (name, value) in place.environment() {
                server = server.env(name, value);
            }
        }
    }
    let mut server = server.prepare();
    let mut daemon = None;
    if let Some(place) = place {
        place.serve(&data);
        daemon = place.daemon();
    }
    server.launch();
    let daemon_before = daemon.map_or(Duration::ZERO, super::cost::cpu_of);
    let startup = wait::some("the startup process is there", || startup(server.pid()));
    let meter = Meter::start(startup, daemon);
    let own_before = super::cost::own_cpu_of(startup);
    let mut own = own_before;
    let done = wait::some_within("recovery is done", Duration::from_secs(600), || {
        own = super::cost::own_cpu_of(startup).max(own);
        elapsed(&server.log())
    });
    let daemon = daemon.map_or(Duration::ZERO, super::cost::cpu_of).saturating_sub(daemon_before);
    let (cpu, peak_bytes) = meter.finish();
    server.kill9();
    Run { wall: done, cpu: (cpu + daemon).saturating_sub(own - own_before), peak_bytes }
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
