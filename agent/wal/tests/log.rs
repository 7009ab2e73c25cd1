//! Segments that real servers wrote, and damaged ones.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::path::PathBuf;

use agent_wal::kind::{create_tablespace, is_switch, restore_point};
use agent_wal::record::{
    EndReason, FeedError, PageFault, ReaderOptions, Record, RecordFault, RecordReader, Step,
};
use agent_wal::segment::{Expected, SegmentError, verify};
use agent_wal::{Flavour, Lsn, Major, SegmentName, SegmentSize};
use proptest::prelude::*;

/// A fixture and what its server said of it.
struct Log {
    major: u32,
    bytes: Vec<u8>,
    name: &'static str,
    system_identifier: u64,
    /// As `pg_create_restore_point` answered.
    point: &'static str,
    tablespace: u32,
    /// As `pg_switch_wal` answered.
    switch: &'static str,
}

macro_rules! log {
    ($major:literal, $name:literal, $system:literal, $point:literal, $tablespace:literal, $switch:literal) => {
        Log {
            major: $major,
            bytes: zstd::decode_all(&include_bytes!(concat!("fixtures/wal.", $major, ".zst"))[..])
                .unwrap(),
            name: $name,
            system_identifier: $system,
            point: $point,
            tablespace: $tablespace,
            switch: $switch,
        }
    };
}

fn logs() -> Vec<Log> {
    vec![
        log!(
            12,
            "00000001000000000000000B",
            7_710_626_966_641_678_937,
            "0/B06C80",
            16393,
            "0/B15490"
        ),
        log!(
            13,
            "00000001000000000000000B",
            7_710_626_977_450_818_233,
            "0/B07668",
            16393,
            "0/B16C50"
        ),
        log!(
            14,
            "00000001000000000000000C",
            7_710_626_987_254_401_817,
            "0/C08EA8",
            16392,
            "0/C17D58"
        ),
        log!(
            15,
            "00000001000000000000000A",
            7_710_626_997_054_397_305,
            "0/A08470",
            16392,
            "0/A17AD8"
        ),
        log!(
            16,
            "00000001000000000000000A",
            7_710_627_004_456_053_718,
            "0/A089B8",
            16392,
            "0/A17D70"
        ),
        log!(
            17,
            "00000001000000000000000A",
            7_710_627_012_325_137_459,
            "0/A07AA0",
            16392,
            "0/A16BF8"
        ),
        log!(
            18,
            "00000001000000000000000A",
            7_710_627_019_122_597_008,
            "0/A09140",
            16393,
            "0/A18A78"
        ),
    ]
}

fn size() -> SegmentSize {
    SegmentSize::new(1 << 20).unwrap()
}

fn lsn(text: &str) -> Lsn {
    text.parse().unwrap()
}

impl Log {
    fn name(&self) -> SegmentName {
        SegmentName::parse(self.name, size()).unwrap()
    }

    fn start(&self) -> Lsn {
        self.name().start_lsn(size())
    }

    fn expected(&self) -> Expected {
        Expected {
            system_identifier: self.system_identifier,
            segment_size: size(),
            name: self.name(),
            timelines: vec![1],
            flavour: Major::new(self.major).map(Flavour::PostgreSql),
        }
    }

    /// All records and what came after them.
    fn read(&self, bytes: &[u8]) -> (Vec<Record>, Step) {
        read(self.start(), self.name().number, bytes)
    }
}

fn read(near: Lsn, number: u64, bytes: &[u8]) -> (Vec<Record>, Step) {
    let mut reader = RecordReader::near(near, ReaderOptions::new(size()));
    let mut records = Vec::new();
    loop {
        match reader.step() {
            Step::Record(record) => records.push(record),
            Step::NeedSegment(needed) if needed == number => reader.feed(needed, bytes).unwrap(),
            end => return (records, end),
        }
    }
}

