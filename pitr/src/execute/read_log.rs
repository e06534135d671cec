//! Reads a log: loads what it asks for, until it is complete or long enough.

use walship::backup::names::NamesRead;
use walship::catalog::Catalog;
use walship::repository::{LineageRepository, load_catalog_from_listings, load_tails};
use walship::{Error, Result};

use super::load::{Wal, load_events, load_summaries};
use super::load_index::Index;
use crate::log::{Dictionary, Documents, Log, NameSource, Need, Query, Reading};
use crate::plan::{Evidence, Halt, Refusal};

/// What came of a query.
#[derive(Debug, Clone)]
pub enum Logged {
    /// What happened.
    Log(Box<Log>),
    /// The way to the timeline is not known.
    Refused(Box<Refusal>),
}

/// Returns what happened in the archived WAL, as far as it is asked for. `server` is what a live server calls
/// its databases and relations.
///
/// Roll-ups and summaries tell of most; whole segments are read, one at a time, only where their summaries had
/// no room or ordinary ends of transactions are asked for. What was passed is forgotten. Names that cannot be
/// read are not asked for again, and said.
///
/// # Errors
/// What the repository answers; damage is a line of the log.
pub async fn read_log(
    repository: &LineageRepository,
    catalog: &Catalog,
    query: &Query,
    server: Option<NamesRead>,
) -> Result<Logged> {
    let mut documents = Documents::default();
    documents.server = server.map(|read| Dictionary::new(read.names, NameSource::Server { time: read.time }));
    match read_from(repository, catalog, query, &mut documents).await {
        Err(Error::Missing(_)) if !catalog.rollups.is_empty() => {
            let listed = load_catalog_from_listings(repository).await?;
            read_from(repository, &listed, query, &mut documents).await
        }
        read => read,
    }
}

async fn read_from(
    repository: &LineageRepository,
    catalog: &Catalog,
    query: &Query,
    documents: &mut Documents,
) -> Result<Logged> {
    let mut catalog = catalog.clone();
    let tails = load_tails(repository, &mut catalog).await?;
    let catalog = &catalog;
    let mut evidence = Evidence::of(catalog);
    evidence.add_tails(tails);
    let mut index = Index::of(catalog);
    let wal = Wal::of(repository, catalog);
    let mut reading = match Reading::new(catalog, query.clone()) {
        Ok(reading) => reading,
        Err(Halt::Refuse(refusal)) => return Ok(Logged::Refused(refusal)),
        Err(halt) => return Err(not_expected(&halt)),
    };
    loop {
        let halt = match reading.advance(catalog, &evidence, documents) {
            Ok(true) => {
                if let Some(segment) = reading.at() {
                    evidence.forget_before(segment);
                    index.forget_before(segment);
                }
                continue;
            }
            Ok(false) => return Ok(Logged::Log(Box::new(reading.into_log()))),
            Err(Need::Names(backup)) => {
                let (dictionary, unread) = names_of(repository, catalog, &backup).await?;
                unread.into_iter().for_each(|why| reading.note_unread(&backup, why));
                documents.insert(backup, dictionary);
                continue;
            }
            Err(Need::Halt(halt)) => halt,
        };
        match halt {
            Halt::Rollup(first) => index.refine(repository, first, &mut evidence).await?,
            Halt::Summaries(names) => {
                for (name, read) in load_summaries(repository, names).await? {
                    match read {
                        Ok(read) => {
                            index.check(name, &read, &mut evidence);
                            evidence.summaries.insert(name, read.summary);
                        }
                        Err(_) => drop(evidence.unreadable.insert(name)),
                    }
                }
            }
            Halt::Events(requests) => {
                for request in requests {
                    match load_events(&wal, &request).await {
                        Ok(events) => drop(evidence.events.insert(request.segment, events)),
                        Err((name, Error::Corrupt(_))) => drop(evidence.unreadable.insert(name)),
                        Err((_, error)) => return Err(error),
                    }
                }
            }
            Halt::Refuse(refusal) => return Ok(Logged::Refused(refusal)),
            halt => return Err(not_expected(&halt)),
        }
    }
}

/// Returns the names saved beside a backup, or why they cannot be read.
///
/// # Errors
/// An outage: what is not reachable is not unknown.
async fn names_of(
    repository: &LineageRepository,
    catalog: &Catalog,
    id: &str,
) -> Result<(Option<Dictionary>, Option<String>)> {
    let record = catalog.backups.iter().find(|backup| backup.id == id);
    let Some((record, saved)) = record.and_then(|record| Some((record, record.names.as_ref()?))) else {
        return Ok((None, None));
    };
    match repository.get_backup_names(record).await {
        Ok(names) => {
            let source = NameSource::Backup { id: id.to_owned(), time: saved.time };
            Ok((names.map(|names| Dictionary::new(names, source)), None))
        }
        Err(error @ (Error::Unavailable(_) | Error::Denied(_))) => Err(error),
        Err(error) => Ok((None, Some(error.to_string()))),
    }
}

/// Returns an error for what a log never asks for.
fn not_expected(halt: &Halt) -> Error {
    Error::corrupt(format!("the index contradicts itself: {halt:?}"))
        .with_next("Run `pitr index --rebuild`, then ask again.")
}
