//! Man pages and completions of a program, made from its own command line. Nothing is said here that `--help` does not
//! say. Called by the programs' own commands.

use std::path::Path;

use clap::{Command, ValueEnum as _};
use clap_complete::Shell;

use crate::error::{Error, Result};

/// Writes a man page for the program and for each of its commands: `pitr.1`, `pitr-plan.1`.
///
/// # Errors
/// [`Error::LocalIo`] and [`Error::Denied`] where the folder cannot be written to.
pub fn write_man_pages(command: Command, folder: &Path) -> Result<()> {
    make(folder)?;
    let mut command = whole(command).disable_help_subcommand(true);
    command.build();
    write_page_and_below(&command, folder)
}

fn write_page_and_below(command: &Command, folder: &Path) -> Result<()> {
    for below in command.get_subcommands().filter(|below| !below.is_hide_set()) {
        write_page_and_below(below, folder)?;
    }
    let man = clap_mangen::Man::new(command.clone());
    let path = folder.join(man.get_filename());
    let mut page = Vec::new();
    man.render(&mut page)
        .and_then(|()| std::fs::write(&path, unbroken(&String::from_utf8_lossy(&page))))
        .map_err(|error| not_written(&path, error))
}

/// Words stay whole, and lines ragged: what is copied from a page is what was meant.
fn unbroken(page: &str) -> String {
    let mut text = String::with_capacity(page.len() + 16);
    for line in page.split_inclusive('\n') {
        text.push_str(line);
        if line.starts_with(".TH ") {
            text.push_str(".nh\n.ad l\n");
        }
    }
    text
}

/// What only the long help shows belongs on the page as well.
fn whole(command: Command) -> Command {
    command.mut_args(|arg| arg.hide_short_help(false)).mut_subcommands(whole)
}

/// Writes the completions of every shell that is known: `_pitr`, `pitr.bash`, `pitr.fish` and others.
///
/// # Errors
/// As [`write_man_pages`].
pub fn write_completions(mut command: Command, folder: &Path) -> Result<()> {
    make(folder)?;
    let name = command.get_name().to_owned();
    for shell in Shell::value_variants() {
        clap_complete::generate_to(*shell, &mut command, &name, folder)
            .map_err(|error| not_written(folder, error))?;
    }
    Ok(())
}

/// Writes the man page of a program that has no commands, from what it says with `--help`: what it is on the first
/// line, its usage on a line that begins with `Usage:`.
///
/// # Errors
/// As [`write_man_pages`].
pub fn write_plain_man_page(program: &str, version: &str, help: &str, folder: &Path) -> Result<()> {
    make(folder)?;
    let path = folder.join(format!("{program}.1"));
    std::fs::write(&path, unbroken(&plain_man_page(program, version, help)))
        .map_err(|error| not_written(&path, error))
}

fn plain_man_page(program: &str, version: &str, help: &str) -> String {
    let (what, rest) = help.split_once('\n').unwrap_or((help, ""));
    let usage = rest.lines().find_map(|line| line.strip_prefix("Usage: ")).unwrap_or(program);
    let body: Vec<String> = rest.lines().filter(|line| !line.starts_with("Usage: ")).map(roff_line).collect();
    format!(
        ".TH {program} 1 \"\" \"{program} {version}\"\n.SH NAME\n{program} \\- {}\n.SH SYNOPSIS\n{}\n\
         .SH DESCRIPTION\n{}\n.PP\n.nf\n{}\n.fi\n",
        roff_line(what.trim_end_matches('.')),
        roff_line(usage),
        roff_line(what),
        body.join("\n").trim_matches('\n'),
    )
}

/// A line of text in which nothing is a request or an escape.
fn roff_line(line: &str) -> String {
    let escaped = line.replace('\\', "\\e").replace('-', "\\-");
    if escaped.starts_with(['.', '\'']) { format!("\\&{escaped}") } else { escaped }
}

fn make(folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(|error| not_written(folder, error))
}

fn not_written(path: &Path, error: std::io::Error) -> Error {
    Error::from_io(format!("writing {}", path.display()), error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_page_has_no_requests_in_it() {
        let page = plain_man_page(
            "x-cmd",
            "1.0",
            "Does it.\n\nUsage: x-cmd [OPTIONS] PATH\n\n.so /etc/passwd\na\\b -c\n",
        );
        assert!(page.contains(".SH NAME\nx-cmd \\- Does it\n"), "{page}");
        assert!(page.contains("\n\\&.so /etc/passwd\na\\eb \\-c\n"), "{page}");
        assert!(page.contains(".SH SYNOPSIS\nx\\-cmd [OPTIONS] PATH\n"), "{page}");
    }
}
