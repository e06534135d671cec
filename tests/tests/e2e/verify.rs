//! `pitr verify`: a sound archive is proven, every kind of damage made one by one is found and told by what it takes
//! away, and an outage is never taken for damage.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use tokio::runtime::Runtime;
use walship::codec::{Compression, Digest, ObjectHead};
use walship::repository::ClusterRepository;
use walship::storage::{self, StorageConfig};
use walship_tests::postgres::{PgServer, StopMode, majors, primary_major};
use walship_tests::process::{self, copy_tree};
use walship_tests::s3_inprocess::{Fault, S3Server};
use walship_tests::stage::Stage;

use crate::json_docs::compare;

pub(crate) fn parsed(output: &std::process::Output) -> Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)))
}

/// Verifies, and returns the exit status and what was printed.
pub(crate) fn verify(stage: &Stage, words: &[&str]) -> (i32, Value) {
    let output = stage.run(stage.pitr(&["verify", "--json"]).args(words));
    (output.status.code().unwrap(), parsed(&output))
}

pub(crate) fn sound(stage: &Stage, words: &[&str]) -> Value {
    let (status, report) = verify(stage, words);
    assert_eq!((status, &report["outcome"]), (0, &Value::from("sound")), "{report:#}");
    let found = &report["repositories"][0]["findings"];
    assert_eq!(found.as_array().unwrap().len(), 0, "{found:#}");
    report
}

pub(crate) fn damaged(stage: &Stage, what: &str) -> Value {
    let (status, report) = verify(stage, &[]);
    assert_eq!((status, &report["outcome"]), (4, &Value::from("damaged")), "{what}: {report:#}");
    report
}

/// The findings of one kind that count as damage: what they concern.
pub(crate) fn damage_of(report: &Value, kind: &str) -> Vec<String> {
    let all = report["repositories"].as_array().unwrap().iter();
    let all = all.flat_map(|one| one["findings"].as_array().unwrap());
    all.filter(|finding| finding["kind"] == kind && finding["weight"] == "damage")
        .map(|finding| finding["object"].as_str().unwrap().to_owned())
        .collect()
}

fn small(major: u32) -> walship_tests::postgres::PgServerBuilder {
    PgServer::builder(major).wal_segment_size_mb(1)
}

pub(crate) fn insert(server: &PgServer, rows: u32) {
    server.psql(&format!("insert into t select g, md5(g::text) from generate_series(1, {rows}) g"));
}

/// An archive in a folder: two backups, the second incremental, and two timelines.
fn archive(stage: &Stage, major: u32) -> PgServer {
    let mut first = stage.archiving(small(major)).start();
    stage.init(&first);
    first.psql("create table t (g int, t text); create index on t (g)");
    insert(&first, 5000);
    stage.backup(&first);
    for _ in 0..6 {
        insert(&first, 3000);
        first.archive_now();
    }
    stage.ok(&mut stage.walship_on(&first, &["backup", "--source", "local", "--incremental"]));
    for _ in 0..6 {
        insert(&first, 3000);
        first.archive_now();
    }
    assert!(first.stop(StopMode::Fast).success());
    let dir = stage.path().join("second");
    stage.ok(stage.pitr(&["restore", "--latest", "--as", "production", "-D"]).arg(&dir));
    let second = stage.archiving(stage.recovering(&dir)).start();
    second.wait_for("select pg_is_in_recovery()", "f");
    for _ in 0..4 {
        insert(&second, 3000);
        second.archive_now();
    }
    stage.ok(&mut stage.pitr(&["index"]));
    second
}

/// Every file of the repository, by its path below the lineage.
fn files(stage: &Stage) -> BTreeMap<String, PathBuf> {
    let base = lineage(stage);
    let (mut found, mut left) = (BTreeMap::new(), vec![base.clone()]);
    while let Some(folder) = left.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                left.push(path);
            } else {
                found.insert(path.strip_prefix(&base).unwrap().to_str().unwrap().to_owned(), path);
            }
        }
    }
    found
}

pub(crate) fn lineage(stage: &Stage) -> PathBuf {
    stage.repository_dir().join("main/0001")
}

pub(crate) fn matching(stage: &Stage, begin: &str, end: &str) -> Vec<PathBuf> {
    let fits = |key: &String| key.starts_with(begin) && key.ends_with(end);
    files(stage).into_iter().filter(|(key, _)| fits(key)).map(|(_, path)| path).collect()
}

pub(crate) fn segments(stage: &Stage, timeline: u32) -> Vec<PathBuf> {
    matching(stage, &format!("wal/{timeline:08X}/"), ".wal")
}

pub(crate) fn name(path: &Path) -> String {
    path.file_name().unwrap().to_str().unwrap().trim_end_matches(".wal").to_owned()
}

pub(crate) fn write(path: &Path, bytes: &[u8]) {
    // Stored objects may be read only.
    fs::remove_file(path).unwrap();
    fs::write(path, bytes).unwrap();
}

/// Runs the program `zstd` on these bytes.
fn zstd(words: &[&str], input: &[u8]) -> Vec<u8> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(input).unwrap();
    let output = Command::new("zstd").arg("-q").args(words).stdin(file.reopen().unwrap()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    output.stdout
}

