//! Where a process and its children write, as the kernel sees it: `strace` attached to all of their threads.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// Everything that puts bytes into a file, or could.
const CALLS: &str = "write,writev,pwrite64,pwritev,pwritev2,sendfile,splice,copy_file_range,fallocate,ftruncate,truncate,mmap,\
                     io_uring_enter";

/// A tracer that is attached.
#[derive(Debug)]
pub struct Watch {
    tracer: Child,
    output: PathBuf,
}

/// Whether there is a `strace` that may attach here.
pub fn available() -> bool {
    let works = Command::new("strace")
        .args(["-qq", "-e", "trace=none", "true"])
        .output();
    works.is_ok_and(|output| output.status.success())
}

impl Watch {
    /// Attaches to a process, and to every child that it starts from now on. `output` is a directory of its own.
    ///
    /// # Panics
    /// If that fails.
    pub fn attach(pid: u32, output: &Path) -> Self {
        fs::create_dir(output).expect("a directory for traces");
        let tracer = Command::new("strace")
            .args(["-ff", "-y", "-s", "0", "-e", "signal=none"])
            .arg("-e")
            .arg(format!("trace={CALLS}"))
            .arg("-o")
            .arg(output.join("trace"))
            .args(["-p", &pid.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(output.join("strace")).expect("its words"))
            .spawn()
            .expect("strace");
        let watch = Self {
            tracer,
            output: output.to_owned(),
        };
        let deadline = Instant::now() + Duration::from_secs(20);
        let attached = || {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let tracer = status.lines().find_map(|it| it.strip_prefix("TracerPid:"));
            tracer.is_some_and(|it| it.trim() != "0")
        };
        while !attached() {
            let words = fs::read_to_string(output.join("strace")).unwrap_or_default();
            assert!(Instant::now() < deadline, "strace does not attach: {words}");
            std::thread::park_timeout(Duration::from_millis(50));
        }
        watch
    }

    /// Detaches, and says what was written where, in bytes. A file that was made longer by other means than a write counts
    /// as that long, and one that was mapped to be written as one byte at least.
    ///
    /// # Panics
    /// If a line is not understood: what it says might have been a write.
    pub fn written(mut self) -> BTreeMap<String, u64> {
        let pid = Pid::from_child(&self.tracer);
        kill_process(pid, Signal::INT).expect("strace is there");
        self.tracer.wait().expect("strace ends");
        let mut written = BTreeMap::new();
        for entry in fs::read_dir(&self.output).expect("traces") {
            let path = entry.expect("a trace").path();
            let name = path.file_name().expect("a name").to_string_lossy();
            if !name.starts_with("trace") {
                continue;
            }
            for line in fs::read_to_string(&path).expect("a trace").lines() {
                if let Some((file, bytes)) = understood(line) {
                    *written.entry(file).or_default() += bytes;
                }
            }
        }
        written
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = kill_process(Pid::from_child(&self.tracer), Signal::INT);
        let _ = self.tracer.wait();
    }
}

/// The file that a line is about, and how many bytes went into it; `None`: none did.
fn understood(line: &str) -> Option<(String, u64)> {
    if line.starts_with("+++") || line.starts_with("---") {
        return None;
    }
    let (call, rest) = line
        .split_once('(')
        .unwrap_or_else(|| panic!("strace says `{line}`"));
    // Killed in the middle: nothing is known of what it did, so it counts.
    let result = rest.rsplit_once(" = ").map_or("1", |(_, result)| result);
    let result = result.split_whitespace().next().unwrap_or("1");
    if result.starts_with('-') || result == "?" {
        return None;
    }
    let files: Vec<&str> = descriptors(rest);
    let file = match call {
        "mmap" if rest.contains("MAP_SHARED") && rest.contains("PROT_WRITE") => files.first()?,
        "mmap" => return None,
        // From one descriptor to another.
        "splice" | "copy_file_range" => files.get(1)?,
        _ => files.first().unwrap_or(&"a file without a name"),
    };
    let number = |text: &str| {
        text.trim_matches(|it: char| !it.is_ascii_digit())
            .parse::<u64>()
    };
    let bytes = match call {
        "mmap" => 1,
        "fallocate" | "ftruncate" | "truncate" => {
            let arguments = rest.rsplit_once(" = ").map(|(before, _)| before);
            let last = arguments.and_then(|arguments| arguments.rsplit(", ").next());
            last.and_then(|last| number(last).ok()).unwrap_or(1)
        }
        _ => number(result).unwrap_or(1),
    };
    (bytes > 0).then(|| ((*file).to_owned(), bytes))
}

/// The paths in `5</a/path>, ...`, in their order.
fn descriptors(arguments: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut rest = arguments;
    while let Some((before, after)) = rest.split_once('<') {
        let of_number = before.ends_with(|it: char| it.is_ascii_digit());
        // `->` stands in what it says of sockets.
        let end = after
            .match_indices('>')
            .find(|(at, _)| !after[..*at].ends_with('-'));
        let Some((end, _)) = end else { break };
        if of_number {
            found.push(&after[..end]);
        }
        rest = &after[end + 1..];
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_line_is_understood() {
        let of = understood;
        let some = |file: &str, bytes| Some((file.to_owned(), bytes));
        assert_eq!(
            of("write(7</tmp/x y>, \"\"..., 65536) = 65536"),
            some("/tmp/x y", 65536)
        );
        assert_eq!(
            of("write(7</tmp/x>, \"\"..., 65536) = -1 EIO (Input/output error)"),
            None
        );
        assert_eq!(
            of("sendfile(9<TCP:[127.0.0.1:5->127.0.0.1:6]>, 5</tmp/a>, NULL, 10) = 10"),
            some("TCP:[127.0.0.1:5->127.0.0.1:6]", 10)
        );
        assert_eq!(
            of("copy_file_range(3</a>, NULL, 4</b>, NULL, 100, 0) = 100"),
            some("/b", 100)
        );
        assert_eq!(of("ftruncate(3</a>, 4096)       = 0"), some("/a", 4096));
        assert_eq!(
            of("mmap(NULL, 4096, PROT_READ|PROT_WRITE, MAP_SHARED, 3</a>, 0) = 0x7f00"),
            some("/a", 1)
        );
        assert_eq!(
            of("mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, 3</a>, 0) = 0x7f00"),
            None
        );
        assert_eq!(
            of("write(7</tmp/x>, \"\"..., 10 <unfinished ...>"),
            some("/tmp/x", 1)
        );
        assert_eq!(of("+++ exited with 0 +++"), None);
    }
}
