//! SIGKILL at swept system calls and at random moments, in every program that writes something that
//! matters: push, fetch, backup, restore, on a folder and on S3.
//!
//! Whatever moment is hit: never a wrong byte under a final name, never an acknowledged segment missing,
//! never a half backup offered, never a half restored data directory that PostgreSQL starts from, and
//! the next run succeeds. A hundred rounds; ten times as many with `WALSHIP_CAMPAIGN=1`. The moments come
//! from `WALSHIP_SEED`.

mod killer;
mod scene;

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::Path;

use walship::pg::SegmentName;
use walship_tests::random::Random;
use walship_tests::{bins, note, seed};

use killer::{Ended, Killer};
use scene::Scene;

/// How many rounds of each kind.
struct Rounds {
    push: usize,
    fetch: usize,
    backup: usize,
    restore: usize,
}

impl Rounds {
    fn of(push: usize, fetch: usize, backup: usize, restore: usize) -> Self {
        let factor = if walship_tests::campaign() { 10 } else { 1 };
        Self {
            push: push * factor,
            fetch: fetch * factor,
            backup: backup * factor,
            restore: restore * factor,
        }
    }
}

#[test]
fn kills_do_no_harm_on_a_folder() {
    run("folder", Scene::on_a_folder, &Rounds::of(30, 22, 5, 5));
}

#[test]
fn kills_do_no_harm_on_s3() {
    run("S3", Scene::on_s3, &Rounds::of(18, 12, 4, 4));
}

fn run(store: &str, scene: fn() -> Scene, rounds: &Rounds) {
    let seed = seed();
    println!("kill tests, {store}: WALSHIP_SEED={seed}");
    let scene = scene();
    let mut random = Random::new(seed ^ store.len() as u64);
    let push = push_rounds(&scene, rounds.push, &mut random);
    let fetch = fetch_rounds(&scene, rounds.fetch, &mut random);
    let backup = backup_rounds(&scene, rounds.backup, &mut random);
    let restore = restore_rounds(&scene, rounds.restore, &mut random);
    note(&format!(
        "kill tests, {store}, seed {seed}: rounds (of which hit before their end): push {push}, fetch {fetch}, \
         backup {backup}, restore {restore}; nothing wrong, missing or half"
    ));
    for count in [push, fetch, backup, restore] {
        assert!(count.killed > 0, "some kills hit: {count}");
    }
}

/// How many rounds there were.
#[derive(Clone, Copy)]
struct Count {
    all: usize,
    /// Those in which the kill came before the end.
    killed: usize,
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.all, self.killed)
    }
}

fn push_rounds(scene: &Scene, rounds: usize, random: &mut Random) -> Count {
    let mut acknowledged = BTreeSet::new();
    let segment = |round: usize| &scene.segments[round % scene.segments.len()];
    let push = |round: usize| {
        let path = scene.data_dir.join("pg_wal").join(segment(round).0.to_string());
        let mut command = scene.pushing.command(&bins::archive_cmd());
        command.arg(path);
        command
    };
    scene.forget_pushed(segment(0).0);
    let killer = Killer::watch(&push(0), scene.scratch(), random);
    let rounds = rounds.max(killer.sweep_rounds());
    let mut killed = 0;
    for round in 0..rounds {
        let (name, bytes) = segment(round);
        scene.forget_pushed(*name);
        acknowledged.remove(name);

        let (moment, ended) = killer.strike(&push(round), round, random);
        // Reading checks everything: what is there is right, or this fails.
        let stored = scene.pushed(*name);
        match ended {
            Ended::Killed => killed += 1,
            Ended::Done => assert!(stored.is_some(), "{name} was acknowledged and is missing ({moment})"),
            Ended::Failed(said) => panic!("pushing {name} failed ({moment}): {said}"),
        }
        if let Some(stored) = stored {
            assert!(stored == *bytes, "{name} holds wrong bytes ({moment})");
        }

        scene.pushing.ok(&mut push(round));
        assert!(scene.pushed(*name).as_ref() == Some(bytes), "{name} after the next run ({moment})");
        acknowledged.insert(*name);
    }
    for (name, bytes) in scene.segments.iter().filter(|(name, _)| acknowledged.contains(name)) {
        assert!(scene.pushed(*name).as_ref() == Some(bytes), "{name} was acknowledged");
    }
    scene.check_keys();
    Count { all: rounds, killed }
}

