//! `pitr drill`: a restore that really runs, what it proves and what it finds, and that nothing is left of it.

mod ends;
mod whose;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use walship_tests::postgres::{PgBinaries, PgServer, StopMode, majors, newer_major, primary_major};
use walship_tests::stage::Stage;
use walship_tests::tmpfs::Tmpfs;
use walship_tests::{bins, process};

/// A server's archive: a backup with row 1, then each row in a segment of its own.
struct Origin {
    stage: Stage,
    server: PgServer,
    segments: Vec<String>,
}

impl Origin {
    fn make(major: u32) -> Self {
        Self::make_with(major, "select 1")
    }

    /// The same; `before` is run before the backup.
    fn make_with(major: u32, before: &str) -> Self {
        let stage = Stage::folder("main");
        let builder = stage.archiving(PgServer::builder(major).wal_segment_size_mb(1));
        let mut server = builder.setting("autovacuum", "off").start();
        stage.init(&server);
        server.psql("create database shop");
        server.psql("create table t (id int primary key); insert into t values (1)");
        server.psql(before);
        stage.backup(&server);
        let mut segments = Vec::new();
        for id in 2..=4 {
            server.psql(&format!("insert into t values ({id})"));
            segments.push(server.archive_now());
        }
        server.stop(StopMode::Fast);
        Self { stage, server, segments }
    }

    fn scratch(&self) -> PathBuf {
        self.stage.path().join("scratch")
    }

    /// `pitr drill` into the scratch folder.
    fn drill(&self, words: &[&str]) -> Command {
        let mut drill = self.stage.pitr_as_user(&["drill", "--scratch"]);
        drill.arg(self.scratch()).arg("--pg-bin").arg(self.server.binaries().server_bin()).args(words);
        drill
    }

    /// Runs a drill with `--json` that must end with this status; returns its report.
    fn report(&self, words: &[&str], status: i32) -> Value {
        let mut drill = self.drill(words);
        let output = self.stage.run(drill.arg("--json"));
        let (printed, said) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.status.code(), Some(status), "{words:?}\n{printed}\n{said}");
        assert_eq!(said.contains("error: "), status != 0, "{said}");
        serde_json::from_str(&printed).unwrap_or_else(|error| panic!("{error}: {printed}"))
    }

    /// A folder of checks with these files.
    fn checks(&self, files: &[(&str, &str)]) -> String {
        let folder = self.stage.path().join("checks");
        let _ = fs::remove_dir_all(&folder);
        for (name, text) in files {
            let path = folder.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        folder.to_str().unwrap().to_owned()
    }

    /// A `restore-cmd` that does this first for one segment.
    fn restore_cmd(&self, segment: &str, first: &str) -> String {
        let path = self.stage.path().join(format!("restore-cmd-{}", rand_word()));
        let real = bins::restore_cmd();
        let script = format!(
            "#!/bin/sh\ncase \"$*\" in *{segment}*) {first};; esac\nexec '{}' \"$@\"\n",
            real.display()
        );
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// Nothing is left of any drill: no folder, no process, no hold.
    fn assert_nothing_left(&self) {
        assert_eq!(self.stage.holds(), []);
        assert!(!self.scratch().exists(), "{:?}", fs::read_dir(self.scratch()).unwrap().collect::<Vec<_>>());
        assert_eq!(processes_of(&self.scratch()), Vec::<u32>::new());
    }

    /// The names of the WAL that is stored.
    fn stored_wal(&self) -> BTreeSet<PathBuf> {
        walk(&self.stage.repository_dir().join("main/0001/wal"))
    }
}

fn rand_word() -> String {
    tempfile::NamedTempFile::new().unwrap().path().file_name().unwrap().to_str().unwrap().to_owned()
}

fn walk(folder: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(walk(&path))
        } else {
            found.insert(path);
        }
    }
    found
}

/// PostgreSQL's processes that have this folder on their command line.
fn processes_of(folder: &Path) -> Vec<u32> {
    let is_one = |pid: &u32| {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).into_owned();
        command.contains(folder.to_str().unwrap())
            && command.split('\0').next().is_some_and(|program| program.ends_with("postgres"))
    };
    let pids = fs::read_dir("/proc").unwrap().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(is_one).collect()
}

