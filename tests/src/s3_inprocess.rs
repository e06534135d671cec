//! An S3 server inside the test process: correct by default (conditional writes, checksums,
//! multipart uploads, SigV4), and wrong on demand.
//!
//! It serves HTTP on a free port of the loopback from threads of its own, so that tests which start
//! programs can use it as well as those that call the library.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use futures_util::{StreamExt as _, stream};
use hyper::body::Incoming;
use hyper::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use s3s::auth::SimpleAuth;
use s3s::dto::*;
use s3s::service::{S3Service, S3ServiceBuilder};
use s3s::{Body, S3, S3Error, S3Request, S3Response, S3Result, s3_error};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use walship::storage::{S3Settings, Secret, StorageConfig};

/// The access key that the server knows.
pub const ACCESS_KEY: &str = "AKWALSHIPTEST";
/// Its secret key.
pub const SECRET_KEY: &str = "walship-test-secret";
/// The bucket that is there from the start.
pub const BUCKET: &str = "walship-test";

/// What the server does with `If-None-Match: *`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConditionalWrites {
    /// As it should.
    Honoured,
    /// As stores do that never heard of it: the object is overwritten.
    Ignored,
    /// It looks first and writes a moment later: several writers win.
    Raced,
}

/// What goes wrong with one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// Nothing is done; the answer is an S3 error document with this status and code.
    S3(u16, &'static str),
    /// Nothing is done; the answer is the page of a proxy with this status.
    Proxy(u16),
    /// Nothing is done; the answer is this status and nothing else.
    Bare(u16),
    /// 404 NoSuchKey of an object whose newest version is a delete marker.
    DeleteMarker,
    /// It is done, and the connection is closed without an answer.
    AnswerLost,
    /// It is done after this long.
    Late(Duration),
    /// Of the answer's body only this many bytes come, then the connection is closed.
    Truncated(usize),
    /// The lowest bit of this byte of the answer's body is flipped.
    Flipped(usize),
}

/// What is known of a request when a fault is chosen.
#[derive(Debug, Clone)]
pub struct Seen {
    /// `GET`, `PUT`...
    pub method: String,
    /// `/bucket/key`.
    pub path: String,
    /// What stands after the question mark; empty without one.
    pub query: String,
}

type Rule = Box<dyn FnMut(&Seen) -> Option<Fault> + Send>;

#[derive(Debug, Clone)]
struct Stored {
    bytes: Bytes,
    e_tag: String,
    crc32: Option<String>,
    modified: SystemTime,
}

#[derive(Debug)]
struct Parts {
    bucket: String,
    key: String,
    started: SystemTime,
    parts: BTreeMap<i32, Stored>,
}

struct State {
    buckets: HashMap<String, BTreeMap<String, Stored>>,
    /// The keys, behind their bucket's name and a slash, whose newest version is a delete marker.
    markers: BTreeSet<String>,
    uploads: HashMap<String, Parts>,
    conditional: ConditionalWrites,
    checksums: bool,
    versioned: bool,
    locked_prefix: Option<String>,
    /// How far its clock is ahead of this machine's, in seconds.
    ahead: i64,
    next: u64,
}

#[derive(Clone)]
struct Store(Arc<Mutex<State>>);

