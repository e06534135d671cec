//! What every storage must do, as one suite that runs unchanged on each of them.
//!
//! All keys lie under a prefix with a random id, so that a store can be used again. Nothing is
//! tidied away.
//!
//! # Panics
//! Every check panics where the storage does not keep its promise.

use std::io::Write as _;

use bytes::Bytes;
use futures_util::future::join_all;

use super::{Error, ObjectKey, PutBody, PutOutcome, Storage, list_all};

/// Runs all checks.
pub async fn run(storage: &dyn Storage) {
    put_get_and_taken_keys(storage).await;
    absence(storage).await;
    bounds(storage).await;
    ranges(storage).await;
    bodies(storage).await;
    listing(storage).await;
    paging(storage).await;
    confirm_and_delete(storage).await;
    removal(storage).await;
    uploads(storage).await;
    one_winner(storage).await;
}

/// Keys under a prefix of their own.
struct Keys(String);

impl Keys {
    fn new(check: &str) -> Self {
        Self(format!("conformance/{:016x}/{check}", rand::random::<u64>()))
    }

    fn key(&self, name: &str) -> ObjectKey {
        ObjectKey::new(format!("{}/{name}", self.0)).expect("checks use valid keys")
    }
}

/// Bytes that differ everywhere and do not compress to nothing.
fn content(length: usize, seed: u64) -> Bytes {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&(state ^ (state >> 29)).to_le_bytes());
    }
    bytes.truncate(length);
    bytes.into()
}

async fn put(storage: &dyn Storage, key: &ObjectKey, bytes: &Bytes) -> PutOutcome {
    storage.put_if_absent(key, bytes.clone().into()).await.expect("put")
}

async fn get(storage: &dyn Storage, key: &ObjectKey) -> Option<Bytes> {
    storage.get(key, 1 << 30).await.expect("get")
}

async fn put_get_and_taken_keys(storage: &dyn Storage) {
    let keys = Keys::new("put");
    let (first, second) = (content(1000, 1), content(1000, 2));
    let key = keys.key("deep/er/object.bin");
    assert_eq!(get(storage, &key).await, None);
    assert_eq!(put(storage, &key, &first).await, PutOutcome::Stored);
    assert_eq!(get(storage, &key).await.as_ref(), Some(&first));
    assert_eq!(put(storage, &key, &second).await, PutOutcome::Exists, "other content");
    assert_eq!(put(storage, &key, &first).await, PutOutcome::Exists, "same content");
    assert_eq!(get(storage, &key).await, Some(first), "a taken key keeps its content");
    let empty = keys.key("empty");
    assert_eq!(put(storage, &empty, &Bytes::new()).await, PutOutcome::Stored);
    assert_eq!(get(storage, &empty).await, Some(Bytes::new()));
    assert_eq!(put(storage, &empty, &second).await, PutOutcome::Exists, "an empty object is there, too");
}

async fn absence(storage: &dyn Storage) {
    let keys = Keys::new("absence");
    put(storage, &keys.key("folder/name"), &content(10, 1)).await;
    for name in ["folder/nam", "folder/name.x", "folder/other", "other/name", "folder.x", "x/y/z"] {
        let key = keys.key(name);
        assert_eq!(get(storage, &key).await, None, "{name}");
        assert_eq!(storage.get_range(&key, 0, 10).await.expect("range"), None, "{name}");
        assert_eq!(storage.get_range(&key, 0, 0).await.expect("range"), None, "{name}");
        assert_eq!(storage.confirm(&key).await.expect("confirm"), None, "{name}");
        storage.delete(&key).await.expect("deleting what is not there succeeds");
    }
}

async fn bounds(storage: &dyn Storage) {
    let key = Keys::new("bounds").key("thousand");
    put(storage, &key, &content(1000, 1)).await;
    assert!(storage.get(&key, 1000).await.expect("get").is_some());
    let error = storage.get(&key, 999).await.expect_err("the object is longer than allowed");
    assert!(matches!(error, Error::Corrupt(_)), "{error}");
}

