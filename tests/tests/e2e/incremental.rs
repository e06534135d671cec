//! Incremental backups: only what changed is stored, and chains are put together as PostgreSQL's own tool does it.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;
use walship::catalog::BackupRecord;
use walship::pg::BackupManifest;
use walship_tests::postgres::{PgServer, StopMode, majors, newer_major, primary_major};
use walship_tests::stage::Stage;
use walship_tests::{process, wait};

use crate::backup::unpack;

const LOCAL: &[&str] = &["--source", "local", "--workers", "3"];

/// The versions and sources that give incremental backups.
fn ways() -> Vec<(u32, &'static [&'static str])> {
    let local = majors().into_iter().map(|major| (major, LOCAL));
    let streamed = majors().into_iter().filter(|major| *major >= 17).map(|major| (major, &[][..]));
    local.chain(streamed).collect()
}

fn started(stage: &Stage, major: u32) -> PgServer {
    // Which files change between two backups is the test's to say.
    let mut builder = PgServer::builder(major).setting("autovacuum", "off");
    if major >= 17 {
        builder = builder.setting("summarize_wal", "on");
    }
    let server = stage.archiving(builder).start();
    stage.init(&server);
    server
}

fn taken(stage: &Stage, server: &PgServer, words: &[&str]) -> BackupRecord {
    let output = stage.run(stage.walship_on(server, &["backup", "--json"]).args(words));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let record: BackupRecord = serde_json::from_slice(&output.stdout).unwrap();
    // Which pages were looked at is said.
    let sent = record.parent.is_some() && !words.contains(&"local");
    assert_eq!(said.contains("and no other page"), sent, "{said}");
    record
}

fn folder_of(stage: &Stage, id: &str) -> PathBuf {
    stage.repository_dir().join(stage.cluster()).join("0001/backups").join(id)
}

fn restored(stage: &Stage, record: &BackupRecord, name: &str, words: &[&str]) -> PathBuf {
    let data = stage.path().join(name);
    let mut command = stage.pitr(&["restore", "--immediate", "--backup", &record.id, "-D"]);
    stage.ok(command.arg(&data).args(words));
    data
}

/// PostgreSQL's own tool finds every file as the manifest says.
fn is_whole(server: &PgServer, data: &Path) {
    let verify = server.run_tool("pg_verifybackup", &["-n", data.to_str().unwrap()]);
    assert!(verify.status.success(), "{}", String::from_utf8_lossy(&verify.stderr));
    let label = fs::read_to_string(data.join("backup_label")).unwrap();
    assert!(!label.contains("INCREMENTAL"), "{label}");
}

const SUMS: &str = "SELECT (SELECT sum(g) || max(t) FROM large), (SELECT count(*) FROM pg_class)";

/// Changes rows here and there, and relations in every way: cut off, grown, moved, dropped, new.
fn change(server: &PgServer, round: u32) {
    server.psql(&format!(
        "UPDATE large SET t = 'round {round}' WHERE g % 5000 = {round};
         CREATE TABLE new_{round} AS SELECT g FROM generate_series(1, 3000) g;
         DELETE FROM shrinking WHERE g > 20000 / ({round} + 1);
         INSERT INTO growing SELECT g, repeat('x', 100) FROM generate_series(1, 5000) g"
    ));
    server.psql("VACUUM shrinking");
    match round {
        1 => server.psql("TRUNCATE gone_and_back; DROP TABLE dropped; VACUUM FULL rewritten"),
        _ => server.psql("INSERT INTO gone_and_back SELECT generate_series(1, 20000)"),
    };
    server.psql("CHECKPOINT");
}

fn fill(server: &PgServer) {
    server.psql(
        "CREATE TABLE large AS SELECT g, repeat(md5(g::text), 10) AS t FROM generate_series(1, 60000) g;
         CREATE INDEX ON large (g);
         CREATE TABLE shrinking AS SELECT g, repeat('s', 100) AS t FROM generate_series(1, 20000) g;
         CREATE TABLE growing AS SELECT g, repeat('g', 100) AS t FROM generate_series(1, 5000) g;
         CREATE TABLE rewritten AS SELECT g FROM generate_series(1, 5000) g;
         CREATE TABLE dropped AS SELECT g FROM generate_series(1, 5000) g;
         CREATE TABLE gone_and_back AS SELECT g FROM generate_series(1, 20000) g;
         CREATE UNLOGGED TABLE unlogged AS SELECT g FROM generate_series(1, 1000) g",
    );
    server.psql("VACUUM");
    server.psql("CHECKPOINT");
}

