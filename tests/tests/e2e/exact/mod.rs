//! The planner against PostgreSQL itself: random targets of every kind in a random history, each planned,
//! restored and recovered; what the server ends with is compared with what the plan said.
//!
//! A plan is right when the server ends on the planned timeline at the planned position, with the planned
//! last transaction, the rows that `pg_waldump` puts before it, and the planned prepared transactions. A
//! refusal is right when a server that is given the target all the same refuses as well, or would have
//! ended with commits from after the target. Forty targets; more than three hundred with
//! `WALSHIP_CAMPAIGN=1`. Everything random comes from `WALSHIP_SEED`.

pub(crate) mod history;

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use serde_json::Value;
use walship::pg::Lsn;
use walship_tests::postgres::{self, PgBinaries, PgServer};
use walship_tests::process::copy_tree;
use walship_tests::random::Random;
use walship_tests::wait::PATIENCE;
use walship_tests::{note, seed};

use history::{Ending, History, NAMES, fork_of};

#[test]
fn what_is_planned_is_what_postgresql_does() {
    compare(postgres::primary_major(), Ending::Archived, if walship_tests::campaign() { 160 } else { 20 });
}

#[test]
fn what_is_planned_is_what_a_newer_major_does() {
    compare(postgres::newer_major(), Ending::Archived, if walship_tests::campaign() { 160 } else { 20 });
}

#[test]
fn what_is_planned_in_the_open_segment_is_what_postgresql_does() {
    compare(postgres::primary_major(), Ending::Shipped, if walship_tests::campaign() { 160 } else { 20 });
}

#[test]
fn what_is_planned_in_the_open_segment_is_what_a_newer_major_does() {
    compare(postgres::newer_major(), Ending::Shipped, if walship_tests::campaign() { 160 } else { 20 });
}

/// What was asked for, as options of `pitr` and as settings of PostgreSQL.
#[derive(Debug, Clone)]
struct Asked {
    options: Vec<String>,
    settings: Vec<(&'static str, String)>,
    /// Of a time: in microseconds since 1970.
    time: Option<i64>,
    exclusive: bool,
    timeline: Option<u32>,
    backup: Option<String>,
}

impl fmt::Display for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.options.join(" "))
    }
}

