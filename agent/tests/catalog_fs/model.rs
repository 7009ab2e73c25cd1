//! The reference: a plain directory, and the few things in which a backup catalog that streams away differs.
//!
//! Every call is made on a real directory, and what the system answers is what the subject must answer, unless one of the
//! refusals that the product documents comes first; then the directory is left alone.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use crate::ops::{
    At, Call, DIRECTORIES, FILES, FileSystem as _, Fill, How, Outcome, PlainDirectory, SEGMENT,
    SLOTS, Script, Step, THERE,
};

const EIO: i32 = 5;
const EOPNOTSUPP: i32 = 95;
/// A small file in memory grows no longer than this here: there is a limit for all together.
const SMALL: u64 = 48 << 10;
/// Bytes in which the programs pad a segment.
const BLOCK: u64 = 8 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Stream,
    Segment,
    List,
    Small,
}

impl Class {
    fn of(path: &str) -> Self {
        let name = path.rsplit('/').next().unwrap();
        if path.contains("/pg_wal/") {
            Self::Segment
        } else if name.starts_with("backup_content.control") {
            Self::List
        } else if name == "page_header_map" || name == "PG_VERSION" || path.contains("/base/") {
            Self::Stream
        } else {
            Self::Small
        }
    }
}

/// What the model knows of a file besides what the directory knows.
#[derive(Debug)]
struct Known {
    class: Class,
    /// Of a segment: it has had its size; written so far for good; something that is not zero; complete.
    padded: bool,
    front: u64,
    held: bool,
    complete: bool,
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    file: usize,
    how: How,
}

/// Plays steps and writes down the script.
pub(crate) struct Model {
    root: PathBuf,
    plain: PlainDirectory,
    spoils: bool,
    spoiled: bool,
    calls: Vec<(Call, Outcome)>,
    slots: Vec<Option<Slot>>,
    names: BTreeMap<String, usize>,
    files: Vec<Known>,
    /// What each segment was when it was complete.
    segments: BTreeMap<String, Outcome>,
}

/// The script of some steps, played in an empty directory.
pub(crate) fn script(steps: &[Step], spoils: bool, scratch: &Path) -> Script {
    let mut model = Model {
        root: scratch.to_owned(),
        plain: PlainDirectory::new(scratch.to_owned()),
        spoils,
        spoiled: false,
        calls: Vec::new(),
        slots: vec![None; SLOTS],
        names: BTreeMap::new(),
        files: Vec::new(),
        segments: BTreeMap::new(),
    };
    for directory in &DIRECTORIES[..THERE] {
        model.call(Call::Mkdir((*directory).to_owned()));
    }
    for step in steps {
        model.step(step);
    }
    model.look_around();
    let tree = model.tree();
    Script {
        calls: model.calls,
        spoiled: model.spoiled,
        tree,
    }
}

impl Model {
    fn step(&mut self, step: &Step) {
        let name = |number: &usize| FILES[*number].to_owned();
        let directory = |number: &usize| DIRECTORIES[*number].to_owned();
        match step {
            Step::Open(slot, path, how) => {
                self.call(Call::Close(*slot));
                self.call(Call::Open(*slot, name(path), *how));
            }
            Step::Write(slot, at, fill) => self.write_at(*slot, *at, *fill),
            Step::Read(slot, part, length) => {
                let offset = self.slot_size(*slot) * u64::from(*part) / 200;
                self.call(Call::Read(*slot, offset, *length));
            }
            Step::Fsync(slot) => self.call(Call::Fsync(*slot)),
            Step::Close(slot) => self.call(Call::Close(*slot)),
            Step::Stat(path) => self.call(Call::Stat(name(path))),
            Step::List(path) => self.call(Call::List(directory(path))),
            Step::Mkdir(path) => self.call(Call::Mkdir(directory(path))),
            Step::Rmdir(path) => self.call(Call::Rmdir(directory(path))),
            Step::Unlink(path) => self.call(Call::Unlink(name(path))),
            Step::Rename(from, to) => self.call(Call::Rename(name(from), name(to))),
            // A directory into itself is the kernel's own error, which never reaches a file system.
            Step::RenameDirectory(from, to) if !directory(to).starts_with(&directory(from)) => {
                self.call(Call::Rename(directory(from), directory(to)));
            }
            Step::RenameDirectory(..) => {}
            Step::Chmod(path, mode) => self.call(Call::Chmod(name(path), *mode)),
            Step::Truncate(path, part, more) => self.truncate_to(&name(path), *part, *more),
            Step::Wal(number, gs) => self.wal(*number, *gs),
        }
    }

