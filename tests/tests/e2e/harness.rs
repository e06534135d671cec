//! The harness itself: what the other tests rely on.

use walship_tests::postgres::{self, PgServer, StopMode};
use walship_tests::{process, wait};

#[test]
fn servers_start_stop_crash_and_recover() {
    for major in postgres::majors() {
        let mut server = PgServer::builder(major).wal_segment_size_mb(1).setting("work_mem", "5MB").start();
        assert_eq!(
            server.psql("SELECT current_setting('server_version_num')::int / 10000"),
            major.to_string()
        );
        assert_eq!(server.psql("SHOW wal_segment_size; SHOW work_mem; SHOW data_checksums"), "1MB\n5MB\non");
        server.psql("CREATE TABLE t (a int); INSERT INTO t SELECT generate_series(1, 1000)");
        assert!(server.try_psql("SELECT * FROM missing").unwrap_err().contains("missing"));

        let backends = process::descendants(server.pid());
        assert!(backends.len() >= 4, "the postmaster's children are seen: {backends:?}");
        server.kill9();
        assert!(backends.iter().all(|pid| !process::is_alive(*pid)));
        server.start();
        assert!(server.log().contains("database system was not properly shut down"));
        assert_eq!(server.psql("SELECT count(*) FROM t"), "1000");

        assert!(server.stop(StopMode::Fast).success());
        server.start();
        assert_eq!(server.psql("SELECT sum(a) FROM t"), "500500");
    }
}

#[test]
fn an_archive_command_runs_and_a_standby_promotes() {
    let archive = tempfile::tempdir().unwrap();
    let server = PgServer::builder(postgres::primary_major())
        .setting("archive_mode", "on")
        .setting("archive_command", format!("cp %p '{}/%f'", archive.path().display()))
        .env("WALSHIP_HARNESS", archive.path())
        .start();
    let segment = server.archive_now();
    assert_eq!(std::fs::metadata(archive.path().join(segment)).unwrap().len(), 16 << 20);

    let copy = tempfile::tempdir().unwrap();
    let data = copy.path().join("data");
    let output = server.run_tool("pg_basebackup", &["-D", data.to_str().unwrap(), "-R", "-c", "fast"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let standby = PgServer::from_data_dir(&data).setting("archive_mode", "off").start();
    assert_eq!(standby.major(), server.major());
    server.psql("CREATE TABLE late AS SELECT 7 AS a");
    standby.wait_for("SELECT a FROM late", "7");
    standby.promote();
    standby.psql("INSERT INTO late VALUES (8)");
    assert_eq!(standby.system_identifier(), server.system_identifier());
}

#[test]
fn a_server_that_cannot_start_says_why() {
    let failure = PgServer::builder(postgres::primary_major()).setting("port_of_call", "1").try_start();
    assert!(failure.unwrap_err().contains("unrecognized configuration parameter"));
}

#[test]
fn a_guarded_child_dies_with_everything_below_it() {
    let mut command = process::guarded("sh");
    command.args(["-c", "sleep 600 & sleep 601"]);
    let mut child = process::spawn(command).unwrap();
    wait::until("both sleeps run", || process::descendants(child.id()).len() == 2);
    let below = process::descendants(child.id());
    process::kill_tree(&mut child);
    assert!(below.iter().all(|pid| !process::is_alive(*pid)));
}
