//! Segments and control files of openGauss: those that a server of release 5.0.0 wrote, and others built as its source
//! writes them (`CopyXLogRecordToWAL`, `AdvanceXLInsertBuffer`, `WriteControlFile` of
//! `src/gausskernel/storage/access/transam/xlog.cpp`), for what a recording does not have.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::path::PathBuf;

use agent_wal::control::{ControlError, ControlFile, DbState};
use agent_wal::kind::{create_tablespace, is_switch, restore_point, shutdown_checkpoint};
use agent_wal::record::{
    EndReason, PageFault, ReaderOptions, Record, RecordFault, RecordReader, Step,
};
use agent_wal::segment::{Expected, SegmentError, verify};
use agent_wal::{Flavour, Lsn, SegmentName, SegmentSize};
use proptest::prelude::*;

const SYSTEM: u64 = 215_046_882_207_012_340;
const PAGE: usize = 8192;
const SIZE: usize = 16 << 20;
/// Segment 13 of the recorded server.
const NUMBER: u64 = 0x13;

fn lsn(text: &str) -> Lsn {
    text.parse().unwrap()
}

/// Writes a log as openGauss does.
struct Log {
    bytes: Vec<u8>,
    at: usize,
    previous: u64,
}

impl Log {
    /// A segment that begins with `continued` bytes of a record from the segment before.
    fn new(continued: &[u8], missing: usize) -> Self {
        let mut log = Self {
            bytes: vec![0; SIZE],
            at: 0,
            previous: NUMBER * SIZE as u64 - 0x40,
        };
        log.page(missing);
        log.bytes[log.at..log.at + continued.len()].copy_from_slice(continued);
        log.at = (log.at + continued.len()).next_multiple_of(8);
        log
    }

    fn start() -> u64 {
        NUMBER * SIZE as u64
    }

    fn lsn(&self) -> Lsn {
        Lsn(Self::start() + self.at as u64)
    }

    /// `AdvanceXLInsertBuffer`
    fn page(&mut self, missing: usize) {
        let address = Self::start() + self.at as u64;
        let long = self.at == 0;
        let flags: u16 = 4 | if long { 2 } else { 0 } | u16::from(missing > 0);
        let head = &mut self.bytes[self.at..];
        head[..2].copy_from_slice(&0xD074_u16.to_le_bytes());
        head[2..4].copy_from_slice(&flags.to_le_bytes());
        head[4..8].copy_from_slice(&1_u32.to_le_bytes());
        head[8..16].copy_from_slice(&address.to_le_bytes());
        head[16..20].copy_from_slice(&u32::try_from(missing).unwrap().to_le_bytes());
        if long {
            head[24..32].copy_from_slice(&SYSTEM.to_le_bytes());
            head[32..36].copy_from_slice(&u32::try_from(SIZE).unwrap().to_le_bytes());
            head[36..40].copy_from_slice(&8192_u32.to_le_bytes());
        }
        self.at += if long { 40 } else { 24 };
    }

    /// The header that [`Log::write`] puts before a body.
    fn record(&self, rmid: u8, info: u8, body: &[u8]) -> Vec<u8> {
        let mut record = vec![0; 28];
        let length = u32::try_from(32 + body.len()).unwrap();
        record[..4].copy_from_slice(&length.to_le_bytes());
        record[4..8].copy_from_slice(&7_u32.to_le_bytes()); // xl_term
        record[8..16].copy_from_slice(&0x1_0000_3395_u64.to_le_bytes());
        record[16..24].copy_from_slice(&self.previous.to_le_bytes());
        record[24] = info;
        record[25] = rmid;
        record[26..28].copy_from_slice(&0xFFFF_u16.to_le_bytes()); // xl_bucket_id
        let crc = crc32c::crc32c_append(crc32c::crc32c(body), &record);
        record.extend_from_slice(&crc.to_le_bytes());
        record.extend_from_slice(body);
        record
    }