/// Compares `count` targets on one major.
fn compare(major: u32, ending: Ending, count: usize) {
    assert!(
        PgBinaries::find(major).has_waldump(),
        "this comparison needs the pg_waldump of PostgreSQL {major}"
    );
    let seed = seed();
    println!("exact plans, PostgreSQL {major}: WALSHIP_SEED={seed}");
    let mut random = Random::new(seed ^ u64::from(major));
    let history = History::make(major, ending, &mut random);
    let targets: Vec<Asked> = (0..count).map(|_| draw(&history, &mut random)).collect();
    let next = AtomicUsize::new(0);
    let [reached, refused, stricter, different] = [const { AtomicUsize::new(0) }; 4];
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(asked) = targets.get(next.fetch_add(1, Ordering::Relaxed)) {
                    // Every difference is looked for: they seldom come alone.
                    let checked = catch_unwind(AssertUnwindSafe(|| check(&history, asked)));
                    let counter = match checked {
                        Ok(Verdict::Reached) => &reached,
                        Ok(Verdict::Refused) => &refused,
                        Ok(Verdict::Stricter) => &stricter,
                        Err(_) => &different,
                    };
                    counter.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    let (reached, refused, stricter) = (reached.into_inner(), refused.into_inner(), stricter.into_inner());
    assert_eq!(different.into_inner(), 0, "differences in {count} targets; each is told above");
    note(&format!(
        "exact plans, {ending:?}, PostgreSQL {major}, seed {seed}: {count} random targets in {} records of two timelines; \
         {reached} reached as planned, {refused} refused by both, {stricter} refused by the plan because the server \
         would have ended with later commits; no difference",
        history.records.values().map(Vec::len).sum::<usize>(),
    ));
    assert!(reached > count / 4 && refused > 0, "{reached} reached, {refused} refused");
}

/// Draws a target.
fn draw(history: &History, random: &mut Random) -> Asked {
    let timeline = *random.pick(&[None, None, Some(1), Some(2), Some(1), Some(2)]);
    let timeline = if random.chance(0.02) { Some(9) } else { timeline };
    let way = timeline.filter(|number| *number < 3).unwrap_or(2);
    let mut records = history.path(way);
    if random.chance(0.85) {
        records.retain(|record| record.lsn >= history.drawn_from[&way]);
    }
    let ends: Vec<_> = records.iter().filter_map(|record| record.ended()).collect();
    let mut asked = Asked {
        options: Vec::new(),
        settings: Vec::new(),
        time: None,
        exclusive: random.chance(0.4),
        timeline,
        backup: None,
    };
    match random.below(20) {
        0..=6 => {
            let mut time = random.pick(&ends).time;
            time += *random.pick(&[0, 0, 0, 1, -1, 300, -300, 20_000, -20_000, 1_500_000]);
            if random.chance(0.06) {
                time += *random.pick(&[-86_400_000_000, 86_400_000_000]);
            }
            let text = chrono::DateTime::from_timestamp_micros(time).unwrap();
            let text = text.format("%Y-%m-%d %H:%M:%S%.6f+00").to_string();
            asked.time = Some(time);
            asked.set("--to-time", "recovery_target_time", text);
        }
        7..=11 => {
            let at = match random.below(20) {
                0 => history.ends[&1].0.max(history.ends[&2].0) + 8 * random.below(1000) as u64,
                1 => records[0].lsn.0 - 8,
                2..=6 => random.pick(&records).lsn.0 + 8,
                _ => random.pick(&records).lsn.0,
            };
            asked.set("--to-lsn", "recovery_target_lsn", Lsn(at).to_string());
        }
        12..=15 => {
            let xid = match random.below(10) {
                // Of any record: subtransactions, those that never ended.
                0..=2 => random.pick(&records).xid,
                3 => ends.iter().map(|end| end.xid).max().unwrap() + random.below(5) as u32,
                _ => random.pick(&ends).xid,
            };
            asked.set("--to-xid", "recovery_target_xid", xid.max(3).to_string());
        }
        16..=17 => {
            let name = if random.chance(0.15) { "nowhere" } else { *random.pick(&NAMES) };
            asked.exclusive = false;
            asked.set("--to-name", "recovery_target_name", name.to_owned());
        }
        18 => {
            asked.exclusive = false;
            asked.options.push("--immediate".to_owned());
            asked.settings.push(("recovery_target", "immediate".to_owned()));
        }
        _ => {
            asked.exclusive = false;
            asked.options.push("--latest".to_owned());
        }
    }
    if asked.exclusive {
        asked.options.push("--exclusive".to_owned());
        asked.settings.push(("recovery_target_inclusive", "off".to_owned()));
    }
    if let Some(timeline) = timeline {
        asked.options.extend(["--timeline".to_owned(), timeline.to_string()]);
    }
    if random.chance(0.35) {
        let backup = random.pick(&history.backups).0.clone();
        asked.options.extend(["--backup".to_owned(), backup.clone()]);
        asked.backup = Some(backup);
    }
    asked
}

impl Asked {
    fn set(&mut self, option: &str, setting: &'static str, value: String) {
        self.options.extend([option.to_owned(), value.clone()]);
        self.settings.push((setting, value));
    }
}

/// How a comparison ended, all of them well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Reached,
    Refused,
    /// The server would have recovered, to more than was asked for.
    Stricter,
}

fn check(history: &History, asked: &Asked) -> Verdict {
    let stage = &history.stage;
    let mut plan = stage.pitr(&["plan", "--json"]);
    let output = stage.run(plan.args(&asked.options));
    let said = String::from_utf8_lossy(&output.stderr);
    let plan: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {asked}: {said}"));
    match output.status.code() {
        Some(0) => {
            check_reached(history, asked, &plan["plan"]);
            Verdict::Reached
        }
        Some(3) => check_refused(history, asked, &plan["refusal"]),
        _ => panic!("{asked}: {}: {said}", output.status),
    }
}

