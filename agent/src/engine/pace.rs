//! A copy that leaves the processors to the database.
//!
//! A low priority is not enough: Linux weighs threads within a session or a control group only, and the database is in another one;
//! a thread that the kernel stops in the middle of a read may hold what a writer of the same file waits for. So the copy itself
//! stops, between two frames, when the machine has so much to do that others would wait for it.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use pipeline::pace::{Pace, WeakPace};

use crate::managers::postmaster;
use crate::operation::Reporter;

/// How often the machine is looked at.
const LOOK: Duration = Duration::from_millis(250);
/// How often the database's processes are, after the first looks: there can be thousands.
const LOOK_AT_DATABASE: Duration = Duration::from_secs(2);
/// Looks from the beginning on that the database's processes are part of.
const FIRST_LOOKS: u32 = 8;
/// A database that takes less than this is idle: a copy beside it may have all there is.
const AT_WORK: f64 = 0.05;
/// How much longer others may wait for a core because of the copy, as a share of the time that they compute at a stretch.
const DELAY: f64 = 0.05;
/// The copy may always have this share of the machine: a backup must come to its end.
const LEAST: f64 = 0.03;
/// Looks after which a copy that is held up is spoken of: a minute's.
const HELD_UP: u32 = 240;
/// Weight of a new look against those before it.
const FRESH: f64 = 0.3;

/// A pace that follows what the machine and the database in `pgdata` are doing, for as long as it is somebody's. If it holds a copy up
/// for long, `report` says so.
pub(super) fn gentle(pgdata: &Path, report: &Reporter) -> Pace {
    let pace = Pace::default();
    let (weak, pgdata, report) = (pace.downgrade(), pgdata.to_owned(), report.clone());
    let thread = thread::Builder::new().name("gs-pace".into());
    if let Err(error) = thread.spawn(move || follow(&weak, &pgdata, &report)) {
        tracing::warn!("the copy does not give way to the database: {error}");
    }
    pace
}

fn follow(weak: &WeakPace, pgdata: &Path, report: &Reporter) {
    let mut last: Option<Look> = None;
    let mut slow = Slow::default();
    let mut database = Database::new(pgdata);
    let mut others = None;
    while let Some(pace) = weak.upgrade() {
        let Some(look) = Look::now(&pace) else {
            tracing::warn!("the copy does not give way to the database: no /proc/stat");
            return;
        };
        database.look();
        if let Some(last) = last {
            let now = look.others_since(&last);
            let before = others.unwrap_or(now);
            let smooth = before + FRESH * (now - before);
            others = Some(smooth);
            let limit = database.works().then(|| allowed(look.cores, smooth));
            tracing::debug!(cores = look.cores, others = smooth, ?limit, "pace");
            pace.limit(limit);
            if let Some(words) = slow.look(look.copy - last.copy, limit) {
                report.warning(words);
            }
        }
        last = Some(look);
        drop(pace);
        pause(LOOK);
    }
}

/// Whether the copy is held up, and for how long.
#[derive(Debug, Default)]
struct Slow {
    looks: u32,
    said: bool,
}

impl Slow {
    /// Words for the operator, once, when a copy that took `seconds` of a core since the last look has for a minute been using all of a
    /// limit that is not worth a core.
    fn look(&mut self, seconds: f64, limit: Option<f64>) -> Option<String> {
        let held_up =
            limit.filter(|limit| *limit < 1.0 && seconds >= limit * LOOK.as_secs_f64() / 2.0);
        let Some(cores) = held_up else {
            // A frame may take longer than a look.
            self.looks = self.looks.saturating_sub(1);
            return None;
        };
        self.looks += 1;
        if self.said || self.looks < HELD_UP {
            return None;
        }
        self.said = true;
        Some(format!(
            "this host's processors are busy: the copy takes {:.0} % of one of them, so that the database does not wait for it; \
             `--pace full` takes all there is",
            cores * 100.0
        ))
    }
}

/// Cores that a copy may use on a machine of `cores`, of which others use `others`.
fn allowed(cores: f64, others: f64) -> f64 {
    let load = (others / cores).clamp(0.0, 1.0);
    let most = delay(cores, load) + DELAY;
    // Between these two the delay is what may be; it grows with the load.
    let (mut low, mut high) = (load, 1.0);
    for _ in 0..30 {
        let middle = f64::midpoint(low, high);
        if delay(cores, middle) <= most {
            low = middle;
        } else {
            high = middle;
        }
    }
    ((low - load) * cores).max(LEAST * cores)
}

