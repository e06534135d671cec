//! What the programs say, word by word: helps, error reports, the shapes of JSON. A change of them is
//! a change for operators and their scripts; `INSTA_UPDATE=always` accepts it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use serde_json::Value;
use walship::pg::SegmentSize;
use walship::repository::Repository;
use walship::storage::fs::FsStorage;
use walship_tests::bins;
use walship_tests::postgres::{PgServer, primary_major};
use walship_tests::process::{RunOptions, run};
use walship_tests::stage::Stage;

/// A program with these words as its arguments and nothing in its environment.
fn asked(program: &Path, words: &str, folder: &Path) -> Output {
    asked_on(100, program, words, folder)
}

/// The same on a terminal of so many columns.
fn asked_on(columns: usize, program: &Path, words: &str, folder: &Path) -> Output {
    let mut command = Command::new(program);
    command
        .env_clear()
        .env("COLUMNS", columns.to_string())
        .env("TZ", "UTC")
        .env("HOME", folder)
        .current_dir(folder);
    command.env("WALSHIP_RESTORE_RETRY_MS", "0").args(words.split(' ').filter(|word| !word.is_empty()));
    run(&mut command, RunOptions::default())
}

fn helps(program: &Path, commands: &[&str]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let mut text = String::new();
    for command in commands {
        let words = format!("{command} --help");
        let output = asked(program, words.trim(), folder.path());
        assert!(output.status.success() && output.stderr.is_empty(), "{words}: {output:?}");
        let name = program.file_name().unwrap().to_str().unwrap();
        writeln!(text, "$ {name} {}\n{}", words.trim(), String::from_utf8_lossy(&output.stdout)).unwrap();
    }
    text
}

#[test]
fn helps_read_as_they_should() {
    let walship = [
        "",
        "init",
        "check",
        "backup",
        "wal",
        "wal push",
        "wal fetch",
        "wal give-up",
        "setup",
        "setup systemd",
        "setup man",
        "setup completions",
    ];
    insta::assert_snapshot!("help_walship", helps(&bins::walship(), &walship));
    insta::assert_snapshot!("help_walship_serve", helps(&bins::walship(), &["serve"]));
    insta::assert_snapshot!(
        "help_pitr",
        helps(
            &bins::pitr(),
            &[
                "", "info", "plan", "restore", "drill", "extract", "verify", "history", "log", "index",
                "expire", "hold", "release",
            ]
        )
    );
    insta::assert_snapshot!("help_archive_cmd", helps(&bins::archive_cmd(), &[""]));
    insta::assert_snapshot!("help_restore_cmd", helps(&bins::restore_cmd(), &[""]));
}

#[test]
fn the_help_of_receive_reads_well_on_narrow_terminals() {
    let folder = tempfile::tempdir().unwrap();
    let on = |columns| {
        let output = asked_on(columns, &bins::walship(), "receive --help", folder.path());
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    insta::assert_snapshot!("help_walship_receive", on(80));
    for columns in [80, 90, 100] {
        let text = on(columns);
        let last = text.split("\nExamples:\n").nth(1).unwrap();
        for paragraph in last.split("\n\n") {
            let lines: Vec<&str> = paragraph.lines().collect();
            assert!(lines.iter().all(|line| line.chars().count() <= columns), "{columns}: {paragraph}");
            // A line ends where the next word has no room, not where the source had an end.
            if !paragraph.contains("  ") {
                for pair in lines.windows(2) {
                    let next = pair[1].split(' ').next().unwrap_or_default();
                    assert!(
                        pair[0].chars().count() + 1 + next.chars().count() > columns,
                        "{columns}: {paragraph}"
                    );
                }
            }
        }
    }
}

/// A repository of cluster "main" without a server, with one lineage.
fn prepare(root: &Path) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let now = chrono::Utc::now();
        let storage = Arc::new(FsStorage::create_root(root).unwrap());
        let repository = Repository::create(storage, now).await.unwrap();
        let cluster = repository.create_cluster(&"main".parse().unwrap(), now).await.unwrap();
        cluster.register_lineage(42, SegmentSize::DEFAULT, 15, now).await.unwrap();
    });
}