impl Store {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running server; dropping it stops it.
pub struct S3Server {
    address: SocketAddr,
    store: Store,
    rule: Arc<Mutex<Rule>>,
    log: Arc<Mutex<Vec<Seen>>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl S3Server {
    /// Starts a server with the bucket [`BUCKET`].
    ///
    /// # Panics
    /// When no port of the loopback can be had.
    pub fn start() -> Self {
        Self::start_with(None)
    }

    /// Starts a server that takes what stands before `.domain` in a request's host for its bucket.
    ///
    /// # Panics
    /// When no port of the loopback can be had.
    pub fn start_virtual_hosts(domain: &str) -> Self {
        Self::start_with(Some(domain))
    }

    fn start_with(domain: Option<&str>) -> Self {
        let store = Store(Arc::new(Mutex::new(State {
            buckets: HashMap::from([(BUCKET.to_owned(), BTreeMap::new())]),
            markers: BTreeSet::new(),
            uploads: HashMap::new(),
            conditional: ConditionalWrites::Honoured,
            checksums: true,
            versioned: false,
            locked_prefix: None,
            ahead: 0,
            next: 0,
        })));
        let mut builder = S3ServiceBuilder::new(store.clone());
        builder.set_auth(SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY));
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        listener.set_nonblocking(true).expect("a listener can be made non-blocking");
        let address = listener.local_addr().expect("a listener has an address");
        if let Some(domain) = domain {
            let domain = format!("{domain}:{}", address.port());
            builder.set_host(s3s::host::SingleDomain::new(&domain).expect("tests use valid domains"));
        }
        let service = builder.build();
        let rule: Arc<Mutex<Rule>> = Arc::new(Mutex::new(Box::new(|_| None)));
        let log = Arc::new(Mutex::new(Vec::new()));
        let (stop, stopped) = oneshot::channel::<()>();
        let front = Front { service, store: store.clone(), rule: Arc::clone(&rule), log: Arc::clone(&log) };
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .expect("a runtime for the S3 server");
            runtime.block_on(async move {
                let listener = TcpListener::from_std(listener).expect("the listener can be used");
                tokio::select! {
                    () = serve(listener, front) => {}
                    _ = stopped => {}
                }
            });
            runtime.shutdown_background();
        });
        Self { address, store, rule, log, stop: Some(stop), thread: Some(thread) }
    }

    /// Returns the endpoint's URL.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Returns the address to connect to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns the configuration of a storage under `prefix` (may be empty) with the right credentials.
    pub fn config(&self, prefix: &str) -> StorageConfig {
        config_for(&self.endpoint(), prefix)
    }

    /// Returns the environment with which programs reach the server; its URL is `s3://BUCKET/...`.
    pub fn env(&self) -> Vec<(&'static str, String)> {
        env_for(&self.endpoint())
    }

    /// Chooses what conditional writes do from now on.
    pub fn set_conditional_writes(&self, conditional: ConditionalWrites) {
        self.store.lock().conditional = conditional;
    }

    /// Chooses whether wrong checksums are refused.
    pub fn set_checksums(&self, checked: bool) {
        self.store.lock().checksums = checked;
    }

    /// Chooses whether what is deleted is kept as an older version, behind a delete marker: reads of it are then answered
    /// as S3 does, with 404 and the header `x-amz-delete-marker`.
    pub fn set_versioned(&self, versioned: bool) {
        self.store.lock().versioned = versioned;
    }

    /// Sets its clock, by which it says when objects were written, so many seconds ahead of this machine's.
    pub fn set_clock_ahead(&self, seconds: i64) {
        self.store.lock().ahead = seconds;
    }

    /// Makes the objects whose keys hold this text so much older.
    pub fn age_objects(&self, part_of_key: &str, by: Duration) {
        self.ager()(part_of_key, by);
    }

    /// Returns what makes objects older, as [`S3Server::age_objects`] does, for whoever does not have the server.
    pub fn ager(&self) -> impl Fn(&str, Duration) + Send + use<> {
        let store = self.store.clone();
        move |part_of_key, by| {
            let mut state = store.lock();
            let objects = state.buckets.get_mut(BUCKET).into_iter().flatten();
            for (_, object) in objects.filter(|(key, _)| key.contains(part_of_key)) {
                object.modified -= by;
            }
        }
    }

    /// Refuses, in requests that delete many objects, those whose keys hold this text.
    pub fn set_locked(&self, part_of_key: Option<&str>) {
        self.store.lock().locked_prefix = part_of_key.map(str::to_owned);
    }

    /// Asks `rule` about each request from now on.
    pub fn set_faults(&self, rule: impl FnMut(&Seen) -> Option<Fault> + Send + 'static) {
        *self.rule.lock().unwrap_or_else(PoisonError::into_inner) = Box::new(rule);
    }

    /// Lets nothing go wrong from now on.
    pub fn heal(&self) {
        self.set_faults(|_| None);
        self.set_conditional_writes(ConditionalWrites::Honoured);
        self.set_checksums(true);
    }

    /// Removes the bucket and all it holds.
    pub fn drop_bucket(&self) {
        self.store.lock().buckets.remove(BUCKET);
    }

    /// Returns the objects of the bucket by key.
    pub fn objects(&self) -> BTreeMap<String, Bytes> {
        let state = self.store.lock();
        let bucket = state.buckets.get(BUCKET);
        bucket.into_iter().flatten().map(|(key, object)| (key.clone(), object.bytes.clone())).collect()
    }

    /// Puts an object there behind everybody's back.
    pub fn put(&self, key: &str, bytes: impl Into<Bytes>) {
        let mut state = self.store.lock();
        let stored = stored(&mut state, bytes.into(), None);
        state.markers.remove(&format!("{BUCKET}/{key}"));
        state.buckets.entry(BUCKET.to_owned()).or_default().insert(key.to_owned(), stored);
    }

    /// Removes an object behind everybody's back; returns whether it was there.
    pub fn remove(&self, key: &str) -> bool {
        let mut state = self.store.lock();
        state.markers.remove(&format!("{BUCKET}/{key}"));
        state.buckets.entry(BUCKET.to_owned()).or_default().remove(key).is_some()
    }

    /// Returns how many multipart uploads were neither completed nor aborted.
    pub fn open_uploads(&self) -> usize {
        self.store.lock().uploads.len()
    }

    /// Makes the open multipart uploads so much older.
    pub fn age_uploads(&self, by: Duration) {
        for upload in self.store.lock().uploads.values_mut() {
            upload.started -= by;
        }
    }

    /// Returns and forgets the requests seen so far.
    pub fn take_log(&self) -> Vec<Seen> {
        std::mem::take(&mut *self.log.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Returns the configuration of a storage in [`BUCKET`] under `prefix` at `endpoint`, with the test's credentials.
pub fn config_for(endpoint: &str, prefix: &str) -> StorageConfig {
    let mut config = StorageConfig::new(format!("s3://{BUCKET}/{prefix}"));
    config.s3 = S3Settings {
        endpoint: Some(endpoint.to_owned()),
        region: Some("us-east-1".to_owned()),
        access_key_id: Some(ACCESS_KEY.to_owned()),
        secret_access_key: Some(Secret::new(SECRET_KEY)),
        ..S3Settings::default()
    };
    config
}

/// Returns AWS's variables for programs that are to reach `endpoint` with the test's credentials.
pub fn env_for(endpoint: &str) -> Vec<(&'static str, String)> {
    vec![
        ("AWS_ENDPOINT_URL", endpoint.to_owned()),
        ("AWS_REGION", "us-east-1".to_owned()),
        ("AWS_ACCESS_KEY_ID", ACCESS_KEY.to_owned()),
        ("AWS_SECRET_ACCESS_KEY", SECRET_KEY.to_owned()),
        ("AWS_EC2_METADATA_DISABLED", "true".to_owned()),
    ]
}

#[derive(Clone)]
struct Front {
    service: S3Service,
    store: Store,
    rule: Arc<Mutex<Rule>>,
    log: Arc<Mutex<Vec<Seen>>>,
}

async fn serve(listener: TcpListener, front: Front) {
    loop {
        let Ok((socket, _)) = listener.accept().await else { continue };
        let _ = socket.set_nodelay(true);
        let front = front.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let front = front.clone();
                let answer: BoxFuture<'static, Answered> =
                    Box::pin(async move { front.answer(request).await });
                answer
            });
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(socket), service)
                .await;
        });
    }
}

