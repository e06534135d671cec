//! The open segment: what was committed a moment ago, from the repository alone.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use walship::pg::Lsn;
use walship_tests::postgres::{PgServer, StopMode, majors, primary_major};
use walship_tests::random::Random;
use walship_tests::stage::Stage;
use walship_tests::{process, wait};

use super::{Front, Reading, Receiving, server};

/// Commits numbers one after the other and keeps those that the server has acknowledged.
struct Client {
    child: Child,
    number: usize,
    acknowledged: std::path::PathBuf,
}

impl Client {
    fn start(server: &PgServer, folder: &Path, number: usize) -> Self {
        let acknowledged = folder.join(format!("acknowledged-{number}"));
        let script = folder.join(format!("script-{number}"));
        let mut text = std::io::BufWriter::new(fs::File::create(&script).unwrap());
        for n in 0..200_000 {
            writeln!(text, "INSERT INTO committed VALUES ({number}, {n}) RETURNING n;").unwrap();
        }
        text.into_inner().unwrap();
        let psql = server.tool("psql");
        let mut command = process::guarded(psql.get_program());
        for (name, value) in psql.get_envs() {
            if let Some(value) = value {
                command.env(name, value);
            }
        }
        command.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1"]);
        command.stdin(fs::File::open(&script).unwrap());
        command.stdout(fs::File::create(&acknowledged).unwrap()).stderr(Stdio::null());
        Self { child: process::spawn(command).unwrap(), number, acknowledged }
    }

    /// Returns the last number that was acknowledged, once the client is gone.
    fn last(mut self) -> Option<u64> {
        if process::wait_within(&mut self.child, Duration::from_secs(10)).is_none() {
            process::kill_tree(&mut self.child);
        }
        let text = fs::read_to_string(&self.acknowledged).unwrap();
        // Each is a line; what is no whole line was not read as an answer.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().last().map(|line| line.parse().unwrap())
    }
}

#[test]
fn no_acknowledged_commit_is_lost_when_only_the_repository_survives() {
    let rounds = if walship_tests::campaign() { 200 } else { 12 };
    let seed = walship_tests::seed();
    let mut random = Random::new(seed);
    let (mut commits, majors) = (0, majors());
    for round in 0..rounds {
        commits += everything_but_the_repository_dies(majors[round % majors.len()], &mut random);
    }
    assert!(commits > rounds as u64 * 20, "only {commits} commits");
    walship_tests::note(&format!(
        "receive --flush repository: {rounds} rounds, seed {seed}, everything but the repository lost: {commits} \
         acknowledged commits, none lost"
    ));
}

fn everything_but_the_repository_dies(major: u32, random: &mut Random) -> u64 {
    let stage = Stage::folder("main");
    let mut server = server(major, 1).start();
    stage.init(&server);
    server.psql("CREATE TABLE committed (client int, n int)");
    let front = Front::of(&server);
    let mut receiving = Receiving::start(&stage, &front.conninfo(), &["--flush", "repository"]);
    stage.backup(&server);
    server.psql("ALTER SYSTEM SET synchronous_standby_names = 'walship'");
    server.psql("SELECT pg_reload_conf()");
    server.wait_for("SELECT sync_state FROM pg_stat_replication", "sync");

    let folder = tempfile::tempdir().unwrap();
    let clients: Vec<Client> = (0..4).map(|number| Client::start(&server, folder.path(), number)).collect();
    std::thread::sleep(Duration::from_millis(300 + random.below(1500) as u64));
    if random.chance(0.5) {
        receiving.kill9();
        server.kill9();
    } else {
        server.kill9();
        receiving.kill9();
    }
    let acknowledged: Vec<_> = clients.into_iter().map(|client| (client.number, client.last())).collect();
    fs::remove_dir_all(server.data_dir()).unwrap();
    let _ = fs::remove_dir_all(stage.path().join("state"));

    let restored = stage.path().join("restored");
    stage.ok(stage.pitr(&["restore", "--latest", "-D"]).arg(&restored));
    let restored = stage.recovering(&restored).start();
    restored.wait_for("SELECT pg_is_in_recovery()", "f");
    let mut commits = 0;
    for (number, last) in acknowledged {
        let Some(last) = last else { continue };
        commits += last + 1;
        let found =
            restored.psql(&format!("SELECT count(*) FROM committed WHERE client = {number} AND n <= {last}"));
        assert_eq!(
            found,
            (last + 1).to_string(),
            "client {number} lost commits; restore-cmd's side:\n{}",
            restored.log()
        );
    }
    commits
}

