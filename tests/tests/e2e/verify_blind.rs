//! `pitr verify` where it could be blind: repositories that were copied or changed behind its back, removals that ended early
//! or are at work, folders that cannot be read, WAL that is stored in parts.

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use tokio::runtime::Runtime;
use walship::codec::Compression;
use walship::pg::{Lsn, SegmentName};
use walship::repository::{ClusterRepository, LineageRepository};
use walship::storage::{self, StorageConfig};
use walship_tests::process::copy_tree;
use walship_tests::s3_inprocess::{Fault, S3Server};
use walship_tests::stage::Stage;

use crate::expire::Scene;
use crate::verify::{
    damage_of, damaged, flip, lineage, matching, name, short_archive, sound, twins, verify, write,
};

fn never_proven(report: &Value) -> u64 {
    report["repositories"][0]["never_proven"].as_u64().unwrap()
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
    // What it does remove is not missed; nor is it when that came to its end without saying so.
    scene.expire(&["--confirm", "--yes"]);
    let done = s3.objects().into_keys().filter(|key| key.ends_with(".done.json"));
    done.for_each(|key| assert!(s3.remove(&key)));
    assert_eq!(missing(), none);
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
    let mut copy = std::process::Command::new("cp");
    let copied = copy.arg("-a").arg(&original).arg(stage.repository_dir()).status().unwrap();
    assert!(copied.success());
    let (status, report) = verify(&stage, &["--budget", "1kB"]);
    assert_eq!((status, &report["outcome"]), (0, &Value::from("partly")), "{report:#}");
    assert!(never_proven(&report) > 0, "{report:#}");
    // The original is what it was.
    fs::remove_dir_all(stage.repository_dir()).unwrap();
    fs::rename(&original, stage.repository_dir()).unwrap();
    let (_, report) = verify(&stage, &["--budget", "1kB"]);
    assert_eq!(never_proven(&report), 0, "{report:#}");
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