fn proof<'a>(report: &'a Value, what: &str) -> (&'a str, &'a str) {
    let proofs = report["proofs"].as_array().unwrap();
    let found = proofs.iter().find(|proof| proof["what"] == what);
    let found = found.unwrap_or_else(|| panic!("{what}: {report:#}"));
    (found["verdict"].as_str().unwrap(), found["detail"].as_str().unwrap())
}

/// What the private server is must be told by itself, from within the drill.
const PRIVATE: &str = "select current_setting('listen_addresses') = '' \
    and current_setting('archive_mode') = 'off' and current_setting('shared_preload_libraries') = '' \
    and current_setting('data_directory') like '%/scratch/data' and current_setting('hba_file') like '%/scratch/%' \
    and current_setting('unix_socket_directories') like '%/scratch/socket' and not pg_is_in_recovery() \
    and current_setting('transaction_read_only') = 'on' \
    and not exists (select from pg_replication_slots) and not exists (select from pg_stat_wal_receiver)";

#[test]
fn a_drill_proves_what_is_there_and_leaves_nothing() {
    for major in majors() {
        let outside = tempfile::tempdir().unwrap();
        let space = outside.path().join("space");
        fs::create_dir(&space).unwrap();
        let mut origin = Origin::make_with(major, "select 1");
        // What the original has of its own must not be touched by a copy of its configuration.
        origin.server.start();
        let pid_file = outside.path().join("main.pid");
        origin.server.psql(&format!("create tablespace sp location '{}'", space.display()));
        origin.server.psql("create table in_space (id int) tablespace sp; insert into in_space values (7)");
        origin.server.psql(&format!("alter system set external_pid_file = '{}'", pid_file.display()));
        origin.server.psql("alter system set archive_command = 'false'");
        origin.server.psql("alter system set shared_preload_libraries = 'no_such_library'");
        origin.server.psql("alter system set listen_addresses = '*'");
        origin.server.psql("select pg_create_physical_replication_slot('of_the_original', true)");
        origin.stage.backup(&origin.server);
        origin.server.psql("insert into t values (5)");
        origin.server.archive_now();
        let before = (origin.stored_wal(), walk(outside.path()));

        let checks = origin.checks(&[
            ("private.sql", PRIVATE),
            ("rows.sql", "select id, null, 'a' from t where id > 2 order by id;\n"),
            ("rows.expected", "3||a\n4||a\n5||a\n"),
            ("shop/here.sql", "select current_database() = 'shop'"),
        ]);
        let words =
            ["--latest", "--checks", &checks, "--reason", "a \"test\" <b>", "--rto", "1h", "--rpo", "1d"];
        let report = origin.report(&words, 0);
        assert_eq!(report["outcome"], "proven", "{report:#}");
        for what in ["outcome", "amcheck", "row_counts", "checks", "pages"] {
            assert_eq!(proof(&report, what).0, "proven", "{what}: {report:#}");
        }
        assert_eq!(report["ended_lsn"], report["planned_lsn"]);
        let rows: Vec<(&str, u64)> = report["row_counts"]
            .as_array()
            .unwrap()
            .iter()
            .map(|count| (count["table"].as_str().unwrap(), count["rows"].as_u64().unwrap()))
            .collect();
        assert_eq!(rows, [("public.in_space", 1), ("public.t", 5)]);
        assert_eq!(report["objectives"]["rto"]["met"], true);
        assert_eq!(report["objectives"]["rpo"]["met"], true);
        let steps: Vec<_> =
            report["steps"].as_array().unwrap().iter().map(|step| step["name"].as_str().unwrap()).collect();
        let all =
            ["plan", "restore", "recovery", "amcheck", "row_counts", "checks", "stop", "pages", "clean_up"];
        assert_eq!(steps, all);
        origin.assert_nothing_left();
        assert_eq!(
            (origin.stored_wal(), walk(outside.path())),
            before,
            "a drill touches nothing of the original"
        );

        // The report is stored in three forms, and a record beside.
        let id = report["id"].as_str().unwrap();
        let home = origin.stage.repository_dir().join("main/0001");
        let read = |name: String| fs::read_to_string(home.join(name)).unwrap();
        let stored: Value = serde_json::from_str(&read(format!("drills/{id}/report.json"))).unwrap();
        assert_eq!(stored, report);
        assert!(read(format!("drills/{id}/report.txt")).starts_with(&format!("Drill {id}: proven\n")));
        let page = read(format!("drills/{id}/report.html"));
        assert!(page.contains("a &quot;test&quot; &lt;b&gt;") && page.ends_with("</html>\n"));
        let record: Value = serde_json::from_str(&read(format!("history/drills/{id}.json"))).unwrap();
        assert_eq!((&record["outcome"], &record["reason"]), (&report["outcome"], &report["reason"]));
        assert_eq!(record["recovery_millis"], report["objectives"]["rto"]["measured_millis"]);

        // Without a target: a moment by chance, in words.
        let said = origin.stage.ok(&mut origin.drill(&["--no-amcheck", "--count", "public.t"]));
        for words in [": proven\n", "chosen by chance", "skipped  pg_amcheck", "public.t"] {
            assert!(said.contains(words), "{words}: {said}");
        }
        origin.assert_nothing_left();
        // Into a folder that is there: it stays, empty. And kept, where that is asked for.
        fs::create_dir(origin.scratch()).unwrap();
        let xid = origin.server.psql("select xmin from t where id = 3");
        let report = origin.report(&["--before-xid", &xid, "--no-count", "--no-amcheck"], 0);
        assert!(proof(&report, "outcome").1.contains(&format!("transaction {xid} is not")), "{report:#}");
        assert_eq!(fs::read_dir(origin.scratch()).unwrap().count(), 0);
        let report = origin.report(&["--latest", "--no-count", "--no-amcheck", "--keep"], 0);
        assert!(report["kept"].as_str().unwrap().contains("rm -r "), "{report:#}");
        assert!(origin.scratch().join("data/PG_VERSION").exists());
        assert_eq!(processes_of(&origin.scratch()), Vec::<u32>::new());
        // It is started as it says, and is the private server again.
        let kept = report["kept"].as_str().unwrap();
        let start = kept.split("; start it with ").nth(1).unwrap().split("; remove it with ").next().unwrap();
        process::run_ok(process::unprivileged("sh").args(["-c", start]));
        let socket = origin.scratch().join("socket");
        let psql = |sql: &str| {
            let mut psql = origin.server.binaries().tool("psql");
            psql.env("PGHOST", &socket).args(["-XqAt", "-U", "postgres", "-c", sql]);
            process::run_ok(&mut psql).trim().to_owned()
        };
        assert_eq!(psql("select count(*), current_setting('archive_mode') from t"), "5|off");
        let mut stop = origin.server.binaries().unprivileged("pg_ctl");
        process::run_ok(stop.args(["stop", "-m", "immediate", "-D"]).arg(origin.scratch().join("data")));
        let said = origin.stage.fails(&mut origin.drill(&["--latest"]), 2);
        assert!(said.contains("--keep"), "{said}");
        assert!(origin.scratch().join("data/PG_VERSION").exists());
    }
}

