//! SQL as far as a proxy has to understand it: tokens, and which part of a text each is.

use std::ops::Range;

/// What a token is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Token {
    /// A keyword or a plain name, in lower case.
    Word(String),
    /// A name in double quotes.
    Quoted(String),
    /// A string constant.
    Text(String),
    /// A number, as it stands there.
    Number(String),
    /// `$1` is 1.
    Parameter(usize),
    /// Anything else, one character.
    Symbol(char),
}

/// A token and where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    pub token: Token,
    pub at: Range<usize>,
}

impl Piece {
    /// Whether it is the keyword `word`, given in lower case.
    pub(super) fn is(&self, word: &str) -> bool {
        matches!(&self.token, Token::Word(text) if text == word)
    }

    pub(super) fn is_symbol(&self, symbol: char) -> bool {
        self.token == Token::Symbol(symbol)
    }

    /// The name it is, if it can be one.
    pub(super) fn name(&self) -> Option<&str> {
        match &self.token {
            Token::Word(name) | Token::Quoted(name) => Some(name),
            _ => None,
        }
    }

    /// The string it is; DistSQL takes both quotes.
    pub(super) fn text(&self) -> Option<&str> {
        match &self.token {
            Token::Text(text) | Token::Quoted(text) => Some(text),
            _ => None,
        }
    }
}

/// The tokens of `sql`, without comments and without semicolons at the end. `None`: a quote is not closed.
pub(super) fn pieces(sql: &str) -> Option<Vec<Piece>> {
    let mut scanner = Scanner { sql, at: 0 };
    let mut pieces = Vec::new();
    loop {
        scanner.skip_space()?;
        let start = scanner.at;
        let Some(first) = scanner.peek() else { break };
        let token = scanner.token(first)?;
        pieces.push(Piece {
            token,
            at: start..scanner.at,
        });
    }
    while pieces.last().is_some_and(|last| last.is_symbol(';')) {
        pieces.pop();
    }
    Some(pieces)
}

struct Scanner<'a> {
    sql: &'a str,
    at: usize,
}

impl<'a> Scanner<'a> {
    fn rest(&self) -> &'a str {
        &self.sql[self.at..]
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn skip_space(&mut self) -> Option<()> {
        loop {
            let rest = self.rest();
            let trimmed = rest.trim_start();
            self.at += rest.len() - trimmed.len();
            if trimmed.starts_with("--") {
                self.at += trimmed.find('\n').unwrap_or(trimmed.len());
            } else if trimmed.starts_with("/*") {
                self.at += trimmed.find("*/")? + 2;
            } else {
                return Some(());
            }
        }
    }

    fn while_(&mut self, wanted: impl Fn(char) -> bool) -> &'a str {
        let rest = self.rest();
        let end = rest.find(|c| !wanted(c)).unwrap_or(rest.len());
        self.at += end;
        &rest[..end]
    }

    fn token(&mut self, first: char) -> Option<Token> {
        if matches!(first, 'e' | 'E') && self.rest()[1..].starts_with('\'') {
            self.at += 1;
            return self.escaped().map(Token::Text);
        }
        Some(match first {
            '\'' => Token::Text(self.quoted('\'')?),
            '"' => Token::Quoted(self.quoted('"')?),
            '`' => Token::Quoted(self.quoted('`')?),
            '$' => return self.dollar(),
            '0'..='9' => {
                let number = self.while_(|c| c.is_ascii_alphanumeric() || c == '.');
                Token::Number(number.to_owned())
            }
            c if c.is_alphabetic() || c == '_' => {
                let word = self.while_(|c| c.is_alphanumeric() || matches!(c, '_' | '$'));
                Token::Word(word.to_lowercase())
            }
            symbol => {
                self.at += symbol.len_utf8();
                Token::Symbol(symbol)
            }
        })
    }

    fn quoted(&mut self, quote: char) -> Option<String> {
        let mut text = String::new();
        loop {
            self.at += 1;
            let end = self.rest().find(quote)?;
            text.push_str(&self.rest()[..end]);
            self.at += end + 1;
            // Doubled, it is one of the text.
            if self.peek() != Some(quote) {
                return Some(text);
            }
            text.push(quote);
        }
    }

    /// `E'...'`: only where it ends is looked at.
    fn escaped(&mut self) -> Option<String> {
        let mut text = String::new();
        let mut characters = self.rest().char_indices().skip(1);
        while let Some((at, c)) = characters.next() {
            match c {
                '\\' => text.extend(characters.next().map(|(_, c)| c)),
                '\'' => {
                    self.at += at + 1;
                    return Some(text);
                }
                c => text.push(c),
            }
        }
        None
    }

    /// `$1`, or `$tag$ ... $tag$`.
    fn dollar(&mut self) -> Option<Token> {
        let rest = self.rest();
        if rest[1..].starts_with(|c: char| c.is_ascii_digit()) {
            self.at += 1;
            let number = self.while_(|c| c.is_ascii_digit());
            return number.parse().ok().map(Token::Parameter);
        }
        let Some(end) = rest[1..].find('$') else {
            self.at += 1;
            return Some(Token::Symbol('$'));
        };
        let tag = &rest[..end + 2];
        let length = rest[tag.len()..].find(tag)?;
        self.at += 2 * tag.len() + length;
        Some(Token::Text(rest[tag.len()..tag.len() + length].to_owned()))
    }
}