#[test]
fn a_chain_is_put_together_as_it_was() {
    for (major, words) in ways() {
        let stage = Stage::folder("main");
        let mut server = started(&stage, major);
        fill(&server);
        let space = TempDir::new().unwrap();
        server.psql(&format!("CREATE TABLESPACE fast LOCATION '{}'", space.path().display()));
        server.psql("CREATE TABLE there TABLESPACE fast AS SELECT g FROM generate_series(1, 20000) g");
        let full = taken(&stage, &server, &[&["--incremental"], words].concat());
        assert!(full.parent.is_none(), "there is nothing to build on yet");
        let mut below = full.clone();
        for depth in 1..=3 {
            change(&server, depth);
            server.psql(&format!("UPDATE there SET g = g WHERE g = {depth}; CHECKPOINT"));
            let record = taken(&stage, &server, &[&["--incremental"], words].concat());
            let parent = record.parent.clone().unwrap();
            assert_eq!((&parent.id, parent.start_lsn, parent.depth), (&below.id, below.start_lsn, depth));
            assert!(
                record.stored_bytes * 4 < full.stored_bytes,
                "{} of {}",
                record.stored_bytes,
                full.stored_bytes
            );
            let files = &record.data_bytes;
            assert!(*files * 10 > full.data_bytes * 9 && record.tablespaces[0].bytes > 100_000, "{files}");
            below = record;
        }
        let expected = server.psql(SUMS);
        let mapping = format!("{}={}/restored-space", space.path().display(), stage.path().display());
        let mapped = ["--tablespace-mapping", &mapping];
        let data = restored(&stage, &below, "restored", &mapped);
        is_whole(&server, &data);
        let started = stage.recovering(&data).start();
        started.wait_for("SELECT pg_is_in_recovery()", "f");
        assert_eq!(started.psql(SUMS), expected, "{major} {words:?}");
        assert_eq!(
            started.psql("SELECT count(*), sum(g) FROM there"),
            server.psql("SELECT count(*), sum(g) FROM there")
        );
        assert_eq!(started.psql("SELECT count(*) FROM unlogged"), "0");
        let sound = started.try_psql("CREATE EXTENSION amcheck; SELECT bt_index_check('large_g_idx', true)");
        assert!(sound.is_ok(), "{sound:?}");
        drop(started);

        // Over what production became since, and what the restored server became.
        change(&server, 4);
        server.stop(StopMode::Fast);
        let mut command = stage.pitr(&[
            "restore",
            "--immediate",
            "--backup",
            &below.id,
            "--delta",
            "--yes",
            "--json",
            "-D",
        ]);
        let report: Value = serde_json::from_str(&stage.ok(command.arg(&data).args(mapped))).unwrap();
        let delta = &report["report"]["delta"];
        assert!(delta["kept_bytes"].as_u64().unwrap() * 10 > below.data_bytes * 9, "{report}");
        is_whole(&server, &data);
    }
}

/// The files of a directory that was put together that its manifest lists, but for the one that a restore writes anew.
fn files_of(data: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let manifest = BackupManifest::parse(&fs::read(data.join("backup_manifest")).unwrap()).unwrap();
    let mut files: Vec<_> = manifest.files.into_iter().map(|file| file.path).collect();
    files.retain(|path| path != Path::new("postgresql.auto.conf"));
    files.sort();
    files.into_iter().map(|path| (path.clone(), fs::read(data.join(path)).unwrap())).collect()
}

