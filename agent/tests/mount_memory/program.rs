//! The program that writes a backup into the mount, as `gs_probackup` and `pg_probackup` do, and reads one back.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use rand::{Rng as _, SeedableRng as _};

/// What there is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    /// 100,000 files of up to 4 KiB.
    Small,
    /// A file of 4 GiB: zeros with random bytes between.
    Large,
    /// 100 WAL segments, half of them as each of the programs writes them, beside a data file.
    Wal,
    /// `global/pg_dw_0`.
    DoubleWrite,
}

const ALL: [Work; 4] = [Work::Small, Work::Large, Work::Wal, Work::DoubleWrite];
/// The order: `write` or `read`.
const WHAT: &str = "GS_PITR_PROGRAM";
const WORK: &str = "GS_PITR_PROGRAM_WORK";
const PLACE: &str = "GS_PITR_PROGRAM_PLACE";

/// The backup's directory in the catalog.
const BACKUP: &str = "backups/node/T0MEMO";
const MIB: usize = 1 << 20;
/// What the real programs write at most at once.
const WRITE: usize = 128 << 10;
const PAGE: usize = 8 << 10;

const SMALL_FILES: usize = 100_000;
const SMALL_DIRECTORIES: usize = 20;
/// Of the small files every so many are read; all are listed.
const READ_EVERY: usize = 4;
/// MiB of the large file, and every how many of them are random.
const LARGE: usize = 4096;
const RANDOM_EVERY: usize = 16;
/// Random bytes in the large file.
pub(crate) const RANDOM_IN_LARGE: u64 = (LARGE / RANDOM_EVERY * MIB) as u64;
const SEGMENTS: usize = 100;
const SEGMENT: usize = 16 * MIB;
/// MiB of the data file beside them.
const BESIDE: usize = 64;
/// Bytes of `pg_dw_0`.
pub(crate) const DOUBLE_WRITE: u64 = 256 << 20;

impl Work {
    pub(crate) fn name(self) -> String {
        format!("{self:?}")
    }

    pub(crate) fn named(name: &str) -> Option<Self> {
        ALL.into_iter().find(|work| work.name() == name)
    }

    /// What makes this binary do it.
    pub(crate) fn environment(self, what: &str, place: &Path) -> [(&'static str, String); 3] {
        [
            (WHAT, what.to_owned()),
            (WORK, self.name()),
            (PLACE, place.display().to_string()),
        ]
    }
}

pub(crate) fn run_if_asked() {
    let Ok(what) = std::env::var(WHAT) else {
        return;
    };
    let work = Work::named(&std::env::var(WORK).unwrap()).unwrap();
    let database = PathBuf::from(std::env::var_os(PLACE).unwrap())
        .join(BACKUP)
        .join("database");
    let program = Program {
        database,
        noise: noise(),
    };
    match what.as_str() {
        "write" => program.write(work),
        "read" => program.read(work),
        other => panic!("what is {other}?"),
    }
    println!("PROGRAM OVER");
}

/// The same random bytes in every process: 1 MiB, which is more than one frame can find again.
fn noise() -> Vec<u8> {
    let mut bytes = vec![0; MIB];
    rand::rngs::StdRng::seed_from_u64(5).fill_bytes(&mut bytes);
    bytes
}

struct Program {
    database: PathBuf,
    noise: Vec<u8>,
}

/// As the programs open a data file.
fn create(path: &Path) -> File {
    let mut how = OpenOptions::new();
    let how = how.write(true).create(true).truncate(true).mode(0o600);
    how.open(path).unwrap()
}

fn put(file: &mut File, bytes: &[u8]) {
    for bytes in bytes.chunks(WRITE) {
        file.write_all(bytes).unwrap();
    }
}

/// Writes zeros, or seeks over them as `pg_probackup` does.
fn put_zeros(file: &mut File, length: usize, seek: bool) {
    if seek {
        file.seek(SeekFrom::Current(i64::try_from(length).unwrap()))
            .unwrap();
    } else {
        put(file, &vec![0; length]);
    }
}

/// Reads `expected` and nothing else.
fn want(file: &mut impl Read, expected: &[u8], place: &str) {
    let mut found = vec![0; expected.len()];
    file.read_exact(&mut found)
        .unwrap_or_else(|error| panic!("{place}: {error}"));
    assert!(found == expected, "{place}: other bytes");
}

fn want_end(file: &mut impl Read, place: &str) {
    assert_eq!(file.read(&mut [0]).unwrap(), 0, "{place} is longer");
}

impl Program {
    fn write(&self, work: Work) {
        fs::create_dir_all(&self.database).unwrap();
        match work {
            Work::Small => self.write_small(),
            Work::Large => self.write_large(),
            Work::Wal => self.write_wal(),
            Work::DoubleWrite => self.write_double(),
        }
        let control = self.database.parent().unwrap().join("backup.control");
        fs::write(control, "status = DONE\n").unwrap();
    }

    fn read(&self, work: Work) {
        match work {
            Work::Small => self.read_small(),
            Work::Large => self.read_large(),
            Work::Wal => self.read_wal(),
            Work::DoubleWrite => self.read_double(),
        }
    }

    /// The noise with a number in it.
    fn block(&self, number: usize) -> Vec<u8> {
        let mut block = self.noise.clone();
        block[..8].copy_from_slice(&(number as u64).to_le_bytes());
        block
    }

