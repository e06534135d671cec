//! The words of `pitr verify`.

use chrono::{DateTime, Utc};
use walship::{Error, Result};

use super::{SourceArgs, TargetArgs, local_offset};
use crate::target::parse_time;

pub(super) const VERIFY_EXAMPLES: &str = "Examples:
  pitr verify
  pitr verify --budget 10GB --max-rate 50MB --reason 'nightly'
  pitr verify --to-time '2026-03-01 14:29:59.8 Europe/Berlin'
  pitr verify --backup 20260301T020000Z-0123456789abcdef
  pitr verify --window --server 'host=db1 user=monitor'
  pitr verify --json | jq .affected

Every byte is read: envelopes, sizes, checksums, digests, the CRC of every WAL record, whether WAL goes on from segment to
segment and across timelines, summaries and the index against the WAL, files of backups against the server's manifest, page
checksums. Each repository is read by itself. What is damaged is told by what it takes away: which moments can no longer be
reached, which backups cannot be restored. Nothing is repaired and nothing is removed.

With --budget the objects that were not proven for longest are read first: run every night, it gets round to everything.
One that was killed or interrupted is gone on with by the next, within a week.

It does not see everything yet: the page about verification lists the cases. `pitr drill` restores, and proves that.
";

#[derive(Debug, clap::Args)]
#[command(
    override_usage = "pitr verify [OPTIONS]    (without a target, --backup, --since or --window: the whole lineage)"
)]
pub(in crate::cli) struct VerifyArgs {
    /// Only what leads to every moment from here on, with an offset or a zone
    #[arg(long, value_name = "TIME", conflicts_with = "window")]
    since: Option<String>,
    /// Only what leads to every moment of the window of [retention] in the configuration
    #[arg(long)]
    pub(in crate::cli) window: bool,
    /// Read about so much of each repository, such as 10GB: what was not proven for longest first
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(in crate::cli) budget: Option<u64>,
    /// Read at most so much in a second, such as 50MB
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(in crate::cli) max_rate: Option<u64>,
    /// How many objects are read side by side [default: the number of processors, at most 8]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(in crate::cli) workers: Option<u32>,
    /// Compare the archive's end with this server: a connection string or URI, without a password [default: connection of
    /// the configuration, where there is one]
    #[arg(long, value_name = "CONNINFO")]
    pub(in crate::cli) server: Option<String>,
    /// Ask no server
    #[arg(long, conflicts_with = "server")]
    pub(in crate::cli) no_server: bool,
    /// Read also what a verification that was killed or interrupted had proven
    #[arg(long)]
    pub(in crate::cli) anew: bool,
    /// What was there before and is missing now is known: it is not told any more, by this verification or later ones
    #[arg(long, requires = "reason")]
    pub(in crate::cli) accept_missing: bool,
    /// Why, for the history (`pitr history`)
    #[arg(long, value_name = "TEXT")]
    pub(in crate::cli) reason: Option<String>,
    #[command(flatten)]
    pub(in crate::cli) target: TargetArgs,
    #[command(flatten)]
    pub(in crate::cli) source: SourceArgs,
}

impl VerifyArgs {
    /// Returns from when on every moment is meant.
    pub(in crate::cli) fn since(&self) -> Result<Option<DateTime<Utc>>> {
        let since = self.since.as_deref().map(|text| parse_time(text, local_offset)).transpose()?;
        Ok(since.map(|(time, _)| time))
    }

    /// Checks that what is to be proven is said in one way only.
    ///
    /// # Errors
    /// [`Error::Invalid`] when it is not.
    pub(in crate::cli) fn check(&self) -> Result<()> {
        let ways =
            [self.target.is_given(), self.since.is_some(), self.window].iter().filter(|way| **way).count();
        if ways > 1 || (self.target.backup.is_some() && (self.since.is_some() || self.window)) {
            return Err(Error::invalid("what is to be verified is said in more than one way")
                .with_safe("nothing was read")
                .with_next("Give a target, or --backup, or --since, or --window; without any it is the whole lineage."));
        }
        Ok(())
    }
}

/// Parses a size: `500MB`, `10GB`, `2TiB`, a plain number of bytes. Decimal and binary units are what they say.
fn parse_size(text: &str) -> std::result::Result<u64, String> {
    let digits = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kb" => 1000,
        "m" | "mb" => 1_000_000,
        "g" | "gb" => 1_000_000_000,
        "t" | "tb" => 1_000_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        "tib" => 1 << 40,
        _ => {
            return Err(format!("{unit:?} is no unit of size: there are KB, MB, GB, TB, KiB, MiB, GiB, TiB"));
        }
    };
    let number: f64 = number.parse().map_err(|_| "a size begins with a number, as 10GB does".to_owned())?;
    let bytes = number * factor as f64;
    if !(1.0..=1e18).contains(&bytes) {
        return Err("a size is at least one byte".to_owned());
    }
    Ok(bytes as u64)
}

#[cfg(test)]
mod tests {
    use super::parse_size;

    #[test]
    fn sizes_are_what_they_say() {
        for (text, bytes) in
            [("10GB", 10_000_000_000), ("1.5MiB", 3 << 19), ("700", 700), ("2 kb", 2000), ("1TiB", 1 << 40)]
        {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "GB", "10XB", "-1GB", "0", "1..5GB", "1e99GB"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
