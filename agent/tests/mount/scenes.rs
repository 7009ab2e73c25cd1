//! What happens in a process that serves a mount.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use pipeline::budget::Budget;
use pitr_agent::catalog_fs::life::{
    MountError, MountHow, MountKind, MountSettings, Mounted, available, detach_dead,
};
use pitr_agent::catalog_fs::{CatalogFs, NoLower};
use pitr_agent::facts;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};

/// Names the scene to play.
pub(crate) const SCENE: &str = "GS_PITR_SCENE";
/// How it is to mount.
pub(crate) const HOW: &str = "GS_PITR_SCENE_HOW";
/// Where.
pub(crate) const RUNTIME: &str = "GS_PITR_SCENE_RUNTIME";
/// The agent's program.
pub(crate) const AGENT: &str = "GS_PITR_SCENE_AGENT";

/// For what should take a moment.
const SOON: Duration = Duration::from_secs(30);

fn settings() -> MountSettings {
    let how = match std::env::var(HOW).unwrap().as_str() {
        "root" => MountHow::Root,
        "fusermount3" => MountHow::Fusermount,
        "namespace" => MountHow::Namespace,
        _ => MountHow::Auto,
    };
    MountSettings {
        how,
        runtime_dir: PathBuf::from(std::env::var_os(RUNTIME).unwrap()),
        runner: PathBuf::from(std::env::var_os(AGENT).unwrap()),
    }
}

pub(crate) fn play(scene: &str) {
    if scene == "player" {
        return crate::through::play();
    }
    if scene == "replayer" {
        return crate::replayed::make_calls();
    }
    if let Some(copies) = scene.strip_prefix("replay ") {
        return crate::replayed::compare(copies, &settings());
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        match scene {
            "files" => files().await,
            "programs" => programs().await,
            "held" => held().await,
            "copied" => copied().await,
            "busy" => busy().await,
            "watched" => watched().await,
            "unavailable" => unavailable().await,
            other => panic!("no scene {other}"),
        }
    });
}

/// A catalog with nothing in it, and memory for what is written.
fn empty() -> Arc<CatalogFs> {
    let budget = Budget::new(64 << 20);
    CatalogFs::for_reading(Vec::new(), Arc::new(NoLower), &budget).unwrap()
}

async fn start() -> Mounted {
    let settings = settings();
    for told in detach_dead(&settings.runtime_dir).await {
        println!("TOLD {told}");
    }
    let fs = empty();
    let mounted = Mounted::start(fs, &settings, "0197-scene").await.unwrap();
    let expected = match settings.how {
        MountHow::Root => MountKind::Root,
        MountHow::Fusermount => MountKind::Fusermount,
        MountHow::Namespace => MountKind::Namespace,
        MountHow::Auto => mounted.kind(),
    };
    assert_eq!(mounted.kind(), expected);
    mounted
}

/// A shell beside the mount, in it. The script is an argument, so nothing is quoted twice.
fn shell(mounted: &Mounted, script: &str) -> Command {
    let mut command = mounted.command("/bin/sh");
    command
        .args(["-euc", &format!("cd \"$0\"\n{script}")])
        .arg(mounted.path());
    command
}

async fn run(command: &mut Command) -> Output {
    timeout(SOON, command.output()).await.unwrap().unwrap()
}

/// Runs it, wants it to succeed, and returns what it says.
async fn say(mounted: &Mounted, script: &str) -> String {
    let output = run(&mut shell(mounted, script)).await;
    let text = String::from_utf8(output.stdout).unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script}\n{text}\n{errors}");
    text.trim().to_owned()
}

