//! Whether recovery ended where the plan says: by its position, and by what became of the transactions around it.

use std::time::Duration;

use walship::Result;
use walship::pg::Xid;

use crate::drill::Proof;
use crate::execute::scratch::Up;
use crate::plan::RestorePlan;

/// How long the server may take to say what became of a transaction.
const PATIENCE: Duration = Duration::from_secs(60);

/// Proves it by the server's own word.
///
/// # Errors
/// When the server does not answer.
pub async fn prove(plan: &RestorePlan, up: &Up) -> Result<Proof> {
    let ended = match (up.started.as_planned, up.started.replayed_lsn) {
        (Some(true), Some(lsn)) => lsn,
        (Some(false), Some(lsn)) => {
            return Ok(Proof::failed(
                "outcome",
                format!("recovery ended at {lsn}, and the plan ends at {}", plan.stop.final_lsn),
            ));
        }
        _ => {
            return Ok(Proof::failed(
                "outcome",
                format!(
                    "where recovery ended is not known{}",
                    up.started.not_asked.as_ref().map_or_else(String::new, |why| format!(": {why}"))
                ),
            ));
        }
    };
    let mut connection = up.connect(up.any_database(), PATIENCE).await?;
    let rows =
        connection.query("SELECT pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())").await?;
    let next: u64 = rows.get(0, 0).and_then(|text| text.parse().ok()).unwrap_or(0);
    let mut said = Vec::new();
    if let Some(last) = &plan.last_included {
        let status = match full(last.xid, next) {
            Some(xid) if xid < next => connection.query(&status_of(xid)).await?.get(0, 0).map(str::to_owned),
            _ => Some("unknown to it".to_owned()),
        };
        match status.as_deref() {
            Some("committed") => said.push(format!("transaction {} is committed in it", last.xid)),
            // Its fate is forgotten after some hundred million transactions.
            None => said.push(format!("transaction {} is too old to be asked for", last.xid)),
            Some(other) => {
                return Ok(Proof::failed(
                    "outcome",
                    format!(
                        "transaction {}, the last of the plan, is {other} in what was restored",
                        last.xid
                    ),
                ));
            }
        }
    }
    if let Some(first) = &plan.first_excluded
        // With --latest what was archived meanwhile is there as well.
        && ended == plan.stop.final_lsn
        && let Some(xid) = full(first.xid, next)
    {
        let there = match xid < next {
            true => connection.query(&status_of(xid)).await?.get(0, 0) == Some("committed"),
            false => false,
        };
        if there {
            return Ok(Proof::failed(
                "outcome",
                format!("transaction {}, which the plan leaves out, is committed in it", first.xid),
            ));
        }
        said.push(format!("transaction {} is not", first.xid));
    }
    connection.close().await;
    let said = if said.is_empty() { String::new() } else { format!("; {}", said.join(", ")) };
    Ok(Proof::proven("outcome", format!("recovery ended at {ended}{said}")))
}

fn status_of(xid: u64) -> String {
    format!("SELECT pg_catalog.pg_xact_status('{xid}'::pg_catalog.xid8)")
}

/// Returns the full number of a transaction that is near the next one, `next`: numbers of 32 bits come again.
fn full(xid: Xid, next: u64) -> Option<u64> {
    const EPOCH: u64 = 1 << 32;
    let short = u64::from(xid);
    let here = next / EPOCH * EPOCH + short;
    // The nearer one of the two that may be meant.
    if here > next && here - next > EPOCH / 2 { here.checked_sub(EPOCH) } else { Some(here) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transaction_has_the_epoch_that_is_near() {
        const EPOCH: u64 = 1 << 32;
        for (xid, next, expected) in [
            (700, 731, Some(700)),
            (735, 731, Some(735)),
            (700, EPOCH + 731, Some(EPOCH + 700)),
            (u32::MAX - 5, EPOCH + 10, Some(EPOCH - 6)),
            (u32::MAX - 5, 10, None),
        ] {
            assert_eq!(full(xid, next), expected, "{xid} {next}");
        }
    }
}
