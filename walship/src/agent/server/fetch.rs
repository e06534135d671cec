//! Fetches: what a recovering server asks for, and before it does, what it will ask for next.
//!
//! Every file goes into a spool in the data directory; the one who asked moves it to its place. So whatever
//! happens to a question (its asker killed, this process killed), nothing appears where the server looks.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::statvfs::statvfs;
use tokio::sync::{Mutex, MutexGuard, Semaphore};
use tokio::task::JoinHandle;

use crate::agent::client::{Asker, STATUS_ABSENT, STATUS_STOP};
use crate::archive::fetch::{
    FetchFailure, FetchOptions, FetchOutcome, fetch_file, give_prefetched, prefetch_segment,
};
use crate::error::{Error, Result};
use crate::pg::{SegmentName, SegmentSize, TimelineHistory, TimelineId, WalFileName};

use super::warm::Warm;
use super::{Reply, Said};

/// The spool's name in the data directory. Base backups leave out what starts with `pgsql_tmp`
/// (`src/backend/backup/basebackup.c`), and so does `pg_rewind`.
pub(super) const SPOOL: &str = "pgsql_tmp_walship_spool";

/// The spool holds no more than this.
const SPOOL_BYTES_MAX: u64 = 256 << 20;

/// No more segments are fetched ahead: recovery may end at any of them.
const AHEAD_MAX: u64 = 16;

/// What is fetched ahead takes no more than this part of the room that is left on the server's disk.
const FREE_PART: u64 = 8;

/// The fetches of one data directory.
#[derive(Debug)]
pub(super) struct Fetches {
    warm: Arc<Warm>,
    data_directory: PathBuf,
    lineage: Option<u32>,
    retry: Duration,
    turn: Arc<Semaphore>,
    state: Mutex<State>,
}

/// What is known between two questions. A server asks one at a time.
#[derive(Debug, Default)]
struct State {
    ahead: BTreeMap<SegmentName, Ahead>,
    /// The newest history that the server was given: the path that it follows.
    followed: Option<TimelineHistory>,
}

/// A segment on its way into the spool, or there.
#[derive(Debug)]
struct Ahead {
    path: Spooled,
    fetched: JoinHandle<Result<bool>>,
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.fetched.abort();
    }
}

/// What an answer holds until the asker is done.
#[derive(Debug)]
pub(super) struct Held<'a> {
    _ahead: Option<Ahead>,
    _spooled: Spooled,
    _state: MutexGuard<'a, State>,
}

/// A file of the spool, perhaps to come: what nobody took is removed with this.
#[derive(Debug)]
struct Spooled(PathBuf);

impl Drop for Spooled {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

impl Fetches {
    /// Returns fetches with an empty spool.
    pub(super) fn new(
        warm: Arc<Warm>,
        data_directory: PathBuf,
        lineage: Option<u32>,
        retry: Duration,
        side_by_side: usize,
    ) -> Self {
        let this = Self {
            warm,
            data_directory,
            lineage,
            retry,
            turn: Arc::new(Semaphore::new(side_by_side)),
            state: Mutex::default(),
        };
        this.remove_spool();
        this
    }

    /// Answers a question. What comes with the reply is to be kept until the asker is done: it holds the file, and
    /// the turn.
    pub(super) async fn asked(&self, name: &OsStr, target: &Path) -> (Reply, Option<Held<'_>>) {
        let Some(Ok(name)) = name.to_str().map(str::parse::<WalFileName>) else {
            return (Reply::Foreground("that is no WAL file's name".to_owned()), None);
        };
        let mut state = self.state.lock().await;
        let asker = Asker::of(target);
        let spooled = match self.make_spool() {
            Ok(spool) => Spooled(spool.join(name.to_string())),
            Err(error) => return (Reply::Foreground(error.to_string()), None),
        };
        let options = self.options(asker, Some(spooled.0.clone()));
        let mut ahead = None;
        if let WalFileName::Segment(segment) = name {
            ahead = self.fetched_ahead(&mut state, segment, target, &options).await;
        }
        let reply = match &ahead {
            Some(ahead) => Reply::File(ahead.path.0.clone()),
            None => match self.fetch(name, target, &options, &spooled.0).await {
                // What is fetched ahead may be what there is no room for.
                Err(failure) if matches!(failure.error, Error::LocalIo(_)) && !state.ahead.is_empty() => {
                    state.ahead.clear();
                    self.fetch(name, target, &options, &spooled.0).await
                }
                fetched => fetched,
            }
            .unwrap_or_else(|failure| self.failed(target, &failure)),
        };
        let delivered = matches!(reply, Reply::File(_));
        if delivered {
            self.note_followed(&mut state, name, &spooled.0);
            if let (WalFileName::Segment(segment), true) = (name, asker != Asker::Other) {
                self.fetch_ahead(&mut state, segment, target, asker, &spooled.0);
            }
        }
        (reply, Some(Held { _state: state, _ahead: ahead, _spooled: spooled }))
    }

