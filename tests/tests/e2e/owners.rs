//! What root writes into a folder repository belongs to the owner of its root folder: one command with `sudo` too much
//! locks the user of the archiver out of nothing.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use bytes::Bytes;
use walship::catalog::BackupRecord;
use walship::storage::fs::FsStorage;
use walship::storage::{ObjectKey, PutOutcome, Storage as _};
use walship_tests::bins;
use walship_tests::postgres::{PgServer, majors};
use walship_tests::stage::Stage;

use crate::receive::Receiving;

/// A user and a group that nobody else is here.
const OWNER: (u32, u32) = (4711, 4712);

/// Whether this can be tried: nobody but root gives files away.
fn is_root(test: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("{test} was not tried: it needs root");
    }
    root
}

/// Everything below a folder, and the folder, that does not belong to [`OWNER`].
fn others(below: &Path) -> Vec<PathBuf> {
    let (mut found, mut left) = (Vec::new(), vec![below.to_owned()]);
    while let Some(path) = left.pop() {
        let metadata = path.symlink_metadata().unwrap();
        if (metadata.uid(), metadata.gid()) != OWNER {
            found.push(path.clone());
        }
        if metadata.is_dir() {
            left.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
    }
    found
}

fn give(path: &Path, (user, group): (u32, u32)) {
    chown(path, Some(user), Some(group)).unwrap();
}

/// A program as the repository's owner.
fn as_owner(stage: &Stage, program: &Path, args: &[&str]) -> Command {
    let mut command = stage.command(Path::new("setpriv"));
    command.arg(format!("--reuid={}", OWNER.0)).arg(format!("--regid={}", OWNER.1));
    command.args(["--clear-groups", "--"]).arg(program).args(args);
    command
}

#[tokio::test]
async fn folders_and_objects_are_given_and_a_folder_that_a_crash_left_too() {
    if !is_root("giving files away") {
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let root = home.path().join("repository");
    fs::create_dir(&root).unwrap();
    give(&root, OWNER);
    let storage = FsStorage::create_root(&root).unwrap();
    let key = |text: &str| ObjectKey::new(text).unwrap();
    // Killed between the two, root leaves a folder of its own.
    fs::create_dir(root.join("main")).unwrap();
    let object = Bytes::from_static(b"object");
    assert_eq!(
        storage.put_if_absent(&key("main/0001/a"), object.clone().into()).await.unwrap(),
        PutOutcome::Stored
    );
    let mut upload = storage.start_upload(&key("main/0001/deep/er/b")).await.unwrap();
    upload.write(object.clone()).await.unwrap();
    assert_eq!(others(&root), Vec::<PathBuf>::new(), "not even while it is written");
    upload.finish().await.unwrap();
    assert_eq!(others(&root), Vec::<PathBuf>::new());
    let mode = |below: &str| fs::metadata(root.join(below)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("main/0001/deep"), mode("main/0001/deep/er/b")), (0o750, 0o640));

    // What is another user's stays that user's, and root's own repository root's.
    give(&root.join("main"), (4713, 4713));
    storage.put_if_absent(&key("main/0001/c"), object.clone().into()).await.unwrap();
    assert_eq!(others(&root), [root.join("main")]);
    let own = home.path().join("own");
    let storage = FsStorage::create_root(&own).unwrap();
    storage.put_if_absent(&key("main/a"), object.into()).await.unwrap();
    assert_eq!(fs::metadata(own.join("main/a")).unwrap().uid(), 0);
}

#[test]
fn what_cannot_be_given_is_refused_and_leaves_nothing() {
    if !is_root("giving files away") {
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let root = home.path().join("repository");
    fs::create_dir(&root).unwrap();
    give(&root, OWNER);
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let now = chrono::Utc::now();
        let storage = std::sync::Arc::new(FsStorage::create_root(&root).unwrap());
        let repository = walship::repository::Repository::create(storage, now).await.unwrap();
        let cluster = repository.create_cluster(&"main".parse().unwrap(), now).await.unwrap();
        cluster.register_lineage(42, walship::pg::SegmentSize::DEFAULT, 15, now).await.unwrap();
    });
    // As in a container without CAP_CHOWN.
    let mut check = Command::new("setpriv");
    check.args(["--bounding-set=-chown", "--inh-caps=-chown", "--"]).arg(bins::walship());
    check.args(["check", "--offline", "--cluster", "main", "--repo"]).arg(&root).env_clear();
    let output = check.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("cannot give to the owner of the repository's folder"), "{said}");
    assert!(said.contains("Run it as the user that the repository's folder belongs to."), "{said}");
    assert_eq!(others(&root), Vec::<PathBuf>::new());
}

#[test]
fn commands_that_root_ran_lock_the_owner_out_of_nothing() {
    if !is_root("commands as root") {
        return;
    }
    for major in majors() {
        let stage = Stage::folder("main");
        fs::set_permissions(stage.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir(stage.repository_dir()).unwrap();
        give(&stage.repository_dir(), OWNER);
        give(&stage.config(), OWNER);
        let stage = stage.with_agent("off");
        let server = PgServer::builder(major).setting("wal_level", "replica").start();
        stage.init(&server);
        let mut receiving = Receiving::start(&stage, &server.socket_conninfo(), &[]);
        server.psql("CREATE TABLE t AS SELECT g FROM generate_series(1, 1000) g");
        stage.ok(&mut stage.walship_on(&server, &["backup", "--source", "local"]));
        let record = stage.ok(&mut stage.walship_on(&server, &["backup", "--json"]));
        let id = serde_json::from_str::<BackupRecord>(&record).unwrap().id;
        stage.ok(&mut stage.pitr(&["hold", &id, "--reason", "audit"]));
        stage.ok(stage.pitr(&["restore", "--immediate", "-D"]).arg(stage.path().join("restored")));
        assert_eq!(others(&stage.repository_dir()), Vec::<PathBuf>::new(), "{major}");

        let pitr = |args: &[&str]| as_owner(&stage, &bins::pitr(), args);
        stage.ok(&mut pitr(&["info"]));
        stage.ok(&mut pitr(&["plan", "--immediate"]));
        stage.ok(&mut pitr(&["expire", "--keep-last", "1"]));
        stage.ok(&mut as_owner(&stage, &bins::walship(), &["backup", &server.uri()]));
        assert!(receiving.terminate().success(), "{}", receiving.said());
        assert_eq!(others(&stage.repository_dir()), Vec::<PathBuf>::new(), "{major}");

        // What an earlier version, or another program, has left is told with the way out.
        let folder = stage.repository_dir().join("main/0001/backups").join(&id);
        give(&folder, (0, 0));
        let said = stage.fails(&mut pitr(&["info"]), 1);
        let mend = format!("chown -R --reference={0} {0}", stage.repository_dir().display());
        assert!(said.contains("Permission denied") && said.contains(&mend), "{said}");
        stage.ok(stage.command(Path::new("sh")).args(["-c", &mend]));
        assert_eq!(others(&stage.repository_dir()), Vec::<PathBuf>::new());
    }
}
