//! WAL that the server has removed before it was received: recorded, told, and gone past.

use std::fs;
use std::path::PathBuf;

use walship::pg::{Lsn, SegmentName};
use walship_tests::postgres::{PgServer, majors, newer_major, primary_major};
use walship_tests::proxy::Mode;
use walship_tests::stage::Stage;
use walship_tests::wait;

use super::{Front, Reading, Receiving, names, server};

/// A server with a base backup and a row that are in the repository, and a receiver.
struct Scene {
    stage: Stage,
    server: PgServer,
    front: Front,
    receiving: Receiving,
    /// Of the row that is in the repository.
    xid: String,
}

impl Scene {
    /// `setting` is one that decides how long the server keeps WAL.
    fn new(major: u32, setting: (&str, &str)) -> Self {
        let stage = Stage::folder("main");
        let server = server(major, 1).setting("max_wal_size", "4MB").setting(setting.0, setting.1).start();
        stage.init(&server);
        let front = Front::of(&server);
        let receiving = Receiving::start(&stage, &front.conninfo(), &[]);
        server.wait_for("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'", "1");
        stage.backup(&server);
        server.psql("CREATE TABLE t (n int)");
        let xid = server.psql("INSERT INTO t VALUES (1) RETURNING pg_current_xact_id()");
        let scene = Self { stage, server, front, receiving, xid };
        scene.stored(&scene.server.switch_wal());
        scene
    }

    fn stored(&self, segment: &str) {
        let reading = Reading::of(&self.stage);
        wait::until(&format!("{segment} is stored"), || reading.has(segment));
    }

    fn stop(&mut self) {
        assert!(self.receiving.terminate().success(), "{}", self.receiving.said());
        self.server.wait_for("SELECT active FROM pg_replication_slots", "f");
    }

    fn start(&mut self) {
        self.receiving = Receiving::start(&self.stage, &self.front.conninfo(), &[]);
    }

    /// Writes WAL that the server forgets at once where no slot forbids it; returns the first such segment.
    fn write_and_forget(&self) -> String {
        self.server.psql("INSERT INTO t VALUES (2)");
        self.forget()
    }

    fn forget(&self) -> String {
        let first = self.server.switch_wal();
        for _ in 0..12 {
            self.server.switch_wal();
            self.server.psql("CHECKPOINT");
        }
        assert!(!self.server.data_dir().join("pg_wal").join(&first).exists(), "{first} is still there");
        first
    }

    fn ledger(&self) -> Vec<PathBuf> {
        let folder = self.stage.repository_dir().join("main/0001/gaps/00000001");
        if !folder.exists() {
            return Vec::new();
        }
        names(&folder).into_iter().map(|name| folder.join(name)).collect()
    }

    fn plan(&self, words: &[&str], status: i32) -> serde_json::Value {
        let output = self.stage.run(self.stage.pitr(&["plan", "--json"]).args(words));
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(status), "{text}");
        serde_json::from_str(&text).unwrap()
    }

    /// The loss from `first` on is told and recorded, and everything goes on behind it.
    fn is_told_and_gone_past(&mut self, first: &str) {
        wait::until("the loss is told", || self.receiving.said().contains("error: WAL is lost: "));
        let said = self.receiving.said();
        assert!(said.contains("\nnext:  No target inside of it can be reached"), "{said}");
        assert!(said.contains("take a new base backup now"), "{said}");

        // What is recorded begins where the archive ends and ends where WAL is stored again, no byte later.
        let ledger = self.ledger();
        assert_eq!(ledger.len(), 1, "{ledger:?}");
        let record: serde_json::Value = serde_json::from_slice(&fs::read(&ledger[0]).unwrap()).unwrap();
        assert_eq!(record["cause"]["kind"], "lost", "{record}");
        let position = |name: &str| record[name].as_str().unwrap().parse::<Lsn>().unwrap();
        let name: SegmentName = first.parse().unwrap();
        let size = walship::pg::SegmentSize::MIN;
        // What of its first segment was shipped in parts is not lost.
        let start = position("start_lsn");
        assert!(name.start(size) <= start && start < name.end(size), "{record}");
        let last = self.server.switch_wal();
        self.stored(&last);
        let after = SegmentName::containing(name.timeline, position("end_lsn"), size);
        self.stored(&after.to_string());

        // Readers know.
        let info = self.stage.ok(&mut self.stage.pitr(&["info"]));
        assert!(info.contains("had removed it before it was received"), "{info}");
        let refusal = self.plan(&["--latest"], 3)["refusal"].clone();
        assert_eq!(
            (&refusal["kind"], &refusal["gap"]["first_missing"]),
            (&"gap".into(), &first.into()),
            "{refusal}"
        );
        self.plan(&["--to-xid", &self.xid.clone()], 0);

        // A new base backup opens a new window.
        self.stage.backup(&self.server);
        let xid = self.server.psql("INSERT INTO t VALUES (3) RETURNING pg_current_xact_id()");
        self.stored(&self.server.switch_wal());
        self.plan(&["--to-xid", &xid], 0);

        // Another start has nothing to add.
        self.stop();
        self.start();
        self.stored(&self.server.switch_wal());
        assert_eq!(self.ledger().len(), 1);
        assert!(!self.receiving.said().contains("WAL is lost"), "{}", self.receiving.said());
    }
}

