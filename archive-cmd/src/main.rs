//! `archive-cmd`: what stands in `archive_command`.
//!
//! Status 0 only when the file is durable in every repository; 1 to 125 otherwise, so that PostgreSQL
//! keeps it, counts the failure and asks again.

use std::ffi::OsString;
use std::process::ExitCode;

use walship::Error;
use walship::agent::client::become_walship;

const HELP: &str = "\
Stores a WAL file in the repository: the program for PostgreSQL's archive_command.

Usage: archive-cmd [OPTIONS] PATH

    archive_command = 'archive-cmd %p'
    archive_command = 'archive-cmd --config /etc/walship/main.toml %p'
    archive_command = 'archive-cmd --repo s3://bucket/pg --cluster main %p'

PATH is %p. The options are those of `walship wal push`, which does the work: see its --help.
`walship` is looked for in WALSHIP_BIN, beside this program, and in PATH.

Exit status:
  0      the file is durable in every repository
  1-125  it is not; PostgreSQL keeps it and asks again
";

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    match arguments.first().and_then(|first| first.to_str()) {
        Some("--help" | "-h") => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Some("--version" | "-V") => {
            println!("archive-cmd {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        Some(_) => {}
        None if arguments.is_empty() => {
            let error = Error::invalid("no file is named")
                .with_next("Set archive_command = 'archive-cmd %p'; `archive-cmd --help` shows more.");
            eprintln!("{}", error.report());
            return ExitCode::from(2);
        }
        None => {}
    }
    eprintln!("{}", become_walship("push", &arguments).report());
    ExitCode::from(3)
}
