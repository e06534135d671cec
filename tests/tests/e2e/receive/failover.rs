//! A standby takes over: the receiver follows by itself, both timelines restore, and whoever was left behind is
//! not taken for the primary.

use std::fs;
use std::time::Duration;

use nix::sys::signal::Signal;
use tempfile::TempDir;
use walship::pg::Lsn;
use walship_tests::bins;
use walship_tests::postgres::{PgServer, StopMode, majors, newer_major, primary_major};
use walship_tests::proxy::Mode;
use walship_tests::stage::Stage;
use walship_tests::{process, wait};

use super::{Flush, Front, Reading, Receiving, names, server, standby_of};

/// How the primary ends, and where the new timeline begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// It is shut down: standby and receiver have all of it.
    Clean,
    /// It is killed; the standby has all of it.
    Crash,
    /// It is killed while the receiver has more of it than the standby.
    CrashAhead,
    /// It is killed behind a switch of WAL: the new timeline begins with a segment.
    AtABoundary,
}

/// A primary, a standby, a repository with a base backup, and a receiver that knows both servers.
struct Scene {
    stage: Stage,
    primary: PgServer,
    standby: PgServer,
    fronts: [Front; 2],
    reading: Reading,
    receiving: Receiving,
    _folder: TempDir,
}

impl Scene {
    fn start(major: u32, flush: Flush) -> Self {
        let stage = Stage::folder("main");
        let primary = server(major, 1).setting("autovacuum", "off").start();
        stage.init(&primary);
        let standby = Self::standby(&primary, &stage);
        let fronts = [Front::of(&primary), Front::of(&standby.1)];
        let receiving = flush.receive(&stage, &Self::conninfo(&fronts));
        primary.wait_for("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'", "2");
        stage.backup(&primary);
        primary.psql("CREATE TABLE marks (mark text)");
        let reading = Reading::of(&stage);
        Self { stage, primary, standby: standby.1, fronts, reading, receiving, _folder: standby.0 }
    }

    /// A standby that finds history files in the repository, and follows none of them.
    fn standby(primary: &PgServer, stage: &Stage) -> (TempDir, PgServer) {
        let (folder, data) = standby_of(primary);
        let conninfo = format!("host=127.0.0.1 port={} user=postgres", primary.port());
        let standby = stage
            .recovering(&data)
            .setting("primary_conninfo", conninfo)
            .setting("restore_command", format!("'{}' %f %p", bins::restore_cmd().display()))
            .setting("recovery_target_timeline", "current")
            .setting("wal_retrieve_retry_interval", "100ms")
            .setting("archive_mode", "off")
            .start();
        (folder, standby)
    }

    fn conninfo(fronts: &[Front]) -> String {
        let hosts = vec!["127.0.0.1"; fronts.len()].join(",");
        let ports: Vec<String> = fronts.iter().map(|front| front.port().to_string()).collect();
        format!(
            "host={hosts} port={} user=postgres sslmode=disable target_session_attrs=primary",
            ports.join(",")
        )
    }

    fn mark(server: &PgServer, mark: &str) {
        server.psql(&format!("INSERT INTO marks VALUES ('{mark}')"));
    }

    /// Waits until the standby has replayed this mark.
    fn replayed(&self, mark: &str) {
        self.standby.wait_for(&format!("SELECT count(*) FROM marks WHERE mark = '{mark}'"), "1");
    }

    /// Waits until all that the server has written is durable in the repository.
    fn durable(&mut self, of: fn(&Self) -> &PgServer) {
        let lsn: Lsn = of(self).psql("SELECT pg_current_wal_flush_lsn()").parse().unwrap();
        self.receiving.wait_durable(lsn);
    }

    /// Waits until the receiver streams from the standby that was promoted.
    fn followed(&mut self) {
        self.standby.wait_for("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'", "1");
    }

