//! What the server's settings really promise about `walship receive`: its slot, and commits that wait for it.

use walship::config::Config;
use walship::error::Result;
use walship::replication::StandbyRole;
use walship::replication::connection::Connection;

use super::server::{self, Weight};

/// A finding: how much it matters, what is the case, what to do.
pub(super) type Found = (Weight, String, Option<String>);

/// The slot that `walship receive` uses when nothing names another.
pub(super) const DEFAULT_SLOT: &str = "walship";

/// What was found of receiving.
pub(super) struct Receiving {
    /// Whether somebody streams through the slot at the moment.
    pub(super) streaming: bool,
    pub(super) findings: Vec<Found>,
}

/// Looks at the slot, and at what commits wait for.
pub(super) async fn check(config: &Config, connection: &mut Connection) -> Result<Receiving> {
    let slot = config.receive.slot.clone().unwrap_or_else(|| DEFAULT_SLOT.to_owned());
    let receiver = server::options(config)?.application_name;
    let shown = connection
        .query("SELECT current_setting('synchronous_standby_names'), reset_val, current_setting('max_slot_wal_keep_size') \
                FROM pg_settings WHERE name = 'synchronous_commit'")
        .await?;
    let text = |column| shown.get(0, column).unwrap_or_default().to_owned();
    let (names, commit, keep) = (text(0), text(1), text(2));
    let found = read_slot(connection, &slot).await?;
    let mut findings: Vec<Found> = Vec::new();
    let streaming = found.as_ref().is_some_and(|slot| slot.active);
    let role = StandbyRole::of(&names, &receiver);
    if let Some(found) = &found {
        findings.push(judge_slot(&slot, found, keep == "-1"));
    } else if role != StandbyRole::None {
        findings.push((
            Weight::Needed,
            format!("synchronous_standby_names is '{names}', and there is no replication slot \"{slot}\""),
            Some("Start `walship receive`: commits that wait for it wait for ever without.".to_owned()),
        ));
    }
    let durable = match config.receive.flush.as_deref() {
        Some("local") => "durable in the spool of `walship receive`, on its host",
        _ => "durable in every repository",
    };
    findings.extend(judge(&names, &commit, &receiver, role, durable));
    if matches!(role, StandbyRole::Required { .. }) {
        for (whose, value) in overrides(connection).await? {
            if !matches!(&*value, "on" | "remote_write" | "true" | "yes" | "1") {
                findings.push((
                    Weight::Advice,
                    format!("{whose} has synchronous_commit = {value}: its commits do not keep that promise"),
                    Some("Reset it with ALTER ROLE or ALTER DATABASE ... RESET synchronous_commit, or know why it stands there.".to_owned()),
                ));
            }
        }
    }
    Ok(Receiving { streaming, findings })
}

/// A slot, as `pg_replication_slots` shows it.
struct Slot {
    physical: bool,
    active: bool,
    wal_status: String,
    held_bytes: Option<u64>,
    held: String,
    safe: Option<String>,
}

async fn read_slot(connection: &mut Connection, name: &str) -> Result<Option<Slot>> {
    let sql = format!(
        "SELECT slot_type, active, coalesce(wal_status, ''), held::bigint, pg_size_pretty(held), pg_size_pretty(safe_wal_size) \
         FROM pg_replication_slots, LATERAL (SELECT pg_wal_lsn_diff(CASE WHEN pg_is_in_recovery() \
         THEN pg_last_wal_receive_lsn() ELSE pg_current_wal_flush_lsn() END, restart_lsn) AS held) h \
         WHERE slot_name = '{}'",
        name.replace('\'', "''")
    );
    let rows = connection.query(&sql).await?;
    if rows.rows.is_empty() {
        return Ok(None);
    }
    let text = |column| rows.get(0, column).unwrap_or_default().to_owned();
    Ok(Some(Slot {
        physical: text(0) == "physical",
        active: text(1) == "t",
        wal_status: text(2),
        held_bytes: rows.get(0, 3).and_then(|text| text.parse().ok()),
        held: text(4),
        safe: rows.get(0, 5).map(str::to_owned),
    }))
}

