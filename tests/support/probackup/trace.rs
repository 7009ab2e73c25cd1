//! Sequences of calls on a catalog: recorded ones (`tests/fixtures/probackup`), those that strace saw, and what of
//! them must be the same for the real programs and for the stand-in.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::Path;

use super::Kind;

/// A call, without the path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Call {
    /// `access`.
    Access,
    /// `mkdir` with a mode.
    MakeDirectory(u32),
    /// Reading a directory.
    List,
    /// `chmod`.
    ChangeMode(u32),
    /// `unlink`.
    Unlink,
    /// `rename` to a path.
    Rename(String),
    /// `fsync`.
    Sync,
    /// `close`.
    Close,
    /// An open that made the file: mode, and flags if they are known.
    Create(u32, Option<String>),
    /// An open of a file that was there.
    Open(String),
    /// One write: offset and bytes.
    Write(u64, u64),
    /// One read: offset, bytes asked for, bytes got.
    Read(u64, u64, u64),
}

/// A call on a path relative to the catalog.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The path.
    pub path: String,
    /// What was done.
    pub call: Call,
}

/// Reads a recorded sequence.
///
/// # Panics
/// If there is no such fixture, or it is not understood.
pub fn recorded(name: &str) -> Vec<Event> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures/probackup")
        .join(format!("{name}.trace.zst"));
    let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let text = zstd::decode_all(bytes.as_slice()).expect("zstd");
    let text = String::from_utf8(text).expect("text");
    text.lines().flat_map(line).collect()
}

fn line(line: &str) -> Vec<Event> {
    let words: Vec<_> = line.split(' ').collect();
    let understood = events(&words);
    understood.unwrap_or_else(|| panic!("not understood: {line}"))
}

fn events(words: &[&str]) -> Option<Vec<Event>> {
    let octal = |text: &str| u32::from_str_radix(text, 8).ok();
    let number = |text: &str| text.parse::<u64>().ok();
    let call = match *words {
        ["access", _] => Call::Access,
        ["readdir", _] => Call::List,
        ["unlink", _] => Call::Unlink,
        ["fsync", _] => Call::Sync,
        ["close", _] => Call::Close,
        ["mkdir", _, mode] => Call::MakeDirectory(octal(mode)?),
        ["chmod", _, mode] => Call::ChangeMode(octal(mode)?),
        ["rename", _, to] => Call::Rename(to.to_owned()),
        ["create", _, mode, flags] => {
            Call::Create(octal(mode)?, (flags != "?").then(|| flags.to_owned()))
        }
        ["open", _, flags] => Call::Open(flags.to_owned()),
        ["read", _, what] => {
            let (asked, rest) = what.split_once('@')?;
            let (offset, got) = rest.split_once('=')?;
            Call::Read(number(offset)?, number(asked)?, number(got)?)
        }
        ["write", path, what, ref times @ ..] => {
            let (bytes, offset) = what.split_once('@')?;
            let (bytes, offset) = (number(bytes)?, number(offset)?);
            let times = match times {
                [] => 1,
                [times] => number(times.strip_prefix('x')?)?,
                _ => return None,
            };
            let event = |at: u64| Event {
                path: path.to_owned(),
                call: Call::Write(offset + at * bytes, bytes),
            };
            return Some((0..times).map(event).collect());
        }
        _ => return None,
    };
    Some(vec![Event {
        path: (*words.get(1)?).to_owned(),
        call,
    }])
}

/// What strace writes down for [`of_strace`].
pub const STRACE: [&str; 6] = [
    "-f",
    "-y",
    "-s",
    "0",
    "-e",
    "trace=openat,open,close,read,write,lseek,fsync,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,chmod,fchmodat,\
     access,faccessat,faccessat2,getdents64",
];

/// State of an open file while strace's output is read.
struct Descriptor {
    path: String,
    position: u64,
}

struct Strace<'a> {
    root: &'a str,
    open: HashMap<String, Descriptor>,
    exists: HashSet<String>,
    events: Vec<Event>,
}

/// Reads the output of `strace` with the options [`STRACE`] and keeps the calls on the catalog at `root` that succeeded.
/// Files made under a umask of 022 are assumed.
///
/// # Panics
/// If a line on the catalog is not understood.
pub fn of_strace(text: &str, root: &Path) -> Vec<Event> {
    let mut strace = Strace {
        root: root.to_str().expect("a path in UTF-8"),
        open: HashMap::new(),
        exists: HashSet::new(),
        events: Vec::new(),
    };
    let mut pending: HashMap<&str, &str> = HashMap::new();
    for line in text.lines() {
        let Some((pid, rest)) = line.split_once(' ') else {
            continue;
        };
        let rest = rest.trim_start();
        if let Some(begun) = rest.strip_suffix("<unfinished ...>") {
            pending.insert(pid, begun.trim_end());
            if begun.starts_with("close(") && begun.contains(strace.root) {
                // From here on another thread may be given the same number.
                strace.closed(begun);
            }
            continue;
        }
        let resumed = rest
            .strip_prefix("<... ")
            .and_then(|rest| rest.split_once(" resumed>"));
        let whole = match resumed {
            Some((_, end)) => format!("{}{end}", pending.remove(pid).unwrap_or_default()),
            None => rest.to_owned(),
        };
        if resumed.is_some_and(|(name, _)| name == "close") {
            continue;
        }
        if whole.contains(strace.root) {
            let known = strace.call(&whole);
            assert!(known.is_some(), "not understood: {whole}");
        }
    }
    strace.events
}