#[test]
fn a_sound_archive_is_proven_and_recorded() {
    for major in majors() {
        let stage = Stage::folder("main");
        let server = archive(&stage, major);
        let report = sound(&stage, &["--reason", "for the test", "--server", &server.socket_conninfo()]);
        let one = &report["repositories"][0];
        assert_eq!(
            (&one["objects_left"], &one["never_proven"]),
            (&Value::from(0), &Value::from(0)),
            "{one:#}"
        );
        let read: u64 =
            one["wal"].as_array().unwrap().iter().map(|range| range["segments"].as_u64().unwrap()).sum();
        assert_eq!(read as usize, segments(&stage, 1).len() + segments(&stage, 2).len());
        let backups = one["backups"].as_array().unwrap();
        assert_eq!(backups.len(), 2);
        assert!(
            backups.iter().all(|backup| backup["outcome"] == "sound" && backup["proven_since"].is_string())
        );
        let stored: u64 = files(&stage).values().map(|path| fs::metadata(path).unwrap().len()).sum();
        assert!(one["bytes"].as_u64().unwrap() > stored / 2, "{one:#}");

        // Parts of it.
        let id = backups[1]["id"].as_str().unwrap();
        let of_backup = sound(&stage, &["--backup", id, "--no-server"]);
        assert!(of_backup["repositories"][0]["bytes"].as_u64() < one["bytes"].as_u64());
        sound(&stage, &["--latest"]);
        sound(&stage, &["--since", "2020-01-01 00:00Z"]);
        assert!(
            stage
                .fails(&mut stage.pitr(&["verify", "--latest", "--window"]), 2)
                .contains("more than one way")
        );
        assert!(
            stage
                .fails(&mut stage.pitr(&["verify", "--backup", "20200101T000000Z-0123456789abcdef"]), 1)
                .contains("no backup")
        );

        let history = stage.ok(&mut stage.pitr(&["history", "--only", "verify", "--json"]));
        let history: Value = serde_json::from_str(&history).unwrap();
        let entries = history["entries"].as_array().unwrap();
        assert_eq!(entries.len(), 4, "{history:#}");
        let first = &entries[3];
        assert_eq!(
            (&first["outcome"], &first["reason"]),
            (&Value::from("sound"), &Value::from("for the test"))
        );
        let text = stage.ok(&mut stage.pitr(&["verify"]));
        assert!(text.contains("everything is sound") && text.contains("proven since"), "{text}");
    }
}

/// Puts a roll-up that lies under a key that is right for it.
pub(crate) fn lying_rollup(stage: &Stage) -> PathBuf {
    let rollup = matching(stage, "index/00000001/1/", ".json.zst")[0].clone();
    let json = zstd(&["-dc"], &fs::read(&rollup).unwrap());
    let mut value: walship::wal::rollup::Rollup = serde_json::from_slice(&json).unwrap();
    value.entries[0].facts.wal_bytes += 8;
    let lie = serde_json::to_vec(&value).unwrap();
    let old = rollup.file_name().unwrap().to_str().unwrap();
    let stem = old.rsplit_once('-').unwrap().0;
    let lying = rollup.with_file_name(format!("{stem}-{}.json.zst", Digest::of(&lie).short()));
    fs::write(&lying, zstd(&["-c"], &lie)).unwrap();
    lying
}

