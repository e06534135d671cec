//! The tools as takers of base backups, and as those who restore them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use walship_tests::postgres::{PgServer, primary_major};
use walship_tests::s3_inprocess::BUCKET;
use walship_tests::{bins, process};

use super::tools::{PGBACKREST, Place, Store, Tool, WALRUS, bytes_below, cores, fetched, peer, said};
use super::{Run, cost};

/// A tool and the way in which it takes a base backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Taker {
    WalshipLocal,
    WalshipStream,
    PgBackRest,
    /// With small files put together, which is not its default.
    PgBackRestBundled,
    PgBasebackup,
    WalRusLocal,
    WalRusStream,
    Barman,
}

const BARMAN_BACKUP: &str = "barman/bin/barman-cloud-backup";
const BARMAN_RESTORE: &str = "barman/bin/barman-cloud-restore";

/// The name of Barman's backup.
const NAME: &str = "bench";

/// What kind of backup is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Full,
    Incremental,
}

impl Taker {
    /// Its name as a taker of backups.
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::WalshipLocal => "`walship backup --source local`",
            Self::WalshipStream => "`walship backup`",
            Self::PgBackRest => "`pgbackrest backup`",
            Self::PgBackRestBundled => "`pgbackrest --repo1-bundle backup`",
            Self::PgBasebackup => "`pg_basebackup -F tar -Z client-zstd:1`",
            Self::WalRusLocal => "`walrus backup-push PGDATA`",
            Self::WalRusStream => "`walrus backup-push`",
            Self::Barman => "`barman-cloud-backup`",
        }
    }

    /// Its name as the one who restores.
    pub(super) fn restorer(self) -> &'static str {
        match self {
            Self::WalshipLocal | Self::WalshipStream => "`pitr restore --latest`",
            Self::PgBackRest => "`pgbackrest restore`",
            Self::PgBackRestBundled => "`pgbackrest restore`, bundled",
            Self::PgBasebackup => "`zstd -d < base.tar.zst \\| tar -x && sync -f`",
            Self::WalRusLocal | Self::WalRusStream => "`walrus backup-fetch && sync -f`",
            Self::Barman => "`barman-cloud-restore && sync -f`",
        }
    }

    /// What makes and holds its store.
    pub(super) fn tool(self) -> Tool {
        match self {
            Self::WalshipLocal | Self::WalshipStream => Tool::Walship,
            Self::PgBackRest | Self::PgBackRestBundled => Tool::PgBackRest,
            Self::PgBasebackup => Tool::Copy,
            Self::WalRusLocal | Self::WalRusStream => Tool::WalRus,
            Self::Barman => Tool::Barman,
        }
    }

    /// Its version and the settings that matter; the error says that it is absent, and why.
    pub(super) fn look(self, store: Store) -> Result<String, String> {
        match self {
            Self::WalshipLocal => Ok(format!("zstd 1, {} workers", cores())),
            Self::WalshipStream => Ok("zstd 1".to_owned()),
            Self::PgBackRest | Self::PgBackRestBundled => {
                self.tool().look(store)?;
                let version = said(&peer(PGBACKREST), &["version"]);
                let help = process::run_ok(Command::new(peer(PGBACKREST)).args(["help", "backup"]));
                if self == Self::PgBackRestBundled && !help.contains("--repo-bundle") {
                    return Err("absent: this version does not bundle".to_owned());
                }
                Ok(format!("{version}; zst 1, process-max {}", cores()))
            }
            Self::PgBasebackup if store != Store::Folder => Err("absent: it has no S3".to_owned()),
            Self::PgBasebackup if primary_major() < 15 => {
                Err("absent: it has zstd from PostgreSQL 15 on".to_owned())
            }
            Self::PgBasebackup => Ok(format!("{}; -X fetch", primary_major())),
            Self::WalRusLocal | Self::WalRusStream => {
                self.tool().look(store)?;
                Ok(format!("{}; zstd 1, concurrency as it comes", said(&peer(WALRUS), &["--version"])))
            }
            Self::Barman if store == Store::Folder => Err("absent: it has S3 only".to_owned()),
            Self::Barman => {
                self.tool().look(store)?;
                let version = said(&fetched(BARMAN_BACKUP)?, &["--version"]);
                Ok(format!("{version}; lz4 (it has no zstd here), {} jobs", cores()))
            }
        }
    }

    /// The `archive_command` while it takes a backup: nothing that works on after the backup has ended.
    pub(super) fn archive_command(self, place: &Place) -> String {
        let command = place.archive_command();
        match self.tool() {
            Tool::PgBackRest => format!("{command} --no-archive-async"),
            _ => command,
        }
    }

    /// Takes a backup, and returns what that cost the tool.
    pub(super) fn take(self, kind: Kind, place: &Place, server: &PgServer) -> Run {
        let mut command = match self {
            Self::WalshipLocal | Self::WalshipStream => {
                let mut command = process::guarded(bins::walship());
                command.arg("backup").arg("--config").arg(place.walship_config());
                if self == Self::WalshipLocal {
                    command.args(["--source", "local"]);
                }
                if kind == Kind::Incremental {
                    command.arg("--incremental");
                }
                command
            }
            Self::PgBackRest | Self::PgBackRestBundled => {
                let mut command = pgbackrest(place);
                command.arg(if kind == Kind::Full { "--type=full" } else { "--type=incr" });
                command.args(["--start-fast", "--compress-type=zst", "--compress-level=1"]);
                if self == Self::PgBackRestBundled {
                    command.arg("--repo1-bundle");
                }
                command.arg("backup");
                command
            }
            Self::PgBasebackup => {
                let mut command = process::guarded(server.tool("pg_basebackup").get_program());
                command.args(["-c", "fast", "-F", "tar", "-Z", "client-zstd:1", "-X", "fetch", "-D"]);
                command.arg(place.path("backup"));
                command
            }
            Self::WalRusLocal | Self::WalRusStream => {
                let mut command = walrus(place);
                command.args(["backup-push", "--fast", "--full"]);
                if self == Self::WalRusLocal {
                    command.arg(server.data_dir());
                }
                command
            }
            Self::Barman => {
                let mut command = process::guarded(peer(BARMAN_BACKUP));
                command.args([
                    "--endpoint-url",
                    &place.endpoint(),
                    "--lz4",
                    "--immediate-checkpoint",
                    "-n",
                    NAME,
                ]);
                command.args(["-J", &cores().to_string(), "-U", "postgres", "-d", "postgres", "-h"]);
                command.arg(server.socket_dir()).args(["-p", &server.port().to_string()]);
                command.args([&format!("s3://{BUCKET}/barman"), "main"]);
                command
            }
        };
        command.env("PGHOST", server.socket_dir()).env("PGPORT", server.port().to_string());
        command.env("PGUSER", "postgres").env("PGDATABASE", "postgres");
        run(command, place)
    }

    /// Returns the size of what a backup has left in the store.
    pub(super) fn stored_bytes(self, place: &Place) -> u64 {
        match self {
            Self::PgBasebackup => {
                let folder = place.path("backup");
                if folder.exists() { bytes_below(&folder) } else { 0 }
            }
            _ => place.stored_bytes(),
        }
    }

    /// Whether it can restore over a data directory.
    pub(super) fn has_delta(self) -> bool {
        matches!(self.tool(), Tool::Walship | Tool::PgBackRest)
    }

    /// Restores what was taken to `data`: a new folder, or with `delta` one that is there. Afterwards all of it
    /// is synced, which those that do not do it themselves leave to `sync -f`.
    pub(super) fn restore(self, place: &Place, data: &Path, delta: bool) -> Run {
        let command = match self {
            Self::WalshipLocal | Self::WalshipStream => {
                let mut command = process::guarded(bins::pitr());
                command.args(["restore", "--latest", "--config"]).arg(place.walship_config());
                if delta {
                    command.args(["--delta", "--yes"]);
                }
                command.arg("-D").arg(data);
                command
            }
            Self::PgBackRest | Self::PgBackRestBundled => {
                fs::create_dir_all(data).expect("the scratch folder has room");
                let mut command = pgbackrest(place);
                command.arg(format!("--pg1-path={}", data.display()));
                if delta {
                    command.arg("--delta");
                }
                command.arg("restore");
                command
            }
            Self::PgBasebackup => {
                let text = "mkdir -m 700 \"$1\" && zstd -q -d < \"$0/base.tar.zst\" | tar -x -C \"$1\" && sync -f \"$1\"";
                let mut command = process::guarded("sh");
                command.args(["-c", text]).arg(place.path("backup")).arg(data);
                command
            }
            Self::WalRusLocal | Self::WalRusStream => {
                let mut command = walrus(place);
                command.arg("backup-fetch").arg(data).arg("LATEST");
                then_sync(&command, data)
            }
            Self::Barman => {
                let mut command = process::guarded(peer(BARMAN_RESTORE));
                command.args(["--endpoint-url", &place.endpoint()]);
                command.args([&format!("s3://{BUCKET}/barman"), "main", NAME]).arg(data);
                then_sync(&command, data)
            }
        };
        run(command, place)
    }
}

