//! Bytes to stored objects and back: compression, the envelope, digests. CPU only.
//!
//! Encoding and decoding stand side by side. Nothing here opens a file, asks a store or trusts a
//! byte that it decodes: callers hand in readers and writers, lengths are bounded before anything
//! is allocated, and whatever fails a check is [`Error::Corrupt`](crate::Error::Corrupt).
//! `docs/repository-format.md` is the specification.

#[cfg(feature = "store")]
pub mod backup_index;
mod beside;
mod compress;
mod digest;
mod envelope;
#[cfg(feature = "store")]
mod lanes;
mod lz4;
mod object;
mod part;

pub use compress::{Codec, Compression};
pub use digest::Digest;
pub use envelope::{Envelope, FORMAT_VERSION, ObjectHead, ObjectKind};
#[cfg(feature = "store")]
pub(crate) use object::fill;
pub use object::{
    BodyEncoder, Encoded, EncodedBody, EncodedObject, PLAIN_BYTES_MAX, decode_body, encode_body,
};
pub use part::TailPart;