#[test]
fn every_kind_of_damage_is_found_and_told_by_what_it_takes() {
    let stage = Stage::folder("main");
    let mut server = archive(&stage, primary_major());
    server.stop(StopMode::Fast);
    sound(&stage, &[]);
    let first = segments(&stage, 1);
    let middle = first[first.len() - 3].clone();
    let mut answers = Vec::new();

    // One byte of each part of a segment's object, and its length.
    let whole = fs::read(&middle).unwrap();
    let mut others =
        vec![whole.clone(), whole[..whole.len() - 1].to_vec(), Vec::new(), [&whole[..], b"x"].concat()];
    for at in [0, 30, 100, 158, 170, 400, whole.len() / 2, whole.len() - 1] {
        let mut flipped = whole.clone();
        flipped[at] ^= 0x10;
        others.push(flipped);
    }
    // Another segment's object under this name: sound by itself.
    others.push(fs::read(&first[first.len() - 4]).unwrap());
    // A summary that lies, with all checksums right.
    let mut head = ObjectHead::decode(&whole).unwrap();
    let body = &whole[head.head_bytes as usize..];
    let summary = head.summary.as_mut().unwrap();
    summary.counts.commits += 1;
    others.push([&ObjectHead::encode(&head.envelope, head.summary.as_ref()).unwrap()[..], body].concat());
    for (case, bytes) in others.iter().enumerate().skip(1) {
        write(&middle, bytes);
        let report = damaged(&stage, &format!("segment, case {case}"));
        let objects = damage_of(&report, "damaged");
        assert!(objects.iter().any(|object| object.contains(&name(&middle))), "case {case}: {report:#}");
        let lost = report["affected"]["unreachable"].as_array().unwrap();
        assert!(!lost.is_empty(), "case {case}: {report:#}");
        // Both timelines lead through it; behind the backup before it nothing is reached any more.
        assert_eq!(lost[0]["timeline"], 1, "{lost:?}");
        assert!(lost[0]["from_time"].is_string(), "{lost:?}");
        answers.push(report);
    }
    write(&middle, &whole);

    // Missing segments.
    fs::remove_file(&middle).unwrap();
    let report = damaged(&stage, "a middle segment is gone");
    assert_eq!(damage_of(&report, "missing"), [name(&middle)], "{report:#}");
    assert!(!report["affected"]["windows"].as_array().unwrap().is_empty(), "{report:#}");
    fs::write(&middle, &whole).unwrap();
    let last = segments(&stage, 2).pop().unwrap();
    let kept = fs::read(&last).unwrap();
    fs::remove_file(&last).unwrap();
    let report = damaged(&stage, "the last segment is gone");
    assert_eq!(damage_of(&report, "missing_end"), [name(&last)], "{report:#}");
    assert!(!report["affected"]["unreachable"].as_array().unwrap().is_empty(), "{report:#}");
    // Whoever knows of it makes the index forget it, says so, and hears no more of it.
    stage.ok(&mut stage.pitr(&["index", "--rebuild"]));
    let accept = ["--accept-missing", "--reason", "known"];
    sound(&stage, &accept);
    sound(&stage, &[]);
    fs::write(&last, &kept).unwrap();
    stage.ok(&mut stage.pitr(&["index"]));
    sound(&stage, &[]);

    // History files.
    let history = lineage(&stage).join("wal/00000002.history");
    let kept = fs::read(&history).unwrap();
    fs::remove_file(&history).unwrap();
    let report = damaged(&stage, "the history file is gone");
    assert_eq!(damage_of(&report, "missing"), ["00000002.history"], "{report:#}");
    assert!(report["affected"]["unreachable"].as_array().unwrap().iter().any(|lost| lost["timeline"] == 2));
    let mut flipped = kept.clone();
    *flipped.last_mut().unwrap() ^= 1;
    fs::write(&history, flipped).unwrap();
    let report = damaged(&stage, "the history file is damaged");
    assert_eq!(damage_of(&report, "damaged"), ["00000002.history"], "{report:#}");
    write(&history, &kept);

    // Backups: objects, manifest, record.
    for (end, kinds) in [("data/000001.tar", &["damaged"][..]), ("manifest.json.zst", &["damaged"])] {
        // The first backup's: ids of one second are in any order.
        let modified = |path: &PathBuf| fs::metadata(path).unwrap().modified().unwrap();
        let path = matching(&stage, "backups/2", end).into_iter().min_by_key(modified).unwrap();
        let kept = fs::read(&path).unwrap();
        for at in [kept.len() / 2, kept.len() - 3] {
            let mut flipped = kept.clone();
            flipped[at] ^= 1;
            write(&path, &flipped);
            let report = damaged(&stage, end);
            let objects: Vec<String> = kinds.iter().flat_map(|kind| damage_of(&report, kind)).collect();
            assert!(objects.iter().any(|object| object.contains(end)), "{end}: {report:#}");
            // The incremental backup builds on it.
            assert_eq!(report["affected"]["backups"].as_array().unwrap().len(), 2, "{end}: {report:#}");
            assert!(!report["affected"]["unreachable"].as_array().unwrap().is_empty(), "{end}: {report:#}");
        }
        fs::remove_file(&path).unwrap();
        let report = damaged(&stage, end);
        assert!(damage_of(&report, "missing").iter().any(|object| object.contains(end)), "{end}: {report:#}");
        fs::write(&path, &kept).unwrap();
    }
    let record = matching(&stage, "backups/catalog/", ".json")[0].clone();
    let kept = fs::read_to_string(&record).unwrap();
    let digest =
        serde_json::from_str::<Value>(&kept).unwrap()["objects"][0]["digest"].as_str().unwrap().to_owned();
    let other = format!("{}{}", if digest.starts_with('0') { '1' } else { '0' }, &digest[1..]);
    for (case, text) in
        [kept.replace(&digest, &other), kept.replacen('{', "[", 1), String::new()].iter().enumerate()
    {
        write(&record, text.as_bytes());
        let report = damaged(&stage, "record");
        assert_eq!(report["affected"]["backups"].as_array().unwrap().len(), 2, "case {case}: {report:#}");
        assert!(!report["affected"]["unreachable"].as_array().unwrap().is_empty(), "case {case}: {report:#}");
        answers.push(report);
    }
    fs::remove_file(&record).unwrap();
    let report = damaged(&stage, "the record is gone");
    assert!(!damage_of(&report, "missing").is_empty(), "{report:#}");
    // The index tells where it led to.
    assert!(!report["affected"]["unreachable"].as_array().unwrap().is_empty(), "{report:#}");
    fs::write(&record, &kept).unwrap();

    let lying = lying_rollup(&stage);
    let report = damaged(&stage, "a roll-up lies");
    assert_eq!(damage_of(&report, "index").len(), 1, "{report:#}");
    assert!(report["affected"]["unreachable"].as_array().unwrap().is_empty(), "{report:#}");
    fs::remove_file(&lying).unwrap();

    sound(&stage, &[]);
    compare("pitr verify", &answers, &[]);
    // What was damaged is not forgotten by the history, and nothing has changed the archive.
    let history: Value =
        serde_json::from_str(&stage.ok(&mut stage.pitr(&["history", "--only", "verify", "--json"]))).unwrap();
    assert!(history["entries"].as_array().unwrap().iter().any(|entry| entry["outcome"] == "damaged"));
}

/// Lets one server archive into one stage and its twin into another, with the same names from some segment on; returns what
/// both have stored.
pub(crate) fn twins(stage: &Stage, elsewhere: &Stage) -> (Vec<PathBuf>, Vec<PathBuf>) {
    let mut server = stage.archiving(small(primary_major())).start();
    stage.init(&server);
    server.psql("create table t (g int, t text)");
    stage.backup(&server);
    insert(&server, 3000);
    server.archive_now();
    server.stop(StopMode::Fast);
    // The same server twice, from here on.
    let copy = stage.path().join("copy");
    copy_tree(server.data_dir(), &copy);
    copy_tree(&stage.repository_dir(), &elsewhere.repository_dir());
    let go_on = |stage: &Stage, server: &PgServer, rows: u32| {
        for _ in 0..4 {
            insert(server, rows);
            server.archive_now();
        }
        segments(stage, 1)
    };
    server.start();
    let ours = go_on(stage, &server, 3000);
    server.stop(StopMode::Fast);
    let mut twin = elsewhere.archiving(elsewhere.recovering(&copy)).start();
    let theirs = go_on(elsewhere, &twin, 2000);
    twin.stop(StopMode::Fast);
    (ours, theirs)
}

#[test]
fn wal_of_another_history_under_a_right_name_does_not_go_on() {
    let (stage, elsewhere) = (Stage::folder("main"), Stage::folder("main"));
    let (ours, theirs) = twins(&stage, &elsewhere);
    sound(&stage, &[]);
    let at = ours.len() - 3;
    let same_name = theirs.iter().find(|path| name(path) == name(&ours[at])).unwrap();
    assert_ne!(fs::read(same_name).unwrap(), fs::read(&ours[at]).unwrap());
    // As a good copy it contradicts the object beside which it lies, and behind a damaged one it goes on from nothing.
    let (mine, other) = (fs::read(&ours[at]).unwrap(), fs::read(same_name).unwrap());
    let digest = ObjectHead::decode(&other).unwrap().envelope.digest.short();
    let copy = ours[at].with_file_name(format!("{}.wal.r{digest}", name(&ours[at])));
    fs::write(&copy, &other).unwrap();
    let report = damaged(&stage, "a copy that is another");
    assert_eq!(damage_of(&report, "contradiction").len(), 1, "{report:#}");
    assert!(!report["affected"]["unreachable"].as_array().unwrap().is_empty(), "{report:#}");
    let mut flipped = mine.clone();
    *flipped.last_mut().unwrap() ^= 1;
    write(&ours[at], &flipped);
    let report = damaged(&stage, "a copy of another history");
    assert!(damage_of(&report, "broken").contains(&name(&ours[at])), "{report:#}");
    fs::remove_file(copy).unwrap();
    write(&ours[at], &other);
    let report = damaged(&stage, "another history");
    let broken = damage_of(&report, "broken");
    // It goes on from nothing, and nothing goes on from it.
    assert!(broken.contains(&name(&ours[at])), "{report:#}");
    assert!(!report["affected"]["unreachable"].as_array().unwrap().is_empty(), "{report:#}");
}

