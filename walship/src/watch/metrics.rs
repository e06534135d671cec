//! The metrics: their names, which are stable, and their values. `docs/monitoring.md` lists them, and a test compares.

use std::time::Duration;

use chrono::{DateTime, Utc};

use super::facts::{
    BackupKind, Contents, Disk, DrillFacts, Facts, RepositoryFacts, ServerAnswer, ServerFacts, backup_kinds,
};
use super::kind::{Kind, Problem, Severity};
use super::problems::Limits;

/// A metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metric {
    /// Its name.
    pub name: &'static str,
    /// What it says, one line.
    pub help: &'static str,
    /// Whether it only ever grows while a process lives.
    pub is_counter: bool,
    /// The names of its labels.
    pub labels: &'static [&'static str],
}

/// One value of a metric.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// The metric.
    pub metric: &'static Metric,
    /// The values of its labels, in the order of their names.
    pub labels: Vec<String>,
    /// The value.
    pub value: f64,
}

const CLUSTER: &[&str] = &["cluster"];
const REPOSITORY: &[&str] = &["cluster", "repository"];
const LINEAGE: &[&str] = &["cluster", "repository", "lineage"];
const BACKUP: &[&str] = &["cluster", "repository", "lineage", "kind"];
const TIMELINE: &[&str] = &["cluster", "repository", "lineage", "timeline"];

macro_rules! metrics {
    ($($name:ident: $labels:expr, $type:ident, $text:literal, $help:literal;)*) => {
        $(static $name: Metric =
            Metric { name: $text, help: $help, is_counter: metrics!(@$type), labels: $labels };)*

        /// Every metric.
        pub static METRICS: &[&Metric] = &[$(&$name),*];
    };
    (@gauge) => { false };
    (@counter) => { true };
}

