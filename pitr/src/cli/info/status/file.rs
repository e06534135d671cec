//! A page where it was asked for: whole or not at all.

use std::fs::{self, Permissions};
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use walship::durable::TempFile;
use walship::{Error, Result};

/// Writes the page to a file, or into what is no file (a pipe, `/dev/stdout`).
///
/// A page that is there is read until the new one takes its place; its mode stays. A new one has the mode that a file has
/// which a shell writes.
pub(super) fn write(target: &Path, page: &str) -> Result<()> {
    let told = |error: Error| {
        error
            .with_safe("a page that was there before is unchanged, and so is the repository")
            .with_next("Check the folder: is it there, may this user write to it, has it room? `--html -` prints the page.")
    };
    write_to(target, page).map_err(told)
}

fn write_to(target: &Path, page: &str) -> Result<()> {
    let failed = |doing: &str, error| Error::from_io(format!("{doing} {}", target.display()), error);
    // As with a shell's redirection, a link stays one.
    let place = match fs::canonicalize(target) {
        Ok(place) => place,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => target.to_owned(),
        Err(error) => return Err(failed("looking at", error)),
    };
    let mode = match fs::metadata(&place) {
        Ok(there) if there.is_dir() => {
            return Err(Error::invalid(format!("{} is a folder", target.display())));
        }
        // A device or a pipe must not be replaced by a file.
        Ok(there) if !there.is_file() => {
            let mut file =
                fs::OpenOptions::new().write(true).open(&place).map_err(|error| failed("opening", error))?;
            return file.write_all(page.as_bytes()).map_err(|error| failed("writing", error));
        }
        Ok(there) => there.mode() & 0o777,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => 0o666 & !umask(),
        Err(error) => return Err(failed("looking at", error)),
    };
    let temp = TempFile::beside(&place)?;
    temp.file().write_all(page.as_bytes()).map_err(|error| failed("writing", error))?;
    temp.file()
        .set_permissions(Permissions::from_mode(mode))
        .map_err(|error| failed("setting the mode of", error))?;
    temp.publish()
}

/// Returns what this process takes from the modes of its files. Where that cannot be read: all that others might have.
fn umask() -> u32 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("Umask:"));
    line.and_then(|mask| u32::from_str_radix(mask.trim(), 8).ok()).unwrap_or(0o077)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o777
    }

    #[test]
    fn a_page_takes_the_place_of_another_and_keeps_its_mode() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("page.html");
        write(&path, "one").unwrap();
        assert_eq!(mode(&path), 0o666 & !umask());
        fs::set_permissions(&path, Permissions::from_mode(0o604)).unwrap();
        let link = folder.path().join("link.html");
        symlink(&path, &link).unwrap();
        write(&link, "two").unwrap();
        assert_eq!((fs::read_to_string(&path).unwrap().as_str(), mode(&path)), ("two", 0o604));
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_device_stays_one_and_a_folder_is_refused() {
        write(Path::new("/dev/null"), "page").unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
        let folder = tempfile::tempdir().unwrap();
        for bad in [folder.path().to_owned(), folder.path().join("no/page.html")] {
            let error = write(&bad, "page").unwrap_err();
            assert!(
                error.to_string().contains(bad.to_str().unwrap().trim_end_matches("/page.html")),
                "{error}"
            );
            assert!(error.safe().contains("unchanged") && error.next().contains("--html -"));
        }
        let full = write(Path::new("/dev/full"), "page").unwrap_err();
        assert!(full.to_string().contains("writing /dev/full"), "{full}");
    }
}
