//! How the two thin commands get their work done: by one round trip to an agent that is at work already, else
//! in the foreground.
//!
//! [`client`] is the thin commands' side and links no runtime and no SDK; [`meeting`] says where the two meet,
//! [`protocol`] what they say. `server` is the agent: it keeps connections warm, pushes and fetches
//! ahead of what PostgreSQL asks for, holds its state in memory and exits when it is idle. It may be killed at any
//! moment. An answer is never more than what the foreground would have said.

pub mod client;
pub mod meeting;
pub mod protocol;
#[cfg(feature = "store")]
pub mod server;
