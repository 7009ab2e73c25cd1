//! The program's command lines. No shell, and no secret: the password comes on its standard input.

use std::ffi::OsString;
use std::path::Path;

use agent_sql::ConnectOptions;
use catalog::model::{BackupMode, Tablespace};

use super::program::Kind;

/// The instance in every catalog.
pub const INSTANCE: &str = "node";
/// `gs_probackup` gives up a statement that takes longer, in seconds; a start may wait for a checkpoint of a day.
const RW_TIMEOUT: u32 = 25 * 60 * 60;
/// For the server's own archiver at the end of a backup, in seconds.
const ARCHIVE_TIMEOUT: u32 = 300;

/// What a backup is made with.
#[derive(Debug)]
pub(super) struct Backup<'a> {
    pub(super) kind: Kind,
    pub(super) mode: BackupMode,
    pub(super) jobs: u32,
    pub(super) fast_checkpoint: bool,
    pub(super) options: &'a ConnectOptions,
    pub(super) tablespaces: &'a [Tablespace],
}

fn argv(catalog: &Path, command: &str) -> Vec<OsString> {
    let mut argv: Vec<OsString> = vec![command.into(), "-B".into()];
    argv.push(catalog.as_os_str().to_owned());
    argv
}

/// `init`
pub(super) fn init(catalog: &Path) -> Vec<OsString> {
    argv(catalog, "init")
}

/// `add-instance`
pub(super) fn add_instance(catalog: &Path, pgdata: &Path) -> Vec<OsString> {
    let mut argv = argv(catalog, "add-instance");
    argv.push("-D".into());
    argv.push(pgdata.as_os_str().to_owned());
    argv.push(format!("--instance={INSTANCE}").into());
    argv
}

/// `backup`
pub(super) fn backup(catalog: &Path, pgdata: &Path, how: &Backup<'_>) -> Vec<OsString> {
    let mut argv = argv(catalog, "backup");
    let mut add = |words: &[&str]| argv.extend(words.iter().map(OsString::from));
    let (jobs, port) = (how.jobs.max(1).to_string(), how.options.port.to_string());
    add(&[
        &format!("--instance={INSTANCE}"),
        "-b",
        how.mode.name(),
        "--stream",
        "--no-validate",
        "--no-sync",
    ]);
    add(&["-j", &jobs, "-h", &how.options.host, "-p", &port]);
    add(&["-U", &how.options.user, "-d", &how.options.database]);
    add(&[&format!("--archive-timeout={ARCHIVE_TIMEOUT}")]);
    if !how.fast_checkpoint {
        add(&["-C"]);
    }
    match how.kind {
        // A line for each file: an increment that finds no change writes nothing for hours. And WAL that its own
        // session has not had yet stays, whatever we have shipped meanwhile.
        Kind::Pg => add(&["--progress", "--temp-slot"]),
        Kind::Gs => {
            add(&[&format!("--rw-timeout={RW_TIMEOUT}")]);
            // Without, they are silently empty.
            let locations: Vec<_> = how
                .tablespaces
                .iter()
                .map(|space| &*space.location)
                .collect();
            if !locations.is_empty() {
                add(&[&format!("--external-dirs={}", locations.join(":"))]);
            }
        }
    }
    argv.push("-D".into());
    argv.push(pgdata.as_os_str().to_owned());
    argv
}

#[cfg(test)]
mod tests {
    use catalog::model::Extra;

    use super::*;

    fn words(kind: Kind, fast_checkpoint: bool) -> Vec<String> {
        let options = ConnectOptions {
            host: "/sock et".into(),
            port: 5433,
            user: "me".into(),
            password: Some(agent_sql::Password::new("hidden")),
            ..ConnectOptions::default()
        };
        let space = |location: &str| Tablespace {
            oid: 1,
            location: location.into(),
            extra: Extra::new(),
        };
        let spaces = [space("/a b"), space("/c")];
        let how = Backup {
            kind,
            mode: BackupMode::Ptrack,
            jobs: 0,
            fast_checkpoint,
            options: &options,
            tablespaces: &spaces,
        };
        let argv = backup(Path::new("/m"), Path::new("/data"), &how);
        argv.into_iter()
            .map(|word| word.into_string().unwrap())
            .collect()
    }

    #[test]
    fn words_are_given_as_they_are_and_no_secret_is_among_them() {
        for kind in [Kind::Gs, Kind::Pg] {
            let words = words(kind, true);
            assert_eq!(&words[..3], ["backup", "-B", "/m"]);
            let after = |name: &str| {
                let at = words.iter().position(|word| word == name).unwrap();
                words[at + 1].as_str()
            };
            assert_eq!(
                (after("-h"), after("-p"), after("-d")),
                ("/sock et", "5433", "postgres")
            );
            assert_eq!(
                (after("-j"), after("-b"), after("-D")),
                ("1", "PTRACK", "/data")
            );
            assert!(
                !words
                    .iter()
                    .any(|word| word.contains("hidden") || word == "-C")
            );
            let external = words.iter().any(|word| word == "--external-dirs=/a b:/c");
            assert_eq!(external, kind == Kind::Gs);
        }
        assert!(words(Kind::Pg, false).contains(&"-C".to_owned()));
    }
}
