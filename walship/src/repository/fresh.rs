//! The heads of segments that were stored through this handle just now: the index, which tells of them soon, need
//! not read them back.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use super::LineageRepository;
use super::segments::Summarized;
use crate::codec::{EncodedObject, ObjectHead, ObjectKind};
use crate::error::Result;
use crate::pg::{SegmentName, WalFileName};

/// How many heads are kept, each of 64 KiB at most: some more than the index takes at once.
const KEPT_MAX: usize = 48;

/// Clones share what is kept.
#[derive(Debug, Clone, Default)]
pub(super) struct Fresh(Arc<Mutex<VecDeque<(SegmentName, Bytes)>>>);

impl Fresh {
    /// Keeps the head of what was stored under its own key.
    pub(super) fn keep(&self, object: &EncodedObject) {
        let WalFileName::Segment(name) = object.envelope.name else { return };
        if object.envelope.kind != ObjectKind::Segment {
            return;
        }
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == KEPT_MAX {
            kept.pop_front();
        }
        kept.push_back((name, object.head.clone()));
    }

    fn head(&self, name: SegmentName) -> Option<Bytes> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.iter().find(|(kept, _)| *kept == name).map(|(_, head)| head.clone())
    }
}

impl LineageRepository {
    /// As [`LineageRepository::summarized`], without a request for what was stored just now.
    pub(super) async fn summarized_fresh(&self, name: SegmentName) -> Result<Option<Summarized>> {
        if let Some(head) = self.fresh.head(name)
            && let Ok(head) = ObjectHead::decode(&head)
        {
            let (digest, stored_bytes) = (head.envelope.digest.to_string(), head.object_bytes());
            if let Some(summary) = head.summary.filter(|summary| summary.segment == name) {
                return Ok(Some(Summarized { summary, digest, stored_bytes }));
            }
        }
        self.summarized(name).await
    }
}
