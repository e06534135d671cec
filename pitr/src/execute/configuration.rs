//! Reads the configuration files of a restored data directory, as far as they lie in it.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Component, Path, PathBuf};

use walship::{Error, Result};

use crate::inherited::{Inherited, Line};

/// The longest configuration file that is read.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// How many files are read at most.
const FILES_MAX: usize = 100;

/// Returns what `postgresql.conf`, what it includes, and `postgresql.auto.conf` say.
pub(super) fn read(data_dir: &Path) -> Result<Inherited> {
    let mut inherited = Inherited {
        auto_conf: read_bounded(&data_dir.join("postgresql.auto.conf"))?.unwrap_or_default(),
        ..Inherited::default()
    };
    // Relative to the data directory.
    let mut files = vec![PathBuf::from("postgresql.conf")];
    let mut at = 0;
    while at < files.len() {
        let name = files[at].clone();
        at += 1;
        let Some(text) = read_bounded(&data_dir.join(&name))? else {
            if at > 1 {
                inherited.outside.push(name.display().to_string());
            }
            continue;
        };
        for line in inherited.add(&text) {
            let found = match &line {
                Line::Include(path) => inside(&name, path).map(|path| vec![path]),
                Line::IncludeDir(path) => match inside(&name, path) {
                    Some(folder) => files_of(data_dir, &folder)?,
                    None => None,
                },
                Line::Setting { .. } => continue,
            };
            let (Line::Include(shown) | Line::IncludeDir(shown) | Line::Setting { value: shown, .. }) = line;
            match found {
                Some(found) if files.len() + found.len() <= FILES_MAX => files.extend(found),
                _ => inherited.outside.push(shown),
            }
        }
    }
    Ok(inherited)
}

/// Returns where an included path lies below the data directory; `None` when it lies elsewhere.
fn inside(includer: &Path, path: &str) -> Option<PathBuf> {
    let plain = |part: Component<'_>| matches!(part, Component::Normal(_) | Component::CurDir);
    let path = Path::new(path);
    path.components().all(plain).then(|| includer.parent().unwrap_or(Path::new("")).join(path))
}

/// Returns the files that `include_dir` reads, in its order; `None` when there is no such folder.
fn files_of(data_dir: &Path, folder: &Path) -> Result<Option<Vec<PathBuf>>> {
    let path = data_dir.join(folder);
    let failed = |error| Error::from_io(format!("reading {}", path.display()), error);
    if !path.is_dir() {
        return Ok(None);
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(&path).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        if name.to_str().is_some_and(|name| name.ends_with(".conf") && !name.starts_with('.')) {
            names.push(folder.join(name));
        }
    }
    names.sort();
    Ok(Some(names))
}

/// Returns a file's content; `None` when it is not there.
fn read_bounded(path: &Path) -> Result<Option<Vec<u8>>> {
    let failed = |error| Error::from_io(format!("reading {}", path.display()), error);
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(failed)?,
    };
    let mut content = Vec::new();
    io::copy(&mut file.take(FILE_BYTES_MAX), &mut content).map_err(failed)?;
    if content.len() as u64 == FILE_BYTES_MAX {
        return Err(Error::corrupt(format!("{} is longer than any such file", path.display())));
    }
    Ok(Some(content))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn includes_inside_are_followed_and_others_named() {
        let home = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = home.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write(
            "postgresql.conf",
            "include_dir 'conf.d'\ninclude '/etc/x.conf'\ninclude_if_exists '../y'\nport = 1",
        );
        write("conf.d/b.conf", "port = 3\ninclude 'more'");
        write("conf.d/a.conf", "port = 2\ninclude '../z'\ninclude_dir nowhere");
        write("conf.d/.hidden.conf", "port = 4");
        write("conf.d/more", "log_directory = '/var/log'");
        let inherited = read(home.path()).unwrap();
        assert_eq!(inherited.settings["port"], "3");
        assert_eq!(inherited.settings["log_directory"], "/var/log");
        assert_eq!(inherited.outside, ["/etc/x.conf", "../y", "../z", "nowhere"]);
        // A file that includes itself comes to an end.
        write("postgresql.conf", "include 'postgresql.conf'\ninclude 'postgresql.conf'");
        assert!(!read(home.path()).unwrap().outside.is_empty());
    }
}
