//! What is wrong: one function that the monitor, the metrics and the notices share.

use std::time::Duration;

use chrono::{DateTime, Utc};

use super::facts::{
    BackupKind, Contents, Disk, DrillFacts, Facts, RepositoryFacts, ServerAnswer, ServerFacts, backup_kinds,
};
use super::kind::{Absence, Kind, Problem, Severity};
use crate::config::{Config, Objectives, RetentionSettings, WatchSettings};

/// A clock may be so far ahead of another.
const CLOCKS_DIFFER: Duration = Duration::from_secs(5 * 60);

/// What is critical of what waits: so many times what is worth a warning.
const WAITING_CRITICAL_TIMES: u64 = 16;

/// The subjects of what waits on the server.
const ARCHIVER: &str = "archiver";
const ARCHIVE_STATUS: &str = "archive_status";

/// The subject of a disk of the server that does not answer.
const SILENT: &str = "disk";

/// What is measured by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// `[watch]`.
    pub watch: WatchSettings,
    /// `rpo` and `rto`.
    pub objectives: Objectives,
    /// Whether `[retention]` says anything.
    pub retention: bool,
}

impl Limits {
    /// Returns the limits of a configuration.
    pub fn of(config: &Config) -> Self {
        Self {
            watch: config.watch,
            objectives: config.objectives,
            retention: config.retention != RetentionSettings::default(),
        }
    }
}

/// Returns everything that is wrong, what is critical first.
///
/// What is not known is no problem by itself: that a repository or the server cannot be asked is one already. What a
/// repository held when it was read last is judged all the same: it does not get younger while it is away.
pub fn problems(facts: &Facts, limits: &Limits) -> Vec<Problem> {
    let mut found = Found { at: facts.at, problems: Vec::new() };
    if let ServerAnswer::Failed { what, next } = &facts.server {
        found.add(Kind::ServerUnreachable, "server", Severity::Critical, what.clone(), next);
    }
    for repository in &facts.repositories {
        found.repository(repository, limits);
        if let Some(contents) = &repository.contents {
            found.clocks(&repository.url, contents);
            found.backups(&repository.url, contents, limits);
            found.wal(&repository.url, contents);
            found.arriving(repository, facts, contents, limits);
            found.drills(&repository.url, contents, limits, facts.repositories.len());
            found.verifications(&repository.url, contents, limits);
            found.retention(&repository.url, contents, limits);
        }
    }
    if let Some(server) = facts.server.told() {
        found.server(server, limits);
    }
    let mut problems = found.problems;
    problems.sort_by(|a, b| (b.severity, a.kind, &a.subject).cmp(&(a.severity, b.kind, &b.subject)));
    problems
}

/// Returns what it means that there is no problem of this kind with this subject: what nobody could look at is neither there
/// nor over, and what nobody is to look at any more did not end.
pub fn absence(facts: &Facts, kind: Kind, subject: &str) -> Absence {
    let is_of_server = matches!(kind, Kind::ServerUnreachable | Kind::Slot | Kind::ServerDisk)
        || matches!(subject, ARCHIVER | ARCHIVE_STATUS);
    if is_of_server || kind == Kind::WalNotArriving {
        match facts.server {
            ServerAnswer::NotAsked => return Absence::Unwatched,
            ServerAnswer::Failed { .. } if kind != Kind::ServerUnreachable => return Absence::Unknown,
            ServerAnswer::Told(ref server) if kind == Kind::ServerDisk && server.disks.is_none() => {
                return Absence::Unknown;
            }
            ServerAnswer::Failed { .. } | ServerAnswer::Told(_) if is_of_server => return Absence::Over,
            ServerAnswer::Failed { .. } | ServerAnswer::Told(_) => {}
        }
    }
    let is_about = |repository: &&RepositoryFacts| {
        subject.strip_prefix(&repository.url).is_some_and(|rest| rest.is_empty() || rest.starts_with(' '))
    };
    let about: Vec<_> = facts.repositories.iter().filter(is_about).collect();
    let is_seen = |repository: &&RepositoryFacts| match kind {
        Kind::RepositoryUnreachable => true,
        Kind::RepositoryDisk => repository.disk.is_some(),
        _ => repository.contents.is_some(),
    };
    match about.iter().all(is_seen) {
        _ if about.is_empty() => Absence::Unwatched,
        true => Absence::Over,
        false => Absence::Unknown,
    }
}

struct Found {
    at: DateTime<Utc>,
    problems: Vec<Problem>,
}

