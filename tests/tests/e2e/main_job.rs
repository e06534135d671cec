//! The main job: archive, back up, lose a table, plan, restore to just before, and prove it. Then the same
//! across a promotion.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use walship_tests::postgres::{self, PgServer};
use walship_tests::stage::Stage;
use walship_tests::weed::WeedServer;

/// What was committed before somebody dropped the table, known from the production server itself.
#[derive(Debug)]
struct Mistake {
    /// The transaction that dropped the table.
    xid: String,
    /// Its commit time.
    time: String,
    /// The last entry of the ledger that was committed before.
    last_entry: u64,
    /// The contents of the dropped table.
    invoices: String,
}

/// Commits ledger entries one after the other (the lock makes commit order and entry order the same)
/// amid other transactions, until told to stop.
fn keep_busy(server: &PgServer, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let mut script = String::new();
        for _ in 0..20 {
            script.push_str(
                "BEGIN; SELECT pg_advisory_xact_lock(1); INSERT INTO ledger (note) VALUES (repeat('x', 200)); COMMIT;\n\
                 BEGIN; INSERT INTO noise SELECT g FROM generate_series(1, 50) g; ROLLBACK;\n\
                 BEGIN; INSERT INTO noise VALUES (1); SAVEPOINT s; UPDATE noise SET a = a + 1; ROLLBACK TO s; COMMIT;\n",
            );
        }
        server.psql(&script);
    }
}

fn ledger_last(server: &PgServer) -> u64 {
    server.psql("SELECT coalesce(max(id), 0) FROM ledger").parse().unwrap()
}

/// Runs the workload with the mistake in its middle.
fn work_and_make_the_mistake(server: &PgServer) -> Mistake {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..2).map(|_| scope.spawn(|| keep_busy(server, &stop))).collect();
        // Whatever happens here, the writers must end, or the scope never does.
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            server.wait_for("SELECT count(*) > 50 FROM ledger", "t");
            let invoices = server.psql("SELECT count(*), sum(amount) FROM invoices");
            let answer = server.psql(
                "BEGIN;\n\
                 SELECT pg_advisory_xact_lock(1);\n\
                 SELECT max(id) FROM ledger;\n\
                 DROP TABLE invoices;\n\
                 SELECT pg_current_xact_id();\n\
                 COMMIT;",
            );
            let lines: Vec<&str> = answer.lines().filter(|line| !line.is_empty()).collect();
            let (last_entry, xid) = (lines[0].parse().unwrap(), lines[1].to_owned());
            let time = server.psql(&format!(
                "SELECT to_char(pg_xact_commit_timestamp('{xid}'::xid), 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')"
            ));
            let much_later = ledger_last(server) + 50;
            server.wait_for(&format!("SELECT max(id) > {much_later} FROM ledger"), "t");
            Mistake { xid, time, last_entry, invoices }
        }));
        stop.store(true, Ordering::Relaxed);
        for writer in writers {
            writer.join().unwrap();
        }
        outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Asserts that exactly the commits before the mistake are there.
fn prove(restored: &PgServer, mistake: &Mistake) {
    restored.wait_for("SELECT pg_is_in_recovery()", "f");
    assert_eq!(restored.psql("SELECT count(*), sum(amount) FROM invoices"), mistake.invoices);
    assert_eq!(
        restored.psql("SELECT count(*), max(id) FROM ledger"),
        format!("{0}|{0}", mistake.last_entry),
        "every earlier commit and no later one; the server's log:\n{}",
        restored.log()
    );
}

fn production(stage: &Stage, major: u32, segment_size_mb: u32) -> PgServer {
    let server = stage
        .archiving(PgServer::builder(major))
        .wal_segment_size_mb(segment_size_mb)
        .setting("track_commit_timestamp", "on")
        .start();
    stage.init(&server);
    server.psql(
        "CREATE TABLE ledger (id bigint GENERATED ALWAYS AS IDENTITY (CACHE 1) PRIMARY KEY, note text);\n\
         CREATE TABLE noise (a int);\n\
         CREATE TABLE invoices AS SELECT g AS id, (g * 37 % 1000)::numeric / 10 AS amount FROM generate_series(1, 2000) g;",
    );
    server
}

