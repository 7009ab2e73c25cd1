//! What goes wrong: return codes, words, and what is left.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use support::postgres::ClusterOptions;
use support::probackup::{Kind, ProbackupUnderTest, faults};

use crate::world::{INSTANCE, Ran, World, control, ids, run};

fn backup(
    world: &World,
    program: &ProbackupUnderTest,
    catalog: &Path,
    mode: &str,
    orders: &str,
) -> Command {
    let mut command = program.command();
    command
        .args(world.backup_arguments(catalog, mode, 2))
        .env(faults::VARIABLE, orders);
    command
}

async fn wait_for(path: &Path) {
    let until = Instant::now() + Duration::from_secs(30);
    while !path.exists() {
        assert!(Instant::now() < until, "{} does not come", path.display());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// base36 of the seconds since 1970, as both programs name backups.
fn id_in(seconds: u64) -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("a clock")
        .as_secs();
    let mut left = now + seconds;
    let mut id = String::new();
    while left > 0 {
        let digit =
            char::from_digit(u32::try_from(left % 36).expect("a digit"), 36).expect("a digit");
        id.insert(0, digit.to_ascii_uppercase());
        left /= 36;
    }
    id
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_leave_what_the_real_programs_leave() {
    let world = World::checked("faults");
    for kind in [Kind::Gs, Kind::Pg] {
        let program = ProbackupUnderTest::stand_in(kind);
        let catalog = world.catalog(&program, kind.program());
        let instance = catalog.join("backups").join(INSTANCE);

        // An increment without a parent fails after backup mode is on, and leaves an entry.
        let mode = crate::world::increment(kind);
        run(&mut backup(&world, &program, &catalog, mode, ""))
            .fails_with("Create new full backup before an incremental one");
        let id = ids(&catalog).pop().expect("an entry");
        assert_eq!(control(&catalog, &id, "status"), "ERROR");
        tokio::time::sleep(Duration::from_millis(1100)).await;

        // Dies on the way: status ERROR, no lock left.
        run(&mut backup(&world, &program, &catalog, "FULL", "half:die"))
            .fails_with("setting its status to ERROR");
        let id = ids(&catalog).pop().expect("an entry");
        assert_eq!(control(&catalog, &id, "status"), "ERROR");
        assert!(!instance.join(&id).join("backup.pid").exists());
        tokio::time::sleep(Duration::from_millis(1100)).await;

        // Hangs, and is ended by SIGTERM: return code 1, backup mode off.
        let child = backup(&world, &program, &catalog, "FULL", "copying:hang")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("a child");
        let pid = rustix::process::Pid::from_raw(i32::try_from(child.id()).expect("a pid"))
            .expect("a pid");
        tokio::time::sleep(Duration::from_secs(3)).await;
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("SIGTERM");
        Ran::of(&child.wait_with_output().expect("it ends")).fails_with("interrupted");
        tokio::time::sleep(Duration::from_millis(1100)).await;

        // SIGKILL: RUNNING and a lock, for ever; the next backup does not care.
        run(&mut backup(
            &world,
            &program,
            &catalog,
            "FULL",
            "copied:kill",
        ));
        let id = ids(&catalog).pop().expect("an entry");
        assert_eq!(control(&catalog, &id, "status"), "RUNNING");
        assert!(instance.join(&id).join("backup.pid").exists());
        tokio::time::sleep(Duration::from_millis(1100)).await;

        // Return code 0 with a file missing: the list says it is there.
        run(&mut backup(
            &world,
            &program,
            &catalog,
            "FULL",
            "forget=PG_VERSION",
        ))
        .ok();
        let id = ids(&catalog).pop().expect("an entry");
        let text = std::fs::read_to_string(instance.join(&id).join("backup_content.control"))
            .expect("the list");
        assert!(
            text.contains("{\"path\":\"PG_VERSION\", \"size\":\"3\""),
            "{text}"
        );
        assert!(!instance.join(&id).join("database/PG_VERSION").exists());
        let mut validate = program.command();
        run(validate
            .args(["validate", "--instance", INSTANCE, "-i", &id, "-B"])
            .arg(&catalog))
        .fails_with("is corrupt.");
        tokio::time::sleep(Duration::from_millis(1100)).await;

        // A flood without a line's end does not stop it.
        let ran = run(&mut backup(
            &world,
            &program,
            &catalog,
            "FULL",
            "started:flood=2",
        ))
        .ok();
        assert!(ran.stderr.lines().any(|line| line.len() > 1 << 20));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn gs_probackup_has_its_own_ways() {
    let program = ProbackupUnderTest::stand_in(Kind::Gs);
    let world = World::checked("ways");
    let catalog = world.catalog(&program, "catalog");
    let instance = catalog.join("backups").join(INSTANCE);

    // Ids are seconds: the second start of one finds the directory of the first.
    let taken: Vec<_> = (0..60).map(|it| instance.join(id_in(it))).collect();
    for directory in &taken {
        std::fs::create_dir(directory).expect("a directory");
    }
    run(&mut backup(&world, &program, &catalog, "FULL", ""))
        .fails_with("backup destination is not empty");
    for directory in &taken {
        // The program may have put something into its own.
        std::fs::remove_dir_all(directory).expect("it goes");
    }
    tokio::time::sleep(Duration::from_millis(1100)).await;

    // Two at once: the second is told, the first goes on.
    let go = world.scratch.path().join("node/go");
    let orders = format!("copied:pause={}", go.display());
    let first = backup(&world, &program, &catalog, "FULL", &orders)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("a child");
    wait_for(&go.with_extension("reached")).await;
    // In another second, so that the second has an id of its own.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    run(&mut backup(&world, &program, &catalog, "FULL", ""))
        .fails_with("a backup is already in progress");
    std::fs::write(&go, "").expect("go");
    let first = Ran::of(&first.wait_with_output().expect("it ends")).ok();
    assert!(
        first.stderr.contains("\r[20"),
        "the WAL client's lines: {}",
        first.stderr
    );
    tokio::time::sleep(Duration::from_millis(1100)).await;

    // Its parent goes: it notices, fails and cleans up.
    let begun = ids(&catalog).len();
    let go = world.scratch.path().join("node/orphan");
    let orders = format!("copying:pause={}", go.display());
    let mut line = format!("'{}'", program.path().display());
    for word in world.backup_arguments(&catalog, "FULL", 1) {
        line += &format!(" '{word}'");
    }
    let mut shell = support::os::command("sh");
    shell.args([
        "-c",
        &format!(
            "{line} >/dev/null 2>&1 &\nwhile [ ! -e {}.reached ]; do sleep 0.1; done",
            go.display()
        ),
    ]);
    shell.env(faults::VARIABLE, &orders).stdin(Stdio::null());
    assert!(shell.status().expect("a shell").success());
    std::fs::write(&go, "").expect("go");
    let until = Instant::now() + Duration::from_secs(30);
    let orphan = || ids(&catalog).get(begun).cloned().expect("its entry");
    while control(&catalog, &orphan(), "status") != "ERROR" {
        assert!(
            Instant::now() < until,
            "{}",
            control(&catalog, &orphan(), "status")
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    // show: an array, or an object since 6.0.
    let show = |release: &str| {
        let mut command = program.command();
        command
            .args(["show", "--instance", INSTANCE, "--format=json", "-B"])
            .arg(&catalog);
        run(command.env("PROBACKUP_STAND_IN_RELEASE", release))
            .ok()
            .stdout
    };
    assert!(show("5.0.0").starts_with('['));
    assert!(show("6.0.2").contains("backup_info"));
}

#[test]
fn passwords_are_asked_for() {
    let options = ClusterOptions {
        password: Some("a secret".to_owned()),
        ..ClusterOptions::default()
    };
    let world = World::new("password", options);
    for kind in [Kind::Gs, Kind::Pg] {
        let program = ProbackupUnderTest::stand_in(kind);
        let catalog = world.catalog(&program, kind.program());
        let mut arguments = world.backup_arguments(&catalog, "FULL", 1);
        let host = arguments.iter().position(|word| word == "-h").expect("-h") + 1;
        arguments[host] = "127.0.0.1".to_owned();
        let attempt = |text: &str| {
            use std::io::Write as _;
            let mut command = program.command();
            command
                .args(&arguments)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
            let mut child = command.spawn().expect("a child");
            let mut input = child.stdin.take().expect("its input");
            input.write_all(text.as_bytes()).expect("it reads");
            drop(input);
            let ran = Ran::of(&child.wait_with_output().expect("it ends"));
            assert!(
                ran.stderr.contains("Password for user postgres: "),
                "{}",
                ran.stderr
            );
            ran
        };
        attempt("").fails_with("no password supplied");
        std::thread::park_timeout(Duration::from_millis(1100));
        attempt("wrong\n").fails_with("could not connect to database postgres");
        std::thread::park_timeout(Duration::from_millis(1100));
        attempt("a secret\n").ok();
    }
}
