//! What the benches share: realistic WAL, and measurements that are taken in pairs.
//!
//! `cargo bench -p walship-benches` runs the criterion benches of the pure code; `benches/run` builds the
//! release programs and prints the tables of `docs/benchmarks.md`, which says what they show.
//!
//! Milliseconds belong to the machine that they were measured on. What travels is the ratio of two
//! contenders that took turns in the same run, and that is what [`measure::compete`] returns:
//!
//! ```
//! use walship_benches::measure::{Contender, compete, in_process};
//!
//! let bytes = vec![7u8; 1 << 20];
//! let rows = compete(3, vec![
//!     Contender::new("CRC-32C", in_process(|| { std::hint::black_box(crc32c::crc32c(&bytes)); })),
//!     Contender::new("BLAKE3", in_process(|| { std::hint::black_box(blake3::hash(&bytes)); })),
//! ]);
//! assert_eq!(rows.len(), 2);
//! ```

#![warn(missing_docs)]

pub mod measure;
pub mod object;
pub mod peers;
pub mod scale;
pub mod streaming;
pub mod tables;
pub mod wal;
