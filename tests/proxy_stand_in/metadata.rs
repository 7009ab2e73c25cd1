//! EXPORT and IMPORT, databases, storage units.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use support::proxy::{Clock, ClusterState, ProxyFarm, ProxyFarmOptions};
use tokio_postgres::Client;

use super::bank::*;

async fn export(client: &Client) -> Value {
    let rows = run(client, "EXPORT METADATA").await;
    assert_eq!(rows[0].len(), 3);
    assert!(!rows[0][2].contains('\n'), "one line");
    serde_json::from_slice(&STANDARD.decode(&rows[0][2]).unwrap()).unwrap()
}

fn import(document: &Value) -> String {
    format!(
        "IMPORT METADATA '{}'",
        STANDARD.encode(document.to_string())
    )
}

#[tokio::test]
async fn exports_have_the_passwords_in_clear() {
    let nodes = Nodes::start(2).await;
    let farm = ProxyFarm::start(ProxyFarmOptions {
        clock: Clock::TsoRedis,
        ..nodes.options()
    });
    let client = client_in(&farm, 0, "postgres").await;
    let document = export(&client).await;
    let bank = document["meta_data"]["databases"]["bank"].as_str().unwrap();
    assert!(bank.starts_with("databaseName: bank\ndataSources:\n  ds_0:\n"));
    assert!(bank.contains(&format!("    password: {PASSWORD}\n")));
    let rules = document["meta_data"]["rules"].as_str().unwrap();
    assert!(rules.contains("    password: root\n    user: root@%\n"));
    assert_eq!(document["snapshot_info"]["csn"], farm.csn().to_string());
    let rows = run(&client, "EXPORT STORAGE NODES").await;
    let exported: Value = serde_json::from_str(&rows[0][2]).unwrap();
    let listed = exported["storage_nodes"]["bank"].as_array().unwrap();
    assert_eq!(listed.len(), 2);
    assert_eq!(listed[1]["port"], nodes.clusters[1].port().to_string());
    assert_eq!(listed[1]["password"], PASSWORD);
    let units = run(&client, "SHOW STORAGE UNITS FROM bank").await;
    assert_eq!(
        units[1][..5].join(" "),
        format!(
            "ds_1 PostgreSQL 127.0.0.1 {} bank_1",
            nodes.clusters[1].port()
        )
    );
    assert!(!format!("{units:?}").contains(PASSWORD));
    assert!(run(&client, "SHOW STORAGE UNITS").await.is_empty());
    assert_eq!(
        refused(&client, "SHOW STORAGE UNITS FROM nosuch").await.0,
        "3D000"
    );
}

#[tokio::test]
async fn import_fails_in_its_ways_until_it_takes() {
    let nodes = Nodes::start(1).await;
    let farm = ProxyFarm::start(nodes.options());
    let outside = client_in(&farm, 0, "postgres").await;
    run(
        &client(&farm, 1).await,
        "INSERT INTO account VALUES (1, 7), (2, 8)",
    )
    .await;
    let mut document = export(&outside).await;
    let rules = document["meta_data"]["rules"].as_str().unwrap();
    document["meta_data"]["rules"] = rules.replace("password: root", "password: other").into();
    let bank = document["meta_data"]["databases"]["bank"].as_str().unwrap();
    document["meta_data"]["databases"]["bank"] =
        bank.replace(PASSWORD, &format!("'{PASSWORD}'")).into();
    let import = import(&document);
    let there = (
        "42P04".to_owned(),
        "Database 'bank' already exists".to_owned(),
    );
    let inside = client(&farm, 0).await;
    assert_eq!(refused(&outside, &import).await, there);
    // Though it was refused, the users' passwords are those of the document now.
    let old = config(&farm, 0, "bank")
        .connect(tokio_postgres::NoTls)
        .await;
    assert!(old.is_err());
    let current = refused(&inside, "DROP DATABASE bank").await;
    assert!(
        current
            .1
            .ends_with("cannot drop the currently open database")
    );
    run(&outside, "DROP DATABASE bank").await;
    // It fails, and leaves an empty database.
    let (state, message) = refused(&outside, &import).await;
    assert!(
        state == "58000" && message.contains("NullPointerException"),
        "{message}"
    );
    assert!(message.contains("getResourceMetaData()"), "{message}");
    assert_eq!(refused(&outside, &import).await, there);
    run(&outside, "DROP DATABASE bank").await;
    run(&outside, &import).await;
    let inside = |i: usize| {
        let mut config = config(&farm, i, "bank");
        config.password("other");
        async move {
            let (client, connection) = config.connect(tokio_postgres::NoTls).await.unwrap();
            tokio::spawn(connection);
            client
        }
    };
    let sql = "SELECT id, balance FROM account ORDER BY id";
    for i in 0..2 {
        assert_eq!(run(&inside(i).await, sql).await, [["1", "7"], ["2", "8"]]);
    }
    // But a proxy that starts does not find the tables.
    farm.restart(1);
    let lost = (
        "42S02".to_owned(),
        "Table or view 'account' does not exist.".to_owned(),
    );
    assert_eq!(refused(&inside(1).await, sql).await, lost);
    run(&inside(0).await, "REFRESH DATABASE METADATA bank").await;
    assert_eq!(run(&inside(1).await, sql).await, [["1", "7"], ["2", "8"]]);
    farm.restart(1);
    assert_eq!(run(&inside(1).await, sql).await, [["1", "7"], ["2", "8"]]);
}