#[test]
fn a_page_with_a_wrong_checksum_in_a_sound_object_is_found() {
    let stage = Stage::folder("main");
    let mut server = stage.archiving(PgServer::builder(primary_major()).checksums(true)).start();
    stage.init(&server);
    server.psql("create table t as select g, md5(g::text) t from generate_series(1, 5000) g; checkpoint");
    let path = server.psql("select pg_relation_filepath('t')");
    let path = server.data_dir().join(path.trim());
    server.stop(StopMode::Fast);
    let mut bytes = fs::read(&path).unwrap();
    bytes[3 * 8192 + 4000] ^= 1;
    fs::write(&path, bytes).unwrap();
    server.start();
    stage.run(&mut stage.walship_on(&server, &["backup", "--source", "local"]));
    server.archive_now();
    // That it was so when the backup was taken is on record: to be known, and no news.
    let (status, report) = verify(&stage, &[]);
    assert_eq!(status, 0, "{report:#}");
    assert_eq!(report["repositories"][0]["findings"][0]["kind"], "page", "{report:#}");
    assert_eq!(report["repositories"][0]["findings"][0]["weight"], "note", "{report:#}");
    let record = matching(&stage, "backups/catalog/", ".json")[0].clone();
    let mut value: Value = serde_json::from_slice(&fs::read(&record).unwrap()).unwrap();
    value.as_object_mut().unwrap().remove("damaged_pages").unwrap();
    write(&record, &serde_json::to_vec_pretty(&value).unwrap());
    let report = damaged(&stage, "a page");
    assert_eq!(damage_of(&report, "page").len(), 1, "{report:#}");
    assert!(report.to_string().contains("block 3 of base/"), "{report:#}");
}

#[test]
fn an_older_copy_does_not_verify_clean() {
    let stage = Stage::folder("main");
    let server = stage.archiving(small(primary_major())).start();
    stage.init(&server);
    server.psql("create table t (g int, t text)");
    stage.backup(&server);
    insert(&server, 3000);
    server.archive_now();
    let older = stage.path().join("older");
    copy_tree(&stage.repository_dir(), &older);
    for _ in 0..3 {
        insert(&server, 3000);
        server.archive_now();
    }
    stage.backup(&server);
    let conninfo = server.socket_conninfo();
    sound(&stage, &["--server", &conninfo]);
    // Beside the newer one, and against the server.
    let url = format!("file://{}", older.display());
    let both = [&["--repo", stage.url(), "--repo", &url][..], &[]].concat();
    let (status, report) = verify(&stage, &both);
    assert_eq!(status, 4, "{report:#}");
    let old = report["repositories"]
        .as_array()
        .unwrap()
        .iter()
        .find(|one| one["repository"].as_str().unwrap().contains("older"));
    let old = old.unwrap();
    let findings = old["findings"].as_array().unwrap();
    assert!(findings.iter().any(|finding| finding["kind"] == "missing_end"), "{old:#}");
    assert!(findings.iter().all(|finding| finding["also_in"].as_array().unwrap().len() == 1), "{old:#}");
    assert_eq!(report["affected"]["unreachable"], serde_json::json!([]), "the other has all: {report:#}");
    let alone = ["--repo", &*url];
    sound(&stage, &[&alone[..], &["--no-server"]].concat());
    let (status, report) = verify(&stage, &[&alone[..], &["--server", &conninfo]].concat());
    assert_eq!(status, 4, "{report:#}");
    assert_eq!(damage_of(&report, "missing_end").len(), 1, "{report:#}");
    assert!(!report["affected"]["unreachable"].as_array().unwrap().is_empty(), "{report:#}");
    // In the place of the newer one, with no server to ask: this machine has seen more.
    let newer = stage.path().join("newer");
    fs::rename(stage.repository_dir(), &newer).unwrap();
    copy_tree(&older, &stage.repository_dir());
    let (status, report) = verify(&stage, &["--no-server"]);
    assert_eq!(status, 4, "{report:#}");
    assert_eq!(damage_of(&report, "missing_end").len(), 1, "{report:#}");
    fs::remove_dir_all(stage.repository_dir()).unwrap();
    fs::rename(&newer, stage.repository_dir()).unwrap();
    // Another cluster's server, and one that does not answer, say nothing of the archive.
    let mut other = PgServer::builder(primary_major()).start();
    let conninfo = other.socket_conninfo();
    assert!(stage.fails(stage.pitr(&["verify", "--server"]).arg(&conninfo), 1).contains("another cluster"));
    other.stop(StopMode::Fast);
    let said = stage.fails(stage.pitr(&["verify", "--server"]).arg(&conninfo), 1);
    assert!(said.contains("the server could not be asked"), "{said}");
    assert!(!said.contains("not everything could be read"), "{said}");
    // That its end may be missing is also said where the record of it is read.
    let history: Value =
        serde_json::from_str(&stage.ok(&mut stage.pitr(&["history", "--json", "--only", "verify"]))).unwrap();
    let last = &history["entries"][0];
    assert_eq!(last["outcome"], "unread", "{last}");
    assert!(last["problems"][0].as_str().unwrap().contains("the server's position"), "{last}");
    let page = stage.ok(&mut stage.pitr(&["info", "--html", "-"]));
    assert!(page.contains("<dt>Last verification</dt><dd class=\"value warn\">unread</dd>"), "{page}");
}

