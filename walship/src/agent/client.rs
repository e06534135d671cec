//! The thin commands' side: who asks, which status an unanswered question has, asking the agent, and handing
//! the work to `walship` in the foreground where there is none.
//!
//! PostgreSQL reads exit statuses (`src/backend/access/transam/xlogarchive.c`, `wait_result_is_any_signal`):
//! above 125, or a death by signal, stops a recovery; everything lower but 0 reads as "not in the archive".

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Read as _};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use crate::archive::DataDirectory;
use crate::archive::asked::{Answer, Asked};
use crate::durable::TempFile;
use crate::error::Error;
use crate::pg::WalFileName;

use super::meeting::{Meeting, WANTED_VARIABLE};
use super::protocol::{self, GREETING, Question};

/// An agent that gives no sign of life for so long is not waited for: it is stopped, or hangs. While it
/// works it gives one every [`SIGN_OF_LIFE`].
const SILENCE_MAX: Duration = Duration::from_secs(10);

/// How often an agent that works says so.
pub const SIGN_OF_LIFE: Duration = Duration::from_secs(2);

/// The status of a question that a one-shot recovery must not go on without.
pub const STATUS_STOP: u8 = 126;

/// The status of a question that a standby will ask again.
pub const STATUS_ASK_AGAIN: u8 = 75;

/// The status that means "absent".
pub const STATUS_ABSENT: u8 = 1;

/// Set by `restore-cmd` for the `walship wal fetch` that it starts: [`STATUS_ABSENT_TO_US`], a space, its own pid.
pub const ABSENT_STATUS_VARIABLE: &str = "WALSHIP_ABSENT_STATUS";

/// The status by which `walship wal fetch` says "absent" to `restore-cmd`. A dynamic linker that cannot
/// start a program ends it with 1, and so does many a wrapper: their 1 must not reach PostgreSQL.
pub const STATUS_ABSENT_TO_US: u8 = 73;

/// Who asks for a WAL file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asker {
    /// A standby: `standby.signal` is there (it wins over `recovery.signal`). It asks again.
    Standby,
    /// A server that recovers once, and promotes when it is told that there is no more.
    OneShot,
    /// No signal file: `pg_rewind -c`, or a person.
    Other,
}

impl Asker {
    /// Returns who wants a file at `target` (`%p`).
    pub fn of(target: &Path) -> Self {
        let Some(directory) = DataDirectory::of_wal_file(target) else { return Self::Other };
        let has = |name: &str| directory.path().join(name).symlink_metadata().is_ok();
        if has("standby.signal") {
            Self::Standby
        } else if has("recovery.signal") {
            Self::OneShot
        } else {
            Self::Other
        }
    }

    /// Returns how long to try again for this asker, when a one-shot recovery is worth `one_shot`: a standby asks
    /// again by itself.
    pub fn retry(self, one_shot: Duration) -> Duration {
        match self {
            Self::Standby => Duration::ZERO,
            Self::OneShot | Self::Other => one_shot,
        }
    }

    /// Returns the status of a question that could not be answered.
    pub fn unanswered(self) -> u8 {
        match self {
            Self::Standby => STATUS_ASK_AGAIN,
            Self::OneShot | Self::Other => STATUS_STOP,
        }
    }
}

/// Notes that the fetch of `name` to `target` gave no answer for a reason outside of the archive (no
/// configuration, no program), and returns the status to end with.
pub fn unanswered(name: Option<&OsStr>, target: Option<&Path>) -> u8 {
    let Some(target) = target else { return STATUS_STOP };
    let status = Asker::of(target).unanswered();
    let name = name.and_then(OsStr::to_str).and_then(|name| name.parse::<WalFileName>().ok());
    let (Some(name), Some(directory)) = (name, DataDirectory::of_wal_file(target)) else {
        return if name.is_none() { STATUS_STOP } else { status };
    };
    let noted = Asked::load(directory.path()).and_then(|mut asked| asked.note(name, Answer::Unknown));
    if noted.is_ok() { status } else { STATUS_STOP }
}

/// An answer of the agent's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answered {
    /// The status for PostgreSQL.
    pub status: u8,
    /// What is to be said on standard error; may be nothing.
    pub text: String,
}

