//! TLS as libpq means it: what is verified under which `sslmode`, client certificates, and the
//! channel binding value for SCRAM.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error as TlsError, RootCertStore, SignatureScheme,
};
use sha2::{Digest as _, Sha256, Sha384, Sha512};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use x509_cert::der::{Decode as _, Encode as _};
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::GeneralName;

use super::options::{ConnectOptions, Host, RootCerts, SslMode};
use crate::error::{Error, Result};

/// The longest certificate or key file that is read.
const MAX_FILE_BYTES: u64 = 8 << 20;

/// Carries out the TLS handshake on a connection whose server agreed to it.
///
/// # Errors
/// [`Error::Denied`] when the certificate is not trusted or not for this host, [`Error::Invalid`]
/// for local files that make no sense, [`Error::Unavailable`] when the handshake breaks off.
pub(crate) async fn handshake(
    options: &ConnectOptions,
    host: &Host,
    socket: TcpStream,
) -> Result<TlsStream<TcpStream>> {
    let config = client_config(options)?;
    let name = server_name(options, host)?;
    TlsConnector::from(Arc::new(config)).connect(name, socket).await.map_err(|error| {
        let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<TlsError>()).cloned();
        let text = format!("TLS with {host}: {}", tls.as_ref().map_or_else(|| error.to_string(), explain));
        match tls {
            Some(TlsError::InvalidCertificate(_)) => Error::denied(text)
                .with_safe("no password was sent")
                .with_next("Check sslrootcert and that the certificate is for the host name that is given."),
            Some(TlsError::AlertReceived(_)) => Error::denied(text).with_next(
                "The server refused: check the client certificate (sslcert, sslkey) and the server's log.",
            ),
            _ => Error::unavailable(text),
        }
        .with_source(error)
    })
}

fn explain(error: &TlsError) -> String {
    match error {
        TlsError::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "no trusted root certificate signed the server's certificate".into()
        }
        TlsError::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => "the server's certificate is for another host name".into(),
        TlsError::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
            "the server's certificate has expired".into()
        }
        TlsError::InvalidCertificate(CertificateError::Other(other))
            if other.to_string().contains("UnsupportedCertVersion") =>
        {
            "the server's certificate is of X.509 version 1; version 3 is needed".into()
        }
        other => other.to_string(),
    }
}

/// Returns the name to verify and to send; any name where neither is asked for.
fn server_name(options: &ConnectOptions, host: &Host) -> Result<ServerName<'static>> {
    let text = match (&host.name, host.address) {
        (name, _) if !name.is_empty() => name.clone(),
        (_, Some(address)) if options.sslmode != SslMode::VerifyFull => address.to_string(),
        _ => return Err(Error::invalid("sslmode=verify-full needs a host name, and only hostaddr is given")),
    };
    ServerName::try_from(text.clone())
        .map_err(|_| Error::invalid(format!("{text:?} cannot be the name in a certificate")))
}

fn client_config(options: &ConnectOptions) -> Result<ClientConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let versions: &[&rustls::SupportedProtocolVersion] = if options.tls13_only {
        &[&rustls::version::TLS13]
    } else {
        &[&rustls::version::TLS13, &rustls::version::TLS12]
    };
    let verify = match options.sslmode {
        SslMode::VerifyFull => Verify::ChainAndName(load_roots(options)?),
        SslMode::VerifyCa => Verify::Chain(load_roots(options)?),
        _ => Verify::Nothing,
    };
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(versions)
        .map_err(|error| Error::invalid(format!("TLS cannot be set up: {error}")))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Verifier { verify, provider }));
    let mut config = match client_identity(options)? {
        Some((certs, key)) => builder
            .with_client_auth_cert(certs, key)
            .map_err(|error| Error::invalid(format!("the client certificate cannot be used: {error}")))?,
        None => builder.with_no_client_auth(),
    };
    config.enable_sni = options.sslsni;
    Ok(config)
}

struct Roots {
    store: RootCertStore,
    certs: Vec<CertificateDer<'static>>,
}