fn the_main_job(stage: &Stage, major: u32, segment_size_mb: u32, by_time: bool) {
    let server = production(stage, major, segment_size_mb);
    stage.backup(&server);
    let mistake = work_and_make_the_mistake(&server);
    server.archive_now();
    assert_eq!(server.psql("SELECT failed_count FROM pg_stat_archiver"), "0", "log:\n{}", server.log());

    let target: Vec<&str> = if by_time {
        vec!["--to-time", &mistake.time, "--exclusive"]
    } else {
        vec!["--to-xid", &mistake.xid, "--exclusive"]
    };
    let plan = stage.ok(stage.pitr(&["plan", "--json"]).args(&target));
    let plan: serde_json::Value = serde_json::from_str(&plan).unwrap();
    assert_eq!(
        plan["plan"]["first_excluded"]["xid"].to_string(),
        mistake.xid,
        "the plan names the mistake: {plan:#}"
    );

    let data_dir = stage.path().join("restored");
    stage.ok(stage.pitr(&["restore", "--data-dir"]).arg(&data_dir).args(&target));
    accepted_by_pg_verifybackup(&server, &data_dir);
    let restored = stage.recovering(&data_dir).start();
    prove(&restored, &mistake);
    assert_eq!(
        restored.psql("SHOW archive_mode"),
        "off",
        "a copy does not archive into production's repository"
    );
}

fn accepted_by_pg_verifybackup(server: &PgServer, data_dir: &Path) {
    let output = server.run_tool("pg_verifybackup", &["-n", data_dir.to_str().unwrap()]);
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn a_dropped_table_comes_back_from_s3() {
    let weed = WeedServer::start();
    for (major, by_time) in postgres::majors().into_iter().zip([false, true].into_iter().cycle()) {
        let cluster = format!("pg{major}");
        the_main_job(&Stage::s3(&cluster, &weed.endpoint()).with_agent("auto"), major, 16, by_time);
    }
}

#[test]
fn a_dropped_table_comes_back_from_a_folder() {
    for (major, by_time) in postgres::majors().into_iter().zip([true, false].into_iter().cycle()) {
        the_main_job(&Stage::folder("main").with_agent("auto"), major, if by_time { 16 } else { 1 }, by_time);
    }
}

/// A standby takes over while the old primary dies; both archive into the same repository. The promotion's
/// history file, partial segment and new segments are archived without one failure, and a restore follows
/// the new timeline: what the old primary committed after the fork is not there.
#[test]
fn a_promotion_is_archived_and_a_restore_follows_it() {
    let stage = Stage::folder("main");
    let mut primary = production(&stage, postgres::primary_major(), 16);
    stage.backup(&primary);
    primary.psql("INSERT INTO ledger (note) SELECT 'before the fork' FROM generate_series(1, 10)");

    let standby_dir = stage.path().join("standby");
    let output =
        primary.run_tool("pg_basebackup", &["-D", standby_dir.to_str().unwrap(), "-R", "-c", "fast"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let standby = stage.recovering(&standby_dir).start();
    standby.wait_for("SELECT count(*) FROM ledger", "10");

    // The standby no longer follows: what the primary commits from here on is lost by the failover.
    standby.psql("ALTER SYSTEM SET primary_conninfo = ''; SELECT pg_reload_conf();");
    standby.wait_for("SELECT count(*) FROM pg_stat_wal_receiver", "0");
    let fork = standby.psql("SELECT pg_last_wal_replay_lsn()");
    primary.psql("INSERT INTO ledger (note) SELECT 'lost by the failover' FROM generate_series(1, 5)");
    primary.archive_now();
    primary.kill9();

    standby.promote();
    standby.psql("INSERT INTO ledger (note) SELECT 'after the fork' FROM generate_series(1, 7)");
    let last = standby.archive_now();
    assert!(last.starts_with("00000002"), "the new primary writes timeline 2: {last}");
    standby.wait_until_archived("00000002.history");
    assert_eq!(standby.psql("SELECT failed_count FROM pg_stat_archiver"), "0", "log:\n{}", standby.log());
    let expected = standby.psql("SELECT note, count(*) FROM ledger GROUP BY 1 ORDER BY 1");
    assert_eq!(expected, "after the fork|7\nbefore the fork|10");

    // By default the restore follows the newest timeline, and says which.
    let data_dir = stage.path().join("restored");
    let plan = stage.ok(&mut stage.pitr(&["plan", "--latest"]));
    assert!(plan.contains("timeline 2"), "{plan}");
    stage.ok(stage.pitr(&["restore", "--latest", "--data-dir"]).arg(&data_dir));
    let restored = stage.recovering(&data_dir).start();
    restored.wait_for("SELECT pg_is_in_recovery()", "f");
    assert_eq!(
        restored.psql("SELECT note, count(*) FROM ledger GROUP BY 1 ORDER BY 1"),
        expected,
        "fork at {fork}"
    );
    drop(restored);

    // The old timeline is still there for who asks for it.
    let data_dir = stage.path().join("restored-1");
    stage.ok(stage.pitr(&["restore", "--latest", "--timeline", "1", "--data-dir"]).arg(&data_dir));
    let restored = stage.recovering(&data_dir).start();
    restored.wait_for("SELECT pg_is_in_recovery()", "f");
    assert_eq!(
        restored.psql("SELECT note, count(*) FROM ledger GROUP BY 1 ORDER BY 1"),
        "before the fork|10\nlost by the failover|5"
    );
}
