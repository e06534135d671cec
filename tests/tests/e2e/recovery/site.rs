//! A repository that breaks and mends on demand, and data directories that recover from it.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use bytes::Bytes;
use tempfile::TempDir;
use walship::repository::Repository;
use walship::storage::{ObjectKey, Storage, StorageConfig};
use walship_tests::postgres::{PgServer, PgServerBuilder};
use walship_tests::process::copy_tree;
use walship_tests::s3_inprocess::{BUCKET, S3Server, config_for, env_for};
use walship_tests::weed::WeedServer;
use walship_tests::{bins, process};

pub(super) const CLUSTER: &str = "main";

/// How the programs' errors are told from PostgreSQL's in its log: the first line of each report.
pub(super) const REPORT: &str = "error: ";

/// Which store holds the repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Folder,
    /// The S3 server in the test process.
    S3,
    /// SeaweedFS.
    Weed,
}

/// What is wrong with the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// S3: connections are refused. Folder: the root is gone.
    Dead,
    /// The folder is an empty mount point.
    Unmounted,
    /// S3: 403. Folder: no permissions.
    Forbidden,
    /// The bucket is not there.
    NoBucket,
    /// One segment is not there, later ones are.
    Hole,
}

/// The repository of one case.
pub(super) struct Site {
    kind: Kind,
    home: TempDir,
    pub(super) s3: Option<Arc<S3Server>>,
    weed: Option<Arc<WeedServer>>,
}

impl Site {
    /// A copy of the folder repository `origin` in a store of this kind.
    pub(super) fn new(kind: Kind, origin: &Path) -> Self {
        let home = tempfile::Builder::new().prefix("walship-site").tempdir().unwrap();
        let s3 = (kind == Kind::S3).then(|| Arc::new(S3Server::start()));
        let site = Self { kind, home, s3, weed: (kind == Kind::Weed).then(weed) };
        match kind {
            Kind::Folder => copy_tree(origin, &site.root()),
            Kind::S3 | Kind::Weed => site.put_all(&objects_of_folder(origin)),
        }
        site
    }

    pub(super) fn home(&self) -> &Path {
        self.home.path()
    }

    fn root(&self) -> PathBuf {
        self.home().join("repo")
    }

    /// The prefix in the bucket: the scratch folder's name, which is used by nobody else.
    fn prefix(&self) -> String {
        self.home().file_name().unwrap().to_str().unwrap().trim_start_matches('.').to_owned()
    }

    fn url(&self) -> String {
        match self.kind {
            Kind::Folder => format!("file://{}", self.root().display()),
            Kind::S3 | Kind::Weed => format!("s3://{BUCKET}/{}", self.prefix()),
        }
    }

    fn endpoint(&self) -> Option<String> {
        match self.kind {
            Kind::Folder => None,
            Kind::S3 => self.s3.as_ref().map(|server| server.endpoint()),
            Kind::Weed => self.weed.as_ref().map(|server| server.endpoint()),
        }
    }

    fn storage(&self) -> Arc<dyn Storage> {
        let config = match self.endpoint() {
            Some(endpoint) => config_for(&endpoint, &self.prefix()),
            None => StorageConfig::new(self.url()),
        };
        walship::storage::open(&config).unwrap()
    }

