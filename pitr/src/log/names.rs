//! What object ids in the WAL stood for when it was written: names out of documents that were read at known
//! positions. Nothing is guessed: a name comes with where it is from, or there is none.

use std::collections::{BTreeMap, HashMap};

use chrono::{DateTime, Utc};
use serde::Serialize;
use walship::catalog::{BackupRecord, Catalog, Names, RelationName};
use walship::pg::{Lsn, Oid, TimelineHistory};
use walship::wal::event::RelFileLocator;

/// How many documents are tried when the nearest does not list a database.
const DOCUMENTS_MAX: usize = 3;

/// Where a name is from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "source", rename_all = "snake_case")]
pub enum NameSource {
    /// The record itself.
    Wal,
    /// What was saved beside a backup: the name at that time. It may have changed before the event.
    Backup {
        /// The backup.
        id: String,
        /// When the names were read.
        time: DateTime<Utc>,
    },
    /// The live server: the name as it is now.
    Server {
        /// When the server was asked.
        time: DateTime<Utc>,
    },
}

/// A database, by oid and by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DatabaseName {
    /// Its oid.
    pub oid: Oid,
    /// Its name; `None` where nobody knows it.
    pub name: Option<String>,
    /// Where the name is from.
    pub named_by: Option<NameSource>,
}

/// What a commit did to a relation whose storage it removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Removed {
    /// It was dropped.
    Dropped,
    /// It got new storage: TRUNCATE, or a rewrite.
    Replaced,
}

/// A relation that an event names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Relation {
    /// The database's oid.
    pub database: Oid,
    /// The tablespace of the storage; `None` where the event names the relation by oid.
    pub tablespace: Option<Oid>,
    /// The number of the storage; `None` where the event names the relation by oid.
    pub relation: Option<Oid>,
    /// Its `pg_class` oid, where that is known.
    pub oid: Option<Oid>,
    /// Its schema.
    pub schema: Option<String>,
    /// Its name.
    pub name: Option<String>,
    /// `pg_class.relkind`.
    pub kind: Option<char>,
    /// Of an index or a TOAST table, the relation that it belongs to.
    pub of: Option<String>,
    /// What became of it, where that is known.
    pub removed: Option<Removed>,
    /// About how many rows were deleted of it, of an event that deleted many.
    pub deleted_rows: Option<u64>,
    /// The bytes of its files in the backup that tells its name.
    pub bytes: Option<u64>,
    /// Where its name is from.
    pub named_by: Option<NameSource>,
}

impl Relation {
    /// Returns schema and name; `None` where they are not known.
    pub fn full_name(&self) -> Option<String> {
        Some(format!("{}.{}", self.schema.as_ref()?, self.name.as_ref()?))
    }

    /// Returns a relation of which nothing but its storage is known.
    fn stored(storage: RelFileLocator) -> Self {
        Self {
            tablespace: Some(storage.tablespace),
            relation: Some(storage.relation),
            ..Self::unknown(storage.database, None)
        }
    }

    fn unknown(database: Oid, oid: Option<Oid>) -> Self {
        Self {
            database,
            tablespace: None,
            relation: None,
            oid,
            schema: None,
            name: None,
            kind: None,
            of: None,
            removed: None,
            deleted_rows: None,
            bytes: None,
            named_by: None,
        }
    }
}

/// A document of names, to look them up in.
#[derive(Debug)]
pub(crate) struct Dictionary {
    source: NameSource,
    names: Names,
    by_storage: HashMap<RelFileLocator, (usize, usize)>,
    by_oid: HashMap<(Oid, Oid), (usize, usize)>,
}

impl Dictionary {
    /// Returns names that were read from a backup or a server.
    pub(crate) fn new(names: Names, source: NameSource) -> Self {
        let (mut by_storage, mut by_oid) = (HashMap::new(), HashMap::new());
        for (at, database) in names.databases.iter().enumerate() {
            for (place, relation) in database.relations.iter().enumerate() {
                by_storage.insert(relation.storage(database.oid), (at, place));
                by_oid.insert((database.oid, relation.oid), (at, place));
            }
        }
        Self { source, names, by_storage, by_oid }
    }

    fn database(&self, oid: Oid) -> Option<&walship::catalog::DatabaseNames> {
        self.names.databases.iter().find(|database| database.oid == oid)
    }

    fn at(&self, (database, relation): (usize, usize)) -> Option<&RelationName> {
        self.names.databases.get(database)?.relations.get(relation)
    }

    /// Says of a relation what is known here; returns whether anything is.
    fn name(&self, relation: &mut Relation) -> bool {
        let storage = relation.tablespace.zip(relation.relation).map(|(tablespace, number)| RelFileLocator {
            tablespace,
            database: relation.database,
            relation: number,
        });
        let place = match storage {
            Some(storage) => self.by_storage.get(&storage),
            None => relation.oid.and_then(|oid| self.by_oid.get(&(relation.database, oid))),
        };
        let Some(known) = place.and_then(|place| self.at(*place)) else { return false };
        relation.oid = Some(known.oid);
        relation.schema = Some(known.schema.clone());
        relation.name = Some(known.name.clone());
        relation.kind = Some(known.kind);
        relation.bytes = known.bytes;
        relation.of = known.of.and_then(|of| {
            let owner = self.at(*self.by_oid.get(&(relation.database, of))?)?;
            Some(format!("{}.{}", owner.schema, owner.name))
        });
        relation.named_by = Some(self.source.clone());
        true
    }
}