    fn small(&self, number: usize) -> (PathBuf, Vec<u8>) {
        let directory = self
            .database
            .join(format!("base/{}", number % SMALL_DIRECTORIES));
        let length = 8 + number * 37 % 4096;
        let mut bytes = vec![0; length];
        for part in bytes.chunks_exact_mut(8) {
            part.copy_from_slice(&(number as u64).to_le_bytes());
        }
        (directory.join(number.to_string()), bytes)
    }

    fn write_small(&self) {
        for directory in 0..SMALL_DIRECTORIES {
            fs::create_dir_all(self.database.join(format!("base/{directory}"))).unwrap();
        }
        for number in 0..SMALL_FILES {
            let (path, bytes) = self.small(number);
            put(&mut create(&path), &bytes);
        }
    }

    fn read_small(&self) {
        let listed = (0..SMALL_DIRECTORIES).map(|directory| {
            let directory = self.database.join(format!("base/{directory}"));
            fs::read_dir(directory).unwrap().count()
        });
        assert_eq!(listed.sum::<usize>(), SMALL_FILES);
        for number in (0..SMALL_FILES).step_by(READ_EVERY) {
            let (path, bytes) = self.small(number);
            let found = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            assert!(found == bytes, "{}: other bytes", path.display());
        }
    }

    fn large(&self) -> PathBuf {
        self.database.join("base/5/16384")
    }

    fn write_large(&self) {
        fs::create_dir_all(self.large().parent().unwrap()).unwrap();
        let mut file = create(&self.large());
        for number in (0..LARGE).step_by(RANDOM_EVERY) {
            let seek = number >= LARGE / 2;
            put_zeros(&mut file, (RANDOM_EVERY - 1) * MIB, seek);
            put(&mut file, &self.block(number));
        }
    }

    fn read_large(&self) {
        let mut file = File::open(self.large()).unwrap();
        assert_eq!(file.metadata().unwrap().len(), (LARGE * MIB) as u64);
        let zeros = vec![0; MIB];
        for number in (0..LARGE).step_by(RANDOM_EVERY) {
            for _ in 1..RANDOM_EVERY {
                want(&mut file, &zeros, "a hole");
            }
            want(&mut file, &self.block(number), &format!("block {number}"));
        }
        want_end(&mut file, "the large file");
    }

    fn segment(&self, number: usize) -> PathBuf {
        let name = format!("0000000100000000{number:08X}");
        self.database.join("pg_wal").join(name)
    }

    /// A quarter of each MiB is random.
    fn segment_part(&self, number: usize, part: usize) -> Vec<u8> {
        let mut bytes = self.block(number * 16 + part);
        bytes[MIB / 4..].fill(b'w');
        bytes
    }

    fn write_wal(&self) {
        fs::create_dir_all(self.database.join("pg_wal")).unwrap();
        fs::create_dir_all(self.large().parent().unwrap()).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut file = create(&self.large());
                for number in 0..BESIDE {
                    put(&mut file, &self.block(number));
                }
            });
            for number in 1..=SEGMENTS {
                self.write_segment(number, number % 2 == 0);
                // Both programs look at pages of it at once, and read it all when they end.
                if number % 10 == 0 {
                    self.read_segment(number - 5);
                }
            }
        });
    }

    /// Zeros up to its size, then over them the WAL. `gs_probackup` renames it when it is complete.
    fn write_segment(&self, number: usize, gs: bool) {
        let path = self.segment(number);
        let first = if gs {
            path.with_extension("partial")
        } else {
            path.clone()
        };
        let mut how = OpenOptions::new();
        let how = how.write(true).create(true).truncate(false).mode(0o600);
        let mut file = how.open(&first).unwrap();
        let zeros = [0; PAGE];
        for _ in 0..SEGMENT / PAGE {
            file.write_all(&zeros).unwrap();
        }
        file.seek(SeekFrom::Start(0)).unwrap();
        for part in 0..SEGMENT / MIB {
            put(&mut file, &self.segment_part(number, part));
        }
        file.sync_all().unwrap();
        drop(file);
        if gs {
            fs::rename(&first, &path).unwrap();
        }
        assert_eq!(fs::metadata(&path).unwrap().len(), SEGMENT as u64);
    }

    fn read_segment(&self, number: usize) {
        let place = format!("segment {number}");
        let mut file = File::open(self.segment(number)).unwrap();
        for part in 0..SEGMENT / MIB {
            want(&mut file, &self.segment_part(number, part), &place);
        }
        want_end(&mut file, &place);
    }

    fn read_wal(&self) {
        for number in 1..=SEGMENTS {
            self.read_segment(number);
        }
        let mut file = File::open(self.large()).unwrap();
        for number in 0..BESIDE {
            want(&mut file, &self.block(number), "the data file");
        }
    }

    /// Each MiB of it; one in 32 has a page that is not zeros.
    fn double_part(&self, number: usize) -> Vec<u8> {
        let mut part = vec![0; MIB];
        if number.is_multiple_of(32) {
            part[..PAGE].copy_from_slice(&self.noise[..PAGE]);
        }
        part
    }

    fn double_parts(&self) -> impl Iterator<Item = Vec<u8>> {
        (0..usize::try_from(DOUBLE_WRITE).unwrap() / MIB).map(|number| self.double_part(number))
    }

    fn write_double(&self) {
        fs::create_dir_all(self.database.join("global")).unwrap();
        let mut file = create(&self.database.join("global/pg_dw_0"));
        self.double_parts().for_each(|part| put(&mut file, &part));
    }

    fn read_double(&self) {
        let mut file = File::open(self.database.join("global/pg_dw_0")).unwrap();
        self.double_parts()
            .for_each(|part| want(&mut file, &part, "pg_dw_0"));
        want_end(&mut file, "pg_dw_0");
    }
}
