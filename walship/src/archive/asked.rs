//! What the server asked for before, so that no answer leads it across a fork.
//!
//! PostgreSQL asks for segment N on the newest timeline that it follows and then, whatever kept it
//! from getting that one, for N of each older timeline; it compares nothing but the number. One
//! question alone therefore does not tell whether the server belongs on the timeline it asks about
//! or only falls back to it. Each question is a process of its own, so the answers "absent" and
//! "unknown" are kept in a small file in the data directory, for the one run of the server that got
//! them. Deliveries write nothing. `docs/adr/0002-no-server-crosses-a-fork.md` has the whole argument.
//!
//! ```
//! use walship::archive::asked::{Answer, Asked, Order};
//! use walship::pg::TimelineId;
//!
//! # fn main() -> walship::Result<()> {
//! # let folder = tempfile::tempdir().map_err(|e| walship::Error::from_io("temporary folder", e))?;
//! # let data_directory = folder.path();
//! # std::fs::write(data_directory.join("postmaster.pid"), "4711\n/data\n1700000000\n").unwrap();
//! let mut asked = Asked::load(data_directory)?;
//! asked.note("000000020000000000000005".parse()?, Answer::Absent)?;
//! // The next question comes to another process.
//! let asked = Asked::load(data_directory)?;
//! let followed = TimelineId::try_from(2)?;
//! assert_eq!(asked.order("000000010000000000000005".parse()?), Order::UpToSwitch(followed));
//! # Ok(())
//! # }
//! ```

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::pg::{Lsn, SegmentName, SegmentSize, TimelineHistory, TimelineId, WalFileName};

/// The file's name in the data directory. Base backups leave out what starts with `pgsql_tmp`
/// (`src/backend/backup/basebackup.c`), so no other server ever inherits it.
pub const FILE_NAME: &str = "pgsql_tmp_walship_asked";

/// The first line.
const MAGIC: &str = "walship asked 1";

/// More than the file or `postmaster.pid` ever hold; the rest of a longer one is not ours to read.
const BYTES_MAX: u64 = 16 << 10;

/// As many timelines of one segment as are remembered; a server asks one after the other.
const TIMELINES_MAX: usize = 64;

/// How a question was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The file was put in place.
    Delivered,
    /// It is known that the repository does not hold it.
    Absent,
    /// It could not be found out: an outage, a refusal, damage, a hole.
    Unknown,
}

/// What the earlier answers mean for a question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    /// Nothing: answer with what the repository holds.
    AsStored,
    /// The server follows this newer timeline, which has no such segment: whatever lies behind the
    /// switch point must not be delivered ([`share_of`]).
    UpToSwitch(TimelineId),
    /// A newer timeline's answer was "unknown", so this one is too, whatever is stored.
    Unknown {
        /// What could not be found out.
        because_of: WalFileName,
    },
}

/// What one run of a server has been told so far.
#[derive(Debug)]
pub struct Asked {
    path: PathBuf,
    /// Names the run: pid and start time of the postmaster. `None` when no server runs there
    /// (`pg_rewind`, a call by hand): then nothing is remembered.
    run: Option<String>,
    /// The highest history file that was not delivered, and whether that was known.
    history: Option<(TimelineId, Answer)>,
    /// The segments of the last number asked for that were not delivered.
    segments: Vec<(SegmentName, Answer)>,
}

impl Asked {
    /// Returns what the server that runs in `data_dir` has been told; what an earlier run was told
    /// counts for nothing.
    ///
    /// # Errors
    /// [`Error::LocalIo`] or [`Error::Denied`] when the data directory cannot be read.
    pub fn load(data_dir: &Path) -> Result<Self> {
        let path = data_dir.join(FILE_NAME);
        let pid_file = read_start(&data_dir.join("postmaster.pid"))?;
        let run = pid_file.as_deref().and_then(run_of);
        let mut asked = Self { path, run, history: None, segments: Vec::new() };
        if asked.run.is_some()
            && let Some(text) = read_start(&asked.path)?
        {
            asked.parse(&text);
        }
        Ok(asked)
    }

    /// Returns what the earlier answers mean for a question about `name`.
    pub fn order(&self, name: WalFileName) -> Order {
        let WalFileName::Segment(name) = name else { return Order::AsStored };
        if let Some((timeline, Answer::Unknown)) = self.history
            && timeline > name.timeline
        {
            return Order::Unknown { because_of: WalFileName::History(timeline) };
        }
        let newer = || self.segments.iter().filter(|(asked, _)| is_newer(*asked, name));
        if let Some((unknown, _)) = newer().find(|(_, answer)| *answer != Answer::Absent) {
            return Order::Unknown { because_of: WalFileName::Segment(*unknown) };
        }
        match newer().map(|(asked, _)| asked.timeline).max() {
            Some(followed) => Order::UpToSwitch(followed),
            None => Order::AsStored,
        }
    }

