//! The command lines of a restored server: private while it recovers and is promoted, then its own.
//!
//! Every setting goes by argv, which wins over every file. That is what makes the source's own
//! configuration safe to use: Debian's `data_directory` in postgresql.conf wins over `-D`, and once made the
//! "copy" of a trial the LIVE directory.

pub(super) mod opengauss;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::recoverer::Recoverer;

/// A setting, name and value.
pub(super) type Setting = (String, String);

/// Settings that name a place on the source, or that we give ourselves.
const OURS: [&str; 8] = [
    "data_directory",
    "config_file",
    "hba_file",
    "ident_file",
    "external_pid_file",
    "port",
    "restore_command",
    "archive_mode",
];

/// Where a server finds its files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Places {
    /// Data directory.
    pub(super) data: PathBuf,
    /// `config_file`, if it is not the data directory's own.
    pub(super) config: Option<PathBuf>,
    /// `hba_file`
    pub(super) hba: PathBuf,
    /// `ident_file`
    pub(super) ident: PathBuf,
}

impl Places {
    fn settings(&self) -> Vec<Setting> {
        let path = |path: &Path| path.to_string_lossy().into_owned();
        let mut all = Vec::new();
        if let Some(config) = &self.config {
            all.push(setting("config_file", path(config)));
        }
        all.push(setting("data_directory", path(&self.data)));
        all.push(setting("hba_file", path(&self.hba)));
        all.push(setting("ident_file", path(&self.ident)));
        all.push(setting("external_pid_file", ""));
        all
    }

    /// Only what a server would not find by itself: `gs_ctl` cuts a command line off at 1024 bytes.
    fn elsewhere(&self) -> Vec<Setting> {
        let mut all = self.settings();
        all.retain(|(name, value)| match name.as_str() {
            "config_file" => true,
            "hba_file" | "ident_file" => !Path::new(value).starts_with(&self.data),
            _ => false,
        });
        all
    }
}

/// What recovery does when it has reached the point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// Shut down: then `pg_control` can be read.
    Shutdown,
    /// End recovery on a new timeline.
    Promote,
}

/// Where a recovery ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RecoveryTarget {
    /// Name of the restore point.
    pub(super) name: String,
    /// Its timeline.
    pub(super) timeline: u32,
    /// What then.
    pub(super) action: Action,
}

/// A server that nobody else can reach.
#[derive(Debug, Clone)]
pub(super) struct Private<'a> {
    /// Major version.
    pub(super) major: u32,
    /// Its files; `hba` rejects everybody.
    pub(super) places: &'a Places,
    /// Directory for its socket; short, and only ours.
    pub(super) socket_directory: &'a Path,
    /// Settings the source was started with.
    pub(super) source: &'a [Setting],
    /// `restore_command`
    pub(super) restore_command: String,
    /// Where it ends.
    pub(super) target: &'a RecoveryTarget,
}

/// `-c name=value` for each, as every server takes them.
fn arguments(settings: impl IntoIterator<Item = Setting>) -> impl Iterator<Item = OsString> {
    let argument = |(name, value)| [OsString::from("-c"), format!("{name}={value}").into()];
    settings.into_iter().flat_map(argument)
}

fn setting(name: &str, value: impl Into<String>) -> Setting {
    (name.to_owned(), value.into())
}

