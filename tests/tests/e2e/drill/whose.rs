//! Of several repositories a drill proves the one that it read.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use walship_tests::postgres::primary_major;
use walship_tests::process;

use super::Origin;
use crate::pitr::find;

/// What the newest drill on record in a repository says of that.
fn read_here(root: &Path) -> Option<bool> {
    let folder = fs::read_dir(root.join("main/0001/history/drills")).unwrap();
    let newest = folder.map(|entry| entry.unwrap().path()).max()?;
    let record: Value = serde_json::from_slice(&fs::read(newest).unwrap()).unwrap();
    record["read_here"].as_bool()
}

#[test]
fn a_drill_says_which_repository_it_read() {
    let origin = Origin::make(primary_major());
    let (first, second) = (origin.stage.repository_dir(), origin.stage.path().join("second"));
    process::run_ok(Command::new("cp").arg("-a").args([&first, &second]));
    let drilled = |repositories: &[&Path]| {
        let urls: Vec<String> =
            repositories.iter().map(|root| format!("file://{}", root.display())).collect();
        let mut words = vec!["--latest", "--no-count", "--no-amcheck"];
        words.extend(urls.iter().flat_map(|url| ["--repo", url]));
        origin.report(&words, 0);
        (read_here(&first), read_here(&second))
    };
    assert_eq!(drilled(&[&first, &second]), (Some(true), Some(false)));
    assert_eq!(drilled(&[&second]), (Some(true), Some(true)));
    // One that cannot be read takes nothing away from the first that can.
    let (third, gone) = (origin.stage.path().join("third"), origin.stage.path().join("gone"));
    process::run_ok(Command::new("cp").arg("-a").args([&first, &third]));
    assert_eq!(drilled(&[&gone, &second, &third]), (Some(true), Some(true)));
    assert_eq!(read_here(&third), Some(false));
    // Nor does what the drill has no need of.
    let unneeded = fs::read_dir(first.join("main/0001/wal/00000001/00000000")).unwrap();
    let unneeded =
        unneeded.map(|entry| entry.unwrap().path()).filter(|path| path.extension() == Some("wal".as_ref()));
    fs::remove_file(unneeded.min().unwrap()).unwrap();
    assert_eq!(drilled(&[&first, &second]), (Some(true), Some(false)));
    // With what one lacks taken from the other neither is proven.
    fs::remove_file(find(&first, &format!("{}.wal", origin.segments[1])).unwrap()).unwrap();
    assert_eq!(drilled(&[&first, &second]), (Some(false), Some(false)));
}
