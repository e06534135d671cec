//! `walship receive` under load: how old the newest durable commit is, what a commit waits for, how fast a
//! slot's backlog is stored, and what a slow store does to the server.
//!
//! Servers and stores are made by the tests' harness and are gone when a table is done.

mod age;
mod catch_up;
mod commits;
mod receiver;
mod site;
mod slow;
mod walrus;

pub use age::ages;
pub use catch_up::catching_up;
pub use commits::commits;
pub(crate) use receiver::tps;
pub use slow::slow_stores;