async fn ranges(storage: &dyn Storage) {
    let keys = Keys::new("ranges");
    let (key, bytes) = (keys.key("object"), content(1000, 3));
    put(storage, &key, &bytes).await;
    put(storage, &keys.key("empty"), &Bytes::new()).await;
    for (offset, length, from, to) in [
        (0, 1000, 0, 1000),
        (0, 1, 0, 1),
        (0, 5000, 0, 1000),
        (17, 100, 17, 117),
        (999, 1, 999, 1000),
        (990, 100, 990, 1000),
        (1000, 10, 1000, 1000),
        (5000, 10, 1000, 1000),
        (17, 0, 17, 17),
        (5000, 0, 1000, 1000),
        (1, u64::MAX, 1, 1000),
    ] {
        let got = storage.get_range(&key, offset, length).await.expect("range");
        assert_eq!(got, Some(bytes.slice(from..to)), "{length} bytes from {offset}");
    }
    let got = storage.get_range(&keys.key("empty"), 0, 100).await.expect("range");
    assert_eq!(got, Some(Bytes::new()), "of an empty object");
}

async fn bodies(storage: &dyn Storage) {
    let keys = Keys::new("bodies");
    let pieces = vec![content(100, 1), Bytes::new(), content(200, 2), content(1, 3)];
    let whole: Bytes = pieces.concat().into();
    let key = keys.key("pieces");
    let outcome = storage.put_if_absent(&key, PutBody::Memory(pieces)).await.expect("put");
    assert_eq!((outcome, get(storage, &key).await), (PutOutcome::Stored, Some(whole)));
    assert_eq!(
        storage.put_if_absent(&keys.key("none"), PutBody::Memory(Vec::new())).await.expect("put"),
        PutOutcome::Stored
    );
    assert_eq!(get(storage, &keys.key("none")).await, Some(Bytes::new()));

    for (name, length) in [("spooled", 70_000), ("spooled-large", (65 << 20) + 5)] {
        let (head, tail, key) = (content(100, 5), content(length, 6), keys.key(name));
        let mut file = tempfile::NamedTempFile::new().expect("a local file");
        file.write_all(&tail).expect("writing it");
        let body =
            |file_bytes| PutBody::Spooled { head: head.clone(), file: file.path().to_owned(), file_bytes };
        let wrong = storage.put_if_absent(&key, body(length as u64 + 1)).await;
        assert!(matches!(wrong, Err(Error::LocalIo(_))), "a file that is shorter than said: {wrong:?}");
        assert_eq!(get(storage, &key).await, None);
        for outcome in [PutOutcome::Stored, PutOutcome::Exists] {
            let got = storage.put_if_absent(&key, body(length as u64)).await.expect("put");
            assert_eq!(got, outcome, "{name}");
        }
        let stored = get(storage, &key).await.expect("it is there");
        assert!(stored[..100] == head && stored[100..] == tail, "{name}");
    }
}

async fn listing(storage: &dyn Storage) {
    let keys = Keys::new("listing");
    let names = ["a-b", "a.b", "a/b", "a/b.c/d", "a/b/c", "a/bb", "a0", "aa/x", "B", "b"];
    // The file `a/b` and the folder `a/b/` cannot both be in a folder storage, nor are they in a repository.
    let mut names: Vec<&str> = names.into_iter().filter(|name| *name != "a/b").collect();
    for (index, name) in names.iter().enumerate() {
        put(storage, &keys.key(name), &content(index, 1)).await;
    }
    let lengths: Vec<u64> = {
        let mut sorted: Vec<(&str, u64)> =
            names.iter().enumerate().map(|(i, name)| (*name, i as u64)).collect();
        sorted.sort_unstable();
        sorted.into_iter().map(|(_, bytes)| bytes).collect()
    };
    names.sort_unstable();
    let all = list_all(storage, &format!("{}/", keys.0), 100).await.expect("list");
    let found: Vec<&str> = all.iter().map(|object| &object.key.as_str()[keys.0.len() + 1..]).collect();
    assert_eq!(found, names, "byte order of whole keys");
    assert_eq!(all.iter().map(|object| object.bytes).collect::<Vec<_>>(), lengths);

    let listed = async |prefix: &str, page: Option<&str>| -> Vec<String> {
        let page = page.map(|page| format!("{}/{page}", keys.0));
        let listed = storage.list(&format!("{}/{prefix}", keys.0), page.as_deref()).await.expect("list");
        assert_eq!(listed.next, None);
        listed.objects.iter().map(|object| object.key.as_str()[keys.0.len() + 1..].to_owned()).collect()
    };
    assert_eq!(listed("a/", None).await, ["a/b.c/d", "a/b/c", "a/bb"]);
    assert_eq!(listed("a/b", None).await, ["a/b.c/d", "a/b/c", "a/bb"], "a prefix may end within a name");
    assert_eq!(listed("a/b/c", None).await, ["a/b/c"], "a prefix may be a key");
    assert!(listed("a/b/c/", None).await.is_empty());
    assert!(listed("nothing", None).await.is_empty());
    assert_eq!(listed("a/", Some("a/b/c")).await.last().map(String::as_str), Some("a/bb"), "after a key");
    assert_eq!(listed("a/b/", Some("a/b/b")).await, ["a/b/c"], "after what is no key");
    assert!(listed("a/b/", Some("a/b/c")).await.is_empty(), "after the last key");
    assert_eq!(listed("aa", Some("a0")).await, ["aa/x"], "after a key outside the prefix");
    assert!(listed("a", Some("b")).await.is_empty());
    let folders = async |prefix: &str, page: Option<&str>| {
        let page = storage.list_folders(&format!("{}/{prefix}", keys.0), page).await.expect("list folders");
        assert_eq!(page.next, None);
        let mut names = page.names;
        names.sort_unstable();
        names
    };
    assert_eq!(folders("", None).await, ["a", "aa"]);
    assert_eq!(folders("", Some("a")).await, ["aa"]);
    assert_eq!(folders("a/", None).await, ["b", "b.c"]);
    assert!(folders("a/b/", None).await.is_empty());
    let refused = list_all(storage, &keys.0, 3).await;
    assert!(matches!(refused, Err(Error::Invalid(_))), "more than were allowed: {refused:?}");
}

