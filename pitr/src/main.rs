//! The `pitr` command.

fn main() -> std::process::ExitCode {
    pitr::cli::run()
}