/// The documents that were read so far.
#[derive(Debug, Default)]
pub(crate) struct Documents {
    /// Beside backups, by id; `None` when one cannot be read.
    backups: BTreeMap<String, Option<Dictionary>>,
    /// Of the live server.
    pub(crate) server: Option<Dictionary>,
}

/// The names that count at one position of the WAL.
#[derive(Debug, Default)]
pub(super) struct NamesAt<'a> {
    /// The nearest first.
    before: Vec<&'a Dictionary>,
    server: Option<&'a Dictionary>,
}

impl Documents {
    /// How many of backups are held at once: one more than are asked together.
    const HELD_MAX: usize = DOCUMENTS_MAX + 1;

    /// Adds the names saved beside a backup, `None` when they cannot be read; the oldest of others may go.
    pub(crate) fn insert(&mut self, backup: String, dictionary: Option<Dictionary>) {
        let held = self.backups.values().flatten().count();
        if dictionary.is_some() && held >= Self::HELD_MAX {
            let oldest = self.backups.iter().find(|(_, held)| held.is_some()).map(|(id, _)| id.clone());
            oldest.iter().for_each(|id| drop(self.backups.remove(id)));
        }
        self.backups.insert(backup, dictionary);
    }

    /// Returns the names that count at `lsn` on the way to a timeline.
    ///
    /// # Errors
    /// The id of the backup whose names must be read first.
    pub(super) fn at(
        &self,
        catalog: &Catalog,
        history: Option<&TimelineHistory>,
        lsn: Lsn,
    ) -> Result<NamesAt<'_>, String> {
        let mut saved: Vec<(Lsn, &BackupRecord)> = catalog
            .backups
            .iter()
            .filter_map(|backup| {
                let names = backup.names.as_ref()?;
                let on_the_way =
                    history.is_none_or(|history| history.timeline_of(names.lsn) == names.timeline);
                (names.lsn <= lsn && on_the_way).then_some((names.lsn, backup))
            })
            .collect();
        saved.sort_by(|(a, one), (b, other)| (b, &other.id).cmp(&(a, &one.id)));
        let mut before = Vec::new();
        for (_, backup) in saved {
            match self.backups.get(&backup.id) {
                None => return Err(backup.id.clone()),
                Some(Some(dictionary)) => before.push(dictionary),
                Some(None) => {}
            }
            // An older one is asked only for databases that this one could not list.
            let whole = |dictionary: &Dictionary| {
                dictionary.names.databases.iter().all(|one| one.unread.is_none() || one.name == "template0")
            };
            if before.len() >= DOCUMENTS_MAX || before.last().is_some_and(|last| whole(last)) {
                break;
            }
        }
        Ok(NamesAt { before, server: self.server.as_ref() })
    }
}

impl NamesAt<'_> {
    /// Returns a database's name.
    pub(super) fn database(&self, oid: Oid) -> DatabaseName {
        let mut named = DatabaseName { oid, name: None, named_by: None };
        for dictionary in self.before.iter().copied().chain(self.server) {
            if let Some(database) = dictionary.database(oid) {
                named.name = Some(database.name.clone());
                named.named_by = Some(dictionary.source.clone());
                break;
            }
        }
        named
    }

    /// Returns what is known of the relation that had this storage.
    ///
    /// Storage belongs to one relation from when it is made until it is removed, and its number is not used
    /// again before the server's counter of oids has gone round: a document that lists the storage before the
    /// event tells whose it was, and so does the server when it still has it.
    pub(super) fn stored(&self, storage: RelFileLocator) -> Relation {
        self.look_up(Relation::stored(storage))
    }

    /// Returns what is known of the relation with this oid, whatever storage it had.
    pub(super) fn oid(&self, database: Oid, oid: Oid) -> Relation {
        self.look_up(Relation::unknown(database, Some(oid)))
    }

    fn look_up(&self, mut relation: Relation) -> Relation {
        for dictionary in &self.before {
            if dictionary.name(&mut relation) {
                return relation;
            }
            // One that lists the whole database and not this relation: it was made later.
            if dictionary.database(relation.database).is_some_and(|one| one.unread.is_none()) {
                break;
            }
        }
        if let Some(server) = self.server {
            server.name(&mut relation);
            // How large it is now says nothing of then.
            relation.bytes = None;
        }
        relation
    }

    /// Returns the bytes of all relations that are listed in a database, as its last document has it.
    pub(super) fn database_bytes(&self, oid: Oid) -> Option<u64> {
        let database = self.before.first()?.database(oid).filter(|database| database.unread.is_none())?;
        Some(database.relations.iter().filter_map(|relation| relation.bytes).sum())
    }
}