    fn fail_over(&mut self, end: End) {
        match end {
            End::Clean => assert!(self.primary.stop(StopMode::Fast).success()),
            End::Crash => self.primary.kill9(),
            End::CrashAhead => {
                self.cut_the_standby_off();
                Self::mark(&self.primary, "lost by the standby");
                self.durable(|scene| &scene.primary);
                self.primary.kill9();
            }
            End::AtABoundary => {
                // Nobody writes anything behind the switch.
                let writer = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'background writer'";
                process::signal(self.primary.psql(writer).parse().unwrap(), Signal::SIGSTOP);
                let last = self.primary.switch_wal();
                self.durable(|scene| &scene.primary);
                let lsn = self.primary.psql("SELECT pg_current_wal_flush_lsn()");
                self.standby.wait_for(&format!("SELECT pg_last_wal_receive_lsn() >= '{lsn}'"), "t");
                wait::until("the last segment is stored", || self.reading.has(&last));
                self.primary.kill9();
            }
        }
        self.standby.promote();
        self.followed();
    }

    /// Starts the standby again without its connection to the primary.
    fn cut_the_standby_off(&mut self) {
        let data = self.standby.data_dir().to_owned();
        assert!(self.standby.stop(StopMode::Fast).success());
        self.standby = self
            .stage
            .recovering(&data)
            .setting("primary_conninfo", "")
            .setting("archive_mode", "off")
            .start();
        self.fronts[1].turn_to(&self.standby);
    }

    /// Restores and returns the marks.
    fn restored(&self, name: &str, target: &[&str]) -> String {
        let folder = self.stage.path().join(name);
        self.stage.ok(self.stage.pitr(&["restore"]).args(target).arg("-D").arg(&folder));
        let restored = self.stage.recovering(&folder).start();
        restored.wait_for("SELECT pg_is_in_recovery()", "f");
        let marks = restored.psql("SELECT string_agg(mark, ', ') FROM marks");
        drop(restored);
        fs::remove_dir_all(&folder).unwrap();
        marks
    }
}

fn through_a_failover(major: u32, end: End, flush: Flush) {
    let mut scene = Scene::start(major, flush);
    scene.primary.pgbench(&["-i", "-q", "-s", "1"]);
    Scene::mark(&scene.primary, "one");
    scene.primary.psql("SELECT pg_create_restore_point('on the first')");
    let first = scene.primary.switch_wal();
    Scene::mark(&scene.primary, "two");
    scene.replayed("two");
    scene.durable(|scene| &scene.primary);
    scene.fail_over(end);
    let begin: Lsn = scene
        .standby
        .psql("SELECT split_part(pg_read_file('pg_wal/00000002.history'), E'\\t', 2)")
        .trim()
        .parse()
        .unwrap();
    assert_eq!(begin.0.is_multiple_of(1 << 20), end == End::AtABoundary, "the fork is at {begin}");

    Scene::mark(&scene.standby, "three");
    scene.standby.psql("SELECT pg_create_restore_point('on the second')");
    let second = scene.standby.switch_wal();
    Scene::mark(&scene.standby, "four");
    scene.durable(|scene| &scene.standby);
    if flush == Flush::Local {
        // Durable was the spool's word; the end brings it into the repository.
        assert!(scene.receiving.terminate().success(), "{}", scene.receiving.said());
        assert!(!super::spool::anything_in(&scene.stage), "the spool is not empty");
    }
    wait::until("both segments are stored", || scene.reading.has(&first) && scene.reading.has(&second));
    assert_eq!(&second[..8], "00000002");
    assert!(!scene.receiving.said().contains("warning: the slot"), "{}", scene.receiving.said());

    let lost = if end == End::CrashAhead { ", lost by the standby" } else { "" };
    for (name, target, expected) in [
        ("a", vec!["--to-name", "on the first"], "one".to_owned()),
        ("b", vec!["--to-name", "on the second"], "one, two, three".to_owned()),
        ("c", vec!["--latest"], "one, two, three, four".to_owned()),
        ("d", vec!["--latest", "--timeline", "1"], format!("one, two{lost}")),
    ] {
        assert_eq!(scene.restored(name, &target), expected, "{end:?}, PostgreSQL {major}, {target:?}");
    }
    if flush != Flush::Local {
        assert!(scene.receiving.terminate().success(), "{}", scene.receiving.said());
    }
}

