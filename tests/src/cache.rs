//! Where the fetched servers and tools live.

use std::path::PathBuf;

/// Returns the folder that `scripts/install-test-deps` fills.
///
/// # Panics
/// When neither `WALSHIP_CACHE`, `XDG_CACHE_HOME` nor `HOME` is set.
pub fn dir() -> PathBuf {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(dir) = variable("WALSHIP_CACHE") {
        return dir;
    }
    variable("XDG_CACHE_HOME")
        .or_else(|| variable("HOME").map(|home| home.join(".cache")))
        .expect("WALSHIP_CACHE, XDG_CACHE_HOME or HOME must be set")
        .join("walship-test")
}

/// Returns the path of a fetched program, such as `seaweedfs/weed`.
///
/// # Panics
/// When it is not there, saying what installs it.
pub fn program(relative: &str) -> PathBuf {
    let path = dir().join(relative);
    assert!(
        path.is_file(),
        "this test needs {relative}, and {} is not there; run scripts/install-test-deps (./test does)",
        path.display()
    );
    path
}