#[test]
fn a_slot_that_is_gone_costs_what_the_server_has_removed() {
    let mut scene = Scene::new(primary_major(), ("wal_keep_size", "0"));
    scene.stop();
    scene.server.psql("SELECT pg_drop_replication_slot('walship')");
    let first = scene.write_and_forget();
    scene.start();
    scene.is_told_and_gone_past(&first);
    // And it comes back as it was taken.
    let data = scene.stage.path().join("restored");
    scene.stage.ok(scene.stage.pitr(&["restore", "--latest", "-D"]).arg(&data));
    let restored = scene.stage.recovering(&data).start();
    restored.wait_for("SELECT pg_is_in_recovery()", "f");
    assert_eq!(restored.psql("SELECT string_agg(n::text, ',' ORDER BY n) FROM t"), "1,2,3");
}

#[test]
fn a_slot_that_exceeds_its_limit_costs_what_the_server_has_removed() {
    // Whether the server tells of the slot to a replication connection, or in SQL only, depends on its release.
    for major in majors() {
        exceeded_limit(major);
    }
}

fn exceeded_limit(major: u32) {
    let mut scene = Scene::new(major, ("max_slot_wal_keep_size", "2MB"));
    wait::until("the limit is looked at", || {
        scene.receiving.said().contains("max_slot_wal_keep_size is 2 MiB, less than max_wal_size (4 MiB)")
    });
    // Nothing comes through for a while.
    scene.front.0.set(Mode::BlackHole);
    let first = scene.write_and_forget();
    scene.server.wait_for("SELECT wal_status FROM pg_replication_slots", "lost");
    scene.front.0.set(Mode::Pass);
    wait::until("the slot is made anew", || scene.receiving.said().contains("it is made anew"));
    wait::until("the loss is told", || scene.receiving.said().contains("error: WAL is lost: "));
    let told = &scene.ledger()[0];
    let told: serde_json::Value = serde_json::from_slice(&fs::read(told).unwrap()).unwrap();
    // The first of it may have come through.
    let start: Lsn = told["start_lsn"].as_str().unwrap().parse().unwrap();
    let first: SegmentName = first.parse().unwrap();
    let size = walship::pg::SegmentSize::MIN;
    assert!(start >= first.start(size), "{told}");
    let first = SegmentName::containing(first.timeline, start, size).to_string();
    scene.is_told_and_gone_past(&first);
}

#[test]
fn a_slot_that_was_made_anew_further_on_costs_what_the_server_has_removed() {
    let mut scene = Scene::new(primary_major(), ("wal_keep_size", "0"));
    scene.stop();
    scene.server.psql("SELECT pg_drop_replication_slot('walship')");
    let first = scene.write_and_forget();
    scene.server.psql("SELECT pg_create_physical_replication_slot('walship', true)");
    scene.server.switch_wal();
    scene.start();
    scene.is_told_and_gone_past(&first);
}

