//! Restores of backups that are damaged or made to do harm: each is refused, nothing is written outside
//! the folder, and what is left cannot be started.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use chrono::Utc;
use pitr::execute::restore::{Existing, INCOMPLETE_MARKER};
use pitr::execute::{Progress, RestoreOptions, restore};
use pitr::plan::{RestorePlan, Stop, StopKind};
use pitr::recovery_settings::{Recovery, RestoreAs, SettingsOptions, TargetAction};
use pitr::target::{RecoveryTarget, TargetKind};
use sha2::{Digest as _, Sha256};
use walship::Error;
use walship::catalog::{BackupObject, BackupRecord, Tablespace};
use walship::pg::{Lsn, SegmentSize, TimelineId};
use walship::repository::{LineageRepository, Repository};
use walship::storage::memory::MemoryStorage;
use walship::wal::testing::INITDB_LIMITS;

const ID: &str = "20261121T010203Z-0123456789abcdef";

/// A tar member whose name is taken as it is.
fn member(name: &str, kind: tar::EntryType, link: &str, content: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
    header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_entry_type(kind);
    header.set_mode(0o600);
    header.set_size(content.len() as u64);
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(content);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn file(name: &str, content: &[u8]) -> Vec<u8> {
    member(name, tar::EntryType::Regular, "", content)
}

fn manifest(files: &[(&str, &[u8])]) -> Vec<u8> {
    let files: Vec<String> = files
        .iter()
        .map(|(path, content)| {
            let crc: String =
                crc32c::crc32c(content).to_le_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
            format!(
                "{{ \"Path\": \"{path}\", \"Size\": {}, \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"{crc}\" }}",
                content.len()
            )
        })
        .collect();
    let mut text = format!(
        "{{ \"PostgreSQL-Backup-Manifest-Version\": 1,\n\"Files\": [\n{}\n],\n\"WAL-Ranges\": [\n\
         {{ \"Timeline\": 1, \"Start-LSN\": \"0/2000028\", \"End-LSN\": \"0/2000100\" }}\n],\n",
        files.join(",\n")
    );
    let digest: String = Sha256::digest(&text).iter().map(|byte| format!("{byte:02x}")).collect();
    text.push_str(&format!("\"Manifest-Checksum\": \"{digest}\"}}\n"));
    text.into_bytes()
}

/// A made-up backup and where it is restored to.
struct Scene {
    home: tempfile::TempDir,
    repository: LineageRepository,
    record: BackupRecord,
}

impl Scene {
    async fn new(files: &[(&str, &[u8])], tar: &[u8]) -> Self {
        let now = Utc::now();
        let repository = Repository::create(Arc::new(MemoryStorage::new()), now).await.unwrap();
        let cluster = repository.create_cluster(&"main".parse().unwrap(), now).await.unwrap();
        let repository =
            cluster.register_lineage(7_123_456_789_012_345_678, SegmentSize::DEFAULT, 15, now).await.unwrap();
        let stored = zstd::encode_all(tar, 1).unwrap();
        let object = BackupObject {
            name: "data/000001.tar".into(),
            tablespace: None,
            stored_bytes: stored.len() as u64,
            tar_bytes: tar.len() as u64,
            digest: blake3::hash(&stored).to_hex().to_string(),
            index: None,
            backup: None,
        };
        let mut upload = repository.start_backup_object(ID, &object.name).await.unwrap();
        upload.write(stored.into()).await.unwrap();
        upload.finish().await.unwrap();
        let manifest = zstd::encode_all(&*manifest(files), 1).unwrap();
        let manifest_digest = repository.put_backup_manifest(ID, manifest.into()).await.unwrap();
        let record = BackupRecord {
            format: 1,
            id: ID.into(),
            label: "walship".into(),
            timeline: TimelineId::FIRST,
            start_lsn: Lsn(0x200_0028),
            stop_timeline: TimelineId::FIRST,
            stop_lsn: Lsn(0x200_0100),
            started: now,
            finished: now,
            server_version: 150_018,
            from_standby: false,
            data_bytes: 1 << 10,
            stored_bytes: object.stored_bytes,
            files: files.len() as u64,
            tablespaces: vec![],
            objects: vec![object],
            limits: INITDB_LIMITS,
            data_checksums: false,
            manifest_digest,
            settings_files: vec![],
            names: None,
            prepared: Some(Vec::new()),
            damaged_pages: None,
            parent: None,
        };
        Self { home: tempfile::tempdir().unwrap(), repository, record }
    }

    fn data_dir(&self) -> PathBuf {
        self.home.path().join("data")
    }

    async fn restore(&self) -> Error {
        let lsn = self.record.stop_lsn;
        let plan = RestorePlan {
            cluster: "main".into(),
            lineage: 1,
            system_identifier: "7123456789012345678".into(),
            target: RecoveryTarget::new(TargetKind::Immediate),
            target_options: "--immediate".into(),
            timeline: TimelineId::FIRST,
            timeline_path: vec![],
            backup: self.record.clone(),
            parents: vec![],
            chain: vec![],
            tail: None,
            stop: Stop {
                kind: StopKind::Consistent,
                cut_lsn: lsn,
                final_lsn: lsn,
                through_lsn: lsn,
                record: None,
            },
            last_included: None,
            first_excluded: None,
            first_excluded_unknown: None,
            timelines_left_out: vec![],
            backup_fetch_bytes: 0,
            wal_segments: 0,
            wal_segments_checked: 0,
            wal_fetch_bytes: 0,
            wal_replay_bytes: 0,
            forecast: None,
            limits: INITDB_LIMITS,
            tablespace_paths: vec![],
            open_prepared: None,
            half_done: vec![],
            parent_segments: vec![],
            gap_behind: None,
            damaged_behind: None,
            reasons: vec![],
            warnings: vec![],
        };
        let options = RestoreOptions {
            existing: Existing::Refuse,
            data_dir: self.data_dir(),
            tablespaces: BTreeMap::new(),
            accept_tablespace_paths: false,
            settings_dir: None,
            settings: SettingsOptions {
                restore_as: RestoreAs::Copy,
                recovery: Recovery::ToTarget(TargetAction::Promote),
                restore_command: "restore-cmd %f %p".into(),
            },
        };
        restore(&self.repository, &plan, &options, Arc::new(Progress::default())).await.unwrap_err()
    }

    /// Restores and expects damage to be found, said with these words, and nothing to be startable.
    async fn is_damaged(&self, words: &str) {
        let error = self.restore().await;
        assert!(matches!(error, Error::Corrupt(_)), "{error:?}");
        assert!(error.to_string().contains(words), "{error}");
        assert!(self.data_dir().join(INCOMPLETE_MARKER).exists(), "{words}");
        assert!(!self.data_dir().join("global/pg_control").exists(), "{words}");
        let beside: Vec<_> =
            fs::read_dir(self.home.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(beside.iter().all(|name| name == "data" || name == "ts"), "{words}: {beside:?}");
        // The next attempt into the same folder is told what it holds.
        assert!(self.restore().await.to_string().contains("did not complete"));
    }
}

#[tokio::test]
async fn names_that_lead_elsewhere_are_refused() {
    for name in ["../escaped", "/tmp/walship-escaped", "base/../../escaped"] {
        let scene = Scene::new(&[("PG_VERSION", b"15\n")], &file(name, b"x")).await;
        scene.is_damaged("is not a path inside a backup").await;
        assert!(!Path::new("/tmp/walship-escaped").exists());
    }
}

#[tokio::test]
async fn links_and_other_kinds_are_refused() {
    for kind in [tar::EntryType::Symlink, tar::EntryType::Link, tar::EntryType::Char, tar::EntryType::Fifo] {
        let mut tar = member("base", kind, "/tmp", b"");
        tar.extend(file("base/evil", b"x"));
        Scene::new(&[("base/evil", b"x")], &tar).await.is_damaged("neither a file nor a folder").await;
    }
}

#[tokio::test]
async fn nothing_is_written_through_a_tablespace_link() {
    let mut scene = Scene::new(&[("pg_tblspc/16385/evil", b"x")], &file("pg_tblspc/16385/evil", b"x")).await;
    let place = scene.home.path().join("ts");
    scene.record.tablespaces =
        vec![Tablespace { oid: 16_385, path: place.to_str().unwrap().into(), bytes: 1 }];
    let error = scene.restore().await;
    assert!(error.to_string().contains("through a tablespace's link"), "{error}");
    assert!(!place.join("evil").exists());
}

#[tokio::test]
async fn only_what_postgres_puts_there_is_unpacked() {
    for name in ["pg_wal/000000010000000000000002", "pg_replslot/slot/state"] {
        Scene::new(&[(name, b"x")], &file(name, b"x")).await.is_damaged("a backup holds no such file").await;
    }
    for (name, words) in [
        ("evil", "not in a folder that PostgreSQL makes"),
        ("PG_15_/1/2", "not in a folder that PostgreSQL makes"),
        ("PG_15_202209061/1/2", "which its manifest lists"),
    ] {
        let listed = format!("pg_tblspc/16385/{name}");
        let files: &[(&str, &[u8])] = &[("PG_VERSION", b"15\n"), (&listed, b"x")];
        let mut scene = Scene::new(files, &file(name, b"x")).await;
        let place = scene.home.path().join("ts");
        scene.record.tablespaces =
            vec![Tablespace { oid: 16_385, path: place.to_str().unwrap().into(), bytes: 1 }];
        scene.record.objects[0].tablespace = Some(16_385);
        let error = scene.restore().await;
        assert!(error.to_string().contains(words), "{name}: {error}");
        assert!(!place.join("evil").exists());
    }
}

#[tokio::test]
async fn names_beyond_a_header_are_refused_before_they_are_read() {
    let long = vec![b'a'; 4 << 20];
    for kind in [tar::EntryType::GNULongName, tar::EntryType::XHeader] {
        let tar = [member("././@LongLink", kind, "", &long), file("PG_VERSION", b"15\n")].concat();
        Scene::new(&[("PG_VERSION", b"15\n")], &tar).await.is_damaged("").await;
    }
}

#[tokio::test]
async fn contents_other_than_the_manifests_are_damage() {
    let good: &[(&str, &[u8])] = &[("PG_VERSION", b"15\n")];
    Scene::new(good, &file("PG_VERSION", b"16\n")).await.is_damaged("does not match the checksum").await;
    Scene::new(good, &file("PG_VERSION", b"15")).await.is_damaged("has 2 bytes, the manifest says 3").await;
    Scene::new(good, &file("other", b"15\n")).await.is_damaged("does not list").await;
    let twice = [file("PG_VERSION", b"15\n"), file("PG_VERSION", b"15\n")].concat();
    Scene::new(good, &twice).await.is_damaged("twice").await;
    let more: &[(&str, &[u8])] = &[("PG_VERSION", b"15\n"), ("base/1/2", b"")];
    Scene::new(more, &file("PG_VERSION", b"15\n")).await.is_damaged("which its manifest lists").await;
    Scene::new(good, &file("PG_VERSION", b"15\n")).await.is_damaged("does not hold global/pg_control").await;
    let cut = &file("PG_VERSION", b"15\n")[..600];
    Scene::new(good, cut).await.is_damaged("cannot be unpacked").await;
}

#[tokio::test]
async fn objects_other_than_the_records_are_damage() {
    let good: &[(&str, &[u8])] = &[("PG_VERSION", b"15\n")];
    let tar = file("PG_VERSION", b"15\n");
    let mut scene = Scene::new(good, &tar).await;
    scene.record.objects[0].digest = "0".repeat(64);
    scene.is_damaged("has the digest").await;

    // A small object that unpacks to more than its record says is read no further than that.
    let bomb = [tar.clone(), vec![0; 64 << 20]].concat();
    let mut scene = Scene::new(good, &bomb).await;
    scene.record.objects[0].tar_bytes = tar.len() as u64;
    scene.is_damaged("longer than the backup's record says").await;

    let mut scene = Scene::new(good, &tar).await;
    scene.record.objects[0].stored_bytes += 1;
    let error = scene.restore().await;
    assert!(matches!(error, Error::Corrupt(_)), "{error:?}");
    assert!(!scene.data_dir().exists());

    let mut scene = Scene::new(good, &tar).await;
    scene.record.manifest_digest = "0".repeat(64);
    let error = scene.restore().await;
    assert!(matches!(error, Error::Corrupt(_)), "{error:?}");
    assert!(!scene.data_dir().exists());
}

#[tokio::test]
async fn an_object_that_is_not_there_is_found_before_anything_is_written() {
    let good: &[(&str, &[u8])] = &[("PG_VERSION", b"15\n")];
    let mut scene = Scene::new(good, &file("PG_VERSION", b"15\n")).await;
    let second = BackupObject { name: "data/000002.tar".into(), ..scene.record.objects[0].clone() };
    scene.record.objects.push(second);
    let error = scene.restore().await;
    assert!(matches!(error, Error::Missing(_)), "{error:?}");
    assert!(error.to_string().contains("data/000002.tar"), "{error}");
    assert!(!scene.data_dir().exists());
}

#[tokio::test]
async fn a_folder_that_is_in_use_is_left_alone() {
    let scene = Scene::new(&[("PG_VERSION", b"15\n")], &file("PG_VERSION", b"15\n")).await;
    fs::create_dir(scene.data_dir()).unwrap();
    fs::write(scene.data_dir().join("precious"), b"x").unwrap();
    let error = scene.restore().await;
    assert!(matches!(error, Error::Invalid(_)), "{error:?}");
    assert_eq!(fs::read_dir(scene.data_dir()).unwrap().count(), 1);
}
