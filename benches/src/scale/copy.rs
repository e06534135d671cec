//! Stores a generated world object by object: every object with its own digest, so that the copy is a repository.

use std::sync::Arc;

use futures_util::{StreamExt as _, TryStreamExt as _};
use walship::storage::{ObjectKey, PutBody, PutOutcome, Storage, list_all};
use walship::{Error, Result};

use super::store::GeneratedStore;
use super::timelines;

/// How many objects are made and stored at once.
const PUTS_MAX: usize = 32;

/// More objects than a world is stored with.
const OBJECTS_MAX: usize = 1_000_000;

/// Puts everything that the world holds into other stores and returns how many objects that are. What the
/// generated store tells afterwards is the same.
pub(super) async fn copy(world: &GeneratedStore, targets: &[Arc<dyn Storage>]) -> Result<usize> {
    let shape = world.shape();
    let segments = timelines(shape).into_iter().flat_map(|timeline| {
        let (first, end) = shape.range(timeline);
        (first..end).map(move |number| (timeline, number))
    });
    // Segments first: what roll-ups say depends on them.
    let puts = segments.map(|(timeline, number)| {
        let world = world.clone();
        put(targets, async move { Ok(world.make_segment(timeline, number)) })
    });
    all(puts).await?;
    world.make_rollups();
    let listed = list_all(world, "", OBJECTS_MAX).await?;
    let rest: Vec<ObjectKey> =
        listed.iter().map(|meta| meta.key.clone()).filter(|key| !key.as_str().ends_with(".wal")).collect();
    let puts = rest.into_iter().map(|key| {
        let world = world.clone();
        put(targets, async move {
            let bytes = world.get(&key, u64::MAX).await?;
            bytes.map(|bytes| (key, bytes)).ok_or_else(|| Error::missing("what was listed a moment ago"))
        })
    });
    all(puts).await?;
    world.forget_objects();
    Ok(listed.len())
}

/// Makes an object and puts it into each store, in a task of its own.
async fn put(
    targets: &[Arc<dyn Storage>],
    object: impl Future<Output = Result<(ObjectKey, bytes::Bytes)>> + Send + 'static,
) -> Result<()> {
    let targets = targets.to_vec();
    let task = tokio::spawn(async move {
        let (key, bytes) = object.await?;
        for target in targets {
            if target.put_if_absent(&key, PutBody::from(bytes.clone())).await? == PutOutcome::Exists {
                return Err(Error::conflict(format!("{key} is there already")));
            }
        }
        Ok(())
    });
    task.await.map_err(|error| Error::unavailable(format!("a put was broken off: {error}")))?
}

async fn all(puts: impl Iterator<Item = impl Future<Output = Result<()>>>) -> Result<()> {
    futures_util::stream::iter(puts).buffer_unordered(PUTS_MAX).try_for_each(|()| async { Ok(()) }).await
}
