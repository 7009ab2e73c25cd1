//! EXPORT and IMPORT.

use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use support::raw::Raw;
use support::real_proxy::PASSWORD;

use crate::farm::{Farm, ok, refused};

/// What EXPORT METADATA tells, and in base64.
pub(crate) async fn exported(session: &mut Raw) -> (Value, String) {
    let reply = ok(session, "EXPORT METADATA").await;
    assert_eq!(reply.columns(), ["id", "create_time", "cluster_info"]);
    let text = reply.rows()[0][2].clone().expect("a document");
    assert!(!text.contains('\n'), "one line");
    let json = STANDARD.decode(&text).expect("base64");
    (serde_json::from_slice(&json).expect("JSON"), text)
}

pub(crate) async fn export(farm: &mut Farm) {
    for i in 0..2 {
        let (document, _) = exported(&mut farm.postgres(i).await).await;
        let bank = document["meta_data"]["databases"]["bank"]
            .as_str()
            .expect("text");
        assert!(bank.starts_with("databaseName: bank\n"), "{bank}");
        for number in 0..2 {
            let port = farm.nodes[number].port();
            let url = format!("jdbc:postgresql://127.0.0.1:{port}/bank_{number}");
            assert!(bank.contains(&url), "{bank}");
        }
        // In clear, and unquoted.
        assert!(bank.contains("password: node-secret\n"), "{bank}");
        assert!(bank.contains("!SHARDING"), "{bank}");
        let rules = document["meta_data"]["rules"].as_str().expect("text");
        assert!(
            rules.contains(&format!("password: {PASSWORD}\n")) && rules.contains("user: root@%\n"),
            "{rules}"
        );
        assert!(
            rules.contains("- !GLOBAL_CLOCK\n  enabled: false\n"),
            "{rules}"
        );
        assert!(
            rules.contains("- !TRANSACTION\n  defaultType: LOCAL\n"),
            "{rules}"
        );
        let props = document["meta_data"]["props"].as_str().expect("text");
        assert!(
            props.contains("proxy-frontend-database-protocol-type: "),
            "{props}"
        );
        assert!(document.get("snapshot_info").is_none(), "{document}");
    }
}

pub(crate) async fn export_storage_nodes(farm: &mut Farm) {
    let mut session = farm.postgres(1).await;
    for sql in ["EXPORT STORAGE NODES", "EXPORT STORAGE NODES FROM bank"] {
        let reply = ok(&mut session, sql).await;
        assert_eq!(reply.columns(), ["id", "create_time", "storage_nodes"]);
        let document: Value =
            serde_json::from_str(reply.rows()[0][2].as_ref().unwrap()).expect("JSON, not base64");
        let nodes = document["storage_nodes"]["bank"]
            .as_array()
            .expect("a list");
        assert_eq!(nodes.len(), 2, "{document}");
        for number in 0..2 {
            let database = format!("bank_{number}");
            let node = nodes
                .iter()
                .find(|node| node["database"] == *database)
                .expect("the node");
            let port = farm.nodes[number].port().to_string();
            assert_eq!(node["ip"], "127.0.0.1");
            assert_eq!(node["port"], *port);
            assert_eq!(
                (&node["username"], &node["password"]),
                (&Value::from("postgres"), &Value::from("node-secret"))
            );
        }
    }
    let (code, text) = refused(&mut session, "EXPORT STORAGE NODES FROM nosuchdb").await;
    assert_eq!(code, "58000");
    assert!(
        text.contains("java.lang.IllegalArgumentException: database nosuchdb is not existed"),
        "{text}"
    );
}

/// Even an empty one.
pub(crate) async fn import_of_what_is_there(farm: &mut Farm) {
    let mut session = farm.postgres(0).await;
    let (_, text) = exported(&mut session).await;
    let (code, text) = refused(&mut session, &format!("IMPORT METADATA '{text}'")).await;
    assert_eq!(
        (code.as_str(), text.as_str()),
        ("42P04", "Database 'bank' already exists")
    );
    ok(&mut farm.bank(0).await, "SELECT count(*) FROM account").await;
}

pub(crate) async fn import_of_nonsense(farm: &mut Farm) {
    let (code, text) = refused(&mut farm.postgres(0).await, "IMPORT METADATA 'xxx'").await;
    assert_eq!(code, "58000");
    assert!(
        text.contains("com.fasterxml.jackson.core.JsonParseException"),
        "{text}"
    );
}

/// Before anything is kept of it; the database is not there afterwards.
pub(crate) async fn import_tries_the_storage_units(farm: &mut Farm) {
    let mut session = farm.postgres(0).await;
    let (document, text) = exported(&mut session).await;
    let wrong = document
        .to_string()
        .replace("password: node-secret", "password: nobody-s");
    ok(&mut session, "DROP DATABASE bank").await;
    until_forgotten(farm).await;
    let (code, why) = import(&mut session, &wrong)
        .await
        .expect_err("a wrong password");
    assert_eq!(code, "08000", "{why}");
    let says = "Storage units validate error, messages are: Storage unit name: 'ds_";
    assert!(why.starts_with(says), "{why}");
    assert!(why.contains("password authentication failed"), "{why}");
    until_forgotten(farm).await;
    brought_back(farm, &text).await;
}

