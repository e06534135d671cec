//! `pitr verify` where it could be blind: repositories that were copied or changed behind its back, removals that ended early
//! or are at work, folders that cannot be read, WAL that is stored in parts.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;
use tokio::runtime::Runtime;
use walship::codec::Compression;
use walship::pg::{Lsn, SegmentName};
use walship::repository::{ClusterRepository, LineageRepository};
use walship::storage::{self, StorageConfig};
use walship_tests::process::{self, copy_tree};
use walship_tests::s3_inprocess::{Fault, S3Server};
use walship_tests::stage::Stage;

use crate::expire::Scene;
use crate::verify::{
    damage_of, damaged, flip, insert, lineage, lost_backups, lying_rollup, matching, name, parsed, segments,
    short_archive, sound, twins, verify, write,
};

fn never_proven(report: &Value) -> u64 {
    report["repositories"][0]["never_proven"].as_u64().unwrap()
}

fn unread(report: &Value) -> Vec<String> {
    let unread = report["repositories"][0]["unread"].as_array().unwrap().iter();
    unread.map(|one| one["object"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_backup_that_a_removal_has_left_is_missed_when_it_is_lost() {
    let s3 = S3Server::start();
    let scene = Scene::s3(&s3);
    let missing = || damage_of(&verify(&scene.stage, &["--no-server"]).1, "missing");
    let none = Vec::<String>::new();
    let old = &scene.backups[0];
    // The removal says what it is about to do, and may not.
    s3.set_faults(|seen| {
        let removes = seen.method == "DELETE" && seen.path.contains("/backups/catalog/");
        removes.then_some(Fault::S3(403, "AccessDenied"))
    });
    let refused = scene.stage.fails(&mut scene.stage.pitr(&["expire", "--confirm", "--yes"]), 1);
    assert!(refused.contains("AccessDenied"), "{refused}");
    s3.heal();
    assert_eq!(missing(), none);
    let key = s3.objects().into_keys().find(|key| key.ends_with(&format!("-{old}.json"))).unwrap();
    let kept = s3.objects()[&key].clone();
    s3.remove(&key);
    assert_eq!(missing(), [format!("backup {old}")]);
    s3.put(&key, kept);
    assert_eq!(missing(), none);
    // What it does remove is not missed: it says so itself, and that it came to its end says so as well.
    scene.expire(&["--confirm", "--yes"]);
    for one in [".backups.json", ".done.json"] {
        let lost: Vec<_> = s3.objects().into_iter().filter(|(key, _)| key.ends_with(one)).collect();
        assert!(!lost.is_empty(), "{one}");
        lost.iter().for_each(|(key, _)| assert!(s3.remove(key)));
        assert_eq!(missing(), none, "without {one}");
        lost.into_iter().for_each(|(key, bytes)| s3.put(&key, bytes));
    }
}

/// Opens the lineage in a stage's folder.
async fn opened(stage: &Stage) -> LineageRepository {
    let storage = storage::open(&StorageConfig::new(stage.url())).unwrap();
    let cluster = ClusterRepository::open(storage, &"main".parse().unwrap()).await.unwrap();
    cluster.newest_lineage().await.unwrap()
}

/// Puts the first bytes of a segment of one archive into another one, in parts.
fn in_parts(from: &Stage, to: &Stage, segment: &Path, bytes: usize) {
    Runtime::new().unwrap().block_on(async {
        let segment: SegmentName = name(segment).parse().unwrap();
        let (from, to) = (opened(from).await, opened(to).await);
        let wal = from.segment_bytes(segment).await.unwrap().unwrap();
        for at in (0..bytes).step_by(300_000) {
            let part = wal[at..bytes.min(at + 300_000)].to_vec();
            let start = Lsn(segment.start(to.lineage().segment_size).0 + at as u64);
            to.put_tail(segment.timeline, start, part, Compression::default()).await.unwrap();
        }
    });
}

#[test]
fn a_break_beside_what_is_stored_in_parts_is_found() {
    const WHOLE: usize = 1 << 20;
    let (stage, elsewhere) = (Stage::folder("main"), Stage::folder("main"));
    let (ours, theirs) = twins(&stage, &elsewhere);
    let tail = lineage(&stage).join("tail");
    let kept = stage.path().join("kept");
    copy_tree(&stage.repository_dir(), &kept);
    let at = ours.len() - 3;
    assert!(theirs.iter().any(|path| name(path) == name(&ours[at])));
    // Its own WAL in parts goes on, from what is before it and to what is behind it; so does the open segment.
    let last = ours.last().unwrap();
    for path in [&ours[at], last] {
        in_parts(&stage, &stage, path, if path == last { WHOLE / 2 } else { WHOLE });
        fs::remove_file(path).unwrap();
    }
    sound(&stage, &[]);
    // That of another history does not.
    fs::remove_dir_all(&tail).unwrap();
    in_parts(&elsewhere, &stage, &ours[at], WHOLE);
    let report = damaged(&stage, "parts of another history");
    let broken = damage_of(&report, "broken");
    assert!(broken.contains(&name(&ours[at])) && broken.contains(&name(&ours[at + 1])), "{report:#}");
    assert!(!report["affected"]["unreachable"].as_array().unwrap().is_empty(), "{report:#}");
    // Nor that of an open segment: it ends where the one before it does.
    fs::remove_dir_all(stage.repository_dir()).unwrap();
    copy_tree(&kept, &stage.repository_dir());
    fs::remove_file(last).unwrap();
    in_parts(&elsewhere, &stage, last, WHOLE / 2);
    let report = damaged(&stage, "an open segment of another history");
    assert_eq!(damage_of(&report, "broken"), [format!("parts of {}", name(last))], "{report:#}");
    let lost = report["affected"]["unreachable"].as_array().unwrap();
    let start = name(last).parse::<SegmentName>().unwrap().start(walship::pg::SegmentSize::MIN);
    assert!(lost.iter().any(|lost| lost["from_lsn"] == start.to_string()), "{report:#}");
}

#[test]
fn of_a_copy_in_the_place_of_the_original_nothing_is_proven() {
    let stage = Stage::folder("main");
    drop(short_archive(&stage));
    sound(&stage, &[]);
    let (_, report) = verify(&stage, &["--budget", "1kB"]);
    assert_eq!(never_proven(&report), 0, "{report:#}");
    // As a mount, or a restored backup of the repository, comes to lie there.
    let original = stage.path().join("original");
    fs::rename(stage.repository_dir(), &original).unwrap();
    copy_tree(&original, &stage.repository_dir());
    let (status, report) = verify(&stage, &["--budget", "1kB"]);
    assert_eq!((status, &report["outcome"]), (0, &Value::from("partly")), "{report:#}");
    assert!(never_proven(&report) > 0, "{report:#}");
    // The original is what it was.
    fs::remove_dir_all(stage.repository_dir()).unwrap();
    fs::rename(&original, stage.repository_dir()).unwrap();
    let (_, report) = verify(&stage, &["--budget", "1kB"]);
    assert_eq!(never_proven(&report), 0, "{report:#}");
    // What was damaged in it may be so in a copy, and is told until it is read there.
    let segment = segments(&stage, 1)[3].clone();
    let kept = flip(&segment, 700);
    damaged(&stage, "a segment");
    fs::rename(stage.repository_dir(), &original).unwrap();
    copy_tree(&original, &stage.repository_dir());
    let (status, report) = verify(&stage, &["--budget", "1B"]);
    assert_eq!(status, 4, "{report:#}");
    assert!(
        damage_of(&report, "damaged").iter().any(|object| object.contains(&name(&segment))),
        "{report:#}"
    );
    write(&segment, &kept);
    sound(&stage, &[]);
}

#[test]
fn of_a_copy_in_the_place_of_the_original_on_s3_nothing_is_proven() {
    let s3 = S3Server::start();
    let stage = Stage::s3("main", &s3.endpoint());
    drop(short_archive(&stage));
    sound(&stage, &[]);
    let (_, report) = verify(&stage, &["--budget", "1kB"]);
    assert_eq!(never_proven(&report), 0, "{report:#}");
    // The same objects, written anew.
    std::thread::sleep(Duration::from_millis(1100));
    s3.objects().into_iter().for_each(|(key, bytes)| s3.put(&key, bytes));
    let (status, report) = verify(&stage, &["--budget", "1kB"]);
    assert_eq!((status, &report["outcome"]), (0, &Value::from("partly")), "{report:#}");
    assert!(never_proven(&report) > 0, "{report:#}");
}

#[test]
fn a_flipped_bit_in_what_is_proven_is_damage_and_takes_nothing_along() {
    let stage = Stage::folder("main");
    drop(short_archive(&stage));
    let manifest = matching(&stage, "backups/2", "manifest.json.zst")[0].clone();
    let kept = flip(&manifest, fs::metadata(&manifest).unwrap().len() as usize / 2);
    let id = damaged(&stage, "a manifest")["id"].as_str().unwrap().to_owned();
    let documents = || matching(&stage, &format!("verifications/{id}/"), ".json");
    // A digit, so that it still reads: what that verification has found is not forgotten.
    let last = documents().pop().unwrap();
    let text = fs::read_to_string(&last).unwrap();
    let digit = text.find("\"at\": \"20").unwrap() + "\"at\": \"2".len();
    flip(&last, digit);
    let budget = ["--budget", "1kB"];
    let told = |what: &str| {
        let (status, report) = verify(&stage, &budget);
        assert_eq!(status, 4, "{what}: {report:#}");
        damage_of(&report, "damaged").into_iter().filter(|object| object.contains(what)).count()
    };
    assert_eq!((told(&name(&last)), told("manifest")), (1, 1));
    // Removed, it is told of no more.
    fs::remove_file(&last).unwrap();
    assert_eq!((told(&name(&last)), told("manifest")), (0, 1));
    write(&manifest, &kept);
    sound(&stage, &[]);
}

#[test]
fn a_folder_that_cannot_be_read_is_named_and_the_rest_is_read() {
    let stage = Stage::folder("main");
    drop(short_archive(&stage));
    sound(&stage, &[]);
    let user = || {
        let output = stage.run(&mut stage.pitr_as_user(&["verify", "--json"]));
        (output.status.code().unwrap(), parsed(&output))
    };
    let object = matching(&stage, "backups/2", "data/000001.tar")[0].clone();
    let segment = segments(&stage, 1)[3].clone();
    for (folder, reads_backup) in
        [("wal/00000001/00000000", true), ("wal", true), ("backups/catalog", false), ("gaps", true)]
    {
        let path = lineage(&stage).join(folder);
        fs::create_dir_all(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).unwrap();
        let (status, report) = user();
        assert_eq!((status, &report["outcome"]), (1, &Value::from("unread")), "{folder}: {report:#}");
        assert!(unread(&report).iter().any(|object| object.ends_with(folder)), "{folder}: {report:#}");
        assert_eq!(report["repositories"][0]["findings"], serde_json::json!([]), "{folder}: {report:#}");
        assert_eq!(report["affected"]["unreachable"], serde_json::json!([]), "{folder}: {report:#}");
        assert!(report["repositories"][0]["proven_since"].is_null(), "{folder}: {report:#}");
        let read = report["repositories"][0]["backups"].as_array().unwrap().len();
        assert_eq!(read, usize::from(reads_backup), "{folder}: {report:#}");
        // What may be there is not accepted as missing.
        let mut accepting = stage.pitr_as_user(&["verify", "--json", "--accept-missing", "--reason", "x"]);
        let report = parsed(&stage.run(&mut accepting));
        assert!(report["notes"].to_string().contains("nothing was accepted as missing"), "{report:#}");
        fs::set_permissions(&path, mode).unwrap();
        sound(&stage, &[]);
    }
    // What lies beside it is found, and what was found there is not forgotten.
    let kept_segment = flip(&segment, fs::metadata(&segment).unwrap().len() as usize / 2);
    damaged(&stage, "a segment");
    let wal = lineage(&stage).join("wal/00000001");
    let mode = fs::metadata(&wal).unwrap().permissions();
    fs::set_permissions(&wal, fs::Permissions::from_mode(0o000)).unwrap();
    let kept = flip(&object, fs::metadata(&object).unwrap().len() as usize / 2);
    let (status, report) = user();
    assert_eq!(status, 4, "{report:#}");
    let objects = damage_of(&report, "damaged");
    assert_eq!(objects.len(), 2, "{report:#}");
    assert_eq!(lost_backups(&report), 1, "{report:#}");
    fs::set_permissions(&wal, mode).unwrap();
    write(&object, &kept);
    write(&segment, &kept_segment);
    sound(&stage, &[]);
}

#[test]
fn a_small_file_that_cannot_be_read_does_not_hide_the_rest() {
    let stage = Stage::folder("main");
    drop(short_archive(&stage));
    let record = matching(&stage, "backups/catalog/", ".json")[0].clone();
    let started = matching(&stage, "backups/2", "started.json")[0].clone();
    let gap = lineage(&stage)
        .join("gaps/00000001/0000000099000000-000000009A000000-20260101T000000Z-0123456789abcdef.json");
    fs::create_dir_all(gap.parent().unwrap()).unwrap();
    let segment = segments(&stage, 1)[3].clone();
    for path in [&record, &started, &gap] {
        if *path == gap {
            fs::write(path, "{}").unwrap();
        }
        let mode = fs::metadata(path).unwrap().permissions();
        fs::set_permissions(path, fs::Permissions::from_mode(0o000)).unwrap();
        let looked = |damages: usize| {
            let report = parsed(&stage.run(&mut stage.pitr_as_user(&["verify", "--json"])));
            let expected = if damages > 0 { "damaged" } else { "unread" };
            assert_eq!(report["outcome"], expected, "{}: {report:#}", path.display());
            assert_eq!(damage_of(&report, "damaged").len(), damages, "{report:#}");
            let read = if *path == record { 5 } else { 11 };
            assert!(report["repositories"][0]["objects"].as_u64().unwrap() > read, "{report:#}");
            assert!(unread(&report).iter().any(|object| object.contains(&name(path))), "{report:#}");
        };
        looked(0);
        let kept = flip(&segment, fs::metadata(&segment).unwrap().len() as usize / 2);
        looked(1);
        write(&segment, &kept);
        fs::set_permissions(path, mode).unwrap();
    }
    fs::remove_file(gap).unwrap();
    sound(&stage, &[]);
}

#[test]
fn a_link_in_the_repository_is_named_and_the_rest_is_read() {
    let stage = Stage::folder("main");
    drop(short_archive(&stage));
    let segment = segments(&stage, 1)[3].clone();
    let away = stage.path().join("away.wal");
    fs::rename(&segment, &away).unwrap();
    std::os::unix::fs::symlink(&away, &segment).unwrap();
    let (status, report) = verify(&stage, &[]);
    assert_eq!((status, &report["outcome"]), (1, &Value::from("unread")), "{report:#}");
    assert!(unread(&report).iter().any(|object| object.contains(&name(&segment))), "{report:#}");
    assert!(report["repositories"][0]["objects"].as_u64().unwrap() > 5, "{report:#}");
}

#[test]
fn looking_can_be_interrupted() {
    let s3 = S3Server::start();
    let stage = Stage::s3("main", &s3.endpoint());
    drop(short_archive(&stage));
    let (asked, was_asked) = std::sync::mpsc::channel();
    s3.set_faults(move |seen| {
        let looks = seen.query.contains("%2Fwal%2F") || seen.query.contains("/wal/");
        looks.then(|| asked.send(()).unwrap()).map(|()| Fault::Late(Duration::from_secs(30)))
    });
    let mut command = stage.pitr(&["verify"]);
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    let child = process::spawn(command).unwrap();
    was_asked.recv_timeout(Duration::from_secs(60)).unwrap();
    let told = Instant::now();
    process::signal(child.id(), Signal::SIGINT);
    let output = child.wait_with_output().unwrap();
    assert!(told.elapsed() < Duration::from_secs(10), "{:?}", told.elapsed());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && said.contains("interrupted"), "{said}");
    s3.heal();
    sound(&stage, &[]);
}

#[test]
fn looking_counts_against_the_budget() {
    let stage = Stage::folder("main");
    let server = short_archive(&stage);
    insert(&server, 9000);
    server.archive_now();
    drop(server);
    let kept = stage.path().join("kept");
    copy_tree(&stage.repository_dir(), &kept);
    let read = || {
        let (status, report) = verify(&stage, &["--budget", "400kB", "--workers", "1"]);
        assert_eq!((status, &report["outcome"]), (0, &Value::from("partly")), "{report:#}");
        let wal = report["repositories"][0]["wal"].as_array().unwrap();
        wal.iter().map(|range| range["segments"].as_u64().unwrap()).sum::<u64>()
    };
    let without_parts = read();
    fs::remove_dir_all(stage.repository_dir()).unwrap();
    copy_tree(&kept, &stage.repository_dir());
    // Parts are read each time, before all else.
    let last = segments(&stage, 1).pop().unwrap();
    in_parts(&stage, &stage, &last, 1 << 20);
    fs::remove_file(last).unwrap();
    let with_parts = read();
    assert!(0 < with_parts && with_parts < without_parts, "{with_parts} and {without_parts}");
}

#[test]
fn what_is_wrong_with_the_index_is_told_whatever_is_read() {
    let stage = Stage::folder("main");
    let server = short_archive(&stage);
    for _ in 0..6 {
        insert(&server, 3000);
        server.archive_now();
    }
    drop(server);
    stage.ok(&mut stage.pitr(&["index"]));
    sound(&stage, &[]);
    let lying: PathBuf = lying_rollup(&stage);
    assert_eq!(damage_of(&damaged(&stage, "a roll-up lies"), "index").len(), 1);
    for run in 0..5 {
        let (status, report) = verify(&stage, &["--budget", "1kB"]);
        assert_eq!((status, damage_of(&report, "index").len()), (4, 1), "run {run}: {report:#}");
    }
    fs::remove_file(lying).unwrap();
    let (status, report) = verify(&stage, &["--budget", "50MB"]);
    assert_eq!(status, 0, "{report:#}");
    sound(&stage, &[]);
}

#[test]
fn wal_that_is_on_its_way_is_waited_for() {
    let stage = Stage::folder("main");
    drop(short_archive(&stage));
    let all = segments(&stage, 1);
    let late = &all[all.len() - 2];
    let kept = fs::read(late).unwrap();
    fs::remove_file(late).unwrap();
    let mut command = stage.pitr(&["verify", "--json"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = process::spawn(command).unwrap();
    std::thread::sleep(Duration::from_secs(25));
    fs::write(late, kept).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{:#}", parsed(&output));
}
