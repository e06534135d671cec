//! The tools, each with its configuration and its store.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::Signal;
use tempfile::TempDir;
use walship::storage::list_all;
use walship_tests::postgres::PgServer;
use walship_tests::proxy::{Mode, Proxy};
use walship_tests::s3_inprocess::{ACCESS_KEY, BUCKET, SECRET_KEY};
use walship_tests::weed::WeedServer;
use walship_tests::{bins, cache, process, wait};

use std::time::Duration;

/// A program that archives and restores WAL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tool {
    /// Neither compressed nor durable: what the least call costs.
    Copy,
    /// walship's thin commands and the agent behind them.
    WalshipAgent,
    /// The same without an agent.
    Walship,
    PgBackRest,
    WalRus,
    Barman,
}

/// Where it stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Store {
    Folder,
    /// SeaweedFS over HTTP, each answer so many milliseconds later.
    S3(u64),
    /// The same over HTTPS.
    S3Tls,
}

impl Store {
    pub(super) fn title(self) -> String {
        match self {
            Self::Folder => "folder".to_owned(),
            Self::S3(0) => "S3, http".to_owned(),
            Self::S3(millis) => format!("S3, http, {millis} ms away"),
            Self::S3Tls => "S3, https".to_owned(),
        }
    }
}

impl Tool {
    /// Its name in tables.
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Copy => "`cp`, not compressed, not durable",
            Self::WalshipAgent => "walship, agent",
            Self::Walship => "walship, no agent",
            Self::PgBackRest => "pgBackRest, asynchronous",
            Self::WalRus => "wal-rus, daemon",
            Self::Barman => "barman-cloud",
        }
    }

    /// Its version and the settings that matter; the error says that it is absent, and why.
    pub(super) fn look(self, store: Store) -> Result<String, String> {
        match (self, store) {
            (Self::Copy, Store::Folder) => Ok(String::new()),
            (Self::Copy, _) => Err("absent: it has no S3".to_owned()),
            (Self::Walship | Self::WalshipAgent, _) => Ok("compression lz4".to_owned()),
            (Self::PgBackRest, Store::S3(_)) => Err("absent: it insists on https".to_owned()),
            (Self::PgBackRest, _) => {
                let version = said(&fetched(PGBACKREST)?, &["version"]);
                Ok(format!("{version}; archive-async, process-max {}, compress-type lz4 (level 1)", cores()))
            }
            (Self::WalRus, Store::S3Tls) => Err("absent: it trusts public authorities only".to_owned()),
            (Self::WalRus, _) => {
                let version = said(&fetched(WALRUS)?, &["--version"]);
                Ok(format!("{version}; lz4, upload and download concurrency 4 (its defaults)"))
            }
            (Self::Barman, Store::Folder) => {
                Err("absent: its archive command for a folder needs a Barman server behind ssh".to_owned())
            }
            (Self::Barman, Store::S3Tls) => Err("absent: measured over http".to_owned()),
            (Self::Barman, _) => {
                let version = said(&fetched(BARMAN_ARCHIVE)?, &["--version"]);
                Ok(format!("{version}; --lz4; where many wait, the first 32 of them, once"))
            }
        }
    }
}

pub(super) const PGBACKREST: &str = "pgbackrest/usr/bin/pgbackrest";
pub(super) const WALRUS: &str = "wal-rus/bin/walrus";
const BARMAN_ARCHIVE: &str = "barman/bin/barman-cloud-wal-archive";
const BARMAN_RESTORE: &str = "barman/bin/barman-cloud-wal-restore";

/// Returns a peer's program, or says that it is absent.
pub(super) fn fetched(path: &str) -> Result<PathBuf, String> {
    let program = peer(path);
    if program.is_file() { Ok(program) } else { Err("absent: not fetched".to_owned()) }
}

/// Returns the first line of what a program prints.
pub(super) fn said(program: &Path, arguments: &[&str]) -> String {
    let text = process::run_ok(Command::new(program).args(arguments));
    text.lines().next().unwrap_or_default().trim().to_owned()
}

pub(super) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// A store with nothing in it, and a tool that is ready to archive into it.
pub(super) struct Place {
    tool: Tool,
    store: Store,
    home: TempDir,
    daemon: Option<Child>,
    // The proxy goes before the server behind it.
    proxy: Option<Proxy>,
    weed: Option<WeedServer>,
    authority: PathBuf,
}