#[test]
fn postgresqls_own_tool_makes_the_same_of_it() {
    for words in [LOCAL, &[]] {
        let stage = Stage::folder("main");
        let server = started(&stage, newer_major());
        fill(&server);
        let mut records = vec![taken(&stage, &server, words)];
        for round in 1..=2 {
            change(&server, round);
            // One of each kind: either can build on the other.
            let words = if round == 1 { words } else { &["--source", "local"] };
            records.push(taken(&stage, &server, &[&["--incremental"], words].concat()));
        }
        let mut levels = Vec::new();
        for (number, record) in records.iter().enumerate() {
            let (data, beside) =
                (stage.path().join(format!("level-{number}")), stage.path().join("no-spaces"));
            unpack(record, &folder_of(&stage, &record.id), &data, &beside);
            levels.push(data);
        }
        let combined = stage.path().join("combined");
        let mut tool = server.tool("pg_combinebackup");
        tool.args(&levels).arg("-o").arg(&combined);
        process::run_ok(&mut tool);
        let ours = restored(&stage, records.last().unwrap(), "ours", &[]);
        is_whole(&server, &ours);
        let (theirs, ours) = (files_of(&combined), files_of(&ours));
        let names =
            |files: &[(PathBuf, Vec<u8>)]| files.iter().map(|(path, _)| path.clone()).collect::<Vec<_>>();
        assert_eq!(names(&theirs), names(&ours));
        for ((path, theirs), (_, ours)) in theirs.iter().zip(&ours) {
            assert!(theirs == ours, "{path:?} differs");
        }
    }
}