type Problem = std::io::Error;
type Answered = Result<Response<Body>, Problem>;

async fn whole(body: Body) -> Result<Bytes, Problem> {
    let whole = http_body_util::BodyExt::collect(body).await;
    Ok(whole.map_err(|error| Problem::other(error.to_string()))?.to_bytes())
}

impl Front {
    async fn answer(&self, request: Request<Incoming>) -> Answered {
        let seen = Seen {
            method: request.method().to_string(),
            path: request.uri().path().to_owned(),
            query: request.uri().query().unwrap_or_default().to_owned(),
        };
        let fault = (self.rule.lock().unwrap_or_else(PoisonError::into_inner))(&seen);
        let is_read = ["GET", "HEAD"].contains(&&*seen.method);
        let name = seen.path.trim_start_matches('/').to_owned();
        self.log.lock().unwrap_or_else(PoisonError::into_inner).push(seen);
        let refusal = match &fault {
            Some(Fault::S3(status, code)) => Some(s3_error_page(*status, code)),
            Some(Fault::Proxy(status)) => {
                Some(page(*status, "text/html", format!("<html><h1>{status}</h1></html>")))
            }
            Some(Fault::Bare(status)) => Some(page(*status, "text/plain", String::new())),
            Some(Fault::DeleteMarker) => {
                let mut response = s3_error_page(404, "NoSuchKey");
                response.headers_mut().insert("x-amz-delete-marker", HeaderValue::from_static("true"));
                Some(response)
            }
            _ => None,
        };
        if let Some(refusal) = refusal {
            // As a polite server does: the body is read before the answer.
            let _ = http_body_util::BodyExt::collect(request.into_body()).await;
            return Ok(refusal);
        }
        if let Some(Fault::Late(time)) = fault {
            tokio::time::sleep(time).await;
        }
        let mut response = self
            .service
            .call(request.map(Body::from))
            .await
            .map_err(|error| Problem::other(format!("{error:?}")))?;
        if is_read && response.status() == StatusCode::NOT_FOUND && self.store.lock().markers.contains(&name)
        {
            response.headers_mut().insert("x-amz-delete-marker", HeaderValue::from_static("true"));
        }
        match fault {
            Some(Fault::AnswerLost) => Err(Problem::other("the answer is lost")),
            Some(Fault::Truncated(length)) => {
                let (mut parts, body) = response.into_parts();
                let bytes = whole(body).await?;
                parts.headers.insert(CONTENT_LENGTH, HeaderValue::from(bytes.len()));
                let part = bytes.slice(..length.min(bytes.len()));
                let pieces = stream::iter([Ok(part), Err(std::io::Error::other("truncated"))]);
                let body =
                    http_body_util::StreamBody::new(pieces.map(|piece| piece.map(hyper::body::Frame::data)));
                Ok(Response::from_parts(parts, Body::http_body_unsync(body)))
            }
            Some(Fault::Flipped(offset)) => {
                let (parts, body) = response.into_parts();
                let mut bytes = whole(body).await?.to_vec();
                if let Some(byte) = bytes.get_mut(offset) {
                    *byte ^= 1;
                }
                Ok(Response::from_parts(parts, Body::from(bytes)))
            }
            _ => Ok(response),
        }
    }
}