fn lsn(value: &Value) -> Lsn {
    value.as_str().and_then(|text| text.parse().ok()).unwrap_or_else(|| panic!("no position: {value}"))
}

fn check_reached(history: &History, asked: &Asked, plan: &Value) {
    let stage = &history.stage;
    let dir = tempfile::Builder::new().prefix("restored").tempdir_in(stage.path()).unwrap();
    let mut restore =
        stage.pitr(&["restore", "--target-action", "promote", "-D", dir.path().to_str().unwrap()]);
    stage.ok(restore.args(&asked.options));
    let mut server = stage.recovering(dir.path()).start();
    let deadline = Instant::now() + PATIENCE;
    while !server.try_psql("SELECT pg_is_in_recovery()").is_ok_and(|answer| answer == "f") {
        let waiting = server.is_running() && Instant::now() < deadline;
        assert!(waiting, "not recovered: {asked}\n{plan:#}\n{}", server.log());
    }
    let context = || format!("{asked}\n{plan:#}\n{}", server.log());

    // Where it ended.
    let timeline: u32 = server.psql("SELECT timeline_id FROM pg_control_checkpoint()").parse().unwrap();
    let (parent, end) = fork_of(dir.path(), timeline);
    let path = plan["timeline_path"].as_array().unwrap();
    assert_eq!(path.last().unwrap()["timeline"], parent, "the timeline; {}", context());
    assert_eq!(lsn(&plan["stop"]["final_lsn"]), end, "the position; {}", context());

    // The last commit, as the server replayed it.
    let last = server.psql(
        "SELECT xid, (extract(epoch FROM timestamp) * 1000000)::bigint FROM pg_last_committed_xact() WHERE xid IS NOT NULL",
    );
    let planned = match &plan["last_included"] {
        Value::Null => String::new(),
        end => {
            let time: chrono::DateTime<chrono::Utc> = end["time"].as_str().unwrap().parse().unwrap();
            format!("{}|{}", end["xid"], time.timestamp_micros())
        }
    };
    assert_eq!(planned, last, "the last commit; {}", context());

    // What is there: the commits before the cut, and no other.
    let cut = lsn(&plan["stop"]["cut_lsn"]);
    let rows = server.psql("SELECT id FROM t");
    let rows: BTreeSet<i64> = rows.lines().map(|id| id.parse().unwrap()).collect();
    let expected = history.rows_at(parent, cut);
    assert_eq!(rows, expected, "the rows; {}", context());

    // The first commit that is not there: along the timeline that was asked for.
    let asked_timeline = asked.timeline.unwrap_or(2);
    let behind = history
        .path(asked_timeline)
        .into_iter()
        .find(|record| record.lsn >= cut && record.ended().is_some_and(|ended| ended.committed));
    let behind = behind.filter(|_| plan["stop"]["kind"] != "end_of_wal");
    let planned = &plan["first_excluded"];
    match behind {
        Some(record) => {
            assert_eq!(lsn(&planned["lsn"]), record.lsn, "the first one out; {}", context());
            assert_eq!(planned["xid"], record.ended().unwrap().xid, "the first one out; {}", context());
        }
        None => assert!(planned.is_null(), "the first one out; {}", context()),
    }

    // Prepared transactions that are open.
    let open = server.psql("SELECT transaction, gid FROM pg_prepared_xacts ORDER BY gid");
    if let Some(planned) = plan["open_prepared"].as_array() {
        let mut planned: Vec<_> =
            planned.iter().map(|one| (one["gid"].as_str().unwrap(), &one["xid"])).collect();
        planned.sort_unstable_by_key(|one| one.0);
        let planned: Vec<_> = planned.iter().map(|(gid, xid)| format!("{xid}|{gid}")).collect();
        assert_eq!(planned.join("\n"), open, "prepared transactions; {}", context());
    }
}