#[test]
fn a_slot_that_is_gone_costs_nothing_while_the_wal_is_there() {
    let mut scene = Scene::new(primary_major(), ("wal_keep_size", "1GB"));
    scene.stop();
    scene.server.psql("SELECT pg_drop_replication_slot('walship')");
    let written: Vec<String> = (0..3).map(|_| scene.server.switch_wal()).collect();
    scene.start();
    written.iter().for_each(|segment| scene.stored(segment));
    assert!(scene.ledger().is_empty());
    assert!(!scene.receiving.said().contains("lost"), "{}", scene.receiving.said());
}

#[test]
fn a_commit_that_was_shipped_before_the_loss_comes_back() {
    let mut scene = Scene::new(newer_major(), ("wal_keep_size", "0"));
    // In the segment of which the rest is lost: acknowledged, and in parts alone.
    let shipped = scene.server.psql("INSERT INTO t VALUES (20) RETURNING pg_current_xact_id()");
    let next = scene.server.psql("INSERT INTO t VALUES (21) RETURNING pg_current_xact_id()");
    scene.receiving.wait_durable(scene.server.psql("SELECT pg_current_wal_flush_lsn()").parse().unwrap());
    scene.receiving.kill9();
    scene.server.wait_for("SELECT active FROM pg_replication_slots", "f");
    scene.server.psql("SELECT pg_drop_replication_slot('walship')");
    let lost = scene.server.psql("INSERT INTO t VALUES (22) RETURNING pg_current_xact_id()");
    let first = scene.forget();
    scene.start();
    wait::until("the loss is told", || scene.receiving.said().contains("error: WAL is lost: "));
    scene.stored(&scene.server.switch_wal());

    // The plan says what it rests on, and what is behind it.
    let plan = scene.plan(&["--to-xid", &next], 0)["plan"].clone();
    let tail = &plan["tail"];
    assert_eq!(tail["segment"], *first, "{plan:#}");
    assert_eq!(plan["last_included"]["xid"].to_string(), next, "{plan:#}");
    assert_eq!(plan["gap_behind"]["from"], tail["until_lsn"], "{plan:#}");
    let record: serde_json::Value = serde_json::from_slice(&fs::read(&scene.ledger()[0]).unwrap()).unwrap();
    assert_eq!(record["start_lsn"], tail["lost_from"], "{record}");
    for words in [&["--latest"][..], &["--to-xid", &lost]] {
        let refusal = scene.plan(words, 3)["refusal"].clone();
        assert_eq!(refusal["kind"], "gap", "{refusal}");
        // It offers the last commit before the loss.
        assert!(refusal["before"]["what"].as_str().unwrap().contains(&next), "{refusal}");
    }
    let info: serde_json::Value =
        serde_json::from_str(&scene.stage.ok(&mut scene.stage.pitr(&["info", "--json"]))).unwrap();
    let timeline = &info["timelines"][0];
    assert_eq!(timeline["stranded"][0], *tail, "{info:#}");
    assert_eq!(timeline["windows"][0]["until_lsn"], tail["until_lsn"], "{info:#}");
    assert_eq!(timeline["windows"][0]["latest_transaction"]["xid"].to_string(), next, "{info:#}");
    let text = scene.stage.ok(&mut scene.stage.pitr(&["info"]));
    assert!(text.contains(&format!("parts    {first} to ")), "{text}");

    // A server recovers there, to the transaction.
    for (name, words, rows) in [
        ("inclusive", vec!["--to-xid", &next], "1,20,21"),
        ("exclusive", vec!["--before-xid", &next], "1,20"),
        ("first", vec!["--to-xid", &shipped], "1,20"),
    ] {
        let data = scene.stage.path().join(name);
        scene.stage.ok(scene.stage.pitr(&["restore"]).args(&words).arg("-D").arg(&data));
        let restored = scene.stage.recovering(&data).start();
        restored.wait_for("SELECT pg_is_in_recovery()", "f");
        assert_eq!(restored.psql("SELECT string_agg(n::text, ',' ORDER BY n) FROM t"), rows, "{words:?}");
    }

    // Without its target that recovery gets nothing: it would end early, and be promoted.
    let data = scene.stage.path().join("without");
    scene.stage.ok(scene.stage.pitr(&["restore", "--to-xid", &next, "-D"]).arg(&data));
    let settings = data.join("postgresql.auto.conf");
    let text = fs::read_to_string(&settings).unwrap();
    assert!(text.contains("--up-to-gap"), "{text}");
    fs::write(
        &settings,
        text.replace(&format!("recovery_target_xid = '{next}'"), "recovery_target_xid = ''"),
    )
    .unwrap();
    let mut server = scene.stage.recovering(&data).prepare();
    server.launch();
    assert!(!server.wait_for_exit().success());
    let log = server.log();
    assert!(log.contains("this recovery has no target before that"), "{log}");
    assert!(!log.contains("archive recovery complete"), "{log}");
}

