//! The command line: the options that the agent and people use, long or short, with `=` or a space.

use std::path::PathBuf;

use super::{Failure, Kind};

/// What a command line says.
#[expect(
    clippy::struct_excessive_bools,
    reason = "flags of a command line, each its own"
)]
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Args {
    pub(super) command: String,
    pub(super) catalog: Option<PathBuf>,
    pub(super) data: Option<PathBuf>,
    pub(super) instance: Option<String>,
    pub(super) backup_id: Option<String>,
    pub(super) mode: Option<String>,
    pub(super) threads: usize,
    pub(super) host: Option<String>,
    pub(super) port: Option<u16>,
    pub(super) user: Option<String>,
    pub(super) database: Option<String>,
    pub(super) password: Option<String>,
    pub(super) never_ask: bool,
    pub(super) external: Vec<PathBuf>,
    pub(super) tablespace_mapping: Vec<(PathBuf, PathBuf)>,
    pub(super) external_mapping: Vec<(PathBuf, PathBuf)>,
    pub(super) stream: bool,
    pub(super) temporary_slot: bool,
    pub(super) no_validate: bool,
    pub(super) no_sync: bool,
    pub(super) compress: String,
    pub(super) compress_level: u32,
    pub(super) json: bool,
}

/// Options with a value, by their long name and their letter.
const WITH_VALUE: [(&str, char); 29] = [
    ("backup-path", 'B'),
    ("pgdata", 'D'),
    ("instance", '\0'),
    ("backup-id", 'i'),
    ("backup-mode", 'b'),
    ("threads", 'j'),
    ("pghost", 'h'),
    ("pgport", 'p'),
    ("pguser", 'U'),
    ("pgdatabase", 'd'),
    ("external-dirs", 'E'),
    ("tablespace-mapping", 'T'),
    ("external-mapping", '\0'),
    ("compress-algorithm", '\0'),
    ("compress-level", '\0'),
    ("format", '\0'),
    ("slot", 'S'),
    ("rw-timeout", 't'),
    ("archive-timeout", '\0'),
    ("log-level-console", '\0'),
    ("log-level-file", '\0'),
    ("log-directory", '\0'),
    ("log-filename", '\0'),
    ("note", '\0'),
    ("ttl", '\0'),
    ("recovery-target", '\0'),
    ("recovery-target-timeline", '\0'),
    ("recovery-target-action", '\0'),
    ("incremental-mode", 'I'),
];

/// Options without one.
const FLAGS: [(&str, char); 12] = [
    ("stream", '\0'),
    ("no-validate", '\0'),
    ("no-sync", '\0'),
    ("no-password", 'w'),
    ("temp-slot", '\0'),
    ("smooth-checkpoint", 'C'),
    ("progress", '\0'),
    ("compress", '\0'),
    ("force", '\0'),
    ("skip-block-validation", '\0'),
    ("no-color", '\0'),
    ("archive", '\0'),
];

