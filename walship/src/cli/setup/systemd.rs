//! `walship setup systemd`.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use clap::Parser as _;
use serde::Serialize;
use walship::config::{Config, DEFAULT_PATH, Overrides};
use walship::durable::TempFile;
use walship::error::{Error, Result};
use walship::storage::Location;

use super::units::{Folders, Units};

pub(super) const HELP: &str = "\
Examples:
  walship setup systemd                          # shows what it would write
  walship setup systemd --confirm
  walship setup systemd --backup-at 'Sat 22:00' --backup-options '--source local --incremental' --confirm
  walship setup systemd --name shop --config /etc/walship/shop.toml --confirm      # a second cluster on this host

Written are services for walship receive, walship serve, base backups, pitr verify, pitr expire and drills, and timers for the \
last four. A second walship serve on one host needs another port: --serve-options '--listen 127.0.0.1:19188'. Nothing is started: systemctl enable --now does that, for those that are wanted. What a unit may write to comes from \
the configuration: run it again when a repository's or the spool's folder changes.

A unit that was edited is never written over. Changes belong into a drop-in: systemctl edit walship-backup.timer

Exit status:
  0  done, or shown what would be
  1  failed, or a unit was edited; the message says which
  2  the command line makes no sense";

/// Where units of packages lie.
const PACKAGED: [&str; 2] = ["usr/lib/systemd/system", "lib/systemd/system"];

/// The longest unit that is read.
const UNIT_BYTES_MAX: u64 = 1 << 20;

/// What the first line of a unit begins with; the digest of the rest follows.
const MARK: &str = "# Written by `walship setup systemd`; changes belong into `systemctl edit`. ";

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// Write the units
    #[arg(long)]
    confirm: bool,
    /// The folder of the units
    #[arg(long, value_name = "FOLDER", default_value = "/etc/systemd/system")]
    dir: PathBuf,
    /// Write below this folder, which becomes / later: for images and packages
    #[arg(long, value_name = "FOLDER")]
    root: Option<PathBuf>,
    /// What the units' names begin with
    #[arg(long, value_name = "NAME", default_value = "walship", value_parser = parse_name)]
    name: String,
    /// The user that they run as: the one who may read the configuration, and the data directory
    #[arg(long, value_name = "USER", default_value = "postgres", value_parser = parse_user)]
    user: String,
    /// The folder of the programs [default: where this one is]
    #[arg(long, value_name = "FOLDER")]
    bin_dir: Option<PathBuf>,
    /// Options of walship serve, with spaces between them
    #[arg(
        long,
        value_name = "OPTIONS",
        default_value = "",
        hide_default_value = true,
        allow_hyphen_values = true
    )]
    serve_options: String,
    /// Options of walship backup, with spaces between them
    #[arg(
        long,
        value_name = "OPTIONS",
        default_value = "--incremental --chain-max 6",
        allow_hyphen_values = true
    )]
    backup_options: String,
    /// Options of pitr drill, with spaces between them
    #[arg(
        long,
        value_name = "OPTIONS",
        default_value = "",
        hide_default_value = true,
        allow_hyphen_values = true
    )]
    drill_options: String,
    /// When backups begin, as systemd.time(7) writes it
    #[arg(long, value_name = "CALENDAR", default_value = "*-*-* 01:30")]
    backup_at: String,
    /// Options of pitr verify, with spaces between them
    #[arg(long, value_name = "OPTIONS", default_value = "--budget 10GB", allow_hyphen_values = true)]
    verify_options: String,
    /// When pitr verify begins
    #[arg(long, value_name = "CALENDAR", default_value = "*-*-* 04:00")]
    verify_at: String,
    /// When pitr expire begins
    #[arg(long, value_name = "CALENDAR", default_value = "*-*-* 05:30")]
    expire_at: String,
    /// When drills begin
    #[arg(long, value_name = "CALENDAR", default_value = "Sun *-*-1..7 06:00")]
    drill_at: String,
    /// Whatever the configuration says, for any: units of packages
    #[arg(long)]
    generic: bool,
    /// Print what was done as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    folder: PathBuf,
    /// Whether the units were written.
    written: bool,
    units: Vec<Unit>,
    /// What is worth knowing.
    notes: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Unit {
    name: String,
    state: State,
    text: String,
}

/// What is there of a unit, compared with what it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum State {
    New,
    Changed,
    Unchanged,
    /// Somebody else wrote it, or changed it.
    Edited,
}

