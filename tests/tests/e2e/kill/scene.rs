//! A server with an archive and a backup, a second repository to push into, and what must hold in both.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use walship::catalog::BackupRecord;
use walship::config::{Config, Overrides};
use walship::pg::SegmentName;
use walship::repository::{ClusterRepository, LineageRepository, load_catalog};
use walship::storage::{self, ObjectMeta, list_all};
use walship_tests::bins;
use walship_tests::postgres::{PgServer, primary_major};
use walship_tests::stage::Stage;
use walship_tests::weed::WeedServer;

/// How many segments there are to push and fetch.
const SEGMENTS: usize = 24;
/// The rows that every restore must bring back.
const ROWS: &str = "1000";

/// Everything that the rounds work on.
pub(crate) struct Scene {
    pub(crate) server: PgServer,
    /// What the server archives into: fetched from, backed up into, restored from.
    pub(crate) archive: Stage,
    /// What the push rounds push into.
    pub(crate) pushing: Stage,
    /// Looks like a data directory in recovery.
    pub(crate) data_dir: PathBuf,
    /// The segments in its `pg_wal`, all of them in the archive.
    pub(crate) segments: Vec<(SegmentName, Vec<u8>)>,
    runtime: tokio::runtime::Runtime,
    pushed_into: LineageRepository,
    archived_into: LineageRepository,
    _store: Option<WeedServer>,
}

impl Scene {
    pub(crate) fn on_a_folder() -> Self {
        Self::new(None, Stage::folder("main"), Stage::folder("main"))
    }

    pub(crate) fn on_s3() -> Self {
        let store = WeedServer::start();
        let endpoint = store.endpoint();
        let (archive, pushing) = (Stage::s3("main", &endpoint), Stage::s3("pushed", &endpoint));
        Self::new(Some(store), archive, pushing)
    }

    fn new(store: Option<WeedServer>, archive: Stage, pushing: Stage) -> Self {
        // It is these calls that are killed, and what they stored is removed behind them; agents have kill tests of their own.
        let (archive, pushing) = (archive.with_agent("off"), pushing.with_agent("off"));
        let data_dir = archive.path().join("data");
        for folder in ["pg_wal", "global"] {
            fs::create_dir_all(data_dir.join(folder)).unwrap();
        }
        let wal = data_dir.join("pg_wal");
        // A copy of each segment for the push rounds, then the real thing.
        let command = format!("cp %p '{}/%f' && exec '{}' %p", wal.display(), bins::archive_cmd().display());
        let server = PgServer::builder(primary_major())
            .wal_segment_size_mb(1)
            .setting("archive_mode", "on")
            .setting("archive_command", command)
            .setting("max_wal_senders", 50)
            .env("WALSHIP_CONFIG", archive.config())
            .start();
        archive.init(&server);
        pushing.init(&server);
        server.psql(
            "CREATE TABLE kept AS SELECT a, repeat(md5(a::text), 20) AS b FROM generate_series(1, 500) a",
        );
        archive.backup(&server);
        server.psql("INSERT INTO kept SELECT a, repeat(md5(a::text), 20) FROM generate_series(501, 1000) a");
        let rows = SEGMENTS * 1024 * 1024 / 700;
        server.psql(&format!(
            "CREATE TABLE bulk AS SELECT repeat(md5(a::text), 20) AS b FROM generate_series(1, {rows}) a"
        ));
        server.archive_now();
        fs::copy(server.data_dir().join("global/pg_control"), data_dir.join("global/pg_control")).unwrap();
        fs::write(data_dir.join("recovery.signal"), b"").unwrap();

        let mut segments: Vec<(SegmentName, Vec<u8>)> = fs::read_dir(&wal)
            .unwrap()
            .filter_map(|entry| {
                let path = entry.unwrap().path();
                let name = path.file_name()?.to_str()?.parse().ok()?;
                Some((name, fs::read(path).unwrap()))
            })
            .collect();
        segments.sort();
        segments.truncate(SEGMENTS);
        assert_eq!(segments.len(), SEGMENTS, "the server wrote enough WAL");

        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let open = |stage: &Stage| {
            let overrides = Overrides { config: Some(stage.config()), ..Overrides::default() };
            let config = Config::load(&overrides).unwrap();
            runtime.block_on(async {
                let storage = storage::open(&config.repositories[0]).unwrap();
                let cluster =
                    ClusterRepository::open(storage, &config.cluster.parse().unwrap()).await.unwrap();
                cluster.newest_lineage().await.unwrap()
            })
        };
        let (pushed_into, archived_into) = (open(&pushing), open(&archive));
        Self {
            server,
            archive,
            pushing,
            data_dir,
            segments,
            runtime,
            pushed_into,
            archived_into,
            _store: store,
        }
    }

