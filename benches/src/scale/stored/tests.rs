//! Two thousand objects on a real S3 server: listings have several pages.

use serde_json::Value;
use walship::storage::StorageConfig;
use walship::storage::fs::FsStorage;

use super::*;

/// What a question may cost of some two thousand objects.
const REQUESTS_MAX: u64 = 90;

/// Lets `pitr` answer from another place.
fn ask(stage: &Stage, shape: Shape, question: &str) -> Value {
    let output = stage.run(&mut shell(stage, shape, question));
    serde_json::from_slice(&output.stdout)
        .map(comparable)
        .unwrap_or_else(|error| panic!("{question}: {error}: {}", String::from_utf8_lossy(&output.stderr)))
}

#[test]
fn answers_over_s3_are_those_over_a_folder_and_of_the_generated_world() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let shape = Shape::STORED_SMALL;
    let folder = Stage::folder("main");
    let beside: Arc<dyn Storage> = Arc::new(FsStorage::create_root(&folder.repository_dir()).unwrap());
    let stored = runtime.block_on(Stored::new(shape, &[beside]));
    assert!(stored.objects > 2000, "{} objects fill no three pages", stored.objects);

    for (question, _) in QUESTIONS {
        let (answer, requests) = stored.ask(question);
        assert_eq!(answer, ask(&folder, shape, question), "{question}");
        assert_eq!(answer, runtime.block_on(stored.expected(question)), "{question}");
        assert!(requests.all() <= REQUESTS_MAX, "{question}: {requests:?}");
        assert!(requests.lists > 0 && requests.gets > 0 && requests.others == 0, "{question}: {requests:?}");
    }

    // Without the index every segment is listed, page after page, and the answers are the same.
    let config: StorageConfig = stored.server.config("walship");
    let opened = storage::open(&config).unwrap();
    runtime.block_on(async {
        for meta in storage::list_all(&*opened, "main/0001/index/", 10_000).await.unwrap() {
            opened.delete(&meta.key).await.unwrap();
        }
    });
    std::fs::remove_dir_all(folder.repository_dir().join("main/0001/index")).unwrap();
    for question in ["info", "before", "unknown-name", "latest"] {
        let (answer, requests) = stored.ask(question);
        assert_eq!(answer, ask(&folder, shape, question), "{question} without an index");
        // What was not looked at is said by `pitr info` alone, and is more without an index.
        if question != "info" {
            assert_eq!(answer, runtime.block_on(stored.expected(question)), "{question} without an index");
        }
        let pages = shape.segments / 1000;
        assert!(requests.lists >= 3 + pages, "{question} without an index: {requests:?}");
    }
}