fn judge_slot(name: &str, slot: &Slot, unlimited: bool) -> Found {
    let next = |text: &str| Some(text.to_owned());
    if !slot.physical {
        return (
            Weight::Needed,
            format!("the replication slot \"{name}\" is a logical one"),
            next("Name another slot for `walship receive` with --slot."),
        );
    }
    if slot.wal_status == "lost" && slot.held_bytes.is_some() {
        return (
            Weight::Needed,
            format!(
                "the replication slot \"{name}\" was invalidated by the server: it holds no WAL back any more"
            ),
            next(
                "Start `walship receive`: it makes the slot anew, goes on where the archive ends, and says whether WAL is lost. \
                 Raise idle_replication_slot_timeout, or set it to 0.",
            ),
        );
    }
    if slot.wal_status == "lost" {
        return (
            Weight::Needed,
            format!("the replication slot \"{name}\" has lost WAL that was not received"),
            next(
                "Start `walship receive`: it says what is lost, records it as a gap and goes on. Then take a base backup, \
                 and raise max_slot_wal_keep_size.",
            ),
        );
    }
    let held = match slot.held_bytes {
        None => return (Weight::Good, format!("the replication slot \"{name}\" holds no WAL yet"), None),
        Some(_) => &slot.held,
    };
    let room = slot.safe.as_ref().map(|safe| format!(", {safe} more may be written before it loses WAL"));
    let what =
        format!("the replication slot \"{name}\" holds back {held} of WAL{}", room.unwrap_or_default());
    match (slot.active, slot.wal_status.as_str(), unlimited) {
        (_, "unreserved", _) => (
            Weight::Needed,
            format!("{what}: the next checkpoint may remove it"),
            next(
                "See that `walship receive` runs and reaches its repositories; raise max_slot_wal_keep_size.",
            ),
        ),
        (false, ..) => (
            Weight::Advice,
            format!("{what}, and nobody streams through it"),
            next(
                "Start `walship receive`; where it is not used any more, drop the slot with pg_drop_replication_slot: it \
                 fills the server's disk.",
            ),
        ),
        (true, _, true) => (
            Weight::Good,
            format!(
                "{what}; max_slot_wal_keep_size is -1, so an outage of the repository ends when the server's disk is full"
            ),
            None,
        ),
        (true, ..) => (Weight::Good, what, None),
    }
}

/// Says in words what a commit that returned is sure of. `durable` says what the receiver's word rests on.
fn judge(names: &str, commit: &str, receiver: &str, role: StandbyRole, durable: &str) -> Option<Found> {
    let next = |text: &str| Some(text.to_owned());
    let shown = format!("synchronous_standby_names is '{names}', synchronous_commit is {commit}");
    Some(match (role, commit) {
        (StandbyRole::None, _) if names.is_empty() => return None,
        (StandbyRole::None, _) => (
            Weight::Good,
            format!("{shown}: no commit waits for \"{receiver}\"; a crash may lose what was not shipped yet"),
            None,
        ),
        (_, "remote_apply") => (
            Weight::Needed,
            format!(
                "{shown}: nothing is replayed by `walship receive`, commits that wait for it wait for ever"
            ),
            next("Set synchronous_commit = on."),
        ),
        (_, "off" | "local") => (
            Weight::Advice,
            format!("{shown}: commits return before they are in the repository, whoever is named"),
            next("Set synchronous_commit = on where no commit may be lost."),
        ),
        (StandbyRole::Replaceable, _) => (
            Weight::Advice,
            format!(
                "{shown}: a commit may return when others have it and \"{receiver}\" has not; it is not sure to be in \
                 the repository"
            ),
            next(&format!(
                "To be sure, let all that are named be waited for: 'FIRST 1 ({receiver})', or as many as there are names."
            )),
        ),
        (StandbyRole::Required { .. }, "remote_write") => (
            Weight::Advice,
            format!(
                "{shown}: a commit that returned is {durable}, because `walship receive` calls written only what is; other \
                 standbys may lose it"
            ),
            next("Set synchronous_commit = on."),
        ),
        (StandbyRole::Required { others }, _) => {
            let with = match others {
                0 => String::new(),
                1 => " and on the other standby".to_owned(),
                others => format!(" and on {others} other standbys"),
            };
            (
                Weight::Good,
                format!(
                    "{shown}: a commit that returned is {durable}{with}; while that cannot be, commits wait"
                ),
                None,
            )
        }
    })
}

