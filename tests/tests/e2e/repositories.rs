//! Several repositories of one cluster: what one cannot give is taken from another, for plans, restores and the
//! server's own recovery.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use serde_json::Value;
use walship_tests::postgres::{PgBinaries, PgServer, StopMode, primary_major};
use walship_tests::process::copy_tree;
use walship_tests::s3_inprocess::{ACCESS_KEY, BUCKET, SECRET_KEY};
use walship_tests::stage::Stage;
use walship_tests::weed::WeedServer;

use super::pitr::find;

/// A cluster in a folder and on S3, both with five rows in a segment each.
struct Scene {
    stage: Stage,
    weed: WeedServer,
    rows: Vec<(String, String)>,
    /// The folder as it was after two rows.
    older: PathBuf,
}

impl Scene {
    fn new() -> Self {
        let stage = Stage::folder("main");
        let weed = WeedServer::start();
        let older = stage.path().join("older");
        let mut scene = Self { stage, weed, rows: Vec::new(), older };
        scene.configure(&[&scene.folder("repository"), &scene.s3()]);
        let mut server = scene.stage.archiving(PgServer::builder(primary_major())).start();
        scene.stage.init(&server);
        server.psql("create table t (id int)");
        scene.stage.backup(&server);
        for id in 1..=5 {
            let xid =
                server.psql(&format!("insert into t values ({id}); select xmin from t where id = {id}"));
            scene.rows.push((xid.trim().to_owned(), server.archive_now()));
            if id == 2 {
                copy_tree(&scene.stage.repository_dir(), &scene.older);
            }
        }
        server.stop(StopMode::Fast);
        scene
    }

    fn folder(&self, name: &str) -> String {
        format!("{:?}", format!("file://{}", self.stage.path().join(name).display()))
    }

    fn s3(&self) -> String {
        format!(
            "{{ url = \"s3://{BUCKET}/walship\", s3 = {{ endpoint = {:?}, access_key_id = {ACCESS_KEY:?}, \
             secret_access_key = {SECRET_KEY:?} }} }}",
            self.weed.endpoint()
        )
    }

    fn configure(&self, repositories: &[&str]) {
        let text = format!(
            "repositories = [{}]\ncluster = \"main\"\nstate_dir = {:?}\n\
             limits = {{ connect_ms = 500, request_ms = 3000, deadline_ms = 4000 }}\n",
            repositories.join(", "),
            self.stage.path().join("state")
        );
        fs::write(self.stage.config(), text).unwrap();
        fs::set_permissions(self.stage.config(), fs::Permissions::from_mode(0o600)).unwrap();
    }

    fn plan(&self, target: &[&str]) -> Value {
        let text = self.stage.ok(self.stage.pitr(&["plan", "--json"]).args(target));
        serde_json::from_str(&text).unwrap()
    }

    /// Restores the latest state, lets the server recover, and returns what was said of the repositories.
    fn restores(&self, name: &str) -> String {
        let dir = self.stage.path().join(name);
        let text = self.stage.ok(self.stage.pitr(&["restore", "--latest", "--json", "-D"]).arg(&dir));
        let said: Value = serde_json::from_str(&text).unwrap();
        let server = self.stage.recovering(&dir).start();
        server.wait_for("select pg_is_in_recovery()", "f");
        assert_eq!(server.psql("select count(*), max(id) from t").trim(), "5|5", "{name}");
        let lists = [&said["plan"]["warnings"], &said["report"]["notes"]];
        let lines = lists.into_iter().flat_map(|list| list.as_array().unwrap());
        lines.map(|line| line.as_str().unwrap()).collect::<Vec<_>>().join("\n")
    }

    fn segment(&self, root: &Path, row: usize) -> PathBuf {
        find(root, &format!("{}.wal", self.rows[row - 1].1)).unwrap()
    }
}

