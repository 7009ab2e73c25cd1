//! The mount, with real kernels and real programs: in each of the three ways that there are.
//!
//! A process that touches a mount that it serves itself waits for ever. So each scene is a process of its own, this binary
//! started again as the user that the way is for, and what touches the files in it are programs beside the mount.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::too_many_lines,
    reason = "test code: a panic is a failed test, and a story is read from top to bottom"
)]

#[path = "catalog_fs/model.rs"]
mod model;
#[path = "catalog_fs/ops.rs"]
mod ops;
#[path = "mount/replayed.rs"]
mod replayed;
#[path = "mount/scenes.rs"]
mod scenes;
#[path = "catalog_fs/subject.rs"]
#[expect(dead_code, reason = "the in-process side of the same scripts")]
mod subject;
#[path = "mount/through.rs"]
mod through;
#[path = "catalog_fs/world.rs"]
#[expect(dead_code, reason = "what only the in-process tests need")]
mod world;

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, geteuid, kill_process};
use scenes::{AGENT, HOW, RUNTIME, SCENE};
use support::os::{self, Scratch};
use support::skip;

/// A scene that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(90);

/// A way to mount, for the tests that run in all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Root,
    Fusermount,
    Namespace,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::Root => "root",
            Self::Fusermount => "fusermount3",
            Self::Namespace => "namespace",
        }
    }

    /// Whether it can be tested here; says so if not.
    fn is_here(self, test: &str) -> bool {
        let missing = || {
            let device =
                fs::metadata("/dev/fuse").map_err(|error| format!("/dev/fuse: {error}"))?;
            let root = geteuid().is_root();
            if self == Self::Root {
                return if root {
                    Ok(())
                } else {
                    Err("only root may".to_owned())
                };
            }
            if device.permissions().mode() & 0o006 != 0o006 {
                if !root {
                    return Err("/dev/fuse is not open to this user".to_owned());
                }
                // As Debian's udev has it.
                let open = fs::Permissions::from_mode(0o666);
                fs::set_permissions("/dev/fuse", open).map_err(|error| error.to_string())?;
                println!("chmod 666 /dev/fuse");
            }
            let path = std::env::var_os("PATH").unwrap_or_default();
            let there = |name: &str| std::env::split_paths(&path).any(|at| at.join(name).is_file());
            if self == Self::Fusermount && !there("fusermount3") {
                return Err("there is no fusermount3 (package fuse3)".to_owned());
            }
            Ok(())
        };
        match missing() {
            Ok(()) => true,
            Err(why) => {
                skip(&format!("{test}_as_{}", self.name()), &why);
                false
            }
        }
    }

    /// A command as the user that the way is for.
    fn command(self, program: &Path) -> Command {
        match self {
            Self::Root => Command::new(program),
            Self::Fusermount | Self::Namespace => os::command(program),
        }
    }
}

/// Runs `test` in every way that can be had.
fn in_every_way(test: &str, story: impl Fn(Way)) {
    for way in [Way::Root, Way::Fusermount, Way::Namespace] {
        if way.is_here(test) {
            println!("{test} as {}", way.name());
            story(way);
        }
    }
}

/// A process that serves a mount; killed on drop.
struct Scene {
    process: Child,
    output: BufReader<std::process::ChildStdout>,
    text: String,
}

impl Scene {
    fn start(way: Way, scene: &str, runtime: &Path) -> Self {
        let mut command = way.command(&std::env::current_exe().unwrap());
        Self::start_by(&mut command, way.name(), scene, runtime)
    }

    fn start_by(command: &mut Command, how: &str, scene: &str, runtime: &Path) -> Self {
        let mut process = command
            .args(["--exact", "a_scene", "--nocapture", "--test-threads=1"])
            .env(SCENE, scene)
            .env(HOW, how)
            .env(RUNTIME, runtime)
            .env(AGENT, env!("CARGO_BIN_EXE_pitr-agent"))
            .env("AWS_SECRET_ACCESS_KEY", "a secret of ours")
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        Self {
            process,
            output,
            text: String::new(),
        }
    }

    /// The rest of the next line that begins with `word`.
    fn says(&mut self, word: &str) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(
                self.output.read_line(&mut line).unwrap(),
                0,
                "{word}? {}",
                self.text
            );
            self.text.push_str(&line);
            if let Some((_, rest)) = line.split_once(word) {
                return rest.trim().to_owned();
            }
        }
    }

    fn ends_well(mut self) -> String {
        let begun = Instant::now();
        let mut rest = String::new();
        let code = loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                break status;
            }
            assert!(begun.elapsed() < PATIENCE, "it hangs: {}", self.text);
            wait(Duration::from_millis(20));
        };
        self.output.read_to_string(&mut rest).unwrap();
        self.text.push_str(&rest);
        assert!(code.success(), "{code}: {}", self.text);
        assert!(
            self.text.contains("SCENE OVER"),
            "it was not played: {}",
            self.text
        );
        std::mem::take(&mut self.text)
    }

    fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn wait(time: Duration) {
    let (_wake, woken) = std::sync::mpsc::channel::<()>();
    let _ = woken.recv_timeout(time);
}