    /// `CopyXLogRecordToWAL`; start and end.
    fn write(&mut self, rmid: u8, info: u8, body: &[u8]) -> (Lsn, Lsn) {
        let record = self.record(rmid, info, body);
        if self.at.is_multiple_of(PAGE) {
            self.page(0);
        }
        let start = self.lsn();
        let mut rest = &record[..];
        while !rest.is_empty() {
            let room = PAGE - self.at % PAGE;
            if room == PAGE {
                self.page(rest.len());
                continue;
            }
            let (now, later) = rest.split_at(room.min(rest.len()));
            self.bytes[self.at..self.at + now.len()].copy_from_slice(now);
            self.at += now.len();
            rest = later;
        }
        self.at = self.at.next_multiple_of(8);
        self.previous = start.0;
        (start, self.lsn())
    }

    fn point(&mut self, name: &str) -> (Lsn, Lsn) {
        let mut data = vec![255, 72];
        data.extend_from_slice(&(848_579_984_155_204_i64).to_le_bytes());
        let mut padded = name.as_bytes().to_vec();
        padded.resize(64, 0);
        data.extend(padded);
        self.write(0, 0x70, &data)
    }

    /// A record of a page with an image, in the layout of 5.0.0, and one that is no layout of ours at all.
    fn blocks(&mut self) {
        let mut body = vec![0, 0x30, 4, 0]; // block 0, image and data, 4 bytes of data
        body.extend([10, 0, 0x0F, 0x1F]); // hole
        body.extend([0; 12]); // RelFileNodeOld
        body.extend([0; 2 + 4 + 8]); // extra_flag, block number, last_lsn
        body.extend([255, 3]);
        body.extend(vec![9; PAGE - 0x1F0F]);
        body.extend([1, 2, 3, 4, 5, 6, 7]);
        self.write(10, 0x00, &body);
        self.write(10, 0x20, &[0xC1; 300]);
    }

    /// The switch, and the pages behind it that were prepared.
    fn switch(&mut self) -> Lsn {
        let (_, end) = self.write(0, 0x40, &[]);
        self.at = self.at.next_multiple_of(PAGE);
        while self.at < SIZE {
            self.page(0);
            self.at = self.at.next_multiple_of(PAGE);
        }
        end
    }
}

fn size() -> SegmentSize {
    SegmentSize::new(SIZE as u64).unwrap()
}

fn expected() -> Expected {
    Expected {
        system_identifier: SYSTEM,
        segment_size: size(),
        name: SegmentName::parse("000000010000000000000013", size()).unwrap(),
        timelines: vec![1],
        flavour: Some(Flavour::OpenGauss),
    }
}

fn read(bytes: &[u8]) -> (Vec<Record>, Step) {
    let start = Lsn(Log::start());
    let mut reader = RecordReader::near(start, ReaderOptions::new(size()));
    let mut records = Vec::new();
    loop {
        match reader.step() {
            Step::Record(record) => records.push(record),
            Step::NeedSegment(NUMBER) => reader.feed(NUMBER, bytes).unwrap(),
            end => return (records, end),
        }
    }
}

/// A log with all that we look for; where the point begins and ends, and where the switch does.
fn whole() -> (Log, (Lsn, Lsn), Lsn) {
    let mut log = Log::new(&[5; 20], 20);
    let mut checkpoint = vec![255, 88];
    checkpoint.extend(lsn("0/1308FB68").0.to_le_bytes());
    checkpoint.extend([0; 80]);
    log.write(0, 0x00, &checkpoint);
    log.blocks();
    let mut tablespace = vec![254];
    let path = b"\x03\x40\0\0/data/ts one\0";
    tablespace.extend(u32::try_from(path.len()).unwrap().to_le_bytes());
    tablespace.extend(path);
    log.write(5, 0x00, &tablespace);
    log.write(5, 0x20, b"\xff\x08\x04\x40\0\0rel\0");
    let mut several = vec![254];
    several.extend(20_000_u32.to_le_bytes());
    several.extend(vec![6; 20_000]);
    log.write(1, 0x00, &several);
    let point = log.point("gs_pitr_fixture");
    let end = log.switch();
    (log, point, end)
}