fn load_roots(options: &ConnectOptions) -> Result<Roots> {
    let certs = match &options.root_certs {
        Some(RootCerts::File(path)) => certificates(path)?,
        Some(RootCerts::System) => rustls_native_certs::load_native_certs().certs,
        None => Vec::new(),
    };
    let mut store = RootCertStore::empty();
    let (added, _) = store.add_parsable_certificates(certs.iter().cloned());
    if added == 0 {
        return Err(Error::invalid("no usable root certificate was found").with_next(
            "Check sslrootcert: a PEM file of certificates, or \"system\" with ca-certificates installed.",
        ));
    }
    Ok(Roots { store, certs })
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let pem = read_pem(path)?;
    CertificateDer::pem_slice_iter(&pem)
        .collect::<std::result::Result<Vec<_>, _>>()
        .map_err(|error| Error::invalid(format!("{} holds no PEM certificates: {error}", path.display())))
}

fn read_pem(path: &Path) -> Result<Vec<u8>> {
    let named = |error| Error::from_io(path.display(), error);
    let metadata = std::fs::metadata(path).map_err(named)?;
    if !metadata.is_file() || metadata.len() > MAX_FILE_BYTES {
        return Err(Error::invalid(format!("{} is no certificate or key file", path.display())));
    }
    std::fs::read(path).map_err(named)
}

type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn client_identity(options: &ConnectOptions) -> Result<Option<Identity>> {
    let Some(cert) = &options.client_cert else { return Ok(None) };
    let certs = certificates(cert)?;
    let key = options.client_key.as_ref().ok_or_else(|| {
        Error::invalid(format!("the client certificate {} has no key file", cert.display()))
            .with_next("Give the key's file with sslkey.")
    })?;
    let metadata = std::fs::metadata(key).map_err(|error| Error::from_io(key.display(), error))?;
    let allowed = if metadata.uid() == 0 { 0o640 } else { 0o600 };
    if metadata.mode() & 0o777 & !allowed != 0 {
        return Err(Error::denied(format!(
            "the key file {} can be read by others (mode {:04o})",
            key.display(),
            metadata.mode() & 0o777
        ))
        .with_next("Set its mode to 0600 (0640 when root owns it)."));
    }
    let key_der = PrivateKeyDer::from_pem_slice(&read_pem(key)?).map_err(|error| {
        Error::invalid(format!("{} holds no key that can be used: {error}", key.display()))
            .with_next("Use an unencrypted PEM key; a passphrase is not supported.")
    })?;
    Ok(Some((certs, key_der)))
}

enum Verify {
    /// The connection is encrypted; who is at its other end is not known.
    Nothing,
    Chain(Roots),
    ChainAndName(Roots),
}

struct Verifier {
    verify: Verify,
    provider: Arc<CryptoProvider>,
}

