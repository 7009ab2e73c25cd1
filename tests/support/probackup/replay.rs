//! Does a recorded sequence of calls again, in any directory, and writes down what each call returned.
//!
//! Two directories that behave the same give the same list. Bytes are made up, the same ones every time; what is read is
//! returned as its CRC.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{
    DirBuilderExt as _, FileExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::Path;

use super::trace::{Call, Event};

/// What the calls returned, one line each.
pub type Outcome = Vec<String>;

/// Bytes of a file at an offset. What counts is that they are the same in both places.
fn made_up(path: &str, at: u64, bytes: u64) -> Vec<u8> {
    let seed = u64::from(crc32c::crc32c(path.as_bytes()));
    (at..at + bytes)
        .map(|at| {
            let mixed = (at / 64 + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            mixed.to_le_bytes()[7] ^ at.to_le_bytes()[0]
        })
        .collect()
}

fn said(result: io::Result<String>) -> String {
    match result {
        Ok(text) => text,
        Err(e) => format!("error {}", e.raw_os_error().unwrap_or(-1)),
    }
}

/// Replays `events` below `root`, which holds the catalog. The process that serves a mount must not call it on that mount.
pub fn run(events: &[Event], root: &Path) -> Outcome {
    let mut open: HashMap<String, File> = HashMap::new();
    let padding = padding(events);
    let numbered = events.iter().enumerate();
    numbered
        .map(|(number, event)| {
            let zeros = padding.contains(&number);
            let result = said(one(event, root, &mut open, zeros));
            format!("{} {:?}: {result}", event.path, event.call)
        })
        .collect()
}

/// Which calls write the zeros that the programs fill a WAL segment with before they write it from its start again.
fn padding(events: &[Event]) -> HashSet<usize> {
    let mut written: HashMap<&str, Vec<usize>> = HashMap::new();
    let mut padding = HashSet::new();
    let in_log =
        |event: &Event| event.path.contains("/pg_wal/") || event.path.contains("/pg_xlog/");
    for (number, event) in events.iter().enumerate().filter(|(_, event)| in_log(event)) {
        let writes = written.entry(&event.path).or_default();
        match event.call {
            Call::Create(..) => writes.clear(),
            Call::Write(at, _) => {
                if at == 0 {
                    padding.extend(writes.drain(..));
                }
                writes.push(number);
            }
            _ => {}
        }
    }
    padding
}

/// Where calls returned something else than what was recorded, one line each.
pub fn unlike_the_record(events: &[Event], outcome: &Outcome) -> Vec<String> {
    let as_recorded = |event: &Event, line: &str| match event.call {
        Call::Read(_, _, got) => line.contains(&format!(": {got} bytes")),
        Call::MakeDirectory(mode) | Call::ChangeMode(mode) => {
            line.ends_with(&format!(": {mode:o}"))
        }
        // Of all others only those that succeeded were written down.
        _ => !line.contains(": error "),
    };
    let calls = events.iter().zip(outcome);
    let unlike = calls.filter(|(event, line)| !as_recorded(event, line));
    unlike.map(|(_, line)| line.clone()).collect()
}

fn one(
    event: &Event,
    root: &Path,
    open: &mut HashMap<String, File>,
    zeros: bool,
) -> io::Result<String> {
    let path = root.join(&event.path);
    let handle = |open: &HashMap<String, File>| {
        let file = open.get(&event.path).map(File::try_clone);
        file.unwrap_or_else(|| Err(io::Error::from_raw_os_error(9)))
    };
    match &event.call {
        Call::Access => {
            let there = fs::metadata(&path)?;
            Ok(format!("{}", there.is_dir()))
        }
        Call::MakeDirectory(mode) => {
            fs::DirBuilder::new().mode(*mode).create(&path)?;
            Ok(format!(
                "{:o}",
                fs::metadata(&path)?.permissions().mode() & 0o7777
            ))
        }
        Call::List => {
            let entries = fs::read_dir(&path)?;
            let mut names: Vec<_> = entries
                .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
                .collect::<io::Result<_>>()?;
            names.sort();
            Ok(names.join(" "))
        }
        Call::ChangeMode(mode) => {
            fs::set_permissions(&path, Permissions::from_mode(*mode))?;
            Ok(format!(
                "{:o}",
                fs::metadata(&path)?.permissions().mode() & 0o7777
            ))
        }
        Call::Unlink => fs::remove_file(&path).map(|()| "removed".to_owned()),
        Call::Rename(to) => fs::rename(&path, root.join(to)).map(|()| "renamed".to_owned()),
        Call::Sync => handle(open)?.sync_all().map(|()| "synced".to_owned()),
        Call::Close => {
            // A duplicate first: the last close of a descriptor cannot be looked at in std.
            let file = open.remove(&event.path);
            let file = file.ok_or_else(|| io::Error::from_raw_os_error(9))?;
            let size = file.metadata()?.len();
            nix::unistd::close(file).map_err(io::Error::from)?;
            Ok(format!("closed at {size}"))
        }
        Call::Create(mode, flags) => {
            let flags = flags.as_deref().unwrap_or("WRONLY|TRUNC");
            let mut options = OpenOptions::new();
            options.write(true).read(flags.contains("RDWR")).mode(*mode);
            options.truncate(flags.contains("TRUNC"));
            if flags.contains("EXCL") {
                options.create_new(true);
            } else {
                options.create(true);
            }
            let file = options.open(&path)?;
            let size = file.metadata()?.len();
            open.insert(event.path.clone(), file);
            Ok(format!("made with {size}"))
        }
        Call::Open(flags) => {
            let mut options = OpenOptions::new();
            options.read(flags.contains("RDONLY") || flags.contains("RDWR"));
            options.write(flags.contains("WRONLY") || flags.contains("RDWR"));
            options.truncate(flags.contains("TRUNC"));
            let file = options.open(&path)?;
            let size = file.metadata()?.len();
            open.insert(event.path.clone(), file);
            Ok(format!("opened with {size}"))
        }
        Call::Write(at, bytes) => {
            let file = handle(open)?;
            let content = if zeros {
                vec![0; usize::try_from(*bytes).unwrap_or(0)]
            } else {
                made_up(&event.path, *at, *bytes)
            };
            file.write_all_at(&content, *at)?;
            Ok(format!("size {}", file.metadata()?.len()))
        }
        Call::Read(at, bytes, _) => {
            let mut buffer = vec![0; usize::try_from(*bytes).unwrap_or(0)];
            let file = handle(open)?;
            let mut got = 0;
            while got < buffer.len() {
                match file.read_at(&mut buffer[got..], at + got as u64)? {
                    0 => break,
                    more => got += more,
                }
            }
            Ok(format!(
                "{got} bytes, {:08x}",
                crc32c::crc32c(&buffer[..got])
            ))
        }
    }
}

/// The directories that a sequence expects to be there already.
pub fn prepare(events: &[Event], root: &Path) {
    let mut made = HashSet::new();
    for event in events {
        if let Call::MakeDirectory(_) = event.call {
            made.insert(event.path.as_str());
        }
        if let Some((parent, _)) = event.path.rsplit_once('/')
            && !made.contains(parent)
        {
            let _ = fs::create_dir_all(root.join(parent));
        }
    }
}
