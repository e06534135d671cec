//! Damage that a verification has found is told until it was found sound.

use std::fs;

use serde_json::Value;
use walship_tests::postgres::primary_major;
use walship_tests::stage::Stage;

use super::metrics::archived;
use super::{Metrics, Serving};

fn verify(stage: &Stage, words: &[&str], status: i32) {
    let output = stage.run(stage.pitr(&["verify"]).args(words));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(status), "{words:?}: {said}");
}

fn is_told(metrics: &Metrics) -> bool {
    let told = metrics.has_problem("verification_failed");
    assert_eq!(metrics.one("walship_verification_last_good", &[]), f64::from(u8::from(!told)));
    told
}

#[test]
fn damage_is_told_however_much_was_verified_since_and_wherever_it_has_moved() {
    let stage = Stage::folder("main");
    let server = archived(&stage, primary_major());
    stage.ok(&mut stage.walship_on(&server, &["backup", "--source", "local"]));
    server.archive_now();
    let info: Value = serde_json::from_str(&stage.ok(&mut stage.pitr(&["info", "--json"]))).unwrap();
    let backups: Vec<_> =
        info["backups"].as_array().unwrap().iter().map(|one| one["id"].as_str().unwrap()).collect();
    let object = format!("main/0001/backups/{}/data/000001.tar", backups[0]);
    let sound = fs::read(stage.repository_dir().join(&object)).unwrap();
    let mut damaged = sound.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 0x10;
    fs::write(stage.repository_dir().join(&object), damaged).unwrap();
    verify(&stage, &[], 4);
    // More of another backup than watching looks at of whatever has a record.
    for _ in 0..21 {
        verify(&stage, &["--backup", backups[2]], 0);
    }
    let serving = Serving::start(&stage, None);
    assert!(is_told(&serving.fresh()));
    drop(serving);

    let elsewhere = stage.path().join("elsewhere");
    fs::rename(stage.repository_dir(), &elsewhere).unwrap();
    let text = fs::read_to_string(stage.config()).unwrap();
    let url = format!("file://{}", elsewhere.display());
    fs::write(stage.config(), text.replace(stage.url(), &url)).unwrap();
    let serving = Serving::start(&stage, None);
    assert!(is_told(&serving.fresh()), "nobody has read it there");
    fs::write(elsewhere.join(&object), sound).unwrap();
    // What was damaged is read, whatever else is not.
    verify(&stage, &["--backup", backups[0]], 0);
    let over = serving.wait("it is over", |metrics| !is_told(metrics));
    assert_eq!(over.problems(), [], "{over:#?}");
}