/// How a call goes on.
#[derive(Debug)]
pub enum Asking {
    /// The agent answered.
    Answered(Answered),
    /// Nobody did: the work is to be done in the foreground, which then may start an agent at this place.
    Foreground(Option<Meeting>),
}

/// Asks the agent to push the file that `arguments`, those of `walship wal push`, end with.
pub fn ask_push(arguments: &[OsString]) -> Asking {
    let Some((path, options)) = arguments.split_last() else { return Asking::Foreground(None) };
    let Some(meeting) = meeting(options, Path::new(path)) else { return Asking::Foreground(None) };
    let Ok(path) = std::path::absolute(path) else { return Asking::Foreground(None) };
    match ask(&meeting, &Question::Push { path }) {
        // A status that archive-cmd never has is no answer.
        Some((protocol::Answer::Status { status, text }, _)) if status <= 125 => {
            Asking::Answered(Answered { status, text })
        }
        _ => Asking::Foreground(Some(meeting)),
    }
}

/// Asks the agent for the file that `arguments`, those of `walship wal fetch`, end with, and puts it in place.
pub fn ask_fetch(arguments: &[OsString]) -> Asking {
    let [options @ .., name, target] = arguments else { return Asking::Foreground(None) };
    let Some(meeting) = meeting(options, Path::new(target)) else { return Asking::Foreground(None) };
    let Ok(target) = std::path::absolute(target) else { return Asking::Foreground(None) };
    match fetched(&meeting, name, &target) {
        Some(answered) => Asking::Answered(answered),
        None => Asking::Foreground(Some(meeting)),
    }
}

/// Returns the agent's answer, once the file that it gave is in place.
fn fetched(meeting: &Meeting, name: &OsStr, target: &Path) -> Option<Answered> {
    let question = Question::Fetch { name: name.to_owned(), target: target.to_owned() };
    // The agent takes back what it gave as soon as the line is closed.
    let (answer, _line) = ask(meeting, &question)?;
    match answer {
        protocol::Answer::File { path } => {
            put_in_place(&path, target).ok()?;
            Some(Answered { status: 0, text: String::new() })
        }
        protocol::Answer::Status {
            status: status @ (STATUS_ABSENT | STATUS_ASK_AGAIN | STATUS_STOP),
            text,
        } => Some(Answered { status, text }),
        _ => None,
    }
}

/// What is asked for as JSON, or with options that are none, is not for the agent.
fn meeting(options: &[OsString], path: &Path) -> Option<Meeting> {
    let odd = |option: &OsString| {
        ["--json", "--help", "-h", "--version", "-V", "--", "--up-to-damage", "--up-to-gap"]
            .iter()
            .any(|odd| option == odd)
    };
    if options.iter().any(odd) { None } else { Meeting::of(options, path) }
}

/// Returns the agent's answer and the line to it; `None` when there is no agent, or it gives none.
fn ask(meeting: &Meeting, question: &Question) -> Option<(protocol::Answer, UnixStream)> {
    let mut stream = UnixStream::connect(&meeting.socket).ok()?;
    stream.set_read_timeout(Some(SILENCE_MAX)).ok()?;
    stream.set_write_timeout(Some(SILENCE_MAX)).ok()?;
    // Whoever could put a socket there could as well be root.
    let peer = getsockopt(&stream, PeerCredentials).ok()?;
    if peer.uid() != nix::unistd::geteuid().as_raw() {
        return None;
    }
    protocol::write_question(&mut stream, question).ok()?;
    let mut greeting = [0; GREETING.len()];
    stream.read_exact(&mut greeting).ok()?;
    if greeting != *GREETING {
        return None;
    }
    loop {
        match protocol::read_answer(&mut stream).ok()?? {
            protocol::Answer::Working => {}
            protocol::Answer::Foreground { .. } => return None,
            answer => return Some((answer, stream)),
        }
    }
}

/// Gives a whole, checked and synced file its name. Where it lies on another file system, a copy gets it.
fn put_in_place(file: &Path, target: &Path) -> Result<(), Error> {
    let failed = |error| Error::from_io(format!("moving {} to {}", file.display(), target.display()), error);
    match fs::rename(file, target) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
            let temp = TempFile::beside(target)?;
            let mut source = fs::File::open(file).map_err(failed)?;
            let mut sink = temp.file();
            io::copy(&mut source, &mut sink).map_err(failed)?;
            temp.publish()?;
            // The agent tidies up what cannot be removed.
            let _ = fs::remove_file(file);
            Ok(())
        }
        Err(error) => Err(failed(error)),
    }
}

