//! Looks at a server that recovers: its pid file, pg_control, and as soon as it takes connections its own word.

use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use walship::pg::control::{ClusterState, ControlData};
use walship::pg::{Lsn, SegmentName, TimelineHistory, TimelineId};
use walship::replication::{ConnectOptions, Connection, Origin, SessionKind};
use walship::{Error, Result};

use super::pid_file::PidFile;

/// How long the server may take to let us in, and to answer.
const ANSWER_PATIENCE: Duration = Duration::from_secs(20);

/// How often the processes of the machine are looked through for the one that replays.
const LOOK_FOR_PROCESS: Duration = Duration::from_secs(2);

/// The state is read before the positions: where it says that recovery has ended, they are final. The times are in
/// microseconds since 1970.
const QUESTION: &str = "\
SELECT recovers, lsn, (EXTRACT(epoch FROM last) * 1000000)::pg_catalog.int8,
  CASE WHEN recovers THEN pg_catalog.pg_get_wal_replay_pause_state() END,
  CASE WHEN recovers
    THEN (SELECT pg_catalog.lpad(pg_catalog.to_hex(greatest(min_recovery_end_timeline, timeline_id)), 8, '0')
      FROM pg_catalog.pg_control_recovery(), pg_catalog.pg_control_checkpoint())
    ELSE pg_catalog.substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()), 1, 8) END
FROM (SELECT pg_catalog.pg_is_in_recovery() AS recovers, pg_catalog.pg_last_wal_replay_lsn() AS lsn,
  pg_catalog.pg_last_xact_replay_timestamp() AS last OFFSET 0) AS replay";

/// What the server answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Answer {
    recovers: bool,
    replayed: Option<Lsn>,
    /// When the last transaction ended that is replayed.
    pub(super) last_transaction: Option<DateTime<Utc>>,
    is_paused: bool,
    timeline: Option<TimelineId>,
}

/// What one look at the server shows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Look {
    /// Its pid file, when it runs.
    pub(super) server: Option<PidFile>,
    /// Its own word.
    pub(super) answer: Option<Answer>,
    /// Its pg_control.
    pub(super) control: Option<ControlData>,
    /// The segment that the recovering process says it is at.
    segment: Option<SegmentName>,
    /// The timeline that recovery began, and where, as its history file says.
    begun: Option<(TimelineId, Lsn)>,
    /// Why the server cannot be asked.
    pub(super) not_asked: Option<String>,
}

impl Look {
    /// Returns the position up to which WAL is replayed: exact by the server's word, else no more than that.
    pub(super) fn replayed(&self) -> Option<Lsn> {
        self.exactly_replayed().or_else(|| {
            let control = self.control.as_ref()?;
            let segment = self.segment.map(|segment| segment.start(control.segment_size));
            Some(control.min_recovery_point.max(control.redo)).max(segment).filter(|lsn| lsn.is_valid())
        })
    }

    /// Returns the position up to which WAL is replayed; `None` when that is not known exactly.
    pub(super) fn exactly_replayed(&self) -> Option<Lsn> {
        let asked = self.answer.as_ref().and_then(|answer| answer.replayed);
        asked.or(self.begun.map(|(_, lsn)| lsn))
    }

    /// Returns the timeline that the server is on.
    pub(super) fn timeline(&self) -> Option<TimelineId> {
        let asked = self.answer.as_ref().and_then(|answer| answer.timeline);
        asked.or(self.begun.map(|(timeline, _)| timeline)).or(self.control.as_ref().map(|c| c.timeline))
    }

    /// Returns whether it is open for writing.
    pub(super) fn is_open(&self) -> bool {
        match (&self.answer, &self.server) {
            (Some(answer), _) => !answer.recovers,
            // The word of a server that answers outranks the file, which is written a moment before.
            (None, Some(server)) => {
                let state = self.control.as_ref().map(|control| control.state);
                self.not_asked.is_some()
                    && server.takes_connections()
                    && state == Some(ClusterState::InProduction)
            }
            (None, None) => false,
        }
    }

    /// Returns whether it stands still at its target.
    pub(super) fn is_paused(&self) -> bool {
        self.answer.as_ref().is_some_and(|answer| answer.recovers && answer.is_paused)
    }

    /// Returns whether it takes connections, and answers where it is known to.
    pub(super) fn takes_connections(&self) -> bool {
        let says = self.server.as_ref().is_some_and(PidFile::takes_connections);
        says && (self.answer.is_some() || self.not_asked.is_some())
    }

    /// Returns whether anything shows that recovery has gone on since.
    pub(super) fn has_moved(&self, since: &Self) -> bool {
        let state = |look: &Self| {
            let control = look.control.as_ref();
            (
                look.replayed(),
                look.segment,
                look.server.as_ref().map(|server| server.status.clone()),
                control.map(|control| (control.state, control.checkpoint, control.min_recovery_point)),
            )
        };
        state(self) != state(since)
    }

