//! WAL that is given up: the archiver goes on, restores refuse to cross, the segment closes the gap when it
//! turns up after all.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::process::Stdio;

use serde_json::Value;
use walship_tests::postgres::{PgServer, majors};
use walship_tests::stage::Stage;
use walship_tests::{bins, wait};

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// A server whose second segment after the backup was damaged in pg_wal before it could be archived.
struct Damaged {
    stage: Stage,
    server: PgServer,
    segment: String,
    good: Vec<u8>,
    /// Transactions before, in and behind the damaged segment.
    xids: Vec<String>,
}

impl Damaged {
    fn make(major: u32) -> Self {
        let stage = Stage::folder("main");
        let server = stage.archiving(PgServer::builder(major).wal_segment_size_mb(1)).start();
        stage.init(&server);
        server.psql("create table t (n int)");
        stage.backup(&server);
        let insert = |n: u32| {
            let told = server.psql(&format!("insert into t values ({n}) returning xmin"));
            told.lines().next().unwrap().to_owned()
        };
        let mut xids = vec![insert(1)];
        server.archive_now();
        server.psql("alter system set archive_command = 'false'; ");
        server.psql("select pg_reload_conf()");
        xids.push(insert(2));
        let segment = server.switch_wal();
        wait::until("the archiver has met the segment", || {
            server.psql("select last_failed_wal from pg_stat_archiver") == segment
        });
        let path = server.data_dir().join("pg_wal").join(&segment);
        let good = fs::read(&path).unwrap();
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&[0; 8192], 0).unwrap();
        server.psql("alter system reset archive_command");
        server.psql("select pg_reload_conf()");
        wait::until("archive-cmd has refused the segment", || {
            server.log().contains(&format!("pg_wal/{segment}: it is not the WAL"))
        });
        xids.push(insert(3));
        Self { stage, server, segment, good, xids }
    }

    fn give_up(&self, words: &[&str]) -> std::process::Command {
        let path = self.server.data_dir().join("pg_wal").join(&self.segment);
        let mut args = vec!["wal", "give-up", path.to_str().unwrap(), "--reason", "bad block on /dev/sdb"];
        args.extend(words);
        let mut command = self.stage.walship(&args);
        command.stdin(Stdio::null());
        command
    }

    fn ledger(&self) -> usize {
        let folder = self.stage.repository_dir().join("main/0001/gaps/00000001");
        fs::read_dir(folder).map_or(0, Iterator::count)
    }
}

