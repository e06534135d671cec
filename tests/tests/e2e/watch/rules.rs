//! The shipped alert rules, as Prometheus' own tool sees them.

use std::path::{Path, PathBuf};
use std::process::Command;

use walship_tests::{cache, process};

/// Prometheus' tool.
///
/// # Panics
/// When it is not there: a test without it would prove nothing.
pub(super) fn promtool() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found =
        std::env::split_paths(&path).map(|folder| folder.join("promtool")).find(|path| path.is_file());
    found.unwrap_or_else(|| cache::program("prometheus/promtool"))
}

#[test]
fn the_alerts_fire_when_they_should_and_only_then() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../share/monitoring");
    let run = |folder: &Path, args: &[&str]| {
        let mut command = Command::new(promtool());
        process::run(command.args(args).current_dir(folder), process::RunOptions::default())
    };
    let checked = run(&folder, &["check", "rules", "walship-alerts.yml"]);
    assert!(checked.status.success(), "{checked:?}");
    let tested = run(&folder, &["test", "rules", "walship-alerts-test.yml"]);
    assert!(tested.status.success(), "{tested:?}");

    // The tests are tests: without a rule, or with another limit, they fail.
    let rules = std::fs::read_to_string(folder.join("walship-alerts.yml")).unwrap();
    let tests = std::fs::read_to_string(folder.join("walship-alerts-test.yml")).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    std::fs::write(scratch.path().join("walship-alerts-test.yml"), tests).unwrap();
    for (limit, other) in [
        (">= 0.9", "> 0.9"),
        ("< 0.5 *", "< 0.4 *"),
        ("> 3 *", "> 4 *"),
        ("walship_wal_lost_ends > 0", "walship_wal_lost_ends > 1"),
        ("for: 5m", "for: 0m"),
    ] {
        assert!(rules.contains(limit), "{limit}");
        std::fs::write(scratch.path().join("walship-alerts.yml"), rules.replace(limit, other)).unwrap();
        let tested = run(scratch.path(), &["test", "rules", "walship-alerts-test.yml"]);
        assert!(!tested.status.success(), "{limit} became {other}, and no test noticed");
    }
}