    fn slot_size(&self, slot: usize) -> u64 {
        self.plain.size(slot).unwrap_or(0)
    }

    fn path_size(&self, path: &str) -> u64 {
        let found = fs::symlink_metadata(self.root.join(path));
        found.map_or(0, |found| if found.is_file() { found.len() } else { 0 })
    }

    fn write_at(&mut self, slot: usize, at: At, fill: Fill) {
        let Some(open) = self.slots[slot] else {
            return self.call(Call::Write(slot, 0, fill));
        };
        let known = &self.files[open.file];
        let size = self.slot_size(slot);
        let within = |part: u8| size * u64::from(part) / 256;
        let wanted = match at {
            At::End => size,
            At::Gap(gap) => size + gap,
            At::Within(_) if known.class == Class::Stream && !self.spoils => size,
            At::Within(part) => within(part),
        };
        if known.complete && !self.spoils {
            return;
        }
        // Where only so much fits.
        let most = match known.class {
            Class::Stream => u64::MAX,
            // Only a whole one, see `wal`, is complete: it has the same bytes each time.
            Class::Segment => SEGMENT - 1,
            Class::List => 3 << 20,
            Class::Small => SMALL,
        };
        let offset = wanted.min(most);
        let begin = if open.how.append { size } else { offset };
        let room = usize::try_from(most - begin.min(most)).unwrap_or(usize::MAX);
        let length = fill.length.min(room);
        self.call(Call::Write(slot, offset, Fill { length, ..fill }));
    }

    fn truncate_to(&mut self, path: &str, part: Option<u8>, more: u64) {
        let size = self.path_size(path);
        let wanted = match part {
            Some(part) => size * u64::from(part) / 256,
            None => size + more,
        };
        let Some(known) = self.names.get(path).map(|file| &self.files[*file]) else {
            return self.call(Call::Truncate(path.to_owned(), wanted));
        };
        let wanted = match known.class {
            Class::Segment => wanted.min(SEGMENT),
            Class::Small => wanted.min(SMALL),
            Class::Stream | Class::List => wanted,
        };
        let follows = match known.class {
            Class::Stream => wanted == 0 || wanted >= size,
            Class::Segment => !known.complete || wanted == 0 || wanted == size,
            Class::List | Class::Small => true,
        };
        if follows || self.spoils {
            self.call(Call::Truncate(path.to_owned(), wanted));
        }
    }

    /// A whole segment, as one of the programs writes it. The same number has the same bytes, as it has on a server.
    fn wal(&mut self, number: u8, gs: bool) {
        let done = format!("{}/pg_wal/00000001{number:016X}", DIRECTORIES[3]);
        let path = if gs {
            format!("{done}.partial")
        } else {
            done.clone()
        };
        // What another kind of file was renamed to stays of that kind.
        let known = self.names.get(&path).map(|file| &self.files[*file]);
        let unfit = known.is_some_and(|known| known.complete || known.class != Class::Segment);
        if unfit || !self.root.join(DIRECTORIES[4]).is_dir() {
            return;
        }
        let how = How {
            write: true,
            create: true,
            ..How::default()
        };
        self.call(Call::Close(0));
        self.call(Call::Open(0, path.clone(), how));
        let zeros = |length: u64| Fill {
            seed: 0,
            length: usize::try_from(length).unwrap(),
        };
        for block in 0..SEGMENT / BLOCK {
            self.call(Call::Write(0, block * BLOCK, zeros(BLOCK)));
        }
        let mut at = 0;
        for (turn, length) in [328, 112, 48, 130_584, 131_072, 131_072]
            .iter()
            .cycle()
            .enumerate()
        {
            let length = (SEGMENT - at).min(*length);
            let seed = u64::from(number) * 100 + turn as u64 % 5;
            let fill = Fill {
                seed,
                ..zeros(length)
            };
            self.call(Call::Write(0, at, fill));
            at += length;
            if at == SEGMENT {
                break;
            }
        }
        self.call(Call::Fsync(0));
        self.call(Call::Close(0));
        if gs {
            self.call(Call::Rename(path, done));
        }
    }

