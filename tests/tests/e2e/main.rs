//! End to end, on real PostgreSQL servers and real stores.

mod harness;