impl Strace<'_> {
    fn relative(&self, path: &str) -> Option<String> {
        let below = path.strip_prefix(self.root)?.trim_start_matches('/');
        Some(if below.is_empty() { "." } else { below }.to_owned())
    }

    fn push(&mut self, path: String, call: Call) {
        // One reading of a directory takes several calls.
        let again = Event { path, call };
        if again.call != Call::List || self.events.last() != Some(&again) {
            self.events.push(again);
        }
    }

    fn closed(&mut self, line: &str) {
        let number = line
            .strip_prefix("close(")
            .and_then(|rest| rest.split('<').next());
        if let Some(file) = number.and_then(|number| self.open.remove(number)) {
            self.push(file.path, Call::Close);
        }
    }

    fn call(&mut self, line: &str) -> Option<()> {
        let (name, rest) = line.split_once('(')?;
        let (arguments, result) = rest.rsplit_once(" = ")?;
        let arguments = arguments.trim_end().strip_suffix(')')?;
        if result.starts_with('-') {
            return Some(());
        }
        let quoted: Vec<_> = arguments.split('"').skip(1).step_by(2).collect();
        let path = quoted.iter().find_map(|path| self.relative(path));
        let octal = || u32::from_str_radix(arguments.rsplit(", ").next()?, 8).ok();
        let descriptor = arguments.split('<').next().unwrap_or_default().to_owned();
        match name {
            "openat" | "open" => self.opened(path?, arguments, result)?,
            "close" => {
                self.closed(line);
            }
            "read" | "write" => {
                let file = self.open.get_mut(&descriptor)?;
                let got: u64 = result.parse().ok()?;
                let at = file.position;
                file.position += got;
                let path = file.path.clone();
                let asked = arguments.rsplit(", ").next()?.parse().ok()?;
                let call = if name == "read" {
                    Call::Read(at, asked, got)
                } else {
                    Call::Write(at, got)
                };
                self.push(path, call);
            }
            "lseek" => self.open.get_mut(&descriptor)?.position = result.parse().ok()?,
            "fsync" => {
                let path = self.open.get(&descriptor)?.path.clone();
                self.push(path, Call::Sync);
            }
            "rename" | "renameat" | "renameat2" => {
                let mut both = quoted.iter().filter_map(|path| self.relative(path));
                let (from, to) = (both.next()?, both.next()?);
                drop(both);
                self.exists.remove(&from);
                self.exists.insert(to.clone());
                self.push(from, Call::Rename(to));
            }
            "unlink" | "unlinkat" => {
                self.exists.remove(path.as_ref()?);
                self.push(path?, Call::Unlink);
            }
            "mkdir" | "mkdirat" => self.push(path?, Call::MakeDirectory(octal()?)),
            "chmod" | "fchmodat" => {
                let mode = arguments.split(", ").find_map(|word| {
                    word.starts_with('0')
                        .then(|| u32::from_str_radix(word, 8).ok())?
                });
                self.push(path?, Call::ChangeMode(mode? & 0o7777));
            }
            "access" | "faccessat" | "faccessat2" => self.push(path?, Call::Access),
            "getdents64" => {
                let listed = arguments.split_once('<')?.1.split('>').next()?;
                let listed = self.relative(listed)?;
                self.push(listed, Call::List);
            }
            _ => return None,
        }
        Some(())
    }

    fn opened(&mut self, path: String, arguments: &str, result: &str) -> Option<()> {
        let words: Vec<_> = arguments.split(", ").collect();
        let flags = words.iter().find(|word| word.starts_with("O_"))?;
        let flags: Vec<_> = flags.split('|').collect();
        if flags.contains(&"O_DIRECTORY") {
            return Some(());
        }
        let kept = [
            "O_RDONLY", "O_WRONLY", "O_RDWR", "O_TRUNC", "O_APPEND", "O_EXCL",
        ];
        let told: Vec<_> = flags
            .iter()
            .filter(|flag| kept.contains(flag))
            .map(|flag| &flag[2..])
            .collect();
        let told = told.join("|");
        let call = if flags.contains(&"O_CREAT") && self.exists.insert(path.clone()) {
            let mode = u32::from_str_radix(words.last()?, 8).ok()?;
            Call::Create(mode & !0o022, Some(told))
        } else {
            Call::Open(told)
        };
        let descriptor = result.split('<').next()?.to_owned();
        let file = Descriptor {
            path: path.clone(),
            position: 0,
        };
        self.open.insert(descriptor, file);
        self.push(path, call);
        Some(())
    }
}