fn fetch_rounds(scene: &Scene, rounds: usize, random: &mut Random) -> Count {
    let target = scene.data_dir.join("pg_wal/RECOVERYXLOG");
    let fetch = |name: SegmentName| {
        let mut command = scene.archive.command(&bins::restore_cmd());
        command.arg(name.to_string()).arg(&target);
        command
    };
    let killer = Killer::watch(&fetch(scene.segments[0].0), scene.scratch(), random);
    let rounds = rounds.max(killer.sweep_rounds());
    let mut killed = 0;
    for round in 0..rounds {
        let (name, bytes) = &scene.segments[round % scene.segments.len()];
        // What an earlier question left there.
        let (_, before) = &scene.segments[(round + 1) % scene.segments.len()];
        if round % 2 == 0 {
            let _ = fs::remove_file(&target);
        } else {
            fs::write(&target, before).unwrap();
        }
        let (moment, ended) = killer.strike(&fetch(*name), round, random);
        let found = fs::read(&target).ok();
        match ended {
            Ended::Killed => killed += 1,
            Ended::Done => {
                assert!(found.as_ref() == Some(bytes), "{name} was called delivered and is not ({moment})")
            }
            Ended::Failed(said) => panic!("fetching {name} failed ({moment}): {said}"),
        }
        match &found {
            None => assert_eq!(round % 2, 0, "the earlier file is gone ({moment})"),
            Some(found) => assert!(
                found == bytes || (round % 2 == 1 && found == before),
                "wrong bytes under the final name ({moment})"
            ),
        }
        scene.archive.ok(&mut fetch(*name));
        assert!(fs::read(&target).unwrap() == *bytes, "{name} after the next run ({moment})");
        scene.remove_temporaries();
    }
    Count { all: rounds, killed }
}

fn backup_rounds(scene: &Scene, rounds: usize, random: &mut Random) -> Count {
    let backup = || scene.archive.walship_on(&scene.server, &["backup"]);
    let killer = Killer::watch(&backup(), scene.scratch(), random);
    let mut known = scene.check_backups(&BTreeSet::new());
    let mut killed = 0;
    for round in 0..rounds {
        let (moment, ended) = killer.strike(&backup(), round, random);
        let now = scene.check_backups(&known);
        match ended {
            Ended::Killed => killed += 1,
            Ended::Done => assert!(now.len() > known.len(), "the backup is not there ({moment})"),
            Ended::Failed(said) => panic!("the backup failed ({moment}): {said}"),
        }
        known = now;
        if round % 4 == 0 || round + 1 == rounds {
            scene.archive.ok(&mut backup());
            let now = scene.check_backups(&known);
            assert_eq!(now.len(), known.len() + 1, "the next backup is there ({moment})");
            known = now;
        }
    }
    Count { all: rounds, killed }
}

fn restore_rounds(scene: &Scene, rounds: usize, random: &mut Random) -> Count {
    let target = scene.scratch().join("restored");
    let restore = || {
        let mut command = scene.archive.pitr(&["restore", "--latest", "-D"]);
        command.arg(&target);
        command
    };
    let killer = Killer::watch(&restore(), scene.scratch(), random);
    assert!(scene.starts_complete(&target), "a whole restore starts");
    let mut killed = 0;
    for round in 0..rounds {
        empty(&target);
        let (moment, ended) = killer.strike(&restore(), round, random);
        match ended {
            Ended::Killed => {
                killed += 1;
                // It refuses to start, or all of it was in place when the kill came.
                scene.starts_complete(&target);
            }
            Ended::Done => assert!(scene.starts_complete(&target), "a whole restore starts ({moment})"),
            Ended::Failed(said) => panic!("the restore failed ({moment}): {said}"),
        }
        if round % 4 == 0 {
            empty(&target);
            scene.archive.ok(&mut restore());
            assert!(scene.starts_complete(&target), "the next restore starts ({moment})");
        }
    }
    Count { all: rounds, killed }
}

fn empty(folder: &Path) {
    if folder.exists() {
        fs::remove_dir_all(folder).unwrap();
    }
}
