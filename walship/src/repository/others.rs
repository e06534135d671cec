//! Several repositories of one lineage, read as one: what is missing, damaged or not to be had in the first is
//! taken from another. Only reading knows of this; what is written is written to one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::index::ListedSegment;
use super::{ClusterRepository, LineageRepository};
use crate::catalog::Lineage;
use crate::error::{Error, Result};
use crate::pg::SegmentName;

/// More that is to be known of repositories than anybody reads.
const NOTES_MAX: usize = 50;

/// What a lineage in one repository knows of the same lineage in others. Clones share what was noted.
#[derive(Debug, Clone, Default)]
pub(super) struct Others {
    repositories: Vec<LineageRepository>,
    notes: Arc<Mutex<BTreeSet<String>>>,
    /// The configured repositories that could not be read at all.
    unreadable: Arc<Mutex<Vec<String>>>,
    /// Of segments that a repository holds with other content than the one that is right, the digest of that.
    right: Arc<Mutex<BTreeMap<SegmentName, String>>>,
    /// Whether a call to this very repository ended in an outage: it is asked last then.
    down: Arc<AtomicBool>,
    /// Whether another gave what this one holds and could not give.
    made_up_for: Arc<AtomicBool>,
}

impl LineageRepository {
    /// Returns this lineage with others that hold the same, to be read from where this one cannot answer.
    #[must_use]
    pub fn with_others(mut self, others: Vec<Self>) -> Self {
        self.others.repositories = others;
        self
    }

    /// Returns this repository and the others, each by itself; those that answer before those that had an outage.
    pub fn each(&self) -> Vec<Self> {
        let all = std::iter::once(self).chain(&self.others.repositories);
        let mut each: Vec<Self> = all.map(Self::alone).collect();
        each.sort_by_key(|one| one.others.down.load(Ordering::Relaxed));
        each
    }

    /// Returns this repository by itself.
    pub(super) fn alone(&self) -> Self {
        Self { others: Others { repositories: Vec::new(), ..self.others.clone() }, ..self.clone() }
    }

