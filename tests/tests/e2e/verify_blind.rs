//! `pitr verify` where it could be blind: repositories that were copied or changed behind its back, removals that ended early
//! or are at work, folders that cannot be read, WAL that is stored in parts.

use std::fs;
use std::time::Duration;

use serde_json::Value;
use walship_tests::s3_inprocess::{Fault, S3Server};
use walship_tests::stage::Stage;

use crate::expire::Scene;
use crate::verify::{damage_of, damaged, flip, matching, name, short_archive, sound, verify, write};

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