/// Becomes `walship wal push <arguments>`, which may start an agent at `wanted`; returns only when that
/// failed, and why.
///
/// The program is `WALSHIP_BIN`, else `walship` beside this program, else the one in `PATH`.
pub fn become_push(arguments: &[OsString], wanted: Option<&Meeting>) -> Error {
    let program = walship();
    let mut command = Command::new(&program);
    want(&mut command, wanted);
    let failure = command.args(["wal", "push"]).args(arguments).exec();
    not_started(&program, failure)
}

fn want(command: &mut Command, wanted: Option<&Meeting>) {
    match wanted {
        Some(meeting) => command.env(WANTED_VARIABLE, &meeting.socket),
        None => command.env_remove(WANTED_VARIABLE),
    };
}

/// Runs `walship wal fetch <arguments>`, which may start an agent at `wanted`, and returns the status for
/// PostgreSQL, or `None` when the call gave no answer: it ended in a way that no fetch ends. The program is
/// found as in [`become_push`].
///
/// # Errors
/// [`Error::LocalIo`] or [`Error::Denied`] when it cannot be started.
pub fn run_fetch(arguments: &[OsString], wanted: Option<&Meeting>) -> Result<Option<u8>, Error> {
    let program = walship();
    let mut command = Command::new(&program);
    want(&mut command, wanted);
    let status = command
        .args(["wal", "fetch"])
        .args(arguments)
        .env(ABSENT_STATUS_VARIABLE, format!("{STATUS_ABSENT_TO_US} {}", std::process::id()))
        .status()
        .map_err(|failure| not_started(&program, failure))?;
    Ok(status_for_postgres(status))
}

/// Returns what PostgreSQL is told after `walship wal fetch` ended so; `None`: no answer.
fn status_for_postgres(status: ExitStatus) -> Option<u8> {
    match (status.code(), status.signal()) {
        (Some(0), _) => Some(0),
        (Some(code), _) if code == i32::from(STATUS_ABSENT_TO_US) => Some(STATUS_ABSENT),
        (Some(code), _) if code == i32::from(STATUS_ASK_AGAIN) => Some(STATUS_ASK_AGAIN),
        (Some(code), _) if code == i32::from(STATUS_STOP) => Some(STATUS_STOP),
        // A server that stops signals the whole group, and reads 128 + the signal as the signal itself.
        (None, Some(signal @ (1 | 2 | 3 | 15))) => u8::try_from(128 + signal).ok(),
        _ => None,
    }
}

/// Called by `walship wal fetch`: returns the status with which it says "absent" to whoever started it. When
/// that is `restore-cmd`, this process dies with it from now on: it must not put a file in place
/// when the server has asked for another one since.
///
/// # Errors
/// [`Error::LocalIo`] when `restore-cmd` is gone already.
pub fn bound_to_starter() -> Result<u8, Error> {
    let value = env::var(ABSENT_STATUS_VARIABLE).unwrap_or_default();
    let Some((status, starter)) = value.split_once(' ') else { return Ok(STATUS_ABSENT) };
    if status != STATUS_ABSENT_TO_US.to_string() {
        return Ok(STATUS_ABSENT);
    }
    let gone = |why: String| Error::local_io(format!("the restore-cmd that started this is gone: {why}"));
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(|errno| gone(errno.to_string()))?;
    let parent = nix::unistd::getppid().to_string();
    if parent != starter {
        return Err(gone(format!("the parent is process {parent}, not {starter}")));
    }
    Ok(STATUS_ABSENT_TO_US)
}

fn not_started(program: &Path, failure: std::io::Error) -> Error {
    Error::from_io(format!("{} cannot be started", program.display()), failure)
        .with_safe("nothing was done")
        .with_next("Install walship beside this program, or set WALSHIP_BIN to its path.")
}