#[test]
fn a_log_is_read_to_its_switch() {
    let (log, point, switch) = whole();
    let (records, end) = read(&log.bytes);
    assert_eq!(end, Step::NeedSegment(NUMBER + 1));
    for pair in records.windows(2) {
        assert_eq!(pair[1].previous, pair[0].start);
    }
    assert!(records.iter().all(|r| r.flavour == Flavour::OpenGauss));
    assert!(records.iter().all(|r| r.xid == 0x1_0000_3395));
    let points: Vec<_> = records
        .iter()
        .filter(|r| restore_point(r).is_some())
        .collect();
    assert_eq!(points.len(), 1);
    assert_eq!((points[0].start, points[0].end), point);
    // 0x6a bytes: 32 of header, 2 that say how long the data is, 72 of data.
    assert_eq!(point.1.0 - point.0.0, 0x70);
    let found = restore_point(points[0]).unwrap();
    assert_eq!(found.name, "gs_pitr_fixture");
    assert_eq!(found.time, 848_579_984_155_204 + 946_684_800_000_000);
    // The one within the data directory is none that replay makes elsewhere.
    let created: Vec<_> = records.iter().filter_map(create_tablespace).collect();
    assert_eq!(created, [(0x4003, PathBuf::from("/data/ts one"))]);
    let checkpoints: Vec<_> = records.iter().filter_map(shutdown_checkpoint).collect();
    assert_eq!(checkpoints, [lsn("0/1308FB68")]);
    // Records with blocks are known by their CRC; their data is not taken apart.
    assert!(
        records
            .iter()
            .filter(|r| r.rmid == 10)
            .all(|r| r.data.is_empty())
    );
    assert!(records.iter().any(|r| r.data.len() == 20_000));
    assert!(is_switch(records.last().unwrap()));

    let verified = verify(&log.bytes, &expected()).unwrap();
    assert_eq!(verified.flavour, Flavour::OpenGauss);
    assert_eq!(verified.switched, Some(switch));
    assert_eq!(verified.records, records.len() as u64);
    assert_eq!(verified.first_record, Some(records[0].start));
}

#[test]
fn a_segment_that_is_full_ends_in_a_record_of_the_next() {
    let mut log = Log::new(&[], 0);
    while log.at + 3000 < SIZE {
        log.write(1, 0, &[&[254, 0xB8, 0x0B, 0, 0][..], &[4; 3000]].concat());
    }
    let rest = SIZE - log.at - 32 - 5;
    let length = u32::try_from(rest + 100).unwrap();
    let body = [&[254][..], &length.to_le_bytes(), &vec![4; rest + 100]].concat();
    let record = log.record(1, 0, &body);
    let room = SIZE - log.at;
    log.bytes[log.at..].copy_from_slice(&record[..room]);
    let verified = verify(&log.bytes, &expected()).unwrap();
    assert_eq!(verified.switched, None);
}

#[test]
fn a_switch_across_the_boundary_leaves_an_empty_segment() {
    for rest in [8, 16, 24] {
        let mut log = Log::new(&[], 0);
        let record = log.record(0, 0x40, &[]);
        log = Log::new(&record[32 - rest..], rest);
        let end = log.lsn();
        log.at = PAGE;
        while log.at < SIZE {
            log.page(0);
            log.at = log.at.next_multiple_of(PAGE);
        }
        let verified = verify(&log.bytes, &expected()).unwrap();
        assert_eq!(
            (verified.records, verified.switched),
            (0, Some(end)),
            "{rest}"
        );
    }
}