impl Place {
    /// Makes the store, and what the tool needs in it for `server`.
    pub(super) fn new(tool: Tool, store: Store, server: &PgServer) -> Self {
        let home = tempfile::Builder::new().prefix("walship-peer").tempdir().expect("a temporary folder");
        let mut authority = PathBuf::new();
        let weed = match store {
            Store::Folder => None,
            Store::S3(_) => Some(WeedServer::start()),
            Store::S3Tls => {
                let [own, certificate, key] = certificates(home.path());
                authority = own;
                Some(WeedServer::start_tls(&certificate, &key, &authority))
            }
        };
        let proxy = match (store, &weed) {
            (Store::S3(millis), Some(weed)) if millis > 0 => {
                let proxy = Proxy::start(weed.address());
                proxy.set(Mode::Latency(Duration::from_millis(millis)));
                Some(proxy)
            }
            _ => None,
        };
        let mut place = Self { tool, store, home, daemon: None, proxy, weed, authority };
        place.prepare(server);
        place
    }

    fn prepare(&mut self, server: &PgServer) {
        fs::create_dir_all(self.path("store")).expect("the scratch folder has room");
        let own = |command: &mut Command| {
            command.env("PGHOST", server.socket_dir()).env("PGPORT", server.port().to_string());
            command.env("PGUSER", "postgres").env("PGDATABASE", "postgres");
            process::run_ok(command);
        };
        match self.tool {
            Tool::Walship | Tool::WalshipAgent => {
                self.write_walship();
                own(Command::new(bins::walship())
                    .arg("init")
                    .env("WALSHIP_CONFIG", self.path("walship.toml")));
            }
            Tool::PgBackRest => {
                self.write_pgbackrest(server.data_dir(), server.socket_dir(), server.port());
                let config = format!("--config={}", self.path("pgbackrest.conf").display());
                own(Command::new(peer(PGBACKREST)).args([&config, "--stanza=main", "stanza-create"]));
            }
            Tool::Copy | Tool::WalRus | Tool::Barman => {}
        }
    }

    /// Makes the tool ready for this data directory, and starts what is to be at work before it is called.
    pub(super) fn serve(&mut self, data: &Path) {
        self.rest();
        if self.tool == Tool::PgBackRest {
            self.write_pgbackrest(data, data, 1);
        }
        if self.tool == Tool::WalRus {
            let socket = self.path("walrus.sock");
            let mut command = process::guarded(peer(WALRUS));
            command.arg("daemon").arg(&socket).env("PGDATA", data).env("WALG_COMPRESSION_METHOD", "lz4");
            command.envs(self.walrus_prefix());
            command.envs(self.environment()).stdin(Stdio::null()).stdout(Stdio::null());
            command.stderr(fs::File::create(self.path("walrus.log")).expect("the scratch folder has room"));
            self.daemon = Some(process::spawn(command).expect("wal-rus can be started"));
            wait::until("wal-rus listens", || socket.exists());
        }
    }

    /// The same for the server itself, which the tool is to back up as well.
    pub(super) fn serve_beside(&mut self, server: &PgServer) {
        self.serve(server.data_dir());
        if self.tool == Tool::PgBackRest {
            self.write_pgbackrest(server.data_dir(), server.socket_dir(), server.port());
        }
    }