    pub(crate) fn scratch(&self) -> &Path {
        self.archive.path()
    }

    /// Returns what is stored of a segment in the repository that is pushed into.
    ///
    /// # Panics
    /// When it is not what it says it is.
    pub(crate) fn pushed(&self, name: SegmentName) -> Option<Vec<u8>> {
        self.runtime.block_on(self.pushed_into.segment_bytes(name)).unwrap()
    }

    /// Removes a segment from the repository that is pushed into, so that it can be pushed anew.
    pub(crate) fn forget_pushed(&self, name: SegmentName) {
        let end = format!("/{name}.wal");
        for object in
            self.objects(&self.pushed_into).iter().filter(|object| object.key.as_str().ends_with(&end))
        {
            self.runtime.block_on(self.pushed_into.storage().delete(&object.key)).unwrap();
        }
    }

    fn objects(&self, lineage: &LineageRepository) -> Vec<ObjectMeta> {
        let prefix = format!("{}/{:04}/", lineage.cluster(), lineage.lineage().number);
        self.runtime.block_on(list_all(&**lineage.storage(), &prefix, 100_000)).unwrap()
    }

    /// Checks that no second copy of anything was stored: that happens only beside a damaged object.
    pub(crate) fn check_keys(&self) {
        for lineage in [&self.pushed_into, &self.archived_into] {
            for object in self.objects(lineage) {
                let name = object.key.as_str().rsplit('/').next().unwrap();
                assert!(!name.contains(".r") && !name.contains(".incomplete."), "{} is stored", object.key);
            }
        }
    }

    /// Removes what killed fetches left behind.
    pub(crate) fn remove_temporaries(&self) {
        for entry in fs::read_dir(self.data_dir.join("pg_wal")).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "walship-tmp") {
                fs::remove_file(path).unwrap();
            }
        }
    }

    /// Returns the ids of all backups that are offered, having checked that those not known before are
    /// whole.
    pub(crate) fn check_backups(&self, known: &BTreeSet<String>) -> BTreeSet<String> {
        let info = self.archive.ok(&mut self.archive.pitr(&["info", "--json"]));
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        let offered: BTreeSet<String> = info["backups"]
            .as_array()
            .unwrap()
            .iter()
            .map(|backup| backup["id"].as_str().unwrap().to_owned())
            .collect();
        let catalog = self.runtime.block_on(load_catalog(&self.archived_into)).unwrap();
        assert_eq!(offered, catalog.backups.iter().map(|record| record.id.clone()).collect());
        assert!(known.is_subset(&offered), "a backup is gone");
        for record in catalog.backups.iter().filter(|record| !known.contains(&record.id)) {
            self.check_backup(record);
            let mut segment =
                SegmentName::containing(record.timeline, record.start_lsn, catalog.lineage.segment_size);
            while segment.start(catalog.lineage.segment_size) < record.stop_lsn {
                assert!(catalog.segments.contains(segment), "{segment} of backup {} is missing", record.id);
                segment = segment.next(catalog.lineage.segment_size).unwrap();
            }
        }
        offered
    }

    fn check_backup(&self, record: &BackupRecord) {
        // Reading checks the digest.
        self.runtime.block_on(self.archived_into.get_backup_manifest(record)).unwrap();
        for object in &record.objects {
            let read = self.archived_into.read_backup_object_range(
                &record.id,
                &object.name,
                0,
                object.stored_bytes + 1,
            );
            let bytes = self.runtime.block_on(read).unwrap();
            assert_eq!(bytes.len() as u64, object.stored_bytes, "{} of {}", object.name, record.id);
            assert_eq!(
                walship::codec::Digest::of(&bytes).to_string(),
                object.digest,
                "{} of {}",
                object.name,
                record.id
            );
        }
    }

    /// Starts PostgreSQL on a restored folder and returns whether it came up; if so, everything must be
    /// there.
    pub(crate) fn starts_complete(&self, data_dir: &Path) -> bool {
        if !data_dir.join("PG_VERSION").exists() {
            return false;
        }
        match self.archive.recovering(data_dir).try_start() {
            Ok(server) => {
                server.wait_for("SELECT pg_is_in_recovery()", "f");
                assert_eq!(server.psql("SELECT count(*) FROM kept"), ROWS);
                true
            }
            // Whatever it misses first.
            Err(_log) => false,
        }
    }
}