#[test]
fn damage_in_one_repository_is_told_though_another_is_sound() {
    let stage = Stage::folder("main");
    let server = archive(&stage, primary_major());
    drop(server);
    let copy = stage.path().join("copy");
    copy_tree(&stage.repository_dir(), &copy);
    let url = format!("file://{}", copy.display());
    let both = ["--repo", stage.url(), "--repo", &*url];
    let (status, report) = verify(&stage, &both);
    assert_eq!(status, 0, "{report:#}");
    let first = segments(&stage, 1);
    let path = &first[first.len() - 3];
    let mut bytes = fs::read(path).unwrap();
    let at = bytes.len() / 2;
    bytes[at] ^= 1;
    write(path, &bytes);
    let (status, report) = verify(&stage, &both);
    assert_eq!((status, &report["outcome"]), (4, &Value::from("damaged")), "{report:#}");
    let outcomes: Vec<_> =
        report["repositories"].as_array().unwrap().iter().map(|one| one["outcome"].clone()).collect();
    assert_eq!(outcomes, ["damaged", "sound"]);
    let finding = &report["repositories"][0]["findings"][0];
    assert!(finding["also_in"][0].as_str().unwrap().contains("copy"), "{finding:#}");
    assert_eq!(report["affected"]["unreachable"], serde_json::json!([]), "{report:#}");
    let text = stage.run(stage.pitr(&["verify"]).args(both));
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(text.contains("the promise that it is stored more than once is broken"), "{text}");
    // A good copy beside the damaged object is what readers take: then it is only to be known.
    let good = fs::read(copy.join(path.strip_prefix(stage.repository_dir()).unwrap())).unwrap();
    let digest = ObjectHead::decode(&good).unwrap().envelope.digest.short();
    fs::write(path.with_file_name(format!("{}.wal.r{digest}", name(path))), good).unwrap();
    let (status, report) = verify(&stage, &both);
    assert_eq!(status, 0, "{report:#}");
    assert_eq!(report["repositories"][0]["findings"][0]["weight"], "note", "{report:#}");
}

#[test]
fn a_copy_that_nobody_has_read_is_no_comfort() {
    let stage = Stage::folder("main");
    drop(short_archive(&stage));
    let copy = stage.path().join("copy");
    copy_tree(&stage.repository_dir(), &copy);
    let segment = segments(&stage, 1)[3].clone();
    flip(&segment, fs::metadata(&segment).unwrap().len() as usize / 2);
    damaged(&stage, "a segment");
    let url = format!("file://{}", copy.display());
    let both = ["--repo", stage.url(), "--repo", &*url];
    let also_in = |words: &[&str]| {
        let (status, report) = verify(&stage, &[&both[..], words].concat());
        assert_eq!(status, 4, "{report:#}");
        report["repositories"][0]["findings"][0]["also_in"].as_array().unwrap().len()
    };
    assert_eq!((also_in(&["--budget", "1kB"]), also_in(&[])), (0, 1));
}

#[test]
fn parts_of_the_open_segment_are_read() {
    let stage = Stage::folder("main");
    let server = stage.archiving(small(primary_major())).start();
    stage.init(&server);
    server.psql("create table t (g int, t text)");
    stage.backup(&server);
    insert(&server, 1000);
    server.archive_now();
    insert(&server, 500);
    let file = server.psql("select pg_walfile_name(pg_current_wal_flush_lsn())").trim().to_owned();
    let wal = fs::read(server.data_dir().join("pg_wal").join(&file)).unwrap();
    let offset = server.psql("select file_offset from pg_walfile_name_offset(pg_current_wal_flush_lsn())");
    let offset: usize = offset.trim().parse().unwrap();
    let runtime = Runtime::new().unwrap();
    runtime.block_on(async {
        let storage = storage::open(&StorageConfig::new(stage.url())).unwrap();
        let cluster = ClusterRepository::open(storage, &"main".parse().unwrap()).await.unwrap();
        let lineage = cluster.newest_lineage().await.unwrap();
        let segment: walship::pg::SegmentName = file.parse().unwrap();
        let size = lineage.lineage().segment_size;
        for from in (0..offset).step_by(9000) {
            let until = (from + 9000).min(offset);
            let start = walship::pg::Lsn(segment.start(size).0 + from as u64);
            lineage
                .put_tail(segment.timeline, start, wal[from..until].to_vec(), Compression::default())
                .await
                .unwrap();
        }
    });
    sound(&stage, &[]);
    let parts = matching(&stage, "tail/", "");
    assert!(parts.len() > 3);
    let kept = fs::read(&parts[2]).unwrap();
    let mut flipped = kept.clone();
    let at = kept.len() - 1;
    flipped[at] ^= 1;
    write(&parts[2], &flipped);
    let report = damaged(&stage, "a part");
    assert_eq!(damage_of(&report, "damaged").len(), 1, "{report:#}");
    assert!(!report["affected"]["unreachable"].as_array().unwrap().is_empty(), "{report:#}");
    fs::remove_file(&parts[2]).unwrap();
    let report = damaged(&stage, "a part is gone");
    assert_eq!(damage_of(&report, "missing").len(), 1, "{report:#}");
    fs::write(&parts[2], &kept).unwrap();
    // The end is gone: it was seen before.
    let last = parts.last().unwrap();
    let kept = fs::read(last).unwrap();
    fs::remove_file(last).unwrap();
    let report = damaged(&stage, "the last part is gone");
    assert_eq!(damage_of(&report, "missing_end").len(), 1, "{report:#}");
    fs::write(last, kept).unwrap();
    sound(&stage, &[]);
}