impl Found {
    fn add(&mut self, kind: Kind, subject: &str, severity: Severity, text: String, next: &str) {
        let subject = subject.to_owned();
        self.problems.push(Problem { kind, subject, severity, text, next: next.to_owned() });
    }

    fn age(&self, then: DateTime<Utc>) -> Duration {
        self.at.signed_duration_since(then).to_std().unwrap_or_default()
    }

    fn repository(&mut self, repository: &RepositoryFacts, limits: &Limits) {
        let url = &repository.url;
        if let Some((what, next)) = &repository.failure {
            let seen = repository.seen.map(|seen| format!("; last read {} ago", length(self.age(seen))));
            let text = format!("{what}{}", seen.unwrap_or_default());
            self.add(Kind::RepositoryUnreachable, url, Severity::Critical, text, next);
        }
        if let Some(disk) = &repository.disk {
            let next =
                "Make room, or give it a larger disk; `pitr expire` shows what the policy does not keep.";
            self.disk(Kind::RepositoryDisk, url, &format!("the disk of {url}"), disk, limits, next);
        }
    }

    fn disk(&mut self, kind: Kind, subject: &str, what: &str, disk: &Disk, limits: &Limits, next: &str) {
        let percent = disk.used_ratio() * 100.0;
        let severity = if percent >= limits.watch.disk_critical_percent as f64 {
            Severity::Critical
        } else if percent >= limits.watch.disk_warning_percent as f64 {
            Severity::Warning
        } else {
            return;
        };
        let free = bytes(disk.free_bytes);
        self.add(kind, subject, severity, format!("{what} is {percent:.0} % full, {free} are free"), next);
    }

    fn backups(&mut self, url: &str, contents: &Contents, limits: &Limits) {
        let next = "Run `walship backup`; look at why the scheduled one did not: its log, `pitr history`.";
        let Some(newest) = contents.newest_backup() else {
            let text = format!("{url} holds no complete backup: nothing can be restored from it");
            return self.add(Kind::BackupMissing, url, Severity::Critical, text, next);
        };
        let full = contents.newest(BackupKind::Full).0.map(|backup| backup.finished);
        for (what, finished, limit) in [
            ("backup", Some(newest), limits.watch.backup_overdue.0),
            ("full backup", full, limits.watch.full_backup_overdue.0),
        ] {
            let Some((finished, limit)) = finished.zip(limit) else { continue };
            let age = self.age(finished);
            if age <= limit {
                continue;
            }
            let severity = if age > limit * 2 { Severity::Critical } else { Severity::Warning };
            let text =
                format!("the newest {what} in {url} is {} old; it may be {} old", length(age), length(limit));
            // A subject of its own for each: one may be gone while the other holds.
            let subject = if what == "backup" { url.to_owned() } else { format!("{url} full") };
            self.add(Kind::BackupOverdue, &subject, severity, text, next);
        }
        for kind in backup_kinds() {
            self.backup_kind(url, contents, kind);
        }
    }

    fn backup_kind(&mut self, url: &str, contents: &Contents, kind: BackupKind) {
        let (Some(newest), before) = contents.newest(kind) else { return };
        let subject = format!("{url} {}", kind.word());
        if newest.damaged_pages > 0 {
            let text = format!(
                "{} pages had a wrong checksum when backup {} in {url} read them",
                newest.damaged_pages, newest.id
            );
            let next =
                "Find out with pg_amcheck what is damaged on the server, and keep the backups from before.";
            self.add(Kind::BackupDamagedPages, &subject, Severity::Critical, text, next);
        }
        // How much changes between two incremental ones is the load's to say; a full one follows the cluster's size.
        let size = |backup: &super::BackupFacts| match kind {
            BackupKind::Full => backup.data_bytes,
            BackupKind::Incremental => backup.stored_bytes,
        };
        if let Some(before) = before {
            let (now, then) = (size(newest), size(before));
            let is_odd = now.saturating_mul(2) < then || now > then.saturating_mul(3);
            if is_odd {
                let text = format!(
                    "the newest {} backup in {url} has {}, the one before it {}",
                    kind.word(),
                    bytes(now),
                    bytes(then)
                );
                let next = "Make sure that it is the right server and that nothing was dropped or loaded by mistake; \
                            the next backup of about the same size ends this.";
                self.add(Kind::BackupSize, &subject, Severity::Warning, text, next);
            }
        }
    }