/// How long one waits for one of `cores` that are at work for this share of the time, in units of the time that one computes at a stretch.
/// The approximation of H. Sakasegawa (1977) for a queue before several servers.
fn delay(cores: f64, load: f64) -> f64 {
    load.powf((2.0 * (cores + 1.0)).sqrt() - 1.0) / (cores * (1.0 - load))
}

/// What the machine did so far, in seconds of one core.
#[derive(Debug, Clone, Copy)]
struct Look {
    at: Instant,
    cores: f64,
    busy: f64,
    copy: f64,
}

impl Look {
    fn now(pace: &Pace) -> Option<Self> {
        let (cores, busy) = machine(&fs::read_to_string("/proc/stat").ok()?)?;
        Some(Self {
            at: Instant::now(),
            cores,
            busy: busy / ticks_a_second(),
            copy: pace.spent().as_secs_f64(),
        })
    }

    /// Cores at work for others than the copy.
    fn others_since(&self, last: &Self) -> f64 {
        let seconds = (self.at - last.at).as_secs_f64().max(0.001);
        let busy = (self.busy - last.busy) - (self.copy - last.copy);
        (busy / seconds).clamp(0.0, self.cores)
    }
}

#[expect(clippy::cast_precision_loss, reason = "it is 100")]
fn ticks_a_second() -> f64 {
    rustix::param::clock_ticks_per_second() as f64
}

/// Cores, and ticks that all of them were at work, of `/proc/stat` (`proc_stat(5)`): all but idle and waiting for disks.
fn machine(stat: &str) -> Option<(f64, f64)> {
    let is_core = |line: &&str| line.starts_with("cpu") && !line.starts_with("cpu ");
    let cores = stat.lines().filter(is_core).map(|_| 1.0).sum::<f64>();
    let all = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    // user nice system idle iowait irq softirq steal; a guest's time is in user's already.
    let ticks = all.split_whitespace().take(8).enumerate();
    let busy = ticks
        .filter(|(column, _)| *column != 3 && *column != 4)
        .map(|(_, ticks)| ticks.parse::<f64>())
        .sum::<Result<f64, _>>();
    (cores > 0.0).then_some((cores, busy.ok()?))
}

/// The database's processes.
#[derive(Debug)]
struct Database {
    pgdata: PathBuf,
    looks: u32,
    last: Option<(Instant, f64)>,
    works: bool,
}

impl Database {
    fn new(pgdata: &Path) -> Self {
        Self {
            pgdata: pgdata.to_owned(),
            looks: 0,
            last: None,
            // What cannot be seen is thought to be at work.
            works: true,
        }
    }

    /// Whether it was, when it was looked at last.
    fn works(&self) -> bool {
        self.works
    }

    fn look(&mut self) {
        self.looks = self.looks.saturating_add(1);
        let now = Instant::now();
        let due = |(at, _): (Instant, f64)| now - at >= LOOK_AT_DATABASE;
        if self.looks > FIRST_LOOKS && !self.last.is_none_or(due) {
            return;
        }
        let seen = family(&self.pgdata).map(|ticks| (now, ticks / ticks_a_second()));
        if let (Some((at, seconds)), Some((last, before))) = (seen, self.last) {
            // Less than before: one that ended and was not counted elsewhere.
            let used = (seconds - before).max(0.0) / (at - last).as_secs_f64().max(0.001);
            self.works = used >= AT_WORK;
        }
        self.last = seen;
        if seen.is_none() {
            self.works = true;
        }
    }
}

/// Ticks of the server, of its sessions, and of those that have ended.
fn family(pgdata: &Path) -> Option<f64> {
    let server = postmaster(pgdata)?;
    let stat = |pid: &str| fs::read_to_string(format!("/proc/{pid}/stat")).ok();
    let mut ticks = process(&stat(&server.to_string())?, true)?;
    let children = fs::read_to_string(format!("/proc/{server}/task/{server}/children")).ok()?;
    for child in children.split_whitespace() {
        // One that has ended meanwhile is among the server's own the next time.
        ticks += stat(child)
            .and_then(|text| process(&text, false))
            .unwrap_or(0.0);
    }
    Some(ticks)
}

