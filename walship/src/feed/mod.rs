//! The thinking part of receiving WAL: what the bytes of a stream belong to, how far everything is
//! durable, when to speak to the server, and where to go on after a break.
//!
//! Pure: bytes, positions and times come in, decisions go out. `receive` carries them out.

mod clock;
mod conversation;
mod cutter;
mod frontier;
mod lost;
mod resume;
mod tail;

pub use clock::{ServerClock, clock_ahead, clock_text};
pub use conversation::{Conversation, Rules, Verdict};
pub use cutter::{Cutter, Piece};
pub use frontier::Frontier;
pub use lost::{Search, Stretch, owner, stretches};
pub use resume::{Known, Start, first_missing, resume, start_at, younger};
pub use tail::{Eagerness, LeftBehind, OnTheWay, Part, TailCutter, TailRules};
