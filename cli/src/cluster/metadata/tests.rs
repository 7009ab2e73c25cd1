//! No secret survives, and nothing is lost.

use std::fmt::Write as _;

use proptest::prelude::*;
use serde_json::json;

use super::*;

/// The document with its secrets put back.
fn filled(value: &Value, secrets: &Secrets) -> Value {
    match value {
        Value::String(text) => {
            let mut text = text.clone();
            for (name, secret) in &secrets.all {
                text = text.replace(&placeholder(name), &secret.0);
            }
            Value::String(text)
        }
        Value::Array(items) => items.iter().map(|item| filled(item, secrets)).collect(),
        Value::Object(fields) => fields
            .iter()
            .map(|(key, field)| (key.clone(), filled(field, secrets)))
            .collect(),
        other => other.clone(),
    }
}

fn yaml(text: &str) -> (String, Secrets) {
    let mut secrets = Secrets::default();
    let redacted = yaml::redact(text, "t", &mut secrets);
    let mut back = redacted.clone();
    for (name, secret) in &secrets.all {
        back = back.replace(&placeholder(name), &secret.0);
    }
    assert_eq!(back, text, "something was lost");
    (redacted, secrets)
}

const DATABASE: &str = "\
databaseName: bank
dataSources:
  ds_0:
    connectionTimeoutMilliseconds: 30000
    password: a: b
    url: jdbc:postgresql://10.0.0.1:5432/bank?ssl=false&password=hunter2&user=app
    username: root
  ds_1:
    password: x #y
    url: jdbc:opengauss://app:swordfish@10.0.0.2:5432/bank
  token_ds:
    password: 0123
    maxPoolSize: 50
rules:
- !SHARDING
  tables:
    user_token:
      actualDataNodes: ds_${0..1}.user_token
  keyGenerators:
    snowflake:
      type: SNOWFLAKE
- !ENCRYPT
  tables:
    t_user:
      columns:
        password:
          cipher:
            name: password_cipher
            encryptorName: aes
  encryptors:
    aes:
      type: AES
      props:
        aes-key-value: 123456abc
";