impl std::fmt::Debug for Verifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Verifier")
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, TlsError> {
        let (roots, name_matters) = match &self.verify {
            Verify::Nothing => return Ok(ServerCertVerified::assertion()),
            Verify::Chain(roots) => (roots, false),
            Verify::ChainAndName(roots) => (roots, true),
        };
        // A self-signed server certificate that is itself the trusted file: PostgreSQL's
        // documentation starts with one. webpki takes no authority as a server's own certificate.
        if roots.certs.iter().any(|root| root == end_entity) {
            check_dates(end_entity, now)?;
        } else {
            let parsed = ParsedCertificate::try_from(end_entity)?;
            verify_server_cert_signed_by_trust_anchor(
                &parsed,
                &roots.store,
                intermediates,
                now,
                self.provider.signature_verification_algorithms.all,
            )?;
        }
        if name_matters {
            check_name(end_entity, server_name)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, TlsError> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, TlsError> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

fn parse(cert: &CertificateDer<'_>) -> std::result::Result<x509_cert::Certificate, TlsError> {
    x509_cert::Certificate::from_der(cert)
        .map_err(|_| TlsError::InvalidCertificate(CertificateError::BadEncoding))
}

fn check_dates(cert: &CertificateDer<'_>, now: UnixTime) -> std::result::Result<(), TlsError> {
    let validity = parse(cert)?.tbs_certificate.validity;
    if now.as_secs() < validity.not_before.to_unix_duration().as_secs() {
        return Err(TlsError::InvalidCertificate(CertificateError::NotValidYet));
    }
    if now.as_secs() > validity.not_after.to_unix_duration().as_secs() {
        return Err(TlsError::InvalidCertificate(CertificateError::Expired));
    }
    Ok(())
}

/// Checks the host's name against the certificate's alternative names, and against its common name
/// only when it has no alternative name of that kind (RFC 6125, as libpq does).
fn check_name(cert: &CertificateDer<'_>, server_name: &ServerName<'_>) -> std::result::Result<(), TlsError> {
    let strict =
        ParsedCertificate::try_from(cert).and_then(|parsed| verify_server_name(&parsed, server_name));
    let Err(error) = strict else { return Ok(()) };
    let parsed = parse(cert)?;
    let alternatives: Option<SubjectAltName> =
        parsed.tbs_certificate.get().map_err(|_| error.clone())?.map(|(_, names)| names);
    let has_alternative = alternatives
        .iter()
        .flat_map(|names| &names.0)
        .any(|name| matches!(name, GeneralName::DnsName(_) | GeneralName::IpAddress(_)));
    let common_name = common_name(&parsed);
    match common_name {
        Some(common_name) if !has_alternative && name_matches(&common_name, &server_name.to_str()) => Ok(()),
        _ => Err(error),
    }
}

fn common_name(cert: &x509_cert::Certificate) -> Option<String> {
    const COMMON_NAME: &str = "2.5.4.3";
    let subject = &cert.tbs_certificate.subject;
    let attribute = subject
        .0
        .iter()
        .flat_map(|set| set.0.iter())
        .rfind(|attribute| attribute.oid.to_string() == COMMON_NAME)?;
    std::str::from_utf8(attribute.value.value()).ok().map(str::to_owned)
}

/// Compares as libpq does: without case; one leading `*.` stands for one label.
fn name_matches(pattern: &str, host: &str) -> bool {
    let (pattern, host) = (pattern.to_ascii_lowercase(), host.to_ascii_lowercase());
    if pattern == host {
        return true;
    }
    let Some(suffix) = pattern.strip_prefix('*').filter(|suffix| suffix.starts_with('.') && suffix.len() > 1)
    else {
        return false;
    };
    host.strip_suffix(suffix).is_some_and(|label| !label.is_empty() && !label.contains('.'))
}

/// Returns the `tls-server-end-point` channel binding value: the certificate's digest under its own
/// signature's hash, SHA-256 in place of MD5 and SHA-1; `None` for signatures without one hash.
///
/// Source: RFC 5929 section 4.1.
pub(crate) fn server_end_point(cert: &[u8]) -> Option<Vec<u8>> {
    let parsed = x509_cert::Certificate::from_der(cert).ok()?;
    let algorithm = &parsed.signature_algorithm;
    match algorithm.oid.to_string().as_str() {
        // md5, sha1 and sha256 with RSA; ECDSA with SHA-1 and SHA-256; DSA with SHA-1 and SHA-256.
        "1.2.840.113549.1.1.4"
        | "1.2.840.113549.1.1.5"
        | "1.2.840.113549.1.1.11"
        | "1.2.840.10045.4.1"
        | "1.2.840.10045.4.3.2"
        | "1.2.840.10040.4.3"
        | "2.16.840.1.101.3.4.3.2" => Some(Sha256::digest(cert).to_vec()),
        "1.2.840.113549.1.1.12" | "1.2.840.10045.4.3.3" => Some(Sha384::digest(cert).to_vec()),
        "1.2.840.113549.1.1.13" | "1.2.840.10045.4.3.4" => Some(Sha512::digest(cert).to_vec()),
        // RSASSA-PSS names its hash in the parameters; the three that are used stand there as an OID.
        "1.2.840.113549.1.1.10" => {
            let parameters = algorithm.parameters.as_ref()?.to_der().ok()?;
            let has = |oid: &[u8]| parameters.windows(oid.len()).any(|window| window == oid);
            if has(&[0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x02]) {
                Some(Sha384::digest(cert).to_vec())
            } else if has(&[0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x03]) {
                Some(Sha512::digest(cert).to_vec())
            } else {
                Some(Sha256::digest(cert).to_vec())
            }
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn common_names_match_as_in_libpq() {
        for (pattern, host, expected) in [
            ("db.example.com", "DB.example.com", true),
            ("*.example.com", "db.example.com", true),
            ("*.example.com", "a.db.example.com", false),
            ("*.example.com", ".example.com", false),
            ("*.example.com", "example.com", false),
            ("*", "db", false),
            ("*.", "db.", false),
            ("d*.example.com", "db.example.com", false),
        ] {
            assert_eq!(name_matches(pattern, host), expected, "{pattern} {host}");
        }
    }
}
