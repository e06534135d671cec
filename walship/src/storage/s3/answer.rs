//! What a store's refusal means: the one place that reads status codes and error codes.

use std::error::Error as StdError;

use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;

use super::S3Storage;
use crate::error::Error;

/// A request that did not succeed, by what its caller can do about it.
#[derive(Debug)]
pub(super) enum Answer {
    /// Exactly this key is not there: the store itself said so.
    NoSuchKey,
    /// The key of a conditional write is taken.
    Taken,
    /// Another write to the same key is under way; a multipart upload has to be started anew.
    Conflict(Error),
    /// The object is shorter than the range's start.
    RangePastEnd,
    /// The multipart upload is not there: completed or aborted already.
    NoSuchUpload(Error),
    /// What arrived at the store was not what its checksum said.
    WrongChecksum(Error),
    /// Anything else.
    Other {
        /// The HTTP status, where there was one.
        status: Option<u16>,
        /// What to tell the caller.
        error: Error,
    },
}

impl Answer {
    /// Returns what the failure of a request means.
    pub(super) fn of<E>(error: SdkError<E, HttpResponse>, storage: &S3Storage) -> Self
    where
        E: ProvideErrorMetadata + StdError + Send + Sync + 'static,
    {
        let SdkError::ServiceError(service) = &error else {
            return Self::Other { status: None, error: unanswered(error) };
        };
        let status = service.raw().status().as_u16();
        let deleted = service.raw().headers().get("x-amz-delete-marker") == Some("true");
        let code = match service.err().code().unwrap_or_default() {
            // The SDK's own word for a 404 without a body.
            "NotFound" => String::new(),
            code => code.to_owned(),
        };
        let message = service.err().message().unwrap_or_default();
        let text = format!("the store answered {}", sentence(status, &code, message));
        match (status, code.as_str()) {
            (404 | 405, _) if deleted => Self::Other { status: None, error: deleted_by_somebody(&text) },
            (404, "NoSuchKey") => Self::NoSuchKey,
            (412, _) => Self::Taken,
            (416, "InvalidRange") => Self::RangePastEnd,
            (404, "NoSuchUpload") => Self::NoSuchUpload(Error::unavailable(text)),
            (409, _) => Self::Conflict(Error::unavailable(text)),
            (400, "BadDigest" | "InvalidDigest" | "XAmzContentChecksumMismatch" | "ChecksumMismatch") => {
                Self::WrongChecksum(Error::unavailable(text))
            }
            _ => Self::Other { status: Some(status), error: explained(status, &code, text, storage) },
        }
    }

    /// Returns the error for a caller that expects none of the special answers.
    pub(super) fn into_error(self) -> Error {
        match self {
            Self::Conflict(error) | Self::NoSuchUpload(error) | Self::WrongChecksum(error) => error,
            Self::Other { error, .. } => error,
            Self::NoSuchKey => {
                Error::unavailable("the store answered 404 NoSuchKey to a request that names no object")
            }
            Self::Taken => Error::unavailable("the store answered 412 to a request without a condition"),
            Self::RangePastEnd => Error::unavailable("the store answered 416 to a request without a range"),
        }
    }
}

fn deleted_by_somebody(text: &str) -> Error {
    Error::missing(format!("the object was deleted: {text} with a delete marker"))
        .with_safe("the bucket keeps versions: the object's content is still there")
        .with_next("Find out who deleted it, then remove the delete marker (see list-object-versions).")
}

