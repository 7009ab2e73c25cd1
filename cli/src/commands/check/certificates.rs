//! Certificates: ours, our CA's, and those that the agents show.

use agent_api::{ErrorKind, Finding};
use jiff::{SignedDuration, Timestamp};

use super::report::of_failure;
use crate::certs::{self, Facts};
use crate::failure::Failure;
use crate::settings::Settings;

/// Certificates that end sooner are told of.
const SOON: SignedDuration = SignedDuration::from_hours(30 * 24);

/// Our own certificate and the CA's.
pub(super) fn ours(settings: &Settings) -> Vec<Finding> {
    if settings.insecure_http() {
        let message = "plain HTTP: every user of this host can give the agents orders";
        let mend =
            "gs_pitr certs init, and start the agents with --tls-crt, --tls-key and --tls-ca";
        return vec![Finding::warning("certificate", message, mend)];
    }
    let renew = "gs_pitr certs issue --operator";
    let (crt, ca) = (settings.tls_crt(), settings.tls_ca());
    let read = |path: &std::path::Path| {
        std::fs::read_to_string(path).map_err(|error| {
            let message = format!("cannot read `{}`: {error}", path.display());
            Failure::new(ErrorKind::Certificate, message).next("gs_pitr certs init")
        })
    };
    let own = read(&crt).and_then(|pem| certs::check_operator(&crt, &pem));
    let signer = read(&ca).and_then(|pem| Facts::read(&ca, &pem));
    let renew_ca =
        "move the CA's files away, gs_pitr certs init, then new certificates for all agents";
    vec![
        match own {
            Ok(facts) => left("certificate", "ours", &facts, renew),
            Err(failure) => of_failure("certificate", failure),
        },
        match signer {
            Ok(facts) => left("CA", "the CA's", &facts, renew_ca),
            Err(failure) => of_failure("CA", failure),
        },
    ]
}

/// The certificate that an agent at `host` shows. It has been verified: by our CA, for this host, an agent's.
pub(super) fn of_agent(der: Option<&[u8]>, host: &str) -> Option<Finding> {
    let facts = Facts::of_der(der?)?;
    let renew = format!(
        "gs_pitr certs issue --name {host} --san {host}, installed at the agent, then SIGHUP to it"
    );
    Some(left("certificate", "the agent's", &facts, &renew))
}

fn left(name: &str, whose: &str, facts: &Facts, renew: &str) -> Finding {
    let left = facts.not_after.duration_since(Timestamp::now());
    let days = left.as_hours() / 24;
    let message = format!("{whose} (`{}`) is valid for {days} more days", facts.name);
    if left <= SignedDuration::ZERO {
        let message = format!("{whose} (`{}`) expired at {}", facts.name, facts.not_after);
        return of_failure(
            name,
            Failure::new(ErrorKind::Certificate, message).next(renew),
        );
    }
    if left < SOON {
        return Finding::warning(name, message, renew);
    }
    Finding::fine(name, message)
}

#[cfg(test)]
mod tests {
    use agent_api::Level;

    use super::*;
    use crate::certs::{Role, San};

    /// Of a certificate made for so many days.
    fn found(days: u32) -> Finding {
        let directory = tempfile::tempdir().unwrap();
        let (crt, key) = (
            directory.path().join("ca.crt"),
            directory.path().join("ca.key"),
        );
        let made = certs::make_authority("test", 400).unwrap();
        std::fs::write(&crt, made.cert).unwrap();
        std::fs::write(&key, made.key).unwrap();
        let authority = certs::Authority::load(&crt, &key).unwrap();
        let role = Role::Agent(vec![San::Dns("db1".into())]);
        let leaf = authority.issue("db1", &role, days, None).unwrap();
        let facts = Facts::read(&crt, &leaf.cert).unwrap();
        left("certificate", "the agent's", &facts, "renew it")
    }

    #[test]
    fn certificates_that_end_soon_are_told_of() {
        assert_eq!(found(100).level, Level::Ok);
        let soon = found(20);
        assert_eq!(soon.level, Level::Warning, "{soon:?}");
        assert_eq!(soon.mend.as_deref(), Some("renew it"));
        assert!(
            soon.message.contains("for 19 more days") || soon.message.contains("for 20 more days"),
            "{soon:?}"
        );
    }
}
