//! Reads a log: loads what it asks for, until it is complete or long enough.

use walship::catalog::Catalog;
use walship::repository::{LineageRepository, load_catalog_from_listings};
use walship::{Error, Result};

use super::load::{load_events, load_summaries};
use super::load_index::Index;
use crate::log::{Log, Query, Reading};
use crate::plan::{Evidence, Halt, Refusal};

/// What came of a query.
#[derive(Debug, Clone)]
pub enum Logged {
    /// What happened.
    Log(Box<Log>),
    /// The way to the timeline is not known.
    Refused(Box<Refusal>),
}

/// Returns what happened in the archived WAL, as far as it is asked for.
///
/// Roll-ups and summaries tell of most; whole segments are read, one at a time, only where their summaries had
/// no room or ordinary ends of transactions are asked for. What was passed is forgotten.
///
/// # Errors
/// What the repository answers; damage is a line of the log.
pub async fn read_log(repository: &LineageRepository, catalog: &Catalog, query: &Query) -> Result<Logged> {
    match read_from(repository, catalog, query).await {
        Err(Error::Missing(_)) if !catalog.rollups.is_empty() => {
            let listed = load_catalog_from_listings(repository).await?;
            read_from(repository, &listed, query).await
        }
        read => read,
    }
}

async fn read_from(repository: &LineageRepository, catalog: &Catalog, query: &Query) -> Result<Logged> {
    let mut evidence = Evidence::of(catalog);
    let mut index = Index::of(catalog);
    let mut reading = match Reading::new(catalog, query.clone()) {
        Ok(reading) => reading,
        Err(Halt::Refuse(refusal)) => return Ok(Logged::Refused(refusal)),
        Err(halt) => return Err(not_expected(&halt)),
    };
    loop {
        match reading.advance(catalog, &evidence) {
            Ok(true) => {
                if let Some(segment) = reading.at() {
                    evidence.forget_before(segment);
                    index.forget_before(segment);
                }
            }
            Ok(false) => return Ok(Logged::Log(Box::new(reading.into_log()))),
            Err(Halt::Rollup(first)) => index.refine(repository, first, &mut evidence).await?,
            Err(Halt::Summaries(names)) => {
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
            Err(Halt::Events(requests)) => {
                for request in requests {
                    match load_events(repository, &request).await {
                        Ok(events) => drop(evidence.events.insert(request.segment, events)),
                        Err((name, Error::Corrupt(_))) => drop(evidence.unreadable.insert(name)),
                        Err((_, error)) => return Err(error),
                    }
                }
            }
            Err(Halt::Refuse(refusal)) => return Ok(Logged::Refused(refusal)),
            Err(halt) => return Err(not_expected(&halt)),
        }
    }
}

/// Returns an error for what a log never asks for.
fn not_expected(halt: &Halt) -> Error {
    Error::corrupt(format!("the index contradicts itself: {halt:?}"))
        .with_next("Run `pitr index --rebuild`, then ask again.")
}