/// What a file is for the programs.
fn class(path: &str, own: &str) -> &'static str {
    let Some(below) = path
        .split_once(own)
        .map(|(_, below)| below.trim_start_matches('/'))
    else {
        let parent = path.starts_with("backups/") && path.split('/').count() > 3;
        return match path.rsplit('/').next() {
            Some(name) if name.starts_with("pg_probackup.conf") => "configuration",
            _ if parent => "parent",
            _ => "directory",
        };
    };
    let name = path.rsplit('/').next().unwrap_or_default();
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let is_relation = digits(name)
        || name
            .split_once('.')
            .is_some_and(|(a, b)| digits(a) && digits(b));
    match below {
        "backup.control" | "backup.control.tmp" => "backup.control",
        "backup_content.control" | "backup_content.control.tmp" => "backup_content.control",
        "backup.pid" => "backup.pid",
        "page_header_map" => "page_header_map",
        "database/global/pg_control" => "pg_control",
        "database/backup_label" | "database/tablespace_map" => "backup_label",
        "database/database_map" => "database_map",
        _ if below.starts_with("external_directories/") => "external file",
        _ if below.starts_with("database/pg_wal/") || below.starts_with("database/pg_xlog/") => {
            "WAL segment"
        }
        _ if is_relation
            && (below.starts_with("database/base/") || below.starts_with("database/global/")) =>
        {
            "data file"
        }
        _ if below.starts_with("database/") => "other file",
        _ => "directory",
    }
}

/// What must be the same.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Patterns {
    /// For each class of files: the ways they were treated, each from an open that made the file to the next.
    pub by_class: BTreeMap<&'static str, BTreeSet<String>>,
    /// What happened to the files there is one of, in order.
    pub order: Vec<String>,
    /// Directories that were made without a look at their parent before.
    pub unseen_parents: Vec<String>,
    /// The largest write to a data file, in bytes.
    pub largest_data_write: u64,
}

/// Tokens of one file since it was made.
#[derive(Default)]
struct Life {
    tokens: Vec<String>,
    size: u64,
    read: u64,
    reading_to: u64,
    /// Writes of exactly 8 KiB, one after the other.
    padding: u64,
}

impl Life {
    fn say(&mut self, token: String) {
        if self.tokens.last() != Some(&token) {
            self.tokens.push(token);
        }
    }

    fn write(&mut self, at: u64, bytes: u64) {
        let token = match at.cmp(&self.size) {
            std::cmp::Ordering::Equal => "write",
            std::cmp::Ordering::Less => "overwrite",
            std::cmp::Ordering::Greater => "gap, write",
        };
        self.size = self.size.max(at + bytes);
        self.padding = if bytes == 8192 && token == "write" {
            self.padding + 1
        } else {
            self.padding
        };
        if self.padding == 65 && self.tokens.last().is_some_and(|token| token == "write") {
            self.tokens.pop();
            self.tokens.push("pad".to_owned());
            return;
        }
        if token == "write" && self.tokens.last().is_some_and(|token| token == "pad") {
            return;
        }
        self.say(token.to_owned());
    }

    fn closed(&mut self) {
        if self.read > 0 {
            let whole = self.read >= self.size.max(self.reading_to);
            self.say(if whole { "read whole" } else { "read part" }.to_owned());
            self.read = 0;
        }
        self.say("close".to_owned());
    }
}

impl Patterns {
    /// Of one backup: the directory of its own is `own`, as in `backups/node/TOURVH`.
    pub fn of(events: &[Event], own: &str, kind: Kind) -> Self {
        let mut patterns = Self::default();
        let mut lives: HashMap<String, Life> = HashMap::new();
        let mut looked_at: HashSet<&str> = HashSet::new();
        for event in events {
            let class = class(&event.path, own);
            if class == "directory" {
                patterns.directory(event, &mut looked_at);
                continue;
            }
            patterns.milestone(event, class, kind);
            if matches!(event.call, Call::Create(..))
                && let Some(old) = lives.remove(&event.path)
            {
                patterns.add(class, &old);
            }
            // After a rename the same life goes on; the name that is free begins another.
            let key = match &event.call {
                Call::Rename(to) => {
                    let mut life = lives.remove(&event.path).unwrap_or_default();
                    life.say("rename".to_owned());
                    if let Some(old) = lives.insert(to.clone(), life) {
                        patterns.add(class, &old);
                    }
                    continue;
                }
                _ => event.path.clone(),
            };
            let life = lives.entry(key).or_default();
            patterns.live(event, class, life);
        }
        for (path, life) in &lives {
            patterns.add(class(path, own), life);
        }
        patterns
    }