/// A server (18 or later) that has invalidated the slot of a receiver which was away for too long.
fn idle_for_too_long(keep: &str) -> Scene {
    let major = newer_major();
    assert!(major >= 18, "idle_replication_slot_timeout needs PostgreSQL 18, not {major}");
    let mut scene = Scene::new(major, ("wal_keep_size", keep));
    let set = |value: &str| {
        scene.server.psql(&format!("ALTER SYSTEM SET idle_replication_slot_timeout = '{value}'"));
        scene.server.psql("SELECT pg_reload_conf()");
    };
    set("1s");
    scene.receiving.kill9();
    wait::until("the slot is invalidated", || {
        scene.server.psql("CHECKPOINT");
        scene.server.psql("SELECT invalidation_reason FROM pg_replication_slots") == "idle_timeout"
    });
    set("0");
    // It shows a position all the same.
    let shown = scene.server.psql("SELECT wal_status, restart_lsn IS NOT NULL FROM pg_replication_slots");
    assert_eq!(shown, "lost|t");
    let checked = scene.stage.run(&mut scene.stage.walship_on(&scene.server, &["check"]));
    let checked = String::from_utf8_lossy(&checked.stdout).into_owned();
    assert!(checked.contains("was invalidated by the server"), "{checked}");
    scene
}

#[test]
fn a_slot_that_was_idle_for_too_long_costs_nothing_while_the_wal_is_there() {
    let mut scene = idle_for_too_long("1GB");
    // The receiver may stream, and ask nothing in SQL: it goes by what the server says.
    let hba = scene.server.data_dir().join("pg_hba.conf");
    let lines = "host replication all 127.0.0.1/32 trust\nhost all all 127.0.0.1/32 reject\n";
    fs::write(&hba, format!("{lines}{}", fs::read_to_string(&hba).unwrap())).unwrap();
    scene.server.psql("SELECT pg_reload_conf()");
    let written: Vec<String> = (0..3).map(|_| scene.server.switch_wal()).collect();
    scene.start();
    written.iter().for_each(|segment| scene.stored(segment));
    let said = scene.receiving.said();
    assert!(said.contains("error: ") && said.contains("cannot be used any more"), "{said}");
    assert!(said.contains("\nsafe:  what is stored is unchanged"), "{said}");
    assert!(said.contains("\nnext:  Nothing now: the slot is made anew"), "{said}");
    assert!(said.contains("idle_replication_slot_timeout longer than"), "{said}");
    assert!(said.contains("was invalidated by the server and holds no WAL back; it is made anew"), "{said}");
    assert!(!said.contains("is lost") && scene.ledger().is_empty(), "{said}");
    let slot = scene.server.psql("SELECT active, wal_status, invalidation_reason FROM pg_replication_slots");
    assert_eq!(slot, "t|reserved|");
}

#[test]
fn a_slot_that_was_idle_for_too_long_costs_what_the_server_has_removed() {
    let mut scene = idle_for_too_long("0");
    let first = scene.write_and_forget();
    scene.start();
    scene.is_told_and_gone_past(&first);
}
