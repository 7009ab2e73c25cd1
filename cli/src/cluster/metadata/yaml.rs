//! Secrets in YAML, line by line.

use std::collections::BTreeMap;

use super::{Secrets, inline, is_nothing, speaks_of_a_secret};

/// Keys below these are names that somebody gave, such as a table's: they say nothing of what is below them.
const NAMES: [&str; 14] = [
    "dataSources",
    "dataSourceGroups",
    "tables",
    "autoTables",
    "columns",
    "bindingTables",
    "shardingAlgorithms",
    "keyGenerators",
    "auditors",
    "loadBalancers",
    "encryptors",
    "maskAlgorithms",
    "shadowAlgorithms",
    "authenticators",
];

/// `text` with its secrets taken out; they are called by `path` and the keys that lead to them.
pub(super) fn redact(text: &str, path: &str, secrets: &mut Secrets) -> String {
    let mut reader = Reader {
        path: path.to_owned(),
        above: Vec::new(),
        items: BTreeMap::new(),
        scope: None,
        secret_at: None,
        blank: String::new(),
        out: String::with_capacity(text.len()),
        secrets,
    };
    for line in text.split_inclusive('\n') {
        reader.line(line);
    }
    let blank = std::mem::take(&mut reader.blank);
    reader.out.push_str(&blank);
    reader.out
}

/// Something that the next lines may be below.
#[derive(Debug)]
struct Above {
    column: usize,
    name: String,
    is_item: bool,
}

struct Reader<'a> {
    path: String,
    above: Vec<Above>,
    /// How many items were seen below a path.
    items: BTreeMap<String, usize>,
    /// Column of a key that speaks of a secret and has no value in its own line: all below it are secrets.
    scope: Option<usize>,
    /// Column of the secret in the line before, which may go on.
    secret_at: Option<usize>,
    /// Lines without content after a secret: its own, if it goes on after them.
    blank: String,
    out: String,
    secrets: &'a mut Secrets,
}

/// A line without its end.
struct Line<'a> {
    /// Column of what is first in it.
    indent: usize,
    /// From there.
    body: &'a str,
    /// `\n`, `\r\n` or nothing.
    end: &'a str,
}

impl<'a> Line<'a> {
    fn of(line: &'a str) -> Self {
        let content = line.trim_end_matches(['\n', '\r']);
        let body = content.trim_start_matches(' ');
        Self {
            indent: content.len() - body.len(),
            body,
            end: &line[content.len()..],
        }
    }

    fn is_item(&self) -> bool {
        self.body == "-" || self.body.starts_with("- ")
    }

    /// Whether it stands for itself, whatever was before it.
    fn is_structure(&self) -> bool {
        self.is_item()
            || self.body.starts_with('#')
            || matches!(self.body, "---" | "..." | "}" | "]")
            || key_of(self.body).is_some()
    }
}

/// The end of the key at the beginning of `text`, its colon included, and its name.
fn key_of(text: &str) -> Option<(usize, &str)> {
    for quote in ['\'', '"'] {
        if let Some(rest) = text.strip_prefix(quote) {
            let end = rest.find(quote)?;
            let after = &rest[end + 1..];
            let colon = after.find(|c| c != ' ')?;
            let after = after[colon..].strip_prefix(':')?;
            let ok = after.is_empty() || after.starts_with([' ', '\t']);
            return ok.then_some((text.len() - after.len(), &rest[..end]));
        }
    }
    let colon = text
        .match_indices(':')
        .map(|(at, _)| at)
        .find(|at| text[at + 1..].is_empty() || text[at + 1..].starts_with([' ', '\t']))?;
    (colon > 0).then_some((colon + 1, text[..colon].trim_end()))
}

