//! One connection: stream, timeline after timeline, until it breaks or it is time to stop.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};

use super::prepare::no_archive;
use super::segments::{Before, OpenSegment};
use super::spooled::Again;
use super::{ReceiveEvent, Receiver, stopped};
use crate::error::{Error, Result};
use crate::feed::{Conversation, Cutter, Start, TailCutter, Verdict, clock_text};
use crate::pg::{Lsn, SegmentName};
use crate::replication::Connection;
use crate::replication::stream::{
    NextTimeline, StandbyStatus, StreamMessage, end_streaming, next_streamed, send_status, start_streaming,
};

/// Bytes are waited for in a loop that has its own clock: this is only a bound.
const READ_PATIENCE: Duration = Duration::from_secs(3600);

/// Why a session ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// It was time to stop.
    Stopped,
    /// The stores take nothing: the server is left alone meanwhile.
    Stalled,
}

/// Why streaming one timeline ended.
enum Turn {
    Timeline(NextTimeline),
    Ended(Ended),
}

/// What is being streamed.
struct Streaming {
    cutter: Cutter,
    first: SegmentName,
    open: Option<OpenSegment>,
    /// The segment that is received, as far as the spool had it before.
    again: Option<Again>,
    tail: TailCutter,
    talk: Conversation,
    /// Since when nothing is taken because too much is on its way.
    full_since: Option<Duration>,
    next_report: Duration,
}

impl Receiver {
    /// Streams from `start` on until the session ends.
    pub(super) async fn talk(&mut self, connection: &mut Connection, mut start: Start) -> Result<Ended> {
        loop {
            self.report.host = Some(connection.host().to_string());
            self.report.timeline = Some(start.timeline);
            self.report.received_lsn = start.lsn;
            let begun = start_streaming(connection, &self.options.slot, start.timeline, start.lsn).await;
            let next = match begun.map_err(|error| self.streaming_failed(connection, error, start.lsn))? {
                Some(next) => next,
                None => {
                    (self.progress)(ReceiveEvent::Streaming {
                        host: connection.host().to_string(),
                        timeline: start.timeline,
                        start: start.lsn,
                    });
                    self.report.sessions += 1;
                    self.report.streaming = true;
                    match self.stream(connection, start).await? {
                        Turn::Timeline(next) => next,
                        Turn::Ended(ended) => return Ok(ended),
                    }
                }
            };
            start = self.switch(connection, start, next).await?;
        }
    }

    /// Goes over to the next timeline: everything of the old one is durable before.
    async fn switch(&mut self, connection: &mut Connection, old: Start, next: NextTimeline) -> Result<Start> {
        let NextTimeline { timeline, switch_lsn } = next;
        if timeline <= old.timeline {
            return Err(Error::corrupt(format!("the server names {timeline:?} after {:?}", old.timeline)));
        }
        while self.archive.as_ref().is_some_and(|archive| !archive.uploads.is_empty()) {
            let archive = self.archive.as_mut().ok_or_else(no_archive)?;
            tokio::select! {
                stored = archive.next() => self.note(stored?),
                _ = stopped(&mut self.stop) => return Err(Error::unavailable("it is time to stop")),
            }
        }
        self.store_history(connection, timeline).await?;
        let archive = self.archive.as_mut().ok_or_else(no_archive)?;
        let size = archive.size;
        let start = Start { timeline, lsn: Lsn(switch_lsn.0 - size.offset_of(switch_lsn)) };
        archive.next = Some(start);
        // The new timeline's first segment begins with the old one's bytes: durable is what is stored as its own.
        archive.frontier.go_back(start.lsn);
        self.report.durable_lsn = archive.frontier.durable();
        (self.progress)(ReceiveEvent::Switched { from: old.timeline, to: timeline, switch_lsn });
        Ok(start)
    }

