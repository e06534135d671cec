//! `walship setup systemd`: read by systemd itself.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use walship_tests::bins;
use walship_tests::process::{RunOptions, run, run_ok};

use crate::json_docs::compare;

use super::{files, setup, succeeds};

/// The units below `root`, written for this configuration.
fn written(root: &Path, config: Option<&str>) -> Value {
    let bin_dir = bins::dir();
    let path = root.join("walship.toml");
    let mut words = vec!["systemd", "--root", root.to_str().unwrap(), "--bin-dir", bin_dir.to_str().unwrap()];
    words.extend(["--user", "root", "--confirm", "--json"]);
    match config {
        Some(text) => {
            fs::write(&path, text).unwrap();
            words.extend(["--config", path.to_str().unwrap()]);
        }
        None => words.push("--generic"),
    }
    serde_json::from_str(&succeeds(&words)).unwrap()
}

/// The commands of a unit, as the shell would have them.
fn command_of(text: &str) -> Vec<String> {
    let line = text.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
    line.split(' ').map(str::to_owned).collect()
}

#[test]
fn systemd_understands_the_units_and_finds_them_well_locked_up() {
    for config in [
        None,
        Some("repositories = ['s3://bucket/prefix']\ncluster = 'main'\n"),
        Some(
            "repositories = ['file:///srv/wal ship']\ncluster = 'main'\nstate_dir = '/var/tmp/w'\n\
             [receive]\nspool = '/srv/spool/w'\nstatus_file = '/run/w/status'\n",
        ),
    ] {
        let root = tempfile::tempdir().unwrap();
        let report = written(root.path(), config);
        assert_eq!((&report["written"], report["units"].as_array().unwrap().len()), (&Value::Bool(true), 10));
        compare("walship setup systemd", &[report], &[]);
        let units = files(&root.path().join("etc/systemd/system"));
        assert_eq!(units.len(), 10);
        let output = run(
            Command::new("systemd-analyze").args(["verify", "--man=no"]).args(&units),
            RunOptions::default(),
        );
        let said = String::from_utf8_lossy(&output.stderr);
        // It also says what it does not like about units of this machine.
        let ours: Vec<&str> = said.lines().filter(|line| line.contains("walship")).collect();
        assert!(ours.is_empty(), "{config:?}: {ours:#?}");
        assert!(output.status.success(), "{output:?}");
        for service in units.iter().filter(|unit| unit.extension().is_some_and(|is| is == "service")) {
            // User=root only because this machine may have no user postgres: judged without it.
            let text = fs::read_to_string(service).unwrap();
            assert!(text.contains("\nUser=root\n"), "{text}");
            fs::write(service, text.replace("\nUser=root\n", "\nUser=nobody\n")).unwrap();
            let judged = ["security", "--offline=yes", "--no-pager", "--threshold=25"];
            run_ok(Command::new("systemd-analyze").args(judged).arg(service));
            // The programs know these words.
            let mut words = command_of(&text);
            words.push("--help".to_owned());
            run_ok(Command::new(&words[0]).args(&words[1..]));
        }
    }
}

#[test]
fn what_was_edited_stays_and_settings_that_change_are_written() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("etc/systemd/system");
    let at = ["systemd", "--generic", "--root", root.path().to_str().unwrap()];
    let with = |more: &[&'static str]| [&at[..], more].concat();
    let shown = succeeds(&with(&[]));
    assert!(shown.contains("walship-receive.service: would be written"), "{shown}");
    assert!(shown.contains("    Type=notify\n") && shown.ends_with("--confirm does that.\n"), "{shown}");
    assert!(!folder.exists(), "a dry run writes nothing");
    assert!(succeeds(&with(&["--confirm"])).contains("systemctl enable --now walship-receive.service"));
    assert!(succeeds(&with(&[])).matches("is there, unchanged").count() == 10);

    succeeds(&with(&["--backup-at", "Sat 22:00", "--backup-options", "--source local", "--confirm"]));
    let read = |name: &str| fs::read_to_string(folder.join(name)).unwrap();
    assert!(read("walship-backup.timer").contains("\nOnCalendar=Sat 22:00\n"));
    assert!(read("walship-backup.service").contains(" backup --source local\n"));

    let mine = read("walship-backup.service") + "# mine\n";
    fs::write(folder.join("walship-backup.service"), &mine).unwrap();
    let timer = read("walship-backup.timer");
    let refused = setup(&with(&["--confirm"]));
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(said.contains("walship-backup.service") && said.contains("safe:  nothing was written"), "{said}");
    assert_eq!((read("walship-backup.service"), read("walship-backup.timer")), (mine, timer));
    assert!(succeeds(&with(&[])).contains("walship-backup.service: was edited by somebody else"));
}

#[test]
fn nonsense_is_refused_and_nothing_is_written() {
    let root = tempfile::tempdir().unwrap();
    let at = ["systemd", "--confirm", "--root", root.path().to_str().unwrap()];
    for (words, said) in [
        (&["--backup-options", "--bogus"][..], "unexpected argument '--bogus'"),
        (&["--serve-options", "--textfile x --listen y"], "--serve-options: "),
        (&["--backup-at", "when it rains"], "systemd does not understand it"),
        (&["--drill-at", "06:00\nUnit=evil.service"], "systemd does not understand it"),
        (&["--drill-options", "a\u{7}b"], "control characters"),
        (&["--config", "/nowhere.toml"], "/nowhere.toml"),
        (&["--repo", "file:///srv/walship"], "not from flags"),
        (&["--name", "../x"], "a letter first"),
        (&["--user", "a b"], "no user's name"),
    ] {
        let refused = setup(&[&at[..], words].concat());
        let text = String::from_utf8(refused.stderr).unwrap();
        assert!(matches!(refused.status.code(), Some(1 | 2)), "{words:?}");
        assert!(text.contains(said), "{words:?}: {text}");
    }
    assert_eq!(files(root.path()), Vec::<std::path::PathBuf>::new());
}
