//! Values of options that are more than a string: each parses the same from a flag, the environment
//! and the configuration file.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer};

/// Where the repository is: `s3://BUCKET/PREFIX`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct RepoUrl {
    /// The bucket.
    pub(crate) bucket: String,
    /// The prefix, without slashes at the ends; may be empty.
    pub(crate) prefix: String,
}

impl FromStr for RepoUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| format!("{why}; a repository is written `s3://BUCKET/PREFIX`");
        let Some(rest) = text.strip_prefix("s3://") else {
            return Err(wrong("it does not begin with `s3://`"));
        };
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let name_ok = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b".-".contains(&b);
        if bucket.len() < 3 || bucket.len() > 63 || !bucket.bytes().all(name_ok) {
            return Err(wrong(
                "the bucket's name is not 3 to 63 lower-case letters, digits, dots or hyphens",
            ));
        }
        let prefix = prefix.trim_matches('/');
        let bad = |part: &str| part.is_empty() || part == "." || part == "..";
        if !prefix.is_empty() && (prefix.split('/').any(bad) || prefix.contains(char::is_control)) {
            return Err(wrong("the prefix has an empty, `.` or `..` part"));
        }
        Ok(Self {
            bucket: bucket.to_owned(),
            prefix: prefix.to_owned(),
        })
    }
}

impl TryFrom<String> for RepoUrl {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for RepoUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s3://{}/{}", self.bucket, self.prefix)
    }
}

/// `HOST:PORT`, an IPv6 host in brackets; compared as written.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Address {
    /// Host name or address, without brackets.
    pub(crate) host: String,
    /// Port, never 0.
    pub(crate) port: u16,
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not of the form HOST:PORT");
        let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
        let port: u16 = port.parse().map_err(|_| wrong())?;
        let bare = host
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'));
        let host = bare.unwrap_or(host);
        let odd = |c: char| c.is_whitespace() || c.is_control() || "/@[]?#".contains(c);
        if host.is_empty()
            || port == 0
            || host.contains(odd)
            || (bare.is_none() && host.contains(':'))
        {
            return Err(wrong());
        }
        Ok(Self {
            host: host.to_owned(),
            port,
        })
    }
}

impl TryFrom<String> for Address {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// `NAME=HOST:PORT`: what is listed as NAME, a `host:port` or a host, is to be reached there.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Named {
    /// As it is listed, a host in brackets or not.
    pub(crate) name: String,
    /// Where it is.
    pub(crate) address: Address,
}

impl Named {
    /// Whether it speaks of this address, and if so, whether by its port too.
    pub(crate) fn names(&self, listed: &Address) -> Option<bool> {
        if self.name == listed.to_string() {
            return Some(true);
        }
        let bare = self.name.trim_start_matches('[').trim_end_matches(']');
        (bare == listed.host).then_some(false)
    }
}

impl FromStr for Named {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((name, address)) if !name.is_empty() => Ok(Self {
                name: name.to_owned(),
                address: address.parse()?,
            }),
            _ => Err(format!("`{text}` is not of the form NAME=HOST:PORT")),
        }
    }
}

impl TryFrom<String> for Named {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// `HOST:PORT=UUID`: the node that an agent's database is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NodeName {
    /// The agent.
    pub(crate) address: Address,
    /// The node.
    pub(crate) node: uuid::Uuid,
}

impl FromStr for NodeName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (address, node) = text
            .split_once('=')
            .ok_or("it is not of the form HOST:PORT=UUID")?;
        let node = node
            .parse()
            .map_err(|_| format!("`{node}` is not a UUID"))?;
        Ok(Self {
            address: address.parse()?,
            node,
        })
    }
}

/// Bytes a second: a number, or one with `KiB`, `MiB`, `GiB` (or `K`, `M`, `G`: the same).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ByteRate(pub(crate) u64);

impl FromStr for ByteRate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let shift = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kib" => 10,
            "m" | "mib" => 20,
            "g" | "gib" => 30,
            _ => return Err(format!("`{unit}` is not one of KiB, MiB, GiB")),
        };
        let number: u64 = number
            .parse()
            .map_err(|_| "it does not begin with a number that fits".to_owned())?;
        match number.checked_mul(1 << shift) {
            Some(0) => Err("a rate of 0 would never end".into()),
            Some(rate) => Ok(Self(rate)),
            None => Err("that is too much".into()),
        }
    }
}