/// Waits until it is so.
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_secs(20), "not so: {what}");
        wait(Duration::from_millis(50));
    }
}

fn alive(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')')
        .is_some_and(|(_, behind)| !behind.trim_start().starts_with('Z'))
}

fn mounted_below(runtime: &Path) -> Vec<String> {
    let table = fs::read_to_string("/proc/self/mounts").unwrap();
    let below = runtime.to_str().unwrap();
    table
        .lines()
        .filter(|line| line.contains(below))
        .map(ToOwned::to_owned)
        .collect()
}

/// A runtime directory, and that nothing is in it at the end.
struct Runtime {
    scratch: Scratch,
    path: PathBuf,
}

impl Runtime {
    fn new(way: Way) -> Self {
        let scratch = Scratch::new("mount");
        let path = scratch.directory("run");
        if way == Way::Root {
            std::os::unix::fs::chown(&path, Some(0), Some(0)).unwrap();
        }
        let path = path.canonicalize().unwrap();
        Self { scratch, path }
    }

    fn is_clean(&self) {
        assert_eq!(mounted_below(&self.path), Vec::<String>::new());
        let entries = fs::read_dir(&self.path).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name());
        // An agent has sockets of other uses there.
        let left: Vec<_> = names
            .filter(|name| name.to_string_lossy().starts_with("gs_pitr-"))
            .collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        // What a failed test has left must not stay in the machine's mount table.
        for line in mounted_below(&self.path) {
            let point = line.split(' ').nth(1).unwrap_or_default();
            let _ = Command::new("umount").args(["-l", point]).status();
        }
        let _ = &self.scratch;
    }
}

/// Not a test: what the tests below start again as a process that serves a mount.
#[test]
fn a_scene() {
    if let Ok(scene) = std::env::var(SCENE) {
        scenes::play(&scene);
        println!("SCENE OVER");
    }
}

#[test]
fn programs_find_an_ordinary_directory() {
    in_every_way("programs_find_an_ordinary_directory", |way| {
        let runtime = Runtime::new(way);
        Scene::start(way, "files", &runtime.path).ends_well();
        runtime.is_clean();
    });
}

/// As `tests/fixtures/probackup` has them: copies, each on the one before, of sequences that go into one mount.
#[test]
fn recorded_calls_of_the_real_programs_return_what_they_returned() {
    let test = "recorded_calls_of_the_real_programs_return_what_they_returned";
    in_every_way(test, |way| {
        for copies in [
            "gs-full gs-ptrack gs-external",
            "pg-init+pg-add-instance+pg-full pg-delta",
        ] {
            let runtime = Runtime::new(way);
            let said = Scene::start(way, &format!("replay {copies}"), &runtime.path).ends_well();
            assert_eq!(
                said.matches("REPLAYED ").count(),
                copies.split(' ').count(),
                "{said}"
            );
            runtime.is_clean();
        }
    });
}

#[test]
fn programs_are_started_as_the_engine_needs_it() {
    in_every_way("programs_are_started_as_the_engine_needs_it", |way| {
        let runtime = Runtime::new(way);
        Scene::start(way, "programs", &runtime.path).ends_well();
        runtime.is_clean();
    });
}

#[test]
fn a_mount_that_is_held_open_is_detached_and_it_is_said_by_whom() {
    in_every_way("a_mount_that_is_held_open_is_detached", |way| {
        let runtime = Runtime::new(way);
        Scene::start(way, "held", &runtime.path).ends_well();
        runtime.is_clean();
    });
}

#[test]
fn a_copy_of_the_mount_in_another_namespace_is_in_nobodys_way() {
    let test = "a_copy_of_the_mount_in_another_namespace";
    in_every_way(test, |way| {
        if way != Way::Namespace {
            let runtime = Runtime::new(way);
            Scene::start(way, "copied", &runtime.path).ends_well();
            runtime.is_clean();
        }
    });
}

#[test]
fn a_killed_agent_takes_its_program_along_and_blocks_nobody() {
    in_every_way("a_killed_agent_takes_its_program_along", |way| {
        let runtime = Runtime::new(way);
        let mut scene = Scene::start(way, "busy", &runtime.path);
        let program = scene.says("PROGRAM ");
        assert!(alive(&program));
        scene.kill();
        until("the program is gone", || !alive(&program));
        let left = mounted_below(&runtime.path);
        assert_eq!(left.is_empty(), way == Way::Namespace, "{left:?}");
        // The next mount finds it, and says so.
        let text = Scene::start(way, "files", &runtime.path).ends_well();
        assert_eq!(
            text.contains("TOLD detached"),
            way != Way::Namespace,
            "{text}"
        );
        runtime.is_clean();
    });
}

