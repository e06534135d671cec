//! `flush = "local"`: a store's outage keeps nobody waiting while the spool has room, and nothing is lost after.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use walship::pg::Lsn;
use walship_tests::postgres::{PgServer, StopMode, newer_major, primary_major};
use walship_tests::stage::Stage;
use walship_tests::tmpfs::Tmpfs;
use walship_tests::wait;

use super::clients::{Clients, lost};
use super::{Flush, Front, Reading, Receiving, names, server};

/// Whether the stage's spool holds a file of any segment.
pub(super) fn anything_in(stage: &Stage) -> bool {
    let folder = Flush::spool(stage).join(stage.cluster());
    let lineages =
        fs::read_dir(&folder).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir());
    lineages.into_iter().any(|lineage| !names(&lineage.path()).is_empty())
}

fn lsn(server: &PgServer) -> Lsn {
    server.psql("SELECT pg_current_wal_flush_lsn()").parse().unwrap()
}

/// A repository whose calls end soon when it is away, and a server that waits for the receiver and keeps a copy of
/// what it archives.
struct Scene {
    stage: Stage,
    server: PgServer,
    front: Front,
    kept: tempfile::TempDir,
    away: PathBuf,
}

impl Scene {
    fn start(major: u32) -> Self {
        let stage = Stage::folder("main").configured("[limits]\ndeadline_ms = 500\n");
        let kept = tempfile::tempdir().unwrap();
        let server = server(major, 1)
            .setting("archive_mode", "on")
            .setting("archive_command", format!("cp %p '{}/%f'", kept.path().display()))
            .start();
        stage.init(&server);
        Clients::table(&server);
        let front = Front::of(&server);
        let away = stage.path().join("away");
        Self { stage, server, front, kept, away }
    }

    fn receive(&self, args: &[&str]) -> Receiving {
        let spool = Flush::spool(&self.stage);
        let mut all = vec!["--flush", "local", "--spool", spool.to_str().unwrap()];
        all.extend(args);
        Receiving::start(&self.stage, &self.front.conninfo(), &all)
    }

    fn wait_for_commits_of(&self, standby: &str) {
        self.server.psql(&format!("ALTER SYSTEM SET synchronous_standby_names = '{standby}'"));
        self.server.psql("SELECT pg_reload_conf()");
        self.server.wait_for("SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'", "1");
    }

    fn cut_off(&self) {
        fs::rename(self.stage.repository_dir(), &self.away).unwrap();
    }

    fn bring_back(&self) {
        fs::rename(&self.away, self.stage.repository_dir()).unwrap();
    }

    /// Compares every segment that the server archived behind `first`, up to `last`, with what is stored. Autovacuum may
    /// write others when nobody receives any more.
    fn compare(&self, first: &str, last: &str) -> usize {
        let reading = Reading::of(&self.stage);
        let wanted = |name: &String| name.len() == 24 && &**name > first && &**name <= last;
        let archived: Vec<String> = names(self.kept.path()).into_iter().filter(wanted).collect();
        for name in &archived {
            let stored = reading.file(name.parse().unwrap()).unwrap_or_else(|| panic!("{name} is missing"));
            assert!(stored == fs::read(self.kept.path().join(name)).unwrap(), "{name} differs");
        }
        archived.len()
    }
}