impl Private<'_> {
    /// Arguments of `postgres`.
    pub(super) fn argv(&self) -> Vec<OsString> {
        let mut all: Vec<Setting> = self.source.to_vec();
        all.extend(self.places.settings());
        all.extend(self.closed());
        all.extend(self.recovery());
        let mut argv = vec![OsString::from("-D"), self.places.data.clone().into()];
        argv.extend(arguments(all));
        argv
    }

    /// Closes every way in and out, and drops what a recovery does not need but may fail on here.
    fn closed(&self) -> Vec<Setting> {
        let sockets = self.socket_directory.to_string_lossy().into_owned();
        let mut all = vec![
            setting("listen_addresses", ""),
            setting("unix_socket_directories", sockets),
            setting("unix_socket_permissions", "0700"),
            setting("unix_socket_group", ""),
            setting("ssl", "off"),
            // The files must not reach the source's archive, nor its old primary, publishers or synchronous standbys.
            setting("archive_mode", "off"),
            setting("primary_conninfo", ""),
            setting("primary_slot_name", ""),
            setting("synchronous_standby_names", ""),
            setting("max_logical_replication_workers", "0"),
            // No job of an extension runs before the database is handed over.
            setting("max_worker_processes", "0"),
            setting("autovacuum", "off"),
            // Without a hot standby no setting is compared with the source's.
            setting("hot_standby", "off"),
            setting("fsync", "on"),
            setting("restart_after_crash", "off"),
            setting("huge_pages", "try"),
            setting("logging_collector", "off"),
            setting("log_destination", "stderr"),
            setting("log_min_messages", "warning"),
            setting("log_line_prefix", "%m [%p] "),
            setting("lc_messages", "C"),
            setting("cluster_name", "gs_pitr restore"),
        ];
        if self.major <= 15 {
            all.push(setting("promote_trigger_file", ""));
        }
        all
    }

    fn recovery(&self) -> Vec<Setting> {
        let action = match self.target.action {
            Action::Shutdown => "shutdown",
            Action::Promote => "promote",
        };
        // By name and not by LSN: the proof compares the position, so that both have to fit. The other targets first:
        // setting one, even to nothing, after the name is an error ("multiple recovery targets specified").
        ["", "_time", "_xid", "_lsn"]
            .map(|kind| setting(&format!("recovery_target{kind}"), ""))
            .into_iter()
            .chain([
                setting("recovery_target_name", self.target.name.as_str()),
                setting("recovery_target_timeline", self.target.timeline.to_string()),
                setting("recovery_target_inclusive", "on"),
                setting("recovery_target_action", action),
                setting("recovery_min_apply_delay", "0"),
                setting("recovery_end_command", ""),
                setting("archive_cleanup_command", ""),
                setting("restore_command", self.restore_command.as_str()),
            ])
            .collect()
    }
}

/// `restore_command` that asks the agent on `socket`. The server gives it to a shell after it has
/// replaced `%f`, `%p` and `%%`.
pub(super) fn restore_command(program: &Path, socket: &Path) -> String {
    let word = |path: &Path| shell_word(&path.to_string_lossy()).replace('%', "%%");
    format!(
        "{} {} --socket {} \"%f\" \"%p\"",
        word(program),
        crate::walget::SUBCOMMAND,
        word(socket)
    )
}

/// `word` as one word of `sh`.
pub(super) fn shell_word(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// The settings in a server's command line, in order. Those that name places on the source or that a restore
/// gives itself are left out, and so are debugging switches.
pub(super) fn of_command_line(argv: &[String]) -> Vec<Setting> {
    let mut settings = Vec::new();
    let mut words = argv.iter();
    while let Some(word) = words.next() {
        if let Some(long) = word.strip_prefix("--") {
            settings.extend(assignment(long));
            continue;
        }
        let Some(switch) = word.strip_prefix('-').and_then(|rest| rest.chars().next()) else {
            continue;
        };
        let rest = word.get(2..).unwrap_or_default();
        if !"BcCDdfhkNoprStvW".contains(switch) {
            match switch {
                'i' => settings.push(setting("listen_addresses", "*")),
                'l' => settings.push(setting("ssl", "on")),
                _ => {}
            }
            continue;
        }
        let value = match rest {
            "" => words.next().map_or("", String::as_str),
            value => value,
        };
        let name = match switch {
            'c' => {
                settings.extend(assignment(value));
                continue;
            }
            'B' => "shared_buffers",
            'h' => "listen_addresses",
            'k' => "unix_socket_directories",
            'N' => "max_connections",
            'S' => "work_mem",
            _ => continue,
        };
        settings.push(setting(name, value));
    }
    settings
        .retain(|(name, _)| !OURS.contains(&name.as_str()) && !name.starts_with("recovery_target"));
    settings
}

fn assignment(text: &str) -> Option<Setting> {
    let (name, value) = text.split_once('=')?;
    Some(setting(&name.replace('-', "_").to_lowercase(), value))
}

/// How the restored database is started from now on.
#[derive(Debug, Clone)]
pub(super) struct Standalone<'a> {
    /// Whose database it is.
    pub(super) recoverer: Recoverer,
    /// Directory of its programs.
    pub(super) bindir: &'a Path,
    /// Its files.
    pub(super) places: &'a Places,
    /// Settings the source was started with.
    pub(super) source: &'a [Setting],
    /// Port it listens on.
    pub(super) port: u16,
    /// Directory for its socket, if the configured ones cannot be used here.
    pub(super) socket_directory: Option<&'a Path>,
    /// File for what it writes before its own logging begins.
    pub(super) log: &'a Path,
}