#[test]
fn checks_that_fail_or_hang_are_told_one_by_one() {
    let origin = Origin::make(primary_major());
    let checks = origin.checks(&[
        ("answer.sql", "select id from t order by id"),
        ("answer.expected", "1\n2\n3\n4\n5\n"),
        ("error.sql", "select 1/0"),
        ("false.sql", "select false"),
        ("good.sql", "select count(*) = 4 from t"),
        ("hang.sql", "select pg_sleep(1000)"),
        ("leaves.sql", "commit; begin; delete from t; select true"),
        ("nothing.sql", "select true where false"),
        ("stubborn.sql", "set statement_timeout = 0; select pg_sleep(1000)"),
        ("syntax.sql", "selekt"),
        ("unlock.sql", "set transaction read write; delete from t; select true"),
        ("write.sql", "insert into t values (9) returning true"),
    ]);
    let report = origin.report(&["--latest", "--checks", &checks, "--check-timeout", "2"], 4);
    assert_eq!(report["outcome"], "not_proven");
    let results: Vec<(String, String)> = report["checks"]
        .as_array()
        .unwrap()
        .iter()
        .map(|check| (check["name"].as_str().unwrap().into(), check["result"].as_str().unwrap().into()))
        .collect();
    for (name, result) in &results {
        let expected = match name.as_str() {
            "good.sql" => "passed",
            "hang.sql" | "stubborn.sql" => "timed_out",
            _ => "failed",
        };
        assert_eq!(result, expected, "{name}: {report:#}");
    }
    assert_eq!(results.len(), 11);
    let detail = |name: &str| {
        let checks = report["checks"].as_array().unwrap();
        let check = checks.iter().find(|check| check["name"] == name).unwrap();
        check["detail"].as_str().unwrap_or_default().to_owned()
    };
    for (name, words) in [
        ("answer.sql", "expected:\n1\n2\n3\n4\n5\ngot:\n1\n2\n3\n4"),
        ("error.sql", "division by zero"),
        ("false.sql", "expected: one true\ngot 1 rows:\nf"),
        ("nothing.sql", "got 0 rows"),
        ("leaves.sql", "ended its transaction"),
        ("write.sql", "read-only transaction"),
        ("hang.sql", "within 2 s"),
    ] {
        assert!(detail(name).contains(words), "{name}: {}", detail(name));
    }
    let (verdict, told) = proof(&report, "checks");
    assert!(verdict == "failed" && told.starts_with("10 of 11 did not: answer.sql, error.sql"), "{told}");
    // The other proofs are there all the same.
    for what in ["outcome", "amcheck", "row_counts", "pages"] {
        assert_eq!(proof(&report, what).0, "proven", "{what}");
    }
    origin.assert_nothing_left();
}

