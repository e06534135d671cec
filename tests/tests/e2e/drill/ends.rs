//! Drills that are told to stop, or killed: what is left of them, and who removes it.

use std::fs;
use std::io::Read as _;
use std::process::{Child, Stdio};

use nix::sys::signal::Signal;
use walship_tests::postgres::primary_major;
use walship_tests::{process, wait};

use super::{Origin, walk};

/// A drill that hangs in recovery, and its server's process. Dropped, both are gone.
struct Hanging {
    drill: Child,
    server: u32,
}

impl Hanging {
    fn start(origin: &Origin) -> Self {
        let stuck = origin.restore_cmd(&origin.segments[1], "exec sleep 1000");
        let mut drill = origin.drill(&["--latest", "--restore-cmd", &stuck]);
        let drill = drill.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut hanging = Self { drill, server: 0 };
        let pid_file = origin.scratch().join("data/postmaster.pid");
        wait::until("the drill's server replays", || {
            let text = fs::read_to_string(&pid_file).unwrap_or_default();
            let pid = text.lines().next().and_then(|line| line.parse().ok());
            hanging.server = pid.unwrap_or(hanging.server);
            pid.is_some_and(|server| hangs_in(server, &origin.segments[1]))
        });
        hanging
    }

    fn kill(&mut self) {
        self.drill.kill().unwrap();
        self.drill.wait().unwrap();
    }
}

impl Drop for Hanging {
    fn drop(&mut self) {
        self.kill();
        if self.server > 0 && process::is_alive(self.server) {
            process::signal(self.server, Signal::SIGQUIT);
        }
    }
}

/// Whether a server waits for this segment.
fn hangs_in(server: u32, segment: &str) -> bool {
    process::descendants(server).iter().any(|pid| {
        let title = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&title).contains(&format!("waiting for {segment}"))
    })
}

#[test]
fn a_drill_that_is_told_to_stop_cleans_up() {
    let origin = Origin::make(primary_major());
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let mut hanging = Hanging::start(&origin);
        process::signal(hanging.drill.id(), signal);
        let status = process::wait_within(&mut hanging.drill, wait::PATIENCE).expect("it ends");
        let mut said = String::new();
        hanging.drill.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert_eq!(status.code(), Some(1), "{said}");
        assert!(said.contains("interrupted by SIG") && said.contains("was removed"), "{said}");
        assert!(!process::is_alive(hanging.server));
        origin.assert_nothing_left();
    }
    // What it was started to ignore it ignores.
    let stuck = origin.restore_cmd(&origin.segments[1], "sleep 1.5");
    let drill = origin.drill(&["--latest", "--restore-cmd", &stuck, "--no-count", "--no-amcheck"]);
    let mut nohup = std::process::Command::new("sh");
    nohup.args(["-c", "trap '' HUP; exec \"$@\"", "sh"]).arg(drill.get_program()).args(drill.get_args());
    for (name, value) in drill.get_envs() {
        match value {
            Some(value) => nohup.env(name, value),
            None => nohup.env_remove(name),
        };
    }
    let mut drill = nohup.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait::until("the drill is at work", || origin.scratch().join("data/postmaster.pid").exists());
    process::signal(drill.id(), Signal::SIGHUP);
    let status = process::wait_within(&mut drill, wait::PATIENCE).expect("it ends");
    assert!(status.success());
    // While files are restored, and it may be at any of them.
    for _ in 0..5 {
        let mut drill = origin.drill(&["--latest"]);
        let mut drill = drill.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        wait::until("files are restored", || {
            origin.scratch().join("data/walship-restore-incomplete").exists()
        });
        process::signal(drill.id(), Signal::SIGTERM);
        let status = process::wait_within(&mut drill, wait::PATIENCE).expect("it ends");
        assert_eq!(status.code(), Some(1));
        origin.assert_nothing_left();
    }
    let history = walk(&origin.stage.repository_dir().join("main/0001/history/drills"));
    let records = history.iter().map(|record| fs::read_to_string(record).unwrap());
    let (ended, interrupted): (Vec<_>, Vec<_>) =
        records.partition(|record| !record.contains("interrupted by SIG"));
    assert!(interrupted.iter().all(|record| record.contains("\"interrupted\"")), "{interrupted:?}");
    assert_eq!((ended.len(), interrupted.len()), (1, 8));
}

#[test]
fn what_a_killed_drill_left_is_removed_by_the_next() {
    let origin = Origin::make(primary_major());
    let mut hanging = Hanging::start(&origin);
    hanging.kill();
    assert!(process::is_alive(hanging.server), "a server outlives the program that started it");
    let release = || {
        let holds = origin.stage.holds();
        let reasons: Vec<&str> = holds.iter().map(|(_, reason)| &**reason).collect();
        assert_eq!(reasons, ["pitr drill --latest --timeline 1"], "nobody was there to release it");
        origin.stage.ok(&mut origin.stage.pitr(&["release", &holds[0].0]));
    };
    release();
    let report = origin.report(&["--latest"], 0);
    assert!(!process::is_alive(hanging.server));
    let notes = report["notes"].to_string();
    assert!(notes.contains("and its server, which was still running, was removed"), "{notes}");
    origin.assert_nothing_left();

    // While somebody works there, nobody else does.
    let hanging = Hanging::start(&origin);
    let said = origin.stage.fails(&mut origin.drill(&["--latest"]), 2);
    assert!(said.contains("another drill or extract is at work"), "{said}");
    assert!(process::is_alive(hanging.server));
    drop(hanging);
    release();
    // An extract cleans up as well, and leaves nothing either.
    let file = origin.stage.path().join("t.sql");
    let mut extract = origin.stage.pitr_as_user(&["extract", "--table", "t", "--latest", "--output"]);
    extract.arg(&file).arg("--scratch").arg(origin.scratch());
    let said = origin.stage.ok(extract.arg("--pg-bin").arg(origin.server.binaries().server_bin()));
    assert!(said.contains("what a drill of"), "{said}");
    assert!(fs::read_to_string(&file).unwrap().contains("COPY public.t"));
    origin.assert_nothing_left();
}