    /// Returns what was taken from others, and why; and what else is to be known about the repositories.
    pub fn notes(&self) -> Vec<String> {
        self.others.notes.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    /// Adds to what is to be known about the repositories.
    pub fn note(&self, note: impl Into<String>) {
        let mut notes = self.others.notes.lock().unwrap_or_else(PoisonError::into_inner);
        if notes.len() < NOTES_MAX {
            notes.insert(note.into());
        }
    }

    /// Returns the URLs of the configured repositories that could not be read when the lineage was opened.
    pub fn unreadable(&self) -> Vec<String> {
        self.others.unreadable.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes an error of this repository by itself.
    pub fn failed(&self, error: &Error) {
        if matches!(error, Error::Unavailable(_)) {
            self.others.down.store(true, Ordering::Relaxed);
        }
    }

    /// Notes which content of a segment counts: the beginning of its digest in hex. Repositories with another one
    /// are passed over for this segment.
    pub(super) fn note_right(&self, name: SegmentName, digest: String) {
        self.others.right.lock().unwrap_or_else(PoisonError::into_inner).insert(name, digest);
    }

    /// Fails for content of a segment that is known to be the wrong one.
    ///
    /// # Errors
    /// [`Error::Missing`]: the right one is not there.
    pub(super) fn check_right(&self, name: SegmentName, digest: &str, one: &Self) -> Result<()> {
        let right = self.others.right.lock().unwrap_or_else(PoisonError::into_inner);
        match right.get(&name) {
            Some(right) if !digest.starts_with(&**right) => {
                Err(Error::missing(format!("{} holds {name} with other content", one.location())))
            }
            _ => Ok(()),
        }
    }

    /// Notes that something was taken from another repository, and why: this one could not give it.
    pub fn note_made_up_for(&self, note: String) {
        self.others.made_up_for.store(true, Ordering::Relaxed);
        self.note(note);
    }

    /// Returns whether this repository was read first and gave everything that it was asked for and holds.
    pub fn gave_all(&self) -> bool {
        !self.others.made_up_for.load(Ordering::Relaxed) && !self.others.down.load(Ordering::Relaxed)
    }

    pub(super) fn has_others(&self) -> bool {
        !self.others.repositories.is_empty()
    }

    /// Asks one repository after the other until one has it; `None` when none has and all could say so. Where an
    /// error was passed over for `what`, if that is anything, it is noted.
    ///
    /// # Errors
    /// The first that one answered with, when none has it.
    pub(super) async fn ask_each<T, F: Future<Output = Result<Option<T>>>>(
        &self,
        what: String,
        ask: impl Fn(Self) -> F,
    ) -> Result<Option<T>> {
        if !self.has_others() {
            return ask(self.clone()).await;
        }
        let mut refused: Option<(String, Option<Error>)> = None;
        for one in self.each() {
            let problem = match ask(one.clone()).await {
                Ok(Some(found)) => {
                    // What is simply not there was told of when the catalog was read.
                    if let Some((location, Some(why))) = refused.filter(|_| !what.is_empty()) {
                        self.note_made_up_for(format!(
                            "{what} was taken from {}, not from {location}: {why}",
                            one.location()
                        ));
                    }
                    return Ok(Some(found));
                }
                Ok(None) => None,
                Err(error) => {
                    one.failed(&error);
                    Some(error)
                }
            };
            // A failure says more than an absence.
            match &mut refused {
                Some((_, Some(_))) => {}
                Some((_, None)) if problem.is_none() => {}
                refused => *refused = Some((one.location(), problem)),
            }
        }
        match refused {
            Some((_, Some(error))) => Err(error),
            _ => Ok(None),
        }
    }

    /// Returns whether another repository holds the segment in an object of the length that its head says.
    ///
    /// # Errors
    /// What the last of them answered, when none does.
    pub async fn is_whole_elsewhere(&self, name: SegmentName) -> Result<bool> {
        let number = name.number(self.lineage.segment_size);
        let mut failure = None;
        for one in self.each() {
            let looked = async {
                let listed = one.segments_listed(name.timeline, number, number + 1).await?;
                let Some(listed) = listed.first() else { return Ok(false) };
                let head = one.summarized(name).await?;
                Ok::<_, Error>(
                    head.is_some_and(|head| head.stored_bytes == listed.stored_bytes || listed.has_copy),
                )
            };
            match looked.await {
                Ok(true) => return Ok(true),
                Ok(false) | Err(Error::Corrupt(_)) => {}
                Err(error) => failure = Some(error),
            }
        }
        failure.map_or(Ok(false), Err)
    }

    /// Adds what others list of a range to what was listed here.
    pub(super) fn join_lists(own: &mut Vec<ListedSegment>, others: Vec<ListedSegment>) {
        let known: BTreeSet<SegmentName> = own.iter().map(|listed| listed.name).collect();
        own.extend(others.into_iter().filter(|listed| !known.contains(&listed.name)));
        own.sort_by_key(|listed| listed.name);
    }
}

/// Returns one lineage of a cluster as the repositories hold it that can be read, with a note for each that cannot
/// or holds another; and the cluster's part of the first.
///
/// Without a number it is the newest lineage of any. In another repository the same lineage is the one with the same
/// number, system identifier and segment size, or the only one with the same two.
///
/// # Errors
/// The first that a repository answered with, when none can be read.
pub async fn open_same_lineage(
    opened: Vec<(String, Result<ClusterRepository>)>,
    number: Option<u32>,
) -> Result<(LineageRepository, ClusterRepository)> {
    let reads = opened.into_iter().map(|(url, cluster)| async move {
        let read = async {
            let cluster = cluster?;
            let lineages = cluster.lineages().await?;
            Ok::<_, Error>((cluster, lineages))
        };
        (url, read.await)
    });
    let mut readable = Vec::new();
    let mut failed: Vec<(String, Error)> = Vec::new();
    for (url, read) in futures_util::future::join_all(reads).await {
        match read {
            Ok((cluster, lineages)) => readable.push((url, cluster, lineages)),
            Err(error) => failed.push((url, error)),
        }
    }
    let of_one = |lineages: &[LineageRepository]| match number {
        Some(number) => lineages.iter().find(|one| one.lineage.number == number).cloned(),
        None => lineages.last().cloned(),
    };
    let candidates = readable.iter().filter_map(|(_, cluster, lineages)| Some((of_one(lineages)?, cluster)));
    // The newest; of equals the first.
    let chosen = candidates.reduce(|best, other| {
        if number.is_none()
            && !same(&best.0.lineage, &other.0.lineage)
            && other.0.lineage.created > best.0.lineage.created
        {
            other
        } else {
            best
        }
    });
    let Some((chosen, cluster)) = chosen.map(|(chosen, cluster)| (chosen, cluster.clone())) else {
        if let Some((_, error)) = failed.into_iter().next() {
            return Err(error);
        }
        return match (readable.into_iter().next(), number) {
            (Some((_, cluster, _)), Some(number)) => Err(cluster
                .lineage(number)
                .await
                .err()
                .unwrap_or_else(|| Error::unavailable(format!("lineage {number} comes and goes")))),
            (Some((_, cluster, _)), None) => cluster.newest_lineage().await.map(|lineage| (lineage, cluster)),
            (None, _) => Err(Error::invalid("no repository is configured")),
        };
    };
    let mut others = Vec::new();
    for (url, _, lineages) in &readable {
        let alike: Vec<_> = lineages.iter().filter(|one| same(&one.lineage, &chosen.lineage)).collect();
        let numbered = alike.iter().find(|one| one.lineage.number == chosen.lineage.number);
        match numbered.or(alike.first().filter(|_| alike.len() == 1)) {
            Some(other) if Arc::ptr_eq(&other.storage, &chosen.storage) => {}
            Some(other) => others.push(LineageRepository {
                others: Others { notes: chosen.others.notes.clone(), ..Others::default() },
                ..(*other).clone()
            }),
            None => chosen.note(format!(
                "{url} does not hold this lineage (system identifier {}): nothing is read from it",
                chosen.lineage.system_identifier
            )),
        }
    }
    for (url, error) in failed {
        chosen.note(format!("{url} cannot be read, and nothing is known of what it holds: {error}"));
        chosen.others.unreadable.lock().unwrap_or_else(PoisonError::into_inner).push(url);
    }
    Ok((chosen.with_others(others), cluster))
}

fn same(one: &Lineage, other: &Lineage) -> bool {
    (one.system_identifier, one.segment_size) == (other.system_identifier, other.segment_size)
}