#[test]
fn real_segments_are_read_to_their_switch() {
    for log in logs() {
        let (records, end) = log.read(&log.bytes);
        let major = log.major;
        assert_eq!(end, Step::NeedSegment(log.name().number + 1), "{major}");
        for pair in records.windows(2) {
            assert_eq!(pair[1].previous, pair[0].start, "{major}");
            assert!(pair[0].end <= pair[1].start, "{major}");
        }
        let points: Vec<_> = records
            .iter()
            .filter_map(|r| Some((r.end, restore_point(r)?)))
            .collect();
        assert_eq!(points.len(), 1, "{major}");
        assert_eq!(points[0].0, lsn(log.point), "{major}");
        assert_eq!(points[0].1.name, "gs_pitr_fixture", "{major}");
        let seconds = points[0].1.time / 1_000_000;
        assert!((1_795_270_200..1_795_270_260).contains(&seconds), "{major}");

        let created: Vec<_> = records.iter().filter_map(create_tablespace).collect();
        let path = PathBuf::from("/tmp/gs_pitr_fixture/ts");
        assert_eq!(created, [(log.tablespace, path)], "{major}");

        let last = records.last().unwrap();
        assert!(is_switch(last), "{major}");
        assert_eq!(last.end, lsn(log.switch), "{major}");
        assert!(
            records.iter().any(|r| r.data.len() > 20_000),
            "{major}: none over several pages"
        );

        let verified = verify(&log.bytes, &log.expected()).unwrap();
        assert_eq!(
            verified.flavour,
            Flavour::PostgreSql(Major::new(major).unwrap())
        );
        assert_eq!(verified.switched, Some(lsn(log.switch)), "{major}");
        assert_eq!(verified.records, records.len() as u64, "{major}");
        assert_eq!(
            verified.first_record,
            Some(Lsn(log.start().0 + 40)),
            "{major}"
        );
    }
}

#[test]
fn reading_can_begin_at_any_record_and_on_any_page() {
    for log in logs() {
        let (records, _) = log.read(&log.bytes);
        for (at, record) in records.iter().enumerate() {
            let mut reader = RecordReader::new(record.start, ReaderOptions::new(size()));
            reader.feed(log.name().number, &log.bytes[..]).unwrap();
            assert_eq!(reader.step(), Step::Record(record.clone()));
            if at + 1 < records.len() {
                assert_eq!(reader.position(), record.end);
            }
            let (found, _) = read(record.end, log.name().number, &log.bytes);
            assert!(found.iter().zip(&records[at + 1..]).count() <= found.len());
            let later: Vec<_> = found
                .into_iter()
                .filter(|r| r.start >= record.end)
                .collect();
            assert_eq!(later, records[at + 1..]);
        }
    }
}

#[test]
fn a_log_goes_on_across_segments() {
    // The same segments cut off in the middle of the long record: the rest is asked for, and what is
    // there ends where it does.
    for log in logs() {
        let (records, _) = log.read(&log.bytes);
        let long = records.iter().find(|r| r.data.len() > 20_000).unwrap();
        let cut = usize::try_from(long.start.0 - log.start().0).unwrap() / 8192 * 8192 + 8192;
        let (before, end) = log.read(&log.bytes[..cut]);
        assert!(before.last().unwrap().end <= long.start);
        let Step::End(end) = end else {
            panic!("{end:?}")
        };
        assert_eq!(end.lsn, long.start);
        assert_eq!(end.reason, EndReason::Cut(Lsn(log.start().0 + cut as u64)));
    }
}

#[test]
fn another_segment_is_not_taken() {
    let log = &logs()[3];
    let number = log.name().number;
    let mut reader = RecordReader::new(log.start(), ReaderOptions::new(size()));
    assert_eq!(reader.step(), Step::NeedSegment(number));
    assert_eq!(
        reader.feed(number + 1, &log.bytes[..]),
        Err(FeedError::Number {
            given: number + 1,
            needed: number
        })
    );
    let too_much = vec![0; (1 << 20) + 1];
    assert_eq!(
        reader.feed(number, &too_much[..]),
        Err(FeedError::Length(too_much.len()))
    );
    let step = reader.step_with(|_| Ok::<_, ()>(Some(&log.bytes[..])));
    assert!(matches!(step, Ok(Step::Record(_))));
}

