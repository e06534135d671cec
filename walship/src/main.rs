//! The `walship` command: creates and checks repositories, moves WAL files, takes base backups.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