metrics! {
    BUILD_INFO: &["version"], gauge, "walship_build_info", "Which release looks; always 1.";
    OBSERVED: CLUSTER, gauge, "walship_observed_timestamp_seconds", "When all the rest was looked at last.";
    OBJECTIVE: &["cluster", "objective"], gauge, "walship_objective_seconds", "What is configured: rpo, rto, and when a backup, a full_backup, a drill, a verification, what was read by none (proven) and retention are overdue.";
    PROBLEM: &["cluster", "kind", "severity"], gauge, "walship_problem", "How many problems of this kind and severity there are; 0 for each that there could be.";
    SERVER_UP: CLUSTER, gauge, "walship_server_up", "Whether the server answered.";
    REPOSITORY_UP: REPOSITORY, gauge, "walship_repository_up", "Whether the repository could be read; where not, the rest is what it held then.";
    REPOSITORY_SEEN: REPOSITORY, gauge, "walship_repository_last_seen_timestamp_seconds", "When the repository could be read last.";
    STORE_LATENCY: REPOSITORY, gauge, "walship_store_latency_seconds", "How long the store took for one small read.";
    STORE_ERRORS: REPOSITORY, counter, "walship_store_errors_total", "How many looks at the repository have failed.";
    REPOSITORY_DISK_SIZE: REPOSITORY, gauge, "walship_repository_disk_size_bytes", "The room of the file system of a repository in a folder.";
    REPOSITORY_DISK_FREE: REPOSITORY, gauge, "walship_repository_disk_free_bytes", "What of it is left.";
    REPOSITORY_DISK_USED: REPOSITORY, gauge, "walship_repository_disk_used_ratio", "How full it is, from 0 to 1.";
    BACKUPS: BACKUP, gauge, "walship_backups", "How many complete backups there are.";
    BACKUP_TIME: BACKUP, gauge, "walship_backup_last_success_timestamp_seconds", "When the newest backup was complete.";
    BACKUP_DURATION: BACKUP, gauge, "walship_backup_last_duration_seconds", "How long the newest backup took.";
    BACKUP_SIZE: BACKUP, gauge, "walship_backup_last_size_bytes", "Bytes of all files of the newest backup.";
    BACKUP_STORED: BACKUP, gauge, "walship_backup_last_stored_bytes", "Bytes of the newest backup as stored.";
    BACKUP_SIZE_BEFORE: BACKUP, gauge, "walship_backup_previous_size_bytes", "Bytes of all files of the backup of that kind before it.";
    BACKUP_STORED_BEFORE: BACKUP, gauge, "walship_backup_previous_stored_bytes", "Bytes of the backup of that kind before it as stored.";
    BACKUP_DAMAGED: BACKUP, gauge, "walship_backup_last_damaged_pages", "Pages of the newest backup whose checksum was wrong.";
    BACKUP_SOUND: BACKUP, gauge, "walship_backup_last_verification_good", "Whether the last verification that read all of the newest backup found it sound.";
    BACKUPS_UNFINISHED: LINEAGE, gauge, "walship_backups_unfinished", "Backups that were started and are not complete.";
    BACKUPS_ORPHANED: LINEAGE, gauge, "walship_backups_orphaned", "Incremental backups without one that they build on.";
    COMMIT_TIME: TIMELINE, gauge, "walship_newest_commit_timestamp_seconds", "When the newest durable transaction ended, by the server's clock.";
    COMMIT_AGE: TIMELINE, gauge, "walship_newest_commit_age_seconds", "How old the newest durable commit is.";
    RPO: TIMELINE, gauge, "walship_rpo_seconds", "How much would be lost were the server gone now: 0 when it has ended no transaction that is not durable, else the age of the newest commit.";
    WAL_DURABLE: TIMELINE, gauge, "walship_wal_durable_lsn_bytes", "Up to where WAL is durable and can be restored, as a number of bytes.";
    WAL_BEHIND: TIMELINE, gauge, "walship_wal_behind_bytes", "How many bytes of the server's WAL are not durable, or cannot be restored.";
    WAL_BEHIND_SEGMENTS: TIMELINE, gauge, "walship_wal_behind_segments", "How many full segments of that.";
    WINDOW_START: TIMELINE, gauge, "walship_window_start_timestamp_seconds", "From when on every commit can be reached.";
    WINDOW_END: TIMELINE, gauge, "walship_window_end_timestamp_seconds", "Up to when: the newest durable commit.";
    WAL_SEGMENTS: LINEAGE, gauge, "walship_wal_segments", "How many whole segments are stored.";
    WAL_STORED: LINEAGE, gauge, "walship_wal_stored_bytes", "Their size as stored.";
    GAPS: LINEAGE, gauge, "walship_wal_gaps", "Gaps in the WAL that are nobody's intention, in the ledger or not.";
    GAPS_BARE: LINEAGE, gauge, "walship_wal_gaps_without_backup", "Those of them behind which no backup begins.";
    LOST_ENDS: LINEAGE, gauge, "walship_wal_lost_ends", "Timelines of which WAL at the end is gone.";
    DRILL_TIME: LINEAGE, gauge, "walship_drill_last_timestamp_seconds", "When the last drill began.";
    DRILL_DURATION: LINEAGE, gauge, "walship_drill_last_duration_seconds", "How long it took.";
    DRILL_GOOD: LINEAGE, gauge, "walship_drill_last_good", "Whether it showed that a restore works.";
    DRILL_RECOVERY: LINEAGE, gauge, "walship_drill_last_recovery_seconds", "The recovery time that it measured.";
    DRILL_PROVEN: LINEAGE, gauge, "walship_drill_last_success_timestamp_seconds", "When the last drill began that showed that a restore works.";
    VERIFY_TIME: LINEAGE, gauge, "walship_verification_last_timestamp_seconds", "When the last verification began.";
    VERIFY_DURATION: LINEAGE, gauge, "walship_verification_last_duration_seconds", "How long it took.";
    VERIFY_GOOD: LINEAGE, gauge, "walship_verification_last_good", "Whether all that it read was as it should be, and nothing is known to be damaged.";
    VERIFY_BYTES: LINEAGE, gauge, "walship_verification_last_bytes", "How much it read.";
    VERIFY_ALL: LINEAGE, gauge, "walship_verification_all_read_timestamp_seconds", "Since when verifications have read everything that was stored then.";
    EXPIRE_TIME: LINEAGE, gauge, "walship_expire_last_timestamp_seconds", "When the last removal by retention began.";
    EXPIRE_GOOD: LINEAGE, gauge, "walship_expire_last_good", "Whether it ended and nothing failed.";
    SERVER_LSN: CLUSTER, gauge, "walship_server_wal_lsn_bytes", "How far the server's WAL is flushed, as a number of bytes.";
    SERVER_TIMELINE: CLUSTER, gauge, "walship_server_timeline", "The timeline that the server is on.";
    SERVER_STANDBY: CLUSTER, gauge, "walship_server_in_recovery", "Whether the server is a standby.";
    READY: CLUSTER, gauge, "walship_archiver_waiting_files", "Files in the server's archive_status that wait to be archived.";
    ARCHIVER_FAILING: CLUSTER, gauge, "walship_archiver_failing", "Whether the archiver failed last.";
    ARCHIVER_FAILURES: CLUSTER, counter, "walship_archiver_failures_total", "How many times archive_command has failed, as the server counts.";
    ARCHIVER_TIME: CLUSTER, gauge, "walship_archiver_last_success_timestamp_seconds", "When the archiver archived a file last.";
    SLOT_ACTIVE: &["cluster", "slot"], gauge, "walship_slot_active", "Whether somebody streams from the slot of walship receive.";
    SLOT_LAG: &["cluster", "slot"], gauge, "walship_slot_lag_bytes", "How much WAL the slot holds back.";
    SLOT_LOST: &["cluster", "slot"], gauge, "walship_slot_lost", "Whether the slot has lost WAL or was invalidated.";
    SERVER_DISK_SIZE: &["cluster", "place"], gauge, "walship_server_disk_size_bytes", "The room of the file system with the server's data_directory or pg_wal, where that is this machine's.";
    SERVER_DISK_FREE: &["cluster", "place"], gauge, "walship_server_disk_free_bytes", "What of it is left.";
    SERVER_DISK_USED: &["cluster", "place"], gauge, "walship_server_disk_used_ratio", "How full it is, from 0 to 1.";
    NOTICES_WAITING: CLUSTER, gauge, "walship_notices_waiting", "Notices that were not delivered yet.";
    NOTICES_FAILED: CLUSTER, counter, "walship_notices_failed_total", "How many times a notice could not be delivered.";
}