fn flip(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let at = bytes.len() * 2 / 3;
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn one_repository_makes_up_for_what_another_lacks() {
    let mut scene = Scene::new();
    let pristine = scene.stage.path().join("pristine");
    copy_tree(&scene.stage.repository_dir(), &pristine);
    let sound = scene.plan(&["--latest"]);
    assert_eq!(sound["plan"]["warnings"].as_array().unwrap().len(), 0, "{sound:#}");

    // Damaged: a segment's body, a segment's head, one that is gone, and a part of the backup.
    let damaged = scene.stage.repository_dir();
    flip(&scene.segment(&damaged, 1));
    let head = scene.segment(&damaged, 3);
    let mut bytes = fs::read(&head).unwrap();
    bytes[100] ^= 1;
    fs::write(&head, bytes).unwrap();
    fs::remove_file(scene.segment(&damaged, 4)).unwrap();
    flip(&find(&damaged, "000001.tar").unwrap());
    let plan = scene.plan(&["--latest"]);
    assert_eq!(plan["plan"]["last_included"], sound["plan"]["last_included"]);
    assert_eq!(plan["plan"]["chain"], sound["plan"]["chain"]);
    let said = scene.restores("damaged");
    assert!(said.contains("000001.tar") && said.contains("was taken from s3://"), "{said}");
    // A fault of the folder's own is no fault of the files here, also over what is there.
    let object = find(&damaged, "000001.tar").unwrap();
    fs::remove_file(&object).unwrap();
    fs::create_dir(&object).unwrap();
    let over = scene.stage.path().join("damaged");
    fs::remove_file(over.join("base/1/1259")).unwrap();
    let mut restore =
        scene.stage.pitr(&["restore", "--latest", "--delta", "--yes", "--leave-surviving", "-D"]);
    let said = scene.stage.ok(restore.arg(&over));
    assert!(said.contains("000001.tar") && said.contains("was taken from s3://"), "{said}");
    // Alone it is no use.
    scene.configure(&[&scene.folder("repository")]);
    scene.stage.fails(&mut scene.stage.pitr(&["plan", "--latest"]), 3);

    // An older copy comes first: it shortens nothing.
    scene.configure(&[&scene.folder("older"), &scene.s3()]);
    let plan = scene.plan(&["--latest"]);
    assert_eq!(plan["plan"]["last_included"], sound["plan"]["last_included"]);
    assert!(plan["plan"]["warnings"][0].as_str().unwrap().contains("lacks 3 segment(s)"), "{plan:#}");
    scene.restores("older-first");

    // Two that are not whole are whole together, also for the server's own recovery.
    let (left, right) = (scene.stage.path().join("left"), scene.stage.path().join("right"));
    copy_tree(&pristine, &left);
    copy_tree(&pristine, &right);
    fs::remove_file(scene.segment(&left, 2)).unwrap();
    fs::remove_file(scene.segment(&right, 4)).unwrap();
    fs::remove_file(find(&right, "000001.tar").unwrap()).unwrap();
    scene.configure(&[&scene.folder("right"), &scene.folder("left")]);
    scene.restores("combined");
    for alone in ["left", "right"] {
        scene.configure(&[&scene.folder(alone)]);
        let refused = scene.stage.fails(&mut scene.stage.pitr(&["restore", "--latest", "-D", "/nowhere"]), 3);
        assert!(refused.contains("is missing"), "{refused}");
    }

    // One is dead.
    scene.configure(&[&scene.s3(), &scene.folder("pristine")]);
    scene.weed.kill9();
    let plan = scene.plan(&["--latest"]);
    assert_eq!(plan["plan"]["last_included"], sound["plan"]["last_included"]);
    let said = scene.restores("dead-first");
    assert!(said.contains("cannot be read") && said.contains("--without-repo"), "{said}");
    let settings = fs::read_to_string(scene.stage.path().join("dead-first/postgresql.auto.conf")).unwrap();
    assert!(settings.contains("--without-repo"), "{settings}");
}

#[test]
fn drills_and_extracts_read_s3_and_make_up_for_what_a_repository_lacks() {
    let mut scene = Scene::new();
    let pristine = scene.stage.path().join("pristine");
    copy_tree(&scene.stage.repository_dir(), &pristine);
    let damaged = scene.stage.repository_dir();
    fs::remove_file(scene.segment(&damaged, 4)).unwrap();
    flip(&find(&damaged, "000001.tar").unwrap());
    let binaries = PgBinaries::find(primary_major()).server_bin().to_owned();
    let run = |scene: &Scene, words: &[&str]| -> Value {
        let mut command = scene.stage.pitr_as_user(words);
        command.arg("--scratch").arg(scene.stage.path().join("scratch")).arg("--pg-bin").arg(&binaries);
        serde_json::from_str(&scene.stage.ok(command.arg("--json"))).unwrap()
    };
    let both = |scene: &Scene, name: &str| {
        let drill = run(scene, &["drill", "--latest"]);
        assert_eq!(drill["outcome"], "proven", "{name}: {drill:#}");
        assert_eq!(drill["row_counts"][0]["rows"], 5, "{name}: {drill:#}");
        let file = scene.stage.path().join(format!("{name}.sql"));
        let extract =
            run(scene, &["extract", "--table", "public.t", "--latest", "--output", file.to_str().unwrap()]);
        let text = fs::read_to_string(&file).unwrap();
        assert!(text.contains("COPY public.t (id) FROM stdin;\n1\n2\n3\n4\n5\n"), "{name}: {text}");
        assert!(!scene.stage.path().join("scratch").exists(), "{name}");
        [drill, extract].map(|report| report["notes"].to_string())
    };
    // What the folder lacks comes from S3.
    for said in both(&scene, "damaged") {
        assert!(said.contains("000001.tar") && said.contains("was taken from s3://"), "{said}");
    }
    // S3 alone; the records of what was done lie there as well.
    scene.configure(&[&scene.s3()]);
    both(&scene, "s3");
    let history: Value =
        serde_json::from_str(&scene.stage.ok(&mut scene.stage.pitr(&["history", "--json"]))).unwrap();
    let kinds = |kind: &str| {
        history["entries"].as_array().unwrap().iter().filter(|done| done["kind"] == kind).count()
    };
    assert_eq!((kinds("drill"), kinds("extract")), (2, 2), "{history:#}");
    // S3 is dead, and comes first.
    scene.configure(&[&scene.s3(), &scene.folder("pristine")]);
    scene.weed.kill9();
    for said in both(&scene, "dead-first") {
        assert!(said.contains("cannot be read"), "{said}");
    }
}