pub(super) fn run(args: &Args, overrides: &Overrides) -> Result<u8> {
    let mut notes = Vec::new();
    let units = units(args, overrides, &mut notes)?;
    let below = |folder: &Path| match &args.root {
        Some(root) => root.join(folder.strip_prefix("/").unwrap_or(folder)),
        None => folder.to_owned(),
    };
    let folder = below(&args.dir);
    let mut planned = Vec::new();
    for (name, text) in units.texts()? {
        let text = marked(&text);
        let state = compare(&folder.join(&name), &text)?;
        planned.push(Unit { name, state, text });
    }
    for packaged in PACKAGED.map(|folder| below(&Path::new("/").join(folder))) {
        let receive = packaged.join(format!("{}-receive.service", args.name));
        if packaged != folder && receive.exists() {
            notes.push(format!("the package's units are in {}: these take their place", packaged.display()));
            break;
        }
    }
    let edited: Vec<&str> =
        planned.iter().filter(|unit| unit.state == State::Edited).map(|unit| unit.name.as_str()).collect();
    if args.confirm && !edited.is_empty() {
        return Err(Error::conflict(format!(
            "edited by somebody else in {}: {}",
            folder.display(),
            edited.join(", ")
        ))
        .with_safe("nothing was written")
        .with_next(
            "Put the changes into a drop-in (`systemctl edit`), move the file away, and run it again.",
        ));
    }
    if args.confirm {
        fs::create_dir_all(&folder)
            .map_err(|error| Error::from_io(format!("making {}", folder.display()), error))?;
        for unit in planned.iter().filter(|unit| unit.state != State::Unchanged) {
            write(&folder.join(&unit.name), &unit.text)?;
        }
    }
    let report = Report { folder, written: args.confirm, units: planned, notes };
    super::super::print_report(&report, args.json, || text(&report, &args.name))?;
    Ok(0)
}

fn units(args: &Args, overrides: &Overrides, notes: &mut Vec<String>) -> Result<Units> {
    let only_config = Overrides { config: overrides.config.clone(), ..Overrides::default() };
    if *overrides != only_config {
        return Err(Error::invalid(
            "the services take their settings from the configuration file, not from flags",
        )
        .with_safe("nothing was written")
        .with_next("Write them into the file, and name it with --config where it is not the default one."));
    }
    // The services do not have this shell's variables.
    let config = match Config::read(overrides, &|_| None) {
        _ if args.generic => None,
        Ok(config) => Some(config),
        Err(error) if overrides.config.is_some() => return Err(error),
        Err(error) => {
            notes.push(format!(
                "the folders that are written to are not known, so only /usr, /boot and /etc are read-only: {error}"
            ));
            None
        }
    };
    let (serve_options, backup_options) = (words(&args.serve_options), words(&args.backup_options));
    for (command, options) in [("serve", &serve_options), ("backup", &backup_options)] {
        let line = ["walship", command].into_iter().chain(options.iter().map(String::as_str));
        super::super::Cli::try_parse_from(line).map_err(|error| {
            let said = error.to_string();
            let line = said.lines().next().unwrap_or_default().trim_start_matches("error: ");
            Error::invalid(format!("--{command}-options: {line}")).with_safe("nothing was written")
        })?;
    }
    for (option, at) in [
        ("--backup-at", &args.backup_at),
        ("--verify-at", &args.verify_at),
        ("--expire-at", &args.expire_at),
        ("--drill-at", &args.drill_at),
    ] {
        check_calendar(option, at)?;
    }
    let programs = match &args.bin_dir {
        Some(folder) => folder.clone(),
        None => {
            let own =
                std::env::current_exe().map_err(|error| Error::from_io("looking for this program", error))?;
            own.parent().unwrap_or(Path::new("/")).to_owned()
        }
    };
    let named = overrides.config.as_ref().filter(|path| path.as_path() != Path::new(DEFAULT_PATH));
    let absolute = |path: &PathBuf| {
        std::path::absolute(path)
            .map_err(|error| Error::from_io(format!("looking for {}", path.display()), error))
    };
    Ok(Units {
        name: args.name.clone(),
        user: args.user.clone(),
        programs,
        config: named.map(absolute).transpose()?,
        own_status_file: config.as_ref().is_some_and(|config| config.receive.status_file.is_some()),
        folders: config.as_ref().map(folders).transpose()?,
        serve_options,
        backup_options,
        verify_options: words(&args.verify_options),
        drill_options: words(&args.drill_options),
        backup_at: args.backup_at.clone(),
        verify_at: args.verify_at.clone(),
        expire_at: args.expire_at.clone(),
        drill_at: args.drill_at.clone(),
    })
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

/// Returns what the configuration says of folders of this machine.
fn folders(config: &Config) -> Result<Folders> {
    let mut folders = Folders::default();
    for repository in &config.repositories {
        if let Location::Folder(path) = repository.location()? {
            folders.repositories.push(path);
        }
    }
    folders.has_state_dir = config.state_dir.is_some();
    folders.others.extend(config.state_dir.clone());
    // Both are made where they are not there: what is written to is the folder around them.
    let around = |path: &PathBuf| path.parent().map(Path::to_owned);
    folders.others.extend(config.receive.spool.as_ref().and_then(around));
    folders.others.extend(config.receive.status_file.as_ref().and_then(around));
    folders.others.sort();
    folders.others.dedup();
    Ok(folders)
}

/// Has systemd read a calendar expression, where it is there.
fn check_calendar(option: &str, at: &str) -> Result<()> {
    let asked = std::process::Command::new("systemd-analyze").args(["calendar", "--", at]).output();
    match asked {
        Ok(output) if !output.status.success() => {
            Err(Error::invalid(format!("{option} {at:?}: systemd does not understand it"))
                .with_safe("nothing was written")
                .with_next("Write it as systemd.time(7) says: '*-*-* 01:30', 'Sat 22:00'. `systemd-analyze calendar` tries it."))
        }
        _ => Ok(()),
    }
}

fn parse_name(text: &str) -> std::result::Result<String, String> {
    let fits = text.starts_with(|c: char| c.is_ascii_lowercase())
        && text.len() <= 63
        && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "_-".contains(c));
    if fits {
        Ok(text.to_owned())
    } else {
        Err("up to 63 of a-z, 0-9, \"_\" and \"-\", a letter first".to_owned())
    }
}

