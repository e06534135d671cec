//! `restore-cmd`: what stands in `restore_command`.
//!
//! Status 0: the file is in place, whole and checked. Status 1: proven absent, nothing else. All other
//! failures stop a one-shot recovery (126) or make a standby ask again (75).

use std::ffi::{OsStr, OsString};
use std::io::Write as _;
use std::panic::catch_unwind;
use std::path::Path;
use std::process::ExitCode;

use walship::Error;
use walship::agent::client::{Asking, STATUS_STOP, ask_fetch, run_fetch, unanswered};

const HELP: &str = "\
Fetches a WAL file from the repository: the program for PostgreSQL's restore_command.

Usage: restore-cmd [OPTIONS] NAME PATH

    restore_command = 'restore-cmd %f %p'
    restore_command = 'restore-cmd --config /etc/walship/main.toml %f %p'
    restore_command = 'restore-cmd --repo s3://bucket/pg --cluster main %f %p'

NAME is %f, PATH is %p. The options are those of `walship wal fetch`: see its --help. The work is done by
an agent (`walship agent --help`) where one is at work, else by `walship wal fetch` itself, which is looked
for in WALSHIP_BIN, beside this program, and in PATH.

Exit status:
  0    the file is in place, whole and checked
  1    the file is proven not to be in the repository, and nothing behind it is
  75   no answer, and the server is a standby: it asks again
  126  no answer (outage, hole, damage, configuration): PostgreSQL stops the recovery
";

fn main() -> ExitCode {
    // 101, the status of a panic, would read as "absent".
    ExitCode::from(catch_unwind(answer).unwrap_or(STATUS_STOP))
}

fn answer() -> u8 {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    // Beside other arguments they are a mistake in restore_command: status 0 would promise a file.
    if let [only] = &*arguments {
        match only.to_str() {
            Some("--help" | "-h") => return said(HELP),
            Some("--version" | "-V") => {
                return said(concat!("restore-cmd ", env!("CARGO_PKG_VERSION"), "\n"));
            }
            _ => {}
        }
    }
    let target = arguments.last().map(Path::new);
    let name = arguments.iter().rev().nth(1).map(OsString::as_os_str);
    let error = match (name, target) {
        (Some(_), Some(_)) => match ask_fetch(&arguments) {
            Asking::Answered(answered) => {
                let _ = std::io::stderr().write_all(answered.text.as_bytes());
                return answered.status;
            }
            Asking::Foreground(wanted) => match run_fetch(&arguments, wanted.as_ref()) {
                Ok(Some(status)) => return status,
                Ok(None) => Error::unavailable("walship ended without an answer")
                    .with_next("Run `walship wal fetch` by hand with the same arguments to see why."),
                Err(error) => error,
            },
        },
        _ => Error::invalid("a file's name and a path are needed")
            .with_next("Set restore_command = 'restore-cmd %f %p'; `restore-cmd --help` shows more."),
    };
    // First the note for the questions to come, then words: standard error may be full or closed.
    let status = unanswered(name.map(OsStr::new), target);
    let _ = writeln!(std::io::stderr(), "{}", error.report());
    status
}

fn said(text: &str) -> u8 {
    let _ = std::io::stdout().write_all(text.as_bytes());
    0
}