/// How notices are doing; only of a process that sends them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Notices {
    /// How many wait.
    pub waiting: u64,
    /// How many deliveries have failed.
    pub failed_total: u64,
}

/// Returns all values.
pub fn samples(
    facts: &Facts,
    problems: &[Problem],
    limits: &Limits,
    notices: Option<Notices>,
) -> Vec<Sample> {
    let mut samples = Samples { cluster: &facts.cluster, all: Vec::new() };
    samples.all.push(Sample {
        metric: &BUILD_INFO,
        labels: vec![env!("CARGO_PKG_VERSION").to_owned()],
        value: 1.0,
    });
    samples.add(&OBSERVED, &[], seconds(facts.at));
    let watch = &limits.watch;
    for (objective, length) in [
        ("rpo", limits.objectives.recovery_point),
        ("rto", limits.objectives.recovery_time),
        ("backup", watch.backup_overdue.0),
        ("full_backup", watch.full_backup_overdue.0),
        ("drill", watch.drill_overdue.0),
        ("verification", watch.verification_overdue.0),
        ("proven", watch.proven_overdue.0),
        ("retention", watch.retention_overdue.0),
    ] {
        samples.some(&OBJECTIVE, &[objective], length.map(|length| length.as_secs_f64()));
    }
    for kind in Kind::ALL {
        for (severity, word) in [(Severity::Warning, "warning"), (Severity::Critical, "critical")] {
            let these =
                problems.iter().filter(|problem| problem.kind == kind && problem.severity == severity);
            samples.add(&PROBLEM, &[kind.word(), word], these.count() as f64);
        }
    }
    for repository in &facts.repositories {
        samples.repository(repository);
        if let Some(contents) = &repository.contents {
            samples.contents(&repository.url, contents);
            samples.wal(&repository.url, facts, contents);
            samples.records(&repository.url, contents);
        }
    }
    match &facts.server {
        ServerAnswer::NotAsked => {}
        ServerAnswer::Failed { .. } => samples.add(&SERVER_UP, &[], 0.0),
        ServerAnswer::Told(server) => samples.server(server),
    }
    if let Some(notices) = notices {
        samples.add(&NOTICES_WAITING, &[], notices.waiting as f64);
        samples.add(&NOTICES_FAILED, &[], notices.failed_total as f64);
    }
    samples.all
}

