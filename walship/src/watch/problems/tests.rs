use super::*;
use crate::pg::{Lsn, TimelineId};
use crate::watch::{BackupFacts, DiskPlace, Ended, ExpireFacts, SlotFacts, VerificationFacts, WindowFacts};

const URL: &str = "file:///r";
const HOUR: i64 = 3600;

fn at(second: i64) -> DateTime<Utc> {
    DateTime::from_timestamp(1_800_000_000 + second, 0).unwrap()
}

fn ago(seconds: i64) -> DateTime<Utc> {
    at(-seconds)
}

fn backup(kind: BackupKind, age: i64, bytes: u64) -> BackupFacts {
    BackupFacts {
        id: format!("{age}"),
        kind,
        started: ago(age + 60),
        finished: ago(age),
        data_bytes: bytes,
        stored_bytes: bytes,
        damaged_pages: 0,
        is_sound: None,
    }
}

fn good() -> Facts {
    let contents = Contents {
        lineage: 1,
        created: ago(25 * HOUR),
        timeline: Some(TimelineId::FIRST),
        backups: vec![backup(BackupKind::Full, 25 * HOUR, 100), backup(BackupKind::Full, HOUR, 100)],
        unfinished_backups: 0,
        orphaned_backups: 0,
        durable_lsn: Some(Lsn(1000)),
        newest_commit: Some(ago(10)),
        newest_xid: Some(700),
        window: Some(WindowFacts { from_lsn: Lsn(10), from: ago(25 * HOUR), until_lsn: Lsn(1000) }),
        is_cut: false,
        gaps: 0,
        holes: 0,
        gaps_without_backup: 0,
        lost_ends: 0,
        segments: 1,
        wal_bytes: 1,
        drill: None,
        proven: None,
        expire: None,
        verification: None,
        verified: None,
        all_read: None,
    };
    let repository = RepositoryFacts {
        url: URL.into(),
        failure: None,
        failures_total: 0,
        latency: Some(Duration::from_millis(1)),
        seen: Some(at(0)),
        contents: Some(contents),
        disk: Some(Disk { total_bytes: 100, free_bytes: 21 }),
    };
    let server = ServerFacts {
        timeline: TimelineId::FIRST,
        in_recovery: false,
        wal_lsn: Lsn(1000),
        segment_bytes: 16,
        ended: Some(Ended { newest_xid: 700, by: Lsn(1000), late: None }),
        archives: true,
        ready_files: Some(3),
        archive_failures_total: 0,
        failing_wal: None,
        last_archived: Some(ago(60)),
        slot: None,
        commits_wait: false,
        disks: Some(vec![(DiskPlace::Wal, Disk { total_bytes: 100, free_bytes: 21 })]),
    };
    Facts {
        at: at(0),
        cluster: "main".into(),
        repositories: vec![repository],
        server: ServerAnswer::Told(server),
    }
}

fn limits() -> Limits {
    Limits {
        objectives: Objectives {
            recovery_time: Some(Duration::from_secs(900)),
            recovery_point: Some(Duration::from_secs(300)),
        },
        retention: true,
        ..Limits::default()
    }
}

/// The kinds and severities after a change.
fn after(change: impl FnOnce(&mut Facts)) -> Vec<(Kind, Severity)> {
    after_with(limits(), change)
}

fn after_with(limits: Limits, change: impl FnOnce(&mut Facts)) -> Vec<(Kind, Severity)> {
    let mut facts = good();
    change(&mut facts);
    problems(&facts, &limits).iter().map(|problem| (problem.kind, problem.severity)).collect()
}

fn contents(facts: &mut Facts) -> &mut Contents {
    facts.repositories[0].contents.as_mut().unwrap()
}

fn server(facts: &mut Facts) -> &mut ServerFacts {
    match &mut facts.server {
        ServerAnswer::Told(server) => server,
        _ => unreachable!("the server told"),
    }
}

use Severity::{Critical, Warning};

#[test]
fn nothing_is_wrong_where_nothing_is() {
    assert_eq!(after(|_| {}), []);
}

