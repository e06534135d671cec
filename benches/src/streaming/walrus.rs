//! `wal-rus wal-receive` as a contender, where it is installed (`benches/peers/install`).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use walship::storage::{ObjectKey, StorageConfig};
use walship_tests::postgres::PgServer;
use walship_tests::weed::WeedServer;
use walship_tests::{cache, process};

use super::receiver::cpu_seconds;
use super::site::Store;
use crate::measure::Measurement;

/// How often is looked whether it has stored the last segment.
const LOOK: Duration = Duration::from_millis(20);

/// Longer than any backlog takes.
const PATIENCE: Duration = Duration::from_secs(300);

/// Returns the program; `None` where it is not installed.
pub(super) fn program() -> Option<PathBuf> {
    Some(cache::dir().join("peers/wal-rus/bin/walrus")).filter(|program| program.is_file())
}

/// Returns what it says of its version.
pub(super) fn version(program: &Path) -> String {
    process::run_ok(Command::new(program).arg("--version")).trim().to_owned()
}

/// Lets it receive from the slot `bench` until it has stored the segment `last`. It does not end by itself: its time is
/// that until the last object is there, its processor time what it has used then.
pub(super) fn receive(program: &Path, server: &PgServer, store: Store, last: &str) -> Measurement {
    let home = tempfile::tempdir().expect("a temporary folder can be made");
    let (staging, folder) = (home.path().join("staging"), home.path().join("store"));
    for folder in [&staging, &folder] {
        fs::create_dir(folder).expect("the scratch folder has room");
    }
    let mut command = process::guarded(program);
    command.arg("wal-receive").arg(&staging).env("WALG_SLOTNAME", "bench");
    command.env("WALG_COMPRESSION_METHOD", "lz4").env("PGDATA", server.data_dir());
    command.env("PGHOST", server.socket_dir()).env("PGPORT", server.port().to_string());
    command.env("PGUSER", "postgres").env("PGDATABASE", "postgres");
    let weed = match store {
        Store::Folder => {
            command.env("WALG_FILE_PREFIX", &folder);
            None
        }
        Store::S3(_) => {
            let weed = WeedServer::start();
            command.envs(weed.env()).env("AWS_S3_FORCE_PATH_STYLE", "true");
            command.env("WALG_S3_PREFIX", format!("s3://{}/walrus", walship_tests::s3_inprocess::BUCKET));
            Some(weed)
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let name = format!("wal_005/{last}.lz4");
    let stored = |config: &StorageConfig| {
        let storage = walship::storage::open(config).expect("the configuration is right");
        let key = ObjectKey::new(&*name).expect("the name is legal");
        move || runtime.block_on(storage.get_range(&key, 0, 1)).is_ok_and(|found| found.is_some())
    };
    let is_there: Box<dyn Fn() -> bool> = match &weed {
        Some(weed) => Box::new(stored(&weed.config("walrus"))),
        None => Box::new(|| folder.join(&name).exists()),
    };
    let said = fs::File::create(home.path().join("said")).expect("the scratch folder has room");
    command.stdin(Stdio::null()).stdout(said.try_clone().expect("a file can be shared")).stderr(said);
    let started = Instant::now();
    let mut child = process::spawn(command).expect("wal-rus can be started");
    while !is_there() {
        let ended = child.try_wait().expect("a child can be waited for");
        let said = || fs::read_to_string(home.path().join("said")).unwrap_or_default();
        assert!(ended.is_none(), "wal-rus ended: {ended:?}\n{}", said());
        assert!(started.elapsed() < PATIENCE, "wal-rus has not stored {last}:\n{}", said());
        std::thread::sleep(LOOK);
    }
    let measured = Measurement {
        wall: started.elapsed(),
        cpu: Duration::from_secs_f64(cpu_seconds(child.id())),
        peak_bytes: peak_bytes(child.id()),
    };
    process::kill_tree(&mut child);
    measured
}

fn peak_bytes(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib << 10)
}