fn pgbackrest(place: &Place) -> Command {
    let mut command = process::guarded(peer(PGBACKREST));
    command.arg(format!("--config={}", place.path("pgbackrest.conf").display())).arg("--stanza=main");
    command
}

fn walrus(place: &Place) -> Command {
    let mut command = process::guarded(peer(WALRUS));
    command.envs([("WALG_COMPRESSION_METHOD", "zstd"), ("WALG_COMPRESSION_LEVEL", "1")]);
    command.envs(place.walrus_prefix());
    command
}

fn then_sync(command: &Command, data: &Path) -> Command {
    let mut both = Command::new("sh");
    both.args(["-c", "\"$@\" && sync -f \"$0\""])
        .arg(data)
        .arg(command.get_program())
        .args(command.get_args());
    both.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    both
}

fn run(mut command: Command, place: &Place) -> Run {
    let log: PathBuf = place.path("log.txt");
    let file = fs::File::create(&log).expect("the scratch folder has room");
    command.envs(place.environment()).stdin(std::process::Stdio::null());
    command.stdout(file.try_clone().expect("a file can be shared")).stderr(file);
    let shown = format!("{command:?}");
    let (run, success) = cost::run(command);
    assert!(success, "{shown} failed:\n{}", fs::read_to_string(&log).unwrap_or_default());
    run
}
