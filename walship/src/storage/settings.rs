//! Which storage to open and how patient to be: plain data, checked once.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// One storage, as an operator configures it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StorageConfig {
    /// The root: `file:///srv/walship`, an absolute path, or `s3://bucket/prefix`.
    pub url: String,
    /// Settings of an `s3://` root.
    #[serde(default)]
    pub s3: S3Settings,
    /// Deadlines.
    #[serde(default)]
    pub limits: Limits,
}

/// How to reach an S3 or compatible store, and as whom.
///
/// What is left out is taken from AWS's own environment variables, profiles and instance roles.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct S3Settings {
    /// The endpoint's URL; `None` is AWS itself (or `AWS_ENDPOINT_URL`).
    pub endpoint: Option<String>,
    /// The region; `None` is taken from environment or profile, else `us-east-1` with an endpoint of one's own.
    pub region: Option<String>,
    /// How the bucket is named in requests.
    pub addressing: AddressingStyle,
    /// A PEM file of certificate authorities to trust besides the system's own.
    pub ca_file: Option<PathBuf>,
    /// The profile of AWS's shared configuration files.
    pub profile: Option<String>,
    /// The access key; together with `secret_access_key`.
    pub access_key_id: Option<String>,
    /// The secret key; together with `access_key_id`.
    pub secret_access_key: Option<Secret>,
    /// The session token of temporary credentials.
    pub session_token: Option<Secret>,
    /// For `pitr expire` alone, whose credentials may delete: the profile.
    pub expire_profile: Option<String>,
    /// For `pitr expire` alone: the access key.
    pub expire_access_key_id: Option<String>,
    /// For `pitr expire` alone: the secret key.
    pub expire_secret_access_key: Option<Secret>,
    /// For `pitr expire` alone: the session token.
    pub expire_session_token: Option<Secret>,
}

impl S3Settings {
    /// Returns whether removal has credentials of its own.
    pub fn expires_as_another(&self) -> bool {
        self.expire_profile.is_some()
            || self.expire_access_key_id.is_some()
            || self.expire_secret_access_key.is_some()
    }
}

/// How requests name the bucket.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AddressingStyle {
    /// In the path where an endpoint is configured, in the host name on AWS itself.
    #[default]
    Auto,
    /// In the path: `https://host/bucket/key`.
    Path,
    /// In the host name: `https://bucket.host/key`.
    Virtual,
}

/// How long calls to a storage may take, in milliseconds.
///
/// A call that moves data gets one second more for every MiB, on top of both of the latter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// To connect, TLS included.
    pub connect_ms: u64,
    /// For one request and its answer.
    pub request_ms: u64,
    /// For one call with all its retries.
    pub deadline_ms: u64,
}

impl Limits {
    /// Returns the time for one request that moves `bytes`.
    pub fn request(&self, bytes: u64) -> Duration {
        Duration::from_millis(self.request_ms) + moving(bytes)
    }

    /// Returns the time for one call that moves `bytes`, with all its retries.
    pub fn deadline(&self, bytes: u64) -> Duration {
        Duration::from_millis(self.deadline_ms) + moving(bytes)
    }
}

/// A second for every MiB: no store that is slower can keep up with a server.
fn moving(bytes: u64) -> Duration {
    Duration::from_millis(bytes / 1049)
}

impl Default for Limits {
    fn default() -> Self {
        Self { connect_ms: 5_000, request_ms: 20_000, deadline_ms: 60_000 }
    }
}

/// A text that is never printed.
#[derive(Clone, PartialEq, Eq, Hash, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Returns the secret that holds `text`.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// Returns the text itself, for the one place that needs it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// Where a storage's root lies.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Location {
    /// A folder, by its absolute path.
    Folder(PathBuf),
    /// A bucket of an S3 store and a prefix within it.
    S3 {
        /// The bucket's name.
        bucket: String,
        /// What all keys start with; empty, or without a slash at either end.
        prefix: String,
    },
}

impl StorageConfig {
    /// Returns the configuration of the storage at `url`, all else by default.
    pub fn new(url: impl Into<String>) -> Self {
        Self { url: url.into(), s3: S3Settings::default(), limits: Limits::default() }
    }

    /// Returns the same storage as `pitr expire` opens it: with the credentials that are for that alone, where
    /// there are any.
    #[must_use]
    pub fn for_removal(&self) -> Self {
        let mut config = self.clone();
        if config.s3.expires_as_another() {
            config.s3.profile = config.s3.expire_profile.take();
            config.s3.access_key_id = config.s3.expire_access_key_id.take();
            config.s3.secret_access_key = config.s3.expire_secret_access_key.take();
            config.s3.session_token = config.s3.expire_session_token.take();
        }
        config
    }

    /// Returns where the root lies.
    ///
    /// # Errors
    /// [`Error::Invalid`] for anything but the three forms of [`StorageConfig::url`].
    pub fn location(&self) -> Result<Location> {
        if let Some(path) = self.url.strip_prefix("file://") {
            return folder(&percent_decoded(path)?, &self.url);
        }
        if let Some(rest) = self.url.strip_prefix("s3://") {
            return bucket(rest, &self.url);
        }
        if self.url.starts_with('/') {
            return folder(&self.url, &self.url);
        }
        Err(invalid(&self.url, "it starts with none of file://, s3:// and /"))
    }
}

fn invalid(url: &str, why: &str) -> Error {
    Error::invalid(format!("{} cannot be a repository: {why}", shown(url)))
        .with_next("Write it like file:///srv/walship or s3://bucket/prefix.")
}

