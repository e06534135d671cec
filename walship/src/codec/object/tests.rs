use proptest::prelude::*;

use super::*;
use crate::codec::beside::CHUNK_BYTES;
use crate::codec::{Codec, ObjectHead, ObjectKind};
use crate::pg::SegmentSize;

const COMPRESSIONS: [Compression; 3] = [Compression::Lz4, Compression::Zstd(1), Compression::Zstd(9)];

fn encode(plain: &[u8], compression: Compression) -> (Envelope, Vec<u8>) {
    let mut body = Vec::new();
    let mut seen = Vec::new();
    let encoded = encode_body(&mut &plain[..], plain.len() as u64, compression, &mut body, &mut |bytes| {
        seen.extend_from_slice(bytes);
    })
    .unwrap();
    assert_eq!(seen, plain, "the observer sees every byte once");
    let envelope = Envelope {
        kind: ObjectKind::Partial,
        name: "000000010000000A0000004C.partial".parse().unwrap(),
        codec: compression.codec(),
        segment_size: SegmentSize::DEFAULT,
        system_identifier: 7_123_456_789_012_345_678,
        plain_bytes: encoded.plain_bytes,
        body_bytes: encoded.body_bytes,
        body_crc: encoded.body_crc,
        digest: encoded.digest,
    };
    (envelope, body)
}

fn decode(envelope: &Envelope, mut body: &[u8]) -> Result<Vec<u8>> {
    let mut plain = Vec::new();
    decode_body(envelope, &mut body, &mut plain).map(|()| plain)
}

fn compressible(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|i| if i % 97 < 60 { 0 } else { (i * i % 251) as u8 }).collect()
}

#[test]
fn round_trips_are_byte_identical() {
    for compression in COMPRESSIONS {
        for bytes in [0, 1, 15, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 << 20] {
            let plain = compressible(bytes);
            let (envelope, body) = encode(&plain, compression);
            assert_eq!(envelope.digest, Digest::of(&plain));
            assert_eq!(envelope.body_crc, crc32fast::hash(&body));
            assert_eq!(decode(&envelope, &body).unwrap(), plain, "{compression} {bytes}");
        }
    }
}

#[test]
fn a_source_of_another_length_is_refused() {
    for declared in [0, 9, 11] {
        let error =
            encode_body(&mut &[7u8; 10][..], declared, Compression::Lz4, &mut Vec::new(), &mut |_| ())
                .unwrap_err();
        assert!(matches!(error, Error::Mismatch(_)), "{declared}: {error}");
    }
}

#[test]
fn every_truncation_and_extension_is_corrupt() {
    for compression in COMPRESSIONS {
        let (envelope, body) = encode(&compressible(5000), compression);
        for length in 0..body.len() {
            assert!(
                matches!(decode(&envelope, &body[..length]), Err(Error::Corrupt(_))),
                "{compression} {length}"
            );
        }
        // What lies behind the declared body is not looked at here: the object's length is the caller's check.
        let longer = Envelope { body_bytes: envelope.body_bytes + 4, ..envelope.clone() };
        let mut extended = body.clone();
        extended.extend([0; 4]);
        assert!(matches!(decode(&longer, &extended), Err(Error::Corrupt(_))), "{compression}");
        let mut twice = body.clone();
        twice.extend(&body);
        let double = Envelope { body_bytes: twice.len() as u64, plain_bytes: 10_000, ..envelope.clone() };
        assert!(matches!(decode(&double, &twice), Err(Error::Corrupt(_))), "{compression}: two frames");
    }
}

#[test]
fn a_flipped_bit_is_corrupt() {
    for compression in COMPRESSIONS {
        let (envelope, body) = encode(&compressible(3000), compression);
        let ends = |byte: usize| byte < 24 || byte + 12 >= body.len();
        // Every bit of the frame's header and end, one of each byte between them.
        for bit in (0..body.len() * 8).filter(|bit| ends(bit / 8) || bit % 8 == bit / 8 % 8) {
            let mut flipped = body.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(matches!(decode(&envelope, &flipped), Err(Error::Corrupt(_))), "{compression} bit {bit}");
        }
    }
}