    /// Makes a call on the directory, unless the product refuses it, and writes down what must come of it.
    fn call(&mut self, call: Call) {
        if self.would_conflict(&call) {
            return;
        }
        let outcome = if let Some(errno) = self.refusal(&call) {
            Outcome::Errno(errno)
        } else {
            let before = self.before(&call);
            let outcome = self.plain.call(&call);
            if outcome == Outcome::Done {
                self.learn(&call, before);
            }
            outcome
        };
        self.calls.push((call, outcome));
    }

    fn of_slot(&self, slot: usize) -> Option<(&Known, How)> {
        let slot = self.slots[slot]?;
        Some((&self.files[slot.file], slot.how))
    }

    fn spoil(&mut self) -> i32 {
        self.spoiled = true;
        EIO
    }

    /// The documented differences.
    fn refusal(&mut self, call: &Call) -> Option<i32> {
        match call {
            // What streams away cannot be read.
            Call::Open(_, path, how) => {
                let exists = how.create && how.exclusive;
                let known = &self.files[*self.names.get(path)?];
                let refused = known.class == Class::Stream && how.read && !how.write && !exists;
                refused.then_some(EOPNOTSUPP)
            }
            Call::Read(slot, _, length) => {
                let (known, how) = self.of_slot(*slot)?;
                let refused = known.class == Class::Stream && how.read && *length > 0;
                refused.then_some(EOPNOTSUPP)
            }
            // It is written once, in order; a complete segment is not written again.
            Call::Write(slot, offset, fill) => {
                let (known, how) = self.of_slot(*slot)?;
                if !how.write || fill.length == 0 {
                    return None;
                }
                let before = !how.append && *offset < self.slot_size(*slot);
                let refused = match known.class {
                    Class::Stream => before,
                    Class::Segment => known.complete,
                    Class::List | Class::Small => false,
                };
                refused.then(|| self.spoil())
            }
            Call::Truncate(path, wanted) => {
                let size = self.path_size(path);
                let known = &self.files[*self.names.get(path)?];
                match known.class {
                    Class::Stream if *wanted > 0 && *wanted < size => {
                        self.spoil();
                        Some(EOPNOTSUPP)
                    }
                    Class::Segment if known.complete && *wanted > 0 && *wanted < size => {
                        Some(self.spoil())
                    }
                    _ => None,
                }
            }
            // Directories keep their names.
            Call::Rename(from, to) => {
                let is_directory = |path: &str| self.root.join(path).is_dir();
                let parent_there = is_directory(to.rsplit_once('/')?.0);
                let refused = is_directory(from) && from != to && parent_there;
                (refused && !self.names.contains_key(to)).then_some(EOPNOTSUPP)
            }
            _ => None,
        }
    }

    /// A server does not write two segments of one name, so this is not tried.
    fn would_conflict(&self, call: &Call) -> bool {
        let Call::Rename(from, to) = call else {
            return false;
        };
        let (Some(file), Some(name)) = (self.names.get(from), completes(from, to)) else {
            return false;
        };
        let known = &self.files[*file];
        if known.class != Class::Segment || !known.held || self.path_size(from) != SEGMENT {
            return false;
        }
        let earlier = self.segments.get(name);
        earlier.is_some_and(|earlier| *earlier != self.bytes(from))
    }

    fn bytes(&self, path: &str) -> Outcome {
        Outcome::of_bytes(&fs::read(self.root.join(path)).unwrap())
    }

    /// What a call will have changed, as it is before.
    fn before(&self, call: &Call) -> u64 {
        match call {
            Call::Write(slot, offset, _) => {
                let append = self.of_slot(*slot).is_some_and(|(_, how)| how.append);
                if append {
                    self.slot_size(*slot)
                } else {
                    *offset
                }
            }
            _ => 0,
        }
    }

    fn learn(&mut self, call: &Call, before: u64) {
        match call {
            Call::Open(slot, path, how) => self.opened(*slot, path, *how),
            Call::Write(slot, _, fill) => self.written(*slot, before, *fill),
            Call::Close(slot) => self.closed(*slot),
            Call::Unlink(path) => {
                self.names.remove(path);
            }
            Call::Rename(from, to) => self.renamed(from, to),
            Call::Truncate(path, size) => {
                if let Some(file) = self.names.get(path).copied() {
                    self.files[file].truncated(*size);
                    self.maybe_complete(file);
                }
            }
            _ => {}
        }
    }