#[test]
fn backups_are_overdue_missing_odd_or_damaged() {
    let overdue = |age: i64| after(|facts| contents(facts).backups = vec![backup(BackupKind::Full, age, 1)]);
    assert_eq!(overdue(26 * HOUR), []);
    assert_eq!(overdue(26 * HOUR + 1), [(Kind::BackupOverdue, Warning)]);
    assert_eq!(overdue(52 * HOUR + 1), [(Kind::BackupOverdue, Critical)]);
    assert_eq!(after(|facts| contents(facts).backups.clear()), [(Kind::BackupMissing, Critical)]);
    // A young incremental one counts, unless full ones have a limit of their own.
    let mixed = |facts: &mut Facts| {
        contents(facts).backups =
            vec![backup(BackupKind::Full, 100 * HOUR, 1), backup(BackupKind::Incremental, HOUR, 1)];
    };
    assert_eq!(after(mixed), []);
    let mut strict = limits();
    strict.watch.full_backup_overdue.0 = Some(Duration::from_secs(90 * 3600));
    assert_eq!(after_with(strict, mixed), [(Kind::BackupOverdue, Warning)]);
    for (before, now, is_odd) in [(100, 50, false), (100, 49, true), (100, 300, false), (100, 301, true)] {
        let found = after(|facts| {
            contents(facts).backups =
                vec![backup(BackupKind::Full, 2 * HOUR, before), backup(BackupKind::Full, HOUR, now)];
        });
        assert_eq!(found.first(), is_odd.then_some(&(Kind::BackupSize, Warning)), "{before} {now}");
    }
    let damaged = after(|facts| contents(facts).backups[1].damaged_pages = 1);
    assert_eq!(damaged, [(Kind::BackupDamagedPages, Critical)]);
}

#[test]
fn what_was_seen_last_is_judged_while_a_repository_is_away() {
    let found = after(|facts| {
        facts.repositories[0].failure = Some(("gone".into(), "Look.".into()));
        contents(facts).backups = vec![backup(BackupKind::Full, 27 * HOUR, 1)];
    });
    assert_eq!(found, [(Kind::RepositoryUnreachable, Critical), (Kind::BackupOverdue, Warning)]);
    let silent = |facts: &mut Facts| {
        facts.server = ServerAnswer::Failed { what: "refused".into(), next: "Start it.".into() };
    };
    assert_eq!(after(silent), [(Kind::ServerUnreachable, Critical)]);
    assert_eq!(after(|facts| facts.server = ServerAnswer::NotAsked), []);
}

#[test]
fn the_recovery_point_is_what_would_be_lost() {
    let point = |change: fn(&mut Facts)| {
        let mut facts = good();
        contents(&mut facts).newest_commit = Some(ago(301));
        change(&mut facts);
        let point = facts.recovery_point(facts.repositories[0].contents.as_ref().unwrap());
        let missed = problems(&facts, &limits()).iter().any(|problem| problem.kind == Kind::RpoMissed);
        assert_eq!(missed, point > Some(Duration::from_secs(300)));
        point.map(|point| point.as_secs())
    };
    assert_eq!(point(|_| {}), Some(0), "the archive holds all that there is");
    let ahead = |facts: &mut Facts, newest_xid: u32, by: u64, late: Option<u64>| {
        server(facts).wal_lsn = Lsn(1008);
        server(facts).ended = Some(Ended { newest_xid, by: Lsn(by), late: late.map(Lsn) });
    };
    let asked = |newest_xid, by, late| {
        let mut facts = good();
        contents(&mut facts).newest_commit = Some(ago(301));
        ahead(&mut facts, newest_xid, by, late);
        facts.recovery_point(facts.repositories[0].contents.as_ref().unwrap()).unwrap().as_secs()
    };
    assert_eq!(asked(700, 1008, None), 0, "no transaction is behind its end");
    assert_eq!(asked(701, 1008, None), 301);
    assert_eq!(asked(700, 1008, Some(1004)), 301, "a long one with a lower number has ended last");
    assert_eq!(asked(700, 1008, Some(1000)), 0, "and is there");
    // The numbers of savepoints are not among those that ended.
    assert_eq!(asked(703, 1000, None), 0, "none has ended since a position that is there");
    let wrapped = |facts: &mut Facts| {
        server(facts).wal_lsn = Lsn(1008);
        server(facts).ended = Some(Ended { newest_xid: 3, by: Lsn(1008), late: None });
        contents(facts).newest_xid = Some(u32::MAX);
    };
    assert_eq!(point(wrapped), Some(301), "numbers wrap around");
    assert_eq!(point(|facts| facts.server = ServerAnswer::NotAsked), Some(301));
    assert_eq!(point(|facts| contents(facts).newest_commit = None), None);
    assert_eq!(point(|facts| contents(facts).timeline = TimelineId::new(2)), Some(0), "by its transactions");
    let late_elsewhere = |facts: &mut Facts| {
        contents(facts).timeline = TimelineId::new(2);
        server(facts).ended = Some(Ended { newest_xid: 700, by: Lsn(1000), late: Some(Lsn(500)) });
    };
    assert_eq!(point(late_elsewhere), Some(301), "positions of another timeline tell nothing");
}

