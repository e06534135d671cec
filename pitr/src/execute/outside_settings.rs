//! The settings files that a server had outside its data directory: said, and written where asked.

use std::fs::DirBuilder;
use std::io::Write as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Component, Path, PathBuf};

use walship::{Error, Result};

use super::restore::{RestoreOptions, check_empty, make_private, sync_file_system};
use super::unpack::create;
use crate::plan::RestorePlan;

/// Returns what to know about the settings files beside the backup.
///
/// # Errors
/// [`Error::Invalid`] for a folder that is not empty, or when the backup has no such files.
pub(super) fn check(plan: &RestorePlan, options: &RestoreOptions) -> Result<Option<String>> {
    let files = &plan.backup.settings_files;
    let paths: Vec<String> = files.iter().map(|file| format!("{:?}", file.path)).collect();
    let paths = paths.join(", ");
    match &options.settings_dir {
        Some(_) if files.is_empty() => {
            Err(Error::invalid("the backup has no settings files from outside the data directory")
                .with_safe("nothing was written")
                .with_next("Leave out --settings-dir."))
        }
        Some(folder) => {
            check_empty(folder)?;
            Ok(Some(format!(
                "the settings files {paths} go to {}: look them over before PostgreSQL uses them",
                folder.display()
            )))
        }
        None if files.is_empty() => Ok(None),
        None => Ok(Some(format!(
            "its server kept {paths} outside the data directory: a restore with --settings-dir DIR writes them"
        ))),
    }
}

/// Writes the files below `folder`, each under the path it had.
///
/// # Durability
/// After `Ok` the files survive a crash.
pub(super) fn write(folder: &Path, files: &[(String, Vec<u8>)]) -> Result<()> {
    make_private(folder)?;
    for (path, content) in files {
        let place = folder.join(below_root(path)?);
        let failed = |error| Error::from_io(format!("writing {}", place.display()), error);
        if let Some(parent) = place.parent() {
            DirBuilder::new().recursive(true).mode(0o700).create(parent).map_err(failed)?;
        }
        create(&place, 0o600)?.write_all(content).map_err(failed)?;
    }
    // Files and the folders that lead to them; it need not be the data directory's file system.
    sync_file_system(folder)
}

/// Returns an absolute path without its root; one that would leave the folder is refused.
fn below_root(path: &str) -> Result<PathBuf> {
    let mut components = Path::new(path).components();
    let rooted = components.next() == Some(Component::RootDir);
    let rest = components.as_path();
    let plain = rest.components().all(|component| matches!(component, Component::Normal(_)));
    if rooted && plain && !rest.as_os_str().is_empty() && !path.contains('\0') {
        return Ok(rest.to_owned());
    }
    Err(Error::corrupt(format!("the backup names a settings file {path:?}"))
        .with_next("Restore without --settings-dir."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_never_leads_out_of_the_folder() {
        assert_eq!(
            below_root("/etc/postgresql/pg_hba.conf").unwrap(),
            Path::new("etc/postgresql/pg_hba.conf")
        );
        for hostile in ["", "/", "etc/x", "/etc/../../x", "/..", "../x", "/a\0b"] {
            assert!(below_root(hostile).is_err(), "{hostile:?}");
        }
    }
}