    /// What the programs need to find the repository. Deadlines are short: the tests wait for them.
    pub(super) fn env(&self) -> Vec<(String, String)> {
        let mut env: Vec<(String, String)> = [
            ("WALSHIP_CLUSTER", CLUSTER),
            ("WALSHIP_CONFIG", ""),
            ("WALSHIP_DEADLINE_MS", "1500"),
            ("WALSHIP_CONNECT_MS", "1000"),
            ("WALSHIP_RESTORE_RETRY_MS", "1200"),
            ("AWS_EC2_METADATA_DISABLED", "true"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into();
        env.push(("WALSHIP_REPO".to_owned(), self.url()));
        env.push(("WALSHIP_AGENT".to_owned(), walship_tests::agent_use()));
        if let Some(endpoint) = self.endpoint() {
            env.extend(env_for(&endpoint).into_iter().map(|(name, value)| (name.to_owned(), value)));
        }
        env
    }

    /// The environment for a server and so for its commands.
    pub(super) fn serving(&self, mut builder: PgServerBuilder) -> PgServerBuilder {
        for (name, value) in self.env() {
            builder = builder.env(&name, value);
        }
        builder
    }

    /// A server on `data_dir` that recovers from here with the plain command.
    pub(super) fn recovering(&self, data_dir: &Path) -> PgServerBuilder {
        self.recovering_by(data_dir, &format!("'{}' %f %p", bins::restore_cmd().display()))
    }

    /// A server on `data_dir` that recovers with this command.
    pub(super) fn recovering_by(&self, data_dir: &Path, restore_command: &str) -> PgServerBuilder {
        self.serving(PgServer::from_data_dir(data_dir))
            .setting("restore_command", restore_command)
            .setting("archive_mode", "off")
            .setting("primary_conninfo", "")
            .setting("hot_standby", "on")
            .setting("wal_retrieve_retry_interval", "100ms")
    }

    /// A `restore_command` that meets the fault from the moment on in which `segment` is first asked
    /// for until [`Site::mend`].
    pub(super) fn breaking_at(&self, segment: &str, fault: Fault) -> String {
        let root = self.root().display().to_string();
        let (once, always) = match (self.kind, fault) {
            (Kind::Folder, Fault::Dead) => (format!("mv '{root}' '{root}.away'"), String::new()),
            (Kind::Folder, Fault::Unmounted) => {
                (format!("mv '{root}' '{root}.away'; mkdir '{root}'"), String::new())
            }
            (Kind::Folder, Fault::Forbidden) => (format!("chmod 000 '{root}'"), String::new()),
            (Kind::S3 | Kind::Weed, Fault::Dead) => {
                (String::new(), "export AWS_ENDPOINT_URL=http://127.0.0.1:1".to_owned())
            }
            (Kind::S3 | Kind::Weed, Fault::Forbidden) => {
                (String::new(), "export AWS_SECRET_ACCESS_KEY=wrong".to_owned())
            }
            (Kind::S3 | Kind::Weed, Fault::NoBucket) => {
                (String::new(), "export WALSHIP_REPO=s3://walship-no-such-bucket/x".to_owned())
            }
            (_, Fault::Hole) => {
                self.remove(segment);
                (String::new(), String::new())
            }
            (kind, fault) => panic!("{kind:?} cannot have {fault:?}"),
        };
        let home = self.home().display();
        let script = format!(
            "#!/bin/sh\n\
             if [ \"$1\" = {segment} ] && [ ! -e '{home}/broken' ]; then : > '{home}/broken'; {once}\nfi\n\
             if [ -e '{home}/broken' ] && [ ! -e '{home}/mended' ]; then :; {always}\nfi\n\
             exec '{}' \"$1\" \"$2\"\n",
            bins::restore_cmd().display()
        );
        let path = self.home().join("restore");
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        // Run by sh: a file that was just written may still be open in a child that another test forks.
        format!("exec sh '{}' %f %p", path.display())
    }

    /// Whether the fault of [`Site::breaking_at`] has begun.
    pub(super) fn is_broken(&self) -> bool {
        self.home().join("broken").exists()
    }

    /// Ends the fault; a hole is filled from `origin`.
    pub(super) fn mend(&self, segment: &str, fault: Fault, origin: &Path) {
        fs::write(self.home().join("mended"), "").unwrap();
        let root = self.root();
        match (self.kind, fault) {
            (_, Fault::Hole) => self.fill(segment, origin),
            (Kind::Folder, Fault::Dead | Fault::Unmounted) => {
                if root.exists() {
                    fs::remove_dir(&root).unwrap();
                }
                fs::rename(self.home().join("repo.away"), &root).unwrap();
            }
            (Kind::Folder, _) => fs::set_permissions(&root, fs::Permissions::from_mode(0o755)).unwrap(),
            _ => {}
        }
    }

    /// Returns the keys of all stored WAL files with this name (a segment may have several objects).
    pub(super) fn keys_of(&self, file: &str) -> Vec<String> {
        let name = |key: &String| key.rsplit('/').next().unwrap_or_default().starts_with(file);
        self.keys().into_iter().filter(name).collect()
    }

    /// Returns all keys but the index's: a cache, which whoever archives may extend.
    pub(super) fn keys(&self) -> Vec<String> {
        let storage = self.storage();
        let listed =
            block_on(async move { walship::storage::list_all(&*storage, "", 10_000).await }).unwrap();
        let keys = listed.into_iter().map(|meta| meta.key.as_str().to_owned());
        keys.filter(|key| !key.contains("/index/")).collect()
    }

    /// Removes what is stored under this name and returns it.
    pub(super) fn remove(&self, file: &str) -> BTreeMap<String, Bytes> {
        let keys = self.keys_of(file);
        assert!(!keys.is_empty(), "{file} is stored");
        let storage = self.storage();
        block_on(async move {
            let mut removed = BTreeMap::new();
            for key in keys {
                let object = ObjectKey::new(&*key).unwrap();
                removed.insert(key, storage.get(&object, 1 << 30).await.unwrap().unwrap());
                storage.delete(&object).await.unwrap();
            }
            removed
        })
    }

    /// Puts objects there.
    pub(super) fn put_all(&self, objects: &BTreeMap<String, Bytes>) {
        let storage = match self.kind {
            Kind::Folder => self.storage(),
            Kind::S3 | Kind::Weed => {
                let config = config_for(&self.endpoint().unwrap(), &self.prefix());
                walship::storage::create_root(&config).unwrap()
            }
        };
        let objects = objects.clone();
        block_on(async move {
            for (key, bytes) in objects {
                storage.put_if_absent(&ObjectKey::new(&*key).unwrap(), bytes.into()).await.unwrap();
            }
        });
    }

    /// Puts the objects of this name there, taken from `origin`.
    pub(super) fn fill(&self, file: &str, origin: &Path) {
        let mut objects = objects_of_folder(origin);
        objects.retain(|key, _| key.rsplit('/').next().unwrap_or_default().starts_with(file));
        assert!(!objects.is_empty(), "{file} is in the origin");
        self.put_all(&objects);
    }
}

/// Makes an empty folder repository for the cluster that `server` is.
pub(super) fn create_repository(root: &Path, server: &PgServer) {
    let size: u64 =
        server.psql("SELECT setting FROM pg_settings WHERE name = 'wal_segment_size'").parse().unwrap();
    let (system, major) = (server.system_identifier(), server.major());
    let config = StorageConfig::new(format!("file://{}", root.display()));
    let storage = walship::storage::create_root(&config).unwrap();
    block_on(async move {
        let now = std::time::SystemTime::now().into();
        let repository = Repository::create(storage, now).await.unwrap();
        let cluster = repository.create_cluster(&CLUSTER.parse().unwrap(), now).await.unwrap();
        cluster.register_lineage(system, size.try_into().unwrap(), major, now).await.unwrap();
    });
}

/// Takes a base backup without WAL: a recovery has to ask for every byte of it.
pub(super) fn base_backup(server: &PgServer, into: &Path) {
    let into = into.to_str().unwrap();
    let output = server.run_tool("pg_basebackup", &["-D", into, "-X", "none", "-c", "fast", "--no-manifest"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn objects_of_folder(root: &Path) -> BTreeMap<String, Bytes> {
    let mut objects = BTreeMap::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let key = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
            if path.is_dir() {
                if key != "tmp" {
                    folders.push(path);
                }
            } else {
                objects.insert(key, fs::read(&path).unwrap().into());
            }
        }
    }
    objects
}

/// The one SeaweedFS of all who need it now; whoever will need it several times keeps it.
pub(super) fn weed() -> Arc<WeedServer> {
    static WEED: Mutex<Weak<WeedServer>> = Mutex::new(Weak::new());
    let mut weed = WEED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    weed.upgrade().unwrap_or_else(|| {
        let started = Arc::new(WeedServer::start());
        *weed = Arc::downgrade(&started);
        started
    })
}

/// Keeps a folder until this process ends, however it ends: what is made once for all tests is never
/// dropped, so a process that sees the end of its input removes it.
pub(super) fn kept_until_the_end(folder: TempDir) -> PathBuf {
    let path = folder.keep();
    let mut janitor = Command::new("sh");
    janitor.args(["-c", "cat > /dev/null; rm -rf \"$1\"", "sh"]).arg(&path);
    janitor.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    // Not stopped by a ^C in the terminal, which ends the tests.
    janitor.process_group(0);
    std::mem::forget(janitor.spawn().unwrap());
    path
}

pub(super) fn block_on<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(Duration::from_secs(60), work).await }).unwrap()
}

/// Returns one line of `pg_controldata`.
pub(super) fn control(server: &PgServer, field: &str) -> String {
    let mut command = server.binaries().tool("pg_controldata");
    let text = process::run_ok(command.arg("-D").arg(server.data_dir()));
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("{field} in {text}")).trim().to_owned()
}

/// Fails when anything says that the server ended its recovery.
pub(super) fn assert_never_promoted(server: &PgServer, signal: &str) {
    let log = server.log();
    for sign in [
        "selected new timeline ID",
        "archive recovery complete",
        "database system is ready to accept connections",
    ] {
        assert!(!log.contains(sign), "{sign:?} in the log:\n{log}");
    }
    assert!(server.data_dir().join(signal).exists(), "{signal} is gone");
    let state = control(server, "Database cluster state");
    assert!(state.contains("in archive recovery") || state.contains("shut down in recovery"), "{state}");
}