    /// Returns the timeline whose history file this run was told is absent, if it is a newer one than
    /// that of the segment: when it has turned up since, the server has to hear of the fork first
    /// ([`forks_inside`]). Only a server that looks for the newest timeline asks such questions.
    pub fn newest_timeline_sought(&self, name: SegmentName) -> Option<TimelineId> {
        match self.history {
            Some((timeline, Answer::Absent)) if timeline > name.timeline => Some(timeline),
            _ => None,
        }
    }

    /// Keeps the answer for the questions to come. To be called before the server hears it.
    ///
    /// # Errors
    /// [`Error::LocalIo`] or [`Error::Denied`] when it cannot be kept. The server must then not hear
    /// a "no" that it would take for leave to ask an older timeline: the recovery has to stop.
    pub fn note(&mut self, name: WalFileName, answer: Answer) -> Result<()> {
        if self.run.is_none() {
            return Ok(());
        }
        let changed = match name {
            WalFileName::Segment(name) => self.note_segment(name, answer),
            WalFileName::History(timeline) => self.note_history(timeline, answer),
            WalFileName::Partial(_) | WalFileName::BackupHistory(..) => false,
        };
        if changed { self.store() } else { Ok(()) }
    }

    fn note_segment(&mut self, name: SegmentName, answer: Answer) -> bool {
        let position = |name: SegmentName| (name.log, name.seg);
        let same = |(asked, _): &(SegmentName, Answer)| position(*asked) == position(name);
        if answer == Answer::Delivered {
            // No newer timeline's answer may outlive a delivery on the same or a newer timeline; older
            // entries are overtaken by the number of the next question anyway.
            let before = self.segments.len();
            self.segments.retain(|entry| !(same(entry) && entry.0.timeline <= name.timeline));
            return self.segments.len() != before;
        }
        if self.segments.contains(&(name, answer)) {
            return false;
        }
        self.segments.retain(|entry| same(entry) && entry.0.timeline != name.timeline);
        // A server asks from the newest timeline down, so the first ones decide.
        if self.segments.len() < TIMELINES_MAX {
            self.segments.push((name, answer));
        }
        true
    }

    fn note_history(&mut self, timeline: TimelineId, answer: Answer) -> bool {
        match (self.history, answer) {
            (Some((known, _)), Answer::Delivered) if known == timeline => {
                self.history = None;
                true
            }
            (_, Answer::Delivered) => false,
            // Histories of ancestors are read after the search for the newest timeline has ended.
            (Some((known, _)), _) if known > timeline => false,
            (known, _) if known == Some((timeline, answer)) => false,
            _ => {
                self.history = Some((timeline, answer));
                true
            }
        }
    }

    fn store(&self) -> Result<()> {
        let mut text = format!("{MAGIC}\nrun {}\n", self.run.as_deref().unwrap_or_default());
        let history = self.history.map(|(timeline, answer)| (WalFileName::History(timeline), answer));
        let segments = self.segments.iter().map(|(name, answer)| (WalFileName::Segment(*name), *answer));
        for (name, answer) in history.into_iter().chain(segments) {
            let word = if answer == Answer::Absent { "absent" } else { "unknown" };
            let _ = writeln!(text, "{word} {name}");
        }
        // Whole or not at all, but without fsync: what a crash of the machine takes with it belonged to
        // a run that is over.
        let temporary = self.path.with_extension("new");
        let failed = |error| Error::from_io(format!("writing {}", temporary.display()), error);
        fs::write(&temporary, text).map_err(failed)?;
        fs::rename(&temporary, &self.path).map_err(failed)
    }

    /// Takes over what the file says, if it is of this run. Lines that this program never writes are
    /// passed over.
    fn parse(&mut self, text: &str) {
        let mut lines = text.lines();
        if lines.next() != Some(MAGIC)
            || lines.next().and_then(|line| line.strip_prefix("run ")) != self.run.as_deref()
        {
            return;
        }
        for line in lines {
            let Some((word, name)) = line.split_once(' ') else { continue };
            let answer = if word == "absent" { Answer::Absent } else { Answer::Unknown };
            match name.parse() {
                Ok(WalFileName::Segment(name)) => {
                    self.note_segment(name, answer);
                }
                Ok(WalFileName::History(timeline)) => {
                    self.note_history(timeline, answer);
                }
                _ => {}
            }
        }
    }
}

