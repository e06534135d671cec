//! Which of the named servers to receive from: one that turns out to be none of the archive's is passed over
//! while there are others.

use super::session::Ended;
use super::{ReceiveEvent, Receiver, stopped};
use crate::error::{Error, Result};
use crate::pg::{TimelineHistory, TimelineId};
use crate::replication::{Connection, SessionKind, SystemIdentity};
use crate::repository::ClusterRepository;

impl Receiver {
    /// Reaches a server that will do, and streams from it until the session ends.
    pub(super) async fn one_session(&mut self, clusters: &[ClusterRepository]) -> Result<Ended> {
        if self.settle().await? {
            return Ok(Ended::Stopped);
        }
        let mut server = self.server.clone();
        let mut refused: Vec<Error> = Vec::new();
        loop {
            if *self.stop.borrow() {
                return Ok(Ended::Stopped);
            }
            let connecting = Connection::connect(&server, SessionKind::Replication);
            let connected = tokio::select! {
                connected = connecting => connected,
                _ = stopped(&mut self.stop) => return Ok(Ended::Stopped),
            };
            let mut connection = connected.map_err(|error| with_refused(error, &refused))?;
            let start = match self.prepare(&mut connection, clusters).await {
                Ok(start) => start,
                Err(error) if is_refusal(&error) && server.hosts.len() > 1 => {
                    server.hosts.retain(|host| host != connection.host());
                    refused.push(error);
                    if server.hosts.is_empty() {
                        return Err(refused.swap_remove(0));
                    }
                    continue;
                }
                Err(error) => return Err(with_refused(error, &refused)),
            };
            for error in refused {
                (self.progress)(ReceiveEvent::Warning(format!("a host was passed over: {error}")));
            }
            let ended = self.talk(&mut connection, start).await;
            if matches!(ended, Ok(Ended::Stopped)) {
                connection.close().await;
            }
            return ended;
        }
    }

    /// Refuses a server whose timeline the archive has left behind: it was the primary once, or a failover
    /// has not reached it. What it writes now is on no path that is archived since.
    pub(super) async fn refuse_overtaken(
        &self,
        connection: &Connection,
        identity: &SystemIdentity,
    ) -> Result<()> {
        let Some(archive) = self.archive.as_ref().filter(|_| !self.options.accept_overtaken) else {
            return Ok(());
        };
        // With a spool a store's outage keeps nobody waiting: the same timeline was asked about before.
        let known = archive.spooled.is_some()
            && archive.path.as_ref().is_some_and(|path| path.timeline == identity.timeline);
        for lineage in archive.lineages.iter() {
            let younger = match lineage.histories_above(identity.timeline).await {
                Err(error) if known && error.is_transient() => continue,
                younger => younger?,
            };
            if let Some(newest) = younger.last() {
                return Err(overtaken(connection, identity, newest));
            }
        }
        Ok(())
    }
}

/// Whether another host may be what this one is not.
fn is_refusal(error: &Error) -> bool {
    matches!(error, Error::Mismatch(_) | Error::Conflict(_))
}

/// Adds to a failure why other hosts were passed over before.
fn with_refused(error: Error, refused: &[Error]) -> Error {
    match refused {
        [] => error,
        refused => {
            let each: Vec<String> = refused.iter().map(ToString::to_string).collect();
            error.context(each.join("; "))
        }
    }
}

fn overtaken(connection: &Connection, identity: &SystemIdentity, newest: &TimelineHistory) -> Error {
    let SystemIdentity { timeline, flush_lsn, .. } = identity;
    let host = connection.host();
    let fork = match newest.switch_lsn_of(*timeline) {
        Some(switch) => format!("which left it at {switch}"),
        None => "which does not come from it".to_owned(),
    };
    let by = newest.timeline;
    if connection.is_standby() {
        return Error::unavailable(format!(
            "{host} is a standby on {timeline:?}, and the archive knows {by:?}, {fork}: it has not followed yet"
        ))
        .with_next("Nothing, if it follows; else name the new primary.");
    }
    Error::mismatch(format!(
        "{host} was overtaken: it is a primary on {timeline:?} with WAL up to {flush_lsn}, and the archive knows {by:?}, {fork}"
    ))
    .with_safe("nothing of it was stored; what it has written since is on this server alone")
    .with_next(next_of_overtaken(*timeline))
}

fn next_of_overtaken(timeline: TimelineId) -> String {
    format!(
        "Two servers take writes if the new primary runs: stop this one, and make it a standby with pg_rewind. If \
         this one is right, give it a timeline of its own (standby.signal, start, pg_promote), or go on with {timeline:?} by \
         --accept-overtaken."
    )
}
