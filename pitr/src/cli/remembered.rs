//! What this machine remembers to have seen in repositories, in the configuration's `state_dir`: a copy of a repository
//! that is older brings its own records along, and they know of nothing newer.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use walship::catalog::Seen;
use walship::config::Config;
use walship::durable;
use walship::repository::LineageRepository;
use walship::{Error, Result};

use crate::verify::Report;

/// The longest file that is read.
const BYTES_MAX: u64 = 64 << 20;

/// What was seen of a lineage in each repository, by its location.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Remembered {
    format: u32,
    seen: BTreeMap<String, Seen>,
}

/// Returns what is remembered of a lineage. A file that cannot be read is none; it is told of.
pub(super) fn read(config: &Config, repository: &LineageRepository) -> BTreeMap<String, Seen> {
    let Some(path) = path_of(config, repository) else { return BTreeMap::new() };
    match remembered(&path) {
        Ok(remembered) => remembered.seen,
        Err(error) => {
            repository.note(format!("what this machine has seen before is not known: {error}"));
            BTreeMap::new()
        }
    }
}

fn remembered(path: &Path) -> Result<Remembered> {
    let failed = |error| Error::from_io(format!("reading {}", path.display()), error);
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Remembered::default()),
        Err(error) => return Err(failed(error)),
    };
    let mut bytes = Vec::new();
    file.take(BYTES_MAX).read_to_end(&mut bytes).map_err(failed)?;
    serde_json::from_slice(&bytes).map_err(|error| Error::corrupt(format!("{}: {error}", path.display())))
}

/// Remembers what was seen. That it cannot be is told, and no failure.
pub(super) fn write(config: &Config, repository: &LineageRepository, report: &Report) {
    let Some(path) = path_of(config, repository) else { return };
    let mut all = remembered(&path).unwrap_or_default();
    all.format = 1;
    let seen = report.repositories.iter().filter_map(|one| Some((one.repository.clone(), one.seen.clone()?)));
    all.seen.extend(seen);
    let written =
        serde_json::to_vec(&all).map_err(|error| Error::invalid(error.to_string())).and_then(|bytes| {
            let folder = durable::folder_of(&path);
            fs::create_dir_all(folder)
                .map_err(|error| Error::from_io(format!("creating {}", folder.display()), error))?;
            durable::write(&path, &bytes)
        });
    if let Err(error) = written {
        repository.note(format!("what was seen cannot be remembered on this machine: {error}"));
    }
}

fn path_of(config: &Config, repository: &LineageRepository) -> Option<PathBuf> {
    let name = format!("{}-{}.json", repository.cluster(), repository.lineage().system_identifier);
    Some(config.state_dir.as_ref()?.join("verify").join(name))
}
