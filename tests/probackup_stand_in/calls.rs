//! The calls on the catalog: recorded ones of the real programs against those strace sees now.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use support::os::{self, Scratch};
use support::probackup::trace::{self, Call, Event, Patterns};
use support::probackup::{Kind, ProbackupUnderTest, replay};
use support::skip;

use crate::world::{INSTANCE, World, increment, next_second, run};

/// A way of treating files that only one side has, on purpose.
struct Difference {
    kind: Kind,
    class: &'static str,
    /// What the way begins with, or `""` for all of the class.
    way: &'static str,
    reason: &'static str,
}

/// Every difference between the recordings and the stand-in that is meant.
const MEANT: [Difference; 7] = [
    Difference {
        kind: Kind::Gs,
        class: "backup_label",
        way: "",
        reason: "the server has no exclusive backup mode, so there is no backup_label in its data directory to copy: it \
                 is written and read back, as gs_probackup does on a standby",
    },
    Difference {
        kind: Kind::Gs,
        class: "pg_control",
        way: "",
        reason: "the recording shows writes that the kernel split at pages; open, sync and close are looked at by the next test",
    },
    Difference {
        kind: Kind::Gs,
        class: "WAL segment",
        way: "create 600, pad, overwrite, fsync, close, rename, open RDONLY, read whole",
        reason: "of a page that the kernel has in its cache a FUSE file system sees no read: how often the last segment is \
                 read in parts differs",
    },
    Difference {
        kind: Kind::Gs,
        class: "configuration",
        way: "open RDONLY, read whole, close",
        reason: "the recording of the increment begins after the program has read its configuration",
    },
    Difference {
        kind: Kind::Pg,
        class: "WAL segment",
        way: "create 600 WRONLY, pad, overwrite, close, open RDONLY, read whole, close",
        reason: "whether the last segment is read again after that depends on when the server's last message comes: the real \
                 program shows both",
    },
    Difference {
        kind: Kind::Gs,
        class: "parent",
        way: "",
        reason: "`access` of the parent's control file reaches a FUSE file system only when the kernel does not know the answer",
    },
    Difference {
        kind: Kind::Gs,
        class: "external file",
        way: "",
        reason: "a tablespace outside the data directory is in one recording only, and has a test of its own",
    },
];

fn is_meant(kind: Kind, class: &str, way: &str) -> bool {
    let found = MEANT.iter().find(|difference| {
        difference.kind == kind && difference.class == class && way.starts_with(difference.way)
    });
    if let Some(difference) = found {
        println!("meant: {class}: {way}: {}", difference.reason);
    }
    found.is_some()
}

/// Flags of an open that the recordings of `gs_probackup` do not say.
fn without_flags(kind: Kind, way: &str) -> String {
    let word = |word: &str| match word.strip_prefix("create ") {
        Some(rest) if kind == Kind::Gs => {
            format!("create {}", rest.split(' ').next().unwrap_or(rest))
        }
        _ => word.to_owned(),
    };
    way.split(", ").map(word).collect::<Vec<_>>().join(", ")
}

fn strace_is_here(test: &str) -> bool {
    let here = Command::new("strace").arg("--version").output().is_ok();
    if !here {
        skip(test, "strace is not installed");
    }
    here
}

/// Runs a command of the program under strace, as the database user; the calls on the catalog.
fn traced(
    scratch: &Scratch,
    program: &ProbackupUnderTest,
    arguments: &[String],
    catalog: &Path,
) -> Vec<Event> {
    let log = scratch.path().join("strace.log");
    let _ = fs::remove_file(&log);
    fs::write(&log, "").expect("a log");
    os::give(&log);
    let mut strace = os::command("strace");
    strace
        .args(trace::STRACE)
        .arg("-o")
        .arg(&log)
        .arg(program.path());
    run(strace.args(arguments).current_dir(scratch.path())).ok();
    trace::of_strace(&fs::read_to_string(&log).expect("strace's log"), catalog)
}