#[test]
fn errors_have_three_lines() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    prepare(&at("repository"));
    for (name, content) in [
        ("00000002.history", "1\t0/5000000\tfirst\n"),
        ("other/00000002.history", "1\t0/5000000\tsecond\n"),
        ("00000003.history", "1\t0/5000000\tthird\n"),
        ("00000004.history", "1\t0/5000000\tfourth\n"),
        ("000000010000000000000001", "not WAL"),
        ("bad.toml", "repositories = 7\n"),
    ] {
        fs::create_dir_all(at(name).parent().unwrap()).unwrap();
        fs::write(at(name), content).unwrap();
    }
    let here = "--repo DIR/repository --cluster main";
    let walship = bins::walship();
    let mut text = String::new();
    let mut say = |program: &Path, words: &str, status: i32| {
        let root = folder.path().to_str().unwrap();
        let output = asked(program, &words.replace("DIR", root), folder.path());
        let said = String::from_utf8_lossy(&output.stderr).replace(root, "DIR");
        assert_eq!(output.status.code(), Some(status), "{words}: {said}");
        let name = program.file_name().unwrap().to_str().unwrap();
        writeln!(text, "$ {name} {words}\n{said}status {status}\n").unwrap();
        said.lines()
            .filter(|line| ["error: ", "safe: ", "next: "].iter().any(|w| line.starts_with(w)))
            .count()
    };
    assert_eq!(say(&walship, &format!("wal push 00000002.history {here}"), 0), 0);
    assert_eq!(say(&walship, &format!("wal push 00000003.history {here}"), 0), 0);
    assert_eq!(say(&walship, &format!("wal fetch 00000009.history RECOVERYHISTORY {here}"), 1), 0);
    assert_eq!(say(&bins::pitr(), &format!("plan --latest {here}"), 3), 3);
    let damaged = at("repository/main/0001/wal/00000003.history");
    fs::remove_file(&damaged).unwrap();
    fs::write(&damaged, "x").unwrap();
    for (program, words, status) in [
        (&walship, format!("wal push other/00000002.history {here}"), 1),
        (&walship, format!("wal push 000000010000000000000001 {here}"), 1),
        (&walship, format!("wal push 000000010000000000000002 {here}"), 1),
        (&walship, format!("wal push notes {here}"), 1),
        (&walship, format!("wal fetch 00000003.history RECOVERYHISTORY {here}"), 126),
        (&walship, "wal push 00000004.history --repo DIR/gone --cluster main".to_owned(), 1),
        (&walship, "wal push 00000004.history --repo DIR/repository --cluster other".to_owned(), 1),
        (&walship, "wal push 00000004.history --config bad.toml".to_owned(), 1),
        (&walship, "backup --config nowhere.toml".to_owned(), 1),
    ] {
        assert_eq!(say(program, &words, status), 3, "{words}");
    }
    // Mistakes in the words themselves are told by the parser of arguments.
    say(&walship, "check --bogus", 2);
    say(&bins::pitr(), &format!("plan --to-time 2031-05-01T12:00:00 {here}"), 2);
    say(&bins::archive_cmd(), "", 2);
    say(&bins::restore_cmd(), "00000002.history", 126);
    insta::assert_snapshot!("errors", text);
}

/// The shape of a value: names and types, all elements of an array taken together.
#[derive(Default)]
struct Shape {
    plain: BTreeSet<&'static str>,
    fields: BTreeMap<String, (usize, Shape)>,
    objects: usize,
    elements: Option<Box<Shape>>,
}

impl Shape {
    fn add(&mut self, value: &Value) {
        match value {
            Value::Null => drop(self.plain.insert("null")),
            Value::Bool(_) => drop(self.plain.insert("boolean")),
            Value::Number(_) => drop(self.plain.insert("number")),
            Value::String(_) => drop(self.plain.insert("text")),
            Value::Array(values) => {
                let elements = self.elements.get_or_insert_default();
                values.iter().for_each(|value| elements.add(value));
            }
            Value::Object(fields) => {
                self.objects += 1;
                for (name, value) in fields {
                    let (times, shape) = self.fields.entry(name.clone()).or_default();
                    *times += 1;
                    shape.add(value);
                }
            }
        }
    }

    fn write(&self, text: &mut String, indent: usize) {
        let mut words: Vec<&str> = self.plain.iter().copied().collect();
        words.extend(self.elements.is_some().then_some("array"));
        words.extend((self.objects > 0).then_some("object"));
        writeln!(text, "{}", words.join(" | ")).unwrap();
        if let Some(elements) = &self.elements {
            write!(text, "{:indent$}- ", "").unwrap();
            elements.write(text, indent + 2);
        }
        for (name, (times, shape)) in &self.fields {
            let optional = if *times < self.objects { "?" } else { "" };
            write!(text, "{:indent$}{name}{optional}: ", "").unwrap();
            shape.write(text, indent + 2);
        }
    }
}

#[test]
fn json_keeps_its_shape() {
    let stage = Stage::folder("main");
    let server = stage.archiving(PgServer::builder(primary_major())).setting("archive_timeout", "60").start();
    let mut text = String::new();
    let mut show = |name: &str, command: &mut Command| {
        let output = stage.run(command);
        let value: Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{name}: {error}: {output:?}"));
        let mut shape = Shape::default();
        shape.add(&value);
        write!(text, "{name}: ").unwrap();
        shape.write(&mut text, 2);
        text.push('\n');
    };
    show("walship init --json", &mut stage.walship_on(&server, &["init", "--json"]));
    stage.backup(&server);
    server.psql("CREATE TABLE t AS SELECT 1 AS a");
    server.psql("INSERT INTO t VALUES (2)");
    server.archive_now();
    show("walship check --json", &mut stage.walship_on(&server, &["check", "--json"]));
    show("pitr info --json", &mut stage.pitr(&["info", "--json"]));
    show("pitr plan --latest --json", &mut stage.pitr(&["plan", "--latest", "--json"]));
    server.psql("DROP TABLE t");
    server.archive_now();
    show("pitr log --json", &mut stage.pitr(&["log", "--json"]));
    show("pitr plan, refused", &mut stage.pitr(&["plan", "--to-name", "nowhere", "--json"]));
    insta::assert_snapshot!("json_shapes", text);
}