struct Samples<'a> {
    cluster: &'a str,
    all: Vec<Sample>,
}

impl Samples<'_> {
    fn add(&mut self, metric: &'static Metric, labels: &[&str], value: f64) {
        let labels = std::iter::once(self.cluster).chain(labels.iter().copied());
        self.all.push(Sample { metric, labels: labels.map(str::to_owned).collect(), value });
    }

    fn some(&mut self, metric: &'static Metric, labels: &[&str], value: Option<f64>) {
        if let Some(value) = value {
            self.add(metric, labels, value);
        }
    }

    fn disk(&mut self, metrics: [&'static Metric; 3], labels: &[&str], disk: &Disk) {
        let [size, free, used] = metrics;
        self.add(size, labels, disk.total_bytes as f64);
        self.add(free, labels, disk.free_bytes as f64);
        self.add(used, labels, disk.used_ratio());
    }

    fn repository(&mut self, repository: &RepositoryFacts) {
        let labels = &[&*repository.url];
        self.add(&REPOSITORY_UP, labels, flag(repository.failure.is_none()));
        self.some(&REPOSITORY_SEEN, labels, repository.seen.map(seconds));
        self.some(&STORE_LATENCY, labels, repository.latency.map(|latency| latency.as_secs_f64()));
        self.add(&STORE_ERRORS, labels, repository.failures_total as f64);
        if let Some(disk) = &repository.disk {
            self.disk([&REPOSITORY_DISK_SIZE, &REPOSITORY_DISK_FREE, &REPOSITORY_DISK_USED], labels, disk);
        }
    }

    fn contents(&mut self, url: &str, contents: &Contents) {
        let lineage = lineage(contents);
        for kind in backup_kinds() {
            let labels = &[url, &*lineage, kind.word()];
            let (newest, before) = contents.newest(kind);
            let many = contents.backups.iter().filter(|backup| backup.kind == kind).count();
            self.add(&BACKUPS, labels, many as f64);
            if let Some(newest) = newest {
                self.add(&BACKUP_TIME, labels, seconds(newest.finished));
                let took = newest.finished.signed_duration_since(newest.started).to_std().unwrap_or_default();
                self.add(&BACKUP_DURATION, labels, took.as_secs_f64());
                self.add(&BACKUP_SIZE, labels, newest.data_bytes as f64);
                self.add(&BACKUP_STORED, labels, newest.stored_bytes as f64);
                self.add(&BACKUP_DAMAGED, labels, newest.damaged_pages as f64);
                self.some(&BACKUP_SOUND, labels, newest.is_sound.map(flag));
            }
            self.some(&BACKUP_SIZE_BEFORE, labels, before.map(|before| before.data_bytes as f64));
            self.some(&BACKUP_STORED_BEFORE, labels, before.map(|before| before.stored_bytes as f64));
        }
        let labels = &[url, &*lineage];
        self.add(&BACKUPS_UNFINISHED, labels, contents.unfinished_backups as f64);
        self.add(&BACKUPS_ORPHANED, labels, contents.orphaned_backups as f64);
        self.add(&WAL_SEGMENTS, labels, contents.segments as f64);
        self.add(&WAL_STORED, labels, contents.wal_bytes as f64);
        self.add(&GAPS, labels, contents.gaps as f64);
        self.add(&GAPS_BARE, labels, contents.gaps_without_backup as f64);
        self.add(&LOST_ENDS, labels, contents.lost_ends as f64);
    }

    fn wal(&mut self, url: &str, facts: &Facts, contents: &Contents) {
        let Some(timeline) = contents.timeline else { return };
        let (lineage, timeline) = (lineage(contents), timeline.get().to_string());
        let labels = &[url, &*lineage, &*timeline];
        let newest = contents.newest_commit;
        let age = newest.map(|newest| facts.at.signed_duration_since(newest).to_std().unwrap_or_default());
        self.some(&COMMIT_TIME, labels, newest.map(seconds));
        self.some(&COMMIT_AGE, labels, age.map(|age| age.as_secs_f64()));
        self.some(&RPO, labels, facts.recovery_point(contents).map(|age| age.as_secs_f64()));
        self.some(&WAL_DURABLE, labels, contents.durable_lsn.map(|lsn| lsn.0 as f64));
        if let (Some(behind), Some(server)) = (facts.behind_bytes(contents), facts.server.told()) {
            self.add(&WAL_BEHIND, labels, behind as f64);
            self.add(&WAL_BEHIND_SEGMENTS, labels, (behind / server.segment_bytes.max(1)) as f64);
        }
        if let Some(window) = &contents.window {
            self.add(&WINDOW_START, labels, seconds(window.from));
            // A commit from before the first backup was complete is not in the window.
            let end = newest.map(|newest| newest.max(window.from));
            self.some(&WINDOW_END, labels, end.map(seconds));
        }
    }

    fn records(&mut self, url: &str, contents: &Contents) {
        let lineage = lineage(contents);
        let labels = &[url, &*lineage];
        if let Some(drill) = &contents.drill {
            self.add(&DRILL_TIME, labels, seconds(drill.started));
            self.add(&DRILL_DURATION, labels, drill.took.as_secs_f64());
            self.add(&DRILL_GOOD, labels, flag(DrillFacts::has_proven(&drill.outcome)));
            self.some(&DRILL_RECOVERY, labels, drill.recovery.map(|took| took.as_secs_f64()));
        }
        self.some(&DRILL_PROVEN, labels, contents.proven.map(seconds));
        if let Some(verification) = &contents.verification {
            self.add(&VERIFY_TIME, labels, seconds(verification.started));
            self.add(&VERIFY_DURATION, labels, verification.took.as_secs_f64());
            self.add(&VERIFY_GOOD, labels, flag(verification.is_good));
            self.add(&VERIFY_BYTES, labels, verification.bytes as f64);
        }
        self.some(&VERIFY_ALL, labels, contents.all_read.map(seconds));
        if let Some(expire) = &contents.expire {
            self.add(&EXPIRE_TIME, labels, seconds(expire.started));
            self.add(&EXPIRE_GOOD, labels, flag(expire.finished.is_some() && expire.failure.is_none()));
        }
    }

    fn server(&mut self, server: &ServerFacts) {
        self.add(&SERVER_UP, &[], 1.0);
        self.add(&SERVER_LSN, &[], server.wal_lsn.0 as f64);
        self.add(&SERVER_TIMELINE, &[], f64::from(server.timeline.get()));
        self.add(&SERVER_STANDBY, &[], flag(server.in_recovery));
        self.some(&READY, &[], server.ready_files.map(|files| files as f64));
        self.add(&ARCHIVER_FAILING, &[], flag(server.failing_wal.is_some()));
        self.add(&ARCHIVER_FAILURES, &[], server.archive_failures_total as f64);
        self.some(&ARCHIVER_TIME, &[], server.last_archived.map(seconds));
        if let Some(slot) = &server.slot {
            let labels = &[&*slot.name];
            self.add(&SLOT_ACTIVE, labels, flag(slot.active));
            self.some(&SLOT_LAG, labels, slot.lag_bytes.map(|lag| lag as f64));
            self.add(&SLOT_LOST, labels, flag(slot.wal_status == "lost"));
        }
        for (place, disk) in server.disks.iter().flatten() {
            self.disk([&SERVER_DISK_SIZE, &SERVER_DISK_FREE, &SERVER_DISK_USED], &[place.word()], disk);
        }
    }
}