#[test]
fn positions_between_records_are_no_beginning() {
    let log = &logs()[6];
    for (offset, reason) in [(8, EndReason::Position), (44, EndReason::Position)] {
        let start = Lsn(log.start().0 + offset);
        let mut reader = RecordReader::new(start, ReaderOptions::new(size()));
        reader.feed(log.name().number, &log.bytes[..]).unwrap();
        let Step::End(end) = reader.step() else {
            panic!()
        };
        assert_eq!((end.lsn, end.reason), (start, reason));
        assert_eq!(reader.step(), Step::End(end));
    }
}

#[test]
fn verify_names_what_is_wrong() {
    fn fault(log: &Log, change: impl FnOnce(&mut Vec<u8>, &mut Expected)) -> (u64, EndReason) {
        let (mut bytes, mut expected) = (log.bytes.clone(), log.expected());
        change(&mut bytes, &mut expected);
        match verify(&bytes, &expected) {
            Err(SegmentError::Broken { offset, end }) => (offset, end.reason),
            other => panic!("{other:?}"),
        }
    }
    let page = |log: &Log, page: u64, fault| {
        let at = Lsn(log.start().0 + page * 8192);
        (page * 8192, EndReason::Page { at, fault })
    };
    for log in logs() {
        let log = &log;
        assert_eq!(
            fault(log, |_, e| e.system_identifier += 1),
            page(log, 0, PageFault::SystemIdentifier(log.system_identifier))
        );
        assert_eq!(
            fault(log, |_, e| e.name.number += 1),
            page(log, 0, PageFault::Address(log.start())).at_of(log.start().0 + (1 << 20))
        );
        assert_eq!(
            fault(log, |_, e| e.timelines = vec![2, 3]),
            page(log, 0, PageFault::Timeline(1))
        );
        let other = Major::new(if log.major == 12 { 13 } else { 12 });
        let magic = u16::from_le_bytes([log.bytes[0], log.bytes[1]]);
        assert_eq!(
            fault(log, |_, e| e.flavour = other.map(Flavour::PostgreSql)),
            page(log, 0, PageFault::Magic(magic))
        );
        // A page of the segment that had the file before.
        assert_eq!(
            fault(log, |b, _| b[3 * 8192 + 10] ^= 1),
            page(
                log,
                3,
                PageFault::Address(Lsn((log.start().0 + 3 * 8192) ^ (1 << 16)))
            )
        );
        assert_eq!(
            fault(log, |b, _| b[3 * 8192 + 4] = 2),
            page(log, 3, PageFault::Timeline(2))
        );
        // A page that was not written.
        assert_eq!(
            fault(log, |b, _| b[5 * 8192..6 * 8192].fill(0)),
            page(log, 5, PageFault::Magic(0))
        );
        let (_, reason) = fault(log, |b, _| b[2 * 8192 - 30] ^= 4);
        assert_eq!(reason, EndReason::Record(RecordFault::Crc));
    }
}

trait AtOf {
    fn at_of(self, address: u64) -> Self;
}

impl AtOf for (u64, EndReason) {
    /// The same with another address of the page.
    fn at_of(self, address: u64) -> Self {
        match self.1 {
            EndReason::Page { fault, .. } => (
                self.0,
                EndReason::Page {
                    at: Lsn(address),
                    fault,
                },
            ),
            reason => (self.0, reason),
        }
    }
}

#[test]
fn verify_wants_the_whole_segment_and_nothing_after_the_switch() {
    for log in logs() {
        let short = &log.bytes[..log.bytes.len() - 1];
        assert_eq!(
            verify(short, &log.expected()),
            Err(SegmentError::Length {
                found: short.len(),
                expected: 1 << 20
            })
        );
        let mut more = log.bytes.clone();
        *more.last_mut().unwrap() = 1;
        assert_eq!(
            verify(&more, &log.expected()),
            Err(SegmentError::AfterSwitch(lsn(log.switch)))
        );
        // Without its switch a segment that ends in zeros is one that was not written to its end.
        let mut unfinished = log.bytes.clone();
        let switch = usize::try_from(lsn(log.switch).0 - log.start().0).unwrap() - 24;
        unfinished[switch..].fill(0);
        let error = verify(&unfinished, &log.expected()).unwrap_err();
        assert!(
            matches!(error, SegmentError::Broken { offset, end } if offset == switch as u64
                && end.reason == EndReason::Nothing),
            "{error}"
        );
    }
}