#[test]
fn a_decompression_bomb_stops_at_the_declared_length() {
    struct Counter(u64);
    impl Write for Counter {
        fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
            self.0 += buffer.len() as u64;
            Ok(buffer.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    for compression in COMPRESSIONS {
        let bomb = vec![0; 64 << 20];
        let (envelope, body) = encode(&bomb, compression);
        let lying = Envelope { plain_bytes: 1 << 20, ..envelope };
        let mut sink = Counter(0);
        assert!(matches!(decode_body(&lying, &mut &body[..], &mut sink), Err(Error::Corrupt(_))));
        assert!(sink.0 <= (1 << 20) + CHUNK_BYTES as u64, "{compression}: {}", sink.0);
    }
}

#[test]
fn the_other_codecs_frame_is_corrupt() {
    let (envelope, body) = encode(b"abc", Compression::Lz4);
    assert!(decode(&Envelope { codec: Codec::Zstd, ..envelope }, &body).is_err());
}

#[test]
fn heads_round_trip_and_every_flipped_bit_is_found() {
    let (envelope, _) = encode(&compressible(3000), Compression::Zstd(3));
    let bytes = ObjectHead::encode(&envelope, None).unwrap();
    let head = ObjectHead::decode(&bytes).unwrap();
    assert_eq!(head, ObjectHead { envelope, summary: None, head_bytes: ObjectHead::ENVELOPE_BYTES as u64 });
    for bit in 0..bytes.len() * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert!(matches!(ObjectHead::decode(&flipped), Err(Error::Corrupt(_))), "bit {bit}");
    }
    for length in 0..bytes.len() {
        assert!(matches!(ObjectHead::decode(&bytes[..length]), Err(Error::Corrupt(_))));
    }
}

/// Changes a head's bytes and makes its CRC right again, as a hostile store would.
fn forged(bytes: &[u8], change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    change(&mut bytes);
    let crc = crc32fast::hash(&bytes[..156]);
    bytes[156..160].copy_from_slice(&crc.to_le_bytes());
    bytes
}

#[test]
fn hostile_heads_are_refused() {
    let (envelope, _) = encode(b"x", Compression::Lz4);
    let good = ObjectHead::encode(&envelope, None).unwrap();
    let absurd = u64::MAX.to_le_bytes();
    type Change = fn(&mut [u8], &[u8; 8]);
    let changes: [(&str, Change); 10] = [
        ("version 0", |b, _| b[16..18].fill(0)),
        ("kind", |b, _| b[18] = 9),
        ("kind and name", |b, _| b[18] = 1),
        ("codec", |b, _| b[19] = 0),
        ("summary length", |b, x| b[20..24].copy_from_slice(&x[..4])),
        ("plain length", |b, x| b[32..40].copy_from_slice(x)),
        ("body length", |b, x| b[40..48].copy_from_slice(x)),
        ("segment size", |b, _| b[56..60].copy_from_slice(&3u32.to_le_bytes())),
        ("name", |b, _| b[96..104].copy_from_slice(b"../../et")),
        ("reserved", |b, _| b[150] = 1),
    ];
    for (what, change) in changes {
        let bytes = forged(&good, |bytes| change(bytes, &absurd));
        assert!(matches!(ObjectHead::decode(&bytes), Err(Error::Corrupt(_))), "{what}");
    }
    let newer = forged(&good, |bytes| bytes[16] = 2);
    assert!(ObjectHead::decode(&newer).unwrap_err().to_string().contains("format 2"));
    let encrypted = forged(&good, |bytes| bytes[24] = 1);
    assert!(matches!(ObjectHead::decode(&encrypted), Err(Error::Mismatch(_))));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_bytes_round_trip(plain in prop::collection::vec(any::<u8>(), 0..70_000), which in 0usize..3) {
        let (envelope, body) = encode(&plain, COMPRESSIONS[which]);
        prop_assert_eq!(decode(&envelope, &body).unwrap(), plain);
    }

    #[test]
    fn any_bytes_decode_without_panic(body in prop::collection::vec(any::<u8>(), 0..3000), zstd in any::<bool>()) {
        let (envelope, _) = encode(b"abc", if zstd { Compression::Zstd(1) } else { Compression::Lz4 });
        let magic: &[u8] = if zstd { &[0x28, 0xB5, 0x2F, 0xFD] } else { &[0x04, 0x22, 0x4D, 0x18] };
        let body = [magic, &body].concat();
        let envelope = Envelope { body_bytes: body.len() as u64, body_crc: crc32fast::hash(&body), ..envelope };
        prop_assert!(decode(&envelope, &body).is_err());
        let _ = ObjectHead::decode(&body);
    }
}

/// The worked hexdump in docs/repository-format.md is this object, byte for byte.
#[test]
fn the_documented_hexdump_is_true() {
    let plain = b"1\t0/5000000\tno recovery target specified\n";
    let mut body = Vec::new();
    let encoded =
        encode_body(&mut &plain[..], plain.len() as u64, Compression::Lz4, &mut body, &mut |_| ()).unwrap();
    let envelope = Envelope {
        kind: ObjectKind::History,
        name: "00000002.history".parse().unwrap(),
        codec: Codec::Lz4,
        segment_size: SegmentSize::DEFAULT,
        system_identifier: 0,
        plain_bytes: encoded.plain_bytes,
        body_bytes: encoded.body_bytes,
        body_crc: encoded.body_crc,
        digest: encoded.digest,
    };
    let mut object = ObjectHead::encode(&envelope, None).unwrap();
    object.extend(body);
    let line = |(number, bytes): (usize, &[u8])| {
        let hex: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let text = bytes.iter().map(|byte| if (32..127).contains(byte) { char::from(*byte) } else { '.' });
        format!("    {:08x}  {:<47}  {}\n", number * 16, hex.join(" "), text.collect::<String>())
    };
    let dump: String = object.chunks(16).enumerate().map(line).collect();
    let document = include_str!("../../../../docs/repository-format.md");
    assert!(document.contains(&dump), "docs/repository-format.md should hold:\n{dump}");
}
