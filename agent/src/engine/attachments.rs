//! Configuration that lives outside the data directory (Debian's /etc/postgresql), and the command line that
//! names it: without both, a restored node would start with other settings, or not at all.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use catalog::model::{Attachment, AttachmentRole, Extra};

use super::copy_error::CopyError;

/// Directory of the index that configuration from outside the data directory goes to.
pub const ATTACHMENTS: &str = "attachments";
/// The most that one configuration file may have, in bytes; more is something else.
const LIMIT: u64 = 4 << 20;

/// The files a server is configured by: `config_file`, `hba_file` and `ident_file`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigFiles {
    /// `config_file`
    pub config: PathBuf,
    /// `hba_file`
    pub hba: PathBuf,
    /// `ident_file`
    pub ident: PathBuf,
    /// Files that the server says its settings and rules come from, these three among them or not.
    pub sources: Vec<PathBuf>,
}

/// Finds the configuration files, included ones too, that are outside `pgdata`, sorted by path.
///
/// # Errors
/// If one cannot be read or has a name that is not UTF-8. A missing included file is no error: the server
/// runs without it.
pub fn find(pgdata: &Path, files: &ConfigFiles) -> Result<Vec<Attachment>, CopyError> {
    let mut found: BTreeMap<PathBuf, AttachmentRole> = BTreeMap::new();
    let mut queue: VecDeque<(PathBuf, AttachmentRole, Syntax)> = VecDeque::from([
        (files.config.clone(), AttachmentRole::Config, Syntax::Guc),
        (files.hba.clone(), AttachmentRole::Hba, Syntax::Tokens),
        (files.ident.clone(), AttachmentRole::Ident, Syntax::Tokens),
    ]);
    // What the server itself has read is surer than how we read its files.
    for source in &files.sources {
        queue.push_back((source.clone(), AttachmentRole::Included, Syntax::Names));
    }
    while let Some((path, role, syntax)) = queue.pop_front() {
        let path = plain(&path);
        if found.contains_key(&path) {
            continue;
        }
        let text = match read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(CopyError::read(&path, e)),
        };
        let base = path.parent().unwrap_or(Path::new("/"));
        for include in includes(&text, syntax) {
            for included in resolve(base, &include).map_err(|e| CopyError::read(base, e))? {
                queue.push_back((included, AttachmentRole::Included, syntax.of(&include)));
            }
        }
        found.insert(path, role);
    }
    let real = fs::canonicalize(pgdata).unwrap_or_else(|_| pgdata.to_owned());
    let mut attachments = Vec::new();
    for (path, role) in found {
        if is_inside(&path, pgdata, &real) {
            continue;
        }
        let Some(source) = path.to_str() else {
            return Err(CopyError::Name(path.display().to_string()));
        };
        attachments.push(Attachment {
            path: format!("{ATTACHMENTS}/{}", source.trim_start_matches('/')),
            source: source.to_owned(),
            role,
            extra: Extra::new(),
        });
    }
    Ok(attachments)
}

/// Whether a file travels with the data directory itself.
fn is_inside(path: &Path, pgdata: &Path, real: &Path) -> bool {
    path.starts_with(pgdata) || path.starts_with(real)
}

/// Without `.` and `..`, so that the path can stand in the index.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => {
                plain.pop();
            }
            Component::CurDir => {}
            part => plain.push(part),
        }
    }
    plain
}