impl Reader<'_> {
    fn line(&mut self, text: &str) {
        let line = Line::of(text);
        if line.body.trim().is_empty() {
            if self.secret_at.is_some() {
                self.blank.push_str(text);
            } else {
                self.out.push_str(text);
            }
            return;
        }
        if let Some(column) = self.secret_at {
            // A value goes on in lines that are further in. One that was written as it is, with a line break in it, goes
            // on anywhere.
            if line.indent > column || !line.is_structure() {
                return self.go_on(&line);
            }
        }
        let blank = std::mem::take(&mut self.blank);
        self.out.push_str(&blank);
        self.secret_at = None;
        self.structure(&line);
    }

    /// The secret of the line before goes on. The end of the line before is its own then.
    fn go_on(&mut self, line: &Line<'_>) {
        let kept = self.out.trim_end_matches(['\n', '\r']).len();
        let mut more = self.out.split_off(kept);
        more.push_str(&std::mem::take(&mut self.blank));
        more.push_str(&" ".repeat(line.indent));
        more.push_str(line.body);
        self.secrets.go_on(&more);
        self.out.push_str(line.end);
    }

    fn structure(&mut self, line: &Line<'_>) {
        let leaves =
            |column: usize| line.indent < column || (line.indent == column && !line.is_item());
        if self.scope.is_some_and(leaves) {
            self.scope = None;
        }
        self.out.push_str(&" ".repeat(line.indent));
        let (mut column, mut rest) = (line.indent, line.body);
        // Where a scalar of this line begins: lines further in than that are its own.
        let mut begin = column;
        while let Some(after) = rest.strip_prefix('-').filter(|it| it.starts_with(' ')) {
            let inner = after.trim_start_matches(' ');
            if inner.is_empty() {
                break;
            }
            begin = column;
            self.item(column, inner);
            let width = rest.len() - inner.len();
            self.out.push_str(&rest[..width]);
            (column, rest) = (column + width, inner);
        }
        if let Some((colon, name)) = key_of(rest) {
            self.entry(column, &rest[..colon], name, &rest[colon..]);
        } else {
            let value = self.scalar(rest, begin, self.scope.is_some());
            self.out.push_str(&value);
        }
        self.out.push_str(line.end);
    }

    /// An item of a list begins.
    fn item(&mut self, column: usize, content: &str) {
        while self
            .above
            .last()
            .is_some_and(|it| it.column > column || (it.column == column && it.is_item))
        {
            self.above.pop();
        }
        let count = self.items.entry(self.place()).or_default();
        let number = *count;
        *count += 1;
        let tag = content.strip_prefix('!');
        let tag = tag.and_then(|tag| tag.split_whitespace().next());
        let name = tag.map_or_else(|| number.to_string(), str::to_owned);
        self.above.push(Above {
            column,
            name,
            is_item: true,
        });
    }

    /// A key and its value.
    fn entry(&mut self, column: usize, key: &str, name: &str, after: &str) {
        while self.above.last().is_some_and(|it| it.column >= column) {
            self.above.pop();
        }
        let above = self.above.last();
        let named = above.is_some_and(|it| NAMES.contains(&it.name.as_str()));
        let value = after.trim_start_matches([' ', '\t']);
        let secret = speaks_of_a_secret(name) && !(named && value.is_empty());
        self.above.push(Above {
            column,
            name: name.to_owned(),
            is_item: false,
        });
        self.out.push_str(key);
        self.out.push_str(&after[..after.len() - value.len()]);
        if value.is_empty() {
            if secret && self.scope.is_none() {
                self.scope = Some(column);
            }
            return;
        }
        let value = self.scalar(value, column, secret || self.scope.is_some());
        self.out.push_str(&value);
    }

    /// A value that begins in this line.
    fn scalar(&mut self, value: &str, column: usize, secret: bool) -> String {
        let in_braces = value.starts_with(['{', '[']) && speaks_of_a_secret(value);
        if (secret && !is_nothing(value)) || in_braces {
            self.secret_at = Some(column);
            return self.secrets.take(&self.place(), value);
        }
        inline::redact(value, &self.place(), self.secrets)
    }

    fn place(&self) -> String {
        let names = self.above.iter().map(|it| it.name.as_str());
        let all: Vec<&str> = std::iter::once(self.path.as_str()).chain(names).collect();
        all.join(".")
    }
}