#[test]
fn a_full_backup_is_taken_where_nothing_can_be_built_on() {
    let stage = Stage::folder("main");
    let server = started(&stage, primary_major());
    let said = |words: &[&str]| {
        let output = stage.run(stage.walship_on(&server, &["backup", "--json", "--incremental"]).args(words));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let record: BackupRecord = serde_json::from_slice(&output.stdout).unwrap();
        (record, String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (first, why) = said(LOCAL);
    assert!(first.parent.is_none() && why.contains("there is no complete backup"), "{why}");
    let (streamed, why) = said(&[]);
    assert!(streamed.parent.is_none() && why.contains("--source local makes them"), "{why}");
    let chained = [LOCAL, &["--chain-max", "1"]].concat();
    let (second, _) = said(&chained);
    assert_eq!(second.parent.as_ref().unwrap().id, streamed.id);
    let (third, why) = said(&chained);
    assert!(third.parent.is_none() && why.contains("1 incremental backups"), "{why}");
    let named = [LOCAL, &["--parent", &second.id]].concat();
    let (fourth, _) = said(&named);
    assert_eq!(fourth.parent.as_ref().map(|parent| parent.depth), Some(2));

    // Who names one wants that one.
    let mut command = stage.walship_on(&server, &["backup", "--incremental", "--parent", "nobody"]);
    let refused = stage.fails(command.args(LOCAL), 1);
    assert!(refused.contains("no complete backup \"nobody\"") && refused.contains("\nnext:  "), "{refused}");

    // Without one below it, a backup is none.
    let catalog = stage.repository_dir().join("main/0001/backups/catalog");
    let mut records = fs::read_dir(catalog).unwrap().map(|entry| entry.unwrap().path());
    let record = records.find(|path| path.to_str().unwrap().contains(&second.id)).unwrap();
    fs::rename(&record, stage.path().join("aside")).unwrap();
    let info = stage.ok(&mut stage.pitr(&["info"]));
    assert!(
        info.contains(&format!("{}  never restored from: it builds on {}", fourth.id, second.id)),
        "{info}"
    );
    let plan = stage.ok(&mut stage.pitr(&["plan", "--latest"]));
    assert!(plan.contains(&third.id), "{plan}");
    let refused = stage.fails(&mut stage.pitr(&["plan", "--latest", "--backup", &fourth.id]), 3);
    assert!(refused.contains(&format!("builds on backup {}", second.id)), "{refused}");
    let (fifth, _) = said(LOCAL);
    assert_eq!(fifth.parent.unwrap().id, third.id);
    fs::rename(stage.path().join("aside"), &record).unwrap();
    assert!(stage.ok(&mut stage.pitr(&["plan", "--latest", "--backup", &fourth.id])).contains("incremental"));
}

#[test]
fn a_server_without_summaries_sends_a_full_backup() {
    let stage = Stage::folder("main");
    let server = stage.archiving(PgServer::builder(newer_major())).start();
    stage.init(&server);
    taken(&stage, &server, &[]);
    let output = stage.run(&mut stage.walship_on(&server, &["backup", "--json", "--incremental"]));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && said.contains("a full backup is taken"), "{said}");
    let record: BackupRecord = serde_json::from_slice(&output.stdout).unwrap();
    assert!(record.parent.is_none());
    is_whole(&server, &restored(&stage, &record, "restored", &[]));
}

#[test]
fn damage_below_is_found_before_anything_is_started() {
    let stage = Stage::folder("main");
    let server = started(&stage, primary_major());
    fill(&server);
    let full = taken(&stage, &server, LOCAL);
    change(&server, 1);
    let record = taken(&stage, &server, &[&["--incremental"], LOCAL].concat());
    // A byte of a frame that the incremental backup needs: in the middle of the largest object.
    let largest = full.objects.iter().max_by_key(|object| object.stored_bytes).unwrap();
    let path = folder_of(&stage, &full.id).join(&largest.name);
    let sound = fs::read(&path).unwrap();
    let mut bytes = sound.clone();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let restore = |data: &Path| {
        let mut command = stage.pitr(&["restore", "--immediate", "--backup", &record.id, "-D"]);
        command.arg(data);
        command
    };
    let data = stage.path().join("damaged");
    let said = stage.fails(&mut restore(&data), 4);
    assert!(said.contains(&full.id) && said.contains("\nsafe:  ") && said.contains("\nnext:  "), "{said}");
    assert!(!data.join("global/pg_control").exists());
    // Gone is found out before a byte is written.
    fs::remove_file(&path).unwrap();
    let data = stage.path().join("gone");
    let said = stage.fails(&mut restore(&data), 1);
    assert!(said.contains("is not there") && !data.exists(), "{said}");
    fs::write(&path, &sound).unwrap();
    stage.ok(restore(&stage.path().join("damaged")).args(["--delta", "--yes"]));
    is_whole(&server, &stage.path().join("damaged"));

    // An index below that cannot be read: what would build on it is stored anew.
    let mut bytes = sound.clone();
    let end = bytes.len() - 20;
    bytes[end] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let mut command = stage.walship_on(&server, &["backup", "--incremental", "--parent", &full.id]);
    let said = stage.fails(command.args(LOCAL), 1);
    assert!(said.contains("is damaged"), "{said}");
    let output = stage.run(stage.walship_on(&server, &["backup", "--json", "--incremental"]).args(LOCAL));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let record: BackupRecord = serde_json::from_slice(&output.stdout).unwrap();
    assert!(record.parent.is_some(), "{said}");
    assert!(said.contains("files are stored whole, because a backup below cannot be read"), "{said}");
    is_whole(&server, &restored(&stage, &record, "again", &[]));
}

/// The whole chain with stock tools and the commands of the page about the format.
#[test]
fn the_page_about_the_format_restores_a_chain_by_hand() {
    let stage = Stage::folder("main");
    let server = started(&stage, newer_major());
    fill(&server);
    taken(&stage, &server, LOCAL);
    for round in 1..=2 {
        change(&server, round);
        taken(&stage, &server, &[&["--incremental"], LOCAL].concat());
    }
    let page = include_str!("../../../docs/repository-format.md");
    let (_, chapter) = page.split_once("### An incremental backup by hand").unwrap();
    let lines = chapter.lines().skip_while(|line| !line.starts_with("    "));
    let block = lines.take_while(|line| line.is_empty() || line.starts_with("    "));
    let commands: Vec<&str> = block.map(|line| line.strip_prefix("    ").unwrap_or_default()).collect();
    let new = stage.path().join("new");
    let tool = server.tool("pg_combinebackup");
    let tools = Path::new(tool.get_program()).parent().unwrap();
    let path = format!("{}:{}", tools.display(), std::env::var("PATH").unwrap());
    let mut shell = Command::new("sh");
    shell.args(["-eu", "-c", &commands.join("\n")]).env("NEW", &new).env("PATH", path);
    shell.env("TAR_OPTIONS", "--no-same-owner").current_dir(stage.repository_dir().join("main/0001"));
    process::run_ok(&mut shell);
    is_whole(&server, &new.join("data"));
}

/// Takes a backup and kills it when so many of its objects are whole; returns its id.
fn killed(stage: &Stage, server: &PgServer, objects: usize, words: &[&str]) -> String {
    let mut command = stage.walship_on(server, &["backup", "--object-mib", "1", "--max-rate", "8M"]);
    command.args(words).stdout(Stdio::null()).stderr(Stdio::null());
    let backups = stage.repository_dir().join(stage.cluster()).join("0001/backups");
    let ids = || -> Vec<String> {
        let entries = fs::read_dir(&backups).map(|entries| entries.map(|entry| entry.unwrap())).into_iter();
        entries.flatten().map(|entry| entry.file_name().into_string().unwrap()).collect()
    };
    let known = ids();
    let mut child = process::spawn(command).unwrap();
    let mut id = String::new();
    wait::until("some objects are whole", || {
        id = ids().into_iter().find(|id| id != "catalog" && !known.contains(id)).unwrap_or_default();
        let data = fs::read_dir(backups.join(&id).join("data")).into_iter().flatten();
        let notes = data.filter(|entry| entry.as_ref().unwrap().path().extension() == Some("json".as_ref()));
        !id.is_empty() && notes.count() >= objects
    });
    process::kill_tree(&mut child);
    id
}

#[test]
fn a_backup_that_was_killed_is_gone_on_with() {
    for major in majors() {
        let stage = Stage::folder("main");
        let server = started(&stage, major);
        fill(&server);
        let space = TempDir::new().unwrap();
        server.psql(&format!("CREATE TABLESPACE fast LOCATION '{}'", space.path().display()));
        server.psql(
            "CREATE TABLE there TABLESPACE fast AS SELECT g FROM generate_series(1, 200000) g; CHECKPOINT",
        );
        let mapping = format!("{}={}/restored-space", space.path().display(), stage.path().display());
        let mapped = ["--tablespace-mapping", &mapping];
        let first = killed(&stage, &server, 6, LOCAL);
        let second = killed(&stage, &server, 3, LOCAL);
        // Files come, go and change meanwhile.
        change(&server, 1);
        let output =
            stage.run(stage.walship_on(&server, &["backup", "--json", "--object-mib", "1"]).args(LOCAL));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() && said.contains("are taken over"), "{said}");
        let record: BackupRecord = serde_json::from_slice(&output.stdout).unwrap();
        let from =
            |id: &str| record.objects.iter().filter(|object| object.backup.as_deref() == Some(id)).count();
        // How many files a server that does nothing changes meanwhile is its own affair.
        assert!(from(&first) >= 1, "{said}");
        assert!(from(&first) + from(&second) < record.objects.len());
        let data = restored(&stage, &record, "restored", &mapped);
        is_whole(&server, &data);
        let expected = server.psql(SUMS);
        let copy = stage.recovering(&data).start();
        copy.wait_for("SELECT pg_is_in_recovery()", "f");
        assert_eq!((copy.psql(SUMS), copy.psql("SELECT count(*) FROM there")), (expected, "200000".into()));
        drop(copy);

        // One that builds on it is killed and gone on with too, and restored over what is there.
        change(&server, 2);
        let incremental = [&["--incremental"], LOCAL].concat();
        for name in ["much", "more"] {
            server.psql(&format!(
                "CREATE TABLE {name} AS SELECT g, repeat(md5(g::text), 10) AS t FROM generate_series(1, 30000) g; CHECKPOINT"
            ));
        }
        // Folders, of the data directory and of the tablespace, are two objects.
        let third = killed(&stage, &server, 4, &incremental);
        server.psql("UPDATE large SET t = 'later' WHERE g = 77; CHECKPOINT");
        let output = stage.run(stage.walship_on(&server, &["backup", "--json"]).args(&incremental));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() && said.contains("are taken over"), "{said}");
        let next: BackupRecord = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(next.parent.as_ref().map(|parent| &parent.id), Some(&record.id));
        assert!(next.objects.iter().any(|object| object.backup.as_ref() == Some(&third)));
        let mut command =
            stage.pitr(&["restore", "--immediate", "--backup", &next.id, "--delta", "--yes", "-D"]);
        stage.ok(command.arg(&data).args(mapped));
        is_whole(&server, &data);

        // A full one has no use for what builds on another; and who wants everything anew gets that.
        let full = taken(&stage, &server, &[&["--no-resume"], LOCAL].concat());
        assert!(!full.went_on());
        let info = stage.ok(&mut stage.pitr(&["info"]));
        assert_eq!(info.matches("not complete (started").count(), 3, "{info}");
    }
}

