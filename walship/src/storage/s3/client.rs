//! How the SDK's client is made: endpoint, region, credentials, TLS, and nothing tried twice.

use std::time::Duration;

use aws_config::environment::EnvironmentVariableRegionProvider;
use aws_config::meta::region::RegionProviderChain;
use aws_config::profile::ProfileFileRegionProvider;
use aws_config::retry::RetryConfig;
use aws_config::timeout::TimeoutConfig;
use aws_config::{BehaviorVersion, Region};
use aws_credential_types::Credentials;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::{
    RequestChecksumCalculation, ResponseChecksumValidation, SharedHttpClient, StalledStreamProtectionConfig,
};
use aws_smithy_http_client::tls::{Provider, TlsContext, TrustStore, rustls_provider::CryptoMode};

use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use crate::error::{Error, Result};
use crate::storage::{AddressingStyle, Limits, S3Settings};

/// Refuses settings that make no sense, without touching the network.
pub(super) fn check(settings: &S3Settings) -> Result<()> {
    if settings.access_key_id.is_some() != settings.secret_access_key.is_some() {
        return Err(Error::invalid("access_key_id and secret_access_key are set together or not at all"));
    }
    if settings.session_token.is_some() && settings.access_key_id.is_none() {
        return Err(Error::invalid("session_token is set without access_key_id"));
    }
    if let Some(endpoint) = &settings.endpoint {
        let host = endpoint.strip_prefix("https://").or_else(|| endpoint.strip_prefix("http://"));
        let host_ok = host.is_some_and(|host| {
            let host = host.trim_end_matches('/');
            !host.is_empty() && !host.contains(['@', '?', '#', ' '])
        });
        if !host_ok {
            return Err(Error::invalid("the S3 endpoint is not like https://host or http://host:port")
                .with_next("Give the store's URL without bucket, user or query."));
        }
    }
    authorities(settings).map(drop)
}

/// The SDK's client, and what it does not tell.
#[derive(Debug)]
pub(super) struct Connected {
    pub(super) client: Client,
    /// Whether requests go over TLS.
    pub(super) over_tls: bool,
}

/// Returns the client. Credentials are looked for when the first request is signed.
pub(super) async fn build(settings: &S3Settings, limits: Limits) -> Result<Connected> {
    let http = http_client(settings)?;
    let mut loader = aws_config::defaults(BehaviorVersion::v2026_01_12())
        .http_client(http)
        .retry_config(RetryConfig::disabled())
        .timeout_config(
            TimeoutConfig::builder().connect_timeout(Duration::from_millis(limits.connect_ms)).build(),
        )
        // Each request has a deadline of its own.
        .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
        // Sums are made and checked in this module.
        .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
        .response_checksum_validation(ResponseChecksumValidation::WhenRequired);
    if let Some(profile) = &settings.profile {
        loader = loader.profile_name(profile);
    }
    if let (Some(id), Some(secret)) = (&settings.access_key_id, &settings.secret_access_key) {
        let token = settings.session_token.as_ref().map(|token| token.reveal().to_owned());
        loader = loader.credentials_provider(Credentials::new(
            id,
            secret.reveal(),
            token,
            None,
            "walship configuration",
        ));
    }
    if let Some(endpoint) = &settings.endpoint {
        loader = loader.endpoint_url(endpoint.trim_end_matches('/'));
    }
    match (&settings.region, &settings.endpoint) {
        (Some(region), _) => loader = loader.region(Region::new(region.clone())),
        // A store of one's own: never ask an instance's metadata service for a region.
        (None, Some(_)) => {
            let mut profile = ProfileFileRegionProvider::builder();
            if let Some(name) = &settings.profile {
                profile = profile.profile_name(name);
            }
            loader = loader.region(
                RegionProviderChain::first_try(EnvironmentVariableRegionProvider::new())
                    .or_else(profile.build())
                    .or_else(Region::from_static("us-east-1")),
            );
        }
        (None, None) => {}
    }
    let shared = loader.load().await;
    if shared.region().is_none() {
        return Err(Error::invalid("no region is known for the S3 store")
            .with_next("Set the region in the configuration or AWS_REGION."));
    }
    let path_style = match settings.addressing {
        AddressingStyle::Path => true,
        AddressingStyle::Virtual => false,
        AddressingStyle::Auto => shared.endpoint_url().is_some(),
    };
    let config = aws_sdk_s3::config::Builder::from(&shared)
        .force_path_style(path_style)
        // A wrong clock is reported: it also dates what this machine writes.
        .disable_clock_skew_correction(true)
        .build();
    let over_tls = !shared.endpoint_url().is_some_and(|url| url.starts_with("http://"));
    Ok(Connected { client: Client::from_conf(config), over_tls })
}

fn http_client(settings: &S3Settings) -> Result<SharedHttpClient> {
    let mut trust = TrustStore::default();
    if let Some(pem) = authorities(settings)? {
        trust = trust.with_pem_certificate(pem);
    }
    let context = TlsContext::builder()
        .with_trust_store(trust)
        .build()
        .map_err(|error| Error::invalid(format!("TLS cannot be set up: {error}")))?;
    Ok(aws_smithy_http_client::Builder::new()
        .tls_provider(Provider::Rustls(CryptoMode::Ring))
        .tls_context(context)
        .build_https())
}

/// The file of certificate authorities. The SDK panics on one that it cannot use, so that is found here.
fn authorities(settings: &S3Settings) -> Result<Option<Vec<u8>>> {
    let Some(path) = &settings.ca_file else { return Ok(None) };
    let pem = std::fs::read(path).map_err(|error| {
        Error::from_io(format_args!("cannot read the certificate authorities in {}", path.display()), error)
    })?;
    let unusable = |why: &dyn std::fmt::Display| {
        Error::invalid(format!("{} is no file of PEM certificates: {why}", path.display()))
    };
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        roots.add(certificate.map_err(|error| unusable(&error))?).map_err(|error| unusable(&error))?;
    }
    if roots.is_empty() { Err(unusable(&"it holds none")) } else { Ok(Some(pem)) }
}