/// Returns whether `history`'s timeline leaves that of segment `name` within the segment (at its very
/// start included): a server on the older timeline can still follow, one step later it could not.
pub fn forks_inside(history: &TimelineHistory, name: SegmentName, size: SegmentSize) -> bool {
    history
        .switch_lsn_of(name.timeline)
        .is_some_and(|switch| (name.start(size)..name.end(size)).contains(&switch))
}

/// What may be delivered of a segment to a server that follows another timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Share {
    /// All of it: the timeline is left later, or at its very end.
    All,
    /// Its first bytes, up to this offset; the rest has to read as zeros, which PostgreSQL takes for
    /// the end of WAL.
    First(u64),
    /// None of it: the timeline was left before, or never belonged to the path.
    Nothing,
}

/// Returns what a server that follows `history` may get of segment `name`.
pub fn share_of(history: &TimelineHistory, name: SegmentName, size: SegmentSize) -> Share {
    let (start, end) = (name.start(size), name.end(size));
    match history.switch_lsn_of(name.timeline) {
        None if name.timeline == history.timeline => Share::All,
        Some(switch) if switch >= end => Share::All,
        Some(Lsn(switch)) if switch > start.0 => Share::First(switch - start.0),
        _ => Share::Nothing,
    }
}

fn is_newer(asked: SegmentName, name: SegmentName) -> bool {
    (asked.log, asked.seg) == (name.log, name.seg) && asked.timeline > name.timeline
}

/// Pid and start time from `postmaster.pid`: lines 1 and 3 (`src/include/utils/pidfile.h`).
fn run_of(pid_file: &str) -> Option<String> {
    let mut lines = pid_file.lines();
    let (pid, started) = (lines.next()?.trim(), lines.nth(1)?.trim());
    let number = |text: &str| text.trim_start_matches('-').parse::<u64>().is_ok();
    (number(pid) && number(started)).then(|| format!("{pid} {started}"))
}

