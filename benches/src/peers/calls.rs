//! What a call of the thin commands costs when the agent has the answer.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use walship_tests::{bins, process, wait};

use super::cost::Meter;
use super::tools::{Place, Store, Tool};
use super::waiting::drain;
use super::world::World;
use crate::measure::{cpu_of, median, quantile};
use crate::tables::Effort;

/// As many segments are asked for again and again.
const NAMES: usize = 64;

/// The calls of one command.
#[derive(Default)]
struct Calls {
    wall: Vec<f64>,
    cpu: Duration,
    agent: Duration,
}

impl Calls {
    fn call(&mut self, argv: &[&str], environment: &[(&str, &str)]) {
        let mut command = Command::new(argv[0]);
        command.args(&argv[1..]).envs(environment.iter().copied());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit());
        let before = children_cpu();
        let started = Instant::now();
        let status = command.status().expect("the program can be started");
        self.wall.push(started.elapsed().as_secs_f64() * 1e3);
        self.cpu += children_cpu().saturating_sub(before);
        assert!(status.success(), "{argv:?}: {status}");
    }
}

fn children_cpu() -> Duration {
    cpu_of(&getrusage(UsageWho::RUSAGE_CHILDREN).expect("a process may ask for its children's use"))
}

/// A thousand calls of each, one of each kind after the other.
pub fn calls(effort: Effort) -> String {
    let count = if effort.long_rounds > 1 { 1000 } else { 100 };
    let world = World::new();
    let server = world.server();
    let (mut yes, mut copy, mut archive) = (Calls::default(), Calls::default(), Calls::default());
    let scratch = tempfile::tempdir().expect("a temporary folder");
    let mut place = Place::new(Tool::WalshipAgent, Store::Folder, &server);
    // What restore-cmd asks for, by the server's own archiver.
    drain(&world, &server, &mut place, world.names.len());
    let config = place.walship_config();
    let environment = [("WALSHIP_CONFIG", text(&config))];
    let archive_cmd = bins::archive_cmd();
    let target = scratch.path().join("copy");
    let meter = Meter::start(server.pid(), None);
    let segment = |index: usize| world.segment(world.names[index % NAMES]);
    for index in 0..2 * NAMES {
        Calls::default().call(&[text(&archive_cmd), text(&segment(index))], &environment);
    }
    let agent_before = meter.helpers_cpu();
    for index in 0..count {
        yes.call(&["/bin/true"], &[]);
        copy.call(&["/bin/cp", text(&segment(index)), text(&target)], &[]);
        archive.call(&[text(&archive_cmd), text(&segment(index))], &environment);
    }
    archive.agent = meter.helpers_cpu().saturating_sub(agent_before);
    meter.finish();
    let (restore, beside) = restores(&world, &environment, count);
    let mut table = String::from(
        "\n| | ms, median | 99 % | CPU ms, mean | the agent's CPU ms a call, beside | stripped size, KiB |\n|---|---|---|---|---|---|\n",
    );
    let rows = [
        ("`/bin/true`", &yes, None),
        ("`cp` of a segment, not durable", &copy, None),
        ("`archive-cmd`", &archive, Some(archive_cmd)),
        ("`/bin/true`, while the agent decodes ahead", &beside, None),
        ("`restore-cmd`, while the agent decodes ahead", &restore, Some(bins::restore_cmd())),
    ];
    for (name, calls, program) in rows {
        let mean = |time: Duration| time.as_secs_f64() * 1e3 / count as f64;
        let size = program.map_or_else(String::new, |program| format!("{}", stripped(&program) >> 10));
        let _ = writeln!(
            table,
            "| {name} | {:.2} | {:.2} | {:.2} | {:.2} | {size} |",
            median(calls.wall.clone()),
            quantile(&calls.wall, 0.99),
            mean(calls.cpu),
            mean(calls.agent)
        );
    }
    table
}

/// Calls of `restore-cmd`, each when the next segment lies ready, and of `true` between them.
fn restores(world: &World, environment: &[(&str, &str)], count: usize) -> (Calls, Calls) {
    let scratch = tempfile::Builder::new().prefix("walship-calls").tempdir().expect("a temporary folder");
    let data = scratch.path().join("data");
    process::copy_tree(&world.base(), &data);
    // As in a recovery: there is a server, and it recovers once.
    fs::write(data.join("recovery.signal"), "").expect("the scratch folder has room");
    fs::write(data.join("postmaster.pid"), "2\n").expect("the scratch folder has room");
    let meter = Meter::start(std::process::id(), None);
    let restore_cmd = bins::restore_cmd();
    let target = data.join("pg_wal/RECOVERYXLOG");
    let spooled = |name: &str| -> PathBuf { data.join("pgsql_tmp_walship_spool").join(name) };
    let (mut calls, mut yes) = (Calls::default(), Calls::default());
    let mut agent_before = Duration::ZERO;
    while calls.wall.len() < count {
        for (index, name) in world.names.iter().enumerate() {
            let name = name.to_string();
            let argv = [text(&restore_cmd), &name, text(&target)];
            let _ = fs::remove_file(&target);
            if index < 3 {
                // The first ones of each round are asked for out of order.
                Calls::default().call(&argv, environment);
                continue;
            }
            wait::until("the next segment is there", || spooled(&name).exists());
            if calls.wall.is_empty() {
                agent_before = meter.helpers_cpu();
            }
            yes.call(&["/bin/true"], &[]);
            calls.call(&argv, environment);
            if calls.wall.len() == count {
                break;
            }
        }
    }
    calls.agent = meter.helpers_cpu().saturating_sub(agent_before);
    meter.finish();
    (calls, yes)
}

fn stripped(program: &Path) -> u64 {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let bare = folder.path().join("bare");
    process::run_ok(Command::new("strip").arg("-o").arg(&bare).arg(program));
    fs::metadata(&bare).map_or(0, |metadata| metadata.len())
}

fn text(path: &Path) -> &str {
    path.to_str().expect("scratch paths are UTF-8")
}
