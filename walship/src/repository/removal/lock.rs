//! The lock of removals: for clear messages, and so that two do not do the same work. Nothing stored depends on it.

use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::repository::document::{self, DOCUMENT_BYTES_MAX, DOCUMENT_VERSION};
use crate::repository::{LineageRepository, RecordedBy};
use crate::storage::{ObjectKey, PutOutcome, list_all};

/// How long a lock holds that is not renewed.
const LOCK: Duration = Duration::from_secs(600);

/// A lock is renewed when it is this old.
const RENEW_AFTER: Duration = Duration::from_secs(180);

/// How often it is looked whether that is due, while something takes long.
pub(super) const LOOKED_AT_EVERY: Duration = Duration::from_secs(30);

/// More locks than there ever are.
const LOCKS_MAX: usize = 10_000;

/// Who removes (`locks/expire/<number>.json`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LockDocument {
    format: u32,
    run: String,
    host: String,
    user: String,
    pid: u32,
    /// Among which processes `pid` is a number; a lock without it says nothing of its holder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    processes: Option<String>,
    taken: DateTime<Utc>,
    until: DateTime<Utc>,
}

/// A lock that is held.
#[derive(Debug)]
pub(super) struct Lock {
    run: String,
    number: u32,
    renewed: Instant,
    renewed_at: DateTime<Utc>,
}

impl Lock {
    /// Takes the lock of a lineage; returns it, and the keys of those that are over.
    ///
    /// # Errors
    /// [`Error::Unavailable`] while another holds it.
    pub(super) async fn take(
        repository: &LineageRepository,
        run: &str,
        now: DateTime<Utc>,
        store_now: Option<DateTime<Utc>>,
    ) -> Result<(Self, Vec<ObjectKey>)> {
        let renewed = Instant::now();
        let listed = listed(repository).await?;
        if let Some((_, key)) = listed.last() {
            // By one clock where the store has one: those of two machines may differ by more than a lock's time.
            let age = repository.written_at(key).await?.zip(store_now);
            let over = age.map(|(written, store_now)| {
                store_now.signed_duration_since(written).to_std().is_ok_and(|age| age >= LOCK)
            });
            match document::read_listed::<LockDocument>(&*repository.storage, key, DOCUMENT_BYTES_MAX).await {
                Ok(Some(held)) if !over.unwrap_or(held.until <= now) && !has_died(&held) => {
                    return Err(busy(repository, &held, now));
                }
                Ok(_) => {}
                Err(Error::Corrupt(_) | Error::Mismatch(_)) if over == Some(true) => {}
                Err(error @ (Error::Corrupt(_) | Error::Mismatch(_))) => {
                    return Err(Error::unavailable(format!(
                        "another removal may be at work in {}: its lock cannot be read ({error})",
                        repository.location()
                    ))
                    .with_safe("nothing was removed by this one")
                    .with_next("Wait for ten minutes: a lock that nobody renews is over then."));
                }
                Err(error) => return Err(error),
            }
        }
        let number = listed.last().map_or(1, |(number, _)| number.saturating_add(1));
        let key = repository.layout.expire_lock(number)?;
        if document::put(&*repository.storage, &key, &lock_document(run, now)).await? == PutOutcome::Exists {
            let held = document::read_listed::<LockDocument>(&*repository.storage, &key, DOCUMENT_BYTES_MAX);
            match held.await? {
                // The answer to this very call's first attempt was lost.
                Some(held) if held.run == run => {}
                Some(held) => return Err(busy(repository, &held, now)),
                None => {
                    return Err(
                        Error::unavailable("another removal has just ended").with_safe("nothing was removed")
                    );
                }
            }
        }
        let lock = Self { run: run.to_owned(), number, renewed, renewed_at: now };
        Ok((lock, listed.into_iter().map(|(_, key)| key).collect()))
    }

    /// Returns the lock's key.
    pub(super) fn key(&self, repository: &LineageRepository) -> Result<ObjectKey> {
        repository.layout.expire_lock(self.number)
    }

    /// Renews the lock where that is due; returns the key of the one before, which is over then.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when it was lost.
    pub(super) async fn stay(&mut self, repository: &LineageRepository) -> Result<Option<ObjectKey>> {
        let now = Utc::now();
        // While a machine sleeps the one clock may stand still; the other may be set.
        let by_clock = now.signed_duration_since(self.renewed_at).to_std().unwrap_or_default();
        let age = self.renewed.elapsed().max(by_clock);
        if age < RENEW_AFTER {
            return Ok(None);
        }
        if age >= LOCK {
            return Err(lost());
        }
        let (old, begun) = (self.key(repository)?, Instant::now());
        let key = repository.layout.expire_lock(self.number + 1)?;
        if document::put(&*repository.storage, &key, &lock_document(&self.run, now)).await?
            == PutOutcome::Exists
        {
            return Err(lost());
        }
        (self.number, self.renewed, self.renewed_at) = (self.number + 1, begun, now);
        Ok(Some(old))
    }