    /// What lies in the future would count as fresh until then.
    fn clocks(&mut self, url: &str, contents: &Contents) {
        let verified = contents.verification.as_ref().map(|verification| verification.started);
        for (what, time) in [
            ("backup", contents.newest_backup()),
            ("commit", contents.newest_commit),
            ("drill", contents.drill.as_ref().map(|drill| drill.started).max(contents.proven)),
            ("verification", verified.max(contents.verified)),
            ("removal by retention", contents.expire.as_ref().map(|expire| expire.started)),
        ] {
            let Some(time) = time.filter(|time| *time > self.at + CLOCKS_DIFFER) else { continue };
            let time = time.format("%Y-%m-%d %H:%M:%SZ");
            let text = format!("the newest {what} in {url} is of {time}, which lies in the future");
            let next = "Compare the clocks of this machine, of the server and of those who wrote to the repository. \
                        Until that time it is not noticed that a newer one is missing.";
            self.add(Kind::Clock, &format!("{url} {what}"), Severity::Warning, text, next);
        }
    }

    fn wal(&mut self, url: &str, contents: &Contents) {
        if contents.gaps_without_backup > 0 {
            let text = format!(
                "{url} has {} gaps in its WAL without a backup behind them",
                contents.gaps_without_backup
            );
            let next =
                "Take a base backup (`walship backup`): nothing behind the gap can be restored without.";
            self.add(Kind::WalGap, url, Severity::Critical, text, next);
        } else if contents.holes > 0 {
            // What the ledger knows was told when it was recorded, and is over with the backup behind it.
            let text =
                format!("WAL is missing in {url}, and nothing on record says why: {} gaps", contents.holes);
            let next = "`pitr info` shows which moments cannot be reached. Store it (`walship wal push`) where it still is; \
                        else record that it is lost (`walship wal give-up`), and this ends.";
            self.add(Kind::WalGap, url, Severity::Warning, text, next);
        }
        if contents.lost_ends > 0 {
            let text = format!("WAL at the end of {} timelines is gone from {url}", contents.lost_ends);
            let next = "Find out who removed it, or whether this is an older copy of the repository.";
            self.add(Kind::WalEndLost, url, Severity::Critical, text, next);
        }
        let next = "Take a base backup (`walship backup`): nothing that is written can be restored without.";
        if contents.is_cut {
            let text = format!(
                "no restore gets to the end of {url}: wal_level was minimal there, or pg_resetwal was run, and no backup \
                 lies behind it"
            );
            self.add(Kind::WindowEnded, url, Severity::Critical, text, next);
        } else if contents.window.is_none() && !contents.backups.is_empty() {
            let text = format!("no backup in {url} has the WAL that it needs to be restored");
            self.add(Kind::WindowEnded, url, Severity::Critical, text, next);
        }
    }

    fn arriving(
        &mut self,
        repository: &RepositoryFacts,
        facts: &Facts,
        contents: &Contents,
        limits: &Limits,
    ) {
        let url = &repository.url;
        if let Some(server) = facts.server.told() {
            let behind = facts.behind_bytes(contents);
            let segments = behind.unwrap_or(0) / server.segment_bytes.max(1);
            if contents.timeline != Some(server.timeline) && repository.failure.is_none() {
                let text =
                    format!("nothing in {url} leads to timeline {}, which the server is on", server.timeline);
                let next =
                    "See that the server archives, or `walship receive` streams from it: `walship check`.";
                self.add(Kind::WalNotArriving, url, Severity::Critical, text, next);
            } else if segments >= limits.watch.waiting_segments {
                let text = format!(
                    "{segments} full segments of the server's WAL ({}) cannot be restored from {url}",
                    bytes(behind.unwrap_or(0))
                );
                let next =
                    "Run `walship check`: it says whether the archiver or the receiver fails, and why.";
                self.add(Kind::WalNotArriving, url, waiting(segments, limits), text, next);
            }
        }
        if let (Some(objective), Some(age)) =
            (limits.objectives.recovery_point, facts.recovery_point(contents))
            && age > objective
        {
            let text = format!(
                "the newest commit in {url} is {} old; the objective is {}",
                length(age),
                length(objective)
            );
            let next = "See that WAL arrives (`walship check`); lower archive_timeout, or stream with `walship receive`.";
            self.add(Kind::RpoMissed, url, Severity::Critical, text, next);
        }
    }