#[test]
fn a_database() {
    let (redacted, secrets) = yaml(DATABASE);
    insta::assert_snapshot!(redacted, @r"
    databaseName: bank
    dataSources:
      ds_0:
        connectionTimeoutMilliseconds: 30000
        password: ${gs_pitr:t.dataSources.ds_0.password}
        url: jdbc:postgresql://10.0.0.1:5432/bank?ssl=false&password=${gs_pitr:t.dataSources.ds_0.url.password}&user=app
        username: root
      ds_1:
        password: ${gs_pitr:t.dataSources.ds_1.password}
        url: jdbc:opengauss://app:${gs_pitr:t.dataSources.ds_1.url.userinfo}@10.0.0.2:5432/bank
      token_ds:
        password: ${gs_pitr:t.dataSources.token_ds.password}
        maxPoolSize: 50
    rules:
    - !SHARDING
      tables:
        user_token:
          actualDataNodes: ds_${0..1}.user_token
      keyGenerators:
        snowflake:
          type: SNOWFLAKE
    - !ENCRYPT
      tables:
        t_user:
          columns:
            password:
              cipher:
                name: password_cipher
                encryptorName: aes
      encryptors:
        aes:
          type: AES
          props:
            aes-key-value: ${gs_pitr:t.rules.ENCRYPT.encryptors.aes.props.aes-key-value}
    ");
    let values: Vec<_> = secrets.all.iter().map(|(_, it)| it.0.as_str()).collect();
    assert_eq!(
        values,
        ["a: b", "hunter2", "x #y", "swordfish", "0123", "123456abc"]
    );
}

#[test]
fn users_of_the_proxy() {
    let text = "rules:\n- !AUTHORITY\n  privilege:\n    type: ALL_PERMITTED\n  users:\n  - authenticationMethodName: ''\n    password: r00t\n    user: root@%\n  - password: ''\n    user: none@%\n  - password: 'it''s: #1'\n    user: app@%\n";
    let (redacted, secrets) = yaml(text);
    insta::assert_snapshot!(redacted, @r"
    rules:
    - !AUTHORITY
      privilege:
        type: ALL_PERMITTED
      users:
      - authenticationMethodName: ''
        password: ${gs_pitr:t.rules.AUTHORITY.users.0.password}
        user: root@%
      - password: ''
        user: none@%
      - password: ${gs_pitr:t.rules.AUTHORITY.users.2.password}
        user: app@%
    ");
    assert_eq!(secrets.all.len(), 2);
}

#[test]
fn secrets_of_several_lines_and_kinds() {
    for (text, gone) in [
        (
            "password: |-\n  one\n\n  two\nuser: x\n",
            vec!["one", "two"],
        ),
        (
            "password: 'folded\n  here'\nuser: x\n",
            vec!["folded", "here"],
        ),
        (
            "password: broken\noff here\nuser: x\n",
            vec!["broken", "off here"],
        ),
        ("tokens:\n- aaa\n- bbb\nuser: x\n", vec!["aaa", "bbb"]),
        (
            "secrets:\n  a: aaa\n  b:\n    c: bbb\nuser: x\n",
            vec!["aaa", "bbb"],
        ),
        ("props: {user: a, password: aaa}\nuser: x\n", vec!["aaa"]),
        (
            "\"password\": aaa\n'my-secret' : bbb\nuser: x\n",
            vec!["aaa", "bbb"],
        ),
        ("- password: aaa\r\n  user: x\r\n", vec!["aaa"]),
        ("- - token: aaa\n    user: x\n", vec!["aaa"]),
        ("# password: aaa\nuser: x\n", vec!["aaa"]),
        (
            "url: \"jdbc:x://h/d?sslPassword=aaa&a=b\"\nuser: x\n",
            vec!["aaa"],
        ),
        ("url: jdbc:x://u:a/a?a@h:1/d?x=y\nuser: x\n", vec!["a/a?a"]),
        ("options: -c token=aaa\nuser: x", vec!["aaa"]),
    ] {
        let (redacted, _) = yaml(text);
        for gone in gone {
            assert!(!redacted.contains(gone), "{text:?} -> {redacted:?}");
        }
        assert!(redacted.contains("user: x"), "{text:?} -> {redacted:?}");
    }
}

#[test]
fn what_has_no_secret_stays_as_it_is() {
    let text = "databaseName: b\ndataSources:\n  ds:\n    url: jdbc:opengauss://h:1/d?user=a@b&x=y\n    password:\nprops:\n  a: 'b: c'\n\n  key: value\n";
    let (redacted, secrets) = yaml(text);
    assert_eq!(redacted, text);
    assert!(secrets.all.is_empty());
}

fn export(document: &Value) -> MetadataExport {
    MetadataExport::parse(&document.to_string()).unwrap()
}

#[test]
fn the_document_as_a_whole() {
    let document = json!({
        "meta_data": {
            "databases": {"secret_db": DATABASE},
            "props": "props:\n  sql-show: true\n",
            "rules": "rules:\n- !AUTHORITY\n  users:\n  - password: r00t\n    user: root@%\n",
            "more": {"redis-password": "rrr", "nested": {"token": 12345}},
        },
        "snapshot_info": {"csn": "2147483750", "create_time": "2026"},
    });
    let export = export(&document);
    let redacted = export.redacted();
    for gone in ["hunter2", "swordfish", "r00t", "rrr", "12345", "x #y"] {
        assert!(!redacted.document.contains(gone), "{gone}");
    }
    assert_eq!(redacted.placeholders.len(), 9, "{redacted:?}");
    assert!(!format!("{export:?}").contains("hunter2"));
    let (without, secrets) = export.split();
    let mut back = filled(&without, &secrets);
    // A number is put back as a string.
    back["meta_data"]["more"]["nested"]["token"] = json!(12345);
    assert_eq!(back, document);
}

#[test]
fn exports_are_compared_without_what_passes() {
    let one = json!({"meta_data": {"props": "a"}, "snapshot_info": {"csn": "1"}});
    let two = json!({"meta_data": {"props": "a"}, "create_time": "x"});
    let three = json!({"meta_data": {"props": "b"}});
    assert!(export(&one).same_as(&export(&two)));
    assert!(!export(&one).same_as(&export(&three)));
    assert!(MetadataExport::parse("[]").is_err());
    // As the proxy that was asked to register the units has them, and as the other one has.
    let unit = |name: &str, password: &str| {
        format!("  {name}:\n    password: {password}\n    url: jdbc:postgresql://h:1/{name}\n")
    };
    let bank = |units: [String; 2]| {
        let yaml = format!("databaseName: bank\ndataSources:\n{}", units.concat());
        export(&json!({"meta_data": {"databases": {"bank": yaml}}}))
    };
    let registered = bank([unit("ds_0", "a"), unit("ds_1", "b")]);
    assert!(registered.same_as(&bank([unit("ds_1", "b"), unit("ds_0", "a")])));
    assert!(!registered.same_as(&bank([unit("ds_0", "b"), unit("ds_1", "a")])));
    assert!(!registered.same_as(&bank([unit("ds_0", "a"), unit("ds_1", "c")])));
    // And as one has them that was started anew.
    let anew = |name: &str, password| unit(name, password) + "    readOnly: false\n";
    assert!(registered.same_as(&bank([anew("ds_0", "a"), anew("ds_1", "b")])));
    let changed = anew("ds_1", "b").replace("false", "true");
    assert!(!registered.same_as(&bank([anew("ds_0", "a"), changed])));
    let broken = MetadataExport::parse("{\"password\": hunter2").unwrap_err();
    assert!(!broken.message.contains("hunter2"));
}

/// A password with something in it that is nowhere else.
fn passwords() -> impl Strategy<Value = String> {
    let odd = "[ -~]{0,6}";
    (odd, "[0-9]{6}", odd).prop_map(|(before, core, after)| format!("{before}Qz{core}{after}"))
}

/// How a value is written.
#[derive(Debug, Clone, Copy)]
enum Style {
    AsItIs,
    Single,
    Double,
    Block,
}

fn written(password: &str, style: Style, indent: usize) -> String {
    match style {
        Style::AsItIs => password.to_owned(),
        Style::Single => format!("'{}'", password.replace('\'', "''")),
        Style::Double => format!(
            "\"{}\"",
            password.replace('\\', "\\\\").replace('"', "\\\"")
        ),
        Style::Block => format!("|-\n{}{password}", " ".repeat(indent + 2)),
    }
}

fn styles() -> impl Strategy<Value = Style> {
    prop::sample::select(vec![
        Style::AsItIs,
        Style::Single,
        Style::Double,
        Style::Block,
    ])
}

fn keys() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec![
        "password",
        "Password",
        "trustStorePassword",
        "redis-password",
        "client_secret",
        "accessToken",
        "aes-key-value",
    ])
}