/// Gives the refused target to a server all the same.
fn check_refused(history: &History, asked: &Asked, refusal: &Value) -> Verdict {
    let why = refusal["kind"].as_str().unwrap_or_default();
    if why == "backup_not_on_path" || asked.timeline == Some(9) {
        // There is nothing to start such a recovery from; see the tests of forks.
        return Verdict::Refused;
    }
    let mut verdict = Verdict::Refused;
    for (backup, start) in &history.backups {
        if asked.backup.as_ref().is_some_and(|only| only != backup) {
            continue;
        }
        let Some(template) = template(history, backup, asked.timeline) else { continue };
        let dir = tempfile::Builder::new().prefix("forced").tempdir_in(history.stage.path()).unwrap();
        let dir = dir.path().join("data");
        copy_tree(&template, &dir);
        let mut conf = fs::read_to_string(dir.join("postgresql.auto.conf")).unwrap();
        for (name, value) in &asked.settings {
            conf += &format!("{name} = '{}'\n", value.replace('\'', "''"));
        }
        conf += "recovery_target_action = 'promote'\n";
        fs::write(dir.join("postgresql.auto.conf"), conf).unwrap();
        let mut server = history.stage.recovering(&dir).prepare();
        server.launch();
        if forced(history, asked, refusal, *start, &mut server) == Verdict::Stricter {
            verdict = Verdict::Stricter;
        }
    }
    for side in ["before", "after"] {
        let Some(options) = refusal[side]["options"].as_str() else { continue };
        let words = shell_words(options);
        let mut plan = history.stage.pitr(&["plan"]);
        if let (Some(timeline), false) = (asked.timeline, words.iter().any(|word| word == "--timeline")) {
            plan.args(["--timeline", &timeline.to_string()]);
        }
        history.stage.ok(plan.args(&words));
    }
    verdict
}

/// Waits for what a server makes of a target that the plan refused.
fn forced(history: &History, asked: &Asked, refusal: &Value, start: Lsn, server: &mut PgServer) -> Verdict {
    let ended = server.wait_until_ready().err();
    let context = |server: &PgServer| format!("{asked}\n{refusal:#}\n{}", server.log());
    if ended.is_none() {
        let deadline = Instant::now() + PATIENCE;
        while server.is_running() {
            if server.try_psql("SELECT pg_is_in_recovery()").is_ok_and(|answer| answer == "f") {
                // It recovered. Right to refuse only when that is not what was asked for: the backup holds
                // commits from after the target, which replay never looked at.
                let target =
                    asked.time.unwrap_or_else(|| panic!("the server reached it: {}", context(server)));
                let past = |time: i64| if asked.exclusive { time >= target } else { time > target };
                let told = history.committed_before(start).any(past);
                assert!(
                    told && refusal["kind"] == "before_first",
                    "the server reached it: {}",
                    context(server)
                );
                return Verdict::Stricter;
            }
            assert!(Instant::now() < deadline, "neither reached nor refused: {}", context(server));
            thread::yield_now();
        }
    }
    let log = server.log();
    let words =
        ["recovery ended before configured recovery target was reached", "before consistent recovery point"];
    assert!(words.iter().any(|words| log.contains(words)), "another end: {}", context(server));
    Verdict::Refused
}

/// Returns a data directory restored from `backup` with everything that is archived before it, on
/// `timeline`; none where the backup is not on the way.
fn template(history: &History, backup: &str, timeline: Option<u32>) -> Option<PathBuf> {
    let key = vec![backup.to_owned(), format!("{timeline:?}")];
    let mut templates = history.templates.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(made) = templates.get(&key) {
        return Some(made.clone());
    }
    let dir = history.stage.path().join(format!("template-{}", templates.len()));
    let mut restore = history.stage.pitr(&["restore", "--latest", "--backup", backup, "-D"]);
    restore.arg(&dir);
    if let Some(timeline) = timeline {
        restore.args(["--timeline", &timeline.to_string()]);
    }
    let output = history.stage.run(&mut restore);
    if output.status.code() == Some(3) {
        return None;
    }
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    templates.insert(key, dir.clone());
    Some(dir)
}

/// Splits a line of options as a shell does.
fn shell_words(line: &str) -> Vec<String> {
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", &format!("printf '%s\\n' {line}")]);
    let words = walship_tests::process::run_ok(&mut shell);
    words.lines().map(str::to_owned).collect()
}