#[test]
fn a_damaged_page_in_the_backup_is_found() {
    let major = primary_major();
    let stage = Stage::folder("main");
    let builder = stage.archiving(PgServer::builder(major).wal_segment_size_mb(1));
    let mut server = builder.setting("autovacuum", "off").start();
    stage.init(&server);
    server.psql(
        "create table t as select g as id, repeat('x', 500) from generate_series(1, 1000) g; checkpoint",
    );
    let file = server.data_dir().join(server.psql("select pg_relation_filepath('t')").trim());
    server.stop(StopMode::Fast);
    let mut bytes = fs::read(&file).unwrap();
    bytes[3 * 8192 + 4000] ^= 0xff;
    fs::write(&file, bytes).unwrap();
    server.start();
    let mut backup = stage.walship_on(&server, &["backup"]);
    stage.fails(&mut backup, 4);
    server.psql("create table u (id int)");
    let segments = vec![server.archive_now()];
    server.stop(StopMode::Fast);
    let origin = Origin { stage, server, segments };
    let report = origin.report(&["--latest"], 4);
    for what in ["amcheck", "row_counts", "pages"] {
        assert_eq!(proof(&report, what).0, "failed", "{what}: {report:#}");
    }
    assert!(proof(&report, "row_counts").1.contains("public.t"), "{report:#}");
    assert_eq!(proof(&report, "outcome").0, "proven");
    origin.assert_nothing_left();
}

#[test]
fn a_recovery_that_ends_early_or_not_at_all_is_no_proof() {
    let origin = Origin::make(primary_major());
    // The archive seems to end early, and the server opens with less in it.
    let early = origin.restore_cmd(&origin.segments[1], "exit 1");
    let report = origin.report(&["--latest", "--restore-cmd", &early], 4);
    let (verdict, told) = proof(&report, "outcome");
    assert!(verdict == "failed" && told.contains("the plan ends at"), "{report:#}");
    origin.assert_nothing_left();
    // To a target it does not open at all.
    let xid = xid_of_row(&origin, 3);
    let report = origin.report(&["--to-xid", &xid, "--restore-cmd", &early], 1);
    assert_eq!((&report["outcome"], report["proofs"].as_array().unwrap().len()), (&"failed".into(), 0));
    let error = report["trouble"]["error"].as_str().unwrap();
    assert!(error.contains("recovery ended before configured recovery target"), "{error}");
    assert!(report["trouble"]["safe"].as_str().unwrap().contains("cleaned up"), "{report:#}");
    origin.assert_nothing_left();
    // It hangs.
    let stuck = origin.restore_cmd(&origin.segments[1], "exec sleep 1000");
    let report = origin.report(&["--latest", "--restore-cmd", &stuck, "--start-timeout", "2"], 1);
    assert!(report["trouble"]["error"].as_str().unwrap().contains("no progress for 2 s"), "{report:#}");
    origin.assert_nothing_left();
    // It takes longer than it may, and is right.
    let slow = origin.restore_cmd(&origin.segments[1], "sleep 1.2");
    let report = origin.report(&["--latest", "--restore-cmd", &slow, "--rto", "1s"], 1);
    assert_eq!(report["outcome"], "objective_missed");
    assert_eq!(report["objectives"]["rto"]["met"], false);
    // The objective may stand in the environment, as in the file.
    let mut drill = origin.drill(&["--latest", "--restore-cmd", &slow, "--no-count", "--no-amcheck"]);
    let said = origin.stage.fails(drill.env("WALSHIP_RTO", "1s"), 1);
    assert!(said.contains("an objective was missed: RTO: "), "{said}");
    origin.assert_nothing_left();
}

