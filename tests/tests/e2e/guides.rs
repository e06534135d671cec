//! The guides: every command in them exists, and changing over leaves no gap on a real server.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use walship_tests::bins;
use walship_tests::postgres::{PgServer, primary_major};
use walship_tests::process::{RunOptions, run};
use walship_tests::stage::Stage;

use crate::receive::Receiving;

fn guide(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(name)).unwrap()
}

/// The words of a command in a guide; `...` stands for words of the reader's own.
fn words(line: &str) -> Vec<String> {
    let line = line.split("  #").next().unwrap();
    let (mut words, mut word, mut quoted) = (Vec::new(), String::new(), false);
    for c in line.chars() {
        match c {
            '\'' => quoted = !quoted,
            ' ' if !quoted => words.push(std::mem::take(&mut word)),
            c => word.push(c),
        }
    }
    words.push(word);
    words.into_iter().filter(|word| !word.is_empty() && word != "...").collect()
}

#[test]
fn every_command_in_the_guides_exists() {
    let mut tried = BTreeSet::new();
    for page in ["operators-guide.md", "changing-over.md", "retention.md"] {
        for line in guide(page).lines().filter_map(|line| line.strip_prefix("    ")) {
            let words = words(line);
            let program = match words.first().map(String::as_str) {
                Some("walship") => bins::walship(),
                Some("pitr") => bins::pitr(),
                _ => continue,
            };
            // What is not understood is refused before help is given.
            let mut command = Command::new(program);
            let output = run(command.args(&words[1..]).arg("--help"), RunOptions::default());
            // `wal fetch` gives help beside other words, but never with status 0.
            assert!(output.stderr.is_empty(), "{page}: {line}: {output:?}");
            let wanted = words.get(1).map_or("", |word| word);
            assert!(String::from_utf8_lossy(&output.stdout).contains(wanted), "{page}: {line}");
            tried.insert(line.to_owned());
        }
    }
    assert!(tried.len() > 20, "{tried:?}");
}

/// Everything that a folder of plain segments holds.
fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.len() == 24)
        .collect()
}

/// The steps of docs/changing-over.md, from `cp`, with both ways to have both tools at work.
#[test]
fn changing_over_leaves_no_gap_and_there_is_a_way_back() {
    let page = guide("changing-over.md");
    for streamed in [true, false] {
        let stage = Stage::folder("main");
        let old = stage.path().join("archive");
        fs::create_dir(&old).unwrap();
        let set = |server: &PgServer, command: &str| {
            let command = command.replace("/archive/", &format!("{}/", old.display())).replace(
                "archive-cmd",
                &format!("{} --config {}", bins::archive_cmd().display(), stage.config().display()),
            );
            server.psql(&format!("ALTER SYSTEM SET archive_command = '{command}'"));
            server.psql("SELECT pg_reload_conf()");
        };
        let server = PgServer::builder(primary_major())
            .wal_segment_size_mb(1)
            .setting("archive_mode", "on")
            .setting("archive_command", format!("cp %p {}/%f", old.display()))
            .setting("max_slot_wal_keep_size", "1GB")
            .start();
        server.psql("CREATE TABLE t (step text)");
        let write = |step: &str| {
            server.psql(&format!("INSERT INTO t VALUES ('{step}')"));
            server.archive_now()
        };
        write("only the old one");

        stage.init(&server);
        assert!(server.psql("SHOW archive_command").starts_with("cp "), "init changes nothing");
        let mut receiving = None;
        if streamed {
            let conninfo = format!("host=127.0.0.1 port={} user=postgres sslmode=disable", server.port());
            receiving = Some(Receiving::start(&stage, &conninfo, &[]));
            server.wait_for("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'", "1");
        } else {
            let both = "cp %p /archive/%f && archive-cmd %p";
            assert!(page.contains(&format!("archive_command = '{both}'")));
            set(&server, both);
        }
        let first = write("both");
        stage.backup(&server);
        let both = write("both, behind the backup");
        if let Some(receiving) = &mut receiving {
            receiving.wait_durable(server.current_lsn().parse().unwrap());
        }
        // The same bytes in both.
        for name in [&first, &both] {
            let copy = stage.path().join(name);
            stage.ok(&mut stage.walship(&["wal", "fetch", name, copy.to_str().unwrap()]));
            assert!(fs::read(&copy).unwrap() == fs::read(old.join(name)).unwrap(), "{name}");
        }

        assert!(page.contains("ALTER SYSTEM SET archive_command = 'archive-cmd %p';"));
        set(&server, "archive-cmd %p");
        if let Some(receiving) = &mut receiving {
            assert_eq!(receiving.terminate().code(), Some(0));
            server.psql("SELECT pg_drop_replication_slot('walship')");
        }
        let last_old = names(&old);
        let mut new = Vec::new();
        for step in ["only the new one", "and again"] {
            new.push(write(step));
        }
        assert!(new.iter().all(|name| !names(&old).contains(name)), "{new:?} in {:?}", names(&old));
        assert!(last_old.contains(&both));
        assert_eq!(server.psql("SELECT failed_count FROM pg_stat_archiver"), "0");
        let info: serde_json::Value =
            serde_json::from_str(&stage.ok(&mut stage.pitr(&["info", "--json"]))).unwrap();
        let timeline = &info["timelines"][0];
        assert_eq!(timeline["gaps"].as_array().map(Vec::len), Some(0), "{info}");
        assert_eq!(timeline["windows"].as_array().map(Vec::len), Some(1), "{info}");

        // The way back: the old one goes on, and gets what it lacks.
        set(&server, "cp %p /archive/%f");
        let back = write("the old one again");
        for name in &new {
            stage.ok(&mut stage.walship(&["wal", "fetch", name, old.join(name).to_str().unwrap()]));
        }
        let numbers: Vec<u64> =
            names(&old).iter().map(|name| u64::from_str_radix(&name[16..], 16).unwrap()).collect();
        assert!(
            numbers.windows(2).all(|pair| pair[1] == pair[0] + 1),
            "the old archive has no hole: {numbers:?}"
        );
        assert!(names(&old).contains(&back));
    }
}
