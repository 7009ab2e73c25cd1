//! The private server of openGauss, and its `recovery.conf`.

use std::ffi::OsString;
use std::path::Path;

use agent_api::{ApiError, ErrorKind};

use super::{Action, Places, RecoveryTarget, Setting, arguments, setting};

/// A server that only we can reach, by its socket.
#[derive(Debug, Clone)]
pub(in super::super) struct Private<'a> {
    /// Its files; `hba` lets only our user in, by the socket.
    pub(in super::super) places: &'a Places,
    /// Directory for its socket; short, and only ours.
    pub(in super::super) socket_directory: &'a Path,
    /// A port that is free, as is the next one: it listens on both, and cannot be told not to.
    pub(in super::super) port: u16,
    /// Settings the source was started with.
    pub(in super::super) source: &'a [Setting],
}

impl Private<'_> {
    /// Arguments of `gaussdb`.
    pub(in super::super) fn argv(&self) -> Vec<OsString> {
        let mut all: Vec<Setting> = self.source.to_vec();
        all.extend(self.places.settings());
        all.extend(self.closed());
        let mut argv: Vec<OsString> = vec![
            "-D".into(),
            self.places.data.clone().into(),
            // Neither primary nor standby: it asks nobody for WAL, and recovery comes to an end.
            "--single_node".into(),
            "-p".into(),
            self.port.to_string().into(),
        ];
        argv.extend(arguments(all));
        argv
    }

    /// Closes every way in and out but the socket, and drops what a recovery does not need.
    fn closed(&self) -> Vec<Setting> {
        let sockets = self.socket_directory.to_string_lossy().into_owned();
        let mut all = vec![
            // An empty list is FATAL there.
            setting("listen_addresses", "127.0.0.1"),
            setting("unix_socket_directory", sockets),
            setting("unix_socket_permissions", "0700"),
            setting("unix_socket_group", ""),
            setting("ssl", "off"),
            // The files must not reach the source's archive, nor its standbys.
            setting("archive_mode", "off"),
            setting("archive_dest", ""),
            setting("synchronous_standby_names", ""),
            setting("autovacuum", "off"),
            // It pauses at its target only where somebody could log in.
            setting("hot_standby", "on"),
            setting("recovery_min_apply_delay", "0"),
            setting("fsync", "on"),
            setting("restart_after_crash", "off"),
            // The source's directories for logs and audit records may be on this host, and in use.
            setting("audit_enabled", "off"),
            setting("logging_collector", "off"),
            setting("log_destination", "stderr"),
            setting("log_min_messages", "log"),
            setting("log_line_prefix", "%m [%p] "),
            setting("lc_messages", "C"),
        ];
        all.extend((1..=8).map(|number| setting(&format!("replconninfo{number}"), "")));
        all
    }
}

/// `recovery.conf` that ends recovery at a point, with WAL from the agent on `socket`. The server splits the command at
/// white space and runs it without a shell (`gs_popen_security`, `src/common/port/gs_system.cpp`), so that nothing
/// can be quoted.
///
/// # Errors
/// [`ErrorKind::Target`] for a path that cannot be written that way.
pub(in super::super) fn recovery_conf(
    program: &Path,
    socket: &Path,
    target: &RecoveryTarget,
) -> Result<String, ApiError> {
    let (program, socket) = (bare(program)?, bare(socket)?);
    let name = target.name.replace('\'', "''");
    let pause = match target.action {
        Action::Shutdown => "true",
        Action::Promote => "false",
    };
    Ok(format!(
        "restore_command = '{program} {} --socket {socket} %f %p'\nrecovery_target_name = '{name}'\n\
         pause_at_recovery_target = '{pause}'\n",
        crate::walget::SUBCOMMAND
    ))
}

/// A path that means the same without quotes.
fn bare(path: &Path) -> Result<&str, ApiError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+,:=@".contains(c);
    path.to_str()
        .filter(|text| text.chars().all(plain))
        .ok_or_else(|| {
            let message = format!(
                "openGauss cannot run a command with the path {}: its restore_command knows no quotes",
                path.display()
            );
            ApiError::new(ErrorKind::Target, message).next(
                "install the agent, and set TMPDIR, where paths have only letters, digits and ._-+,:=@",
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(action: Action) -> RecoveryTarget {
        RecoveryTarget {
            name: "gs_pitr it's".into(),
            timeline: 1,
            action,
        }
    }

    #[test]
    fn the_command_is_written_without_quotes_or_refused() {
        let (program, socket) = (
            Path::new("/opt/pitr-agent"),
            Path::new("/tmp/gs_pitr-1/wal.sock"),
        );
        let conf = recovery_conf(program, socket, &target(Action::Shutdown)).unwrap();
        assert_eq!(
            conf,
            "restore_command = '/opt/pitr-agent wal-get --socket /tmp/gs_pitr-1/wal.sock %f %p'\n\
             recovery_target_name = 'gs_pitr it''s'\npause_at_recovery_target = 'true'\n"
        );
        let conf = recovery_conf(program, socket, &target(Action::Promote)).unwrap();
        assert!(conf.ends_with("pause_at_recovery_target = 'false'\n"));
        for path in ["/opt/a b", "/opt/it's", "/opt/100%", "/opt/$x", "/opt/ä"] {
            let error = recovery_conf(Path::new(path), socket, &target(Action::Shutdown));
            assert_eq!(error.unwrap_err().kind, ErrorKind::Target, "{path}");
        }
    }

    #[test]
    fn a_private_server_is_nobodys_primary_and_lets_nobody_in() {
        let places = Places {
            data: "/r/n.gs_pitr-restore/data".into(),
            config: None,
            hba: "/r/hba".into(),
            ident: "/r/ident".into(),
        };
        let source = [setting("archive_mode", "on"), setting("replconninfo2", "x")];
        let private = Private {
            places: &places,
            socket_directory: Path::new("/tmp/x"),
            port: 5544,
            source: &source,
        };
        let argv: Vec<String> = private
            .argv()
            .into_iter()
            .map(|word| word.into_string().unwrap())
            .collect();
        let at = |setting: &str| argv.iter().rposition(|word| word == setting).unwrap();
        assert!(at("archive_mode=off") > at("archive_mode=on"));
        assert!(at("replconninfo2=") > at("replconninfo2=x"));
        assert_eq!(argv[at("-p") + 1], "5544");
        for name in [
            "--single_node",
            "data_directory=/r/n.gs_pitr-restore/data",
            "hba_file=/r/hba",
            "listen_addresses=127.0.0.1",
            "unix_socket_directory=/tmp/x",
            "hot_standby=on",
        ] {
            at(name);
        }
    }
}