#[test]
fn any_change_to_what_was_written_is_found() {
    // Every byte of one log up to its switch; the others by chance, below. What no checksum covers: 4
    // bytes of padding after a page's header, up to 7 after each record, and the flag XLP_BKP_REMOVABLE.
    // None of them means anything.
    let mut missed: BTreeMap<&str, usize> = BTreeMap::new();
    let log = &logs()[3];
    let (records, _) = log.read(&log.bytes);
    let used = usize::try_from(lsn(log.switch).0 - log.start().0).unwrap();
    let expected = log.expected();
    let mut bytes = log.bytes.clone();
    for at in (0..used).step_by(7) {
        bytes[at] ^= 4;
        if verify(&bytes, &expected).is_ok() {
            let in_page = at % 8192;
            let position = log.start().0 + at as u64;
            let record = records.iter().rev().find(|r| r.start.0 <= position);
            let what = match record {
                _ if (20..24).contains(&in_page) => "page padding",
                _ if in_page == 2 => "flag",
                Some(r) if r.end.0 - position < 8 => "record padding",
                _ => panic!("byte {at} was changed unseen"),
            };
            *missed.entry(what).or_default() += 1;
        }
        bytes[at] ^= 4;
    }
    assert!(missed.values().sum::<usize>() < used / 7 / 20, "{missed:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn damage_ends_the_log_and_nothing_else(
        which in 0usize..7,
        changes in proptest::collection::vec((0usize..100_000, any::<u8>()), 1..20),
        cut in 0usize..(1 << 20),
    ) {
        let log = &logs()[which];
        let mut bytes = log.bytes.clone();
        for (at, value) in &changes {
            bytes[*at] = *value;
        }
        let (original, _) = log.read(&log.bytes);
        let first = changes.iter().map(|(at, _)| *at as u64).min().unwrap_or(0);
        let (records, _) = log.read(&bytes);
        // Everything before the first change is read as it was.
        let before = |r: &&Record| r.end.0 - log.start().0 < first / 8192 * 8192;
        let sound: Vec<_> = original.iter().filter(before).collect();
        prop_assert!(records.iter().zip(&sound).all(|(a, b)| a == *b));
        prop_assert!(records.len() >= sound.len());
        let (_, end) = log.read(&bytes[..cut]);
        let stops = matches!(end, Step::End(_) | Step::NeedSegment(_));
        prop_assert!(stops);
        let _ = verify(&bytes, &log.expected());
    }

    #[test]
    fn any_bytes_can_be_read(
        bytes in proptest::collection::vec(any::<u8>(), 0..40_000),
        start in any::<u64>(),
        page_magic in 0usize..7,
    ) {
        let mut bytes = bytes;
        let size = size();
        let number = size.number_of(Lsn(start));
        // Good page headers, so that the garbage is taken for records.
        let magic = logs()[page_magic].bytes[..2].to_vec();
        let first = size.start_of(number).0;
        for (index, page) in bytes.chunks_mut(8192).enumerate() {
            if page.len() >= 40 && index % 3 < 2 {
                page[..2].copy_from_slice(&magic);
                page[2..4].copy_from_slice(&[if index == 0 { 2 } else { 0 }, 0]);
                page[4..8].copy_from_slice(&1u32.to_le_bytes());
                page[8..16].copy_from_slice(&(first + index as u64 * 8192).to_le_bytes());
                page[16..20].fill(0);
                if index == 0 {
                    page[32..36].copy_from_slice(&(1u32 << 20).to_le_bytes());
                    page[36..40].copy_from_slice(&8192u32.to_le_bytes());
                }
            }
        }
        for near in [Lsn(start), Lsn(first), Lsn(first + 40)] {
            let (records, _) = read(near, number, &bytes);
            prop_assert!(records.is_empty());
            let mut reader = RecordReader::new(near, ReaderOptions::new(size));
            reader.feed(number, &bytes[..]).unwrap();
            let step = reader.step();
            prop_assert!(matches!(step, Step::End(_)));
        }
    }
}
