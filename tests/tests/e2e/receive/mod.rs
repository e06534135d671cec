//! `walship receive` on real servers.

mod bad_input;
mod clients;
mod clock;
mod failover;
mod kills;
mod life;
mod lost;
mod oracle;
mod promises;
mod rpo;
mod spool;
mod supervised;
mod tail;
mod together;

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::Arc;

use nix::sys::signal::Signal;
use tempfile::TempDir;
use walship::pg::{Lsn, SegmentName, WalFileName};
use walship::repository::{ClusterRepository, LineageRepository};
use walship::storage::fs::FsStorage;
use walship_tests::postgres::{PgServer, PgServerBuilder};
use walship_tests::proxy::Proxy;
use walship_tests::stage::Stage;
use walship_tests::{process, wait};

/// What the server's word rests on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flush {
    /// Nothing: parts follow after a quarter of a second.
    Async,
    /// Every repository.
    Repository,
    /// The receiver's spool; the repositories get the open segment when it is asked for.
    Local,
}

impl Flush {
    /// Starts a receiver of this kind, with these arguments besides.
    pub(crate) fn receive(self, stage: &Stage, conninfo: &str) -> Receiving {
        let spool = Self::spool(stage);
        let args: &[&str] = match self {
            Self::Async => &[],
            Self::Repository => &["--flush", "repository"],
            Self::Local => {
                &["--flush", "local", "--spool", spool.to_str().unwrap(), "--tail-interval", "60000"]
            }
        };
        Receiving::start(stage, conninfo, args)
    }

    /// Where the spool is.
    pub(crate) fn spool(stage: &Stage) -> PathBuf {
        stage.path().join("spool")
    }

    /// Brings what only the spool has into the repositories; returns how many segments and parts that was.
    pub(crate) fn rescue(self, stage: &Stage) -> u64 {
        if self != Self::Local {
            return 0;
        }
        let spool = Self::spool(stage);
        let args = ["receive", "--drain", "--json", "--spool", spool.to_str().unwrap()];
        let report: serde_json::Value = serde_json::from_str(&stage.ok(&mut stage.walship(&args))).unwrap();
        assert_eq!(report["left_bytes"], 0, "{report}");
        report["segments"].as_u64().unwrap() + report["parts"].as_u64().unwrap()
    }
}

/// A running `walship receive`; dropping it kills it.
pub(crate) struct Receiving {
    child: Child,
    folder: TempDir,
}

impl Receiving {
    /// Starts it with these arguments behind `receive`.
    pub(crate) fn start(stage: &Stage, conninfo: &str, args: &[&str]) -> Self {
        Self::start_in(stage, conninfo, args, &[])
    }

    /// The same with these variables in its environment.
    pub(crate) fn start_in(stage: &Stage, conninfo: &str, args: &[&str], variables: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let errors = fs::File::create(folder.path().join("stderr")).unwrap();
        let inner = stage.walship(&[]);
        let mut command = process::guarded(inner.get_program());
        for (name, value) in inner.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command.envs(variables.iter().copied());
        command.args(["receive", conninfo, "--report-interval", "1", "--status-file"]);
        command.arg(folder.path().join("status.json")).args(args);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors);
        Self { child: process::spawn(command).unwrap(), folder }
    }

    /// What it has said on standard error.
    pub(crate) fn said(&self) -> String {
        fs::read_to_string(self.folder.path().join("stderr")).unwrap()
    }

    /// Where the status file is.
    pub(crate) fn status_file(&self) -> PathBuf {
        self.folder.path().join("status.json")
    }

    /// The status file, when there is one.
    pub(crate) fn status(&self) -> Option<serde_json::Value> {
        let text = fs::read(self.folder.path().join("status.json")).ok()?;
        Some(serde_json::from_slice(&text).expect("the status file is whole at any time"))
    }

    /// A position in the status file.
    pub(crate) fn position(&self, name: &str) -> Lsn {
        let status = self.status();
        let text = status.as_ref().and_then(|status| status[name].as_str());
        text.map_or(Lsn::INVALID, |text| text.parse().unwrap())
    }

    /// Waits until the status file names this durable position, or a later one.
    pub(crate) fn wait_durable(&mut self, lsn: Lsn) {
        let said = wait::some(&format!("{lsn} is durable"), || {
            let ended = self.child.try_wait().unwrap();
            (self.position("durable_lsn") >= lsn || ended.is_some()).then_some(ended)
        });
        assert!(said.is_none(), "it ended: {said:?}\n{}", self.said());
    }

    /// Ends it as a supervisor does.
    pub(crate) fn terminate(&mut self) -> ExitStatus {
        process::signal(self.child.id(), Signal::SIGTERM);
        self.wait()
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        process::wait_within(&mut self.child, wait::PATIENCE)
            .unwrap_or_else(|| panic!("it does not end; it said:\n{}", self.said()))
    }

    pub(crate) fn kill9(&mut self) {
        process::kill_tree(&mut self.child);
    }
}

impl Drop for Receiving {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            process::kill_tree(&mut self.child);
        }
        if std::thread::panicking() {
            eprintln!("--- walship receive said:\n{}", self.said());
        }
    }
}

/// One address for servers that change their port with each start.
pub(crate) struct Front(Proxy);

impl Front {
    pub(crate) fn of(server: &PgServer) -> Self {
        Self(Proxy::start(address(server)))
    }

    pub(crate) fn turn_to(&self, server: &PgServer) {
        self.0.set_target(address(server));
    }

    pub(crate) fn port(&self) -> u16 {
        self.0.address().port()
    }

    pub(crate) fn conninfo(&self) -> String {
        format!("host=127.0.0.1 port={} user=postgres sslmode=disable", self.port())
    }
}

fn address(server: &PgServer) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], server.port()))
}

/// A server that archives nothing by itself.
pub(crate) fn server(major: u32, segment_size_mb: u32) -> PgServerBuilder {
    PgServer::builder(major)
        .wal_segment_size_mb(segment_size_mb)
        .setting("archive_mode", "off")
        .setting("max_slot_wal_keep_size", "4GB")
        .setting("min_wal_size", format!("{}MB", 2 * segment_size_mb))
        .setting("max_wal_size", format!("{}MB", 8 * segment_size_mb.max(8)))
}

/// The repository of a stage on a folder, read by the library.
pub(crate) struct Reading {
    runtime: tokio::runtime::Runtime,
    lineage: LineageRepository,
}

impl Reading {
    pub(crate) fn of(stage: &Stage) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let lineage = runtime.block_on(async {
            let storage = Arc::new(FsStorage::open(&stage.repository_dir()).unwrap());
            let cluster = ClusterRepository::open(storage, &stage.cluster().parse().unwrap()).await.unwrap();
            cluster.newest_lineage().await.unwrap()
        });
        Self { runtime, lineage }
    }

    pub(crate) fn file(&self, name: WalFileName) -> Option<Vec<u8>> {
        self.runtime.block_on(self.lineage.wal_file_bytes(name)).unwrap()
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        let name: SegmentName = name.parse().unwrap();
        self.runtime.block_on(self.lineage.segment_summary(name)).unwrap().is_some()
    }
}

/// The folder's file names, sorted.
pub(crate) fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// A standby of `server` in a folder of its own, not started yet.
pub(crate) fn standby_of(server: &PgServer) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let output =
        server.run_tool("pg_basebackup", &["-D", data.to_str().unwrap(), "-R", "-c", "fast", "-X", "stream"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    (folder, data)
}