    fn directory<'a>(&mut self, event: &'a Event, looked_at: &mut HashSet<&'a str>) {
        match &event.call {
            Call::Access => {
                looked_at.insert(&event.path);
            }
            Call::MakeDirectory(mode) => {
                let parent = event
                    .path
                    .rsplit_once('/')
                    .map_or(".", |(parent, _)| parent);
                if !looked_at.contains(parent) {
                    self.unseen_parents.push(event.path.clone());
                }
                let ways = self.by_class.entry("directory").or_default();
                ways.insert(format!("mkdir {mode:o}"));
            }
            _ => {}
        }
    }

    fn live(&mut self, event: &Event, class: &str, life: &mut Life) {
        match &event.call {
            Call::Create(mode, flags) => {
                let flags = flags
                    .as_deref()
                    .map_or(String::new(), |flags| format!(" {flags}"));
                life.say(format!("create {mode:o}{flags}"));
            }
            Call::Open(flags) => {
                life.reading_to = 0;
                life.say(format!("open {flags}"));
            }
            Call::ChangeMode(mode) => life.say(format!("chmod {mode:o}")),
            Call::Write(at, bytes) => {
                if class == "data file" {
                    self.largest_data_write = self.largest_data_write.max(*bytes);
                }
                life.write(*at, *bytes);
            }
            Call::Read(at, _, got) => {
                life.read += got;
                life.reading_to = life.reading_to.max(at + got);
            }
            Call::Sync => life.say("fsync".to_owned()),
            Call::Close => life.closed(),
            Call::Unlink => life.say("unlink".to_owned()),
            Call::Access => life.say("access".to_owned()),
            Call::List | Call::MakeDirectory(_) | Call::Rename(_) => {}
        }
    }

    fn add(&mut self, class: &'static str, life: &Life) {
        if !life.tokens.is_empty() {
            let ways = self.by_class.entry(class).or_default();
            ways.insert(life.tokens.join(", "));
        }
    }

    /// What is done once, by one thread, has a place in the order.
    fn milestone(&mut self, event: &Event, class: &'static str, kind: Kind) {
        let what = match (class, &event.call) {
            ("backup.pid", Call::Unlink) => "removed",
            ("backup.control" | "backup_content.control", Call::Rename(_)) => "written",
            ("pg_control", Call::Close) if kind == Kind::Pg => "copied",
            ("parent" | "configuration" | "WAL segment", Call::Open(_)) => "read",
            ("WAL segment", Call::Rename(_)) => "complete",
            ("page_header_map", Call::Sync) => "synced",
            ("backup.pid" | "database_map" | "backup_label", Call::Create(..)) => "made",
            ("database_map" | "backup_label", Call::Open(_)) => "read back",
            ("data file" | "other file" | "external file", Call::Create(..)) => "copied",
            _ => return,
        };
        let class = match class {
            "data file" | "other file" | "external file" => "files",
            other => other,
        };
        let milestone = format!("{class} {what}");
        if self.order.last() != Some(&milestone) {
            self.order.push(milestone);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn straces_are_read_with_interrupted_lines() {
        let text = "\
10 openat(AT_FDCWD</x>, \"/c/a.tmp\", O_WRONLY|O_CREAT|O_TRUNC|O_CLOEXEC, 0666) = 3</c/a.tmp>\n\
10 write(3</c/a.tmp>, \"\"..., 10 <unfinished ...>\n\
11 access(\"/c\", F_OK) = 0\n\
10 <... write resumed>) = 10\n\
10 lseek(3</c/a.tmp>, 0, SEEK_SET) = 0\n\
10 write(3</c/a.tmp>, \"\"..., 4) = 4\n\
10 close(3</c/a.tmp>) = 0\n\
10 renameat2(AT_FDCWD</x>, \"/c/a.tmp\", AT_FDCWD</x>, \"/c/a\", 0) = 0\n\
10 unlink(\"/c/gone\") = -1 ENOENT (No such file or directory)\n";
        let events = of_strace(text, Path::new("/c"));
        let calls: Vec<_> = events.iter().map(|event| event.call.clone()).collect();
        let made = Call::Create(0o644, Some("WRONLY|TRUNC".to_owned()));
        let expected = [
            made,
            Call::Access,
            Call::Write(0, 10),
            Call::Write(0, 4),
            Call::Close,
            Call::Rename("a".to_owned()),
        ];
        assert_eq!(calls, expected);
    }
}