/// What a store that keeps folders may do otherwise (see [`Storage::list`]): not part of [`run`].
pub async fn byte_order_across_folders(storage: &dyn Storage) {
    let keys = Keys::new("order");
    for name in ["a-b", "a.b", "a/b.c/d", "a/b/c", "a/bb", "a0", "aa/x"] {
        put(storage, &keys.key(name), &Bytes::new()).await;
    }
    for (after, expected) in [
        ("a.b", vec!["a/b.c/d", "a/b/c", "a/bb", "a0", "aa/x"]),
        ("a/b.c/d", vec!["a/b/c", "a/bb", "a0", "aa/x"]),
        ("a/b.d", vec!["a/b/c", "a/bb", "a0", "aa/x"]),
        ("a/c", vec!["a0", "aa/x"]),
    ] {
        let page = format!("{}/{after}", keys.0);
        let listed = storage.list(&format!("{}/a", keys.0), Some(&page)).await.expect("list");
        let found: Vec<&str> = listed.objects.iter().map(|o| &o.key.as_str()[keys.0.len() + 1..]).collect();
        assert_eq!(found, expected, "after {after}");
    }
}

async fn paging(storage: &dyn Storage) {
    const OBJECTS: usize = 1050;
    let keys = Keys::new("paging");
    let names: Vec<String> = (0..OBJECTS).map(|n| format!("{:03}/{:02}", n / 100, n % 100)).collect();
    for some in names.chunks(50) {
        join_all(some.iter().map(async |name| put(storage, &keys.key(name), &Bytes::new()).await)).await;
    }
    let mut found = Vec::new();
    let (mut page, mut pages) = (None, 0);
    loop {
        let listed = storage.list(&keys.0, page.as_deref()).await.expect("list");
        assert!(listed.objects.len() <= 1000, "a page is bounded");
        found.extend(listed.objects.iter().map(|object| object.key.as_str()[keys.0.len() + 1..].to_owned()));
        pages += 1;
        page = listed.next;
        if page.is_none() {
            break;
        }
    }
    assert!(pages > 1);
    assert_eq!(found, names);
}

async fn confirm_and_delete(storage: &dyn Storage) {
    let key = Keys::new("confirm").key("folder/object");
    put(storage, &key, &content(123, 1)).await;
    let meta = storage.confirm(&key).await.expect("confirm").expect("it is there");
    assert_eq!((meta.key.as_str(), meta.bytes), (key.as_str(), 123));
    storage.delete(&key).await.expect("delete");
    assert_eq!(get(storage, &key).await, None);
    assert_eq!(storage.confirm(&key).await.expect("confirm"), None);
    storage.delete(&key).await.expect("delete again");
    assert_eq!(put(storage, &key, &content(5, 2)).await, PutOutcome::Stored, "the key is free again");
}

