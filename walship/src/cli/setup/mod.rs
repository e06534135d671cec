//! `walship setup`: what belongs around the programs on a machine.

mod systemd;
mod units;

use std::path::{Path, PathBuf};
use std::process::{Command as Program, Output};

use clap::CommandFactory as _;
use walship::config::Overrides;
use walship::error::{Error, Result};
use walship::pages;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Write systemd's units: services that stream, watch, back up, verify, look at retention and drill, and their timers
    #[command(after_help = systemd::HELP)]
    Systemd(Box<systemd::Args>),
    /// Write the man pages of all four programs
    Man(ManArgs),
    /// Write completions of walship and pitr for bash, zsh, fish and others
    Completions(CompletionsArgs),
}

#[derive(Debug, clap::Args)]
pub(super) struct ManArgs {
    /// The folder of the pages
    #[arg(long, value_name = "FOLDER", default_value = "/usr/local/share/man/man1")]
    dir: PathBuf,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  walship setup completions --dir /tmp/completions
  install -m 644 /tmp/completions/walship.bash /usr/share/bash-completion/completions/walship
  install -m 644 /tmp/completions/_walship /usr/share/zsh/site-functions/_walship
  install -m 644 /tmp/completions/walship.fish /usr/share/fish/vendor_completions.d/walship.fish")]
pub(super) struct CompletionsArgs {
    /// The folder of the files
    #[arg(long, value_name = "FOLDER")]
    dir: PathBuf,
}

pub(super) fn run(command: &Command, overrides: &Overrides) -> Result<u8> {
    match command {
        Command::Systemd(args) => systemd::run(args, overrides),
        Command::Man(args) => man(&args.dir),
        Command::Completions(args) => completions(&args.dir),
    }
}

fn man(folder: &Path) -> Result<u8> {
    pages::write_man_pages(super::Cli::command(), folder)?;
    ask("pitr", &["pages".as_ref(), "--man".as_ref(), folder.as_os_str()])?;
    for program in ["archive-cmd", "restore-cmd"] {
        let help = ask(program, &["--help".as_ref()])?;
        let help = String::from_utf8_lossy(&help.stdout);
        pages::write_plain_man_page(program, env!("CARGO_PKG_VERSION"), &help, folder)?;
    }
    said(folder)
}

fn completions(folder: &Path) -> Result<u8> {
    pages::write_completions(super::Cli::command(), folder)?;
    ask("pitr", &["pages".as_ref(), "--completions".as_ref(), folder.as_os_str()])?;
    said(folder)
}

fn said(folder: &Path) -> Result<u8> {
    super::print_report(&(), false, || format!("written into {}", folder.display()))?;
    Ok(0)
}

/// Runs one of the other programs, which lie beside this one.
fn ask(program: &str, arguments: &[&std::ffi::OsStr]) -> Result<Output> {
    let own = std::env::current_exe().map_err(|error| Error::from_io("looking for this program", error))?;
    let path = own.with_file_name(program);
    let output = Program::new(&path)
        .args(arguments)
        .output()
        .map_err(|error| Error::from_io(format!("running {}", path.display()), error))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(Error::local_io(format!("{} failed: {}", path.display(), said.trim()))
            .with_next("Install the four programs of one version into one folder."));
    }
    Ok(output)
}