/// Returns the number of the lineage as its folder has it.
fn lineage(contents: &Contents) -> String {
    format!("{:04}", contents.lineage)
}

fn flag(is_so: bool) -> f64 {
    f64::from(u8::from(is_so))
}

fn seconds(time: DateTime<Utc>) -> f64 {
    time.timestamp_micros() as f64 / 1e6
}

/// Returns the figures that a monitor draws: a name, a value with its unit, what is worth a warning and what is critical.
pub(super) fn figures(facts: &Facts, limits: &Limits) -> Vec<(String, String, Option<u64>, Option<u64>)> {
    let mut figures = Vec::new();
    let many = facts.repositories.len() > 1;
    let age = |then: DateTime<Utc>| facts.at.signed_duration_since(then).num_seconds().max(0);
    let secs = |length: Option<Duration>| length.map(|length| length.as_secs());
    for (number, repository) in facts.repositories.iter().enumerate() {
        let named = |name: &str| if many { format!("{name}_{}", number + 1) } else { name.to_owned() };
        let mut add = |name: &str, value: String, warn: Option<u64>, crit: Option<u64>| {
            figures.push((named(name), value, warn, crit));
        };
        if let Some(latency) = repository.latency {
            add("store_latency", format!("{:.3}s", latency.as_secs_f64()), None, None);
        }
        if let Some(disk) = &repository.disk {
            let watch = &limits.watch;
            let used = format!("{:.1}%", disk.used_ratio() * 100.0);
            add("repository_disk", used, Some(watch.disk_warning_percent), Some(watch.disk_critical_percent));
        }
        let Some(contents) = &repository.contents else { continue };
        for kind in backup_kinds() {
            let (Some(newest), _) = contents.newest(kind) else { continue };
            let limit = secs(match kind {
                BackupKind::Full => limits.watch.full_backup_overdue.0,
                BackupKind::Incremental => None,
            });
            let name = format!("{}_backup_age", kind.word());
            add(&name, format!("{}s", age(newest.finished)), limit, limit.map(|limit| limit * 2));
            add(&format!("{}_backup_size", kind.word()), format!("{}B", newest.data_bytes), None, None);
        }
        if let Some(newest) = contents.newest_backup() {
            let limit = secs(limits.watch.backup_overdue.0);
            add("backup_age", format!("{}s", age(newest)), limit, limit.map(|limit| limit * 2));
        }
        if let Some(newest) = contents.newest_commit {
            add("newest_commit_age", format!("{}s", age(newest)), None, None);
        }
        if let Some(point) = facts.recovery_point(contents) {
            let limit = secs(limits.objectives.recovery_point);
            add("rpo", format!("{}s", point.as_secs()), None, limit);
        }
        if let Some(behind) = facts.behind_bytes(contents) {
            add("wal_behind", format!("{behind}B"), None, None);
        }
        add("gaps", contents.gaps.to_string(), Some(0), None);
        if let Some(took) = contents.drill.as_ref().and_then(|drill| drill.recovery) {
            let limit = secs(limits.objectives.recovery_time);
            add("rto", format!("{:.1}s", took.as_secs_f64()), limit, None);
        }
    }
    if let Some(server) = facts.server.told() {
        if let Some(ready) = server.ready_files {
            // A monitor warns above a limit, not at it.
            let warning = limits.watch.waiting_segments.saturating_sub(1);
            figures.push(("waiting_files".to_owned(), ready.to_string(), Some(warning), None));
        }
        if let Some(lag) = server.slot.as_ref().and_then(|slot| slot.lag_bytes) {
            figures.push(("slot_lag".to_owned(), format!("{lag}B"), None, None));
        }
        for (place, disk) in server.disks.iter().flatten() {
            let watch = &limits.watch;
            figures.push((
                format!("{}_disk", place.word()),
                format!("{:.1}%", disk.used_ratio() * 100.0),
                Some(watch.disk_warning_percent),
                Some(watch.disk_critical_percent),
            ));
        }
    }
    figures
}