proptest! {
    #[test]
    fn no_password_survives(
        units in prop::collection::vec((passwords(), styles(), keys(), "[a-z_]{1,8}"), 1..5),
        url in passwords(),
        users in prop::collection::vec((passwords(), styles()), 0..4),
    ) {
        let mut database = String::from("databaseName: bank\ndataSources:\n");
        let mut cores = Vec::new();
        let core = |password: &str| {
            let at = password.find("Qz").unwrap();
            password[at..at + 8].to_owned()
        };
        for (password, style, key, name) in &units {
            cores.push(core(password));
            let value = written(password, *style, 4);
            writeln!(database, "  {name}:\n    {key}: {value}\n    username: app").unwrap();
        }
        // In a URL an ampersand is written otherwise.
        let url = url.replace('&', "%26");
        cores.push(core(&url));
        writeln!(database, "    url: jdbc:postgresql://h:5432/d?password={url}&user=app").unwrap();
        let mut rules = String::from("rules:\n- !AUTHORITY\n  users:\n");
        for (password, style) in &users {
            cores.push(core(password));
            let value = written(password, *style, 4);
            writeln!(rules, "  - user: u@%\n    password: {value}\n    admin: true").unwrap();
        }
        let document = json!({"meta_data": {"databases": {"bank": database}, "props": "", "rules": rules}});
        let export = export(&document);
        let redacted = export.redacted();
        for core in &cores {
            prop_assert!(!redacted.document.contains(core.as_str()), "{core} in {}", redacted.document);
        }
        let (without, secrets) = export.split();
        prop_assert_eq!(filled(&without, &secrets), document);
        prop_assert_eq!(redacted.document.matches("username: app").count(), units.len());
        prop_assert_eq!(redacted.document.matches("admin: true").count(), users.len());
    }

    #[test]
    fn any_text_is_taken_and_given_back(text in "[ -~\n]{0,200}") {
        let (_, secrets) = yaml(&text);
        prop_assert!(secrets.all.len() <= 200);
    }

    #[test]
    fn words_of_secrets_at_any_place(text in "((password|token|url|a|-|:|'|\"| |\n|=|&|@|//|\\{|\\}|x1)){0,40}") {
        yaml(&text);
    }
}