async fn files() {
    let mounted = start().await;
    let m = &mounted;
    // Sizes while a file grows, through open handles and by name; and what is read back is what was written.
    let grown = say(
        m,
        "exec 3>grows; for n in 1 2 3; do head -c 70001 /dev/zero | tr '\\0' $n >&3; stat -c %s grows; done
         exec 3>&-; head -c 70000 /dev/zero | tr '\\0' 1 | cmp -n 70000 - grows; tail -c 1 grows",
    )
    .await;
    assert_eq!(grown, "70001\n140002\n210003\n3");
    // Each command has its own session: in a namespace, one of its own mount, too.
    assert_eq!(
        say(
            m,
            "stat -c '%s %U' grows; chmod 640 grows; stat -c %a grows"
        )
        .await,
        format!("210003 {}\n640", facts::os_user())
    );
    assert_eq!(
        say(
            m,
            ": >grows; stat -c %s grows; echo abc >>grows; echo def >>grows; cat grows"
        )
        .await,
        "0\nabc\ndef"
    );
    let twice = run(&mut shell(m, "set -C; echo again >grows")).await;
    assert!(!twice.status.success(), "O_EXCL holds");
    assert_eq!(say(m, "cat grows").await, "abc\ndef");
    // Directories: made, listed in full, also when there is more than one answer's worth, and while entries go.
    assert_eq!(say(m, "mkdir -p a/b; for n in $(seq 1500); do : >a/b/file-with-a-longer-name-$n; done; ls a/b | wc -l").await, "1500");
    assert_eq!(say(m, "rm -r a; ls").await, "grows");
    assert_eq!(
        say(m, "echo 1 >x.tmp; echo 0 >x; mv x.tmp x; cat x; ls").await,
        "1\ngrows\nx"
    );
    let gap = say(m, "echo end | dd of=x bs=1 seek=100000 conv=notrunc 2>/dev/null; stat -c %s x; head -c 5 x | od -An -tx1 | cut -c2-").await;
    assert_eq!(gap, "100004\n31 0a 00 00 00");
    // What no file system for backups has, it refuses at once.
    for refused in [
        "ln grows y",
        "ln -s grows y",
        "mkfifo y",
        "cat absent",
        "rmdir absent",
    ] {
        assert!(
            !run(&mut shell(m, refused)).await.status.success(),
            "{refused}"
        );
    }
    // Room that satisfies gs_probackup: more than a petabyte.
    let room: u64 = say(
        m,
        "echo $(( $(stat -f -c %a .) / 1024 * $(stat -f -c %S .) ))",
    )
    .await
    .parse()
    .unwrap();
    assert!(room >= 1 << 40, "{room} KiB");
    mounted.unmount().await.unwrap();
}

async fn programs() {
    let mounted = start().await;
    let m = &mounted;
    for (script, code) in [("exit 7", 7), ("kill -9 $$", 137), ("kill -TERM $$", 143)] {
        assert_eq!(
            run(&mut shell(m, script)).await.status.code(),
            Some(code),
            "{script}"
        );
    }
    let absent = run(&mut m.command("/no/such/program")).await;
    assert_eq!(absent.status.code(), Some(126));
    let words = String::from_utf8_lossy(&absent.stderr).into_owned();
    assert!(words.contains("cannot run /no/such/program"), "{words}");
    // Arguments arrive as they are; there is no shell between.
    let odd = ["", "a b", "$HOME", "-x", "--", "*", "\n"];
    let mut printf = m.command("/usr/bin/printf");
    let printed = run(printf.arg("[%s]").args(odd)).await;
    assert_eq!(
        String::from_utf8(printed.stdout).unwrap(),
        format!("[{}]", odd.join("]["))
    );
    assert_eq!(say(m, "env").await.matches("a secret of ours").count(), 0);
    // Neither the device nor the agent's socket is open in the program.
    let open = say(m, "ls -l /proc/$$/fd").await;
    assert!(!open.contains("fuse") && !open.contains("socket"), "{open}");
    // Standard input is the caller's.
    let mut cat = m.command("/bin/cat");
    let mut child = cat
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    tokio::io::AsyncWriteExt::write_all(child.stdin.as_mut().unwrap(), b"pass\n")
        .await
        .unwrap();
    drop(child.stdin.take());
    let output = timeout(SOON, child.wait_with_output())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(output.stdout, b"pass\n");
    // Who started it stays its parent; signals are handed on; its own code comes back.
    for (signal, name) in [(Signal::TERM, "TERM"), (Signal::INT, "INT")] {
        let script = format!("trap 'exit 9' {name}; echo $PPID $$; while :; do sleep 0.1; done");
        let (mut child, line) = spawn(&mut shell(m, &script)).await;
        let runner = child.id().unwrap().to_string();
        assert_eq!(line.split(' ').next().unwrap(), runner);
        kill_process(pid(&runner), signal).unwrap();
        let status = timeout(SOON, child.wait()).await.unwrap().unwrap();
        assert_eq!(status.code(), Some(9), "{name}");
    }
    // If it is killed, so is the program.
    let (mut child, line) = spawn(&mut shell(m, "echo $$; while :; do sleep 0.1; done")).await;
    child.kill().await.unwrap();
    gone(&line).await;
    // And when the mount is taken away it is ended, the stubborn after a while.
    let (mut child, line) = spawn(&mut shell(
        m,
        "trap '' TERM; cd /; echo $$; while :; do sleep 0.1; done",
    ))
    .await;
    mounted.unmount().await.unwrap();
    gone(&line).await;
    assert_eq!(child.wait().await.unwrap().code(), Some(137));
}