    fn opened(&mut self, slot: usize, path: &str, how: How) {
        let file = if let Some(file) = self.names.get(path) {
            *file
        } else {
            self.files.push(Known::new(Class::of(path)));
            self.names.insert(path.to_owned(), self.files.len() - 1);
            self.files.len() - 1
        };
        if how.truncate {
            self.files[file].truncated(0);
        }
        self.slots[slot] = Some(Slot { file, how });
    }

    fn written(&mut self, slot: usize, offset: u64, fill: Fill) {
        let size = self.slot_size(slot);
        let Some(slot) = self.slots[slot] else {
            return;
        };
        let known = &mut self.files[slot.file];
        let zero = fill.bytes().iter().all(|byte| *byte == 0);
        known.held |= !zero;
        if (known.padded || !zero) && offset <= known.front {
            known.front = known.front.max(offset + fill.length as u64);
        }
        known.padded |= size == SEGMENT;
    }

    fn closed(&mut self, slot: usize) {
        if let Some(slot) = self.slots[slot].take()
            && slot.how.write
        {
            self.maybe_complete(slot.file);
        }
    }

    /// A segment that a writer closes after it was written to its end is complete.
    fn maybe_complete(&mut self, file: usize) {
        let path = self.names.iter().find(|(_, named)| **named == file);
        let Some(path) = path.map(|(path, _)| path.clone()) else {
            return;
        };
        let known = &self.files[file];
        let full = self.path_size(&path) == SEGMENT && known.front == SEGMENT;
        if full && let Some(name) = final_name(&path) {
            self.complete(file, &path, name);
        }
    }

    fn complete(&mut self, file: usize, path: &str, name: &str) {
        let bytes = self.bytes(path);
        let known = &mut self.files[file];
        if known.class == Class::Segment && known.held && !known.complete {
            known.complete = true;
            let earlier = self.segments.insert(name.to_owned(), bytes.clone());
            assert!(
                earlier.is_none_or(|earlier| earlier == bytes),
                "two of {name}"
            );
        }
    }

    fn renamed(&mut self, from: &str, to: &str) {
        if from == to {
            return;
        }
        if let Some(file) = self.names.remove(from) {
            self.names.insert(to.to_owned(), file);
            if let Some(name) = completes(from, to)
                && self.path_size(to) == SEGMENT
            {
                self.complete(file, to, name);
            }
        }
    }

    /// Looks at everything at the end, and reads what can be read.
    fn look_around(&mut self) {
        for slot in 0..SLOTS {
            self.call(Call::Close(slot));
        }
        for directory in DIRECTORIES {
            self.call(Call::Stat(directory.to_owned()));
            self.call(Call::List(directory.to_owned()));
        }
        let read = How {
            read: true,
            ..How::default()
        };
        for path in FILES {
            self.call(Call::Stat(path.to_owned()));
            self.call(Call::Open(0, path.to_owned(), read));
            self.call(Call::Read(0, 0, 4 << 20));
            self.call(Call::Close(0));
        }
    }

    fn tree(&self) -> BTreeMap<String, (u32, Option<Outcome>)> {
        let mut tree = BTreeMap::new();
        for directory in DIRECTORIES {
            if let Ok(found) = fs::symlink_metadata(self.root.join(directory)) {
                tree.insert(directory.to_owned(), (found.mode() & 0o7777, None));
            }
        }
        for path in self
            .names
            .keys()
            .filter(|path| !path.ends_with("/backup.pid"))
        {
            let found = fs::symlink_metadata(self.root.join(path)).unwrap();
            let entry = (found.mode() & 0o7777, Some(self.bytes(path)));
            tree.insert(path.clone(), entry);
        }
        tree
    }
}

impl Known {
    fn new(class: Class) -> Self {
        Self {
            class,
            padded: false,
            front: 0,
            held: false,
            complete: false,
        }
    }

    fn truncated(&mut self, size: u64) {
        if size == 0 {
            *self = Self::new(self.class);
        } else if !self.complete {
            self.front = self.front.min(size);
            self.padded |= size == SEGMENT;
        }
    }
}

/// The name of a segment, if a path is that of a complete one.
fn final_name(path: &str) -> Option<&str> {
    let name = path.rsplit('/').next()?;
    (name.len() == 24 && name.starts_with('0')).then_some(name)
}

/// The name of the segment that a rename declares complete.
fn completes<'a>(from: &str, to: &'a str) -> Option<&'a str> {
    final_name(to).filter(|_| final_name(from).is_none())
}
