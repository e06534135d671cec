//! Every segment byte for byte as `pg_receivewal` has it, which runs beside it on the same server.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use walship::pg::{Lsn, SegmentName, SegmentSize, TimelineId, WalFileName};
use walship_tests::postgres::{PgServer, StopMode, majors, newer_major, primary_major};
use walship_tests::stage::Stage;
use walship_tests::{process, wait};

use super::{Flush, Front, Reading, names, server, standby_of};

/// A running `pg_receivewal`; dropping it kills it.
struct Oracle {
    child: Child,
    folder: TempDir,
    program: PathBuf,
    port: u16,
}

impl Oracle {
    fn start(server: &PgServer, front: &Front) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let program = PathBuf::from(server.tool("pg_receivewal").get_program());
        let port = front.port();
        process::run_ok(&mut Self::tool(&program, port, folder.path(), &["--create-slot"]));
        let child = Self::stream(&program, port, folder.path());
        Self { child, folder, program, port }
    }

    fn tool(program: &Path, port: u16, folder: &Path, args: &[&str]) -> Command {
        let mut command = process::guarded(program);
        command.env("PGHOST", "127.0.0.1").env("PGPORT", port.to_string()).env("PGUSER", "postgres");
        command.args(["--slot", "oracle", "-D"]).arg(folder).args(args);
        command
    }

    fn stream(program: &Path, port: u16, folder: &Path) -> Child {
        let mut command = Self::tool(program, port, folder, &[]);
        let words = fs::OpenOptions::new().create(true).append(true).open(Self::words(folder)).unwrap();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(words);
        process::spawn(command).unwrap()
    }

    /// What it says: beside its folder, which may hold WAL only.
    fn words(folder: &Path) -> PathBuf {
        folder.with_extension("stderr")
    }

    /// It ends for good when the server goes away at the wrong moment of a new session.
    fn revive(&mut self) {
        if !matches!(self.child.try_wait(), Ok(None)) {
            self.child = Self::stream(&self.program, self.port, self.folder.path());
        }
    }

    fn segments(&self) -> Vec<String> {
        names(self.folder.path()).into_iter().filter(|name| name.len() == 24).collect()
    }
}

impl Drop for Oracle {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            process::kill_tree(&mut self.child);
        }
        let words = Self::words(self.folder.path());
        if std::thread::panicking() {
            eprintln!("--- pg_receivewal said:\n{}", fs::read_to_string(&words).unwrap_or_default());
        }
        let _ = fs::remove_file(&words);
    }
}

/// Compares all that `pg_receivewal` has completed; returns how many files. Timeline 1 ends at `fork`.
fn compare(oracle: &Oracle, reading: &Reading, fork: Lsn, size: SegmentSize) -> usize {
    let mut compared = 0;
    for name in names(oracle.folder.path()) {
        let Ok(parsed) = name.parse::<WalFileName>() else { continue };
        let own = fs::read(oracle.folder.path().join(&name)).unwrap();
        let stored = reading.file(parsed);
        match parsed {
            // A segment is its partial file until it is complete, and stays one at the end of a timeline. Behind
            // that end `pg_receivewal` leaves what the dead server had sent there, an unfinished record perhaps.
            WalFileName::Partial(segment) => {
                let Some(stored) = stored else { continue };
                assert_eq!(
                    segment,
                    SegmentName::containing(TimelineId::FIRST, fork, size),
                    "{name} is no end"
                );
                let valid = usize::try_from(size.offset_of(fork)).unwrap();
                assert!(stored[..valid] == own[..valid], "{name} differs before {fork}");
                assert!(stored[valid..].iter().all(|byte| *byte == 0), "{name} goes on behind {fork}");
            }
            _ => {
                let stored = stored.unwrap_or_else(|| panic!("{name} is not stored"));
                assert!(stored == own, "{name} differs");
            }
        }
        compared += 1;
    }
    compared
}

fn load(server: &PgServer, rounds: usize) {
    for round in 0..rounds {
        server.pgbench(&["-n", "-c", "4", "-t", "100"]);
        if round % 2 == 0 {
            server.switch_wal();
        }
    }
}