    /// Returns this look where it holds the server's word, else the other.
    pub(super) fn or(self, other: Self) -> Self {
        if self.answer.is_some() || other.answer.is_none() { self } else { other }
    }
}

/// Looks at one server again and again.
#[derive(Debug)]
pub(super) struct Watcher {
    data_dir: PathBuf,
    connection: Option<Connection>,
    /// Why the server does not let us in: asking again would not change that.
    refused: Option<String>,
    /// The pid file as it was last.
    last: Option<PidFile>,
    /// The process that replays, and when it was last looked for.
    replaying: (Option<u32>, Option<Instant>),
}

impl Watcher {
    pub(super) fn of(data_dir: &Path) -> Self {
        Self {
            data_dir: data_dir.to_owned(),
            connection: None,
            refused: None,
            last: None,
            replaying: (None, None),
        }
    }

    /// Returns what can be seen now. `ask`: whether the server is to be asked when it takes connections.
    pub(super) async fn look(&mut self, ask: bool) -> Look {
        let mut look = Look {
            server: self.running(),
            // A file that is being written reads as damaged: the next look will tell.
            control: fs::read(self.data_dir.join("global/pg_control"))
                .ok()
                .and_then(|bytes| ControlData::parse(&bytes).ok()),
            ..Look::default()
        };
        let Some(server) = look.server.clone() else {
            self.connection = None;
            return look;
        };
        if ask && server.takes_connections() {
            look.answer = self.ask(&server).await;
        }
        look.not_asked = self.refused.clone();
        if server.stays_closed() {
            look.not_asked = Some("hot_standby is off: it takes no connections while it recovers".to_owned());
        }
        if look.answer.is_none() {
            look.segment = self.segment_replayed(server.pid);
            if look.is_open() {
                look.begun = look.control.as_ref().and_then(|control| self.begun(control.timeline));
            }
        }
        look
    }

    /// Returns the pid file of a server that runs. A file that cannot be read while it is written says what it said
    /// before.
    fn running(&mut self) -> Option<PidFile> {
        let text = fs::read_to_string(self.data_dir.join("postmaster.pid")).unwrap_or_default();
        let file = PidFile::parse(&text).or_else(|| self.last.take());
        self.last = file.filter(|file| is_alive(file.pid));
        self.last.clone()
    }

    /// Returns the server's word; `None` when it gives none now.
    async fn ask(&mut self, server: &PidFile) -> Option<Answer> {
        if self.refused.is_some() {
            return None;
        }
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => match connect(server, &self.data_dir).await {
                Ok(connection) => connection,
                // It may be busy, or about to end: the next look will tell.
                Err(Error::Unavailable(_)) => return None,
                Err(error) => {
                    self.refused = Some(error.to_string());
                    return None;
                }
            },
        };
        let rows = match connection.query(QUESTION).await {
            Ok(rows) => rows,
            Err(Error::Denied(detail)) => {
                self.refused = Some(detail.to_string());
                return None;
            }
            // Among them: recovery ended while it answered.
            Err(_) => return None,
        };
        self.connection = Some(connection);
        Some(Answer {
            recovers: rows.get(0, 0)? == "t",
            replayed: rows.get(0, 1).and_then(|lsn| lsn.parse().ok()),
            last_transaction: rows
                .get(0, 2)
                .and_then(|micros| micros.parse().ok())
                .and_then(DateTime::from_timestamp_micros),
            is_paused: rows.get(0, 3) == Some("paused"),
            timeline: rows.get(0, 4).and_then(timeline_of_hex),
        })
    }

    /// Returns the segment that the recovering process names in its title.
    fn segment_replayed(&mut self, postmaster: u32) -> Option<SegmentName> {
        if let Some(segment) = self.replaying.0.and_then(title_segment) {
            return Some(segment);
        }
        if self.replaying.1.is_some_and(|at| at.elapsed() < LOOK_FOR_PROCESS) {
            return None;
        }
        let found = children(postmaster).into_iter().find(|pid| title_segment(*pid).is_some());
        self.replaying = (found, Some(Instant::now()));
        found.and_then(title_segment)
    }

    /// Returns the newest timeline that the data directory has a history file of, above the one it was on,
    /// and where it begins: recovery writes that file when it ends.
    fn begun(&self, at_least: TimelineId) -> Option<(TimelineId, Lsn)> {
        let entries = fs::read_dir(self.data_dir.join("pg_wal")).ok()?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let timelines = names.filter_map(|name| timeline_of_hex(name.strip_suffix(".history")?));
        let newest = timelines.max().filter(|newest| *newest >= at_least)?;
        let path = self.data_dir.join("pg_wal").join(format!("{}.history", newest.hex()));
        let history = TimelineHistory::parse(newest, &fs::read_to_string(path).ok()?).ok()?;
        Some((newest, history.begin_lsn()?))
    }
}

