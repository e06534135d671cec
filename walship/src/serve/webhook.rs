//! One POST to a webhook. Its address may be a secret in whole: of it, messages hold the host alone.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue, USER_AGENT};
use hyper::{Request, Uri};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use crate::config::WebhookForm;
use crate::error::{Error, Result};
use crate::storage::Secret;

/// How long one POST may take, with everything.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where notices are sent.
#[derive(Debug)]
pub(super) struct Webhook {
    url: Secret,
    pub(super) form: WebhookForm,
    is_tls: bool,
    host: String,
    port: u16,
}

impl Webhook {
    /// Returns the webhook at an address.
    ///
    /// # Errors
    /// [`Error::Invalid`] for what is no `http://` or `https://` address. The message does not hold it.
    pub(super) fn new(url: &Secret, form: WebhookForm) -> Result<Self> {
        let bad = || {
            Error::invalid("notify.webhook is no address of the form https://host/path")
                .with_next("Correct `webhook` in [notify], or WALSHIP_NOTIFY_WEBHOOK.")
        };
        let uri: Uri = url.reveal().parse().map_err(|_| bad())?;
        let is_tls = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(bad()),
        };
        let host = uri.host().filter(|host| !host.is_empty()).ok_or_else(bad)?;
        let port = uri.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        Ok(Self { url: url.clone(), form, is_tls, host, port })
    }

    /// Sends JSON. Success is an answer from 200 to 299; redirects are not followed.
    ///
    /// # Errors
    /// [`Error::Unavailable`] for all else: it may be tried again.
    pub(super) async fn post(&self, json: String) -> Result<()> {
        match timeout(PATIENCE, self.post_patiently(json)).await {
            Ok(done) => done,
            Err(_) => Err(self.failed(format!("no answer within {} s", PATIENCE.as_secs()))),
        }
    }

    async fn post_patiently(&self, json: String) -> Result<()> {
        let socket =
            TcpStream::connect((&*self.host, self.port)).await.map_err(|error| self.failed(error))?;
        if !self.is_tls {
            return self.send(socket, json).await;
        }
        let mut roots = RootCertStore::empty();
        let (added, _) = roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if added == 0 {
            return Err(self.failed("this machine trusts no certificate authority (ca-certificates)"));
        }
        let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| self.failed(error))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = ServerName::try_from(self.host.clone()).map_err(|error| self.failed(error))?;
        let stream = TlsConnector::from(Arc::new(config)).connect(name, socket).await;
        self.send(stream.map_err(|error| self.failed(error))?, json).await
    }

    async fn send<S>(&self, stream: S, json: String) -> Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.failed(error))?;
        let connection = tokio::spawn(connection);
        let answer = sender.send_request(self.request(json)?).await;
        connection.abort();
        let status = answer.map_err(|error| self.failed(error))?.status();
        if status.is_success() { Ok(()) } else { Err(self.failed(format!("it answered {status}"))) }
    }

    fn request(&self, json: String) -> Result<Request<Full<Bytes>>> {
        let uri: Uri = self.url.reveal().parse().map_err(|_| self.failed("its address is none"))?;
        let path = uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
        let authority = uri.authority().map_or("", |authority| authority.as_str());
        let (user, host) = match authority.rsplit_once('@') {
            Some((user, host)) => (Some(user), host),
            None => (None, authority),
        };
        let wrong = |_| self.failed("its address cannot stand in a request");
        let mut request = Request::post(path)
            .header(HOST, host)
            .header(CONTENT_TYPE, "application/json")
            .header(USER_AGENT, concat!("walship/", env!("CARGO_PKG_VERSION")))
            .body(Full::new(Bytes::from(json)))
            .map_err(wrong)?;
        if let Some(user) = user {
            use base64::Engine as _;
            let basic = format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(user));
            let mut value = HeaderValue::from_str(&basic)
                .map_err(|_| self.failed("its address cannot stand in a request"))?;
            value.set_sensitive(true);
            request.headers_mut().insert(AUTHORIZATION, value);
        }
        Ok(request)
    }

    fn failed(&self, why: impl std::fmt::Display) -> Error {
        Error::unavailable(format!("the webhook at {} did not take a notice: {why}", self.host))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_checked_and_never_shown() {
        for bad in ["", "hush", "ftp://h/hush", "https:///hush", "/hush"] {
            let error = Webhook::new(&Secret::new(bad), WebhookForm::Json).unwrap_err().report();
            assert!(!error.contains("hush"), "{error}");
        }
        let url = Secret::new("https://user:hush@[::1]:8443/services/hush?token=hush");
        let webhook = Webhook::new(&url, WebhookForm::Text).unwrap();
        assert_eq!((&*webhook.host, webhook.port, webhook.is_tls), ("::1", 8443, true));
        assert!(!format!("{webhook:?} {}", webhook.failed("x").report()).contains("hush"));
        let request = webhook.request("{}".into()).unwrap();
        assert_eq!(request.uri(), "/services/hush?token=hush");
        assert_eq!(request.headers()[HOST], "[::1]:8443");
        assert!(request.headers()[AUTHORIZATION].is_sensitive());
    }
}
