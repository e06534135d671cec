//! Kills a program at a chosen system call or after a chosen time.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt;
use std::io::{Read as _, Seek as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use walship_tests::process::{self, RunOptions};
use walship_tests::random::Random;

/// The calls by which a program reads, writes, names and removes things, and ends. Those that a
/// machine's architecture does not have are left out by strace.
const CALLS: [&str; 30] = [
    "openat",
    "read",
    "pread64",
    "write",
    "writev",
    "pwrite64",
    "close",
    "fsync",
    "fdatasync",
    "syncfs",
    "ftruncate",
    "fallocate",
    "link",
    "linkat",
    "symlink",
    "symlinkat",
    "rename",
    "renameat",
    "renameat2",
    "unlink",
    "unlinkat",
    "mkdir",
    "mkdirat",
    "fchmod",
    "connect",
    "sendto",
    "sendmsg",
    "recvfrom",
    "recvmsg",
    "exit_group",
];

/// So many occurrences of one call are points of the sweep; of more, so many are chosen evenly.
const POINTS_PER_CALL: u64 = 40;

/// How a struck program ended.
pub(crate) enum Ended {
    /// By the kill.
    Killed,
    /// With status 0, before the kill came.
    Done,
    /// Otherwise; what it said.
    Failed(String),
}

/// A moment to kill at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Moment {
    /// Just before the `nth` call of a thread.
    Call { call: String, nth: u64 },
    /// So long after the start.
    After(Duration),
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Call { call, nth } => write!(f, "killed before {call} number {nth}"),
            Self::After(time) => write!(f, "killed after {time:?}"),
        }
    }
}

/// Knows which system calls a program makes and how long it takes.
pub(crate) struct Killer {
    /// The points of the sweep; every call comes once before any comes twice.
    points: Vec<Moment>,
    takes: Duration,
}

impl Killer {
    /// Runs a program to its end and watches it.
    pub(crate) fn watch(command: &Command, scratch: &Path, random: &mut Random) -> Self {
        let trace = scratch.join("trace");
        let calls = format!("trace={}", CALLS.map(|call| format!("?{call}")).join(","));
        let trace_path = trace.to_str().expect("scratch paths are UTF-8");
        let started = Instant::now();
        let watched = run(&mut under_strace(command, &["-o", trace_path, "-e", &calls]));
        let takes = started.elapsed();
        assert!(watched.status.success(), "{command:?}: {}", said(&watched));
        // Each thread counts for itself, as strace does when it injects.
        let mut counts: BTreeMap<&str, BTreeMap<&str, u64>> = BTreeMap::new();
        let trace = std::fs::read_to_string(&trace).expect("strace writes its trace");
        for line in trace.lines() {
            let Some((thread, rest)) = line.split_once(' ') else { continue };
            let Some((call, _)) = rest.trim_start().split_once('(') else { continue };
            if CALLS.contains(&call) {
                *counts.entry(call).or_default().entry(thread).or_default() += 1;
            }
        }
        let mut of_calls: Vec<Vec<Moment>> = Vec::new();
        for (call, threads) in counts {
            let most = threads.into_values().max().unwrap_or(0);
            let points = most.min(POINTS_PER_CALL);
            let moment =
                |point: u64| Moment::Call { call: call.to_owned(), nth: (point * most).div_ceil(points) };
            let mut moments: Vec<Moment> = (1..=points).map(moment).collect();
            random.shuffle(&mut moments);
            of_calls.push(moments);
        }
        let mut points = Vec::new();
        while of_calls.iter().any(|moments| !moments.is_empty()) {
            random.shuffle(&mut of_calls);
            points.extend(of_calls.iter_mut().filter_map(Vec::pop));
        }
        // What strace adds is a good part of it.
        Self { points, takes: takes / 2 }
    }

    /// How many rounds it takes to come to every point of the sweep, where the full counts are asked for;
    /// else 0.
    pub(crate) fn sweep_rounds(&self) -> usize {
        if walship_tests::campaign() { self.points.len() * 3 / 2 + 1 } else { 0 }
    }

    /// Runs a program of the same kind and kills it: in every third round after a random time, in the
    /// others at the next point of the sweep.
    pub(crate) fn strike(&self, command: &Command, round: usize, random: &mut Random) -> (Moment, Ended) {
        let moment = if round % 3 == 2 {
            Moment::After(self.takes.mul_f64(random.fraction()))
        } else {
            self.points[(round - round / 3) % self.points.len()].clone()
        };
        let output = match &moment {
            Moment::Call { call, nth } => {
                let trace = format!("trace={call}");
                let inject = format!("inject={call}:signal=KILL:when={nth}");
                run(&mut under_strace(command, &["-o", "/dev/null", "-e", &trace, "-e", &inject]))
            }
            Moment::After(time) => killed_after(&mut with_prefix(command, &[]), *time),
        };
        let ended = match (output.status.signal(), output.status.success()) {
            (Some(9), _) => Ended::Killed,
            // The kill came to the walship that restore-cmd had started.
            _ if said(&output).contains("walship ended without an answer") => Ended::Killed,
            (_, true) => Ended::Done,
            _ => Ended::Failed(said(&output)),
        };
        (moment, ended)
    }
}

fn under_strace(command: &Command, options: &[&str]) -> Command {
    let mut prefix = vec!["strace", "-f", "-qq"];
    prefix.extend(options);
    prefix.push("--");
    with_prefix(command, &prefix)
}

/// Returns the same command behind a prefix.
fn with_prefix(command: &Command, prefix: &[&str]) -> Command {
    let mut words = prefix.iter().map(OsStr::new).chain([command.get_program()]).chain(command.get_args());
    let mut copy = Command::new(words.next().expect("there is a program"));
    copy.args(words);
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => copy.env(name, value),
            None => copy.env_remove(name),
        };
    }
    copy
}

fn killed_after(command: &mut Command, time: Duration) -> Output {
    let output = tempfile::tempfile().expect("the scratch folder has room");
    let streams = || output.try_clone().expect("a file can be duplicated");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(streams());
    let mut child = command.spawn().unwrap_or_else(|e| panic!("{command:?} could not be started: {e}"));
    std::thread::sleep(time);
    let _ = child.kill();
    let status =
        process::wait_within(&mut child, walship_tests::wait::PATIENCE).expect("a killed process ends");
    let mut stderr = Vec::new();
    let mut output = output;
    output.rewind().and_then(|()| output.read_to_end(&mut stderr)).expect("a file can be read");
    Output { status, stdout: Vec::new(), stderr }
}

fn run(command: &mut Command) -> Output {
    process::run(command, RunOptions { deadline: Duration::from_secs(180), ..RunOptions::default() })
}

fn said(output: &Output) -> String {
    format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr))
}
