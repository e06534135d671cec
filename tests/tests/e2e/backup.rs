//! Base backups of real servers into a repository, and what stock tools make of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tempfile::TempDir;
use walship::Error;
use walship::archive::push::{PushOptions, push_file};
use walship::backup::{BackupEvent, BackupOptions, server_identity, take_backup};
use walship::catalog::BackupRecord;
use walship::codec::Compression;
use walship::pg::{BackupManifest, SegmentSize, TimelineId};
use walship::replication::{ConnectOptions, Origin};
use walship::repository::{ClusterRepository, LineageRepository, Repository, load_catalog};
use walship::storage::fs::FsStorage;
use walship_tests::postgres::{PgServer, PgServerBuilder, StopMode, majors, primary_major};
use walship_tests::stage::Stage;
use walship_tests::{process, wait};

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn connect_options(conninfo: &str) -> ConnectOptions {
    ConnectOptions::resolve(conninfo, Origin::Argument, &|_| None).unwrap()
}

/// A folder repository, and a thread that pushes into it what servers put into a folder.
struct Place {
    folder: TempDir,
    cluster: ClusterRepository,
    runtime: tokio::runtime::Runtime,
    shipping: Arc<AtomicBool>,
    shipper: Option<std::thread::JoinHandle<()>>,
}