    /// Fails when another has taken the lock since, because this process stood still for too long.
    ///
    /// # Errors
    /// [`Error::Unavailable`]
    pub(super) async fn confirm(&self, repository: &LineageRepository) -> Result<()> {
        match listed(repository).await?.last() {
            Some((newest, _)) if *newest == self.number => Ok(()),
            _ => Err(lost()),
        }
    }
}

fn lost() -> Error {
    Error::unavailable("this removal was held up for too long, and its lock is lost")
        .with_safe("what is left is whole: what was to be removed does not count any more")
        .with_next("Run `pitr expire` again: it goes on where this one ended.")
}

/// Returns the locks that there are, by their numbers.
async fn listed(repository: &LineageRepository) -> Result<Vec<(u32, ObjectKey)>> {
    let prefix = repository.layout.expire_locks_prefix();
    let listed = list_all(&*repository.storage, &prefix, LOCKS_MAX).await?;
    let number =
        |key: &ObjectKey| key.as_str().strip_prefix(&prefix)?.strip_suffix(".json")?.parse::<u32>().ok();
    let mut numbered: Vec<_> =
        listed.into_iter().filter_map(|meta| Some((number(&meta.key)?, meta.key))).collect();
    numbered.sort();
    Ok(numbered)
}

fn lock_document(run: &str, now: DateTime<Utc>) -> LockDocument {
    let RecordedBy { host, user } = RecordedBy::now();
    let until = now + LOCK;
    LockDocument {
        format: DOCUMENT_VERSION,
        run: run.to_owned(),
        host,
        user,
        pid: std::process::id(),
        processes: processes(),
        taken: now,
        until,
    }
}

/// Returns a name of the processes that this one sees: the machine's boot and the namespace of process ids. Of another boot,
/// or in another container, a number is another process's.
fn processes() -> Option<String> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let namespace = std::fs::read_link("/proc/self/ns/pid").ok()?;
    Some(format!("{} {}", boot.trim(), namespace.to_str()?))
}

/// Returns whether the holder of a lock is known to be gone: a process that this one would see, and that is not there.
fn has_died(held: &LockDocument) -> bool {
    let Ok(pid) = i32::try_from(held.pid) else { return false };
    let RecordedBy { host, .. } = RecordedBy::now();
    let asked = || nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), None);
    let seen = held.processes.is_some() && held.processes == processes();
    seen && !host.is_empty() && host == held.host && pid > 0 && asked() == Err(nix::errno::Errno::ESRCH)
}

fn busy(repository: &LineageRepository, held: &LockDocument, now: DateTime<Utc>) -> Error {
    let clean = |text: &str| -> String {
        text.chars().map(|c| if c.is_control() { '?' } else { c }).take(100).collect()
    };
    let seconds = (held.until - now).num_seconds().max(1);
    Error::unavailable(format!(
        "another removal is at work in {}: of {} on {} (process {}), since {}",
        repository.location(),
        clean(&held.user),
        clean(&held.host),
        held.pid,
        held.taken.format("%Y-%m-%d %H:%M:%SZ")
    ))
    .with_safe("nothing was removed by this one")
    .with_next(format!(
        "Wait for it to end. If it was killed, its lock is over in {seconds} s, and `pitr expire` then goes on where it \
         ended."
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A process id that is in use nowhere: above what Linux gives out.
    const NOBODY: u32 = 1 << 30;

    #[test]
    fn only_a_process_that_can_be_seen_is_known_to_be_gone() {
        let own = || lock_document("20260101T000000Z-0123456789abcdef", Utc::now());
        assert!(!has_died(&own()), "this process is alive");
        assert!(has_died(&LockDocument { pid: NOBODY, ..own() }));
        let elsewhere = LockDocument { pid: NOBODY, host: "elsewhere".into(), ..own() };
        let container = own().processes.map(|words| format!("{words}1"));
        for held in [
            elsewhere,
            LockDocument { pid: NOBODY, processes: container, ..own() },
            LockDocument { pid: NOBODY, processes: Some("another-boot pid:[4026531836]".into()), ..own() },
            LockDocument { pid: NOBODY, processes: None, ..own() },
        ] {
            assert!(!has_died(&held), "{held:?}");
        }
    }
}
