//! End to end, on real PostgreSQL servers and real stores.

// Helpers of tests may fail loudly, as the tests themselves.
#![allow(clippy::unwrap_used)]

mod agent;
mod backup;
mod backup_ends;
mod catalog_oracle;
mod delta;
mod doctor;
mod drill;
mod exact;
mod expire;
mod expire_races;
mod extract;
mod forecast;
mod gaps;
mod guides;
mod half_done;
mod harness;
mod incremental;
mod index;
mod json_docs;
mod kill;
mod large_segments;
mod local_backup;
mod log;
mod log_under_load;
mod main_job;
mod outside_settings;
mod owners;
mod pitr;
mod prepared_fork;
mod receive;
mod records;
mod recovery;
mod replication;
mod repositories;
mod reset;
mod restore;
mod s3_settings;
mod setup;
mod standby;
pub(crate) mod start;
mod status_page;
mod storage;
mod storage_folder;
mod surviving;
mod tablespaces;
mod texts;
mod thin;
mod verify;
mod verify_blind;
mod wal_files;
mod waldump_oracle;
mod watch;