#[test]
fn a_budget_gets_round_to_everything_and_a_killed_run_is_gone_on_with() {
    let stage = Stage::folder("main");
    let server = archive(&stage, primary_major());
    drop(server);
    let mut runs = 0;
    loop {
        let (status, report) = verify(&stage, &["--budget", "2MB"]);
        assert_eq!(status, 0, "{report:#}");
        runs += 1;
        let one = &report["repositories"][0];
        if one["proven_since"].is_string() {
            assert_eq!(one["never_proven"], 0, "{one:#}");
            break;
        }
        assert_eq!(report["outcome"], "partly", "{report:#}");
        assert!(runs < 60, "{report:#}");
    }
    assert!(runs > 2, "{runs}");

    // A slow one is killed when something is noted.
    let total = sound(&stage, &["--anew"])["repositories"][0]["bytes"].as_u64().unwrap();
    let rate = format!("{}", total / 12);
    let mut slow = stage.pitr(&["verify", "--max-rate", &rate, "--workers", "1"]);
    slow.stdout(Stdio::null()).stderr(Stdio::null());
    let noted = matching(&stage, "verifications/", ".json").len();
    let mut child = process::spawn(slow).unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while matching(&stage, "verifications/", ".json").len() == noted {
        assert!(std::time::Instant::now() < deadline, "nothing was noted");
        std::thread::sleep(Duration::from_millis(50));
    }
    process::kill_tree(&mut child);
    let report = sound(&stage, &[]);
    let one = &report["repositories"][0];
    assert!(one["goes_on_from"].is_string(), "{one:#}");
    assert!(one["bytes"].as_u64().unwrap() < total, "{one:#}");
    let again = sound(&stage, &[]);
    assert_eq!(again["repositories"][0]["goes_on_from"], Value::Null);
    assert_eq!(again["repositories"][0]["objects_left"], 0);
}

#[test]
fn a_rate_is_kept_however_many_read_at_once() {
    let stage = Stage::folder("main");
    drop(short_archive(&stage));
    let timed = |words: &[&str]| {
        let begun = std::time::Instant::now();
        let report = sound(&stage, &[&["--anew"], words].concat());
        (begun.elapsed(), report["repositories"][0]["bytes"].as_u64().unwrap())
    };
    let (fast, total) = timed(&[]);
    let rate = total / 5;
    for workers in ["1", "8"] {
        let (took, bytes) = timed(&["--max-rate", &rate.to_string(), "--workers", workers]);
        assert!(bytes >= total, "{bytes} {total}");
        let least = bytes as f64 / rate as f64;
        assert!(took.as_secs_f64() >= least, "{workers}: {bytes} bytes at {rate} a second took {took:?}");
        assert!(took > fast, "{took:?} {fast:?}");
    }
}

#[test]
fn on_s3_an_outage_is_no_damage() {
    let s3 = S3Server::start();
    let stage = Stage::s3("main", &s3.endpoint());
    let server = stage.archiving(small(primary_major())).start();
    stage.init(&server);
    server.psql("create table t (g int, t text)");
    stage.backup(&server);
    for _ in 0..4 {
        insert(&server, 3000);
        server.archive_now();
    }
    sound(&stage, &[]);
    let key = s3.objects().into_keys().filter(|key| key.ends_with(".wal")).nth(2).unwrap();
    let wanted = key.clone();
    s3.set_faults(move |seen| {
        (seen.method == "GET" && seen.path.contains(&wanted)).then_some(Fault::S3(403, "AccessDenied"))
    });
    let (status, report) = verify(&stage, &[]);
    assert_eq!((status, &report["outcome"]), (1, &Value::from("unread")), "{report:#}");
    assert_eq!(report["affected"]["unreachable"], serde_json::json!([]), "{report:#}");
    assert!(!report["repositories"][0]["unread"].as_array().unwrap().is_empty(), "{report:#}");
    s3.heal();
    let mut bytes = s3.objects()[&key].to_vec();
    let at = bytes.len() / 2;
    bytes[at] ^= 1;
    let kept = s3.objects()[&key].clone();
    s3.put(&key, bytes);
    let report = damaged(&stage, "on S3");
    assert_eq!(damage_of(&report, "damaged").len(), 1, "{report:#}");
    s3.put(&key, kept);
    sound(&stage, &[]);
    s3.set_faults(|_| Some(Fault::S3(403, "AccessDenied")));
    let output = stage.run(&mut stage.pitr(&["verify"]));
    assert_eq!(output.status.code(), Some(1), "{output:?}");
}

/// The names of the backups that a report calls lost.
pub(crate) fn lost_backups(report: &Value) -> usize {
    report["affected"]["backups"].as_array().unwrap().len()
}

/// A server with a backup and a few segments behind it.
pub(crate) fn short_archive(stage: &Stage) -> PgServer {
    let server = stage.archiving(small(primary_major())).start();
    stage.init(&server);
    server.psql("create table t (g int, t text)");
    insert(&server, 3000);
    server.archive_now();
    stage.ok(&mut stage.walship_on(&server, &["backup", "--source", "local"]));
    for _ in 0..5 {
        insert(&server, 3000);
        server.archive_now();
    }
    server
}

pub(crate) fn flip(path: &Path, at: usize) -> Vec<u8> {
    let kept = fs::read(path).unwrap();
    let mut flipped = kept.clone();
    flipped[at] ^= 1;
    write(path, &flipped);
    kept
}

#[test]
fn an_archive_that_begins_too_late_for_its_backup_is_no_sound_one() {
    let stage = Stage::folder("main");
    drop(short_archive(&stage));
    let record = matching(&stage, "backups/catalog/", ".json")[0].clone();
    let record: Value = serde_json::from_slice(&fs::read(record).unwrap()).unwrap();
    let start: walship::pg::Lsn = record["start_lsn"].as_str().unwrap().parse().unwrap();
    let all = segments(&stage, 1);
    let needed = all.iter().filter(|path| {
        let segment: walship::pg::SegmentName = name(path).parse().unwrap();
        segment.start(walship::pg::SegmentSize::MIN) <= start
    });
    let needed: Vec<PathBuf> = needed.cloned().collect();
    assert!(!needed.is_empty() && needed.len() < all.len());
    needed.iter().for_each(|path| fs::remove_file(path).unwrap());
    // Nobody has ever seen them.
    let report = damaged(&stage, "the WAL of the backup");
    assert_eq!(damage_of(&report, "missing"), [name(needed.last().unwrap())], "{report:#}");
    assert_eq!(lost_backups(&report), 1, "{report:#}");
    assert!(!report["affected"]["unreachable"].as_array().unwrap().is_empty(), "{report:#}");
}