fn s3_error_page(status: u16, code: &str) -> Response<Body> {
    let text = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?><Error><Code>{code}</Code><Message>injected by the test</Message></Error>"
    );
    page(status, "application/xml", text)
}

fn page(status: u16, kind: &'static str, text: String) -> Response<Body> {
    let mut response = Response::new(Body::from(text));
    *response.status_mut() = StatusCode::from_u16(status).expect("tests use valid statuses");
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

fn stored(state: &mut State, bytes: Bytes, crc32: Option<String>) -> Stored {
    state.next += 1;
    let by = Duration::from_secs(state.ahead.unsigned_abs());
    let now = SystemTime::now();
    let modified = if state.ahead < 0 { now - by } else { now + by };
    Stored { e_tag: format!("{:032x}", state.next), bytes, crc32, modified }
}

async fn collected(body: Option<StreamingBlob>) -> S3Result<Bytes> {
    let mut bytes = BytesMut::new();
    let Some(mut body) = body else { return Ok(bytes.freeze()) };
    while let Some(piece) = body.next().await {
        bytes.extend_from_slice(&piece.map_err(|error| s3_error!(IncompleteBody, "{error}"))?);
    }
    Ok(bytes.freeze())
}

fn crc32(bytes: &[u8]) -> String {
    STANDARD.encode(crc32fast::hash(bytes).to_be_bytes())
}

fn bucket<'a>(state: &'a mut State, name: &str) -> S3Result<&'a mut BTreeMap<String, Stored>> {
    state.buckets.get_mut(name).ok_or_else(|| s3_error!(NoSuchBucket))
}

fn object(state: &mut State, name: &str, key: &str) -> S3Result<Stored> {
    bucket(state, name)?.get(key).cloned().ok_or_else(|| s3_error!(NoSuchKey))
}