#[test]
fn wal_that_waits_is_told() {
    // Segments have 16 bytes here.
    for (behind, severity) in [(63, None), (64, Some(Warning)), (64 * 16, Some(Critical))] {
        let found = after(|facts| server(facts).wal_lsn = Lsn(1000 + behind));
        assert_eq!(found.first().map(|(_, severity)| *severity), severity, "{behind}");
    }
    for (ready, severity) in [(4, Warning), (64, Critical)] {
        let found = after(|facts| server(facts).ready_files = Some(ready));
        assert_eq!(found, [(Kind::WalNotArriving, severity)]);
    }
    let failing = after(|facts| server(facts).failing_wal = Some("000000010000000000000001".into()));
    assert_eq!(failing, [(Kind::WalNotArriving, Critical)]);
    let idle = after(|facts| {
        server(facts).archives = false;
        server(facts).ready_files = Some(100);
        server(facts).failing_wal = Some("000000010000000000000001".into());
    });
    assert_eq!(idle, [], "nobody is to archive them");
    assert_eq!(after(|facts| contents(facts).gaps = 1), [], "it is known, and a backup lies behind it");
    let hole = after(|facts| (contents(facts).gaps, contents(facts).holes) = (2, 1));
    assert_eq!(hole, [(Kind::WalGap, Warning)]);
    let bare = after(|facts| {
        contents(facts).gaps = 1;
        contents(facts).gaps_without_backup = 1;
    });
    assert_eq!(bare, [(Kind::WalGap, Critical)]);
    assert_eq!(after(|facts| contents(facts).lost_ends = 1), [(Kind::WalEndLost, Critical)]);
}

#[test]
fn a_timeline_to_which_nothing_leads_is_told() {
    let promoted = |facts: &mut Facts| server(facts).timeline = TimelineId::new(2).unwrap();
    assert_eq!(after(promoted), [(Kind::WalNotArriving, Critical)]);
    // What it holds by now nobody knows.
    let away = |facts: &mut Facts| {
        promoted(facts);
        facts.repositories[0].failure = Some(("gone".into(), "Look.".into()));
    };
    assert_eq!(after(away), [(Kind::RepositoryUnreachable, Critical)]);
}

#[test]
fn an_end_that_no_backup_leads_to_is_told() {
    assert_eq!(after(|facts| contents(facts).is_cut = true), [(Kind::WindowEnded, Critical)]);
    assert_eq!(after(|facts| contents(facts).window = None), [(Kind::WindowEnded, Critical)]);
    let empty = after(|facts| {
        contents(facts).window = None;
        contents(facts).backups.clear();
    });
    assert_eq!(empty, [(Kind::BackupMissing, Critical)], "said once");
}

#[test]
fn what_lies_in_the_future_is_told() {
    let clock = [(Kind::Clock, Warning)];
    assert_eq!(after(|facts| contents(facts).newest_commit = Some(at(300))), [], "clocks differ a little");
    assert_eq!(after(|facts| contents(facts).newest_commit = Some(at(301))), clock);
    let later = |facts: &mut Facts| {
        contents(facts).backups.push(backup(BackupKind::Full, -24 * HOUR, 100));
    };
    assert_eq!(after(later), clock);
    assert_eq!(after(|facts| contents(facts).proven = Some(at(HOUR))), clock);
    assert_eq!(after(|facts| contents(facts).verified = Some(at(HOUR))), clock);
    let expire = ExpireFacts { started: at(HOUR), finished: None, failure: None, refused: false, done: None };
    assert_eq!(after(|facts| contents(facts).expire = Some(expire)), clock);
}

