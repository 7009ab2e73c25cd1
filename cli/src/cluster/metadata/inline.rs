//! Secrets within a value: in a URL, or written as `name=value`.

use super::{Secrets, speaks_of_a_secret};

/// A value with its secrets taken out. Such a secret goes on to the next `&` or the end of the value: in doubt, more is
/// taken out.
pub(super) fn redact(value: &str, path: &str, secrets: &mut Secrets) -> String {
    let (open, inner, close) = unquoted(value);
    let mut text = String::with_capacity(value.len());
    text.push_str(open);
    let rest = user_info(inner, path, &mut text, secrets);
    parameters(rest, path, &mut text, secrets);
    text.push_str(close);
    text
}

/// A value without the quotes around all of it.
fn unquoted(value: &str) -> (&str, &str, &str) {
    for quote in ['\'', '"'] {
        let inner = value
            .strip_prefix(quote)
            .and_then(|rest| rest.strip_suffix(quote));
        if let Some(inner) = inner {
            return (&value[..1], inner, &value[value.len() - 1..]);
        }
    }
    ("", value, "")
}

/// Writes a URL to the end of `user:password@`, if it has that; what comes after it.
fn user_info<'a>(url: &'a str, path: &str, text: &mut String, secrets: &mut Secrets) -> &'a str {
    let Some(begin) = url.find("://").map(|at| at + 3) else {
        return url;
    };
    let authority = &url[begin..];
    // A password may have a `/` or a `?` in it; the query of an address without user may have an `@`.
    let before_query = authority.split('?').next().unwrap_or_default();
    let end = match before_query.rfind('@') {
        Some(end) => Some(end),
        None if is_host(before_query) => None,
        None => authority.rfind('@'),
    };
    let Some(end) = end else {
        return url;
    };
    let Some(colon) = authority[..end].find(':') else {
        return url;
    };
    text.push_str(&url[..begin]);
    text.push_str(&authority[..=colon]);
    let password = &authority[colon + 1..end];
    if !password.is_empty() {
        text.push_str(&secrets.take(&format!("{path}.userinfo"), password));
    }
    &authority[end..]
}

/// Whether an address begins with a host, with or without a port, and so has no user.
fn is_host(address: &str) -> bool {
    let host = address.split('/').next().unwrap_or_default();
    host.starts_with('[')
        || host
            .rsplit_once(':')
            .is_none_or(|(_, port)| port.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Writes the rest, without the values of parameters that are secrets.
fn parameters(mut rest: &str, path: &str, text: &mut String, secrets: &mut Secrets) {
    let of_name = |c: char| c.is_alphanumeric() || "_.-".contains(c);
    let mut looked = 0;
    while let Some(equals) = rest[looked..].find('=').map(|at| looked + at) {
        let before = rest[..equals].trim_end();
        let name = before.rfind(|c| !of_name(c));
        let name = name.map_or(before, |at| {
            let first = before[at..].chars().next().map_or(1, char::len_utf8);
            &before[at + first..]
        });
        if !speaks_of_a_secret(name) {
            looked = equals + 1;
            continue;
        }
        let value = &rest[equals + 1..];
        let end = value.find('&').unwrap_or(value.len());
        text.push_str(&rest[..=equals]);
        if end > 0 {
            text.push_str(&secrets.take(&format!("{path}.{name}"), &value[..end]));
        }
        rest = &value[end..];
        looked = 0;
    }
    text.push_str(rest);
}