/// Waits until the first proxy lets nobody into the database. Another one may miss a DROP.
async fn until_forgotten(farm: &Farm) {
    let begun = Instant::now();
    while let Ok(Ok(_)) = Raw::log_in(&farm.log_in(0, "bank")).await {
        assert!(begun.elapsed() < Duration::from_secs(30), "it is there");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// How a database comes back: DROP, IMPORT until it takes, REFRESH, and a look through every proxy. One that has missed it is
/// started again.
pub(crate) async fn drop_import_refresh(farm: &mut Farm) {
    let (_, text) = exported(&mut farm.postgres(0).await).await;
    ok(&mut farm.postgres(0).await, "DROP DATABASE bank").await;
    brought_back(farm, &text).await;
}

/// All properties of the cluster are replaced by those of the document; and without the one that names the protocol no database can be
/// imported any more.
pub(crate) async fn import_replaces_the_properties(farm: &mut Farm) {
    let mut session = farm.postgres(0).await;
    let (mut document, text) = exported(&mut session).await;
    let metadata = &mut document["meta_data"];
    let props = metadata["props"].take();
    assert!(
        props.as_str().is_some_and(|props| props.contains(PROTOCOL)),
        "{props}"
    );
    (metadata["props"], metadata["rules"]) = ("".into(), "".into());
    let without = document.to_string();
    let of_nothing = json!({"meta_data": {"databases": {}, "props": "", "rules": ""}}).to_string();
    import(&mut session, &of_nothing).await.unwrap();
    until_properties(farm, |props| !props.contains(PROTOCOL)).await;
    ok(&mut session, "DROP DATABASE bank").await;
    for _ in 0..5 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let refused = import(&mut session, &without).await;
        let _ = session.query("DROP DATABASE bank").await.unwrap();
        let (code, why) = refused.expect_err("it took");
        println!("  {code} {why}");
        assert!(why.contains("java.lang.NullPointerException"), "{why}");
        assert!(why.contains("getSchema(String)"), "{why}");
    }
    let set = "SET DIST VARIABLE proxy_frontend_database_protocol_type = 'PostgreSQL'";
    ok(&mut session, set).await;
    until_properties(farm, |props| props.contains(PROTOCOL)).await;
    brought_back(farm, &text).await;
    until_properties(farm, |now| {
        sorted(now) == sorted(props.as_str().expect("text"))
    })
    .await;
}

fn sorted(text: &str) -> Vec<&str> {
    let mut lines: Vec<_> = text.lines().collect();
    lines.sort_unstable();
    lines
}

const PROTOCOL: &str = "proxy-frontend-database-protocol-type: ";

/// IMPORT of a document. What it is refused with.
async fn import(session: &mut Raw, document: &str) -> Result<(), (String, String)> {
    let sql = format!("IMPORT METADATA '{}'", STANDARD.encode(document));
    let reply = session.query(&sql).await.expect("an answer");
    match reply.error() {
        None => Ok(()),
        Some((code, text)) => Err((code.to_owned(), text.to_owned())),
    }
}

/// Waits until every proxy has such properties.
async fn until_properties(farm: &Farm, are_such: impl Fn(&str) -> bool) {
    let begun = Instant::now();
    for i in 0..2 {
        loop {
            let (document, _) = exported(&mut farm.postgres(i).await).await;
            let props = document["meta_data"]["props"].as_str().expect("text");
            if are_such(props) {
                break;
            }
            assert!(
                begun.elapsed() < Duration::from_secs(30),
                "proxy {i}: {props}"
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

/// IMPORT until it takes, and all that follows.
async fn brought_back(farm: &mut Farm, text: &str) {
    let mut session = farm.postgres(0).await;
    let begun = Instant::now();
    let mut tries = 0;
    loop {
        tries += 1;
        let reply = session
            .query(&format!("IMPORT METADATA '{text}'"))
            .await
            .unwrap();
        let Some((code, text)) = reply.error() else {
            break;
        };
        println!(
            "  try {tries}: {code} {}",
            text.lines().last().unwrap_or_default()
        );
        assert!(
            tries < 40 && begun.elapsed() < Duration::from_mins(3),
            "IMPORT never took"
        );
        // It may have left an empty database.
        let _ = session.query("DROP DATABASE bank").await.unwrap();
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    println!("  IMPORT took at try {tries}");
    assert_eq!(
        ok(&mut session, "REFRESH DATABASE METADATA bank")
            .await
            .tags(),
        ["SUCCESS"]
    );
    for i in 0..2 {
        if !counts(farm, i).await {
            println!("  proxy {i} has missed it");
            farm.restart(i).await;
            assert!(counts(farm, i).await, "proxy {i}");
        }
    }
}

async fn counts(farm: &Farm, i: usize) -> bool {
    let until = Instant::now() + Duration::from_secs(10);
    while Instant::now() < until {
        if let Ok(Ok(mut session)) = Raw::log_in(&farm.log_in(i, "bank")).await {
            let reply = session.query("SELECT count(*) FROM account").await.unwrap();
            if reply.value() == Some("8") {
                return true;
            }
            println!("  proxy {i}: {:?}", reply.error());
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    false
}
