//! The crate's one error type: what happened, what is still safe, what to do next.

use std::error::Error as StdError;
use std::fmt;

/// The result of everything fallible in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, by what the caller can do about it.
///
/// A new variant is justified only when a caller acts differently on it. Every variant answers
/// three questions: [`fmt::Display`] says what happened (a lowercase fact without a full stop),
/// [`Error::safe`] what still holds, [`Error::next`] what to do. Programs print all three with
/// [`Error::report`].
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A store, a server or a network did not answer, or answered that it cannot at the moment.
    /// The same call may succeed later. Never a statement about what is stored.
    #[error("{0}")]
    Unavailable(Box<Detail>),
    /// A store, server or file system refused: credentials, permissions, read-only.
    #[error("{0}")]
    Denied(Box<Detail>),
    /// Something that had to exist does not, and that is confirmed (never an outage).
    #[error("{0}")]
    Missing(Box<Detail>),
    /// A name is taken by other content.
    #[error("{0}")]
    Conflict(Box<Detail>),
    /// Stored or received bytes fail their own checks.
    #[error("{0}")]
    Corrupt(Box<Detail>),
    /// Sound data that belongs elsewhere: another cluster, timeline, segment size or version.
    #[error("{0}")]
    Mismatch(Box<Detail>),
    /// The request itself, or the configuration, makes no sense.
    #[error("{0}")]
    Invalid(Box<Detail>),
    /// The local machine failed: disk full, I/O error, no such local file.
    #[error("{0}")]
    LocalIo(Box<Detail>),
}

/// The three answers of an [`Error`], and its cause.
#[derive(Debug)]
pub struct Detail {
    what: String,
    safe: Option<String>,
    next: Option<String>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl fmt::Display for Detail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl StdError for Detail {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

macro_rules! constructors {
    ($($(#[$doc:meta])* $name:ident => $variant:ident,)*) => {$(
        $(#[$doc])*
        pub fn $name(what: impl Into<String>) -> Self {
            Self::$variant(Box::new(Detail { what: what.into(), safe: None, next: None, source: None }))
        }
    )*};
}

impl Error {
    constructors! {
        /// Returns an [`Error::Unavailable`] that says `what` happened.
        unavailable => Unavailable,
        /// Returns an [`Error::Denied`] that says `what` happened.
        denied => Denied,
        /// Returns an [`Error::Missing`] that says `what` happened.
        missing => Missing,
        /// Returns an [`Error::Conflict`] that says `what` happened.
        conflict => Conflict,
        /// Returns an [`Error::Corrupt`] that says `what` happened.
        corrupt => Corrupt,
        /// Returns an [`Error::Mismatch`] that says `what` happened.
        mismatch => Mismatch,
        /// Returns an [`Error::Invalid`] that says `what` happened.
        invalid => Invalid,
        /// Returns an [`Error::LocalIo`] that says `what` happened.
        local_io => LocalIo,
    }

    /// Returns a [`Error::LocalIo`] or [`Error::Denied`] for a failed local file operation:
    /// `what` names operation and path, the operating system's text is appended.
    pub fn from_io(what: impl fmt::Display, source: std::io::Error) -> Self {
        let text = format!("{what}: {source}");
        let kind = source.kind();
        let error = match kind {
            std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem => {
                Self::denied(text)
            }
            _ => Self::local_io(text),
        };
        error.with_source(source)
    }

    /// Returns the error with its own answer to "what is still true".
    #[must_use]
    pub fn with_safe(mut self, safe: impl Into<String>) -> Self {
        self.detail_mut().safe = Some(safe.into());
        self
    }

    /// Returns the error with its own answer to "what to do next".
    #[must_use]
    pub fn with_next(mut self, next: impl Into<String>) -> Self {
        self.detail_mut().next = Some(next.into());
        self
    }

    /// Returns the error with the given cause.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.detail_mut().source = Some(source.into());
        self
    }

    /// Returns the error with `context: ` before what happened.
    #[must_use]
    pub fn context(mut self, context: impl fmt::Display) -> Self {
        let detail = self.detail_mut();
        detail.what = format!("{context}: {}", detail.what);
        self
    }

    /// Returns the cause that [`Error::with_source`] attached, for a caller that knows its type.
    pub fn cause(&self) -> Option<&(dyn StdError + Send + Sync + 'static)> {
        self.detail().source.as_deref()
    }

    /// Returns what still holds although this happened.
    pub fn safe(&self) -> &str {
        self.detail().safe.as_deref().unwrap_or(match self {
            Self::Unavailable(_) => "nothing was changed; what was acknowledged before is still stored",
            Self::Denied(_) => "nothing was changed",
            Self::Missing(_) => "nothing was changed",
            Self::Conflict(_) => "nothing was overwritten",
            Self::Corrupt(_) => "nothing was delivered from the damaged data",
            Self::Mismatch(_) => "nothing was changed",
            Self::Invalid(_) => "nothing was started",
            Self::LocalIo(_) => "the repository is unchanged",
        })
    }

    /// Returns what to do about it.
    pub fn next(&self) -> &str {
        self.detail().next.as_deref().unwrap_or(match self {
            Self::Unavailable(_) => "Check that the store or server is up and reachable, then try again.",
            Self::Denied(_) => "Check the credentials and permissions of the user that runs this.",
            Self::Missing(_) => "Check the name and the configured repository and cluster.",
            Self::Conflict(_) => "Check that only one cluster archives under this name: compare system identifiers with `pitr info`.",
            Self::Corrupt(_) => "Keep the damaged object for inspection and use another copy if there is one.",
            Self::Mismatch(_) => "Check that the configured cluster is the one that this data belongs to.",
            Self::Invalid(_) => "Correct the command or the configuration; `--help` shows an example.",
            Self::LocalIo(_) => "Check the local disk: free space, mount, permissions.",
        })
    }

    /// Returns whether the same call may succeed later without anyone's help.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable(_))
    }

    /// Returns the three lines that every program prints: `error:`, `safe:`, `next:`.
    pub fn report(&self) -> String {
        format!("error: {self}\nsafe:  {}\nnext:  {}", self.safe(), self.next())
    }

    fn detail(&self) -> &Detail {
        match self {
            Self::Unavailable(detail)
            | Self::Denied(detail)
            | Self::Missing(detail)
            | Self::Conflict(detail)
            | Self::Corrupt(detail)
            | Self::Mismatch(detail)
            | Self::Invalid(detail)
            | Self::LocalIo(detail) => detail,
        }
    }

    fn detail_mut(&mut self) -> &mut Detail {
        match self {
            Self::Unavailable(detail)
            | Self::Denied(detail)
            | Self::Missing(detail)
            | Self::Conflict(detail)
            | Self::Corrupt(detail)
            | Self::Mismatch(detail)
            | Self::Invalid(detail)
            | Self::LocalIo(detail) => detail,
        }
    }
}

impl From<crate::pg::ParseError> for Error {
    fn from(error: crate::pg::ParseError) -> Self {
        Self::invalid(error.to_string())
    }
}