#[test]
fn an_operator_gives_up_a_damaged_segment_and_the_archiver_goes_on() {
    for major in majors() {
        let scene = Damaged::make(major);
        let Damaged { stage, server, segment, good, xids } = &scene;

        // Nothing by itself, nothing without a yes, nothing without the repository.
        let refused = stage.fails(&mut scene.give_up(&[]), 1);
        assert!(refused.contains("has to be confirmed"), "{refused}");
        let would = json(&stage.ok(&mut scene.give_up(&["--dry-run", "--json"])));
        assert_eq!(would["outcome"], "would_give_up");
        let away = stage.path().join("away");
        fs::rename(stage.repository_dir(), &away).unwrap();
        let refused = stage.fails(&mut scene.give_up(&["--yes"]), 1);
        assert!(refused.contains("nothing can be given up now"), "{refused}");
        fs::rename(&away, stage.repository_dir()).unwrap();
        assert_eq!(scene.ledger(), 0);
        assert_eq!(server.psql("select last_archived_wal < last_failed_wal from pg_stat_archiver"), "t");

        let done = json(&stage.ok(&mut scene.give_up(&["--yes", "--json"])));
        assert_eq!(done["outcome"], "given_up", "{done}");
        assert_eq!(done["record"]["cause"]["text"], "bad block on /dev/sdb");
        stage.ok(&mut scene.give_up(&["--yes"]));
        assert_eq!(scene.ledger(), 1, "a second call adds nothing");
        wait::until("the archiver has let the segment go", || {
            server.log().contains(&format!("WARNING: {segment} is NOT archived"))
        });

        // Nothing later is stored yet: the end of the archive is a gap all the same.
        let target = format!("--to-xid {}", xids[2]);
        for words in [vec!["--latest"], target.split(' ').collect()] {
            for pass in ["before later WAL is stored", "afterwards"] {
                if pass == "afterwards" {
                    server.archive_now();
                }
                let mut args = vec!["plan", "--json"];
                args.extend(&words);
                let output = stage.run(&mut stage.pitr(&args));
                assert_eq!(output.status.code(), Some(3), "{words:?} {pass}");
                let refusal = json(&String::from_utf8_lossy(&output.stdout))["refusal"].clone();
                assert_eq!(refusal["kind"], "gap", "{words:?} {pass}: {refusal}");
                let reason = refusal["reason"].as_str().unwrap();
                assert!(reason.contains("given up by") && reason.contains("bad block"), "{reason}");
                assert_eq!(refusal["gap"]["first_missing"], segment.as_str());
                let dir = stage.path().join("never");
                let mut restore = stage.pitr(&["restore", "-D", dir.to_str().unwrap()]);
                stage.fails(restore.args(&words), 3);
                assert!(!dir.exists());
            }
        }
        let info = stage.ok(&mut stage.pitr(&["info"]));
        assert!(info.contains("bad block on /dev/sdb"), "{info}");
        let check = stage.ok(&mut stage.walship(&["check", "--offline"]));
        assert!(check.contains("bad block on /dev/sdb"), "{check}");

        // What lies before the gap is reached by a real server.
        let dir = stage.path().join("before");
        let words = ["restore", "--to-xid", &xids[0], "-D", dir.to_str().unwrap()];
        stage.ok(&mut stage.pitr(&words));
        let restored = stage.recovering(&dir).start();
        restored.wait_for("select pg_is_in_recovery()", "f");
        assert_eq!(restored.psql("select string_agg(n::text, ',') from t"), "1");
        drop(restored);

        // The good copy turns up.
        let found = stage.path().join(segment);
        fs::write(&found, good).unwrap();
        stage.ok(&mut stage.walship(&["wal", "push", found.to_str().unwrap()]));
        let dir = stage.path().join("after");
        let words = ["restore", "--to-xid", &xids[2], "-D", dir.to_str().unwrap()];
        stage.ok(&mut stage.pitr(&words));
        let restored = stage.recovering(&dir).start();
        restored.wait_for("select pg_is_in_recovery()", "f");
        assert_eq!(restored.psql("select string_agg(n::text, ',' order by n) from t"), "1,2,3");
        let check = stage.ok(&mut stage.walship(&["check", "--offline"]));
        assert!(!check.contains("bad block on /dev/sdb"), "{check}");
        // Giving up what can be stored, or is, does nothing.
        let path = found.to_str().unwrap();
        let words = ["wal", "give-up", path, "--reason", "why not", "--yes", "--json"];
        assert_eq!(json(&stage.ok(&mut stage.walship(&words)))["outcome"], "stored");
    }
}

#[test]
fn a_segment_is_given_up_on_a_terminal_only_by_its_name() {
    let scene = Damaged::make(walship_tests::postgres::primary_major());
    let command = |answer: &str| {
        let walship = bins::walship();
        let path = scene.server.data_dir().join("pg_wal").join(&scene.segment);
        let line = format!("{} wal give-up {} --reason x", walship.display(), path.display());
        // `script` gives it a terminal.
        let mut command = scene.stage.command("sh".as_ref());
        command.arg("-c").arg(format!("(sleep 1; echo '{answer}') | script -qec '{line}' /dev/null"));
        String::from_utf8_lossy(&scene.stage.run(&mut command).stdout).into_owned()
    };
    let said = command("yes");
    assert!(said.contains("the answer was not the segment's name"), "{said}");
    assert_eq!(scene.ledger(), 0);
    let said = command(&scene.segment);
    assert!(said.contains("It cannot be stored") && said.contains("It is given up"), "{said}");
    assert_eq!(scene.ledger(), 1);
}