#[test]
fn pieces_beside_which_nothing_whole_is_stored_are_read() {
    let stage = Stage::folder("main");
    let mut server = short_archive(&stage);
    insert(&server, 300);
    let file = server.psql("select pg_walfile_name(pg_current_wal_flush_lsn())").trim().to_owned();
    let wal = server.data_dir().join("pg_wal").join(&file);
    server.stop(StopMode::Immediate);
    for name in [file.clone(), format!("{file}.partial")] {
        let path = stage.path().join(&name);
        fs::copy(&wal, &path).unwrap();
        stage.run(stage.walship(&["wal", "push"]).arg(&path).current_dir(server.data_dir()));
    }
    sound(&stage, &[]);
    for kind in [".partial.", ".incomplete."] {
        let path = files(&stage).into_iter().find(|(key, _)| key.contains(kind)).unwrap().1;
        let kept = flip(&path, fs::metadata(&path).unwrap().len() as usize - 1);
        let report = damaged(&stage, kind);
        let objects = damage_of(&report, "damaged");
        assert!(objects.len() == 1 && objects[0].contains(kind), "{report:#}");
        write(&path, &kept);
        sound(&stage, &[]);
    }
}

#[test]
fn documents_that_no_restore_reads_are_damaged_and_take_nothing() {
    let stage = Stage::folder("main");
    drop(short_archive(&stage));
    let started = matching(&stage, "backups/2", "started.json")[0].clone();
    let note = matching(&stage, "backups/2", "data/000001.json")[0].clone();
    for (path, from, to) in [
        (&started, "{", "["),
        (&started, "\"label\": \"", "\"label\": \"x"),
        (&note, "\"digest\": \"", "\"digest\": \"0"),
    ] {
        let kept = fs::read_to_string(path).unwrap();
        assert!(kept.contains(from), "{kept}");
        write(path, kept.replacen(from, to, 1).as_bytes());
        let report = damaged(&stage, from);
        assert_eq!(lost_backups(&report), 0, "{report:#}");
        assert_eq!(report["affected"]["unreachable"], serde_json::json!([]), "{report:#}");
        write(path, kept.as_bytes());
    }
    sound(&stage, &[]);
}

#[test]
fn a_damaged_begin_of_a_backup_that_did_not_complete_is_found_and_hinders_no_plan() {
    let stage = Stage::folder("main");
    drop(short_archive(&stage));
    let folder = lineage(&stage).join("backups/20200101T000000Z-0123456789abcdef");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("started.json"), "{").unwrap();
    let report = damaged(&stage, "a backup that did not complete");
    assert!(damage_of(&report, "damaged")[0].contains("20200101T000000Z"), "{report:#}");
    stage.ok(&mut stage.pitr(&["plan", "--latest"]));
    fs::remove_dir_all(folder).unwrap();
    sound(&stage, &[]);
}

#[test]
fn documents_that_cannot_be_read_do_not_hide_the_rest() {
    let stage = Stage::folder("main");
    drop(short_archive(&stage));
    // A run before, so that its record is looked for.
    sound(&stage, &[]);
    let stranger = lineage(&stage).join("gaps/00000001/stranger.json");
    fs::create_dir_all(stranger.parent().unwrap()).unwrap();
    fs::write(&stranger, "{}").unwrap();
    let report = damaged(&stage, "no gap");
    assert!(damage_of(&report, "damaged")[0].ends_with("/gaps"), "{report:#}");
    assert_eq!(report["repositories"][0]["objects_left"], 0, "{report:#}");
    assert!(report["repositories"][0]["objects"].as_u64().unwrap() > 5, "{report:#}");
    fs::remove_file(stranger).unwrap();
    for folder in ["verifications", "expires"] {
        let record = lineage(&stage).join(format!("history/{folder}/20200101T000000Z-0123456789abcdef.json"));
        fs::create_dir_all(record.parent().unwrap()).unwrap();
        fs::write(&record, "{").unwrap();
    }
    let report = sound(&stage, &[]);
    let left_out = |note: &&Value| note.as_str().unwrap().contains("a record of the history is left out");
    assert_eq!(report["notes"].as_array().unwrap().iter().filter(left_out).count(), 2, "{report:#}");
}

#[test]
fn damage_is_told_until_it_is_read_again() {
    let stage = Stage::folder("main");
    drop(short_archive(&stage));
    sound(&stage, &[]);
    let segment = segments(&stage, 1)[3].clone();
    let object = matching(&stage, "backups/2", "data/000001.tar")[0].clone();
    let half = |path: &Path| fs::metadata(path).unwrap().len() as usize / 2;
    let (good_segment, good_object) = (flip(&segment, half(&segment)), flip(&object, half(&object)));
    let full = damaged(&stage, "both");
    assert_eq!(damage_of(&full, "damaged").len(), 2, "{full:#}");
    // However small the budget: it is told, and does not keep the rest from being read.
    let mut ranges = Vec::new();
    for _ in 0..12 {
        let (status, report) = verify(&stage, &["--budget", "1kB"]);
        assert_eq!(status, 4, "{report:#}");
        assert_eq!(damage_of(&report, "damaged").len(), 2, "{report:#}");
        assert_eq!(
            report["affected"]["unreachable"].as_array().unwrap().len(),
            full["affected"]["unreachable"].as_array().unwrap().len()
        );
        assert_eq!(report["repositories"][0]["backups"][0]["outcome"], "damaged", "{report:#}");
        let read = report["repositories"][0]["wal"].as_array().unwrap().iter();
        ranges.extend(read.map(|range| range["first"].as_str().unwrap().to_owned()));
    }
    ranges.sort();
    ranges.dedup();
    assert!(ranges.len() > 1, "others have their turn: {ranges:?}");
    // Mended: it is read first.
    write(&segment, &good_segment);
    write(&object, &good_object);
    let (status, report) = verify(&stage, &["--budget", "50MB"]);
    assert_eq!((status, damage_of(&report, "damaged").len()), (0, 0), "{report:#}");
    sound(&stage, &[]);
}