fn long_of(table: &[(&'static str, char)], letter: char) -> Option<&'static str> {
    let found = table.iter().find(|(_, short)| *short == letter);
    found.map(|(long, _)| *long)
}

impl Args {
    /// Parses what follows the program's name.
    pub(super) fn parse(kind: Kind, arguments: &[String]) -> Result<Self, Failure> {
        let mut args = Self {
            threads: 1,
            compress: "none".to_owned(),
            compress_level: 1,
            ..Self::default()
        };
        let mut rest = arguments.iter();
        args.command = rest.next().cloned().unwrap_or_default();
        while let Some(argument) = rest.next() {
            let unknown = || Failure::new(format!("unrecognized option '{argument}'"));
            let (name, inline) = if let Some(long) = argument.strip_prefix("--") {
                match long.split_once('=') {
                    Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
                    None => (long.to_owned(), None),
                }
            } else if let Some(short) = argument.strip_prefix('-') {
                let mut letters = short.chars();
                let letter = letters.next().ok_or_else(unknown)?;
                let inline = letters.as_str();
                let inline = (!inline.is_empty()).then(|| inline.to_owned());
                let name = match letter {
                    'W' => "password",
                    letter => long_of(&WITH_VALUE, letter)
                        .or_else(|| long_of(&FLAGS, letter))
                        .ok_or_else(unknown)?,
                };
                (name.to_owned(), inline)
            } else {
                return Err(Failure::new(format!(
                    "too many command-line arguments (first is \"{argument}\")"
                )));
            };
            // gs_probackup takes the password behind -W; for pg_probackup it means: ask for it.
            let takes_password = name == "password" && kind == Kind::Gs;
            if takes_password || WITH_VALUE.iter().any(|(long, _)| *long == name) {
                let value = inline.or_else(|| rest.next().cloned()).ok_or_else(|| {
                    Failure::new(format!("option '--{name}' requires an argument"))
                })?;
                args.value(&name, value)?;
            } else if name == "password" || FLAGS.iter().any(|(long, _)| *long == name) {
                args.flag(&name);
            } else {
                return Err(unknown());
            }
        }
        Ok(args)
    }

    fn value(&mut self, name: &str, value: String) -> Result<(), Failure> {
        let bad = |value: &str| Failure::new(format!("invalid value \"{value}\" for --{name}"));
        let mapping = |value: &str| {
            // `\=` is part of a path (`opt_path_map` in dir.c).
            let marks = value.match_indices('=').map(|(at, _)| at);
            let mut marks = marks.filter(|at| !value[..*at].ends_with('\\'));
            let (from, to) = marks
                .next()
                .and_then(|at| Some((value.get(..at)?, value.get(at + 1..)?)))
                .ok_or_else(|| bad(value))?;
            let (from, to) = (from.replace("\\=", "="), to.replace("\\=", "="));
            Ok((PathBuf::from(from), PathBuf::from(to)))
        };
        match name {
            "backup-path" => self.catalog = Some(value.into()),
            "pgdata" => self.data = Some(value.into()),
            "instance" => self.instance = Some(value),
            "backup-id" => self.backup_id = Some(value),
            "backup-mode" => self.mode = Some(value.to_uppercase()),
            "threads" => self.threads = value.parse().map_err(|_| bad(&value))?,
            "pghost" => self.host = Some(value),
            "pgport" => self.port = Some(value.parse().map_err(|_| bad(&value))?),
            "pguser" => self.user = Some(value),
            "pgdatabase" => self.database = Some(value),
            "password" => self.password = Some(value),
            "external-dirs" => self.external = value.split(':').map(PathBuf::from).collect(),
            "tablespace-mapping" => self.tablespace_mapping.push(mapping(&value)?),
            "external-mapping" => self.external_mapping.push(mapping(&value)?),
            "compress-algorithm" => self.compress = value,
            "compress-level" => self.compress_level = value.parse().map_err(|_| bad(&value))?,
            "format" => self.json = value == "json",
            "incremental-mode" => {
                return Err(Failure::new(
                    "the stand-in restores into an empty directory only",
                ));
            }
            _ => {}
        }
        Ok(())
    }

    fn flag(&mut self, name: &str) {
        match name {
            "stream" => self.stream = true,
            "temp-slot" => self.temporary_slot = true,
            "no-validate" => self.no_validate = true,
            "no-sync" => self.no_sync = true,
            "no-password" => self.never_ask = true,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(kind: Kind, line: &str) -> Result<Args, Failure> {
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        Args::parse(kind, &words)
    }

    #[test]
    fn options_are_read_in_every_shape() {
        let args = parse(
            Kind::Gs,
            "backup -B /b --instance=i -b full -j4 -p 5432 -W secret --no-sync -E /a:/c -T /x=/y",
        )
        .unwrap();
        assert_eq!(args.command, "backup");
        assert_eq!(args.mode.as_deref(), Some("FULL"));
        assert_eq!((args.threads, args.port), (4, Some(5432)));
        assert_eq!(args.password.as_deref(), Some("secret"));
        assert!(args.no_sync && !args.no_validate);
        assert_eq!(args.external, [PathBuf::from("/a"), PathBuf::from("/c")]);
        assert_eq!(args.tablespace_mapping, [("/x".into(), "/y".into())]);
        let asked = parse(Kind::Pg, "backup -W -B /b").unwrap();
        assert_eq!((asked.password, asked.catalog), (None, Some("/b".into())));
        assert!(parse(Kind::Pg, "backup --whatever").is_err());
        assert!(parse(Kind::Pg, "backup stray").is_err());
    }
}
