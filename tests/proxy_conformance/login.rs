//! PostgreSQL's front end: who is let in, and what is said to others.

use support::raw::{Heard, LogIn, Raw, Reply};

use crate::farm::Farm;

async fn sent_away(who: &LogIn) -> Reply {
    let outcome = Raw::log_in(who).await.expect("the proxy answers");
    outcome.expect_err("it is sent away")
}

pub(crate) async fn greeting(farm: &mut Farm) {
    let session = farm.postgres(0).await;
    let greeting = &session.greeting;
    assert!(
        matches!(&greeting.0[0], Heard::Authentication(5, salt) if salt.len() == 4),
        "{greeting:?}"
    );
    assert_eq!(greeting.0[1], Heard::Authentication(0, vec![]));
    let expected = [
        "server_version",
        "client_encoding",
        "server_encoding",
        "integer_datetimes",
        "standard_conforming_strings",
    ];
    assert_eq!(greeting.parameters(), expected);
    let version = greeting.parameter("server_version").unwrap();
    assert!(
        version.ends_with("-ShardingSphere-Proxy 5.5.2"),
        "{version}"
    );
    assert_eq!(greeting.parameter("client_encoding"), Some("UTF8"));
    assert_eq!(greeting.parameter("integer_datetimes"), Some("on"));
    // Nothing can be cancelled.
    assert!(!greeting.0.contains(&Heard::BackendKey));
    assert_eq!(greeting.ready(), Some('I'));
}

async fn fails(who: LogIn, code: &str, text: &str) {
    let reply = sent_away(&who).await;
    // Nobody is told before the password.
    assert!(
        matches!(reply.0[0], Heard::Authentication(5, _)),
        "{reply:?}"
    );
    assert_eq!(reply.error(), Some((code, text)));
    assert_eq!(reply.field('S'), Some("FATAL"));
    assert_eq!(reply.field('V'), Some("FATAL"));
}

pub(crate) async fn wrong_password(farm: &mut Farm) {
    let password = "wrong".to_owned();
    let who = LogIn {
        password,
        ..farm.log_in(0, "postgres")
    };
    fails(
        who,
        "28P01",
        "password authentication failed for user \"root\"",
    )
    .await;
}

pub(crate) async fn unknown_user(farm: &mut Farm) {
    let user = "nobody".to_owned();
    let who = LogIn {
        user,
        ..farm.log_in(0, "postgres")
    };
    fails(who, "28000", "unknown username: nobody").await;
}

pub(crate) async fn unknown_database(farm: &mut Farm) {
    let who = farm.log_in(0, "nosuchdb");
    fails(who, "3D000", "database \"nosuchdb\" does not exist").await;
}