fn xid_of_row(origin: &Origin, row: usize) -> String {
    let log = origin.stage.ok(&mut origin.stage.pitr(&["log", "--only", "commit", "--json"]));
    let log: Value = serde_json::from_str(&log).unwrap();
    let lines = log["lines"].as_array().unwrap();
    let at = lines.len() + row - 4 - 1;
    lines[at]["xid"].as_u64().unwrap().to_string()
}

#[test]
fn what_cannot_be_is_said_before_anything_is_written() {
    let origin = Origin::make(primary_major());
    let stage = &origin.stage;
    let drill = |scratch: &Path, words: &[&str]| {
        let mut drill = stage.pitr_as_user(&["drill", "--latest", "--scratch"]);
        drill.arg(scratch).args(words);
        drill
    };
    let scratch = origin.scratch();
    // Folders of somebody else.
    let data = origin.server.data_dir();
    for place in [data.to_owned(), data.join("base/scratch")] {
        let said = stage.fails(&mut drill(&place, &[]), 2);
        assert!(said.contains("a data directory") && said.contains("nothing was written"), "{said}");
    }
    let full = stage.path().join("full");
    fs::create_dir(&full).unwrap();
    fs::write(full.join("notes"), "x").unwrap();
    let said = stage.fails(&mut drill(&full, &[]), 2);
    assert!(said.contains("is not empty: it holds \"notes\""), "{said}");
    let said = stage.fails(&mut drill(&stage.repository_dir().join("scratch"), &[]), 2);
    assert!(said.contains("lies in the repository"), "{said}");
    // Too little room.
    let small = Tmpfs::mount(&stage.path().join("small"), "size=4m,mode=0777");
    let said = stage.fails(&mut drill(&small.path().join("scratch"), &[]), 1);
    assert!(said.contains("bytes at") && said.contains("are free"), "{said}");
    assert_eq!(fs::read_dir(small.path()).unwrap().count(), 0);
    // No server of that version.
    let other = PgBinaries::find(newer_major());
    let other = other.server_bin().to_str().unwrap();
    let said = stage.fails(&mut drill(&scratch, &["--pg-bin", other]), 1);
    assert!(said.contains(&format!("is of {}", newer_major())) && !said.contains("--start"), "{said}");
    // Checks that are none.
    let none = origin.checks(&[("notes.txt", "x")]);
    let said = stage.fails(&mut drill(&scratch, &["--checks", &none]), 2);
    assert!(said.contains("has 0 files NAME.sql"), "{said}");
    // A server that others could reach.
    for setting in ["listen_addresses=*", "archive_mode=on", "hba_file=/etc/x", "recovery_target_xid=7", "x"]
    {
        let said = stage.fails(&mut drill(&scratch, &["--set", setting]), 2);
        assert!(said.contains("nothing was written"), "{said}");
    }
    stage.fails(&mut drill(&scratch, &["--rto", "15"]), 2);
    if nix::unistd::geteuid().is_root() {
        let said = stage.fails(&mut stage.pitr(&["drill", "--latest"]), 2);
        assert!(said.contains("as root"), "{said}");
    }
    // A table that is not there to be counted is no proof.
    let report = origin.report(&["--latest", "--count", "public.gone", "--no-amcheck"], 4);
    assert!(proof(&report, "row_counts").1.contains("public.gone is in no database"), "{report:#}");
    // No way there.
    let said = stage.fails(&mut origin.drill(&["--to-name", "nowhere"]), 3);
    assert!(said.contains("nowhere"), "{said}");
    origin.assert_nothing_left();

    // No backup, so no window.
    let empty = Stage::folder("main");
    let server = empty.archiving(PgServer::builder(primary_major())).start();
    empty.init(&server);
    let mut drill = empty.pitr_as_user(&["drill", "--scratch"]);
    let said = empty.fails(drill.arg(&scratch), 3);
    assert!(said.contains("backup"), "{said}");
    assert!(!scratch.exists());
    let history = empty.repository_dir().join("main/0001/history/drills");
    let record = fs::read_to_string(walk(&history).pop_first().unwrap()).unwrap();
    assert!(record.contains("\"no_plan\""), "{record}");
}

