//! Folder repositories on file systems that fail: missing, read-only, full, with links and pipes in them.

use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use walship::error::{Error, Result};
use walship::storage::fs::FsStorage;
use walship::storage::{ObjectKey, PutBody, PutOutcome, Storage, list_all};
use walship_tests::process::{self, RunOptions};
use walship_tests::tmpfs::Tmpfs;

fn key(text: &str) -> ObjectKey {
    ObjectKey::new(text).unwrap()
}

fn body(length: usize) -> PutBody {
    vec![7; length].into()
}

fn entries(folder: &Path) -> usize {
    std::fs::read_dir(folder).unwrap().count()
}

#[tokio::test]
async fn a_full_disk_is_named_and_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let mount = Tmpfs::mount(&folder.path().join("disk"), "size=2m");
    let storage = FsStorage::create_root(mount.path()).unwrap();
    assert_eq!(storage.put_if_absent(&key("small"), body(1000)).await.unwrap(), PutOutcome::Stored);

    let error = storage.put_if_absent(&key("a/large"), body(3 << 20)).await.unwrap_err();
    assert!(matches!(error, Error::LocalIo(_)), "{error}");
    assert!(error.to_string().contains("No space left on device"), "{error}");
    assert!(error.next().contains("Free space"), "{}", error.report());
    assert_eq!(entries(&mount.path().join("tmp")), 0, "the temporary is removed");
    assert_eq!(storage.get(&key("a/large"), 1 << 30).await.unwrap(), None);

    let mut upload = storage.start_upload(&key("b")).await.unwrap();
    let mut result = Ok(());
    for _ in 0..4 {
        result = upload.write(Bytes::from(vec![1; 1 << 20])).await;
        if result.is_err() {
            break;
        }
    }
    assert!(matches!(result, Err(Error::LocalIo(_))), "{result:?}");
    assert!(upload.write(Bytes::from_static(b"more")).await.is_err(), "a broken upload stays broken");
    assert!(upload.finish().await.is_err());
    assert_eq!(entries(&mount.path().join("tmp")), 0);
    // With the space back, everything goes on.
    mount.remount("size=8m");
    assert_eq!(storage.put_if_absent(&key("a/large"), body(3 << 20)).await.unwrap(), PutOutcome::Stored);
}

#[tokio::test]
async fn a_read_only_file_system_refuses_writes_and_serves_reads() {
    let folder = tempfile::tempdir().unwrap();
    let mount = Tmpfs::mount(&folder.path().join("disk"), "size=2m");
    let storage = FsStorage::create_root(mount.path()).unwrap();
    storage.put_if_absent(&key("a/b"), body(1000)).await.unwrap();
    mount.remount("ro");
    let error = storage.put_if_absent(&key("a/c"), body(1)).await.unwrap_err();
    assert!(matches!(error, Error::Denied(_)) && error.to_string().contains("Read-only"), "{error}");
    assert_eq!(storage.put_if_absent(&key("a/b"), body(1)).await.unwrap(), PutOutcome::Exists);
    assert_eq!(storage.get(&key("a/b"), 1000).await.unwrap().unwrap().len(), 1000);
    assert_eq!(storage.get(&key("a/c"), 1000).await.unwrap(), None);
    assert!(storage.confirm(&key("a/b")).await.unwrap().is_some());
    assert_eq!(list_all(&storage, "", 10).await.unwrap().len(), 1);
}

#[tokio::test]
async fn an_unmounted_root_is_an_outage_and_never_absence() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path().join("disk");
    let mount = Tmpfs::mount(&at, "size=2m");
    let storage = FsStorage::create_root(&at).unwrap();
    storage.put_if_absent(&key("a/b"), body(1000)).await.unwrap();
    drop(mount);
    assert_eq!(entries(&at), 0, "the mount point is an empty folder now");
    all_unavailable(&storage).await;
    assert_eq!(entries(&at), 0, "nothing is written into the mount point");
    // A process that starts now finds an empty folder: it must not write into that either.
    let late = FsStorage::open(&at).unwrap();
    let error = late.put_if_absent(&key("a/c"), body(1)).await.unwrap_err();
    assert!(error.is_transient() && error.to_string().contains("mounted"), "{error}");
    assert_eq!(entries(&at), 0);
    std::fs::remove_dir(&at).unwrap();
    all_unavailable(&storage).await;
    assert!(matches!(FsStorage::open(&at), Err(Error::Unavailable(_))));
}

