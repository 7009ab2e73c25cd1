//! The configuration file: options at the top, and per profile below `[profile.NAME]`.

use std::io::ErrorKind as IoErrorKind;
use std::path::Path;

use toml::{Table, Value};

use super::Options;
use super::proxy::ProxySettings;
use crate::failure::{Failure, Result};

/// What the file says for `profile`, combined with what it says for all. A file that is not named
/// need not exist.
pub(super) fn read(home: &Path, named: Option<&Path>, profile: Option<&str>) -> Result<Options> {
    let usual = home.join("config.toml");
    let path = named.unwrap_or(&usual);
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == IoErrorKind::NotFound && named.is_none() => match profile {
            None => return Ok(Options::default()),
            Some(_) => String::new(),
        },
        Err(error) => return Err(Failure::file(path, "read", &error)),
    };
    parse(path, &text, profile)
}

fn parse(path: &Path, text: &str, profile: Option<&str>) -> Result<Options> {
    let shown = path.display();
    let mut table: Table = toml::from_str(text)
        .map_err(|error| Failure::usage(format!("`{shown}` is not TOML: {}", one_line(&error))))?;
    let profiles = match table.remove("profile") {
        None => Table::new(),
        Some(Value::Table(profiles)) => profiles,
        Some(_) => {
            let message = format!("`{shown}`: `profile`: write each as a table `[profile.NAME]`");
            return Err(Failure::usage(message));
        }
    };
    let common = options(path, "", table)?;
    // All profiles are read, so that a mistake is found before the day it is needed.
    let names: Vec<String> = profiles.keys().map(|name| format!("`{name}`")).collect();
    let mut chosen = None;
    for (name, value) in profiles {
        let Value::Table(table) = value else {
            let message = format!("`{shown}`: `profile.{name}`: it is not a table");
            return Err(Failure::usage(message));
        };
        let options = options(path, &format!("profile.{name}."), table)?;
        if profile == Some(name.as_str()) {
            chosen = Some(options);
        }
    }
    match (profile, chosen) {
        (None, _) => Ok(common),
        (Some(_), Some(chosen)) => Ok(chosen.combine(common)),
        (Some(profile), None) => {
            let there = match names.as_slice() {
                [] => "it has no profiles".to_owned(),
                names => format!("it has {}", names.join(", ")),
            };
            Err(Failure::usage(format!(
                "`{shown}` has no profile `{profile}`; {there}"
            )))
        }
    }
}

/// Reads key by key, so that every mistake can be told with the key it is in.
fn options(path: &Path, place: &str, table: Table) -> Result<Options> {
    let mut all = Options::default();
    for (key, value) in table {
        let wrong = |error: toml::de::Error| {
            let (path, why) = (path.display(), one_line(&error));
            Failure::usage(format!("`{path}`: `{place}{key}`: {why}"))
        };
        let one = Table::from_iter([(key.clone(), value)]);
        let one = if ProxySettings::KEYS.contains(&key.as_str()) {
            Options::from(one.try_into::<ProxySettings>().map_err(wrong)?)
        } else {
            one.try_into::<Options>().map_err(wrong)?
        };
        all = all.combine(one);
    }
    if all.s3_credentials_file.is_some() && all.s3_credentials_command.is_some() {
        return Err(Failure::usage(format!(
            "`{}`: `{place}s3-credentials-file` and `{place}s3-credentials-command` exclude each other",
            path.display()
        )));
    }
    check_ranges(path, place, &all)?;
    Ok(all)
}