async fn held() {
    let mounted = start().await;
    let point = mounted.path().to_owned();
    // A grandchild that nobody waits for keeps a file open.
    let holder = say(
        &mounted,
        "exec 3>held; setsid sleep 300 >/dev/null 2>&1 & echo $!",
    )
    .await;
    let error = mounted.unmount().await.unwrap_err();
    assert!(matches!(error, MountError::HeldOpen { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains(&holder) && text.contains("sleep"), "{text}");
    assert!(text.contains(point.to_str().unwrap()), "{text}");
    kill_process(pid(&holder), Signal::KILL).unwrap();
}

/// Somebody's new mount namespace has all mounts that there are when it is made, and keeps them.
async fn copied() {
    let mounted = start().await;
    let mut other = Command::new("unshare");
    other
        .args(["--user", "--map-current-user", "--mount"])
        .args(["--propagation", "private", "sh", "-c"])
        .arg("grep -cF \"$0\" /proc/self/mounts; exec sleep 300")
        .arg(mounted.path())
        .kill_on_drop(true);
    let (mut other, copies) = spawn(&mut other).await;
    assert_eq!(copies, "1");
    mounted.unmount().await.unwrap();
    assert!(other.try_wait().unwrap().is_none(), "it is still there");
}

async fn busy() {
    let mounted = start().await;
    let script = "echo $$; while :; do echo more >>file; sleep 0.02; done";
    let (_child, line) = spawn(&mut shell(&mounted, script)).await;
    println!("PROGRAM {line}");
    std::future::pending::<()>().await;
}

async fn watched() {
    let mounted = start().await;
    // It keeps a file open, so that the session lives on.
    let script = "exec 3>file; echo $$; while :; do sleep 0.1; done";
    let (mut child, line) = spawn(&mut shell(&mounted, script)).await;
    println!("PROGRAM {line}");
    println!("POINT {}", mounted.path().display());
    let why = if mounted.kind() == MountKind::Namespace {
        // There the table is the program's: it is noticed when the last file is closed.
        let table = Path::new("/proc").join(&line).join("mounts");
        let point = mounted.path().to_string_lossy().into_owned();
        let taken_away = async {
            while fs::read_to_string(&table).unwrap().contains(&point) {
                sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(SOON, taken_away).await.unwrap();
        child.kill().await.unwrap();
        return mounted.unmount().await.unwrap();
    } else {
        timeout(SOON, mounted.ended()).await.unwrap()
    };
    assert!(why.contains("taken away by somebody else"), "{why}");
    // Who goes on then finds a directory that takes nothing (root may write everywhere).
    let late = run(&mut shell(&mounted, "cd \"$0\"; echo x >late")).await;
    assert_eq!(late.status.success(), mounted.kind() == MountKind::Root);
    if mounted.kind() == MountKind::Root {
        assert_eq!(say(&mounted, "rm late").await, "");
    }
    child.kill().await.unwrap();
    mounted.unmount().await.unwrap();
}

async fn unavailable() {
    let error = available(&settings()).await.unwrap_err();
    println!("WHY {error}");
    let fs = empty();
    let refused = Mounted::start(fs, &settings(), "x").await.unwrap_err();
    assert!(matches!(refused, MountError::Unavailable(_)), "{refused}");
}

/// Starts it and reads its first line.
async fn spawn(command: &mut Command) -> (Child, String) {
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    timeout(SOON, output.read_line(&mut line))
        .await
        .unwrap()
        .unwrap();
    child.stdout = Some(output.into_inner());
    (child, line.trim().to_owned())
}

fn pid(text: &str) -> Pid {
    Pid::from_raw(text.parse().unwrap()).unwrap()
}

async fn gone(pid: &str) {
    let directory = Path::new("/proc").join(pid);
    let gone = async {
        while directory.join("exe").read_link().is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(SOON, gone).await.unwrap();
}
