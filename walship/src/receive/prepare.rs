//! What has to be known and done before the first byte is streamed: whose server it is, its path, the
//! slot, and where to go on.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::segments::{Uploads, push_history};
use super::spooled::Spooled;
use super::{Archive, ReceiveEvent, Receiver, Until};
use crate::archive::push::PushOptions;
use crate::catalog::StoredSegments;
use crate::error::{Error, Result};
use crate::feed::{Eagerness, Frontier, Known, Start, resume};
use crate::pg::{Lsn, TimelineHistory, TimelineId};
use crate::replication::{
    Connection, Rows, ServerError, SessionKind, SlotLifetime, SlotState, StandbyRole, SystemIdentity,
    create_slot, drop_slot, identify_system, read_slot, segment_size, show, timeline_history,
};
use crate::repository::{ClusterRepository, load_catalog};
use crate::storage::blocking;

impl Receiver {
    /// Finds out where to go on with this server.
    pub(super) async fn prepare(
        &mut self,
        connection: &mut Connection,
        clusters: &[ClusterRepository],
    ) -> Result<Start> {
        connection.server_version()?;
        let identity = identify_system(connection).await?;
        self.find_archive(connection, clusters, &identity).await?;
        self.refuse_overtaken(connection, &identity).await?;
        let slot = self.ensure_slot(connection).await?;
        // Only now: the slot starts no later than this.
        let identity = identify_system(connection).await?;
        let path = self.store_histories(connection, identity.timeline).await?;
        let start = self.start(&path, slot, &identity).await?;
        if start.lsn > identity.flush_lsn {
            return Err(ahead(connection, start, &identity));
        }
        self.report.server_lsn = identity.flush_lsn;
        if self.report.sessions == 0 {
            self.set_until(&identity);
            self.warn_of_settings(connection, &identity).await?;
        }
        Ok(start)
    }

    fn set_until(&mut self, identity: &SystemIdentity) {
        let size = self.archive.as_ref().map_or(1, |archive| archive.size.bytes());
        self.until = match self.options.until {
            Until::Stopped => None,
            Until::Durable(lsn) => Some(lsn),
            Until::CaughtUp if self.options.tail.eagerness != Eagerness::Never => Some(identity.flush_lsn),
            Until::CaughtUp => Some(Lsn(identity.flush_lsn.0 / size * size)),
        };
    }

    /// Opens the server's lineage in every repository, or checks that it is still the same server.
    async fn find_archive(
        &mut self,
        connection: &mut Connection,
        clusters: &[ClusterRepository],
        identity: &SystemIdentity,
    ) -> Result<()> {
        if let Some(archive) = &self.archive {
            if archive.system_identifier == identity.system_identifier {
                return Ok(());
            }
            return Err(Error::mismatch(format!(
                "{} has system identifier {}, the server before had {}",
                connection.host(),
                identity.system_identifier,
                archive.system_identifier
            ))
            .with_safe("nothing of it was stored")
            .with_next("Check the connection string: every host in it has to be of the same cluster."));
        }
        let size = segment_size(connection).await?;
        let mut lineages = Vec::new();
        for cluster in clusters {
            lineages.push(cluster.lineage_of(identity.system_identifier, size).await?);
        }
        let lineages: Arc<[_]> = lineages.into();
        let push = PushOptions {
            compression: self.options.compression,
            lineage: None,
            spool_dir: self.options.spool_dir.clone(),
        };
        let spooled = match (&self.options.spool, self.spool.take()) {
            (Some(options), Some(folder)) => {
                let (identifier, bytes_max) = (identity.system_identifier, options.bytes_max);
                let spool = blocking(move || folder.open(identifier, size, bytes_max)).await?;
                let shipped = (Arc::clone(&lineages), push.clone(), options.tail_interval);
                Some(Spooled::new(Arc::new(spool), shipped, Arc::clone(&self.progress)))
            }
            _ => None,
        };
        self.archive = Some(Archive {
            system_identifier: identity.system_identifier,
            size,
            uploads: Uploads::new(Arc::clone(&lineages), Arc::clone(&self.progress)),
            lineages,
            push,
            spooled,
            frontier: Frontier::new(Lsn::INVALID),
            next: None,
            path: None,
            histories: Vec::new(),
            parts: BTreeMap::new(),
            wholes: BTreeSet::new(),
        });
        Ok(())
    }