    fn drills(&mut self, url: &str, contents: &Contents, limits: &Limits, repositories: usize) {
        if let Some(drill) = &contents.drill {
            let DrillFacts { started, outcome, recovery, .. } = drill;
            if !DrillFacts::has_proven(outcome) {
                let text = format!(
                    "the last drill of {url}, {} ago, did not prove a restore: {outcome}",
                    length(self.age(*started))
                );
                let next = "`pitr history` shows its problems and its report; run `pitr drill` when they are mended.";
                self.add(Kind::DrillFailed, url, Severity::Critical, text, next);
            }
            if let (Some(objective), Some(took)) = (limits.objectives.recovery_time, recovery)
                && *took > objective
            {
                let text = format!(
                    "the last drill of {url} took {} until the server was open; the objective is {}",
                    length(*took),
                    length(objective)
                );
                let next =
                    "Take backups more often, so that less WAL is replayed, or restore to a faster machine.";
                self.add(Kind::RtoMissed, url, Severity::Warning, text, next);
            }
        }
        let since = contents.proven.or(contents.since());
        if let Some((since, limit)) = since.zip(limits.watch.drill_overdue.0)
            && self.age(since) > limit
        {
            let text = match contents.proven {
                Some(_) => format!("the last good drill of {url} was {} ago", length(self.age(since))),
                None => format!("no drill has shown that {url} can be restored from"),
            };
            let next = match repositories {
                1 => "Run `pitr drill`, best from a timer.",
                _ => {
                    "Run `pitr drill --repo` with this address alone, best from a timer: of several repositories a drill proves \
                     the first, where that holds all that is needed."
                }
            };
            self.add(Kind::DrillOverdue, url, Severity::Warning, text, next);
        }
    }

    fn verifications(&mut self, url: &str, contents: &Contents, limits: &Limits) {
        if let Some(verification) = contents.verification.as_ref().filter(|one| !one.is_good) {
            let text = match verification.damage {
                Some((places, since)) => format!(
                    "{places} stored object(s) of {url} are damaged, as verifications found, the first {} ago",
                    length(self.age(since))
                ),
                None => format!(
                    "the last verification of {url}, {} ago, ended with {}",
                    length(self.age(verification.started)),
                    verification.outcome
                ),
            };
            let next = "`pitr history` shows what it found, and which moments cannot be reached.";
            let severity = if verification.is_damaged { Severity::Critical } else { Severity::Warning };
            self.add(Kind::VerificationFailed, url, severity, text, next);
        }
        let last = contents.verified;
        let since = last.or(contents.since());
        if let Some((since, limit)) = since.zip(limits.watch.verification_overdue.0)
            && self.age(since) > limit
        {
            let text = match last {
                Some(_) => format!("the last verification of {url} was {} ago", length(self.age(since))),
                None => format!("{url} was never verified"),
            };
            let next = "Run `pitr verify`, best from a timer.";
            self.add(Kind::VerificationOverdue, url, Severity::Warning, text, next);
        }
        // With a budget the work is spread over days; a small one never comes round.
        let since = contents.all_read.or(contents.since());
        if let Some((since, limit)) = since.zip(limits.watch.proven_overdue.0)
            && last.is_some()
            && self.age(since) > limit
        {
            let text = match contents.all_read {
                Some(_) => {
                    format!("something in {url} was read by no verification for {}", length(self.age(since)))
                }
                None => format!("something in {url} was never read by a verification"),
            };
            let next = "Raise --budget of `pitr verify`, or run it once without.";
            self.add(Kind::VerificationOverdue, &format!("{url} all"), Severity::Warning, text, next);
        }
    }

    fn retention(&mut self, url: &str, contents: &Contents, limits: &Limits) {
        let last = contents.expire.as_ref();
        if let Some((expire, failure)) = last.and_then(|expire| Some((expire, expire.failure.as_ref()?))) {
            let ended = if expire.refused { "was refused" } else { "failed" };
            let text = format!("the last removal by retention in {url} {ended}: {failure}");
            let next = "Run `pitr expire` again: it says what is left to do.";
            self.add(Kind::RetentionFailed, url, Severity::Warning, text, next);
        }
        // One that is at work has no end yet; after a day it was cut off.
        let cut_off = |started: &DateTime<Utc>| self.age(*started) > Duration::from_secs(86_400);
        if last.is_some_and(|expire| expire.finished.is_none() && cut_off(&expire.started)) {
            let text = format!("the last removal by retention in {url} never ended");
            let next = "Run `pitr expire` again: it goes on where that one was cut off.";
            self.add(Kind::RetentionFailed, url, Severity::Warning, text, next);
        }
        let done = last.and_then(|expire| expire.done);
        let since = done.or(contents.oldest_backup());
        if let Some((since, limit)) = since.zip(limits.watch.retention_overdue.0)
            && limits.retention
            && self.age(since) > limit
        {
            let text = match done {
                Some(_) => format!("retention was not carried out in {url} for {}", length(self.age(since))),
                None => format!("retention was never carried out in {url}"),
            };
            let next =
                "See that `pitr expire --confirm` is run: a repository that only grows fills its disk.";
            self.add(Kind::RetentionOverdue, url, Severity::Warning, text, next);
        }
    }

