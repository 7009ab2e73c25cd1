//! Things that go wrong because a test asked for it, by the environment variable `PROBACKUP_STAND_IN_FAULTS`.
//!
//! It holds orders separated by commas, `STEP:FAULT`. Steps, in order:
//!
//! | step | when |
//! |---|---|
//! | `begin` | the backup's directory, lock and first backup.control exist |
//! | `started` | the server is in backup mode |
//! | `streaming` | the first WAL segment is padded |
//! | `copying` | the first file of the data directory is copied |
//! | `half` | half of the files are |
//! | `copied` | all are, pg_control too |
//! | `stopped` | the server's backup mode has ended |
//! | `end` | all that is left is backup.control with the status |
//! | `restoring` | `restore` and `validate`: before the first file |
//!
//! | fault | what happens |
//! |---|---|
//! | `pause=FILE` | makes `FILE.reached`, goes on when `FILE` exists |
//! | `die` | fails as the program does on an error: cleans up, return code 1 |
//! | `kill` | SIGKILL to itself |
//! | `hang` | writes nothing any more, for ever; signals end it as they end the program |
//! | `flood=MIB` | as many MiB on standard error and on standard output, without one line's end |
//!
//! Without a step: `slow=MS` waits so long before each file it copies or restores; `forget=PATH` does not write the
//! file of this path, counts it in backup_content.control as if it had, and ends with return code 0.

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::Failure;
use super::log::Log;

/// The variable.
pub const VARIABLE: &str = "PROBACKUP_STAND_IN_FAULTS";

/// Set by SIGTERM and SIGINT, looked at wherever the real programs look.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Says that a signal to end has come.
pub(super) fn interrupt() {
    INTERRUPTED.store(true, Ordering::SeqCst);
    for thread in WAITING.lock().expect("no panic under it").iter() {
        thread.unpark();
    }
}

/// Threads in [`wait`].
static WAITING: std::sync::Mutex<Vec<std::thread::Thread>> = std::sync::Mutex::new(Vec::new());

/// Whether a signal to end has come.
pub(super) fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// Waits, but not past a signal to end.
pub(super) fn wait(time: Duration) -> Result<(), Failure> {
    let me = std::thread::current();
    WAITING.lock().expect("no panic under it").push(me.clone());
    let until = std::time::Instant::now() + time;
    while let Some(left) = until.checked_duration_since(std::time::Instant::now())
        && !interrupted()
    {
        std::thread::park_timeout(left);
    }
    let mut waiting = WAITING.lock().expect("no panic under it");
    if let Some(at) = waiting.iter().position(|thread| thread.id() == me.id()) {
        waiting.swap_remove(at);
    }
    if interrupted() {
        return Err(Failure::new("interrupted"));
    }
    Ok(())
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Fault {
    Pause(PathBuf),
    Die,
    Kill,
    Hang,
    Flood(usize),
}

/// What was ordered.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Faults {
    at: Vec<(String, Fault)>,
    slow: Duration,
    forget: Option<String>,
}

const STEPS: [&str; 9] = [
    "begin",
    "started",
    "streaming",
    "copying",
    "half",
    "copied",
    "stopped",
    "end",
    "restoring",
];

impl Faults {
    /// Reads the variable. An order that is not understood is an error: a test that orders nothing proves nothing.
    pub(super) fn from_environment() -> Result<Self, Failure> {
        Self::parse(&std::env::var(VARIABLE).unwrap_or_default())
    }

    fn parse(text: &str) -> Result<Self, Failure> {
        let mut faults = Self::default();
        for order in text.split(',').filter(|order| !order.is_empty()) {
            let bad = || Failure::new(format!("{VARIABLE}: not understood: {order}"));
            let number = |text: &str| text.parse::<u64>().map_err(|_| bad());
            if let Some(time) = order.strip_prefix("slow=") {
                faults.slow = Duration::from_millis(number(time)?);
                continue;
            }
            if let Some(path) = order.strip_prefix("forget=") {
                faults.forget = Some(path.to_owned());
                continue;
            }
            let (step, fault) = order.split_once(':').ok_or_else(bad)?;
            let fault = match fault.split_once('=') {
                None if fault == "die" => Fault::Die,
                None if fault == "kill" => Fault::Kill,
                None if fault == "hang" => Fault::Hang,
                Some(("pause", file)) => Fault::Pause(file.into()),
                Some(("flood", mib)) => {
                    Fault::Flood(usize::try_from(number(mib)?).map_err(|_| bad())?)
                }
                _ => return Err(bad()),
            };
            if !STEPS.contains(&step) {
                return Err(bad());
            }
            faults.at.push((step.to_owned(), fault));
        }
        Ok(faults)
    }

    /// Does what was ordered for this step.
    pub(super) fn reach(&self, step: &str, log: Log) -> Result<(), Failure> {
        debug_assert!(STEPS.contains(&step));
        for (_, fault) in self.at.iter().filter(|(at, _)| at == step) {
            match fault {
                Fault::Pause(file) => pause(file)?,
                Fault::Die => return Err(Failure::new(format!("ordered to die at {step}"))),
                Fault::Kill => {
                    let me = rustix::process::getpid();
                    let _ = rustix::process::kill_process(me, rustix::process::Signal::KILL);
                }
                Fault::Hang => loop {
                    wait(Duration::from_hours(1))?;
                },
                Fault::Flood(mib) => {
                    let text = "no end of a line ".repeat(65536 / 17);
                    for _ in 0..mib * 16 {
                        log.raw(&text);
                        let _ = io::stdout().write_all(text.as_bytes());
                    }
                }
            }
        }
        Ok(())
    }

    /// Before each file.
    pub(super) fn before_file(&self) -> Result<(), Failure> {
        if interrupted() {
            return Err(Failure::new("interrupted during backup"));
        }
        if self.slow > Duration::ZERO {
            wait(self.slow)?;
        }
        Ok(())
    }

    /// Whether the file of this path is to be forgotten.
    pub(super) fn forgets(&self, path: &str) -> bool {
        self.forget.as_deref() == Some(path)
    }
}

fn pause(file: &Path) -> Result<(), Failure> {
    let reached = PathBuf::from(format!("{}.reached", file.display()));
    std::fs::write(&reached, "").map_err(|e| Failure::call("create file", &reached, e))?;
    while !file.exists() {
        wait(Duration::from_millis(20))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_understood_or_refused() {
        let faults = Faults::parse("begin:die,half:pause=/x,slow=5,forget=base/1/2").unwrap();
        assert_eq!(faults.slow, Duration::from_millis(5));
        assert!(faults.forgets("base/1/2") && !faults.forgets("base/1/3"));
        assert_eq!(faults.at.len(), 2);
        for bad in ["begin:dye", "begun:die", "slow=x", "die", "half:flood=x"] {
            assert!(Faults::parse(bad).is_err(), "{bad}");
        }
        assert!(
            faults
                .reach("begin", Log::new(super::super::Kind::Pg))
                .is_err()
        );
    }
}