/// Ticks of a process in all its threads, with those of its ended children if `ended`, of its `stat` (`proc_pid_stat(5)`).
fn process(stat: &str, ended: bool) -> Option<f64> {
    // The name may hold anything, blanks and parentheses too; the field after it is the third.
    let (_, rest) = stat.rsplit_once(')')?;
    let ticks = rest.split_whitespace().skip(11);
    let ticks = ticks.take(if ended { 4 } else { 2 });
    ticks.map(str::parse::<f64>).sum::<Result<f64, _>>().ok()
}

/// Lets a thread of the copy wait.
pub(super) fn pause(duration: Duration) {
    let _ = crossbeam_channel::never::<()>().recv_timeout(duration);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn less_is_left_for_a_copy_the_more_others_do_and_more_on_a_larger_machine() {
        let of = |cores: f64, load: f64| allowed(cores, cores * load);
        for cores in [1.0, 2.0, 8.0, 64.0] {
            let at: Vec<_> = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
                .map(|load| of(cores, load))
                .into();
            assert!(at.is_sorted_by(|a, b| a >= b), "{cores}: {at:?}");
            assert!(at[5] >= LEAST * cores && at[0] <= cores, "{cores}: {at:?}");
        }
        // Half of sixteen cores at work: a copy of four threads is hardly slowed down.
        assert!(of(16.0, 0.5) > 3.5, "{}", of(16.0, 0.5));
        assert!(of(2.0, 0.6) < 0.2, "{}", of(2.0, 0.6));
    }

    #[test]
    fn what_others_use_is_what_the_copy_did_not() {
        let stat = "cpu  100 20 30 1000 500 5 5 40 7 0\ncpu0 1 2 3\ncpu1 1 2 3\nintr 5\n";
        assert_eq!(machine(stat), Some((2.0, 200.0)));
        assert_eq!(machine("intr 5\n"), None);
        let at = Instant::now();
        let look = |seconds: u64, busy: f64, copy: f64| Look {
            at: at + Duration::from_secs(seconds),
            cores: 2.0,
            busy,
            copy,
        };
        let others = look(10, 16.0, 7.0).others_since(&look(0, 1.0, 2.0));
        assert!((others - 1.0).abs() < 1e-9, "{others}");
    }

    #[test]
    fn a_copy_that_is_held_up_is_spoken_of_once() {
        let mut slow = Slow::default();
        let said = (0..1000).filter_map(|_| slow.look(0.025, Some(0.1)));
        let said: Vec<_> = said.collect();
        assert_eq!(said.len(), 1);
        assert!(said[0].contains("10 % of one"), "{said:?}");
        for (seconds, limit) in [(0.25, None), (0.25, Some(1.5)), (0.001, Some(0.5))] {
            let mut slow = Slow::default();
            let said = (0..1000).filter_map(|_| slow.look(seconds, limit)).count();
            assert_eq!(said, 0, "{seconds} {limit:?}");
        }
    }

    #[test]
    fn a_name_with_parentheses_is_no_field() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 1 2 3 4 11 12 13 14 20 0 1 0 5";
        assert_eq!(process(stat, false), Some(23.0));
        assert_eq!(process(stat, true), Some(50.0));
        assert_eq!(process("7 (a", false), None);
    }

    /// This test is the database: it idles, then it works.
    #[test]
    fn a_database_that_idles_is_told_from_one_that_works() {
        let directory = tempfile::tempdir().unwrap();
        let mut database = Database::new(directory.path());
        database.look();
        assert!(database.works(), "nothing is known of it");
        let mut idle = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        fs::write(
            directory.path().join("postmaster.pid"),
            format!("{}\n", idle.id()),
        )
        .unwrap();
        database.look();
        pause(Duration::from_millis(300));
        database.look();
        assert!(!database.works());
        idle.kill().unwrap();
        idle.wait().unwrap();
        let mut busy = std::process::Command::new("sh")
            .args(["-c", "while :; do :; done"])
            .spawn()
            .unwrap();
        fs::write(
            directory.path().join("postmaster.pid"),
            format!("{}\n", busy.id()),
        )
        .unwrap();
        let until = Instant::now() + Duration::from_secs(30);
        while !database.works() && Instant::now() < until {
            database.looks = 0;
            database.look();
            pause(Duration::from_millis(100));
        }
        busy.kill().unwrap();
        busy.wait().unwrap();
        assert!(database.works());
    }
}