    /// Forgets everything when no recovery is going on any more.
    pub(super) fn tidy(&self) {
        let has = |name: &str| self.data_directory.join(name).symlink_metadata().is_ok();
        let recovering = has("postmaster.pid") && (has("recovery.signal") || has("standby.signal"));
        if !recovering && let Ok(mut state) = self.state.try_lock() {
            *state = State::default();
            self.remove_spool();
        }
    }

    /// Removes the spool and everything in it.
    pub(super) fn remove_spool(&self) {
        let _ = fs::remove_dir_all(self.data_directory.join(SPOOL));
    }

    fn make_spool(&self) -> Result<PathBuf> {
        let spool = self.data_directory.join(SPOOL);
        match fs::DirBuilder::new().mode(0o700).create(&spool) {
            Ok(()) => Ok(spool),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(spool),
            Err(error) => Err(Error::from_io(format!("making the folder {}", spool.display()), error)),
        }
    }

    fn options(&self, asker: Asker, deliver_to: Option<PathBuf>) -> FetchOptions {
        FetchOptions {
            lineage: self.lineage,
            retry: asker.retry(self.retry),
            standby: asker == Asker::Standby,
            // Who wants that asks in the foreground.
            up_to_damage: false,
            up_to_gap: None,
            deliver_to,
        }
    }

    /// Returns the segment where it was fetched ahead and may be given out.
    async fn fetched_ahead(
        &self,
        state: &mut State,
        segment: SegmentName,
        target: &Path,
        options: &FetchOptions,
    ) -> Option<Ahead> {
        let mut ahead = state.ahead.remove(&segment)?;
        let there = matches!((&mut ahead.fetched).await, Ok(Ok(true)));
        let allowed =
            there && matches!(give_prefetched(&*self.warm, segment, target, options).await, Ok(true));
        allowed.then_some(ahead)
    }

    /// Fetches as `walship wal fetch` does.
    async fn fetch(
        &self,
        name: WalFileName,
        target: &Path,
        options: &FetchOptions,
        spooled: &Path,
    ) -> Result<Reply, FetchFailure> {
        Ok(match fetch_file(&*self.warm, name, target, options).await? {
            FetchOutcome::Delivered { .. } => Reply::File(spooled.to_owned()),
            FetchOutcome::Absent => {
                let text = match Asker::of(target) {
                    Asker::Standby => String::new(),
                    Asker::OneShot | Asker::Other => format!("{name} is not in the repository\n"),
                };
                Reply::Said(Said { status: STATUS_ABSENT, text })
            }
        })
    }

    fn failed(&self, target: &Path, failure: &FetchFailure) -> Reply {
        self.warm.forget();
        let status = if failure.must_stop { STATUS_STOP } else { Asker::of(target).unanswered() };
        Reply::Said(Said { status, text: failure.error.report() + "\n" })
    }

    /// Takes note of the path that the server follows from now on.
    fn note_followed(&self, state: &mut State, name: WalFileName, spooled: &Path) {
        let WalFileName::History(timeline) = name else { return };
        let text = fs::read_to_string(spooled).unwrap_or_default();
        let newer = state.followed.as_ref().is_none_or(|known| known.timeline < timeline);
        if let (true, Ok(history)) = (newer, TimelineHistory::parse(timeline, &text)) {
            state.followed = Some(history);
            // What was fetched along another path is not asked for.
            state.ahead.clear();
        }
    }

