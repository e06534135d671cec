//! Pure code on one core: decoding WAL, compressing it, making and reading objects.

use std::fmt::Write as _;
use std::hint::black_box;
use std::io::Read;

use walship::codec::Compression;

use super::Effort;
use crate::measure::{Contender, compete, in_process, table};
use crate::object;
use crate::wal::{Kind, SEGMENTS, Segment, pgbench};

const BYTES: u64 = (SEGMENTS as u64) * (16 << 20);

/// Record decoding, beside what merely touching every byte costs.
pub fn decoding(effort: Effort) -> String {
    let mut text = String::new();
    for kind in Kind::ALL {
        let segments = pgbench(kind);
        let records: u64 = segments.iter().map(|segment| object::scan(segment).counts.records).sum();
        let rows = compete(
            effort.rounds,
            vec![
                Contender::new(
                    "scan: pages, records, CRC-32C, summary",
                    in_process(|| for_each(&segments, |s| drop(black_box(object::scan(s))))),
                ),
                Contender::new(
                    "bare CRC-32C of the whole file",
                    in_process(|| {
                        for_each(&segments, |s| {
                            black_box(crc32c::crc32c(&s.bytes));
                        })
                    }),
                ),
                Contender::new(
                    "bare BLAKE3 of the whole file",
                    in_process(|| {
                        for_each(&segments, |s| {
                            black_box(blake3::hash(&s.bytes));
                        })
                    }),
                ),
            ],
        );
        let _ = write!(
            text,
            "\n{}: {SEGMENTS} segments, {records} records\n\n{}",
            kind.title(),
            table(&rows, Some(BYTES))
        );
    }
    text
}

/// Making whole objects, beside the bare codec.
pub fn encoding(effort: Effort) -> String {
    let mut text = String::new();
    for kind in Kind::ALL {
        let segments = pgbench(kind);
        for compression in [Compression::Lz4, Compression::Zstd(1)] {
            let rows = compete(
                effort.rounds,
                vec![
                    Contender::new(
                        format!("{compression} alone"),
                        in_process(|| for_each(&segments, |s| drop(black_box(bare(s, compression))))),
                    ),
                    Contender::new(
                        format!("{compression} object: scan, summary, digest, CRC"),
                        in_process(|| {
                            for_each(&segments, |s| drop(black_box(object::encode(s, compression))))
                        }),
                    ),
                ],
            );
            let _ = write!(
                text,
                "\n{}, {compression}: {:.2} of the bare codec's speed by the wall clock, {:.2} by CPU time\n\n{}",
                kind.title(),
                1.0 / rows[1].wall_ratio,
                1.0 / rows[1].cpu_ratio,
                table(&rows, Some(BYTES))
            );
        }
    }
    text
}

/// The codecs against one another: time to compress and to decompress, and what is left.
pub fn codecs(effort: Effort) -> String {
    let mut text = String::new();
    for kind in Kind::ALL {
        let segments = pgbench(kind);
        type Compress = fn(&[u8]) -> Vec<u8>;
        let contenders: [(&str, Compress); 6] = [
            ("lz4_flex", object::bare_lz4_flex),
            ("lz4 (C)", object::bare_lz4_c),
            ("zstd -1 (minus one)", |plain| object::bare_zstd(plain, -1)),
            ("zstd 1", |plain| object::bare_zstd(plain, 1)),
            ("zstd 3", |plain| object::bare_zstd(plain, 3)),
            ("zstd 6", |plain| object::bare_zstd(plain, 6)),
        ];
        let compressed: Vec<Vec<Vec<u8>>> = contenders
            .iter()
            .map(|(_, compress)| segments.iter().map(|segment| compress(&segment.bytes)).collect())
            .collect();
        let rows = compete(
            effort.rounds,
            contenders
                .iter()
                .map(|(name, compress)| {
                    Contender::new(
                        *name,
                        in_process(|| for_each(&segments, |s| drop(black_box(compress(&s.bytes))))),
                    )
                })
                .collect(),
        );
        let back = compete(
            effort.rounds,
            contenders
                .iter()
                .zip(&compressed)
                .map(|((name, _), frames)| {
                    let decompress: fn(&[u8], &mut [u8]) = match *name {
                        "lz4_flex" => lz4_flex_back,
                        "lz4 (C)" => lz4_c_back,
                        _ => zstd_back,
                    };
                    let mut plain = vec![0; 16 << 20];
                    let all =
                        move || frames.iter().for_each(|frame| decompress(frame, black_box(&mut plain)));
                    Contender::new(*name, in_process(all))
                })
                .collect(),
        );
        let _ = write!(
            text,
            "\n{}\n\n| codec | compress GB/s | ratio of time | decompress GB/s | ratio of time | left of 100 bytes |\n|---|---|---|---|---|---|\n",
            kind.title()
        );
        for ((row, back), frames) in rows.iter().zip(&back).zip(&compressed) {
            let left: usize = frames.iter().map(Vec::len).sum();
            let rate = |cpu: std::time::Duration| BYTES as f64 / cpu.as_secs_f64() / 1e9;
            let _ = writeln!(
                text,
                "| {} | {:.2} | {:.2} | {:.2} | {:.2} | {:.1} |",
                row.name,
                rate(row.cpu),
                row.cpu_ratio,
                rate(back.cpu),
                back.cpu_ratio,
                left as f64 / BYTES as f64 * 100.0
            );
        }
    }
    text
}

fn for_each(segments: &[Segment], work: impl FnMut(&Segment)) {
    segments.iter().for_each(work);
}

fn bare(segment: &Segment, compression: Compression) -> Vec<u8> {
    match compression {
        Compression::Lz4 => object::bare_lz4_flex(&segment.bytes),
        Compression::Zstd(level) => object::bare_zstd(&segment.bytes, i32::from(level)),
    }
}

fn lz4_flex_back(frame: &[u8], plain: &mut [u8]) {
    read_all(lz4_flex::frame::FrameDecoder::new(frame), plain);
}

fn lz4_c_back(frame: &[u8], plain: &mut [u8]) {
    read_all(lz4::Decoder::new(frame).expect("memory does not fail"), plain);
}

fn zstd_back(frame: &[u8], plain: &mut [u8]) {
    read_all(zstd::stream::read::Decoder::with_buffer(frame).expect("memory does not fail"), plain);
}

fn read_all(mut source: impl Read, plain: &mut [u8]) {
    source.read_exact(plain).expect("the frame holds a whole segment");
}