#[test]
fn slots_are_judged() {
    for (status, active, commits_wait, expected) in [
        ("reserved", true, false, None),
        ("extended", true, true, None),
        ("reserved", false, false, Some(Warning)),
        ("reserved", false, true, Some(Critical)),
        ("unreserved", true, false, Some(Critical)),
        ("lost", false, false, Some(Critical)),
    ] {
        let found = after(|facts| {
            server(facts).commits_wait = commits_wait;
            server(facts).slot = Some(SlotFacts {
                name: "walship".into(),
                active,
                lag_bytes: Some(5),
                wal_status: status.into(),
            });
        });
        assert_eq!(found.first().map(|(_, severity)| *severity), expected, "{status} {active}");
    }
    assert_eq!(after(|facts| server(facts).commits_wait = true), [(Kind::Slot, Critical)]);
}

#[test]
fn disks_fill_up() {
    for (free, expected) in
        [(21, None), (20, Some(Warning)), (11, Some(Warning)), (10, Some(Critical)), (0, Some(Critical))]
    {
        let disk = Disk { total_bytes: 100, free_bytes: free };
        let repository = after(|facts| facts.repositories[0].disk = Some(disk));
        assert_eq!(repository.first().copied(), expected.map(|severity| (Kind::RepositoryDisk, severity)));
        let own = after(|facts| server(facts).disks.as_mut().unwrap()[0].1 = disk);
        assert_eq!(own.first().copied(), expected.map(|severity| (Kind::ServerDisk, severity)));
    }
    assert_eq!(after(|facts| server(facts).disks = None), [(Kind::ServerDisk, Warning)], "it hangs");
    let mut silent = good();
    server(&mut silent).disks = None;
    assert_eq!(absence(&silent, Kind::ServerDisk, "pg_wal"), Absence::Unknown, "it is no emptier for that");
    assert_eq!(Disk { total_bytes: 0, free_bytes: 0 }.used_ratio(), 0.0);
}

#[test]
fn drills_fail_are_slow_or_overdue() {
    let drilled = |outcome: &str, age: i64, seconds: u64, proven: Option<i64>| {
        after(|facts| {
            contents(facts).drill = Some(DrillFacts {
                started: ago(age),
                took: Duration::from_secs(seconds),
                outcome: outcome.into(),
                recovery: Some(Duration::from_secs(seconds)),
            });
            contents(facts).proven = proven.map(ago);
        })
    };
    assert_eq!(drilled("proven", HOUR, 900, Some(HOUR)), []);
    assert_eq!(drilled("objective_missed", HOUR, 901, Some(HOUR)), [(Kind::RtoMissed, Warning)]);
    assert_eq!(drilled("not_proven", HOUR, 1, Some(2 * HOUR)), [(Kind::DrillFailed, Critical)]);
    let month = 36 * 24 * HOUR;
    assert_eq!(drilled("proven", month, 1, Some(month)), [(Kind::DrillOverdue, Warning)]);
    // Retention keeps the oldest backup young; that says nothing of when there was something to drill.
    let never = |age: i64| {
        let found = after(|facts| {
            contents(facts).created = ago(age);
            contents(facts).verified = Some(ago(HOUR));
        });
        found.into_iter().filter(|(kind, _)| *kind == Kind::DrillOverdue).count()
    };
    assert_eq!((never(34 * 24 * HOUR), never(month)), (0, 1), "there must be something to drill for so long");
}