#[test]
fn verify_names_what_is_wrong() {
    let (log, point, switch) = whole();
    let broken = |change: &dyn Fn(&mut Vec<u8>, &mut Expected)| {
        let (mut bytes, mut expected) = (log.bytes.clone(), expected());
        change(&mut bytes, &mut expected);
        match verify(&bytes, &expected) {
            Err(SegmentError::Broken { end, .. }) => end.reason,
            other => panic!("{other:?}"),
        }
    };
    let page = |page: u64, fault| {
        let at = Lsn(Log::start() + page * PAGE as u64);
        EndReason::Page { at, fault }
    };
    let crc = EndReason::Record(RecordFault::Crc);
    assert_eq!(
        broken(&|_, e| e.system_identifier += 1),
        page(0, PageFault::SystemIdentifier(SYSTEM))
    );
    assert_eq!(
        broken(&|_, e| e.timelines = vec![2]),
        page(0, PageFault::Timeline(1))
    );
    assert_eq!(
        broken(&|b, _| b[PAGE + 8 + 4] = 1),
        page(
            1,
            PageFault::Address(Lsn(1 << 32 | (Log::start() + PAGE as u64)))
        )
    );
    // PostgreSQL's flag for an overwritten record is none of openGauss's.
    assert_eq!(
        broken(&|b, _| b[PAGE + 2] |= 8),
        page(1, PageFault::Flags(13))
    );
    let postgresql = agent_wal::Major::new(15).map(Flavour::PostgreSql);
    assert_eq!(
        broken(&|_, e| e.flavour = postgresql),
        page(0, PageFault::Magic(0xD074))
    );
    let offset = usize::try_from(point.0.0 - Log::start()).unwrap();
    assert_eq!(broken(&|b, _| b[offset + 50] ^= 1), crc);
    assert_eq!(broken(&|b, _| b[offset + 26] ^= 1), crc);
    // What the server prepared behind the switch is empty, all of it.
    let behind = usize::try_from(switch.0 - Log::start())
        .unwrap()
        .next_multiple_of(PAGE);
    for (at, value) in [
        (behind - 1, 1),
        (behind + 30, 1),
        (behind + 2, 5),
        (SIZE - PAGE + 8, 1),
        (SIZE - 1, 1),
    ] {
        let mut bytes = log.bytes.clone();
        bytes[at] ^= value;
        assert_eq!(
            verify(&bytes, &expected()),
            Err(SegmentError::AfterSwitch(switch)),
            "{at}"
        );
    }
    let mut zero = log.bytes.clone();
    zero[behind..].fill(0);
    assert!(verify(&zero, &expected()).is_ok());
}

/// `ControlFileData` with what `pg_controldata` printed of a server that was stopped while it paused at a point
/// (0/1308FB68 to 0/1308FBD8).
fn control() -> Vec<u8> {
    let mut file = vec![0_u8; 8192];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &SYSTEM.to_le_bytes());
    put(8, &923_u32.to_le_bytes());
    put(12, &201_611_171_u32.to_le_bytes());
    put(16, &6_u32.to_le_bytes()); // Database system TimeLine
    put(20, &2_u32.to_le_bytes()); // shut down in recovery
    put(24, &1_795_265_616_i64.to_le_bytes());
    put(32, &lsn("0/120000A8").0.to_le_bytes());
    put(40, &lsn("0/120000A8").0.to_le_bytes());
    put(48, &lsn("0/12000028").0.to_le_bytes());
    put(56, &1_u32.to_le_bytes());
    put(64, &13_206_u64.to_le_bytes());
    put(72, &24_583_u32.to_le_bytes());
    put(80, &2_u64.to_le_bytes());
    put(96, &11_091_u64.to_le_bytes());
    put(104, &14_715_u32.to_le_bytes());
    put(112, &1_795_264_678_i64.to_le_bytes());
    put(120, &1_u64.to_le_bytes());
    put(128, &13_206_u64.to_le_bytes());
    put(136, &lsn("0/1308FB68").0.to_le_bytes());
    put(164, &2_u32.to_le_bytes());
    put(168, &150_u32.to_le_bytes());
    put(180, &8_u32.to_le_bytes());
    put(184, &1_234_567.0_f64.to_le_bytes());
    put(192, &8192_u32.to_le_bytes());
    put(196, &131_072_u32.to_le_bytes());
    put(200, &8192_u32.to_le_bytes());
    put(204, &(16_u32 << 20).to_le_bytes());
    put(208, &64_u32.to_le_bytes());
    put(220, &[1, 1, 1, 0]);
    let crc = crc32c::crc32c(&file[..224]);
    file[224..228].copy_from_slice(&crc.to_le_bytes());
    file
}

