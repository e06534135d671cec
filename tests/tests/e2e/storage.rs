//! The storages against what they stand on: folders, an S3 server in the process, SeaweedFS.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use walship::error::Error;
use walship::repository::probe::{Promise, probe};
use walship::storage::fs::FsStorage;
use walship::storage::memory::MemoryStorage;
use walship::storage::{self, ObjectKey, PutBody, PutOutcome, Storage, StorageConfig, conformance};
use walship_tests::proxy::{Mode, Proxy};
use walship_tests::s3_inprocess::{BUCKET, ConditionalWrites, Fault, S3Server, Seen};
use walship_tests::weed::WeedServer;

fn key(text: &str) -> ObjectKey {
    ObjectKey::new(text).unwrap()
}

/// Opens with short deadlines, so that what is tried again in vain ends soon.
fn open(mut config: StorageConfig) -> Arc<dyn Storage> {
    config.limits.connect_ms = 500;
    config.limits.request_ms = 500;
    config.limits.deadline_ms = 700;
    storage::open(&config).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_conforms() {
    conformance::run(&MemoryStorage::new()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_folder_conforms() {
    let folder = tempfile::tempdir().unwrap();
    let storage = FsStorage::create_root(&folder.path().join("repository")).unwrap();
    conformance::run(&storage).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s3_conforms() {
    let server = S3Server::start();
    let storage = storage::open(&server.config("some/prefix")).unwrap();
    conformance::run(storage.as_ref()).await;
    conformance::byte_order_across_folders(storage.as_ref()).await;
    conformance::one_upload_wins(storage.as_ref()).await;
    assert_eq!(server.open_uploads(), 0, "no upload is left open");
    assert!(server.objects().keys().any(|key| key.starts_with("some/prefix/conformance/")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn seaweedfs_conforms() {
    let server = WeedServer::start();
    conformance::run(storage::open(&server.config("pre/fix")).unwrap().as_ref()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_probe_passes_sound_stores_and_finds_others() {
    let folder = tempfile::tempdir().unwrap();
    let on_disk = FsStorage::create_root(&folder.path().join("repository")).unwrap();
    let report = probe(&on_disk).await.unwrap();
    assert!(report.is_safe(), "{report:?}");

    let server = S3Server::start();
    let storage = storage::open(&server.config("p")).unwrap();
    let broken = async || -> Vec<Promise> {
        let report = probe(storage.as_ref()).await.unwrap();
        assert_eq!(report.findings.len(), 5);
        assert_eq!(report.verdict().is_ok(), report.is_safe());
        report.findings.iter().filter(|f| f.broken.is_some()).map(|f| f.promise).collect()
    };
    assert_eq!(broken().await, []);
    assert!(server.objects().is_empty() && server.open_uploads() == 0, "probe objects are tidied away");
    server.set_conditional_writes(ConditionalWrites::Ignored);
    let all = [Promise::OneWriterWins, Promise::UploadsAreConditional, Promise::OneUploadWins];
    assert_eq!(broken().await, all);
    server.set_conditional_writes(ConditionalWrites::Raced);
    assert_eq!(broken().await, [Promise::OneWriterWins, Promise::OneUploadWins]);
    server.heal();
    server.set_checksums(false);
    assert_eq!(broken().await, [Promise::WrongChecksumIsRefused]);
    server.heal();
    // Credentials without the right to delete.
    server.set_faults(|seen| (seen.method == "DELETE").then_some(Fault::S3(403, "AccessDenied")));
    assert_eq!(broken().await, []);
    // A bucket where strangers get 403 instead of "no such key": no statement about any key.
    server.set_faults(|seen| (seen.method == "GET").then_some(Fault::S3(403, "AccessDenied")));
    assert!(matches!(probe(storage.as_ref()).await, Err(Error::Denied(_))));
}

/// What a fault must lead to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expected {
    Absent,
    Unavailable,
    Denied,
    Missing,
    Invalid,
}

fn kind<T>(result: &Result<Option<T>, Error>) -> Option<Expected> {
    Some(match result {
        Ok(None) => Expected::Absent,
        Err(Error::Unavailable(_)) => Expected::Unavailable,
        Err(Error::Denied(_)) => Expected::Denied,
        Err(Error::Missing(_)) => Expected::Missing,
        Err(Error::Invalid(_)) => Expected::Invalid,
        _ => return None,
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn absent_is_said_only_for_exactly_that_answer() {
    let server = S3Server::start();
    let storage = open(server.config("x"));
    let key = key("a/b");
    for (fault, expected) in [
        (None, Expected::Absent),
        (Some(Fault::S3(404, "NoSuchKey")), Expected::Absent),
        (Some(Fault::S3(404, "NoSuchBucket")), Expected::Missing),
        (Some(Fault::S3(404, "NotFound")), Expected::Unavailable),
        (Some(Fault::S3(404, "NoSuchVersion")), Expected::Invalid),
        (Some(Fault::Proxy(404)), Expected::Unavailable),
        (Some(Fault::Bare(404)), Expected::Unavailable),
        (Some(Fault::DeleteMarker), Expected::Missing),
        (Some(Fault::S3(403, "AccessDenied")), Expected::Denied),
        (Some(Fault::Proxy(403)), Expected::Denied),
        (Some(Fault::S3(403, "InvalidAccessKeyId")), Expected::Denied),
        (Some(Fault::S3(403, "RequestTimeTooSkewed")), Expected::Denied),
        (Some(Fault::S3(301, "PermanentRedirect")), Expected::Invalid),
        (Some(Fault::S3(429, "TooManyRequests")), Expected::Unavailable),
        (Some(Fault::Bare(429)), Expected::Unavailable),
        (Some(Fault::S3(500, "InternalError")), Expected::Unavailable),
        (Some(Fault::Proxy(502)), Expected::Unavailable),
        (Some(Fault::Bare(503)), Expected::Unavailable),
        (Some(Fault::S3(503, "SlowDown")), Expected::Unavailable),
        (Some(Fault::S3(400, "RequestTimeout")), Expected::Unavailable),
        (Some(Fault::AnswerLost), Expected::Unavailable),
        (Some(Fault::Late(Duration::from_secs(30))), Expected::Unavailable),
    ] {
        let again = fault.clone();
        server.set_faults(move |_| again.clone());
        let got = storage.get(&key, 100).await;
        assert_eq!(kind(&got), Some(expected), "get under {fault:?}: {got:?}");
        let got = storage.get_range(&key, 0, 100).await;
        assert_eq!(kind(&got), Some(expected), "get_range under {fault:?}: {got:?}");
        let got = storage.confirm(&key).await;
        // An answer to HEAD has no body: the refusals are less well told apart, absence never is.
        let vague = [Expected::Unavailable, Expected::Denied, Expected::Missing, Expected::Invalid];
        let found = kind(&got).unwrap();
        assert!(
            found == expected || (expected != Expected::Absent && vague.contains(&found)),
            "{fault:?}: {got:?}"
        );
        if let Err(error) = &got {
            assert!(!error.report().contains(walship_tests::s3_inprocess::SECRET_KEY), "{}", error.report());
        }
    }
    server.heal();
    server.drop_bucket();
    for result in [
        storage.get(&key, 100).await.map(drop),
        storage.confirm(&key).await.map(drop),
        storage.list("", None).await.map(drop),
        storage.put_if_absent(&key, Bytes::new().into()).await.map(drop),
    ] {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::Missing(_)) && error.to_string().contains("bucket"), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transient_answers_are_tried_again() {
    let server = S3Server::start();
    let storage = storage::open(&server.config("")).unwrap();
    for (name, fault) in [
        ("slowdown", Fault::S3(503, "SlowDown")),
        ("internal", Fault::S3(500, "InternalError")),
        ("throttled", Fault::Bare(429)),
        ("gateway", Fault::Proxy(504)),
        ("friendly", Fault::Proxy(200)),
        ("empty", Fault::Bare(200)),
        ("conflict", Fault::S3(409, "ConditionalRequestConflict")),
        ("corrupted", Fault::S3(400, "BadDigest")),
    ] {
        let mut left = 2;
        let fault = fault.clone();
        server.set_faults(move |_| {
            left -= 1;
            (left >= 0).then(|| fault.clone())
        });
        let outcome = storage.put_if_absent(&key(name), Bytes::from_static(b"body").into()).await;
        assert_eq!(outcome.unwrap(), PutOutcome::Stored, "{name}");
    }
    // A page with status 200 that comes every time is never taken for a stored object.
    server.set_faults(|_| Some(Fault::Proxy(200)));
    let never = open(server.config("")).put_if_absent(&key("never"), Bytes::from_static(b"x").into()).await;
    assert!(matches!(never, Err(Error::Unavailable(_))), "{never:?}");
    server.heal();
    // An answer that is lost leaves the object there: the caller has to compare.
    let mut lose = true;
    server.set_faults(move |_| std::mem::take(&mut lose).then_some(Fault::AnswerLost));
    let outcome = storage.put_if_absent(&key("lost"), Bytes::from_static(b"body").into()).await;
    assert_eq!(outcome.unwrap(), PutOutcome::Exists);
    // A body that breaks off is read again; one that never comes whole is no object.
    let mut first = true;
    server.set_faults(move |_| std::mem::take(&mut first).then_some(Fault::Truncated(2)));
    assert_eq!(storage.get(&key("lost"), 100).await.unwrap().unwrap(), "body");
    server.set_faults(|seen| (seen.method == "GET").then_some(Fault::Truncated(2)));
    let cut = open(server.config("")).get(&key("lost"), 100).await;
    assert_eq!(kind(&cut), Some(Expected::Unavailable), "{cut:?}");
    // A flipped bit is seen by the checksum that the object was stored with.
    server.set_faults(|_| Some(Fault::Flipped(1)));
    assert!(matches!(storage.get(&key("lost"), 100).await, Err(Error::Corrupt(_))));
    server.heal();

    // A refusal is not tried again.
    server.set_faults(|_| Some(Fault::S3(403, "AccessDenied")));
    server.take_log();
    storage.get(&key("lost"), 100).await.unwrap_err();
    assert_eq!(server.take_log().len(), 1);
}

/// How many requests of a method there were.
fn count(log: &[Seen], method: &str) -> usize {
    log.iter().filter(|seen| seen.method == method).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_body_is_one_conditional_put() {
    let server = S3Server::start();
    let storage = storage::open(&server.config("")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("spooled");
    let content: Vec<u8> = (0..70_u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    std::fs::write(&file, &content).unwrap();
    let spooled =
        |file_bytes| PutBody::Spooled { head: Bytes::from_static(b"head"), file: file.clone(), file_bytes };
    let whole = [b"head".as_slice(), &content].concat();
    // Refused once, then stored with the answer lost: what is there is for the caller to compare.
    let mut puts = 0;
    server.set_faults(move |seen| {
        puts += i32::from(seen.method == "PUT");
        match (seen.method.as_str(), puts) {
            ("PUT", 1) => Some(Fault::S3(503, "SlowDown")),
            _ => None,
        }
    });
    let body = || spooled(content.len() as u64);
    assert_eq!(storage.put_if_absent(&key("a"), body()).await.unwrap(), PutOutcome::Stored);
    assert!(server.objects()["a"] == whole);
    let log = server.take_log();
    assert_eq!((count(&log, "PUT"), count(&log, "POST")), (2, 0), "never in parts: {log:?}");
    assert_eq!(storage.put_if_absent(&key("a"), body()).await.unwrap(), PutOutcome::Exists);
    assert_eq!(count(&server.take_log(), "PUT"), 0, "a taken key costs no transfer");
    // The key is taken while the body is under way.
    server.set_faults(|seen| (seen.method != "PUT").then_some(Fault::S3(404, "NoSuchKey")));
    server.put("b", "first");
    assert_eq!(storage.put_if_absent(&key("b"), body()).await.unwrap(), PutOutcome::Exists);
    assert_eq!(server.objects()["b"], "first");
    let mut lose = true;
    server.set_faults(move |seen| {
        (seen.method == "PUT" && std::mem::take(&mut lose)).then_some(Fault::AnswerLost)
    });
    assert_eq!(storage.put_if_absent(&key("lost"), body()).await.unwrap(), PutOutcome::Exists);
    assert!(server.objects()["lost"] == whole);
    // A file that is not what was announced is this machine's fault, and nothing is stored.
    server.heal();
    for announced in [content.len() as u64 - 1, content.len() as u64 + 1] {
        let changed = storage.put_if_absent(&key("changed"), spooled(announced)).await;
        assert!(matches!(changed, Err(Error::LocalIo(_))), "{changed:?}");
    }
    assert!(!server.objects().contains_key("changed"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_in_parts_that_meets_another_leaves_nothing_open() {
    let server = S3Server::start();
    let storage = storage::open(&server.config("")).unwrap();
    let body = Bytes::from(vec![7; 17 << 20]);
    let upload = async |name: &str| {
        let mut upload = storage.start_upload(&key(name)).await.unwrap();
        upload.write(body.clone()).await.unwrap();
        upload.finish().await
    };
    let completes = |seen: &Seen| seen.method == "POST" && seen.query.contains("uploadId");
    server.set_faults(move |seen| completes(seen).then_some(Fault::S3(409, "ConditionalRequestConflict")));
    let error = upload("conflict").await.unwrap_err();
    assert!(error.is_transient() && error.next().contains("start this one again"), "{}", error.report());
    assert_eq!(server.open_uploads(), 0, "it is aborted");
    // The lost answer of a completion that happened: the caller compares.
    let mut lose = true;
    server
        .set_faults(move |seen| (completes(seen) && std::mem::take(&mut lose)).then_some(Fault::AnswerLost));
    assert_eq!(upload("lost").await.unwrap(), PutOutcome::Exists);
    assert!(server.objects()["lost"] == body);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_connections_end_within_the_deadline_and_heal() {
    let server = S3Server::start();
    server.put("there", vec![5; 300_000]);
    let proxy = Proxy::start(server.address());
    let config = |deadline_ms| {
        let mut config = server.config("");
        config.s3.endpoint = Some(proxy.endpoint());
        config.limits = storage::Limits { connect_ms: 300, request_ms: 400, deadline_ms };
        config
    };
    let hasty = storage::open(&config(600)).unwrap();
    for mode in [
        Mode::Refuse,
        Mode::BlackHole,
        Mode::ResetAfter(1000),
        Mode::CloseAfter(1000),
        Mode::Latency(Duration::from_secs(5)),
        Mode::Throttle(10_000),
    ] {
        proxy.set(mode);
        let started = Instant::now();
        let got = hasty.get(&key("there"), 300_000).await;
        assert_eq!(kind(&got), Some(Expected::Unavailable), "{mode:?}");
        assert!(started.elapsed() < Duration::from_secs(5), "{mode:?} took {:?}", started.elapsed());
        proxy.set(Mode::Pass);
        assert_eq!(
            hasty.get(&key("there"), 300_000).await.unwrap().unwrap().len(),
            300_000,
            "after {mode:?}"
        );
    }
    // A put whose connection is reset midway is repeated, and stored once and whole.
    proxy.set(Mode::ResetUploadAfter(100_000));
    let patient = storage::open(&config(20_000)).unwrap();
    let put = tokio::spawn({
        let patient = Arc::clone(&patient);
        async move { patient.put_if_absent(&key("put"), vec![6; 300_000].into()).await }
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    proxy.set(Mode::Pass);
    assert_eq!(put.await.unwrap().unwrap(), PutOutcome::Stored);
    assert!(server.objects()["put"] == vec![6; 300_000]);
    // Nobody listens.
    drop(proxy);
    assert_eq!(kind(&hasty.get(&key("there"), 300_000).await), Some(Expected::Unavailable));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_credentials_and_settings_have_their_own_errors() {
    let server = S3Server::start();
    let mut config = server.config("");
    config.s3.secret_access_key = Some(storage::Secret::new("wrong-secret"));
    let error = open(config).get(&key("a"), 1).await.unwrap_err();
    assert!(matches!(error, Error::Denied(_)) && error.to_string().contains("credentials"), "{error}");
    assert!(!error.report().contains("wrong-secret"));

    let mut config = server.config("");
    config.s3.ca_file = Some("/nonexistent/ca.pem".into());
    assert!(matches!(storage::open(&config), Err(Error::LocalIo(_))));
    let file = tempfile::NamedTempFile::new().unwrap();
    for text in ["", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
        std::fs::write(file.path(), text).unwrap();
        config.s3.ca_file = Some(file.path().to_owned());
        assert!(matches!(storage::open(&config), Err(Error::Invalid(_))), "{text:?}");
    }
    for endpoint in ["127.0.0.1:1", "https://", "http://user:pass@host", "ftp://host"] {
        let mut config = server.config("");
        config.s3.endpoint = Some(endpoint.to_owned());
        let error = storage::open(&config).unwrap_err();
        assert!(
            matches!(error, Error::Invalid(_)) && !error.report().contains("pass@"),
            "{endpoint}: {error}"
        );
    }
    let mut config = server.config("");
    config.s3.secret_access_key = None;
    assert!(matches!(storage::open(&config), Err(Error::Invalid(_))));
}

/// Makes a certificate authority and a certificate for 127.0.0.1 in `folder`; returns the files of the
/// authority, the certificate and its key.
pub(crate) fn own_authority(folder: &Path) -> (PathBuf, PathBuf, PathBuf) {
    let path = |name: &str| folder.join(name);
    let openssl = |args: &str, more: &[&str]| {
        let output =
            Command::new("openssl").args(args.split(' ')).args(more).current_dir(folder).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    let ec = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
    openssl("req -x509 -days 2 -subj /CN=ca -keyout ca.key -out ca.pem", &ec);
    openssl("req -subj /CN=s3 -keyout s3.key -out s3.csr", &ec);
    std::fs::write(path("ext"), "subjectAltName=IP:127.0.0.1\n").unwrap();
    openssl(
        "x509 -req -in s3.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile ext -out s3.pem",
        &[],
    );
    (path("ca.pem"), path("s3.pem"), path("s3.key"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn seaweedfs_over_tls_needs_its_authority() {
    let folder = tempfile::tempdir().unwrap();
    let (authority, certificate, private_key) = own_authority(folder.path());
    let server = WeedServer::start_tls(&certificate, &private_key, &authority);
    let storage = storage::open(&server.config("tls")).unwrap();
    assert_eq!(storage.put_if_absent(&key("a"), vec![1; 100_000].into()).await.unwrap(), PutOutcome::Stored);
    assert_eq!(storage.put_if_absent(&key("a"), vec![2; 100_000].into()).await.unwrap(), PutOutcome::Exists);
    assert!(storage.get(&key("a"), 100_000).await.unwrap().unwrap() == vec![1; 100_000]);
    let mut config = server.config("tls");
    config.s3.ca_file = None;
    let error = open(config).get(&key("a"), 100_000).await.unwrap_err();
    assert!(matches!(error, Error::Denied(_)) && error.next().contains("ca_file"), "{}", error.report());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn seaweedfs_passes_the_probe_and_comes_back_after_a_crash() {
    let mut server = WeedServer::start();
    let storage = storage::open(&server.config("")).unwrap();
    let report = probe(storage.as_ref()).await.unwrap();
    assert!(report.is_safe(), "{report:?}");
    storage.put_if_absent(&key("kept"), vec![9; 1 << 20].into()).await.unwrap();
    let hasty = open(server.config(""));
    server.kill9();
    assert_eq!(kind(&hasty.get(&key("kept"), 1 << 20).await), Some(Expected::Unavailable));
    let put = tokio::spawn({
        let storage = Arc::clone(&storage);
        async move { storage.put_if_absent(&key("during"), vec![8; 1 << 20].into()).await }
    });
    let server = tokio::task::spawn_blocking(move || {
        server.restart();
        server
    })
    .await
    .unwrap();
    assert_eq!(put.await.unwrap().unwrap(), PutOutcome::Stored, "a put waits for the store to come back");
    assert!(storage.get(&key("kept"), 1 << 20).await.unwrap().unwrap() == vec![9; 1 << 20]);
    server.freeze();
    assert_eq!(kind(&hasty.get(&key("kept"), 1 << 20).await), Some(Expected::Unavailable));
    server.thaw();
    assert!(storage.get(&key("during"), 1 << 20).await.unwrap().is_some());
}

#[test]
fn a_runtime_less_thread_can_use_the_servers() {
    let server = S3Server::start();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let storage = storage::open(&server.config("")).unwrap();
    runtime.block_on(async { storage.put_if_absent(&key("a"), vec![1].into()).await.unwrap() });
    assert_eq!(server.objects().keys().collect::<Vec<_>>(), ["a"]);
    assert!(server.remove("a"));
    assert!(server.config("").url.contains(BUCKET));
}
