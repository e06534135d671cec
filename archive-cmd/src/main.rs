//! `archive-cmd`: what stands in `archive_command`.
//!
//! Status 0 only when the file is durable in every repository; 1 to 125 otherwise, so that PostgreSQL
//! keeps it, counts the failure and asks again.

use std::ffi::OsString;
use std::io::Write as _;
use std::process::ExitCode;

use walship::Error;
use walship::agent::client::{Asking, ask_push, become_push};

const HELP: &str = "\
Stores a WAL file in the repository: the program for PostgreSQL's archive_command.

Usage: archive-cmd [OPTIONS] PATH

    archive_command = 'archive-cmd %p'
    archive_command = 'archive-cmd --config /etc/walship/main.toml %p'
    archive_command = 'archive-cmd --repo s3://bucket/pg --cluster main %p'

PATH is %p. The options are those of `walship wal push`: see its --help. The work is done by an agent
(`walship agent --help`) where one is at work, else by `walship wal push` itself, which is looked for in
WALSHIP_BIN, beside this program, and in PATH.

Exit status:
  0      the file is durable in every repository
  1-125  it is not; PostgreSQL keeps it and asks again
";

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    // Beside other arguments they are a mistake in archive_command: status 0 would give WAL away.
    if let [only] = &*arguments {
        match only.to_str() {
            Some("--help" | "-h") => return said(HELP),
            Some("--version" | "-V") => {
                return said(concat!("archive-cmd ", env!("CARGO_PKG_VERSION"), "\n"));
            }
            _ => {}
        }
    }
    let (status, error) = match &*arguments {
        [] => {
            let error = Error::invalid("no file is named")
                .with_next("Set archive_command = 'archive-cmd %p'; `archive-cmd --help` shows more.");
            (2, error)
        }
        arguments => match ask_push(arguments) {
            Asking::Answered(answered) => {
                let _ = std::io::stderr().write_all(answered.text.as_bytes());
                return ExitCode::from(answered.status);
            }
            Asking::Foreground(wanted) => (3, become_push(arguments, wanted.as_ref())),
        },
    };
    let _ = writeln!(std::io::stderr(), "{}", error.report());
    ExitCode::from(status)
}

fn said(text: &str) -> ExitCode {
    let _ = std::io::stdout().write_all(text.as_bytes());
    ExitCode::SUCCESS
}