#[test]
fn a_disk_that_fills_half_way_is_told_and_nothing_is_left() {
    let origin = Origin::make(primary_major());
    let stage = &origin.stage;
    let drill = |scratch: &Path, words: &[&str]| {
        let mut drill = stage.pitr_as_user(&["drill", "--latest", "--scratch"]);
        drill
            .arg(scratch.join("scratch"))
            .arg("--pg-bin")
            .arg(origin.server.binaries().server_bin())
            .args(words);
        stage.fails(&mut drill, 1)
    };
    // While files are restored: there is room for the bytes, but not for the files.
    let crowded = Tmpfs::mount(&stage.path().join("crowded"), "size=2g,nr_inodes=300,mode=0777");
    let said = drill(crowded.path(), &[]);
    assert!(said.contains("No space left on device") && said.contains("was cleaned up"), "{said}");
    assert_eq!(fs::read_dir(crowded.path()).unwrap().count(), 0);
    // While it recovers: somebody else takes the room.
    let taken = Tmpfs::mount(&stage.path().join("taken"), "size=200m,mode=0777");
    let filler = taken.path().join("filler");
    let fill = format!("dd if=/dev/zero of='{}' bs=64k 2>/dev/null", filler.display());
    let said = drill(taken.path(), &["--restore-cmd", &origin.restore_cmd(&origin.segments[1], &fill)]);
    assert!(said.contains("No space left on device") && said.contains("was cleaned up"), "{said}");
    let left: Vec<_> = fs::read_dir(taken.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(left, [filler]);
    assert_eq!((processes_of(taken.path()), stage.holds()), (vec![], vec![]));
    let records = walk(&stage.repository_dir().join("main/0001/history/drills"));
    let is_told = |record: &PathBuf| {
        let record = fs::read_to_string(record).unwrap();
        record.contains("No space left on device") && record.contains("\"failed\"")
    };
    assert_eq!(records.iter().filter(|record| is_told(record)).count(), 2, "both are on record");
}

/// A way on which replay would write outside the scratch folder is not gone.
#[test]
fn replay_creates_no_folder_outside() {
    let outside = tempfile::tempdir().unwrap();
    let mut origin = Origin::make(primary_major());
    origin.server.start();
    origin.server.psql(&format!("create tablespace late location '{}'", outside.path().display()));
    origin.server.archive_now();
    let said = origin.stage.fails(&mut origin.drill(&["--latest"]), 2);
    assert!(said.contains("creates tablespace") && said.contains("outside the scratch folder"), "{said}");
    origin.assert_nothing_left();
}

/// The settings of Debian's layout lie elsewhere, and so does the scratch folder when nobody names one.
#[test]
fn a_server_whose_configuration_is_elsewhere_is_drilled_too() {
    let mut origin = Origin::make(primary_major());
    let data_dir = origin.server.data_dir().to_owned();
    let elsewhere = origin.stage.path().join("postgresql.conf");
    let text = fs::read_to_string(data_dir.join("postgresql.conf")).unwrap();
    let paths = format!(
        "data_directory = '{0}'\nhba_file = '{0}/pg_hba.conf'\nwork_mem = '7MB'\nssl = on\nssl_cert_file = '/nowhere'\n",
        data_dir.display()
    );
    fs::write(&elsewhere, format!("{text}{paths}")).unwrap();
    fs::remove_file(data_dir.join("postgresql.conf")).unwrap();
    let server = origin.stage.recovering(&data_dir).setting("config_file", elsewhere.display());
    // It has the data directory, and goes with the test.
    let _original = std::mem::replace(&mut origin.server, server.setting("ssl", "off").start());
    let backups = origin.stage.ok(&mut origin.stage.walship_on(&origin.server, &["backup", "--json"]));
    let newest: Value = serde_json::from_str(&backups).unwrap();
    origin.server.psql("insert into t values (5)");
    origin
        .stage
        .ok(&mut origin.stage.walship_on(&origin.server, &["backup", "--incremental", "--source", "local"]));
    origin.server.psql("insert into t values (6)");
    origin.server.archive_now();
    origin.server.stop(StopMode::Fast);
    let checks = origin.checks(&[
        ("own.sql", "select current_setting('work_mem') = '7MB' and current_setting('config_file') like '%/settings/%'"),
        ("rows.sql", "select count(*) = 6 from t"),
    ]);
    let mut drill = origin.stage.pitr_as_user(&["drill", "--latest", "--json", "--checks", &checks]);
    let printed = origin.stage.ok(drill.arg("--pg-bin").arg(origin.server.binaries().server_bin()));
    let report: Value = serde_json::from_str(&printed).unwrap();
    assert_eq!(report["outcome"], "proven");
    // It was put together of two backups.
    assert_ne!(report["backup"], newest["id"], "{report:#}");
    assert_eq!(fs::read_dir(origin.stage.path().join("state")).unwrap().count(), 0);
    // By chance, behind a backup that is named.
    let id = report["backup"].as_str().unwrap().to_owned();
    let report = origin.report(&["--backup", &id, "--timeline", "1", "--no-count", "--no-amcheck"], 0);
    assert_eq!((report["backup"].as_str(), &report["target_by_chance"]), (Some(&*id), &true.into()));
}

#[test]
fn the_history_tells_what_was_done_and_shows_reports() {
    let origin = Origin::make(primary_major());
    let stage = &origin.stage;
    let pitr = |words: &[&str]| stage.ok(&mut stage.pitr(words));
    assert_eq!(pitr(&["history", "--only", "drill"]), "Nothing is on record.\n");
    let dir = stage.path().join("restored");
    let mut restore = stage.pitr(&["restore", "--latest", "--reason", "to \u{1b}[2J look", "-D"]);
    stage.ok(restore.arg(&dir));
    let quick = ["--latest", "--no-count", "--no-amcheck"];
    let report = origin.report(&quick, 0);
    let said = pitr(&["history"]);
    for words in
        ["drill    proven", "restore  restored", "backup   complete", "reason: to ?[2J look", "open after: "]
    {
        assert!(said.contains(words), "{words}: {said}");
    }
    assert!(said.find("drill ").unwrap() < said.find("restore ").unwrap(), "{said}");
    let shown = |words: &[&str]| -> Vec<String> {
        let history: Value = serde_json::from_str(&pitr(&[&["history", "--json"], words].concat())).unwrap();
        let entries = history["entries"].as_array().unwrap().clone();
        let kinds = entries.iter().map(|one| one["kind"].as_str().unwrap().to_owned());
        kinds.chain(history["more"].as_bool().unwrap().then(|| "more".to_owned())).collect()
    };
    // Changes: the configuration, noted by the backup, and the lineage.
    assert_eq!(shown(&[]), ["drill", "restore", "change", "backup", "change"]);
    assert_eq!(shown(&["--only", "backup,restore"]), ["restore", "backup"]);
    assert_eq!(shown(&["--limit", "2"]), ["drill", "restore", "more"]);
    let id = report["id"].as_str().unwrap();
    assert!(pitr(&["history", "--drill", id]).starts_with(&format!("Drill {id}: proven\n")));
    assert!(pitr(&["history", "--drill", id, "--html"]).starts_with("<!DOCTYPE html>"));
    let json: Value = serde_json::from_str(&pitr(&["history", "--drill", id, "--json"])).unwrap();
    assert_eq!(json, report);
    let said = stage.fails(&mut stage.pitr(&["history", "--drill", "20260101T000000Z-0000000000000000"]), 1);
    assert!(said.contains("there is no report"), "{said}");
    stage.fails(&mut stage.pitr(&["history", "--drill", "../../x"]), 2);

    // Where nothing may be written a drill is carried out all the same, and says that it is on no record.
    let locked = stage.repository_dir().join("main/0001/history");
    fs::set_permissions(&locked, fs::Permissions::from_mode(0o500)).unwrap();
    fs::rename(locked.join("drills"), locked.join("moved")).unwrap();
    fs::write(locked.join("drills"), "in the way").unwrap();
    let output = stage.run(&mut origin.drill(&quick));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("is not in the history of"), "{said}");
}