#[test]
fn verifications_and_retention_fail_or_are_overdue() {
    let verified = |outcome: &str, is_good: bool, age: i64| {
        after(|facts| {
            contents(facts).verification = Some(VerificationFacts {
                started: ago(age),
                took: Duration::from_secs(1),
                is_good,
                is_damaged: outcome == "damaged",
                damage: None,
                outcome: outcome.into(),
                bytes: 1,
            });
            contents(facts).verified = Some(ago(age));
        })
    };
    assert_eq!(verified("sound", true, HOUR), []);
    assert_eq!(verified("damaged", false, HOUR), [(Kind::VerificationFailed, Critical)]);
    assert_eq!(verified("unread", false, HOUR), [(Kind::VerificationFailed, Warning)]);
    assert_eq!(verified("sound", true, 9 * 24 * HOUR), [(Kind::VerificationOverdue, Warning)]);
    let never = |age: i64| after(|facts| contents(facts).created = ago(age));
    assert_eq!(
        (never(8 * 24 * HOUR), never(9 * 24 * HOUR)),
        (vec![], vec![(Kind::VerificationOverdue, Warning)])
    );
    // With a budget that is too small: each day a part, never all.
    let in_parts = |all_read: Option<i64>| {
        let found = after(|facts| {
            contents(facts).created = ago(91 * 24 * HOUR);
            contents(facts).verified = Some(ago(HOUR));
            contents(facts).all_read = all_read.map(ago);
        });
        found.into_iter().filter(|(kind, _)| *kind == Kind::VerificationOverdue).count()
    };
    assert_eq!(in_parts(Some(90 * 24 * HOUR)), 0);
    assert_eq!((in_parts(Some(91 * 24 * HOUR)), in_parts(None)), (1, 1));

    let expired = |failure: Option<&str>, finished: bool, age: i64, limits: Limits| {
        after_with(limits, |facts| {
            contents(facts).expire = Some(ExpireFacts {
                started: ago(age),
                finished: finished.then(|| ago(age)),
                failure: failure.map(str::to_owned),
                refused: false,
                done: (finished && failure.is_none()).then(|| ago(age)),
            });
        })
    };
    assert_eq!(expired(None, true, 100 * HOUR, limits()), []);
    assert_eq!(expired(None, false, HOUR, limits()), [], "it may be at work");
    assert_eq!(expired(None, false, 25 * HOUR, limits()), [(Kind::RetentionFailed, Warning)]);
    assert_eq!(expired(Some("full"), true, HOUR, limits()), [(Kind::RetentionFailed, Warning)]);
    let mut strict = limits();
    strict.watch.retention_overdue.0 = Some(Duration::from_secs(99 * 3600));
    assert_eq!(expired(None, true, 100 * HOUR, strict), [(Kind::RetentionOverdue, Warning)]);
    strict.retention = false;
    assert_eq!(expired(None, true, 100 * HOUR, strict), [], "there is no policy");
}

#[test]
fn the_monitor_says_the_worst_first_and_every_figure() {
    use crate::watch::monitor::{Line, State, answer, worst};
    let facts = good();
    let text = answer("main", &[], Some((&facts, &limits())));
    assert_eq!(
        text,
        "WALSHIP OK - main: the newest backup is 1 h old | store_latency=0.001s;;;0; repository_disk=79.0%;80;90;0;100 \
         full_backup_age=3600s;;;0; full_backup_size=100B;;;0; backup_age=3600s;93600;187200;0; \
         newest_commit_age=10s;;;0; rpo=0s;;300;0; wal_behind=0B;;;0; gaps=0;0;;0; waiting_files=3;3;;0; \
         pg_wal_disk=79.0%;80;90;0;100"
    );
    let line = |state, text: &str| Line { state, text: text.into(), next: Some("Do it.".into()) };
    let lines =
        [line(State::Critical, "a | b\nc"), line(State::Warning, "old"), line(State::Ok, "no checksums")];
    assert_eq!(worst(&lines), State::Critical);
    assert_eq!(
        answer("main", &lines, None),
        "WALSHIP CRITICAL - main: a / b c (and 1 more)\nCRITICAL: a / b c - Do it.\nWARNING: old - Do it.\n\
         OK: no checksums - Do it."
    );
}

#[test]
fn lengths_and_sizes_are_said_as_people_do() {
    let text = |seconds| length(Duration::from_secs(seconds));
    assert_eq!(
        [5, 65, 3600, 3 * 3600 + 60, 27 * 3600, 71 * 3600, 73 * 3600].map(text),
        ["5 s", "1 min", "1 h", "3 h 1 min", "27 h", "71 h", "3 days"]
    );
    assert_eq!([5, 2048, 3 << 30].map(bytes), ["5 bytes", "2.0 KiB", "3.0 GiB"]);
}