impl Place {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        fs::create_dir(folder.path().join("inbox")).unwrap();
        let runtime = runtime();
        let cluster = runtime.block_on(async {
            let storage = FsStorage::create_root(&folder.path().join("repository")).unwrap();
            let now = chrono::Utc::now();
            let repository = Repository::create(Arc::new(storage), now).await.unwrap();
            repository.create_cluster(&"main".parse().unwrap(), now).await.unwrap()
        });
        Self { folder, cluster, runtime, shipping: Arc::new(AtomicBool::new(true)), shipper: None }
    }

    fn archiving(&self, server: PgServerBuilder) -> PgServerBuilder {
        let inbox = self.folder.path().join("inbox");
        let command = format!("cp %p {0}/%f.tmp && mv {0}/%f.tmp {0}/%f", inbox.display());
        server.setting("archive_mode", "on").setting("archive_command", command)
    }

    fn register(&self, server: &PgServer) -> LineageRepository {
        self.runtime.block_on(async {
            let (identity, size) = server_identity(&connect_options(&server.uri())).await.unwrap();
            self.cluster
                .register_lineage(identity.system_identifier, size, server.major(), chrono::Utc::now())
                .await
                .unwrap()
        })
    }

    fn ship(&mut self) {
        let (inbox, spool) = (self.folder.path().join("inbox"), self.folder.path().join("spool"));
        fs::create_dir_all(&spool).unwrap();
        let (shipping, cluster) = (Arc::clone(&self.shipping), self.cluster.clone());
        let handle = self.runtime.handle().clone();
        self.shipper = Some(std::thread::spawn(move || {
            let options = PushOptions { compression: Compression::Lz4, lineage: None, spool_dir: spool };
            while shipping.load(Ordering::Relaxed) {
                let mut files: Vec<PathBuf> =
                    fs::read_dir(&inbox).unwrap().map(|e| e.unwrap().path()).collect();
                files.retain(|path| path.extension().is_none_or(|extension| extension != "tmp"));
                files.sort();
                for file in files {
                    handle.block_on(push_file(std::slice::from_ref(&cluster), &file, &options)).unwrap();
                    fs::remove_file(&file).unwrap();
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        }));
    }

    fn take(
        &self,
        lineage: &LineageRepository,
        conninfo: &str,
        options: &BackupOptions,
    ) -> (Result<BackupRecord, Error>, Vec<BackupEvent>) {
        let events = Mutex::new(Vec::new());
        let server = connect_options(conninfo);
        let taken =
            self.runtime.block_on(take_backup(std::slice::from_ref(lineage), &server, options, &|event| {
                events.lock().unwrap().push(event)
            }));
        (taken, events.into_inner().unwrap())
    }

    fn backup_dir(&self, lineage: &LineageRepository, id: &str) -> PathBuf {
        let number = format!("{:04}", lineage.lineage().number);
        self.folder.path().join("repository/main").join(number).join("backups").join(id)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shipping.store(false, Ordering::Relaxed);
        if let Some(shipper) = self.shipper.take() {
            let _ = shipper.join();
        }
    }
}

/// Unpacks a backup with `zstd` and `tar` alone. Tablespaces go into folders below `beside`.
pub(crate) fn unpack(record: &BackupRecord, backup_dir: &Path, target: &Path, beside: &Path) {
    fs::create_dir_all(target).unwrap();
    let pipe = |object: &str, into: &Path| {
        let mut zstd = Command::new("zstd");
        zstd.arg("-dcq").stdin(fs::File::open(backup_dir.join(object)).unwrap()).stdout(Stdio::piped());
        let mut zstd = zstd.spawn().unwrap();
        let mut tar = Command::new("tar");
        tar.args(["-x", "--no-same-owner", "-C"]).arg(into).stdin(zstd.stdout.take().unwrap());
        assert!(tar.status().unwrap().success(), "tar of {object}");
        assert!(zstd.wait().unwrap().success(), "zstd of {object}");
    };
    for object in &record.objects {
        match object.tablespace {
            None => pipe(&object.name, target),
            Some(oid) => {
                let folder = beside.join(oid.to_string());
                fs::create_dir_all(&folder).unwrap();
                pipe(&object.name, &folder);
            }
        }
    }
    // The links lead to the original tablespaces: turn them to the unpacked ones.
    for tablespace in &record.tablespaces {
        let link = target.join("pg_tblspc").join(tablespace.oid.to_string());
        assert_eq!(fs::read_link(&link).unwrap(), Path::new(&tablespace.path));
        fs::remove_file(&link).unwrap();
        std::os::unix::fs::symlink(beside.join(tablespace.oid.to_string()), &link).unwrap();
    }
    let manifest = fs::read(backup_dir.join("manifest.json.zst")).unwrap();
    let manifest = process_pipe(Command::new("zstd").arg("-dcq"), &manifest);
    BackupManifest::parse(&manifest).unwrap();
    fs::write(target.join("backup_manifest"), manifest).unwrap();
}

fn process_pipe(command: &mut Command, input: &[u8]) -> Vec<u8> {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("input");
    fs::write(&path, input).unwrap();
    let output = command.stdin(fs::File::open(path).unwrap()).output().unwrap();
    assert!(output.status.success());
    output.stdout
}

#[test]
fn a_backup_with_tablespaces_is_verified_by_stock_tools_and_starts() {
    for major in majors() {
        let mut place = Place::new();
        let server = place.archiving(PgServer::builder(major)).start();
        let lineage = place.register(&server);
        place.ship();
        let space = TempDir::new().unwrap();
        server.psql(&format!("CREATE TABLESPACE fast LOCATION '{}'", space.path().display()));
        server.psql(
            "CREATE TABLE here AS SELECT g, repeat(md5(g::text), 20) AS t FROM generate_series(1, 30000) g;
             CREATE TABLE there TABLESPACE fast AS SELECT g, md5(g::text) AS t FROM generate_series(1, 20000) g;
             CREATE TABLE empty ()",
        );
        let options = BackupOptions {
            label: "it's Tuesday".into(),
            object_bytes: 4 << 20,
            wal_timeout: Duration::from_secs(60),
            ..BackupOptions::default()
        };
        let (taken, events) = place.take(&lineage, &server.uri(), &options);
        let record = taken.unwrap();

        assert_eq!(record.label, "it's Tuesday");
        assert_eq!(record.server_version / 10_000, major);
        assert_eq!((record.timeline, record.stop_timeline), (TimelineId::FIRST, TimelineId::FIRST));
        assert!(record.stop_lsn > record.start_lsn && record.data_checksums && !record.from_standby);
        assert_eq!(record.limits.max_connections, 100);
        assert_eq!(record.tablespaces.len(), 1);
        assert_eq!(record.tablespaces[0].path, space.path().to_str().unwrap());
        assert!(record.tablespaces[0].bytes > 1 << 20);
        assert!(record.objects.len() >= 6, "{}", record.objects.len());
        assert!(record.objects.iter().any(|object| object.tablespace.is_some()));
        assert!(matches!(events[0], BackupEvent::Checkpoint));
        assert!(events.iter().any(
            |event| matches!(event, BackupEvent::Started { total_bytes, .. } if *total_bytes > 20 << 20)
        ));
        assert!(!events.iter().any(|event| matches!(event, BackupEvent::Warning(_))), "{events:?}");
        // It goes with its session, whose end the server notices a moment later.
        server.wait_for("SELECT count(*) FROM pg_replication_slots", "0");

        let catalog = place.runtime.block_on(load_catalog(&lineage)).unwrap();
        assert_eq!(catalog.backups, std::slice::from_ref(&record));
        assert!(catalog.unfinished_backups.is_empty());
        let last = walship::pg::SegmentName::containing(
            record.stop_timeline,
            walship::pg::Lsn(record.stop_lsn.0 - 1),
            SegmentSize::DEFAULT,
        );
        assert!(catalog.segments.contains(last));

        let restored = TempDir::new().unwrap();
        let (target, beside) = (restored.path().join("data"), restored.path().join("spaces"));
        unpack(&record, &place.backup_dir(&lineage, &record.id), &target, &beside);
        let verify = server.run_tool("pg_verifybackup", &["-n", target.to_str().unwrap()]);
        assert!(verify.status.success(), "{}", String::from_utf8_lossy(&verify.stderr));

        // And PostgreSQL recovers from it with the archived WAL.
        let wal = restored.path().join("wal");
        fs::create_dir(&wal).unwrap();
        for segment in catalog.segments.names() {
            let bytes = place.runtime.block_on(lineage.segment_bytes(segment)).unwrap().unwrap();
            fs::write(wal.join(segment.to_string()), bytes).unwrap();
        }
        process::run_ok(Command::new("chmod").args(["-R", "u=rwX,go="]).arg(&target).arg(&beside));
        fs::write(target.join("recovery.signal"), "").unwrap();
        let copy = PgServer::from_data_dir(&target)
            .setting("restore_command", format!("cp {}/%f %p", wal.display()))
            .setting("archive_mode", "off")
            .start();
        wait::until("recovery ends", || copy.psql("SELECT pg_is_in_recovery()") == "f");
        assert_eq!(copy.psql("SELECT count(*) FROM here"), "30000");
        assert_eq!(copy.psql("SELECT count(*) FROM there"), "20000");
    }
}

#[test]
fn a_backup_whose_wal_does_not_arrive_is_no_backup() {
    let place = Place::new();
    let server = place.archiving(PgServer::builder(primary_major())).start();
    let lineage = place.register(&server);
    // Nobody ships: the archive command succeeds, and the repository stays empty.
    let options = BackupOptions { wal_timeout: Duration::from_secs(2), ..BackupOptions::default() };
    let (taken, events) = place.take(&lineage, &server.uri(), &options);
    let error = taken.unwrap_err();
    assert!(error.is_transient() && error.to_string().contains("is missing"), "{error}");
    assert!(error.next().contains("archive_command"));
    assert!(events.iter().any(|event| matches!(event, BackupEvent::WaitingForWal { .. })));
    let catalog = place.runtime.block_on(load_catalog(&lineage)).unwrap();
    assert!(catalog.backups.is_empty());
    assert_eq!(catalog.unfinished_backups.len(), 1);
}

#[test]
fn another_clusters_server_is_refused_and_a_bad_page_is_named() {
    let mut place = Place::new();
    let mut server = place.archiving(PgServer::builder(primary_major())).start();
    let other = PgServer::builder(primary_major()).wal_segment_size_mb(1).start();
    let lineage = place.register(&server);
    place.ship();
    let (taken, _) = place.take(&lineage, &other.uri(), &BackupOptions::default());
    assert!(matches!(taken, Err(Error::Mismatch(_))), "{taken:?}");
    assert!(!place.folder.path().join("repository/main/0001/backups").exists());

    // Pages whose checksum is wrong: the server finds them, and sends them as they are.
    server.psql("CREATE TABLE bad AS SELECT g FROM generate_series(1, 10000) g; CHECKPOINT");
    let relative = server.psql("SELECT pg_relation_filepath('bad')");
    let path = server.data_dir().join(&relative);
    server.stop(StopMode::Fast);
    let mut bytes = fs::read(&path).unwrap();
    for block in [3, 7, 8, 9, 10, 11, 12] {
        bytes[block * 8192 + 5000] ^= 1;
    }
    fs::write(&path, bytes).unwrap();
    server.start();
    let (taken, _) = place.take(&lineage, &server.uri(), &BackupOptions::default());
    let record = taken.unwrap();
    let damaged = record.damaged_pages.clone().unwrap();
    // The server names five of a file.
    assert_eq!((damaged.total, damaged.pages.len()), (7, 5), "{damaged:?}");
    assert_eq!((&damaged.pages[0].path, damaged.pages[0].block), (&PathBuf::from(relative), 3));
    assert_eq!(damaged.pages[0].relation.as_deref(), Some("postgres.public.bad"));
    let catalog = place.runtime.block_on(load_catalog(&lineage)).unwrap();
    assert_eq!(catalog.backups, [record]);
}

#[test]
fn a_backup_from_a_standby_is_complete_when_the_primary_has_switched() {
    let mut place = Place::new();
    let primary = place.archiving(PgServer::builder(primary_major())).start();
    let lineage = place.register(&primary);
    place.ship();
    primary.psql("CREATE TABLE t AS SELECT g FROM generate_series(1, 1000) g");
    let folder = TempDir::new().unwrap();
    let copy = folder.path().join("standby");
    let made = primary
        .run_tool("pg_basebackup", &["-D", copy.to_str().unwrap(), "-R", "-X", "stream", "-c", "fast"]);
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let standby = PgServer::from_data_dir(&copy).setting("archive_mode", "off").start();
    primary.psql("INSERT INTO t SELECT generate_series(1, 1000)");
    // Both hosts are named: the backup comes from the standby, the switch happens on the primary.
    let both = format!(
        "postgresql://postgres@127.0.0.1:{},127.0.0.1:{}/postgres?target_session_attrs=prefer-standby",
        primary.port(),
        standby.port()
    );
    let options = BackupOptions { wal_timeout: Duration::from_secs(60), ..BackupOptions::default() };
    let (taken, _) = place.take(&lineage, &both, &options);
    let record = taken.unwrap();
    assert!(record.from_standby);
    let catalog = place.runtime.block_on(load_catalog(&lineage)).unwrap();
    assert_eq!(catalog.backups, [record]);
}

/// The names of the records in a stage's catalog of backups.
pub(crate) fn records(stage: &Stage) -> Vec<String> {
    let folder = stage.repository_dir().join(stage.cluster()).join("0001/backups/catalog");
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn the_command_takes_a_backup_and_a_killed_one_leaves_no_record() {
    let stage = Stage::folder("main");
    let server = stage.archiving(PgServer::builder(primary_major())).start();
    stage.ok(&mut stage.walship_on(&server, &["init"]));
    server.psql("CREATE TABLE t AS SELECT g, repeat(md5(g::text), 8) AS t FROM generate_series(1, 100000) g");

    // Killed at several moments: before, amid and after the data. The rate makes it last.
    let mut begun = 0;
    for pause_ms in [50, 150, 400, 800, 1500] {
        let mut command = stage.walship_on(&server, &["backup", "--max-rate", "10M"]);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        std::thread::sleep(Duration::from_millis(pause_ms));
        child.kill().unwrap();
        child.wait().unwrap();
        begun += 1;
        assert_eq!(records(&stage), Vec::<String>::new(), "after {pause_ms} ms");
    }
    let backups = stage.repository_dir().join("main/0001/backups");
    let left: Vec<_> = fs::read_dir(&backups).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(!left.is_empty() && left.len() <= begun, "{left:?}");
    wait::until("the killed sessions' slots are gone", || {
        server.psql("SELECT count(*) FROM pg_replication_slots") == "0"
    });

    let output = stage.run(&mut stage.walship_on(&server, &["backup", "--label", "nightly", "--json"]));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    assert!(errors.contains("starts at"), "{errors}");
    let record: BackupRecord = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(record.label, "nightly");
    assert_eq!(records(&stage).len(), 1);

    // By argument, with a password: refused without repeating it.
    let output = stage.run(&mut stage.walship(&["backup", "postgresql://postgres:hunter2@127.0.0.1/"]));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert!(
        errors.contains("password") && errors.contains(".pgpass") && !errors.contains("hunter2"),
        "{errors}"
    );
    assert_eq!(stage.run(&mut stage.walship(&["backup", "--max-rate", "5"])).status.code(), Some(2));

    // Without a server: an error, and nothing changes.
    let port = server.port();
    drop(server);
    let uri = format!("host=127.0.0.1 port={port} user=postgres");
    let output = stage.run(&mut stage.walship(&["backup", &uri]));
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("cannot be reached"));
    assert_eq!(records(&stage).len(), 1);
}
