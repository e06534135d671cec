//! `pitr verify` where it could be blind: repositories that were copied or changed behind its back, removals that ended early
//! or are at work, folders that cannot be read, WAL that is stored in parts.

use walship_tests::s3_inprocess::{Fault, S3Server};

use crate::expire::Scene;
use crate::verify::{damage_of, verify};

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