    async fn stream(&mut self, connection: &mut Connection, start: Start) -> Result<Turn> {
        let now = self.started.elapsed();
        let size = self.archive.as_ref().ok_or_else(no_archive)?.size;
        let mut streaming = Streaming {
            cutter: Cutter::new(start.timeline, start.lsn, size),
            first: SegmentName::containing(start.timeline, start.lsn, size),
            open: None,
            again: None,
            tail: TailCutter::new(self.options.tail, size),
            talk: Conversation::new(self.options.rules, now),
            full_since: None,
            next_report: now,
        };
        loop {
            let now = self.started.elapsed();
            let received = streaming.cutter.position();
            if self.is_done() || *self.stop.borrow() {
                return self.drain(connection, &mut streaming).await.map(Turn::Ended);
            }
            match streaming.talk.verdict(now, self.report.durable_lsn, received) {
                Verdict::Stay => {}
                Verdict::Silent => {
                    return Err(Error::unavailable(format!("{} has fallen silent", connection.host())));
                }
                Verdict::KeptWaiting => {
                    return Err(Error::unavailable(format!(
                        "{} shuts down, and not all of its WAL is durable here yet",
                        connection.host()
                    ))
                    .with_safe("it was told nothing that is not so: the slot keeps the rest"));
                }
            }
            self.speak(connection, &mut streaming, now).await?;
            if now >= streaming.next_report {
                streaming.next_report = now + self.options.report_interval;
                self.tell();
            }
            self.ship(&mut streaming, now)?;
            let archive = self.archive.as_mut().ok_or_else(no_archive)?;
            let full = streaming.tail.is_full()
                || streaming.open.is_none()
                    && !archive.uploads.have_room(self.options.uploads_max, archive.size);
            if !full {
                streaming.full_since = None;
            } else if now.saturating_sub(*streaming.full_since.get_or_insert(now))
                >= self.options.rules.stop_patience
            {
                // Not listening, we would not notice that the server wants to shut down.
                return Ok(Turn::Ended(Ended::Stalled));
            }
            let mut look = streaming.talk.next_look(now).min(streaming.next_report.saturating_sub(now));
            let may_ship = archive.spooled.as_ref().is_none_or(|spooled| spooled.spool.has_room());
            if may_ship && let Some(next) = streaming.tail.next_look(now, archive.uploads.under_way()) {
                look = look.min(next);
            }
            if full {
                look = look.min(self.options.rules.stop_patience);
            }
            let less_held = archive.uploads.less_held();
            tokio::select! {
                biased;
                stored = archive.next() => self.note(stored?),
                () = less_held, if full => {}
                message = next_streamed(connection, READ_PATIENCE), if !full => {
                    let message = message.map_err(|error| self.streaming_failed(connection, error, received))?;
                    if let Some(turn) = self.heard(connection, &mut streaming, message).await? {
                        return Ok(turn);
                    }
                }
                () = sleep(look) => {}
                () = stopped(&mut self.stop) => {}
            }
        }
    }

    /// Says that what follows waits for stores, however long they take: no report comes every second any more.
    fn streams_no_more(&mut self) {
        self.report.streaming = false;
        self.tell();
    }

    /// Ships what is due of the open segment.
    fn ship(&mut self, streaming: &mut Streaming, now: Duration) -> Result<()> {
        let archive = self.archive.as_mut().ok_or_else(no_archive)?;
        let spool = archive.spooled.as_ref().map(|spooled| &spooled.spool);
        while spool.is_none_or(|spool| spool.has_room())
            && let Some(part) = streaming.tail.take(now, archive.uploads.under_way())
        {
            match spool {
                Some(spool) => archive.uploads.spool(part, self.options.compression, spool),
                None => archive.uploads.part(part, self.options.compression),
            }
        }
        Ok(())
    }

    /// Tells the server where we are, when it is time to.
    async fn speak(
        &self,
        connection: &mut Connection,
        streaming: &mut Streaming,
        now: Duration,
    ) -> Result<()> {
        // Never more than this server has sent: behind the end of a timeline, what a dead primary wrote before may
        // be durable at positions that are other WAL on this server's path.
        let durable = self.report.durable_lsn.min(streaming.cutter.position());
        let Some(reply_requested) = streaming.talk.speak(now, durable) else { return Ok(()) };
        let status = StandbyStatus { write: durable, flush: durable, reply_requested };
        send_status(connection, status, chrono::Utc::now().timestamp_micros()).await
    }

    /// Deals with one message.
    async fn heard(
        &mut self,
        connection: &mut Connection,
        streaming: &mut Streaming,
        message: StreamMessage,
    ) -> Result<Option<Turn>> {
        let now = self.started.elapsed();
        match message {
            StreamMessage::Wal { mut start, server, sent_micros, mut bytes } => {
                self.heard_clock(connection, now, sent_micros);
                streaming.talk.heard_wal(now);
                streaming.tail.server_is_at(server);
                self.report.received_bytes += bytes.len() as u64;
                while let Some(piece) = streaming.cutter.take(&mut start, &mut bytes)? {
                    if self.archive.as_ref().is_some_and(|archive| archive.spooled.is_some()) {
                        if let Some(piece) = self.not_in_the_spool(&mut streaming.again, piece).await? {
                            streaming.tail.add(&piece, now);
                        }
                        continue;
                    }
                    streaming.tail.add(&piece, now);
                    let open = match streaming.open.take() {
                        Some(open) => open,
                        None => self.open(piece.segment)?,
                    };
                    let open = streaming.open.insert(open);
                    open.push(piece.bytes).await?;
                    if piece.completes
                        && let Some(open) = streaming.open.take()
                    {
                        // The first one of a session may have parts that were shipped before.
                        let first = streaming.first == piece.segment;
                        let in_parts = first || streaming.tail.ships(piece.segment);
                        self.close(
                            piece.segment,
                            open,
                            if in_parts { Before::Parts } else { Before::Nothing },
                        )?;
                    }
                }
                self.report.received_lsn = streaming.cutter.position();
                self.report.server_lsn = self.report.server_lsn.max(server).max(self.report.received_lsn);
                Ok(None)
            }
            StreamMessage::Keepalive { sent, sent_micros, reply_requested } => {
                self.heard_clock(connection, now, sent_micros);
                streaming.talk.heard_keepalive(now, reply_requested);
                if reply_requested {
                    streaming.tail.hurry();
                }
                self.report.server_lsn = self.report.server_lsn.max(sent);
                Ok(None)
            }
            StreamMessage::ServerStopped => {
                Err(Error::unavailable(format!("{} has shut down", connection.host())))
            }
            StreamMessage::End => {
                let next = end_streaming(connection, true).await?.ok_or_else(|| {
                    Error::unavailable(format!("{} ended the stream without a word", connection.host()))
                })?;
                self.streams_no_more();
                self.end_timeline(streaming, next.switch_lsn).await?;
                Ok(Some(Turn::Timeline(next)))
            }
        }
    }

