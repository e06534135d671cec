//! Whether a restore may write where it goes: looked at before anything is changed, so that nothing is left half done over a
//! file of another user.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::unistd::{AccessFlags, access, geteuid};
use walship::pg::Oid;
use walship::{Error, Result};

use super::existing::{OLD_WAL, OWN_FOLDERS, entries};
use super::restore::nearest_existing;
use super::unpack::Destination;

/// So many are named.
const NAMED_MAX: usize = 3;

/// Fails where a folder cannot be made, or is there and is not this user's; `is_moved` says that it is to be made anew.
///
/// # Errors
/// [`Error::Denied`].
pub(super) fn check_place(path: &Path, is_moved: bool) -> Result<()> {
    if !is_moved && path.exists() {
        return refuse_any(if is_own_folder(path) { vec![] } else { vec![path.to_owned()] });
    }
    let above = nearest_existing(path.parent().unwrap_or(Path::new("/")));
    match access(&above, AccessFlags::W_OK | AccessFlags::X_OK) {
        Ok(()) => Ok(()),
        Err(_) => Err(Error::denied(format!(
            "{} cannot be made: {} cannot be written to by {}",
            path.display(),
            above.display(),
            user()
        ))
        .with_safe("nothing was written")
        .with_next("Make it first and give it to the user that runs this, or restore elsewhere.")),
    }
}

/// Fails when what is to be changed in a data directory, or is in the way, is not this user's to change.
///
/// # Errors
/// [`Error::Denied`], which names the first of it; [`Error::LocalIo`].
pub(super) fn check_existing(
    data_dir: &Path,
    tablespaces: &BTreeMap<Oid, PathBuf>,
    destination: &Destination,
) -> Result<()> {
    let mut found = Vec::new();
    for (name, path) in entries(data_dir)? {
        let is_folder = fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_dir());
        let listed = Path::new(&name);
        if is_folder && OWN_FOLDERS.contains(&&*name) {
            look(listed, &path, destination, &mut found)?;
        } else if !is_folder && destination.is_expected(listed) && !is_writable(&path) {
            found.push(path);
        }
    }
    let pg_wal = data_dir.join("pg_wal");
    let inside = entries(&pg_wal)?.into_iter();
    let inside = inside.filter(|(name, _)| !name.starts_with(OLD_WAL)).map(|(_, path)| path);
    // A folder that gets another parent is written to.
    found.extend(std::iter::once(pg_wal).chain(inside).filter(|path| path.is_dir() && !is_own_folder(path)));
    for (oid, place) in tablespaces {
        let listed = Path::new("pg_tblspc").join(oid.to_string());
        for (name, path) in entries(place)? {
            if destination.lists_below(&listed.join(&name)) {
                look(&listed.join(&name), &path, destination, &mut found)?;
            }
        }
    }
    refuse_any(found)
}

/// Adds what cannot be changed in a folder of PostgreSQL's, and itself.
fn look(listed: &Path, path: &Path, destination: &Destination, found: &mut Vec<PathBuf>) -> Result<()> {
    if !is_own_folder(path) {
        found.push(path.to_owned());
        return Ok(());
    }
    for (name, path) in entries(path)? {
        let listed = listed.join(&name);
        let meta = match fs::symlink_metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            meta => meta.map_err(|error| Error::from_io(format!("looking at {}", path.display()), error))?,
        };
        if meta.is_dir() {
            look(&listed, &path, destination, found)?;
        } else if meta.is_file() && destination.is_expected(&listed) && !is_writable(&path) {
            found.push(path);
        }
    }
    Ok(())
}

/// Returns whether a folder may be written to and given another mode, as PostgreSQL wants it.
fn is_own_folder(path: &Path) -> bool {
    let is_owner =
        fs::metadata(path).is_ok_and(|meta| geteuid().is_root() || meta.uid() == geteuid().as_raw());
    is_owner && access(path, AccessFlags::R_OK | AccessFlags::W_OK | AccessFlags::X_OK).is_ok()
}

/// Returns whether a file may be compared and written; a link is removed, whatever it leads to.
fn is_writable(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|meta| meta.is_symlink())
        || access(path, AccessFlags::R_OK | AccessFlags::W_OK).is_ok()
}

fn refuse_any(found: Vec<PathBuf>) -> Result<()> {
    let named: Vec<String> = found.iter().take(NAMED_MAX).map(|path| path.display().to_string()).collect();
    let more = match found.len().saturating_sub(NAMED_MAX) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    match found.is_empty() {
        true => Ok(()),
        false => Err(Error::denied(format!("{} cannot change {}{more}", user(), named.join(", ")))
            .with_safe("nothing was written")
            .with_next(
                "Give the data directory, the folders of its tablespaces and all in them to the user that runs this (chown -R), \
                 or run it as their owner.",
            )),
    }
}

fn user() -> String {
    let user = geteuid();
    let name = nix::unistd::User::from_uid(user).ok().flatten().map(|user| user.name);
    name.unwrap_or_else(|| format!("user {user}"))
}