#[test]
fn what_is_away_cannot_tell_that_something_is_over() {
    let known = |facts: &Facts, kind| absence(facts, kind, URL) == Absence::Over;
    let all = good();
    assert!(known(&all, Kind::BackupOverdue) && known(&all, Kind::ServerDisk) && known(&all, Kind::WalGap));
    let mut facts = good();
    facts.server = ServerAnswer::Failed { what: "down".into(), next: "Start it.".into() };
    assert!(!known(&facts, Kind::ServerDisk) && !known(&facts, Kind::Slot) && known(&facts, Kind::WalGap));
    assert!(!known(&facts, Kind::WalNotArriving));
    assert!(known(&facts, Kind::ServerUnreachable), "that it cannot be asked is known");
    let mut facts = good();
    facts.repositories[0].contents = None;
    facts.repositories[0].disk = None;
    assert!(
        !known(&facts, Kind::WalGap) && !known(&facts, Kind::RepositoryDisk) && known(&facts, Kind::Slot)
    );
    assert!(known(&facts, Kind::RepositoryUnreachable), "that it is away is known");
}

#[test]
fn what_is_not_in_the_configuration_is_watched_no_more() {
    let watched = |facts: &Facts, kind, subject: &str| absence(facts, kind, subject) != Absence::Unwatched;
    let mut facts = good();
    let every = [Kind::WalGap, Kind::RepositoryUnreachable, Kind::RepositoryDisk, Kind::WalNotArriving];
    for kind in every {
        assert!(watched(&facts, kind, URL) && watched(&facts, kind, &format!("{URL} full")), "{kind}");
        assert!(!watched(&facts, kind, "file:///r2") && !watched(&facts, kind, "s3://r full"), "{kind}");
    }
    let of_server = [
        (Kind::ServerUnreachable, "server"),
        (Kind::Slot, "walship"),
        (Kind::ServerDisk, "pg_wal"),
        (Kind::WalNotArriving, "archiver"),
        (Kind::WalNotArriving, "archive_status"),
        (Kind::WalNotArriving, URL),
    ];
    assert!(of_server.iter().all(|(kind, subject)| absence(&facts, *kind, subject) == Absence::Over));
    // `--offline` from now on.
    facts.server = ServerAnswer::NotAsked;
    assert!(!of_server.iter().any(|(kind, subject)| watched(&facts, *kind, subject)));
    assert!(watched(&facts, Kind::WalGap, URL));
}