    fn server(&mut self, server: &ServerFacts, limits: &Limits) {
        // What failed last stands in the statistics for ever, also where nothing is archived any more.
        if let Some(failing) = server.failing_wal.as_ref().filter(|_| server.archives) {
            let text = format!("the archiver fails with {failing}");
            let next = "Look into the server's log: archive-cmd says there what happened.";
            self.add(Kind::WalNotArriving, ARCHIVER, Severity::Critical, text, next);
        }
        if let Some(ready) = server.ready_files.filter(|ready| *ready >= limits.watch.waiting_segments)
            && server.archives
        {
            let text = format!("{ready} files wait on the server to be archived");
            let next = "See whether archive_command keeps up: `walship check`, and the server's log.";
            self.add(Kind::WalNotArriving, ARCHIVE_STATUS, waiting(ready, limits), text, next);
        }
        match &server.slot {
            Some(slot) => {
                let lag = slot.lag_bytes.map(|lag| format!(", {} behind", bytes(lag))).unwrap_or_default();
                let next =
                    "Start `walship receive`: it says what is the case and goes on where the archive ends.";
                let (severity, what) = match (&*slot.wal_status, slot.active) {
                    ("lost", _) => (Severity::Critical, "has lost WAL, or was invalidated".to_owned()),
                    ("unreserved", _) => (Severity::Critical, format!("is about to lose WAL{lag}")),
                    (_, false) if server.commits_wait => {
                        (Severity::Critical, format!("is used by nobody{lag}, and commits wait for it"))
                    }
                    (_, false) => (Severity::Warning, format!("is used by nobody{lag}")),
                    _ => (Severity::Warning, String::new()),
                };
                if !what.is_empty() {
                    let text = format!("the replication slot \"{}\" {what}", slot.name);
                    self.add(Kind::Slot, &slot.name, severity, text, next);
                }
            }
            None if server.commits_wait => {
                let text =
                    "commits wait for `walship receive`, and its replication slot is not there".to_owned();
                let next = "Start `walship receive`, or take it out of synchronous_standby_names.";
                self.add(Kind::Slot, "walship", Severity::Critical, text, next);
            }
            None => {}
        }
        if server.disks.is_none() {
            let text =
                "the disk with the server's data directory does not answer: how full it is cannot be told"
                    .to_owned();
            let next = "See whether it is mounted and its storage answers: `df` on the server's machine hangs as well.";
            self.add(Kind::ServerDisk, SILENT, Severity::Warning, text, next);
        }
        for (place, disk) in server.disks.iter().flatten() {
            let what = format!("the server's disk with its {}", place.word());
            let next = "Make room: a server whose pg_wal has none stops. See whether WAL waits to be archived, or a slot \
                        holds it.";
            self.disk(Kind::ServerDisk, place.word(), &what, disk, limits, next);
        }
    }
}

fn waiting(segments: u64, limits: &Limits) -> Severity {
    if segments >= limits.watch.waiting_segments.saturating_mul(WAITING_CRITICAL_TIMES) {
        Severity::Critical
    } else {
        Severity::Warning
    }
}

/// Returns a length of time as people say it.
pub(super) fn length(time: Duration) -> String {
    let seconds = time.as_secs();
    match (seconds / 86_400, seconds / 3600, seconds / 60) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, minutes) => format!("{minutes} min"),
        (0, hours, minutes) if hours < 48 && minutes % 60 > 0 && hours < 10 => {
            format!("{hours} h {} min", minutes % 60)
        }
        (days, hours, _) if days < 3 => format!("{hours} h"),
        (days, ..) => format!("{days} days"),
    }
}

/// Returns bytes as people say them.
pub(super) fn bytes(bytes: u64) -> String {
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 1024.0 && unit + 1 < units.len() {
        (value, unit) = (value / 1024.0, unit + 1);
    }
    if unit == 0 { format!("{bytes} bytes") } else { format!("{value:.1} {}", units[unit]) }
}

#[cfg(test)]
mod tests;
