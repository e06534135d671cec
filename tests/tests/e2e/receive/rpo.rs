//! `flush = "repository"`: what was acknowledged is there when only the repository survives. `flush = "local"`: when that
//! and the spool do.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;
use walship::pg::{Lsn, SegmentName, SegmentSize, TimelineId, WalFileName};
use walship_tests::postgres::{PgServer, newer_major, primary_major};
use walship_tests::random::Random;
use walship_tests::stage::Stage;
use walship_tests::wait;
use walship_tests::weed::WeedServer;

use super::clients::{Acknowledged, Clients, commits, lost};
use super::{Flush, Reading, Receiving, names, server, standby_of};

/// So many disasters follow each other on one base backup: what was restored is the next one's primary.
const DISASTERS_OF_A_LIFE: usize = 6;

#[test]
fn no_acknowledged_commit_is_lost_when_only_a_folder_survives() {
    disasters(Flush::Repository, "a folder", 12, 200, |_| Stage::folder("main"));
}

#[test]
fn no_acknowledged_commit_is_lost_when_a_folder_and_the_spool_survive() {
    disasters(Flush::Local, "a folder and the spool", 12, 200, |_| Stage::folder("main"));
}

#[test]
fn no_acknowledged_commit_is_lost_when_only_s3_survives() {
    let weed = WeedServer::start();
    disasters(Flush::Repository, "S3", 6, 200, |life| Stage::s3(&format!("life-{life}"), &weed.endpoint()));
}

fn disasters(
    flush: Flush,
    store: &str,
    rounds: usize,
    rounds_in_the_campaign: usize,
    stage: impl Fn(usize) -> Stage,
) {
    let rounds = if walship_tests::campaign() { rounds_in_the_campaign } else { rounds };
    let seed = walship_tests::seed();
    let mut random = Random::new(seed ^ store.len() as u64);
    let (mut left, mut number, mut acknowledged, mut rescued) = (rounds, 0, 0, 0);
    while left > 0 {
        let of_this = left.min(DISASTERS_OF_A_LIFE);
        let (major, size) =
            [(primary_major(), 1), (newer_major(), 16), (newer_major(), 1), (primary_major(), 16)]
                [number % 4];
        let mut life = Life::begin(flush, stage(number), major, size);
        for round in 0..of_this {
            life.disaster(round, &mut random);
        }
        acknowledged += commits(&life.acknowledged);
        rescued += life.rescued;
        (left, number) = (left - of_this, number + 1);
    }
    assert!(acknowledged > rounds as u64 * 20, "only {acknowledged} commits");
    // The spool had what the repository had not.
    assert_eq!(rescued > 0, flush == Flush::Local);
    walship_tests::note(&format!(
        "receive, {flush:?}: {rounds} rounds, seed {seed}, everything but {store} lost: {acknowledged} acknowledged \
         commits, none lost; {rescued} segments and parts out of spools"
    ));
}

/// A cluster that dies again and again.
struct Life {
    flush: Flush,
    stage: Stage,
    server: PgServer,
    data: PathBuf,
    receiving: Receiving,
    /// Outside of everything that dies.
    notes: TempDir,
    acknowledged: Vec<Acknowledged>,
    rescued: u64,
}

impl Life {
    fn begin(flush: Flush, stage: Stage, major: u32, segment_size_mb: u32) -> Self {
        let server = server(major, segment_size_mb).start();
        stage.init(&server);
        Clients::table(&server);
        let receiving = flush.receive(&stage, &server.uri());
        stage.backup(&server);
        require_walship(&server);
        let data = server.data_dir().to_owned();
        let notes = tempfile::tempdir().unwrap();
        Self { flush, stage, server, data, receiving, notes, acknowledged: Vec::new(), rescued: 0 }
    }