    /// Fetches what the server will ask for after `segment`, which lies at `spooled`.
    fn fetch_ahead(
        &self,
        state: &mut State,
        segment: SegmentName,
        target: &Path,
        asker: Asker,
        spooled: &Path,
    ) {
        let Some(size) = fs::metadata(spooled).ok().and_then(|file| SegmentSize::new(file.len())) else {
            return;
        };
        let room = SPOOL_BYTES_MAX.min(free_bytes(spooled) / FREE_PART);
        let ahead_max = (room / size.bytes()).min(AHEAD_MAX);
        let number = segment.number(size);
        let wanted: Vec<SegmentName> = (number + 1..=number + ahead_max)
            .filter_map(|number| next_on_path(segment.timeline, number, state.followed.as_ref(), size))
            .collect();
        state.ahead.retain(|name, _| wanted.contains(name));
        sweep(spooled, &wanted);
        for name in wanted {
            let path = spooled.with_file_name(name.to_string());
            let Entry::Vacant(place) = state.ahead.entry(name) else { continue };
            let options = self.options(asker, Some(path.clone()));
            let (warm, turn, target) = (Arc::clone(&self.warm), Arc::clone(&self.turn), target.to_owned());
            let fetched = tokio::spawn(async move {
                let _turn = turn.acquire_owned().await;
                prefetch_segment(&*warm, name, &target, &options).await
            });
            place.insert(Ahead { path: Spooled(path), fetched });
        }
    }
}

/// Returns how much room is left where a file lies; all of it where that cannot be said.
fn free_bytes(file: &Path) -> u64 {
    statvfs(file).map_or(u64::MAX, |disk| disk.blocks_available().saturating_mul(disk.fragment_size()))
}

/// Removes what a fetch that was broken off at its last step left beside `spooled`.
fn sweep(spooled: &Path, wanted: &[SegmentName]) {
    let Some(own) = spooled.file_name().and_then(OsStr::to_str) else { return };
    let Ok(entries) = fs::read_dir(spooled.with_file_name("")) else { return };
    for entry in entries.flatten() {
        let file_name = entry.file_name();
        let of = |name: &str| file_name.to_str().is_some_and(|text| text.starts_with(name));
        if !of(own) && !wanted.iter().any(|name| of(&name.to_string())) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Returns the name by which a server asks first for segment `number`: that of the newest timeline of its path
/// that has begun in or before it.
///
/// Source: `src/backend/access/transam/xlogrecovery.c`, XLogFileReadAnyTLI.
fn next_on_path(
    current: TimelineId,
    number: u64,
    followed: Option<&TimelineHistory>,
    size: SegmentSize,
) -> Option<SegmentName> {
    let first = SegmentName::from_number(current, number, size)?;
    let Some(history) = followed.filter(|history| history.contains(current)) else { return Some(first) };
    let mut newest = history.timeline;
    for ancestor in history.ancestors.iter().rev() {
        let begin = SegmentName::containing(newest, ancestor.switch_lsn, size).number(size);
        if begin <= number {
            break;
        }
        newest = ancestor.timeline;
    }
    Some(first.on(newest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_is_followed_across_forks() {
        let size = SegmentSize::MIN;
        let at = |timeline: u32, number| {
            SegmentName::from_number(TimelineId::new(timeline).unwrap(), number, size).unwrap()
        };
        let lsn = |number: u64, offset: u64| format!("0/{:X}", number * size.bytes() + offset);
        let text = format!("1\t{}\tx\n2\t{}\tx\n", lsn(5, 100), lsn(9, 0));
        let history = TimelineHistory::parse(TimelineId::new(3).unwrap(), &text).unwrap();
        let next = |timeline: u32, number| {
            next_on_path(TimelineId::new(timeline).unwrap(), number, Some(&history), size).unwrap()
        };
        assert_eq!(next(1, 4), at(1, 4));
        assert_eq!(next(1, 5), at(2, 5), "the fork lies in this segment");
        assert_eq!(next(2, 8), at(2, 8));
        assert_eq!(next(2, 9), at(3, 9));
        assert_eq!(next(3, 12), at(3, 12));
        let alone = next_on_path(TimelineId::FIRST, 7, None, size).unwrap();
        assert_eq!(alone, at(1, 7));
        // A path that the current timeline does not belong to says nothing.
        assert_eq!(next(4, 12), at(4, 12));
    }
}
