//! A real S3 server: SeaweedFS, one process with everything in it (`weed mini`).

use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;
use walship::storage::{StorageConfig, list_all};

use crate::s3_inprocess::{ACCESS_KEY, BUCKET, SECRET_KEY, config_for, env_for};
use crate::{cache, process, wait};

/// How long a server may take to answer after its start.
const START: Duration = Duration::from_secs(60);

/// A running SeaweedFS with the bucket [`BUCKET`] and the test's credentials; dropping it kills it.
pub struct WeedServer {
    data: tempfile::TempDir,
    ports: Ports,
    tls: Option<Tls>,
    child: Option<Child>,
}

/// Each server of the process has a port, and one 10,000 higher for gRPC.
#[derive(Debug, Clone, Copy)]
struct Ports {
    master: u16,
    volume: u16,
    filer: u16,
    s3: u16,
    s3_tls: u16,
}

#[derive(Debug, Clone)]
struct Tls {
    certificate: PathBuf,
    key: PathBuf,
    authority: PathBuf,
}

impl WeedServer {
    /// Starts a server that speaks HTTP.
    ///
    /// # Panics
    /// When the program is not there (`scripts/install-test-deps --s3` fetches it) or does not start.
    pub fn start() -> Self {
        Self::start_with(None)
    }

    /// Starts a server that speaks HTTPS as well, with this certificate for 127.0.0.1, its key,
    /// and the authority that signed it.
    pub fn start_tls(certificate: &Path, key: &Path, authority: &Path) -> Self {
        let own = |path: &Path| path.to_owned();
        Self::start_with(Some(Tls {
            certificate: own(certificate),
            key: own(key),
            authority: own(authority),
        }))
    }

    fn start_with(tls: Option<Tls>) -> Self {
        let data = tempfile::tempdir().expect("a temporary folder");
        let ports = Ports {
            master: free_port(),
            volume: free_port(),
            filer: free_port(),
            s3: free_port(),
            s3_tls: free_port(),
        };
        let mut server = Self { data, ports, tls, child: None };
        server.restart();
        server
    }

    /// Starts the server again on its data, after [`WeedServer::kill9`].
    ///
    /// # Panics
    /// When it does not answer in time.
    pub fn restart(&mut self) {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log_path())
            .expect("the log of the S3 server can be written");
        let ports = &self.ports;
        let mut command = process::guarded(cache::program("seaweedfs/weed"));
        command.args(["mini", "-master.telemetry=false", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]);
        command.args(["-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]);
        command.args(["-s3.autoCreateBucket=false".to_owned(), format!("-bucket={BUCKET}")]);
        command.arg(format!("-dir={}", self.data.path().display()));
        command.arg(format!("-master.port={}", ports.master));
        command.arg(format!("-volume.port={}", ports.volume));
        command.arg(format!("-filer.port={}", ports.filer));
        command.arg(format!("-s3.port={}", ports.s3));
        if let Some(tls) = &self.tls {
            command.arg(format!("-s3.port.https={}", ports.s3_tls));
            command.arg(format!("-s3.cert.file={}", tls.certificate.display()));
            command.arg(format!("-s3.key.file={}", tls.key.display()));
        }
        command.env("AWS_ACCESS_KEY_ID", ACCESS_KEY).env("AWS_SECRET_ACCESS_KEY", SECRET_KEY);
        command.current_dir(self.data.path()).stdin(Stdio::null());
        command.stdout(log.try_clone().expect("a file can be shared")).stderr(log);
        self.child = Some(process::spawn(command).expect("SeaweedFS can be started"));
        self.wait_until_ready();
    }

    fn wait_until_ready(&mut self) {
        let mut config = self.config("");
        config.limits.deadline_ms = 1000;
        // A runtime of its own in a thread of its own: the caller may be asynchronous or not.
        let (log, deadline) = (self.log_path(), START);
        let ready = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            let storage = walship::storage::open(&config).expect("the configuration is right");
            wait::some_within("the S3 server answers", deadline, || {
                runtime.block_on(list_all(storage.as_ref(), "none/", 1)).ok()
            });
        });
        if ready.join().is_err() {
            panic!("SeaweedFS did not start:\n{}", std::fs::read_to_string(log).unwrap_or_default());
        }
    }

    /// Kills the server as a power cut would.
    pub fn kill9(&mut self) {
        if let Some(mut child) = self.child.take() {
            process::kill_tree(&mut child);
        }
    }

    /// Stops the process where it stands: connections stay open and nothing answers.
    pub fn freeze(&self) {
        self.signal(Signal::SIGSTOP);
    }

    /// Lets a frozen process go on.
    pub fn thaw(&self) {
        self.signal(Signal::SIGCONT);
    }

    fn signal(&self, signal: Signal) {
        if let Some(child) = &self.child {
            process::signal(child.id(), signal);
        }
    }

    /// Returns the endpoint's URL: `https://` when it was started with a certificate.
    pub fn endpoint(&self) -> String {
        match &self.tls {
            Some(_) => format!("https://127.0.0.1:{}", self.ports.s3_tls),
            None => format!("http://127.0.0.1:{}", self.ports.s3),
        }
    }

    /// Returns the address for requests without TLS.
    pub fn address(&self) -> std::net::SocketAddr {
        ([127, 0, 0, 1], self.ports.s3).into()
    }

    /// Returns the configuration of a storage under `prefix` (may be empty) with the right credentials.
    pub fn config(&self, prefix: &str) -> StorageConfig {
        let mut config = config_for(&self.endpoint(), prefix);
        config.s3.ca_file = self.tls.as_ref().map(|tls| tls.authority.clone());
        config
    }

    /// Returns the environment with which programs reach the server (not over TLS).
    pub fn env(&self) -> Vec<(&'static str, String)> {
        env_for(&format!("http://127.0.0.1:{}", self.ports.s3))
    }

    fn log_path(&self) -> PathBuf {
        self.data.path().join("weed.log")
    }
}

impl Drop for WeedServer {
    fn drop(&mut self) {
        self.kill9();
    }
}

/// Returns a port that is free now, and free 10,000 higher as well.
fn free_port() -> u16 {
    for _ in 0..1000 {
        let port = rand::random_range(20_000..30_000);
        let free = |port| TcpListener::bind(("127.0.0.1", port)).is_ok();
        if free(port) && free(port + 10_000) {
            return port;
        }
    }
    panic!("no free pair of ports was found");
}