impl Standalone<'_> {
    /// All settings it is started with.
    pub(super) fn settings(&self) -> Vec<Setting> {
        let mut all: Vec<Setting> = self.source.to_vec();
        match self.recoverer {
            Recoverer::PostgreSql(_) => all.extend(self.places.settings()),
            Recoverer::OpenGauss => all.extend(self.places.elsewhere()),
        }
        all.push(setting("port", self.port.to_string()));
        if let Some(directory) = self.socket_directory {
            let directory = directory.to_string_lossy().into_owned();
            let name = self.recoverer.socket_setting();
            all.retain(|(set, _)| set != name);
            all.push(setting(name, directory));
        }
        all
    }

    /// The command as argv.
    pub(super) fn argv(&self) -> Vec<String> {
        // pg_ctl and gs_ctl put the text behind -o into a command line of `sh`.
        let options: Vec<String> = self
            .settings()
            .iter()
            .map(|(name, value)| format!("-c {}", shell_word(&format!("{name}={value}"))))
            .collect();
        let path = |path: &Path| path.to_string_lossy().into_owned();
        // gs_ctl waits for the port that postgresql.conf has, and succeeds and fails by other rules than this server's: whether
        // it runs is for us to see.
        let wait = match self.recoverer {
            Recoverer::PostgreSql(_) => "-w",
            Recoverer::OpenGauss => "-W",
        };
        vec![
            path(&self.bindir.join(self.recoverer.control_program())),
            "start".to_owned(),
            wait.to_owned(),
            "-D".to_owned(),
            path(&self.places.data),
            "-l".to_owned(),
            path(self.log),
            "-o".to_owned(),
            options.join(" "),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn the_sources_command_line_is_read_without_its_places() {
        let argv = strings(&[
            "-D",
            "/var/lib/postgresql/15/main",
            "-c",
            "config_file=/etc/postgresql/15/main/postgresql.conf",
            "-cmax_connections=77",
            "--work-mem=5MB",
            "-p5433",
            "-h",
            "10.0.0.1",
            "-F",
            "-B",
            "128MB",
            "-c",
            "Recovery_Target_Name=x",
        ]);
        let expected = [
            ("max_connections", "77"),
            ("work_mem", "5MB"),
            ("listen_addresses", "10.0.0.1"),
            ("shared_buffers", "128MB"),
        ]
        .map(|(name, value)| setting(name, value));
        assert_eq!(of_command_line(&argv), expected);
    }

    #[test]
    fn restore_command_survives_any_path() {
        let command = restore_command(Path::new("/opt/100% it's/pitr-agent"), Path::new("/t/s"));
        assert_eq!(
            command,
            r#"'/opt/100%% it'\''s/pitr-agent' wal-get --socket '/t/s' "%f" "%p""#
        );
    }

    fn places() -> Places {
        Places {
            data: "/r/n.gs_pitr-restore/data".into(),
            config: Some("/r/n.config/postgresql.conf".into()),
            hba: "/r/hba".into(),
            ident: "/r/ident".into(),
        }
    }

    #[test]
    fn a_private_start_always_names_its_own_places_last() {
        let target = RecoveryTarget {
            name: "p".into(),
            timeline: 3,
            action: Action::Shutdown,
        };
        let source = [setting("listen_addresses", "*")];
        let private = Private {
            major: 15,
            places: &places(),
            socket_directory: Path::new("/tmp/x"),
            source: &source,
            restore_command: "wal-get".into(),
            target: &target,
        };
        let argv: Vec<String> = private
            .argv()
            .into_iter()
            .map(|word| word.into_string().unwrap())
            .collect();
        let at = |setting: &str| argv.iter().rposition(|word| word == setting).unwrap();
        assert!(at("listen_addresses=") > at("listen_addresses=*"));
        assert!(at("recovery_target_name=p") > at("recovery_target="));
        for name in [
            "data_directory=/r/n.gs_pitr-restore/data",
            "hba_file=/r/hba",
            "ident_file=/r/ident",
            "external_pid_file=",
            "archive_mode=off",
            "recovery_target_timeline=3",
            "recovery_target_action=shutdown",
            "promote_trigger_file=",
        ] {
            at(name);
        }
    }

    #[test]
    fn the_start_command_quotes_for_the_shell_of_pg_ctl() {
        let mut places = places();
        places.data = "/r/it's a node".into();
        let source = [setting("unix_socket_directories", "/gone")];
        let standalone = Standalone {
            recoverer: Recoverer::PostgreSql(15),
            bindir: Path::new("/usr/lib/postgresql/15/bin"),
            places: &places,
            source: &source,
            port: 5444,
            socket_directory: Some(Path::new("/tmp")),
            log: Path::new("/r/n.log"),
        };
        let argv = standalone.argv();
        assert_eq!(argv[4], "/r/it's a node");
        let options = argv.last().unwrap();
        assert!(options.contains(r"-c 'data_directory=/r/it'\''s a node'"));
        assert!(options.contains("-c 'port=5444'") && options.contains("'external_pid_file='"));
        assert!(!options.contains("/gone") && options.contains("unix_socket_directories=/tmp"));
    }
}
