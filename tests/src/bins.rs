//! The built programs.
//!
//! Cargo builds a package's own programs before its tests, not those of other packages: `./test`
//! builds them first, and so must whoever runs one test by hand (`cargo build --workspace --bins`).
//! A program that is missing, or older than a source it was built from, fails the test: a pass
//! with yesterday's program would prove nothing.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// The `walship` command.
pub fn walship() -> PathBuf {
    program("walship")
}

/// The `pitr` command.
pub fn pitr() -> PathBuf {
    program("pitr")
}

/// The `archive-cmd` command.
pub fn archive_cmd() -> PathBuf {
    program("archive-cmd")
}

/// The `restore-cmd` command.
pub fn restore_cmd() -> PathBuf {
    program("restore-cmd")
}

/// Returns the folder that holds the programs.
pub fn dir() -> PathBuf {
    if let Some(dir) = std::env::var_os("WALSHIP_BIN_DIR") {
        return PathBuf::from(dir);
    }
    let test = std::env::current_exe().expect("a running test knows its own path");
    // target/debug/deps/e2e-0123456789abcdef -> target/debug
    let deps = test.parent().expect("an executable lies in a folder");
    if deps.ends_with("deps") {
        deps.parent().expect("deps lies in a folder").to_owned()
    } else {
        deps.to_owned()
    }
}

fn program(name: &str) -> PathBuf {
    let path = dir().join(name);
    assert!(
        path.is_file(),
        "{} is not built; run `cargo build --workspace --bins` first (./test does)",
        path.display()
    );
    if let Some(newer) = newer_source(&path) {
        panic!(
            "{} is older than {}; run `cargo build --workspace --bins` first (./test does)",
            path.display(),
            newer.display()
        );
    }
    path
}

/// Returns a source changed after `program` was built, by the list that cargo leaves beside it.
fn newer_source(program: &Path) -> Option<PathBuf> {
    let built = modified(program)?;
    let list = std::fs::read_to_string(program.with_extension("d")).ok()?;
    let (_, sources) = list.split_once(": ")?;
    sources.split_whitespace().map(PathBuf::from).find(|source| modified(source).is_some_and(|at| at > built))
}

fn modified(path: &Path) -> Option<SystemTime> {
    std::fs::metadata(path).ok()?.modified().ok()
}
