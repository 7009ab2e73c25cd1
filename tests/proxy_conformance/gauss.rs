//! openGauss's front end: its log-in by three protocols, and the shape of its errors.

use support::raw::{Heard, LogIn, Raw};

use crate::farm::{Farm, LOCK, UNLOCK, ok};

/// Length of what follows method, salt and token.
async fn greeting(farm: &Farm, minor: u32, rest: usize) {
    let who = LogIn {
        minor,
        ..farm.log_in(0, "bank")
    };
    let session = Raw::log_in(&who).await.expect("the proxy answers");
    let session = session.expect("it lets us in");
    let Heard::Authentication(10, question) = &session.greeting.0[0] else {
        panic!("{:?}", session.greeting);
    };
    assert_eq!(question[..4], 2_u32.to_be_bytes());
    assert!(question[4..76].iter().all(u8::is_ascii_hexdigit));
    assert_eq!(question.len() - 76, rest, "{:?}", session.greeting);
    let expected = [
        "server_version",
        "client_encoding",
        "server_encoding",
        "integer_datetimes",
    ];
    assert_eq!(session.greeting.parameters(), expected);
    let version = session.greeting.parameter("server_version").unwrap();
    assert!(
        version.ends_with("-ShardingSphere-Proxy 5.5.2"),
        "{version}"
    );
    assert!(!session.greeting.0.contains(&Heard::BackendKey));
    assert_eq!(session.greeting.ready(), Some('I'));
}

/// The server's signature follows.
pub(crate) async fn greeting_of_300(farm: &mut Farm) {
    greeting(farm, 0, 64).await;
}

/// Nothing follows.
pub(crate) async fn greeting_of_350(farm: &mut Farm) {
    greeting(farm, 50, 0).await;
}

/// The number of rounds follows.
pub(crate) async fn greeting_of_351(farm: &mut Farm) {
    greeting(farm, 51, 4).await;
}

async fn fails(who: LogIn, code: &str, text: &str) {
    let reply = Raw::log_in(&who).await.expect("the proxy answers");
    let reply = reply.expect_err("it is sent away");
    let text = format!("FATAL: {text}\n  Server SQLState: {code}");
    assert_eq!(reply.error(), Some((code, text.as_str())));
    assert_eq!(reply.field('S'), Some("ERROR"));
    assert_eq!(reply.field('V'), None);
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

pub(crate) async fn errors_have_its_shape(farm: &mut Farm) {
    let mut session = farm.bank(0).await;
    ok(&mut session, LOCK).await;
    farm.until(0, true, crate::farm::MOMENT).await;
    let reply = session
        .query("INSERT INTO account VALUES (20, 100)")
        .await
        .unwrap();
    let Some(Heard::Error(fields)) = reply.0.first() else {
        panic!("{reply:?}");
    };
    let text =
        "The cluster state is READ_ONLY, can not support SQL statement 'OpenGaussInsertStatement'.";
    let expected = [('S', "ERROR"), ('C', "58000"), ('M', text), ('c', "0")];
    assert_eq!(
        *fields,
        expected.map(|(letter, value)| (letter, value.to_owned()))
    );
    ok(&mut session, UNLOCK).await;
}
