//! The database at the target: what it is, how it is stopped, how it is started as it was before.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use agent_api::{ApiError, ClusterFacts, ErrorKind};
use rustix::process::{Pid, test_kill_process};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::errors::local;
use super::process::{self, PidFile};
use super::recoverer::Recoverer;
use super::settings::shell_word;
use super::{promote, prove};
use crate::config::Config;
use crate::engine::attachments;

/// How long its last checkpoint may take.
const STOP: Duration = Duration::from_mins(10);
/// How long its start may take, crash recovery included.
const START: Duration = Duration::from_mins(10);
/// What is added for `pg_ctl` to say by itself that it waited long enough.
const SLACK: Duration = Duration::from_secs(20);
/// How often a torn `pg_control` is read again.
const READS: u32 = 20;

/// A database, as its files say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Live {
    /// Its data directory.
    pub(super) data: PathBuf,
    pub(super) system_identifier: u64,
    pub(super) major: u32,
    /// Whether it ran when it was looked at.
    pub(super) running: bool,
    /// Its port, if it ran.
    pub(super) port: Option<u16>,
    /// What it was started with, without the program; empty if that is not known.
    pub(super) argv: Vec<String>,
    /// Its tablespaces outside the data directory: name of the link, and where it leads.
    pub(super) tablespaces: BTreeMap<String, PathBuf>,
    /// Directory of the programs that stop and start it.
    pub(super) bindir: PathBuf,
}

impl Live {
    /// Looks at the database in `data`; `None` if there is none. Changes nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Target`] if what is there cannot be read, or runs where its processes cannot be seen.
    pub(super) async fn look(data: &Path) -> Result<Option<Self>, ApiError> {
        let version_file = data.join("PG_VERSION");
        let version = match fs::read_to_string(&version_file) {
            Ok(version) => version,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(local(&version_file, &error)),
        };
        let unreadable = |what: String| {
            let message = format!("the database in {}: {what}", data.display());
            ApiError::new(ErrorKind::Target, message)
        };
        let Some(recoverer) = Recoverer::of_version_file(&version) else {
            return Err(unreadable(format!(
                "PG_VERSION says `{}`",
                version.escape_debug()
            )));
        };
        let control = read_control(data).await.map_err(unreadable)?;
        let running = Self::runs(data).await?;
        let file = PidFile::read(data).filter(|_| running);
        let opts = fs::read_to_string(data.join("postmaster.opts")).unwrap_or_default();
        Ok(Some(Self {
            data: data.to_owned(),
            system_identifier: control.system_identifier,
            major: recoverer.major(),
            running,
            port: file.map(|file| file.port),
            argv: attachments::argv(&opts),
            tablespaces: read_links(data).map_err(|error| local(data, &error))?,
            bindir: PathBuf::new(),
        }))
    }

    /// Whether a server runs in `data`.
    ///
    /// # Errors
    /// [`ErrorKind::Target`] if one answers whose process is not to be seen, as from another container.
    pub(super) async fn runs(data: &Path) -> Result<bool, ApiError> {
        let Some(file) = PidFile::read(data) else {
            return Ok(false);
        };
        let seen = Pid::from_raw(file.pid).is_some_and(|pid| {
            let cwd = fs::read_link(format!("/proc/{}/cwd", file.pid));
            match (cwd, data.canonicalize()) {
                (Ok(cwd), Ok(data)) => cwd == data,
                // Another user's: it lives, and that is all that can be known.
                (Err(e), _) if e.kind() == io::ErrorKind::PermissionDenied => true,
                (Err(_), _) => false,
                (Ok(_), Err(_)) => test_kill_process(pid).is_ok(),
            }
        });
        if seen {
            return Ok(true);
        }
        let asked = timeout(Duration::from_secs(5), promote::answers(&file)).await;
        if matches!(asked, Ok(Ok(())))
            && file.socket_directory.is_some()
            && file.ready != Some(false)
        {
            let message = format!(
                "the database in {} answers, but its process {} is not to be seen from here",
                data.display(),
                file.pid
            );
            return Err(ApiError::new(ErrorKind::Target, message)
                .next("run the agent where the database's processes are, as the same user"));
        }
        Ok(false)
    }

    /// What the API says of it.
    pub(super) fn facts(&self) -> ClusterFacts {
        ClusterFacts {
            system_identifier: self.system_identifier,
            major: self.major,
            running: self.running,
            port: self.port,
            tablespaces: self
                .tablespaces
                .values()
                .map(|path| path.to_string_lossy().into_owned())
                .collect(),
        }
    }