/// The limits that the flags have too.
fn check_ranges(path: &Path, place: &str, options: &Options) -> Result<()> {
    let within = |key: &str, value: Option<i64>, low: i64, high: i64| match value {
        Some(value) if !(low..=high).contains(&value) => Err(Failure::usage(format!(
            "`{}`: `{place}{key}`: {value} is not in {low}..={high}",
            path.display()
        ))),
        _ => Ok(()),
    };
    within("jobs", options.jobs.map(i64::from), 1, 64)?;
    let port = |port: Option<u16>| port.map(i64::from);
    within("proxy-port", port(options.proxy.port), 1, 65_535)?;
    within("agent-port", port(options.proxy.agent_port), 1, 65_535)?;
    within("level", options.level.map(i64::from), 1, 19)?;
    let (lease_ttl, shortest) = (options.lease_ttl.map(i64::from), super::MIN_LEASE_TTL);
    within("lease-ttl", lease_ttl, shortest, 3600)?;
    within(
        "agent-timeout",
        options.agent_timeout.map(i64::from),
        1,
        86_400,
    )
}

fn one_line(error: &toml::de::Error) -> String {
    let mut text = error.message().replace('\n', " ").trim().to_owned();
    if text.starts_with("unknown field") {
        for key in ProxySettings::KEYS {
            text.push_str(", `");
            text.push_str(key);
            text.push('`');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: &str = "/etc/gs_pitr.toml";

    fn message(text: &str, profile: Option<&str>) -> String {
        parse(Path::new(PATH), text, profile).unwrap_err().message
    }

    #[test]
    fn a_profile_goes_before_the_rest_of_the_file() {
        let text = "repo = 's3://common/a'\njobs = 2\n[profile.prod]\nrepo = 's3://prod/a'\n";
        let options = parse(Path::new(PATH), text, Some("prod")).unwrap();
        assert_eq!(options.repo.unwrap().bucket, "prod");
        assert_eq!(options.jobs, Some(2));
        let options = parse(Path::new(PATH), text, None).unwrap();
        assert_eq!(options.repo.unwrap().bucket, "common");
    }

    #[test]
    fn a_credential_source_replaces_the_other_one() {
        let text = "s3-credentials-file = '/a'\n[profile.p]\ns3-credentials-command = 'get it'\n";
        let options = parse(Path::new(PATH), text, Some("p")).unwrap();
        assert_eq!(options.s3_credentials_file, None);
        assert!(options.s3_credentials_command.is_some());
    }

    #[test]
    fn mistakes_name_file_and_key() {
        insta::assert_snapshot!(message("s3-regoin = 'x'", None), @"`/etc/gs_pitr.toml`: `s3-regoin`: unknown field `s3-regoin`, expected one of `repo`, `s3-endpoint`, `s3-region`, `s3-ca-file`, `s3-credentials-file`, `s3-credentials-command`, `tls-crt`, `tls-key`, `tls-ca`, `insecure-http`, `agent-timeout`, `lease-ttl`, `output`, `no-progress`, `nodes`, `jobs`, `bandwidth`, `level`, `keep-full`, `keep-days`, `proxy-host`, `proxy-port`, `proxy-username`, `proxy-password-file`, `proxies`, `proxy-map`, `proxy-tls`, `proxy-ca`, `agent-port`, `agents`");
        insta::assert_snapshot!(message("[profile.p]\njobs = 'x'", None), @r#"`/etc/gs_pitr.toml`: `profile.p.jobs`: invalid type: string "x", expected u32"#);
        insta::assert_snapshot!(message("repo = 'bucket'", None), @"`/etc/gs_pitr.toml`: `repo`: it does not begin with `s3://`; a repository is written `s3://BUCKET/PREFIX`");
        insta::assert_snapshot!(message("jobs = 1000", None), @"`/etc/gs_pitr.toml`: `jobs`: 1000 is not in 1..=64");
        insta::assert_snapshot!(message("jobs = ", None), @"`/etc/gs_pitr.toml` is not TOML: string values must be quoted, expected literal string");
        insta::assert_snapshot!(message("[profile.p]\n[profile.q]", Some("prod")), @"`/etc/gs_pitr.toml` has no profile `prod`; it has `p`, `q`");
        insta::assert_snapshot!(message("nodes = ['a:1', 'b']", None), @"`/etc/gs_pitr.toml`: `nodes`: `b` is not of the form HOST:PORT");
    }
}