#[test]
fn commits_go_on_while_the_repository_is_away_until_the_spool_is_full() {
    let scene = Scene::start(primary_major());
    let first = scene.server.switch_wal();
    let mut receiving = scene.receive(&["--spool-mib-max", "16"]);
    scene.stage.backup(&scene.server);
    scene.wait_for_commits_of("walship");
    scene.cut_off();

    let notes = tempfile::tempdir().unwrap();
    let clients = Clients::start(&scene.server, notes.path(), 0);
    let begun = lsn(&scene.server);
    wait::until("some segments' worth of WAL is acknowledged", || {
        receiving.position("durable_lsn").0 > begun.0 + (2 << 20) || {
            scene.server.switch_wal();
            false
        }
    });
    assert!(receiving.said().contains("the spool keeps the WAL"), "{}", receiving.said());
    assert!(receiving.position("repository_lsn") <= begun);
    // What cannot be compressed fills it: then commits wait, and nothing more is acknowledged.
    let status = |key: &str| receiving.status().unwrap()[key].as_u64().unwrap();
    scene.server.psql(
        "SET synchronous_commit = local; CREATE TABLE noise AS \
         SELECT decode(string_agg(md5(random()::text || n), ''), 'hex') FROM generate_series(1, 1200000) n GROUP BY n / 100",
    );
    wait::until("the spool is full", || status("spool_bytes") >= 16 << 20);
    let told = receiving.position("durable_lsn");
    assert!(status("spool_bytes") < 22 << 20, "it keeps to its bound, up to the part that filled it");
    assert!(lsn(&scene.server) > told, "the server has more");
    scene.server.wait_for("SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event = 'SyncRep'", "t");

    // The clients commit without a pause, so one of them waits at most moments: what goes on is
    // their acknowledgements.
    let commits = || clients.so_far().iter().map(|client| client.last).sum::<u64>();
    let held_up = commits();
    scene.bring_back();
    let end = lsn(&scene.server);
    receiving.wait_durable(end);
    wait::until("commits go on", || commits() > held_up + 10);
    let acknowledged = clients.so_far();
    drop(clients);
    let last = scene.server.switch_wal();
    wait::until("the last segment is stored", || Reading::of(&scene.stage).has(&last));
    assert!(receiving.terminate().success(), "{}", receiving.said());
    assert!(!anything_in(&scene.stage), "all is in the repository");
    assert!(!receiving.said().contains("not in every repository yet"), "{}", receiving.said());
    scene.server.wait_until_archived(&last);
    assert!(scene.compare(&first, &last) >= 20);
    let data = scene.stage.path().join("restored");
    scene.stage.ok(scene.stage.pitr(&["restore", "--latest", "-D"]).arg(&data));
    let restored = scene.stage.recovering(&data).start();
    restored.wait_for("SELECT pg_is_in_recovery()", "f");
    assert_eq!(lost(&restored, &acknowledged), "");
}

#[test]
fn a_server_that_shuts_down_while_the_repository_is_away_is_not_held_up() {
    let mut scene = Scene::start(newer_major());
    let mut receiving = scene.receive(&[]);
    scene.server.wait_for("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'", "1");
    scene.stage.backup(&scene.server);
    scene.cut_off();
    scene.server.psql("INSERT INTO committed VALUES (1, 1, 1)");
    scene.server.switch_wal();
    let stopping = Instant::now();
    assert!(scene.server.stop(StopMode::Fast).success());
    assert!(stopping.elapsed() < Duration::from_secs(10), "held up for {:?}", stopping.elapsed());
    // Both are gone for good, and the store comes back.
    receiving.kill9();
    fs::remove_dir_all(scene.server.data_dir()).unwrap();
    scene.bring_back();
    let said = plan(&scene.stage);
    assert!(said.contains("walship receive --drain"), "{said}");
    assert!(Flush::Local.rescue(&scene.stage) >= 2);
    let said = plan(&scene.stage);
    assert!(!said.contains("--drain"), "{said}");
    let data = scene.stage.path().join("restored");
    scene.stage.ok(scene.stage.pitr(&["restore", "--latest", "-D"]).arg(&data));
    let restored = scene.stage.recovering(&data).start();
    restored.wait_for("SELECT pg_is_in_recovery()", "f");
    assert_eq!(restored.psql("SELECT count(*) FROM committed"), "1");
}

/// A plan for the end, made on the receiver's host.
fn plan(stage: &Stage) -> String {
    stage.ok(stage.pitr(&["plan", "--latest"]).env("WALSHIP_RECEIVE_SPOOL", Flush::spool(stage)))
}