async fn all_unavailable(storage: &FsStorage) {
    let results: [Result<()>; 7] = [
        storage.get(&key("a/b"), 1000).await.map(drop),
        storage.get(&key("none"), 1000).await.map(drop),
        storage.get_range(&key("a/b"), 0, 1).await.map(drop),
        storage.confirm(&key("a/b")).await.map(drop),
        storage.list("", None).await.map(drop),
        storage.put_if_absent(&key("a/c"), body(1)).await.map(drop),
        storage.start_upload(&key("a/d")).await.map(drop),
    ];
    for result in results {
        let error = result.unwrap_err();
        assert!(
            matches!(error, Error::Unavailable(_)) && error.to_string().contains("is it mounted?"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn no_link_below_the_root_is_followed() {
    let folder = tempfile::tempdir().unwrap();
    let (root, outside) = (folder.path().join("repository"), folder.path().join("outside"));
    let storage = FsStorage::create_root(&root).unwrap();
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("secret"), b"not for the repository").unwrap();
    symlink(&outside, root.join("folder")).unwrap();
    std::fs::create_dir(root.join("a")).unwrap();
    symlink(outside.join("secret"), root.join("a/file")).unwrap();
    symlink("/nonexistent", root.join("a/dangling")).unwrap();
    for name in ["folder/secret", "a/file", "a/dangling", "folder/new", "folder/deep/er"] {
        for result in [
            storage.get(&key(name), 1000).await.map(drop),
            storage.get_range(&key(name), 0, 10).await.map(drop),
            storage.confirm(&key(name)).await.map(drop),
        ] {
            let error = result.unwrap_err();
            assert!(matches!(error, Error::Denied(_)), "{name}: {error}");
            assert!(error.to_string().contains("symbolic link"), "{name}: {error}");
        }
    }
    assert!(storage.put_if_absent(&key("folder/new"), body(1)).await.is_err());
    assert!(storage.delete(&key("folder/secret")).await.is_err());
    assert_eq!(storage.put_if_absent(&key("a/dangling"), body(1)).await.unwrap(), PutOutcome::Exists);
    assert_eq!(entries(&outside), 1, "nothing was written outside");
    assert!(storage.list("a/", None).await.is_err(), "a link in a listing is an error");
    assert!(storage.list("folder", None).await.is_err());

    // The folder of temporaries may be no link either; the root itself may be one.
    std::fs::remove_dir(root.join("tmp")).unwrap();
    symlink(&outside, root.join("tmp")).unwrap();
    assert!(FsStorage::open(&root).unwrap().put_if_absent(&key("b"), body(1)).await.is_err());
    let linked = folder.path().join("linked");
    let real = folder.path().join("real");
    FsStorage::create_root(&real).unwrap();
    symlink(&real, &linked).unwrap();
    let storage = FsStorage::open(&linked).unwrap();
    assert_eq!(storage.put_if_absent(&key("b"), body(1)).await.unwrap(), PutOutcome::Stored);
    assert!(real.join("b").is_file());
}

#[tokio::test]
async fn what_is_no_file_is_an_error_and_foreign_names_are_not_listed() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("repository");
    let storage = FsStorage::create_root(&root).unwrap();
    storage.put_if_absent(&key("a/b"), body(10)).await.unwrap();
    process::run_ok(Command::new("mkfifo").arg(root.join("a/pipe")));
    for name in ["a", "a/pipe", "a/b/c"] {
        let error = storage.get(&key(name), 1000).await.unwrap_err();
        assert!(matches!(error, Error::LocalIo(_)), "{name}: {error}");
    }
    assert!(storage.put_if_absent(&key("a/b/c"), body(1)).await.is_err());
    assert!(storage.list("", None).await.is_err(), "a pipe");
    std::fs::remove_file(root.join("a/pipe")).unwrap();
    std::fs::create_dir(root.join("lost+found")).unwrap();
    std::fs::write(root.join("a/na me"), b"x").unwrap();
    let keys: Vec<String> =
        list_all(&storage, "", 10).await.unwrap().iter().map(|o| o.key.to_string()).collect();
    assert_eq!(keys, ["a/b"]);
    for name in ["tmp", "tmp/x", "tmp/put-0123456789abcdef.tmp"] {
        assert!(matches!(storage.put_if_absent(&key(name), body(1)).await, Err(Error::Invalid(_))), "{name}");
        assert!(matches!(storage.get(&key(name), 1).await, Err(Error::Invalid(_))), "{name}");
    }
}

#[tokio::test]
async fn stale_temporaries_are_tidied_and_others_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("repository");
    FsStorage::create_root(&root).unwrap();
    let make = |name: &str, age: Duration| {
        let path = root.join("tmp").join(name);
        let file = std::fs::File::create(&path).unwrap();
        file.set_modified(SystemTime::now() - age).unwrap();
        path
    };
    let day = Duration::from_secs(24 * 3600);
    let stale = make("put-0123456789abcdef.tmp", 2 * day);
    let fresh = make("put-0123456789abcde0.tmp", day / 2);
    let foreign = make("somebody-elses", 20 * day);
    FsStorage::open(&root).unwrap().put_if_absent(&key("a"), body(1)).await.unwrap();
    assert!(!stale.exists() && fresh.exists() && foreign.exists());
}

#[tokio::test]
async fn a_root_is_made_durably_or_the_reason_is_given() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("repository");
    FsStorage::create_root(&root).unwrap();
    FsStorage::create_root(&root).unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&root), mode(&root.join("tmp"))), (0o750, 0o750));
    let storage = FsStorage::open(&root).unwrap();
    storage.put_if_absent(&key("a/b"), body(1)).await.unwrap();
    assert_eq!((mode(&root.join("a")), mode(&root.join("a/b"))), (0o750, 0o640));

    let error = FsStorage::create_root(&folder.path().join("no/such")).unwrap_err();
    assert!(error.next().contains("Make the folder"), "{}", error.report());
    std::fs::write(folder.path().join("file"), b"").unwrap();
    assert!(FsStorage::create_root(&folder.path().join("file")).is_err());
    assert!(FsStorage::open(&folder.path().join("file")).is_err());
}