    /// The link of a tablespace that lies at `location`.
    pub(super) fn link_to(&self, location: &Path) -> Option<&String> {
        let real = location.canonicalize();
        self.tablespaces
            .iter()
            .find(|(_, to)| {
                to.as_path() == location
                    || real
                        .as_ref()
                        .is_ok_and(|real| to.canonicalize().is_ok_and(|to| to == *real))
            })
            .map(|(name, _)| name)
    }

    /// Stops it in order. Nothing happens if it does not run.
    ///
    /// # Errors
    /// [`ErrorKind::Database`] if it still runs.
    pub(super) async fn stop(&self, config: &Config) -> Result<(), ApiError> {
        let data = &self.data;
        if !Self::runs(data).await? {
            return Ok(());
        }
        let seconds = STOP.as_secs().to_string();
        let argv = match &config.stop_command {
            Some(argv) => self.filled(argv),
            None => vec![
                self.program(self.recoverer().control_program()),
                "stop".to_owned(),
                "-w".to_owned(),
                "-m".to_owned(),
                "fast".to_owned(),
                "-t".to_owned(),
                seconds,
                "-D".to_owned(),
                data.to_string_lossy().into_owned(),
            ],
        };
        let failed = |what: String| {
            let message = format!("the database in {} {what}", data.display());
            let error = ApiError::new(ErrorKind::Database, message);
            error.next(format!(
                "look at its log; it was told to stop by: {}",
                argv.join(" ")
            ))
        };
        let ran = run(&argv, data, STOP + SLACK).await;
        // Some commands come back before it has ended.
        for _ in 0..100 {
            if !Self::runs(data).await? {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Err(failed(match ran {
            Ok(()) => "was told to stop and still runs".to_owned(),
            Err(why) => format!("was not stopped: {why}"),
        }))
    }

    /// The command that starts it as before, on `port` if that is another one than its configuration has.
    pub(super) fn start_argv(&self, config: &Config, log: &Path, port: Option<u16>) -> Vec<String> {
        if let Some(argv) = &config.start_command {
            return self.filled(argv);
        }
        let (directory, mut words) = self.words();
        if let Some(port) = port {
            words.push("-c".to_owned());
            words.push(format!("port={port}"));
        }
        let options: Vec<String> = words.iter().map(|word| shell_word(word)).collect();
        let mut argv = vec![
            self.program(self.recoverer().control_program()),
            "start".to_owned(),
            "-w".to_owned(),
            "-t".to_owned(),
            START.as_secs().to_string(),
            "-D".to_owned(),
            directory,
            "-l".to_owned(),
            log.to_string_lossy().into_owned(),
        ];
        if !options.is_empty() {
            argv.extend(["-o".to_owned(), options.join(" ")]);
        }
        argv
    }

    /// Starts it again as it was.
    ///
    /// # Errors
    /// [`ErrorKind::Database`] with the command, if it does not run then.
    pub(super) async fn start(&self, config: &Config, log: &Path) -> Result<(), ApiError> {
        if Self::runs(&self.data).await? {
            return Ok(());
        }
        let argv = self.start_argv(config, log, self.port);
        let ran = run(&argv, &self.data, START + SLACK).await;
        for _ in 0..100 {
            if Self::runs(&self.data).await? {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let why = ran.err().unwrap_or_else(|| "it does not run".to_owned());
        let message = format!(
            "the database in {} was stopped for a restore and did not start again: {why}; {}",
            self.data.display(),
            process::last_words(log)
        );
        Err(ApiError::new(ErrorKind::Database, message)
            .changed()
            .next(format!("mend that, then start it: {}", argv.join(" "))))
    }

    /// The value that its configuration has for a setting, as it would be started.
    pub(super) async fn ask(&self, name: &str) -> Option<String> {
        let (directory, words) = self.words();
        let mut command = process::command(&self.bindir.join(self.recoverer().server()));
        command.arg("-D").arg(directory).args(words);
        command.args(["-c", "log_min_messages=fatal", "-C", name]);
        promote::answer_of(command).await
    }

    /// The directory behind `-D` and the other words of its command line.
    fn words(&self) -> (String, Vec<String>) {
        let mut directory = self.data.to_string_lossy().into_owned();
        let mut rest = Vec::new();
        let mut words = self.argv.iter();
        while let Some(word) = words.next() {
            let given = match word.strip_prefix("-D") {
                Some("") => words.next().map(String::as_str),
                Some(joined) => Some(joined),
                None => {
                    rest.push(word.clone());
                    continue;
                }
            };
            // A configuration directory, as Debian once had it, is kept; a relative one cannot be.
            if let Some(given) = given.filter(|given| Path::new(given).is_absolute()) {
                given.clone_into(&mut directory);
            }
        }
        (directory, rest)
    }

    /// Whose database it is.
    pub(super) fn recoverer(&self) -> Recoverer {
        Recoverer::of_major(self.major)
    }

    fn program(&self, name: &str) -> String {
        self.bindir.join(name).to_string_lossy().into_owned()
    }

    /// A configured command, in which `{data_directory}` and `{port}` stand for this database's.
    fn filled(&self, argv: &[String]) -> Vec<String> {
        fill(argv, &self.data, self.port)
    }
}

/// A configured command with what its placeholders stand for.
pub(super) fn fill(argv: &[String], data: &Path, port: Option<u16>) -> Vec<String> {
    let data = data.to_string_lossy();
    let port = port.map(|port| port.to_string()).unwrap_or_default();
    let fill = |word: &String| {
        word.replace("{data_directory}", &data)
            .replace("{port}", &port)
    };
    argv.iter().map(fill).collect()
}

/// Runs a command to its end.
///
/// # Errors
/// Why it did not end well, in words.
async fn run(argv: &[String], directory: &Path, deadline: Duration) -> Result<(), String> {
    let (program, arguments) = argv.split_first().ok_or("the command is empty")?;
    let mut command = process::command(Path::new(program));
    command.args(arguments).current_dir(directory);
    // Not pipes: a server would inherit them and keep them open.
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    match timeout(deadline, command.status()).await {
        Ok(Ok(status)) if status.success() => Ok(()),
        Ok(Ok(status)) => Err(format!("{program} ended with {status}")),
        Ok(Err(error)) => Err(format!("{program}: {error}")),
        Err(_) => Err(format!(
            "{program} took longer than {} s",
            deadline.as_secs()
        )),
    }
}

/// A running server rewrites `pg_control` in place: a torn one is read again.
async fn read_control(data: &Path) -> Result<agent_wal::control::ControlFile, String> {
    let mut last = String::new();
    for _ in 0..READS {
        match prove::read_control(data) {
            Ok(control) => return Ok(control),
            Err(error) => last = error,
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Err(last)
}

pub(super) fn read_links(data: &Path) -> io::Result<BTreeMap<String, PathBuf>> {
    let mut found = BTreeMap::new();
    let entries = match fs::read_dir(data.join("pg_tblspc")) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(found),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        // Not a link: a tablespace in place, within the data directory.
        if let (Ok(to), Ok(name)) = (fs::read_link(entry.path()), entry.file_name().into_string()) {
            found.insert(name, to);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn live(argv: &[&str]) -> Live {
        Live {
            data: "/var/lib/postgresql/15/main".into(),
            system_identifier: 7,
            major: 15,
            running: true,
            port: Some(5433),
            argv: argv.iter().map(|&word| word.to_owned()).collect(),
            tablespaces: BTreeMap::new(),
            bindir: "/usr/lib/postgresql/15/bin".into(),
        }
    }

    #[test]
    fn it_is_started_with_the_words_it_was_started_with() {
        let debian = live(&[
            "-D",
            "/var/lib/postgresql/15/main",
            "-c",
            "config_file=/etc/postgresql/15/main/postgresql.conf",
            "-c",
            "cluster_name=it's",
        ]);
        let argv = debian.start_argv(&Config::default(), Path::new("/l"), None);
        assert_eq!(argv[0], "/usr/lib/postgresql/15/bin/pg_ctl");
        let at = argv.iter().position(|word| word == "-D").unwrap();
        assert_eq!(argv[at + 1], "/var/lib/postgresql/15/main");
        assert_eq!(
            argv.last().unwrap(),
            r"'-c' 'config_file=/etc/postgresql/15/main/postgresql.conf' '-c' 'cluster_name=it'\''s'"
        );
        // A configuration directory stays what it was; a relative one is not to be trusted.
        assert_eq!(live(&["-D/etc/pg", "-F"]).words().0, "/etc/pg");
        let relative = live(&["-D", "data", "-p", "1"]);
        assert_eq!(
            relative.words(),
            (
                "/var/lib/postgresql/15/main".to_owned(),
                vec!["-p".to_owned(), "1".to_owned()]
            )
        );
        let config = Config {
            start_command: Some(vec!["start".into(), "{data_directory}:{port}".into()]),
            ..Config::default()
        };
        let argv = relative.start_argv(&config, Path::new("/l"), None);
        assert_eq!(argv, ["start", "/var/lib/postgresql/15/main:5433"]);
    }
}