/// Switches and waits until both have the segment.
fn catch_up(server: &PgServer, oracle: &mut Oracle, reading: &Reading) {
    let last = server.switch_wal();
    wait::until_within(&format!("pg_receivewal has {last}"), 2 * wait::PATIENCE, || {
        oracle.revive();
        oracle.segments().contains(&last)
    });
    wait::until(&format!("{last} is stored"), || reading.has(&last));
}

fn through_everything(flush: Flush, major: u32, segment_size_mb: u32) {
    let stage = Stage::folder("main");
    // The standby comes up at the end only, and has no slot: it needs what was written since.
    let mut primary = server(major, segment_size_mb).setting("wal_keep_size", "4GB").start();
    stage.init(&primary);
    let (ours, theirs) = (Front::of(&primary), Front::of(&primary));
    let mut oracle = Oracle::start(&primary, &theirs);
    let mut receiving = flush.receive(&stage, &ours.conninfo());
    let reading = Reading::of(&stage);
    primary.wait_for("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'", "2");

    primary.pgbench(&["-i", "-q", "-s", "2"]);
    load(&primary, 4);
    catch_up(&primary, &mut oracle, &reading);

    // A clean restart: nobody is held up, though the open segment is not durable here.
    let stopping = Instant::now();
    assert!(primary.stop(StopMode::Fast).success());
    assert!(stopping.elapsed() < Duration::from_secs(15), "held up for {:?}", stopping.elapsed());
    primary.start();
    ours.turn_to(&primary);
    theirs.turn_to(&primary);
    load(&primary, 2);
    catch_up(&primary, &mut oracle, &reading);

    // A crash.
    load(&primary, 1);
    primary.kill9();
    primary.start();
    ours.turn_to(&primary);
    theirs.turn_to(&primary);
    load(&primary, 2);
    catch_up(&primary, &mut oracle, &reading);

    // A failover to a standby that has replayed everything. It is made only now: one that is started later misses
    // what a checkpoint has removed meanwhile.
    let (_folder, standby_data) = standby_of(&primary);
    let conninfo = format!("host=127.0.0.1 port={} user=postgres", primary.port());
    let standby = PgServer::from_data_dir(&standby_data)
        .setting("primary_conninfo", conninfo)
        .setting("archive_mode", "off")
        .start();
    load(&primary, 1);
    primary.psql("CREATE TABLE last_words AS SELECT 7 AS a");
    standby.wait_for("SELECT a FROM last_words", "7");
    standby.psql("SELECT pg_create_physical_replication_slot('oracle', true)");
    primary.kill9();
    ours.turn_to(&standby);
    theirs.turn_to(&standby);
    standby.promote();
    load(&standby, 3);
    catch_up(&standby, &mut oracle, &reading);

    assert!(receiving.terminate().success(), "{}", receiving.said());
    assert_eq!(receiving.status().unwrap()["state"], "stopped");
    let history = fs::read_to_string(oracle.folder.path().join("00000002.history")).unwrap();
    let fork: Lsn = history.split('\t').nth(1).unwrap().parse().unwrap();
    let size = SegmentSize::new(u64::from(segment_size_mb) << 20).unwrap();
    let compared = compare(&oracle, &reading, fork, size);
    assert!(compared >= 8, "only {compared} files: {:?}", names(oracle.folder.path()));
    let segments = oracle.segments();
    assert!(segments.iter().any(|name| name.starts_with("00000002")), "{segments:?}");
    walship_tests::note(&format!(
        "receive, {flush:?}, beside pg_receivewal, PostgreSQL {major}, {segment_size_mb} MiB segments: {compared} files the same"
    ));
}

#[test]
fn every_segment_is_as_pg_receivewal_has_it() {
    for major in majors() {
        through_everything(Flush::Async, major, 16);
    }
}

#[test]
fn small_segments_are_as_pg_receivewal_has_them() {
    for major in majors() {
        through_everything(Flush::Async, major, 1);
    }
}

#[test]
fn segments_that_went_through_the_spool_are_as_pg_receivewal_has_them() {
    through_everything(Flush::Local, newer_major(), 1);
    through_everything(Flush::Local, primary_major(), 16);
}

#[test]
fn large_segments_are_as_pg_receivewal_has_them() {
    for major in majors() {
        through_everything(Flush::Async, major, 64);
    }
}