#[tokio::test]
async fn import_damages_unquoted_passwords_and_needs_its_nodes() {
    let nodes = Nodes::start(1).await;
    let farm = ProxyFarm::start(nodes.options());
    let client = client_in(&farm, 0, "postgres").await;
    let document = export(&client).await;
    let bank = document["meta_data"]["databases"]["bank"]
        .as_str()
        .unwrap()
        .to_owned();
    let named = |name: &str, password: &str| {
        let mut document = document.clone();
        let text = bank.replace("databaseName: bank", &format!("databaseName: {name}"));
        let text = text.replace(PASSWORD, password);
        document["meta_data"]["databases"] = serde_json::json!({ name: text });
        import(&document)
    };
    let (_, message) = refused(&client, &named("b1", "a: b")).await;
    assert!(
        message.contains("mapping values are not allowed here"),
        "{message}"
    );
    // It is read as 83, with which no node lets anybody in.
    let (_, message) = refused(&client, &named("b2", "0123")).await;
    assert!(
        message.starts_with("Storage units validate error"),
        "{message}"
    );
    run(&client, &named("b3", PASSWORD)).await;
    farm.force_state(ClusterState::Unavailable);
    assert!(
        refused(&client, &named("b4", PASSWORD))
            .await
            .1
            .contains("NullPointerException")
    );
    let (_, message) = refused(&client, "IMPORT METADATA 'xxx'").await;
    assert!(message.contains("JsonParseException"), "{message}");
}

#[tokio::test]
async fn a_database_is_made_by_statements() {
    let nodes = Nodes::start(2).await;
    let farm = ProxyFarm::start(ProxyFarmOptions {
        nodes: Vec::new(),
        database: "other".to_owned(),
        ..nodes.options()
    });
    let outside = client_in(&farm, 0, "postgres").await;
    run(&outside, "CREATE DATABASE bank").await;
    assert_eq!(refused(&outside, "CREATE DATABASE bank").await.0, "42P04");
    let inside = client(&farm, 0).await;
    let none = "There is no storage unit in database 'bank'.";
    assert_eq!(
        refused(&inside, "SELECT 1").await,
        ("42S02".into(), none.into())
    );
    let unit = |number: usize| {
        let port = nodes.clusters[number].port();
        format!(
            "ds_{number} (URL=\"jdbc:postgresql://127.0.0.1:{port}/bank_{number}\", USER=\"postgres\", PASSWORD=\"{PASSWORD}\")"
        )
    };
    run(
        &inside,
        &format!("REGISTER STORAGE UNIT {}, {}", unit(0), unit(1)),
    )
    .await;
    let rule = "CREATE SHARDING TABLE RULE ledger (STORAGE_UNITS(ds_0, ds_1), SHARDING_COLUMN=entry, \
                TYPE(NAME=\"mod\", PROPERTIES(\"sharding-count\"=\"2\")))";
    run(&inside, rule).await;
    let other = client(&farm, 1).await;
    run(&other, "CREATE TABLE ledger (amount bigint, entry bigint)").await;
    run(
        &other,
        "INSERT INTO ledger (amount, entry) VALUES (5, 3), (6, 4)",
    )
    .await;
    assert_eq!(nodes.ask(0, "SELECT amount FROM ledger").await, "6");
    assert_eq!(nodes.ask(1, "SELECT amount FROM ledger").await, "5");
    let sql = "ALTER TRANSACTION RULE(DEFAULT=\"XA\", TYPE(NAME=\"Atomikos\"))";
    run(&inside, sql).await;
    assert_eq!(run(&inside, "SHOW TRANSACTION RULE").await[0][0], "XA");
}

#[tokio::test]
async fn tables_that_are_not_there_are_refused_by_the_proxy() {
    let nodes = Nodes::start(1).await;
    let farm = ProxyFarm::start(nodes.options());
    let client = client(&farm, 0).await;
    let none = (
        "42S02".to_owned(),
        "Table or view 'later' does not exist.".to_owned(),
    );
    run(&client, "BEGIN").await;
    assert_eq!(refused(&client, "INSERT INTO later VALUES (1)").await, none);
    // Which leaves the transaction as it was.
    run(&client, "CREATE TABLE later (id bigint)").await;
    run(&client, "INSERT INTO later VALUES (1), (2)").await;
    run(&client, "COMMIT").await;
    let other = super::bank::client(&farm, 1).await;
    assert_eq!(run(&other, "SELECT count(*) FROM later").await, [["2"]]);
}

#[tokio::test]
async fn set_is_answered_by_the_proxy() {
    let farm = ProxyFarm::start(ProxyFarmOptions::default());
    let client = client_in(&farm, 0, "postgres").await;
    run(&client, "SET application_name = 'x'").await;
    run(&client, "SET SESSION x TO 1").await;
    assert_eq!(run(&client, "SHOW server_version").await, [["5.5.2"]]);
    assert_eq!(refused(&client, "fly me to the moon").await.0, "99999");
}
