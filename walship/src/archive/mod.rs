//! Moves WAL files between the server's disk and the repositories.

pub mod asked;