impl Store {
    fn check(&self, bytes: &Bytes, stated: Option<&String>) -> S3Result<()> {
        match stated {
            Some(sum) if self.lock().checksums && *sum != crc32(bytes) => {
                Err(s3_error!(BadDigest, "the CRC32 that was sent does not match"))
            }
            _ => Ok(()),
        }
    }

    /// Publishes an object as far as the condition lets it.
    async fn publish(&self, name: &str, key: &str, object: Stored, conditional: bool) -> S3Result<()> {
        let mode = self.lock().conditional;
        let taken = |state: &mut State| bucket(state, name).map(|bucket| bucket.contains_key(key));
        if conditional && mode == ConditionalWrites::Raced {
            if taken(&mut self.lock())? {
                return Err(s3_error!(PreconditionFailed));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let mut state = self.lock();
        if conditional && mode == ConditionalWrites::Honoured && taken(&mut state)? {
            return Err(s3_error!(PreconditionFailed));
        }
        bucket(&mut state, name)?.insert(key.to_owned(), object);
        state.markers.remove(&format!("{name}/{key}"));
        Ok(())
    }
}

impl State {
    /// Removes an object, or hides it behind a delete marker; returns whether it is that.
    fn delete(&mut self, name: &str, key: &str) -> S3Result<Option<bool>> {
        bucket(self, name)?.remove(key);
        if self.versioned {
            self.markers.insert(format!("{name}/{key}"));
        }
        Ok(self.versioned.then_some(true))
    }
}

#[async_trait::async_trait]
impl S3 for Store {
    async fn put_object(&self, request: S3Request<PutObjectInput>) -> S3Result<S3Response<PutObjectOutput>> {
        let input = request.input;
        let bytes = collected(input.body).await?;
        self.check(&bytes, input.checksum_crc32.as_ref())?;
        bucket(&mut self.lock(), &input.bucket)?;
        let object = stored(&mut self.lock(), bytes, input.checksum_crc32.clone());
        let e_tag = Some(ETag::Strong(object.e_tag.clone()));
        self.publish(&input.bucket, &input.key, object, input.if_none_match.is_some()).await?;
        let output =
            PutObjectOutput { e_tag, checksum_crc32: input.checksum_crc32, ..PutObjectOutput::default() };
        Ok(S3Response::new(output))
    }

    async fn get_object(&self, request: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
        let input = request.input;
        let found = object(&mut self.lock(), &input.bucket, &input.key)?;
        let whole = found.bytes.len() as u64;
        let range = match input.range {
            Some(range) => Some(range.check(whole).map_err(|_| s3_error!(InvalidRange))?),
            None => None,
        };
        let body = match &range {
            Some(range) => found.bytes.slice(range.start as usize..range.end as usize),
            None => found.bytes.clone(),
        };
        let enabled = input.checksum_mode.is_some();
        let output = GetObjectOutput {
            content_length: Some(body.len() as i64),
            content_range: range.as_ref().map(|r| format!("bytes {}-{}/{whole}", r.start, r.end - 1)),
            checksum_crc32: found.crc32.filter(|_| enabled && range.is_none()),
            e_tag: Some(ETag::Strong(found.e_tag)),
            last_modified: Some(found.modified.into()),
            body: Some(StreamingBlob::from(Body::from(body))),
            ..GetObjectOutput::default()
        };
        Ok(S3Response::new(output))
    }

    async fn head_object(
        &self,
        request: S3Request<HeadObjectInput>,
    ) -> S3Result<S3Response<HeadObjectOutput>> {
        let found = object(&mut self.lock(), &request.input.bucket, &request.input.key)?;
        Ok(S3Response::new(HeadObjectOutput {
            content_length: Some(found.bytes.len() as i64),
            e_tag: Some(ETag::Strong(found.e_tag)),
            last_modified: Some(found.modified.into()),
            ..HeadObjectOutput::default()
        }))
    }

    async fn delete_object(
        &self,
        request: S3Request<DeleteObjectInput>,
    ) -> S3Result<S3Response<DeleteObjectOutput>> {
        let marker = self.lock().delete(&request.input.bucket, &request.input.key)?;
        let output = DeleteObjectOutput { delete_marker: marker, ..DeleteObjectOutput::default() };
        Ok(S3Response::with_status(output, StatusCode::NO_CONTENT))
    }

    async fn delete_objects(
        &self,
        request: S3Request<DeleteObjectsInput>,
    ) -> S3Result<S3Response<DeleteObjectsOutput>> {
        let mut state = self.lock();
        let keep = state.locked_prefix.clone();
        let (mut deleted, mut errors) = (Vec::new(), Vec::new());
        for object in request.input.delete.objects {
            if keep.as_ref().is_some_and(|keep| object.key.contains(keep)) {
                errors.push(s3s::dto::Error {
                    code: Some("AccessDenied".to_owned()),
                    key: Some(object.key),
                    message: Some("injected by the test".to_owned()),
                    ..s3s::dto::Error::default()
                });
                continue;
            }
            let marker = state.delete(&request.input.bucket, &object.key)?;
            let one =
                DeletedObject { key: Some(object.key), delete_marker: marker, ..DeletedObject::default() };
            deleted.push(one);
        }
        let output = DeleteObjectsOutput {
            deleted: Some(deleted),
            errors: (!errors.is_empty()).then_some(errors),
            ..DeleteObjectsOutput::default()
        };
        Ok(S3Response::new(output))
    }

    async fn list_objects_v2(
        &self,
        request: S3Request<ListObjectsV2Input>,
    ) -> S3Result<S3Response<ListObjectsV2Output>> {
        let input = request.input;
        let prefix = input.prefix.clone().unwrap_or_default();
        let after = input.continuation_token.clone().or(input.start_after.clone()).unwrap_or_default();
        let most = usize::try_from(input.max_keys.unwrap_or(1000)).unwrap_or(0).min(1000);
        let mut state = self.lock();
        let mut found: Vec<(String, Stored)> = bucket(&mut state, &input.bucket)?
            .iter()
            .filter(|(key, _)| key.starts_with(&prefix) && key.as_str() > after.as_str())
            .take(most + 1)
            .map(|(key, object)| (key.clone(), object.clone()))
            .collect();
        let truncated = found.len() > most;
        found.truncate(most);
        let next = found.last().filter(|_| truncated).map(|(key, _)| key.clone());
        let contents = found.into_iter().map(|(key, object)| Object {
            key: Some(key),
            size: Some(object.bytes.len() as i64),
            e_tag: Some(ETag::Strong(object.e_tag)),
            last_modified: Some(object.modified.into()),
            ..Object::default()
        });
        Ok(S3Response::new(ListObjectsV2Output {
            name: Some(input.bucket),
            prefix: Some(prefix),
            is_truncated: Some(truncated),
            next_continuation_token: next,
            contents: Some(contents.collect()),
            max_keys: input.max_keys,
            ..ListObjectsV2Output::default()
        }))
    }

    async fn create_multipart_upload(
        &self,
        request: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        let (name, key) = (request.input.bucket, request.input.key);
        let mut state = self.lock();
        bucket(&mut state, &name)?;
        state.next += 1;
        let id = format!("upload-{}", state.next);
        let parts = Parts {
            bucket: name.clone(),
            key: key.clone(),
            started: SystemTime::now(),
            parts: BTreeMap::new(),
        };
        state.uploads.insert(id.clone(), parts);
        Ok(S3Response::new(CreateMultipartUploadOutput {
            bucket: Some(name),
            key: Some(key),
            upload_id: Some(id),
            ..CreateMultipartUploadOutput::default()
        }))
    }

    async fn upload_part(
        &self,
        request: S3Request<UploadPartInput>,
    ) -> S3Result<S3Response<UploadPartOutput>> {
        let input = request.input;
        let bytes = collected(input.body).await?;
        self.check(&bytes, input.checksum_crc32.as_ref())?;
        let mut state = self.lock();
        let part = stored(&mut state, bytes, input.checksum_crc32.clone());
        let e_tag = Some(ETag::Strong(part.e_tag.clone()));
        let upload = state.uploads.get_mut(&input.upload_id).ok_or_else(|| s3_error!(NoSuchUpload))?;
        if (&upload.bucket, &upload.key) != (&input.bucket, &input.key) {
            return Err(s3_error!(NoSuchUpload));
        }
        upload.parts.insert(input.part_number, part);
        let output =
            UploadPartOutput { e_tag, checksum_crc32: input.checksum_crc32, ..UploadPartOutput::default() };
        Ok(S3Response::new(output))
    }

    async fn complete_multipart_upload(
        &self,
        request: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        let input = request.input;
        let asked = input.multipart_upload.and_then(|upload| upload.parts).unwrap_or_default();
        let object = {
            let mut state = self.lock();
            let upload = state.uploads.get(&input.upload_id).ok_or_else(|| s3_error!(NoSuchUpload))?;
            let mut whole = BytesMut::new();
            let mut last = 0;
            for (index, part) in asked.iter().enumerate() {
                let number = part.part_number.unwrap_or(0);
                if number <= last {
                    return Err(s3_error!(InvalidPartOrder));
                }
                last = number;
                let known = upload.parts.get(&number).ok_or_else(|| s3_error!(InvalidPart))?;
                if part.e_tag.as_ref().map(ETag::value) != Some(known.e_tag.as_str())
                    || part.checksum_crc32 != known.crc32
                {
                    return Err(s3_error!(InvalidPart));
                }
                if index + 1 < asked.len() && known.bytes.len() < 5 << 20 {
                    return Err(s3_error!(EntityTooSmall));
                }
                whole.extend_from_slice(&known.bytes);
            }
            if asked.is_empty() {
                return Err(s3_error!(MalformedXML));
            }
            // The sum of a multipart upload is one of its parts' sums.
            let sum = format!("AAAAAA==-{}", asked.len());
            stored(&mut state, whole.freeze(), Some(sum))
        };
        let e_tag = Some(ETag::Strong(object.e_tag.clone()));
        self.publish(&input.bucket, &input.key, object, input.if_none_match.is_some()).await?;
        self.lock().uploads.remove(&input.upload_id);
        Ok(S3Response::new(CompleteMultipartUploadOutput {
            bucket: Some(input.bucket),
            key: Some(input.key),
            e_tag,
            ..CompleteMultipartUploadOutput::default()
        }))
    }

    async fn list_multipart_uploads(
        &self,
        request: S3Request<ListMultipartUploadsInput>,
    ) -> S3Result<S3Response<ListMultipartUploadsOutput>> {
        let input = request.input;
        let prefix = input.prefix.clone().unwrap_or_default();
        let after = (input.key_marker.clone(), input.upload_id_marker.clone().unwrap_or_default());
        let mut state = self.lock();
        bucket(&mut state, &input.bucket)?;
        let mut found: Vec<_> = state
            .uploads
            .iter()
            .filter(|(_, parts)| parts.bucket == input.bucket && parts.key.starts_with(&prefix))
            .map(|(id, parts)| (parts.key.clone(), id.clone(), parts.started))
            .filter(|(key, id, _)| after.0.as_ref().is_none_or(|marker| (key, id) > (marker, &after.1)))
            .collect();
        found.sort();
        // Short pages: what goes on is tested then, too.
        let truncated = found.len() > 2;
        found.truncate(2);
        let last = found.last().filter(|_| truncated).cloned();
        let uploads = found.into_iter().map(|(key, id, started)| MultipartUpload {
            key: Some(key),
            upload_id: Some(id),
            initiated: Some(started.into()),
            ..MultipartUpload::default()
        });
        Ok(S3Response::new(ListMultipartUploadsOutput {
            bucket: Some(input.bucket),
            is_truncated: Some(truncated),
            next_key_marker: last.as_ref().map(|(key, ..)| key.clone()),
            next_upload_id_marker: last.map(|(_, id, _)| id),
            uploads: Some(uploads.collect()),
            ..ListMultipartUploadsOutput::default()
        }))
    }

    async fn abort_multipart_upload(
        &self,
        request: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        let removed = self.lock().uploads.remove(&request.input.upload_id);
        removed.map(|_| ()).ok_or_else(|| -> S3Error { s3_error!(NoSuchUpload) })?;
        Ok(S3Response::with_status(AbortMultipartUploadOutput::default(), StatusCode::NO_CONTENT))
    }
}