#[test]
fn the_control_file_of_a_server_stopped_at_its_point() {
    let control = ControlFile::parse(&control()).unwrap();
    assert!(control.is_opengauss());
    assert_eq!(control.system_identifier, SYSTEM);
    assert_eq!(control.catalog_version, 201_611_171);
    assert_eq!(control.state, DbState::ShutDownInRecovery);
    assert_eq!(control.min_recovery_point, lsn("0/1308FB68"));
    assert_eq!(
        (control.checkpoint, control.redo),
        (lsn("0/120000A8"), lsn("0/12000028"))
    );
    assert_eq!((control.timeline, control.previous_timeline), (1, 1));
    assert_eq!(control.wal_segment_size.bytes(), SIZE as u64);
    assert_eq!(control.relation_segment_blocks, 131_072);
    assert_eq!(
        (control.data_checksum_version, control.min_recovery_timeline),
        (0, 0)
    );
    assert!(!control.backup_start.is_valid() && !control.backup_end_required);
}

/// System identifier of the server that wrote the fixtures.
const RECORDED: u64 = 215_046_882_207_026_465;

/// Number and bytes of a recorded segment, and what it has to be.
fn recorded(name: &str, number: u64) -> (Vec<u8>, Expected) {
    let file = match name {
        "written" => &include_bytes!("fixtures/wal.opengauss.zst")[..],
        "point" => &include_bytes!("fixtures/wal.opengauss.point.zst")[..],
        _ => &include_bytes!("fixtures/wal.opengauss.opened.zst")[..],
    };
    let expected = Expected {
        system_identifier: RECORDED,
        name: SegmentName {
            timeline: 1,
            number,
        },
        ..expected()
    };
    (zstd::decode_all(file).unwrap(), expected)
}

fn records_of(number: u64, bytes: &[u8]) -> Vec<Record> {
    let start = size().start_of(number);
    let mut reader = RecordReader::near(start, ReaderOptions::new(size()));
    let mut records = Vec::new();
    loop {
        match reader.step() {
            Step::Record(record) => records.push(record),
            Step::NeedSegment(needed) if needed == number => reader.feed(needed, bytes).unwrap(),
            _ => return records,
        }
    }
}

#[test]
fn a_recorded_segment_is_read_to_its_switch() {
    let (bytes, expected) = recorded("written", 4);
    let verified = verify(&bytes, &expected).unwrap();
    assert_eq!(verified.flavour, Flavour::OpenGauss);
    // As pg_switch_xlog() and pg_create_restore_point() answered.
    assert_eq!(verified.switched, Some(lsn("0/4021050")));
    let records = records_of(4, &bytes);
    assert_eq!(verified.records, records.len() as u64);
    let point = records.iter().find(|r| restore_point(r).is_some()).unwrap();
    assert_eq!(restore_point(point).unwrap().name, "gs_pitr_fixture");
    assert_eq!(
        (point.start, point.end),
        (lsn("0/4020ED8"), lsn("0/4020F48"))
    );
    let created: Vec<_> = records.iter().filter_map(create_tablespace).collect();
    assert_eq!(created, [(16398, PathBuf::from("/var/tmp/ogw-my/tsabs"))]);
    // Pages behind the switch have headers.
    assert_eq!(bytes[0x22000..0x22002], [0x74, 0xD0]);
}

