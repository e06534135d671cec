//! Folders of a data directory that another one has as well: the links of a copy lead to the original's tablespaces, and
//! a restore over the copy would write there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use walship::pg::Oid;
use walship::{Error, Result};

use super::unpack::CONTROL_FILE;

/// Fails when folders that a restore over `data_dir` would write to are another data directory's too: one on which a server
/// of this machine runs, or the one in which this one's server was started last, before it was copied.
///
/// Servers of other users cannot be seen by anybody but root, those in other containers by nobody.
///
/// # Errors
/// [`Error::Invalid`].
pub(super) fn check_unshared(data_dir: &Path, tablespaces: &BTreeMap<Oid, PathBuf>) -> Result<()> {
    let mut own = BTreeMap::new();
    for (oid, path) in tablespaces {
        if let Ok(path) = fs::canonicalize(path) {
            own.insert(path, format!("tablespace {oid}"));
        }
    }
    if let Ok(path) = fs::canonicalize(data_dir.join("pg_wal")) {
        own.insert(path, "pg_wal".to_owned());
    }
    for (other, process) in others(data_dir) {
        if is_same(&other, data_dir) || !other.join(CONTROL_FILE).exists() {
            continue;
        }
        let shared = folders(&other).into_iter().find_map(|path| Some((own.get(&path)?, path)));
        let Some((what, path)) = shared else { continue };
        let server =
            process.map(|pid| format!(", on which a server runs (process {pid})")).unwrap_or_default();
        return Err(Error::invalid(format!(
            "{what} of {} lies in {}, which is also that of the data directory {}{server}",
            data_dir.display(),
            path.display(),
            other.display()
        ))
        .with_safe("nothing was written")
        .with_next(
            "The data directory looks like a copy whose links lead to the original's folders. Give it folders of its own \
             (--tablespace-mapping; for pg_wal a folder in the place of the link), restore over the original, or \
             into an empty folder.",
        ));
    }
    Ok(())
}

/// Returns data directories that may have folders in common with this one, with the server's process where one is
/// seen.
fn others(data_dir: &Path) -> BTreeMap<PathBuf, Option<u32>> {
    let mut found: BTreeMap<PathBuf, Option<u32>> =
        started_in(data_dir).into_iter().map(|path| (path, None)).collect();
    // A server works in its data directory.
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = entry.file_name().to_str().and_then(|name| name.parse().ok());
        let Some(pid) = pid else { continue };
        if let Ok(folder) = fs::read_link(entry.path().join("cwd"))
            && folder.join("postmaster.pid").exists()
        {
            let first = found.entry(folder).or_default();
            *first = Some(first.map_or(pid, |first| first.min(pid)));
        }
    }
    found
}

/// Returns the data directories that the server of this one was started with last, by the files that it leaves there.
///
/// Source: `src/backend/postmaster/postmaster.c`, CreateOptsFile; `src/include/utils/pidfile.h`.
fn started_in(data_dir: &Path) -> BTreeSet<PathBuf> {
    let read = |name| fs::read_to_string(data_dir.join(name)).unwrap_or_default();
    let options = read("postmaster.opts");
    // The program, and each argument in quotes.
    let arguments: Vec<&str> = options.split('"').skip(1).step_by(2).collect();
    let named = arguments.iter().enumerate().filter_map(|(number, argument)| match *argument {
        "-D" => arguments.get(number + 1).copied(),
        argument => argument.strip_prefix("-D"),
    });
    let noted = read("postmaster.pid");
    let paths = named.chain(noted.lines().nth(1)).map(PathBuf::from);
    paths.filter(|path| path.is_absolute()).collect()
}

/// Returns the folders outside a data directory that it leads to.
fn folders(data_dir: &Path) -> Vec<PathBuf> {
    let spaces = fs::read_dir(data_dir.join("pg_tblspc")).into_iter().flatten().flatten();
    let paths = spaces.map(|entry| entry.path()).chain([data_dir.join("pg_wal")]);
    paths.filter_map(|path| fs::canonicalize(path).ok()).collect()
}

fn is_same(one: &Path, other: &Path) -> bool {
    let file = |path: &Path| fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
    file(one).is_some_and(|found| file(other) == Some(found))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_copy_that_leads_to_the_originals_folders_is_told_from_the_original() {
        let home = tempfile::tempdir().unwrap();
        let [original, copy, space, wal] =
            ["original", "copy", "space", "wal"].map(|name| home.path().join(name));
        for folder in [&space, &wal] {
            fs::create_dir(folder).unwrap();
        }
        for folder in [&original, &copy] {
            fs::create_dir_all(folder.join("pg_tblspc")).unwrap();
            fs::create_dir(folder.join("global")).unwrap();
            fs::write(folder.join(CONTROL_FILE), b"x").unwrap();
            symlink(&space, folder.join("pg_tblspc/16400")).unwrap();
            let options = format!("/usr/bin/postgres \"-D\" \"{}\" \"-c\" \"port=5\"\n", original.display());
            fs::write(folder.join("postmaster.opts"), options).unwrap();
        }
        let spaces = BTreeMap::from([(16400, space)]);
        check_unshared(&original, &spaces).unwrap();
        let error = check_unshared(&copy, &spaces).unwrap_err().to_string();
        assert!(error.contains("tablespace 16400") && error.contains(original.to_str().unwrap()), "{error}");
        let elsewhere = BTreeMap::from([(16400, home.path().join("new"))]);
        check_unshared(&copy, &elsewhere).unwrap();
        for folder in [&original, &copy] {
            symlink(&wal, folder.join("pg_wal")).unwrap();
        }
        assert!(check_unshared(&copy, &elsewhere).unwrap_err().to_string().contains("pg_wal of"));
        // It was moved, not copied.
        fs::rename(&original, home.path().join("gone")).unwrap();
        check_unshared(&copy, &spaces).unwrap();
        let noted = format!("1\n{}\n0\n", home.path().join("gone").display());
        fs::write(copy.join("postmaster.pid"), noted).unwrap();
        assert!(check_unshared(&copy, &spaces).is_err(), "by postmaster.pid");
    }
}