/// Returns the `walship` program that belongs to this one.
pub(super) fn walship() -> PathBuf {
    if let Some(program) = env::var_os("WALSHIP_BIN").filter(|value| !value.is_empty()) {
        return program.into();
    }
    let beside = env::current_exe().ok().map(|own| own.with_file_name("walship"));
    beside.filter(|path| path.is_file()).unwrap_or_else(|| "walship".into())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn the_asker_is_known_by_the_signal_files() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("pg_wal")).unwrap();
        let target = folder.path().join("pg_wal/RECOVERYXLOG");
        assert_eq!((Asker::of(&target), Asker::of(&target).unanswered()), (Asker::Other, 126));
        fs::write(folder.path().join("recovery.signal"), "").unwrap();
        assert_eq!((Asker::of(&target), Asker::of(&target).unanswered()), (Asker::OneShot, 126));
        fs::write(folder.path().join("standby.signal"), "").unwrap();
        assert_eq!((Asker::of(&target), Asker::of(&target).unanswered()), (Asker::Standby, 75));
        assert_eq!(Asker::of(&folder.path().join("elsewhere/x")), Asker::Other);
    }

    #[test]
    fn only_a_fetchs_own_statuses_reach_postgres() {
        let exited = |code: i32| status_for_postgres(ExitStatus::from_raw(code << 8));
        assert_eq!(exited(0), Some(0));
        assert_eq!(exited(73), Some(1));
        assert_eq!((exited(75), exited(126)), (Some(75), Some(126)));
        // A linker's or a wrapper's failure, a usage error of an older version, a panic, a shell's 127.
        for code in [1, 2, 74, 101, 127, 255] {
            assert_eq!(exited(code), None, "{code}");
        }
        let killed = |signal: i32| status_for_postgres(ExitStatus::from_raw(signal));
        assert_eq!((killed(15), killed(3)), (Some(143), Some(131)));
        assert_eq!((killed(9), killed(11)), (None, None));
    }

    /// What it gives is taken back when the asker is gone, so nobody may be gone before the file is in place.
    #[test]
    fn the_agent_hears_us_until_the_file_is_in_place() {
        let folder = tempfile::tempdir().unwrap();
        let meeting =
            Meeting { socket: folder.path().join("socket"), data_directory: folder.path().to_owned() };
        let listener = std::os::unix::net::UnixListener::bind(&meeting.socket).unwrap();
        let spooled = folder.path().join("spooled");
        let targets: Vec<PathBuf> =
            (0..200).map(|call| folder.path().join(format!("target {call}"))).collect();
        let agent = {
            let targets = targets.clone();
            std::thread::spawn(move || {
                for target in targets {
                    let (mut line, _) = listener.accept().unwrap();
                    let mut length = [0; 4];
                    line.read_exact(&mut length).unwrap();
                    line.read_exact(&mut vec![0; protocol::body_length(length).unwrap()]).unwrap();
                    fs::write(&spooled, "whole").unwrap();
                    let answer = protocol::Answer::File { path: spooled.clone() }.to_message();
                    line.write_all(&[GREETING, &*answer].concat()).unwrap();
                    assert_eq!(line.read(&mut length).unwrap(), 0);
                    assert!(target.exists(), "hung up before {}", target.display());
                }
            })
        };
        for target in &targets {
            let answered = fetched(&meeting, OsStr::new("000000010000000000000001"), target);
            assert_eq!(answered.map(|answered| answered.status), Some(0));
        }
        agent.join().unwrap();
    }

    #[test]
    fn an_unanswered_question_is_noted_or_stops() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("pg_wal")).unwrap();
        fs::write(folder.path().join("standby.signal"), "").unwrap();
        fs::write(folder.path().join("postmaster.pid"), "1\n/data\n17\n").unwrap();
        let target = folder.path().join("pg_wal/RECOVERYXLOG");
        let name = OsStr::new("000000020000000000000005");
        assert_eq!(unanswered(Some(name), Some(&target)), 75);
        let asked = Asked::load(folder.path()).unwrap();
        let older = "000000010000000000000005".parse().unwrap();
        assert!(matches!(asked.order(older), crate::archive::asked::Order::Unknown { .. }));
        assert_eq!(unanswered(Some(OsStr::new("../x")), Some(&target)), 126);
        assert_eq!(unanswered(Some(name), None), 126);
        fs::create_dir(folder.path().join("pgsql_tmp_walship_asked").with_extension("new")).unwrap();
        let other = OsStr::new("000000020000000000000006");
        assert_eq!(unanswered(Some(other), Some(&target)), 126, "not noted");
    }
}