fn explained(status: u16, code: &str, text: String, storage: &S3Storage) -> Error {
    match (status, code) {
        (_, "NoSuchBucket") => {
            Error::missing(format!("the bucket {} does not exist: {text}", storage.bucket()))
                .with_next("Create the bucket, or correct the repository's URL, endpoint and region.")
        }
        (_, "RequestTimeTooSkewed" | "RequestExpired" | "RequestInTheFuture") => {
            Error::denied(format!("this machine's clock and the store's differ too much: {text}"))
                .with_next("Set this machine's clock (is NTP running?), then try again.")
        }
        (
            _,
            "InvalidAccessKeyId"
            | "SignatureDoesNotMatch"
            | "InvalidToken"
            | "ExpiredToken"
            | "TokenRefreshRequired"
            | "InvalidClientTokenId"
            | "UnrecognizedClientException",
        ) => Error::denied(format!("the store does not accept the credentials: {text}")).with_next(
            "Check access key, secret key and session token, and that they belong to this endpoint.",
        ),
        (
            _,
            "AuthorizationHeaderMalformed"
            | "PermanentRedirect"
            | "TemporaryRedirect"
            | "IllegalLocationConstraintException",
        )
        | (301 | 302 | 307 | 308, _) => Error::invalid(format!("the bucket is served elsewhere: {text}"))
            .with_next("Set the region (and endpoint) that the bucket lives in."),
        (401 | 403, _) => Error::denied(text).with_next(
            "Grant s3:PutObject, s3:GetObject and s3:AbortMultipartUpload on the objects and s3:ListBucket \
             on the bucket: without the latter the store answers 403 instead of \"no such key\".",
        ),
        (429 | 500 | 502..=599, _)
        | (
            _,
            "SlowDown"
            | "RequestTimeout"
            | "InternalError"
            | "ServiceUnavailable"
            | "Throttling"
            | "ThrottlingException"
            | "RequestLimitExceeded"
            | "OperationAborted"
            | "BandwidthLimitExceeded",
        ) => Error::unavailable(text),
        // Without a code it is not the store that speaks but something before it.
        (_, "") => {
            Error::unavailable(format!("{text} without an S3 error code: a proxy or another server answered"))
                .with_next(
                    "Check endpoint, addressing style and any proxy or load balancer before the store.",
                )
        }
        _ => Error::invalid(text)
            .with_next("Check that the store supports what walship asks for: `walship check`."),
    }
}

/// The error of a request that got no answer, or none that could be read.
fn unanswered<E>(error: SdkError<E, HttpResponse>) -> Error
where
    E: StdError + Send + Sync + 'static,
{
    let mut texts: Vec<String> = Vec::new();
    let mut cause: Option<&(dyn StdError + 'static)> = Some(&error);
    let mut credentials = None;
    while let Some(link) = cause {
        if let Some(found) = link.downcast_ref::<CredentialsError>() {
            credentials = Some(matches!(
                found,
                CredentialsError::CredentialsNotLoaded(_) | CredentialsError::InvalidConfiguration(_)
            ));
        }
        let text = escaped(&link.to_string(), 200);
        if texts.last() != Some(&text) && texts.len() < 8 {
            texts.push(text);
        }
        cause = link.source();
    }
    let text = texts.join(": ");
    match (credentials, &error) {
        (Some(true), _) => Error::denied(format!("no credentials for the store were found: {text}"))
            .with_next("Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, name a profile, or run with an instance role."),
        (Some(false), _) => Error::unavailable(format!("credentials could not be fetched: {text}")),
        (None, SdkError::ConstructionFailure(_)) => Error::invalid(format!("the request cannot be made: {text}")),
        (None, _) if text.contains("certificate") => Error::denied(format!("TLS to the store failed: {text}"))
            .with_next("Trust the store's certificate authority with ca_file, and check the endpoint's host name."),
        (None, SdkError::ResponseError(_)) => Error::unavailable(format!("the store's answer is no S3 answer: {text}"))
            .with_next("Check endpoint, addressing style and any proxy or load balancer before the store."),
        (None, _) => Error::unavailable(format!("the store cannot be reached: {text}")),
    }
}

fn sentence(status: u16, code: &str, message: &str) -> String {
    let mut text = status.to_string();
    if !code.is_empty() {
        text.push(' ');
        text.push_str(&escaped(code, 60));
    }
    if !message.is_empty() {
        text.push_str(&format!(" ({})", escaped(message, 200).trim_end_matches('.')));
    }
    text
}

/// Foreign text, safe for a terminal and not longer than `most` characters.
fn escaped(text: &str, most: usize) -> String {
    let mut shown: String = text
        .chars()
        .take(most)
        .flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] })
        .collect();
    if text.chars().nth(most).is_some() {
        shown.push_str("...");
    }
    shown
}