/// The URL for a message: without what may be a password, and without control characters.
fn shown(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    let rest = rest.rsplit_once('@').map_or(rest, |(_, host)| host);
    format!("{:?}", if scheme.is_empty() { rest.to_owned() } else { format!("{scheme}://{rest}") })
}

fn folder(path: &str, url: &str) -> Result<Location> {
    if !path.starts_with('/') {
        return Err(invalid(url, "the path of a folder is absolute (three slashes: file:///srv/walship)"));
    }
    if path.contains('\0') {
        return Err(invalid(url, "a path holds no zero byte"));
    }
    if path.split('/').any(|part| part == "..") {
        return Err(invalid(url, "the path holds \"..\""));
    }
    let path: PathBuf = path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    if path.as_os_str().is_empty() {
        return Err(invalid(url, "the root of the file system is no folder of its own"));
    }
    Ok(Location::Folder(PathBuf::from("/").join(path)))
}

fn bucket(rest: &str, url: &str) -> Result<Location> {
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let bucket_ok = (3..=63).contains(&bucket.len())
        && bucket.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b".-".contains(&b))
        && bucket.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    if !bucket_ok {
        return Err(invalid(url, "a bucket's name is 3 to 63 of a-z, 0-9, \".\" and \"-\""));
    }
    let prefix = prefix.trim_end_matches('/');
    let prefix_ok = prefix.len() <= 256
        && (prefix.is_empty()
            || prefix.split('/').all(|part| !part.is_empty() && part != "." && part != ".."))
        && prefix.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-/=".contains(&b));
    if !prefix_ok {
        return Err(invalid(
            url,
            "a prefix is up to 256 of A-Z, a-z, 0-9, \".\", \"_\", \"-\" and \"=\", in parts joined by single slashes",
        ));
    }
    Ok(Location::S3 { bucket: bucket.to_owned(), prefix: prefix.to_owned() })
}

fn percent_decoded(text: &str) -> Result<String> {
    let bad = || invalid(text, "a % stands before two hexadecimal digits");
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digits = [rest.next().ok_or_else(bad)?, rest.next().ok_or_else(bad)?];
        bytes.push(hex::decode(digits).map_err(|_| bad())?[0]);
    }
    String::from_utf8(bytes).map_err(|_| invalid(text, "it is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_read() {
        let s3 = |bucket: &str, prefix: &str| Location::S3 { bucket: bucket.into(), prefix: prefix.into() };
        for (url, expected) in [
            ("file:///srv/walship", Location::Folder("/srv/walship".into())),
            ("/srv//walship/", Location::Folder("/srv/walship".into())),
            ("file:///srv/a%20b", Location::Folder("/srv/a b".into())),
            ("s3://bucket", s3("bucket", "")),
            ("s3://bucket/", s3("bucket", "")),
            ("s3://my-bucket.x/a/b=c/", s3("my-bucket.x", "a/b=c")),
        ] {
            assert_eq!(StorageConfig::new(url).location().unwrap(), expected, "{url}");
        }
    }

    #[test]
    fn urls_that_make_no_sense_are_refused() {
        for url in [
            "",
            "walship",
            "file://srv/walship",
            "file:///",
            "/",
            "file:///a/../b",
            "file:///a%2",
            "file:///a%00",
            "http://bucket/x",
            "s3://",
            "s3://ab",
            "s3://Bucket/x",
            "s3://bucket/a//b",
            "s3://bucket/../x",
            "s3://key:secret@bucket/x",
            "s3://bucket/x?y=z",
        ] {
            let error = StorageConfig::new(url).location().unwrap_err();
            assert!(matches!(error, Error::Invalid(_)), "{url}: {error}");
            assert!(!error.to_string().contains("secret"), "{error}");
        }
    }

    #[test]
    fn removal_has_credentials_of_its_own() {
        let text = "url = 's3://bucket'\n[s3]\naccess_key_id = 'AK'\nsecret_access_key = 'hush'\n\
                    session_token = 'token'\nexpire_access_key_id = 'DK'\nexpire_secret_access_key = 'psst'\n";
        let config: StorageConfig = toml::from_str(text).unwrap();
        let removing = config.for_removal();
        assert_eq!(removing.s3.access_key_id.as_deref(), Some("DK"));
        assert_eq!(removing.s3.secret_access_key.as_ref().map(Secret::reveal), Some("psst"));
        assert_eq!(removing.s3.session_token, None, "what belongs to other credentials is left out");
        assert_eq!(config.s3.access_key_id.as_deref(), Some("AK"));
        let plain: StorageConfig =
            toml::from_str("url = 's3://bucket'\n[s3]\naccess_key_id = 'AK'\n").unwrap();
        assert_eq!(plain.for_removal(), plain);
        assert!(!format!("{removing:?}").contains("psst"));
    }

    #[test]
    fn settings_are_read_and_secrets_not_shown() {
        let text = "url = 's3://bucket'\n[s3]\nendpoint = 'https://h'\naddressing = 'path'\n\
                    access_key_id = 'AK'\nsecret_access_key = 'hush'\n[limits]\ndeadline_ms = 5\n";
        let config: StorageConfig = toml::from_str(text).unwrap();
        assert_eq!(config.s3.addressing, AddressingStyle::Path);
        assert_eq!(config.limits, Limits { deadline_ms: 5, ..Limits::default() });
        assert_eq!(config.s3.secret_access_key.as_ref().map(Secret::reveal), Some("hush"));
        assert!(!format!("{config:?}").contains("hush"));
        assert!(toml::from_str::<StorageConfig>("url = '/x'\nendpiont = 1").is_err());
    }
}
