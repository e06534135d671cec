//! Where streamed WAL goes: a repository in a folder or on SeaweedFS, behind a proxy that delays answers.

use std::time::Duration;

use tokio::runtime::Runtime;
use walship::repository::{ClusterRepository, LineageRepository};
use walship::storage::StorageConfig;
use walship_tests::postgres::{PgServer, primary_major};
use walship_tests::proxy::{Mode, Proxy};
use walship_tests::stage::Stage;
use walship_tests::weed::WeedServer;

/// A kind of store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Store {
    /// A folder on this machine's disk.
    Folder,
    /// SeaweedFS on this machine, each answer of which comes so many milliseconds later.
    S3(u64),
}

impl Store {
    /// Returns its name in tables.
    pub(super) fn title(self) -> String {
        match self {
            Self::Folder => "folder".to_owned(),
            Self::S3(0) => "S3".to_owned(),
            Self::S3(millis) => format!("S3, {millis} ms away"),
        }
    }
}

/// Starts a server that syncs its WAL, archives nothing by itself, and rarely writes a checkpoint.
pub(super) fn busy_server() -> PgServer {
    PgServer::builder(primary_major())
        .setting("fsync", "on")
        .setting("archive_mode", "off")
        .setting("max_wal_size", "8GB")
        .setting("checkpoint_timeout", "1h")
        .setting("max_slot_wal_keep_size", "8GB")
        .start()
}

/// An empty repository, and the store that it is in.
pub(super) struct Site {
    stage: Stage,
    runtime: Runtime,
    // The proxy goes before the server behind it.
    _proxy: Option<Proxy>,
    weed: Option<WeedServer>,
}

impl Site {
    /// Makes a store and a repository for `server` in it.
    pub(super) fn new(store: Store, server: &PgServer) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let (stage, proxy, weed) = match store {
            Store::Folder => (Stage::folder("main"), None, None),
            Store::S3(millis) => {
                let weed = WeedServer::start();
                let proxy = Proxy::start(weed.address());
                if millis > 0 {
                    proxy.set(Mode::Latency(Duration::from_millis(millis)));
                }
                (Stage::s3("main", &proxy.endpoint()), Some(proxy), Some(weed))
            }
        };
        stage.init(server);
        Self { stage, runtime: runtime.expect("a runtime can be made"), _proxy: proxy, weed }
    }

    /// Returns the configuration and the scratch folder.
    pub(super) fn stage(&self) -> &Stage {
        &self.stage
    }

    /// Returns the repository as the library reads it, without the proxy's delay.
    pub(super) fn lineage(&self) -> LineageRepository {
        let config = match &self.weed {
            Some(weed) => weed.config("walship"),
            None => StorageConfig::new(self.stage.url()),
        };
        let storage = walship::storage::open(&config).expect("the configuration is right");
        self.wait_for(async {
            let cluster = self.stage.cluster().parse().expect("the name is legal");
            let cluster = ClusterRepository::open(storage, &cluster).await.expect("the repository was made");
            cluster.newest_lineage().await.expect("the repository was made")
        })
    }

    /// Runs a future to its end.
    pub(super) fn wait_for<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }
}