fn timeline_of_hex(text: &str) -> Option<TimelineId> {
    let is_name = text.len() == 8 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_name.then(|| u32::from_str_radix(text, 16).ok())?.and_then(TimelineId::new)
}

/// Returns a session with the server, as the user of the environment, else as `postgres`.
async fn connect(server: &PidFile, data_dir: &Path) -> Result<Connection> {
    let host = server.host(data_dir).ok_or_else(|| Error::invalid("the server listens nowhere"))?;
    let quoted = host.replace('\\', "\\\\").replace('\'', "\\'");
    let place = format!("host='{quoted}' port={} dbname=postgres", server.port.unwrap_or(5432));
    // Which server is meant is known; from the environment comes only who asks.
    let variable = |name: &str| {
        let kept = ["PGUSER", "PGPASSWORD", "PGPASSFILE", "HOME"].contains(&name);
        env::var(name).ok().filter(|_| kept)
    };
    let mut failure = None;
    for user in ["", " user=postgres"] {
        let options = ConnectOptions::resolve(&format!("{place}{user}"), Origin::Private, &variable);
        let connected = match options {
            Ok(mut options) => {
                options.connect_timeout = ANSWER_PATIENCE;
                options.command_timeout = ANSWER_PATIENCE;
                options.application_name = "pitr restore".to_owned();
                Connection::connect(&options, SessionKind::Ordinary).await
            }
            Err(error) => Err(error),
        };
        match connected {
            Ok(connection) => return Ok(connection),
            Err(error @ Error::Unavailable(_)) => return Err(error),
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    Err(failure.unwrap_or_else(|| Error::denied("nobody was let in")))
}

/// Returns whether a process runs; one that has ended and that nobody waited for does not.
fn is_alive(pid: u32) -> bool {
    let Ok(number) = i32::try_from(pid) else { return false };
    let there = match kill(Pid::from_raw(number), None) {
        Ok(()) | Err(Errno::EPERM) => true,
        Err(_) => false,
    };
    there && stat(pid).is_none_or(|(state, _)| state != 'Z')
}

/// Returns a process's state and parent, where the system tells them in files.
fn stat(pid: u32) -> Option<(char, u32)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name before may hold anything, parentheses too.
    let mut fields = text.rsplit_once(") ")?.1.split(' ');
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

fn children(parent: u32) -> Vec<u32> {
    let numbers = |entry: io::Result<fs::DirEntry>| entry.ok()?.file_name().to_str()?.parse::<u32>().ok();
    let all = fs::read_dir("/proc").into_iter().flatten().filter_map(numbers);
    all.filter(|pid| stat(*pid).is_some_and(|(_, of)| of == parent)).collect()
}

/// Returns the segment in `postgres: startup recovering 000000010000000000000005`.
///
/// Source: `src/backend/access/transam/xlogrecovery.c`, XLogFileRead.
fn title_segment(pid: u32) -> Option<SegmentName> {
    let title = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    segment_of_title(&String::from_utf8_lossy(&title))
}

fn segment_of_title(title: &str) -> Option<SegmentName> {
    let words = title.split(|c: char| c == '\0' || c.is_whitespace()).filter(|word| !word.is_empty());
    let words: Vec<&str> = words.collect();
    match *words {
        [.., "recovering", segment] => segment.parse().ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_title_of_the_recovering_process_is_read() {
        for (title, segment) in [
            ("postgres: startup recovering 00000001000000A000000005\0\0\0", Some("00000001000000A000000005")),
            ("postgres: main: startup recovering 000000020000000000000001", Some("000000020000000000000001")),
            ("postgres: startup waiting for 000000020000000000000001", None),
            ("postgres: checkpointer", None),
            ("", None),
        ] {
            assert_eq!(segment_of_title(title).map(|name| name.to_string()).as_deref(), segment, "{title}");
        }
    }

    #[test]
    fn the_timeline_that_recovery_began_is_read_from_its_history() {
        let home = tempfile::tempdir().unwrap();
        let wal = home.path().join("pg_wal");
        fs::create_dir(&wal).unwrap();
        let watcher = Watcher::of(home.path());
        let one = TimelineId::FIRST;
        assert_eq!(watcher.begun(one), None);
        fs::write(wal.join("00000002.history"), "1\t0/1100000\tno recovery target specified\n").unwrap();
        fs::write(wal.join("000000010000000000000001"), "").unwrap();
        assert_eq!(watcher.begun(one), Some((TimelineId::new(2).unwrap(), Lsn(0x110_0000))));
        assert_eq!(watcher.begun(TimelineId::new(3).unwrap()), None);
    }

    #[test]
    fn processes_are_known_to_run() {
        assert!(is_alive(std::process::id()));
        assert!(!is_alive(u32::MAX));
        let parent = stat(std::process::id()).unwrap().1;
        assert!(children(parent).contains(&std::process::id()));
    }
}