async fn removal(storage: &dyn Storage) {
    let keys = Keys::new("removal");
    let removal = storage.removal().expect("it can remove");
    let names: Vec<ObjectKey> = (0..7).map(|n| keys.key(&format!("{}/{n}", n / 3))).collect();
    for key in &names {
        put(storage, key, &content(10, 1)).await;
    }
    if let Some(written) = removal.last_written(&keys.0).await.expect("when it was written") {
        let off = chrono::Utc::now().signed_duration_since(written).num_seconds().abs();
        assert!(off < 900, "the store's clock is {off} s off");
    }
    let nothing = keys.key("nothing");
    assert_eq!(removal.last_written(nothing.as_str()).await.expect("when it was written"), None);
    let mut some = names[..5].to_vec();
    some.push(keys.key("never/there"));
    removal.remove(&some).await.expect("remove");
    let left: Vec<_> =
        list_all(storage, &keys.0, 10).await.expect("list").into_iter().map(|o| o.key).collect();
    assert_eq!(left, names[5..], "what was not named stays");
    removal.remove(&some).await.expect("remove again");
    removal.remove(&[]).await.expect("remove nothing");
    assert_eq!(get(storage, &names[0]).await, None);
    assert_eq!(put(storage, &names[0], &content(5, 2)).await, PutOutcome::Stored, "the key is free again");
}

async fn uploads(storage: &dyn Storage) {
    let keys = Keys::new("uploads");
    // Nothing, one piece, exactly two parts of S3, more than the parts that may be under way at once.
    for length in [0, 1000, 16 << 20, (40 << 20) + 3] {
        let (key, bytes) = (keys.key(&format!("object-{length}")), content(length, 9));
        let mut upload = storage.start_upload(&key).await.expect("upload");
        for piece in bytes.chunks(3_000_017) {
            upload.write(bytes.slice_ref(piece)).await.expect("write");
        }
        assert_eq!(get(storage, &key).await, None, "invisible until finished");
        assert_eq!(upload.finish().await.expect("finish"), PutOutcome::Stored);
        assert!(get(storage, &key).await.expect("it is there") == bytes, "{length} bytes");
        let listed = list_all(storage, key.as_str(), 1).await.expect("list");
        assert_eq!(listed[0].bytes, length as u64);

        let mut second = storage.start_upload(&key).await.expect("upload");
        second.write(content(length + 1, 10)).await.expect("write");
        assert_eq!(second.finish().await.expect("finish"), PutOutcome::Exists, "the key is taken");
        assert!(get(storage, &key).await.expect("it is there") == bytes, "{length} bytes stay");
    }
    for length in [0, 1000, 20 << 20] {
        let key = keys.key(&format!("aborted-{length}"));
        let mut upload = storage.start_upload(&key).await.expect("upload");
        upload.write(content(length, 11)).await.expect("write");
        upload.abort().await;
        assert_eq!(get(storage, &key).await, None);
        let dropped = storage.start_upload(&key).await.expect("upload");
        drop(dropped);
    }
    assert!(list_all(storage, &format!("{}/aborted", keys.0), 1).await.expect("list").is_empty());
}

async fn one_winner(storage: &dyn Storage) {
    let keys = Keys::new("winner");
    for round in 0..3 {
        let key = keys.key(&format!("put-{round}"));
        let bodies: Vec<Bytes> = (0..16).map(|n| content(50_000, n)).collect();
        let outcomes = join_all(bodies.iter().map(|body| put(storage, &key, body))).await;
        let winners: Vec<usize> = (0..16).filter(|n| outcomes[*n] == PutOutcome::Stored).collect();
        assert_eq!(winners.len(), 1, "of 16 puts at once to one key");
        assert_eq!(get(storage, &key).await.as_ref(), Some(&bodies[winners[0]]));
    }
}

/// Of several uploads in parts that end at once one wins. SeaweedFS lets two win at times, so this is
/// no part of [`run`].
pub async fn one_upload_wins(storage: &dyn Storage) {
    let key = Keys::new("winner").key("upload");
    let bodies: Vec<Bytes> = (0..4).map(|n| content(9 << 20, n)).collect();
    let outcomes = join_all(bodies.iter().map(async |body| {
        let mut upload = storage.start_upload(&key).await.expect("upload");
        upload.write(body.clone()).await.expect("write");
        upload.finish().await
    }))
    .await;
    let winners: Vec<usize> = (0..4).filter(|n| matches!(outcomes[*n], Ok(PutOutcome::Stored))).collect();
    assert_eq!(winners.len(), 1, "of 4 uploads at once to one key: {outcomes:?}");
    for outcome in &outcomes {
        // A store may answer 409 to a completion that meets another one: to be started again.
        assert!(outcome.as_ref().map_or_else(Error::is_transient, |_| true), "{outcome:?}");
    }
    assert!(get(storage, &key).await.expect("it is there") == bodies[winners[0]]);
}
