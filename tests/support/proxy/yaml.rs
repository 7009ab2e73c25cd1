//! As much YAML as EXPORT METADATA writes, read the way the real IMPORT reads it: its exports leave passwords unquoted, and so some of them
//! come back as something else.

/// A value and the keys above it; items of lists have `[0]`, or their tag (`!SHARDING`), for a key.
pub(super) type Entry = (Vec<String>, String);

/// All values in `text`. The error is what the parser says.
pub(super) fn flatten(text: &str) -> Result<Vec<Entry>, String> {
    let mut entries = Vec::new();
    // Indentation, key, and whether it is an item of a list.
    let mut path: Vec<(usize, String, bool)> = Vec::new();
    let mut items = 0;
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        let content = line.trim_start();
        let mut indentation = line.len() - content.len();
        let mut content = content.trim_end();
        if let Some(item) = content.strip_prefix("- ") {
            let above = |(at, _, item): &(usize, String, bool)| {
                *at < indentation || (*at == indentation && !item)
            };
            while path.last().is_some_and(|last| !above(last)) {
                path.pop();
            }
            content = item.trim_start();
            let key = match content.strip_prefix('!') {
                Some(_) => content.split(' ').next().unwrap_or(content).to_owned(),
                None => format!("[{items}]"),
            };
            items += 1;
            path.push((indentation, key, true));
            if content.starts_with('!') {
                continue;
            }
            indentation += 2;
        }
        while path.last().is_some_and(|(at, ..)| *at >= indentation) {
            path.pop();
        }
        let (key, value) = match content.strip_suffix(':') {
            Some(key) => (key, ""),
            None => content
                .split_once(": ")
                .ok_or("could not find expected ':'")?,
        };
        if value.is_empty() {
            path.push((indentation, key.to_owned(), false));
            continue;
        }
        let keys = path.iter().map(|(_, key, _)| key.clone());
        let keys = keys.chain([key.to_owned()]).collect();
        entries.push((keys, scalar(value)?));
    }
    Ok(entries)
}

/// A value as a string.
fn scalar(raw: &str) -> Result<String, String> {
    let raw = raw.trim();
    if let Some(text) = raw.strip_prefix('\'') {
        let text = text
            .strip_suffix('\'')
            .ok_or("found unexpected end of stream")?;
        return Ok(text.replace("''", "'"));
    }
    if let Some(text) = raw.strip_prefix('"') {
        let text = text
            .strip_suffix('"')
            .ok_or("found unexpected end of stream")?;
        return Ok(text.replace("\\\"", "\"").replace("\\\\", "\\"));
    }
    if raw.starts_with(['@', '`', '%']) {
        return Err("found character that cannot start any token".to_owned());
    }
    if raw.starts_with(['*', '&', '!', '{', '[', '|', '>']) {
        return Err("found something else than a plain value".to_owned());
    }
    if raw.contains(": ") || raw.ends_with(':') {
        return Err("mapping values are not allowed here".to_owned());
    }
    let plain = raw.split(" #").next().unwrap_or(raw).trim_end();
    let octal = plain.len() > 1 && plain.starts_with('0');
    if octal && let Ok(number) = u64::from_str_radix(plain, 8) {
        return Ok(number.to_string());
    }
    Ok(match plain.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" => "true".to_owned(),
        "false" | "no" | "off" => "false".to_owned(),
        _ => plain.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_export_is_read_back() {
        let text = "databaseName: bank\ndataSources:\n  ds_0:\n    password: secret\n    url: jdbc:postgresql://h:1/b\nrules:\n\
                    - !SHARDING\n  autoTables:\n    account:\n      logicTable: account\n- !OTHER {}\nusers:\n- admin: true\n  user: root@%\n- user: b@%\n";
        let entries: Vec<String> = flatten(text)
            .unwrap()
            .into_iter()
            .map(|(keys, value)| format!("{}={value}", keys.join("/")))
            .collect();
        assert_eq!(
            entries,
            [
                "databaseName=bank",
                "dataSources/ds_0/password=secret",
                "dataSources/ds_0/url=jdbc:postgresql://h:1/b",
                "rules/!SHARDING/autoTables/account/logicTable=account",
                "users/[2]/admin=true",
                "users/[2]/user=root@%",
                "users/[3]/user=b@%",
            ]
        );
    }

    #[test]
    fn unquoted_passwords_are_damaged_as_they_were_seen_to_be() {
        assert!(scalar("a: b").is_err());
        assert_eq!(scalar("x #y").unwrap(), "x");
        assert_eq!(scalar("0123").unwrap(), "83");
        for leading in ["@a", "*a", "!a"] {
            assert!(scalar(leading).is_err(), "{leading}");
        }
        assert_eq!(scalar("'a: b #''c'").unwrap(), "a: b #'c");
        assert_eq!(scalar("\"0123\"").unwrap(), "0123");
        assert_eq!(scalar("a#b:c").unwrap(), "a#b:c");
    }
}
