//! What `walship setup` writes is what systemd, man and shells understand; the Debian package installs, works and goes.

mod package;
mod systemd;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use walship_tests::bins;
use walship_tests::process::{RunOptions, run, run_ok};

/// `walship setup` with nothing in its environment that could lead it elsewhere.
fn setup(words: &[&str]) -> Output {
    let mut command = Command::new(bins::walship());
    command.env_remove("WALSHIP_CONFIG").arg("setup").args(words);
    run(&mut command, RunOptions::default())
}

fn succeeds(words: &[&str]) -> String {
    let output = setup(words);
    assert!(output.status.success(), "{words:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

/// The commands that a program's help names, with their own below them.
fn commands(program: &Path, above: &[&str]) -> BTreeSet<String> {
    let help = run_ok(Command::new(program).args(above).arg("--help"));
    let listed =
        help.split("\nCommands:\n").nth(1).unwrap_or_default().split("\n\n").next().unwrap_or_default();
    let mut found = BTreeSet::new();
    for line in listed.lines().filter(|line| line.starts_with("  ") && !line.starts_with("   ")) {
        let name = line.split_whitespace().next().unwrap();
        if name != "help" {
            let words = [above, &[name]].concat();
            found.insert(words.join("-"));
            found.extend(commands(program, &words));
        }
    }
    found
}

#[test]
fn every_command_has_a_man_page_that_reads_without_a_complaint() {
    let folder = tempfile::tempdir().unwrap();
    succeeds(&["man", "--dir", folder.path().to_str().unwrap()]);
    let mut expected: BTreeSet<String> =
        ["walship", "pitr", "archive-cmd", "restore-cmd"].map(|name| format!("{name}.1")).into();
    expected.extend(commands(&bins::walship(), &[]).iter().map(|name| format!("walship-{name}.1")));
    expected.extend(commands(&bins::pitr(), &[]).iter().map(|name| format!("pitr-{name}.1")));
    let pages = files(folder.path());
    let names = pages.iter().map(|page| page.file_name().unwrap().to_str().unwrap().to_owned());
    assert_eq!(names.collect::<BTreeSet<_>>(), expected);
    assert!(expected.contains("walship-wal-push.1") && expected.contains("pitr-drill.1"), "{expected:?}");
    for page in &pages {
        let mut man = Command::new("man");
        man.env("LC_ALL", "C.UTF-8").env("MANWIDTH", "100").args([
            "--warnings",
            "--encoding=UTF-8",
            "--local-file",
        ]);
        let output = run(man.arg(page), RunOptions::default());
        let shown = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && output.stderr.is_empty(), "{}: {output:?}", page.display());
        for heading in ["NAME", "SYNOPSIS", "DESCRIPTION"] {
            assert!(shown.lines().any(|line| line == heading), "{}: no {heading}:\n{shown}", page.display());
        }
        let name = page.file_stem().unwrap().to_str().unwrap();
        assert!(shown.contains(&format!("{name} - ")), "{name} is found by apropos:\n{shown}");
    }
}

/// What bash offers behind these words.
fn offered(completions: &Path, words: &[&str]) -> Vec<String> {
    let program = words[0];
    let script = format!(
        "source '{}'; COMP_WORDS=({}); COMP_CWORD={}; COMPREPLY=(); _{program} {program} \"${{COMP_WORDS[-1]}}\" \
         \"${{COMP_WORDS[-2]}}\"; printf '%s\\n' \"${{COMPREPLY[@]}}\"",
        completions.join(format!("{program}.bash")).display(),
        words.iter().map(|word| format!("'{word}'")).collect::<Vec<_>>().join(" "),
        words.len() - 1,
    );
    run_ok(Command::new("bash").args(["-c", &script])).lines().map(str::to_owned).collect()
}

#[test]
fn bash_completes_commands_and_options() {
    let folder = tempfile::tempdir().unwrap();
    succeeds(&["completions", "--dir", folder.path().to_str().unwrap()]);
    let names: BTreeSet<_> = files(folder.path())
        .iter()
        .map(|file| file.file_name().unwrap().to_str().unwrap().to_owned())
        .collect();
    for name in ["walship.bash", "_walship", "walship.fish", "pitr.bash", "_pitr", "pitr.fish"] {
        assert!(names.contains(name), "{name} in {names:?}");
    }
    for file in ["walship.bash", "pitr.bash"] {
        run_ok(Command::new("bash").arg("-n").arg(folder.path().join(file)));
    }
    assert_eq!(offered(folder.path(), &["walship", "rec"]), ["receive"]);
    assert_eq!(offered(folder.path(), &["walship", "wal", "p"]), ["push"]);
    assert_eq!(offered(folder.path(), &["walship", "backup", "--incre"]), ["--incremental"]);
    assert_eq!(offered(folder.path(), &["pitr", "dri"]), ["drill"]);
    assert!(offered(folder.path(), &["pitr", ""]).contains(&"plan".to_owned()));
}