    /// Stores the history files of a timeline and of all its ancestors, and returns the timeline's own.
    async fn store_histories(
        &mut self,
        connection: &mut Connection,
        timeline: TimelineId,
    ) -> Result<TimelineHistory> {
        let path = self.store_history(connection, timeline).await?;
        for ancestor in &path.ancestors {
            if let Err(error) = self.store_history(connection, ancestor.timeline).await {
                // Servers may have lost old ones; those of a fork that matters were stored in their time.
                let refused = ServerError::of(&error).is_some_and(|said| said.severity == "ERROR");
                if !refused {
                    return Err(error);
                }
                (self.progress)(ReceiveEvent::Warning(format!(
                    "the server has no history of {:?} any more: {error}",
                    ancestor.timeline
                )));
            }
        }
        Ok(path)
    }

    /// Stores the history file of one timeline, unless that was done before.
    pub(super) async fn store_history(
        &mut self,
        connection: &mut Connection,
        timeline: TimelineId,
    ) -> Result<TimelineHistory> {
        if timeline == TimelineId::FIRST {
            return Ok(TimelineHistory::root(timeline));
        }
        let archive = self.archive.as_mut().ok_or_else(no_archive)?;
        let (text, history) = timeline_history(connection, timeline).await?;
        if !archive.histories.contains(&history) {
            push_history(&archive.lineages, timeline, &text, &archive.push, &self.progress).await?;
            archive.histories.push(history.clone());
        }
        Ok(history)
    }

    /// Makes sure that the slot is there, and returns what it holds WAL back from where that can be known.
    async fn ensure_slot(&mut self, connection: &mut Connection) -> Result<Option<Lsn>> {
        let slot = self.options.slot.clone();
        let mut state = read_slot(connection, &slot).await.map_err(|error| not_physical(error, &slot))?;
        if state == SlotState::Unknown {
            state = self.read_slot_by_sql(connection, &slot).await?;
        }
        let refused = self.refused.take();
        match state {
            SlotState::Holds(lsn) if !self.is_invalidated(connection, refused).await? => {
                return Ok(Some(lsn));
            }
            SlotState::Holds(_) => {
                (self.progress)(ReceiveEvent::Warning(format!(
                    "the slot \"{slot}\" was invalidated by the server and holds no WAL back; it is made anew"
                )));
                drop_slot(connection, &slot).await?;
            }
            SlotState::HoldsNothing => {
                (self.progress)(ReceiveEvent::Warning(format!(
                    "the slot \"{slot}\" holds no WAL back (it was never used, or the server has removed its WAL \
                     because of max_slot_wal_keep_size); it is made anew"
                )));
                drop_slot(connection, &slot).await?;
            }
            SlotState::Missing | SlotState::Unknown => {}
        }
        match create_slot(connection, &slot, SlotLifetime::Permanent).await {
            Ok(()) => {}
            // Before 15 nobody may have told that it is there.
            Err(error) if ServerError::of(&error).is_some_and(|said| said.code == "42710") => {}
            Err(error) => return Err(error),
        }
        let state = match read_slot(connection, &slot).await? {
            SlotState::Unknown => self.read_slot_by_sql(connection, &slot).await?,
            state => state,
        };
        Ok(match state {
            SlotState::Holds(lsn) => Some(lsn),
            // The name is taken, and not by a physical one.
            SlotState::Missing if connection.server_version()? / 10_000 < 15 => {
                return Err(is_logical(&slot));
            }
            _ => None,
        })
    }

    /// Asks a server before 15 in SQL, if it lets us: the same one, not another of several hosts.
    async fn read_slot_by_sql(&self, connection: &Connection, slot: &str) -> Result<SlotState> {
        let sql =
            format!("SELECT restart_lsn, slot_type FROM pg_replication_slots WHERE slot_name = '{slot}'");
        let ask = async {
            let rows = self.ask_by_sql(connection, &sql).await?;
            let state = match (rows.rows.first(), rows.get(0, 0).map(str::parse)) {
                (None, _) => SlotState::Missing,
                (Some(_), Some(Ok(lsn))) => SlotState::Holds(lsn),
                (Some(_), _) => SlotState::HoldsNothing,
            };
            Ok::<_, Error>((state, rows.get(0, 1) == Some("logical")))
        };
        match ask.await {
            Ok((_, true)) => Err(is_logical(slot)),
            Ok((state, false)) => Ok(state),
            Err(error) => {
                tracing::debug!(%error, "the slot could not be asked in SQL");
                Ok(SlotState::Unknown)
            }
        }
    }