#[test]
fn a_commit_is_in_the_repository_soon_and_comes_back_without_a_switch() {
    let stage = Stage::folder("main");
    let mut server = server(primary_major(), 16).start();
    stage.init(&server);
    let front = Front::of(&server);
    let mut receiving = Receiving::start(&stage, &front.conninfo(), &[]);
    stage.backup(&server);
    server.psql("CREATE TABLE t AS SELECT 7 AS a");
    let end: Lsn = server.psql("SELECT pg_current_wal_flush_lsn()").parse().unwrap();
    receiving.wait_durable(end);
    let parts = receiving.status().unwrap()["parts"].as_u64().unwrap();
    assert!((1..100).contains(&parts), "{parts} parts");

    // A shutdown is not held up, and its checkpoint is durable too.
    let stopping = Instant::now();
    assert!(server.stop(StopMode::Fast).success());
    assert!(stopping.elapsed() < Duration::from_secs(10), "held up for {:?}", stopping.elapsed());
    let control = process::run_ok(server.binaries().tool("pg_controldata").arg(server.data_dir()));
    let checkpoint =
        control.lines().find_map(|line| line.strip_prefix("Latest checkpoint location:")).unwrap();
    let checkpoint: Lsn = checkpoint.trim().parse().unwrap();
    wait::until("the shutdown checkpoint is durable", || receiving.position("durable_lsn") > checkpoint);
    receiving.kill9();

    // The open segment as a server would get it, and what comes of archiving that again.
    let name = walship::pg::SegmentName::containing(
        walship::pg::TimelineId::FIRST,
        checkpoint,
        walship::pg::SegmentSize::DEFAULT,
    );
    let fetched = stage.path().join(name.to_string());
    stage.ok(stage.walship(&["wal", "fetch", &name.to_string()]).arg(&fetched));
    let own = fs::read(server.data_dir().join("pg_wal").join(name.to_string())).unwrap();
    let delivered = fs::read(&fetched).unwrap();
    let valid = usize::try_from(receiving.position("durable_lsn").0 % (16 << 20)).unwrap();
    assert!(delivered.len() == own.len() && delivered[..valid] == own[..valid]);
    assert!(delivered[valid..].iter().all(|byte| *byte == 0));
    stage.ok(stage.walship(&["wal", "push"]).arg(&fetched));
    assert!(!Reading::of(&stage).has(&name.to_string()), "it took the whole segment's name");

    let restored = stage.path().join("restored");
    stage.ok(stage.pitr(&["restore", "--latest", "-D"]).arg(&restored));
    let restored = stage.recovering(&restored).start();
    restored.wait_for("SELECT pg_is_in_recovery()", "f");
    assert_eq!(restored.psql("SELECT a FROM t"), "7");
}

#[test]
fn parts_go_when_their_segment_is_whole() {
    let stage = Stage::folder("main");
    let server = server(primary_major(), 1).start();
    stage.init(&server);
    let front = Front::of(&server);
    let mut receiving = Receiving::start(&stage, &front.conninfo(), &["--tail-interval", "10"]);
    server.wait_for("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'", "1");
    server.pgbench(&["-i", "-q", "-s", "1"]);
    server.pgbench(&["-n", "-c", "2", "-t", "500"]);
    let last = server.switch_wal();
    let reading = Reading::of(&stage);
    wait::until("the last segment is stored", || reading.has(&last));
    // The status file is written once a second.
    wait::until("the status file tells of parts", || {
        receiving.status().unwrap()["parts"].as_u64().unwrap() > 3
    });
    let tails = stage.repository_dir().join("main/0001/tail/00000001");
    let left = || {
        let files = |folder: fs::DirEntry| fs::read_dir(folder.path()).map_or(0, Iterator::count);
        let folders = fs::read_dir(&tails).unwrap().map(Result::unwrap);
        folders
            .filter(|folder| folder.file_name().to_str().unwrap() <= last.as_str())
            .map(files)
            .sum::<usize>()
    };
    wait::until("parts of whole segments are gone", || left() == 0);
    assert!(receiving.terminate().success(), "{}", receiving.said());
}