/// Returns the beginning of a small text file; `None` when it does not exist.
fn read_start(path: &Path) -> Result<Option<String>> {
    let failed = |error| Error::from_io(format!("reading {}", path.display()), error);
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let mut bytes = Vec::new();
    file.take(BYTES_MAX).read_to_end(&mut bytes).map_err(failed)?;
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: SegmentSize = SegmentSize::MIN;

    fn server(started: u64) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        start(folder.path(), started);
        folder
    }

    fn start(data_dir: &Path, started: u64) {
        fs::write(data_dir.join("postmaster.pid"), format!("4711\n/data\n{started}\n5432\n")).unwrap();
    }

    fn name(text: &str) -> WalFileName {
        text.parse().unwrap()
    }

    fn segment(timeline: u32, number: u64) -> WalFileName {
        let timeline = TimelineId::new(timeline).unwrap();
        WalFileName::Segment(SegmentName::from_number(timeline, number, SIZE).unwrap())
    }

    /// Each answer is kept by a process of its own.
    fn told(data_dir: &Path, answers: &[(WalFileName, Answer)]) {
        for (name, answer) in answers {
            Asked::load(data_dir).unwrap().note(*name, *answer).unwrap();
        }
    }

    fn order(data_dir: &Path, name: WalFileName) -> Order {
        Asked::load(data_dir).unwrap().order(name)
    }

    #[test]
    fn an_unknown_newer_segment_makes_every_older_one_unknown() {
        let server = server(1);
        told(server.path(), &[(segment(3, 5), Answer::Unknown), (segment(2, 5), Answer::Absent)]);
        let unknown = Order::Unknown { because_of: segment(3, 5) };
        assert_eq!(order(server.path(), segment(2, 5)), unknown);
        assert_eq!(order(server.path(), segment(1, 5)), unknown);
        assert_eq!(order(server.path(), segment(3, 5)), Order::AsStored);
        assert_eq!(order(server.path(), segment(1, 6)), Order::AsStored);
        assert_eq!(order(server.path(), name("00000002.history")), Order::AsStored);
    }

    #[test]
    fn an_absent_newer_segment_limits_the_older_one_to_the_path() {
        let server = server(1);
        told(server.path(), &[(segment(3, 5), Answer::Absent), (segment(2, 5), Answer::Absent)]);
        let three = TimelineId::new(3).unwrap();
        assert_eq!(order(server.path(), segment(1, 5)), Order::UpToSwitch(three));
        // The next number starts anew, and so does a newer timeline's delivery.
        told(server.path(), &[(segment(3, 6), Answer::Absent)]);
        assert_eq!(order(server.path(), segment(1, 5)), Order::AsStored);
        told(server.path(), &[(segment(3, 6), Answer::Delivered)]);
        assert_eq!(order(server.path(), segment(1, 6)), Order::AsStored);
    }

    #[test]
    fn an_unknown_history_makes_the_segments_of_older_timelines_unknown_until_it_is_known() {
        let server = server(1);
        let history = name("00000002.history");
        told(server.path(), &[(history, Answer::Unknown)]);
        assert_eq!(order(server.path(), segment(1, 5)), Order::Unknown { because_of: history });
        assert_eq!(order(server.path(), segment(2, 5)), Order::AsStored);
        for known in [Answer::Absent, Answer::Delivered] {
            told(server.path(), &[(history, Answer::Unknown), (history, known)]);
            assert_eq!(order(server.path(), segment(1, 5)), Order::AsStored, "{known:?}");
        }
        // An ancestor's history says nothing about newer timelines.
        told(server.path(), &[(name("00000003.history"), Answer::Unknown), (history, Answer::Delivered)]);
        assert!(matches!(order(server.path(), segment(1, 5)), Order::Unknown { .. }));
    }

    #[test]
    fn a_search_for_the_newest_timeline_is_remembered() {
        let server = server(1);
        let WalFileName::Segment(first) = segment(1, 5) else { unreachable!() };
        assert_eq!(Asked::load(server.path()).unwrap().newest_timeline_sought(first), None);
        told(server.path(), &[(name("00000002.history"), Answer::Absent)]);
        let sought = Asked::load(server.path()).unwrap().newest_timeline_sought(first);
        assert_eq!(sought, TimelineId::new(2));
    }

    #[test]
    fn another_run_and_no_run_remember_nothing() {
        let server = server(1);
        told(server.path(), &[(segment(2, 5), Answer::Unknown)]);
        assert!(matches!(order(server.path(), segment(1, 5)), Order::Unknown { .. }));
        start(server.path(), 2);
        assert_eq!(order(server.path(), segment(1, 5)), Order::AsStored);
        fs::remove_file(server.path().join("postmaster.pid")).unwrap();
        told(server.path(), &[(segment(2, 5), Answer::Unknown)]);
        assert_eq!(order(server.path(), segment(1, 5)), Order::AsStored);
    }

    #[test]
    fn a_damaged_file_is_no_memory_and_an_unwritable_place_an_error() {
        let server = server(1);
        told(server.path(), &[(segment(2, 5), Answer::Unknown)]);
        for junk in
            ["", "walship asked 2\n", "walship asked 1\nrun 4711 1\n\nabsent\nabsent ../x\n\0\u{fffd}"]
        {
            fs::write(server.path().join(FILE_NAME), junk).unwrap();
            assert_eq!(order(server.path(), segment(1, 5)), Order::AsStored, "{junk:?}");
        }
        fs::create_dir(server.path().join(FILE_NAME).with_extension("new")).unwrap();
        let mut asked = Asked::load(server.path()).unwrap();
        assert!(asked.note(segment(2, 5), Answer::Absent).is_err());
    }

    #[test]
    fn deliveries_write_nothing() {
        let server = server(1);
        told(
            server.path(),
            &[(segment(1, 5), Answer::Delivered), (name("00000002.history"), Answer::Delivered)],
        );
        assert!(!server.path().join(FILE_NAME).exists());
    }

    #[test]
    fn shares_end_at_the_switch_point() {
        let history = |switch: u64| {
            let text = format!("1\t0/{switch:X}\tno recovery target specified\n");
            TimelineHistory::parse(TimelineId::new(2).unwrap(), &text).unwrap()
        };
        let WalFileName::Segment(first) = segment(1, 5) else { unreachable!() };
        let start = 5 << 20;
        for (switch, share, inside) in [
            (start - 8, Share::Nothing, false),
            (start, Share::Nothing, true),
            (start + 40, Share::First(40), true),
            (start + (1 << 20) - 8, Share::First((1 << 20) - 8), true),
            (start + (1 << 20), Share::All, false),
        ] {
            assert_eq!(share_of(&history(switch), first, SIZE), share, "{switch:X}");
            assert_eq!(forks_inside(&history(switch), first, SIZE), inside, "{switch:X}");
        }
        let second = first.on(TimelineId::new(2).unwrap());
        assert_eq!(share_of(&history(start), second, SIZE), Share::All);
        let stranger = first.on(TimelineId::new(3).unwrap());
        assert_eq!(share_of(&history(start), stranger, SIZE), Share::Nothing);
        assert!(!forks_inside(&history(start), stranger, SIZE));
    }
}