#[test]
fn damage_stands_until_what_was_damaged_is_sound() {
    use crate::catalog::{RecordHead, StandingDamage, VerifyOutcome, VerifyRecord};
    let record = |hours: i64, scope: &str, outcome| VerifyRecord {
        head: RecordHead {
            format: 1,
            id: String::new(),
            started: ago(hours * HOUR),
            host: String::new(),
            user: String::new(),
            reason: None,
        },
        millis: 1,
        repository: String::new(),
        scope: scope.into(),
        whole: scope == "all",
        outcome,
        problems: Vec::new(),
        problems_total: 0,
        objects: 0,
        bytes: 1,
        objects_left: 0,
        proven_since: None,
        backups: Vec::new(),
        unreachable: 0,
        standing: None,
    };
    let damaged = |later: &[VerifyRecord]| {
        let all = [later, &[record(9, "a", VerifyOutcome::Damaged)]].concat();
        VerificationFacts::of(&all, "", ago(0)).unwrap().is_damaged
    };
    assert!(damaged(&[]) && damaged(&[record(1, "b", VerifyOutcome::Sound)]));
    assert!(damaged(&[record(1, "all", VerifyOutcome::Interrupted)]));
    let proven = |scope: &str, outcome, since: i64| VerifyRecord {
        proven_since: Some(ago(since * HOUR)),
        ..record(1, scope, outcome)
    };
    assert!(!damaged(&[proven("a", VerifyOutcome::Sound, 1)]));
    assert!(!damaged(&[proven("all", VerifyOutcome::Partly, 8)]));
    // Not all of it was read since: its budget ended.
    assert!(damaged(&[record(1, "all", VerifyOutcome::Partly)]));
    assert!(damaged(&[proven("all", VerifyOutcome::Partly, 10)]));
    let elsewhere = VerifyRecord { repository: "another".into(), ..proven("all", VerifyOutcome::Sound, 1) };
    assert!(damaged(&[elsewhere]), "what one repository has sound may be damaged in another");
    let moved = |later: VerifyRecord| {
        let before = VerifyRecord { repository: "before".into(), ..record(9, "all", VerifyOutcome::Damaged) };
        VerificationFacts::of(&[later, before], "", ago(0)).unwrap().is_damaged
    };
    assert!(moved(record(1, "all", VerifyOutcome::Partly)), "it was not all read where it is now");
    assert!(!moved(proven("all", VerifyOutcome::Sound, 1)));

    // Where records tell what is known of all places, that counts, whatever was to be read.
    let knows = |hours: i64, millis: u64, places: u64, others: u64| VerifyRecord {
        millis,
        standing: Some(StandingDamage { places, since: (places > 0).then(|| ago(90 * HOUR)), others }),
        ..record(hours, &format!("window {hours}"), VerifyOutcome::Sound)
    };
    let found = |hours, places, others| VerifyRecord {
        outcome: VerifyOutcome::Damaged,
        ..knows(hours, 1, places, others)
    };
    let facts = |records: &[VerifyRecord]| VerificationFacts::of(records, "", ago(0)).unwrap();
    let known = facts(&[knows(1, 1, 3, 0)]);
    assert_eq!((known.is_good, known.is_damaged, known.damage), (false, true, Some((3, ago(90 * HOUR)))));
    let mended = facts(&[knows(1, 1, 0, 0), found(2, 3, 0)]);
    assert_eq!(
        (mended.is_good, mended.damage),
        (true, None),
        "the window that found it may have another name"
    );
    assert!(facts(&[knows(1, 1, 0, 0), found(2, 3, 1)]).is_damaged, "something is missing, too");
    // A long one began earlier, and knew nothing of what another found meanwhile; or found it after that one had ended.
    let long = 9 * 3_600_000;
    assert!(facts(&[found(5, 3, 0), knows(9, long, 0, 0)]).is_damaged);
    assert!(facts(&[knows(5, 1, 0, 0), VerifyRecord { millis: long, ..found(9, 3, 0) }]).is_damaged);
    // Those of a clock that is ahead are no later ones, and those of a copy's original count where there are no own ones.
    assert!(facts(&[knows(-900, 1, 0, 0), found(5, 3, 0)]).is_damaged);
    let original = |record: VerifyRecord| VerifyRecord { repository: "original".into(), ..record };
    assert!(facts(&[original(knows(1, 1, 0, 0)), knows(5, 1, 3, 0)]).is_damaged);
    assert!(facts(&[original(knows(1, 1, 3, 0))]).is_damaged);
    assert!(
        facts(&[original(found(1, 3, 0)), knows(5, 1, 0, 0)]).is_damaged,
        "it may be so here, and nobody has looked"
    );
    assert!(!facts(&[knows(1, 1, 0, 0), original(found(5, 3, 0))]).is_damaged);
    // What a clock that was ahead has proven clears nothing, and what it found is not the last word.
    let ahead = VerifyRecord { proven_since: Some(ago(-900 * HOUR)), ..knows(-900, 1, 0, 0) };
    let ahead = VerifyRecord { whole: true, ..ahead };
    assert!(facts(&[ahead.clone(), found(5, 0, 1)]).is_damaged);
    let ahead = VerifyRecord { outcome: VerifyOutcome::Damaged, ..ahead };
    assert!(facts(&[ahead, knows(5, 1, 0, 0)]).is_good);
    // One that was at work before the other had ended saw nothing of what that found at its end.
    let late = VerifyRecord { millis: long, ..found(9, 0, 1) };
    let early = VerifyRecord { proven_since: Some(ago(5 * HOUR)), whole: true, ..knows(5, 1, 0, 0) };
    assert!(facts(&[early.clone(), late.clone()]).is_damaged);
    let after = VerifyRecord { proven_since: Some(ago(0)), ..early };
    assert!(!facts(&[after, late]).is_damaged);
    assert_eq!(VerificationFacts::last_done(&[record(1, "a", VerifyOutcome::Unread)]), None);
    let all_read = |records: &[VerifyRecord]| VerificationFacts::all_read(records);
    let partly = proven("all", VerifyOutcome::Partly, 8);
    assert_eq!(all_read(&[record(1, "all", VerifyOutcome::Partly), partly.clone()]), Some(ago(8 * HOUR)));
    assert_eq!(
        all_read(&[proven("a", VerifyOutcome::Sound, 1), partly]),
        Some(ago(8 * HOUR)),
        "of the whole"
    );
    assert_eq!(all_read(&[record(1, "all", VerifyOutcome::Partly)]), None);
}
