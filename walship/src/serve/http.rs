//! A small HTTP server: `/metrics`, `/healthz`.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::{Shown, exposition};
use crate::error::{Error, Result};

/// So many are answered at once; others wait their turn.
const CONNECTIONS_MAX: usize = 32;

/// A connection that is not done by then is closed.
const CONNECTION_PATIENCE: Duration = Duration::from_secs(10);

/// After a failure to accept (too many open files), the next try waits so long.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

const INDEX: &str = "walship\n\n/metrics  for Prometheus\n/healthz  whether it still looks\n";

/// Returns a listener.
///
/// # Errors
/// [`Error::Invalid`] when another program listens there or the address is not this machine's; what the system says.
pub(super) async fn listen(address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|error| {
        let what = format!("{address} cannot be listened on");
        let kind = error.kind();
        let error = Error::from_io(what, error).with_safe("nothing was started");
        match kind {
            std::io::ErrorKind::AddrInUse => error.with_next(
                "Choose another port with --listen, or end the program that has this one (`ss -ltnp` shows it).",
            ),
            std::io::ErrorKind::AddrNotAvailable => {
                error.with_next("Choose an address of this machine with --listen; 0.0.0.0 is all of them.")
            }
            _ => error.with_next("Choose another address with --listen."),
        }
    })
}

/// Answers until it is dropped.
pub(super) async fn serve(listener: TcpListener, shown: Arc<Shown>) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let socket = match listener.accept().await {
            Ok((socket, _)) => socket,
            Err(error) => {
                tracing::warn!("a connection could not be accepted: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let shown = Arc::clone(&shown);
        tokio::spawn(async move {
            let answer = service_fn(move |request| {
                let answer = answer(&request, &shown);
                async move { Ok::<_, Infallible>(answer) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(CONNECTION_PATIENCE)
                .keep_alive(false)
                .serve_connection(TokioIo::new(socket), answer);
            // Who is too slow, or breaks off, hears nothing more.
            let _ = timeout(CONNECTION_PATIENCE, connection).await;
            drop(slot);
        });
    }
}

fn answer(request: &Request<Incoming>, shown: &Shown) -> Response<Full<Bytes>> {
    const PLAIN: &str = "text/plain; charset=utf-8";
    let (status, kind, body) = match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/metrics") => {
            (StatusCode::OK, exposition::CONTENT_TYPE, Bytes::copy_from_slice(shown.metrics().as_bytes()))
        }
        (&Method::GET | &Method::HEAD, "/healthz") if shown.is_fresh() => {
            (StatusCode::OK, PLAIN, Bytes::from_static(b"ok\n"))
        }
        (&Method::GET | &Method::HEAD, "/healthz") => {
            (StatusCode::SERVICE_UNAVAILABLE, PLAIN, Bytes::from_static(b"the last look is too long ago\n"))
        }
        (&Method::GET | &Method::HEAD, "/") => (StatusCode::OK, PLAIN, Bytes::from_static(INDEX.as_bytes())),
        (&Method::GET | &Method::HEAD, _) => {
            (StatusCode::NOT_FOUND, PLAIN, Bytes::from_static(INDEX.as_bytes()))
        }
        _ => (StatusCode::METHOD_NOT_ALLOWED, PLAIN, Bytes::from_static(b"GET and HEAD only\n")),
    };
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    headers.insert(CACHE_CONTROL, hyper::header::HeaderValue::from_static("no-store"));
    if status == StatusCode::METHOD_NOT_ALLOWED {
        headers.insert(ALLOW, hyper::header::HeaderValue::from_static("GET, HEAD"));
    }
    response
}