impl<'de> Deserialize<'de> for ByteRate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "a number of bytes, or a string such as `50MiB`")]
        enum Raw {
            Number(u64),
            Text(String),
        }
        let text = match Raw::deserialize(deserializer)? {
            Raw::Number(number) => number.to_string(),
            Raw::Text(text) => text,
        };
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A program and its arguments. No shell reads it: quotes group, a backslash takes the next
/// character as it is, nothing else is special.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Argv(pub(crate) Vec<String>);

impl FromStr for Argv {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None::<char>);
        let mut chars = text.chars();
        while let Some(c) = chars.next() {
            match (c, quote) {
                ('\\', None | Some('"')) => {
                    let next = chars.next().ok_or("it ends in a backslash")?;
                    word.get_or_insert_default().push(next);
                }
                ('\'' | '"', None) => {
                    quote = Some(c);
                    word.get_or_insert_default();
                }
                (c, Some(open)) if c == open => quote = None,
                (c, None) if c.is_whitespace() => words.extend(word.take()),
                (c, _) => word.get_or_insert_default().push(c),
            }
        }
        if quote.is_some() {
            return Err("a quote is not closed".into());
        }
        words.extend(word);
        Self::checked(words)
    }
}

impl Argv {
    fn checked(words: Vec<String>) -> Result<Self, String> {
        match words.first() {
            Some(program) if !program.is_empty() => Ok(Self(words)),
            _ => Err("it names no program".into()),
        }
    }
}

impl<'de> Deserialize<'de> for Argv {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "a string, or a list of strings")]
        enum Raw {
            Text(String),
            List(Vec<String>),
        }
        let argv = match Raw::deserialize(deserializer)? {
            Raw::Text(text) => text.parse(),
            Raw::List(words) => Self::checked(words),
        };
        argv.map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repository_urls() {
        let url: RepoUrl = "s3://bucket/a/b/".parse().unwrap();
        assert_eq!(
            (url.bucket.as_str(), url.prefix.as_str()),
            ("bucket", "a/b")
        );
        assert_eq!("s3://bucket".parse::<RepoUrl>().unwrap().prefix, "");
        for bad in [
            "bucket/a",
            "s3://",
            "s3://Bucket/a",
            "s3://bucket/a//b",
            "s3://bucket/../x",
        ] {
            assert!(bad.parse::<RepoUrl>().is_err(), "{bad}");
        }
    }

    #[test]
    fn addresses() {
        for good in ["db1:18080", "127.0.0.1:1", "[::1]:18080"] {
            assert_eq!(good.parse::<Address>().unwrap().to_string(), good);
        }
        for bad in [
            "db1",
            "db1:",
            ":1",
            "db1:0",
            "db1:99999",
            "::1:5",
            "a b:1",
            "u@h:1",
            "",
        ] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
    }

    #[test]
    fn names_of_addresses() {
        let at = |text: &str| text.parse::<Address>().unwrap();
        let named: Named = "10.0.0.5:3307=127.0.0.1:13307".parse().unwrap();
        assert_eq!(named.names(&at("10.0.0.5:3307")), Some(true));
        assert_eq!(named.names(&at("10.0.0.5:3308")), None);
        let host: Named = "[::1]=db1:5432".parse().unwrap();
        assert_eq!(host.names(&at("[::1]:3307")), Some(false));
        for bad in ["", "a", "=b:1", "a=b", "a=b:0"] {
            assert!(bad.parse::<Named>().is_err(), "{bad}");
        }
    }

    #[test]
    fn rates() {
        assert_eq!("50MiB".parse(), Ok(ByteRate(50 << 20)));
        assert_eq!("4096".parse(), Ok(ByteRate(4096)));
        for bad in [
            "",
            "0",
            "x",
            "5 parsecs",
            "99999999999999999999",
            "99999999999G",
        ] {
            assert!(bad.parse::<ByteRate>().is_err(), "{bad}");
        }
    }

    #[test]
    fn argv_without_a_shell() {
        let argv: Argv = r#"/bin/cat 'a b' "c \" d" e\ f $HOME;x"#.parse().unwrap();
        assert_eq!(argv.0, ["/bin/cat", "a b", "c \" d", "e f", "$HOME;x"]);
        for bad in ["", "  ", "'open", "end\\", "''"] {
            assert!(bad.parse::<Argv>().is_err(), "{bad}");
        }
    }
}