/// Runs `walship check --offline` on the repository in `root` while some system calls fail.
fn check_with_failing(root: &Path, injected: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-o", "/dev/null", "-e", "trace=linkat,renameat2"]);
    for inject in injected {
        command.args(["-e", &format!("inject={inject}")]);
    }
    command.arg(walship_tests::bins::walship()).args(["check", "--offline", "--cluster", "main", "--repo"]);
    let output = process::run(command.arg(root).env_clear(), RunOptions::default());
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    (output.status.code(), text.into_owned())
}

/// What vfat (EPERM) and other file systems without hard links answer; the probe is sixteen writers at
/// once, of which one must win, whichever call names the file.
#[test]
fn without_hard_links_a_rename_that_replaces_nothing_is_used_or_the_folder_refused() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("repository");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let now = chrono::Utc::now();
        let storage = std::sync::Arc::new(FsStorage::create_root(&root).unwrap());
        let repository = walship::repository::Repository::create(storage, now).await.unwrap();
        let cluster = repository.create_cluster(&"main".parse().unwrap(), now).await.unwrap();
        cluster.register_lineage(42, walship::pg::SegmentSize::DEFAULT, 15, now).await.unwrap();
    });
    for errno in ["EPERM", "EOPNOTSUPP", "ENOSYS", "EMLINK", "EINVAL"] {
        let (status, text) = check_with_failing(&root, &[&format!("linkat:error={errno}")]);
        assert_eq!(status, Some(0), "{errno}: {text}");
        assert!(text.contains("was tried: conditional writes"), "{errno}: {text}");
        assert_eq!(entries(&root.join("tmp")), 0, "{errno}: nothing is left behind");
    }
    for errno in ["EINVAL", "ENOSYS", "EOPNOTSUPP"] {
        let injected = ["linkat:error=EPERM", &format!("renameat2:error={errno}")];
        let (status, text) = check_with_failing(&root, &injected);
        assert_eq!(status, Some(1), "{errno}: {text}");
        assert!(text.contains("neither hard links nor a rename that replaces nothing"), "{errno}: {text}");
        assert!(text.contains("Keep the repository on another file system"), "{errno}: {text}");
        assert_eq!(entries(&root.join("tmp")), 0, "{errno}: nothing is left behind");
    }
    // Any other failure of the link is told as it is, and no rename is tried.
    let (status, text) = check_with_failing(&root, &["linkat:error=ENOSPC"]);
    assert_eq!(status, Some(1), "{text}");
    assert!(text.contains("cannot link") && text.contains("No space left"), "{text}");
}