fn parse_user(text: &str) -> std::result::Result<String, String> {
    let fits = text.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
        && text.len() <= 31
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "_-".contains(c));
    if fits { Ok(text.to_owned()) } else { Err("no user's name".to_owned()) }
}

fn marked(text: &str) -> String {
    format!("{MARK}{}\n{text}", blake3::hash(text.as_bytes()).to_hex())
}

fn is_ours(text: &str) -> bool {
    text.strip_prefix(MARK)
        .and_then(|rest| rest.split_once('\n'))
        .is_some_and(|(digest, text)| digest == blake3::hash(text.as_bytes()).to_hex().as_str())
}

fn compare(path: &Path, text: &str) -> Result<State> {
    let failed = |error| Error::from_io(format!("reading {}", path.display()), error);
    // A masked unit is a link to /dev/null: somebody wants it that way.
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(State::New),
        Err(error) => return Err(failed(error)),
        Ok(metadata) if !metadata.is_file() || metadata.len() > UNIT_BYTES_MAX => return Ok(State::Edited),
        Ok(_) => {}
    }
    let there = fs::read(path).map_err(failed)?;
    Ok(match std::str::from_utf8(&there) {
        Ok(there) if there == text => State::Unchanged,
        Ok(there) if is_ours(there) => State::Changed,
        _ => State::Edited,
    })
}

fn write(path: &Path, text: &str) -> Result<()> {
    let temp = TempFile::beside(path)?;
    let mut file = temp.file();
    file.write_all(text.as_bytes())
        .and_then(|()| file.set_permissions(fs::Permissions::from_mode(0o644)))
        .map_err(|error| Error::from_io(format!("writing {}", path.display()), error))?;
    temp.publish()
}

fn text(report: &Report, name: &str) -> String {
    let mut text = String::new();
    for unit in &report.units {
        let state = match (unit.state, report.written) {
            (State::New, false) => "would be written",
            (State::Changed, false) => "would be written anew: the settings have changed",
            (State::New | State::Changed, true) => "written",
            (State::Unchanged, _) => "is there, unchanged",
            (State::Edited, _) => "was edited by somebody else: it would not be written over",
        };
        text += &format!("{}: {state}\n", report.folder.join(&unit.name).display());
        if !report.written && matches!(unit.state, State::New | State::Changed) {
            unit.text.lines().for_each(|line| text += &format!("    {line}\n"));
        }
    }
    for note in &report.notes {
        text += &format!("note: {note}\n");
    }
    if report.written {
        text += &format!(
            "Then, for what is wanted:\n  systemctl daemon-reload\n  systemctl enable --now {name}-receive.service {name}-serve.service\n  \
             systemctl enable --now {name}-backup.timer {name}-verify.timer {name}-expire.timer \
             {name}-drill.timer\n"
        );
    } else {
        text += "Nothing was written: --confirm does that.\n";
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_we_wrote_and_nobody_changed_is_ours() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("u.service");
        let text = marked("[Unit]\n");
        assert_eq!(compare(&path, &text).unwrap(), State::New);
        write(&path, &text).unwrap();
        assert_eq!(compare(&path, &text).unwrap(), State::Unchanged);
        assert_eq!(compare(&path, &marked("[Unit]\nA=b\n")).unwrap(), State::Changed);
        fs::write(&path, text.clone() + "# mine\n").unwrap();
        assert_eq!(compare(&path, &text).unwrap(), State::Edited);
        fs::write(&path, b"\xff").unwrap();
        assert_eq!(compare(&path, &text).unwrap(), State::Edited);
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/dev/null", &path).unwrap();
        assert_eq!(compare(&path, &text).unwrap(), State::Edited);
    }

    #[test]
    fn names_and_users_are_words() {
        assert!(parse_name("shop-2").is_ok() && parse_user("_pg").is_ok());
        for bad in ["", "-x", "a b", "a/b", "a%b", "Ä"] {
            assert!(parse_name(bad).is_err() && parse_user(bad).is_err(), "{bad}");
        }
    }
}
