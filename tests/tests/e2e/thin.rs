//! The thin commands when what they start, or how they are called, is wrong: no status of theirs is
//! ever taken for "stored" or "absent".

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use walship_tests::bins;
use walship_tests::process::{RunOptions, run};

const SEGMENT: &str = "000000010000000000000005";

fn status(command: &mut Command) -> Option<i32> {
    run(command, RunOptions::default()).status.code()
}

/// A folder that looks like a data directory in recovery, with `signal_file` in it.
fn data_directory(signal_file: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("pg_wal")).unwrap();
    fs::write(folder.path().join(signal_file), "").unwrap();
    folder
}

#[test]
fn a_strange_walship_never_says_absent() {
    let one_shot = data_directory("recovery.signal");
    let standby = data_directory("standby.signal");
    let program = one_shot.path().join("walship");
    let fetch = |data: &tempfile::TempDir| {
        let mut command = Command::new(bins::restore_cmd());
        command.env("WALSHIP_BIN", &program).current_dir(data.path()).args([SEGMENT, "pg_wal/RECOVERYXLOG"]);
        status(&mut command)
    };
    // 1 is what a dynamic linker ends with, 2 a shell that cannot read what it sources.
    for (script, stop, again) in [
        ("exit 1", 126, 75),
        ("exit 2", 126, 75),
        ("exit 101", 126, 75),
        ("kill -9 $$", 126, 75),
        ("kill -15 $$", 143, 143),
        ("exit 73", 1, 1),
    ] {
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!((fetch(&one_shot), fetch(&standby)), (Some(stop), Some(again)), "{script}");
    }
    fs::remove_file(&program).unwrap();
    assert_eq!((fetch(&one_shot), fetch(&standby)), (Some(126), Some(75)), "no program at all");
}

#[test]
fn help_beside_other_arguments_is_a_mistake() {
    let folder = data_directory("recovery.signal");
    let call = |program: &std::path::Path, arguments: &[&str]| {
        status(Command::new(program).current_dir(folder.path()).args(arguments)).unwrap()
    };
    for flag in ["--help", "-h", "--version", "-V"] {
        assert_eq!(call(&bins::archive_cmd(), &[flag]), 0, "{flag}");
        assert_eq!(call(&bins::restore_cmd(), &[flag]), 0, "{flag}");
        for arguments in
            [&[flag, "pg_wal/x"][..], &["--repo", "file:///nowhere", "--cluster", "main", flag, "x"]]
        {
            let stored = call(&bins::archive_cmd(), arguments);
            assert!((1..=125).contains(&stored), "{arguments:?}: {stored}");
        }
        for arguments in
            [&[flag, SEGMENT, "pg_wal/RECOVERYXLOG"][..], &["--cluster", "main", flag, SEGMENT, "pg_wal/X"]]
        {
            assert_eq!(call(&bins::restore_cmd(), arguments), 126, "{arguments:?}");
        }
    }
    assert_eq!(call(&bins::walship(), &["wal", "push", "--help"]), 0);
    assert_eq!(call(&bins::walship(), &["wal", "fetch", "--help"]), 0);
}

#[test]
fn a_full_standard_error_does_not_change_the_answer() {
    let folder = data_directory("recovery.signal");
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = Command::new(bins::restore_cmd());
    command.env("WALSHIP_BIN", "/nonexistent/walship").current_dir(folder.path());
    command.args([SEGMENT, "pg_wal/RECOVERYXLOG"]).stderr(full);
    assert_eq!(command.status().unwrap().code(), Some(126));
}