#[test]
fn a_failover_is_followed_and_both_timelines_restore() {
    let majors = majors();
    for (number, end) in [End::Clean, End::Crash, End::CrashAhead, End::AtABoundary].into_iter().enumerate() {
        through_a_failover(majors[number % majors.len()], end, Flush::Async);
    }
}

#[test]
fn a_failover_is_followed_with_a_spool_and_both_timelines_restore() {
    let majors = majors();
    for (number, end) in [End::CrashAhead, End::Clean, End::AtABoundary].into_iter().enumerate() {
        through_a_failover(majors[number % majors.len()], end, Flush::Local);
    }
}

#[test]
fn a_primary_that_was_left_behind_is_passed_over_and_refused() {
    let mut scene = Scene::start(primary_major(), Flush::Async);
    Scene::mark(&scene.primary, "one");
    scene.replayed("one");
    scene.durable(|scene| &scene.primary);
    scene.fail_over(End::Crash);
    Scene::mark(&scene.standby, "two");
    scene.durable(|scene| &scene.standby);
    let root = scene.stage.repository_dir().join("main/0001");
    let of_the_first = || {
        let folders = ["wal/00000001", "tail/00000001"].map(|folder| root.join(folder));
        folders.iter().flat_map(|folder| everything_in(folder)).collect::<Vec<_>>()
    };
    let before = of_the_first();

    // The old primary comes back on its own timeline, and is written to.
    scene.primary.start();
    Scene::mark(&scene.primary, "split");
    scene.primary.switch_wal();
    scene.fronts[0].turn_to(&scene.primary);
    scene.standby.psql("SELECT pg_terminate_backend(pid) FROM pg_stat_replication");
    wait::until("the old primary is passed over", || {
        scene.receiving.said().contains("a host was passed over")
            && scene.receiving.said().contains("was overtaken")
    });
    scene.followed();
    Scene::mark(&scene.standby, "three");
    scene.durable(|scene| &scene.standby);

    // While the right one is away it is waited for.
    assert!(scene.standby.stop(StopMode::Fast).success());
    wait::until("the right one is waited for", || {
        let said = scene.receiving.said();
        said.lines().any(|line| line.contains("was overtaken") && line.contains("trying again in"))
    });
    scene.standby.start();
    scene.fronts[1].turn_to(&scene.standby);
    scene.followed();
    Scene::mark(&scene.standby, "four");
    scene.durable(|scene| &scene.standby);

    // Alone it is refused, in three lines, before it gets a slot.
    let mut alone = Receiving::start(&scene.stage, &scene.fronts[0].conninfo(), &["--slot", "walship_b"]);
    assert_eq!(alone.wait().code(), Some(1), "{}", alone.said());
    let said = alone.said();
    for words in [
        "error: ",
        "was overtaken",
        "timeline 2",
        "safe:  nothing of it was stored",
        "next:  ",
        "--accept-overtaken",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
    assert_eq!(
        scene.primary.psql("SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'walship_b'"),
        "0"
    );
    assert_eq!(of_the_first(), before, "something of it was stored");

    // Unless it is wanted.
    let args = ["--slot", "walship_b", "--accept-overtaken", "--once"];
    let mut wanted = Receiving::start(&scene.stage, &scene.fronts[0].conninfo(), &args);
    assert!(wanted.wait().success(), "{}", wanted.said());
    assert!(of_the_first().len() > before.len());
    assert_eq!(scene.restored("a", &["--latest"]), "one, two, three, four");
    assert!(scene.receiving.terminate().success(), "{}", scene.receiving.said());
}

#[test]
fn a_new_primary_is_never_told_of_more_than_it_has_sent() {
    let mut scene = Scene::start(primary_major(), Flush::Async);
    scene.primary.switch_wal();
    Scene::mark(&scene.primary, "one");
    scene.replayed("one");
    // In the segment of the fork, and far behind it, is what the standby never had.
    scene.cut_the_standby_off();
    scene.primary.psql("INSERT INTO marks SELECT repeat('x', 1000) FROM generate_series(1, 200)");
    scene.durable(|scene| &scene.primary);
    let ahead: Lsn = scene.primary.psql("SELECT pg_current_wal_flush_lsn()").parse().unwrap();
    scene.primary.kill9();
    // Slow enough to be watched while it follows.
    scene.fronts[1].0.set(Mode::Latency(Duration::from_millis(300)));
    scene.standby.promote();
    let fork = scene.standby.psql("SELECT split_part(pg_read_file('pg_wal/00000002.history'), E'\\t', 2)");
    let fork: Lsn = fork.trim().parse().unwrap();
    assert_eq!(fork.0 >> 20, ahead.0 >> 20, "{fork} and {ahead} are in one segment");
    let mut before_the_fork = 0;
    wait::until("the new timeline is followed", || {
        let told = scene.standby.psql(
            "SELECT coalesce(r.flush_lsn, '0/0'), r.sent_lsn, coalesce(s.restart_lsn, '0/0'), pg_current_wal_flush_lsn() \
             FROM pg_stat_replication r, pg_replication_slots s",
        );
        let Ok([flush, sent, restart, own]) =
            <[Lsn; 4]>::try_from(told.split('|').filter_map(|lsn| lsn.parse().ok()).collect::<Vec<Lsn>>())
        else {
            return false;
        };
        assert!(own < ahead, "the new primary has written as much");
        assert!(
            flush <= sent && restart <= own,
            "told of {flush}, sent {sent}; slot at {restart}, WAL to {own}"
        );
        before_the_fork += u32::from(flush > Lsn::INVALID && sent <= fork);
        sent > fork && flush == sent
    });
    assert!(before_the_fork > 0, "nobody saw it before the fork");
    scene.fronts[1].0.set(Mode::Pass);
    Scene::mark(&scene.standby, "two");
    scene.durable(|scene| &scene.standby);
    assert_eq!(scene.restored("a", &["--latest"]), "one, two");
}

#[test]
fn a_server_of_another_cluster_among_the_hosts_is_passed_over() {
    let stage = Stage::folder("main");
    let (stranger, own) = (server(primary_major(), 1).start(), server(primary_major(), 1).start());
    stage.init(&own);
    let fronts = [Front::of(&stranger), Front::of(&own)];
    let mut receiving = Receiving::start(&stage, &Scene::conninfo(&fronts), &["--once"]);
    assert!(receiving.wait().success(), "{}", receiving.said());
    assert!(receiving.said().contains("a host was passed over: "), "{}", receiving.said());
    assert_eq!(stranger.psql("SELECT count(*) FROM pg_replication_slots"), "0");
}

#[test]
fn numbers_of_timelines_may_be_skipped() {
    let mut scene = Scene::start(newer_major(), Flush::Async);
    Scene::mark(&scene.primary, "one");
    scene.replayed("one");
    // Another standby was promoted and is gone again: its number is taken.
    let (_folder, other) = Scene::standby(&scene.primary, &scene.stage);
    other.promote();
    let history = other.data_dir().join("pg_wal/00000002.history");
    scene.stage.ok(scene.stage.walship(&["wal", "push"]).arg(&history));
    drop(other);
    Scene::mark(&scene.primary, "two");
    scene.replayed("two");
    scene.durable(|scene| &scene.primary);
    scene.fail_over(End::Crash);
    Scene::mark(&scene.standby, "three");
    let third = scene.standby.switch_wal();
    assert_eq!(&third[..8], "00000003");
    Scene::mark(&scene.standby, "four");
    scene.durable(|scene| &scene.standby);
    assert!(scene.receiving.said().contains("timeline 3 follows"), "{}", scene.receiving.said());
    assert_eq!(scene.restored("a", &["--latest"]), "one, two, three, four");
    assert_eq!(scene.restored("b", &["--latest", "--timeline", "1"]), "one, two");
    assert!(scene.receiving.terminate().success(), "{}", scene.receiving.said());
}

/// All files below a folder, by name, with their lengths.
fn everything_in(folder: &std::path::Path) -> Vec<(String, u64)> {
    let mut found = Vec::new();
    if !folder.exists() {
        return found;
    }
    for name in names(folder) {
        let path = folder.join(&name);
        if path.is_dir() {
            found.extend(everything_in(&path));
        } else {
            found.push((path.display().to_string(), fs::metadata(&path).unwrap().len()));
        }
    }
    found
}