    /// Says when the server's clock is not ours.
    fn heard_clock(&mut self, connection: &Connection, now: Duration, sent_micros: i64) {
        let ahead = self.clock.heard(now, sent_micros, chrono::Utc::now().timestamp_micros());
        if let Some(ahead) = ahead {
            let text = clock_text(&connection.host().to_string(), ahead);
            (self.progress)(ReceiveEvent::Warning(format!("{text}. Set both clocks right")));
        }
    }

    fn open(&self, name: SegmentName) -> Result<OpenSegment> {
        let archive = self.archive.as_ref().ok_or_else(no_archive)?;
        Ok(archive.uploads.open(name, archive.size, &archive.push))
    }

    /// A segment is whole.
    fn close(&mut self, name: SegmentName, open: OpenSegment, before: Before) -> Result<()> {
        let archive = self.archive.as_mut().ok_or_else(no_archive)?;
        archive.uploads.segment(name, archive.size, open.close(), before);
        archive.next = Some(Start { timeline: name.timeline, lsn: name.end(archive.size) });
        self.report.uploads = archive.uploads.segments();
        Ok(())
    }

    /// Keeps the last bytes of a timeline that ended at `switch_lsn`.
    async fn end_timeline(&mut self, streaming: &mut Streaming, switch_lsn: Lsn) -> Result<()> {
        let position = streaming.cutter.position();
        if position != switch_lsn {
            return Err(Error::corrupt(format!(
                "the server ends {:?} at {switch_lsn}, and has sent WAL up to {position}",
                streaming.cutter.timeline()
            )));
        }
        loop {
            streaming.tail.hurry();
            self.ship(streaming, self.started.elapsed())?;
            let archive = self.archive.as_mut().ok_or_else(no_archive)?;
            // The spool is told of the end when it has everything.
            let waits = archive.spooled.is_some() && !archive.uploads.is_empty();
            if streaming.tail.is_empty() && !waits {
                break;
            }
            tokio::select! {
                stored = archive.next() => self.note(stored?),
                _ = stopped(&mut self.stop) => return Err(Error::unavailable("it is time to stop")),
            }
        }
        self.end_in_the_spool(streaming.cutter.segment(), switch_lsn).await?;
        let Some(mut open) = streaming.open.take() else { return Ok(()) };
        let archive = self.archive.as_mut().ok_or_else(no_archive)?;
        open.fill_up(archive.size).await?;
        let name = streaming.cutter.segment();
        archive.uploads.last_segment(name, switch_lsn, archive.size, open.close());
        self.report.uploads = archive.uploads.segments();
        Ok(())
    }

    /// Lets what is on its way become durable, tells the server, and takes leave.
    async fn drain(&mut self, connection: &mut Connection, streaming: &mut Streaming) -> Result<Ended> {
        // What was received of it is sent again next time; its parts are durable.
        streaming.open = None;
        self.streams_no_more();
        let deadline = Instant::now() + self.options.drain_max;
        loop {
            let now = self.started.elapsed();
            streaming.tail.hurry();
            self.ship(streaming, now)?;
            self.speak(connection, streaming, now).await?;
            let look = deadline.min(Instant::now() + streaming.talk.next_look(now));
            let archive = self.archive.as_mut().ok_or_else(no_archive)?;
            if archive.uploads.is_empty() || Instant::now() >= deadline {
                break;
            }
            if let Ok(stored) = timeout_at(look, archive.next()).await {
                self.note(stored?);
            }
        }
        // A server that is gone meanwhile does not matter.
        let _ = end_streaming(connection, false).await;
        Ok(Ended::Stopped)
    }
}