#[test]
fn a_full_disk_of_the_spool_is_waited_for() {
    let scene = Scene::start(primary_major());
    let first = scene.server.switch_wal();
    let disk = Tmpfs::mount(&scene.stage.path().join("small"), "size=3m");
    let spool = disk.path().join("spool");
    let args = ["--flush", "local", "--spool", spool.to_str().unwrap(), "--tail-interval", "0"];
    let mut receiving = Receiving::start(&scene.stage, &scene.front.conninfo(), &args);
    scene.wait_for_commits_of("walship");
    scene.cut_off();
    scene.server.psql(
        "SET synchronous_commit = local; CREATE TABLE noise AS \
         SELECT decode(string_agg(md5(random()::text || n), ''), 'hex') FROM generate_series(1, 500000) n GROUP BY n / 100",
    );
    wait::until("the full disk is noticed", || receiving.said().contains("No space left on device"));
    scene.bring_back();
    let last = scene.server.switch_wal();
    wait::until("the last segment is stored", || Reading::of(&scene.stage).has(&last));
    assert!(receiving.terminate().success(), "{}", receiving.said());
    scene.server.wait_until_archived(&last);
    assert!(scene.compare(&first, &last) >= 5);
}

#[test]
fn a_spool_is_used_by_one_receiver_and_named_by_its_operator() {
    let scene = Scene::start(primary_major());
    let mut receiving = scene.receive(&[]);
    scene.server.wait_for("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'", "1");
    let mut second = scene.receive(&["--slot", "walship_b"]);
    assert_eq!(second.wait().code(), Some(1));
    assert!(second.said().contains("another process uses the spool"), "{}", second.said());
    let spool = Flush::spool(&scene.stage);
    let drain = ["receive", "--drain", "--spool", spool.to_str().unwrap()];
    let output = scene.stage.run(&mut scene.stage.walship(&drain));
    assert_eq!(output.status.code(), Some(1));
    let mut nameless = Receiving::start(&scene.stage, &scene.front.conninfo(), &["--flush", "local"]);
    assert_eq!(nameless.wait().code(), Some(1));
    assert!(nameless.said().contains("no folder is named for the spool"), "{}", nameless.said());
    let missing = ["--flush", "local", "--spool", "/nowhere/at/all"];
    let mut missing = Receiving::start(&scene.stage, &scene.front.conninfo(), &missing);
    assert_eq!(missing.wait().code(), Some(1));
    assert!(missing.said().contains("its parent must exist"), "{}", missing.said());
    assert!(receiving.terminate().success(), "{}", receiving.said());
}

/// A part in the middle of the spool that is damaged was acknowledged: nothing is cut off or skipped.
#[test]
fn damage_in_the_spool_is_told_and_left_as_it_is() {
    let scene = Scene::start(primary_major());
    let mut receiving = scene.receive(&["--tail-interval", "0"]);
    scene.server.wait_for("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'", "1");
    for _ in 0..20 {
        scene.server.psql("INSERT INTO committed VALUES (1, 1, 1)");
        receiving.wait_durable(lsn(&scene.server));
    }
    receiving.kill9();
    let folder = Flush::spool(&scene.stage).join("main");
    let lineage =
        fs::read_dir(&folder).unwrap().flatten().find(|entry| entry.path().is_dir()).unwrap().path();
    let file = lineage.join(&names(&lineage)[0]);
    let mut bytes = fs::read(&file).unwrap();
    bytes[150] ^= 1;
    fs::write(&file, &bytes).unwrap();
    let spool = Flush::spool(&scene.stage);
    let drain = scene.stage.walship(&["receive", "--drain", "--spool", spool.to_str().unwrap()]);
    refused(scene.stage.run(&mut { drain }), &file);
    let mut again = scene.receive(&[]);
    assert_eq!(again.wait().code(), Some(1));
    assert!(again.said().contains("walship wal push"), "{}", again.said());
    assert_eq!(fs::read(&file).unwrap(), bytes);
}

fn refused(output: std::process::Output, file: &Path) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains(&file.display().to_string()) && said.contains("safe:  nothing was removed"),
        "{said}"
    );
}
