//! The Debian package: built by its one command, installed below a folder of its own, used, upgraded, removed, purged.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use walship_tests::bins;
use walship_tests::postgres::{PgServer, primary_major};
use walship_tests::process::{RunOptions, run, run_ok};
use walship_tests::stage::Stage;

use super::files;

/// A Debian system below a folder. The machine's own is not touched: the packages' scripts run as they are, and know
/// by `DPKG_ROOT` where they are.
struct Root(tempfile::TempDir);

impl Root {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        for folder in ["info", "updates", "triggers"] {
            fs::create_dir_all(root.path().join("var/lib/dpkg").join(folder)).unwrap();
        }
        fs::write(root.path().join("var/lib/dpkg/status"), "").unwrap();
        // PostgreSQL's user runs what is in it.
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755)).unwrap();
        Self(root)
    }

    fn at(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    fn dpkg(&self, words: &[&str]) -> String {
        let mut dpkg = Command::new("dpkg");
        dpkg.env("LC_ALL", "C").arg(format!("--root={}", self.0.path().display())).args([
            "--force-script-chrootless",
            "--force-not-root",
            "--force-depends",
            "--force-confold",
            "--log=/dev/null",
        ]);
        let output = run(dpkg.args(words), RunOptions::default());
        assert!(output.status.success(), "dpkg {words:?}: {output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
    }
}

fn build(out: &Path, revision: &str) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/build-deb");
    let mut command = Command::new(script);
    command.env_remove("WALSHIP_CONFIG").arg("--programs").arg(bins::dir()).arg("--out").arg(out);
    run_ok(command.args(["--revision", revision])).trim().to_owned()
}

/// The main job by nothing but what the package has put there.
fn archives_and_restores(root: &Root) {
    let stage = Stage::folder("main");
    let program = |name: &str| root.at("usr/bin").join(name);
    let server = stage
        .archiving(PgServer::builder(primary_major()))
        .setting("archive_command", format!("'{}' %p", program("archive-cmd").display()))
        .start();
    for words in ["init", "backup"] {
        let mut command = stage.command(&program("walship"));
        command.env("PGHOST", server.socket_dir()).env("PGPORT", server.port().to_string());
        stage.ok(command.env("PGUSER", "postgres").env("PGDATABASE", "postgres").arg(words));
    }
    server.psql("CREATE TABLE t AS SELECT 7 AS n");
    let before = server.psql("SELECT pg_current_wal_lsn()");
    server.psql("DROP TABLE t");
    server.archive_now();
    let data = stage.path().join("restored");
    let mut restore = stage.command(&program("pitr"));
    stage.ok(restore.args(["restore", "--to-lsn", &before, "--exclusive", "-D"]).arg(&data));
    let settings = fs::read_to_string(data.join("postgresql.auto.conf")).unwrap();
    assert!(settings.contains(program("restore-cmd").to_str().unwrap()), "{settings}");
    let restored = stage.recovering(&data).start();
    restored.wait_for("SELECT pg_is_in_recovery()", "f");
    assert_eq!(restored.psql("SELECT n FROM t"), "7");
}

#[test]
fn the_package_installs_works_upgrades_and_goes() {
    // The programs in it are these.
    for program in [bins::walship(), bins::pitr(), bins::archive_cmd(), bins::restore_cmd()] {
        assert!(program.is_file());
    }
    let out = tempfile::tempdir().unwrap();
    let first = build(out.path(), "1");
    let listed = run_ok(Command::new("dpkg-deb").args(["--contents", &first]));
    for line in listed.lines() {
        assert!(line.contains(" root/root "), "{line}");
    }
    let fields = run_ok(Command::new("dpkg-deb").args(["--field", &first]));
    assert!(fields.contains("\nDepends: libc6 (>= 2."), "{fields}");

    let root = Root::new();
    root.dpkg(&["--install", &first]);
    assert!(root.dpkg(&["--status", "walship"]).contains("Status: install ok installed"));
    for program in ["walship", "pitr", "archive-cmd", "restore-cmd"] {
        let version = run_ok(Command::new(root.at("usr/bin").join(program)).arg("--version"));
        assert_eq!(version, format!("{program} {}\n", env!("CARGO_PKG_VERSION")));
        let page = root.at("usr/share/man/man1").join(format!("{program}.1.gz"));
        let shown = run_ok(Command::new("man").env("LC_ALL", "C.UTF-8").arg("--local-file").arg(page));
        assert!(shown.contains(&format!("{program} - ")), "{shown}");
    }
    archives_and_restores(&root);
    // dpkg's own view of what lies there: nothing is missing or changed.
    assert_eq!(root.dpkg(&["--verify", "walship"]), "");

    // The units are the package's; what setup writes takes their place, and says so.
    let units = root.at("usr/lib/systemd/system");
    assert_eq!(files(&units).len(), 10);
    let receive = fs::read_to_string(units.join("walship-receive.service")).unwrap();
    assert!(
        receive.contains("\nExecStart=/usr/bin/walship receive ") && receive.contains("\nUser=postgres\n")
    );
    let mut setup = Command::new(root.at("usr/bin/walship"));
    setup.env_remove("WALSHIP_CONFIG").args(["setup", "systemd", "--generic", "--root"]).arg(root.0.path());
    let said = run_ok(&mut setup);
    assert!(said.contains("the package's units are in"), "{said}");

    // The example is read, and says what is missing in it.
    let config = root.at("etc/walship/walship.toml");
    let mut info = Command::new(root.at("usr/bin/pitr"));
    let output = run(info.env_clear().args(["info", "--config"]).arg(&config), RunOptions::default());
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("no repository is configured"), "{output:?}");
    // With its lines taken in, it is a configuration.
    let example = fs::read_to_string(&config).unwrap();
    let full: String = example
        .lines()
        .map(|line| match line.strip_prefix('#') {
            Some(key) if !key.starts_with(' ') && !key.contains("s3://") && !key.is_empty() => {
                format!("{key}\n")
            }
            _ => format!("{line}\n"),
        })
        .collect();
    let tried = out.path().join("tried.toml");
    fs::write(&tried, full).unwrap();
    let mut setup = Command::new(root.at("usr/bin/walship"));
    setup.args(["setup", "systemd", "--root"]).arg(out.path()).arg("--config").arg(&tried);
    assert!(run_ok(&mut setup).contains("ReadWritePaths=/srv/walship"));

    // An upgrade keeps what the administrator wrote; so does a removal.
    fs::write(&config, "cluster = 'mine'\n").unwrap();
    fs::create_dir_all(root.at("var/lib/walship/spool")).unwrap();
    root.dpkg(&["--install", &build(out.path(), "2")]);
    assert!(
        root.dpkg(&["--status", "walship"]).contains(&format!("Version: {}-2", env!("CARGO_PKG_VERSION")))
    );
    assert_eq!(fs::read_to_string(&config).unwrap(), "cluster = 'mine'\n");
    root.dpkg(&["--remove", "walship"]);
    assert!(!root.at("usr/bin/walship").exists() && !units.join("walship-receive.service").exists());
    assert_eq!(fs::read_to_string(&config).unwrap(), "cluster = 'mine'\n");
    let said = root.dpkg(&["--purge", "walship"]);
    assert!(!config.exists(), "{said}");
    // A spool may hold the only copy of WAL that was acknowledged.
    assert!(root.at("var/lib/walship/spool").is_dir() && said.contains("/var/lib/walship stays"), "{said}");
}