#[test]
fn what_a_killed_backup_left_damaged_is_stored_again() {
    let stage = Stage::folder("main");
    let server = started(&stage, primary_major());
    fill(&server);
    let id = killed(&stage, &server, 7, LOCAL);
    let data = folder_of(&stage, &id).join("data");
    let mut notes: Vec<PathBuf> = fs::read_dir(&data).unwrap().map(|entry| entry.unwrap().path()).collect();
    notes.retain(|path| path.extension() == Some("json".as_ref()));
    notes.sort();
    // The first is of folders. A note that is no note, an index that is none, an object that is cut off, and one that is gone.
    fs::write(&notes[1], "{}").unwrap();
    let object = |note: &Path| note.with_extension("tar");
    let mut bytes = fs::read(object(&notes[2])).unwrap();
    let end = bytes.len() - 20;
    bytes[end] ^= 1;
    fs::write(object(&notes[2]), bytes).unwrap();
    fs::OpenOptions::new().write(true).open(object(&notes[3])).unwrap().set_len(1000).unwrap();
    fs::remove_file(object(&notes[4])).unwrap();
    let record = taken(&stage, &server, LOCAL);
    let reused: Vec<&str> =
        record.objects.iter().filter(|object| object.backup.is_some()).map(|object| &*object.name).collect();
    for note in &notes[1..5] {
        let name = format!("data/{}.tar", note.file_stem().unwrap().to_str().unwrap());
        assert!(!reused.contains(&&*name), "{name} of {reused:?}");
    }
    assert!(!reused.is_empty());
    is_whole(&server, &restored(&stage, &record, "restored", &[]));
}