    /// Load, death of everything, restore, look, and on with what was restored.
    fn disaster(&mut self, round: usize, random: &mut Random) {
        let clients = Clients::start(&self.server, self.notes.path(), round);
        std::thread::sleep(Duration::from_millis(100 + random.below(900) as u64));
        if random.chance(0.3) {
            self.server.psql(if random.chance(0.5) { "SELECT pg_switch_wal()" } else { "CHECKPOINT" });
        }
        if random.chance(0.3) {
            self.receiving.kill9();
            self.receiving = self.flush.receive(&self.stage, &self.server.uri());
            std::thread::sleep(Duration::from_millis(random.below(1000) as u64));
        }
        if random.chance(0.5) {
            self.receiving.kill9();
            self.server.kill9();
        } else {
            self.server.kill9();
            self.receiving.kill9();
        }
        self.acknowledged.extend(clients.end());
        fs::remove_dir_all(&self.data).unwrap();
        let _ = fs::remove_dir_all(self.stage.path().join("state"));
        self.rescued += self.flush.rescue(&self.stage);

        self.data = self.stage.path().join(format!("restored-{round}"));
        self.stage.ok(self.stage.pitr(&["restore", "--latest", "-D"]).arg(&self.data));
        self.server = self.stage.recovering(&self.data).start();
        self.server.wait_for("SELECT pg_is_in_recovery()", "f");
        let lost = lost(&self.server, &self.acknowledged);
        assert_eq!(lost, "", "after round {round}; the server's log:\n{}", self.server.log());
        self.receiving = self.flush.receive(&self.stage, &self.server.uri());
        require_walship(&self.server);
    }
}

/// Lets every commit wait for the receiver from now on.
fn require_walship(server: &PgServer) {
    server.psql("ALTER SYSTEM SET synchronous_standby_names = 'walship'");
    server.psql("SELECT pg_reload_conf()");
    server.wait_for("SELECT sync_state FROM pg_stat_replication WHERE application_name = 'walship'", "sync");
}

/// A standby that has only the repository, and archives what it gets once more.
fn standby_on(stage: &Stage, data: &Path) -> PgServer {
    stage
        .archiving(PgServer::from_data_dir(data))
        .setting("archive_mode", "always")
        .setting("primary_conninfo", "")
        .setting("synchronous_standby_names", "")
        .setting("restore_command", format!("'{}' %f %p", walship_tests::bins::restore_cmd().display()))
        .setting("wal_retrieve_retry_interval", "100ms")
        .setting("recovery_target_timeline", "latest")
        .start()
}

#[test]
fn a_standby_that_has_only_the_repository_takes_over_without_loss() {
    let stage = Stage::folder("main");
    let mut primary = server(primary_major(), 1).start();
    stage.init(&primary);
    Clients::table(&primary);
    let mut receiving = Flush::Repository.receive(&stage, &primary.uri());
    stage.backup(&primary);
    let (_folder, data) = standby_of(&primary);
    let standby = standby_on(&stage, &data);
    require_walship(&primary);

    let notes = tempfile::tempdir().unwrap();
    let clients = Clients::start(&primary, notes.path(), 0);
    // It replays from the repository while all is well, and is handed ever longer files of the open segment.
    wait::until("the standby has some of it", || {
        standby.try_psql("SELECT count(*) > 400 FROM committed").is_ok_and(|answer| answer == "t")
    });
    primary.kill9();
    receiving.kill9();
    let acknowledged = clients.end();
    fs::remove_dir_all(primary.data_dir()).unwrap();
    wait::until("the standby has all of it", || lost(&standby, &acknowledged).is_empty());
    let replayed: Lsn = standby.current_lsn().parse().unwrap();
    standby.promote();
    assert_eq!(lost(&standby, &acknowledged), "");

    // The open segment was archived again, short as it is: beside the whole segment's name.
    let size = SegmentSize::MIN;
    let open = SegmentName::ending_at(TimelineId::FIRST, replayed, size).unwrap();
    standby.psql("CREATE TABLE afterwards AS SELECT 7 AS a");
    standby.archive_now();
    let reading = Reading::of(&stage);
    assert!(!reading.has(&open.to_string()), "{open} took the name of a whole segment");
    let folder = stage.repository_dir().join("main/0001/wal/00000001/00000000");
    let kept: Vec<String> = names(&folder)
        .into_iter()
        .filter(|name| name.starts_with(&open.to_string()) && name.contains(".incomplete."))
        .collect();
    assert!(!kept.is_empty(), "{open} was not archived again: {:?}", names(&folder));
    assert_eq!(standby.psql("SELECT failed_count FROM pg_stat_archiver"), "0", "{}", standby.log());
    assert!(reading.file(WalFileName::History(TimelineId::new(2).unwrap())).is_some());

    // And from all that, the same again.
    let restored = stage.path().join("restored");
    stage.ok(stage.pitr(&["restore", "--latest", "-D"]).arg(&restored));
    let restored = stage.recovering(&restored).start();
    restored.wait_for("SELECT pg_is_in_recovery()", "f");
    assert_eq!(restored.psql("SELECT a FROM afterwards"), "7");
    assert_eq!(lost(&restored, &acknowledged), "");
}