#[test]
fn a_recorded_point_that_crosses_a_page() {
    let (bytes, expected) = recorded("point", 7);
    verify(&bytes, &expected).unwrap();
    let records = records_of(7, &bytes);
    let point = records.iter().find(|r| restore_point(r).is_some()).unwrap();
    assert_eq!(restore_point(point).unwrap().name, "P1");
    assert_eq!(
        (point.start, point.end),
        (lsn("0/7009FB0"), lsn("0/700A038"))
    );
    // The server that was recovered to it opened there: the checkpoint has taken its place, on the same timeline.
    let (bytes, _) = recorded("opened", 7);
    let after = records_of(7, &bytes);
    let at = after.iter().position(|r| r.start == point.start).unwrap();
    assert_eq!(shutdown_checkpoint(&after[at]), Some(point.start));
    assert_eq!(
        (after[at].previous, after[at].timeline),
        (point.previous, 1)
    );
    assert!(
        records
            .iter()
            .zip(&after[..at])
            .all(|(one, other)| one == other)
    );
}

#[test]
fn recorded_control_files() {
    let parse = |file: &[u8]| ControlFile::parse(file).unwrap();
    let running = parse(include_bytes!("fixtures/pg_control.opengauss.running"));
    assert_eq!(running.state, DbState::InProduction);
    assert_eq!(
        (running.checkpoint, running.redo),
        (lsn("0/50000A8"), lsn("0/5000028"))
    );
    assert_eq!(running.system_identifier, RECORDED);
    assert_eq!(running.wal_segment_size.bytes(), SIZE as u64);
    // Stopped while it paused at the point: the START of the point's record.
    let proved = parse(include_bytes!("fixtures/pg_control.opengauss"));
    assert_eq!(proved.state, DbState::ShutDownInRecovery);
    assert_eq!(proved.min_recovery_point, lsn("0/7009FB0"));
    assert_eq!(proved.timeline, 1);
    let opened = parse(include_bytes!("fixtures/pg_control.opengauss.opened"));
    assert_eq!(opened.state, DbState::ShutDown);
    assert_eq!(
        (opened.timeline, opened.min_recovery_point),
        (1, Lsn::INVALID)
    );
    assert_eq!(opened.checkpoint, lsn("0/700ABF8"));
    for control in [running, proved, opened] {
        assert!(control.is_opengauss());
        // Made on 2026-11-21 after 21:00 UTC.
        assert!((1_795_294_800..1_795_298_400).contains(&control.time));
    }
}

proptest! {
    #[test]
    fn any_flipped_bit_of_a_control_file_is_found(byte in 0_usize..228, bit in 0_u8..8) {
        let mut damaged = control();
        damaged[byte] ^= 1 << bit;
        let found = matches!(
            ControlFile::parse(&damaged),
            Err(ControlError::Crc { .. } | ControlError::Version(_))
        );
        prop_assert!(found);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn records_of_any_length_are_found_where_they_were_written(
        lengths in proptest::collection::vec(0_usize..20_000, 1..40),
        flip in any::<proptest::sample::Index>(),
    ) {
        let mut log = Log::new(&[], 0);
        let mut written = Vec::new();
        for length in lengths {
            let length_bytes = u32::try_from(length).unwrap().to_le_bytes();
            let body = [&[254][..], &length_bytes, &vec![3; length]].concat();
            written.push(log.write(1, 0x10, &body));
        }
        let end = log.switch();
        let (records, _) = read(&log.bytes);
        let found: Vec<_> = records.iter().map(|r| (r.start, r.end)).collect();
        prop_assert_eq!(&found[..written.len()], &written[..]);
        prop_assert!(verify(&log.bytes, &expected()).is_ok());
        // A changed byte of any record is found.
        let (start, _) = written[flip.index(written.len())];
        let at = usize::try_from(start.0 - Log::start()).unwrap() + 24;
        log.bytes[at] ^= 0x80;
        prop_assert!(verify(&log.bytes, &expected()).is_err());
        prop_assert!(end > start);
    }
}