/// Returns whose own setting of `synchronous_commit` differs, and how.
async fn overrides(connection: &mut Connection) -> Result<Vec<(String, String)>> {
    let sql = "SELECT concat_ws(' in ', 'role ' || r.rolname, 'database ' || d.datname), split_part(one, '=', 2) \
               FROM pg_db_role_setting s CROSS JOIN unnest(setconfig) one LEFT JOIN pg_roles r ON r.oid = setrole \
               LEFT JOIN pg_database d ON d.oid = setdatabase WHERE one LIKE 'synchronous_commit=%' ORDER BY 1 LIMIT 20";
    let rows = connection.query(sql).await?;
    let text = |row: usize, column| rows.get(row, column).unwrap_or_default().to_owned();
    Ok((0..rows.rows.len()).map(|row| (text(row, 0), text(row, 1))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_promise_is_said_for_what_it_is() {
        for (names, commit, weight, words) in [
            ("walship", "on", Weight::Good, "a commit that returned is durable somewhere; while"),
            ("2 (walship, s1)", "on", Weight::Good, "and on the other standby"),
            ("walship", "remote_write", Weight::Advice, "other standbys may lose it"),
            ("walship", "remote_apply", Weight::Needed, "wait for ever"),
            ("walship", "local", Weight::Advice, "before they are in the repository"),
            ("walship", "off", Weight::Advice, "before they are in the repository"),
            ("ANY 1 (walship, s1)", "on", Weight::Advice, "not sure to be in the repository"),
            ("s1", "on", Weight::Good, "no commit waits for \"walship\""),
        ] {
            let role = StandbyRole::of(names, "walship");
            let (found, what, next) = judge(names, commit, "walship", role, "durable somewhere").unwrap();
            assert_eq!(found, weight, "{names} {commit}");
            assert!(what.contains(words), "{what}");
            assert_eq!(next.is_some(), weight != Weight::Good, "{what}");
        }
        assert_eq!(judge("", "on", "walship", StandbyRole::None, ""), None);
    }

    #[test]
    fn a_slot_is_judged_by_what_it_holds_and_who_uses_it() {
        for (physical, active, status, held, unlimited, weight, words) in [
            (true, true, "reserved", Some(5), false, Weight::Good, "holds back 5 MB of WAL, 9 GB more"),
            (true, true, "reserved", Some(5), true, Weight::Good, "disk is full"),
            (true, false, "extended", Some(5), false, Weight::Advice, "nobody streams"),
            (true, true, "unreserved", Some(5), false, Weight::Needed, "next checkpoint"),
            (true, false, "lost", Some(5), false, Weight::Needed, "was invalidated"),
            (true, false, "lost", None, false, Weight::Needed, "has lost WAL"),
            (true, false, "", None, false, Weight::Good, "holds no WAL yet"),
            (false, true, "reserved", Some(5), false, Weight::Needed, "logical"),
        ] {
            let slot = Slot {
                physical,
                active,
                wal_status: status.to_owned(),
                held_bytes: held,
                held: "5 MB".to_owned(),
                safe: (!unlimited).then(|| "9 GB".to_owned()),
            };
            let (found, what, next) = judge_slot("walship", &slot, unlimited);
            assert_eq!(found, weight, "{what}");
            assert!(what.contains(words), "{what}");
            assert_eq!(next.is_some(), weight != Weight::Good, "{what}");
        }
    }
}
