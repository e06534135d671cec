//! Moves one WAL file between the server's disk and the repositories, with every check that makes it safe.
//!
//! [`push`] decides whether a local file may take its name's key; [`fetch`] tells delivered from
//! absent from unknown, [`asked`] keeps a server from being led across a fork, [`give_up`] records what will
//! never be archived, [`lookahead`] knows what PostgreSQL will ask for next. None of them decides an exit status: that is the programs' work.

pub mod asked;
#[cfg(feature = "store")]
pub mod fetch;
#[cfg(feature = "store")]
pub mod give_up;
pub mod lookahead;
mod place;
#[cfg(feature = "store")]
pub mod push;
#[cfg(feature = "store")]
mod tail;

pub use place::{DataDirectory, own_folder};
#[cfg(feature = "store")]
pub use tail::{stored_in_parts, whole_from_parts};
