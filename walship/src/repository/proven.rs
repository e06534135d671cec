//! What verifications have proven of a repository, kept beside it: documents that are only ever added.

use std::collections::BTreeMap;

use chrono::{DateTime, TimeDelta, Utc};
use futures_util::{StreamExt as _, TryStreamExt as _};

use crate::catalog::Proven;
use crate::codec::Digest;
use crate::error::{Error, Result};
use crate::storage::{ObjectKey, list_all};

use super::document;
use super::layout::{ProvenKey, lineage_document};
use super::{LineageRepository, new_backup_id};

/// More documents than are ever written.
const DOCUMENTS_MAX: usize = 1_000_000;

/// So many runs' documents are read, of this place and of all: each holds what was known when it was written.
const RUNS_MAX: usize = 32;

/// How many runs' are read at once.
const READS_MAX: usize = 8;

/// So many documents of a run are tried, where the last ones are damaged.
const TRIED_MAX: usize = 8;

/// The longest document that is read.
const BYTES_MAX: u64 = 64 << 20;

/// What verifications have recorded of a repository.
#[derive(Debug, Clone, Default)]
pub struct ProvenBefore {
    /// What tells this repository from a copy of it at the same address; `None` where the store cannot tell.
    pub marker: Option<String>,
    /// The last document of each of the last runs, in the order in which the runs began; those that began later than now come
    /// first: the clock was ahead. Of one that is not of this very repository no address is left, and of one by an older
    /// version, which has no digest, no proofs.
    pub documents: Vec<Proven>,
    /// The documents that are not what was stored: where, and what is wrong.
    pub damaged: Vec<(String, String)>,
}

/// The documents of a run of one place; those by an older version name none.
type Documents = Vec<(ProvenKey, ObjectKey)>;

/// A run's id, and a place.
type Run = (String, Option<String>);

impl LineageRepository {
    /// Stores what is proven: the `number`th document of a verification.
    ///
    /// # Errors
    /// What the store says: where credentials allow no writing, [`Error::Denied`].
    /// # Durability
    /// After `Ok` it survives a crash.
    pub async fn put_proven(&self, proven: &Proven, number: u32) -> Result<()> {
        let bytes = document::written(proven, BYTES_MAX)?;
        let named = Some((place_of(proven), Digest::of(&bytes).short()));
        let key = self.layout.proven(&ProvenKey { id: proven.id.clone(), number, named })?;
        // A key that is taken names the same content.
        self.storage.put_if_absent(&key, bytes.into()).await.map(drop)
    }

    /// Returns what the last runs have recorded. Where a document is damaged, the one before it stands for its run: what only
    /// the damaged one said was proven is read again.
    ///
    /// # Errors
    /// What the store says.
    pub async fn proven(&self, now: DateTime<Utc>) -> Result<ProvenBefore> {
        let marker = self.storage.identity(&lineage_document(&self.cluster, self.lineage.number)?).await?;
        let here = Proven { repository: self.location(), marker: marker.clone(), ..Proven::default() };
        let place = place_of(&here);
        let listed = list_all(&*self.storage, &self.layout.proven_prefix(), DOCUMENTS_MAX).await?;
        let mut runs: BTreeMap<Run, Documents> = BTreeMap::new();
        for meta in listed {
            let Some(key) = self.layout.parse_proven(&meta.key) else { continue };
            let place = key.named.as_ref().map(|(place, _)| place.clone());
            runs.entry((key.id.clone(), place)).or_default().push((key, meta.key));
        }
        // Ids begin with the time.
        let behind_now = new_backup_id(now + TimeDelta::seconds(1), 0);
        let ahead = runs.split_off(&(behind_now, None));
        let chosen = newest(ahead, &place).into_iter().chain(newest(runs, &place));
        let reads = chosen.map(|documents| self.last_of_run(documents, &place));
        let read: Vec<_> = futures_util::stream::iter(reads).buffered(READS_MAX).try_collect().await?;
        let mut known = ProvenBefore { marker, ..ProvenBefore::default() };
        for (document, damaged) in read {
            known.documents.extend(document);
            known.damaged.extend(damaged);
        }
        // The ids of one second are in any order.
        let order = |one: &Proven| (one.started <= now, one.started);
        known.documents.sort_by(|a, b| (order(a), &a.id).cmp(&(order(b), &b.id)));
        Ok(known)
    }

