//! How the two thin commands get their work done. Std only: they link no runtime and no SDK.

pub mod client;
