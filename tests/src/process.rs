//! Child processes that never outlive the tests, and runs with a deadline.

use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{OnceLock, mpsc};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::wait;

/// Returns a command that the kernel kills (SIGKILL) when this test process ends, however it ends.
/// It must be started with [`spawn`].
pub fn guarded(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

/// Returns a command for a program that refuses root: as root it runs in a user namespace in which it sees itself
/// as an ordinary user, and root's files as its own.
pub fn unprivileged(program: impl AsRef<OsStr>) -> Command {
    if !nix::unistd::geteuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("unshare");
    command.args(["-U", "--map-user=1000", "--map-group=1000", "--"]).arg(program);
    command
}

/// Starts `command` from a thread that lives as long as this process: the kernel's "parent died"
/// signal of [`guarded`] is tied to the thread that started the child, and test threads end early.
pub fn spawn(command: Command) -> io::Result<Child> {
    type Job = (Command, mpsc::SyncSender<io::Result<Child>>);
    static SPAWNER: OnceLock<mpsc::Sender<Job>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (jobs_in, jobs) = mpsc::channel::<Job>();
        std::thread::spawn(move || {
            for (mut command, answer) in jobs {
                let _ = answer.send(command.spawn());
            }
        });
        jobs_in
    });
    let (answer_in, answer) = mpsc::sync_channel(1);
    spawner.send((command, answer_in)).expect("the spawning thread never ends");
    answer.recv().expect("the spawning thread never ends")
}

/// What [`run`] does beside running the command.
#[derive(Debug, Clone, Copy)]
pub struct RunOptions<'a> {
    /// Bytes for standard input; none means an empty one.
    pub stdin: &'a [u8],
    /// After this long the process is killed and the test fails.
    pub deadline: Duration,
}

impl Default for RunOptions<'_> {
    fn default() -> Self {
        Self { stdin: b"", deadline: Duration::from_secs(120) }
    }
}

/// Runs `command` to its end and returns its status and output, whatever the status.
///
/// # Panics
/// When it cannot be started or does not end within the deadline.
pub fn run(command: &mut Command, options: RunOptions<'_>) -> Output {
    let shown = format!("{command:?}");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|e| panic!("{shown} could not be started: {e}"));
    let mut stdin = child.stdin.take().expect("standard input is piped");
    let mut stdout = child.stdout.take().expect("standard output is piped");
    let mut stderr = child.stderr.take().expect("standard error is piped");
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // The program may end without reading its input: a broken pipe is its good right.
            let _ = stdin.write_all(options.stdin);
        });
        let out = scope.spawn(move || read_all(&mut stdout));
        let err = scope.spawn(move || read_all(&mut stderr));
        let deadline = Instant::now() + options.deadline;
        let mut late = false;
        // The pipes are at their end when the process and all that inherited them are gone.
        while !(out.is_finished() && err.is_finished()) {
            if !late && Instant::now() > deadline {
                late = true;
                let _ = child.kill();
            }
            assert!(
                Instant::now() < deadline + Duration::from_secs(20),
                "{shown} left processes behind that hold its output open"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        let stdout = out.join().expect("reading a pipe does not panic");
        let stderr = err.join().expect("reading a pipe does not panic");
        let status = wait_within(&mut child, Duration::from_secs(20)).expect("a process without output ends");
        assert!(
            !late,
            "{shown} did not end within {:?}; its output so far:\n{}\n{}",
            options.deadline,
            String::from_utf8_lossy(&stdout),
            String::from_utf8_lossy(&stderr)
        );
        Output { status, stdout, stderr }
    })
}

/// Runs `command` to its end and returns its standard output.
///
/// # Panics
/// When it fails in any way; both outputs are in the message.
pub fn run_ok(command: &mut Command) -> String {
    let shown = format!("{command:?}");
    let output = run(command, RunOptions::default());
    assert!(
        output.status.success(),
        "{shown}: {}\n{}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Copies a folder with everything in it, modes and times too.
///
/// # Panics
/// When `cp` fails.
pub fn copy_tree(from: &Path, to: &Path) {
    run_ok(Command::new("cp").args(["-a", "--reflink=auto"]).arg(from).arg(to));
}

/// Waits for the end of `child`, at most `patience` long.
pub fn wait_within(child: &mut Child, patience: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(status) = child.try_wait().expect("a child can be waited for") {
            return Some(status);
        }
        if Instant::now() > deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Returns all living descendants of `pid`, children first.
pub fn descendants(pid: u32) -> Vec<u32> {
    let mut parents = Vec::new();
    for entry in std::fs::read_dir("/proc").expect("/proc is readable").flatten() {
        let Some(child) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        if let Some((parent, state)) = parent_and_state(&entry.path())
            && state != 'Z'
        {
            parents.push((child, parent));
        }
    }
    let mut found = vec![pid];
    let mut next = 0;
    while next < found.len() {
        let parent = found[next];
        found.extend(parents.iter().filter(|(_, p)| *p == parent).map(|(child, _)| *child));
        next += 1;
    }
    found.split_off(1)
}

/// Whether `pid` still runs; a zombie does not.
pub fn is_alive(pid: u32) -> bool {
    parent_and_state(Path::new(&format!("/proc/{pid}"))).is_some_and(|(_, state)| state != 'Z')
}

/// Sends `signal` to `pid`; a process that is gone already is fine.
pub fn signal(pid: u32, signal: Signal) {
    let _ = kill(Pid::from_raw(i32::try_from(pid).expect("process ids are small")), signal);
}

/// Kills `child` and everything that it started, and returns when all of them are gone.
pub fn kill_tree(child: &mut Child) -> ExitStatus {
    // Stopped first, so that it starts nothing more between the look and the kill.
    signal(child.id(), Signal::SIGSTOP);
    let below = descendants(child.id());
    let _ = child.kill();
    for pid in &below {
        signal(*pid, Signal::SIGKILL);
    }
    let status = wait_within(child, wait::PATIENCE).expect("a killed process ends");
    wait::until("the killed processes are gone", || below.iter().all(|pid| !is_alive(*pid)));
    status
}

fn parent_and_state(proc_dir: &Path) -> Option<(u32, char)> {
    let stat = std::fs::read_to_string(proc_dir.join("stat")).ok()?;
    // The second field is the name in parentheses and may hold anything, spaces and ')' included.
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    let state = fields.next()?.chars().next()?;
    Some((fields.next()?.parse().ok()?, state))
}

fn read_all(from: &mut impl Read) -> Vec<u8> {
    let mut all = Vec::new();
    let _ = from.read_to_end(&mut all);
    all
}