/// Directory of the newest backup that a sequence makes, relative to the catalog.
fn own(events: &[Event]) -> String {
    let made = events.iter().rev().find_map(|event| {
        let pid = event.path.strip_suffix("/backup.pid")?;
        matches!(event.call, Call::Create(..)).then(|| pid.to_owned())
    });
    made.expect("a backup")
}

fn compare(kind: Kind, what: &str, recorded: &[Event], seen: &[Event]) {
    let expected = Patterns::of(recorded, &own(recorded), kind);
    let found = Patterns::of(seen, &own(seen), kind);
    let classes: BTreeSet<_> = expected
        .by_class
        .keys()
        .chain(found.by_class.keys())
        .collect();
    let mut wrong = Vec::new();
    let nothing = BTreeSet::new();
    for class in classes {
        let ways = |patterns: &Patterns| -> BTreeSet<String> {
            let ways = patterns.by_class.get(class).unwrap_or(&nothing);
            ways.iter().map(|way| without_flags(kind, way)).collect()
        };
        let (expected, found) = (ways(&expected), ways(&found));
        for way in expected.symmetric_difference(&found) {
            if !is_meant(kind, class, way) {
                let side = if expected.contains(way) {
                    "recorded only"
                } else {
                    "seen only"
                };
                wrong.push(format!("{class}, {side}: {way}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{what}:\n{}", wrong.join("\n"));
    assert_eq!(found.unseen_parents, Vec::<String>::new(), "{what}");
    assert!(
        found.largest_data_write <= 64 << 10,
        "{what}: {}",
        found.largest_data_write
    );
    assert!(expected.largest_data_write <= 64 << 10);
    // Neither what the programs read of the log, nor, on openGauss, the label and what was before the recording.
    let in_order = |patterns: &Patterns| -> Vec<String> {
        let kept = |step: &&String| {
            let gs_only = ["backup_label", "configuration"];
            let left_out = kind == Kind::Gs && gs_only.iter().any(|class| step.starts_with(class));
            !left_out && *step != "WAL segment read"
        };
        let mut order: Vec<_> = patterns.order.iter().filter(kept).cloned().collect();
        order.dedup();
        order
    };
    assert_eq!(in_order(&found), in_order(&expected), "{what}: the order");
}

/// Init, add-instance: the calls themselves, in order.
fn calls_of(events: &[Event]) -> Vec<String> {
    let call = |event: &Event| {
        let call = match &event.call {
            // The text's length is the data directory's.
            Call::Write(at, _) => format!("write at {at}"),
            Call::Create(mode, _) => format!("create {mode:o}"),
            other => format!("{other:?}"),
        };
        format!("{} {call}", event.path).replace("i1", INSTANCE)
    };
    events.iter().map(call).collect()
}

fn beginnings(kind: Kind) -> Vec<Event> {
    if kind == Kind::Pg {
        return [
            trace::recorded("pg-init"),
            trace::recorded("pg-add-instance"),
        ]
        .concat();
    }
    let events = trace::recorded("gs-full");
    let end = events
        .iter()
        .position(|event| matches!(event.call, Call::Rename(_)))
        .expect("pg_probackup.conf");
    events[..=end].to_vec()
}

fn calls_are_the_recorded_ones(program: &ProbackupUnderTest, test: &str) {
    if !strace_is_here(test) {
        return;
    }
    let kind = program.kind();
    let world = World::checked("calls");
    // What a young cluster has none of: a large file that is no relation, and one that ends in zeros.
    let extra = world.cluster.data_directory().join("extra.dat");
    fs::write(&extra, vec![7; 300 << 10]).expect("a file");
    fs::set_permissions(&extra, fs::Permissions::from_mode(0o600)).expect("chmod");
    os::give(&extra);
    let catalog = world.scratch.directory("traced").join("catalog");
    let place = catalog.display().to_string();
    let data = world.cluster.data_directory().display().to_string();
    let words = |words: &[&str]| {
        words
            .iter()
            .map(|word| (*word).to_owned())
            .collect::<Vec<_>>()
    };
    let mut begun = traced(
        &world.scratch,
        program,
        &words(&["init", "-B", &place]),
        &catalog,
    );
    let add = words(&[
        "add-instance",
        "-B",
        &place,
        "--instance",
        INSTANCE,
        "-D",
        &data,
    ]);
    begun.extend(traced(&world.scratch, program, &add, &catalog));
    assert_eq!(calls_of(&begun), calls_of(&beginnings(kind)));

    let (full, increment_of) = match kind {
        Kind::Gs => ("gs-full", "gs-ptrack"),
        Kind::Pg => ("pg-full", "pg-delta"),
    };
    let threads = if kind == Kind::Gs { 2 } else { 1 };
    let arguments = world.backup_arguments(&catalog, "FULL", threads);
    let seen = traced(&world.scratch, program, &arguments, &catalog);
    let mut recorded = trace::recorded(full);
    if kind == Kind::Gs {
        recorded.drain(..beginnings(kind).len());
    }
    compare(kind, full, &recorded, &seen);

    run(world.client("pgbench").args(["-n", "-t", "50", "postgres"])).ok();
    let arguments = world.backup_arguments(&catalog, increment(kind), threads);
    next_second();
    let seen = traced(&world.scratch, program, &arguments, &catalog);
    compare(kind, increment_of, &trace::recorded(increment_of), &seen);
}

#[test]
fn as_gs_probackup_it_makes_the_recorded_calls() {
    let program = ProbackupUnderTest::stand_in(Kind::Gs);
    calls_are_the_recorded_ones(&program, "as_gs_probackup_it_makes_the_recorded_calls");
}

#[test]
fn as_pg_probackup_it_makes_the_recorded_calls() {
    let program = ProbackupUnderTest::stand_in(Kind::Pg);
    calls_are_the_recorded_ones(&program, "as_pg_probackup_it_makes_the_recorded_calls");
}

/// The recordings are those of the real program, of any that is here.
#[test]
fn a_real_pg_probackup_makes_the_recorded_calls() {
    let test = "a_real_pg_probackup_makes_the_recorded_calls";
    match ProbackupUnderTest::real(Kind::Pg) {
        Some(program) => {
            println!("{program}");
            calls_are_the_recorded_ones(&program, test);
        }
        None => skip(test, "no pg_probackup on PATH"),
    }
}

/// What the comparison leaves out of `gs_probackup`'s `pg_control`: flags apart, it is made, written, synced and closed.
#[test]
fn pg_control_is_synced_although_nothing_is() {
    for name in ["gs-full", "gs-ptrack", "pg-full", "pg-delta"] {
        let events = trace::recorded(name);
        let of_control: Vec<_> = events
            .iter()
            .filter(|event| event.path.ends_with("global/pg_control"))
            .map(|event| match event.call {
                Call::Create(mode, _) => format!("create {mode:o}"),
                Call::Write(..) => "write".to_owned(),
                ref other => format!("{other:?}"),
            })
            .collect();
        let mut steps = of_control.clone();
        steps.dedup();
        assert_eq!(steps, ["create 600", "write", "Sync", "Close"], "{name}");
    }
}

/// A recorded sequence works on a plain directory: no call fails, and what is read is what the real program got.
#[test]
fn recorded_sequences_can_be_replayed() {
    let place = Scratch::new("replay");
    let gs = ["gs-full", "gs-ptrack"].as_slice();
    let pg = ["pg-init", "pg-add-instance", "pg-full", "pg-delta"].as_slice();
    for chain in [gs, pg] {
        let root = place.directory(chain[0]);
        for name in chain {
            let events = trace::recorded(name);
            // The first call makes the catalog, which is there.
            let events: Vec<_> = events
                .into_iter()
                .filter(|event| event.path != ".")
                .collect();
            replay::prepare(&events, &root);
            let outcome = replay::run(&events, &root);
            let unlike = replay::unlike_the_record(&events, &outcome);
            assert!(unlike.is_empty(), "{name}: {unlike:?}");
        }
    }
}