#[test]
fn rows_behind_a_cut_do_not_come_back() {
    let newer = newer_major();
    assert!(newer >= 17, "only these versions send incremental backups");
    let stage = Stage::folder("main");
    let server = started(&stage, newer);
    for table in ["c1", "c2"] {
        server.psql(&format!(
            "CREATE TABLE {table} AS SELECT g AS id, repeat('x', 1000) AS t FROM generate_series(1, 15000) g;
             ALTER TABLE {table} SET (autovacuum_enabled = off)"
        ));
    }
    server.psql("VACUUM FREEZE");
    taken(&stage, &server, &[]);
    let cut = |table: &str| {
        server.psql(&format!("DELETE FROM {table} WHERE id > 7000"));
        server.psql(&format!("VACUUM {table}"));
        let blocks = server.psql(&format!("SELECT pg_relation_size('{table}') / 8192"));
        assert_eq!(blocks, "1000", "VACUUM has cut {table} off");
    };
    // One is cut off before a backup between, one within the last interval.
    cut("c2");
    taken(&stage, &server, &["--incremental"]);
    cut("c1");
    // Those who add rows at the same time add pages that stay empty, and are in no WAL.
    let rows = stage.path().join("rows");
    let lines: Vec<String> =
        (0..100).map(|number| format!("{}\t{}\n", 20_000 + number, "y".repeat(1000))).collect();
    fs::write(&rows, lines.concat()).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..12 {
            let (server, rows) = (&server, &rows);
            scope.spawn(move || {
                for table in ["c1", "c2"] {
                    let copy = format!("\\copy {table} from '{}'", rows.display());
                    let mut psql = server.tool("psql");
                    psql.args(["-X", "-q", "-c", &copy, "postgres"]);
                    process::run_ok(&mut psql);
                }
            });
        }
    });
    server.psql("CHECKPOINT");
    let record = taken(&stage, &server, &["--incremental"]);
    assert_eq!(record.parent.as_ref().map(|parent| parent.depth), Some(2));
    let data = restored(&stage, &record, "restored", &[]);
    is_whole(&server, &data);
    let copy = stage.recovering(&data).start();
    copy.wait_for("SELECT pg_is_in_recovery()", "f");
    for table in ["c1", "c2"] {
        let count = format!("SELECT count(*), count(DISTINCT ctid), max(id) FROM {table}");
        assert_eq!(copy.psql(&count), server.psql(&count), "{table}");
    }
}

