//! Control files that real servers wrote, and damaged ones.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use agent_wal::Lsn;
use agent_wal::control::{CONTROL_BYTES, ControlError, ControlFile, DbState};
use proptest::prelude::*;

const FILES: [(u32, &[u8]); 7] = [
    (12, include_bytes!("fixtures/pg_control.12")),
    (13, include_bytes!("fixtures/pg_control.13")),
    (14, include_bytes!("fixtures/pg_control.14")),
    (15, include_bytes!("fixtures/pg_control.15")),
    (16, include_bytes!("fixtures/pg_control.16")),
    (17, include_bytes!("fixtures/pg_control.17")),
    (18, include_bytes!("fixtures/pg_control.18")),
];

fn lsn(text: &str) -> Lsn {
    text.parse().unwrap()
}

/// The restore point's end as `pg_create_restore_point` answered is the minimum recovery point of the
/// recovered cluster, in every version: the proof that a restore rests on.
#[test]
fn recovered_to_the_restore_point() {
    let expected = [
        (
            1201,
            7_710_626_966_641_678_937,
            201_909_212,
            "0/B06C80",
            "0/B00060",
        ),
        (
            1300,
            7_710_626_977_450_818_233,
            202_007_201,
            "0/B07668",
            "0/B00060",
        ),
        (
            1300,
            7_710_626_987_254_401_817,
            202_107_181,
            "0/C08EA8",
            "0/C00060",
        ),
        (
            1300,
            7_710_626_997_054_397_305,
            202_209_061,
            "0/A08470",
            "0/A00060",
        ),
        (
            1300,
            7_710_627_004_456_053_718,
            202_307_071,
            "0/A089B8",
            "0/A00060",
        ),
        (
            1700,
            7_710_627_012_325_137_459,
            202_406_281,
            "0/A07AA0",
            "0/A00080",
        ),
        (
            1800,
            7_710_627_019_122_597_008,
            202_506_291,
            "0/A09140",
            "0/A00080",
        ),
    ];
    for ((major, file), (version, system, catalog, point, checkpoint)) in FILES.iter().zip(expected)
    {
        let control = ControlFile::parse(file).unwrap_or_else(|e| panic!("{major}: {e}"));
        assert_eq!(control.state, DbState::ShutDownInRecovery, "{major}");
        assert_eq!(control.control_version, version, "{major}");
        assert_eq!(control.system_identifier, system, "{major}");
        assert_eq!(control.catalog_version, catalog, "{major}");
        assert_eq!(control.min_recovery_point, lsn(point), "{major}");
        assert_eq!(control.min_recovery_timeline, 1, "{major}");
        assert_eq!(control.checkpoint, lsn(checkpoint), "{major}");
        assert_eq!(
            control.redo.0,
            control.checkpoint.0 & !0xFFF | 0x28,
            "{major}"
        );
        assert_eq!(
            (control.timeline, control.previous_timeline),
            (1, 1),
            "{major}"
        );
        assert_eq!(control.wal_segment_size.bytes(), 1 << 20, "{major}");
        assert_eq!(control.block_size, 8192, "{major}");
        assert_eq!(control.relation_segment_blocks, 131_072, "{major}");
        assert_eq!(control.data_checksum_version, 1, "{major}");
        assert!(!control.backup_end_required, "{major}");
        assert!(
            !control.backup_start.is_valid() && !control.backup_end.is_valid(),
            "{major}"
        );
        // Made on 2026-11-21 between 14:10 and 14:11 UTC.
        assert!(
            (1_795_270_200..1_795_270_260).contains(&control.time),
            "{major}"
        );
        assert!(
            (1_795_270_200..=control.time).contains(&control.checkpoint_time),
            "{major}"
        );
    }
}

#[test]
fn states_of_a_server() {
    let running = ControlFile::parse(include_bytes!("fixtures/pg_control.15.running")).unwrap();
    assert_eq!(running.state, DbState::InProduction);
    assert_eq!(running.checkpoint, lsn("0/17414F8"));
    assert_eq!(running.min_recovery_point, Lsn::INVALID);
    let stopped = ControlFile::parse(include_bytes!("fixtures/pg_control.15.stopped")).unwrap();
    assert_eq!(stopped.state, DbState::ShutDown);
    assert_eq!(stopped.redo, lsn("0/3000028"));
    assert_eq!(stopped.system_identifier, running.system_identifier);
    assert_eq!(stopped.wal_segment_size.bytes(), 16 << 20);
    assert_eq!(stopped.state.to_string(), "shut down");
}

#[test]
fn cut_short_and_unknown() {
    for length in [0, 8, 288, CONTROL_BYTES - 1] {
        assert_eq!(
            ControlFile::parse(&FILES[0].1[..length]),
            Err(ControlError::Short(length))
        );
    }
    let mut newer = FILES[6].1.to_vec();
    newer[8..12].copy_from_slice(&1900u32.to_le_bytes());
    assert_eq!(ControlFile::parse(&newer), Err(ControlError::Version(1900)));
    assert_eq!(
        ControlFile::parse(&[0; 8192]),
        Err(ControlError::Version(0))
    );
}

proptest! {
    #[test]
    fn any_flipped_bit_is_found(file in 0usize..7, byte in 0usize..292, bit in 0u8..8) {
        let mut damaged = FILES[file].1.to_vec();
        damaged[byte] ^= 1 << bit;
        prop_assert!(ControlFile::parse(&damaged).is_err());
    }

    #[test]
    fn any_bytes_are_parsed_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..1024)) {
        prop_assert!(ControlFile::parse(&bytes).is_err());
    }
}