#[test]
fn an_agent_that_starts_detaches_what_a_killed_one_left() {
    in_every_way("an_agent_that_starts_detaches", |way| {
        let runtime = Runtime::new(way);
        let mut scene = Scene::start(way, "busy", &runtime.path);
        let program = scene.says("PROGRAM ");
        scene.kill();
        until("the program is gone", || !alive(&program));
        let mut agent = way
            .command(Path::new(env!("CARGO_BIN_EXE_pitr-agent")))
            .args(["--insecure-http", "--port", "0"])
            .env("RUNTIME_DIRECTORY", &runtime.path)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = String::new();
        let mut output = BufReader::new(agent.stdout.take().unwrap());
        output.read_line(&mut ready).unwrap();
        assert!(ready.contains("listening"), "{ready}");
        runtime.is_clean();
        let pid = Pid::from_raw(i32::try_from(agent.id()).unwrap()).unwrap();
        kill_process(pid, Signal::TERM).unwrap();
        let output = agent.wait_with_output().unwrap();
        let log = String::from_utf8_lossy(&output.stderr);
        assert_eq!(
            log.contains("of an agent that was killed"),
            way != Way::Namespace,
            "{log}"
        );
    });
}

#[test]
fn a_mount_of_a_living_agent_is_left_alone() {
    in_every_way("a_mount_of_a_living_agent_is_left_alone", |way| {
        let runtime = Runtime::new(way);
        let mut scene = Scene::start(way, "busy", &runtime.path);
        let program = scene.says("PROGRAM ");
        let text = Scene::start(way, "files", &runtime.path).ends_well();
        assert!(!text.contains("TOLD"), "{text}");
        assert!(alive(&program));
        let there = mounted_below(&runtime.path).len();
        assert_eq!(there, usize::from(way != Way::Namespace));
        scene.kill();
        until("the program is gone", || !alive(&program));
        Scene::start(way, "files", &runtime.path).ends_well();
        runtime.is_clean();
    });
}

#[test]
fn an_operators_umount_is_noticed() {
    in_every_way("an_operators_umount_is_noticed", |way| {
        if way == Way::Namespace && !geteuid().is_root() {
            skip(
                "an_operators_umount_is_noticed_as_namespace",
                "only root can reach it",
            );
            return;
        }
        let runtime = Runtime::new(way);
        let mut scene = Scene::start(way, "watched", &runtime.path);
        let program = scene.says("PROGRAM ");
        let point = scene.says("POINT ");
        let status = match way {
            Way::Root | Way::Fusermount => Command::new("umount").args(["-l", &point]).status(),
            Way::Namespace => Command::new("nsenter")
                .args(["-t", &program, "-m", "umount", "-l", &point])
                .status(),
        };
        assert!(status.unwrap().success());
        scene.ends_well();
        runtime.is_clean();
    });
}

#[test]
fn where_fuse_is_not_to_be_had_it_is_said_what_helps() {
    let name = "where_fuse_is_not_to_be_had_it_is_said_what_helps";
    if !geteuid().is_root() {
        skip(name, "only root can hide /dev/fuse");
        return;
    }
    let runtime = Runtime::new(Way::Namespace);
    // A device that only root may open, in a mount namespace of its own.
    let hide = "mkdir $1/dev && mount -t tmpfs none $1/dev && mknod -m 600 $1/dev/fuse c 10 229 \
                && mount --bind $1/dev/fuse /dev/fuse && umount -l $1/dev && rmdir $1/dev \
                && exec setpriv --reuid $2 --regid $3 --clear-groups $4 \"$5\" \"$6\" \"$7\" \"$8\"";
    let user = os::database_user().unwrap();
    let mut command = Command::new("unshare");
    command
        .args(["-m", "sh", "-c", hide, "sh"])
        .arg(&runtime.path)
        .args([user.uid.to_string(), user.gid.to_string()])
        .arg(std::env::current_exe().unwrap());
    let text = Scene::start_by(&mut command, "auto", "unavailable", &runtime.path).ends_well();
    assert!(
        text.contains("WHY the agent's user may not open /dev/fuse (mode 0600)"),
        "{text}"
    );
    assert!(text.contains("chmod 666 /dev/fuse"), "{text}");
    assert!(text.contains("--engine direct"), "{text}");
    let mut command = os::command(std::env::current_exe().unwrap());
    let text = Scene::start_by(&mut command, "root", "unavailable", &runtime.path).ends_well();
    assert!(text.contains("WHY the agent is not root"), "{text}");
    runtime.is_clean();
}