fn read(path: &Path) -> io::Result<String> {
    let metadata = fs::metadata(path)?;
    if !metadata.is_file() || metadata.len() > LIMIT {
        let what = format!("not a regular file of at most {LIMIT} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    Ok(String::from_utf8_lossy(&fs::read(path)?).into_owned())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Syntax {
    /// postgresql.conf: `name = 'value'`
    Guc,
    /// `pg_hba.conf` and `pg_ident.conf`: fields
    Tokens,
    /// A list of names, `@file` in a field.
    Names,
}

impl Syntax {
    fn of(self, include: &Include) -> Self {
        match include {
            Include::Names(_) => Self::Names,
            _ => self,
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Include {
    File(String),
    Directory(String),
    Names(String),
}

fn resolve(base: &Path, include: &Include) -> io::Result<Vec<PathBuf>> {
    match include {
        Include::File(path) | Include::Names(path) => Ok(vec![base.join(path)]),
        Include::Directory(path) => {
            let directory = base.join(path);
            let entries = match fs::read_dir(&directory) {
                Ok(entries) => entries,
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
                Err(e) => return Err(e),
            };
            let mut paths = Vec::new();
            for entry in entries {
                let name = entry?.file_name();
                let name = name.to_string_lossy();
                if name.ends_with(".conf") && !name.starts_with('.') {
                    paths.push(directory.join(&*name));
                }
            }
            Ok(paths)
        }
    }
}

fn includes(text: &str, syntax: Syntax) -> Vec<Include> {
    let mut all = Vec::new();
    for line in text.lines() {
        let fields = fields(line);
        if syntax != Syntax::Names
            && let [Field { text: word, .. }, rest @ ..] = fields.as_slice()
            && let Some(path) = rest.iter().find(|field| field.quoted || field.text != "=")
        {
            let path = path.text.clone();
            match word.to_ascii_lowercase().as_str() {
                "include" | "include_if_exists" => all.push(Include::File(path)),
                "include_dir" => all.push(Include::Directory(path)),
                _ => {}
            }
        }
        if syntax == Syntax::Guc {
            continue;
        }
        for field in &fields {
            if let Some(path) = field.text.strip_prefix('@')
                && !path.is_empty()
            {
                all.push(Include::Names(path.to_owned()));
            }
        }
    }
    all
}

#[derive(Debug, Default)]
struct Field {
    text: String,
    quoted: bool,
}

/// The fields of a line: separated by blanks and commas, quoted by ' or ", ended by #.
fn fields(line: &str) -> Vec<Field> {
    let mut fields = Vec::new();
    let mut field: Option<Field> = None;
    let mut quote: Option<char> = None;
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (Some(open), c) if c == open => {
                // A doubled quote stands for one.
                if chars.next_if_eq(&open).is_some() {
                    field.get_or_insert_default().text.push(open);
                } else {
                    quote = None;
                }
            }
            (Some('\''), '\\') => {
                let next = chars.next().unwrap_or('\\');
                field.get_or_insert_default().text.push(next);
            }
            (None, '\'' | '"') => {
                quote = Some(c);
                field.get_or_insert_default().quoted = true;
            }
            (None, '#') => break,
            (None, '=') => {
                fields.extend(field.take());
                let text = "=".to_owned();
                fields.push(Field {
                    text,
                    quoted: false,
                });
            }
            (None, c) if c.is_whitespace() || c == ',' => fields.extend(field.take()),
            (_, c) => field.get_or_insert_default().text.push(c),
        }
    }
    fields.extend(field);
    fields
}

/// The arguments a server was started with, from the text of its `postmaster.opts`: the program, then each
/// argument after a blank and in double quotes that nothing escapes.
#[must_use]
pub fn argv(postmaster_opts: &str) -> Vec<String> {
    let line = postmaster_opts.trim_end_matches(['\n', '\r']);
    let Some((_program, rest)) = line.split_once(" \"") else {
        return Vec::new();
    };
    let rest = rest.strip_suffix('"').unwrap_or(rest);
    rest.split("\" \"").map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_come_out_of_postmaster_opts() {
        let text = "/usr/lib/postgresql/15/bin/postgres \"-D\" \"/data dir\" \"-c\" \"config_file=/etc/x.conf\"\n";
        assert_eq!(
            argv(text),
            ["-D", "/data dir", "-c", "config_file=/etc/x.conf"]
        );
        assert!(argv("/usr/bin/postgres\n").is_empty());
    }

    #[test]
    fn includes_are_found_in_both_syntaxes() {
        let text = "# include 'no'\ninclude 'a b.conf'\nInclude_If_Exists = 'it''s.conf' # x\ninclude_dir conf.d\nport=5432\nlog_line_prefix = 'include x'\n";
        let expected = [
            Include::File("a b.conf".into()),
            Include::File("it's.conf".into()),
            Include::Directory("conf.d".into()),
        ];
        assert_eq!(includes(text, Syntax::Guc), expected);
        let text = "local all,@admins @\"the users\" trust\ninclude \"hba 2.conf\"\n";
        let expected = [
            Include::Names("admins".into()),
            Include::Names("the users".into()),
            Include::File("hba 2.conf".into()),
        ];
        assert_eq!(includes(text, Syntax::Tokens), expected);
    }

    #[test]
    fn files_outside_the_data_directory_are_attached_with_what_they_include() {
        let home = tempfile::tempdir().unwrap();
        let home = fs::canonicalize(home.path()).unwrap();
        let (data, etc) = (home.join("data"), home.join("etc"));
        fs::create_dir_all(etc.join("conf.d")).unwrap();
        fs::create_dir_all(&data).unwrap();
        let config = format!(
            "include_dir 'conf.d'\ninclude_if_exists 'missing.conf'\ninclude '{}/inner.conf'\ninclude 'main.conf'\n",
            data.display()
        );
        fs::write(etc.join("main.conf"), config).unwrap();
        fs::write(etc.join("conf.d/one.conf"), "include '../two.conf'").unwrap();
        fs::write(etc.join("conf.d/.hidden.conf"), "").unwrap();
        fs::write(etc.join("two.conf"), "").unwrap();
        fs::write(etc.join("more.conf"), "").unwrap();
        fs::write(etc.join("hba.conf"), "local @names all trust").unwrap();
        fs::write(etc.join("names"), "alice").unwrap();
        fs::write(data.join("inner.conf"), "").unwrap();
        fs::write(data.join("pg_ident.conf"), "").unwrap();
        let files = ConfigFiles {
            config: etc.join("main.conf"),
            hba: etc.join("hba.conf"),
            ident: data.join("pg_ident.conf"),
            sources: vec![etc.join("main.conf"), etc.join("conf.d/../more.conf")],
        };
        let found = find(&data, &files).unwrap();
        let named: Vec<_> = found
            .iter()
            .map(|a| (Path::new(&a.source).strip_prefix(&etc).unwrap(), a.role))
            .collect();
        let expected = [
            (Path::new("conf.d/one.conf"), AttachmentRole::Included),
            (Path::new("hba.conf"), AttachmentRole::Hba),
            (Path::new("main.conf"), AttachmentRole::Config),
            (Path::new("more.conf"), AttachmentRole::Included),
            (Path::new("names"), AttachmentRole::Included),
            (Path::new("two.conf"), AttachmentRole::Included),
        ];
        assert_eq!(named, expected);
        assert!(
            found
                .iter()
                .all(|a| a.path == format!("attachments{}", a.source))
        );
    }
}