    /// Ends what [`Place::serve`] started.
    pub(super) fn rest(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            process::signal(daemon.id(), Signal::SIGTERM);
            process::kill_tree(&mut daemon);
            let _ = fs::remove_file(self.path("walrus.sock"));
        }
    }

    /// The process that was started before the tool is called.
    pub(super) fn daemon(&self) -> Option<u32> {
        self.daemon.as_ref().map(Child::id)
    }

    /// What the server's commands need in their environment.
    pub(super) fn environment(&self) -> Vec<(&'static str, String)> {
        let mut variables = vec![("AWS_S3_FORCE_PATH_STYLE", "true".to_owned())];
        if self.store != Store::Folder && self.tool != Tool::Walship && self.tool != Tool::WalshipAgent {
            variables.extend(walship_tests::s3_inprocess::env_for(&self.endpoint()));
        }
        variables
    }

    /// Where wal-rus stores, for its environment.
    pub(super) fn walrus_prefix(&self) -> [(&'static str, String); 1] {
        [match self.store {
            Store::Folder => ("WALG_FILE_PREFIX", self.path("store").display().to_string()),
            _ => ("WALG_S3_PREFIX", format!("s3://{BUCKET}/walrus")),
        }]
    }

    /// walship's configuration file.
    pub(super) fn walship_config(&self) -> PathBuf {
        self.path("walship.toml")
    }

    /// The `archive_command`.
    pub(super) fn archive_command(&self) -> String {
        match self.tool {
            Tool::Copy => format!("cp %p {}/%f", self.path("store").display()),
            Tool::Walship | Tool::WalshipAgent => {
                format!(
                    "{} --config {} %p",
                    bins::archive_cmd().display(),
                    self.path("walship.toml").display()
                )
            }
            Tool::PgBackRest => self.pgbackrest("archive-push %p"),
            Tool::WalRus => self.walrus("wal-push %f"),
            Tool::Barman => format!(
                "{} {} --lz4 --endpoint-url {} s3://{BUCKET}/barman main %p",
                self.env_words(),
                peer(BARMAN_ARCHIVE).display(),
                self.endpoint()
            ),
        }
    }

    /// The `restore_command`.
    pub(super) fn restore_command(&self) -> String {
        match self.tool {
            Tool::Copy => format!("cp {}/%f %p", self.path("store").display()),
            Tool::Walship | Tool::WalshipAgent => {
                let config = self.path("walship.toml");
                format!("{} --config {} %f %p", bins::restore_cmd().display(), config.display())
            }
            Tool::PgBackRest => self.pgbackrest("archive-get %f %p"),
            Tool::WalRus => self.walrus("wal-fetch %f %p"),
            Tool::Barman => format!(
                "{} {} --endpoint-url {} s3://{BUCKET}/barman main %f %p",
                self.env_words(),
                peer(BARMAN_RESTORE).display(),
                self.endpoint()
            ),
        }
    }

    /// Sets the mode of the proxy before the store.
    pub(super) fn latency(&self, millis: u64) {
        if let Some(proxy) = &self.proxy {
            proxy.set(if millis > 0 { Mode::Latency(Duration::from_millis(millis)) } else { Mode::Pass });
        }
    }

    /// Lets the S3 server send at most this many bytes a second; `None` for as much as it can.
    pub(super) fn limit(&mut self, bytes_a_second: Option<u64>) {
        self.proxy = bytes_a_second.map(|rate| {
            let weed = self.weed.as_ref().expect("a folder is as fast as it is");
            let endpoint = weed.endpoint();
            let address = endpoint.rsplit('/').next().unwrap_or_default();
            let proxy = Proxy::start(address.parse().expect("the server is named by its address"));
            proxy.set(Mode::Rate(rate));
            proxy
        });
        match self.tool {
            Tool::Walship | Tool::WalshipAgent => self.write_walship(),
            // Who restores asks no server.
            Tool::PgBackRest => self.write_pgbackrest(self.home.path(), self.home.path(), 1),
            Tool::Copy | Tool::WalRus | Tool::Barman => {}
        }
    }

    /// Returns how many bytes are stored.
    pub(super) fn stored_bytes(&self) -> u64 {
        let Some(weed) = &self.weed else { return bytes_below(&self.path("store")) };
        let config = weed.config("");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let storage = walship::storage::open(&config).expect("the configuration is right");
        let objects = runtime.block_on(list_all(storage.as_ref(), "", 1_000_000));
        objects.expect("the store answers").iter().map(|object| object.bytes).sum()
    }

    fn env_words(&self) -> String {
        let words = self.environment().into_iter().map(|(name, value)| format!("{name}={value}"));
        format!("env {}", words.collect::<Vec<_>>().join(" "))
    }

    fn pgbackrest(&self, what: &str) -> String {
        let config = self.path("pgbackrest.conf");
        format!("{} --config={} --stanza=main {what}", peer(PGBACKREST).display(), config.display())
    }

    fn walrus(&self, what: &str) -> String {
        let socket = self.path("walrus.sock");
        format!("{} daemon-client --socket {} {what}", peer(WALRUS).display(), socket.display())
    }

    /// The URL of the S3 server.
    pub(super) fn endpoint(&self) -> String {
        match (&self.proxy, &self.weed) {
            (Some(proxy), _) if self.store == Store::S3Tls => format!("https://{}", proxy.address()),
            (Some(proxy), _) => proxy.endpoint(),
            (None, Some(weed)) => weed.endpoint(),
            (None, None) => String::new(),
        }
    }

    /// A file or folder beside the store.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    fn write_walship(&self) {
        let mut text = String::new();
        let url = match self.store {
            Store::Folder => format!("file://{}", self.path("store").display()),
            _ => format!("s3://{BUCKET}/walship"),
        };
        let agent = if self.tool == Tool::WalshipAgent { "auto" } else { "off" };
        let state = self.path("state");
        let _ = write!(
            text,
            "repositories = [{url:?}]\ncluster = \"main\"\nstate_dir = {state:?}\nagent = {agent:?}\n\
             compression = \"lz4\"\n"
        );
        if self.store != Store::Folder {
            let endpoint = self.endpoint();
            let _ = write!(
                text,
                "[s3]\nendpoint = {endpoint:?}\naccess_key_id = {ACCESS_KEY:?}\n\
                 secret_access_key = {SECRET_KEY:?}\nregion = \"us-east-1\"\n"
            );
            if self.store == Store::S3Tls {
                let _ = writeln!(text, "ca_file = {:?}", self.authority);
            }
        }
        let path = self.path("walship.toml");
        fs::write(&path, text).expect("the scratch folder has room");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("the file is ours");
    }

    fn write_pgbackrest(&self, data: &Path, socket_dir: &Path, port: u16) {
        let folder = |name: &str| {
            let path = self.path(name);
            fs::create_dir_all(&path).expect("the scratch folder has room");
            path.display().to_string()
        };
        let mut text = format!(
            "[global]\nlog-level-file=off\nlog-level-console=warn\nlog-path={}\nlock-path={}\nspool-path={}\n\
             archive-async=y\narchive-get-queue-max=256MiB\nprocess-max={}\ncompress-type=lz4\n",
            folder("log"),
            folder("lock"),
            folder("spool"),
            cores()
        );
        if self.store == Store::Folder {
            let _ = writeln!(text, "repo1-path={}", folder("store"));
        } else {
            let endpoint = self.endpoint();
            let port = endpoint.rsplit(':').next().unwrap_or_default();
            let _ = write!(
                text,
                "repo1-type=s3\nrepo1-path=/pgbackrest\nrepo1-s3-bucket={BUCKET}\nrepo1-s3-endpoint=localhost\n\
                 repo1-storage-port={port}\nrepo1-s3-region=us-east-1\nrepo1-s3-uri-style=path\n\
                 repo1-s3-key={ACCESS_KEY}\nrepo1-s3-key-secret={SECRET_KEY}\nrepo1-storage-ca-file={}\n",
                self.authority.display()
            );
        }
        let _ = write!(
            text,
            "[main]\npg1-path={}\npg1-socket-path={}\npg1-port={port}\npg1-user=postgres\n",
            data.display(),
            socket_dir.display()
        );
        fs::write(self.path("pgbackrest.conf"), text).expect("the scratch folder has room");
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.rest();
    }
}

