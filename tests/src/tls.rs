//! TLS in front of a server that speaks none.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// Listens on a free port with this certificate and passes on what comes to `target`; returns the address. Its thread ends
/// with the process.
///
/// # Panics
/// When the files are no certificate and its key, or no port of the loopback can be had.
pub fn in_front_of(target: SocketAddr, certificate: &Path, key: &Path) -> SocketAddr {
    let chain = CertificateDer::pem_file_iter(certificate).expect("the certificate can be read");
    let chain = chain.map(|one| one.expect("it is a certificate")).collect();
    let key = PrivateKeyDer::from_pem_file(key).expect("the key can be read");
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("there are protocol versions")
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .expect("the key is the certificate's");
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.set_nonblocking(true).expect("a listener can be made non-blocking");
    let address = listener.local_addr().expect("a listener has an address");
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime can be made").block_on(async move {
            let listener = TcpListener::from_std(listener).expect("the listener is one of tokio's");
            while let Ok((socket, _)) = listener.accept().await {
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    // A client that does not trust the certificate hangs up.
                    if let (Ok(mut ours), Ok(mut theirs)) =
                        (acceptor.accept(socket).await, TcpStream::connect(target).await)
                    {
                        let _ = copy_bidirectional(&mut ours, &mut theirs).await;
                    }
                });
            }
        });
    });
    address
}