#[test]
fn checksums_that_were_turned_on_make_the_next_backup_a_full_one() {
    let stage = Stage::folder("main");
    let builder = PgServer::builder(newer_major()).setting("summarize_wal", "on").checksums(false);
    let mut server = stage.archiving(builder).start();
    stage.init(&server);
    fill(&server);
    taken(&stage, &server, &[]);
    server.stop(StopMode::Fast);
    let enabled = server.run_tool("pg_checksums", &["-e", "-D", server.data_dir().to_str().unwrap()]);
    assert!(enabled.status.success(), "{}", String::from_utf8_lossy(&enabled.stderr));
    server.start();
    let streamed = taken(&stage, &server, &["--incremental"]);
    assert!(streamed.parent.is_none() && streamed.data_checksums);
    is_whole(&server, &restored(&stage, &streamed, "restored", &[]));
}

#[test]
fn who_names_a_parent_gets_no_other_backup_and_a_broken_chain_is_not_built_on() {
    let stage = Stage::folder("main");
    let server = stage.archiving(PgServer::builder(newer_major())).start();
    stage.init(&server);
    let full = taken(&stage, &server, &[]);
    // The server has no summaries.
    let words = ["backup", "--incremental", "--parent", &full.id];
    let said = stage.fails(&mut stage.walship_on(&server, &words), 1);
    assert!(
        said.contains("\nsafe:  no backup was recorded") && said.contains("Leave --parent out"),
        "{said}"
    );
    fs::remove_file(folder_of(&stage, &full.id).join(&full.objects[0].name)).unwrap();
    let output = stage.run(stage.walship_on(&server, &["backup", "--json", "--incremental"]).args(LOCAL));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let record: BackupRecord = serde_json::from_slice(&output.stdout).unwrap();
    assert!(record.parent.is_none() && said.contains("is damaged"), "{said}");
}

#[test]
fn a_chain_is_put_together_from_what_any_repository_has() {
    let stage = Stage::folder("main");
    let second = stage.path().join("second");
    fs::create_dir(&second).unwrap();
    let urls = format!("[\"{}\", \"file://{}\"]", stage.url(), second.display());
    let config = fs::read_to_string(stage.config()).unwrap();
    let config = config.replace(&format!("[\"{}\"]", stage.url()), &urls);
    assert!(config.contains(&urls), "{config}");
    fs::write(stage.config(), config).unwrap();
    let server =
        stage.archiving(PgServer::builder(primary_major()).initdb_arg("--allow-group-access")).start();
    stage.init(&server);
    fill(&server);
    let full = taken(&stage, &server, &[&["--object-mib", "4"], LOCAL].concat());
    change(&server, 1);
    let record = taken(&stage, &server, &[&["--incremental", "--object-mib", "1"], LOCAL].concat());
    let first = stage.repository_dir().join("main/0001/backups");
    let second = second.join("main/0001/backups");
    // Each repository lacks something that the other has: one object of the full, one of the incremental backup, and a byte.
    let object = |below: &Path, record: &BackupRecord, number: usize| {
        below.join(&record.id).join(&record.objects[number].name)
    };
    let large = |record: &BackupRecord| {
        let objects = record.objects.iter().enumerate();
        objects.max_by_key(|(_, object)| object.stored_bytes).map(|(number, _)| number).unwrap()
    };
    fs::remove_file(object(&first, &full, large(&full))).unwrap();
    fs::remove_file(object(&second, &record, large(&record))).unwrap();
    let other = (0..full.objects.len()).filter(|number| *number != large(&full));
    let other = other.max_by_key(|number| full.objects[*number].stored_bytes).unwrap();
    let path = object(&second, &full, other);
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, bytes).unwrap();
    let data = restored(&stage, &record, "restored", &[]);
    is_whole(&server, &data);
    let mode = |path: &str| fs::metadata(data.join(path)).unwrap().permissions().mode() & 0o777;
    let modes = ["", "base", "pg_wal", "PG_VERSION", "global/pg_control", "backup_label"].map(mode);
    assert_eq!(modes, [0o750, 0o750, 0o750, 0o640, 0o640, 0o640]);
}
