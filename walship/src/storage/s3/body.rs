//! What is sent in one request from memory: pieces one after the other, never joined, and the sums over them.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use aws_runtime::auth::SigV4OperationSigningConfig;
use aws_sdk_s3::config::interceptors::BeforeTransmitInterceptorContextMut;
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_sdk_s3::error::BoxError;
use aws_sdk_s3::primitives::ByteStream;
use aws_sigv4::http_request::SignableBody;
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use sha2::{Digest as _, Sha256};

use crate::error::Result;
use crate::storage::blocking;

/// From this length on sums are made on a thread where nobody else waits meanwhile.
const ASIDE_FROM: u64 = 256 << 10;

/// The sums over a body that a request carries.
#[derive(Debug, Clone)]
pub(super) struct Sums {
    /// CRC-32, which the store checks.
    pub(super) crc: u32,
    /// SHA-256 in hex, which is signed where TLS does not guard the body.
    pub(super) sha256: Option<String>,
}

/// Returns the sums over `pieces`, each byte read once.
pub(super) async fn sums(pieces: &[Bytes], with_sha256: bool) -> Result<Sums> {
    let length: u64 = pieces.iter().map(|piece| piece.len() as u64).sum();
    if length < ASIDE_FROM {
        return Ok(sum(pieces, with_sha256));
    }
    let pieces = pieces.to_vec();
    blocking(move || Ok(sum(&pieces, with_sha256))).await
}

fn sum(pieces: &[Bytes], with_sha256: bool) -> Sums {
    let mut crc = crc32fast::Hasher::new();
    let mut sha256 = with_sha256.then(Sha256::new);
    // In parts that stay in the processor's cache from one sum to the other.
    for part in pieces.iter().flat_map(|piece| piece.chunks(64 << 10)) {
        crc.update(part);
        if let Some(sha256) = &mut sha256 {
            sha256.update(part);
        }
    }
    Sums { crc: crc.finalize(), sha256: sha256.map(|sha256| hex::encode(sha256.finalize())) }
}

/// Returns the pieces as the body of one request.
pub(super) fn stream(pieces: &[Bytes]) -> ByteStream {
    let pieces = pieces.iter().filter(|piece| !piece.is_empty()).cloned().collect();
    ByteStream::from_body_1_x(Pieces(pieces))
}

struct Pieces(VecDeque<Bytes>);

impl Body for Pieces {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        Poll::Ready(self.0.pop_front().map(|piece| Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.0.iter().map(|piece| piece.len() as u64).sum())
    }
}

/// Has a SHA-256 signed that is known already: the SDK makes one itself only of a body in one piece, and leaves
/// others unsigned.
#[derive(Debug)]
pub(super) struct SignedAs(pub(super) String);

impl Intercept for SignedAs {
    fn name(&self) -> &'static str {
        "SignedAs"
    }

    fn modify_before_signing(
        &self,
        _: &mut BeforeTransmitInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        settings: &mut ConfigBag,
    ) -> std::result::Result<(), BoxError> {
        let Some(signing) = settings.load::<SigV4OperationSigningConfig>() else {
            return Err("a request is signed by another method than expected".into());
        };
        let mut signing = signing.clone();
        signing.signing_options.payload_override = Some(SignableBody::Precomputed(self.0.clone()));
        settings.interceptor_state().store_put(signing);
        Ok(())
    }
}