    /// Asks the very server of a replication session something in SQL.
    pub(super) async fn ask_by_sql(&self, connection: &Connection, sql: &str) -> Result<Rows> {
        let mut server = self.server.clone();
        server.hosts = vec![connection.host().clone()];
        let mut session = match Connection::connect(&server, SessionKind::Ordinary).await {
            Ok(session) => session,
            Err(_) => {
                server.dbname = "postgres".to_owned();
                Connection::connect(&server, SessionKind::Ordinary).await?
            }
        };
        let rows = session.query(sql).await?;
        session.close().await;
        Ok(rows)
    }

    /// Returns where to go on: where the last session ended if the server's path still goes through there,
    /// else what the repositories say.
    async fn start(
        &mut self,
        path: &TimelineHistory,
        slot: Option<Lsn>,
        identity: &SystemIdentity,
    ) -> Result<Start> {
        let archive = self.archive.as_mut().ok_or_else(no_archive)?;
        archive.path = Some(path.clone());
        if let Some(next) = archive.next {
            let on_the_path = path.contains(next.timeline)
                && path.switch_lsn_of(next.timeline).is_none_or(|switch| next.lsn <= switch);
            if on_the_path {
                return Ok(next);
            }
            (self.progress)(ReceiveEvent::Warning(format!(
                "{:?} of the server does not go through {} on {:?}, to where WAL was received: it was promoted \
                 earlier. The archive keeps both",
                path.timeline, next.lsn, next.timeline
            )));
            archive.uploads.abort().await;
            archive.next = None;
        }
        let mut stored: Option<StoredSegments> = None;
        let mut starts = Vec::new();
        // Asked before the repositories: what goes from here to there meanwhile is seen in one of them.
        let spooled = archive.spooled.as_ref().map(Spooled::whole_segments).unwrap_or_default();
        for lineage in archive.lineages.iter() {
            let mut catalog = load_catalog(lineage).await?;
            for (name, bytes) in &spooled {
                if !catalog.segments.contains(*name) {
                    catalog.segments.insert(*name, *bytes);
                }
            }
            let known = Known {
                path,
                stored: &catalog.segments,
                size: archive.size,
                slot,
                flushed: identity.flush_lsn,
            };
            starts.push(resume(&known));
            stored.get_or_insert(catalog.segments);
        }
        // The repository that lags most decides; the others have what they are given again.
        let start = starts.into_iter().min_by_key(|start| start.lsn).ok_or_else(no_archive)?;
        archive.frontier = Frontier::new(start.lsn);
        archive.next = Some(start);
        self.report.durable_lsn = start.lsn;
        Ok(start)
    }

    async fn warn_of_settings(&self, connection: &mut Connection, identity: &SystemIdentity) -> Result<()> {
        self.warn_of_limits(connection, identity.system_identifier).await?;
        let (commit, names) = (
            show(connection, "synchronous_commit").await?,
            show(connection, "synchronous_standby_names").await?,
        );
        if commit == "remote_apply"
            && StandbyRole::of(&names, &self.server.application_name) != StandbyRole::None
        {
            (self.progress)(ReceiveEvent::Warning(format!(
                "synchronous_commit is remote_apply and synchronous_standby_names is '{names}': nothing is replayed here, \
                 so commits that wait for \"{}\" wait for ever. Use synchronous_commit = on",
                self.server.application_name
            )));
        }
        Ok(())
    }
}

/// The server's WAL ends before the place where the archive goes on.
fn ahead(connection: &Connection, start: Start, identity: &SystemIdentity) -> Error {
    let what = format!(
        "the WAL of {} ends at {} on {:?}, the archive goes on at {} on {:?}",
        connection.host(),
        identity.flush_lsn,
        identity.timeline,
        start.lsn,
        start.timeline
    );
    if connection.is_standby() {
        return Error::unavailable(format!("{what}: the standby is behind"))
            .with_next("Nothing, if it catches up; else name the primary.");
    }
    Error::mismatch(what).with_safe("nothing of it was stored").with_next(
        "Check that this is the cluster's primary, not an older copy of it: a restored copy must archive elsewhere.",
    )
}

/// Says what it means when the server refuses to read a slot.
fn not_physical(error: Error, slot: &str) -> Error {
    match ServerError::of(&error).map(|said| said.code.as_str()) {
        Some("0A000" | "55000") => is_logical(slot),
        _ => error,
    }
}

fn is_logical(slot: &str) -> Error {
    Error::invalid(format!(
        "the slot \"{slot}\" is a logical one, and WAL is streamed through a physical one"
    ))
    .with_safe("the slot was not changed")
    .with_next("Name another slot (--slot): it is made when it is not there.")
}

pub(super) fn no_archive() -> Error {
    Error::invalid("no repository is configured")
}
