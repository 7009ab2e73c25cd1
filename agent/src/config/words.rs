//! A command on the command line: one string, split into words without a shell.

/// Why a string is not a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum WordsError {
    /// No word at all.
    #[error("the command is empty")]
    Empty,
    /// A quote without its pair.
    #[error("a {0} quote is not closed")]
    Quote(char),
    /// A backslash with nothing after it.
    #[error("it ends in a lone backslash")]
    Backslash,
}

/// Splits at blanks. `'...'` keeps everything, `"..."` keeps all but `\"` and `\\`, a backslash
/// outside of quotes keeps the next character. Nothing is expanded: no `$`, `~`, `*`, `;`, `|`.
pub(super) fn split(text: &str) -> Result<Vec<String>, WordsError> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut rest = text.chars();
    while let Some(c) = rest.next() {
        match c {
            c if c.is_whitespace() => words.extend(word.take()),
            '\'' | '"' => quoted(c, &mut rest, word.get_or_insert_default())?,
            '\\' => {
                let next = rest.next().ok_or(WordsError::Backslash)?;
                word.get_or_insert_default().push(next);
            }
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    if words.is_empty() {
        return Err(WordsError::Empty);
    }
    Ok(words)
}

fn quoted(
    quote: char,
    rest: &mut std::str::Chars<'_>,
    word: &mut String,
) -> Result<(), WordsError> {
    loop {
        match rest.next().ok_or(WordsError::Quote(quote))? {
            c if c == quote => return Ok(()),
            '\\' if quote == '"' => match rest.next().ok_or(WordsError::Quote(quote))? {
                c @ ('"' | '\\') => word.push(c),
                c => word.extend(['\\', c]),
            },
            c => word.push(c),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_split_as_a_person_expects() {
        let words = split(r#"pg_ctl  -D '/a b/$HOME' -o "-c x=\"y\" \n" c\ d "" ;"#).unwrap();
        let expected = [
            "pg_ctl",
            "-D",
            "/a b/$HOME",
            "-o",
            r#"-c x="y" \n"#,
            "c d",
            "",
            ";",
        ];
        assert_eq!(words, expected);
    }

    #[test]
    fn half_commands_are_refused() {
        assert_eq!(split("  "), Err(WordsError::Empty));
        assert_eq!(split("a 'b"), Err(WordsError::Quote('\'')));
        assert_eq!(split("a \"b\\"), Err(WordsError::Quote('"')));
        assert_eq!(split("a \\"), Err(WordsError::Backslash));
    }
}