    /// Returns the last document of a run that can be read, and those behind it that are damaged.
    async fn last_of_run(
        &self,
        mut documents: Documents,
        place: &str,
    ) -> Result<(Option<Proven>, Vec<(String, String)>)> {
        documents.sort_by_key(|(key, _)| key.number);
        let mut damaged = Vec::new();
        for (key, stored) in documents.iter().rev().take(TRIED_MAX) {
            match self.proven_document(key, stored).await {
                Ok(Some(document)) => return Ok((Some(of_place(document, key, place)), damaged)),
                Ok(None) => {}
                Err(Error::Corrupt(error)) => damaged.push((self.shown(stored), error.to_string())),
                Err(error @ Error::Mismatch(_)) => {
                    self.note(format!("what a verification has proven cannot be told: {error}"));
                    break;
                }
                Err(error) if self.storage.skip(stored.as_str(), &error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok((None, damaged))
    }

    async fn proven_document(&self, key: &ProvenKey, stored: &ObjectKey) -> Result<Option<Proven>> {
        let Some(bytes) = self.storage.get(stored, BYTES_MAX).await? else { return Ok(None) };
        if let Some((_, digest)) = &key.named
            && Digest::of(&bytes).short() != *digest
        {
            return Err(Error::corrupt("its content has another digest than its key says"));
        }
        let document: Proven = document::parse(&bytes)?;
        let other_place = key.named.as_ref().is_some_and(|(place, _)| *place != place_of(&document));
        if document.id != key.id || other_place {
            return Err(Error::corrupt("it is not the document that its key says"));
        }
        Ok(Some(document))
    }
}

/// Returns what stands in a document's key for the repository that it is of.
fn place_of(document: &Proven) -> String {
    let marker = document.marker.as_deref().unwrap_or_default();
    Digest::of(format!("{}\n{marker}", document.repository).as_bytes()).short()
}

/// Returns the newest runs: so many of this place, and so many of all.
fn newest(runs: BTreeMap<Run, Documents>, place: &str) -> Vec<Documents> {
    let (mut here, mut all) = (0, 0);
    let chosen = runs.into_iter().rev().filter(|((_, known), _)| {
        let is_here = known.as_deref() == Some(place);
        all += 1;
        here += usize::from(is_here);
        all <= RUNS_MAX || (is_here && here <= RUNS_MAX)
    });
    chosen.map(|(_, documents)| documents).collect()
}

/// Returns a document without what it does not tell of this place.
fn of_place(document: Proven, key: &ProvenKey, place: &str) -> Proven {
    match &key.named {
        Some((known, _)) if known == place => document,
        Some(_) => Proven { repository: String::new(), ..document },
        None => {
            let (wal, parts) = (Vec::new(), Vec::new());
            let (backups, documents) = (BTreeMap::new(), BTreeMap::new());
            Proven { round: None, wal, parts, backups, documents, ..document }
        }
    }
}

#[cfg(feature = "test-util")]
#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::catalog::{KnownDamage, ProvenRun, ReadPlace, Seen, SeenRun};
    use crate::pg::{SegmentName, SegmentSize};
    use crate::repository::Repository;
    use crate::storage::Storage as _;
    use crate::storage::memory::MemoryStorage;

    fn time(millis: i64) -> DateTime<Utc> {
        DateTime::from_timestamp_millis(1_700_000_000_000 + millis).unwrap()
    }

    fn name() -> SegmentName {
        "000000010000000000000003".parse().unwrap()
    }

    async fn lineage(memory: &MemoryStorage) -> LineageRepository {
        let repository = Repository::create(Arc::new(memory.clone()), time(0)).await.unwrap();
        let cluster = repository.create_cluster(&"main".parse().unwrap(), time(0)).await.unwrap();
        match cluster.newest_lineage().await {
            Ok(lineage) => lineage,
            Err(_) => cluster.register_lineage(42, SegmentSize::DEFAULT, 15, time(0)).await.unwrap(),
        }
    }

    /// A document that says that a segment is proven, or damaged.
    async fn began(lineage: &LineageRepository, millis: i64, random: u64, is_damaged: bool) -> Proven {
        let started = time(millis);
        let run = ProvenRun { run: SeenRun { first: name(), segments: 1 }, at: started };
        let damage = KnownDamage { place: ReadPlace::Segment(name()), at: started, flaws: Vec::new() };
        Proven {
            format: 1,
            id: new_backup_id(started, random),
            started,
            repository: lineage.location(),
            marker: lineage.proven(time(0)).await.unwrap().marker,
            wal: (!is_damaged).then_some(run).into_iter().collect(),
            damage: is_damaged.then_some(damage).into_iter().collect(),
            ..Proven::default()
        }
    }

    fn starts(read: &[Proven]) -> Vec<i64> {
        read.iter().map(|one| (one.started - time(0)).num_milliseconds()).collect()
    }

    #[tokio::test]
    async fn runs_are_in_the_order_in_which_they_began() {
        let lineage = lineage(&MemoryStorage::default()).await;
        // Three of one second, whose ids are in another order; the last documents count.
        for (millis, random) in [(10, 9), (500, 1), (900, 5)] {
            lineage.put_proven(&began(&lineage, millis, random, false).await, 1).await.unwrap();
        }
        let first = began(&lineage, 10, 9, false).await;
        let more = Proven { accepted: Seen { backups: vec!["b".into()], ..Seen::default() }, ..first };
        lineage.put_proven(&more, 2).await.unwrap();
        let read = lineage.proven(time(999)).await.unwrap().documents;
        assert_eq!(read[0], more);
        assert_eq!(starts(&read), [10, 500, 900]);
        // However many a clock wrote that was ahead, the others are read, and come last.
        for run in 0..40_u64 {
            let hours = 3_600_000 * (1000 + i64::try_from(run).unwrap());
            lineage.put_proven(&began(&lineage, hours, run, false).await, 1).await.unwrap();
        }
        let starts = starts(&lineage.proven(time(999)).await.unwrap().documents);
        assert_eq!(starts.len(), RUNS_MAX + 3);
        assert_eq!(starts[RUNS_MAX..], [10, 500, 900]);
    }

    #[tokio::test]
    async fn what_a_place_remembers_stays_however_often_others_are_verified() {
        let lineage = lineage(&MemoryStorage::default()).await;
        lineage.put_proven(&began(&lineage, 10, 1, true).await, 1).await.unwrap();
        for run in 0..RUNS_MAX as i64 + 8 {
            let elsewhere = began(&lineage, 10_000 * (run + 1), 2, false).await;
            let elsewhere = Proven { repository: "elsewhere".to_owned(), ..elsewhere };
            lineage.put_proven(&elsewhere, 1).await.unwrap();
        }
        let read = lineage.proven(time(10_000_000)).await.unwrap().documents;
        let here: Vec<&Proven> = read.iter().filter(|one| one.repository == lineage.location()).collect();
        assert_eq!((here.len(), here[0].damage.len()), (1, 1));
        assert_eq!(read.len(), RUNS_MAX + 1);
    }

    /// A run has the same id in all repositories, and one of them may be copied onto another, its documents with it.
    #[tokio::test]
    async fn what_another_place_remembers_of_the_same_run_hides_nothing() {
        let lineage = lineage(&MemoryStorage::default()).await;
        let here = began(&lineage, 10, 1, true).await;
        lineage.put_proven(&here, 1).await.unwrap();
        let elsewhere = Proven { repository: "elsewhere".to_owned(), ..began(&lineage, 10, 1, false).await };
        for number in 1..4 {
            lineage.put_proven(&elsewhere, number).await.unwrap();
        }
        let read = lineage.proven(time(999)).await.unwrap().documents;
        assert!(read.len() == 2 && read.contains(&here), "{read:?}");
    }

    #[tokio::test]
    async fn no_flipped_bit_is_a_proof() {
        let memory = MemoryStorage::default();
        let lineage = lineage(&memory).await;
        for (number, is_damaged) in [(1, true), (2, false)] {
            lineage.put_proven(&began(&lineage, 10, 1, is_damaged).await, number).await.unwrap();
        }
        let last = memory.keys().into_iter().rfind(|key| key.contains("/verifications/")).unwrap();
        let last = ObjectKey::new(last).unwrap();
        let sound = memory.get(&last, BYTES_MAX).await.unwrap().unwrap();
        for at in 0..sound.len() {
            let mut flipped = sound.to_vec();
            flipped[at] ^= 1;
            memory.overwrite(&last, flipped);
            let known = lineage.proven(time(999)).await.unwrap();
            let (documents, damaged) = (known.documents, known.damaged);
            assert_eq!((damaged.len(), documents.len()), (1, 1), "{at}");
            assert!(damaged[0].0.ends_with(last.as_str()), "{damaged:?}");
            // The one before stands for the run.
            assert_eq!((documents[0].wal.len(), documents[0].damage.len()), (0, 1), "{at}");
        }
        memory.overwrite(&last, sound.clone());
        assert_eq!(lineage.proven(time(999)).await.unwrap().documents[0].wal.len(), 1);
        // Under another's key it is none either.
        let other = ObjectKey::new(last.as_str().replace("/00000002-", "/00000003-").replace("Z-0", "Z-1"));
        memory.overwrite(&other.unwrap(), sound);
        assert_eq!(lineage.proven(time(999)).await.unwrap().damaged.len(), 1);
    }

    #[tokio::test]
    async fn of_a_copy_in_the_same_place_nothing_is_proven() {
        let memory = MemoryStorage::default();
        let original = lineage(&memory).await;
        lineage(&memory).await.put_proven(&began(&original, 10, 1, false).await, 1).await.unwrap();
        assert_eq!(original.proven(time(999)).await.unwrap().documents[0].repository, original.location());
        let copied = memory.copy();
        copied.age("lineages/", TimeDelta::seconds(-5));
        let copy = lineage(&copied).await;
        let known = copy.proven(time(999)).await.unwrap();
        assert_eq!(copy.location(), original.location());
        assert_eq!((&*known.documents[0].repository, known.damaged.len()), ("", 0));
    }

    #[tokio::test]
    async fn a_document_without_a_digest_proves_nothing_and_its_damage_stands() {
        let memory = MemoryStorage::default();
        let lineage = lineage(&memory).await;
        let mut old = Proven { marker: None, ..began(&lineage, 10, 1, true).await };
        old.wal = began(&lineage, 10, 1, false).await.wal;
        old.seen.backups.push("b".to_owned());
        let key = lineage.layout.proven(&ProvenKey { id: old.id.clone(), number: 1, named: None }).unwrap();
        memory.overwrite(&key, document::written(&old, BYTES_MAX).unwrap());
        let read = lineage.proven(time(999)).await.unwrap().documents.remove(0);
        assert_eq!((read.wal.len(), read.damage.len(), read.seen.backups.len()), (0, 1, 1));
        assert_eq!(read.repository, lineage.location());
    }
}