#[test]
fn what_a_killed_run_has_found_is_told_by_the_one_that_goes_on_with_it() {
    let stage = Stage::folder("main");
    drop(short_archive(&stage));
    let manifest = matching(&stage, "backups/2", "manifest.json.zst")[0].clone();
    let kept = flip(&manifest, fs::metadata(&manifest).unwrap().len() as usize / 2);
    let report = damaged(&stage, "the manifest");
    // Without its record it is as if it had been killed.
    let id = report["id"].as_str().unwrap();
    fs::remove_file(lineage(&stage).join(format!("history/verifications/{id}.json"))).unwrap();
    let report = damaged(&stage, "the manifest, by the run before");
    assert!(report["repositories"][0]["goes_on_from"].is_string(), "{report:#}");
    assert_eq!(damage_of(&report, "damaged").len(), 1, "{report:#}");
    assert!(report.to_string().contains("not read again since"), "{report:#}");
    assert_eq!(lost_backups(&report), 1, "{report:#}");
    write(&manifest, &kept);
    sound(&stage, &[]);
}

#[test]
fn of_a_copy_elsewhere_nothing_is_proven() {
    let stage = Stage::folder("main");
    drop(short_archive(&stage));
    sound(&stage, &[]);
    let copy = stage.path().join("copy");
    copy_tree(&stage.repository_dir(), &copy);
    let url = format!("file://{}", copy.display());
    let (status, report) = verify(&stage, &["--repo", &url, "--budget", "1kB"]);
    assert_eq!((status, &report["outcome"]), (0, &Value::from("partly")), "{report:#}");
    assert!(report["repositories"][0]["never_proven"].as_u64().unwrap() > 0, "{report:#}");
    let (_, report) = verify(&stage, &["--budget", "1kB"]);
    assert_eq!(report["repositories"][0]["never_proven"], 0, "{report:#}");
}

#[test]
fn what_was_accepted_is_not_told_again_of_others_or_by_another_machine() {
    let stage = Stage::folder("main");
    drop(short_archive(&stage));
    let elsewhere = stage.path().join("other machine");
    let other_machine = |words: &[&str]| {
        let mut command = stage.pitr(&["verify", "--json"]);
        let output = stage.run(command.args(words).env("WALSHIP_STATE_DIR", &elsewhere));
        (output.status.code().unwrap(), parsed(&output))
    };
    let copy = stage.path().join("copy");
    copy_tree(&stage.repository_dir(), &copy);
    let url = format!("file://{}", copy.display());
    let both = ["--repo", stage.url(), "--repo", &*url];
    assert_eq!((verify(&stage, &both).0, other_machine(&both).0), (0, 0));
    // The end is gone in the first, and nothing there tells of it.
    let last = segments(&stage, 1).pop().unwrap();
    let kept = fs::read(&last).unwrap();
    fs::remove_file(&last).unwrap();
    fs::remove_dir_all(lineage(&stage).join("verifications")).unwrap();
    let (status, report) = other_machine(&both);
    assert_eq!(status, 4, "{report:#}");
    let accept = [&both[..], &["--accept-missing", "--reason", "known"]].concat();
    let (status, report) = other_machine(&accept);
    assert_eq!(status, 0, "{report:#}");
    for (status, report) in [verify(&stage, &both), other_machine(&both), verify(&stage, &[])] {
        assert_eq!(status, 0, "{report:#}");
    }
    // It comes back, and is gone again: that nobody has accepted.
    fs::write(&last, kept).unwrap();
    assert_eq!(verify(&stage, &both).0, 0);
    fs::remove_file(&last).unwrap();
    assert_eq!(verify(&stage, &both).0, 4);
}

#[test]
fn what_comes_to_a_repository_later_is_waited_for() {
    let stage = Stage::folder("main");
    drop(short_archive(&stage));
    let copy = stage.path().join("copy");
    copy_tree(&stage.repository_dir(), &copy);
    let all = segments(&stage, 1);
    let late: Vec<PathBuf> = all[all.len() - 2..]
        .iter()
        .map(|path| copy.join(path.strip_prefix(stage.repository_dir()).unwrap()))
        .collect();
    late.iter().for_each(|path| fs::remove_file(path).unwrap());
    let url = format!("file://{}", copy.display());
    let mut command = stage.pitr(&["verify", "--json", "--repo", stage.url(), "--repo", &url]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    for (from, to) in all[all.len() - 2..].iter().zip(&late) {
        std::thread::sleep(Duration::from_secs(7));
        fs::copy(from, to).unwrap();
    }
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{:#}", parsed(&output));
}

#[test]
fn a_file_that_cannot_be_read_does_not_hide_the_damage_beside_it() {
    let stage = Stage::folder("main");
    let server = short_archive(&stage);
    for _ in 0..12 {
        insert(&server, 100);
        server.archive_now();
    }
    drop(server);
    let all = segments(&stage, 1);
    let (unreadable, damaged) = all.split_at(all.len() - 2);
    flip(&damaged[0], 300);
    // More of them than an outage needs to be taken for one.
    let unreadable = &unreadable[unreadable.len() - 10..];
    for path in unreadable {
        fs::set_permissions(path, fs::Permissions::from_mode(0o000)).unwrap();
    }
    let output = stage.run(stage.pitr_as_user(&["verify", "--json"]).arg("--workers").arg("1"));
    let report = parsed(&output);
    assert_eq!((output.status.code(), &report["outcome"]), (Some(4), &Value::from("damaged")), "{report:#}");
    assert_eq!(damage_of(&report, "damaged").len(), 1, "{report:#}");
    let unread = report["repositories"][0]["unread"].as_array().unwrap();
    let told =
        |path: &&PathBuf| unread.iter().any(|one| one["object"].as_str().unwrap().contains(&name(path)));
    assert_eq!(unreadable.iter().filter(told).count(), unreadable.len(), "{report:#}");
}