/// Where a peer's program is to be.
pub(super) fn peer(path: &str) -> PathBuf {
    cache::dir().join("peers").join(path)
}

/// Returns the bytes of all files in a folder and below.
pub(super) fn bytes_below(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).expect("the folder is ours").flatten();
    let bytes = entries.map(|entry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => bytes_below(&entry.path()),
        _ => entry.metadata().map_or(0, |metadata| metadata.len()),
    });
    bytes.sum()
}

/// Makes an authority, and a certificate for 127.0.0.1 with its key; by name as well, for who asks for one.
fn certificates(folder: &Path) -> [PathBuf; 3] {
    let openssl = |arguments: &str| {
        process::run_ok(Command::new("openssl").args(arguments.split(' ')).current_dir(folder));
    };
    let ec = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    openssl(&format!("req -x509 -days 2 -subj /CN=ca -keyout ca.key -out ca.pem {ec}"));
    openssl(&format!("req -subj /CN=s3 -keyout s3.key -out s3.csr {ec}"));
    fs::write(folder.join("ext"), "subjectAltName=IP:127.0.0.1,DNS:localhost\n")
        .expect("the scratch folder has room");
    openssl("x509 -req -in s3.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile ext -out s3.pem");
    ["ca.pem", "s3.pem", "s3.key"].map(|name| folder.join(name))
}
